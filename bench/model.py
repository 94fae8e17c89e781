"""Section ``model``: whole decoder layers of a Llama with LoRA on every linear, a training step and a step of generation; and of a
Qwen3-MoE with LoRA on its attention and its stacks of experts, a training step.

linear   the frozen model: the floor; training, its step has a gradient for the first layer's input alone
peft     PEFT's model, its adapters in the base's dtype; generation: a batch by ``adapter_names``
fused    the same after `lora_kernels.integrations.peft.fuse`
shared   training: and after `share_inputs`
gates    training: and after `recompute_gates`
slots    generation: `MultiLoRALinear` layers inside `use_adapters`

Random weights, no embedding and no head; a step of generation has one token a sequence and nothing before it, so that what is timed is
the layers, with all that Python does around them. Before an arm is timed, its results are held against the same model in a wider dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lora_kernels import LoRAConfig, Segments, apply_lora, recompute_gates, share_inputs, use_adapters, use_segments

from .conditions import Recorder
from .memory import peak_of, saved_by
from .session import Budget, Session, lacks, say
from .table import rounded, significant, text_table
from .timing import Step, Times, clock_for, graphed, interleave, message
from .workloads import Point

SHAPES = {
    "8B": (4096, 14336, 32, 8, 32),
    "1B": (2048, 8192, 32, 8, 16),
    "tiny": (32, 48, 4, 2, 2),
}  # hidden, MLP, heads, of k and v, layers
MIXTURES = {
    "30B-A3B": (2048, 768, 32, 4, 48, 128, 8),
    "1B-A400M": (1024, 512, 16, 8, 24, 32, 8),
    "tiny mixture": (32, 16, 4, 2, 2, 6, 2),
}  # and experts, of which a token has so many; the second are the sizes of Granite 3.1, in Qwen3's layers
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LENGTH = 2048  # tokens a sequence in training, at most
NEEDS = ("peft", "transformers")
ARMS = ("linear", "peft", "fused", "shared", "gates", "slots")
Arms = dict[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class ModelPoint(Point):
    """M tokens; N is the MLP's width. ``built``: as many of the layers of ``shape``. ``adapters``: how many generation names, in turn."""

    shape: str = "8B"
    built: int = 4
    adapters: int = 1

    @property
    def sequences(self) -> int:
        return self.M if self.forward_alone else max(1, self.M // LENGTH)

    def fields(self) -> dict:
        return super().fields() | {"adapters": self.adapters}

    def ids(self) -> list[int]:
        """Each sequence's adapter."""
        return [i % self.adapters for i in range(self.sequences)]

    def names(self) -> list[str]:
        """As PEFT names them."""
        return [f"adapter{i}" for i in self.ids()]


def grid(cuda: bool, quick: bool) -> list[ModelPoint]:
    """Training with dropout and without (PEFT takes none on stacks), then generation with one adapter and with one for each sequence."""
    dtype = torch.bfloat16 if cuda and not quick else torch.float32
    shapes, built, tokens, few, mixture = (("8B", "1B"), 4, 8192, 16, "30B-A3B") if cuda else (("1B",), 1, 512, 8, "1B-A400M")
    if quick:
        shapes, built, tokens, few, mixture = ("tiny",), 1, 16, 3, "tiny mixture"

    def point(grid: str, shape: str, M: int, p: float, adapters: int) -> ModelPoint:
        hidden, mlp, _, _, layers, *_ = SHAPES.get(shape) or MIXTURES[shape]
        return ModelPoint(grid, f"{shape}, {built} of {layers} layers", M, hidden, mlp, 16, p, dtype, shape, built, adapters)

    return [
        *(point("train", shape, tokens, p, 1) for shape in shapes for p in (0.0, 0.1)),
        point("train", mixture, tokens, 0.0, 1),
        *(point("decode", shape, few, 0.0, adapters) for shape in shapes for adapters in (few, 1)),
    ]


def run(session: Session) -> int:
    """Writes a row for each point, arm and pass; returns the number of arms that failed."""
    recorder = session.recorder("model")
    if lacks(recorder, "model", NEEDS):
        return 0
    cuda = session.device.type == "cuda"
    clocks = [clock_for(session.device, launch) for launch in (("eager", "graph") if cuda else ("host",))]
    budget, table = Budget(session.seconds), []
    for point in budget.walk(grid(cuda, session.quick)):
        arms = build(point, session.device, point.dtype)
        for name, error in wrong(point, arms, session.device).items():
            recorder.add(**point.fields(), arm=name, launch="check", error=error)
            del arms[name]
        for clock in clocks if point.forward_alone else clocks[:1]:
            times = _time(session, recorder, point, arms, clock)
            last = "forward" if point.forward_alone else "both"
            cells = [significant(times[arm][last].p50) if arm in times else "" for arm in ARMS]
            table.append([f"{point.grid}, {clock.launch}, {point.layer}, M={point.M}, {point.adapters} adapters, p={point.p:g}", *cells])
    budget.record(recorder)
    failed = [row for row in recorder.rows if row["error"]]
    for row in failed:
        say(f"model FAILED {row['grid']} {row['layer']} {row['arm']}: {row['error']}")
    print(text_table(["model, ms", *ARMS], table), flush=True)
    return len(failed)


def _time(session: Session, recorder: Recorder, point: ModelPoint, arms: Arms, clock) -> dict[str, dict[str, Times]]:
    """The arms' rows, for one way of launching, and their times."""
    x, dy = inputs(point, session.device, point.dtype)
    steps, kept, failed = {}, {}, {}
    for name in arms.keys() & {"linear", "slots"} if clock.launch == "graph" else arms:
        try:
            kept[name] = {} if point.forward_alone else _memory(arms[name], x, dy)
            step = _step(point, arms[name], x, dy)
            steps[name] = graphed(step) if clock.launch == "graph" else step
        except Exception as error:  # one arm's failure is a row of its own
            failed[name] = message(error)
    seconds = 0.1 if session.quick else 60.0 if clock.launch == "host" else 4.0
    times, errors = interleave(steps, clock, seconds=seconds, least=3 if session.quick else 5)
    for name, error in (failed | errors).items():
        recorder.add(**point.fields(), arm=name, launch=clock.launch, error=error)
    for name, passes in times.items():
        for what, t in passes.items():
            over = rounded(t.p50 / times["linear"][what].p50) if "linear" in times else None
            memory = kept[name] if what == "both" else {}
            recorder.add(**point.fields(), what=what, arm=name, launch=clock.launch, ms=t.ms(), rounds=t.rounds, over_linear=over, **memory)
    return times


def inputs(point: ModelPoint, device: torch.device, dtype: torch.dtype, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer is given, and the last one's gradient, rounded to the point's dtype; ``tokens`` a sequence."""
    generator = torch.Generator(device).manual_seed(1)
    shape = point.sequences, tokens or point.M // point.sequences, point.K
    x, dy = (torch.randn(shape, generator=generator, device=device).to(point.dtype).to(dtype) for _ in range(2))
    return x.requires_grad_(not point.forward_alone), dy


def build(point: ModelPoint, device: torch.device, dtype: torch.dtype) -> Arms:
    """The arms, on the same frozen weights and adapters, in training mode but for generation."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    from .llama import fused

    torch.manual_seed(0)
    targets = dict(target_modules=ATTENTION, target_parameters=STACKS) if point.shape in MIXTURES else dict(target_modules="all-linear")
    with torch.device(device):
        base = _base(point).to(point.dtype).to(dtype).requires_grad_(False)
        if dtype is torch.float64:
            base.config._experts_implementation = "eager"  # torch's grouped products take no float64

        def again() -> nn.Module:  # the same weights, not copies of them
            return copy.deepcopy(base, {id(p): p for p in base.parameters()})

        config = LoraConfig(r=point.r, lora_alpha=2 * point.r, lora_dropout=point.p, init_lora_weights=False, **targets)
        peft = get_peft_model(again(), config, adapter_name="adapter0", autocast_adapter_dtype=False)
        for i in range(1, point.adapters):
            peft.add_adapter(f"adapter{i}", config, autocast_adapter_dtype=False)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(point.dtype).to(dtype)
    alone = fused(peft, shared=peft.parameters())
    if point.shape in MIXTURES:
        if device.type == "cpu":  # transformers' quicker way there; of PEFT's model grouped products, which it takes by default, are
            base.config._experts_implementation = "eager"
        return {name: partial(_hidden, model.train()) for name, model in dict(linear=base, peft=peft, fused=alone).items()}
    if not point.forward_alone:
        together, gates = (fused(peft, shared=peft.parameters()) for _ in range(2))
        for model in (together, gates):
            share_inputs(model)
        recompute_gates(gates)
        models = dict(linear=base, peft=peft, fused=alone, shared=together, gates=gates)
        return {name: partial(_hidden, model.train()) for name, model in models.items()}
    slots = again()
    apply_lora(slots, LoRAConfig(target_modules="all-linear", r=point.r), num_adapters=point.adapters, adapter_dtype=dtype)
    for name, layer in peft.base_model.model.named_modules():
        for i in range(point.adapters if isinstance(layer, Linear) else 0):
            own = f"adapter{i}"
            A, B = layer.lora_A[own].weight, layer.lora_B[own].weight
            slots.get_submodule(name).load_adapter(i, A, B, layer.scaling[own])
    names, ids = point.names(), point.ids()
    for model in (base, peft, alone, slots):
        model.eval()
    return {
        "linear": partial(_hidden, base),
        "peft": partial(_hidden, peft, adapter_names=names),
        "fused": partial(_hidden, alone, adapter_names=names),
        "slots": partial(_served, slots, ids, torch.tensor(ids, device=device), point.adapters),
    }


def _base(point: ModelPoint) -> nn.Module:
    """Its layers, of random weights."""
    from transformers import LlamaConfig, LlamaModel, Qwen3MoeConfig, Qwen3MoeModel

    hidden, mlp, heads, kv_heads, _, *mixture = SHAPES.get(point.shape) or MIXTURES[point.shape]
    sizes = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=point.built)
    sizes |= dict(vocab_size=8, use_cache=False)
    if not mixture:
        return LlamaModel(LlamaConfig(**sizes, intermediate_size=mlp))
    experts = dict(moe_intermediate_size=mlp, num_experts=mixture[0], num_experts_per_tok=mixture[1], head_dim=hidden // heads)
    return Qwen3MoeModel(Qwen3MoeConfig(**sizes, **experts))


def _hidden(model: nn.Module, x: torch.Tensor, **how) -> torch.Tensor:
    return model(inputs_embeds=x, **how).last_hidden_state


def _served(model: nn.Module, ids: list[int], on_device: torch.Tensor, slots: int, x: torch.Tensor) -> torch.Tensor:
    """By sequence, or where a CUDA graph is captured by a plan that is part of it."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        with use_segments(model, Segments.from_ids(on_device, slots, validate=False)):
            return _hidden(model, x)
    with use_adapters(model, ids):
        return _hidden(model, x)


def _step(point: ModelPoint, arm: Callable, x: torch.Tensor, dy: torch.Tensor) -> Step:
    if point.forward_alone:
        return Step(torch.no_grad()(partial(arm, x)))
    return Step(partial(arm, x), lambda y: torch.autograd.grad(y, _leaves(arm, x), dy))


def _leaves(arm, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(p for p in arm.args[0].parameters() if p.requires_grad)]


def _memory(arm: Callable, x: torch.Tensor, dy: torch.Tensor) -> dict:
    """Bytes kept for backward, parameters not counted, and on a GPU the peak of a step above what was in use."""
    saved = saved_by(lambda: arm(x), arm.args[0].parameters())  # type: ignore[attr-defined]
    return dict(saved_bytes=saved, peak_bytes=peak_of(lambda: torch.autograd.grad(arm(x), _leaves(arm, x), dy), x.device))


def results(point: ModelPoint, arm: Callable, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The last layer's output for few tokens without dropout; training, the gradients of the input and of the adapters, too."""
    x, dy = inputs(point, device, dtype, tokens=min(16, point.M // point.sequences))
    if point.forward_alone:
        with torch.no_grad():
            return [arm(x)]
    model = arm.args[0].eval()
    y = arm(x)
    found = torch.autograd.grad(y, _leaves(arm, x), dy)
    model.train()
    return [y.detach(), *found]


def wrong(point: ModelPoint, arms: Arms, device: torch.device) -> dict[str, str]:
    """The arms that are further from a wider dtype's results than twice PEFT's distance, in the root mean square."""
    wide = torch.float64 if point.dtype is torch.float32 else torch.float32
    truth = results(point, build(point, device, wide)["peft"], device, wide)
    theirs = results(point, arms["peft"], device, point.dtype)
    found = {}
    for name in arms.keys() - {"linear", "peft"}:
        try:
            far = farther(results(point, arms[name], device, point.dtype), theirs, truth, point.dtype)
        except Exception as error:
            found[name] = message(error)
            continue
        if far:
            which, own, most = far
            found[name] = f"check: result {which} is {own:.3g} from the truth, wanted at most {most:.3g}"
    return found


def farther(ours: list, theirs: list, truth: list, dtype: torch.dtype) -> tuple[int, float, float] | None:
    """The first of our results that is further from the truth than twice PEFT's distance and a rounding to ``dtype``, in the root mean
    square: which it is, how far, and how far it may be.
    """
    for i, (own, their) in enumerate(zip(_distances(ours, truth), _distances(theirs, truth), strict=True)):
        most = 2 * their + torch.finfo(dtype).eps
        if not own <= most:
            return i, own, most
    return None


def _distances(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    """Relative, in the root mean square."""
    return [float((own.to(true.dtype) - true).norm() / true.norm()) for own, true in zip(found, truth, strict=True)]

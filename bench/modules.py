"""PEFT's own LoRA layer on a CPU, as it is and fused, in one run: ``python -m bench.modules --out bench/results/modules.jsonl``.

With DoRA it is a section of `bench.device`, too, ``dora``, of more tokens on a GPU.

linear   the frozen nn.Linear alone: the floor; with --kind qlora and qdora bitsandbytes' Linear4bit (NF4)
peft     peft.tuners.lora.Linear, or its Linear4bit; with --kind dora and qdora with a magnitude
beside   with --kind qlora: fused, the base product the layer's own, as for few tokens
fused    the same layer, after ``lora_kernels.integrations.peft.fuse``

A step is forward and backward with gradients for x, A and B. Bytes are what autograd saves for backward, parameters not counted, x counted;
on a GPU also the most that a step adds to the memory in use.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from . import workloads
from .conditions import Recorder, conditions, dtype_name
from .memory import peak_of, saved_by
from .model import farther
from .session import Budget, Session, lacks, say
from .table import rounded, text_table
from .timing import Step, clock_for, interleave, message
from .workloads import Point

CPU = torch.device("cpu")
KINDS = ("modules", "qlora", "dora", "qdora")


def peft_and_fused(K: int, N: int, r: int, p: float, base: torch.dtype, adapters: torch.dtype, kind="modules") -> dict[str, nn.Module]:
    """PEFT's layer around an nn.Linear, or one of 4 bits, with the same values: stock and fused, and beside its base; B is not zero."""
    from peft import LoraConfig, get_peft_model

    from lora_kernels.integrations.peft import fuse

    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["0"], init_lora_weights=False, use_dora="dora" in kind)
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=base))
    if kind in ("qlora", "qdora"):
        from bitsandbytes.nn import Linear4bit, Params4bit

        layer = Linear4bit(K, N, bias=False, compute_dtype=base, quant_type="nf4")
        layer.weight = Params4bit(model[0].weight.data, requires_grad=False, quant_type="nf4", module=layer)
        model = nn.Sequential(layer).to("cpu")
        model.is_loaded_in_4bit = True  # by which PEFT chooses its layer  # type: ignore[assignment]
    stock = get_peft_model(model, config, autocast_adapter_dtype=adapters == torch.float32)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    if report.left:
        raise RuntimeError(f"layer: wanted it fused, got {report}")
    layers = {"peft": stock.base_model.model[0], "fused": fused.base_model.model[0]}
    if kind == "qlora":
        layers["beside"] = copy.deepcopy(layers["fused"])
        layers["beside"].base_layer.register_forward_hook(lambda *args: None)  # which only the layer itself would call
    return layers


def steps(layers: dict[str, nn.Module], x: torch.Tensor, dy: torch.Tensor) -> dict[str, Step]:
    """A training step of each layer, by torch's autograd alone: no optimizer."""

    def step(layer: nn.Module) -> Step:
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return Step(lambda: layer(x), lambda y: torch.autograd.grad(y, trained, dy))

    return {name: step(layer) for name, layer in layers.items()}


def measure(recorder: Recorder, point: Point, adapters: torch.dtype, seconds: float, kind: str, device=CPU) -> None:
    """A row for each arm and pass of a point, with what the arm keeps for backward; an arm that fails, or is wrong, is raised."""
    layers = peft_and_fused(point.K, point.N, point.r, point.p, point.dtype, adapters, kind)
    layers = {name: layer.to(device) for name, layer in {"linear": layers["peft"].base_layer, **layers}.items()}
    x, dy = (torch.randn(point.M, size, dtype=point.dtype, device=device) for size in (point.K, point.N))
    x.requires_grad_()
    if device.type == "cuda":
        check(layers["peft"], layers["fused"], x[:512], dy[:512])
    saved = {name: saved_by(lambda layer=layer: layer(x), layer.parameters()) for name, layer in layers.items()}
    clock, taken = clock_for(device), steps(layers, x, dy)
    peaks = {name: peak_of(lambda step=step: step.backward(step.forward()), device) for name, step in taken.items()}
    times, errors = interleave(taken, clock, seconds=seconds, least=5, most=2000)
    for name, error in errors.items():
        raise RuntimeError(f"{point}: {name} failed: {error}")
    for name, passes in times.items():
        for what, t in passes.items():
            recorder.add(
                **point.fields(), adapter_dtype=dtype_name(adapters), what=what, arm=name, launch=clock.launch, ms=t.ms(),
                rounds=t.rounds, saved_bytes=saved[name] if what == "both" else None, peak_bytes=peaks[name] if what == "both" else None,
                over_linear=rounded(t.p50 / times["linear"][what].p50),
                speedup_over_peft=rounded(times["peft"][what].p50 / t.p50),
            )  # fmt: skip


def check(peft: nn.Module, fused: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """ValueError if y or a gradient without dropout is further from PEFT's in float32 than twice PEFT's own, in the root mean square."""
    wide = copy.deepcopy(peft).float().eval()
    found = []
    for layer, its_x, its_dy in ((wide, x.float(), dy.float()), (peft.eval(), x, dy), (fused.eval(), x, dy)):
        step = steps({"one": layer}, its_x.detach().requires_grad_(), its_dy)["one"]
        y = step.forward()
        found.append([y.detach(), *step.backward(y)])
        layer.train()
    truth, theirs, ours = found
    far = farther(ours, theirs, truth, x.dtype)
    if far:
        which, own, most = far
        raise ValueError(f"result {which}: wanted at most {most:.3g} from float32, as twice PEFT's, got {own:.3g}")


def many_tokens(cuda: bool, quick: bool) -> list[Point]:
    """Training in bfloat16, over 4 bits and with DoRA, with dropout and without."""
    if quick:
        layers, tokens = {"64->64": (64, 64)}, 1024
    elif cuda:
        layers, tokens = {"4096->4096": (4096, 4096), "4096->14336": (4096, 14336)}, 8192
    else:
        layers, tokens = {"1024->4096": (1024, 4096), "4096->4096": (4096, 4096)}, 2048
    return [
        p for drop in (0.0, 0.1) for p in workloads.train(layers, (tokens,), (16,), "train" if cuda else "cpu", (drop,), torch.bfloat16)
    ]


def points(quick: bool, kind: str) -> Iterator[tuple[Point, torch.dtype]]:
    """`bench.cpu`'s points, and on a 16-bit base both PEFT's default, float32 adapters, and 16 bits; or `many_tokens`."""
    if kind != "modules":
        yield from ((point, torch.float32) for point in many_tokens(False, quick))
        return
    for point in workloads.cpu_chain(quick):
        yield point, torch.float32
        if point.dtype != torch.float32:
            yield point, point.dtype


def summary(rows: list[dict]) -> str:
    """Medians of a step, PEFT's time over ours, and MiB kept."""
    both = [row for row in rows if row["what"] == "both"]
    names = list(dict.fromkeys(row["arm"] for row in both))
    lines = []
    for at in range(0, len(both), len(names)):
        arms = {row["arm"]: row for row in both[at : at + len(names)]}
        row = arms["fused"]
        name = f"{row['dtype']} adapters {row['adapter_dtype']} p={row['p']:g} {row['layer']} {row['M']} tokens"
        kept = [f"{arms[arm]['saved_bytes'] / 2**20:.2f}" for arm in ("peft", "fused")]
        lines.append([name, *(arms[arm]["ms"]["p50"] for arm in names), f"{row['speedup_over_peft']:.2f}", *kept, row["rounds"]])
    titles = ["PEFT" if name == "peft" else name for name in names]
    return text_table(["forward + backward, ms", *titles, "PEFT/fused", "PEFT, MiB", "fused, MiB", "rounds"], lines)


def run(session: Session) -> int:
    """The section ``dora``: writes a row for each point, arm and pass; returns the number of points that failed."""
    recorder = session.recorder("dora")
    if lacks(recorder, "dora", ("peft",)):
        return 0
    cuda, budget, failed = session.device.type == "cuda", Budget(session.seconds), 0
    for point in budget.walk(many_tokens(cuda, session.quick)):
        try:
            measure(recorder, point, torch.float32, 0.1 if session.quick else 1.5 if cuda else 9.0, "dora", session.device)
        except Exception as error:
            failed += 1
            recorder.add(**point.fields(), what="both", arm="fused", error=message(error))
            say(f"dora FAILED {point}: {message(error)}")
    budget.record(recorder)
    timed = [row for row in recorder.rows if row["ms"]]
    if timed:
        print(summary(timed), flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.modules", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--seconds", type=float, default=9.0, help="time for the rounds of a point, at least 5 of them (default 9)")
    parser.add_argument("--quick", action="store_true", help="one small layer: to see that it runs")
    parser.add_argument("--kind", choices=KINDS, default="modules", help="plain layers, 4 bits (NF4), DoRA, or both")
    args = parser.parse_args(argv)
    recorder = Recorder(args.out, args.kind, conditions(torch.device("cpu")))
    found = list(points(args.quick, args.kind))
    for i, (point, adapters) in enumerate(found, 1):
        say(f"modules {i}/{len(found)} {point}, adapters {dtype_name(adapters)}")
        measure(recorder, point, adapters, args.seconds, args.kind)
    print(summary(recorder.rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

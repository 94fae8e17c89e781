"""PEFT's own LoRA layer on a CPU, as it is and fused, in one run: ``python -m bench.modules --out bench/results/modules.jsonl``.

linear   the frozen nn.Linear alone: the floor
peft     peft.tuners.lora.Linear
fused    the same layer, after ``lora_kernels.integrations.peft.fuse``

A step is forward and backward with gradients for x, A and B. Bytes are what autograd saves for backward, parameters not counted, x counted.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.integrations.peft import fuse

from . import workloads
from .conditions import Recorder, conditions, dtype_name
from .memory import saved_by
from .session import say
from .table import rounded, text_table
from .timing import HostClock, Step, interleave
from .workloads import Point


def peft_and_fused(K: int, N: int, r: int, p: float, base: torch.dtype, adapters: torch.dtype) -> dict[str, nn.Module]:
    """PEFT's layer around an nn.Linear with the same values twice: stock and fused; B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["0"], init_lora_weights=False)
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=base))
    stock = get_peft_model(model, config, autocast_adapter_dtype=adapters == torch.float32)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    if report.left:
        raise RuntimeError(f"layer: wanted it fused, got {report}")
    return {"peft": stock.base_model.model[0], "fused": fused.base_model.model[0]}


def steps(layers: dict[str, nn.Module], x: torch.Tensor, dy: torch.Tensor) -> dict[str, Step]:
    """A training step of each layer, by torch's autograd alone: no optimizer."""

    def step(layer: nn.Module) -> Step:
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return Step(lambda: layer(x), lambda y: torch.autograd.grad(y, trained, dy))

    return {name: step(layer) for name, layer in layers.items()}


def measure(recorder: Recorder, point: Point, adapters: torch.dtype, seconds: float) -> None:
    """A row for each arm and pass of a point, with what the arm keeps for backward; an arm that fails is raised."""
    layers = peft_and_fused(point.K, point.N, point.r, point.p, point.dtype, adapters)
    layers = {"linear": layers["peft"].base_layer, **layers}
    x, dy = (torch.randn(point.M, size, dtype=point.dtype) for size in (point.K, point.N))
    x.requires_grad_()
    saved = {name: saved_by(lambda layer=layer: layer(x), layer.parameters()) for name, layer in layers.items()}
    times, errors = interleave(steps(layers, x, dy), HostClock(), seconds=seconds, least=5, most=2000)
    for name, error in errors.items():
        raise RuntimeError(f"{point}: {name} failed: {error}")
    for name, passes in times.items():
        for what, t in passes.items():
            recorder.add(
                **point.fields(), adapter_dtype=dtype_name(adapters), what=what, arm=name, launch=HostClock.launch, ms=t.ms(),
                rounds=t.rounds, saved_bytes=saved[name] if what == "both" else None,
                over_linear=rounded(t.p50 / times["linear"][what].p50),
                speedup_over_peft=rounded(times["peft"][what].p50 / t.p50),
            )  # fmt: skip


def points(quick: bool) -> Iterator[tuple[Point, torch.dtype]]:
    """`bench.cpu`'s points, and on a 16-bit base both what PEFT makes of the adapters by default, float32, and 16 bits."""
    for point in workloads.cpu_chain(quick):
        yield point, torch.float32
        if point.dtype != torch.float32:
            yield point, point.dtype


def summary(rows: list[dict]) -> str:
    """Medians of a step, PEFT's time over ours, and MiB kept."""
    both = [row for row in rows if row["what"] == "both"]
    lines = []
    for at in range(0, len(both), 3):
        arms = {row["arm"]: row for row in both[at : at + 3]}
        row = arms["fused"]
        name = f"{row['dtype']} adapters {row['adapter_dtype']} p={row['p']:g} {row['layer']} {row['M']} tokens"
        kept = [f"{arms[arm]['saved_bytes'] / 2**20:.2f}" for arm in ("peft", "fused")]
        lines.append([name, *(arms[arm]["ms"]["p50"] for arm in arms), f"{row['speedup_over_peft']:.2f}", *kept, row["rounds"]])
    return text_table(["forward + backward, ms", "linear", "PEFT", "fused", "PEFT/fused", "PEFT, MiB", "fused, MiB", "rounds"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.modules", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--seconds", type=float, default=9.0, help="time for the rounds of a point, at least 5 of them (default 9)")
    parser.add_argument("--quick", action="store_true", help="one small layer: to see that it runs")
    args = parser.parse_args(argv)
    recorder = Recorder(args.out, "modules", conditions(torch.device("cpu")))
    found = list(points(args.quick))
    for i, (point, adapters) in enumerate(found, 1):
        say(f"modules {i}/{len(found)} {point}, adapters {dtype_name(adapters)}")
        measure(recorder, point, adapters, args.seconds)
    print(summary(recorder.rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

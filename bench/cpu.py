"""The library chain on a CPU against PEFT's formula, in one run: ``python -m bench.cpu --out bench/results/cpu.jsonl``.

torch             lora_linear(impl="torch")
torch-no-onednn   the same chain on torch's own linear: what is left is the chain's gain, the rest is the library's
linear            x W^T, and dY W: the floor, on torch's own linear
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import torch

from lora_kernels import chain

from . import workloads
from .baselines import gradients, linear, ours, peft, training
from .conditions import Recorder, conditions
from .session import say
from .table import rounded, text_table
from .timing import HostClock, Step, interleave
from .workloads import Operands, Point

_CPU = torch.device("cpu")


def without_onednn():
    """Inside, the chain takes torch's own linear for the base products."""
    return mock.patch.object(chain, "_onednn", lambda: False)


def steps(point: Point, o: Operands) -> dict[str, Step]:
    """The arms at a point; oneDNN is an option of float32 alone, torch's own 16-bit linear being oneDNN already."""
    chained = ours("torch")
    arms = {"linear": training(linear, o), "peft": training(peft, o), "torch": training(chained, o)}

    def forward() -> torch.Tensor:
        with without_onednn():
            return chained(o)

    def backward(y: torch.Tensor):
        with without_onednn():
            return gradients(o, y)

    return arms | ({"torch-no-onednn": Step(forward, backward)} if point.dtype == torch.float32 else {})


def measure(recorder: Recorder, point: Point, seconds: float) -> None:
    """A row for each arm and pass of a point; an arm that fails is raised."""
    times, errors = interleave(steps(point, point.operands(_CPU)), HostClock(), seconds=seconds, least=5, most=2000)
    for name, error in errors.items():
        raise RuntimeError(f"{point}: {name} failed: {error}")
    for name, passes in times.items():
        for what, t in passes.items():
            recorder.add(
                **point.fields(), what=what, arm=name, took=name, launch=HostClock.launch, ms=t.ms(), rounds=t.rounds,
                over_linear=rounded(t.p50 / times["linear"][what].p50),
                speedup_over_peft=rounded(times["peft"][what].p50 / t.p50),
            )  # fmt: skip


def summary(rows: list[dict]) -> str:
    """Medians of forward plus backward, and PEFT's time over ours."""
    points: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["what"] == "both":
            points.setdefault((row["dtype"], row["p"], row["layer"], row["M"]), {})[row["arm"]] = row
    lines = []
    for (dtype, p, layer, M), by_arm in points.items():
        ms = [by_arm[name]["ms"]["p50"] if name in by_arm else None for name in ("linear", "peft", "torch", "torch-no-onednn")]
        gains = [f"{by_arm[name]['speedup_over_peft']:.2f}" if name in by_arm else "" for name in ("torch", "torch-no-onednn")]
        lines.append([f"{dtype} p={p:g} {layer} {M} tokens", *ms, *gains, by_arm["torch"]["rounds"]])
    header = ["forward + backward, ms", "linear", "PEFT", "ours", "ours, no oneDNN", "PEFT/ours", "PEFT/no oneDNN", "rounds"]
    return text_table(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--seconds", type=float, default=9.0, help="time for the rounds of a point, at least 5 of them (default 9)")
    parser.add_argument("--quick", action="store_true", help="one small layer: to see that it runs")
    args = parser.parse_args(argv)
    recorder = Recorder(args.out, "cpu", conditions(_CPU))
    points = workloads.cpu_chain(args.quick)
    for i, point in enumerate(points, 1):
        say(f"cpu {i}/{len(points)} {point}")
        measure(recorder, point, args.seconds)
    print(summary(recorder.rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

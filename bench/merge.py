"""Section ``merge``: to write an adapter into a weight, to put another in its place, and to give the base back.

copy      weight := base, both on the device: the floor, one read and one write of W
linear +  weight += (B A) * scale, as PEFT has it: B A is made, scaled and added
addmm     weight.addmm_(B, A, alpha=scale): one library call, in W's own dtype, on top of what is merged already
swap      FusedLoRALinear.swap on a merged layer whose base is kept on the device: what a change of adapter costs
swap cpu  the same with the base kept on the CPU
write     the write of the swap alone, without the check that the result is finite
"""

from __future__ import annotations

import torch

from lora_kernels import FusedLoRALinear, merging

from .session import Budget, Session, say
from .table import rounded, text_table
from .timing import Step, clock_for, interleave
from .workloads import LLAMA_8B, Point


def points(quick: bool) -> list[Point]:
    layers = {"small": (64, 48)} if quick else {name: LLAMA_8B[name] for name in ("8B q,o", "8B gate,up", "8B down")}
    return [Point("merge", name, 0, K, N, r=r) for name, (K, N) in layers.items() for r in ((16,) if quick else (16, 64))]


def run(session: Session) -> int:
    """Writes a row for each point and arm, with the rate at which W is read and written once; returns the number of errors."""
    recorder = session.recorder("merge")
    clock, table, errors, budget = clock_for(session.device), [], 0, Budget(session.seconds)
    for point in budget.walk(points(session.quick)):
        arms = steps(point, session.device)
        times, failed = interleave(arms, clock, seconds=0.1 if session.quick else 2.0, least=3)
        for name, error in failed.items():
            errors += 1
            recorder.add(**point.fields(), what="merge", arm=name, launch=clock.launch, error=error)
            say(f"merge FAILED {point} {name}: {error}")
        moved = 2 * point.N * point.K * point.dtype.itemsize
        for name, passes in times.items():
            t = passes["forward"]
            recorder.add(
                **point.fields(), what="merge", arm=name, launch=clock.launch, ms=t.ms(), rounds=t.rounds,
                gbs=rounded(moved / t.p50 / 1e6),
            )  # fmt: skip
        table.append(
            [f"{point.layer} {point.K}->{point.N} r={point.r}", *(times[name]["forward"].p50 if name in times else None for name in arms)]
        )
    budget.record(recorder)
    print(text_table(["merge, ms", *arms], table), flush=True)
    return errors


def steps(point: Point, device: torch.device) -> dict[str, Step]:
    layers = {}
    for keep in ("device", "cpu"):
        layers[keep] = FusedLoRALinear(
            point.K, point.N, False, r=point.r, lora_alpha=2 * point.r, init_lora_weights=False, device=device, dtype=point.dtype
        )
        layers[keep].merge(keep=keep)
    layer = layers["device"]
    A, B, base, scale = layer.lora_A.detach(), layer.lora_B.detach(), layer.base_weight(), layer.scaling
    weight = base.clone()

    def added() -> None:
        weight.add_((B @ A) * scale)

    def written() -> None:
        if weight.is_cuda:
            from lora_kernels import launch

            launch.merge(weight, base, A, B, scale)
        else:
            merging.by_library(weight, base, A, B, scale, None)

    return {
        "copy": Step(lambda: weight.copy_(base)),
        "linear +": Step(added),
        "addmm": Step(lambda: weight.addmm_(B, A, alpha=scale)),
        "swap": Step(lambda: layer.swap(A, B)),
        "swap cpu": Step(lambda: layers["cpu"].swap(A, B)),
        "write": Step(written),
    }

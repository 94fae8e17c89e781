"""Section ``shared``: layers of one x, as q, k and v or gate and up: together, each alone, and frozen; times and memory.

linear        x W_i^T for each, autograd adding their dX: the floor that a model pays without adapters
peft          PEFT's formula for each
alone:ARM     `lora_linear` for each
together:ARM  `lora_linears`; together:torch is a chain of library calls with the backward pass by hand, as Unsloth has for these layers

ARM is torch, and with kernels auto and triton. Before an arm is timed, its y and gradients are held against float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from lora_kernels import Projection, lora_linears, parity

from . import variants
from .memory import peak_of, saved_by
from .session import Budget, Session, say
from .table import rounded, significant, text_table
from .timing import Step, clock_for, interleave, message
from .workloads import FEW_TOKENS, Point

WIDTHS = {
    "8B q,k,v": (4096, (4096, 1024, 1024)),
    "8B gate,up": (4096, (14336, 14336)),
    "70B q,k,v": (8192, (8192, 1024, 1024)),
    "70B gate,up": (8192, (28672, 28672)),
}
Layers = tuple[torch.Tensor, list[Projection], list[torch.Tensor]]
Formula = Callable[[torch.Tensor, list[Projection]], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class SharedPoint(Point):
    """N is the sum of ``widths``, the outputs of each layer."""

    widths: tuple[int, ...] = ()

    def layers(self, device: torch.device, dtype: torch.dtype | None = None) -> Layers:
        """x, the projections and each dY, the same for the same point, rounded to the point's dtype and given in ``dtype``."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape, std=1.0):
            return (torch.randn(shape, generator=generator, device=device) * std).to(self.dtype).to(dtype or self.dtype)

        x, parts, dys = draw(self.M, self.K).requires_grad_(), [], []
        for seed, N in enumerate(self.widths):
            A = draw(self.r, self.K, std=self.K**-0.5).requires_grad_()
            B = draw(N, self.r, std=self.r**-0.5).requires_grad_()
            parts.append(Projection(draw(N, self.K, std=self.K**-0.5), A, B, None, 2.0, self.p, seed))
            dys.append(draw(self.M, N))
        return x, parts, dys


def grid(cuda: bool, quick: bool) -> list[SharedPoint]:
    """Training by tokens, with dropout and without, then decode."""
    if not cuda or quick:
        widths_of = {"small q,k,v": (96, (96, 32, 32))} if quick else {"1024 q,k,v": (1024, (1024, 256, 256))}
        dtype, tokens, few = torch.float32, ((32,) if quick else (2048, 512)), (1,)
    else:
        widths_of, dtype, tokens, few = WIDTHS, torch.bfloat16, (8192, 2048), FEW_TOKENS[::3]

    def point(grid: str, name: str, M: int, p: float) -> SharedPoint:
        K, widths = widths_of[name]
        return SharedPoint(grid, name, M, K, sum(widths), 16, p, dtype, widths)

    return [
        *(point("train", name, M, p) for M in tokens for name in widths_of for p in (0.0, 0.1)),
        *(point("decode", name, M, 0.0) for name in widths_of for M in few),
    ]


def alone(x: torch.Tensor, parts: list[Projection], impl: str) -> list[torch.Tensor]:
    return [each.alone(x, training=True, impl=impl) for each in parts]


def peft(x: torch.Tensor, parts: list[Projection]) -> list[torch.Tensor]:
    def dropped(p: float) -> torch.Tensor:
        return F.dropout(x, p, training=True) if p else x

    return [F.linear(x, p.weight) + F.linear(F.linear(dropped(p.dropout_p), p.lora_A), p.lora_B) * p.scale for p in parts]


def formulas(device: torch.device) -> dict[str, Formula]:
    found: dict[str, Formula] = {"linear": lambda x, parts: [F.linear(x, p.weight) for p in parts], "peft": peft}
    for impl in ("torch", "auto", "triton") if variants.kernels_run(device) else ("torch",):
        found[f"alone:{impl}"] = partial(alone, impl=impl)
        found[f"together:{impl}"] = partial(lora_linears, training=True, impl=impl)
    return found


def gradients(layers: Layers, ys: Iterable[torch.Tensor]) -> tuple:
    x, parts, dys = layers
    leaves = [x, *(t for p in parts for t in (p.lora_A, p.lora_B))]
    return torch.autograd.grad(list(ys), leaves, dys, allow_unused=True)


def run(session: Session) -> int:
    """Writes a row for each point, arm and pass; returns the number of arms that failed."""
    cuda = session.device.type == "cuda"
    recorder, clock = session.recorder("shared"), clock_for(session.device)
    budget, table, failed = Budget(session.seconds), [], 0
    arms = formulas(session.device)
    for point in budget.walk(grid(cuda, session.quick)):
        layers, steps, kept = point.layers(session.device), {}, {}
        x, parts, _ = layers
        few = replace(point, M=min(point.M, 512))
        wanted = [results(few, partial(alone, impl="reference"), session.device, dtype) for dtype in (None, torch.float32)]
        for name, formula in arms.items():
            try:
                if ":" in name:
                    check(few, results(few, formula, session.device), *wanted)
                kept[name] = memory(formula, layers) if point.grid == "train" else {}
                forward = partial(formula, x, parts)
                steps[name] = Step(forward, partial(gradients, layers)) if point.grid == "train" else Step(torch.no_grad()(forward))
            except Exception as error:
                failed += 1
                recorder.add(**point.fields(), what="both", arm=name, error=message(error))
                say(f"shared FAILED {point} {name}: {message(error)}")
        times, errors = interleave(steps, clock, seconds=0.1 if session.quick else 1.0, least=3 if session.quick else 10)
        failed += len(errors)
        for name, error in errors.items():
            recorder.add(**point.fields(), what="both", arm=name, error=error)
        for name, passes in times.items():
            for what, t in passes.items():
                over = rounded(t.p50 / times["linear"][what].p50) if "linear" in times else None
                recorder.add(
                    **point.fields(), what=what, arm=name, launch=clock.launch, ms=t.ms(), rounds=t.rounds, over_linear=over, **kept[name]
                )  # fmt: skip
        last = "both" if point.grid == "train" else "forward"
        cells = [significant(times[name][last].p50) if name in times else "failed" for name in arms]
        table.append([f"{point.layer} {point.M} p={point.p:g}", *cells])
    budget.record(recorder)
    print(text_table(["shared, ms", *arms], table), flush=True)
    return failed


def results(point: SharedPoint, formula: Formula, device: torch.device, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """y of each layer, then the gradients."""
    layers = point.layers(device, dtype)
    ys = list(formula(*layers[:2]))
    return [t.detach() for t in (*ys, *gradients(layers, ys))]


def check(point: SharedPoint, ours: list[torch.Tensor], same_dtype: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """ValueError if y or a gradient is further from float32 than the budget of `lora_kernels.parity` allows."""
    for i, (result, same, true) in enumerate(zip(ours, same_dtype, truth, strict=True)):
        used = parity.budget_used(result, same, true.double(), terms=point.M + point.N + point.K)
        if used > 1:
            raise ValueError(f"result {i} at {point} is {used:.3g} times as far from float32 as may be")


def memory(formula: Formula, layers: Layers) -> dict:
    """Bytes saved for backward, and on a GPU the peak of forward and backward above what was in use."""
    x, parts, _ = layers
    saved = saved_by(lambda: list(formula(x, parts)), (x, *(t for p in parts for t in p[:3])))
    return dict(saved_bytes=saved, peak_bytes=peak_of(lambda: gradients(layers, formula(x, parts)), x.device))

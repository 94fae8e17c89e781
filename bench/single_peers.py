"""Peers' own kernels for one adapter: compared with the formula at a small version of a point, then timed there beside the other arms.

An adaptor gives ``lora_linear(x, weight, A, B, scale, dropout_p)``: x W^T + scale * (drop(x) A^T) B^T for x ``[M, K]``,
weight ``[N, K]``, A ``[r, K]`` and B ``[N, r]``, differentiable by autograd for x, A and B, dropout_p = 0 included. Its dropout mask is
its own, and need not be known: where the weight is zero dX is (D.(dS A)) / (1 - p), so that its zeros are the mask that backward took,
and the formula with that mask is what y, dX, dA and dB are compared with.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F

from . import peer_modules
from .baselines import Formula, gradients, training
from .conditions import Recorder
from .multi_check import first_wrong, in_float64, outputs, textbook
from .timing import Step, message
from .workloads import Operands, Point

SIGMAS = 5  # a right mask's share of kept elements is this far off once in two million checks


class Peers:
    """The modules found, each checked once for a rank, a dtype and a dropout."""

    def __init__(self, recorder: Recorder, device: torch.device):
        self.recorder, self.device = recorder, device
        self.modules, refused = peer_modules.load("lora_linear")
        self._verdicts: dict[tuple, str | None] = {}
        for arm, reason in refused.items():
            recorder.add(what="left out", arm=arm, detail=reason)

    def steps(self, point: Point, o: Operands) -> tuple[dict[str, Step], dict[str, str]]:
        """The steps to time at a point and how each was checked; one that is wrong is a row that says where."""
        steps: dict[str, Step] = {}
        notes: dict[str, str] = {}
        if point.forward_alone:
            return steps, notes
        tiny = small(point)
        for arm, module in self.modules.items():
            error = self._wrong(tiny, arm, module)
            if error:
                self.recorder.add(**point.fields(), arm=arm, launch="check", error=f"check: {error}")
            else:
                steps[arm], notes[arm] = training(formula(module), o), how_checked(tiny)
        return steps, notes

    def _wrong(self, tiny: Point, arm: str, module: ModuleType) -> str | None:
        key = arm, replace(tiny, layer="", grid="")
        if key not in self._verdicts:
            try:
                self._verdicts[key] = wrong(tiny, module, self.device)
            except Exception as error:  # a row of its own, as an error while it is timed is
                self._verdicts[key] = message(error)
        return self._verdicts[key]


def formula(module: ModuleType) -> Formula:
    return lambda o: module.lora_linear(o.x, o.weight, o.lora_A, o.lora_B, o.scale, o.p)


def small(point: Point) -> Point:
    """Fewer tokens and features, more than one tile of each."""
    return replace(point, M=min(point.M, 192), K=min(point.K, 1024), N=min(point.N, 1024))


def how_checked(tiny: Point) -> str:
    """For a row: what the times of a peer rest on."""
    text = f"y, dX, dA, dB within the budget at {tiny.M}x{tiny.K}->{tiny.N}, p = 0"
    return f"{text}, and at p = {tiny.p:g} with W = 0 and the mask read from dX" if tiny.p else text


def wrong(tiny: Point, module: ModuleType, device: torch.device) -> str | None:
    """What is wrong with a peer at a small point, or None: without dropout, and where the point has it, with dropout and a zero weight."""
    run, o = formula(module), tiny.operands(device)
    plain = replace(o, p=0.0)
    error = _compare(outputs(run, plain, False), textbook, plain, f"{tiny.M}x{tiny.K}->{tiny.N}, p = 0")
    if error or not o.p:
        return error
    o = replace(o, weight=torch.zeros_like(o.weight))
    y = run(o)
    dX, *others = gradients(o, y)
    if dX is None:
        return f"p = {o.p:g}: x has no gradient"
    keep = dX != 0
    share, off = keep.double().mean().item(), SIGMAS * (o.p * (1 - o.p) / keep.numel()) ** 0.5
    if abs(share - (1 - o.p)) > off:
        return f"p = {o.p:g}: wanted dX nonzero for {1 - o.p:.4f} +- {off:.4f} of x where W = 0, got {share:.4f}"
    return _compare([y.detach(), dX, *others], masked(keep), o, f"{tiny.M}x{tiny.K}->{tiny.N}, p = {o.p:g}, W = 0")


def masked(keep: torch.Tensor) -> Formula:
    """The formula with a mask that is known."""

    def run(o: Operands) -> torch.Tensor:
        dropped = torch.where(keep, o.x / (1 - o.p), 0.0)
        return F.linear(o.x, o.weight) + F.linear(F.linear(dropped, o.lora_A), o.lora_B) * o.scale

    return run


def _compare(mine: list, right: Formula, o: Operands, where: str) -> str | None:
    same, exact = outputs(right, o, False), outputs(right, in_float64(o), False)
    return first_wrong(mine, same, exact, where, terms=sum(o.x.shape) + o.weight.shape[0])

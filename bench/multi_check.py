"""An arm's y, and in training its gradients, beside the reference's at a small version of the point: the error over what is allowed.

The allowance is `lora_kernels.parity`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lora_kernels import parity, reference
from lora_kernels.tuning import Config

from .baselines import Formula, gradients
from .multi_workloads import MultiOperands, MultiPoint
from .timing import message
from .workloads import Operands

NAMES = ("y", "dX", "dA", "dB")


def _itself(o: MultiOperands) -> Operands:
    return o


@dataclass(frozen=True)
class Arm:
    """``of`` makes of a point's operands what the formula takes; ``config``: the kernels', where it names one."""

    formula: Formula
    config: Config | None = None
    of: Callable[[MultiOperands], Operands] = _itself


class Checker:
    """Remembers verdicts, for many points have the same small version."""

    def __init__(self, device: torch.device):
        self.device = device
        self._verdicts: dict[tuple, str | None] = {}
        self._tiny: MultiPoint | None = None
        self._operands: MultiOperands | None = None
        self._expected: dict[Callable, tuple[list, list]] = {}

    def wrong(self, tiny: MultiPoint, name: str, arm: Arm) -> str | None:
        """What is wrong with an arm at a small point, or None."""
        key = replace(tiny, layer="", grid="" if tiny.forward_alone else "train"), name, arm.config
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._compare(tiny, arm)
            except Exception as error:  # a row of its own, as an error while it is timed is
                self._verdicts[key] = message(error)
        return self._verdicts[key]

    def _compare(self, tiny: MultiPoint, arm: Arm) -> str | None:
        if self._tiny != tiny:
            self._tiny, self._operands, self._expected = tiny, tiny.operands(self.device), {}
        o = arm.of(self._operands)
        if arm.of not in self._expected:
            exact = outputs(textbook, in_float64(o), tiny.forward_alone)
            self._expected[arm.of] = outputs(textbook, o, tiny.forward_alone), exact
        mine = outputs(arm.formula, o, tiny.forward_alone)
        return first_wrong(mine, *self._expected[arm.of], f"{tiny}", terms=tiny.M + tiny.K + tiny.N)


def first_wrong(mine: list, same: list, exact: list, where: str, terms: int) -> str | None:
    """What is wrong with the first of `outputs` that is not right, or None; same: the textbook's in their dtype, exact: in float64."""
    for what, own, other, truth in zip(NAMES, mine, same, exact, strict=False):  # forward alone: y
        own = torch.zeros_like(other) if own is None else own
        if own.shape != other.shape:
            return f"{what} at {where}: wanted shape {list(other.shape)}, got {list(own.shape)}"
        used = parity.budget_used(own, other, truth, terms=terms)
        if not used <= 1.0:
            return f"{what} at {where}: {used:.3g} times the error that is allowed"
    return None


def textbook(o: Operands) -> torch.Tensor:
    many = dict(segments=o.adapters.segments, ranks=o.adapters.ranks, widths=o.adapters.widths or None)
    return reference.lora_linear(o.x, o.weight, o.lora_A, o.lora_B, scale=o.scale, **many)


def in_float64(o: Operands) -> Operands:
    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    return replace(o, x=cast(o.x), weight=cast(o.weight), lora_A=cast(o.lora_A), lora_B=cast(o.lora_B), dy=cast(o.dy))


def outputs(formula: Formula, o: Operands, forward_alone: bool) -> list:
    """y, or y, dX, dA and dB."""
    if forward_alone:
        with torch.no_grad():
            y = formula(o)
        return [torch.cat(y, -1) if isinstance(y, list) else y]
    y = formula(o)
    return [y.detach(), *gradients(o, y)]

"""The arms: formulas that are measured beside each other, as functions of a point's operands, differentiated by autograd.

linear         x W^T                                                    the frozen layer alone: the floor
peft           x W^T + ((drop(x) A^T) B^T) * scale                      as PEFT's Linear layer computes it
addmm-beta1    l = (scale * drop(x) A^T) B^T, then l += x W^T in place  the base product accumulates on the low-rank term
lorafusion     x@W.T + (drop(x)@A.T@B.T) * scale                        LoRAFusion's baseline formula
torch          lora_linear(impl="torch"): addmm chain, backward by hand
auto, triton   lora_linear with that impl
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lora_kernels import lora_linear
from lora_kernels.tuning import Config

from .timing import Step
from .workloads import Operands

Formula = Callable[[Operands], torch.Tensor]


def _drop(o: Operands) -> torch.Tensor:
    # PEFT replaces a dropout of p = 0 by an identity, so there is no call.
    return F.dropout(o.x, o.p, training=True) if o.p else o.x


def linear(o: Operands) -> torch.Tensor:
    return F.linear(o.x, o.weight)


def peft(o: Operands) -> torch.Tensor:
    result = F.linear(o.x, o.weight)
    return result + F.linear(F.linear(_drop(o), o.lora_A), o.lora_B) * o.scale


def addmm_beta1(o: Operands) -> torch.Tensor:
    low_rank = F.linear(F.linear(_drop(o), o.lora_A) * o.scale, o.lora_B)
    return low_rank.addmm_(o.x, o.weight.t())


def lorafusion(o: Operands) -> torch.Tensor:
    return o.x @ o.weight.T + (_drop(o) @ o.lora_A.T @ o.lora_B.T) * o.scale


def ours(impl: str, config: Config | None = None) -> Formula:
    def formula(o: Operands) -> torch.Tensor:
        many = dict(segments=o.adapters.segments, ranks=o.adapters.ranks, widths=o.adapters.widths or None)
        return lora_linear(o.x, o.weight, o.lora_A, o.lora_B, scale=o.scale, dropout_p=o.p, training=True, impl=impl, config=config, **many)

    return formula


FORMULAS: dict[str, Formula] = {
    "linear": linear,
    "peft": peft,
    "lorafusion": lorafusion,
    "addmm-beta1": addmm_beta1,
    "torch": ours("torch"),
    "auto": ours("auto"),
}


def compiled() -> Formula:
    """torch.compile of PEFT's formula, compiled anew for each point: past its limit of recompilations it would run eagerly."""
    torch._dynamo.reset()
    return torch.compile(peft, dynamic=False)


def gradients(o: Operands, y: torch.Tensor):
    """Gradients of x, A and B; None for an operand that the formula does not use."""
    return torch.autograd.grad(y, (o.x, o.lora_A, o.lora_B), o.dy, allow_unused=True)


def training(formula: Formula, o: Operands) -> Step:
    return Step(lambda: formula(o), lambda y: gradients(o, y))


def inference(formula: Formula, o: Operands) -> Step:
    def forward() -> torch.Tensor:
        with torch.no_grad():
            return formula(o)

    return Step(forward)

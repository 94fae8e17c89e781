"""The experts' arms, as formulas of a point's operands, differentiated by autograd; and why one cannot serve a point.

base      the frozen experts alone, by torch's grouped matmul on rows sorted by expert: the floor; the sorting is no arm's and not timed
ours      `lora_linear` with the stack and a plan, the rows as the router left them
beside    base, and `lora_linear(base=)` on the sorted rows
peft      W + B A * scale made for the whole stack, as PEFT 0.21 folds it, then the grouped matmul
grouped   base, and two more grouped matmuls for the adapter, as trainers have it; the scale is applied to u, where it costs least
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_kernels import lora_linear

from .baselines import ours
from .expert_workloads import ExpertOperands, ExpertPoint, by_expert
from .multi_baselines import why_not_grouped_mm
from .multi_check import Arm

FLOOR, OURS, BESIDE = "base", "ours", "beside"
ARMS = (FLOOR, OURS, BESIDE, "peft", "grouped")
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def through(x: torch.Tensor, stack: torch.Tensor, o: ExpertOperands) -> torch.Tensor:
    """Sorted rows ``[M, K]``, each through its expert's ``[N, K]`` of a stack."""
    return grouped_mm(x, stack.mT, offs=o.ends)


def base(o: ExpertOperands) -> torch.Tensor:
    return through(o.x, o.weight, o)


def beside(impl: str):
    def formula(o: ExpertOperands) -> torch.Tensor:
        return lora_linear(o.x, None, o.lora_A, o.lora_B, base=base(o), scale=o.scale, segments=o.adapters.segments, impl=impl)

    return formula


def peft(o: ExpertOperands) -> torch.Tensor:
    return through(o.x, torch.baddbmm(o.weight, o.lora_B, o.lora_A, alpha=o.scale), o)


def grouped(o: ExpertOperands) -> torch.Tensor:
    y, u = base(o), through(o.x, o.lora_A, o)
    return y.add_(through(u * o.scale, o.lora_B, o))


def arms(point: ExpertPoint, device: torch.device, impl: str) -> tuple[dict[str, Arm], dict[str, str]]:
    """Those that can serve a point, "ours" with ``impl``; and for those that cannot, why."""
    found = {
        FLOOR: Arm(base, of=by_expert),
        OURS: Arm(ours(impl)),
        BESIDE: Arm(beside(impl), of=by_expert),
        "peft": Arm(peft, of=by_expert),
        "grouped": Arm(grouped, of=by_expert),
    }
    refused = {name: why_not(name, point, device) for name in found}
    return {name: arm for name, arm in found.items() if not refused[name]}, {name: why for name, why in refused.items() if why}


def why_not(name: str, point: ExpertPoint, device: torch.device) -> str | None:
    if name == OURS:
        return None
    rank = {"r": point.r} if name == "grouped" else {}
    return why_not_grouped_mm(device, point.dtype, point.experts, K=point.K, N=point.N, **rank)

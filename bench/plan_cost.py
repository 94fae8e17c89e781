"""What a plan costs: `Segments.from_ids` beside one layer's base product of the same tokens; a model makes one plan for all its layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_kernels import Segments

from .multi_workloads import MultiPoint, adapter_ids
from .timing import Step

LAYERS = 32
GRID = "plan"


def points(device: torch.device, quick: bool) -> list[MultiPoint]:
    cuda = device.type == "cuda"
    K, dtype = (4096, torch.bfloat16) if cuda else (64 if quick else 1024, torch.float32)
    tokens = (64,) if quick else (64, 8192, 65536) if cuda else (64, 8192)
    adapters = (64,) if quick else (64, 1024, 4096)
    layer = "8B q,o" if cuda else f"{K}->{K}"
    return [MultiPoint(GRID, layer, M, K, K, dtype=dtype, loaded=E, spread=E) for M in tokens for E in adapters]


def steps(point: MultiPoint, device: torch.device) -> dict[str, Step]:
    """The base product, and the plan with and without the check of the ids."""
    x = torch.empty(point.M, point.K, dtype=point.dtype, device=device).normal_()
    weight = torch.empty(point.N, point.K, dtype=point.dtype, device=device).normal_()
    ids = adapter_ids(point).to(device, torch.int32)
    return {
        "linear": Step(lambda: F.linear(x, weight)),
        "from_ids": Step(lambda: Segments.from_ids(ids, point.loaded)),
        "from_ids:unvalidated": Step(lambda: Segments.from_ids(ids, point.loaded, validate=False)),
    }


def wrong(point: MultiPoint, plan: Segments) -> str | None:
    """What is wrong with a plan's order of the tokens, or None."""
    ids = adapter_ids(point).to(plan.device)
    ends = torch.bincount(ids, minlength=point.loaded).cumsum(0)
    good = torch.equal(plan.ids.long(), ids) and torch.equal(plan.starts[1:-1].long(), ends)
    good = good and torch.equal(ids[plan.order.long()], ids.sort().values)
    return None if good else f"the plan of {point} does not hold its tokens by adapter"

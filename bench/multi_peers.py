"""Peers' own kernels for many adapters, after the library's base product.

A module bench/peers/NAME.py gives ``shrink_expand(y, x, A, B, ids, scale)``: y ``[M, N]`` += scale * (x A[ids]^T) B[ids]^T in place, for x
``[M, K]``, A ``[E, r, K]``, B ``[E, N, r]`` and int64 ids ``[M]``, -1 for none. Where it also gives ``plan(ids, E)``, what that makes of
the ids once a batch is passed in their place, and is not timed.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from . import peer_modules
from .baselines import Formula, linear
from .multi_baselines import once
from .multi_workloads import MultiOperands

NAMES = peer_modules.KNOWN["shrink_expand"]


def load(folder: Path | None = None) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Modules by arm, and for the known peers that are not there, and for those that cannot be used, why."""
    return peer_modules.load("shrink_expand", folder)


def formula(module: ModuleType) -> Formula:
    plan = once(lambda o: module.plan(o.ids, o.lora_A.shape[0]) if hasattr(module, "plan") else o.ids)

    def run(o: MultiOperands) -> torch.Tensor:
        y = linear(o)
        module.shrink_expand(y, o.x, o.lora_A, o.lora_B, plan(o), o.scale)
        return y

    return run

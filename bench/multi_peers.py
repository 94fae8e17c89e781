"""Peers' own kernels for many adapters.

An adaptor gives ``multi_lora_linear(x, weight, A, B, plan)``: x W^T + scale * (x A[ids]^T) B[ids]^T for x ``[M, K]``, weight ``[N, K]``,
A ``[E, r, K]`` and B ``[E, N, r]``; and ``plan(ids, ranks, scale, decode)``, asked once a batch and not timed: int64 ids ``[M]``, -1 for
none, each adapter's rank (the stacks hold zeros beyond it), and whether the tokens are of as many sequences. Where it also takes
``widths``, it serves layers that the weight packs, as `lora_kernels.lora_linear` does.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import torch

from . import peer_modules
from .baselines import Formula
from .multi_baselines import once
from .multi_workloads import MultiOperands

NAMES = peer_modules.KNOWN["multi_lora_linear"]


def load(folder: Path | None = None) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Modules by arm, and for those that cannot be used, why."""
    return peer_modules.load("multi_lora_linear", folder)


def formula(module: ModuleType, decode: bool) -> Formula:
    plan = once(lambda o: module.plan(o.ids, o.host_ranks, o.scale, decode))

    def run(o: MultiOperands) -> torch.Tensor:
        packed = dict(widths=o.adapters.widths) if o.adapters.widths else {}
        return module.multi_lora_linear(o.x, o.weight, o.lora_A, o.lora_B, plan(o), **packed)

    return run


def packs(module: ModuleType) -> bool:
    """Whether a peer serves packed layers."""
    return "widths" in inspect.signature(module.multi_lora_linear).parameters

"""Peers' own kernels after the library's base product, from modules in bench/peers/, which git ignores.

A module bench/peers/NAME.py gives ``shrink_expand(y, x, A, B, ids, scale)``: y ``[M, N]`` += scale * (x A[ids]^T) B[ids]^T in place, for x
``[M, K]``, A ``[E, r, K]``, B ``[E, N, r]`` and int64 ids ``[M]``, -1 for none. Where it also gives ``plan(ids, E)``, what that makes of
the ids once a batch is passed in their place, and is not timed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from .baselines import Formula, linear
from .multi_baselines import once
from .multi_workloads import MultiOperands
from .timing import message

FOLDER = Path(__file__).with_name("peers")
NAMES = ("punica", "sglang", "vllm")


def load(folder: Path | None = None) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Modules by arm, and for the known peers that are not there, and for those that cannot be used, why."""
    folder = folder or FOLDER
    found: dict[str, ModuleType] = {}
    refused: dict[str, str] = {}
    for name in sorted({*NAMES, *(path.stem for path in folder.glob("*.py"))}):
        arm, path = f"peer:{name}", folder / f"{name}.py"
        if not path.exists():
            refused[arm] = f"there is no bench/peers/{name}.py"
            continue
        try:
            found[arm] = _module(name, path)
        except Exception as error:  # whatever its imports raise here
            refused[arm] = message(error).split("\n")[0]
    return found, refused


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_peer_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "shrink_expand", None)):
        raise AttributeError(f"{path.name}: wanted a function shrink_expand(y, x, A, B, ids, scale), got none")
    return module


def formula(module: ModuleType) -> Formula:
    plan = once(lambda o: module.plan(o.ids, o.lora_A.shape[0]) if hasattr(module, "plan") else o.ids)

    def run(o: MultiOperands) -> torch.Tensor:
        y = linear(o)
        module.shrink_expand(y, o.x, o.lora_A, o.lora_B, plan(o), o.scale)
        return y

    return run

"""Peers' own kernels, as modules in bench/peers/, which git ignores: found by name, imported, or refused with a reason.

A module bench/peers/NAME.py gives the function that a section asks for; docs/contributing.md says how to write one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .timing import message

FOLDER = Path(__file__).with_name("peers")
SIGNATURES = {
    "lora_linear": "lora_linear(x, weight, A, B, scale, dropout_p)",
    "shrink_expand": "shrink_expand(y, x, A, B, ids, scale)",
}
KNOWN = {"lora_linear": ("lorafusion",), "shrink_expand": ("punica", "sglang", "vllm")}


def load(function: str, folder: Path | None = None) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Modules that give ``function``, by arm; and for the known ones that are not there, and for those that cannot be used, why.

    A peer known for another function is not asked: its import may take long, and warn.
    """
    folder = folder or FOLDER
    others = {name for other, names in KNOWN.items() if other != function for name in names}
    found: dict[str, ModuleType] = {}
    refused: dict[str, str] = {}
    for name in sorted({*KNOWN[function], *(path.stem for path in folder.glob("*.py"))} - others):
        arm, path = f"peer:{name}", folder / f"{name}.py"
        if not path.exists():
            refused[arm] = f"there is no bench/peers/{name}.py"
            continue
        try:
            found[arm] = _module(name, path, function)
        except (Exception, SystemExit) as error:  # whatever its imports raise here
            refused[arm] = message(error).split("\n")[0]
    return found, refused


def _module(name: str, path: Path, function: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_peer_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and jit look their module up there
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise AttributeError(f"{path.name}: wanted a function {SIGNATURES[function]}, got none")
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module

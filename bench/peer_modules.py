"""Peers' own kernels, through adaptors found by name, imported, or refused with a reason.

An adaptor is a module that gives the functions that a section asks for: those of `KNOWN` lie in bench/adaptors, a user's own in
bench/peers, which git ignores. The peers' code is in no file of ours: it lies as folders in bench/peers, and an adaptor says what puts
it there.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .timing import message

FOLDER = Path(__file__).with_name("peers")
ADAPTORS = Path(__file__).with_name("adaptors")
SIGNATURES = {
    "lora_linear": ("lora_linear(x, weight, A, B, scale, dropout_p)",),
    "multi_lora_linear": ("plan(ids, ranks, scale, decode)", "multi_lora_linear(x, weight, A, B, plan)"),
}
KNOWN = {"lora_linear": ("lorafusion",), "multi_lora_linear": ("punica", "sglang", "vllm")}


def load(function: str, folder: Path | None = None) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Modules that give ``function``, by arm; and for those that cannot be used, why.

    A peer known for another function is not asked: its import may take long, and warn.
    """
    folder = folder or FOLDER
    others = {name for other, names in KNOWN.items() if other != function for name in names}
    found: dict[str, ModuleType] = {}
    refused: dict[str, str] = {}
    for name in sorted({*KNOWN[function], *(path.stem for path in folder.glob("*.py"))} - others):
        arm, own = f"peer:{name}", folder / f"{name}.py"
        try:
            found[arm] = _module(name, own if own.exists() else ADAPTORS / f"{name}.py", function)
        except Missing as error:
            refused[arm] = str(error)
        except (Exception, SystemExit) as error:  # whatever its imports raise here
            refused[arm] = message(error).split("\n")[0]
    return found, refused


def _module(name: str, path: Path, function: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_peer_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and jit look their module up there
    try:
        spec.loader.exec_module(module)
        for signature in SIGNATURES[function]:
            if not callable(getattr(module, signature.split("(")[0], None)):
                raise AttributeError(f"{path.name}: wanted a function {signature}, got none")
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


class Missing(Exception):
    """A peer's code is not there."""


def code(place: str, get: str) -> Path:
    """Where a peer's code lies below bench/peers; ``get``: the command that puts it there. bench/peers/site can be imported from."""
    site = str(FOLDER / "site")
    if site not in sys.path:
        sys.path.append(site)
    if not (FOLDER / place).is_dir():
        raise Missing(f"there is no bench/peers/{place}: {get}")
    return FOLDER / place


def bare(root: Path, *packages: str) -> None:
    """Packages, and those they are in, whose own ``__init__`` is not run: below them only what is asked for is imported."""
    for package in packages:
        parts = package.split(".")
        for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if name not in sys.modules:
                sys.modules[name] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
                sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]


def stand_in(name: str, **attributes) -> None:
    """A module with as much as kernels' files import of the real one."""
    if name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
        vars(sys.modules[name]).update(attributes)

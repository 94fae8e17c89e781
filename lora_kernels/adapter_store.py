"""A folder with an adapter's files: written so that it holds the old adapter or the new one, and opened with its size checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from .lora_config import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"


def write(folder: str | os.PathLike, config: bytes, tensors: dict[str, torch.Tensor], safetensors) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"folder: wanted a directory, got a file, {os.fspath(folder)!r}")
    os.makedirs(folder, exist_ok=True)
    last = os.path.join(folder, CONFIG_FILE)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as fresh:
        safetensors.torch.save_file(tensors, os.path.join(fresh, WEIGHTS_FILE), metadata={"format": "pt"})
        with open(os.path.join(fresh, CONFIG_FILE), "wb") as file:
            file.write(config)
        shutil.copymode(os.path.join(fresh, CONFIG_FILE), os.path.join(fresh, WEIGHTS_FILE))  # safetensors' is for its owner alone
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            _sync(os.path.join(fresh, name))
        with contextlib.suppress(FileNotFoundError):
            with open(last, "rb") as file:
                same = file.read() == config
            if not same:
                os.unlink(last)
                _sync(folder)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(os.path.join(fresh, name), os.path.join(folder, name))
            _sync(folder)


def _sync(path: str | os.PathLike) -> None:
    """Have the disk know a file, or a folder's names, before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Any]:
    """The file, whose header safetensors has checked against its size: whole, no gaps, each shape as large as its bytes."""
    safetensors = safetensors_or_why()
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        pickled = os.path.isfile(os.path.join(folder, "adapter_model.bin"))
        hint = "; adapter_model.bin is a pickle, which is not read: save it as safetensors with PEFT" if pickled else ""
        raise FileNotFoundError(f"folder: wanted a directory with {WEIGHTS_FILE}, got {folder!r} without{hint}")
    try:
        file = safetensors.safe_open(path, framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        size = os.path.getsize(path)
        raise ValueError(f"{path}: wanted a whole safetensors file, got one of {size} bytes; safetensors says: {error}") from None
    with file as whole:
        yield whole


def safetensors_or_why():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('adapter files: wanted safetensors, got none to import; pip install "lora_kernels[peft]"') from error
    return safetensors

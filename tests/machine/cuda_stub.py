"""The CUDA driver's library as a stub that does nothing, built by gcc from cuda_stub.c, for what Triton links with it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import triton


def build(folder: str) -> str:
    """The library's path; Triton in this process and those that it begins links with it from now on."""
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = f"{folder}/libcuda.so.1"
    how = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", str(headers)]
    subprocess.run(["gcc", *how, str(Path(__file__).with_suffix(".c")), "-o", library], check=True)
    os.symlink(library, f"{folder}/libcuda.so")  # the name that Triton 3.4 links
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
    return library

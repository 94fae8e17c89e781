"""This process's kernels run on the machine from now on, from tensors on the CPU."""

from __future__ import annotations

from triton.runtime import driver as runtime

from lora_kernels import dispatch, launch
from lora_kernels.tuning import Arch

from . import driver


def install(name: str, **how) -> driver.Machine:
    """name: sm_80 to sm_90; how: of `driver.Machine`. The CPU's tensors are served as that GPU's are, by its heuristic and rows."""
    arch = Arch.parse(name)
    if arch.kind != "cuda" or not (8, 0) <= arch.capability <= (9, 0):
        raise ValueError(f"PTX_MACHINE: wanted sm_80 to sm_90, got {name}")
    machine = driver.Machine(**how)
    runtime.set_active(driver.Driver(10 * arch.capability[0] + arch.capability[1], machine))
    dispatch.interpreting = lambda: True  # so that the CPU's tensors are served,
    Arch.interpreter = classmethod(lambda cls: arch)  # by this
    launch.interpreted = lambda: False
    return machine

"""``kernel[grid](*args, **options)`` by the compiled kernel itself, where an equal call was made before.

Triton looks at every argument of every call anew, to find what it compiled for such arguments: some 40 us of host time for kernels
with as many as these, where a decoder has hundreds of calls a token. Options that are the same object stand for the same layout
(`layouts`), so for the same numbers and dtypes; what else Triton's choice depends on is which arguments are there, and of each tensor
whether its address is a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import JITFunction, driver

from .layouts import Options
from .operands import aligned

Slot = tuple[int, int | None]
STEADY = tuple(int(number) for number in triton.__version__.split(".")[:2]) <= (3, 9)  # how Triton itself runs what it compiled, so far


def launch(kernel: Any, grid: tuple[int, ...], args: tuple, options: Options) -> None:
    """What ``kernel[grid](*args, **options)`` does. Triton's knobs hold as they were at the first of equal calls."""
    if not isinstance(kernel, JITFunction):  # interpreted: nothing is compiled
        kernel[grid](*args, **options)
        return
    if options.slots is None:
        options.slots = _slots(args)
    active, hooks = driver.active, knobs.runtime
    device = active.get_current_device()
    tensors = [args[i] if j is None else args[i][j] for i, j in options.slots]
    key = (device, grid, *aligned(*tensors))
    found = options.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **options)
        handles = compiled.run, compiled.function, compiled.packed_metadata
        options.compiled[key] = compiled, handles, (*grid, 1, 1)[:3], tuple(options[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, (run, function, metadata), (x, y, z), constants = found
    stream = active.get_current_stream(device)
    if STEADY and _nobody(hooks.launch_enter_hook) and _nobody(hooks.launch_exit_hook):
        run(x, y, z, stream, function, metadata, None, None, None, *args, *constants)
    else:
        compiled[x, y, z](*args, *constants, stream=stream)


def _nobody(hook: Any) -> bool:
    """Whether nobody, a profiler, say, is to be told of launches; from Triton 3.6 on a hook is a list of them."""
    return hook is None or not getattr(hook, "calls", True)


def _slots(args: tuple) -> list[Slot]:
    """Where among the arguments tensors are, or may be: every number, and what of a tuple is none, is the layout's."""
    found: list[Slot] = []
    for i, arg in enumerate(args):
        if arg is None or isinstance(arg, torch.Tensor):
            found.append((i, None))
        elif type(arg) is tuple:
            found += [(i, j) for j, each in enumerate(arg) if isinstance(each, torch.Tensor)]
    return found

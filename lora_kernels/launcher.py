"""``kernel[grid](*args, **options)`` by the compiled kernel itself, where an equal call was made before.

Triton looks at every argument of every call anew, to find what it compiled for such arguments: some 40 us of host time for kernels
with as many as these, where a decoder has hundreds of calls a token. Options that are the same object stand for the same layout
(`layouts`), so for the same numbers and dtypes; what else Triton's choice depends on is which arguments are there, and of each tensor
whether its address is a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import JITFunction, driver

from .layouts import Options
from .operands import aligned

Slot = tuple[int, int | None]


def launch(kernel: Any, grid: tuple[int, ...], args: tuple, options: Options) -> None:
    """What ``kernel[grid](*args, **options)`` does. Triton's knobs hold as they were at the first of equal calls."""
    if not isinstance(kernel, JITFunction):  # interpreted: nothing is compiled
        kernel[grid](*args, **options)
        return
    if options.slots is None:
        options.slots = _slots(args)
    key = driver.active.get_current_device(), *aligned(*[args[i] if j is None else args[i][j] for i, j in options.slots])
    found = options.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **options)
        options.compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, constants = found
    compiled[(*grid, 1, 1)](*args, *constants)


def _slots(args: tuple) -> list[Slot]:
    """Where among the arguments tensors are, or may be: every number, and what of a tuple is none, is the layout's."""
    found: list[Slot] = []
    for i, arg in enumerate(args):
        if arg is None or isinstance(arg, torch.Tensor):
            found.append((i, None))
        elif type(arg) is tuple:
            found += [(i, j) for j, each in enumerate(arg) if isinstance(each, torch.Tensor)]
    return found

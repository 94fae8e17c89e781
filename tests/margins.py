"""Launches whose tensors each lie inside a larger one: what is written past an end shows in its margins, what is read, in results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lora_kernels import launch


@contextlib.contextmanager
def inside(margin: int, fill: float) -> Iterator[list[torch.Tensor]]:
    """Inside, every launch is made so; gives the larger tensors of all of them, whose margins are to stay ``fill``."""
    larger: list[torch.Tensor] = []

    def launched(kernel, grid, args, options):
        tensors = [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, torch.Tensor)]
        wider = {id(t): t.new_full((t.numel() + 2 * margin,), fill) for t in tensors}
        within = {id(t): wider[id(t)][margin:-margin].view(t.shape).copy_(t) for t in tensors}
        args = (tuple(within.get(id(t), t) for t in arg) if isinstance(arg, tuple) else within.get(id(arg), arg) for arg in args)
        kernel[grid](*args, **options)
        for t in tensors:
            t.copy_(within[id(t)])
        larger.extend(wider.values())

    with launch.intercept(launched):
        yield larger


def outside(larger: list[torch.Tensor], margin: int) -> list[torch.Tensor]:
    """The margins of each."""
    return [torch.cat([each[:margin], each[-margin:]]) for each in larger]

"""Launches whose tensors each lie inside a larger one: what is written outside of them shows there, what is read, in results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lora_kernels import launch


@contextlib.contextmanager
def inside(margin: int, fill: float) -> Iterator[list[torch.Tensor]]:
    """Inside, every launch is made so; gives of each tensor of each launch what is around it and between its rows, to stay ``fill``."""
    around: list[torch.Tensor] = []

    def within(larger: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return larger.as_strided(t.shape, t.stride(), margin)

    def launched(kernel, grid, args, options):
        tensors = [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, torch.Tensor)]
        spans = {id(t): 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors}
        larger = {id(t): t.new_full((spans[id(t)] + 2 * margin,), fill) for t in tensors}
        for t in tensors:
            within(larger[id(t)], t).copy_(t)
        own = {id(t): within(larger[id(t)], t) for t in tensors}
        args = (tuple(own.get(id(t), t) for t in arg) if isinstance(arg, tuple) else own.get(id(arg), arg) for arg in args)
        kernel[grid](*args, **options)
        for t in tensors:
            t.copy_(own[id(t)])
        for t in {id(t): t for t in tensors}.values():
            others = torch.ones_like(larger[id(t)], dtype=torch.bool)
            within(others, t).fill_(False)
            around.append(larger[id(t)][others])

    with launch.intercept(launched):
        yield around

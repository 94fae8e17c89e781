"""What decisions see of a call's operands: shapes, strides, dtypes and addresses, as values that are equal for equal calls."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .segments import ONE, Adapters

Matrix = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


def matrix(t: torch.Tensor | None) -> Matrix | None:
    return None if t is None else (t.shape, t.stride(), t.dtype)


def aligned(*tensors: torch.Tensor | None) -> tuple[bool | None, ...]:
    """Whether the addresses are multiples of 16."""
    return tuple([None if t is None else t.data_ptr() % 16 == 0 for t in tensors])


class Many(NamedTuple):
    """A batch's adapters. tokens, tiles and blocks: of the plan, 0 without one; ranked: whether they have ranks of their own."""

    number: int = 1
    tokens: int = 0
    tiles: int = 0
    row_block: int = 0
    gather_block: int = 0
    ranked: bool = False
    widths: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.widths) or 1


ALONE = Many()


def many(adapters: Adapters) -> Many:
    if adapters is ONE:
        return ALONE
    s = adapters.segments
    plan = (1, 0, 0, 0, 0) if s is None else (s.num_adapters, s.tokens, s.tile_adapter.shape[0], s.row_block, s.gather_block)
    return Many(*plan, adapters.ranks is not None, adapters.widths)

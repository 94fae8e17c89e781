"""What decisions see of a call's operands: shapes, strides, dtypes and addresses, as values that are equal for equal calls."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar, overload

import torch

from .segments import ONE, Adapters

Matrix = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
Maybe = TypeVar("Maybe", torch.Tensor, None)


@overload
def matrix(t: None) -> None: ...
@overload
def matrix(t: torch.Tensor) -> Matrix: ...
def matrix(t):
    return None if t is None else (t.shape, t.stride(), t.dtype)


def flat(m: Matrix) -> Matrix:
    """Of tokens ``[..., K]`` that are contiguous, or a matrix: as ``[M, K]``."""
    shape, _, dtype = m
    return m if len(shape) == 2 else ((math.prod(shape[:-1]), shape[-1]), (shape[-1], 1), dtype)


def as_matrix(t: Maybe) -> Maybe:
    """``[..., K]`` as ``[M, K]``: a view wherever the leading dimensions have a common stride, otherwise a copy, as in F.linear."""
    return t if t is None or t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def even(t: Maybe) -> Maybe:
    """``[..., K]`` as an arm takes it: as it is if contiguous, else its `as_matrix`."""
    return t if t is None or t.dim() == 2 or t.is_contiguous() else as_matrix(t)


def lead(shape: tuple[int, ...], top_k: int) -> list[int]:
    """y's leading sizes for x of this shape: x's, and one for the rows of a token where it has several."""
    return [*shape[:-1], top_k] if top_k > 1 else [*shape[:-1]]


def like_tokens(y: torch.Tensor, x: torch.Tensor, top_k: int = 1) -> torch.Tensor:
    """``y [M, N]`` as ``[..., N]`` for ``x [..., K]``, or ``[..., k, N]``: see `lead`."""
    if x.dim() == 2 and top_k == 1:
        return y
    # no view for autograd, which refuses in-place operations (ReLU's, a residual's) on views that a Function returns
    return torch.ops.aten._unsafe_view.default(y, [*lead(x.shape, top_k), y.shape[-1]])


def tokens(x: torch.Tensor) -> int:
    """How many ``x [..., K]`` has; K is not 0."""
    return x.numel() // x.shape[-1]


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

"""The launch of `scale_columns`, the magnitude of DoRA in the backward pass: beside `launch`, whose kernels make what it scales."""

from __future__ import annotations

import functools

import torch

from .kernels.columns import scale_columns
from .launch import run_kernel
from .layouts import Options, cdiv, split_axis, wide
from .operands import Matrix, as_matrix, matrix
from .streams import on_device

BLOCK_M, BLOCK_N = 16, 256  # of 16 bits 8 KB of each tensor on their way for a program
PROGRAMS, SPLITS = 512, 64  # wanted: four for a multiprocessor; and sums of a column at most


def backward(dy: torch.Tensor, t: torch.Tensor | None, g: torch.Tensor, need_dt: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``dt = g dY [..., N]`` if wanted, and ``dg = sum over tokens of dY t [N]`` if t is given, in float32.

    dy, t: ``[..., N]``, any strides, of 16 or 32 bits; g: float32 ``[N]``, contiguous. None of them is empty.
    """
    rows, its = as_matrix(dy), None if t is None else as_matrix(t)
    M, N = rows.shape
    grid, blocks, options = _layout(matrix(rows), matrix(its), need_dt)
    dt = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_dt else None
    parts = None if its is None else g.new_empty(grid[1], N)
    its_args, dt_args = None if its is None else (its, *its.stride()), None if dt is None else (dt, N, 1)
    with on_device(dy):
        run_kernel(scale_columns, grid, ((rows, *rows.stride()), its_args, g, dt_args, parts, M, N, blocks), options)
    return dt, None if parts is None else parts.sum(0)


@functools.lru_cache(maxsize=1024)
def _layout(dy: Matrix, t: Matrix | None, need_dt: bool) -> tuple[tuple[int, int], int, Options]:
    """The grid, the blocks of tokens a split, and the options, for matrices that look so.

    need_dt: For `launcher` takes one object of options for one layout, in which a tuple is there or is not.
    """
    (M, N), dy_strides, _ = dy
    columns = cdiv(N, BLOCK_N)
    blocks, splits = split_axis(M, BLOCK_M, min(cdiv(PROGRAMS, columns), SPLITS))
    reached = ((strides, BLOCK_N) for strides in (dy_strides, t and t[1], (N, 1)))
    return (columns, splits), blocks, Options(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, EVEN_N=N % BLOCK_N == 0, WIDE=wide(*reached), num_warps=4)

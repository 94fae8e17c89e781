"""The launches of a call whose weight is a stack, one for each expert: beside `launch`, whose shrink and wgrad serve it as they are.

forward    U = shrink(x, A), Y = experts(x, W^T, U, B^T)
backward   dS = shrink(dY, B^T), dX = experts(dY, W, dS, A), dA = wgrad(x, dS), dB = wgrad(dY, U)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .kernels.experts import experts
from .launch import _dropout, _run, precision, run_shrink, run_wgrad
from .layouts import KEPT, Options, cdiv, wide
from .operands import Matrix, flat, lead, matrix
from .segments import Adapters
from .streams import on_device
from .tuning import Config, Expand, rank_block
from .tuning.validity import TILE_RANK


def run_experts(x, w, u, v, *, adapters: Adapters, bias=None, drop_uv=None, config: Config):
    """``x[m] w[e] + D.(u[m] v[e]) + bias[e]`` as ``[..., N]``, 0 for rows without an expert.

    x: ``[..., K]``, or each row k times: then ``[..., k, N]``; w: ``[E, K, N]``, u: ``[M, R]``, v: ``[E, R, N]``, any strides; bias:
    ``[E, N]`` or None. drop_uv: None or (seed, p).
    """
    gather = adapters.gather()
    assert gather is not None  # a stack comes with a plan
    tiles = gather[0].shape[0]
    e = _layout(
        config.expand, matrix(x), matrix(w), matrix(u), matrix(v), adapters.ranks is not None, drop_uv is not None, precision(x.dtype)
    )
    y = x.new_empty(e.y)
    bias = None if bias is None else bias.contiguous()
    seed, threshold, inv_keep = _dropout(drop_uv)
    args = (
        (x, *e.x), (w, *e.w[1:]), e.w[0], (u, *e.u), (v, *e.v[1:]), e.v[0], bias, (y, e.y[-1], 1),
        gather, tiles, adapters.number, adapters.ranks, seed, threshold, inv_keep, *e.sizes,
    )  # fmt: skip
    _run(experts, (tiles * e.columns,), args, e.options)
    return y


class _Layout(NamedTuple):
    """y: its shape; x, w, u, v: strides; columns: blocks of columns; sizes: the kernel's last arguments."""

    y: tuple[int, ...]
    x: tuple[int, ...]
    w: tuple[int, ...]
    u: tuple[int, ...]
    v: tuple[int, ...]
    columns: int
    sizes: tuple[int, int, int]
    options: Options


@functools.lru_cache(maxsize=KEPT)
def _layout(c: Expand, x: Matrix, w: Matrix, u: Matrix, v: Matrix, ranked: bool, drop_uv: bool, precision: str) -> _Layout:
    """As those of `layouts`."""
    (rows_of_x, K), x_strides, x_dtype = flat(x)
    (M, R), N = u[0], v[0][-1]
    fan = M // rows_of_x
    block_r = rank_block(R, 32 if x_dtype.itemsize == 4 else TILE_RANK)
    options = Options(
        DROP_UV=drop_uv, PRECISION=precision,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=block_r, R_BLOCKS=cdiv(R, block_r), GROUP_M=c.group_m,
        EVEN_N=N % c.block_n == 0, EVEN_K=K % c.block_k == 0, EVEN_R=R % block_r == 0 and not ranked,
        WIDE=wide((x_strides, c.block_k), (w[1], max(c.block_n, c.block_k)), (v[1], max(c.block_n, block_r)), ((N, 1), c.block_n)),
        FAN=fan, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return _Layout((*lead(x[0], fan), N), x_strides, w[1], u[1], v[1], cdiv(N, c.block_n), (N, K, R), options)


def forward(
    x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale: float, p: float, save_u: bool, config: Config, base=None
):  # fmt: skip
    """As `launch.forward`, for weight ``[E, N, K]`` and bias ``[E, N]`` or None."""
    drop = (seed, p) if p else None
    with on_device(x):
        u = run_shrink(x, lora_A, transposed=True, scale=scale, adapters=adapters, dropout=drop, config=config, dtype=x.dtype)
        return run_experts(x, weight.mT, u, lora_B.mT, adapters=adapters, bias=bias, config=config), u


def backward(dy, x, weight, lora_A, lora_B, u, seed, adapters: Adapters, scale: float, p: float, needs, adapter_dtype, config: Config):
    """As `launch.backward`, for weight ``[E, N, K]``."""
    need_dx, need_da, need_db = needs
    drop = (seed, p) if p else None
    dx = da = db = ds = None
    gradients: dict[str, Any] = dict(scale=1.0, adapters=adapters, config=config, dtype=adapter_dtype)
    with on_device(dy):
        if need_dx or need_da:
            ds = run_shrink(dy, lora_B, scale=scale, adapters=adapters, dropout=None, config=config, dtype=dy.dtype)
        if need_dx:
            dx = run_experts(dy, weight, ds, lora_A, adapters=adapters, drop_uv=drop, config=config)
        if need_da:
            da = run_wgrad(x, ds, dropout=drop, out_transposed=True, **gradients)
        if need_db:
            db = run_wgrad(dy, u, dropout=None, out_transposed=False, **gradients)
    return dx, da, db

"""The launches of a call whose weight is a stack, one for each expert: beside `launch`, whose shrink and wgrad serve it as they are.

forward    U = shrink(x, A), Y = experts(x, W^T, U, B^T)
backward   dS = shrink(dY, B^T), dX = experts(dY, W, dS, A), dA = wgrad(x, dS), dB = wgrad(dY, U)
"""

from __future__ import annotations

from typing import Any

from .kernels.experts import experts
from .launch import _dropout, _matrix, _run, _stack_stride, _wide, cdiv, precision, run_shrink, run_wgrad
from .segments import Adapters
from .streams import on_device
from .tuning import Config, rank_block
from .tuning.validity import TILE_RANK


def run_experts(x, w, u, v, *, adapters: Adapters, bias=None, drop_uv=None, config: Config):
    """``x[m] w[e] + D.(u[m] v[e]) + bias[e]`` as ``[M, N]``, 0 for rows without an expert.

    x: ``[M, K]``, or ``[M / k, K]``, each row k times; w: ``[E, K, N]``, u: ``[M, R]``, v: ``[E, R, N]``, any strides; bias: ``[E, N]`` or
    None. drop_uv: None or (seed, p).
    """
    c = config.expand
    (M, R), K, N = u.shape, x.shape[1], v.shape[-1]
    block_r = rank_block(R, 32 if x.itemsize == 4 else TILE_RANK)
    y = x.new_empty(M, N)
    bias = None if bias is None else bias.contiguous()
    seed, threshold, inv_keep = _dropout(drop_uv)
    gather = adapters.gather()
    assert gather is not None  # a stack comes with a plan
    tiles = gather[0].shape[0]
    args = (
        _matrix(x), _matrix(w), _stack_stride(w), _matrix(u), _matrix(v), _stack_stride(v), bias, _matrix(y),
        gather, tiles, adapters.number, adapters.ranks, seed, threshold, inv_keep, N, K, R,
    )  # fmt: skip
    options = dict(
        DROP_UV=drop_uv is not None, PRECISION=precision(x.dtype),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=block_r, R_BLOCKS=cdiv(R, block_r), GROUP_M=c.group_m,
        EVEN_N=N % c.block_n == 0, EVEN_K=K % c.block_k == 0, EVEN_R=R % block_r == 0 and adapters.ranks is None,
        WIDE=_wide((x, c.block_k), (w, max(c.block_n, c.block_k)), (v, max(c.block_n, block_r)), (y, c.block_n)),
        FAN=M // x.shape[0], num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    _run(experts, (tiles * cdiv(N, c.block_n),), args, options)
    return y


def forward(
    x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale: float, p: float, save_u: bool, config: Config, base=None
):  # fmt: skip
    """As `launch.forward`, for weight ``[E, N, K]`` and bias ``[E, N]`` or None."""
    drop = (seed, p) if p else None
    with on_device(x):
        u = run_shrink(x, lora_A.mT, scale=scale, adapters=adapters, dropout=drop, config=config, dtype=x.dtype)
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

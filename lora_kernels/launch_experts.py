"""The launches of a call whose weight is a stack, one for each expert: beside `launch`, whose shrink and wgrad serve it as they are.

forward    U = shrink(x, A), Y = experts(x, W^T, U, B^T)
backward   dS = shrink(dY, B^T), dX = experts(dY, W, dS, A), dA = wgrad(x, dS), dB = wgrad(dY, U)
"""

from __future__ import annotations

from typing import Any

from . import layouts
from .kernels.experts import experts
from .launch import among, dropout_args, known, precision, run_kernel, run_shrink, run_wgrad
from .operands import many, matrix
from .segments import Adapters
from .streams import on_device
from .tuning import Config


def run_experts(x, w, u, v, *, adapters: Adapters, bias=None, drop_uv=None, config: Config, kept: dict | None = None):
    """``x[m] w[e] + D.(u[m] v[e]) + bias[e]`` as ``[..., N]``, 0 for rows without an expert.

    x: ``[..., K]``, or each row k times: then ``[..., k, N]``; w: ``[E, K, N]``, u: ``[M, R]``, v: ``[E, R, N]``, any strides; bias:
    ``[E, N]`` or None. drop_uv: None or (seed, p). kept: As in `run_shrink`.
    """
    e = known(kept, "experts", lambda: layouts.experts(
        config, matrix(x), matrix(w), matrix(u), matrix(v), many(adapters), drop_uv is not None, precision(x.dtype)
    ))  # fmt: skip
    y = x.new_empty(e.y)
    bias = None if bias is None else bias.contiguous()
    seed, threshold, inv_keep = dropout_args(drop_uv)
    args = (
        (x, *e.x), (w, *e.w[1:]), e.w[0], (u, *e.u), (v, *e.v[1:]), e.v[0], bias, (y, e.y[-1], 1),
        adapters.gather(), many(adapters).tiles, adapters.number, adapters.ranks, seed, threshold, inv_keep, *e.sizes,
    )  # fmt: skip
    run_kernel(experts, e.grid, args, e.options)
    return y


def forward(
    x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale: float, p: float, save_u: bool, config: Config, base=None,
    kept: dict | None = None,
):  # fmt: skip
    """As `launch.forward`, for weight ``[E, N, K]`` and bias ``[E, N]`` or None."""
    drop = (seed, p) if p else None
    shared: dict[str, Any] = dict(adapters=adapters, config=config, kept=among(kept, precision(x.dtype)))
    with on_device(x):
        u = run_shrink(x, lora_A, transposed=True, scale=scale, dropout=drop, dtype=x.dtype, **shared)
        return run_experts(x, weight.mT, u, lora_B.mT, bias=bias, **shared), u


def backward(
    dy, x, weight, lora_A, lora_B, u, seed, adapters: Adapters, scale: float, p: float, needs, adapter_dtype, config: Config,
    kept: dict | None = None,
):  # fmt: skip
    """As `launch.backward`, for weight ``[E, N, K]``. A row of dY may be that of several of the plan's, neighbours, as one of x."""
    need_dx, need_da, need_db = needs
    drop = (seed, p) if p else None
    dx = da = db = ds = None
    shared: dict[str, Any] = dict(adapters=adapters, config=config, kept=among(kept, adapter_dtype, precision(dy.dtype)))
    gradients: dict[str, Any] = dict(scale=1.0, dtype=adapter_dtype, **shared)
    with on_device(dy):
        if need_dx or need_da:
            ds = run_shrink(dy, lora_B, scale=scale, dropout=None, dtype=dy.dtype, **shared)
        if need_dx:
            dx = run_experts(dy, weight, ds, lora_A, drop_uv=drop, **shared)
        if need_da:
            da = run_wgrad(x, ds, dropout=drop, out_transposed=True, **gradients)
        if need_db:
            db = run_wgrad(dy, u, dropout=None, out_transposed=False, **gradients)
    return dx, da, db

"""The two registered operators, ``lora_kernels::forward`` and ``lora_kernels::backward``, and the choice of the arm.

One registered boundary per pass: torch.compile, export, fake tensors and FLOP counters see these two, and which arm runs
inside (the kernels or the chain of library calls) is resolved there, from the sizes of the call, so that no size becomes
a guard of the caller's graph.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .problem import rows

_library = torch.library.Library("lora_kernels", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scale, float dropout_p, "
    "bool save_u, str impl, str config) -> (Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? u, Tensor? seed, float scale, "
    "float dropout_p, bool need_dx, bool need_da, bool need_db, bool need_dbias, ScalarType adapter_dtype, str impl, str config) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)
forward_op = torch.ops.lora_kernels.forward.default
backward_op = torch.ops.lora_kernels.backward.default


def _forward(x, weight, lora_A, lora_B, bias, seed, scale, dropout_p, save_u, impl, config):
    x2 = rows(x)
    if x2.numel() == 0 or weight.shape[0] == 0:
        y, u = _empty_forward(x2, weight, lora_A, bias)
    else:
        run, chosen = dispatch.forward_arm(x2, weight, lora_A, lora_B, dropout_p, impl, config)
        y, u = run(x2, weight, lora_A, lora_B, bias, seed, scale, dropout_p, save_u, chosen)
    return y.view(*x.shape[:-1], weight.shape[0]), u if save_u else x.new_empty(0)


def _empty_forward(x, weight, lora_A, bias):
    """No tokens, no features in or none out: the bias alone, as F.linear has it."""
    y = x.new_zeros(x.shape[0], weight.shape[0])
    if bias is not None:
        y += bias
    return y, x.new_zeros(x.shape[0], lora_A.shape[0])


def _backward(dy, x, weight, lora_A, lora_B, u, seed, scale, dropout_p, need_dx, need_da, need_db, need_dbias, adapter_dtype, impl, config):
    dy2, x2 = rows(dy), None if x is None else rows(x)
    dx = da = db = None
    if need_dx or need_da or need_db:
        if dy2.numel() == 0 or (x2 is not None and x2.numel() == 0):
            K = weight.shape[1] if weight is not None else 0 if x2 is None else x2.shape[1]
            dx = dy.new_zeros(dy2.shape[0], K)
            da = _zeros(need_da, dy, adapter_dtype, lora_B, 1, x2, 1)
            db = _zeros(need_db, dy, adapter_dtype, dy2, 1, u, 1)
        else:
            run, chosen = dispatch.backward_arm(dy2, x2, weight, lora_A, lora_B, u, dropout_p, impl, config)
            needs = (need_dx, need_da, need_db)
            dx, da, db = run(dy2, x2, weight, lora_A, lora_B, u, seed, scale, dropout_p, needs, adapter_dtype, chosen)
    nothing = dy.new_empty(0)
    return (
        dx.view(*dy.shape[:-1], dx.shape[1]) if need_dx else nothing,
        da if need_da else dy.new_empty(0, dtype=adapter_dtype),
        db if need_db else dy.new_empty(0, dtype=adapter_dtype),
        dy2.sum(0) if need_dbias else dy.new_empty(0),
    )


def _zeros(needed, like, dtype, rows_of, row_axis, columns_of, column_axis):
    if not needed:
        return None
    return like.new_zeros(rows_of.shape[row_axis], columns_of.shape[column_axis], dtype=dtype)


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)


@torch.library.register_fake("lora_kernels::forward")
def _forward_fake(x, weight, lora_A, lora_B, bias, seed, scale, dropout_p, save_u, impl, config):
    u = x.new_empty(math.prod(x.shape[:-1]), lora_A.shape[0]) if save_u else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), u


@torch.library.register_fake("lora_kernels::backward")
def _backward_fake(
    dy, x, weight, lora_A, lora_B, u, seed, scale, dropout_p, need_dx, need_da, need_db, need_dbias, adapter_dtype, impl, config
):
    return (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_dx else dy.new_empty(0),
        dy.new_empty(*((lora_B.shape[1], x.shape[-1]) if need_da else (0,)), dtype=adapter_dtype),
        dy.new_empty(*((dy.shape[-1], u.shape[1]) if need_db else (0,)), dtype=adapter_dtype),
        dy.new_empty(dy.shape[-1] if need_dbias else 0),
    )


@register_flop_formula(torch.ops.lora_kernels.forward)
def _forward_flops(x, weight, lora_A, *args, out_shape=None, **kwargs) -> int:
    M, (N, K), R = math.prod(x[:-1]), weight, lora_A[0]
    return 2 * M * (N * K + R * (N + K))


@register_flop_formula(torch.ops.lora_kernels.backward)
def _backward_flops(dy, x, weight, lora_A, lora_B, u, seed, scale, dropout_p, need_dx, need_da, need_db, *args, **kwargs) -> int:
    M, N = math.prod(dy[:-1]), dy[-1]
    total = 0
    if need_dx or need_da:
        total += M * N * lora_B[1]
    if need_dx:
        total += M * weight[1] * (N + lora_A[0])
    if need_da:
        total += M * x[-1] * lora_B[1]
    if need_db:
        total += M * N * u[1]
    return 2 * total

"""DoRA: the direction of ``W + scale B A`` and a trained magnitude for each output.

    y = g (x W^T + scale (x A^T) B^T) + bias      g = m / norm      norm[n] = || W[n] + scale B[n] A ||

The norm is a constant of the backward pass (Liu et al. 2024, arXiv:2402.09353, section 4.3), and B A is never made for it:

    norm^2 = || W ||^2 + 2 scale rowsum(B . (W A^T)) + scale^2 rowsum((B A A^T) . B)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .autograd import autocast, check, lora_linear, refused_twice
from .chain import grad_mm, rows_at_a_time
from .checks import check_base, check_number, check_vector
from .dispatch import triton_missing, without_autocast
from .operands import as_matrix, like_tokens


@torch.no_grad()
def weight_norm(weight, lora_A, lora_B, scale: float) -> torch.Tensor:
    """``|| W[n] + scale B[n] A ||`` for each n: float32 ``[N]`` (float64 for float64), from products with the skinny A and B alone.

    Args:
        weight: ``[N, K]``. lora_A: ``[r, K]``. lora_B: ``[N, r]``; rounded to the weight's dtype first, as the layer multiplies them.
    Accuracy:
        A float32 rounding of ``||W||^2 + ||scale B A||^2``: a row that the update all but cancels keeps fewer digits.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    with without_autocast(weight.device):
        step, parts = rows_at_a_time(weight, *weight.shape), []
        for rows in weight.split(step) if step < weight.shape[0] else (weight,):
            rows = rows.to(wide) if rows is not weight else rows
            parts.append((torch.linalg.vector_norm(rows, dim=1, dtype=wide).square(), grad_mm(rows, A.t().to(rows.dtype), wide)))
        own, cross = (torch.cat(each) for each in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
        A, B = A.to(wide), B.to(wide)
        update = torch.mm(B, torch.mm(A, A.t()))
        return (own + (B * (2 * scale * cross + scale**2 * update)).sum(1)).clamp_min(0).sqrt()


def gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """``magnitude / norm``; where the norm is 0 the magnitude alone, so that a row of zeros (a padded or pruned one) answers 0, not NaN."""
    return magnitude.to(norm.dtype) / norm.masked_fill(norm == 0, 1.0)


class ScaleColumns(torch.autograd.Function):
    """``t [..., N] * g [N] + bias [N]``, g in float32, rounded once; gradients of g and bias are summed in float32.

    kernels: Whether the backward pass is a kernel's, where nobody looks on. The library's is four passes, with float32 tensors of t's size.
    """

    @staticmethod
    def forward(ctx, t, g, bias, kernels):
        y = t.new_empty(math.prod(t.shape[:-1]), t.shape[-1])
        for part, its_y in _parts(t, y):
            # Into y itself, to whose dtype torch rounds as it computes: no float32 tensor of its size is made.
            torch.mul(part, g, out=its_y) if bias is None else torch.addcmul(bias, part, g, out=its_y)
        ctx.save_for_backward(t if ctx.needs_input_grad[1] else None, g)
        ctx.bias_dtype, ctx.kernels = None if bias is None else bias.dtype, kernels
        return like_tokens(y, t)

    @staticmethod
    @refused_twice
    def backward(ctx, dy):
        t, g = ctx.saved_tensors
        need_t, need_g, need_bias, _ = ctx.needs_input_grad
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=g.dtype).to(ctx.bias_dtype) if need_bias else None
        if ctx.kernels and _kernel_serves(dy, t, g) and (need_t or need_g):
            from . import launch_columns

            return *launch_columns.backward(dy, t, g, need_t), dbias, None
        dt = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_t else None
        dg = torch.zeros_like(g) if need_g else None
        for its_dy, its_t, its_dt in _parts(dy, t if need_g else dy, dt if need_t else dy):
            if need_t:
                torch.mul(its_dy, g, out=its_dt)
            if need_g:
                dg += (its_dy.to(g.dtype) * its_t).sum(0)
        return dt, dg, dbias, None


def _kernel_serves(dy: torch.Tensor, t: torch.Tensor | None, g: torch.Tensor) -> bool:
    return not ops.watched() and dy.numel() > 0 and dy.dtype != torch.float64 and triton_missing() is None and ops.plain(dy, t, g)


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of each, `rows_at_a_time`."""
    matrices = [as_matrix(t) for t in tensors]
    step = rows_at_a_time(matrices[0], *matrices[0].shape)
    return zip(*(m.split(step) for m in matrices), strict=True)


def dora_linear(
    x, weight, lora_A, lora_B, magnitude, bias=None, *, base=None, scale=1.0, dropout_p=0.0, training=False, config=None, impl="auto"
):  # fmt: skip
    """Linear layer with a DoRA update: ``y = magnitude / norm * (x W^T + scale (x A^T) B^T) + bias``.

    Args:
        weight: ``[N, K]``, frozen; or a function that makes it: called once for y, norm and product both, and for x's gradient once
            more, with dropout twice, with the same result; none is kept.
        magnitude: ``[N]``, lora_A's dtype; `weight_norm` of a fresh adapter makes it the identity.
        base: ``[..., N]``, x's dtype: ``x W^T + bias`` as another layer, a quantised one, say, makes it; not written to. Then weight and
            bias are what that layer multiplies by and adds, for the norm and for what the magnitude does not scale. None: made here.
        dropout_p: On the adapter's input, with PEFT's meaning: ``x W^T + (g - 1) drop(x) W^T + g scale (drop(x) A^T) B^T``, which
            takes a second product with W while training. The mask is torch's own (F.dropout).
        The others: as in `lora_linear`; ``scale`` is a float.
    Returns:
        ``[..., N]`` in x's dtype; the products are rounded to it once before the magnitude scales them in float32. With base and
        dropout the magnitude scales B, which is rounded to its dtype.
    Gradients:
        For x, lora_A, lora_B, magnitude, bias and base; the norm is held constant.
    Raises:
        The errors of `lora_linear`. ValueError, TypeError: magnitude's or base's shape, dtype or device.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3; dropout as PEFT has it.
    """
    make = None
    if callable(weight):
        make, weight = weight, weight()
    x, weight, bias = autocast(x, weight, bias, base)
    if weight is None:
        raise TypeError("weight: wanted a tensor [out_features, in_features] or a function that makes it, got NoneType")
    check_number("scale", scale, "a float")
    check(x, weight, lora_A, lora_B, bias, None, scale, dropout_p, None, None, None, config, impl, None)
    check_vector("magnitude", magnitude, weight, lora_A)
    if base is not None:
        check_base(x, None, None, base)
        if base.shape[-1] != weight.shape[0]:
            raise ValueError(f"base: wanted {weight.shape[0]} outputs to match weight {list(weight.shape)}, got {list(base.shape)}")
    g = gain(magnitude, weight_norm(weight, lora_A, lora_B, scale))
    how: dict[str, Any] = dict(scale=scale, config=config, impl=impl)
    kernels = impl == "triton" or (impl == "auto" and (config is not None or x.is_cuda))
    dropped = F.dropout(x, dropout_p) if training and dropout_p else x
    if base is None:
        y = lora_linear(dropped, weight if make is None else _made_first(weight, make), lora_A, lora_B, **how)
        y = ScaleColumns.apply(y, g, bias, kernels)
        return y if dropped is x else y + _product(x - dropped, weight, make)
    if dropped is x:  # base has the bias, of which the magnitude scales nothing
        y = lora_linear(x, None, lora_A, lora_B, base=base, **how)
        return ScaleColumns.apply(y, g, None if bias is None else (1 - g) * bias, kernels)
    # The magnitude on B itself: where g is small, little is left of the sum of the update and of (g - 1) times it.
    base = base + ScaleColumns.apply(_product(dropped, weight, make), g - 1, None, kernels)
    return lora_linear(dropped, None, lora_A, (g[:, None] * lora_B).to(lora_B.dtype), base=base, **how)


class Product(torch.autograd.Function):
    """``x W^T`` by a weight that is made already, and for dX made again; it is not kept."""

    @staticmethod
    def forward(ctx, x, weight, make):
        ctx.make, ctx.dtype = make, x.dtype
        ctx.save_for_backward()
        return F.linear(x, weight)

    @staticmethod
    @refused_twice
    def backward(ctx, dy):
        return torch.matmul(dy, ctx.make().to(dy.dtype)).to(ctx.dtype), None, None


def _product(x: torch.Tensor, weight: torch.Tensor, make: Callable[[], torch.Tensor] | None) -> torch.Tensor:
    return F.linear(x, weight) if make is None else Product.apply(x, weight, make)


def _made_first(weight: torch.Tensor, make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that makes the weight, but for its first call, which gets the one that is made already."""
    made = [weight]
    return lambda: made.pop() if made else make()

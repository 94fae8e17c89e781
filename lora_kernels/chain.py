"""The torch arm: the shortest chain of library calls, with its backward by hand.

    u = scale (drop(x) A^T)      y = x W^T + bias, then y += u B^T in place
    dS = scale (dY B)            dX = dY W, then dX += D.(dS A)      dA = dS^T drop(x)      dB = dY^T u

The scale rides on the skinny products as GEMM's alpha, in float32; nothing makes an extra pass over y, and dY B is
computed once for dA and dX. The dropout mask is regenerated from Philox, never stored.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import philox

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def base_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` by the fastest library at hand.

    torch's float32 matmul on a CPU is MKL, which leaves AVX-512 unused on other makers' processors; oneDNN, which torch
    also carries, does not (docs/measured.md). Torch's own linear serves everything else.
    """
    if x.dtype == torch.float32 and not x.is_cuda and _onednn() and min(x.shape[0], *weight.shape) >= 16:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _onednn() -> bool:
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * (a @ b)``, the scale applied to the accumulator where the library allows it."""
    if scale == 1.0:
        return torch.mm(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    return out.addmm_(a, b, beta=0, alpha=scale)


def grad_mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` accumulated in float32 and returned in ``dtype``, without a 16-bit rounding in between."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def kept_bits(seed: torch.Tensor, tokens: int, features: int, p: float, dtype: torch.dtype) -> torch.Tensor:
    """The dropout mask as integers of ``dtype``'s width, all ones where an element is kept: see `drop`."""
    return philox.keep_mask(seed, tokens, features, p).to(_INTEGERS[dtype.itemsize]).neg_()


def drop(t: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """``where(keep, t, 0)`` as a bitwise and: seven times as fast as masked_fill in bfloat16 on a CPU (docs/measured.md)."""
    return t.view(bits.dtype).bitwise_and(bits).view(t.dtype)


def forward(x, weight, lora_A, lora_B, bias, seed, scale: float, p: float):
    """``y [M, N]`` and ``u [M, r]`` for x ``[M, K]``; p = 0 means no dropout."""
    A, B = (lora_A, lora_B) if lora_A.dtype == x.dtype else (lora_A.to(x.dtype), lora_B.to(x.dtype))
    adapter_in, u_scale = x, scale
    if p:  # the 1 / (1 - p) goes into the product's scale, so that nothing is rounded here
        adapter_in, u_scale = drop(x, kept_bits(seed, x.shape[0], x.shape[1], p, x.dtype)), scale * philox.inv_keep(p)
    u = scaled_mm(adapter_in, A.t(), u_scale)
    y = base_linear(x, weight, bias)
    return y.addmm_(u, B.t()), u


def backward(dy, x, weight, lora_A, lora_B, u, seed, scale: float, p: float, need_dx: bool, need_da: bool, need_db: bool, adapter_dtype):
    """``dX [M, K], dA [r, K], dB [N, r]``, each None where not needed; operands that no needed gradient uses may be None."""
    dx = da = db = None
    if need_dx or need_da:
        ds = scaled_mm(dy, lora_B.to(dy.dtype), scale)
        if p:
            K = x.shape[1] if need_da else weight.shape[1]
            bits = kept_bits(seed, dy.shape[0], K, p, dy.dtype)  # one mask serves dX and dA
    if need_dx:
        dx = base_linear(dy, weight.t(), None)
        A = lora_A.to(dy.dtype)
        if p:
            dx += drop(scaled_mm(ds, A, philox.inv_keep(p)), bits)
        else:
            dx.addmm_(ds, A)
    if need_da:
        da = grad_mm(ds.t(), drop(x, bits) if p else x, adapter_dtype)
        if p:
            da *= philox.inv_keep(p)
    if need_db:
        if adapter_dtype == torch.float32:  # the long matrix untransposed: in float32 faster by more than the small copy
            db = grad_mm(u.t(), dy, adapter_dtype).t().contiguous()
        else:
            db = grad_mm(dy.t(), u, adapter_dtype)
    return dx, da, db

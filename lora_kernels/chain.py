"""The torch arm: the shortest chain of library calls, with its backward by hand.

    u = scale (drop(x) A^T)      y = x W^T + bias, then y += u B^T in place
    dS = scale (dY B)            dX = dY W, then dX += D.(dS A)      dA = dS^T drop(x)      dB = dY^T u

Layers of one x (`projections`) add their dX to one tensor, GEMM's beta = 1, and share u and dA; those that one weight packs (`packed`) have
one base product and one dX.

The scale rides on the skinny products as GEMM's alpha, in float32; nothing makes an extra pass over y, and dY B is
computed once for dA and dX. The dropout mask is regenerated from Philox, or on a CPU, where that costs as much as a product, kept as bits.

Many adapters, and experts, which have weights of their own: the same for each adapter's own tokens, which are views where they are
neighbours and gathered where not. How many tokens an adapter has is asked of the device, so on a GPU this arm waits for it, and cannot be
captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from . import philox
from .operands import as_matrix, like_tokens
from .packed import layers_of
from .problem import is_stack, sharded
from .segments import CPU, Adapters, Segments

_WIDENED = 1 << 19  # elements of 16 bits that are widened at a time: they stay in the cache, where whole ones would be of fresh pages
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def base_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` by the fastest library at hand.

    torch's float32 matmul on a CPU is MKL, which leaves AVX-512 unused on processors that are not Intel's; oneDNN, which torch
    also carries, does not (docs/measured.md). Torch's own linear serves everything else, and everything inside
    ``torch.backends.mkldnn.flags(enabled=False)``: oneDNN's float32 sums round more than MKL's (docs/numerics.md).
    """
    if _by_onednn(x, weight):
        # oneDNN reads a bias with any stride as if it had stride 1
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _product(x, weight, bias, base) -> torch.Tensor:
    """The base product, to add to: a copy of what is given."""
    return base_linear(x, weight, bias) if base is None else base.clone(memory_format=torch.contiguous_format)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.dtype != torch.float32 or x.is_cuda or not _onednn():
        return False
    return bool(torch.backends.mkldnn.enabled) and min(x.shape[0], *weight.shape) >= 16


@functools.cache
def _onednn() -> bool:
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    about = Path("/proc/cpuinfo")
    intels = about.exists() and "GenuineIntel" in about.read_text()
    return has_op and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not intels


def base_gradient(dy: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
    """``dY W``, added to ``onto`` where there is one, by the fastest library at hand."""
    if not _by_onednn(dy, weight):
        return torch.mm(dy, weight) if onto is None else onto.addmm_(dy, weight)
    if onto is None:
        return base_linear(dy, weight.t(), None)
    return torch.ops.mkldnn._linear_pointwise.binary(dy, onto, weight.t(), None, "add")


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * (a @ b)``, the scale applied to the accumulator where the library allows it."""
    if scale == 1.0:
        return torch.mm(a, b)
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)  # which beta = 0 does not read


def grad_mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` accumulated in float32 (float64 of float64) and returned in ``dtype``, without a 16-bit rounding in between."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda and a.dtype.itemsize == 2 and not sharded(a):  # all that torch has a float32 result of
        return torch.mm(a, b, out_dtype=dtype)
    wide = torch.promote_types(a.dtype, dtype)
    step = rows_at_a_time(a, a.shape[1], max(a.shape[0], b.shape[1]))
    if step >= a.shape[1]:
        return torch.mm(a.to(wide), b.to(wide)).to(dtype)
    product = a.new_zeros(a.shape[0], b.shape[1], dtype=wide)
    for begin in range(0, a.shape[1], step):
        part = slice(begin, begin + step)
        product.addmm_(a[:, part].to(wide), b[part].to(wide))
    return product.to(dtype)


def rows_at_a_time(t: torch.Tensor, rows: int, columns: int) -> int:
    """How many of so many rows of a tensor's dtype to widen to float32 at a time: all of them, but of 16 bits on a CPU."""
    if t.device != CPU or t.dtype.itemsize != 2 or sharded(t) or is_compiling():
        return max(rows, 1)
    return max(_WIDENED // max(columns, 1), 1)


def kept_bits(mask: torch.Tensor, tokens: int, features: int, p: float, dtype: torch.dtype) -> torch.Tensor:
    """The dropout mask as integers of ``dtype``'s width, all ones where an element is kept: see `drop`. mask: its seed, or its bits."""
    bits = philox.packed_mask(mask, tokens, features, p) if mask.dtype == torch.int64 else mask
    return philox.unpacked(bits, features, _INTEGERS[dtype.itemsize])


def drop(t: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """``where(keep, t, 0)`` as a bitwise and: seven times as fast as masked_fill in bfloat16 on a CPU (docs/measured.md)."""
    return t.resolve_neg().view(bits.dtype).bitwise_and(bits).view(t.dtype)  # what torch negates as it reads it is no bits yet


class Run(NamedTuple):
    """One adapter's tokens: a slice where they are neighbours, else their indices; its rank, and its scale."""

    adapter: int
    rows: slice | torch.Tensor
    rank: int
    scale: float


def runs(plan: Segments, adapters: Adapters, rank: int, scale: float) -> Iterator[Run]:
    """The adapters that have tokens."""
    scales = None if adapters.scales is None else adapters.scales.tolist()
    ranks = None if adapters.ranks is None else adapters.ranks.tolist()
    for e, rows in _rows(plan):
        yield Run(e, rows, rank if ranks is None else min(ranks[e], rank), scale * (1.0 if scales is None else scales[e]))


def _rows(plan: Segments) -> list[tuple[int, slice | torch.Tensor]]:
    """The tokens of each adapter that has some; on a CPU kept with the plan, for the layers that it serves."""
    kept, stamp = plan.__dict__.get("_rows"), None
    if plan.device == CPU and not plan.order.is_inference():
        stamp = plan.starts._version, plan.order._version
        if kept is not None and kept[0] == stamp:
            return kept[1]
    starts, order, E = plan.starts.tolist(), plan.order.long(), plan.num_adapters
    first = order[plan.starts[:E].clamp(max=plan.tokens - 1).long()].tolist()
    last = order[(plan.starts[1 : E + 1] - 1).clamp(min=0).long()].tolist()
    found: list[tuple[int, slice | torch.Tensor]] = []
    for e in range(E):
        begin, end = starts[e], starts[e + 1]
        if begin < end:
            neighbours = last[e] - first[e] == end - begin - 1  # the order is stable, so ascending
            found.append((e, slice(first[e], last[e] + 1) if neighbours else order[begin:end]))
    if stamp is not None:
        plan.__dict__["_rows"] = stamp, found
    return found


def tokens_of(x: torch.Tensor, rows: slice | torch.Tensor, top_k: int) -> torch.Tensor:
    """The rows of x that these rows of a plan are of, each of x being top_k of the plan."""
    if top_k > 1:
        rows = torch.arange(rows.start, rows.stop, device=x.device) if isinstance(rows, slice) else rows
        rows = rows // top_k
    return x[rows]


def add_product(t: torch.Tensor, rows: slice | torch.Tensor | None, a, b, bits=None, keep: float = 1.0) -> None:
    """``t[rows] += D.(a @ b)``; rows None: all of them, bits None: no dropout."""
    if isinstance(rows, torch.Tensor):
        gathered = t[rows]
        add_product(gathered, None, a, b, bits, keep)
        t.index_copy_(0, rows, gathered)
        return
    part = t if rows is None else t[rows]
    if bits is None:
        part.addmm_(a, b)
    else:
        part.add_(drop(scaled_mm(a, b, keep), bits))


def down(x, lora_A, adapters: Adapters, scale: float, save_u=True, config=None):
    """``u = scale x A^T [M, R]``; see `launch.down`."""
    u = scaled_mm(as_matrix(x), (lora_A if lora_A.dtype is x.dtype else lora_A.to(x.dtype)).t(), scale)
    return u if adapters.scales is None else u.mul_(adapters.scales)


def grad_u(dy, B, adapters: Adapters, scale: float):
    """``dS = scale dY B [M, L r]``, of each of L packed layers from its own columns of dY."""
    if not adapters.widths:
        return down(dy, B.t(), adapters, scale)
    return torch.cat([down(dy[:, own], B[own].t(), adapters, scale) for own, _ in layers_of(adapters.widths, B.shape[1])], 1)


def its_rows(A, layers: int, rank: int):
    """The rows of one adapter's ``A [L r, K]`` within its rank, ``[L rank, K]``."""
    return A[:rank] if layers == 1 else A.unflatten(0, (layers, -1))[:, :rank].flatten(0, 1)


def forward(x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale: float, p: float, save_u=True, config=None, base=None, u=None):
    """``y [..., N]`` and ``u [M, r]`` for x ``[..., K]``; p = 0: no dropout. With segments u is None unless ``save_u``; else it is free."""
    given, x, base = x, as_matrix(x), as_matrix(base)
    A, B = (lora_A, lora_B) if lora_A.dtype == x.dtype else (lora_A.to(x.dtype), lora_B.to(x.dtype))
    M, bits = x.shape[0] * adapters.top_k, None
    if p:  # the 1 / (1 - p) goes into the product's scale, so that nothing is rounded here
        bits, scale = kept_bits(seed, M, x.shape[1], p, x.dtype), scale * philox.inv_keep(p)
    if adapters.segments is None:
        if u is None:
            u = down(x if bits is None else drop(x, bits), A, adapters, scale)
        if not adapters.widths:
            y = base_linear(x, weight, bias).addmm_(u, B.t()) if base is None else torch.addmm(base, u, B.t())
            return like_tokens(y, given), u
        y = _product(x, weight, bias, base)
        for own, ranks in layers_of(adapters.widths, B.shape[1]):
            y[:, own].addmm_(u[:, ranks], B[own].t())
        return like_tokens(y, given), u
    u, layers = x.new_zeros(M, A.shape[1]) if save_u else None, adapters.layers
    experts = is_stack(weight)
    y = x.new_zeros(M, weight.shape[1]) if experts else _product(x, weight, bias, base)
    for e, rows, rank, its_scale in runs(adapters.segments, adapters, B.shape[2], scale):
        its_x = tokens_of(x, rows, adapters.top_k)
        its_u = scaled_mm(its_x if bits is None else drop(its_x, bits[rows]), its_rows(A[e], layers, rank).t(), its_scale)
        if save_u and layers == 1:
            u[rows, :rank] = its_u
        elif save_u:
            u.view(M, layers, B.shape[2])[rows, :, :rank] = its_u.view(len(its_u), layers, rank)
        if experts:
            y[rows] = base_linear(its_x, weight[e], None if bias is None else bias[e]).addmm_(its_u, B[e, :, :rank].t())
        elif layers == 1:
            add_product(y, rows, its_u, B[e, :, :rank].t())
        else:
            for own, ranks in layers_of(adapters.widths, rank):
                add_product(y[:, own], rows, its_u[:, ranks], B[e, own, :rank].t())
    return like_tokens(y, given, adapters.top_k), u


def backward(
    dy, x, weight, lora_A, lora_B, u, seed, adapters: Adapters, scale: float, p: float, needs, adapter_dtype, config=None,
    onto=None, ds=None, all_ds=None,
):  # fmt: skip
    """``dX [..., K], dA [(E,) r, K], dB [(E,) N, r]``, each None where not needed; operands that no needed gradient uses may be None.

    The rest as in `launch.backward`; onto, ds and all_ds come without segments. Beside a stack a row of dY may be that of several rows of
    the plan, neighbours: as many as dY has fewer.
    """
    given, dy, x, onto = dy, as_matrix(dy), as_matrix(x), as_matrix(onto)
    need_dx, need_da, need_db = needs
    bits, M = None, adapters.segments.tokens if adapters.segments else dy.shape[0]
    if p and (need_dx or need_da):
        bits = kept_bits(seed, M, x.shape[1] if need_da else lora_A.shape[-1], p, dy.dtype)  # one mask serves dX and dA
    A, B = lora_A, lora_B
    if adapter_dtype != dy.dtype:
        A, B = (None if t is None else t.to(dy.dtype) for t in (A, B))
    keep = philox.inv_keep(p) if p else 1.0
    dx: Any = None
    if need_dx and weight is not None and not is_stack(weight):
        dx = base_gradient(dy, weight, onto)
    elif need_dx and adapters.segments is not None:
        dx = dy.new_zeros(M, A.shape[-1])
    if adapters.segments is not None:
        da, db = _each_backward(dx, dy, x, weight, A, B, u, adapters.segments, adapters, scale, bits, keep, needs, adapter_dtype)
        return dx if dx is None else like_tokens(dx, given), da, db
    if need_dx or need_da or ds is not None:
        own = grad_u(dy, B, adapters, scale)
        if ds is not None:
            ds.copy_(own)
        ds = own  # not ds's columns of all_ds: oneDNN's products read past odd rows (docs/numerics.md), what is not written yet there
    if dx is not None:
        add_product(dx, None, ds, A, bits, keep)
    elif need_dx:
        dx = scaled_mm(ds, A, keep)
        dx = dx if bits is None else drop(dx, bits)
    da = _grad_A(ds if all_ds is None else all_ds, x, bits, keep, adapter_dtype) if need_da else None
    db = _grad_B(dy, u, adapter_dtype, adapters.widths) if need_db else None
    return dx if dx is None else like_tokens(dx, given), da, db


def _each_backward(dx, dy, x, weight, A, B, u, plan: Segments, adapters: Adapters, scale: float, bits, keep: float, needs, adapter_dtype):
    """dA and dB of a batch with segments, adapter by adapter; each one's part of dX is added to ``dx``."""
    need_dx, need_da, need_db = needs
    E, layers = adapters.number, adapters.layers
    R = u.shape[1] // layers if B is None else B.shape[2]
    da: Any = dy.new_zeros(E, layers * R, x.shape[1], dtype=adapter_dtype) if need_da else None
    db: Any = dy.new_zeros(E, dy.shape[1], R, dtype=adapter_dtype) if need_db else None
    unscaled = adapters._replace(scales=None)  # the scale of each is in its run
    for e, rows, rank, its_scale in runs(plan, adapters, R, scale):
        its_dy, its_bits = tokens_of(dy, rows, plan.tokens // dy.shape[0]), None if bits is None else bits[rows]
        if need_dx or need_da:
            ds = grad_u(its_dy, B[e, :, :rank], unscaled, its_scale)
        if need_dx and is_stack(weight):
            its_dx = torch.mm(its_dy, weight[e])
            add_product(its_dx, None, ds, its_rows(A[e], layers, rank), its_bits, keep)
            dx[rows] = its_dx
        elif need_dx:
            add_product(dx, rows, ds, its_rows(A[e], layers, rank), its_bits, keep)
        if need_da:
            own = _grad_A(ds, tokens_of(x, rows, adapters.top_k), its_bits, keep, adapter_dtype)
            if layers == 1:
                da[e, :rank] = own
            else:
                da[e].view(layers, R, -1)[:, :rank] = own.view(layers, rank, x.shape[1])
        if need_db:
            its_u = u[rows, :rank] if layers == 1 else u.view(-1, layers, R)[rows, :, :rank].flatten(1)
            db[e, :, :rank] = _grad_B(its_dy, its_u, adapter_dtype, adapters.widths)
    return da, db


def _grad_A(ds, x, bits, keep: float, dtype):
    """``dS^T (D.x)``."""
    if bits is None:
        return grad_mm(ds.t(), x, dtype)
    return grad_mm(ds.t(), drop(x, bits), dtype).mul_(keep)


def _grad_B(dy, u, dtype, widths=()):
    """``dY^T u``, of each packed layer's own columns of both."""
    if widths:
        return torch.cat([_grad_B(dy[:, own], u[:, ranks], dtype) for own, ranks in layers_of(widths, u.shape[1] // len(widths))])
    if dtype == torch.float32:  # the long matrix untransposed: in float32 faster by more than the small copy
        # cloned: to torch a row turned into a column is contiguous as it is, and DDP warns of its strides
        return grad_mm(u.t(), dy, dtype).t().clone(memory_format=torch.contiguous_format)
    return grad_mm(dy.t(), u, dtype)

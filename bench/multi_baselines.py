"""Many adapters by what a library has, as formulas of a point's operands, beside the base alone; and why one cannot serve a point.

linear        x W^T                                                       the base alone: the floor
gather-bmm    A[ids] and B[ids] copied for every token, bmm, then baddbmm into y
grouped-mm    rows gathered by adapter, torch._grouped_mm twice, rows gathered back and added; ranks padded; the sorting is not timed
peft-loop     for each adapter y[rows] += lora_B(lora_A(x[rows])) * scale as PEFT's mixed batches; the index lists are not timed
one-adapter   `lora_linear` without segments, all tokens through one adapter

Where a weight packs several layers, as q, k and v:
each:linear   x W_i^T for each layer
each:auto     `lora_linear` for each layer, with its own A and B
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from lora_kernels.packed import layers_of

from . import workloads
from .baselines import Formula, linear, ours
from .multi_workloads import MultiOperands, MultiPoint, counts
from .workloads import Operands

MOST_COPIED = 4 << 30
MOST_GROUPS = 1023
MOST_LOOPED = 64
GROUP_ROWS = 8  # 16 bytes of bfloat16: the alignment of a group's rows where they are the summed axis, as for dA and dB


def gather_bmm() -> Formula:
    @once
    def indices(o: MultiOperands):
        without = o.ids < 0
        return o.ids.clamp(min=0), (~without).to(o.x.dtype)[:, None, None] if -1 in o.host_ids else None

    def formula(o: MultiOperands) -> torch.Tensor:
        ids, has = indices(o)
        y = linear(o)
        u = torch.bmm(o.lora_A[ids], o.x.unsqueeze(2))
        u = u if has is None else u * has
        return y.unsqueeze(2).baddbmm_(o.lora_B[ids], u, alpha=o.scale).squeeze(2)

    return formula


def copied_bytes(point: MultiPoint) -> int:
    """Of A[ids] and B[ids], and in training of their gradients."""
    return point.M * point.r * (point.K + point.N) * point.dtype.itemsize * (1 if point.forward_alone else 2)


@dataclass(frozen=True)
class Groups:
    """``order``: rows by adapter, each group padded to ``rows``; ``ends``: of the groups; ``back``: each token's place."""

    order: torch.Tensor
    ends: torch.Tensor
    back: torch.Tensor


def groups(o: MultiOperands, rows: int) -> Groups:
    tokens: list[list[int]] = [[] for _ in range(o.lora_A.shape[0])]
    for m, e in enumerate(o.host_ids):
        tokens[e].append(m)
    order: list[int] = []
    ends: list[int] = []
    back = [0] * len(o.host_ids)
    for mine in tokens:
        for m in mine:
            back[m] = len(order)
            order.append(m)
        order += [0] * (-len(mine) % rows)  # any row will do: nothing is read of its results, so its gradients are zero
        ends.append(len(order))
    made = torch.tensor(order), torch.tensor(ends, dtype=torch.int32), torch.tensor(back)
    return Groups(*(t.to(o.x.device) for t in made))


def grouped_mm() -> Formula:
    cached = once(lambda o: groups(o, GROUP_ROWS if torch.is_grad_enabled() else 1))

    def formula(o: MultiOperands) -> torch.Tensor:
        g = cached(o)
        y = linear(o)
        u = torch._grouped_mm(o.x.index_select(0, g.order), o.lora_A.mT, offs=g.ends)
        if torch.is_grad_enabled():  # an alpha of the addition would cost a pass over dY
            return y.add_(torch._grouped_mm(u * o.scale, o.lora_B.mT, offs=g.ends).index_select(0, g.back))
        return y.add_(torch._grouped_mm(u, o.lora_B.mT, offs=g.ends).index_select(0, g.back), alpha=o.scale)

    return formula


def peft_loop() -> Formula:
    @once
    def batches(o: MultiOperands) -> list[tuple[int, torch.Tensor]]:
        return [(e, (o.ids == e).nonzero().squeeze(1)) for e in sorted(set(o.host_ids)) if e >= 0]

    def formula(o: MultiOperands) -> torch.Tensor:
        result = linear(o)
        # PEFT's adapters are parameters of their own; a stack's slices would each cost a gradient of the whole stack.
        A, B = (o.lora_A.unbind(0), o.lora_B.unbind(0)) if torch.is_grad_enabled() else (o.lora_A, o.lora_B)
        for e, rows in batches(o):
            rank = o.host_ranks[e]
            result[rows] += F.linear(F.linear(o.x[rows], A[e][:rank]), B[e][:, :rank]) * o.scale
        return result

    return formula


FORMULAS: dict[str, Callable[[], Formula]] = {
    "linear": lambda: linear,
    "gather-bmm": gather_bmm,
    "grouped-mm": grouped_mm,
    "peft-loop": peft_loop,
    "torch": lambda: ours("torch"),
    "auto": lambda: ours("auto"),
}


def each_layer(formula: Formula) -> Callable[[MultiOperands], list[torch.Tensor]]:
    """A formula of one layer, for each of those that a weight packs, whose y are apart then."""

    @once
    def layers(o: MultiOperands) -> list[MultiOperands]:
        found = []
        for own, ranks in layers_of(o.adapters.widths, o.lora_B.shape[2]):
            # A serving engine has each layer's stack in one piece.
            A, B, W = (t.detach().contiguous() for t in (o.lora_A[:, ranks], o.lora_B[:, own], o.weight[own]))
            found.append(replace(o, weight=W, lora_A=A, lora_B=B, adapters=o.adapters._replace(widths=())))
        return found

    return lambda o: [formula(each) for each in layers(o)]


EACH_BASE = "each:linear"
PACKED: dict[str, Callable[[], Callable]] = {EACH_BASE: lambda: each_layer(linear), "each:auto": lambda: each_layer(ours("auto"))}


def why_not(name: str, point: MultiPoint, device: torch.device) -> str | None:
    """Why a formula is left out at a point, or None."""
    if point.widths and name not in ("linear", "torch", "auto"):
        return "it serves one layer a call"
    if name == "gather-bmm" and copied_bytes(point) > MOST_COPIED:
        return f"its gathered copies would take {copied_bytes(point) / (1 << 30):.1f} GiB, past {MOST_COPIED >> 30}"
    if name == "grouped-mm":
        return _why_not_grouped(point, device)
    if name == "peft-loop" and not point.forward_alone and point.adapters > MOST_LOOPED:
        return f"its gradient makes tensors of x's size for each of {point.adapters} adapters, past {MOST_LOOPED}"
    return None


def has_grouped_mm(device: torch.device) -> bool:
    """On a CPU from torch 2.9 on."""
    known = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return hasattr(torch, "_grouped_mm") and known("aten::_grouped_mm", device.type.upper())


def _why_not_grouped(point: MultiPoint, device: torch.device) -> str | None:
    if has_grouped_mm(device) and sum(counts(point)) < point.M:
        return "it writes nothing for tokens without an adapter"
    return why_not_grouped_mm(device, point.dtype, point.loaded, r=point.r)


def why_not_grouped_mm(device: torch.device, dtype: torch.dtype, groups: int, **widths: int) -> str | None:
    """Why torch's grouped matmul cannot serve matrices of these widths, which are their rows' strides, or None."""
    if not has_grouped_mm(device):
        return f"torch {torch.__version__} has no _grouped_mm on {device.type}"
    if groups > MOST_GROUPS:
        return f"it takes at most {MOST_GROUPS} groups, got {groups}"
    for name, width in widths.items():
        if width * dtype.itemsize % 16:
            return f"it wants strides of multiples of 16 bytes, got {name} = {width}"
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (9, 0)):
        return "its kernel is for bfloat16 on sm_90 and later"
    return None


def why_not_captured(name: str, took: str) -> str | None:
    """Why an arm cannot be captured in a CUDA graph, or None."""
    waits = "torch" in (name, took)
    return "it asks the device how many tokens each adapter has, so it cannot be captured in a CUDA graph" if waits else None


def one_adapter(o: MultiOperands) -> Operands:
    """The same tokens with one adapter, the stack's first."""
    A, B = (t.detach()[0].clone().requires_grad_() for t in (o.lora_A, o.lora_B))
    return Operands(o.x, o.weight, A, B, o.dy, o.scale, o.p)


def one_adapter_point(point: MultiPoint) -> workloads.Point:
    return workloads.Point("train", point.layer, point.M, point.K, point.N, point.r, point.p, point.dtype)


def once(function):
    """Keeps what ``function`` made of the latest operands: what the host prepares once for all layers of a batch."""
    latest: list = [None, None]

    @functools.wraps(function)
    def cached(o):
        if latest[0] is not o:
            latest[:] = o, function(o)
        return latest[1]

    return cached

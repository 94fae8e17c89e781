"""What a call asks for: `Problem`, the value that dispatch and tuning decide on, read off a call's operands by `describe`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from .operands import as_matrix
from .segments import CPU, ONE, Adapters

MAX_RANK = 512
PLAIN = (torch.Tensor, torch.nn.Parameter)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UnsupportedError(RuntimeError):
    """A legal request that this implementation, device or configuration does not serve; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One pass as a matmul shape: ``x[M, K] w[K, N] + u[M, R] v[R, N]``.

    ``x_row_major``: x is contiguous along K. ``w_major``: the axis along which w is contiguous, "k" (nn.Linear's weight in the
    forward pass), "n" (the same weight in the backward pass), or "" (neither). ``aligned``: base addresses and the other
    strides are multiples of 16 bytes, as TMA descriptors need. ``dropout``: "" (none), "x" (on the adapter's input, forward) or
    "uv" (on the low-rank term, backward). ``wide``: an offset passes 2^31. ``adapters``: E of a batch with segments, 0 for one
    adapter; ``row_block`` and ``gather_block`` are then its plan's, ``mixed_ranks`` whether adapters have ranks of their own.
    ``base``: whether x w is another's, who hands it in (or, in the backward pass, keeps it), and only u v is to be added.
    ``experts``: whether w is a stack, one for each adapter, as in a mixture of experts. ``packed``: "n" where the outputs are those of
    several ``layers``, "k" where the columns of x are (dX of such layers), or ""; R is then of all of them.
    """

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    dropout: str = ""
    x_row_major: bool = True
    w_major: str = "k"
    aligned: bool = True
    wide: bool = False
    adapter_dtype: torch.dtype | None = None
    adapters: int = 0
    row_block: int = 0
    gather_block: int = 0
    mixed_ranks: bool = False
    base: bool = False
    experts: bool = False
    packed: str = ""
    layers: int = 1

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def lora_dtype(self) -> torch.dtype:
        """A's and B's: ``adapter_dtype``, or x's where there is none."""
        return self.adapter_dtype or self.dtype

    @property
    def tile_rank(self) -> int:
        """How many columns of u a tile of y takes: a packed layer's own."""
        return self.R // self.layers if self.packed == "n" else self.R

    def backward(self) -> Problem:
        """The problem of dX: K and N change places, and w is read along its other axis."""
        other = {"k": "n", "n": "k", "": ""}[self.w_major]
        packed = "k" if self.packed else ""
        return replace(self, N=self.K, K=self.N, w_major=other, dropout="uv" if self.dropout else "", packed=packed)


def usual_dtype(itemsize: int) -> torch.dtype:
    """The dtype of so many bytes that problems of the table are described by."""
    return {2: torch.bfloat16, 4: torch.float32}[itemsize]


def forward_flops(M: int, N: int, K: int, R: int, base: bool = False, layers: int = 1) -> int:
    """Floating-point operations of a forward pass, a multiplication and an addition each; base: without those of the base product."""
    return 2 * M * ((0 if base else N * K) + R // layers * N + R * K)


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is enabled for a device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled("cpu" if device == CPU else device.type)


def offsets_pass_int32(*tensors: torch.Tensor | None) -> bool:
    """Whether an element of any tensor lies 2^31 or more elements from its first."""
    for t in tensors:
        if t is None or t.numel() == 0 or (t.numel() < 1 << 31 and t.is_contiguous()):
            continue
        if sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= 1 << 31:
            return True
    return False


def tma_aligned(t: torch.Tensor) -> bool:
    """Whether a matrix can be read by a TMA descriptor: one axis contiguous, the rest multiples of 16 bytes, rows that do not overlap."""
    (near, size), (far, _) = sorted(zip(t.stride(), t.shape, strict=True))
    return near == 1 and far >= size and (far * t.element_size()) % 16 == 0 and t.data_ptr() % 16 == 0


def descriptors_possible(x: torch.Tensor, w: torch.Tensor, *adapters: torch.Tensor | None) -> bool:
    """`Problem.aligned` of these operands: x and w as TMA wants them, the adapters contiguous from an aligned address."""
    return tma_aligned(x) and tma_aligned(w) and all(a is None or (a.is_contiguous() and a.data_ptr() % 16 == 0) for a in adapters)


def contiguous_axis(t: torch.Tensor, first: str, second: str) -> str:
    """The name of the axis along which a matrix is contiguous, the second before the first; "" for neither."""
    return second if t.stride(1) == 1 else first if t.stride(0) == 1 else ""


def is_stack(weight: torch.Tensor | None) -> bool:
    """Whether a weight is a stack ``[E, N, K]``, one for each adapter."""
    return weight is not None and weight.dim() == 3


def one_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight ``[N, K]``: itself, or a stack's first."""
    return weight[0] if is_stack(weight) else weight


def segment_fields(adapters: Adapters) -> dict:
    """`Problem`'s part about many adapters."""
    s = adapters.segments
    if s is None:
        return {}
    return dict(adapters=s.num_adapters, row_block=s.row_block, gather_block=s.gather_block, mixed_ranks=adapters.ranks is not None)


def describe(x, weight, lora_A, lora_B, *, dropout: bool, adapters: Adapters = ONE) -> Problem:
    """The forward `Problem` of a checked call; weight is None where the base product is given."""
    x = as_matrix(x)
    w = x if weight is None else one_of(weight)
    return Problem(
        M=x.shape[0] * adapters.top_k,
        N=lora_B.shape[-2],
        K=x.shape[1],
        R=lora_A.shape[-2],
        dtype=x.dtype,
        dropout="x" if dropout else "",
        x_row_major=x.stride(-1) == 1,
        w_major=contiguous_axis(w, "n", "k"),
        aligned=descriptors_possible(x, w, lora_A, lora_B),
        wide=offsets_pass_int32(x, w),
        adapter_dtype=lora_A.dtype,
        base=weight is None,
        experts=is_stack(weight),
        packed="n" if adapters.widths else "",
        layers=adapters.layers,
        **segment_fields(adapters),
    )


def sharded(t) -> TypeGuard[Any]:
    """Whether it is a DTensor, whose module takes a while to import."""
    return hasattr(t, "placements")

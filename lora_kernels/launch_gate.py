"""The launches of what stands before a gated MLP's down projection, and in a mixture behind it; `launch` has those between."""

from __future__ import annotations

import functools

import torch

from .kernels.gate import gate_gradients, gate_product, gelu_tanh, silu, weighted_rows
from .launch import run_kernel
from .layouts import Options, cdiv
from .operands import as_matrix
from .streams import on_device

ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
BLOCK = 1024  # 8 elements a thread: a load of 16 bytes of each operand, of 16 bits


def product(act: str, gate: torch.Tensor, up: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
    """``h = act(gate) up [..., F]``, in float32 and rounded once.

    gate, up: one shape and dtype, of 16 or 32 bits, not empty, the last axis contiguous and the others as if they were one: halves of a
    contiguous tensor, say. factors: None, or one for each row of h, contiguous, any float dtype: h times them.
    """
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    its, options = _layout(gate_product, act, factors, gate, up, h)
    with on_device(gate):
        run_kernel(gate_product, (h.numel() // h.shape[-1],), (*its[:2], factors, its[2], h.shape[-1]), options)
    return h


def gradients(act: str, gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, factors: torch.Tensor | None = None, into=None):
    """dgate, dup, and the dot products of h and dh ``[rows]``, float32, None without factors.

    gate, up, factors: As in `product`; dgate and dup are of ``factors dh``. dh: contiguous, of gate's shape and dtype. into: Where dgate
    and dup go, as gate and up lie; None: a new tensor, and dh.
    """
    dgate, dup = into or (torch.empty_like(dh), dh)
    dots = None if factors is None else dh.new_empty(factors.numel(), dtype=torch.float32)
    (gate_row, up_row, *others), options = _layout(gate_gradients, act, factors, gate, up, dh, dgate, dup)
    args = (gate_row, up_row, factors, *others, dots, dh.shape[-1])
    with on_device(gate):
        run_kernel(gate_gradients, (dh.numel() // dh.shape[-1],), args, options)
    return dgate, dup, dots


def weighted_sum(y: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``z [T, N]`` of ``dtype``: each token's rows of y ``[T k, N]`` times its weights ``[T, k]``, any float dtypes, both contiguous."""
    (T, top_k), N = weights.shape, y.shape[-1]
    z = y.new_empty(T, N, dtype=dtype)
    options = _options(weighted_rows, (N, y.dtype, weights.dtype, dtype), TOP_K=top_k)
    with on_device(y):
        run_kernel(weighted_rows, (T, cdiv(N, BLOCK)), ((y, N), weights, (z, N), N), options)
    return z


def _layout(kernel, act: str, factors: torch.Tensor | None, *matrices: torch.Tensor) -> tuple[list, Options]:
    """Each matrix as the kernel takes it, and the options."""
    rows = [(t, as_matrix(t).stride(0)) for t in matrices]
    # The width is among the strides: that of h, or dh.
    alike = (*(stride for _, stride in rows), matrices[0].dtype, None if factors is None else factors.dtype)
    return rows, _options(kernel, alike, ACT=ACTIVATIONS[act])


@functools.lru_cache(maxsize=1024)
def _options(kernel, alike: tuple, **constants) -> Options:
    """One object for launches that are alike, as `launcher` wants it."""
    return Options(**constants, BLOCK=BLOCK, num_warps=4)

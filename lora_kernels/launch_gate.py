"""The launches of what stands before a gated MLP's down projection: beside `launch`, whose kernels take it from there."""

from __future__ import annotations

import functools

import torch

from .kernels.gate import gate_gradients, gate_product, gelu_tanh, silu
from .launch import run_kernel
from .layouts import Options, cdiv
from .streams import on_device

ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
BLOCK = 2048  # 16 elements a thread: two loads of 16 bytes of each operand, of 16 bits


def product(act: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``h = act(gate) up``, in float32 and rounded once. gate, up: contiguous, of one shape and dtype, of 16 or 32 bits, not empty."""
    h = torch.empty_like(gate)
    with on_device(gate):
        run_kernel(gate_product, (cdiv(h.numel(), BLOCK),), (gate, up, h, h.numel()), _options(gate_product, act, h.numel(), h.dtype))
    return h


def gradients(act: str, gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup, the latter in the place of dh, which is contiguous and of gate's shape and dtype."""
    dgate = torch.empty_like(gate)
    args = (gate, up, dh, dgate, dh, dh.numel())
    with on_device(gate):
        run_kernel(gate_gradients, (cdiv(dh.numel(), BLOCK),), args, _options(gate_gradients, act, dh.numel(), dh.dtype))
    return dgate, dh


@functools.lru_cache(maxsize=1024)
def _options(kernel, act: str, number: int, dtype: torch.dtype) -> Options:
    """One object for launches that are alike, as `launcher` wants it."""
    return Options(ACT=ACTIVATIONS[act], BLOCK=BLOCK, num_warps=4)

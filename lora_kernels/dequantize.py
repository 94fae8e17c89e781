"""The weight of a layer that stores it in fewer bits, made whole: for training calls of many tokens, and to merge into.

For few tokens bitsandbytes multiplies by 4 bits as they are. For many it makes the weight whole and multiplies by that, forward and
backward; with the same matrix at hand the product and the adapter are one call of `lora_linear`, rounded once, and dX one tensor where
autograd would add two. Like bitsandbytes it is made twice, and not kept.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from . import ops
from .merging import write_merged
from .nn import hooked, linear_of
from .operands import tokens
from .problem import UnsupportedError, autocasts

MANY = 512  # tokens above which bitsandbytes (0.50) makes weights whole on an H100, whatever their sizes; before 0.50 from two on
BLOCK = 1024  # columns of a weight that `whole` asks a layer for at a time
NEAR = 0.1  # of a product's norm: how far a layer may be from a product by its weight, as those are that quantise x, too


class Made:
    """What makes a weight ``[N, K]`` of one in 4 bits; equal to another that makes the same."""

    def __init__(self, packed: torch.Tensor, state: Any, dtype: torch.dtype):
        self.packed, self.state, self.dtype, self.version = packed.data, state, dtype, packed._version
        self.device = packed.device

    def __call__(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state).to(self.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Made) and self._what() == other._what()

    def _what(self) -> tuple:
        return self.packed.data_ptr(), self.version, id(self.state), self.dtype

    __hash__ = None  # type: ignore[assignment]


class FourBit(NamedTuple):
    """``make``: the weight ``[N, K]`` in dtype. ``bias``: ``[N]`` in dtype, or None; ``settled``: whether it is the layer's own."""

    make: Made
    bias: torch.Tensor | None
    dtype: torch.dtype
    settled: bool


def four_bit(layer: Any, x: torch.Tensor, few: bool = False) -> FourBit | None:
    """What `lora_linear` takes in the place of a product of bitsandbytes' Linear4bit, or None where the layer is to make it itself.

    That is in evaluation and for few tokens, unless the weight is made anyway (``few``), under a compiler or a mode, and where it
    multiplies in another dtype than x's or autocast's.
    """
    if not (few or (layer.training and tokens(x) > MANY)) or not is_four_bit(layer) or hooked(layer) or ops.watched():
        return None
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is None or tuple(state.shape) != (layer.out_features, layer.in_features) or repacked(state):
        return None
    dtype = layer.compute_dtype if layer.compute_type_is_set else None
    if dtype is not (torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype) or weight.device != x.device:
        return None
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return FourBit(Made(weight, state, dtype), bias, dtype, bias is layer.bias)


def repacked(state: Any) -> bool:
    """Whether bitsandbytes has put the 4 bits of this state in an order of its CPU kernel's, which nothing but that kernel reads."""
    return getattr(state, "packing_format_for_cpu", False)


def is_four_bit(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' own of 4 bits, without its package to be imported."""
    kind = type(layer)
    return kind.__name__ in ("Linear4bit", "LinearNF4", "LinearFP4") and kind.__module__ == "bitsandbytes.nn.modules"


@torch.no_grad()
def whole(layer: nn.Module, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[N, K]`` by which a layer multiplies x of this dtype, whatever its format: what it makes of unit vectors, bias aside.

    Raises:
        UnsupportedError: the layer does not multiply by a matrix, or has no tensor at all.
    """
    first = next(itertools.chain(layer.parameters(), layer.buffers()), None)
    if first is None:
        raise UnsupportedError(f"base_layer: wanted one with a weight to make whole, got a {type(layer).__name__} without any tensor")
    held: dict = layer._parameters if "bias" in layer._parameters else layer._buffers
    bias, training = held.get("bias"), layer.training
    try:
        layer.train()  # in evaluation bitsandbytes packs weights anew for some CPUs
        if bias is not None:
            held["bias"] = None
        probe = torch.randn(16, in_features, device=first.device).to(dtype)
        columns = []
        for begin in range(0, in_features, BLOCK):
            count = min(BLOCK, in_features - begin)
            ones = torch.zeros(count, in_features, dtype=dtype, device=first.device)
            ones[:, begin : begin + count].fill_diagonal_(1.0)
            columns.append(layer(ones).to(dtype).T)
        weight = torch.cat(columns, dim=1)
        wanted, product = layer(probe).float(), F.linear(probe, weight).float()
    finally:
        layer.train(training)
        if bias is not None:
            held["bias"] = bias
    if not torch.linalg.vector_norm(product - wanted) <= NEAR * torch.linalg.vector_norm(wanted):
        raise UnsupportedError(f"base_layer: wanted one that multiplies by a matrix, got a {type(layer).__name__} that does something else")
    return weight


def plain_linear(layer: Any, in_features: int, dtype: torch.dtype, *adapter) -> nn.Linear:
    """An nn.Linear of this dtype with a layer's weight made whole; adapter: ``lora_A, lora_B, scaling`` of an update merged into it.

    Raises:
        ValueError: the result is not finite. UnsupportedError: as of `whole`.
    """
    weight, bias = whole(layer, in_features, dtype), getattr(layer, "bias", None)
    if adapter:
        write_merged(weight, weight, *adapter)
    own_bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear_of(nn.Parameter(weight, requires_grad=False), own_bias, layer.training)

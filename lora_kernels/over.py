"""LoRA over a layer that keeps its own kernels, a quantised one, say: `LoRAOver`, and `MultiLoRAOver` for many adapters.

    y = base_layer(x) + scaling * (dropout(x) A^T) B^T

The base layer stays whole, with its buffers, hooks and formats; what it makes of x is the ``base`` of `lora_linear`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from .dequantize import four_bit
from .multi import MultiLoRALinear
from .nn import AdaptedLinear, FusedLoRALinear, check_dropout
from .problem import FLOATS, UnsupportedError
from .projections import Projection
from .segments import check_int


class Over:
    """What `LoRAOver` and `MultiLoRAOver` have in the place of a weight: ``base_layer``, kept as it is, its parameters frozen."""

    base_layer: nn.Module

    @classmethod
    def from_linear(cls: Any, linear: nn.Module, **adapter):
        """The class itself, under `FusedLoRALinear`'s name for it."""
        return cls(linear, **adapter)

    def _go_over(self: Any, base_layer: nn.Module, in_features: int | None, out_features: int | None, adapter_dtype) -> None:
        """Check the layer and what is said of it."""
        if not isinstance(base_layer, nn.Module):
            raise TypeError(f"base_layer: wanted an nn.Module, got {type(base_layer).__name__}")
        if isinstance(base_layer, AdaptedLinear):
            raise TypeError(f"base_layer: wanted a layer without an adapter, got {type(base_layer).__name__}")
        found = sizes(base_layer) or (None, None)
        for name, own, size in zip(("in_features", "out_features"), found, (in_features, out_features), strict=True):
            size = own if size is None else size
            if size is None:
                raise ValueError(f"{name}: wanted a number, since the {type(base_layer).__name__} has no such attribute, got None")
            check_int(name, size, 1)
            setattr(self, name, size)
        if adapter_dtype not in FLOATS:
            raise TypeError(f"adapter_dtype: wanted float16, bfloat16, float32 or float64, got {adapter_dtype}")

    def _take(self: Any, base: nn.Module, lora_dropout: float, adapter_dtype: torch.dtype) -> torch.Tensor:
        check_dropout(lora_dropout)
        first = next(itertools.chain(base.parameters(), base.buffers()), None)
        self.lora_dropout, self.base_layer = float(lora_dropout), base.requires_grad_(False)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.train(base.training)
        return torch.empty(0, dtype=adapter_dtype, device=None if first is None else first.device)

    def _operands(self, x: torch.Tensor) -> tuple:
        whole = four_bit(self.base_layer, x)
        if whole is not None and whole.dtype is x.dtype:
            return x, whole.make, whole.bias, None
        base = self.base_layer(x)
        if not isinstance(base, torch.Tensor) or base.dtype not in FLOATS:
            given = base.dtype if isinstance(base, torch.Tensor) else type(base).__name__
            raise TypeError(f"base_layer: wanted a floating-point tensor from the {type(self.base_layer).__name__}, got {given}")
        return x.to(base.dtype), None, None, base

    def merge(self, *args, **kwargs) -> None:
        """Raises UnsupportedError: how this base stores a weight is its library's to know."""
        raise UnsupportedError(f"merge: wanted a layer with a weight to write to, got one over a {type(self.base_layer).__name__}")

    def extra_repr(self) -> str:
        return super().extra_repr().replace("bias=False, ", "")  # type: ignore[misc]


class LoRAOver(Over, FusedLoRALinear):
    """`FusedLoRALinear` over any layer, which keeps its format, hooks and kernels. It cannot merge, and has neither DoRA nor ``lora_bias``.

    Args:
        base_layer: A module that maps ``[..., in_features]`` to ``[..., out_features]``, floats to floats; its parameters are frozen.
        in_features, out_features: None: the base layer's own attributes of these names.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: As in `FusedLoRALinear`.
        adapter_dtype: Of A and B: float32, or the dtype of the base layer's products.
    Shape:
        x ``[..., in_features]`` -> ``[..., out_features]``, in the dtype of what the base layer makes of x.
    Raises:
        TypeError, ValueError, UnsupportedError: a module of another kind, or values out of range.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        adapter_dtype=torch.float32,
    ):
        nn.Module.__init__(self)
        self._go_over(base_layer, in_features, out_features, adapter_dtype)
        self._adopt(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, False, False, adapter_dtype)  # type: ignore

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.enabled else self.base_layer(x)

    def projection(self, x: torch.Tensor) -> Projection | None:
        whole = four_bit(self.base_layer, x) if self.enabled else None
        if whole is None or whole.dtype is not x.dtype or not whole.settled:
            return None
        return Projection(whole.make, self.lora_A, self.lora_B, whole.bias, self.scaling, self.lora_dropout if self.training else 0.0)


class MultiLoRAOver(Over, MultiLoRALinear):
    """`MultiLoRALinear` over any layer, as `LoRAOver` is `FusedLoRALinear` over one.

    Args:
        num_adapters, r, lora_alpha: As in `MultiLoRALinear`. The others: as in `LoRAOver`.
    Shape:
        x ``[..., in_features]`` and a `Segments` -> ``[..., out_features]``, in the dtype of what the base layer makes of x.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        num_adapters: int,
        in_features: int | None = None,
        out_features: int | None = None,
        r: int | list[int] = 8,
        lora_alpha: float | list[float] = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        adapter_dtype=torch.float32,
    ):
        nn.Module.__init__(self)
        self._go_over(base_layer, in_features, out_features, adapter_dtype)
        self._adopt(base_layer, num_adapters, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)


def sizes(layer: nn.Module) -> tuple[int, int] | None:
    """A layer's own in_features and out_features, or None."""
    K, N = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (K, N) if isinstance(K, int) and isinstance(N, int) else None


def quantised(layer: nn.Module) -> bool:
    """Whether a linear layer stores its weight otherwise than as a matrix of floats that products are made of."""
    if sizes(layer) is None or isinstance(layer, AdaptedLinear):
        return False
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:  # 8-bit floats have a scale somewhere, or are cast by hooks
        return True
    by_torchao = any(kind.__module__.startswith("torchao.") for kind in type(weight).__mro__)
    return by_torchao or tuple(weight.shape) != (layer.out_features, layer.in_features)  # packed, perhaps into words of floats

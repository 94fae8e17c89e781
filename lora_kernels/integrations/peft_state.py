"""What `lora_linear` takes of a PEFT layer as it stands, or the sentence that says why PEFT's own forward computes it.

Everything is read at each call, from attributes that cost little: nothing is cached, so merging, hot-swapping and rescaling need no notice.
(``_modules`` is read directly: nn.Module's own lookup of ``layer.lora_A`` costs half a microsecond, and there are six a call.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..dequantize import MANY, four_bit, is_four_bit
from ..experts import Factors
from ..nn import held, hooked
from ..problem import FLOATS, MAX_RANK, PLAIN, UnsupportedError, autocasts, sharded
from ..projections import Projection

DROPOUTS = (nn.Dropout, nn.Identity)


class Base(NamedTuple):
    """``weight [N, K]``, by strides where it is stored transposed, or what makes it; ``bias``; and ``dtype``, of the product for this x.

    Or the product itself, ``[..., N]``, from the layer below: then weight and bias are None. ``result``: what y is cast to, if anything.
    """

    weight: torch.Tensor | Callable[[], torch.Tensor] | None
    bias: torch.Tensor | None
    dtype: torch.dtype
    product: torch.Tensor | None = None
    result: torch.dtype | None = None


class Beside(NamedTuple):
    """Why a fused call takes the base product from the layer below, whose own kernels and hooks make it."""

    reason: str


def active(layer: lora.Linear) -> list[str]:
    """The active adapters that this layer has."""
    here = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in here]


def base_of(layer: lora.LoraLayer, x: torch.Tensor | None) -> Base | Beside | str:
    """The base whose product a fused call makes, or why it takes the product from it, or why PEFT computes the layer."""
    module = layer._modules["base_layer"]
    parameters = module._parameters
    weight: Any = parameters["weight"] if "weight" in parameters else getattr(module, "weight", None)
    if sharded(weight):
        return f"its base layer's weight is a {type(weight).__name__}"
    if x is not None:
        if type(x) not in PLAIN:
            return f"x is a {type(x).__name__}"
        if x.numel() == 0:
            return "x is empty"
        if x.dtype not in FLOATS:
            return f"x is {x.dtype}"
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        if x is not None and (whole := four_bit(module, x)) is not None:
            return Base(whole.make, whole.bias, whole.dtype, result=x.dtype)
        many = f"; in training its weight is made whole for more than {MANY} tokens" if is_four_bit(module) else ""
        return Beside(f"its base layer is a {type(module).__name__}, not exactly an nn.Linear{many}")
    if type(weight) not in PLAIN:
        return Beside(f"its base layer's weight is a {type(weight).__name__}")
    if weight.requires_grad:
        return Beside("its base weight is trained")
    if hooked(module):
        return Beside("its base layer has hooks")
    (bias,), dtype = held(module, "bias"), weight.dtype
    if x is not None:
        if x.device != weight.device:
            return "x is on another device"
        if autocasts(x.device) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        elif x.dtype != dtype:
            return f"x is {x.dtype} beside a base of {dtype}"
    if dtype not in FLOATS:
        return f"its base weight is {dtype}"
    return Base(weight.t() if type(module) is Conv1D else weight, bias, dtype)


def settled(layer: Any, x: torch.Tensor, base: Base | Beside) -> tuple[torch.Tensor, Base]:
    """x and the base of a call that is to be fused: from here on PEFT's forward is out of the question."""
    return product_of(layer, x) if isinstance(base, Beside) else (x, base)


def product_of(layer: lora.LoraLayer, x: torch.Tensor) -> tuple[torch.Tensor, Base]:
    """x in the dtype of what the layer below makes of it, and that."""
    product = layer.base_layer(x)
    if type(product) not in PLAIN or product.dtype not in FLOATS:
        given = product.dtype if type(product) in PLAIN else type(product).__name__
        below = type(layer.base_layer).__name__
        raise UnsupportedError(f"base_layer: wanted a plain floating-point tensor from the {below}, got {given}; unfuse(model) first")
    return x.to(product.dtype), Base(None, None, product.dtype, product)


def adapters_of(layer: lora.LoraLayer, names: list[str], base: Base | Beside, x: torch.Tensor | None) -> list[Factors] | str:
    """The adapters of these names, in this order; names that the layer does not have are an error."""
    found = []
    device = None if x is None else x.device
    if isinstance(base, Base) and isinstance(base.weight, torch.Tensor):
        device = base.weight.device
    for name in names:
        adapter = adapter_of(layer, name, device)
        if isinstance(adapter, str):
            return adapter
        found.append(adapter)
    return found


def projection_of(layer: Any, x: torch.Tensor) -> Projection | None:
    """The layer as one of several of x, or None: only one adapter, and a base whose product a fused call makes, take part."""
    names = [] if layer._disable_adapters or layer.merged_adapters else active(layer)
    base = base_of(layer, x) if len(names) == 1 else ""
    if not isinstance(base, Base) or base.weight is None or base.bias is not held(layer._modules["base_layer"], "bias")[0]:
        return None
    adapters = adapters_of(layer, names, base, x)
    if isinstance(adapters, str) or adapters[0].bias is not None or in_dtype(adapters[0], base.dtype) is not adapters[0]:
        return None
    one = adapters[0]
    return Projection(base.weight, one.A, one.B, base.bias, one.scale, one.p if one.training else 0.0)


def why_not_together(adapters: list[Factors]) -> str | None:
    """Why several adapters cannot act on the same tokens in one call."""
    if len(adapters) < 2:
        return None
    if any(adapter.drops for adapter in adapters):
        return "several adapters are active at once, with dropout: each has a mask of its own"
    rank = sum(adapter.A.shape[-2] for adapter in adapters)
    if rank > MAX_RANK:
        return f"several adapters are active at once, of rank {rank} together; the kernels take 1 to {MAX_RANK}"
    return None


def in_dtype(adapter: Factors, dtype: torch.dtype) -> Factors:
    """A, B and the bias as they take part in a product of this dtype: in it, or in float32."""
    A, B, bias = adapter.A, adapter.B, adapter.bias
    if A.dtype is B.dtype and (bias is None or bias.dtype is A.dtype) and (A.dtype is dtype or A.dtype is torch.float32):
        return adapter
    return adapter._replace(A=A.float(), B=B.float(), bias=None if bias is None else bias.float())


def adapter_of(layer: lora.LoraLayer, name: str, device: torch.device | None, experts: int = 1, variant: str = "") -> Factors | str:
    """An adapter of a layer, of this variant of LoRA, whose A and B hold those of so many experts, or why it takes no fused call."""
    if name in layer.lora_variant and type(layer.lora_variant[name]).__name__ != variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    parts = layer._modules
    down, up, dropout = (parts[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    scale = layer.scaling[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"its lora_A is a {type(down).__name__} and its lora_B a {type(up).__name__}, not exactly nn.Linear"
    (A, inner), (B, bias) = held(down, "weight", "bias"), held(up, "weight", "bias")
    if inner is not None or (bias is not None and variant):
        return f"adapter {name!r} has a bias on its {'lora_B' if inner is None else 'lora_A'}"
    if type(A) not in PLAIN or type(B) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return f"its lora_A's weight is a {type(A).__name__}, its lora_B's a {type(B).__name__}, or the bias no plain tensor"
    if hooked(down) or hooked(up) or hooked(dropout):
        return f"adapter {name!r} has hooks, which a fused call would pass by"
    if type(dropout) not in DROPOUTS:
        return f"adapter {name!r} has a dropout of type {type(dropout).__name__}"
    if A.shape[0] > MAX_RANK * experts:
        return f"adapter {name!r} has rank {A.shape[0] // experts}; the kernels take 1 to {MAX_RANK}"
    if device is not None and (A.device != device or B.device != device):
        return f"adapter {name!r} is on {A.device} and {B.device}, its base on {device}"
    p = dropout.p if type(dropout) is nn.Dropout else 0.0
    if p >= 1.0:
        return f"adapter {name!r} has a dropout of {p}"
    if isinstance(scale, torch.Tensor):  # hot-swapping a compiled model keeps it so
        if scale.requires_grad or scale.numel() != 1:
            return f"adapter {name!r} has a scale that is trained, or not one number"
        scale = scale.to(A.device, torch.float32)
    else:
        scale = float(scale)
    return Factors(A, B, scale, p, dropout.training, bias)

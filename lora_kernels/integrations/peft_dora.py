"""DoRA of a PEFT layer as one call of `dora_linear`, which computes the same, its dropout too.

PEFT makes B A whole at each call, from a unit matrix, adds it to W for its norm, and multiplies in float32 where the adapters are. Over a
quantised base it makes W whole for the norm, in float32, and with dropout keeps that for the backward pass. Here such a W is made, and let
go: once for the norm and the products where it has 4 bits, or for the norm beside the product of the layer below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import dora
from peft.utils.integrations import dequantize_bnb_weight

from ..dequantize import four_bit, is_four_bit, repacked
from ..dora import dora_linear
from ..experts import Factors
from ..nn import held, hooked
from ..problem import FLOATS, PLAIN
from .peft_state import Base, Beside, adapter_of, in_dtype, settled

VARIANT = "DoraLinearVariant"


class Dora(NamedTuple):
    """``magnitude``: ``[N]``. ``whole``: makes the weight ``[N, K]``, of any dtype, where ``base`` has none that is a tensor."""

    adapter: Factors
    magnitude: torch.Tensor
    base: Base | Beside
    whole: Callable[[], torch.Tensor] | None = None

    def of(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        x, base = settled(layer, x, self.base)
        weight, bias, whole = base.weight, base.bias, self.whole
        if base.product is not None and whole is not None:
            bias = getattr(layer.get_base_layer(), "bias", None)
            bias = None if bias is None else bias.to(base.dtype)

            def weight():
                return whole().to(base.dtype)

        one = in_dtype(self.adapter, base.dtype)
        training = one.training and layer.training  # an adapter that is added in evaluation has a dropout that trains
        how: dict[str, Any] = dict(base=base.product, scale=one.scale, dropout_p=one.p, training=training)
        y = dora_linear(x, weight, one.A, one.B, self.magnitude.to(one.A.dtype), bias, **how)
        y = y if base.result is None else y.to(base.result)
        if torch.is_autocast_enabled() and not isinstance(layer, lora.Linear):  # then PEFT's other layers leave the sum as it is
            y = y.to(torch.promote_types(y.dtype, self.magnitude.dtype))
        return y


def dora_of(layer: Any, names: list[str], base: Base | Beside, x: torch.Tensor | None) -> Dora | str | None:
    """The active adapter as DoRA, for this x, or why PEFT computes it, or None where none of these is DoRA."""
    if not any(type(layer.lora_variant.get(name)).__name__ == VARIANT for name in names):
        return None
    if len(names) > 1:
        return "several adapters are active at once, with DoRA"
    part: Any = layer.lora_magnitude_vector._modules[names[0]]
    whole: Any = None
    if isinstance(base, Base) and isinstance(base.weight, torch.Tensor):
        device = base.weight.device
    else:
        whole = _whole(layer.get_base_layer(), part)
        if isinstance(whole, str):
            return f"adapter {names[0]!r} is a {VARIANT}, and {whole}"
        device = layer.get_base_layer().weight.device
    adapter = adapter_of(layer, names[0], device, variant=VARIANT)
    if isinstance(adapter, str):
        return adapter
    (magnitude,) = held(part, "weight")
    if type(part) is not dora.DoraLinearLayer or hooked(part) or type(magnitude) not in PLAIN or magnitude.device != device:
        return f"adapter {names[0]!r} has a magnitude that is a {type(part).__name__} with hooks, or a {type(magnitude).__name__} elsewhere"
    if isinstance(adapter.scale, torch.Tensor):
        return f"adapter {names[0]!r} is a {VARIANT} with a scale that is a tensor"
    if getattr(dora, "ENABLE_DORA_CACHING", False) and not layer.training:  # which PEFT before 0.19 has not
        return f"adapter {names[0]!r} is a {VARIANT} whose norms PEFT keeps (DoraCaching)"
    if isinstance(base, Beside) and x is not None:
        made = four_bit(layer.base_layer, x, few=True)  # of few tokens, too: the norm needs it anyway
        if made is not None:
            base = Base(made.make, made.bias, made.dtype, result=x.dtype)
        elif _repacks(layer.get_base_layer()):
            return f"adapter {names[0]!r} is a {VARIANT}, and bitsandbytes puts its base's 4 bits in another order for this CPU"
    return Dora(adapter, magnitude, base, whole)


def _repacks(module: Any) -> bool:
    """Whether a layer's 4 bits are, or will be by its own product, in an order that only a CPU's kernel reads, and PEFT's norm does not."""
    if not is_four_bit(module):
        return False
    here = module.weight.device.type == "cpu" and getattr(module, "support_avx512bf16_for_cpu", False)
    return repacked(module.weight.quant_state) or (here and not module.training)


@torch.compiler.disable  # it cannot trace bitsandbytes' parameters, in PEFT's own DoRA either, and here would run into itself
def _dequantized(weight: Any, state: Any) -> torch.Tensor:
    return dequantize_bnb_weight(weight, state=state)


def _whole(module: Any, part: Any) -> Callable[[], torch.Tensor] | str:
    """What makes a base layer's weight whole, as PEFT takes it for its norm, or why that is left to PEFT."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight)
    what = f"its base layer is a {type(module).__name__}"
    if kind.__name__ == "Params4bit":
        return lambda: _dequantized(weight, None)
    if kind.__name__ == "Int8Params" and weight.dtype is torch.int8:
        return lambda: _dequantized(weight, module.state)
    if kind.__module__.startswith("torchao."):
        return weight.dequantize
    if kind not in PLAIN or weight.dtype not in FLOATS:
        return f"{what}, whose weight is a {kind.__name__}"
    if weight.requires_grad:
        return f"{what}, whose weight is trained"
    return lambda: weight.t() if part.fan_in_fan_out else weight

"""DoRA of a PEFT layer as one call of `dora_linear`, which computes the same, its dropout too.

PEFT makes B A whole at each call, from a unit matrix, adds it to W for its norm, and multiplies in float32 where the adapters are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import dora

from ..dora import dora_linear
from ..experts import Factors
from ..nn import held, hooked
from ..problem import PLAIN
from .peft_state import Base, Beside, adapter_of, in_dtype

VARIANT = "DoraLinearVariant"


class Dora(NamedTuple):
    """``magnitude``: ``[N]``, the dtype of the adapter's A and B."""

    adapter: Factors
    magnitude: torch.Tensor

    def of(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        A, B, scale, p, training = in_dtype(self.adapter, base.dtype)
        return dora_linear(x, base.weight, A, B, self.magnitude.to(A.dtype), base.bias, scale=scale, dropout_p=p, training=training)


def dora_of(layer: lora.LoraLayer, names: list[str], base: Base | Beside) -> Dora | str | None:
    """The active adapter as DoRA, or why PEFT computes it, or None where none of these is DoRA."""
    if not any(type(layer.lora_variant.get(name)).__name__ == VARIANT for name in names):
        return None
    if len(names) > 1:
        return "several adapters are active at once, with DoRA"
    if isinstance(base, Beside) or not isinstance(base.weight, torch.Tensor):
        return f"adapter {names[0]!r} is a {VARIANT}, and {getattr(base, 'reason', 'its base is quantised')}"
    adapter = adapter_of(layer, names[0], base.weight.device, variant=VARIANT)
    if isinstance(adapter, str):
        return adapter
    part: Any = layer.lora_magnitude_vector._modules[names[0]]
    (magnitude,) = held(part, "weight")
    if type(part) is not dora.DoraLinearLayer or hooked(part) or type(magnitude) not in PLAIN or magnitude.device != base.weight.device:
        return f"adapter {names[0]!r} has a magnitude that is a {type(part).__name__} with hooks, or a {type(magnitude).__name__} elsewhere"
    if isinstance(adapter.scale, torch.Tensor):
        return f"adapter {names[0]!r} is a {VARIANT} with a scale that is a tensor"
    if getattr(dora, "ENABLE_DORA_CACHING", False) and not layer.training:  # which PEFT before 0.19 has not
        return f"adapter {names[0]!r} is a {VARIANT} whose norms PEFT keeps (DoraCaching)"
    return Dora(adapter, magnitude)

"""What is known of a call that looks like an earlier one: that its arguments were checked, and which arm it takes.

A decoder makes hundreds of calls a token, all alike but for their tensors' values; to check and to choose again takes as long as a launch.
A call's look is all that the checks and the choice depend on. A call that has to be looked at itself (with a seed, with ranks on a CPU,
with experts, under a compiler) has none.
"""

from __future__ import annotations

import torch

from . import dispatch, ops
from .operands import even, many
from .problem import PLAIN
from .segments import CPU, Adapters, Segments
from .tuning import Config

NUMBERS = (float, int)
_arms: dict[tuple, tuple] = {}


def look(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, training, seed, segments, ranks, widths, config, impl) -> tuple | None:
    """The look of a call of `lora_linear` with arguments of whatever kind, or None."""
    if seed is not None or ops.watched() or type(impl) is not str:
        return None
    if type(dropout_p) not in NUMBERS or not 0.0 <= dropout_p < 1.0:
        return None
    plan: tuple = ()
    if segments is not None:
        if type(segments) is not Segments or segments.top_k > 1:
            return None
        plan = many(Adapters(segments)), segments.device
    if type(scale) not in NUMBERS:
        if type(scale) is not torch.Tensor:
            return None
        plan += scale.shape, scale.dtype, scale.device, scale.is_contiguous(), scale.requires_grad
    if ranks is not None:
        if type(ranks) is not torch.Tensor or ranks.device == CPU:
            return None
        plan += ranks.shape, ranks.dtype, ranks.device, ranks.is_contiguous()
    if not (widths is None or type(widths) is tuple) or not (config is None or type(config) is Config):
        return None
    looks: list = []
    for t in (x, weight, lora_A, lora_B, bias, base):
        if t is None:
            looks.append(None)
        elif type(t) in PLAIN and t.layout is torch.strided and not t.is_neg():
            looks.append((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0))
        else:
            return None
    if weight is not None and (weight.requires_grad or weight.dim() != 2):
        return None
    return *looks, plan, widths, bool(training and dropout_p), config, impl, dispatch.interpreting()


def arm(call: tuple | None) -> tuple | None:
    """(function, config) of the forward pass of calls that look so, if one was remembered."""
    return None if call is None else _arms.get(call)


def remember(call: tuple | None, x, weight, lora_A, lora_B, bias, base, adapters: Adapters, p: float, impl: str, key: str) -> tuple | None:
    """The arm of a call that was checked, remembered; None where no arm is given x as it is."""
    if call is None or x.numel() == 0 or lora_B.numel() == 0 or even(x) is not x or even(base) is not base:
        return None
    if not ops.plain(x, weight, lora_A, lora_B, bias, base):
        return None
    if len(_arms) >= dispatch.KEPT:
        _arms.clear()
    found = _arms[call] = dispatch.forward_arm(x, weight, lora_A, lora_B, adapters, p, impl, key)
    return found


def forget() -> None:
    """Every arm, and every choice of dispatch's; for tests that change what choices rest on."""
    _arms.clear()
    dispatch.forget()

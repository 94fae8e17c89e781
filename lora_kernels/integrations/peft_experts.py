"""PEFT's ``target_parameters`` on the experts of a mixture: what a `lora.ParamWrapper`, or several around one module, hold for one call.

PEFT adds ``scale B A`` of every expert to a copy of the whole stack, at each forward pass; here the rows that an expert gets take it.

    A [E r, K] of PEFT is [E, r, K];   B [N, r E] is [N, r, E], the expert last
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora

from .. import experts as mixture
from ..experts import Factors, by_expert
from .peft_state import active, adapter_of, hooked, in_dtype, why_not_together

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def why_not_routed(wrapper: lora.ParamWrapper) -> str | None:
    """Why PEFT's own forward computes this wrapper and those within it, or None."""
    found = held(wrapper)
    return found if isinstance(found, str) else None


def routed(wrapper: lora.ParamWrapper, *args, **kwargs) -> torch.Tensor | None:
    """The module's answer with the adapters of this wrapper and of those within it; None where PEFT's forward is to compute it."""
    if any(each._disable_adapters or each.merged_adapters for each in chain(wrapper)):
        return None
    given: dict[str, Any] = dict(zip(ARGUMENTS, args, strict=False), **kwargs) if len(args) <= len(ARGUMENTS) else {}
    if sorted(given) != sorted(ARGUMENTS) or any(type(t) is not torch.Tensor for t in given.values()):
        return None
    x, index, weights = (given[name] for name in ARGUMENTS)
    if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or x.shape[0] != index.shape[0] or not index.numel():
        return None
    found = held(wrapper)
    return None if isinstance(found, str) else mixture.forward(wrapper.get_base_layer(), x, index, weights, found)


def chain(wrapper: lora.ParamWrapper) -> list[Any]:
    """A wrapper and those within it, of which each has one parameter of the same module."""
    found: list[Any] = [wrapper]
    while isinstance(found[-1].base_layer, lora.ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def held(wrapper: lora.ParamWrapper) -> dict[str, list[Factors]] | str:
    """The active adapters of each stack, or why the call cannot be fused."""
    experts = wrapper.get_base_layer()
    reason = mixture.why_not_experts(experts)
    if reason:
        return reason
    if hooked(experts):
        return f"its {type(experts).__name__} has hooks"
    adapters = {}
    for each in chain(wrapper):
        if each is not wrapper and hooked(each):
            return f"the wrapper of its {each.parameter_name} has hooks"
        if each.parameter_name not in mixture.projections(experts):
            return f"its parameter {each.parameter_name} is not one of {', '.join(mixture.projections(experts))}"
        found = []
        for name in active(each):
            factors = factors_of(each, name)
            if isinstance(factors, str):
                return factors
            found.append(factors)
        if (reason := why_not_together(found)) is not None:
            return reason
        adapters[each.parameter_name] = found
    return adapters


def factors_of(wrapper: Any, name: str) -> Factors | str:
    """An adapter as the kernels take it, or why they do not."""
    param, E = wrapper.get_param(), wrapper.num_experts
    adapter = adapter_of(wrapper, name, param.device, E)
    if isinstance(adapter, str):
        return adapter
    scale = adapter.scale
    if adapter.bias is not None:
        return f"adapter {name!r} has a bias on its lora_B"
    if isinstance(scale, torch.Tensor):
        return f"adapter {name!r} has a scale that is a tensor"
    adapter = in_dtype(adapter, param.dtype)
    A, B = by_expert(adapter.A, adapter.B, E)
    # PEFT before 0.19 takes a stack [E, N, K] for [E, K, N]: what it calls A has N columns then.
    as_stored = getattr(wrapper, "_did_swap_in_out_features", False) or wrapper.get_base_layer().is_transposed
    return Factors(A, B, scale) if as_stored else Factors(B.mT, A.mT, scale)

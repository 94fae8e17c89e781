"""LoRA on the experts of a mixture: each token goes through the experts that the router gave it, and each expert has an adapter of its own.

    y[t] = sum over j of g[t, j] f_e(x[t]),  e = top_k[t, j];      f_e: two linear layers of expert e with their adapters, a gate between

The experts are a module that keeps them as stacks, ``gate_up_proj`` and ``down_proj``, with the attributes of transformers' experts
interface (transformers 5, ``use_experts_implementation``), whatever the model's class. Nothing is sorted or repeated, no stack is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .experts_node import Stack, second_half, weighted_sum
from .gates import Gate
from .nn import hooked, hooks_of_all
from .problem import FLOATS, PLAIN, UnsupportedError
from .segments import Segments

INTERFACE = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
OURS = (None, "eager", "grouped_mm", "batched_mm")  # ways to compute the same in plain torch


class Factors(NamedTuple):
    """One adapter: ``A [r, K]``, ``B [N, r]``, or of a stack of weights ``A [E, r, K]``, ``B [E, N, r]``; any strides. Its scale.

    p, training: The dropout on what the adapter takes in, each expert's rows with a mask of their own, and whether it acts.
    bias: ``[N]``, A's dtype, on B, so that its scale multiplies it, too; or None. Not of a stack.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor
    p: float = 0.0
    training: bool = False
    bias: torch.Tensor | None = None

    @property
    def drops(self) -> bool:
        return self.training and self.p > 0


def by_expert(lora_A: torch.Tensor, lora_B: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's ``[E r, K]`` and ``[N, r E]`` as ``A [E, r, K]``, a view, and ``B [E, N, r]``, a copy: B's experts lie innermost."""
    A = lora_A.view(num_experts, -1, lora_A.shape[1])
    return A, lora_B.view(lora_B.shape[0], -1, num_experts).permute(2, 0, 1).contiguous()


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of the stacks, the one that takes the tokens first."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def why_not_experts(experts: nn.Module, *, frozen: bool = True) -> str | None:
    """Why `forward` cannot stand for a module's own, or None; ``frozen``: a stack that is trained is a reason."""
    kind = type(experts).__name__
    if nn.utils.parametrize.is_parametrized(experts):
        return f"its {kind} has parametrizations"
    missing = [name for name in INTERFACE if not hasattr(experts, name)]
    if missing:
        return f"its base layer is a {kind}, without {missing[0]} of transformers' experts interface"
    way = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if way not in OURS:
        return f"its experts run by {way!r}, another library's kernels"
    for name in projections(experts):
        for each in (name, f"{name}_bias") if experts.has_bias else (name,):
            t: Any = getattr(experts, each, None)
            if type(t) not in PLAIN:
                return f"the {each} of its {kind} is a {type(t).__name__}"
            if t.dtype not in FLOATS:
                return f"the {each} of its {kind} is {t.dtype}"
            if frozen and t.requires_grad:
                return f"the {each} of its {kind} is trained"
            if t.dim() != (3 if each == name else 2) or t.shape[0] != experts.num_experts:
                return f"the {each} of its {kind} has shape {list(t.shape)}, not a part for each of {experts.num_experts} experts"
    return None


def forward(
    experts: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, adapters: Mapping[str, Sequence[Factors]]
) -> torch.Tensor:
    """What the experts make of their tokens.

    Args:
        experts: The module, one that `why_not_experts` has nothing against; its parameters are frozen.
        x: Tokens ``[T, K]``, cast to the experts' dtype.
        top_k_index: ints ``[T, k]``, each token's experts; from num_experts on: none (expert parallelism's other ranks have it).
        top_k_weights: ``[T, k]``, what each expert's answer counts for.
        adapters: For each stack by its name the adapters that act on it, all at once; those without one are the base alone.
    Returns:
        ``[T, K]`` in x's dtype. Sums over k in the promoted dtype of experts and weights, in their order.
    Raises:
        UnsupportedError: several adapters on one stack, of which one drops.
    """
    first, last = (_stack(experts, name, adapters.get(name, ())) for name in projections(experts))
    plan = Segments.from_top_k(top_k_index, experts.num_experts)
    h = first.product(x, plan).reshape(top_k_index.numel(), first.weight.shape[1])
    between, plan = experts._apply_gate if experts.has_gate else experts.act_fn, plan.each()
    normed = getattr(experts, "has_post_expert_norm", False)
    if not normed and not _seen_within(experts):
        return second_half(h, top_k_weights, _gate(between, experts, h), last, plan, x.dtype)
    y = last.product(between(h), plan)
    return weighted_sum(experts.post_expert_norm(y) if normed else y, top_k_weights, x.dtype)


def _stack(experts: Any, name: str, adapters: Sequence[Factors]) -> Stack:
    weight: Any = getattr(experts, name)
    weight = weight.mT if experts.is_transposed else weight
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if not adapters:  # of rank 0: the kernels then read neither A nor B
        E, N, K = weight.shape
        one, ranks = weight.new_zeros(1), torch.zeros(E, dtype=torch.int32, device=weight.device)
        return Stack(weight, bias, one.expand(E, 1, K), one.expand(E, N, 1), 1.0, 0.0, False, ranks)
    A, B, scale, p, training, _ = adapters[0] if len(adapters) == 1 else together(adapters)
    return Stack(weight, bias, A, B, scale, p, training, None)


def _gate(between: Any, experts: Any, h: torch.Tensor) -> Gate:
    """What is between the stacks; of transformers' own, ``act(gate) * up`` of one tensor, the activation is held, and may have a kernel."""
    own = getattr(between, "__func__", None)
    theirs = (getattr(own, "__module__", ""), getattr(own, "__name__", "")) == ("transformers.integrations.moe", "_default_apply_gate")
    return Gate.of(experts.act_fn, h) if theirs else Gate(between)


def _seen_within(experts: nn.Module) -> bool:
    """Whether what is between the stacks has hooks, or tensors of its own, which may be others by the backward pass."""
    own = (getattr(experts, each, None) for name in projections(experts) for each in (name, f"{name}_bias"))
    stacks = {id(t) for t in own if t is not None}  # torch 2.11 traces no id of None
    within = list(experts.modules())[1:]
    return hooks_of_all() or any(map(hooked, within)) or any(id(t) not in stacks for t in (*experts.parameters(), *experts.buffers()))


def together(adapters: Sequence[Factors]) -> Factors:
    """Adapters that act on the same rows, as one of all their ranks; each scale multiplies its B, in float32."""
    if any(each.drops for each in adapters):
        raise UnsupportedError("adapters: wanted one for a stack with dropout, each having a mask of its own, got several")
    wide = torch.promote_types(adapters[0].A.dtype, torch.float32)
    A = torch.cat([each.A.to(wide) for each in adapters], -2)
    biases = [each.bias.to(wide) * each.scale for each in adapters if each.bias is not None]
    bias = functools.reduce(torch.add, biases) if biases else None
    return Factors(A, torch.cat([each.B.to(wide) * each.scale for each in adapters], -1), 1.0, bias=bias)

"""`SlotParameter`: one slot of a stack of adapters as a leaf of its own, for an optimizer of that adapter alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .multi import MultiLoRALinear

OWN_GRAD: Any = torch.Tensor.grad  # torch's own attribute, below `SlotParameter`'s


class SlotParameter(nn.Parameter):
    """One slot of a stack as a leaf: it shares storage and version counter, and its ``grad`` is the slot of the stack's gradient.

    The gradient is looked up, not kept, so whatever changes the stack's (a backward pass, zero_grad of any module) shows here. A
    gradient of its own, from a loss that uses the leaf itself, is added to the stack's.
    """

    _layer: MultiLoRALinear
    _name: str
    _slot: int

    def __new__(cls, layer: MultiLoRALinear, name: str, slot: int):
        stack = getattr(layer, name)
        leaf = super().__new__(cls, stack.detach()[slot], stack.requires_grad)
        leaf._layer, leaf._name, leaf._slot = layer, name, slot
        if stack.requires_grad:
            leaf.register_post_accumulate_grad_hook(_hand_over)
        return leaf

    @property
    def grad(self) -> torch.Tensor | None:
        whole = self._stack().grad
        return None if whole is None else whole.detach()[self._slot]

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        slot = self.grad
        if value is None:
            if slot is not None:
                slot.zero_()
            return
        if not isinstance(value, torch.Tensor) or value.shape != self.shape:
            given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"grad: wanted a tensor {list(self.shape)} or None, got {given}")
        if slot is None:
            stack = self._stack()
            stack.grad = torch.zeros_like(stack)
            slot = stack.grad[self._slot]
        slot.copy_(value.detach())

    def _stack(self) -> nn.Parameter:
        stack = getattr(self._layer, self._name)
        if not self.is_set_to(stack.detach()[self._slot]):
            raise RuntimeError(f"adapter_parameters: wanted ones taken after {self._name} last moved, got older ones; take them again")
        return stack

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = SlotParameter(copy.deepcopy(self._layer, memo), self._name, self._slot)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return SlotParameter, (self._layer, self._name, self._slot)


def _hand_over(leaf: SlotParameter) -> None:
    """Move what autograd has accumulated into the leaf itself to the stack's gradient."""
    own = OWN_GRAD.__get__(leaf)
    OWN_GRAD.__set__(leaf, None)
    leaf.grad = own if leaf.grad is None else leaf.grad + own

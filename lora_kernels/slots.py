"""One slot of the stacks of adapters: `put` writes to it, in many layers at once, and `SlotParameter` is it as an optimizer's leaf."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .nn import check_storage, check_written

if TYPE_CHECKING:
    from .multi import MultiLoRALinear

Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, K] and B [N, r]
OWN_GRAD: Any = torch.Tensor.grad  # torch's own attributes, below `SlotParameter`'s
OWN_DATA: Any = torch.Tensor.data


@torch.no_grad()
def put(i: int, given: Iterable[tuple[MultiLoRALinear, Sequence[Pair | None], float | None]], non_blocking: bool = False) -> None:
    """Have slot i of each layer hold an adapter, in place; its gradient is 0, and other slots serve on. Values were checked.

    Many layers cost little more than one: a copy for each A and B, and a few launches for all that is zeroed and for the tables.

    Args:
        given: For each layer the A and B of each of its parts, None: zeros; and the scaling, None: as built. The slot's rank is the
            largest of them, or as built where there is none.
        non_blocking: Whether what lies in page-locked memory may be on its way yet when this returns; the stream has it in order.
    """
    places: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    ranks: list[tuple[torch.Tensor, int]] = []
    scalings: list[tuple[torch.Tensor, float]] = []
    given = list(given)
    for layer, parts, _ in given:
        check_written(layer)
        ranks_of(layer)
        if any(parts):
            check_storage(f"slot {i}", layer)
    for layer, parts, scale in given:
        r = max((own[1].shape[1] for own in parts if own is not None), default=layer._built[i])
        layer.writes[i] += 1
        for (A, B), own in zip(layer._parts(i), parts, strict=True):
            held = 0 if own is None else own[1].shape[1]
            if own is not None:
                values += own
                places += (A, B) if held == layer.r else (A[:held], B[:, :held])
            if held < layer.r:
                rest += A[held:], B[:, held:]
        rest += [stack.grad[i] for stack in (layer.lora_A, layer.lora_B) if stack.grad is not None]  # of the adapter that was there
        ranks.append((layer.ranks[i], r))
        scalings.append((layer.scaling[i], layer._scale_for(i, r) if scale is None else scale))
    if rest:
        torch._foreach_zero_(rest)
    if places:
        torch._foreach_copy_(places, values, non_blocking)
    _fill(ranks)
    _fill(scalings)
    for (layer, *_), (_, r) in zip(given, ranks, strict=True):
        if r != layer._ranks[i]:
            layer._know_ranks([*layer._ranks[:i], r, *layer._ranks[i + 1 :]])
        layer._seen = stamp(layer.ranks)


def _fill(numbers: list[tuple[torch.Tensor, Any]]) -> None:
    """Write a number into each element, by one copy to each device."""
    for device in dict.fromkeys(place.device for place, _ in numbers):
        own = [(place, number) for place, number in numbers if place.device == device]
        there = torch.tensor([number for _, number in own], dtype=own[0][0].dtype, device="cpu").to(device, non_blocking=True)
        torch._foreach_copy_([place for place, _ in own], list(there.unbind()))


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

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return OWN_DATA.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Written to the slot: a storage of its own, as torch gives it, would leave the adapter as it is (`vector_to_parameters`)."""
        if not isinstance(value, torch.Tensor) or value.shape != self.shape or value.dtype != self.dtype:
            given = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"data: wanted a tensor of {self.dtype} {list(self.shape)}, got {given}")
        self._stack()
        with torch.no_grad():
            self.copy_(value)

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


def ranks_of(layer: MultiLoRALinear) -> list[int]:
    """The layer's ranks as the host knows them, asked of the device where others wrote: AveragedModel, a checkpoint read in place."""
    if layer._seen != stamp(layer.ranks) and not layer.ranks.is_meta:
        layer._know_ranks(layer.ranks.tolist())
    return layer._ranks


def stamp(t: torch.Tensor) -> tuple[int, int]:
    """What tells whether a tensor is another one, or was written to; tensors of inference mode do not tell the latter."""
    return id(t), -1 if t.is_inference() else t._version


def _hand_over(leaf: SlotParameter) -> None:
    """Move what autograd has accumulated into the leaf itself to the stack's gradient."""
    own = OWN_GRAD.__get__(leaf)
    OWN_GRAD.__set__(leaf, None)
    leaf.grad = own if leaf.grad is None else leaf.grad + own

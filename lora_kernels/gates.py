"""What stands before a down projection, made again in the backward pass: ``a = gate(inputs)``, by the kernels where they know the gate.

A gate is any function of tensors. Those that the kernels know are ``act(gate) * up``, of two tensors or of one that has them side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from . import dispatch

KERNELS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
# Classes of torch and transformers that answer element by element, in their argument's dtype under autocast, too, and keep the argument.
ACTIVATIONS = (*KERNELS, "GELU", "GELUActivation", "QuickGELUActivation", "Mish")
Gradients = Callable[[torch.Tensor], tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]


class Gate(NamedTuple):
    """``function``: a of its inputs, by torch. ``kernel``: the kernels' name for its activation, "" where torch computes it."""

    function: Callable[..., torch.Tensor]
    kernel: str = ""

    @classmethod
    def of(cls, act: nn.Module, like: torch.Tensor) -> Gate:
        """``act(gate) * up`` of tensors like this. The activation is called without the hooks that it may have by the backward pass."""
        act_of = act.forward if isinstance(act, nn.Module) else act
        return cls(functools.partial(product, act_of), kernel_of(act, like))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _launches().product(self.kernel, *halves(inputs)) if self.kernel else self.function(*inputs)

    def again(self, inputs: tuple, wanted: bool = True, factors: torch.Tensor | None = None) -> tuple[torch.Tensor | None, Gradients]:
        """a if wanted, and what makes the inputs' gradients of a's.

        factors: None, or a number for each row ``[..., F]`` of a, which then multiplies the row of a, and of its gradient when that comes:
        the second of what is made of it is, for each row, the dot product of a and the gradient without the factors, which may be
        written to.
        """
        if self.kernel:
            a = _launches().product(self.kernel, *halves(inputs), factors) if wanted else None
            return a, lambda da: self._by_kernel(inputs, da, factors)
        a, gradients = made_again(self.function, *inputs)
        if factors is None:
            return a, lambda da: (gradients(da), None)
        each, wide, held = factors.reshape(-1, 1), torch.promote_types(a.dtype, factors.dtype), [a]

        def scaled(da: torch.Tensor):  # once, and da is its own: a and da are let go as soon as may be
            dots = torch.einsum("mf,mf->m", held.pop().to(wide), da.to(wide))
            return gradients(da.mul_(each)), dots

        return (a * each).to(a.dtype) if wanted else None, scaled

    def _by_kernel(self, inputs: tuple, da: torch.Tensor, factors: torch.Tensor | None):
        made = torch.empty_like(inputs[0]) if len(inputs) == 1 else None
        da = da.to(inputs[0].dtype).contiguous()
        into = None if made is None else halves((made,))
        dgate, dup, dots = _launches().gradients(self.kernel, *halves(inputs), da, factors, into)
        return ((dgate, dup) if made is None else (made,)), dots


def product(act: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """``act(gate) * up``, by torch."""
    gate, up = halves(inputs)
    return act(gate) * up


def made_again(function: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
    """What a function makes of its inputs, and what makes their gradients of its, as autograd makes them, without keeping the result."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        result = function(*leaves)
    edge, dtype = torch.autograd.graph.get_gradient_edge(result), result.dtype
    return result.detach(), lambda gradient: torch.autograd.grad(edge, leaves, gradient.to(dtype))


def elementwise(act: nn.Module | None) -> bool:
    """Whether an activation is one of `ACTIVATIONS`, and not in place."""
    kind = type(act)
    theirs = kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return theirs and kind.__name__ in ACTIVATIONS and not getattr(act, "inplace", False)


def kernel_of(act: nn.Module, t: torch.Tensor) -> str:
    """`Gate.kernel` for an activation of a tensor like t."""
    return KERNELS.get(type(act).__name__, "") if on_a_gpu(t) and elementwise(act) else ""


def on_a_gpu(t: torch.Tensor) -> bool:
    """Whether the kernels run for a tensor like t."""
    return t.is_cuda and t.dtype != torch.float64 and dispatch.triton_missing() is None


def halves(inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up of them, or of one that has them side by side."""
    gate, up = inputs if len(inputs) == 2 else inputs[0].chunk(2, -1)
    return gate, up


def _launches():
    from . import launch_gate

    return launch_gate

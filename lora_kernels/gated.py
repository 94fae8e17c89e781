"""Gated MLPs, ``down(act(gate(x)) * up(x))``, that keep gate(x) and up(x) for the backward pass, and not what is made of them.

    recompute_gates(model)      after apply_lora(model, config), or after fuse(model);   recompute_gates(model, False) undoes it

torch keeps four tensors of the MLP's width: gate(x), act of it, up(x), and their product, which the gradient of the down projection's A
is made of. Here the last two operations and the down projection are one node of the graph, which keeps two of them and makes the others
again. On a GPU, where the activation is SiLU or GELU by tanh, that is one launch in the forward pass and two in the backward pass.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import dispatch, ops
from .autograd import recorded, refused_twice
from .nn import hooked, sharding
from .problem import UnsupportedError
from .projections import Layer, apart, fitting, made_of, seen

KERNELS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
# Classes of torch and transformers that answer element by element, in the dtype they are given, and hold nothing.
ACTIVATIONS = (*KERNELS, *"GELU ReLU Mish Sigmoid Tanh GELUActivation NewGELUActivation QuickGELUActivation ReLUSquaredActivation".split())


class GatedFunction(torch.autograd.Function):
    """``y [..., N]`` of gate and up, ``[..., K]``, contiguous, with gradients for both and for lora_A, lora_B and bias."""

    @staticmethod
    def forward(ctx, gate, up, act: nn.Module, layer: Layer, weight, lora_A, lora_B, bias, seed):
        need_h, need_A, need_B, need_bias = ctx.needs = (any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[5:8])
        kernel = _kernel(act, gate)
        h = act(gate) * up if kernel is None else _launches().product(kernel, gate, up)
        if layer.make is not None:
            weight = made_of(layer.make, lora_B.shape[0], h.shape[-1], h)
        y, u = ops.forward(h, weight, lora_A, lora_B, bias, seed, layer.adapters, layer.scale, layer.p, need_B, "auto", "")
        ctx.save_for_backward(
            gate,
            up,
            weight if need_h and layer.make is None else None,
            lora_A if need_h else None,
            lora_B if need_h or need_A else None,
            u if need_B else None,
            seed if need_h or need_A else None,
            layer.adapters.scales,  # torch tells then if it was written to
        )
        ctx.constants = (act, layer, kernel, lora_A.dtype)
        return y

    @staticmethod
    @refused_twice
    def backward(ctx, dy):
        gate, up, weight, lora_A, lora_B, u, seed, _ = ctx.saved_tensors
        act, layer, kernel, dtype = ctx.constants
        need_h, need_A, _, _ = ctx.needs
        if kernel is None:
            h, gradients = _by_torch(act, gate, up)
        else:
            h = _launches().product(kernel, gate, up) if need_A else None
            gradients = functools.partial(_launches().gradients, kernel, gate, up)
        if need_h and layer.make is not None:
            weight = made_of(layer.make, dy.shape[-1], gate.shape[-1], dy)
        dh, da, db, dbias = ops.backward(
            dy, h if need_A else None, weight, lora_A, lora_B, u, seed, layer.adapters, layer.scale, layer.p, ctx.needs, dtype, "auto", ""
        )  # fmt: skip
        del h
        dgate, dup = gradients(dh.contiguous()) if need_h else (None, None)
        its_needs = (need_A, da), (ctx.needs[2], db), (ctx.needs[3], dbias)
        return dgate, dup, None, None, None, *(grad if need else None for need, grad in its_needs), None


def _by_torch(act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
    """The product, and what makes dgate and dup of its gradient, as autograd makes them."""
    with torch.enable_grad():
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = act(leaves[0]) * leaves[1]
    return h.detach(), lambda dh: torch.autograd.grad(h, leaves, dh)


def _kernel(act: nn.Module, gate: torch.Tensor) -> str | None:
    """The kernels' name for an activation, or None where torch computes it."""
    runs = gate.is_cuda and gate.dtype != torch.float64 and dispatch.triton_missing() is None
    return KERNELS.get(type(act).__name__) if runs else None


def _launches():
    from . import launch_gate

    return launch_gate


def gated(down: Any, act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``down(act(gate) * up)``, as one node where a graph is made and the layer is a single adapter's; else as it stands here."""
    alike = gate.shape == up.shape and gate.dtype is up.dtype and gate.is_contiguous() and up.is_contiguous()
    if alike and torch.is_grad_enabled() and not ops.watched() and not hooked(down) and not hooked(act):
        own = down.projection(up) if hasattr(down, "projection") else None  # up is what the product looks like
        if own is not None and not seen(up, [own]) and ops.plain(gate) and own.lora_A.shape[-1] == up.shape[-1]:
            x, one, _ = fitting(up, own, None, "auto")
            trained = any(t is not None and t.requires_grad for t in (gate, up, one.lora_A, one.lora_B, one.bias))
            if x is up and recorded(trained):
                layer, (weight, A, B, bias, seed) = apart(up, one, True)  # draws the seed
                seed = ops.mask(seed, up, layer.adapters, layer.p, "auto", "")
                return GatedFunction.apply(gate, up, act, layer, weight, A, B, bias, seed)
    return down(act(gate) * up)


class Gate(NamedTuple):
    """The names by which an MLP's forward calls its parts."""

    gate: str
    act: str
    up: str
    down: str


class Gated:
    """The forward pass of a gated MLP of another class by `gated`; ``_kind``: that class."""

    _kind: type
    _names: Gate

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, act, up, down = (getattr(self, name) for name in self._names)
        return gated(down, act, gate(x), up(x))

    def __reduce_ex__(self, protocol):  # a copy, or a file, finds the class by the one that it is made of
        return _empty, (self._kind, self._names), self.__dict__


@functools.cache
def gated_class(kind: Any, names: Gate) -> type:
    """The subclass of a gated MLP's class that has the forward pass of `Gated`."""
    return type(f"Gated{kind.__name__}", (Gated, kind), {"__module__": kind.__module__, "_kind": kind, "_names": names})


def _empty(kind: type, names: Gate) -> nn.Module:
    new: Any = gated_class(kind, names)
    return new.__new__(new)


@functools.cache
def gate_of(forward: Any) -> Gate | None:
    """The parts of a forward that is, by its source, ``self.down(self.act(self.gate(x)) * self.up(x))`` under any names."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError, AttributeError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    names = [arg.arg for arg in function.args.args]
    if len(names) != 2 or len(inspect.signature(forward).parameters) != 2:
        return None
    me, x = names
    known: dict[str, ast.expr] = {}  # locals that are not used yet, each by what it stands for

    def meant(e: ast.expr) -> ast.expr:
        return known.pop(e.id, e) if isinstance(e, ast.Name) else e

    def called(e: ast.expr) -> tuple[str, ast.expr]:
        """``self.name(argument)`` as (name, argument)."""
        match meant(e):
            case ast.Call(ast.Attribute(ast.Name(owner), name), [argument], []) if owner == me:
                return name, meant(argument)
        return "", e

    for statement in function.body:
        match statement:
            case ast.Expr(ast.Constant()):
                continue
            case ast.Assign([ast.Name(name)], value) if name not in known:
                known[name] = value
            case ast.Return(ast.expr() as value):
                down, product = called(value)
                if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
                    return None
                (act, inner), (up, of_up) = called(product.left), called(product.right)
                gate, of_gate = called(inner)
                found = Gate(gate, act, up, down)
                its_x = [isinstance(e, ast.Name) and e.id == x for e in (of_gate, of_up)]
                return found if all(its_x) and all(found) and len(set(found)) == 4 and not known else None
            case _:
                return None
    return None


def recompute_gates(model: nn.Module, enable: bool = True) -> list[str]:
    """Have gated MLPs keep two tensors of their width for the backward pass where torch keeps four.

    Args:
        model: Changed in place. Call it after apply_lora or fuse, and before MLPs are sharded themselves.
        enable: False gives every MLP its own forward pass again.
    Returns:
        The names of the MLPs: those whose forward pass is, by its source, ``down(act(gate(x)) * up(x))``, as in Llama, Mistral, Qwen and
        Gemma, whose down projection has an adapter, and whose activation is one of torch's or transformers' own.

    On a CPU y and every gradient are the same bits as before. On a GPU the product is made in float32 and rounded once where torch rounds
    act(gate) first. An MLP computes as before, keeping four, under torch.compile, without gradients, and where its down projection is
    merged, has hooks, several adapters, segments, DoRA or a bias of its adapter.

    Raises:
        UnsupportedError: an MLP was sharded by itself (fully_shard) since.
    """
    gated_ones = [module for module in model.modules() if isinstance(module, Gated)]
    for module in gated_ones:
        if sharding(module):
            raise UnsupportedError(f"model: wanted MLPs that are not sharded themselves, got a {type(module).__name__}")
    for module in gated_ones:
        module.__class__ = module._kind
    names = [name for name, module in model.named_modules() if enable and _fits(module)]
    for name in names:
        mlp: Any = model.get_submodule(name)
        kind: Any = type(mlp)
        mlp.__class__ = gated_class(kind, gate_of(kind.forward))
    return names


def _fits(module: nn.Module) -> bool:
    found = None if "forward" in module.__dict__ or sharding(module) else gate_of(type(module).forward)
    if found is None or not all(name in module._modules for name in found):
        return False
    act, down = module._modules[found.act], module._modules[found.down]
    ours = type(act).__module__ in ("torch.nn.modules.activation", "transformers.activations") and type(act).__name__ in ACTIVATIONS
    return ours and not getattr(act, "inplace", False) and hasattr(type(down), "_shares")

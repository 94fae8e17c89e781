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
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import dispatch, ops
from .autograd import recorded, refused_twice
from .nn import hooked, sharding
from .problem import PLAIN, UnsupportedError
from .projections import Layer, Projection, apart, fitting, made_of, seen

KERNELS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
# Classes of torch and transformers that answer element by element, in their argument's dtype under autocast, too, and keep the argument.
ACTIVATIONS = (*KERNELS, "GELU", "GELUActivation", "QuickGELUActivation", "Mish")


class GatedFunction(torch.autograd.Function):
    """``y [..., N]`` of gate and up, ``[..., K]``, contiguous, with gradients for both and for lora_A, lora_B and bias.

    dtype: Of the product, as the down projection takes it.
    """

    @staticmethod
    def forward(ctx, gate, up, act: nn.Module, dtype, layer: Layer, weight, lora_A, lora_B, bias, seed):
        need_A, need_B, need_bias = ctx.needs_input_grad[6:9]
        kernel = _kernel(act, gate)
        h = (act.forward(gate) * up if kernel is None else _launches().product(kernel, gate, up)).to(dtype)
        if layer.make is not None:
            weight = made_of(layer.make, lora_B.shape[0], h.shape[-1], h)
        y, u = ops.forward(h, weight, lora_A, lora_B, bias, seed, layer.adapters, layer.scale, layer.p, need_B, "auto", "")
        weight, u = None if layer.make is not None else weight, u if need_B else None
        ctx.save_for_backward(gate, up, weight, lora_A, lora_B, u, seed, layer.adapters.scales)  # of scales torch tells if written to
        ctx.constants = (act, dtype, layer, kernel, (need_A, need_B, need_bias))
        return y

    @staticmethod
    @refused_twice
    def backward(ctx, dy):
        gate, up, weight, lora_A, lora_B, u, seed, _ = ctx.saved_tensors
        act, dtype, layer, kernel, needs = ctx.constants
        if kernel is None:
            h, gradients = _by_torch(act, gate, up)
        else:
            h = _launches().product(kernel, gate, up) if needs[0] else None
            gradients = functools.partial(_launches().gradients, kernel, gate, up)
        h = h.to(dtype) if needs[0] else None
        if layer.make is not None:
            weight = made_of(layer.make, dy.shape[-1], gate.shape[-1], dy)
        dh, *others = ops.backward(
            dy, h, weight, lora_A, lora_B, u, seed, layer.adapters, layer.scale, layer.p, (True, *needs), lora_A.dtype, "auto", ""
        )  # fmt: skip
        del h
        dgate, dup = gradients(dh.to(gate.dtype).contiguous())
        return dgate, dup, *(None,) * 4, *(grad if need else None for need, grad in zip(needs, others, strict=True)), None


def _by_torch(act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
    """The product, and what makes dgate and dup of its gradient, as autograd makes them, without the product itself."""
    with torch.enable_grad():
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = act.forward(leaves[0]) * leaves[1]
    edge = torch.autograd.graph.get_gradient_edge(h)
    return h.detach(), lambda dh: torch.autograd.grad(edge, leaves, dh)


def _kernel(act: nn.Module, gate: torch.Tensor) -> str | None:
    """The kernels' name for an activation, or None where torch computes it."""
    runs = gate.is_cuda and gate.dtype != torch.float64 and dispatch.triton_missing() is None
    return KERNELS.get(type(act).__name__) if runs else None


def _launches():
    from . import launch_gate

    return launch_gate


def gated(down: Any, act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``down(act(gate) * up)``, as one node where that keeps less and the layer is a single adapter's; else as it stands here."""
    own = _projection(down, act, gate, up)
    if own is not None:
        like, one, _ = fitting(up, own, None, "auto")  # up is what the product looks like
        layer, tensors = apart(like, one, True)  # draws the seed
        tensors[4] = ops.mask(tensors[4], up, layer.adapters, layer.p, "auto", "")
        y = GatedFunction.apply(gate, up, act, like.dtype, layer, *tensors)
        return y.to(up.dtype) if layer.make is not None else y
    return down(act(gate) * up)


def _projection(down: Any, act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> Projection | None:
    """The down projection of a node, or None where the model's own expression is computed."""
    if ops.watched() or not torch.is_grad_enabled() or type(gate) not in PLAIN or type(up) not in PLAIN:
        return None
    alike = gate.shape == up.shape and gate.dtype is up.dtype and gate.is_contiguous() and up.is_contiguous()
    if not alike or not recorded(gate.requires_grad or up.requires_grad):  # else torch keeps no more than the product
        return None
    if hooked(down) or hooked(act) or _hooks_of_all() or not hasattr(down, "projection") or not _elementwise(act):
        return None
    own = down.projection(up)
    return None if own is None or own.lora_A.shape[-1] != up.shape[-1] or seen(up, [own]) or not ops.plain(gate) else own


def _hooks_of_all() -> bool:
    """Whether there are hooks for every module; torch has no public name for the question."""
    return getattr(nn.modules.module, "_has_any_global_hook", bool)()


def _elementwise(act: Any) -> bool:
    kind = type(act)
    theirs = kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return theirs and kind.__name__ in ACTIVATIONS and not getattr(act, "inplace", False)


class Gate(NamedTuple):
    """The names by which an MLP's forward calls its parts, and of its argument."""

    gate: str
    act: str
    up: str
    down: str
    x: str


class Gated:
    """What a gated MLP of another class becomes; ``_kind``: that class, whose ``_forward`` was read."""

    _kind: type
    _forward: Callable
    _names: Gate

    def __reduce_ex__(self: Any, protocol):  # a copy, or a file, finds the class by the one that it is made of
        return _empty, (type(self)._kind,), self.__getstate__()


def _forward(self, x):
    return _through(self, x)


def _through(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a `Gated`, or of its own class where that is another by now."""
    kind: Any = type(mlp)
    if kind._kind.forward is not kind._forward:
        return kind._kind.forward(mlp, x)
    gate, act, up, down, _ = kind._names  # torch 2.8's compiler takes no slice of a named tuple
    return gated(getattr(mlp, down), getattr(mlp, act), getattr(mlp, gate)(x), getattr(mlp, up)(x))


@functools.cache
def gated_class(kind: Any, forward: Callable) -> type:
    """The subclass of a gated MLP's class, whose forward this is, that has the forward pass of `gated`, its argument under its own name."""
    names: Any = gate_of(forward)
    code = _forward.__code__.replace(co_varnames=("self", names.x))
    own = types.FunctionType(code, _forward.__globals__, "forward")
    fields = {"__module__": kind.__module__, "forward": own, "_kind": kind, "_forward": staticmethod(forward), "_names": names}
    return type(f"Gated{kind.__name__}", (Gated, kind), fields)


def _empty(kind: Any) -> nn.Module:
    new: Any = kind if gate_of(kind.forward) is None else gated_class(kind, kind.forward)
    return new.__new__(new)


@functools.cache
def gate_of(forward: Any) -> Gate | None:
    """The parts of a forward that is, by its source, ``self.down(self.act(self.gate(x)) * self.up(x))`` under any names."""
    if type(forward) is not types.FunctionType or hasattr(forward, "__wrapped__"):  # whose source is another's
        return None
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    names = [arg.arg for arg in function.args.args]
    if len(names) != 2 or len(inspect.signature(forward).parameters) != 2:
        return None
    me, x = names
    known: dict[str, ast.expr] = {}  # locals that are not used yet, each by what it stands for

    def meant(e: ast.expr) -> ast.expr:
        return known.pop(e.id, e) if isinstance(e, ast.Name) else e

    def called(e: ast.expr) -> tuple[str, ast.expr, tuple[int, int]]:
        """``self.name(argument)`` as (name, argument, where it stands)."""
        e = meant(e)
        match e:
            case ast.Call(ast.Attribute(ast.Name(owner), name), [argument], []) if owner == me:
                return name, meant(argument), (e.lineno, e.col_offset)
        return "", e, (0, 0)

    for statement in function.body:
        match statement:
            case ast.Expr(ast.Constant()):
                continue
            case ast.Assign([ast.Name(name)], value) if name not in known:
                known[name] = value
            case ast.Return(ast.expr() as value):
                down, product, _ = called(value)
                if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
                    return None
                (act, inner, _), (up, of_up, then) = called(product.left), called(product.right)
                gate, of_gate, first = called(inner)
                found = Gate(gate, act, up, down, x)
                its_x = all(isinstance(e, ast.Name) and e.id == x for e in (of_gate, of_up))
                return found if its_x and first < then and all(found) and len(set(found[:4])) == 4 and not known else None
            case _:
                return None
    return None


def recompute_gates(model: nn.Module, enable: bool = True) -> list[str]:
    """Have gated MLPs keep two tensors of their width for the backward pass where torch keeps four.

    Args:
        model: Changed in place. Call it after apply_lora or fuse, and before MLPs are sharded themselves or get accelerate's hooks.
        enable: False gives every MLP its own class and forward pass again.
    Returns:
        The names of the MLPs: those whose forward pass is, by its source, ``down(act(gate(x)) * up(x))``, as in Llama, Mistral, Qwen and
        Gemma, whose down projection has an adapter, and whose activation is one of `ACTIVATIONS`.
    Raises:
        UnsupportedError: an MLP that is to have its own class again has got another since (fully_shard), or accelerate's hooks.

    On a CPU y and every gradient are the same bits as before. On a GPU the product is made in float32 and rounded once where torch rounds
    act(gate) first. An MLP computes as before, keeping four, under torch.compile, without gradients, and where its down projection is
    merged, has hooks, several adapters, segments, DoRA or a bias of its adapter.
    """
    already = {name: module for name, module in model.named_modules() if isinstance(module, Gated)}
    for name, module in already.items():
        kind: Any = type(module)
        if not enable and ("_kind" not in vars(kind) or "forward" in module.__dict__):
            what = "accelerate's hooks" if "forward" in module.__dict__ else f"the class {kind.__name__}"
            raise UnsupportedError(f"model: wanted MLPs as recompute_gates left them, got {name!r} with {what}")
    if not enable:
        for module in already.values():
            module.__class__ = type(module)._kind
        return []
    classes = {name: _class_of(module) for name, module in model.named_modules() if name not in already and _fits(module)}
    for name, new in classes.items():
        model.get_submodule(name).__class__ = new
    return [name for name, _ in model.named_modules() if name in already or name in classes]


def _class_of(module: nn.Module) -> type:
    kind: Any = type(module)
    return gated_class(kind, kind.forward)


def _fits(module: nn.Module) -> bool:
    found = None if "forward" in module.__dict__ or sharding(module) else gate_of(type(module).forward)
    if found is None or not all(name in module._modules for name in found[:4]):
        return False
    return _elementwise(module._modules[found.act]) and hasattr(type(module._modules[found.down]), "_shares")

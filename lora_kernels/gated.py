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

from . import ops
from .autograd import recorded, refused_twice
from .gates import Gate, elementwise, halves, product
from .nn import hooked, hooks_of_all, sharding
from .problem import PLAIN, UnsupportedError
from .projections import Layer, Projection, apart, fitting, made_of, seen


class GatedFunction(torch.autograd.Function):
    """``y [..., N]`` of a gate's inputs, contiguous, with gradients for them and for lora_A, lora_B and bias.

    dtype: Of the product, as the down projection takes it.
    """

    @staticmethod
    def forward(ctx, gate: Gate, dtype, layer: Layer, weight, lora_A, lora_B, bias, seed, *inputs):
        need_A, need_B, need_bias = ctx.needs_input_grad[4:7]
        h = gate(*inputs).to(dtype)
        if layer.make is not None:
            weight = made_of(layer.make, lora_B.shape[0], h.shape[-1], h)
        y, u = ops.forward(h, weight, lora_A, lora_B, bias, seed, layer.adapters, layer.scale, layer.p, need_B, "auto", "")
        weight, u = None if layer.make is not None else weight, u if need_B else None
        ctx.save_for_backward(weight, lora_A, lora_B, u, seed, layer.adapters.scales, *inputs)  # of scales torch tells if written to
        ctx.constants = (gate, dtype, layer, (need_A, need_B, need_bias))
        return y

    @staticmethod
    @refused_twice
    def backward(ctx, dy):
        weight, lora_A, lora_B, u, seed, _, *inputs = ctx.saved_tensors
        gate, dtype, layer, needs = ctx.constants
        h, gradients = gate.again(tuple(inputs), needs[0])
        h = h.to(dtype) if needs[0] else None
        if layer.make is not None:
            weight = made_of(layer.make, dy.shape[-1], lora_A.shape[-1], dy)
        dh, *others = ops.backward(
            dy, h, weight, lora_A, lora_B, u, seed, layer.adapters, layer.scale, layer.p, (True, *needs), lora_A.dtype, "auto", ""
        )  # fmt: skip
        del h
        found, _ = gradients(dh)
        return *(None,) * 4, *(grad if need else None for need, grad in zip(needs, others, strict=True)), None, *found


def gated(down: Any, act: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """``down(act(gate) * up)``, as one node where that keeps less and the layer is a single adapter's; else as it stands here.

    inputs: gate and up, or one tensor of both, gate first.
    """
    found = _projection(down, act, inputs)
    if found is None:
        return down(product(act, *inputs))
    own, up = found
    like, one, _ = fitting(up, own, None, "auto")  # up is what the product looks like
    layer, tensors = apart(like, one, True)  # draws the seed
    tensors[4] = ops.mask(tensors[4], up, layer.adapters, layer.p, "auto", "")
    y = GatedFunction.apply(Gate.of(act, up), like.dtype, layer, *tensors, *inputs)
    return y.to(up.dtype) if layer.make is not None else y


def _projection(down: Any, act: nn.Module, inputs: tuple) -> tuple[Projection, torch.Tensor] | None:
    """The down projection of a node, and up without its graph; or None where the model's own expression is computed."""
    if ops.watched() or not torch.is_grad_enabled() or not all(type(t) in PLAIN and t.is_contiguous() for t in inputs):
        return None
    one = inputs[0]
    if any(t.shape != one.shape or t.dtype is not one.dtype for t in inputs[1:]):
        return None
    if not recorded(any(t.requires_grad for t in inputs)):  # else torch keeps no more than the product
        return None
    if hooked(down) or hooked(act) or hooks_of_all() or not hasattr(down, "projection") or not elementwise(act):
        return None
    _, up = halves(tuple(t.detach() for t in inputs))
    own = down.projection(up)
    if own is None or own.lora_A.shape[-1] != up.shape[-1] or up.shape[-1] * 2 != one.shape[-1] * len(inputs):
        return None
    return None if seen(up, [own]) or not ops.plain(one) else (own, up)


class Names(NamedTuple):
    """By which an MLP's forward calls its parts, and its argument. up: "" where gate is of both."""

    gate: str
    act: str
    up: str
    down: str
    x: str


class Gated:
    """What a gated MLP of another class becomes; ``_kind``: that class, whose ``_forward`` was read."""

    _kind: type
    _forward: Callable
    _names: Names

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
    inputs = (getattr(mlp, gate)(x), getattr(mlp, up)(x)) if up else (getattr(mlp, gate)(x),)
    return gated(getattr(mlp, down), getattr(mlp, act), *inputs)


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
def gate_of(forward: Any) -> Names | None:
    """The parts of a forward that is, by its source, one of these under any names:

    ``self.down(self.act(self.gate(x)) * self.up(x))``
    ``gate, up = self.both(x).chunk(2, dim=-1);  self.down(up * self.act(gate))``
    """
    if type(forward) is not types.FunctionType or hasattr(forward, "__wrapped__"):  # whose source is another's
        return None
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    names = [arg.arg for arg in function.args.args]
    result = _result(function.body, set(names))
    if result is None or len(names) != 2 or len(inspect.signature(forward).parameters) != 2:
        return None
    me, x = names

    def called(e: ast.expr) -> tuple[str, ast.expr]:
        """``self.name(argument)`` as (name, argument)."""
        match e:
            case ast.Call(ast.Attribute(ast.Name(owner), name), [argument], []) if owner == me:
                return name, argument
        return "", e

    down, multiplied = called(result)
    match multiplied:
        case ast.BinOp(left, ast.Mult(), right):
            pass
        case _:
            return None
    if called(left)[0] == "":  # up * act(gate)
        left, right = right, left
    (act, inner), (up, of_up) = called(left), called(right)
    if isinstance(inner, Half) and isinstance(right, Half) and inner.of is right.of and (inner.which, right.which) == (0, 1):
        gate, of_gate = called(inner.of)
        parts, of = [gate, act, down], [of_gate]
    elif isinstance(inner, Half) or not up or (inner.lineno, inner.col_offset) > (right.lineno, right.col_offset):
        return None  # the last: masks are drawn in the order of the calls
    else:
        gate, of_gate = called(inner)
        parts, of = [gate, act, up, down], [of_gate, of_up]
    if not all(parts) or len(set(parts)) < len(parts) or not all(isinstance(e, ast.Name) and e.id == x for e in of):
        return None
    return Names(gate, act, up, down, x)


class Half(ast.expr):
    """``which`` of the two parts of an expression's chunk(2, dim=-1)."""

    _fields = ()

    def __init__(self, of: ast.expr, which: int):
        super().__init__()
        self.of, self.which = of, which


def _result(body: list[ast.stmt], arguments: set[str]) -> ast.expr | None:
    """What a function returns, its locals, each used once, by what they stand for; None where it is more than assignments to them."""
    known: dict[str, ast.expr] = {}

    class Meant(ast.NodeTransformer):
        def visit_Name(self, node):
            return known.pop(node.id, node)

    for statement in body:
        match statement:
            case ast.Expr(ast.Constant()):
                continue
            case ast.Return(ast.expr() as value):
                result = Meant().visit(value)
                return None if known else result
            case ast.Assign([ast.Name(name)], value):
                new = {name: Meant().visit(value)}
            case ast.Assign([ast.Tuple([ast.Name(first), ast.Name(second)])], value):
                match Meant().visit(value):
                    case ast.Call(ast.Attribute(of)) as call if ast.unparse(call).endswith((".chunk(2, dim=-1)", ".chunk(2, -1)")):
                        new = {first: Half(of, 0), second: Half(of, 1)}
                    case _:
                        return None
            case _:
                return None
        if arguments & set(new) or known.keys() & new.keys():
            return None
        known |= new
    return None


def recompute_gates(model: nn.Module, enable: bool = True) -> list[str]:
    """Have gated MLPs keep two tensors of their width for the backward pass where torch keeps four.

    Args:
        model: Changed in place. Call it after apply_lora or fuse, and before MLPs are sharded themselves or get accelerate's hooks.
        enable: False gives every MLP its own class and forward pass again.
    Returns:
        The names of the MLPs: those whose forward pass is, by its source, ``down(act(gate(x)) * up(x))``, as in Llama, Mistral, Qwen and
        Gemma, or the same of gate and up that are halves of one layer's y, as in Phi-3 and GLM, whose down projection has an adapter, and
        whose activation is one of `gates.ACTIVATIONS`.
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
    if found is None or not all(name in module._modules for name in found[:4] if name):
        return False
    return elementwise(module._modules[found.act]) and hasattr(type(module._modules[found.down]), "_shares")

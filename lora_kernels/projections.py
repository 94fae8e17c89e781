"""``lora_linears``: several layers of one x, as q, k and v are, or gate and up, in one node of the graph.

    Y_i = x W_i^T + U_i B_i^T + bias_i       U = scale x [A_1; A_2; ...]^T, from one read of x
    dX = sum of dY_i W_i + dS_i A_i          each product added to dX as it is made, where autograd would add whole tensors
    [dA_1; dA_2; ...] = dS^T x               from one read of x;  dB_i = dY_i^T U_i

With dropout each layer has a mask of its own, so that U_i and dA_i are of x as it drops it, and dX alone is shared. The kernels and the
chain are those of one layer (`lora_linear`), and which of them a layer takes is its own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import dispatch, ops, reference
from .autograd import carried, lora_linear, prepare, recorded, refused_twice
from .operands import as_matrix, even, like_tokens, tokens
from .problem import MAX_RANK, UnsupportedError, autocasts
from .segments import Adapters


class Projection(NamedTuple):
    """One layer of a shared x; each field as in `lora_linear`.

    weight: ``[N, K]``, frozen; or a function that makes it, contiguous: called in both passes, when its product's turn comes. lora_A:
    ``[r, K]``. lora_B: ``[N, r]``. bias: ``[N]`` or None. scale: a float, or a float32 tensor of one element. dropout_p: in [0, 1), acts
    when training. seed: its mask's, None to draw one.
    """

    weight: torch.Tensor | Callable[[], torch.Tensor]
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float | torch.Tensor = 1.0
    dropout_p: float = 0.0
    seed: torch.Tensor | int | None = None

    def alone(self, x: torch.Tensor, **how) -> torch.Tensor:
        """`lora_linear` of x; how: its training, config and impl."""
        weight, A, B, bias, scale, p, seed = self  # torch 2.8's compiler takes no slice of a named tuple
        return lora_linear(x, weight, A, B, bias, scale=scale, dropout_p=p, seed=seed, **how)


class Layer(NamedTuple):
    """A projection as its arm takes it: its tensors apart, which autograd saves; ``make``: what makes the weight, if it is no tensor."""

    adapters: Adapters
    scale: float
    p: float
    make: Callable[[], torch.Tensor] | None


class LoRALinearsFunction(torch.autograd.Function):
    """``y_i [..., N_i]`` for each layer, with gradients for x and each layer's A, B and bias."""

    @staticmethod
    def forward(ctx, x, layers, impl, config, *tensors):
        five = _fives(tensors)
        need_x, needs = ctx.needs_input_grad[0], _fives(ctx.needs_input_grad[4:])
        ys, us, columns = _forward(x, five, layers, impl, config, [need[2] for need in needs])
        saved: list = [x if any(need[1] for need in needs) else None]
        for (weight, A, B, _, seed), u, (_, need_A, need_B, *_) in zip(five, us, needs, strict=True):
            saved += [weight if need_x else None, A if need_x else None, B if need_x or need_A else None, u if need_B else None]
            saved.append(seed if need_x or need_A else None)
        # The scales, too: torch tells then if one was written to before the backward pass.
        ctx.save_for_backward(*saved, *(layer.adapters.scales for layer in layers))
        if not need_x:
            ctx.mark_non_differentiable(*(y for y, need in zip(ys, needs, strict=True) if not any(need)))
        ctx.set_materialize_grads(False)
        ctx.constants = (layers, impl, config, columns, need_x, needs, [A.dtype for _, A, *_ in five])
        return tuple(ys)

    @staticmethod
    @refused_twice
    def backward(ctx, *dys):
        layers, impl, config, columns, need_x, needs, dtypes = ctx.constants
        x, *flat = ctx.saved_tensors
        tensors = _fives(flat[: 5 * len(layers)])
        live = [i for i, dy in enumerate(dys) if dy is not None]
        grads: list = [[None] * 5 for _ in layers]
        dx = all_ds = None
        if columns is not None and len(live) == len(layers) and all(need[1] for need in needs):
            all_ds = dys[0].new_empty(tokens(dys[0]), columns[-1].stop)
        its_x = even(x)
        for i in live:
            (weight, A, B, u, seed), (_, need_A, need_B, need_bias, _), layer = tensors[i], needs[i], layers[i]
            dy = even(dys[i].resolve_neg())  # as an operator would have it
            shared: dict[str, Any] = dict(onto=dx)
            if all_ds is not None:
                need_A = i == live[-1]  # dS is whole then, and dX's last launch has company
                shared |= dict(ds=all_ds[:, columns[i]], all_ds=all_ds)
            if need_x and layer.make is not None:
                weight = made_of(layer.make, dy.shape[-1], A.shape[-1], dy)
            if need_x or need_A or need_B or all_ds is not None:
                run, chosen = dispatch.backward_arm(dy, its_x, weight, A, B, u, layer.adapters, layer.p, impl, config)
                need = (need_x, need_A, need_B)
                its_dx, da, db = run(
                    dy, its_x, weight, A, B, u, seed, layer.adapters, layer.scale, layer.p, need, dtypes[i], chosen, **shared
                )  # fmt: skip
                dx = like_tokens(its_dx, dys[i]) if need_x and its_dx.dim() != dys[i].dim() else its_dx
                grads[i][1:3] = da, db
            grads[i][3] = as_matrix(dy).sum(0) if need_bias else None
        if all_ds is not None:
            # Not views, to which some optimizers' ways with a gradient do not apply.
            each = torch.unsafe_split_with_sizes(grads[-1][1], [own.stop - own.start for own in columns])
            for its_grads, da in zip(grads, each, strict=True):
                its_grads[1] = da
        return dx, None, None, None, *(grad for five in grads for grad in five)


def _fives(flat: Sequence) -> list[Sequence]:
    """A tuple a layer: weight, lora_A, lora_B, bias and seed."""
    return [flat[i : i + 5] for i in range(0, len(flat), 5)]


def _forward(x, tensors, layers: Sequence[Layer], impl: str, config: str, save: Sequence[bool]):
    """Each layer's ``y [..., N]`` and ``u [M, r]``, and which columns of the shared u are whose, None where each has its own."""
    its = even(x)
    arms = []
    for (weight, A, B, *_), layer in zip(tensors, layers, strict=True):
        # What is made is made when its turn comes.
        like = weight if layer.make is None else torch.empty(B.shape[0], x.shape[-1], dtype=x.dtype, device="meta")
        arms.append(dispatch.forward_arm(its, like, A, B, layer.adapters, layer.p, impl, config))
    columns = _columns([A for _, A, *_ in tensors], layers)
    us: list = [None] * len(layers)
    # To put the As together is to read and write them once; it saves reading x for all layers but one.
    if columns is not None and (len(layers) - 1) * tokens(x) > 2 * columns[-1].stop and all(_takes_u(chosen) for _, chosen in arms):
        A = torch.cat([A for _, A, *_ in tensors])
        run, chosen = dispatch.down_arm(arms[0])
        keep = any(save) or any(chosen is None for _, chosen in arms)
        u = run(its, A, layers[0].adapters, layers[0].scale, keep, chosen)
        us = [u[..., own] for own in columns]
    ys = []
    for i, ((run, chosen), (weight, A, B, bias, seed), layer) in enumerate(zip(arms, tensors, layers, strict=True)):
        weight = weight if layer.make is None else made_of(layer.make, B.shape[0], x.shape[-1], x)
        y, us[i] = run(its, weight, A, B, bias, seed, layer.adapters, layer.scale, layer.p, save[i], chosen, u=us[i])
        ys.append(y if its is x else like_tokens(y, x))
    return ys, us, columns


def made_of(make: Callable[[], torch.Tensor], N: int, K: int, like: torch.Tensor) -> torch.Tensor:
    """The weight ``[N, K]`` that a function makes, in the dtype of ``like`` and, as its arm was chosen for, contiguous."""
    weight = make()
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (N, K) or weight.device != like.device or not weight.is_contiguous():
        given = f"{list(weight.shape)} on {weight.device}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"weight: wanted a function that makes a contiguous [{N}, {K}] on {like.device}, got one that makes {given}")
    return weight.to(like.dtype)


def _takes_u(config) -> bool:
    """Whether an arm, the chain where there is no configuration, takes u as `down` gives it."""
    return config is None or config.expand.u == "given"


def _columns(As: Sequence[torch.Tensor], layers: Sequence[Layer]) -> list[slice] | None:
    """The columns of one u that are each layer's, or None: with dropout, scales or dtypes that differ, or too large a rank in all."""
    one = layers[0]
    ends = [0]
    for A, layer in zip(As, layers, strict=True):
        if layer.p or layer.scale != one.scale or layer.adapters.scales is not one.adapters.scales or A.dtype != As[0].dtype:
            return None
        ends.append(ends[-1] + A.shape[0])
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)] if ends[-1] <= MAX_RANK else None


def lora_linears(x, projections: Sequence[Projection], *, training=False, config=None, impl="auto") -> tuple[torch.Tensor, ...]:
    """`lora_linear` for several layers of one x, reading and adding together what they share.

    Args:
        x: Tokens ``[..., K]``, as in `lora_linear`.
        projections: A `Projection` for each layer; their N, ranks, scales and dropouts may differ. Without dropout and with one scale
            they share the product with A, too.
        training: Whether dropout acts.
        config, impl: As in `lora_linear`, for each of them.
    Returns:
        ``[..., N_i]`` for each. Under torch.compile, and wherever else torch looks on, these are separate calls of `lora_linear`.
    Gradients:
        As of separate calls. dX is summed in the order of the projections, in x's dtype, as autograd sums; gradients of A that were
        computed together lie in one storage.
    Raises:
        As `lora_linear`, the projection named.
    """
    projections = projections if isinstance(projections, Projection) else list(projections)
    if isinstance(projections, Projection) or not all(isinstance(each, Projection) for each in projections):
        raise TypeError(f"projections: wanted a sequence of lora_kernels.Projection, got {_what(projections)}")
    if not projections:
        raise ValueError("projections: wanted at least one, got none")
    checked, key = [], ""
    for i, each in enumerate(projections):
        try:
            x, each, key = fitting(x, each, config, impl)
        except (TypeError, ValueError, UnsupportedError) as error:
            raise type(error)(f"projections[{i}]: {error}") from None
        checked.append(each)
    if impl == "reference" or seen(x, checked):
        return tuple(each.alone(x, training=training, config=config, impl=impl) for each in checked)
    layers, tensors = zip(*(apart(x, each, training) for each in checked), strict=True)
    trained = x.requires_grad or any(t is not None and t.requires_grad for five in tensors for t in five)
    if recorded(trained):
        for five, layer in zip(tensors, layers, strict=True):
            five[4] = ops.mask(five[4], x, layer.adapters, layer.p, impl, key)
        return LoRALinearsFunction.apply(x, layers, impl, key, *(t for five in tensors for t in five))
    return tuple(_forward(x, tensors, layers, impl, key, [False] * len(layers))[0])


def fitting(x, one: Projection, config, impl) -> tuple[torch.Tensor, Projection, str]:
    """x and a projection of it as autocast wants them, and the config's key, all checked."""
    made = callable(one.weight)
    weight = _unmade(x, one.lora_B) if made else one.weight
    x, weight, bias, key = prepare(
        x, weight, one.lora_A, one.lora_B, one.bias, None, one.scale, one.dropout_p, one.seed, None, None, config, impl
    )  # fmt: skip
    weight = one.weight if made else weight
    cast = weight is not one.weight or bias is not one.bias
    return x, one._replace(weight=weight, bias=bias) if cast else one, key


def apart(x, one: Projection, training: bool) -> tuple[Layer, list]:
    """What an autograd Function is given of a projection: its constants, and weight, lora_A, lora_B, bias and seed."""
    p = float(one.dropout_p) if training else 0.0
    adapters, scale = carried(None, one.scale, None)
    make = one.weight if callable(one.weight) else None
    seed = reference.as_seed(one.seed, x.device) if p else None
    return Layer(adapters, float(scale), p, make), [None if make else one.weight, *one[1:4], seed]


def _unmade(x, lora_B) -> torch.Tensor | None:
    """In the place of a weight that is not made yet, for the checks; it takes no memory."""
    if not isinstance(x, torch.Tensor) or not isinstance(lora_B, torch.Tensor) or lora_B.dim() != 2:
        return x  # of which the checks say what is wrong beside it
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype
    return x.new_empty((), dtype=dtype).expand(lora_B.shape[0], x.shape[-1])


def _what(projections) -> str:
    if isinstance(projections, Projection):
        return "a Projection itself"
    return ", ".join(sorted({type(each).__name__ for each in projections}))


def seen(x: torch.Tensor, projections: Sequence[Projection]) -> bool:
    """Whether a compiler, a mode or a tensor's class is to see the operators of single calls; or there is nothing to compute."""
    if ops.watched() or x.numel() == 0:
        return True
    return any(each.lora_B.shape[0] == 0 or not ops.plain(x, *(t for t in each[:4] if not callable(t))) for each in projections)

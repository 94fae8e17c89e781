"""``lora_linear``: the public function, and the autograd Function behind it.

    dX = dY W + D.(dS A)      dA = dS^T (D.x)      dB = dY^T U      dbias = sum over tokens of dY
    with dS = scale dY B, U = scale (D.x) A^T and D the dropout mask over 1 - p

Saved for backward: x, weight, A, B, U and the seed, each only where a gradient that is wanted uses it; with segments the plan,
which all layers share. A weight that a function makes is made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from . import calls, checks, dispatch, ops, problem, reference
from .problem import UnsupportedError
from .segments import ONE, Adapters
from .tuning import Config

IMPLS = ("auto", "triton", "torch", "reference")


class Once(torch.autograd.Function):
    """Gradients, whose own derivatives are refused; ``sources``: all that they depend on.

    torch's `once_differentiable` ties them to nothing, so that torch.autograd.grad passes its error by, and what is missing is zeros.
    """

    @staticmethod
    def forward(ctx, gradients, *sources):
        return tuple(gradients)

    @staticmethod
    def backward(ctx, *ddys):
        raise UnsupportedError("create_graph: wanted gradients that are not differentiated themselves; impl='reference' can be, twice")


class _Unpacked:
    """A ctx whose saved tensors, which a checkpoint hands out once, were read."""

    def __init__(self, ctx):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self.ctx, name)


def refused_twice(gradients: Callable) -> Callable:
    """A backward pass with `Once` around it where a graph of the gradients is made (create_graph=True); nobody else pays for it."""

    def backward(ctx, *dys):
        if not torch.is_grad_enabled():
            return gradients(ctx, *dys)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = gradients(ctx, *dys)
        sources = [t for t in (*dys, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not sources:
            return found
        once = iter(Once.apply([g for g in found if g is not None], *sources))
        return tuple(None if g is None else next(once) for g in found)

    return backward


class LoRALinearFunction(torch.autograd.Function):
    """``y [..., N]`` with gradients for x, lora_A, lora_B, bias and base; the weight is frozen."""

    @staticmethod
    def forward(
        ctx, x, weight, lora_A, lora_B, bias, base, seed, scale, dropout_p, impl, config, arm, make, geometry, scales, ranks, *plan
    ):  # fmt: skip
        need_x, _, need_A, need_B, need_bias, ctx.need_base = ctx.needs_input_grad[:6]
        adapters = Adapters.from_flat(scales, ranks, plan, geometry)
        y, u = ops.forward(x, weight, lora_A, lora_B, bias, seed, adapters, scale, dropout_p, need_B, impl, config, base, arm)
        need_weight = need_x or problem.is_stack(weight)  # a stack: by it the arm is chosen
        ctx.make = make if need_weight else None
        ctx.save_for_backward(
            x if need_A else None,
            weight if need_weight and make is None else None,
            lora_A if need_x else None,
            lora_B if need_x or need_A else None,
            u if need_B else None,
            seed if need_x or need_A else None,
            scales,
            ranks,
            *plan,
        )
        ctx.constants = (scale, dropout_p, (need_x, need_A, need_B, need_bias), lora_A.dtype, impl, config)
        ctx.geometry, ctx.inputs = geometry, 16 + len(plan)
        return y

    @staticmethod
    @refused_twice
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, u, seed, scales, ranks, *plan = ctx.saved_tensors
        adapters = Adapters.from_flat(scales, ranks, plan, ctx.geometry)
        need_x, need_A, need_B, need_bias = ctx.constants[2]
        if ctx.make is not None:
            weight = ctx.make().to(dy.dtype)
        dx, da, db, dbias = ops.backward(dy, x, weight, lora_A, lora_B, u, seed, adapters, *ctx.constants)
        return (
            dx if need_x else None,
            None,
            da if need_A else None,
            db if need_B else None,
            dbias if need_bias else None,
            dy if ctx.need_base else None,
            *(None,) * (ctx.inputs - 6),
        )


def recorded(trained: bool) -> bool:
    """Whether autograd is to see a call: for a backward pass, or to refuse a forward-mode derivative, which the arms would pass by."""
    return (trained and torch.is_grad_enabled()) or (forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled())


def refuse_transforms(*operands: torch.Tensor | None) -> None:
    """torch's own error names its inside; and where a compiler sees the operators, it takes a derivative of them for zeros."""
    if torch._C._are_functorch_transforms_active():
        if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in operands):
            raise UnsupportedError("torch.func: wanted no transform (grad, jacrev, vmap, ...) of this call; impl='reference' takes them")


def _forward_kernel(
    x, weight, lora_A, lora_B, bias, seed, scales, ranks, plan, geometry, scale, dropout_p, save_u, impl, config, base=None
):  # fmt: skip
    """The operator ``lora_kernels::forward``: the arm, or where gradients are wanted the Function, whose u nobody else reads.

    So an exported program calls it, without the Function around. torch warns nevertheless: to be told of the gradients it would have to
    call Python once more at every call.
    """
    if recorded(any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias, base))):
        constants = (scale, dropout_p, impl, config, None, None, tuple(geometry), scales, ranks)
        y = LoRALinearFunction.apply(x, weight, lora_A, lora_B, bias, base, seed, *constants, *plan)
        return y, x.new_empty((math.prod(y.shape[:-1]), lora_A.shape[-2]) if save_u else (0,))
    adapters = Adapters.from_flat(scales, ranks, plan, geometry)
    y, u = ops.forward_by_arm(x, weight, lora_A, lora_B, bias, seed, adapters, scale, dropout_p, save_u, impl, config, base)
    return y, u if save_u else x.new_empty(0)


for _key in ops.KEYS:
    ops.library.impl("forward", _forward_kernel, _key)


def lora_linear(
    x,
    weight,
    lora_A,
    lora_B,
    bias=None,
    *,
    base=None,
    scale=1.0,
    dropout_p=0.0,
    training=False,
    seed=None,
    segments=None,
    ranks=None,
    widths=None,
    lora_bias=None,
    config=None,
    impl="auto",
):
    """Linear layer with a low-rank update: ``y = x W^T + scale * (drop(x) A^T) B^T + bias``.

    Args:
        x: Tokens ``[..., K]``, float16, bfloat16, float32 (every arm) or float64 (reference and torch).
        weight: The frozen base ``[N, K]``, as nn.Linear stores it, x's dtype, any strides; None with ``base``. Or with segments a stack
            ``[E, N, K]``, the experts of a mixture: each token's adapter is that of its expert, and what has none is 0.
            With `Segments.from_top_k` each token has k experts, and y is ``[..., k, N]``. Or a function that makes the weight, of
            4 bits, say: it is called, and for x's gradient once more, with the same result; the kernels and the chain keep none.
        lora_A: ``[r, K]``, or with segments a stack ``[E, r, K]``, r from 1 to 512, any strides, x's dtype or float32 (rounded to
            x's dtype tile by tile, as autocast would).
        lora_B: ``[N, r]`` or ``[E, N, r]``, lora_A's dtype.
        bias: ``[N]``, x's dtype, any stride, or None; beside a stack of weights ``[E, N]``, frozen; added before the result is rounded.
        base: ``[..., N]``, x's dtype: what another layer, a quantised one, say, makes of x. It takes the place of ``x W^T + bias``,
            whose weight and bias are then None, and is not written to. None: the product is made here.
        scale: ``lora_alpha / r`` (or ``/ sqrt(r)`` for rsLoRA); applied in float32, never folded into a 16-bit tensor. Or a float32
            tensor on x's device, one element or with segments ``[E]``, which may change between calls and CUDA-graph replays.
        dropout_p: Dropout on the adapter's input, in [0, 1), rounded to a multiple of 2^-16; acts when ``training``.
        training: Whether dropout acts.
        seed: The dropout mask's seed: int64 tensor with one element on x's device, an int, or None to draw one from torch's
            generator (so torch.manual_seed and checkpoint recomputation govern it).
        segments: A `Segments`: each token's adapter in the stack, -1 for the base alone. None: one adapter for all.
        ranks: int32 ``[E]``, each adapter's own rank, 0 to r; the stack beyond it has no effect, its gradient is 0. None: all have r.
        widths: The outputs of each of L layers that ``weight`` packs, as serving engines keep q, k and v: lora_A is ``[L r, K]``, or
            ``[E, L r, K]``, each layer's A in turn, ``ranks`` those of each layer, and a layer's outputs take its own r columns of u.
            None: one layer. Not beside a stack of weights.
        lora_bias: ``[N]``, lora_A's dtype, or None: adds ``scale * lora_bias``, PEFT's bias on B. Not with segments or base.
        config: A ``lora_kernels.tuning.Config`` for the kernels, which it names with impl "auto", too; None: they choose their own.
        impl: "auto" (the fastest that can run), "triton" (the kernels), "torch" (library calls), "reference" (the textbook
            formula); a named one never falls back. `explain` tells what "auto" takes.
    Returns:
        ``[..., N]`` in x's dtype, contiguous; accumulated in float32 and rounded once, besides ``u = scale * drop(x) A^T``.
        Under torch.autocast, x, weight and bias are cast as F.linear casts them; with base, x to base's dtype.
    Gradients:
        For x, lora_A, lora_B, bias, base and lora_bias, in each one's dtype; not for weight. Not differentiable twice, nor forward, nor
        by torch.func, except "reference".
    Raises:
        ValueError: shapes, devices or values disagree. TypeError: dtypes or types. UnsupportedError: legal, but not here.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; gradients in docs/math.md.
    """
    make = None
    if callable(weight):
        make, weight = weight, weight()
    x, weight, bias = autocast(x, weight, bias, base)
    call = arm = None
    key = config.key() if isinstance(config, Config) else ""
    if lora_bias is None:
        call = calls.look(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, training, seed, segments, ranks, widths, config, impl)
        arm = calls.arm(call)
    if arm is None:
        check(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, config, impl, widths)
    if lora_bias is not None:
        bias = with_lora_bias(bias, lora_bias, scale, weight, lora_A, segments)
    p = float(dropout_p) if training else 0.0
    if impl == "reference":
        return reference.lora_linear(
            x, weight, lora_A, lora_B, bias,
            base=base, scale=scale, dropout_p=p, training=training, seed=seed, segments=segments, ranks=ranks, widths=widths,
        )  # fmt: skip
    refuse_transforms(x, weight, lora_A, lora_B, bias, base)
    drawn = reference.as_seed(seed, x.device) if p else None
    adapters, factor = carried(segments, scale, ranks, widths)
    if arm is None:
        arm = calls.remember(call, x, weight, lora_A, lora_B, bias, base, adapters, p, impl, key)
    added = bias if base is None else base
    trained = x.requires_grad or lora_A.requires_grad or lora_B.requires_grad or (added is not None and added.requires_grad)
    if recorded(trained):
        scales, _, plan, geometry = adapters.flat()
        drawn = ops.mask(drawn, x, adapters, p, impl, key)
        return LoRALinearFunction.apply(
            x, weight, lora_A, lora_B, bias, base, drawn, float(factor), p, impl, key, arm, make, geometry, scales, ranks, *plan
        )
    return ops.forward(x, weight, lora_A, lora_B, bias, drawn, adapters, float(factor), p, False, impl, key, base, arm)[0]


def with_lora_bias(bias, lora_bias, scale, weight, lora_A, segments):
    """``bias + scale lora_bias`` in weight's dtype, from a float32 sum: the adapter's bias costs what a bias costs."""
    check_lora_bias(lora_bias, weight, lora_A, segments)
    wide = scaled_bias(lora_bias, scale)
    return (wide if bias is None else wide + bias).to(weight.dtype)


def scaled_bias(lora_bias: torch.Tensor, scale) -> torch.Tensor:
    """``scale lora_bias`` in float32 (float64 of float64)."""
    return lora_bias.to(torch.promote_types(lora_bias.dtype, torch.float32)) * scale


def check_lora_bias(lora_bias, weight, lora_A, segments) -> None:
    if weight is None:
        raise UnsupportedError("lora_bias: wanted None with base, to which it can be added, got a value")
    if segments is not None:
        raise UnsupportedError("lora_bias: wanted None with segments, whose tokens have adapters of their own, got a value")
    checks.check_vector("lora_bias", lora_bias, weight, lora_A)


def carried(segments, scale, ranks, widths=None) -> tuple[Adapters, float]:
    """(`Adapters`, the scale that is a number)."""
    widths = () if widths is None or len(widths) == 1 else tuple(widths)
    if isinstance(scale, torch.Tensor):
        return Adapters(segments, scale if scale.dim() < 2 else scale.view(1), ranks, widths), 1.0
    return (ONE if segments is None and not widths else Adapters(segments, None, ranks, widths)), scale


def explain(
    x, weight, lora_A, lora_B, bias=None, *,
    base=None, scale=1.0, dropout_p=0.0, training=False, seed=None, segments=None, ranks=None, widths=None,
    lora_bias=None, config=None, impl="auto",
):  # fmt: skip
    """Which arm `lora_linear` takes for these arguments, and why: the same arguments, nothing computed.

    Returns:
        `Choice`: ``arm``, ``config`` (of the forward kernels) and ``why``, a sentence for each arm that was weighed; ``print`` shows all.
    Raises:
        The errors of `lora_linear`.
    """
    weight = weight() if callable(weight) else weight
    x, weight, bias, key = prepare(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, config, impl, widths)
    if lora_bias is not None:
        check_lora_bias(lora_bias, weight, lora_A, segments)
    if impl == "reference":
        return dispatch.Choice("reference", None, {"reference": "named"})
    asked = problem.describe(
        x, weight, lora_A, lora_B, dropout=bool(training and dropout_p), adapters=carried(segments, scale, ranks, widths)[0]
    )
    return dispatch.choose(asked, x.device, impl, key)


def prepare(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, config, impl, widths=None):
    """x, weight and bias as autocast wants them, and the config's key, all checked."""
    x, weight, bias = autocast(x, weight, bias, base)
    check(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, config, impl, widths)
    return x, weight, bias, "" if config is None else config.key()


def check(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, config, impl, widths) -> None:
    """Refuse what `lora_linear` cannot compute, by `checks.check_arguments` and for what it says of the arm."""
    checks.check_arguments(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, widths)
    if impl not in IMPLS:
        raise ValueError(f"impl: wanted one of {', '.join(IMPLS)}, got {impl!r}")
    if config is None:
        return
    if not isinstance(config, Config):
        raise TypeError(f"config: wanted a lora_kernels.tuning.Config or None, got {type(config).__name__}")
    if impl not in ("auto", "triton"):
        raise ValueError(f"config: wanted None with impl={impl!r}, which has no kernels to configure")


def autocast(x, weight, bias, base=None):
    """x, weight and bias as torch.autocast hands them to F.linear: cast to its dtype, or to base's, where it is enabled."""
    if not isinstance(x, torch.Tensor) or not problem.autocasts(x.device):
        return x, weight, bias
    dtype = base.dtype if isinstance(base, torch.Tensor) else torch.get_autocast_dtype(x.device.type)

    def cast(t):
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype not in (dtype, torch.float64):
            return t.to(dtype)
        return t

    return cast(x), cast(weight), cast(bias)

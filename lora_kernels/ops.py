"""The registered operators ``lora_kernels::forward`` and ``lora_kernels::backward``, and the choice of the arm.

One registered boundary per pass: torch.compile, export, fake tensors and FLOP counters see these two, and which arm runs
inside (the kernels or the chain of library calls) is resolved there, from the sizes of the call, so that no size becomes
a guard of the caller's graph. Where nobody looks on, the arm runs without them. The forward operator's kernel
is beside the Function that it may need (`autograd`); a third, the plan of `segments`, has its GPU kernel here.
"""

from __future__ import annotations

import math

import torch
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from . import dispatch, philox
from .operands import as_matrix, even, lead, like_tokens, tokens
from .problem import PLAIN, forward_flops
from .segments import CPU, Adapters, by_library

KEYS = ("CPU", "CUDA")  # whose tensors the operators take
library = torch.library.Library("lora_kernels", "DEF")
library.define(
    "forward(Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, Tensor? scales, Tensor? ranks, "
    "Tensor[] plan, int[] geometry, float scale, float dropout_p, bool save_u, str impl, str config, Tensor? base=None) "
    "-> (Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)
library.define(
    "backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? u, Tensor? seed, "
    "Tensor? scales, Tensor? ranks, Tensor[] plan, int[] geometry, float scale, float dropout_p, "
    "bool need_dx, bool need_da, bool need_db, bool need_dbias, ScalarType adapter_dtype, str impl, str config) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)
forward_op = torch.ops.lora_kernels.forward.default
backward_op = torch.ops.lora_kernels.backward.default


def forward(x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale, dropout_p, save_u, impl, config, base=None, arm=None):
    """``y [..., N]`` and ``u [M, r]``: the forward operator, or the arm itself where nobody is to see an operator; ``arm`` if known."""
    if arm is not None:
        run, chosen = arm
        return run(x, weight, lora_A, lora_B, bias, seed, adapters, scale, dropout_p, save_u, chosen, base)
    if _unseen(impl, config, x, weight, lora_A, lora_B, bias, base):
        return forward_by_arm(x, weight, lora_A, lora_B, bias, seed, adapters, scale, dropout_p, save_u, impl, config, base)
    return forward_op(x, weight, lora_A, lora_B, bias, seed, *adapters.flat(), scale, dropout_p, save_u, impl, config, base)


def backward(dy, x, weight, lora_A, lora_B, u, seed, adapters: Adapters, scale, dropout_p, needs, adapter_dtype, impl, config):
    """``dX, dA, dB, dbias``, what is not needed undefined: the backward operator, or the arm itself, likewise."""
    operands = (dy, x, weight, lora_A, lora_B, u)
    if _unseen(impl, config, *operands):
        return backward_by_arm(*operands, seed, adapters, scale, dropout_p, needs, adapter_dtype, impl, config)
    return backward_op(*operands, seed, *adapters.flat(), scale, dropout_p, *needs, adapter_dtype, impl, config)


def _unseen(impl: str, config: str, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the arm may run without the operator, which costs some 20 us of host time (docs/measured.md).

    Not where a compiler or a mode (fake tensors, FLOP counters, tracers) looks on, or a class of tensors has its own say.
    """
    # `watched` first: a compiler that traces what follows warns of its caches
    return not watched() and (dispatch.plainly_chain(x.device, impl, config) or plain(x, *others))


def watched() -> bool:
    """Whether a compiler, torch.jit.trace, a mode or one of torch.func's transforms looks on."""
    if is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():  # torch has no public, quick names
        return True
    return torch._C._are_functorch_transforms_active()  # whose tensors are of torch's own class, without an address


def plain(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether these are tensors of torch's own classes, where an arm runs: not meta tensors, nor devices that the operators do not know.

    And none that torch negates as it is read (``is_neg``), which no kernel would see: before an operator torch writes it out.
    """
    if not (x.is_cuda or x.device == CPU):
        return False
    for t in (x, *others):
        if t is not None and (type(t) not in PLAIN or t.is_neg()):
            return False
    return True


def mask(seed, x, adapters: Adapters, dropout_p, impl, config):
    """What two passes know their dropout mask by: its seed; where the chain runs on a CPU, its bits, for it is slow to make there."""
    if seed is None or watched() or not (x.device == CPU and dispatch.plainly_chain(x.device, impl, config) and plain(x) and x.numel()):
        return seed
    return philox.packed_mask(seed, tokens(x) * adapters.top_k, x.shape[-1], dropout_p)


def forward_by_arm(x, weight, lora_A, lora_B, bias, seed, adapters, scale, dropout_p, save_u, impl, config, base):
    N = lora_B.shape[-2]
    if x.numel() == 0 or N == 0:
        y, u = _empty_forward(as_matrix(x), N, lora_A, bias, as_matrix(base), adapters)
        return like_tokens(y, x, adapters.top_k), u
    its, its_base = even(x), even(base)
    run, chosen = dispatch.forward_arm(its, weight, lora_A, lora_B, adapters, dropout_p, impl, config)
    y, u = run(its, weight, lora_A, lora_B, bias, seed, adapters, scale, dropout_p, save_u, chosen, its_base)
    return y if its is x else like_tokens(y, x, adapters.top_k), u


def _empty_forward(x, N, lora_A, bias, base, adapters):
    """No tokens, no features in or none out: the bias alone, as F.linear has it, or the base."""
    y = x.new_zeros(x.shape[0] * adapters.top_k, N)
    if bias is not None and bias.dim() == 2:
        ids = adapters.segments.ids.long()[:, None]
        bias = torch.where(ids < 0, 0, bias[ids[:, 0].clamp(min=0)])
    for term in (bias, base):
        if term is not None:
            y += term
    return y, x.new_zeros(y.shape[0], lora_A.shape[-2])


def backward_by_arm(dy, x, weight, lora_A, lora_B, u, seed, adapters, scale, dropout_p, needs, adapter_dtype, impl, config):
    need_dx, need_da, need_db, need_dbias = needs
    dx = da = db = None
    if dy.numel() == 0 or (x is not None and x.numel() == 0):
        stack = [] if adapters.segments is None else [adapters.number]
        dx = dy.new_zeros(*dy.shape[:-1], lora_A.shape[-1]) if need_dx else None
        da = dy.new_zeros(*stack, lora_B.shape[-1] * adapters.layers, x.shape[-1], dtype=adapter_dtype) if need_da else None
        db = dy.new_zeros(*stack, dy.shape[-1], u.shape[1] // adapters.layers, dtype=adapter_dtype) if need_db else None
    elif need_dx or need_da or need_db:
        its, its_x = even(dy), even(x)
        run, chosen = dispatch.backward_arm(its, its_x, weight, lora_A, lora_B, u, adapters, dropout_p, impl, config)
        dx, da, db = run(its, its_x, weight, lora_A, lora_B, u, seed, adapters, scale, dropout_p, needs[:3], adapter_dtype, chosen)
        dx = dx if its is dy or dx is None else like_tokens(dx, dy)
    if need_dx and adapters.top_k > 1:  # a token's experts, in their order, in float32
        dx = dx.sum(-2)
    return dx, da, db, as_matrix(dy).sum(0) if need_dbias else None


def _backward_kernel(
    dy, x, weight, lora_A, lora_B, u, seed, scales, ranks, plan, geometry, scale, dropout_p,
    need_dx, need_da, need_db, need_dbias, adapter_dtype, impl, config,
):  # fmt: skip
    adapters, needs = Adapters.from_flat(scales, ranks, plan, geometry), (need_dx, need_da, need_db, need_dbias)
    grads = backward_by_arm(dy, x, weight, lora_A, lora_B, u, seed, adapters, scale, dropout_p, needs, adapter_dtype, impl, config)
    dtypes = (dy.dtype, adapter_dtype, adapter_dtype, dy.dtype)
    return tuple(dy.new_empty(0, dtype=dtype) if grad is None else grad for grad, dtype in zip(grads, dtypes, strict=True))


for _key in KEYS:
    library.impl("backward", _backward_kernel, _key)


def _plan_on_a_gpu(adapter_ids, num_adapters, row_block, gather_block):
    if dispatch.triton_missing() is None:
        from . import launch_plan

        if launch_plan.plans(adapter_ids, num_adapters):
            return launch_plan.plan(adapter_ids, num_adapters, row_block, gather_block)
    return by_library(adapter_ids, num_adapters, row_block, gather_block)


library.impl("plan", _plan_on_a_gpu, "CUDA")


def _top_k(geometry: list[int]) -> int:
    return geometry[3] if geometry else 1


def _layers(geometry: list[int]) -> int:
    return len(geometry[4:]) or 1


@torch.library.register_fake("lora_kernels::forward")
def _forward_fake(
    x, weight, lora_A, lora_B, bias, seed, scales, ranks, plan, geometry, scale, dropout_p, save_u, impl, config, base=None
):  # fmt: skip
    sizes = lead(x.shape, _top_k(geometry))
    u = x.new_empty(math.prod(sizes), lora_A.shape[-2]) if save_u else x.new_empty(0)
    return x.new_empty(*sizes, lora_B.shape[-2]), u


@torch.library.register_fake("lora_kernels::backward")
def _backward_fake(
    dy, x, weight, lora_A, lora_B, u, seed, scales, ranks, plan, geometry, scale, dropout_p,
    need_dx, need_da, need_db, need_dbias, adapter_dtype, impl, config,
):  # fmt: skip
    stack, sizes, layers = geometry[:1] if plan else [], dy.shape[:-2] if _top_k(geometry) > 1 else dy.shape[:-1], _layers(geometry)
    return (
        dy.new_empty(*sizes, lora_A.shape[-1]) if need_dx else dy.new_empty(0),
        dy.new_empty(*((*stack, lora_B.shape[-1] * layers, x.shape[-1]) if need_da else (0,)), dtype=adapter_dtype),
        dy.new_empty(*((*stack, dy.shape[-1], u.shape[1] // layers) if need_db else (0,)), dtype=adapter_dtype),
        dy.new_empty(dy.shape[-1] if need_dbias else 0),
    )


@register_flop_formula(torch.ops.lora_kernels.forward)
def _forward_flops(x, weight, lora_A, lora_B, bias, seed, scales, ranks, plan, geometry, *args, **kwargs) -> int:
    tokens, layers = math.prod(x[:-1]) * _top_k(geometry), _layers(geometry)
    return forward_flops(tokens, lora_B[-2], x[-1], lora_A[-2], base=weight is None, layers=layers)


@register_flop_formula(torch.ops.lora_kernels.backward)
def _backward_flops(
    dy, x, weight, lora_A, lora_B, u, seed, scales, ranks, plan, geometry, scale, dropout_p, need_dx, need_da, need_db, *args, **kwargs
) -> int:
    """Of what these gradients need; with segments every token is taken to have an adapter of the full rank."""
    M, N = math.prod(dy[:-1]), dy[-1]
    total = 0
    if need_dx or need_da:
        total += M * N * lora_B[-1]
    if need_dx:
        total += M * lora_A[-1] * ((0 if weight is None else N) + lora_A[-2])
    if need_da:
        total += M * x[-1] * lora_B[-1] * _layers(geometry)
    if need_db:
        total += M * N * u[1] // _layers(geometry)
    return 2 * total

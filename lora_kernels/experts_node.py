"""The second half of a mixture's experts as one node of the graph, which keeps what comes in and little else.

    z[t] = sum over j of g[t, j] y[t, j];    y = W[e] a + scale B[e] A[e] (D a) + bias[e],  a = gate(h),  e = top_k[t, j]

torch keeps h, what the gate makes on its way, a, and for the gradient of g the largest of all, y. Here h is kept: a is made of it again,
and y, which is linear in a but for its bias, is not needed:

    dg[t, j] = dz[t] . y[t, j] = a . da' + dz[t] . bias[e];    da' = W[e]^T dz[t] + scale D (A[e]^T B[e]^T dz[t]),  da = g da'

So the backward pass of the stack is of dz, not of g dz; g comes to its other factor: dA = dS'^T D (g a), dB = dz^T (g u).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import ops, reference
from .autograd import carried, lora_linear, prepare, recorded, refused_twice
from .chain import grad_mm
from .dispatch import without_autocast
from .gates import Gate, on_a_gpu
from .problem import autocasts
from .segments import Adapters, Segments


class Stack(NamedTuple):
    """A stack of weights ``[E, N, K]`` and what acts on it, each as in `lora_linear`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float | torch.Tensor
    p: float
    training: bool
    ranks: torch.Tensor | None

    def product(self, x: torch.Tensor, plan: Segments) -> torch.Tensor:
        """``[..., N]``, a row for each of the plan's, 0 for those without an expert."""
        weight, bias, A, B, scale, p, training, ranks = self
        with without_autocast(x.device):  # as torch's grouped products, which know no autocast
            return lora_linear(
                x.to(weight.dtype), weight, A, B, bias, scale=scale, segments=plan, ranks=ranks, dropout_p=p, training=training
            )  # fmt: skip


class ExpertsFunction(torch.autograd.Function):
    """``z [T, N]``, of ``dtype``, of h ``[T k, F]``, with gradients for h, weights ``[T, k]``, lora_A and lora_B.

    a: What the gate makes of h, where that is known.
    """

    @staticmethod
    def forward(ctx, h, weights, lora_A, lora_B, gate: Gate, a, stack, bias, seed, scale, p, dtype, geometry, scales, ranks, *plan):
        adapters = Adapters.from_flat(scales, ranks, plan, geometry)
        need_B, a = ctx.needs_input_grad[3], gate(h) if a is None else a
        ctx.autocast = torch.get_autocast_dtype(h.device.type) if autocasts(h.device) else None
        with without_autocast(h.device):
            y, u = ops.forward(a.to(stack.dtype), stack, lora_A, lora_B, bias, seed, adapters, scale, p, need_B, "auto", "")
        del a
        ctx.save_for_backward(h, weights, lora_A, lora_B, stack, bias, u if need_B else None, seed, scales, ranks, *plan)
        ctx.constants = (gate, scale, p, geometry)
        return weighted_sum(y, weights, dtype)

    @staticmethod
    @refused_twice
    def backward(ctx, dz):
        h, weights, lora_A, lora_B, stack, bias, u, seed, scales, ranks, *plan = ctx.saved_tensors
        gate, scale, p, geometry = ctx.constants
        adapters = Adapters.from_flat(scales, ranks, plan, geometry)
        need_h, need_weights, need_A, need_B = ctx.needs_input_grad[:4]
        with torch.autocast(h.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None):
            x, gradients = gate.again((h,), need_A, weights.contiguous())
        with without_autocast(h.device):
            x = x.to(stack.dtype) if need_A else None
            u = (u * weights.reshape(-1, 1)).to(u.dtype) if need_B else None
            dy = dz.to(stack.dtype)
            if ops.watched():  # an operator's dY has a row for each of the plan's
                dy = dy.repeat_interleave(weights.shape[1], 0)
            needs = (need_h or need_weights, need_A, need_B, False)
            da, dA, dB, _ = ops.backward(dy, x, stack, lora_A, lora_B, u, seed, adapters, scale, p, needs, lora_A.dtype, "auto", "")
            del x, u, dy
            dh = dweights = None
            if need_h or need_weights:
                (dh,), dots = gradients(da.reshape(h.shape[0], -1))
                dweights = _with_bias(dots, dz, bias, adapters.segments.ids).to(weights.dtype).view(weights.shape)
        return dh, dweights, dA if need_A else None, dB if need_B else None, *(None,) * (11 + len(plan))


def weighted_sum(y: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each token's rows of y ``[T k, N]`` or ``[T, k, N]``, times its weights ``[T, k]``, added in their order: ``[T, N]`` of ``dtype``."""
    if not torch.is_grad_enabled() and on_a_gpu(y) and not ops.watched() and ops.plain(y, weights) and y.numel():
        from . import launch_gate

        return launch_gate.weighted_sum(y.contiguous(), weights.contiguous(), dtype)
    return (y.reshape(*weights.shape, y.shape[-1]) * weights[..., None]).sum(1).to(dtype)


def _with_bias(dots: torch.Tensor, dz: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """``dots [T k]`` and ``dz . bias[e]``, 0 for a row without an expert."""
    if bias is None:
        return dots
    of_all = grad_mm(dz.to(bias.dtype), bias.t(), dots.dtype)  # [T, E]
    ids = ids.view(dz.shape[0], -1).long()
    return dots + torch.where(ids < 0, 0, of_all.gather(1, ids.clamp(min=0))).reshape(-1)


def second_half(h, weights: torch.Tensor, gate: Gate, stack: Stack, plan: Segments, dtype: torch.dtype) -> torch.Tensor:
    """``z [T, N]`` of ``dtype``, as one node where that keeps less and is the same."""
    if not _as_one(h, weights, stack):
        return weighted_sum(stack.product(gate.function(h), plan), weights, dtype)
    a = None
    if not gate.kernel:
        before = h._version, _drawn(h.device)
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):  # nobody is to pack what is let go at once
            a = gate.function(h)
        if (h._version, _drawn(h.device)) != before or not _of_h_alone(a, h):
            return weighted_sum(stack.product(a, plan), weights, dtype)
        a = a.detach()
    weight, bias, A, B, scale, p, training, ranks = stack
    like = h.new_empty((), dtype=weight.dtype).expand(h.shape[0], weight.shape[2])  # what the gate makes looks so
    with without_autocast(h.device):
        prepare(like, weight, A, B, bias, None, scale, p, None, plan, ranks, None, "auto")
    adapters, factor = carried(plan, scale, ranks)
    p = float(p) if training else 0.0
    seed = ops.mask(reference.as_seed(None, h.device), like, adapters, p, "auto", "") if p else None
    scales, _, flat, geometry = adapters.flat()
    return ExpertsFunction.apply(h, weights, A, B, gate, a, weight, bias, seed, float(factor), p, dtype, geometry, scales, ranks, *flat)


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


def _as_one(h: torch.Tensor, weights: torch.Tensor, stack: Stack) -> bool:
    """Whether the node keeps less: not of an h without a gradient. Not in float16, whose range is not that of dz without the weights."""
    others = [t for t in (weights, stack.weight, stack.lora_A, stack.lora_B, stack.bias) if t is not None]
    if not h.requires_grad or not recorded(True) or ops.watched() or not ops.plain(h, *others):
        return False
    return stack.weight.dtype is not torch.float16 and h.numel() > 0 and stack.weight.numel() > 0


def _drawn(device: torch.device):
    """What changes where random numbers are drawn: what draws would be made again of others."""
    if device.type == "cpu":
        return torch.default_generator.get_state().numpy().tobytes()
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.default_generators[device.index].get_offset()


def _of_h_alone(a: torch.Tensor, h: torch.Tensor) -> bool:
    """Whether gradients of a go to h, and to nothing besides."""
    end, seen = torch.autograd.graph.get_gradient_edge(h).node, set()
    ahead = [a.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is not end and hasattr(node, "variable"):
            return False
        ahead += () if node is end else (following for following, _ in node.next_functions)
    return end in seen

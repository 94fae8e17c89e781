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
from .problem import UnsupportedError, autocasts
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
    """``z [T, N]``, of ``dtype``, of h ``[T k, F]``, with gradients for h, weights ``[T, k]``, lora_A and lora_B."""

    @staticmethod
    def forward(ctx, h, weights, lora_A, lora_B, gate: Gate, stack, bias, seed, scale, p, dtype, geometry, scales, ranks, *plan):
        adapters = Adapters.from_flat(scales, ranks, plan, geometry)
        need_B, before = ctx.needs_input_grad[3], h._version
        a = gate(h)
        if h._version != before:
            raise UnsupportedError("gate: wanted one that leaves its argument as it is, got one that writes to it")
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
            dy = dz.to(stack.dtype).repeat_interleave(weights.shape[1], 0)
            needs = (need_h or need_weights, need_A, need_B, False)
            da, dA, dB, _ = ops.backward(dy, x, stack, lora_A, lora_B, u, seed, adapters, scale, p, needs, lora_A.dtype, "auto", "")
            del x, u, dy
            dh = dweights = None
            if need_h or need_weights:
                (dh,), dots = gradients(da)
                dweights = _with_bias(dots, dz, bias, adapters.segments.ids).to(weights.dtype).view(weights.shape)
        return dh, dweights, dA if need_A else None, dB if need_B else None, *(None,) * (10 + len(plan))


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


def second_half(h, weights: torch.Tensor, gate: Gate, stack: Stack, plan: Segments, dtype: torch.dtype) -> torch.Tensor | None:
    """``z [T, N]`` of ``dtype``, or None where nothing is kept, or somebody looks on who is to see single operators."""
    weight, bias, A, B, scale, p, training, ranks = stack
    others = [t for t in (weights, weight, A, B, bias) if t is not None]
    trained = any(t.requires_grad for t in (h, weights, A, B))
    if not recorded(trained) or ops.watched() or not ops.plain(h, *others) or not h.numel() or not weight.numel():
        return None
    like = h.new_empty((), dtype=weight.dtype).expand(h.shape[0], weight.shape[2])  # what the gate makes looks so
    with without_autocast(h.device):
        prepare(like, weight, A, B, bias, None, scale, p, None, plan, ranks, None, "auto")
    adapters, factor = carried(plan, scale, ranks)
    p = float(p) if training else 0.0
    seed = ops.mask(reference.as_seed(None, h.device), like, adapters, p, "auto", "") if p else None
    scales, _, flat, geometry = adapters.flat()
    return ExpertsFunction.apply(h, weights, A, B, gate, weight, bias, seed, float(factor), p, dtype, geometry, scales, ranks, *flat)

"""The definition, in plain torch: ``y = x W^T + scale (drop(x) A^T) B^T + bias``.

Every kernel and every other implementation is tested against this file, in float64 from the same inputs. It is
differentiated by torch's own autograd, so its gradients are independent of the handwritten ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import philox


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """``x * keep / (1 - p)`` with the mask of `philox.keep_mask`; tokens are numbered in row-major order of ``x[..., :]``."""
    keep = philox.keep_mask(seed, x.numel() // max(x.shape[-1], 1), x.shape[-1], p)
    return torch.where(keep.reshape(x.shape), x * philox.inv_keep(p), x.new_zeros(()))


def lora_linear(
    x, weight, lora_A, lora_B, bias=None, *,
    base=None, scale=1.0, dropout_p=0.0, training=False, seed=None, segments=None, ranks=None, widths=None,
):  # fmt: skip
    """Linear layer with a low-rank update, as the textbook has it: each product rounded to the tensors' dtype.

    Args:
        x: Tokens ``[..., K]``; any floating dtype, float64 included.
        weight: ``[N, K]`` as nn.Linear stores it, x's dtype; or with segments a stack ``[E, N, K]``, and 0 for tokens without an adapter.
        lora_A, lora_B: ``[r, K]`` and ``[N, r]`` as PEFT stores them, or stacks ``[E, r, K]`` and ``[E, N, r]``; cast to x's dtype.
        bias: ``[N]``, ``[E, N]`` beside a stack, or None.
        base: ``[..., N]``, what ``x W^T + bias`` is, with weight and bias None; or None.
        scale: ``lora_alpha / r``, a float, or float32 with one for each adapter.
        dropout_p: Probability of the adapter branch's dropout, in [0, 1); it acts when ``training``.
        seed: int64 tensor with one element, or int; None draws one from torch's generator.
        segments: A `Segments`, each token's adapter in the stack; None for one adapter.
        ranks: ints ``[E]``, each adapter's own rank; what the stack holds beyond it is not read.
        widths: The outputs of each layer that ``weight`` packs; A then has r rows for each, of which that layer's outputs are. Or None.
    Returns:
        ``[..., N]`` in x's dtype; ``[..., k, N]`` under a plan of k tokens a row of x.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; dropout on the adapter's input as in PEFT.
    """
    k = 1 if segments is None else segments.top_k
    x = x.repeat_interleave(k, 0 if x.dim() == 1 else -2) if k > 1 else x
    adapter_in = x
    if training and dropout_p > 0.0:
        adapter_in = dropout(x, dropout_p, as_seed(seed, x.device))
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if segments is None:
        low_rank = _low_rank(adapter_in, lora_A, lora_B, widths) * (scale.reshape(()) if isinstance(scale, torch.Tensor) else scale)
    else:
        low_rank = _by_adapter(adapter_in, lora_A, lora_B, scale, segments.ids, ranks, widths)
    if base is None:
        base = F.linear(x, weight, bias) if weight.dim() == 2 else _by_expert(x, weight, bias, segments.ids)
    y = base + low_rank
    return y.unflatten(-2, (-1, k)) if k > 1 else y


def _low_rank(x, lora_A, lora_B, widths, rank=None):
    """``(x A^T) B^T`` within a rank, or such products side by side, one for each packed layer."""
    layers = len(widths) if widths else 1
    each = zip(lora_A.chunk(layers), lora_B.split(list(widths)) if widths else [lora_B], strict=True)
    return torch.cat([F.linear(F.linear(x, A[:rank]), B[:, :rank]) for A, B in each], -1)


def _by_adapter(x, lora_A, lora_B, scale, ids, ranks, widths):
    """Each token through its own adapter, and zero for those without one."""
    rows = x.reshape(-1, x.shape[-1])
    nothing = lora_A[:0].sum() + lora_B[:0].sum()  # zero, and the stacks are in the graph even where no token has an adapter
    low_rank = (rows[:0].sum() + nothing).expand(rows.shape[0], lora_B.shape[1])
    for e in ids.unique().tolist():
        if e < 0:
            continue
        at = (ids == e).nonzero().squeeze(1)
        r = None if ranks is None else int(ranks[e])
        factor = scale[e] if isinstance(scale, torch.Tensor) else scale
        low_rank = low_rank.index_put((at,), _low_rank(rows[at], lora_A[e], lora_B[e], widths, r) * factor)
    return low_rank.reshape(*x.shape[:-1], lora_B.shape[1])


def _by_expert(x, weight, bias, ids):
    """Each token through its own weight, and zero for those without one."""
    rows = x.reshape(-1, x.shape[-1])
    base = rows[:0].sum().expand(rows.shape[0], weight.shape[1])
    for e in ids.unique().tolist():
        if e >= 0:
            at = (ids == e).nonzero().squeeze(1)
            base = base.index_put((at,), F.linear(rows[at], weight[e], None if bias is None else bias[e]))
    return base.reshape(*x.shape[:-1], weight.shape[1])


def as_seed(seed, device: torch.device) -> torch.Tensor:
    """``seed`` (None, int or tensor) as an int64 tensor of one element on ``device``."""
    if seed is None:
        return philox.draw_seed(device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)

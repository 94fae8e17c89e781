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


def lora_linear(x, weight, lora_A, lora_B, bias=None, *, scale=1.0, dropout_p=0.0, training=False, seed=None, segments=None):
    """Linear layer with a low-rank update, as the textbook has it: each product rounded to the tensors' dtype.

    Args:
        x: Tokens ``[..., K]``; any floating dtype, float64 included.
        weight: ``[N, K]`` as nn.Linear stores it, x's dtype.
        lora_A, lora_B: ``[r, K]`` and ``[N, r]`` as PEFT stores them; cast to x's dtype.
        bias: ``[N]`` or None.
        scale: ``lora_alpha / r``, a float.
        dropout_p: Probability of the adapter branch's dropout, in [0, 1); it acts when ``training``.
        seed: int64 tensor with one element, or int; None draws one from torch's generator.
        segments: Refused: one adapter only.
    Returns:
        ``[..., N]`` in x's dtype.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; dropout on the adapter's input as in PEFT.
    """
    if segments is not None:
        raise NotImplementedError("segments: wanted None, got a value; several adapters in one batch are not supported yet")
    adapter_in = x
    if training and dropout_p > 0.0:
        adapter_in = dropout(x, dropout_p, as_seed(seed, x.device))
    low_rank = F.linear(F.linear(adapter_in, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + low_rank * scale


def as_seed(seed, device: torch.device) -> torch.Tensor:
    """``seed`` (None, int or tensor) as an int64 tensor of one element on ``device``."""
    if seed is None:
        return philox.draw_seed(device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)

"""Mixed batches: the samples of one batch through the adapters they name, as one call with `Segments`.

    y[t] = x[t] W^T + scale[e] (drop(x[t]) A[e]^T) B[e]^T + bias      e = names[sample of t]; none: the base alone

Only the adapters that the batch names are stacked, at each call: E adapters of rank r are read and written once, E r (K + N) elements.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional as F

from ..autograd import lora_linear
from ..experts import Factors
from ..segments import Segments, plan_of
from ..streams import kept_for
from .peft_state import Base

KEPT = 32  # plans and tables; a model has a few at a time, one for each set of adapters that its layers have


def mixed(x: torch.Tensor, base: Base, adapters: list[Factors], ids: tuple[int, ...]) -> torch.Tensor:
    """x ``[samples, ..., K]`` with ``adapters[ids[i]]`` for sample i, -1 for the base alone."""
    ranks = tuple(adapter.A.shape[0] for adapter in adapters)
    A, B = _stacks(adapters, max(ranks))
    scales = [adapter.scale for adapter in adapters]
    if any(isinstance(scale, torch.Tensor) for scale in scales):
        scale = torch.stack([torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(()) for scale in scales])
    else:
        scale = _from_host(_table, x.device, tuple(scales), torch.float32)
    y = lora_linear(
        x,
        base.weight,
        A,
        B,
        base.bias,
        scale=scale,
        dropout_p=adapters[0].p,
        training=adapters[0].training,
        base=base.product,
        segments=_from_host(_plan, x.device, ids, len(adapters), math.prod(x.shape[1:-1])),
        ranks=_from_host(_table, x.device, ranks, torch.int32) if min(ranks) < max(ranks) else None,
    )
    return y if base.result is None else y.to(base.result)


def why_not_mixed(adapters: list[Factors]) -> str | None:
    """Why adapters cannot share one call of a mixed batch."""
    if len({adapter.p if adapter.drops else 0.0 for adapter in adapters}) > 1:
        return "its adapters differ in dropout"
    if any(adapter.bias is not None for adapter in adapters):
        return "an adapter has a bias of its own"
    return None


def _stacks(adapters: list[Factors], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[E, rank, K]`` and ``[E, N, rank]``, in float32 unless all have the same dtype."""
    downs, ups = [adapter.A for adapter in adapters], [adapter.B for adapter in adapters]
    if any(A.dtype is not downs[0].dtype for A in downs):
        downs, ups = [A.float() for A in downs], [B.float() for B in ups]
    downs = [A if A.shape[0] == rank else F.pad(A, (0, 0, 0, rank - A.shape[0])) for A in downs]
    ups = [B if B.shape[1] == rank else F.pad(B, (0, rank - B.shape[1])) for B in ups]
    return torch.stack(downs), torch.stack(ups)


def _from_host(make, device: torch.device, *key):
    """``make(device, *key)``, kept from one layer to the next: it depends on these alone, and costs copies to the device."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return make(device, *key)  # what a graph holds is of no use outside it
    return _kept(make, kept_for(device), device, *key)


@functools.lru_cache(maxsize=KEPT)
def _kept(make, kept_for: tuple[int, bool], *key):
    return make(*key)


def _plan(device: torch.device, ids: tuple[int, ...], adapters: int, tokens: int) -> Segments:
    """The plan of samples of ``tokens`` tokens each."""
    return plan_of(torch.tensor(ids, dtype=torch.int32).to(device, non_blocking=True), tokens, adapters)


def _table(device: torch.device, values: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)  # which no earlier work is waited for

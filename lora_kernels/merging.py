"""Merging: ``W := base + scale B A`` in one pass over W, and the state of a layer while its update sits in the weight.

A merged layer costs what nn.Linear costs. Its base weight is kept beside it, so that `Mergeable.unmerge` gives it back bit for
bit and another adapter is merged from the base itself, not on top of the first one's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import dispatch
from .problem import UnsupportedError, sharded

KEEP = ("cpu", "device")
LIBRARY = (torch.bfloat16, torch.float32, torch.float64)  # which addmm sums in float32 or more and rounds once, on a CPU too
_ROWS = 1 << 20  # elements of W that the library's arm widens to float32 at a time


@torch.no_grad()
def write_merged(weight, base, lora_A, lora_B, scale: float, *, row_scale=None, impl: str = "auto") -> None:
    """``weight := row_scale (base + scale B A)`` in float32 (float64 for float64), rounded once.

    Args:
        weight: ``[N, K]``, any strides, written in place. base: Likewise, any device; may be ``weight`` itself.
        lora_A, lora_B: ``[r, K]`` and ``[N, r]``, any floating dtype. scale: ``lora_alpha / r``.
        row_scale: float32 ``[N]`` (DoRA's ``m / norm``), or None for ones.
        impl: "triton" (the kernel), "torch" (library calls over blocks of rows) or "auto": the kernel on a GPU.
    Raises:
        ValueError: the result is not finite; ``weight`` holds ``base`` again. UnsupportedError: "triton" cannot serve it.
    """
    reason = _why_not_kernel(weight, row_scale)
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl: wanted one of auto, triton, torch, got {impl!r}")
    if impl == "triton" and reason:
        raise UnsupportedError(f"impl: 'triton' cannot merge here: {reason}")
    before = base.clone() if base is weight or (not sharded(weight) and base.is_set_to(weight)) else base
    source = base.to(weight.device)
    if impl == "triton" or (impl == "auto" and weight.is_cuda and not reason):
        from . import launch

        launch.merge(weight, source, lora_A, lora_B, scale)
    else:
        with dispatch.without_autocast(weight.device):
            by_library(weight, source, lora_A, lora_B, scale, row_scale)
    if not finite(weight):
        weight.copy_(before)
        raise ValueError("merge: wanted a finite merged weight, got NaN or Inf in base + scale * B A; the weight is unchanged")


def finite(weight) -> bool:
    """Whether all elements are finite, of a sharded tensor on every rank."""
    if sharded(weight):  # merged on all ranks or on none
        others: Any = (~torch.isfinite(weight)).sum()  # torch 2.8 takes a sharded tensor's all() for its any()
        return not others.full_tensor()
    # NaN shows in both ends; one pass without a tensor of its own, on a CPU 50 times as fast as isfinite
    return not weight.numel() or all(torch.isfinite(end) for end in torch.aminmax(weight))


def _why_not_kernel(weight, row_scale) -> str | None:
    if sharded(weight):
        return "the weight is a DTensor, whose own operations merge it"
    arch, why_not_here = dispatch.arch_of(weight.device)
    if arch is None:
        return why_not_here
    if arch.kind == "interpreter" and weight.dtype == torch.bfloat16:
        return dispatch.INTERPRETED_BFLOAT16
    if weight.dtype == torch.float64:
        return "the kernels multiply in float32, and the weight is float64"
    if row_scale is not None:
        return "a scale for each row (DoRA) is merged by library calls"
    return None


def by_library(weight, base, lora_A, lora_B, scale: float, row_scale) -> None:
    """The library's arm of `write_merged`: one product where that rounds once, else blocks of rows widened to float32."""
    one_dtype = lora_A.dtype == lora_B.dtype == weight.dtype == base.dtype
    if row_scale is None and one_dtype and weight.dtype in LIBRARY and not sharded(weight):
        torch.addmm(base, lora_B, lora_A, alpha=scale, out=weight)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    if sharded(weight):
        merged = torch.addmm(base.to(wide), B, A, alpha=scale)
        weight.copy_(merged if row_scale is None else merged * row_scale[:, None])
        return
    rows = max(1, _ROWS // max(weight.shape[1], 1))
    for begin in range(0, weight.shape[0], rows):
        part = slice(begin, begin + rows)
        merged = torch.addmm(base[part].to(wide), B[part], A, alpha=scale)
        weight[part] = merged if row_scale is None else merged.mul_(row_scale[part, None])


class Mergeable:
    """What a layer with a ``weight`` needs to merge into it: the base kept aside, given back, and told apart in a checkpoint."""

    weight: torch.Tensor
    widths: tuple[int, ...] = ()  # of packed layers, whose A is [L, r, K] then
    tied = False  # whether another module has the weight, too: `apply_lora` says so
    _base_weight: torch.Tensor | None = None

    @property
    def merged(self) -> bool:
        return self._base_weight is not None

    def base_weight(self) -> torch.Tensor:
        """The base weight, merged or not: on the weight's device and in its dtype, copied from the CPU if it is kept there."""
        return self.weight if self._base_weight is None else self._base_weight.to(self.weight.device, self.weight.dtype)

    def has_base(self, weight: torch.Tensor) -> bool:
        """Whether ``weight``, rounded to the layer's dtype, is its base weight."""
        own = self.base_weight()
        return own is not None and weight.shape == own.shape and torch.equal(weight.to(own), own)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight back, bit for bit."""
        if self._base_weight is None:
            raise RuntimeError("unmerge: wanted a merged layer, got an unmerged one")
        self.weight.copy_(self._base_weight)
        self._base_weight = None

    def _merge(self, keep: str, lora_A, lora_B, scale: float, row_scale=None) -> None:
        """Merge an adapter from the base, whether or not another one is merged; where that fails the layer is left unmerged."""
        if keep not in KEEP:
            raise ValueError(f"keep: wanted one of {', '.join(KEEP)}, got {keep!r}")
        if self.tied:
            raise ValueError("merge: wanted a weight of its own, got one that another module shares and that would change there, too")
        if not isinstance(getattr(self, "stack", self.weight), nn.Parameter):
            raise ValueError("merge: wanted a weight that is a parameter, got one that is computed at each call (parametrized, or pruned)")
        base = self._base_weight
        if base is None:
            base = self.weight.detach().to("cpu" if keep == "cpu" else self.weight.device, copy=True)
        self._base_weight = None
        try:
            self._write_merged(base, lora_A.detach(), lora_B.detach(), scale, row_scale)
        except BaseException:  # memory that is full, say, with a part of the update written
            self.weight.detach().copy_(base)
            raise
        self._base_weight = base

    def _write_merged(self, base, lora_A, lora_B, scale: float, row_scale) -> None:
        matrices: Any = [(self.weight.detach(), base, lora_A, lora_B)]
        if self.weight.dim() == 3:
            matrices = zip(*matrices[0], strict=True)
        elif self.widths:
            weights, bases, Bs = (t.split(self.widths) for t in (self.weight.detach(), base, lora_B))
            matrices = zip(weights, bases, lora_A, Bs, strict=True)
        for weight, its_base, A, B in matrices:
            write_merged(weight, its_base, A, B, scale, row_scale=row_scale)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self.merged:  # a checkpoint holds base and adapter apart, or loading it would apply the adapter twice
            destination[prefix + "weight"] = self.base_weight()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if self.merged:
            error_msgs.append(
                f"{prefix[:-1] or 'the layer'}: wanted an unmerged layer to load into, got a merged one; call unmerge() first"
            )
            return
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_unmerged(name: str, layer: Any) -> None:
    if layer.merged:
        raise RuntimeError(f"{name}: wanted an unmerged layer, got a merged one; call unmerge() first")

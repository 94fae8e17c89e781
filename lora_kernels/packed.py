"""Packed layers: several layers of one x whose weights are one matrix, as serving engines keep q, k and v, or gate and up.

    weight [N_1 + N_2 + ..., K]      lora_A [L r, K], each layer's r rows in turn      lora_B [N_1 + N_2 + ..., r]

So one product serves all layers; an output takes the r columns of ``u [M, L r]`` that are its layer's, and dS is, layer by layer, of the
layer's own columns of dY. ``widths``: N_1, N_2, ...; () where a weight is one layer's.
"""

from __future__ import annotations

import itertools


def layers_of(widths: tuple[int, ...], rank: int) -> list[tuple[slice, slice]]:
    """For each packed layer its outputs, and which columns of u are its own, ``rank`` a layer."""
    ends = itertools.accumulate(widths)
    return [(slice(end - N, end), slice(i * rank, (i + 1) * rank)) for i, (end, N) in enumerate(zip(ends, widths, strict=True))]


def cut(widths: tuple[int, ...], columns: int, block: int) -> tuple[tuple[int, ...] | None, int, bool]:
    """Columns in blocks, none of two layers: where each layer ends (None: one layer), how many blocks, and whether they need no mask."""
    if not widths:
        return None, -(-columns // block), columns % block == 0
    blocks, even = sum(-(-width // block) for width in widths), all(width % block == 0 for width in widths)
    return tuple(itertools.accumulate(widths)), blocks, even


def check_widths(widths, N: int) -> None:
    """The outputs of the layers that a weight packs."""
    if not isinstance(widths, (tuple, list)) or not all(isinstance(width, int) and not isinstance(width, bool) for width in widths):
        raise TypeError(f"widths: wanted ints, the out_features of each packed layer, or None, got {widths!r}")
    if not widths or min(widths) < 1 or sum(widths) != N:
        raise ValueError(f"widths: wanted numbers from 1 whose sum is out_features, {N}, got {list(widths)} (sum {sum(widths)})")

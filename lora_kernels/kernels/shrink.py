"""shrink: ``z[M, R] = scale * (D.x)[M, K] @ a[K, R]``: U in the forward pass, dS in the backward pass.

The scale, and 1 / (1 - p) with it, multiplies the float32 sum, once, before the only rounding. With segments a tile holds tokens
of one adapter, gathered from x and written back to their own rows; tokens without an adapter, and columns beyond its rank, are 0.
"""

import triton
import triton.language as tl

from .dropout import drop
from .load import any_within_rank, in_units, load_dense, load_rows, row_offsets, tile_mask, tile_ptrs, within_rank
from .tiles import gathered_tile, layer_columns


@triton.jit
def shrink_tile(
    x,
    a,
    z,
    gather,
    adapters,
    stride_ae,
    scales_ptr,
    ranks_ptr,
    seed,
    threshold,
    scale,
    tile,
    r0,
    k_start,
    k_end,
    M,
    K,
    R,
    LOAD_X: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    FAN: tl.constexpr = 1,
    period=None,
):
    """One tile of z from the columns [k_start, k_end) of x; returns its tokens and which of them are real, [BLOCK_M] each.

    period: As in `within_rank`.
    """
    m0 = tile * BLOCK_M
    rank = R
    slot = 0
    if SEGMENTS:
        slot, tokens, row_mask = gathered_tile(gather, tile, BLOCK_M)
        live = (slot >= 0) & (slot < adapters)
        slot = tl.where(live, slot, 0)
        if ranks_ptr is not None:
            rank = tl.minimum(tl.load(ranks_ptr + slot), R)
        k_end = tl.where(live & any_within_rank(r0, rank, period, BLOCK_R), k_end, k_start)
    else:
        tokens = m0 + tl.arange(0, BLOCK_M)
        row_mask = tokens < M
    if scales_ptr is not None:
        scale *= tl.load(scales_ptr + slot)
    adapter = (a[0] + tl.cast(slot, tl.int64) * stride_ae, a[1], a[2])
    r = r0 + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in tl.range(k_start, k_end, BLOCK_K):
        # x: [BLOCK_M, BLOCK_K]
        if SEGMENTS:
            x_tile = load_rows(x, tokens // FAN, row_mask, k0, K, BLOCK_K, EVEN_K, WIDE)
        else:
            x_tile = LOAD_X(x, m0, k0, M, K, BLOCK_M, BLOCK_K, False, EVEN_K, WIDE)
        if DROPOUT:
            x_tile = drop(x_tile, seed, threshold, tokens, k0, BLOCK_M, BLOCK_K)
        # a: [BLOCK_K, BLOCK_R]
        near = None if ranks_ptr is None else within_rank(r, rank, period, 8)[None, :]
        a_tile = load_dense(adapter, k0, r0, K, R, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, WIDE, near).to(x_tile.dtype)
        acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
    out = acc * scale
    if SEGMENTS:  # what no sum was made for is 0 whatever its scale, NaN too
        out = tl.where(within_rank(r, rank, period)[None, :] & live, out, 0.0)
        ptrs = row_offsets(z, tokens, r0) + tl.arange(0, BLOCK_R)[None, :] * z[2]
        mask = row_mask[:, None] & (r < R)[None, :]
    else:
        ptrs = tile_ptrs(z, m0, r0, BLOCK_M, BLOCK_R, WIDE)
        mask = tile_mask(m0, r0, M, R, BLOCK_M, BLOCK_R)
    tl.store(ptrs, out.to(z[0].dtype.element_ty), mask=mask)
    return tokens, row_mask


@triton.jit(do_not_specialize=["M", "threshold", "blocks_per_split", "adapters"])
def shrink(
    x,
    a,
    z,
    stride_split,
    gather,
    adapters,
    stride_ae,
    scales_ptr,
    ranks_ptr,
    seed_ptr,
    threshold,
    scale,
    M,
    K,
    R,
    ends,
    period,
    blocks_per_split,
    LOAD_X: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    LET_GO: tl.constexpr,
    FAN: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_A: tl.constexpr,
):
    """Grid [row blocks or gathered tiles, rank blocks, splits of K]. z: [splits, M, R] with stride_split between the partial sums.

    LET_GO: None, or a function that lets the next launch begin. FAN: with segments, how many tokens a row of x stands for.
    ends: None, or where the columns in x of each packed layer end: rank blocks are then of one layer after another, R columns of z each.
    period: as in `within_rank`, of z's columns. UNIT, UNIT_A: as in `expand`.
    """
    if LET_GO is not None:
        LET_GO()
    R = in_units(R, UNIT)
    if UNIT_A > 1:
        a = (a[0], in_units(a[1], UNIT_A), a[2])
    r0 = tl.program_id(1) * BLOCK_R
    layer = 0
    begin = 0
    if ends is not None:
        layer = tl.program_id(1) // tl.cdiv(R, BLOCK_R)
        r0 = tl.program_id(1) % tl.cdiv(R, BLOCK_R) * BLOCK_R
        begin, K = layer_columns(layer, ends)
    k_start = begin + tl.program_id(2) * blocks_per_split * BLOCK_K  # in blocks, so that the compiler sees its alignment
    k_end = tl.minimum(k_start + blocks_per_split * BLOCK_K, K)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    part = (z[0] + tl.cast(tl.program_id(2), tl.int64) * stride_split + layer * R * z[2], z[1], z[2])
    shrink_tile(
        x, a, part, gather, adapters, stride_ae, scales_ptr, ranks_ptr, seed, threshold, scale,
        tl.program_id(0), r0, k_start, k_end, M, K, R,
        LOAD_X, SEGMENTS, DROPOUT, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, WIDE, FAN, period,
    )  # fmt: skip

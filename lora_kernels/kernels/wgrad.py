"""wgrad: ``out[J, R] = scale * (D.x)[M, J]^T @ g[M, R]``: dA (x, dS) and dB (dY, U), each stored by its strides.

The long axis comes first, for only so does a small rank reach the wide matmul instructions. Tokens are split over
programs; each split writes its float32 sum, and they are added in a fixed order: deterministic, without atomics. With segments
there is such a sum for each adapter over its own tokens, gathered; an absent adapter's, and a column's beyond its rank, is exactly 0.
"""

import triton
import triton.language as tl

from .dropout import drop
from .load import any_within_rank, in_units, load_dense, load_rows, tile_base, tile_mask, tile_offsets, within_rank
from .tiles import column_block, column_blocks


@triton.jit(do_not_specialize=["M", "threshold", "blocks_per_split"])
def wgrad(
    x,
    g,
    out,
    stride_split,
    starts_ptr,
    order_ptr,
    stride_oe,
    ranks_ptr,
    seed_ptr,
    threshold,
    scale,
    M,
    J,
    R,
    ends,
    period,
    blocks_per_split,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_J: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    LET_GO: tl.constexpr,
    WAIT: tl.constexpr,
    FAN: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_G: tl.constexpr,
):
    """Grid [column blocks of every adapter, rank blocks, splits of the tokens]. out: [splits, adapters, J, R] by strides.

    LET_GO, WAIT: None, or functions: the next launch begins beside this one; this one, begun beside the launch before it, ends after it.
    FAN: with segments, how many tokens a row of x stands for. ends: None, or where the columns in x of each packed layer end; g then has R
    for each. period: as in `within_rank`, of g's columns. UNIT, UNIT_G: as in `expand`.
    """
    if LET_GO is not None:
        LET_GO()
    R = in_units(R, UNIT)
    if UNIT_G > 1:
        g = (g[0], in_units(g[1], UNIT_G), g[2])
    adapter = 0
    block = tl.program_id(0)
    r0 = tl.program_id(1) * BLOCK_R
    split = tl.program_id(2)
    rank = R
    first = 0
    if SEGMENTS:
        num_j = column_blocks(J, ends, BLOCK_J)
        adapter = block // num_j
        block = block % num_j
        first = tl.load(starts_ptr + adapter)
        M = tl.load(starts_ptr + adapter + 1)
        if ranks_ptr is not None:
            rank = tl.minimum(tl.load(ranks_ptr + adapter), R)
            M = tl.where(any_within_rank(r0, rank, period, BLOCK_R), M, first)
        blocks_per_split = tl.cdiv(tl.cdiv(M - first, BLOCK_M), tl.num_programs(2))
    layer, _, j0, J = column_block(block, J, ends, BLOCK_J)
    column = layer * R
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([BLOCK_J, BLOCK_R], tl.float32)
    m_start = first + split * blocks_per_split * BLOCK_M
    for m0 in tl.range(m_start, tl.minimum(m_start + blocks_per_split * BLOCK_M, M), BLOCK_M):
        tokens = m0 + tl.arange(0, BLOCK_M)
        # x: [BLOCK_M, BLOCK_J], g: [BLOCK_M, BLOCK_R]
        if SEGMENTS:
            row_mask = tokens < M
            tokens = tl.load(order_ptr + tokens, mask=row_mask, other=0)
            x_tile = load_rows(x, tokens // FAN, row_mask, j0, J, BLOCK_J, EVEN_J, WIDE)
            g_tile = load_rows(g, tokens, row_mask, column + r0, column + R, BLOCK_R, EVEN_R, WIDE)
        else:
            x_tile = load_dense(x, m0, j0, M, J, BLOCK_M, BLOCK_J, False, EVEN_J, WIDE)
            g_tile = load_dense(g, m0, column + r0, M, column + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE)
        if DROPOUT:
            x_tile = drop(x_tile, seed, threshold, tokens, j0, BLOCK_M, BLOCK_J)
        acc = tl.dot(tl.trans(x_tile), g_tile, acc, input_precision=PRECISION)
    if SEGMENTS:  # a column beyond the rank is 0 even where x is not finite
        acc = tl.where(within_rank(r0 + tl.arange(0, BLOCK_R), rank, period)[None, :], acc, 0.0)
    base = tile_base(out[0], j0, r0, out[1], out[2]) + tl.cast(split, tl.int64) * stride_split + tl.cast(adapter, tl.int64) * stride_oe
    ptrs = base + tile_offsets(out[1], out[2], BLOCK_J, BLOCK_R, WIDE)
    tl.store(ptrs, (acc * scale).to(out[0].dtype.element_ty), mask=tile_mask(j0, r0, J, R, BLOCK_J, BLOCK_R))
    if WAIT is not None:
        # One program is enough for this launch to end after the one before; the last, for one that waits holds the room of another.
        last = (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == tl.num_programs(1) - 1)
        if last & (split == tl.num_programs(2) - 1):
            WAIT()

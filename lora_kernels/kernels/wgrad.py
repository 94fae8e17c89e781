"""wgrad: ``out[J, R] = scale * (D.x)[M, J]^T @ g[M, R]``: dA (x, dS) and dB (dY, U), each stored by its strides.

The long axis comes first, for only so does a small rank reach the wide matmul instructions. Tokens are split over
programs; each split writes its float32 sum, and they are added in a fixed order: deterministic, without atomics.
"""

import triton
import triton.language as tl

from .dropout import drop
from .load import load_dense, tile_base, tile_mask, tile_offsets


@triton.jit(do_not_specialize=["M", "threshold", "blocks_per_split"])
def wgrad(
    x,
    g,
    out,
    stride_split,
    seed_ptr,
    threshold,
    scale,
    M,
    J,
    R,
    blocks_per_split,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_J: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid [column blocks, rank blocks, splits of the tokens]. out: [splits, J, R] by strides."""
    j0 = tl.program_id(0) * BLOCK_J
    r0 = tl.program_id(1) * BLOCK_R
    split = tl.program_id(2)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    acc = tl.zeros([BLOCK_J, BLOCK_R], tl.float32)
    m_start = split * blocks_per_split * BLOCK_M
    for m0 in tl.range(m_start, tl.minimum(m_start + blocks_per_split * BLOCK_M, M), BLOCK_M):
        # x: [BLOCK_M, BLOCK_J]
        x_tile = load_dense(x, m0, j0, M, J, BLOCK_M, BLOCK_J, False, EVEN_J, WIDE)
        if DROPOUT:
            x_tile = drop(x_tile, seed, threshold, m0, j0, BLOCK_M, BLOCK_J)
        # g: [BLOCK_M, BLOCK_R]
        g_tile = load_dense(g, m0, r0, M, R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE)
        acc = tl.dot(tl.trans(x_tile), g_tile, acc, input_precision=PRECISION)
    base = tile_base(out[0], j0, r0, out[1], out[2]) + tl.cast(split, tl.int64) * stride_split
    ptrs = base + tile_offsets(out[1], out[2], BLOCK_J, BLOCK_R, WIDE)
    tl.store(ptrs, (acc * scale).to(out[0].dtype.element_ty), mask=tile_mask(j0, r0, J, R, BLOCK_J, BLOCK_R))

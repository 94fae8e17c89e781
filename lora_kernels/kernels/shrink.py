"""shrink: ``z[M, R] = scale * (D.x)[M, K] @ a[K, R]``: U in the forward pass, dS in the backward pass.

The scale, and 1 / (1 - p) with it, multiplies the float32 sum, once, before the only rounding.
"""

import triton
import triton.language as tl

from .dropout import drop
from .load import load_dense, tile_base, tile_mask, tile_offsets


@triton.jit
def shrink_tile(
    x,
    a,
    z,
    seed,
    threshold,
    scale,
    m0,
    r0,
    k_start,
    k_end,
    M,
    K,
    R,
    LOAD_X: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of z from the columns [k_start, k_end) of x."""
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in tl.range(k_start, k_end, BLOCK_K):
        # x: [BLOCK_M, BLOCK_K]
        x_tile = LOAD_X(x, m0, k0, M, K, BLOCK_M, BLOCK_K, False, EVEN_K, WIDE)
        if DROPOUT:
            x_tile = drop(x_tile, seed, threshold, m0, k0, BLOCK_M, BLOCK_K)
        # a: [BLOCK_K, BLOCK_R]
        a_tile = load_dense(a, k0, r0, K, R, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, WIDE).to(x_tile.dtype)
        acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
    ptrs = tile_base(z[0], m0, r0, z[1], z[2]) + tile_offsets(z[1], z[2], BLOCK_M, BLOCK_R, WIDE)
    tl.store(ptrs, (acc * scale).to(z[0].dtype.element_ty), mask=tile_mask(m0, r0, M, R, BLOCK_M, BLOCK_R))


@triton.jit(do_not_specialize=["M", "threshold", "blocks_per_split"])
def shrink(
    x,
    a,
    z,
    stride_split,
    seed_ptr,
    threshold,
    scale,
    M,
    K,
    R,
    blocks_per_split,
    LOAD_X: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid [row blocks, rank blocks, splits of K]. z: [splits, M, R] with stride_split between the partial sums."""
    m0 = tl.program_id(0) * BLOCK_M
    r0 = tl.program_id(1) * BLOCK_R
    k_start = tl.program_id(2) * blocks_per_split * BLOCK_K  # in blocks, so that the compiler sees its alignment
    k_end = tl.minimum(k_start + blocks_per_split * BLOCK_K, K)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    part = (z[0] + tl.cast(tl.program_id(2), tl.int64) * stride_split, z[1], z[2])
    shrink_tile(
        x, a, part, seed, threshold, scale, m0, r0, k_start, k_end, M, K, R,
        LOAD_X, DROPOUT, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, WIDE,
    )  # fmt: skip

"""low_rank: ``acc[M, N] + D.(u[M, R] @ v[R, N])``, expand's second product, for u that was written before.

With segments it is made once for each adapter present in the row block, and one adapter must never reach another's tokens. Either a
token selects its own product, which takes a second accumulator, or (MASKED) the rows of u that belong to others are zero in each
product, and what is not finite in v, for 0 * inf is NaN, is taken out of it and added to its own tokens as NaN.
"""

import triton
import triton.language as tl

from .dropout import keep_tile
from .load import load_dense, load_v


@triton.jit
def own_product(
    uv, own, u, v, m0, n0, r0, first, M, N, R, rank, period,
    TYPE: tl.constexpr, LOAD_U: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``uv + u v`` in the rows ``own`` [BLOCK_M, 1], and uv, unchanged, in the others."""
    u_tile = LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE, own).to(TYPE)
    v_tile = load_v(v, r0, n0, R, N, rank, period, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE).to(TYPE)
    finite = tl.abs(v_tile.to(tl.float32)) < float("inf")
    poison = tl.sum(tl.where(finite, 0.0, float("nan")), 0)
    uv = tl.dot(u_tile, tl.where(finite, v_tile, 0.0), uv, input_precision=PRECISION)
    return tl.where(own, uv + poison[None, :], uv)


@triton.jit
def low_rank(
    acc,
    u,
    v,
    rows,
    stride_ve,
    ranks_ptr,
    seed,
    threshold,
    inv_keep,
    m0,
    n0,
    first,
    M,
    N,
    R,
    period,
    TYPE: tl.constexpr,
    LOAD_U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    WALK: tl.constexpr,
    DROP_UV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """``acc + D.(u v)``, u from column ``first`` on; FIRST: acc is still zero, so that the product needs no registers of its own."""
    uv = acc
    tokens = m0 + tl.arange(0, BLOCK_M)
    if (DROP_UV or (SEGMENTS and not MASKED)) and not FIRST:
        uv = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SEGMENTS:
        ids = tl.load(rows[0] + tokens, mask=tokens < M, other=-1)
        if R_BLOCKS == 1 and not MASKED:
            u_tile = LOAD_U(u, m0, first, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
        # One step an adapter; where products are selected, one for each block of its rank, so that no inner loop ends the pipeline.
        STEPS: tl.constexpr = 1 if MASKED else R_BLOCKS
        for i in tl.range(0, tl.load(rows[2] + m0 // BLOCK_M) * STEPS, num_stages=WALK):
            adapter = tl.load(rows[1] + m0 + i // STEPS)
            rank = R
            if ranks_ptr is not None:
                rank = tl.minimum(tl.load(ranks_ptr + adapter), R)
            its_v = (v[0] + adapter.to(tl.int64) * stride_ve, v[1], v[2])
            own = (ids == adapter)[:, None]
            if MASKED and R_BLOCKS == 1:
                uv = own_product(
                    uv, own, u, its_v, m0, n0, 0, first, M, N, R, rank, period,
                    TYPE, LOAD_U, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, EVEN_N, EVEN_R, WIDE,
                )  # fmt: skip
            elif MASKED:
                for r0 in tl.range(0, rank if period is None else R, BLOCK_R, num_stages=1):
                    uv = own_product(
                        uv, own, u, its_v, m0, n0, r0, first, M, N, R, rank, period,
                        TYPE, LOAD_U, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, EVEN_N, EVEN_R, WIDE,
                    )  # fmt: skip
            else:
                # u: [BLOCK_M, BLOCK_R], v: [BLOCK_R, BLOCK_N]
                r0 = i % STEPS * BLOCK_R
                if R_BLOCKS > 1:
                    u_tile = LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
                v_tile = load_v(its_v, r0, n0, R, N, rank, period, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE).to(TYPE)
                product = tl.dot(u_tile, v_tile, input_precision=PRECISION)
                uv += tl.where(own, product, 0.0)
    else:
        # A loop, not unrolled: Triton 3.6 compiles consecutive dots before a pipelined loop to an empty kernel on sm_100.
        for r0 in tl.range(0, R_BLOCKS * BLOCK_R, BLOCK_R, num_stages=1):
            # u: [BLOCK_M, BLOCK_R], v: [BLOCK_R, BLOCK_N]
            u_tile = LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
            v_tile = load_dense(v, r0, n0, R, N, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE).to(TYPE)
            uv = tl.dot(u_tile, v_tile, uv, input_precision=PRECISION)
    if DROP_UV:
        uv = tl.where(keep_tile(seed, threshold, tokens, n0, BLOCK_M, BLOCK_N), uv * inv_keep, 0.0)
    elif MASKED or not SEGMENTS:
        return uv
    return uv if FIRST else acc + uv

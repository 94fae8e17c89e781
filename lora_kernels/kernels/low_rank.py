"""low_rank: ``acc[M, N] + D.(u[M, R] @ v[R, N])``, expand's second product, for u that was written before.

With segments one adapter must never reach another's tokens. EACH: every token has v of its own adapter, gathered into registers: for few
rows, in which each may be another. Else a product is made for each adapter present in the row block, and either a token selects its own
one, which takes a second accumulator, or (MASKED) the rows of u that belong to others are zero in each product, and what is not finite
in v, for 0 * inf is NaN, is taken out of it and added to its own tokens as NaN.
"""

import triton
import triton.language as tl

from .dropout import keep_tile
from .load import load_dense, load_v, tile_base, within_rank


@triton.jit
def own_product(
    uv, own, u, v, m0, n0, r0, first, M, N, R, rank, period, NEIGHBOURS: tl.constexpr,
    TYPE: tl.constexpr, LOAD_U: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``uv + u v`` in the rows ``own`` [BLOCK_M, 1], and uv, unchanged, in the others."""
    u_tile = LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE, own).to(TYPE)
    v_tile = load_v(v, r0, n0, R, N, rank, period, NEIGHBOURS, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE).to(TYPE)
    finite = tl.abs(v_tile.to(tl.float32)) < float("inf")
    poison = tl.sum(tl.where(finite, 0.0, float("nan")), 0)
    uv = tl.dot(u_tile, tl.where(finite, v_tile, 0.0), uv, input_precision=PRECISION)
    return tl.where(own, uv + poison[None, :], uv)


@triton.jit
def load_each(
    v, stride_ve, ids_ptr, ranks_ptr, m0, r0, n0, M, R, N, period,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_N: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N, BLOCK_R]: v of each token's own adapter, transposed; zero beyond its rank, and for a token without one."""
    tokens = (m0 + tl.arange(0, BLOCK_M))[:, None, None]
    i = tl.arange(0, BLOCK_N)[None, :, None]
    j = tl.arange(0, BLOCK_R)[None, None, :]
    adapter = tl.load(ids_ptr + tokens, mask=tokens < M, other=-1)
    mask = adapter >= 0
    if ranks_ptr is not None:
        rank = tl.load(ranks_ptr + adapter, mask=mask, other=0)
        mask = within_rank(r0 + j, rank, period, 8)
    if not EVEN_R:
        mask = mask & (r0 + j < R)
    if not EVEN_N:
        mask = mask & (n0 + i < N)
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    ptrs = tile_base(v[0], r0, n0, v[1], v[2]) + adapter.to(tl.int64) * stride_ve + (i * v[2] + j * v[1])
    v_tile = tl.load(ptrs, mask=mask, other=0.0)
    return v_tile if ranks_ptr is None else tl.where(within_rank(r0 + j, rank, period), v_tile, 0.0)


@triton.jit
def each_product(u_tile, v_tile):
    """[BLOCK_M, BLOCK_N]: each row of u [BLOCK_M, BLOCK_R] with its own v [BLOCK_M, BLOCK_N, BLOCK_R]."""
    return tl.sum(u_tile.to(tl.float32)[:, None, :] * v_tile.to(tl.float32), 2)


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
    EACH: tl.constexpr,
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
    if SEGMENTS and EACH:
        longest = R
        if ranks_ptr is not None and period is None:
            longest = tl.minimum(tl.max(tl.load(ranks_ptr + ids, mask=ids >= 0, other=0)), R)
        for r0 in tl.range(0, longest, BLOCK_R, num_stages=1):
            v_tile = load_each(
                v, stride_ve, rows[0], ranks_ptr, m0, r0, n0, M, R, N, period, BLOCK_M, BLOCK_N, BLOCK_R, EVEN_N, EVEN_R, WIDE
            ).to(TYPE)
            u_tile = LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
            uv += each_product(u_tile, v_tile)
    elif SEGMENTS:
        NEIGHBOURS: tl.constexpr = (
            0 if ranks_ptr is None else 1 if TYPE == tl.float32 else 8
        )  # numbers of 4 bytes are copied one by one, too
        if R_BLOCKS == 1 and not MASKED:
            u_tile = LOAD_U(u, m0, first, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
        # One step an adapter; where products are selected, one for each block of its rank, so that no inner loop ends the pipeline.
        STEPS: tl.constexpr = 1 if MASKED else R_BLOCKS
        for i in tl.range(0, tl.load(rows[2] + m0 // BLOCK_M) * STEPS):
            adapter = tl.load(rows[1] + m0 + i // STEPS)
            rank = R
            if ranks_ptr is not None:
                rank = tl.minimum(tl.load(ranks_ptr + adapter), R)
            its_v = (v[0] + adapter.to(tl.int64) * stride_ve, v[1], v[2])
            own = (ids == adapter)[:, None]
            if MASKED and R_BLOCKS == 1:
                uv = own_product(
                    uv, own, u, its_v, m0, n0, 0, first, M, N, R, rank, period, NEIGHBOURS,
                    TYPE, LOAD_U, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, EVEN_N, EVEN_R, WIDE,
                )  # fmt: skip
            elif MASKED:
                for r0 in tl.range(0, rank if period is None else R, BLOCK_R, num_stages=1):
                    uv = own_product(
                        uv, own, u, its_v, m0, n0, r0, first, M, N, R, rank, period, NEIGHBOURS,
                        TYPE, LOAD_U, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, EVEN_N, EVEN_R, WIDE,
                    )  # fmt: skip
            else:
                # u: [BLOCK_M, BLOCK_R], v: [BLOCK_R, BLOCK_N]
                r0 = i % STEPS * BLOCK_R
                if R_BLOCKS > 1:
                    u_tile = LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
                v_tile = load_v(its_v, r0, n0, R, N, rank, period, NEIGHBOURS, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE).to(TYPE)
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

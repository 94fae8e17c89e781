"""experts: expand with a weight of its own for each adapter, ``y[m] = x[m] w[e] + D.(u[m] v[e]) + bias[e]``, e the expert of row m.

A tile holds rows of one expert, gathered through the plan's order and stored to their own places, so that a mixture's routed tokens are
neither sorted nor copied. Rows without an expert are 0. No expert's weights or adapter reach another's rows: a tile reads one of each.
"""

import triton
import triton.language as tl

from .dropout import keep_tile
from .load import in_units, load_dense, load_rows, load_v, row_offsets
from .tiles import gathered_tile, grouped_tile


@triton.jit(do_not_specialize=["tiles", "adapters", "threshold"])
def experts(
    x,
    w,
    stride_we,
    u,
    v,
    stride_ve,
    bias_ptr,
    y,
    gather,
    tiles,
    adapters,
    ranks_ptr,
    seed_ptr,
    threshold,
    inv_keep,
    N,
    K,
    R,
    DROP_UV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    FAN: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_U: tl.constexpr,
    UNIT_V: tl.constexpr,
):
    """Grid [gathered tiles x column blocks]. gather: as in `gathered_tile`, tiles: how many; bias: [adapters, N], contiguous, or None.

    FAN: how many rows of y, neighbours, a row of x stands for. UNIT, UNIT_U, UNIT_V: as in `expand`.
    """
    R = in_units(R, UNIT)
    if UNIT_U > 1:
        u = (u[0], in_units(u[1], UNIT_U), u[2])
    if UNIT_V > 1:
        v = (v[0], v[1], in_units(v[2], UNIT_V))
    tile, pid_n = grouped_tile(tl.program_id(0), tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    n0 = pid_n * BLOCK_N
    slot, tokens, row_mask = gathered_tile(gather, tile, BLOCK_M)
    if slot >= 0:
        live = slot < adapters
        expert = tl.where(live, slot, 0).to(tl.int64)
        rank = R
        if ranks_ptr is not None:
            rank = tl.minimum(tl.load(ranks_ptr + expert), R)
        its_w = (w[0] + expert * stride_we, w[1], w[2])
        its_v = (v[0] + expert * stride_ve, v[1], v[2])
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # A loop, not unrolled: Triton 3.6 compiles consecutive dots before a pipelined loop to an empty kernel on sm_100.
        for r0 in tl.range(0, R_BLOCKS * BLOCK_R, BLOCK_R, num_stages=1):
            # u: [BLOCK_M, BLOCK_R], v: [BLOCK_R, BLOCK_N]
            u_tile = load_rows(u, tokens, row_mask, r0, R, BLOCK_R, EVEN_R, WIDE)
            v_tile = load_v(its_v, r0, n0, R, N, rank, None, 0 if ranks_ptr is None else 8, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE)
            v_tile = v_tile.to(u_tile.dtype)
            acc = tl.dot(u_tile, v_tile, acc, input_precision=PRECISION)
        if DROP_UV:
            acc = tl.where(keep_tile(tl.load(seed_ptr), threshold, tokens, n0, BLOCK_M, BLOCK_N), acc * inv_keep, 0.0)
        tl.assume(K > 0)
        for k0 in tl.range(0, K, BLOCK_K):
            # x: [BLOCK_M, BLOCK_K], w: [BLOCK_K, BLOCK_N]
            x_tile = load_rows(x, tokens // FAN, row_mask, k0, K, BLOCK_K, EVEN_K, WIDE)
            w_tile = load_dense(its_w, k0, n0, K, N, BLOCK_K, BLOCK_N, EVEN_K, EVEN_N, WIDE).to(x_tile.dtype)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        n = tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert * N + n0 + n, mask=n0 + n < N, other=0.0).to(tl.float32)[None, :]
        out = tl.where(live, acc, 0.0).to(y[0].dtype.element_ty)
        tl.store(row_offsets(y, tokens, n0) + n[None, :] * y[2], out, mask=row_mask[:, None] & (n0 + n < N)[None, :])

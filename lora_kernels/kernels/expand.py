"""expand: ``y[M, N] = x[M, K] @ w[K, N] + u[M, R] @ v[R, N] + bias``: Y in the forward pass, dX in the backward pass.

Where u comes from is a plug, ``U``:
  "given"    an earlier shrink launch wrote it;
  "loop"     the K loop sums ``x a`` beside ``x w`` and the epilogue applies v: one launch, no rank buffer to read;
  "awaited"  one launch whose work list holds the shrink items ahead of the tiles: a tile computes its base product, then
             waits for its row block's flag. Items are handed out by a ticket, in order, to running programs only, and
             a producer never waits, so the wait always ends.
Without a loader of w, x is the base product itself, made by the library or by another layer, or a weight into which ``u v`` is merged
(EXACT: u v in float32). Without one of x either, y is ``u v`` alone. ADD: what y holds already, dX of other layers of x, is the
sum's "first" term, or its "last".

SPLIT (u given, few tokens): parts of one tile go to several programs, the low-rank product to the first and ranges of K to the others. Each
writes a float32 partial sum; whichever comes last adds them in their order, so the result does not depend on which it was.
"""

import triton
import triton.language as tl

from .dropout import drop, keep_tile
from .load import in_units, load_dense, tile_mask, tile_ptrs
from .low_rank import each_product, load_each, low_rank
from .shrink import shrink_tile
from .tiles import column_block, column_blocks, grouped_tile


@triton.jit
def expand_tile(
    x,
    w,
    a,
    u,
    v,
    bias_ptr,
    y,
    rows,
    stride_ve,
    scales_ptr,
    ranks_ptr,
    flag_ptr,
    parts,
    part,
    blocks_per_part,
    seed,
    threshold,
    inv_keep,
    scale,
    pid_m,
    pid_n,
    M,
    N,
    K,
    R,
    ends,
    period,
    LOAD_X: tl.constexpr,
    LOAD_W: tl.constexpr,
    LOAD_U: tl.constexpr,
    U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    EACH: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
    ADD: tl.constexpr,
    SAVE_U: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_UV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    UV: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One tile of y, or with SPLIT one part of it. parts: (partial sums, their stride, counters of the tiles, number of parts)."""
    TYPE: tl.constexpr = tl.float32 if EXACT else y[0].dtype.element_ty
    m0 = pid_m * BLOCK_M
    counter = pid_m * column_blocks(N, ends, BLOCK_N) + pid_n
    layer, begin, n0, N = column_block(pid_n, N, ends, BLOCK_N)
    first = layer * R
    k_begin = 0
    k_end = K
    if SPLIT:
        k_begin = (part - 1) * blocks_per_part * BLOCK_K
        k_end = tl.minimum(k_begin + blocks_per_part * BLOCK_K, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if LOAD_X is not None and LOAD_W is None:  # on its way beside u and v, for which their product waits
        # x: [BLOCK_M, BLOCK_N]
        x_tile = LOAD_X(x, m0, n0, M, N, BLOCK_M, BLOCK_N, False, EVEN_N, WIDE)
    if UV == "last":
        # u: [BLOCK_M, BLOCK_R], v: [BLOCK_R, BLOCK_N], or [BLOCK_M, BLOCK_N, BLOCK_R]
        if EACH:
            v_tile = load_each(
                v, stride_ve, rows[0], ranks_ptr, m0, 0, n0, M, R, N, period, BLOCK_M, BLOCK_N, BLOCK_R, EVEN_N, EVEN_R, WIDE
            ).to(TYPE)
        else:
            v_tile = load_dense(v, 0, n0, R, N, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE).to(TYPE)
        if WAIT is None:
            u_tile = LOAD_U(u, m0, first, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
    elif U == "given" and (WAIT is None or SPLIT) and UV == "first":
        if part == 0:
            if WAIT is not None:
                WAIT()
            acc = low_rank(
                acc, u, v, rows, stride_ve, ranks_ptr, seed, threshold, inv_keep, m0, n0, first, M, N, R, period, TYPE,
                LOAD_U, SEGMENTS, MASKED, EACH, DROP_UV, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, R_BLOCKS, EVEN_N, EVEN_R, WIDE, True,
            )  # fmt: skip
    if ADD == "first":
        if part == 0:
            acc += tl.load(tile_ptrs(y, m0, n0, BLOCK_M, BLOCK_N, WIDE), mask=tile_mask(m0, n0, M, N, BLOCK_M, BLOCK_N), other=0.0)
    if LOAD_X is None:
        pass
    elif LOAD_W is None:
        acc += x_tile
    elif UV == "steps":
        k_steps = tl.cdiv(K, BLOCK_K)
        for i in tl.range(0, k_steps + tl.cdiv(R, BLOCK_K)):
            if i < k_steps:
                x_from = x
                w_from = w
                k0 = i * BLOCK_K
            else:
                x_from = u
                w_from = v
                k0 = (i - k_steps) * BLOCK_K
            x_tile = LOAD_X(x_from, m0, k0, M, K, BLOCK_M, BLOCK_K, False, EVEN_K, WIDE)
            w_tile = LOAD_W(w_from, k0, n0, K, N, BLOCK_K, BLOCK_N, EVEN_K, EVEN_N, WIDE)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    else:
        u_acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        turns = 0
        some = part > 0 if SPLIT else True
        if some:
            tl.assume(k_end > k_begin)  # behind a loop that may be skipped ptxas 12.8 serializes wgmma (C7515)
            for k0 in tl.range(k_begin, k_end, BLOCK_K):
                # x: [BLOCK_M, BLOCK_K], w: [BLOCK_K, BLOCK_N]
                x_tile = LOAD_X(x, m0, k0, M, K, BLOCK_M, BLOCK_K, False, EVEN_K, WIDE)
                w_tile = LOAD_W(w, k0, n0, K, N, BLOCK_K, BLOCK_N, EVEN_K, EVEN_N, WIDE).to(x_tile.dtype)
                if U == "loop":  # first, for by the first product Triton lays a tile of 16 rows over the warps: by columns
                    kept = x_tile
                    if DROP_X:
                        kept = drop(x_tile, seed, threshold, m0 + tl.arange(0, BLOCK_M), k0, BLOCK_M, BLOCK_K)
                    # a: [BLOCK_K, BLOCK_R]
                    a_tile = load_dense(a, k0, first, K, first + R, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, WIDE).to(x_tile.dtype)
                    u_acc = tl.dot(kept, a_tile, u_acc, input_precision=PRECISION)
                acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
                if UV == "last":
                    turns += 1
        if UV == "last":
            # What rests on the loop's end is not put into shared memory, so not waited for, ahead of the loop's first copies.
            if WAIT is not None:
                WAIT()
                u_tile = LOAD_U(u, m0, first, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)
            else:
                u_tile = tl.where(turns > 0, u_tile, tl.zeros_like(u_tile))
            if EACH:
                acc += each_product(u_tile, v_tile)
            else:
                v_tile = tl.where(turns > 0, v_tile, tl.zeros_like(v_tile))
                acc = tl.dot(u_tile, v_tile, acc, input_precision=PRECISION)
        if U == "loop":
            # v: [BLOCK_R, BLOCK_N]
            v_tile = load_dense(v, 0, n0, R, N, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE)
            if scales_ptr is not None:
                scale *= tl.load(scales_ptr)
            u_tile = (u_acc * scale).to(TYPE)
            if SAVE_U:
                if n0 == begin:
                    u_ptrs = tile_ptrs(u, m0, first, BLOCK_M, BLOCK_R, WIDE)
                    tl.store(u_ptrs, u_tile, mask=tile_mask(m0, first, M, first + R, BLOCK_M, BLOCK_R))
            if DROP_UV:
                uv = tl.dot(u_tile, v_tile.to(u_tile.dtype), input_precision=PRECISION)
                acc += tl.where(keep_tile(seed, threshold, m0 + tl.arange(0, BLOCK_M), n0, BLOCK_M, BLOCK_N), uv * inv_keep, 0.0)
            else:
                acc = tl.dot(u_tile, v_tile.to(u_tile.dtype), acc, input_precision=PRECISION)
        if U == "awaited":
            wanted = R_BLOCKS * tl.minimum(BLOCK_M, M - m0) if SEGMENTS else R_BLOCKS
            while tl.atomic_add(flag_ptr + pid_m, 0, sem="acquire", scope="gpu") < wanted:
                pass
            tl.debug_barrier()
        if U == "awaited" or (U == "given" and not SPLIT and UV == "first" and WAIT is not None):
            if WAIT is not None:
                WAIT()
            acc = low_rank(
                acc, u, v, rows, stride_ve, ranks_ptr, seed, threshold, inv_keep, m0, n0, first, M, N, R, period, TYPE,
                LOAD_U, SEGMENTS, MASKED, EACH, DROP_UV, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, R_BLOCKS, EVEN_N, EVEN_R, WIDE, False,
            )  # fmt: skip
    y_mask = tile_mask(m0, n0, M, N, BLOCK_M, BLOCK_N)
    if SPLIT:
        part_ptrs = tile_ptrs((parts[0], y[1], y[2]), m0, n0, BLOCK_M, BLOCK_N, WIDE)
        tl.store(part_ptrs + tl.cast(part, tl.int64) * parts[1], acc, mask=y_mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(parts[2] + counter, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == parts[3] - 1:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.range(0, parts[3]):
                acc += tl.load(part_ptrs + tl.cast(i, tl.int64) * parts[1], mask=y_mask, other=0.0)
            store_tile(acc, bias_ptr, y, y_mask, m0, n0, N, ADD, BLOCK_M, BLOCK_N, WIDE)
    else:
        store_tile(acc, bias_ptr, y, y_mask, m0, n0, N, ADD, BLOCK_M, BLOCK_N, WIDE)


@triton.jit
def store_tile(
    acc, bias_ptr, y, y_mask, m0, n0, N, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Add the bias, round once, store."""
    y_ptrs = tile_ptrs(y, m0, n0, BLOCK_M, BLOCK_N, WIDE)
    if ADD == "last":
        acc += tl.load(y_ptrs, mask=y_mask, other=0.0)
    if bias_ptr is not None:
        n = n0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptrs, acc.to(y_ptrs.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["M", "threshold", "adapters", "gathered", "blocks_per_part", "late"])
def expand(
    x,
    w,
    a,
    u,
    v,
    bias_ptr,
    y,
    rows,
    gather_x,
    gather,
    gathered,
    adapters,
    stride_ae,
    stride_ve,
    scales_ptr,
    ranks_ptr,
    flag_ptr,
    ticket_ptr,
    parts,
    blocks_per_part,
    late,
    seed_ptr,
    threshold,
    inv_keep,
    scale,
    M,
    N,
    K,
    R,
    ends,
    period,
    LOAD_X: tl.constexpr,
    LOAD_W: tl.constexpr,
    LOAD_U: tl.constexpr,
    U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    EACH: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
    ADD: tl.constexpr,
    SAVE_U: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_UV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATHER_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    UV: tl.constexpr,
    WAIT: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_A: tl.constexpr,
    UNIT_U: tl.constexpr,
    UNIT_V: tl.constexpr,
):
    """Grid [programs]: as many as there are work items, or fewer (PERSISTENT), each taking every grid-th item or ticket.

    EACH: as in `low_rank`. SPLIT: parts: as in `expand_tile`, blocks_per_part: of K. WAIT: None, or a function that waits for the launch
    that writes u, for which the base product does not wait. late: None, or the first program that calls it at once, having its room from
    one that has waited.

    UV: where u v, u given, joins the sum. "first". "last": u and v, one block of ranks, are on their way while the K loop runs; ahead of
    it the first copies of x and w would wait for their product. "steps": u and v are descriptors with x's and w's boxes, zero beyond the
    ranks, and go through the same loop, which, flattened into that over tiles, begins the next tile's copies before this tile's end.

    ends: None, or where the columns of each layer that w packs end; u then has R for each. period: as in `within_rank`, of v's rows.
    UNIT: of R; UNIT_A, UNIT_U, UNIT_V: of the stride from one row of ranks to the next, where those are neighbours, or 1.

    With segments: rows: (ids, present, counts), gather_x: x by pointers, gather: as in `gathered_tile`, gathered: how many
    such tiles, of GATHER_M tokens.
    """
    R = in_units(R, UNIT)
    if UNIT_A > 1:
        a = (a[0], in_units(a[1], UNIT_A), a[2])
    if UNIT_U > 1:
        u = (u[0], in_units(u[1], UNIT_U)) + u[2:]
    if UNIT_V > 1:
        v = (v[0], v[1], in_units(v[2], UNIT_V))
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = column_blocks(N, ends, BLOCK_N)
    producers = 0
    if U == "awaited":
        producers = (gathered if SEGMENTS else num_m) * R_BLOCKS
    seed = tl.load(seed_ptr) if DROP_X or DROP_UV else 0
    first = tl.program_id(0)
    if late is not None:
        if first >= late:
            WAIT()
    if UV == "last" and not PERSISTENT:  # no loop of one turn, whose next turn's copies would be fenced off from this one's stores
        pid_m, pid_n = grouped_tile(first, num_m, num_n, GROUP_M)
        expand_tile(
            x, w, a, u, v, bias_ptr, y, rows, stride_ve, scales_ptr, ranks_ptr, flag_ptr,
            parts, 0, blocks_per_part, seed, threshold, inv_keep, scale, pid_m, pid_n, M, N, K, R, ends, period,
            LOAD_X, LOAD_W, LOAD_U, U, SEGMENTS, MASKED, EACH, SPLIT, EXACT, ADD, SAVE_U, DROP_X, DROP_UV, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, R_BLOCKS, EVEN_N, EVEN_K, EVEN_R, WIDE, UV, WAIT,
        )  # fmt: skip
    else:
        last = producers + num_m * num_n if PERSISTENT else first + 1
        step = tl.num_programs(0) if PERSISTENT else 1
        for turn in tl.range(first, last, step, flatten=UV == "steps"):
            item = turn
            tile = turn
            part = 0
            if SPLIT:
                tile = turn // parts[3]
                part = turn % parts[3]
            if U == "awaited":
                item = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
                tile = item - producers
                if item < producers:
                    source = item // R_BLOCKS
                    tokens, row_mask = shrink_tile(
                        gather_x if SEGMENTS else x, a, u, gather, adapters, stride_ae, scales_ptr, ranks_ptr, seed, threshold, scale,
                        source, (item % R_BLOCKS) * BLOCK_R, 0, K, M, K, R,
                        LOAD_X, SEGMENTS, DROP_X, PRECISION, GATHER_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, WIDE,
                    )  # fmt: skip
                    tl.debug_barrier()
                    if SEGMENTS:  # a row block is ready when each of its tokens is
                        tl.atomic_add(flag_ptr + tokens // BLOCK_M, 1, mask=row_mask, sem="release", scope="gpu")
                    else:
                        tl.atomic_add(flag_ptr + source, 1, sem="release", scope="gpu")
            # The condition is true for u in the loop, too, but Triton 3.6 compiles its dots in a straight line to nothing on sm_100.
            if U == "given" or (tile >= 0) & (tile < num_m * num_n):
                pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
                expand_tile(
                    x, w, a, u, v, bias_ptr, y, rows, stride_ve, scales_ptr, ranks_ptr, flag_ptr,
                    parts, part, blocks_per_part, seed, threshold, inv_keep, scale, pid_m, pid_n, M, N, K, R, ends, period,
                    LOAD_X, LOAD_W, LOAD_U, U, SEGMENTS, MASKED, EACH, SPLIT, EXACT, ADD, SAVE_U, DROP_X, DROP_UV, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, R_BLOCKS, EVEN_N, EVEN_K, EVEN_R, WIDE, UV, WAIT,
                )  # fmt: skip

"""scale_columns: ``dt = g dY`` and ``dg = sum over tokens of dY t``: the magnitude of DoRA in the backward pass, from one read of dY and t.

Tokens are split over programs, and each split writes its float32 sum, to be added in a fixed order, as wgrad's are.
"""

import triton
import triton.language as tl

from .load import load_dense, tile_mask, tile_ptrs


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def scale_columns(
    dy, t, g_ptr, dt, dg, M, N, blocks_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid [column blocks, splits of the tokens]. dt: None, or where it goes; t and dg ``[splits, N]``: None, or both."""
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    g = tl.load(g_ptr + n, mask=n < N, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    m_start = split * blocks_per_split * BLOCK_M
    for m0 in tl.range(m_start, tl.minimum(m_start + blocks_per_split * BLOCK_M, M), BLOCK_M):
        # [BLOCK_M, BLOCK_N]
        dy_tile = load_dense(dy, m0, n0, M, N, BLOCK_M, BLOCK_N, False, EVEN_N, WIDE).to(tl.float32)
        if t is not None:
            acc += dy_tile * load_dense(t, m0, n0, M, N, BLOCK_M, BLOCK_N, False, EVEN_N, WIDE)
        if dt is not None:
            out = (dy_tile * g[None, :]).to(dt[0].dtype.element_ty)
            tl.store(tile_ptrs(dt, m0, n0, BLOCK_M, BLOCK_N, WIDE), out, mask=tile_mask(m0, n0, M, N, BLOCK_M, BLOCK_N))
    if dg is not None:
        tl.store(dg + split * N + n, tl.sum(acc, 0), mask=n < N)

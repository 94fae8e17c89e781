"""Tile loaders: ``LOAD(t, i0, j0, I, J, ...) -> [BLOCK_I, BLOCK_J]``, zero out of range.

A matrix is passed as a loader and its argument, a tuple or a descriptor, so that how an operand is stored is a plug of the matmul bodies. A
descriptor is an argument of its own: Triton 3.6 launches none that lies in a tuple.
"""

import triton
import triton.language as tl


@triton.jit
def tile_offsets(stride_i, stride_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    return i[:, None] * stride_i + j[None, :] * stride_j


@triton.jit
def tile_base(ptr, i0, j0, stride_i, stride_j):
    """The tile's first element: always 64-bit, and scalar, so that it costs nothing in the tile's own offsets."""
    return ptr + tl.cast(i0, tl.int64) * stride_i + tl.cast(j0, tl.int64) * stride_j


@triton.jit
def tile_ptrs(t, i0, j0, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, WIDE: tl.constexpr):
    """Pointers ``[BLOCK_I, BLOCK_J]`` to a tile of t: (pointer, stride_i, stride_j)."""
    return tile_base(t[0], i0, j0, t[1], t[2]) + tile_offsets(t[1], t[2], BLOCK_I, BLOCK_J, WIDE)


@triton.jit
def tile_mask(i0, j0, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    return (i0 + tl.arange(0, BLOCK_I) < I)[:, None] & (j0 + tl.arange(0, BLOCK_J) < J)[None, :]


@triton.jit
def load_dense(
    t,
    i0,
    j0,
    I,
    J,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    WIDE: tl.constexpr,
    only=None,
):
    """Any strides. t: (pointer, stride_i, stride_j). EVEN_*: no mask needed. only: None, or what to read, [BLOCK_I, 1] or [1, BLOCK_J]."""
    # [BLOCK_I, BLOCK_J]
    ptrs = tile_ptrs(t, i0, j0, BLOCK_I, BLOCK_J, WIDE)
    if only is not None:
        return tl.load(ptrs, mask=only & tile_mask(i0, j0, I, J, BLOCK_I, BLOCK_J), other=0.0)
    if EVEN_I and EVEN_J:
        return tl.load(ptrs)
    if EVEN_J:
        return tl.load(ptrs, mask=(i0 + tl.arange(0, BLOCK_I) < I)[:, None], other=0.0)
    if EVEN_I:
        return tl.load(ptrs, mask=(j0 + tl.arange(0, BLOCK_J) < J)[None, :], other=0.0)
    return tl.load(ptrs, mask=tile_mask(i0, j0, I, J, BLOCK_I, BLOCK_J), other=0.0)


@triton.jit
def in_units(number, UNIT: tl.constexpr):
    """The number itself, a multiple of UNIT, said so that the compiler knows it; 1: nothing to say."""
    return number if UNIT == 1 else number // UNIT * UNIT


@triton.jit
def within_rank(r, rank, period, NEIGHBOURS: tl.constexpr = 1):
    """Which columns r of u an adapter of this rank has; period: of each that many, a packed layer's, or None.

    NEIGHBOURS: 8: or has one of the eight that 16 bytes hold. Loads masked by ranks of any size would take two bytes each.
    """
    r = r if period is None else r % period
    return (r if NEIGHBOURS == 1 else r // NEIGHBOURS * NEIGHBOURS) < rank


@triton.jit
def any_within_rank(r0, rank, period, BLOCK_R: tl.constexpr):
    """Whether any of these columns is."""
    return r0 < rank if period is None else (r0 % period < rank) | (r0 % period + BLOCK_R > period)


@triton.jit
def load_v(
    v, r0, n0, R, N, rank, period, NEIGHBOURS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_R: tl.constexpr, EVEN_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_N] of an adapter's v, zero beyond its rank. period, NEIGHBOURS: as in `within_rank`; 0: it has all of R."""
    if NEIGHBOURS == 0:
        return load_dense(v, r0, n0, R, N, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE)
    r = (r0 + tl.arange(0, BLOCK_R))[:, None]
    tile = load_dense(v, r0, n0, R, N, BLOCK_R, BLOCK_N, EVEN_R, EVEN_N, WIDE, within_rank(r, rank, period, NEIGHBOURS))
    if NEIGHBOURS == 1:
        return tile
    return tl.where(within_rank(r, rank, period), tile, 0.0)


@triton.jit
def load_descriptor(
    t,
    i0,
    j0,
    I,
    J,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    WIDE: tl.constexpr,
):
    """By the bulk tensor copy engine, from a matrix contiguous along j. t: descriptor of [I, J] in blocks [BLOCK_I, BLOCK_J]."""
    return t.load([tl.cast(i0, tl.int32), tl.cast(j0, tl.int32)])


@triton.jit
def load_descriptor_transposed(
    t,
    i0,
    j0,
    I,
    J,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same, from a matrix contiguous along i. t: descriptor of [J, I] in blocks [BLOCK_J, BLOCK_I]."""
    return t.load([tl.cast(j0, tl.int32), tl.cast(i0, tl.int32)]).T


@triton.jit
def row_offsets(t, rows, j0):
    """Pointers [BLOCK_I, 1] to column j0 of these rows, each row's offset in 64 bits."""
    return (t[0] + tl.cast(j0, tl.int64) * t[2]) + (rows.to(tl.int64) * t[1])[:, None]


@triton.jit
def load_rows(t, rows, row_mask, j0, J, BLOCK_J: tl.constexpr, EVEN_J: tl.constexpr, WIDE: tl.constexpr):
    """Gathered rows, any strides: [BLOCK_I, BLOCK_J], zero where row_mask says so. rows, row_mask: [BLOCK_I]."""
    j = tl.arange(0, BLOCK_J)
    mask = row_mask[:, None]
    if not EVEN_J:
        mask = mask & (j0 + j < J)[None, :]
    if WIDE:
        j = j.to(tl.int64)
    return tl.load(row_offsets(t, rows, j0) + j[None, :] * t[2], mask=mask, other=0.0)


@triton.jit
def one_part(t, part):
    return t[0] + tl.cast(part, tl.int64) * t[3], t[1], t[2]


@triton.jit
def load_parts(
    t, i0, j0, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The float32 sum, in order, of partial matrices. t: (pointer, stride_i, stride_j, stride_part, parts)."""
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for part in tl.range(0, t[4]):
        total += load_dense(one_part(t, part), i0, j0, I, J, BLOCK_I, BLOCK_J, EVEN_I, EVEN_J, WIDE)
    return total


@triton.jit
def few_parts(
    t, i0, j0, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr, WIDE: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """The same sum of at most MOST parts, all of them on their way at once, where a loop waits for every fourth."""
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for part in tl.static_range(MOST):
        here = tl.full([1, 1], part, tl.int32) < t[4]
        total += load_dense(one_part(t, part), i0, j0, I, J, BLOCK_I, BLOCK_J, EVEN_I, EVEN_J, WIDE, here)
    return total


@triton.jit
def load_8_parts(
    t, i0, j0, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return few_parts(t, i0, j0, I, J, BLOCK_I, BLOCK_J, EVEN_I, EVEN_J, WIDE, 8)


@triton.jit
def load_16_parts(
    t, i0, j0, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return few_parts(t, i0, j0, I, J, BLOCK_I, BLOCK_J, EVEN_I, EVEN_J, WIDE, 16)


@triton.jit
def load_32_parts(
    t, i0, j0, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return few_parts(t, i0, j0, I, J, BLOCK_I, BLOCK_J, EVEN_I, EVEN_J, WIDE, 32)

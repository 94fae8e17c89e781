"""What a launch is, from shapes, strides and dtypes alone: its grid, its numbers and its constexprs.

A call of a kernel has some thirty numbers and as many constexprs; to work them out takes longer than a small layer does on a GPU. These
functions see no tensor, so that whatever they return holds for every call with equal arguments, and an arm keeps it (`dispatch`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .kernels.load import load_8_parts, load_16_parts, load_32_parts, load_dense, load_descriptor, load_descriptor_transposed, load_parts
from .kernels.overlap import in_order, let_next_begin, wait_for_previous, wait_then_let_next_begin
from .operands import Many, Matrix, flat, lead
from .packed import cut
from .tuning import Config, rank_block
from .tuning.validity import LOOP_RANK, MIXED_RANK, TILE_RANK, closes, each_ranks

INT32 = 1 << 31
RESIDENT = 228 << 10  # bytes of shared memory of a multiprocessor: an estimate of how many programs begin at once
PARTS_REGISTERS = 64  # of a thread, for parts of u that are loaded beside its K loop
SPLIT_ADAPTERS = 64  # adapters times splits of their tokens, at most: partial sums cost a stack of gradients each


class Options(dict):
    """A launch's constexprs and options. slots, compiled: by `launcher`, where its tensors are, and what Triton compiled for them."""

    def __init__(self, **options):
        super().__init__(options, enable_fp_fusion=True)  # said, for Triton's own default changes with 3.10, and 3.9 warns of it
        self.slots: list | None = None
        self.compiled: dict[tuple, tuple] = {}


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; Triton's own costs microseconds where it is called from Python."""
    return -(-a // b)


def split_axis(length: int, block: int, wanted: int) -> tuple[int, int]:
    """(blocks a split, splits) of an axis: no more splits than wanted, and none of them empty."""
    blocks = cdiv(length, block)
    per_split = cdiv(blocks, wanted)
    return per_split, cdiv(blocks, per_split)


def wide(*tiles: tuple[tuple[int, ...] | None, int]) -> bool:
    """Whether an offset inside a tile of a matrix of these strides passes 2^31; the offset of a tile itself is always 64-bit."""
    return any(strides is not None and (strides[-2] + strides[-1]) * block >= INT32 for strides, block in tiles)


def unit(number: int, near: int = 1) -> int:
    """The power of two up to 8 that a number of ranks, or the stride of rows whose ranks lie near each other (1), is a multiple of.

    1 where there is nothing to say: Triton itself looks for multiples of 16, of them alone. Of ranks below it, and of 24, it would load
    one at a time.
    """
    return 1 if near != 1 or number % 16 == 0 else min(8, number & -number)


def stack_stride(strides: tuple[int, ...]) -> int:
    """The elements from one adapter to the next."""
    return strides[0] if len(strides) == 3 else 0


def _period(R: int, adapters: Many, widths) -> int | None:
    """How many of R columns of u are a packed layer's, where an adapter's own rank ends each. widths: set where R is one layer's alone."""
    return R // adapters.layers if adapters.ranked and adapters.widths and not widths else None


def _overlapped(interpreted: bool, **plugs) -> dict:
    """The options of a launch that begins while the one before it runs, with the functions by which it waits."""
    return dict.fromkeys(plugs, in_order) if interpreted else plugs | dict(launch_pdl=True)


class ShrinkLayout(NamedTuple):
    """shape, dtype: of z where it is to be made, its rows cut to M; x, a, z, stride_split: as the kernel's; sizes: its last arguments."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    M: int
    splits: int
    x: tuple[int, ...]
    a: tuple[int, ...]
    z: tuple[int, ...]
    stride_split: int
    stride_ae: int
    sizes: tuple
    grid: tuple[int, int, int]
    options: Options


def shrink(
    config: Config, x: Matrix, a: Matrix, transposed: bool, out: Matrix | None, dtype, widths, adapters: Many, dropout: bool,
    precision: str, interpreted: bool,
) -> ShrinkLayout:  # fmt: skip
    """Of `launch.run_shrink`."""
    c = config.shrink
    (rows_of_x, K), x_strides, _ = flat(x)
    M = adapters.tokens or rows_of_x
    R, a_strides, layers = a[0][-2 if transposed else -1], _turned(a[1], transposed), len(widths) or 1
    block_r = rank_block(R, TILE_RANK if adapters.ranked else 128)
    ends, _, even = cut(widths, K, c.block_k)
    blocks, splits = split_axis(max(widths) if widths else K, c.block_k, c.split)
    # Partial sums lie a multiple of 16 rows apart: their stride compiles one kernel then, whatever M and R.
    rows = M if splits == 1 else 16 * cdiv(M, 16)
    whole = splits == 1 and out is not None
    options = Options(
        LOAD_X=load_dense, SEGMENTS=adapters.tokens > 0, DROPOUT=dropout, PRECISION=precision,
        BLOCK_M=c.block_m, BLOCK_K=c.block_k, BLOCK_R=block_r, EVEN_K=even, EVEN_R=R % block_r == 0,
        WIDE=wide((x_strides, max(c.block_m, c.block_k)), (a_strides, c.block_k)), FAN=M // rows_of_x,
        LET_GO=None if not config.expand.pdl else in_order if interpreted else let_next_begin,
        UNIT=unit(R), UNIT_A=unit(*a_strides[-2:]),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    tiles = adapters.tiles if adapters.tokens else cdiv(M, c.block_m)
    return ShrinkLayout(
        None if whole else (M, R * layers) if splits == 1 else (splits, rows, R * layers),
        torch.float32 if splits > 1 else dtype,
        M,
        splits,
        x_strides,
        a_strides[-2:],
        (R * layers, 1) if out is None or not whole else out[1],
        rows * R * layers if splits > 1 else 0,
        stack_stride(a_strides),
        (M, K, R, ends, _period(R, adapters, widths), blocks),
        (tiles, layers * cdiv(R, block_r), splits),
        options,
    )


ADDED = 1024  # elements of a program of `add_parts`


def add_parts(*lengths: int) -> tuple[tuple[int], int, Options]:
    """The grid, how many of its programs are the first sum's, and the options of `launch.add_up`."""
    blocks = [cdiv(length, ADDED) for length in lengths]
    return (sum(blocks),), blocks[0], Options(BLOCK=ADDED, num_warps=4)


class WgradLayout(NamedTuple):
    """shape: of the result, of which each split makes a part; out, stride_split, stride_oe: as the kernel's; sizes: its last arguments."""

    shape: tuple[int, ...]
    splits: int
    x: tuple[int, ...]
    g: tuple[int, ...]
    out: tuple[int, ...]
    stride_split: int
    stride_oe: int
    sizes: tuple
    grid: tuple[int, int, int]
    options: Options


def wgrad(
    config: Config, x: Matrix, g: Matrix, out_transposed: bool, adapters: Many, dropout: bool, precision: str, beside: bool,
    interpreted: bool,
) -> WgradLayout:  # fmt: skip
    """Of `launch.prepare_wgrad`."""
    c, E = config.wgrad, adapters.number
    (rows_of_x, J), x_strides, _ = flat(x)
    (M, columns_of_g), g_strides, _ = flat(g)
    widths = () if out_transposed else adapters.widths  # of dY's columns
    R = columns_of_g // (len(widths) or 1)
    ends, columns, even = cut(widths, J, c.block_j)
    block_r = rank_block(R, TILE_RANK if adapters.ranked else 128)
    blocks, splits = split_axis(M, c.block_m, c.split)
    if adapters.tokens:  # every adapter's tokens are split alike, for how many they are is known on the device alone
        splits = max(1, min(splits, SPLIT_ADAPTERS // E))
    strides = (1, J) if out_transposed else (R, 1)
    options = Options(
        SEGMENTS=adapters.tokens > 0, DROPOUT=dropout, PRECISION=precision, BLOCK_M=c.block_m, BLOCK_J=c.block_j, BLOCK_R=block_r,
        EVEN_J=even, EVEN_R=R % block_r == 0,
        WIDE=wide((x_strides, max(c.block_m, c.block_j)), (strides, c.block_j)), LET_GO=None, WAIT=None,
        UNIT=unit(R), UNIT_G=unit(*g_strides),
        FAN=M // rows_of_x, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if beside:
        options.update(_overlapped(interpreted, LET_GO=let_next_begin, WAIT=wait_for_previous))
    stack = (E,) if adapters.tokens else ()
    return WgradLayout(
        (*stack, R, J) if out_transposed else (*stack, J, R),
        splits,
        x_strides,
        g_strides,
        strides,
        E * J * R,
        J * R,
        (M, J, R, ends, _period(R, adapters, widths), blocks),
        (E * columns, cdiv(R, block_r), splits),
        options,
    )


class ExpandLayout(NamedTuple):
    """y, u: their shapes where they are to be made. flags: how many; splits: of K, each with a partial sum to be made; 0 for none.

    boxes: of the descriptors of x and w, and whether each is of the transposed matrix; None for pointers. The rest: the kernel's arguments.
    """

    y: tuple[int, ...] | None
    u: tuple[int, int] | None
    flags: int
    splits: int
    boxes: tuple | None
    x: tuple[int, ...]
    w: tuple[int, ...]
    a: tuple[int, ...]
    u_args: tuple[int, ...]
    v: tuple[int, ...]
    y_args: tuple[int, ...]
    stride_ae: int
    stride_ve: int
    gathered: int
    blocks_per_part: int
    late: int | None
    sizes: tuple
    grid: tuple[int]
    options: Options


def expand(
    config: Config, x: Matrix, w: Matrix | None, v: Matrix, a: Matrix | None, u: Matrix | None, base: Matrix | None, out: Matrix | None,
    onto: bool, transposed: bool, exact: bool, drop_x: bool, drop_uv: bool, adapters: Many, precision: str, sms: int, interpreted: bool,
    aligned: bool,
) -> ExpandLayout:  # fmt: skip
    """Of `launch.run_expand`. aligned: Whether u and v are known to begin at multiples of 16 bytes, as descriptors want it."""
    c = config.expand
    (M, K), x_strides, x_dtype = flat(x)
    w_strides, v_strides = None if w is None else _turned(w[1], transposed), _turned(v[1], transposed)
    R, N = v[0][-2:][::-1] if transposed else v[0][-2:]
    a_strides = () if a is None else _turned(a[1], transposed)
    narrow = exact or (w is None and x_dtype.itemsize == 4)  # float32 products are unrolled as deep as this
    block_r = (
        each_ranks(c, R, x_dtype.itemsize)
        if c.each
        else rank_block(R, 32 if narrow else LOOP_RANK if c.u == "loop" else MIXED_RANK if adapters.ranked else TILE_RANK)
    )
    r_blocks = cdiv(R, block_r)
    # Neither is read before what it waits for: beside a shrink that runs yet (pdl), which began after the launch that wrote it had ended.
    # The first term costs fewer registers; with dropout, whose mask comes before the first product, the last does.
    add = None if not onto else "last" if drop_uv else "first"
    y_strides = (N, 1) if out is None else flat(out)[1]
    widths = adapters.widths if transposed else ()  # of w's columns
    ends, columns, even = cut(widths, N, c.block_n)
    num_m, tiles = cdiv(M, c.block_m), cdiv(M, c.block_m) * columns
    items, flags, u_shape = tiles, 0, None
    if c.u == "awaited":
        items += (adapters.tiles if adapters.tokens else num_m) * r_blocks
        flags = num_m
    if c.u == "awaited" and u is None:
        u_shape = (M, R)
    blocks_per_part, splits = 0, 0
    if c.split > 1:
        blocks_per_part, splits = split_axis(K, c.block_k, c.split)
        items = tiles * (splits + 1)
    boxes, load_x, load_w = None, None, None
    base_strides = None if base is None else flat(base)[1]
    reached = (x_strides, w_strides, base_strides, v_strides, y_strides)
    if base_strides is not None:
        load_x, x_strides = load_dense, base_strides
    elif w_strides is not None:
        load_x = load_w = load_dense
        if c.tma:
            boxes = _box(x_strides, c.block_m, c.block_k), _box(w_strides, c.block_k, c.block_n)
            load_x, load_w = (load_descriptor_transposed if flip else load_descriptor for _, flip in boxes)
    load_u: Any = load_dense
    u_args: tuple[int, ...] = (R, 1)
    if u is not None:
        u_args = u[1]
        if len(u[0]) == 3:
            load_u = _parts_loader(u[0][0], c.block_m * block_r // (32 * c.num_warps))
            u_args = (*u[1][1:], u[1][0], u[0][0])
    late = None
    if config.wgrad.beside == "pdl":
        late = sms * max(1, RESIDENT // (c.num_stages * (c.block_m + c.block_n) * c.block_k * x_dtype.itemsize))
    uv = "first"  # with segments, a mask or a tile that leaves no registers for more
    if c.u == "given" and load_w is not None and not drop_uv:
        one = not (adapters.tokens or ends or c.pdl) and aligned and c.persistent
        if one and boxes is not None and _same_boxes(boxes, u, v, v_strides, x_dtype):
            uv = "steps"
        elif closes(c, R, x_dtype.itemsize, adapters.tokens > 0, drop_uv):
            uv = "last"
    blocks = max(c.block_m, c.block_n, c.block_k)
    options = Options(
        LOAD_X=load_x, LOAD_W=load_w, LOAD_U=load_u, U=c.u, SEGMENTS=adapters.tokens > 0, MASKED=c.masked, EACH=c.each,
        SPLIT=splits > 0, EXACT=exact, ADD=add, SAVE_U=c.u == "loop" and u is not None, DROP_X=drop_x and c.u != "given",
        DROP_UV=drop_uv, PRECISION="ieee" if exact else precision,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=block_r,
        R_BLOCKS=r_blocks, GROUP_M=c.group_m, GATHER_M=adapters.gather_block if adapters.tokens else c.block_m,
        EVEN_N=even, EVEN_K=K % c.block_k == 0, EVEN_R=R % block_r == 0,
        WIDE=wide(*((strides, blocks) for strides in reached)), PERSISTENT=c.persistent, UV=uv, WAIT=None,
        UNIT=unit(R), UNIT_A=unit(*a_strides[-2:]) if a_strides else 1,
        UNIT_U=1 if uv == "steps" or u is None is u_shape else unit(*u_args[:2]),
        UNIT_V=1 if uv == "steps" else unit(v_strides[-1], v_strides[-2]),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if c.pdl:
        options.update(_overlapped(interpreted, WAIT=wait_for_previous if late is None else wait_then_let_next_begin))
    return ExpandLayout(
        (*x[0][:-1], N) if out is None else None,
        u_shape,
        flags,
        splits,
        boxes,
        x_strides,
        w_strides or (),
        a_strides[-2:],
        u_args,
        v_strides[-2:],
        y_strides,
        stack_stride(a_strides),
        stack_stride(v_strides),
        adapters.tiles,
        blocks_per_part,
        late,
        (M, N, K, R, ends, _period(R, adapters, widths)),
        (min(items, sms) if c.persistent else items,),
        options,
    )


class ExpertsLayout(NamedTuple):
    """y: its shape; x, w, u, v: strides; sizes: the kernel's last arguments."""

    y: tuple[int, ...]
    x: tuple[int, ...]
    w: tuple[int, ...]
    u: tuple[int, ...]
    v: tuple[int, ...]
    sizes: tuple[int, int, int]
    grid: tuple[int]
    options: Options


def experts(config: Config, x: Matrix, w: Matrix, u: Matrix, v: Matrix, adapters: Many, drop_uv: bool, precision: str) -> ExpertsLayout:
    """Of `launch_experts.run_experts`."""
    c = config.expand
    (rows_of_x, K), x_strides, x_dtype = flat(x)
    (M, R), N = u[0], v[0][-1]
    fan = M // rows_of_x
    block_r = rank_block(R, 32 if x_dtype.itemsize == 4 else TILE_RANK)
    options = Options(
        DROP_UV=drop_uv, PRECISION=precision,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=block_r, R_BLOCKS=cdiv(R, block_r), GROUP_M=c.group_m,
        EVEN_N=N % c.block_n == 0, EVEN_K=K % c.block_k == 0, EVEN_R=R % block_r == 0,
        WIDE=wide((x_strides, c.block_k), (w[1], max(c.block_n, c.block_k)), (v[1], max(c.block_n, block_r)), ((N, 1), c.block_n)),
        UNIT=unit(R), UNIT_U=unit(*u[1]), UNIT_V=unit(v[1][-1], v[1][-2]),
        FAN=fan, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    grid = (adapters.tiles * cdiv(N, c.block_n),)
    return ExpertsLayout((*lead(x[0], fan), N), x_strides, w[1], u[1], v[1], (N, K, R), grid, options)


def _turned(strides: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """The strides of a matrix, or of each of a stack, the other way round."""
    return (*strides[:-2], strides[-1], strides[-2]) if transposed else strides


def _parts_loader(parts: int, registers: int):
    """The loader that adds so many parts of u, each of this many registers a thread, with all on their way if there is room for them."""
    for most, loader in ((8, load_8_parts), (16, load_16_parts), (32, load_32_parts)):
        if parts <= most and most * registers <= PARTS_REGISTERS:
            return loader
    return load_parts


def _same_boxes(boxes: tuple, u: Matrix | None, v: Matrix, v_strides: tuple[int, ...], dtype) -> bool:
    """Whether descriptors with the boxes of x and w, turned as theirs are, can read u and v, too."""
    if u is None or len(u[0]) != 2 or len(v[0]) != 2 or {u[2], v[2]} != {dtype}:
        return False
    (_, x_turned), (_, w_turned) = boxes
    rows, near = zip(*(strides[::-1] if turned else strides for strides, turned in ((u[1], x_turned), (v_strides, w_turned))), strict=True)
    return near == (1, 1) and all(row > 0 and row * dtype.itemsize % 16 == 0 for row in rows)


def _box(strides: tuple[int, ...], block_i: int, block_j: int) -> tuple[tuple[int, int], bool]:
    """The box of a matrix's descriptor, which is of the transposed matrix where that is contiguous."""
    return ((block_i, block_j), False) if strides[1] == 1 else ((block_j, block_i), True)

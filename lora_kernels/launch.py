"""Tensors + Config -> ``kernel[grid]``: the only place that launches.

    forward    U = shrink(x, A), Y = expand(x, W^T, U, B^T)          or one launch, with u in the loop or awaited
    backward   dS = shrink(dY, B^T), dX = expand(dY, W, dS, A), dA = wgrad(x, dS), dB = wgrad(dY, U)

Inside the kernels letters are GEMM roles, so a transposition here is a pair of strides in the other order. With segments adapters
are stacks, ``[E, r, K]`` and ``[E, N, r]``, and each kernel takes its part of the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import philox
from .kernels.expand import expand
from .kernels.load import load_dense, load_descriptor, load_descriptor_transposed, load_parts
from .kernels.overlap import in_order, let_next_begin, wait_for_previous, wait_then_let_next_begin
from .kernels.shrink import shrink
from .kernels.wgrad import wgrad
from .packed import cut
from .segments import ONE, Adapters
from .streams import beside, fork, on_device, sm_count
from .tuning import MERGE, Config, rank_block
from .tuning.validity import LOOP_RANK, MIXED_RANK, TILE_RANK

INT32 = 1 << 31
RESIDENT = 228 << 10  # bytes of shared memory of a multiprocessor: an estimate of how many programs begin at once
SPLIT_ADAPTERS = 64  # so few adapters that their tokens are split over programs, too: partial sums cost a stack of gradients each


def _device_launch(kernel, grid, args, options):
    kernel[grid](*args, **options)


_launch: Callable = _device_launch
launches: int = 0  # kernels launched by this process: what a test asserts to know that a kernel ran, not its fallback


@contextlib.contextmanager
def intercept(function: Callable):
    """Hand every launch to ``function(kernel, grid, args, options)`` instead: what compile_only and tests record."""
    global _launch
    before, _launch = _launch, function
    try:
        yield
    finally:
        _launch = before


def _run(kernel, grid, args, options) -> None:
    global launches
    launches += 1
    options["enable_fp_fusion"] = True  # said, for Triton's own default changes with 3.10, and 3.9 warns of it
    _launch(kernel, grid, args, options)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which knows no programmatic dependent launch."""
    return triton.knobs.runtime.interpret


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input precision: float32 products follow torch's own switch, so that they are TF32 only where torch's are."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _matrix(t: torch.Tensor) -> tuple:
    """The argument tuple of `load_dense`: pointer and the strides of the last two axes."""
    return (t, t.stride(-2), t.stride(-1))


def _stack_stride(t: torch.Tensor | None) -> int:
    """The elements from one adapter to the next."""
    return t.stride(0) if t is not None and t.dim() == 3 else 0


def fan_of(x: torch.Tensor, segments) -> int:
    """How many of a plan's tokens a row of x stands for."""
    return 1 if segments is None else segments.tokens // x.shape[0]


def _wide(*tiles: tuple[torch.Tensor | None, int]) -> bool:
    """Whether an offset inside one tile passes 2^31; the offset of a tile itself is always 64-bit."""
    for t, block in tiles:
        if t is not None and (t.stride(-2) + t.stride(-1)) * block >= INT32:
            return True
    return False


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; Triton's own costs microseconds where it is called from Python."""
    return -(-a // b)


def _split(length: int, block: int, wanted: int) -> tuple[int, int]:
    """(blocks a split, splits) of an axis: no more splits than wanted, and none of them empty."""
    blocks = cdiv(length, block)
    per_split = cdiv(blocks, wanted)
    return per_split, cdiv(blocks, per_split)


def run_shrink(
    x, a, *, scale: float, adapters: Adapters = ONE, dropout, config: Config, dtype: torch.dtype, parts: bool = False, out=None, widths=()
):  # fmt: skip
    """``scale * (D.x) a`` as ``[M, R]`` in ``dtype``. x: ``[M, K]``, a: ``[(E,) K, R]``, any strides. dropout: None or (seed, p).

    Where the plan has k times as many tokens, each row of x stands for k.

    parts: Return float32 ``[splits, M, R]``, not yet added, where K was split. out: ``[M, R]`` to write to, by its strides. widths: Of L
    packed layers whose columns x's are: ``[M, L R]`` then, each layer's from its own.
    """
    c, seg = config.shrink, adapters.segments
    fan = fan_of(x, seg)
    M, K = x.shape[0] * fan, x.shape[1]
    R, layers = a.shape[-1], len(widths) or 1
    block_r = rank_block(R, TILE_RANK if adapters.ranks is not None else 128)
    ends, _, even = cut(widths, K, c.block_k)
    blocks, splits = _split(max(widths) if widths else K, c.block_k, c.split)
    # Partial sums lie a multiple of 16 rows apart: their stride compiles one kernel then, whatever M and R.
    rows = M if splits == 1 else 16 * cdiv(M, 16)
    whole = splits == 1 and out is not None
    z = out[None] if whole else x.new_empty(splits, rows, R * layers, dtype=torch.float32 if splits > 1 else dtype)[:, :M]
    seed, threshold, inv_keep = _dropout(dropout)
    args = (
        _matrix(x), _matrix(a), _matrix(z), z.stride(0) if splits > 1 else 0,
        adapters.gather(), adapters.number, _stack_stride(a), adapters.scales, adapters.ranks,
        seed, threshold, scale * inv_keep, M, K, R, ends, _period(adapters, R, widths), blocks,
    )  # fmt: skip
    options = dict(
        LOAD_X=load_dense, SEGMENTS=seg is not None, DROPOUT=dropout is not None, PRECISION=precision(x.dtype),
        BLOCK_M=c.block_m, BLOCK_K=c.block_k, BLOCK_R=block_r,
        EVEN_K=even, EVEN_R=R % block_r == 0 and adapters.ranks is None,
        WIDE=_wide((x, max(c.block_m, c.block_k)), (a, c.block_k)), LET_GO=None, FAN=fan, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    tiles = cdiv(M, c.block_m) if seg is None else seg.tile_adapter.shape[0]
    if config.expand.pdl:
        options["LET_GO"] = in_order if interpreted() else let_next_begin
    _run(shrink, (tiles, layers * cdiv(R, block_r), splits), args, options)
    if out is not None:
        return out if whole else out.copy_(z.sum(0))
    return z if parts and splits > 1 else z[0] if splits == 1 else z.sum(0).to(dtype)


def _period(adapters: Adapters, R: int, widths) -> int | None:
    """How many of R columns of u are a packed layer's, where an adapter's own rank ends each. widths: set where R is one layer's alone."""
    return R // adapters.layers if adapters.ranks is not None and adapters.widths and not widths else None


def run_wgrad(*args, **kwargs) -> torch.Tensor:
    """`prepare_wgrad`'s result, launched at once."""
    start, total = prepare_wgrad(*args, **kwargs)
    start(False)
    return total()


def prepare_wgrad(
    x, g, *, scale: float, adapters: Adapters = ONE, dropout, config: Config, out_transposed: bool, dtype: torch.dtype
) -> tuple[Callable[[bool], None], Callable[[], torch.Tensor]]:
    """``start(beside)``, which launches, and ``total()``: ``scale * (D.x)^T g`` as ``[(E,) J, R]``, or ``[(E,) R, J]`` if transposed, in
    ``dtype``, from float32 sums in a fixed order.

    beside: The launch may run while expand still does. Memory for it is taken here, before expand is launched, for afterwards the
    allocator might hand out what expand yet reads.
    """
    c, seg, E = config.wgrad, adapters.segments, adapters.number
    J, M = x.shape[1], g.shape[0]
    widths = () if out_transposed else adapters.widths  # of dY's columns
    R = g.shape[1] // (len(widths) or 1)
    ends, columns, even = cut(widths, J, c.block_j)
    block_r = rank_block(R, TILE_RANK if adapters.ranks is not None else 128)
    blocks, splits = _split(M, c.block_m, c.split)
    if seg is not None:  # every adapter's tokens are split alike, for how many they are is known on the device alone
        splits = max(1, min(splits, SPLIT_ADAPTERS // E))
    shape = (splits, E, R, J) if out_transposed else (splits, E, J, R)
    out = x.new_empty(shape, dtype=torch.float32 if splits > 1 else dtype)

    def start(beside: bool) -> None:
        seed, threshold, inv_keep = _dropout(dropout)
        strides = (1, J) if out_transposed else (R, 1)
        starts, order = (None, None) if seg is None else (seg.starts, seg.order)
        args = (
            _matrix(x), _matrix(g), (out, *strides), out.stride(0), starts, order, out.stride(1), adapters.ranks,
            seed, threshold, scale * inv_keep, M, J, R, ends, _period(adapters, R, widths), blocks,
        )  # fmt: skip
        options = dict(
            SEGMENTS=seg is not None, DROPOUT=dropout is not None, PRECISION=precision(x.dtype), BLOCK_M=c.block_m, BLOCK_J=c.block_j,
            BLOCK_R=block_r, EVEN_J=even, EVEN_R=R % block_r == 0 and adapters.ranks is None,
            WIDE=_wide((x, max(c.block_m, c.block_j)), (out, c.block_j)), LET_GO=None, WAIT=None,
            FAN=fan_of(x, seg), num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        if beside:
            options |= _overlapped(LET_GO=let_next_begin, WAIT=wait_for_previous)
        _run(wgrad, (E * columns, cdiv(R, block_r), splits), args, options)

    def total() -> torch.Tensor:
        summed = out[0] if splits == 1 else out.sum(0).to(dtype)
        return summed[0] if seg is None else summed

    return start, total


def _overlapped(**plugs) -> dict:
    """The options of a launch that begins while the one before it runs, with the functions by which it waits."""
    return dict.fromkeys(plugs, in_order) if interpreted() else plugs | dict(launch_pdl=True)


def tile_counters(M: int, N: int, config: Config, device: torch.device, widths=()) -> torch.Tensor | None:
    """The zeroed counters of tiles whose K is split, or None. Made before shrink, so that nothing stands between two launches (pdl)."""
    c = config.expand
    return torch.zeros(cdiv(M, c.block_m) * cut(widths, N, c.block_n)[1], dtype=torch.int32, device=device) if c.split > 1 else None


def run_expand(
    x, w, v, *,
    transposed: bool, u, a=None, scale=1.0, adapters: Adapters = ONE, bias=None, base=None, out=None, onto=None, exact=False,
    drop_x=None, drop_uv=None, counters=None, config: Config,
):  # fmt: skip
    """``x w + D.(u v) + bias`` as ``[M, N]``, and u.

    w: ``[K, N]``, v: ``[(E,) R, N]``, a: ``[(E,) K, R]``, all three the other way round if transposed (as the parameters lie for the
    forward pass). u: ``[M, R]``, or float32 ``[parts, M, R]`` to be added, where it is given; a matrix to write it to, or None, where
    the kernel computes it. base: the base product, where the library made it. out: where the result goes, base itself too. onto: the same,
    and what is there is added. exact: u v in float32 whatever the dtypes. w and base None: ``D.(u v) + bias`` alone. drop_x, drop_uv:
    None or (seed, p). counters: `tile_counters`, made here where they are not given.
    """
    c, seg = config.expand, adapters.segments
    if transposed:
        w, v, a = None if w is None else w.t(), v.mT, None if a is None else a.mT
    (M, K), (R, N) = x.shape, v.shape[-2:]
    narrow = exact or (w is None and x.itemsize == 4)  # float32 products are unrolled as deep as this
    block_r = rank_block(R, 32 if narrow else LOOP_RANK if c.u == "loop" else TILE_RANK if adapters.ranks is None else MIXED_RANK)
    r_blocks = cdiv(R, block_r)
    out = out if onto is None else onto
    # Neither is read before what it waits for: beside a shrink that runs yet (pdl), which began after the launch that wrote it had ended.
    # The first term costs fewer registers; with dropout, whose mask comes before the first product, the last does.
    add = None if onto is None else "first" if drop_uv is None else "last"
    y = x.new_empty(M, N) if out is None else out
    widths = adapters.widths if transposed else ()  # of w's columns
    ends, columns, even = cut(widths, N, c.block_n)
    num_m, tiles = cdiv(M, c.block_m), cdiv(M, c.block_m) * columns
    gathered = seg.tile_adapter.shape[0] if seg else 0
    items, flags, ticket = tiles, None, None
    if c.u == "awaited":
        items += (gathered if seg else num_m) * r_blocks
        flags = torch.zeros(num_m + 1, dtype=torch.int32, device=x.device)
        flags, ticket = flags[:num_m], flags[num_m:]
        u = x.new_empty(M, R) if u is None else u
    blocks_per_part, parts = 0, None
    if c.split > 1:
        blocks_per_part, splits = _split(K, c.block_k, c.split)
        partial = x.new_empty(splits + 1, M, N, dtype=torch.float32)
        counters = tile_counters(M, N, config, x.device, widths) if counters is None else counters
        parts = (partial, partial.stride(0), counters, splits + 1)
        items = tiles * (splits + 1)
    seed, threshold, inv_keep = _dropout(drop_x or drop_uv)
    load_x, x_args, load_w, w_args = None, None, None, None
    if base is not None:
        load_x, x_args = load_dense, _matrix(base)
    elif w is not None:
        (load_x, x_args), (load_w, w_args) = _operand(x, c.block_m, c.block_k, c.tma), _operand(w, c.block_k, c.block_n, c.tma)
    load_u: Any = load_dense
    u_args: Any = None
    if u is not None and u.dim() == 3:
        load_u, u_args = load_parts, (u, u.stride(1), u.stride(2), u.stride(0), u.shape[0])
    elif u is not None:
        u_args = _matrix(u)
    late = None
    if config.wgrad.beside == "pdl":
        late = sm_count(x.device) * max(1, RESIDENT // (c.num_stages * (c.block_m + c.block_n) * c.block_k * x.itemsize))
    args = (
        x_args, w_args, None if a is None else _matrix(a), u_args, _matrix(v), bias, _matrix(y),
        adapters.rows(), _matrix(x) if seg and c.u == "awaited" else None, adapters.gather(), gathered, adapters.number,
        _stack_stride(a), _stack_stride(v), None if c.u == "given" else adapters.scales, adapters.ranks,
        flags, ticket, parts, blocks_per_part, late, seed, threshold, inv_keep, scale * (inv_keep if drop_x else 1.0), M, N, K, R,
        ends, _period(adapters, R, widths),
    )  # fmt: skip
    blocks = max(c.block_m, c.block_n, c.block_k)
    options = dict(
        LOAD_X=load_x, LOAD_W=load_w, LOAD_U=load_u, U=c.u, SEGMENTS=seg is not None, MASKED=c.masked, WALK=c.walk or None,
        SPLIT=parts is not None, EXACT=exact, ADD=add, SAVE_U=c.u == "loop" and u is not None,
        DROP_X=drop_x is not None and c.u != "given",
        DROP_UV=drop_uv is not None, PRECISION="ieee" if exact else precision(x.dtype),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=block_r,
        R_BLOCKS=r_blocks, GROUP_M=c.group_m, GATHER_M=c.block_m if seg is None else seg.gather_block,
        EVEN_N=even, EVEN_K=K % c.block_k == 0, EVEN_R=R % block_r == 0 and adapters.ranks is None,
        WIDE=_wide((x, blocks), (w, blocks), (base, blocks), (v, blocks), (y, blocks)), PERSISTENT=c.persistent,
        WAIT=None, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if c.pdl:
        options |= _overlapped(WAIT=wait_for_previous if late is None else wait_then_let_next_begin)
    programs = min(items, sm_count(x.device)) if c.persistent else items
    _run(expand, (programs,), args, options)
    return y, u


def _operand(t: torch.Tensor, block_i: int, block_j: int, descriptor: bool):
    """(loader, argument) of a matrix read in tiles ``[block_i, block_j]``: pointer and strides, or a descriptor."""
    if not descriptor:
        return load_dense, _matrix(t)
    if t.stride(1) == 1:
        return load_descriptor, TensorDescriptor.from_tensor(t, [block_i, block_j])
    return load_descriptor_transposed, TensorDescriptor.from_tensor(t.t(), [block_j, block_i])


def _dropout(dropout) -> tuple:
    """(seed, threshold, 1 / (1 - p)) as the kernels take them; dropout: None or (seed tensor, p)."""
    if dropout is None:
        return None, 0, 1.0
    seed, p = dropout
    return seed, philox.threshold_of(p), philox.inv_keep(p)


def down(x, lora_A, adapters: Adapters, scale: float, save_u: bool, config: Config):
    """``u = scale x A^T [M, R]``, in parts unless ``save_u``: of several layers of one x, for their `forward`, where none drops."""
    with on_device(x):
        return run_shrink(x, lora_A.mT, scale=scale, adapters=adapters, dropout=None, config=config, dtype=x.dtype, parts=not save_u)


def forward(
    x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale: float, p: float, save_u: bool, config: Config, base=None, u=None
):  # fmt: skip
    """``y [M, N]`` and ``u [M, r]`` (None unless ``save_u``) for x ``[M, K]``; p = 0: no dropout. base: as in `lora_linear`, ``[M, N]``.

    u: What `down` gave, for a configuration that takes it (``expand.u="given"``).
    """
    drop = (seed, p) if p else None
    shared: dict[str, Any] = dict(transposed=True, adapters=adapters, config=config)
    with on_device(x):
        if config.expand.u == "given":
            counters = tile_counters(x.shape[0], lora_B.shape[-2], config, x.device, adapters.widths)
            if u is None:
                u = run_shrink(
                    x, lora_A.mT, scale=scale, adapters=adapters, dropout=drop, config=config, dtype=x.dtype, parts=not save_u
                )  # fmt: skip
            if base is not None:
                return run_expand(x, None, lora_B, u=u, base=base, **shared)
            if config.expand.base == "library":
                y = F.linear(x, weight, bias)
                return run_expand(x, weight, lora_B, u=u, base=y, out=y, **shared)
            return run_expand(x, weight, lora_B, u=u, bias=bias, counters=counters, **shared)
        space = x.new_empty(x.shape[0], lora_A.shape[-2]) if save_u else None
        return run_expand(x, weight, lora_B, u=space, a=lora_A, scale=scale, bias=bias, drop_x=drop, **shared)


def backward(
    dy, x, weight, lora_A, lora_B, u, seed, adapters: Adapters, scale: float, p: float, needs, adapter_dtype, config: Config,
    onto=None, ds=None, all_ds=None,
):  # fmt: skip
    """``dX [M, K], dA [(E,) r, K], dB [(E,) N, r]``, each None where not in ``needs``; operands no needed gradient uses may be None.

    Without a weight dX is the adapter's part alone. onto: The dX of other layers of x, to which this one's is added. ds: ``[M, r]``,
    where dS is wanted, by columns of ``all_ds [M, R]`` of all these layers: dA is then of all their ranks.
    """
    need_dx, need_da, need_db = needs
    drop = (seed, p) if p else None
    shared: dict[str, Any] = dict(adapters=adapters, config=config)
    dx = None
    keep_ds = need_da or ds is not None
    with on_device(dy):
        one_launch = need_dx and config.expand.u != "given"
        counters = tile_counters(dy.shape[0], lora_A.shape[-1], config, dy.device) if need_dx else None
        if (need_dx or keep_ds) and not one_launch:
            ds = run_shrink(
                dy, lora_B, scale=scale, dropout=None, dtype=dy.dtype, parts=not keep_ds, out=ds, widths=adapters.widths, **shared
            )  # fmt: skip
        if one_launch and keep_ds and ds is None:
            ds = dy.new_empty(dy.shape[0], lora_B.shape[-1])
        gradients: dict[str, Any] = dict(scale=1.0, dtype=adapter_dtype, **shared)
        for_a = prepare_wgrad(x, ds if all_ds is None else all_ds, dropout=drop, out_transposed=True, **gradients) if need_da else None
        for_b = prepare_wgrad(dy, u, dropout=None, out_transposed=False, **gradients) if need_db else None
        forked = fork(dy) if need_dx and config.wgrad.beside == "stream" else None
        if one_launch:
            dx, _ = run_expand(dy, weight, lora_A, transposed=False, u=ds, a=lora_B, scale=scale, drop_uv=drop, onto=onto, **shared)
        elif need_dx:
            base = None
            if config.expand.base == "library" and weight is not None:
                base, onto = torch.mm(dy, weight) if onto is None else onto.addmm_(dy, weight), None
            dx, _ = run_expand(
                dy, weight, lora_A, transposed=False, u=ds, base=base, out=base, onto=onto, drop_uv=drop, counters=counters, **shared
            )  # fmt: skip
        with beside(forked):
            for start, _ in filter(None, (for_a, for_b)):
                start(need_dx and config.wgrad.beside == "pdl")
        da = for_a[1]() if for_a else None
        db = for_b[1]() if for_b else None
    return dx, da, db


def merge(weight, base, lora_A, lora_B, scale: float) -> None:
    """``weight := base + scale B A``, float32 sums rounded once. weight, base: ``[N, K]``, any strides, or one tensor."""
    with on_device(weight):
        u = lora_B.float() * scale
        run_expand(base, lora_A, lora_A, transposed=False, u=u, base=base, out=weight, exact=True, config=MERGE)

"""A configuration for any problem on any GPU, from first principles and what the compiler says; measured rows go before it.

Few tokens: the base product streams W once, and u is computed in the loop (one launch). Many tokens: the largest tile whose stages
fit the chip's shared memory, u given by a shrink that reads x at memory speed. Many adapters: the tiles are the plan's, and u is given;
where products are selected, which keeps a second accumulator, the tile is at most 128 x 128. Between tiles, and whether K is split over
programs, decides what the busiest multiprocessor fetches (`_fetched`).
"""

from __future__ import annotations

from dataclasses import replace

from ..problem import Problem
from .arch import Arch
from .config import Config, Expand, Shrink, Wgrad, rank_block
from .validity import closes, memory

# Stages where W is streamed once by narrow tiles: seven of 4 KiB on their way are 28 KiB a program. What a multiprocessor's share of the
# memory's bandwidth takes is 18 to 23 KiB on an H100 (3 TB/s, 132 of them, 0.8 to 1 us), and there may be one program on it.
STREAMED = 8
# What a multiprocessor fetches from the L2 cache while it could have fetched one byte of its share from memory (an H100: 70 to 75 KB a
# microsecond, as its published 128 x 256 products need, against 23 to 32 KB), and while a launch, or a split with its counters zeroed and
# its last program waiting for sums, takes 3.5 us. Estimates, to be replaced by measured rows.
OVER_MEMORY = 2.5
LAUNCH = SPLIT = 256 << 10
SPLITS = (2, 4, 8)
# W is read and written once, whatever its size; float32 products without a matmul instruction, for which small tiles hold.
MERGE = Config(expand=Expand(block_m=32, block_n=128, base="library", num_warps=4, num_stages=1))


def heuristic(problem: Problem, arch: Arch) -> Config:
    """Always answers, and always with a valid configuration: what does not fit is narrowed until it does."""
    config = Config(_shrink(problem, arch), _expand(problem, arch), _wgrad(problem, arch))
    while (name := next((name for name, need in memory(config, problem, arch) if need > arch.shared_memory), None)) is not None:
        part = getattr(config, name)
        narrower = _narrower(part, keep_rows=bool(problem.adapters) and name != "wgrad")
        if narrower == part:
            return config
        config = replace(config, **{name: narrower})
    return config


def _shrink(problem: Problem, arch: Arch) -> Shrink:
    # Memory-bound: x is read once, so rows per program are few enough to fill the chip, and few row blocks share K. From rank 64 on a
    # program would read more of A than of x: twice the rows, where they still fill it.
    drops = problem.dropout == "x"  # dS is of all dY
    tall = problem.tile_rank >= 64 and problem.itemsize == 2 and not drops and not problem.gather_block
    tall = tall and _fill(-(-problem.M // 64), arch)
    block_m = problem.gather_block or (64 if tall else 16 if problem.M <= 16 * arch.sms else 32)
    blocks = -(-problem.M // block_m)
    block_k = 64 if problem.itemsize == 4 or drops or (problem.adapters and problem.R > 32) else 128
    stages = 1 if block_m > 32 and drops else 3  # the dropped tile is a register operand: see why_not
    split = _split(blocks, problem.K, 4 * block_k, arch)
    if block_m >= 32 and _fill(blocks, arch) and not drops:
        # One or two programs a multiprocessor fetch enough by more stages, and partial sums would be a launch more. A mask wants warps.
        split, stages = 1, 3 if arch.shared_memory < 160 << 10 else 5 if problem.tile_rank <= 32 else 4
    return Shrink(block_m, block_k, split=split, num_warps=4, num_stages=stages)


def _fill(programs: int, arch: Arch) -> bool:
    """Whether so many leave next to no multiprocessor idle."""
    return 8 * programs >= 7 * arch.sms


def _wgrad(problem: Problem, arch: Arch) -> Wgrad:
    block_j = 32 if problem.dropout or problem.itemsize == 4 else 64
    block_m = 32 if problem.itemsize == 4 or problem.adapters * 64 > problem.M else 64
    blocks = -(-max(problem.N, problem.K) // block_j)
    return Wgrad(block_m, block_j, split=_split(blocks, problem.M, 4 * block_m, arch), num_warps=4, num_stages=3)


def _split(blocks: int, length: int, least: int, arch: Arch) -> int:
    """Programs that share one axis of ``length``: enough for two waves of the chip, each with at least ``least`` of it."""
    wanted = -(-2 * arch.sms // max(blocks, 1))
    return max(1, min(wanted, length // least, 64))


def _expand(problem: Problem, arch: Arch) -> Expand:
    if problem.experts:
        return _experts(problem, arch)
    if problem.base or (problem.itemsize == 4 and max(problem.M, problem.row_block) > 32):
        return _beside_base(problem, arch)  # of float32, whose large products Triton makes without tensor cores, the vendor's
    if problem.adapters:
        return _segments(problem, arch)
    return _few_tokens(problem, arch) if problem.M <= 64 else _many_tokens(problem, arch)


def _least(first: Expand, others: list[Expand], problem: Problem, arch: Arch) -> Expand:
    """The first of some tiles, unless another fetches a tenth less; of small ones that leave multiprocessors idle K may be split, too."""
    small = [tile for tile in (first, *others) if tile.u == "given" and tile.block_n < 256 and not (tile.each and tile.block_n > 32)]
    idle = [tile for tile in small if _tiles(tile, problem) < arch.sms]
    split = [replace(tile, split=s) for tile in idle for s in SPLITS if problem.K >= 4 * s * tile.block_k]
    return min([first, *others, *split], key=lambda tile: _fetched(tile, problem, arch) * (0.9 if tile is first else 1.0))


def _tiles(tile: Expand, problem: Problem) -> int:
    return -(-problem.M // tile.block_m) * -(-problem.N // tile.block_n)


def _fetched(e: Expand, problem: Problem, arch: Arch) -> float:
    """What the busiest multiprocessor fetches of x, W and, in the loop, A, or could have while it waits: bytes. Not less than W takes from
    memory. A tile narrower than its rows fetches more of x than of W, again for each of its neighbours.
    """
    rows, wider = min(e.block_m, problem.M), problem.lora_dtype.itemsize // problem.itemsize
    ranks = wider * rank_block(problem.tile_rank) if e.u == "loop" else 0
    own = (rows + e.block_n + ranks) * problem.K / e.split + (rows * e.block_n * problem.tile_rank * wider if e.each else 0)
    programs = _tiles(e, problem) * e.split
    fetched = max(-(-programs // arch.sms) * own, OVER_MEMORY * problem.N * problem.K / arch.sms) * problem.itemsize
    sums = SPLIT + 8 * (e.split + 1) * problem.M * problem.N / arch.sms if e.split > 1 else 0  # float32, written and read
    return fetched + sums + (LAUNCH if e.u == "given" else 0)


def _many_tokens(problem: Problem, arch: Arch) -> Expand:
    if arch.kind == "hip":
        return _least(Expand(128, 128, 32, num_warps=8, num_stages=2), [], problem, arch)
    roomy = arch.shared_memory >= 160 << 10
    tile = Expand(128, 128, 64 if roomy else 32, num_warps=8, num_stages=4, tma=_tma(problem, arch))
    if problem.dropout == "uv":
        # The mask of the output tile is regenerated in registers: a smaller tile leaves room for it.
        tile = replace(tile, num_stages=3)
    elif roomy and problem.N >= 256 and arch.capability >= (9, 0):
        return _least(replace(tile, block_n=256), [tile], problem, arch)
    return _least(tile, [], problem, arch)


def _few_tokens(problem: Problem, arch: Arch) -> Expand:
    block_m = 16 if problem.M <= 16 else 32 if problem.M <= 32 else 64
    # One launch is right where the rank accumulator is small, and where no mask has to be regenerated beside a large tile.
    loop = problem.tile_rank <= 64 and problem.packed != "k" and (not problem.dropout or (problem.dropout == "x" and block_m < 64))
    block_k = 32 if problem.itemsize == 4 else 64
    tile = Expand(block_m, 32 if loop else 64, block_k, num_warps=4, num_stages=STREAMED, u="loop" if loop else "given")
    if problem.itemsize == 4 or arch.kind != "cuda":
        return tile
    sources = ("loop", "given") if loop else ("given",)
    others = [replace(tile, block_n=n, u=u, num_warps=8 if block_m * n > 64 * 64 else 4) for u in sources for n in (64, 128)]
    return _least(tile, others, problem, arch)


def _segments(problem: Problem, arch: Arch) -> Expand:
    block_m = problem.row_block
    if block_m <= 64:
        tile = _each(Expand(block_m, 32, 32 if problem.itemsize == 4 else 64, num_warps=4, num_stages=STREAMED), problem)
        wider = replace(tile, block_n=64)  # if v of all ranks is gathered at once, as it is, and needs no masks
        fits = tile.each and not problem.mixed_ranks and problem.lora_dtype == problem.dtype
        fits = fits and closes(wider, problem.tile_rank, problem.itemsize, True, False)
        return _least(tile, [wider] if fits else [], problem, arch)
    if arch.kind == "hip":
        return _least(Expand(block_m, 64, 32, num_warps=8, num_stages=2), [], problem, arch)
    if arch.has_tcgen05:  # where masked products do not compile; a select leaves no room for the mask of a wide tile
        tile = Expand(block_m, 64 if problem.dropout == "uv" else 128, 64, num_warps=8, num_stages=3, tma=_tma(problem, arch))
        return _least(tile, [], problem, arch)
    return replace(_many_tokens(problem, arch), block_m=block_m, masked=True)


def _beside_base(problem: Problem, arch: Arch) -> Expand:
    # Bound by memory: base is read and y written once, and the product between them is but r deep.
    block_m = problem.row_block or (16 if problem.M <= 16 else 32 if problem.M <= 32 else 64)
    if problem.adapters and block_m <= 64:
        return _each(Expand(block_m, 32, base="library", num_warps=4, num_stages=1), problem)
    wide = block_m == 64 < problem.M and problem.itemsize == 2 and problem.dropout != "uv"
    block_n = 32 if problem.itemsize == 4 else 128 if wide else 64  # a row block of a plan selects: a second accumulator
    stages = 2 if problem.adapters else 1  # of a walk; else there is a loop of one turn, which waits for u and v ahead of its loads
    return Expand(block_m, block_n, base="library", num_warps=8 if block_m > 64 else 4, num_stages=stages)


def _experts(problem: Problem, arch: Arch) -> Expand:
    block_m = problem.gather_block
    if problem.itemsize == 4:
        return Expand(block_m, 32 if block_m > 64 else 64, 32, num_warps=4, num_stages=3)
    if block_m <= 32:  # each expert's weight is streamed by narrow tiles
        return Expand(block_m, 32, 64, num_warps=4, num_stages=STREAMED)
    if arch.kind == "hip":
        return Expand(block_m, 64, 32, num_warps=8, num_stages=2)
    roomy = arch.shared_memory >= 160 << 10
    wide = roomy and arch.capability >= (9, 0) and block_m > 64 and problem.N >= 256 and problem.dropout != "uv"
    wide = wide and problem.R <= 32 and problem.K % 64 == 0  # else 5 to 38 reloads on sm_90: a second rank block, the masks of a last step
    return Expand(block_m, 256 if wide else 128, 64 if roomy else 32, num_warps=8 if block_m > 64 else 4, num_stages=4)


def _each(tile: Expand, problem: Problem) -> Expand:
    """v gathered for each token, by warps that have the registers for it. Not in dX, whose v lies the other way: sums across threads."""
    return tile if problem.w_major == "n" else replace(tile, each=True, num_warps=8 if tile.block_m == 64 else 4)


def _tma(problem: Problem, arch: Arch) -> bool:
    """Whether the bulk tensor copy engine can read both operands."""
    readable = problem.aligned and problem.x_row_major and bool(problem.w_major) and not problem.wide
    return arch.kind == "cuda" and arch.has_tma and readable


def _narrower(part, keep_rows: bool):
    """One step down in shared memory, if there is one: fewer stages, then smaller tiles. keep_rows: ``block_m`` is a plan's, and stays."""
    if part.num_stages > 2:
        return replace(part, num_stages=part.num_stages - 1)
    for axis in ("block_k", "block_n", "block_m", "block_j"):
        if getattr(part, axis, 0) > 16 and not (keep_rows and axis == "block_m"):
            return replace(part, **{axis: getattr(part, axis) // 2})
    return replace(part, num_stages=1)

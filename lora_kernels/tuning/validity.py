"""The one statement of which configurations are valid: `why_not`, used by dispatch, tuner, tables, heuristic and tests."""

from __future__ import annotations

import torch

from ..problem import Problem
from .arch import Arch
from .config import Config, Expand, Shrink, rank_block

LOOP_RANK = 128  # u in the loop keeps the whole rank in one accumulator
TILE_RANK = 64  # otherwise expand takes the rank in blocks of at most this, for u and v sit beside the stages of x and w
MIXED_RANK = 32  # and of at most this where adapters have ranks of their own, so that a small one costs its own rank


def why_not(config: Config, problem: Problem, arch: Arch) -> str | None:
    """A sentence that says why a configuration cannot serve a problem on an architecture, or None if it can."""
    return (
        _shapes(config)
        or _expand(config.expand, problem, arch)
        or _beside(config)
        or (_experts(config, problem) if problem.experts else _segments(config, problem))
        or _dropout(config, problem, arch)
        or _memory(config, problem, arch)
    )


def _shapes(config: Config) -> str | None:
    for name, part in (("shrink", config.shrink), ("expand", config.expand), ("wgrad", config.wgrad)):
        for field, value in vars(part).items():
            if field.startswith("block_") and (value < 16 or value & (value - 1)):
                return f"{name}.{field} must be a power of two and at least 16 (the least a matmul instruction takes), got {value}"
            if field in ("split", "group_m", "num_stages") and value < 1:
                return f"{name}.{field} must be at least 1, got {value}"
            if field == "num_warps" and value not in (1, 2, 4, 8, 16):
                return f"{name}.num_warps must be 1, 2, 4, 8 or 16, got {value}"
    return None


def _expand(e: Expand, problem: Problem, arch: Arch) -> str | None:
    if problem.dtype == torch.float64:
        return "the kernels compute in float32, so they do not take float64; use impl='torch' or 'reference'"
    if e.u not in ("given", "loop", "awaited"):
        return f"expand.u must be 'given', 'loop' or 'awaited', got {e.u!r}"
    if e.base not in ("kernel", "library"):
        return f"expand.base must be 'kernel' or 'library', got {e.base!r}"
    if problem.base and e.base != "library":
        return f"expand.base must be 'library' where the base product is given, got {e.base!r}"
    if e.base == "library" and e.u != "given":
        return f"expand.base='library' has no K loop to compute u in, so it needs expand.u='given', got {e.u!r}"
    if e.split > 1 and (e.u != "given" or e.base != "kernel" or e.persistent):
        return "expand.split > 1 serves u='given' and base='kernel' on a grid that is not persistent"
    if e.masked and not problem.adapters:
        return "expand.masked tells the adapters of a batch with segments apart, and there is one adapter"
    if e.each and not problem.adapters:
        return "expand.each gathers for each token of a batch with segments, and there is one adapter"
    if e.each and e.u != "given":
        return f"expand.each takes ranks in blocks that no product writes, so it needs expand.u='given', got {e.u!r}"
    if e.each and (e.masked or each_ranks(e, problem.tile_rank, problem.itemsize) < 4):
        most = "at most 64 x 32 numbers of four bytes, or twice as many of two, for each four warps"
        return f"expand.each holds v for every number of a tile in registers, {most}, and masks none, got {e}"
    if e.masked and arch.has_tcgen05:
        return f"expand.masked is not compiled for {arch.name}: Triton 3.6 fails where it hoists tensor memory"
    if problem.packed and (e.u == "awaited" or (problem.packed == "k" and e.u != "given")):
        return f"expand.u must be {'given or in the loop' if problem.packed == 'n' else 'given'} where layers are packed, got {e.u!r}"
    if e.u == "loop" and problem.tile_rank > LOOP_RANK:
        return f"expand.u='loop' keeps the whole rank in one accumulator and serves ranks up to {LOOP_RANK}, got {problem.tile_rank}"
    if e.tma:
        if not arch.has_tma:
            return f"expand.tma needs the bulk tensor copy engine of sm_90 and later, not {arch.name}"
        if not (problem.aligned and problem.x_row_major and problem.w_major):
            return "expand.tma needs x and weight 16-byte aligned, with one contiguous axis and other strides multiples of 16 bytes"
        if problem.wide:
            return "expand.tma takes 32-bit coordinates and strides of ordinary size"
        if e.base == "library":
            return "expand.base='library' reads neither x nor weight, so expand.tma has nothing to load"
    if e.pdl and not arch.has_pdl:
        return f"expand.pdl needs the programmatic dependent launch of sm_90 and later, not {arch.name}"
    if e.pdl and (e.u != "given" or e.base != "kernel"):
        return "expand.pdl starts the base product before shrink has ended, so it serves u='given' and base='kernel'"
    return None


def _beside(config: Config) -> str | None:
    beside, e = config.wgrad.beside, config.expand
    if beside not in ("", "stream", "pdl"):
        return f"wgrad.beside must be '', 'stream' or 'pdl', got {beside!r}"
    if beside and e.u != "given":
        return f"wgrad.beside={beside!r} begins before expand ends, whose dS dA needs, so it needs expand.u='given', got {e.u!r}"
    if beside and (beside == "pdl") != e.pdl:
        wanted = "begins where expand has waited for shrink" if beside == "pdl" else "puts an event between shrink and expand"
        return f"wgrad.beside={beside!r} {wanted}, so it needs expand.pdl={beside == 'pdl'}"
    return None


def _segments(config: Config, problem: Problem) -> str | None:
    """The plan's blocks are the tiles, and one accumulator of u in the loop cannot serve several adapters."""
    if not problem.adapters:
        return None
    s, e = config.shrink, config.expand
    if e.u == "loop":
        return "expand.u='loop' sums x a for one adapter a tile, so it cannot serve segments; use 'given' or 'awaited'"
    if e.block_m != problem.row_block:
        return f"expand.block_m must be the plan's row_block, {problem.row_block}, got {e.block_m}"
    if s.block_m != problem.gather_block:
        return f"shrink.block_m must be the plan's gather_block, {problem.gather_block}, got {s.block_m}"
    return None


def _experts(config: Config, problem: Problem) -> str | None:
    """The kernel of a stack of weights has one way to run; its tiles are the plan's gathered ones."""
    e = config.expand
    for part in ("shrink", "expand"):
        if (block_m := getattr(config, part).block_m) != problem.gather_block:
            return f"{part}.block_m must be the plan's gather_block, {problem.gather_block}, beside a stack of weights, got {block_m}"
    plain = Expand(e.block_m, e.block_n, e.block_k, e.group_m, num_warps=e.num_warps, num_stages=e.num_stages)
    if e != plain or config.wgrad.beside:
        other = [name for name, value in vars(e).items() if value != getattr(plain, name)] or ["wgrad.beside"]
        return f"expand beside a stack of weights has u='given', base='kernel' and no {', '.join(other)}"
    return None


def _dropout(config: Config, problem: Problem, arch: Arch) -> str | None:
    """A dropped tile is a register operand, and on sm_90 a pipelined wgmma with one is miscompiled by ptxas before 13.3 (triton #9433)."""
    if not problem.dropout or not arch.has_wgmma:
        return None
    hazard = "has a register operand (the dropped tile) in a pipelined wgmma loop, which ptxas before 13.3 miscompiles on sm_90"
    s, e, w = config.shrink, config.expand, config.wgrad
    if problem.dropout == "x":
        if s.block_m >= 64 and s.num_warps >= 4 and s.num_stages > 1:
            return f"shrink with dropout {hazard}; use shrink.block_m=32 or num_stages=1"
        rows = problem.gather_block or e.block_m
        if e.u != "given" and rows >= 64 and e.num_warps >= 4 and e.num_stages > 1:
            return f"expand.u='{e.u}' with dropout {hazard}; use expand.block_m=32, num_stages=1 or u='given'"
    elif w.block_j >= 64 and w.num_warps >= 4 and w.num_stages > 1:
        return f"wgrad with dropout {hazard}; use wgrad.block_j=32 or num_stages=1"
    return None


def _asynchronous(rows: int, warps: int, problem: Problem, arch: Arch) -> bool:
    """Whether matmul instructions read shared memory while the program goes on."""
    return (arch.has_wgmma or arch.has_tcgen05) and rows >= 64 and warps >= 4 and problem.itemsize == 2


def _tiles_in_flight(stages: int, rows: int, warps: int, problem: Problem, arch: Arch) -> int:
    """How many tiles a pipeline of that many stages holds: one fewer where each matmul instruction is waited for at once."""
    return stages if _asynchronous(rows, warps, problem, arch) else max(1, stages - 1)


def _a_in_flight(part: Shrink | Expand, rank: int, problem: Problem, arch: Arch) -> int:
    """Bytes of a's tiles in the pipeline; those of wider adapters are rounded as they leave it, into one more where wgmma reads that."""
    tile, wider = rank * part.block_k, problem.lora_dtype.itemsize
    if wider == problem.itemsize:
        return _tiles_in_flight(part.num_stages, part.block_m, part.num_warps, problem, arch) * tile * problem.itemsize
    rounded = tile * problem.itemsize if _asynchronous(part.block_m, part.num_warps, problem, arch) else 0
    return max(1, part.num_stages - 1) * tile * wider + rounded


def expand_shared_memory(e: Expand, problem: Problem, arch: Arch) -> int:
    """A lower bound of expand's shared memory in bytes: the tiles in flight of x and w, and what u and v take beside them."""
    if e.base == "library":
        return 0
    rank = rank_block(problem.tile_rank, LOOP_RANK if e.u == "loop" else TILE_RANK)
    stages = _tiles_in_flight(e.num_stages, e.block_m, e.num_warps, problem, arch)
    stages *= (e.block_m + e.block_n) * e.block_k * problem.itemsize
    if e.u == "loop":
        stages += _a_in_flight(e, rank, problem, arch)
    beside = 0  # behind the K loop u and v take the place of tiles that were multiplied
    ahead = not closes(e, problem.tile_rank, problem.itemsize, bool(problem.adapters), problem.dropout == "uv")
    if arch.has_wgmma and e.u == "given" and e.block_m >= 64 and ahead:
        beside = (e.block_m + e.block_n) * rank * problem.itemsize
    return stages + beside


def closes(e: Expand, rank: int, itemsize: int, segments: bool, dropped: bool) -> bool:
    """Whether u v, u given, closes expand's sum: one block of ranks, nothing selected, dropped or waited for, registers to spare."""
    if e.u != "given" or e.base != "kernel" or dropped or e.split > 1:
        return False
    if e.each:
        return each_ranks(e, rank, itemsize) >= rank
    return not (segments or e.pdl) and rank <= TILE_RANK and min(e.block_m, e.block_n) >= 64


def each_ranks(e: Expand, rank: int, itemsize: int) -> int:
    """How many ranks at a time ``expand.each`` gathers: all, in 512 bytes of a thread's registers, or so many that 256 are enough."""
    most = 512 * 32 * e.num_warps // (e.block_m * e.block_n * itemsize)
    return rank_block(rank) if rank_block(rank) <= most else most // 2


def memory(config: Config, problem: Problem, arch: Arch) -> list[tuple[str, int]]:
    """A lower bound of each kernel's shared memory in bytes."""
    s, w = config.shrink, config.wgrad
    rank = rank_block(problem.R)
    s_tiles = _tiles_in_flight(s.num_stages, s.block_m, s.num_warps, problem, arch)
    w_tiles = _tiles_in_flight(w.num_stages, w.block_j, w.num_warps, problem, arch)
    return [
        ("expand", expand_shared_memory(config.expand, problem, arch)),
        ("shrink", s_tiles * s.block_m * s.block_k * problem.itemsize + _a_in_flight(s, rank, problem, arch)),
        ("wgrad", w_tiles * (w.block_j + rank) * w.block_m * problem.itemsize),
    ]


def _memory(config: Config, problem: Problem, arch: Arch) -> str | None:
    for name, need in memory(config, problem, arch):
        if need > arch.shared_memory:
            return f"{name} needs at least {need} bytes of shared memory for its tiles, {arch.name} has {arch.shared_memory}"
    return None

"""The slips of `mutation.py` where each token has v of its own, ranks their neighbours, and parts are added; all slips up to these."""

from __future__ import annotations

from dataclasses import replace

import mutants_shared
from mutants import EXPAND, LAUNCH, LAYOUT, LOAD, LOW_RANK, SELECTED, SHRINK, SPEED, Mutant

PARTS, HEURISTIC = "kernels/parts.py", "tuning/heuristic.py"
ITS_RANKS, ITS_V = "within_rank(r0 + j, rank, period, 8)", "v[2]) + adapter.to(tl.int64) * stride_ve"
TOKENS = "tokens = (m0 + tl.arange(0, BLOCK_M))[:, None, None]"
ITS_U = "LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)\n            uv += each"
AHEAD = "if WAIT is None:\n            u_tile"

ADDED = [
    Mutant("parts: 16-bit parts of a gradient", LAUNCH, "*w.shape, dtype=torch.float32) if w.splits", "*w.shape, dtype=dtype) if w.splits"),
    Mutant("parts: the second sum left out", LAUNCH, "add_up(*sums, kept=kept)", "add_up(sums[0], kept=kept)"),
    Mutant("parts: the first sum twice", PARTS, "add_block(block - blocks, second_parts,", "add_block(block - blocks, parts,"),
    Mutant("parts: blocks of the first sum", PARTS, "block - blocks", "block"),
    Mutant("parts: length of the first sum", PARTS, "second_out, second_length, BLOCK)", "second_out, length, BLOCK)", tests="machine"),
    Mutant("parts: the last part left out", PARTS, "parts[1], number), 0", "parts[1], number - 1), 0"),
    Mutant("parts: any sum's layout", LAUNCH, '("add", *alike)', '"add"', tests="launcher"),
]
EACH = [
    Mutant("ranks: neighbours rounded up", LOAD, "r // NEIGHBOURS * NEIGHBOURS", "r // NEIGHBOURS * (2 * NEIGHBOURS)"),
    Mutant("ranks: without neighbours", LOAD, "r if NEIGHBOURS == 1 else r // NEIGHBOURS * NEIGHBOURS", "r", note=SPEED),
    Mutant("units: eights, whatever the number", LAYOUT, "min(8, number & -number)", "8"),
    Mutant("parts: without the last", LOAD, "tl.int32) < t[4]", "tl.int32) < t[4] - 1"),
    Mutant("units: none told", LAYOUT, "min(8, number & -number)", "1", note=SPEED),
    Mutant(
        "shrink: a rank's whole neighbourhoods alone", SHRINK, "within_rank(r, rank, period, 8)", "within_rank(r, rank // 8 * 8, period)"
    ),
    Mutant("each: no rank bound", LOW_RANK, "tl.where(within_rank(r0 + j, rank, period), v_tile, 0.0)", "v_tile"),
    Mutant("each: all ranks loaded", LOW_RANK, ITS_RANKS, "mask & (rank > 0)", note=SELECTED),
    Mutant("each: rank of adapter 0", LOW_RANK, "tl.load(ranks_ptr + adapter, mask=mask", "tl.load(ranks_ptr + adapter * 0, mask=mask"),
    Mutant("each: up to the shortest rank", LOW_RANK, "tl.max(tl.load(ranks_ptr + ids", "tl.min(tl.load(ranks_ptr + ids"),
    Mutant("each: adapter 0 for all", LOW_RANK, ITS_V, "v[2])"),
    Mutant("each: adapter in 32 bits", LOW_RANK, ITS_V, "v[2]) + adapter * stride_ve"),
    Mutant("each: tokens of the first block", LOW_RANK, TOKENS, "tokens = tl.arange(0, BLOCK_M)[:, None, None]"),
    Mutant("each: ids not masked", LOW_RANK, "ids_ptr + tokens, mask=tokens < M, other=-1)", "ids_ptr + tokens)", tests="machine"),
    Mutant("each: columns not masked", LOW_RANK, "mask = mask & (n0 + i < N)", "pass", tests="machine"),
    Mutant("each: v of the first ranks", LOW_RANK, "tile_base(v[0], r0, n0", "tile_base(v[0], 0, n0"),
    Mutant("each: u of the first ranks", LOW_RANK, ITS_U, ITS_U.replace("first + r0", "first")),
    Mutant("each: lost behind the loop", EXPAND, "acc += each_product(u_tile, v_tile)", "pass"),
    Mutant("each: u ahead of what it waits for", EXPAND, AHEAD, AHEAD.replace("if WAIT is None", "if True"), note=SPEED),
]
TILES = [
    Mutant("tiles: split where there are many", HEURISTIC, "_tiles(tile, problem) < arch.sms", "_tiles(tile, problem) > arch.sms"),
    Mutant("tiles: large ones split, too", HEURISTIC, 'tile.u == "given" and tile.block_n < 256', 'tile.u == "given"'),
    Mutant("tiles: x for nothing", HEURISTIC, "own = (rows + e.block_n + ranks)", "own = (e.block_n + ranks)"),
    Mutant(
        "tiles: a split for nothing", HEURISTIC, "sums = SPLIT + 8 * (e.split + 1) * problem.M * problem.N / arch.sms if", "sums = 0 if"
    ),
    Mutant("tiles: float32 by Triton", HEURISTIC, "problem.itemsize == 4 and max(problem.M, problem.row_block) > 32", "False"),
    Mutant("tiles: float32 plans by Triton", HEURISTIC, "max(problem.M, problem.row_block) > 32", "problem.M > 32"),
    Mutant("tiles: memory as fast as the L2 cache", HEURISTIC, "OVER_MEMORY = 2.5", "OVER_MEMORY = 1.0"),
]

EVERY = [
    *mutants_shared.EVERY,
    *ADDED,
    *(replace(m, tests="tuning") for m in TILES),
    *(replace(m, tests="segments") if m.tests == "kernels" else m for m in EACH),
]

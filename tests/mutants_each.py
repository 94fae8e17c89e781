"""The slips of `mutation.py` where each token has v of its own, ranks their neighbours, and parts are added; those at the edges of memory,
in 64-bit offsets, and beside what is not finite; all slips up to these."""

from __future__ import annotations

from dataclasses import replace

import mutants_shared
from mutants import EXPAND, EXPERTS, LAUNCH, LAYOUT, LOAD, LOW_RANK, OPS, PLAN, PLANNER, SELECTED, SHRINK, SPEED, WGRAD, X_DOT_W, Mutant

PARTS, HEURISTIC, PHILOX, PROJECTIONS = "kernels/parts.py", "tuning/heuristic.py", "philox.py", "projections.py"
ITS_RANKS, ITS_V = "within_rank(r0 + j, rank, period, 8)", "v[2]) + adapter.to(tl.int64) * stride_ve"
TOKENS = "tokens = (m0 + tl.arange(0, BLOCK_M))[:, None, None]"
ITS_U = "LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE).to(TYPE)\n            uv += each"
AS_ROUNDED = """WIDE).to(TYPE)
    finite = tl.abs(v_tile.to(tl.float32)) < float("inf")
    poison = tl.sum(tl.where(finite, 0.0, float("nan")), 0)
    uv = tl.dot(u_tile, tl.where(finite, v_tile, 0.0)"""
BEHIND = "if WAIT is None:\n            u_tile = LOAD_U(u, m0, first, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R"
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
    Mutant("parts: without the last", LOAD, "tl.int32) < t[4]", "tl.int32) < t[4] - 1", tests="split"),
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
    Mutant("tiles: descriptors of columns", HEURISTIC, "problem.aligned and problem.x_row_major and", "problem.aligned and"),
    Mutant("tiles: descriptors past 32 bits", HEURISTIC, " and not problem.wide\n", "\n"),
    Mutant("tiles: v for each token of dX", HEURISTIC, 'tile if problem.w_major == "n" else', "tile if False else"),
]
REACHED, MERGED = (
    "w_strides, base_strides, v_strides, y_strides)",
    "among(_merges, matrix(weight), matrix(base), matrix(lora_A), matrix(u))",
)
OFFSETS = [
    Mutant("offsets: experts in 32 bits", EXPERTS, "tl.where(live, slot, 0).to(tl.int64)", "tl.where(live, slot, 0)"),
    Mutant("offsets: gradients of adapters in 32 bits", WGRAD, "tl.cast(adapter, tl.int64) * stride_oe", "adapter * stride_oe"),
    Mutant("offsets: splits of the tokens in 32 bits", WGRAD, "tl.cast(split, tl.int64) * stride_split", "split * stride_split"),
    Mutant("offsets: splits of K in 32 bits", SHRINK, "tl.cast(tl.program_id(2), tl.int64) * stride", "tl.program_id(2) * stride"),
    Mutant("offsets: parts of a tile in 32 bits", EXPAND, "tl.cast(part, tl.int64) * parts[1]", "part * parts[1]"),
    Mutant("offsets: parts of a tile read in 32 bits", EXPAND, "tl.cast(i, tl.int64) * parts[1]", "i * parts[1]"),
    Mutant("offsets: parts in 32 bits", LOAD, "tl.cast(part, tl.int64) * t[3]", "part * t[3]"),
    Mutant("wide: x of experts forgotten", LAYOUT, "WIDE=wide((x_strides, c.block_k), (w[1]", "WIDE=wide((w[1]"),
    Mutant("wide: w of experts forgotten", LAYOUT, "(w[1], max(c.block_n, c.block_k)), ", ""),
    Mutant("wide: v of experts forgotten", LAYOUT, "(v[1], max(c.block_n, block_r)), ", ""),
    Mutant("wide: A forgotten", LAYOUT, ", (a_strides, c.block_k)), FAN", "), FAN"),
    Mutant("wide: wgrad's x forgotten", LAYOUT, "(x_strides, max(c.block_m, c.block_j)), (strides, ", "(strides, "),
    Mutant("wide: w forgotten", LAYOUT, REACHED, REACHED.replace("w_strides, ", "")),
    Mutant("wide: the base forgotten", LAYOUT, REACHED, REACHED.replace("base_strides, ", "")),
    Mutant("wide: v forgotten", LAYOUT, REACHED, REACHED.replace("v_strides, ", "")),
    Mutant("wide: y forgotten", LAYOUT, REACHED, REACHED.replace(", y_strides", "")),
]
EDGES = [
    Mutant("base: columns in 32 bits", LOAD, "tl.cast(j0, tl.int64) * stride_j", "j0 * stride_j", tests="segments"),
    Mutant("rows: first column in 32 bits", LOAD, "(t[0] + tl.cast(j0, tl.int64) * t[2])", "(t[0] + j0 * t[2])", tests="segments"),
    Mutant("each: v before the first adapter's", LOW_RANK, "mask = adapter >= 0\n", "mask = tokens < M\n", tests="segments"),
    Mutant("masked: infinities ahead of the rounding", LOW_RANK, AS_ROUNDED,
           AS_ROUNDED.replace(".to(TYPE)\n", "\n").replace("v_tile, 0.0)", "v_tile, 0.0).to(TYPE)"), tests="segments"),
    Mutant("expand: u behind the loop past its ranks", EXPAND, BEHIND, BEHIND.replace("EVEN_R", "True"), tests="sum"),
    Mutant("wgrad: g past its ranks", WGRAD, "column + R, BLOCK_M, BLOCK_R, False, EVEN_R", "column + R, BLOCK_M, BLOCK_R, False, True",
           tests="machine"),
    Mutant("shrink: unused tiles read A", SHRINK, "(slot >= 0) & (slot < adapters)", "(slot < adapters)", tests="machine"),
    Mutant("shared: what y holds is read past its end", EXPAND, "mask=tile_mask(m0, n0, M, N, BLOCK_M, BLOCK_N), other=0.0)", "mask=None)",
           tests="machine"),
    Mutant("shared: what y holds is read past its end at last", EXPAND, "tl.load(y_ptrs, mask=y_mask, other=0.0)", "tl.load(y_ptrs)",
           tests="machine"),
    Mutant("plan kernel: ids past the last written", PLANNER, "-1, slot), mask=tokens < M)", "-1, slot))", tests="plan"),
    Mutant("plan kernel: order past the last written", PLANNER, "order_ptr + place, tokens, mask=tokens < M)", "order_ptr + place, tokens)",
           tests="plan"),
    Mutant("plan kernel: tiles past the last written", PLANNER, "adapter, mask=tile < tiles)", "adapter)", tests="plan"),
    Mutant("plan kernel: firsts past the last written", PLANNER, "first, mask=tile < tiles)", "first)", tests="plan"),
    Mutant("plan: counts past the last slot written", PLANNER, "tl.sum(count, 1), mask=slot <= E)", "tl.sum(count, 1))", tests="plan"),
    Mutant("plan: moved without its rows a token", PLAN, "self.tensors()], self.geometry())", "self.tensors()], self.geometry()[:3])",
           tests="experts"),
    Mutant("lengths: of no adapter", PLAN, "max(int(chosen.max()), 0) + 1", "int(chosen.max()) + 1", tests="segments"),
    Mutant("lengths: validated in any case", PLAN, "num_adapters, validate=validate)", "num_adapters)", tests="segments"),
    Mutant("lengths: where they are themselves", PLAN, "ids.to(device, non_blocking=True)", "ids", tests="segments"),
    Mutant("experts: 16-bit sums", EXPERTS, X_DOT_W, f"{X_DOT_W}.to(x_tile.dtype).to(tl.float32)", tests="experts"),
    Mutant("wgrad: rounded before the scale", WGRAD, "(acc * scale)", "(acc.to(out[0].dtype.element_ty) * scale)"),
    Mutant("merge: any weight's layout", LAUNCH, MERGED, MERGED.replace("matrix(weight), ", ""), tests="merge"),
    Mutant("merge: any base's layout", LAUNCH, MERGED, MERGED.replace("matrix(base), ", ""), tests="merge"),
    Mutant("merge: any A's layout", LAUNCH, MERGED, MERGED.replace("matrix(lora_A), ", ""), tests="merge"),
    Mutant("merge: any B's layout", LAUNCH, MERGED, MERGED.replace(", matrix(u)", ""), tests="merge"),
]  # fmt: skip

ON_A_CPU = "(x.device == CPU and dispatch.plainly_chain(x.device, impl, config)"
MASK = [
    Mutant("mask: kept where the kernels may run", OPS, ON_A_CPU, "(x.device == CPU"),
    Mutant("mask: a row a token", OPS, "tokens(x) * adapters.top_k, x.shape[-1]", "tokens(x), x.shape[-1]"),
    Mutant("mask: made again", OPS, "return philox.packed_mask(", "return seed if seed is not None else philox.packed_mask("),
    Mutant("mask: of several, made again", PROJECTIONS, "five[4] = ops.mask(", "ops.mask("),
    Mutant("mask: the halves of a byte exchanged", PHILOX, "for low, high in ((w0, w1), (w2, w3)):",
           "for low, high in ((w2, w3), (w0, w1)):"),
    Mutant("mask: its first lane last", PHILOX, "1 << 51 | 1 << 34 | 1 << 17 | 1", "1 << 48 | 1 << 33 | 1 << 18 | 1 << 3"),
    Mutant("mask: bytes read from the other end", PHILOX, "torch.arange(LANES - 1, -1, -1, device=device)",
           "torch.arange(LANES, device=device)"),
    Mutant("mask: of whole bytes", PHILOX, ".flatten(1)[:, :features]", ".flatten(1)"),
    Mutant("mask: signed lanes", PHILOX, "bitwise_or_(low).bitwise_xor_(_SIGNS)", "bitwise_or_(low)"),
]  # fmt: skip

EVERY = [
    *mutants_shared.EVERY,
    *(replace(m, tests="mask") for m in MASK),
    *ADDED,
    *(replace(m, tests="tuning") for m in TILES),
    *(replace(m, tests="offsets") for m in OFFSETS),
    *EDGES,
    *(replace(m, tests="segments") if m.tests == "kernels" else m for m in EACH),
]

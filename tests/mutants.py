"""The slips that `mutation.py` tries: one adapter first, then a tile split over programs, many adapters, and the torch arm."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Mutant:
    """``old`` occurs exactly ``count`` times in the file and becomes ``new``.

    note: why these tests cannot see it. tests: the selection in `mutation.SELECTIONS` that it meets; those named machine run compiled
    kernels by tests/machine, the others Triton's interpreter.
    """

    name: str
    file: str
    old: str
    new: str
    count: int = 1
    note: str = ""
    tests: str = "kernels"


LOAD, DROP, TILES = "kernels/load.py", "kernels/dropout.py", "kernels/tiles.py"
SHRINK, EXPAND, WGRAD, LAUNCH, LAYOUT = "kernels/shrink.py", "kernels/expand.py", "kernels/wgrad.py", "launch.py", "layouts.py"
CHAIN, PLAN, MERGING, PLANNER, STREAMS = "chain.py", "segments.py", "merging.py", "kernels/plan.py", "streams.py"
OPS, AUTOGRAD = "ops.py", "autograd.py"
EXPERTS, ROUTED, LOW_RANK = "kernels/experts.py", "launch_experts.py", "kernels/low_rank.py"
READ_BASE = "if base_strides is not None:\n        load_x"
MERGED_FROM = "[(self.weight.detach(), base,"
SPEED = "equivalent: the same result, more slowly"
OWN_BARRIER = "equivalent: Triton puts a barrier there of its own"
I_MASK, J_MASK = "(i0 + tl.arange(0, BLOCK_I) < I)[:, None]", "(j0 + tl.arange(0, BLOCK_J) < J)[None, :]"
X_DOT_W = "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)"
X_DOT_A = "acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)"
X_DOT_G = "acc = tl.dot(tl.trans(x_tile), g_tile, acc, input_precision=PRECISION)"
KEEP = "uv = tl.where(keep_tile(seed, threshold, tokens, n0, BLOCK_M, BLOCK_N), uv * inv_keep, 0.0)"
KEEP_LOOP = "acc += tl.where(keep_tile(seed, threshold, m0 + tl.arange(0, BLOCK_M), n0, BLOCK_M, BLOCK_N), uv * inv_keep, 0.0)"
OFFSETS = "i[:, None] * stride_i + j[None, :] * stride_j"
I0, J0 = "tl.cast(i0, tl.int32)", "tl.cast(j0, tl.int32)"
K_END, M_END = "tl.minimum(k_start + blocks_per_split * BLOCK_K, K)", "blocks_per_split * BLOCK_M, M)"
U_DOT_V = "acc = tl.dot(u_tile, v_tile.to(u_tile.dtype), acc, input_precision=PRECISION)"
W_SHAPE = "K, N, BLOCK_K, BLOCK_N, EVEN_"
STEP = "tl.num_programs(0) if PERSISTENT else 1"
WAIT = "< wanted:\n                pass"
TICKET = 'tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")'
SELECTED = "equivalent: the select that follows drops those columns"
SELECT, WALKED = "uv += tl.where(own, product, 0.0)", "m0 // BLOCK_M) * STEPS"
ALL_PARTS = "if arrived == parts[3] - 1:\n            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"
SHRINK_SELECT = "within_rank(r, rank, period)[None, :] & live"
WGRAD_SELECT = "acc = tl.where(within_rank(r0 + tl.arange(0, BLOCK_R), rank, period)[None, :], acc, 0.0)"
PART_STORE = "tl.store(part_ptrs + tl.cast(part, tl.int64) * parts[1], acc, mask=y_mask)"
BIAS = "acc += tl.load(bias_ptr + n0 + tl.arange(0, BLOCK_N), mask=n0 + tl.arange(0, BLOCK_N) < N, other=0.0)[None, :]"
ROW_OFFSET = "j0, tl.int64) * t[2]) + (rows.to(tl.int64) * t[1])"
PER_SPLIT, ORDERED = "tl.cdiv(tl.cdiv(M - first, BLOCK_M), tl.num_programs(2))", "tl.load(order_ptr + tokens, mask=row_mask, other=0)"
GATHERED_TILES = "tiles = adapters.tiles if adapters.tokens else cdiv(M, c.block_m)"
SHARED = "dict(adapters=adapters, config=config, kept=kept)"
SLOT = "tl.where((raw >= 0) & (raw < E), raw, E)"
PHILOX = "tl.philox(seed, token + zero, zero, group + zero, zero, 7)"

ONE_ADAPTER = [
    Mutant("load: no mask", LOAD, "mask=tile_mask(i0, j0, I, J, BLOCK_I, BLOCK_J), other=0.0", ""),
    Mutant("load: j mask off by one", LOAD, f"mask={J_MASK}", f"mask={J_MASK.replace('< J', '<= J')}"),
    Mutant("load: i mask off by one", LOAD, f"mask={I_MASK}", f"mask={I_MASK.replace('< I', '<= I')}"),
    Mutant("mask: row off by one", LOAD, f"{I_MASK} &", f"{I_MASK.replace('< I', '<= I')} &"),
    Mutant("offsets: strides swapped", LOAD, OFFSETS, "i[:, None] * stride_j + j[None, :] * stride_i"),
    Mutant("offsets: 32 bits in a wide tile", LOAD, "i = i.to(tl.int64)", "pass"),
    Mutant("base: 32 bits", LOAD, "tl.cast(i0, tl.int64) * stride_i", "i0 * stride_i"),
    Mutant("descriptor: coordinates swapped", LOAD, f"[{J0}, {I0}]", f"[{I0}, {J0}]"),
    Mutant("dropout: > for >=", DROP, ">= threshold, [", "> threshold, ["),
    Mutant("dropout: 10 rounds", DROP, "zero, 7)", "zero, 10)"),
    Mutant("dropout: halves of a word swapped", DROP, "tl.join(words & 0xFFFF, words >> 16)", "tl.join(words >> 16, words & 0xFFFF)"),
    Mutant("dropout: counters swapped", DROP, PHILOX, "tl.philox(seed, group + zero, zero, token + zero, zero, 7)"),
    Mutant("dropout: token counted in its tile", DROP, "token = tokens[:, None]", "token = tl.arange(0, BLOCK_M)[:, None]"),
    Mutant("tiles: last group not clamped", TILES, "tl.minimum(num_m - first_m, GROUP_M)", "GROUP_M"),
    Mutant("tiles: group counted in rows", TILES, "tile // (GROUP_M * num_n)", "tile // (GROUP_M * num_m)"),
    Mutant("tiles: row by row inside a group", TILES, "inside % rows, inside // rows", "inside // num_n, inside % num_n", note=SPEED),
    Mutant("shrink: scale missing", SHRINK, "out = acc * scale", "out = acc"),
    Mutant("shrink: rounded before the scale", SHRINK, "out = acc * scale", "out = acc.to(a[0].dtype.element_ty) * scale"),
    Mutant("shrink: 16-bit sums", SHRINK, X_DOT_A, f"{X_DOT_A}.to(x_tile.dtype).to(tl.float32)"),
    Mutant("shrink: mask coordinates swapped", SHRINK, "threshold, tokens, k0, BLOCK_M", "threshold, tokens - m0 + k0, m0, BLOCK_M"),
    Mutant("shrink: first rank block only", SHRINK, "r0 = tl.program_id(1) * BLOCK_R", "r0 = 0"),
    Mutant("shrink: splits overlap", SHRINK, "tl.program_id(2) * blocks_per_split * BLOCK_K", "tl.program_id(2) * BLOCK_K"),
    Mutant("shrink: last split past K", SHRINK, K_END, "k_start + blocks_per_split * BLOCK_K"),
    Mutant("wgrad: 16-bit sums", WGRAD, X_DOT_G, f"{X_DOT_G}.to(x_tile.dtype).to(tl.float32)"),
    Mutant("wgrad: mask coordinates swapped", WGRAD, "threshold, tokens, j0, BLOCK_M", "threshold, tokens - m0 + j0, m0, BLOCK_M"),
    Mutant("wgrad: tail of the tokens missing", WGRAD, M_END, M_END.replace("M)", "M // BLOCK_M * BLOCK_M)")),
    Mutant("wgrad: first rank block only", WGRAD, "r0 = tl.program_id(1) * BLOCK_R", "r0 = 0"),
    Mutant("wgrad: store mask off by one", WGRAD, "tile_mask(j0, r0, J, R,", "tile_mask(j0, r0, J, R + 1,"),
    Mutant("expand: first rank block only", LOW_RANK, "tl.range(0, R_BLOCKS * BLOCK_R, BLOCK_R", "tl.range(0, BLOCK_R, BLOCK_R"),
    Mutant("expand: mask takes the base, too", LOW_RANK, "not MASKED)) and not FIRST", "not MASKED)) and FIRST"),
    Mutant("expand: dX without 1 / (1 - p)", LOW_RANK, KEEP, KEEP.replace("uv * inv_keep", "uv")),
    Mutant("expand: dX without mask", LOW_RANK, KEEP, "uv = uv * inv_keep"),
    Mutant("expand: dX mask coordinates swapped", LOW_RANK, KEEP, KEEP.replace("tokens, n0", "tokens - m0 + n0, m0")),
    Mutant("expand: dX in the loop without 1 / (1 - p)", EXPAND, KEEP_LOOP, KEEP_LOOP.replace("uv * inv_keep", "uv")),
    Mutant("expand: low rank lost on library base", EXPAND, "acc += x_tile", "acc = 0.0 + x_tile"),
    Mutant("expand: low rank lost when awaited", EXPAND, 'if U == "awaited" or (U ==', 'if (U =='),
    Mutant("expand: low rank lost in the loop", EXPAND, U_DOT_V, "pass"),
    Mutant("expand: loop without scale", EXPAND, "(u_acc * scale)", "u_acc"),
    Mutant("expand: loop saves u without scale", EXPAND, "tl.store(u_ptrs, u_tile, mask", "tl.store(u_ptrs, u_acc.to(u_tile.dtype), mask"),
    Mutant("expand: loop without dropout", EXPAND, "kept = drop(x_tile", "drop(x_tile"),
    Mutant("expand: u saved by the second column", EXPAND, "n0 == begin", "pid_n == 1"),
    Mutant("expand: 16-bit sums", EXPAND, X_DOT_W, f"{X_DOT_W}.to(x_tile.dtype).to(tl.float32)", 2),
    Mutant("expand: EVEN_K and EVEN_N swapped for w", EXPAND, f"{W_SHAPE}K, EVEN_N", f"{W_SHAPE}N, EVEN_K", 2),
    Mutant("expand: bias skipped", EXPAND, "if bias_ptr is not None:", "if bias_ptr is not None and LOAD_W is None:"),
    Mutant("expand: bias of the first tile", EXPAND, "n = n0 + tl.arange", "n = 0 * n0 + tl.arange"),
    Mutant("expand: bias not masked", EXPAND, "tl.load(bias_ptr + n, mask=n < N, other=0.0)", "tl.load(bias_ptr + n)", tests="machine"),
    Mutant("expand: store not masked", EXPAND, "acc.to(y_ptrs.dtype.element_ty), mask=y_mask)", "acc.to(y_ptrs.dtype.element_ty))"),
    Mutant("expand: TF32 always", EXPAND, "_precision=PRECISION", '_precision="tf32"', 6, tests="machine"),
    Mutant("low rank: TF32 always", LOW_RANK, "_precision=PRECISION", '_precision="tf32"', 3, tests="machine"),
    Mutant("expand: u v lost where it is last", EXPAND, "acc = tl.dot(u_tile, v_tile, acc, input_precision=PRECISION)", "pass",
           tests="sum"),
    Mutant("expand: u v both first and last", EXPAND, 'elif U == "given" and (WAIT is None or SPLIT) and UV == "first":',
           'if U == "given" and (WAIT is None or SPLIT):'),
    Mutant("expand: a step of ranks too few", EXPAND, "k_steps + tl.cdiv(R, BLOCK_K)", "k_steps + R // BLOCK_K", tests="sum"),
    Mutant("expand: steps of ranks from the second on", EXPAND, "(i - k_steps) * BLOCK_K", "i * BLOCK_K", tests="sum"),
    Mutant("expand: ranks of w's rows", EXPAND, "w_from = v", "w_from = w", tests="sum"),
    Mutant("expand: persistent step of 1", EXPAND, STEP, "1", note=SPEED),
    Mutant("expand: persistent step too long", EXPAND, STEP, "tl.num_programs(0) + 1"),
    Mutant("expand: persistent range without producers", EXPAND, "last = producers + num_m", "last = num_m"),
    Mutant("awaited: no wait", EXPAND, WAIT, WAIT.replace("wanted", "0"), tests="machine"),
    Mutant("awaited: acquire relaxed", EXPAND, 'sem="acquire"', 'sem="relaxed"', tests="machine"),
    Mutant("awaited: release relaxed", EXPAND, 'sem="release"', 'sem="relaxed"', 2, tests="machine"),
    Mutant("awaited: no barrier before the release", EXPAND, "                    tl.debug_barrier()\n", "", tests="machine"),
    Mutant("awaited: no barrier behind the wait", EXPAND, "pass\n            tl.debug_barrier()\n", "pass\n",
           note=OWN_BARRIER, tests="machine"),
    Mutant("awaited: item without ticket", EXPAND, TICKET, "turn"),
    Mutant("awaited: first rank block for all", EXPAND, "(item % R_BLOCKS) * BLOCK_R", "0"),
    Mutant("launch: last split missing", LAYOUT, "cdiv(blocks, per_split)", "max(1, blocks // per_split)"),
    Mutant("launch: 16-bit partial sums", LAYOUT, "torch.float32 if splits > 1 else dtype", "dtype"),
    Mutant("launch: v not transposed", LAYOUT, "_turned(v[1], transposed)", "v[1]"),
    Mutant("launch: w not transposed", LAYOUT, "_turned(w[1], transposed)", "w[1]"),
    Mutant("launch: a not transposed", LAYOUT, "_turned(a[1], transposed)", "a[1]", count=2),
    Mutant("launch: EVEN_K always", LAYOUT, "EVEN_K=K % c.block_k == 0", "EVEN_K=True", 2),
    Mutant("launch: EVEN_N always", LAYOUT, "EVEN_N=even", "EVEN_N=True", tests="machine"),
    Mutant("launch: EVEN_R always", LAYOUT, "EVEN_R=R % block_r == 0", "EVEN_R=True", 4),
    Mutant("launch: EVEN_J always", LAYOUT, "EVEN_J=even", "EVEN_J=True", tests="machine"),
    Mutant("launch: SAVE_U never", LAYOUT, 'SAVE_U=c.u == "loop" and u is not None', "SAVE_U=False"),
    Mutant("launch: 1 / (1 - p) twice in shrink", LAUNCH, "scale * inv_keep, *s.sizes", "scale * inv_keep * inv_keep, *s.sizes"),
    Mutant("launch: loop without 1 / (1 - p)", LAUNCH, "scale * (inv_keep if drop_x else 1.0)", "scale"),
    Mutant("launch: bias twice on library base", LAUNCH, "u=u, base=y, out=y", "u=u, bias=bias, base=y, out=y"),
    Mutant("launch: bias by its own stride", LAUNCH, "None if bias is None else bias.contiguous()", "bias"),
    Mutant("launch: dropout on dY", LAUNCH, "lora_B, scale=scale, dropout=None", "lora_B, scale=scale, dropout=drop"),
    Mutant("launch: dA without dropout", LAUNCH, "all_ds, dropout=drop", "all_ds, dropout=None"),
    Mutant("launch: flags not zeroed", LAUNCH, "flags = torch.zeros(", "flags = torch.empty("),
]  # fmt: skip

SPLIT = [
    Mutant("parts: first only", LOAD, "tl.range(0, t[4])", "tl.range(0, 1)"),
    Mutant("parts: a row apart", LOAD, "tl.cast(part, tl.int64) * t[3]", "tl.cast(part, tl.int64) * t[1]"),
    Mutant("split: range of the part before", EXPAND, "k_begin = (part - 1) *", "k_begin = part *"),
    Mutant("split: range up to K", EXPAND, "tl.minimum(k_begin + blocks_per_part * BLOCK_K, K)", "K"),
    Mutant("split: low rank in each part", EXPAND, "if part == 0:\n            if", "if part >= 0:\n            if"),
    Mutant("split: parts written over each other", EXPAND, PART_STORE, PART_STORE.replace("* parts[1]", "* 0")),
    Mutant("split: counter of a row of tiles", EXPAND, "parts[2] + counter", "parts[2] + pid_m"),
    Mutant("split: added by the first to come", EXPAND, "arrived == parts[3] - 1", "arrived == 0"),
    Mutant("split: added before the last came", EXPAND, "arrived == parts[3] - 1", "arrived == parts[3] - 2"),
    Mutant("split: first part left out", EXPAND, "tl.range(0, parts[3])", "tl.range(1, parts[3])"),
    Mutant("split: last part twice", EXPAND, ALL_PARTS, ALL_PARTS.replace("acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)", "pass")),
    Mutant("split: bias in every part", EXPAND, PART_STORE, f"if bias_ptr is not None:\n            {BIAS}\n        {PART_STORE}"),
    Mutant("split: no bias", EXPAND, "other=0.0)\n            store_tile(acc, bias_ptr,", "other=0.0)\n            store_tile(acc, None,"),
    Mutant("split: arrival relaxed", EXPAND, 'sem="acq_rel"', 'sem="relaxed"', tests="machine"),
    Mutant("split: arrival releases nothing", EXPAND, 'sem="acq_rel"', 'sem="acquire"', tests="machine"),
    Mutant("split: arrival acquires nothing", EXPAND, 'sem="acq_rel"', 'sem="release"', tests="machine"),
    Mutant("split: no barrier before the arrival", EXPAND, "acc, mask=y_mask)\n        tl.debug_barrier()", "acc, mask=y_mask)",
           note=OWN_BARRIER, tests="machine"),
    Mutant("split: no barrier behind the arrival", EXPAND, 'scope="gpu")\n        tl.debug_barrier()', 'scope="gpu")',
           note=OWN_BARRIER, tests="machine"),
    Mutant("split: tile and part mixed up", EXPAND, "tile = turn // parts[3]", "tile = turn % parts[3]"),
    Mutant("launch: counters not zeroed", LAUNCH, "torch.zeros(cdiv(tokens", "torch.empty(cdiv(tokens"),
    Mutant("launch: no program for the last part", LAYOUT, "items = tiles * (splits + 1)", "items = tiles * splits"),
    Mutant("launch: 16-bit parts of a tile", LAUNCH, "splits + 1, M, N, dtype=torch.float32", "splits + 1, M, N, dtype=x.dtype"),
    Mutant("launch: one part of u", LAYOUT, "u[1][0], u[0][0])", "u[1][0], 1)"),
]  # fmt: skip

MANY = [
    Mutant("rows: no row mask", LOAD, "mask = row_mask[:, None]", "mask = (rows >= 0)[:, None]"),
    Mutant("rows: no column mask", LOAD, "mask = mask & (j0 + j < J)[None, :]", "pass"),
    Mutant("rows: column mask off by one", LOAD, "mask & (j0 + j < J)", "mask & (j0 + j <= J)"),
    Mutant("rows: strides swapped", LOAD, ROW_OFFSET, ROW_OFFSET.replace("t[1]", "t[0]").replace("t[2]", "t[1]").replace("t[0]", "t[2]")),
    Mutant("rows: 32 bits", LOAD, "rows.to(tl.int64) * t[1]", "rows * t[1]"),
    Mutant("rows: columns in 32 bits", LOAD, "    if WIDE:\n        j = j.to(tl.int64)\n    return", "    return"),
    Mutant("gathered: a token of the next adapter", TILES, "position < tl.load", "position <= tl.load"),
    Mutant("gathered: tokens in order of place", TILES, "tl.load(gather[3] + position, mask=mask, other=0)", "tl.where(mask, position, 0)"),
    Mutant("gathered: an unused tile works", TILES, "slot = tl.load(gather[0] + tile)", "slot = tl.maximum(tl.load(gather[0] + tile), 0)"),
    Mutant("shrink: base-only tokens take a slot", SHRINK, "(slot < adapters)", "(slot <= adapters)"),
    Mutant("shrink: scale of adapter 0", SHRINK, "tl.load(scales_ptr + slot)", "tl.load(scales_ptr)"),
    Mutant("shrink: rank of adapter 0", SHRINK, "tl.load(ranks_ptr + slot)", "tl.load(ranks_ptr)"),
    Mutant("shrink: adapter 0 for all", SHRINK, "tl.cast(slot, tl.int64) * stride_ae", "0"),
    Mutant("shrink: adapter in 32 bits", SHRINK, "tl.cast(slot, tl.int64) * stride_ae", "slot * stride_ae"),
    Mutant("shrink: no rank bound", SHRINK, "within_rank(r, rank, period, 8)", "(r < R)", note=SELECTED),
    Mutant("shrink: sums beyond the rank", SHRINK, "live & any_within_rank(r0, rank, period, BLOCK_R)", "live", note=SPEED),
    Mutant("shrink: no select beyond the rank", SHRINK, SHRINK_SELECT, "live"),
    Mutant("shrink: no select of base-only tokens", SHRINK, SHRINK_SELECT, SHRINK_SELECT.replace(" & live", "")),
    Mutant("shrink: rows stored in order of place", SHRINK, "row_offsets(z, tokens, r0)", "row_offsets(z, m0 + tl.arange(0, BLOCK_M), r0)"),
    Mutant("shrink: store without row mask", SHRINK, "row_mask[:, None] & (r <", "(tokens >= 0)[:, None] & (r <"),
    Mutant("shrink: store mask off by one", SHRINK, "(r < R)", "(r <= R)"),
    Mutant("shrink: mask of the gathered place", SHRINK, "threshold, tokens, k0", "threshold, m0 + tl.arange(0, BLOCK_M), k0"),
    Mutant("wgrad: end of the next adapter", WGRAD, "starts_ptr + adapter + 1", "starts_ptr + adapter + 2"),
    Mutant("wgrad: from the first token", WGRAD, "first = tl.load(starts_ptr + adapter)", "first = 0"),
    Mutant("wgrad: tokens in order of place", WGRAD, ORDERED, "tl.where(row_mask, tokens, 0)"),
    Mutant("wgrad: splits rounded down", WGRAD, PER_SPLIT, "tl.cdiv(M - first, BLOCK_M) // tl.num_programs(2)"),
    Mutant("wgrad: splits of all the tokens", WGRAD, "blocks_per_split = tl.cdiv(tl", "tl.cdiv(tl"),
    Mutant("wgrad: rank of adapter 0", WGRAD, "tl.load(ranks_ptr + adapter)", "tl.load(ranks_ptr)"),
    Mutant("wgrad: no select beyond the rank", WGRAD, WGRAD_SELECT, "pass"),
    Mutant("wgrad: stored in adapter 0", WGRAD, "tl.cast(adapter, tl.int64) * stride_oe", "0"),
    Mutant("wgrad: mask of the sorted place", WGRAD, "threshold, tokens, j0", "threshold, m0 + tl.arange(0, BLOCK_M), j0"),
    Mutant("expand: masked sum, not a select", LOW_RANK, SELECT, "uv += tl.where(own, 1.0, 0.0) * product"),
    Mutant("expand: no select", LOW_RANK, SELECT, "uv += product"),
    Mutant("expand: last rank block's product alone", LOW_RANK, SELECT, "uv = tl.where(own, product, uv)"),
    Mutant("masked: others' rows of u", LOW_RANK, "EVEN_R, WIDE, own).to(TYPE)", "EVEN_R, WIDE).to(TYPE)"),
    Mutant("masked: infinities in the product", LOW_RANK, "tl.where(finite, v_tile, 0.0)", "v_tile"),
    Mutant("masked: infinities lost", LOW_RANK, "tl.where(own, uv + poison[None, :], uv)", "uv"),
    Mutant("masked: infinities for all", LOW_RANK, "tl.where(own, uv + poison[None, :], uv)", "uv + poison[None, :]"),
    Mutant("masked: first rank block for all", LOW_RANK,
           "LOAD_U(u, m0, first + r0, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE, own)",
           "LOAD_U(u, m0, first, M, first + R, BLOCK_M, BLOCK_R, False, EVEN_R, WIDE, own)"),
    Mutant("expand: adapters of the first block", LOW_RANK, "rows[1] + m0 + i", "rows[1] + i"),
    Mutant("expand: number of the first block", LOW_RANK, "rows[2] + m0 // BLOCK_M", "rows[2]"),
    Mutant("expand: last adapter left out", LOW_RANK, WALKED, f"{WALKED} - STEPS"),
    Mutant("expand: last rank block left out", LOW_RANK, WALKED, f"{WALKED} - 1"),
    Mutant("expand: an adapter for each rank block", LOW_RANK, "m0 + i // STEPS", "m0 + i"),
    Mutant("expand: rank of adapter 0", LOW_RANK, "tl.load(ranks_ptr + adapter)", "tl.load(ranks_ptr)"),
    Mutant("expand: no rank bound", LOAD, "return tl.where(within_rank(r, rank, period), tile, 0.0)", "return tile"),
    Mutant("masked: first rank block of an adapter only", LOW_RANK, "(0, rank if period is None else R, BLOCK_R",
           "(0, tl.minimum(rank, 1), BLOCK_R"),
    Mutant("expand: first rank block for all", LOW_RANK, "r0 = i % STEPS * BLOCK_R", "r0 = 0"),
    Mutant("expand: adapter 0 for all", LOW_RANK, "(v[0] + adapter.to(tl.int64) * stride_ve", "(v[0]"),
    Mutant("expand: adapter in 32 bits", LOW_RANK, "(v[0] + adapter.to(tl.int64) * stride_ve", "(v[0] + adapter * stride_ve"),
    Mutant("expand: base lost beside many adapters", LOW_RANK, "return uv if FIRST else acc + uv", "return uv"),
    Mutant("expand: ids not masked", LOW_RANK, "rows[0] + tokens, mask=tokens < M, other=-1)", "rows[0] + tokens)", tests="machine"),
    Mutant("awaited: a row block waits for its first tile", EXPAND,
           "R_BLOCKS * tl.minimum(BLOCK_M, M - m0) if", "R_BLOCKS if", tests="machine"),
    Mutant("awaited: the last row block waits for ever", EXPAND, "tl.minimum(BLOCK_M, M - m0) if", "BLOCK_M if"),
    Mutant("awaited: flag counted in gathered tiles", EXPAND, "tokens // BLOCK_M", "tokens // GATHER_M"),
    Mutant("awaited: tokens that are none count, too", EXPAND, "mask=row_mask, sem=", "sem="),
    Mutant("awaited: one flag a gathered tile", EXPAND, "if SEGMENTS:  # a row", "if False:  # a row"),
    Mutant("launch: too few tickets", LAYOUT, "(adapters.tiles if adapters.tokens else num_m)", "num_m"),
    Mutant("launch: too few gathered tiles", LAYOUT, GATHERED_TILES, "tiles = cdiv(M, c.block_m)"),
    Mutant("launch: splits of a large stack", LAYOUT, "max(1, min(splits, SPLIT_ADAPTERS // E))", "splits"),
    Mutant("launch: no split of a large stack", LAYOUT, "max(1, min(splits, SPLIT_ADAPTERS // E))", "min(splits, SPLIT_ADAPTERS // E)"),
    Mutant("launch: no scales in backward", LAUNCH, SHARED, SHARED.replace("=adapters,", "=adapters._replace(scales=None),")),
    Mutant("launch: no ranks in backward", LAUNCH, SHARED, SHARED.replace("=adapters,", "=adapters._replace(ranks=None),")),
    Mutant("launch: no scales awaited", LAUNCH, 'None if c.u == "given" else adapters.scales', "None"),
    Mutant("launch: adapters a row apart", LAYOUT, "return strides[0] if", "return strides[1] if"),
    Mutant("launch: dS in parts for wgrad", LAUNCH, "in_parts(keep_ds, ", "in_parts(False, "),
    Mutant("runs: all tokens are neighbours", CHAIN, "last[e] - first[e] == end - begin - 1", "True"),
    Mutant("runs: one gap is none", CHAIN, "== end - begin - 1", "<= end - begin"),
    Mutant("runs: last token left out", CHAIN, "slice(first[e], last[e] + 1)", "slice(first[e], last[e])"),
    Mutant("runs: no scale", CHAIN, "scale * (1.0 if scales is None else scales[e])", "scale"),
    Mutant("runs: rank of the stack", CHAIN, "rank if ranks is None else min(ranks[e], rank)", "rank"),
    Mutant("add_product: gathered rows lose the base", CHAIN, "gathered = t[rows]", "gathered = torch.zeros_like(t[rows])"),
    Mutant("chain: no dropout of gathered tokens", CHAIN, "its_x if bits is None else drop(its_x, bits[rows])", "its_x"),
    Mutant("chain: mask of the first tokens", CHAIN, "bits is None else bits[rows]", "bits is None else bits[: len(dy[rows])]"),
    Mutant("chain: dX without 1 / (1 - p)", CHAIN, "drop(scaled_mm(a, b, keep), bits)", "drop(scaled_mm(a, b, 1.0), bits)"),
    Mutant("plan: one slot too few in the bound", PLAN, "min(E + 1, M)", "min(E, M)"),
    Mutant("plan: unused tiles not marked", PLAN, "torch.where(unused, -1, slot)", "slot"),
    Mutant("plan: tiles one token apart", PLAN, "(index - (ends - tiles)[inside]) * block", "index - (ends - tiles)[inside]"),
    Mutant("plan: a tile for the slot before", PLAN, "index, right=True", "index, right=False"),
    Mutant("plan: no start of the base-only tokens' end", PLAN, "torch.arange(num_adapters + 2,", "torch.arange(num_adapters + 1,"),
    Mutant("plan: base-only tokens are an adapter", PLAN, "torch.where(slot == num_adapters, -1, slot)", "slot"),
    Mutant("plan: ids past the last are kept", PLAN, "(adapter_ids < 0) | (adapter_ids >= num_adapters)", "adapter_ids < 0"),
    Mutant("plan: id E allowed", PLAN, "(adapter_ids < num_adapters)).all()", "(adapter_ids <= num_adapters)).all()"),
    Mutant("present: base-only tokens, too", PLAN, "new = ordered >= 0", "new = ordered >= -1"),
    Mutant("present: repeats", PLAN, "new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]", "pass"),
    Mutant("present: from the second place on", PLAN, "torch.cumsum(new, 1) - 1", "torch.cumsum(new, 1)"),
]  # fmt: skip

MERGE = [
    Mutant("merge: the product in 16 bits", EXPAND, "tl.float32 if EXACT else y[0].dtype.element_ty", "y[0].dtype.element_ty"),
    Mutant("merge: TF32 where torch has it", LAYOUT, '"ieee" if exact else precision', "precision", tests="machine"),
    Mutant("merge: without the scale", LAUNCH, "u = lora_B.float() * scale", "u = lora_B.float()"),
    Mutant("merge: the scale after a rounding", LAUNCH, "u = lora_B.float() * scale", "u = (lora_B * scale).float()"),
    Mutant("merge: onto the weight, not the base", LAUNCH, "u=u, base=base, out=weight", "u=u, base=weight, out=weight"),
    Mutant("merge: into a copy", LAUNCH, "y = x.new_empty(e.y) if out is None else out", "y = x.new_empty(e.sizes[:2])"),
    Mutant("merge: a weight contiguous by rows", LAYOUT, "y_strides = (N, 1) if out is None else flat(out)[1]", "y_strides = (N, 1)"),
    Mutant("merge: library, without the scale", MERGING, "torch.addmm(base, lora_B, lora_A, alpha=scale, out=weight)",
           "torch.addmm(base, lora_B, lora_A, out=weight)"),
    Mutant("merge: library in 16 bits for float32 adapters", MERGING, "A, B = lora_A.to(wide), lora_B.to(wide)",
           "A, B = lora_A.to(weight.dtype).to(wide), lora_B.to(weight.dtype).to(wide)"),
    Mutant("merge: the last rows left out", MERGING, "range(0, weight.shape[0], rows)", "range(0, weight.shape[0] - rows, rows)"),
    Mutant("merge: what is not finite is kept", MERGING, "if not finite(weight):", "if False:"),
    Mutant("merge: the base is not given back", MERGING, "        weight.copy_(before)\n", ""),
    Mutant("merge: on top of the one before", MERGING, MERGED_FROM, MERGED_FROM.replace("base", "self.weight.detach()")),
]  # fmt: skip

PLANNED = [
    Mutant("plan kernel: a negative id is adapter 0", PLANNER, SLOT, "tl.where(raw < E, tl.maximum(raw, 0), E)"),
    Mutant("plan kernel: ids past the last are kept", PLANNER, SLOT, "tl.where(raw >= 0, raw, E)"),
    Mutant("plan kernel: ids lie together", PLANNER, "tokens.to(tl.int64) * ids[1]", "tokens"),
    Mutant("plan kernel: not stable", PLANNER, "tokens, M, E) * M + tokens", "tokens, M, E) * M + M - 1 - tokens"),
    Mutant("plan kernel: equal keys are smaller", PLANNER, "theirs[None, :] < keys[:, None]", "theirs[None, :] <= keys[:, None]"),
    Mutant("plan kernel: the first chunk alone", PLANNER, "tl.range(0, M, CHUNK)", "tl.range(0, tl.minimum(M, 1), CHUNK)"),
    Mutant("present kernel: base-only tokens, too", PLANNER, "(repeats == 0) & (slot < E)", "repeats == 0"),
    Mutant("present kernel: repeats", PLANNER, "(repeats == 0) & (slot < E)", "slot < E"),
    Mutant("present kernel: repeats have places", PLANNER, "& its_new[None, :]", ""),
    Mutant("present kernel: the rest is not written", PLANNER, "mask=local >= count)", "mask=local > count)"),
    Mutant("present kernel: zeros over the last", PLANNER, "mask=local >= count)", "mask=local >= count - 1)"),
    Mutant("plan kernel: base-only tokens are an adapter", PLANNER, "tl.where(slot == E, -1, slot)", "slot"),
    Mutant("plan kernel: -2 is valid", PLANNER, "(raw < -1) | (raw >= E)", "(raw < -2) | (raw >= E)"),
    Mutant("plan kernel: E is valid", PLANNER, "(raw < -1) | (raw >= E)", "(raw < -1) | (raw > E)"),
    Mutant("plan kernel: the end of the base-only tokens", PLANNER, "mask=slot < E + 2", "mask=slot < E + 1"),
    Mutant("plan kernel: tiles of one slot", PLANNER, "past = before + tl.cumsum(its_tiles, 0)", "past = tl.cumsum(its_tiles, 0)"),
    Mutant("plan kernel: tiles one token apart", PLANNER, "[None, :]) * GATHER_BLOCK", "[None, :])"),
    Mutant("plan kernel: unfilled tiles left out", PLANNER, "tl.cdiv(end - begin, GATHER_BLOCK)", "(end - begin) // GATHER_BLOCK"),
    Mutant("plan kernel: no tiles of base-only tokens", PLANNER, "tl.range(0, E + 1, CHUNK)", "tl.range(0, E, CHUNK)"),
    Mutant("plan kernel: base-only tokens left out", PLANNER, "mask=slot <= E, other=0)", "mask=slot < E, other=0)", 2),
    Mutant("plan kernel: the last block's wrong ids alone", PLANNER, "wrong |= tl.load", "wrong = tl.load"),
    Mutant("plan kernel: always valid", PLANNER, "tl.max(wrong, 0) == 0", "tl.max(wrong, 0) >= 0"),
    Mutant("plan: a part's token before itself", PLANNER, "others[None, :] < tokens[:, None]", "others[None, :] <= tokens[:, None]"),
    Mutant("plan: all slots of a part", PLANNER, "(its_slot[None, :] == slot[:, None]) & (others", "(slot[:, None] >= 0) & (others"),
    Mutant("plan: counts of the part itself", PLANNER, "tl.load(ends_ptr + at - 1, mask=at > 0, other=0)", "tl.load(ends_ptr + at)"),
    Mutant("plan: counts past the last token", PLANNER, "tl.where(tokens < M, slots(ids, tokens, M, E), -1)", "slots(ids, tokens, M, E)"),
    Mutant("plan: another part's counts", PLANNER, "slot * parts + block * BLOCK // PART)", "slot * parts)"),
]  # fmt: skip

OVERLAPPED = [
    Mutant("overlap: beside what nobody launched", LAUNCH, 'need_dx and config.wgrad.beside == "pdl"', 'config.wgrad.beside == "pdl"'),
    Mutant("overlap: as if it were alone", LAUNCH, '("wgrad", out_transposed, beside)', '("wgrad", out_transposed)'),
    Mutant("overlap: expand lets nothing begin", LAYOUT, "if late is None else wait_then_let_next_begin", "if True else None"),
    Mutant("overlap: every program is late", LAYOUT, "late = sms * max(", "late = 0 * max("),
    Mutant("overlap: wgrad ends before expand", LAYOUT, "LET_GO=let_next_begin, WAIT=wait_for_previous)", "LET_GO=let_next_begin)"),
    Mutant("overlap: not forked", STREAMS, "    second.wait_event(forked)\n", ""),
    Mutant("overlap: not joined", STREAMS, "first.wait_stream(second)\n", "pass\n"),
    Mutant("overlap: on the first stream", STREAMS, "with torch.cuda.stream(second):", "with torch.cuda.stream(first):"),
]  # fmt: skip

BASE = [
    Mutant("base: written to", LAUNCH, "u=u, base=base, **", "u=u, base=base, out=base, **"),
    Mutant("base: by its rows alone", LAYOUT, "load_dense, base_strides", "load_dense, (N, 1)"),
    Mutant("base: not read", LAYOUT, READ_BASE, READ_BASE.replace("None:", "None and w is not None:")),
    Mutant("base: dX with dY for a base", LAUNCH, "and weight is not None:\n", "and weight is not None or not weight:\n"),
    Mutant("base: torch arm writes to it", CHAIN, "torch.addmm(base, u, B.t())", "base.addmm_(u, B.t())"),
    Mutant("base: torch arm without a copy", CHAIN, "base.clone(memory_format=torch.contiguous_format)", "base"),
    Mutant("base: torch arm drops nothing of dX", CHAIN, "dx = dx if bits is None else drop(dx, bits)", "dx = dx"),
    Mutant("base: torch arm, dX without 1 / (1 - p)", CHAIN, "dx = scaled_mm(ds, A, keep)", "dx = scaled_mm(ds, A, 1.0)"),
    Mutant("base: forgotten where x is empty", OPS, "for term in (bias, base):", "for term in (bias,):"),
    Mutant("base: of one row", OPS, "even(x), even(base)",
           "even(x), None if base is None else as_matrix(base)[:1].expand(x.numel() // x.shape[-1], -1)"),
    Mutant("base: without a gradient", AUTOGRAD, "dy if ctx.need_base else None", "None"),
    Mutant("base: trained alone, and no Function", AUTOGRAD, "added = bias if base is None else base", "added = bias"),
    Mutant("base: kept for backward", AUTOGRAD, "weight if need_weight and make is None else None", "base if need_x else None"),
    Mutant("base: autocast's dtype, not its own", AUTOGRAD, "base.dtype if isinstance(base, torch.Tensor) else torch.get", "torch.get"),
]  # fmt: skip

ROUTING = [
    Mutant("experts: the first one's weight", EXPERTS, "w[0] + expert * stride_we", "w[0]"),
    Mutant("experts: the first one's adapter", EXPERTS, "v[0] + expert * stride_ve", "v[0]"),
    Mutant("experts: the first one's bias", EXPERTS, "bias_ptr + expert * N + n0", "bias_ptr + n0"),
    Mutant("experts: bias without an end", EXPERTS, "mask=n0 + n < N, other=0.0).to", "mask=n < BLOCK_N, other=0.0).to", tests="machine"),
    Mutant("experts: rows of y, not of x", EXPERTS, "tokens // FAN", "tokens"),
    Mutant("experts: rows without an expert computed", EXPERTS, "tl.where(live, acc, 0.0)", "acc"),
    Mutant("experts: the whole stack of ranks", EXPERTS, "rank = tl.minimum(tl.load(ranks_ptr + expert), R)", "rank = R"),
    Mutant("experts: no 1 / (1 - p)", EXPERTS, "acc * inv_keep, 0.0)", "acc, 0.0)"),
    Mutant("experts: dropout on the base, too", EXPERTS, "tl.assume(K > 0)\n", "tl.assume(K > 0)\n        acc *= 1 - DROP_UV\n"),
    Mutant("experts: the mask of other columns", EXPERTS, "threshold, tokens, n0, BLOCK_M", "threshold, tokens, 0, BLOCK_M"),
    Mutant("experts: stored in the plan's order", EXPERTS, "row_offsets(y, tokens,", "row_offsets(y, tl.arange(0, BLOCK_M),"),
    Mutant("experts: no end of the columns", EXPERTS, "row_mask[:, None] & (n0 + n < N)[None, :]", "row_mask[:, None]"),
    Mutant("experts: one block of ranks", EXPERTS, "R_BLOCKS * BLOCK_R, BLOCK_R", "BLOCK_R, BLOCK_R"),
    Mutant("experts: tiles past the last", EXPERTS, "if slot >= 0:", "if slot >= -1:", note="equivalent: it has no rows"),
    Mutant("experts: rank blocks of 128", LAYOUT, "32 if x_dtype.itemsize == 4 else TILE_RANK", "128", note="equivalent: the same sums"),
    Mutant("experts: shrink's rows of y, not of x", SHRINK, "tokens // FAN", "tokens"),
    Mutant("experts: wgrad's rows of y, not of x", WGRAD, "tokens // FAN", "tokens"),
    Mutant("experts: dX without dropout", ROUTED, "lora_A, drop_uv=drop, **shared", "lora_A, **shared"),
    Mutant("experts: dA without dropout", ROUTED, "run_wgrad(x, ds, dropout=drop", "run_wgrad(x, ds, dropout=None"),
    Mutant("experts: u without dropout", ROUTED, "scale=scale, dropout=drop, dtype=x.dtype", "scale=scale, dropout=None, dtype=x.dtype"),
    Mutant("experts: dS without the scale", ROUTED, "run_shrink(dy, lora_B, scale=scale", "run_shrink(dy, lora_B, scale=1.0"),
    Mutant("experts: dX of one expert alone", OPS, "dx.sum(-2)", "dx[..., 0, :]"),
    Mutant("experts: no bias where x is empty", OPS, "torch.where(ids < 0, 0, bias[ids[:, 0].clamp(min=0)])", "None"),
    Mutant("experts: torch arm's rows of y, not of x", CHAIN, "rows = rows // top_k", "rows = rows % x.shape[0]"),
    Mutant("experts: torch arm's first weight", CHAIN, "base_linear(its_x, weight[e]", "base_linear(its_x, weight[0]"),
    Mutant("experts: torch arm's dX from the first weight", CHAIN, "torch.mm(its_dy, weight[e])", "torch.mm(its_dy, weight[0])"),
    Mutant("experts: torch arm without a bias", CHAIN, "None if bias is None else bias[e]", "None"),
    Mutant("experts: plan of one row a token", PLAN, "top_k=top_k_index.shape[1])", "top_k=1)"),
    Mutant("experts: top_k forgotten by operators", PLAN, "self.gather_block, self.top_k]", "self.gather_block, 1]"),
]  # fmt: skip

MUTANTS = [
    *ONE_ADAPTER,
    *(
        m if m.tests == "machine" else replace(m, tests=tests)
        for tests, each in (
            ("split", SPLIT),
            ("segments", MANY),
            ("merge", MERGE),
            ("plan", PLANNED),
            ("overlap", OVERLAPPED),
            ("base", BASE),
            ("experts", ROUTING),
        )
        for m in each
    ),
]

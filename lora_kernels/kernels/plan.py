"""plan: what `lora_kernels.segments` says of a batch of tokens, in few launches without a sort, an atomic or a wait.

A token's place in the order is the number of tokens with a smaller key, its slot first and its position second, and an adapter's start
is the number of tokens with smaller slots. So programs depend on the ids alone: each compares its tokens with all of them, which
stay in the L2 cache. Another launch cuts the slots, whose starts it reads, into tiles of one adapter each.

Many tokens are taken in PARTs, for comparisons grow with the square: `plan_counts` counts the tokens of each slot in each part, [slots,
parts]; the running sum over that, slots first, says how many come before a part's tokens of a slot, and within the part they are compared.
"""

import triton
import triton.language as tl


@triton.jit
def raw_ids(ids, tokens, M):
    """ids: (pointer, stride)."""
    return tl.load(ids[0] + tokens.to(tl.int64) * ids[1], mask=tokens < M, other=-1)


@triton.jit
def slots(ids, tokens, M, E):
    """The tokens' slots: their adapters, E for none."""
    raw = raw_ids(ids, tokens, M)
    return tl.where((raw >= 0) & (raw < E), raw, E).to(tl.int32)


@triton.jit
def smaller(ids, keys, M, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How many tokens have a key, slot * M + position, below each of ``keys [BLOCK]``."""
    below = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in tl.range(0, M, CHUNK):
        tokens = start + tl.arange(0, CHUNK)
        theirs = slots(ids, tokens, M, E) * M + tokens  # past the last token larger than any key
        below += (theirs[None, :] < keys[:, None]).to(tl.int32)
    return tl.sum(below, 1)


@triton.jit
def earlier_in_part(ids, slot, block, M, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr):
    """How many tokens with the same slot lie before each of a block's, ``slot [BLOCK]``, in its part."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in tl.range(block * BLOCK // PART * PART, block * BLOCK + BLOCK, CHUNK):
        others = start + tl.arange(0, CHUNK)
        its_slot = slots(ids, others, M, E)
        before += ((its_slot[None, :] == slot[:, None]) & (others[None, :] < tokens[:, None])).to(tl.int32)
    return tl.sum(before, 1)


@triton.jit
def ended(ends_ptr, at):
    """The running sum before each of these counts."""
    return tl.load(ends_ptr + at - 1, mask=at > 0, other=0)


@triton.jit
def present_in_rows(ids, present_ptr, counts_ptr, block, M, E, ROW_BLOCK: tl.constexpr):
    """The distinct adapters of a row block, ascending, then zeros; and how many they are."""
    local = tl.arange(0, ROW_BLOCK)
    slot = slots(ids, block * ROW_BLOCK + local, M, E)
    repeats = tl.zeros([ROW_BLOCK], tl.int32)
    place = tl.zeros([ROW_BLOCK], tl.int32)
    for start in tl.range(0, ROW_BLOCK, 16):  # of both axes at once a block of 128 rows would need every register there is
        other = start + tl.arange(0, 16)
        its_slot = slots(ids, block * ROW_BLOCK + other, M, E)
        same = slot[:, None] == its_slot[None, :]
        its_new = tl.sum((same & (local[:, None] < other[None, :])).to(tl.int32), 0) == 0
        place += tl.sum(((its_slot[None, :] < slot[:, None]) & its_new[None, :]).to(tl.int32), 1)
        repeats += tl.sum((same & (other[None, :] < local[:, None])).to(tl.int32), 1)
    new = (repeats == 0) & (slot < E)
    count = tl.sum(new.to(tl.int32), 0)
    tl.store(present_ptr + block * ROW_BLOCK + place, slot, mask=new)
    tl.store(present_ptr + block * ROW_BLOCK + local, 0, mask=local >= count)
    tl.store(counts_ptr + block, count)


@triton.jit
def place_tokens(
    ids, ids_ptr, order_ptr, wrong_ptr, ends_ptr, parts, block, M, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Each token's id, -1 for none, and its place in the order; and whether an id of the block is neither."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    raw = raw_ids(ids, tokens, M)
    slot = slots(ids, tokens, M, E)
    tl.store(ids_ptr + tokens, tl.where(slot == E, -1, slot), mask=tokens < M)
    tl.store(wrong_ptr + block, tl.max(((raw < -1) | (raw >= E)).to(tl.int32), 0))
    if PART is None:
        place = smaller(ids, slot * M + tokens, M, E, BLOCK, CHUNK)
    else:
        place = ended(ends_ptr, slot * parts + block * BLOCK // PART) + earlier_in_part(ids, slot, block, M, E, BLOCK, CHUNK, PART)
    tl.store(order_ptr + place, tokens, mask=tokens < M)


@triton.jit
def start_slots(ids, starts_ptr, ends_ptr, parts, block, M, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr):
    """Where in the order each slot begins, and after the last one its end."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    if PART is None:
        start = smaller(ids, tl.minimum(slot, E + 1) * M, M, E, BLOCK, CHUNK)
    else:
        start = ended(ends_ptr, tl.minimum(slot, E + 1) * parts)
    tl.store(starts_ptr + slot, start, mask=slot < E + 2)


@triton.jit(do_not_specialize=["M", "E", "parts"])
def plan_counts(ids, counts_ptr, M, E, parts, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr):
    """Grid [parts, blocks of slots]: how many tokens of each slot a part has, counts [E + 1, parts]."""
    part = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in tl.range(part * PART, part * PART + PART, CHUNK):
        tokens = start + tl.arange(0, CHUNK)
        its_slot = tl.where(tokens < M, slots(ids, tokens, M, E), -1)
        count += (its_slot[None, :] == slot[:, None]).to(tl.int32)
    tl.store(counts_ptr + slot * parts + part, tl.sum(count, 1), mask=slot <= E)


@triton.jit(do_not_specialize=["M", "E", "parts"])
def plan_tokens(
    ids,
    ids_ptr,
    order_ptr,
    starts_ptr,
    present_ptr,
    counts_ptr,
    wrong_ptr,
    ends_ptr,
    parts,
    M,
    E,
    ROW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """Grid [row blocks + blocks of tokens + blocks of slots], each program one of them. ends: counts' running sum, or None without PART."""
    row_blocks = tl.cdiv(M, ROW_BLOCK)
    token_blocks = tl.cdiv(M, BLOCK)
    block = tl.program_id(0)
    if block < row_blocks:
        present_in_rows(ids, present_ptr, counts_ptr, block, M, E, ROW_BLOCK)
    elif block < row_blocks + token_blocks:
        place_tokens(ids, ids_ptr, order_ptr, wrong_ptr, ends_ptr, parts, block - row_blocks, M, E, BLOCK, CHUNK, PART)
    else:
        start_slots(ids, starts_ptr, ends_ptr, parts, block - row_blocks - token_blocks, M, E, BLOCK, CHUNK, PART)


@triton.jit(do_not_specialize=["E", "wrongs", "tiles"])
def plan_tiles(
    starts_ptr,
    wrong_ptr,
    adapter_ptr,
    first_ptr,
    valid_ptr,
    E,
    wrongs,
    tiles,
    GATHER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid [blocks of tiles]: the slot of each tile and where in the order it begins; whether all ids were valid."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    adapter = tl.full([BLOCK], -1, tl.int32)
    first = tl.zeros([BLOCK], tl.int32)
    before = 0
    for start in tl.range(0, E + 1, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        begin = tl.load(starts_ptr + slot, mask=slot <= E, other=0)
        end = tl.load(starts_ptr + slot + 1, mask=slot <= E, other=0)
        its_tiles = tl.cdiv(end - begin, GATHER_BLOCK)
        past = before + tl.cumsum(its_tiles, 0)
        inside = (tile[:, None] < past[None, :]) & (tile[:, None] >= (past - its_tiles)[None, :])
        at = begin[None, :] + (tile[:, None] - (past - its_tiles)[None, :]) * GATHER_BLOCK
        adapter += tl.sum(tl.where(inside, slot[None, :] + 1, 0), 1)
        first += tl.sum(tl.where(inside, at, 0), 1)
        before += tl.sum(its_tiles, 0)
    tl.store(adapter_ptr + tile, adapter, mask=tile < tiles)
    tl.store(first_ptr + tile, first, mask=tile < tiles)
    if tl.program_id(0) == 0:
        wrong = tl.zeros([CHUNK], tl.int32)
        for start in tl.range(0, wrongs, CHUNK):
            blocks = start + tl.arange(0, CHUNK)
            wrong |= tl.load(wrong_ptr + blocks, mask=blocks < wrongs, other=0)
        tl.store(valid_ptr, tl.max(wrong, 0) == 0)

"""plan: what `lora_kernels.segments` says of a batch of tokens, in two launches without a sort, an atomic or a wait.

A token's place in the order is the number of tokens with a smaller key, its slot first and its position second, and an adapter's start
is the number of tokens with smaller slots. So programs depend on the ids alone: each compares its tokens with all of them, which
stay in the L2 cache. The second launch cuts the slots, whose starts it reads, into tiles of one adapter each.
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
def place_tokens(ids, ids_ptr, order_ptr, wrong_ptr, block, M, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Each token's id, -1 for none, and its place in the order; and whether an id of the block is neither."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    raw = raw_ids(ids, tokens, M)
    slot = slots(ids, tokens, M, E)
    tl.store(ids_ptr + tokens, tl.where(slot == E, -1, slot), mask=tokens < M)
    tl.store(wrong_ptr + block, tl.max(((raw < -1) | (raw >= E)).to(tl.int32), 0))
    place = smaller(ids, slot * M + tokens, M, E, BLOCK, CHUNK)
    tl.store(order_ptr + place, tokens, mask=tokens < M)


@triton.jit
def start_slots(ids, starts_ptr, block, M, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Where in the order each slot begins, and after the last one its end."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    keys = tl.minimum(slot, E + 1) * M
    tl.store(starts_ptr + slot, smaller(ids, keys, M, E, BLOCK, CHUNK), mask=slot < E + 2)


@triton.jit(do_not_specialize=["M", "E"])
def plan_tokens(
    ids,
    ids_ptr,
    order_ptr,
    starts_ptr,
    present_ptr,
    counts_ptr,
    wrong_ptr,
    M,
    E,
    ROW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid [row blocks + blocks of tokens + blocks of slots], each program one of them."""
    row_blocks = tl.cdiv(M, ROW_BLOCK)
    token_blocks = tl.cdiv(M, BLOCK)
    block = tl.program_id(0)
    if block < row_blocks:
        present_in_rows(ids, present_ptr, counts_ptr, block, M, E, ROW_BLOCK)
    elif block < row_blocks + token_blocks:
        place_tokens(ids, ids_ptr, order_ptr, wrong_ptr, block - row_blocks, M, E, BLOCK, CHUNK)
    else:
        start_slots(ids, starts_ptr, block - row_blocks - token_blocks, M, E, BLOCK, CHUNK)


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

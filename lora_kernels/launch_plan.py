"""The launches that make a plan: beside `launch`, whose kernels read it.

up to PLAN_TOKENS    plan_tokens, plan_tiles
more                 plan_counts, the running sum of its counts by torch, plan_tokens, plan_tiles
"""

from __future__ import annotations

import torch

from .kernels.plan import plan_counts, plan_tiles, plan_tokens
from .launch import run_kernel
from .layouts import INT32, Options, cdiv
from .segments import lengths
from .streams import on_device

PLAN_TOKENS, PLAN_CHUNK = 8192, 128  # up to which every token is compared with every other, so many at a time
PLAN_PART = 1024  # tokens of a part, compared with one another


def plans(ids: torch.Tensor, num_adapters: int) -> bool:
    """Whether `plan` serves these ids: some, and counts of each part and slot that 32 bits can number."""
    return 0 < ids.shape[0] < INT32 // 2 and (num_adapters + 2) * cdiv(ids.shape[0], PLAN_PART) < INT32


def plan(ids: torch.Tensor, num_adapters: int, row_block: int, gather_block: int) -> list[torch.Tensor]:
    """What `lora_kernels.segments.by_library` returns. ids: int32 or int64 ``[M]``, any stride."""
    M, E, block = ids.shape[0], num_adapters, 32
    tensors = [ids.new_empty(length, dtype=torch.int32) for length in lengths(M, E, row_block, gather_block)]
    its_ids, order, starts, tile_adapter, tile_first, present, counts = tensors
    blocks, slot_blocks, tiles = cdiv(M, block), cdiv(E + 2, block), tile_adapter.shape[0]
    wrong, valid = ids.new_empty(blocks, dtype=torch.int32), ids.new_empty((), dtype=torch.bool)
    options = dict(BLOCK=block, CHUNK=PLAN_CHUNK, num_warps=8)
    raw, ends, parts, part = (ids, ids.stride(0)), None, 0, None
    with on_device(ids):
        if M > PLAN_TOKENS or (E + 1) * M + PLAN_CHUNK >= INT32:
            parts, part = cdiv(M, PLAN_PART), PLAN_PART
            ends = ids.new_empty((E + 1) * parts, dtype=torch.int32)
            run_kernel(plan_counts, (parts, slot_blocks), (raw, ends, M, E, parts), Options(PART=part, **options))
            ends = ends.cumsum(0, dtype=torch.int32)
        args: tuple = (raw, its_ids, order, starts, present, counts, wrong, ends, parts, M, E)
        run_kernel(plan_tokens, (counts.shape[0] + blocks + slot_blocks,), args, Options(ROW_BLOCK=row_block, PART=part, **options))
        args = (starts, wrong, tile_adapter, tile_first, valid, E, blocks, tiles)
        run_kernel(plan_tiles, (cdiv(tiles, block),), args, Options(GATHER_BLOCK=gather_block, **options))
    return [*tensors, valid]

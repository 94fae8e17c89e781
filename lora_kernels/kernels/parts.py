"""add_parts: ``out = parts[0] + parts[1] + ...`` in float32, in their order, rounded once: results whose axis was split over programs.

One launch for one or two of them, dA and dB, where a library's sum and cast would be four.
"""

import triton
import triton.language as tl

from .load import load_parts, tile_mask, tile_ptrs


@triton.jit
def add_block(block, parts, number, out, length, BLOCK: tl.constexpr):
    """One block of out, all of whose elements lie in a row. parts: (pointer, stride from one to the next)."""
    j0 = tl.cast(block, tl.int64) * BLOCK
    tile = load_parts((parts[0], 0, 1, parts[1], number), 0, j0, 1, length, 1, BLOCK, True, False, False)
    tl.store(tile_ptrs((out, 0, 1), 0, j0, 1, BLOCK, False), tile.to(out.dtype.element_ty), mask=tile_mask(0, j0, 1, length, 1, BLOCK))


@triton.jit(do_not_specialize=["number", "second_number", "blocks"])
def add_parts(
    parts, number, out, length, second_parts, second_number, second_out, second_length, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of the first result, blocks, and of the second, if there is one]. number: of parts; length: of a result."""
    block = tl.program_id(0)
    if second_parts is None:
        add_block(block, parts, number, out, length, BLOCK)
    elif block < blocks:
        add_block(block, parts, number, out, length, BLOCK)
    else:
        add_block(block - blocks, second_parts, second_number, second_out, second_length, BLOCK)

"""The order in which output tiles are computed, the columns of packed layers, and the tokens of a gathered tile."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of a tile, GROUP_M row blocks at a time: neighbours share columns of w while they are in the L2 cache."""
    group = tile // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * num_n)
    return first_m + inside % rows, inside // rows


@triton.jit
def column_blocks(columns, ends, BLOCK: tl.constexpr):
    """How many blocks of columns there are, none of two layers. ends: None, or where the columns of each packed layer end."""
    blocks = tl.cdiv(columns if ends is None else ends[0], BLOCK)
    if ends is not None:
        for i in tl.static_range(1, len(ends)):
            blocks += tl.cdiv(ends[i] - ends[i - 1], BLOCK)
    return blocks


@triton.jit
def column_block(block, columns, ends, BLOCK: tl.constexpr):
    """(layer, its first column, the block's first column, the layer's end) of a block of columns."""
    layer = 0
    begin = 0
    first = block * BLOCK
    end = columns
    if ends is not None:
        end = ends[0]
        before = 0
        for i in tl.static_range(1, len(ends)):
            before += tl.cdiv(ends[i - 1] - (ends[i - 2] if i > 1 else 0), BLOCK)
            here = block >= before
            layer = tl.where(here, i, layer)
            begin = tl.where(here, ends[i - 1], begin)
            first = tl.where(here, ends[i - 1] + (block - before) * BLOCK, first)
            end = tl.where(here, ends[i], end)
    return layer, begin, first, end


@triton.jit
def layer_columns(layer, ends):
    """(first column, end) of a packed layer."""
    begin = 0
    end = ends[0]
    for i in tl.static_range(1, len(ends)):
        begin = tl.where(layer == i, ends[i - 1], begin)
        end = tl.where(layer == i, ends[i], end)
    return begin, end


@triton.jit
def gathered_tile(gather, tile, BLOCK_M: tl.constexpr):
    """(slot, tokens, mask) of a tile of one adapter's tokens: the plug `segments` of shrink. An unused tile has slot -1 and no token.

    gather: (tile_adapter, tile_first, starts, order), as `lora_kernels.segments` describes them.
    """
    slot = tl.load(gather[0] + tile)
    position = tl.load(gather[1] + tile) + tl.arange(0, BLOCK_M)
    mask = position < tl.load(gather[2] + slot + 1)
    return slot, tl.load(gather[3] + position, mask=mask, other=0), mask

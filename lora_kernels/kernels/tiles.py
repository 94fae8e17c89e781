"""The order in which output tiles are computed, and the tokens of a gathered tile."""

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
def gathered_tile(gather, tile, BLOCK_M: tl.constexpr):
    """(slot, tokens, mask) of a tile of one adapter's tokens: the plug `segments` of shrink. An unused tile has slot -1 and no token.

    gather: (tile_adapter, tile_first, starts, order), as `lora_kernels.segments` describes them.
    """
    slot = tl.load(gather[0] + tile)
    position = tl.load(gather[1] + tile) + tl.arange(0, BLOCK_M)
    mask = position < tl.load(gather[2] + slot + 1)
    return slot, tl.load(gather[3] + position, mask=mask, other=0), mask

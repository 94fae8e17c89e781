"""The order in which output tiles are computed."""

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

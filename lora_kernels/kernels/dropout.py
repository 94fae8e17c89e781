"""The dropout plug: ``keep(m, j) = lane(philox(seed, (m, 0, j // 8, 0)), j % 8) >= threshold``.

The mask depends on token, feature and seed alone, never on tiles or passes, so shrink, expand and wgrad regenerate one
mask. `lora_kernels.philox` defines it; Philox-4x32 with 7 rounds, eight 16-bit lanes a call.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, threshold, tokens, j0, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr):
    """The mask of these tokens from feature j0 on, a multiple of 8: int1 [BLOCK_M, BLOCK_J]. tokens: [BLOCK_M], in any order."""
    token = tokens[:, None]
    group = (j0 // 8 + tl.arange(0, BLOCK_J // 8))[None, :]
    # [BLOCK_M, BLOCK_J // 8]
    zero = tl.zeros([BLOCK_M, BLOCK_J // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, token + zero, zero, group + zero, zero, 7)
    # [BLOCK_M, BLOCK_J // 8, 2, 2], the words in order
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes.to(tl.int32) >= threshold, [BLOCK_M, BLOCK_J])


@triton.jit
def drop(x, seed, threshold, tokens, j0, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr):
    """``where(keep, x, 0)``; the factor 1 / (1 - p) belongs to the float32 scale of the product that follows."""
    return tl.where(keep_tile(seed, threshold, tokens, j0, BLOCK_M, BLOCK_J), x, tl.zeros_like(x))

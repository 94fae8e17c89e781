"""Philox-4x32-7 in torch integers: the random numbers behind the dropout mask.

``keep(m, j) = lane(philox(seed, counter = (m, 0, j // 8, 0)), j % 8) >= threshold``

One Philox call gives four 32-bit words, read as eight 16-bit lanes, so it decides eight neighbouring features
of one token. The mask is a pure function of (seed, token, feature): every kernel, whatever its tiles, and every
pass regenerates the same one. Seven rounds are the fewest that pass BigCrush (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3", table 2).
"""

from __future__ import annotations

import functools

import torch

from .segments import readable

ROUNDS = 7
LANES = 8
LANE_BITS = 16
_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_SIGNS = -0x7FFF7FFF7FFF8000  # 0x8000 in each of an int64's four lanes
_GATHER = 1 << 51 | 1 << 34 | 1 << 17 | 1  # times four lanes of 0 or 1: the first in bit 51, the last in bit 48, and nothing above
_CPU_CALLS = 1 << 18  # Philox calls at a time: the temporaries stay in the shared cache, and every thread has work
_GPU_CALLS = 1 << 22  # and here within 200 MiB


def philox_4x32(counter, key, rounds: int = ROUNDS):
    """Philox-4x32, equation (2) of Salmon et al. 2011.

    Args:
        counter: Four int64 tensors that hold uint32 values, of shapes that broadcast.
        key: Two ints or int64 tensors that hold uint32 values.
        rounds: How many rounds; 10 is the paper's default, 7 its "Crush-resistant" minimum, 1 the least.
    Returns:
        Four int64 tensors of uint32 values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shape = torch.broadcast_shapes(*(c.shape for c in counter))
    # An int64 product of two uint32 wraps modulo 2^64, so its bits are those of the unsigned product. Words that are only
    # xored may carry bits above their 32 until the one mask at the end of a round; those that are multiplied may not.
    for done in range(rounds):
        if done < 2:  # these meet words that depend on one axis each: they cost next to nothing unbroadcast
            p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
            c0, c1, c2, c3 = ((p1 >> 32) & _WORD ^ k0) ^ (c1 & _WORD), p1, ((p0 >> 32) & _WORD ^ k1) ^ (c3 & _WORD), p0
        else:
            if done == 2:
                c0, c2 = (c.broadcast_to(shape).contiguous() for c in (c0, c2))
            if done < 4:  # c1 and c3 are not broadcast yet; what they become takes a buffer each
                p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
            torch.mul(c0, _MULTIPLIER_0, out=p0)
            torch.mul(c2, _MULTIPLIER_1, out=p1)
            torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
            torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
            c1, p1, c3, p0 = p1, c1, p0, c3
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def threshold_of(p: float) -> int:
    """The 16-bit threshold of dropout probability ``p`` in [0, 1): lanes below it are dropped.

    ``p`` is thereby rounded to a multiple of 2^-16, and at most ``1 - 2^-16``; `inv_keep` follows the rounded value, so
    the mean of the dropped tensor stays exactly the tensor.
    """
    return min(round(p * (1 << LANE_BITS)), (1 << LANE_BITS) - 1)


def inv_keep(p: float) -> float:
    """``1 / (1 - p)`` for the rounded ``p`` of `threshold_of`."""
    full = 1 << LANE_BITS
    return full / (full - threshold_of(p))


def keep_mask(seed: torch.Tensor, tokens: int, features: int, p: float) -> torch.Tensor:
    """The dropout mask: True where an element is kept.

    Args:
        seed: int64 tensor with one element.
        tokens, features: The mask's shape.
        p: Dropout probability in [0, 1).
    Returns:
        bool ``[tokens, features]`` on the seed's device.
    """
    return unpacked(packed_mask(seed, tokens, features, p), features, torch.bool)


def packed_mask(seed: torch.Tensor, tokens: int, features: int, p: float) -> torch.Tensor:
    """`keep_mask` as bits: uint8 ``[tokens, ceil(features / 8)]``, the first feature in the highest bit, as numpy.packbits has it."""
    device = seed.device
    groups = -(-features // LANES)
    packed = torch.empty(tokens, groups, dtype=torch.uint8, device=device)
    number = int(seed) if readable(seed) else seed.reshape(())  # Python's own arithmetic on the key costs nothing
    key = (number & _WORD, (number >> 32) & _WORD)
    threshold = threshold_of(p) - (1 << 15)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    column = torch.arange(groups, device=device)
    rows = max(1, (_CPU_CALLS if device.type == "cpu" else _GPU_CALLS) // max(groups, 1))
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        token = torch.arange(start, stop, device=device)[:, None]
        w0, w1, w2, w3 = philox_4x32((token, zero, column, zero), key)
        halves = []
        for low, high in ((w0, w1), (w2, w3)):
            # Two words as four signed lanes in memory; the flipped sign bits make the comparison unsigned.
            words = high.bitwise_left_shift_(32).bitwise_or_(low).bitwise_xor_(_SIGNS)
            words.view(torch.int16).ge_(threshold)  # in place: a tenth of the time of one that makes a bool on a CPU
            halves.append(words.mul_(_GATHER))
        packed[start:stop] = halves[0].bitwise_right_shift_(44).bitwise_or_(halves[1].bitwise_right_shift_(48))
    return packed


def unpacked(packed: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
    """The bits of `packed_mask` as bool, or integers of ``dtype``, ``[tokens, features]``: all ones (-1) where an element is kept."""
    table = _cpu_bytes(dtype) if packed.device.type == "cpu" else _bytes(dtype, packed.device)
    return torch.embedding(table, packed.to(torch.int32)).flatten(1)[:, :features]


def _bytes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[256, 8]``: the bits of each byte."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(LANES - 1, -1, -1, device=device) & 1).neg_().to(dtype)


_cpu_bytes = functools.cache(functools.partial(_bytes, device=torch.device("cpu")))


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh int64 seed of shape [] from torch's default generator of ``device``, without a host sync.

    ``torch.manual_seed``, checkpoint recomputation and CUDA-graph replay therefore govern it.
    """
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)

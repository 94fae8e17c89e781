"""What NumPy has no word for: PTX's shifts, divisions, bit fields, byte permutations and roundings, over unsigned vectors.

Source: PTX ISA 8.7 and 9.0, https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from __future__ import annotations

import numpy as np

U32, U64 = np.uint32, np.uint64


def fma(a, b, c):
    """float32 with one rounding (but for what float64 rounds of the sum first)."""
    return (a.astype(np.float64) * b + c).astype(np.float32).view(U32)


def div(a, b):
    """Towards zero; anything by zero is anything."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def rem(a, b):
    return (a - div(a, b) * b).astype(a.dtype)


def mul_hi(a, b):
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{'int' if a.dtype.kind == 'i' else 'uint'}{2 * bits}").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(f"uint{bits}")
    shape = np.broadcast_shapes(a.shape, b.shape)
    pairs = zip(np.broadcast_to(a, shape).ravel().tolist(), np.broadcast_to(b, shape).ravel().tolist(), strict=True)
    return np.array([(x * y >> 64) & (2**64 - 1) for x, y in pairs], U64).reshape(shape)


def shl(a, n):
    """A shift by as many bits as there are, or more, leaves none."""
    bits = a.dtype.itemsize * 8
    n = n.astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, a.dtype.type(bits - 1)))


def shr(a, n):
    """The same, but for the sign of signed ones."""
    bits = a.dtype.itemsize * 8
    n = np.minimum(n, U32(bits)).astype(a.dtype)
    shifted = a >> np.minimum(n, a.dtype.type(bits - 1))
    return shifted if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), shifted)


def shf(low, high, n, to: str, wrap: bool):
    """32 bits out of 64 shifted to the left ("l": the upper ones) or the right."""
    n = (n & U32(31) if wrap else np.minimum(n, U32(32))).astype(U64)
    both = (high.astype(U64) << U64(32)) | low
    return ((both << n) >> U64(32) if to == "l" else both >> n).astype(U32)


def lop3(a, b, c, table: int):
    out = a & U32(0)
    for k in range(8):
        if table >> k & 1:
            out = out | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return out


def bfe(a, position, length):
    """``length`` bits from ``position`` on, with their sign if a is signed."""
    signed = a.dtype.kind == "i"
    if signed:
        up = np.int64(64) - (position + length).astype(np.int64)
        return ((a.astype(np.int64) << up) >> (np.int64(64) - length.astype(np.int64))).astype(a.dtype)
    mask = (U64(1) << np.minimum(length & U32(255), U32(63)).astype(U64)) - U64(1)
    return ((a.astype(U64) >> (position & U32(255)).astype(U64)) & mask).astype(a.dtype)


def bfi(a, b, position, length):
    """b with ``length`` bits of a from ``position`` on."""
    mask = (((U64(1) << length.astype(U64)) - U64(1)) << position.astype(U64)).astype(U32)
    return (b & ~mask) | ((a << position) & mask)


def prmt(a, b, selector):
    """Four of the eight bytes of a and b, each by four bits of the selector."""
    both = a.astype(U64) | (b.astype(U64) << U64(32))
    out = U32(0)
    for k in range(4):
        pick = (selector >> U32(4 * k)) & U32(15)
        byte = ((both >> ((pick & U32(7)) * U32(8)).astype(U64)) & U64(255)).astype(U32)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        out = out | (np.where(pick & U32(8), sign, byte) << U32(8 * k))
    return out


def clz(a):
    bits = np.floor(np.log2(np.maximum(a, 1).astype(np.float64))).astype(U32)
    return np.where(a == 0, U32(32), U32(31) - bits)


def bf16(x):
    """float32 -> the nearest bfloat16's bits, ties to even."""
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def f16(x):
    return x.astype(np.float16).view(np.uint16)


def pair(low, high):
    return low.astype(U32) | (high.astype(U32) << U32(16))


def halves(bits):
    """The two numbers that `pair` puts into one."""
    return (bits & U32(0xFFFF)).astype(np.uint16), (bits >> U32(16)).astype(np.uint16)


def floats(bits, kind: str):
    """float32 of the bits of "f16", "bf16" or, what it leaves out taken for zero, "tf32"; others as they are."""
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (bits.astype(U32) << U32(16)).view(np.float32)
    return (bits & U32(0xFFFFE000)).view(np.float32) if kind == "tf32" else bits


def small_float(operation, x, y, kind: str):
    """Of bits of float16 or bfloat16, or of pairs of them: by float32, whose own rounding changes nothing."""
    if kind.endswith("x2"):
        return pair(*(small_float(operation, *each, kind[:-2]) for each in zip(halves(x), halves(y), strict=True)))
    return (f16 if kind == "f16" else bf16)(operation(floats(x, kind), floats(y, kind)))


def compared(test: str, kind: str, x, y) -> list:
    """Of floats, or of the two halves of each; a test that ends in u is true of NaN, too, and any other false."""
    if kind.endswith("x2"):
        return [compared(test, kind[:-2], *each)[0] for each in zip(halves(x), halves(y), strict=True)]
    x, y = floats(x, kind), floats(y, kind)
    unordered = np.isnan(x) | np.isnan(y)
    if test in ("nan", "num"):
        return [unordered if test == "nan" else ~unordered]
    which = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    holds = which[test[:2]](x, y)
    return [holds | unordered if test.endswith("u") else holds & ~unordered]


def tf32(bits):
    """The nearest TF32, ties away from zero."""
    return (bits + U32(0x1000)) & U32(0xFFFFE000)

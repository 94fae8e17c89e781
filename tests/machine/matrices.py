"""Instructions of whole warps: matrices in registers and shared memory, and what lanes tell each other.

Layouts: PTX ISA, "Matrix fragments for mma.m16n8k16", "Asynchronous warpgroup level matrix instructions", "Matrix descriptor format".
In the index letters below, W is a warp, g the eight groups of four lanes, t a lane of a group, h one of two neighbours.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import floats, halves
from .memory import ENGINE, LANES, MANY, Fault, Memory

U32 = np.uint32


def _warps(program, mask) -> np.ndarray:
    """The warps that run an instruction, each as a whole."""
    if mask is None:
        return np.arange(program.threads // LANES)
    lanes = mask.reshape(-1, LANES)
    if (lanes.any(1) != lanes.all(1)).any():
        raise Fault("an instruction of whole warps, run by a part of one")
    return np.flatnonzero(lanes.any(1))


def _registers(program, values, warps) -> np.ndarray:
    """``[n, W, 32]`` of n registers."""
    return np.stack([program.every(v) for v in values]).reshape(len(values), -1, LANES)[:, warps]


def _over_threads(program, warps, values: np.ndarray) -> list[np.ndarray]:
    """``[n, W, 32]`` float32 or bits -> n registers."""
    out = np.zeros((len(values), program.threads // LANES, LANES), U32)
    out[:, warps] = np.ascontiguousarray(values).view(U32)
    return list(out.reshape(len(values), -1))


def _floats(registers: np.ndarray, kind: str) -> np.ndarray:
    """A last axis of the two 16-bit floats of each register, or of its one TF32."""
    return floats(registers[..., None] if kind == "tf32" else np.stack(halves(registers), -1), kind)


def _rows(program, address, count: int, warps) -> np.ndarray:
    """Addresses ``[W, 8 count, 8]`` of the elements of rows of 16 bytes, one a lane."""
    rows = program.every(address).reshape(-1, LANES)[warps][:, : 8 * count].astype(np.uint64)
    if (rows % np.uint64(16)).any():
        raise Fault("a row of a matrix is not aligned to 16 bytes")
    return rows[:, :, None] + np.arange(0, 16, 2, dtype=np.uint64)


def ldmatrix(program, address, count: int, trans: bool, mask) -> list[np.ndarray]:
    warps = _warps(program, mask)
    at, by = _rows(program, address, count, warps).ravel(), np.repeat(warps, 64 * count)
    rows = program.shared_memory.load(at, None, 2, 1, by)[0].reshape(-1, count, 8, 8)
    pairs = np.ascontiguousarray(rows.swapaxes(2, 3) if trans else rows).reshape(-1, count, LANES, 2).astype(U32)
    return _over_threads(program, warps, (pairs[..., 0] | (pairs[..., 1] << U32(16))).swapaxes(0, 1))


def stmatrix(program, address, values, trans: bool, mask) -> None:
    warps = _warps(program, mask)
    registers = _registers(program, values, warps).swapaxes(0, 1)
    rows = np.stack(halves(registers), -1).reshape(-1, len(values), 8, 8)
    rows = np.ascontiguousarray(rows.swapaxes(2, 3) if trans else rows)
    at, by = _rows(program, address, len(values), warps).ravel(), np.repeat(warps, 64 * len(values))
    program.shared_memory.store(at, None, 2, [rows.ravel()], by)


def _fragment_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """``[W, 16, k]``: registers number the halves of k, and in each those of the rows."""
    values = _floats(registers, kind)
    n, W = values.shape[:2]
    return values.reshape(n // 2, 2, W, 8, 4, -1).transpose(2, 1, 3, 0, 4, 5).reshape(W, 16, -1)


def mma(program, k: int, kind: str, a, b, c, mask) -> list[np.ndarray]:
    """m16n8k16 or k8 of every warp; products summed in float64 and rounded once."""
    warps = _warps(program, mask)
    W = len(warps)
    A = _fragment_a(_registers(program, a, warps), kind)
    B = _floats(_registers(program, b, warps), kind)
    B = B.reshape(len(b), W, 8, 4, -1).transpose(1, 0, 3, 4, 2).reshape(W, k, 8)
    C = _registers(program, c, warps).view(np.float32).reshape(2, 2, W, 8, 4).transpose(2, 0, 3, 4, 1).reshape(W, 16, 8)
    D = (C + A.astype(np.float64) @ B).astype(np.float32).reshape(W, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return _over_threads(program, warps, D.reshape(4, W, LANES))


def wgmma(program, n: int, k: int, kind: str, d, a, b, add, transposed, mask) -> list[np.ndarray]:
    """m64n?k? of every warp group; a: a descriptor, or registers."""
    warps = _warps(program, mask)
    first = warps[::4]
    if len(warps) % 4 or (first % 4).any() or (warps != (first[:, None] + np.arange(4)).ravel()).any():
        raise Fault("an instruction of whole warp groups, run by a part of one")
    G, size = len(first), 4 if kind == "tf32" else 2

    def stored(descriptor, rows: int, trans: int) -> np.ndarray:
        found = []
        for value in program.every(descriptor)[first * LANES]:
            address = _operand_addresses(int(value), rows, k, size, trans).ravel().astype(np.uint64)
            found.append(program.shared_memory.load(address, None, size, 1, MANY)[0].reshape(rows, k))
        return floats(np.stack(found), kind)

    A = _fragment_a(_registers(program, a, warps), kind).reshape(G, 64, k) if isinstance(a, list) else stored(a, 64, transposed[0])
    B = stored(b, n, transposed[1])
    product = (A.astype(np.float64) @ B.swapaxes(1, 2)).astype(np.float32)
    product = product.reshape(G, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, len(warps), LANES)
    if program.every(add)[first[0] * LANES]:
        product = product + _registers(program, d, warps).view(np.float32)
    return _over_threads(program, warps, product)


def swizzled(address, width: int):
    """Shared addresses under a swizzle of 32, 64 or 128 bytes; 0: none."""
    return address ^ (((address >> 7) & {0: 0, 32: 1, 64: 3, 128: 7}[width]) << 4)


def _operand_addresses(descriptor: int, rows: int, k: int, size: int, trans: int) -> np.ndarray:
    """``[rows, k]``; rows: of M or N. Transposed: those lie next to each other, and not k."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {0: 0, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    if not width or descriptor >> 49 & 7:
        raise NotImplementedError(f"a matrix descriptor without swizzle, or with an offset: {descriptor:#x}")
    r, j = np.arange(rows)[:, None], np.arange(k)[None, :]
    if trans:
        wide = width // size
        return swizzled(start + (r // wide) * leading + (j // 8) * stride + (j % 8) * width + (r % wide) * size, width)
    return swizzled(start + (r // 8) * stride + (r % 8) * width + j * size, width)


def copy_box(memory: Memory, shared: Memory, to: int, addresses: np.ndarray, inside: np.ndarray, size: int, width: int) -> int:
    """A box of a matrix, rows one behind the other and zero outside of it, into shared memory; how many bytes."""
    rows, columns = addresses.shape
    if to % 128 or (width and columns * size > width):
        raise Fault(f"a box of {columns * size} bytes a row at {to:#x}: wanted 128 bytes' alignment, and no more than its swizzle")
    tile = np.zeros((rows, columns), f"uint{8 * size}")
    if inside.any():
        tile[inside] = memory.load(addresses[inside].astype(np.uint64), None, size, 1)[0]
    at = swizzled(to + np.arange(rows * columns) * size, width).astype(np.uint64)
    shared.store(at, None, size, [tile.ravel()], ENGINE)
    return rows * columns * size


def shuffle(program, how: str, value, b, c) -> tuple[np.ndarray, np.ndarray]:
    """(value of another lane, whether there was one)."""
    value, b, c = (program.every(v).reshape(-1, LANES).astype(np.int64) for v in (value, b, c))
    lane, segment = np.arange(LANES), (c >> 8) & 31
    least, most = lane & segment, (lane & segment) | (c & 31 & ~segment)
    b = b & 31
    other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[how]
    there = other >= most if how == "up" else other <= most
    found = np.take_along_axis(value, np.where(there, other, lane), 1)
    return found.astype(U32).ravel(), there.ravel()


def reduced(program, what: str, value) -> np.ndarray:
    """The sum, minimum or maximum of a warp, in each of its lanes."""
    value = program.every(value).reshape(-1, LANES)
    out = {"add": np.sum, "min": np.min, "max": np.max}[what](value, axis=1).astype(value.dtype)
    return np.repeat(out, LANES)


def ballot(program, value, mask) -> np.ndarray:
    value = program.every(value) & (True if mask is None else mask)
    bits = (value.reshape(-1, LANES).astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1).astype(U32)
    return np.repeat(bits, LANES)

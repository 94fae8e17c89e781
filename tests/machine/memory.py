"""Shared and global memory: vectors of addresses in, vectors of values out; a Fault for what no buffer holds or is not aligned."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator

import numpy as np

LANES = 32
NOBODY, MANY, ENGINE = -1, -2, -3  # instead of a warp; the bulk copy engine
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(RuntimeError):
    """What a GPU stops at, or compute-sanitizer reports."""


class Buffer:
    """Bytes from an address on, as a view of each width."""

    def __init__(self, start: int, data: np.ndarray):
        self.start, self.end = start, start + data.size
        self.views = {width: data[: data.size // width * width].view(dtype) for width, dtype in UNSIGNED.items()}

    @classmethod
    def own(cls, start: int, size: int) -> Buffer:
        """Over this process's memory."""
        return cls(start, np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8))


class Memory:
    """Buffers, in the order of their addresses. Masks are None (all lanes), or vectors of bool. owners: whose memory it is, kept alive.

    by, order: for those who watch (`races`)."""

    def __init__(self, name: str, buffers: list[Buffer], owners: list | None = None):
        self.name, self.buffers, self.owners = name, sorted(buffers, key=lambda b: b.start), owners
        self.starts = [b.start for b in self.buffers]

    def find(self, low: int, high: int) -> Buffer:
        """The buffer that holds these bytes."""
        at = bisect.bisect_right(self.starts, low) - 1
        if at < 0 or high > self.buffers[at].end:
            spans = ", ".join(f"{b.start:#x} to {b.end:#x}" for b in self.buffers[max(0, at) : at + 2])
            raise Fault(f"{self.name} memory: {low:#x} to {high:#x} is in no buffer; the nearest: {spans}")
        return self.buffers[at]

    def load(self, address, mask, width: int, count: int, by=None) -> list[np.ndarray]:
        """``count`` neighbours of ``width`` bytes for each lane; zeros in lanes the mask leaves out."""
        address = spread(address, mask)
        out: list[np.ndarray] = []
        for buffer, lanes, index in self.places(address, mask, width, count):
            view = buffer.views[width]
            if lanes is None:
                return [view[index + k] for k in range(count)]
            out = out or [np.zeros(address.shape, UNSIGNED[width]) for _ in range(count)]
            for k in range(count):
                out[k][lanes] = view[index + k]
        return out or [np.zeros(address.shape, UNSIGNED[width]) for _ in range(count)]

    def store(self, address, mask, width: int, values: list, by=None) -> None:
        address = spread(address, mask)
        for buffer, lanes, index in self.places(address, mask, width, len(values)):
            view = buffer.views[width]
            for k, value in enumerate(values):
                view[index + k] = value if lanes is None or not value.ndim else value[lanes]

    def atomic(self, address, mask, what: str, dtype, order: str, *values) -> np.ndarray:
        """One lane after the other; what each found there, in lanes the mask takes."""
        lanes = max(np.size(v) for v in (address, True if mask is None else mask, *values))
        address, taken = np.broadcast_to(address, lanes), np.broadcast_to(True if mask is None else mask, lanes)
        values = [np.broadcast_to(v, lanes) for v in values]
        out, width = np.zeros(lanes, dtype), np.dtype(dtype).itemsize
        for lane in np.flatnonzero(taken):
            for buffer, _, index in self.places(address[lane], None, width, 1):
                view = buffer.views[width].view(dtype)
                old, new = view[index], values[0][lane]
                out[lane] = old
                view[index] = {
                    "add": old + new, "exch": new, "max": max(old, new), "min": min(old, new),
                    "cas": values[-1][lane] if old == new else old,
                }[what]  # fmt: skip
        return out.view(UNSIGNED[width])

    def places(self, address, mask, width: int, count: int) -> Iterator[tuple[Buffer, np.ndarray | None, np.ndarray]]:
        """(buffer, lanes, their index in its view): once, unless lanes point to several buffers; lanes None: all of them."""
        lanes = None
        if mask is not None and not mask.all():
            lanes = np.flatnonzero(mask)
            if not lanes.size:
                return
            address = address[lanes]
        if (address % np.uint64(width * count)).any():
            raise Fault(f"{self.name} memory: an access of {width * count} bytes is not aligned")
        low, high = int(address.min()), int(address.max()) + width * count
        buffer = self.find(low, low + width * count)
        if high <= buffer.end:
            yield buffer, lanes, _index(address, buffer, width)
            return
        lanes = np.arange(address.size) if lanes is None else lanes
        address = np.atleast_1d(address)
        while address.size:
            low = int(address.min())
            buffer = self.find(low, low + width * count)
            inside = address.astype(np.int64) + width * count <= buffer.end
            yield buffer, lanes[inside], _index(address[inside], buffer, width)
            address, lanes = address[~inside], lanes[~inside]


def _index(address, buffer: Buffer, width: int) -> np.ndarray:
    return ((address.astype(np.int64) - buffer.start) // width).astype(np.intp)


def spread(address, mask):
    """One address of all lanes, where a mask tells them apart."""
    return address if address.ndim or mask is None or not mask.ndim else np.full(mask.shape, address)

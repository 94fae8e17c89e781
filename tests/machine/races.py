"""Accesses to memory that nothing puts in order, by happens-before as the PTX memory model has it, as far as these kernels use it.

A program's clock counts its barriers. Inside a program two warps' accesses to a word, one of them a write, need a barrier between them. Of
another program's writes a program may read what was written, a barrier before a release, where it acquired from that (and from what
that program knew), a barrier before it reads. Atomics themselves never race; what was read before it is overwritten by another program
is not watched. A copy by the bulk engine is put in order with those that read it by its own barrier, and only with those before it here.
"""

from __future__ import annotations

import numpy as np

from .memory import ENGINE, LANES, MANY, NOBODY, Fault, Memory, spread

WORD = 2  # bytes


class Shared:
    """A program's shared memory; ``by``, where a lane is no thread: the warp of each, MANY or ENGINE."""

    def __init__(self, memory: Memory, program):
        self.memory, self.program = memory, program
        words = sum(b.end - b.start for b in memory.buffers) // WORD
        self.writer, self.written = np.full(words, NOBODY, np.int16), np.full(words, -1, np.int32)
        self.reader, self.read = np.full(words, NOBODY, np.int16), np.full(words, -1, np.int32)

    def load(self, address, mask, width: int, count: int, by=None) -> list[np.ndarray]:
        words, by = self._words(address, mask, width * count, by)
        self._meet(words, by, self.writer, self.written, "reads", "wrote")
        other = (self.read[words] == self.program.clock) & (self.reader[words] != by)
        by = np.where(other, MANY, by)
        self.reader[words] = by
        by = np.where(self.reader[words] != by, MANY, by)  # several warps that share a word here, of which the last was kept
        self.reader[words[by == MANY]] = MANY
        self.read[words] = self.program.clock
        return self.memory.load(address, mask, width, count)

    def store(self, address, mask, width: int, values: list, by=None) -> None:
        words, by = self._words(address, mask, width * len(values), by)
        self._meet(words, by, self.reader, self.read, "overwrites", "read")
        self._meet(words, by, self.writer, self.written, "overwrites", "wrote")
        self.writer[words], self.written[words] = by, np.where(by == ENGINE, -1, self.program.clock)
        self.memory.store(address, mask, width, values)

    def atomic(self, *args):
        return self.memory.atomic(*args)

    def _words(self, address, mask, size: int, by) -> tuple[np.ndarray, np.ndarray]:
        """(words, whose they are), one entry for each of each lane."""
        address = np.atleast_1d(self.program.every(address) if by is None else address).astype(np.int64)
        by = np.arange(address.size) // LANES if by is None else np.broadcast_to(by, address.shape)
        if mask is not None:
            taken = np.broadcast_to(mask, address.shape)
            address, by = address[taken], by[taken]
        each = max(1, size // WORD)
        words = (address[:, None] - self.memory.buffers[0].start) // WORD + np.arange(each)
        return words.ravel(), np.repeat(by, each).astype(np.int16)

    def _meet(self, words, by, who, when, does: str, did: str) -> None:
        race = (when[words] == self.program.clock) & (who[words] != by)
        if race.any():
            i = int(np.flatnonzero(race)[0])
            names = {MANY: "many", ENGINE: "the copy engine"}
            one, other = (names.get(int(w), f"warp {int(w)}") for w in (by[i], who[words][i]))
            raise Fault(f"race: {one} {does} shared memory that {other} {did}, with no barrier between")


class Global:
    """Global memory of one launch: who wrote each word, and what releases and acquires have told the programs."""

    def __init__(self, memory: Memory, programs: int):
        self.memory, self.count, self.begun = memory, programs, 0
        self.writer = {b.start: np.full((b.end - b.start) // WORD + 1, NOBODY, np.int32) for b in memory.buffers}
        self.written = {start: np.zeros(words.size, np.int32) for start, words in self.writer.items()}
        self.told: dict[int, np.ndarray] = {}  # by a flag's address: up to which clock each program's writes are published

    def of(self, program) -> View:
        """For the next program that begins."""
        self.begun += 1
        return View(self, program, self.begun - 1)


class View:
    """Global memory as one program sees it."""

    def __init__(self, launch: Global, program, index: int):
        self.all, self.memory, self.program, self.index = launch, launch.memory, program, index
        self.known = np.zeros(launch.count, np.int32)  # writes before this clock may be read
        self.heard: list[tuple[int, np.ndarray]] = []  # (clock, what an acquire brought)

    def load(self, address, mask, width: int, count: int, order: str = "") -> list[np.ndarray]:
        if order:
            self._synchronize(address, mask, order)
        else:
            self._check(address, mask, width * count, "reads")
        return self.memory.load(address, mask, width, count)

    def store(self, address, mask, width: int, values: list) -> None:
        for start, words in self._check(address, mask, width * len(values), "overwrites"):
            self.all.writer[start][words], self.all.written[start][words] = self.index, self.program.clock
        self.memory.store(address, mask, width, values)

    def atomic(self, address, mask, what: str, dtype, order: str, *values) -> np.ndarray:
        self._synchronize(address, mask, order)
        return self.memory.atomic(address, mask, what, dtype, order, *values)

    def _synchronize(self, address, mask, order: str) -> None:
        address, taken = np.broadcast_arrays(np.atleast_1d(address), True if mask is None else mask)
        for flag in {int(a) for a in address[taken]}:
            told = self.all.told.setdefault(flag, np.zeros(self.all.count, np.int32))
            if order in ("acquire", "acq_rel"):
                self.heard.append((self.program.clock, told.copy()))
            if order in ("release", "acq_rel"):
                self._listen()
                np.maximum(told, self.known, out=told)
                told[self.index] = max(told[self.index], self.program.clock)

    def _listen(self) -> None:
        """What was heard before the last barrier is known to all threads."""
        for _, told in [each for each in self.heard if each[0] < self.program.clock]:
            np.maximum(self.known, told, out=self.known)
        self.heard = [each for each in self.heard if each[0] == self.program.clock]

    def _check(self, address, mask, size: int, does: str) -> list[tuple[int, np.ndarray]]:
        self._listen()
        found = []
        width = min(size, 8)
        for buffer, _, index in self.memory.places(spread(address, mask), mask, width, size // width):
            words = (np.atleast_1d(index)[:, None].astype(np.int64) * width) // WORD + np.arange(max(1, size // WORD))
            words = words.ravel()
            who = self.all.writer[buffer.start][words]
            race = (who != NOBODY) & (who != self.index)
            race[race] = self.all.written[buffer.start][words[race]] >= self.known[who[race]]
            if race.any():
                raise Fault(f"race: it {does} what program {int(who[race][0])} of this launch wrote, with no release and acquire between")
            found.append((buffer.start, words))
        return found

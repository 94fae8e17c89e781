"""One program of a grid: its registers and shared memory, the groups of threads that stand at the same place, and what they wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .memory import LANES, Buffer, Fault, Memory
from .races import Global, Shared
from .translate import END, SHARED_BASE, Kernel

PATIENCE = 100_000  # blocks that a program runs; more is waiting in vain
DESCRIPTOR = 1 << 60  # the address of parameter i, which is a descriptor, is this + i


class Group:
    """Threads at one block; waits: None, a barrier (number, threads or None for all), or "previous"; spins: it looked in vain."""

    def __init__(self, place: int, mask: np.ndarray):
        self.place, self.mask, self.waits, self.spins = place, mask, None, False


class Program:
    """``params``: their bits; ``descriptors``: `driver.Descriptor` by parameter; ``let_go``: called when all threads let the next launch
    begin; ``previous_done``: whether the launch before has ended; ``turns``: `run` yields after each block; ``watched``:
    global memory whose races are faults; then copies arrive at once, and not as late as they may."""

    def __init__(
        self, kernel: Kernel, number, grid, threads: int, shared: int, memory: Memory, params: list[int], descriptors: dict,
        let_go: Callable[[], None], previous_done: Callable[[], bool], turns: bool, watched: Global | None,
    ):  # fmt: skip
        self.kernel, self.number, self.threads, self.params, self.descriptors = kernel, number, threads, params, descriptors
        self.R = [np.bool_(False) if w == 1 else np.dtype(f"uint{w}").type(0xBADBADBADBADBAD & ((1 << w) - 1)) for w in kernel.widths]
        tid = np.arange(threads, dtype=np.uint32)
        self.special = {"%tid.x": tid, "%laneid": tid % np.uint32(LANES), "%ntid.x": np.uint32(threads)}
        for axis, (own, all_) in zip("xyz", zip(number, grid, strict=True), strict=True):
            self.special |= {f"%ctaid.{axis}": np.uint32(own), f"%nctaid.{axis}": np.uint32(all_)}
        unwritten = np.full(max(shared, 16), 0xFF, np.uint8)  # NaN
        self.shared_memory = Memory("shared", [Buffer(SHARED_BASE, unwritten)])
        self.global_memory = memory
        if watched is not None:
            self.shared_memory, self.global_memory = Shared(self.shared_memory, self), watched.of(self)
        self.alive = np.ones(threads, bool)
        self.groups = [Group(0, self.alive.copy())]
        self.copies, self.products = Later(), Later()
        self.barriers: dict[int, Barrier] = {}
        self.line, self.atomics, self.steps, self.clock = 0, 0, 0, 0
        self.let_go_by = np.zeros(threads, bool)
        self._let_go, self.previous_done, self.turns, self.early = let_go, previous_done, turns, watched is not None

    def run(self) -> Iterator[None]:
        """To the end; yields where it can only wait for others, and after atomics."""
        with np.errstate(all="ignore"):
            while self.groups:
                self.steps += 1
                if self.steps > PATIENCE:
                    raise Fault("it has waited in vain")
                group = self._next()
                if group is None:
                    yield
                    continue
                before, place = self.atomics, group.place
                mask = None if len(self.groups) == 1 and group.mask.all() else group.mask
                self._go(group, place, *self.kernel.blocks[place](self.R, mask, self))
                if self.turns or self.atomics != before:
                    yield

    @property
    def blocked(self) -> bool:
        """Whether all it can do is to wait for the launch before."""
        return all(g.waits == "previous" for g in self.groups) and not self.previous_done()

    # Groups

    def _next(self) -> Group | None:
        """The group that is furthest behind, joined with those at its place; None where all look in vain."""
        if self.previous_done():
            for group in self.groups:
                group.waits = None if group.waits == "previous" else group.waits
        ready = [g for g in self.groups if g.waits is None]
        if not ready and not any(g.waits == "previous" for g in self.groups):
            raise Fault(f"{self.kernel.name}: every thread waits at a barrier: {[(g.waits, int(g.mask.sum())) for g in self.groups]}")
        going = [g for g in ready if not g.spins]
        if not going:
            for group in ready:
                group.spins = False
            return None
        first = min(going, key=lambda g: g.place)
        for other in [g for g in going if g is not first and g.place == first.place]:
            first.mask = first.mask | other.mask
            self.groups.remove(other)
        return first

    def _go(self, group: Group, place: int, step, target, condition) -> None:
        if isinstance(target, tuple):
            group.place, group.waits = step, (target[0], None if target[1] is None else int(np.max(target[1])))
            self._meet()
        elif target == "previous":
            group.place, group.waits = step, "previous"
        elif condition is None:
            self._jump(group, place, step)
        else:
            taken = condition & group.mask
            if not taken.any():
                self._jump(group, place, step)
            elif (taken == group.mask).all():
                self._jump(group, place, target)
            else:
                other = Group(place, taken)
                group.mask = group.mask & ~taken
                self.groups.append(other)
                self._jump(group, place, step)
                self._jump(other, place, target)

    def _jump(self, group: Group, place: int, target: int) -> None:
        if target == END:
            self.alive = self.alive & ~group.mask
            self.groups.remove(group)
            self._meet()
            return
        group.place = target
        if target <= place and any(self.kernel.spins[target : place + 1]):
            group.spins = True
        else:
            for other in self.groups:
                other.spins = other.spins and other is group

    def _meet(self) -> None:
        """Let go the groups of a barrier that all have reached."""
        for number in {g.waits[0] for g in self.groups if isinstance(g.waits, tuple)}:
            here = [g for g in self.groups if isinstance(g.waits, tuple) and g.waits[0] == number]
            if sum(int(g.mask.sum()) for g in here) >= (here[0].waits[1] or int(self.alive.sum())):
                self.clock += all(g in here for g in self.groups)
                for group in here:
                    group.waits = None

    def trap(self, mask) -> None:
        if mask is None or np.any(mask):
            raise Fault(f"{self.kernel.name}: trap")

    def let_go(self, mask) -> None:
        self.let_go_by = self.let_go_by | (True if mask is None else mask)
        if self.let_go_by.all():
            self._let_go()

    # Parameters

    def param(self, index: int, bits: int, register: int):
        return np.dtype(f"uint{register}").type(self.params[index] & ((1 << bits) - 1))

    def param_address(self, index: int):
        if index not in self.descriptors:
            raise NotImplementedError(f"the address of parameter {index}, which is no descriptor")
        return np.uint64(DESCRIPTOR + index)

    # Copies beside the program

    def every(self, value) -> np.ndarray:
        """A value of each thread."""
        return value if np.ndim(value) else np.full(self.threads, value)

    def copy(self, to, source, size: int, read, mask) -> None:
        """Of ``read`` bytes, all or none; what is not read is zero."""
        if not ((read == 0) | (read == size)).all():
            raise NotImplementedError("cp.async of a part")
        reads = self.every(read > 0 if mask is None else (read > 0) & mask)
        to, source, mask = self.every(to), self.every(source), None if mask is None else self.every(mask)

        def arrive() -> None:
            self.shared_memory.store(to, mask, 4, self.global_memory.load(source, reads, 4, size // 4))

        arrive() if self.early else self.copies.add(arrive)

    # Barriers in shared memory, and tiles copied by descriptor, which arrive at once or when somebody looks at their barrier

    def chosen(self, value, mask) -> list[int]:
        value = self.every(value)
        return [int(v) for v in (value if mask is None else value[self.every(mask)])]

    def barrier_init(self, at, count, mask) -> None:
        for address, arrivals in zip(self.chosen(at, mask), self.chosen(count, mask), strict=True):
            self.barriers[address] = Barrier(arrivals)

    def barrier_expect(self, at, count, arrive: bool, mask) -> None:
        for address, size in zip(self.chosen(at, mask), self.chosen(count, mask), strict=True):
            self.barriers[address].move(bytes_=size, arrivals=int(arrive))

    def barrier_arrive(self, at, count, mask) -> None:
        for address, arrivals in zip(self.chosen(at, mask), self.chosen(count, mask), strict=True):
            self.barriers[address].move(arrivals=arrivals)

    def tensor_copy(self, to, descriptor, x, y, barrier, mask) -> None:
        for *copy, at in zip(*(self.chosen(v, mask) for v in (to, descriptor, x, y, barrier)), strict=True):
            self.barriers[at].copies.append(copy)
            if self.early:
                self._arrive(self.barriers[at])

    def barrier_passed(self, at, parity, mask) -> np.ndarray:
        """Whether the phase of this parity is over."""
        for address in set(self.chosen(at, mask)):
            self._arrive(self.barriers[address])
        phases = {address: barrier.phase for address, barrier in self.barriers.items()}
        seen = np.array([phases.get(int(address), 0) for address in self.every(at)], np.uint32)
        return seen != parity

    def _arrive(self, barrier: Barrier) -> None:
        while barrier.copies:
            to, descriptor, x, y = barrier.copies.pop(0)
            size = self.descriptors[descriptor - DESCRIPTOR].copy(self.global_memory, self.shared_memory, to, _signed(x), _signed(y))
            barrier.move(bytes_=-size)


class Later:
    """What runs beside the program, in groups, each done when it is waited for: as late as it may."""

    def __init__(self):
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def add(self, work: Callable[[], None]) -> None:
        self.open.append(work)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, left: int) -> None:
        while len(self.groups) > left:
            for work in self.groups.pop(0):
                work()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have."""

    def __init__(self, arrivals: int):
        self.all, self.missing, self.bytes, self.phase = arrivals, arrivals, 0, 0
        self.copies: list[list[int]] = []

    def move(self, bytes_: int = 0, arrivals: int = 0) -> None:
        self.bytes, self.missing = self.bytes + bytes_, self.missing - arrivals
        if self.missing < 0 or self.bytes < 0:
            raise Fault(f"a barrier of {self.all} arrivals got {-self.missing} arrivals and {-self.bytes} bytes more than it awaits")
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.all, self.phase ^ 1


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value

"""A Triton driver whose device is this process: kernels are compiled for a GPU, launched as on one, and run from their PTX."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

from . import matrices, translate
from .memory import Buffer, Fault, Memory
from .program import Program
from .ptx import parse
from .races import Global

HASTE = 0.95  # how often the launches that begin last go first, where programs take turns
BOX_LIMIT = 256  # elements along one axis of a box


@dataclass(frozen=True)
class Descriptor:
    """A matrix to be copied in boxes, refused as cuTensorMapEncodeTiled refuses it. swizzle: in bytes, 0 for none."""

    base: int
    shape: tuple[int, int]
    stride: int
    item: int
    box: tuple[int, int]
    swizzle: int

    def __post_init__(self):
        unaligned = self.base % 16 or self.stride * self.item % 16 or self.box[1] * self.item % 16
        if unaligned or min(self.shape) < 1 or max(self.box) > BOX_LIMIT:
            raise Fault(f"a descriptor that the driver refuses: {self}")

    def copy(self, memory: Memory, shared: Memory, to: int, x: int, y: int) -> int:
        row, column = np.arange(y, y + self.box[0])[:, None], np.arange(x, x + self.box[1])[None, :]
        inside = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        addresses = self.base + (row * self.stride + column) * self.item
        return matrices.copy_box(memory, shared, to, addresses, inside, self.item, self.swizzle)


class Launch:
    """A grid on its way. ``make``: its program of a number; ``previous``: the launch it may overlap with, once all programs of that have
    let it begin or ended.
    """

    def __init__(self, numbers: list[tuple], previous: Launch | None, make: Callable[[Launch, tuple], Program]):
        self.numbers, self.previous, self.make = numbers, previous, make
        self.running: list[tuple[Program, Iterator[None]]] = []
        self.holding = set(numbers)  # programs that have neither let the next launch begin nor ended

    @property
    def done(self) -> bool:
        return not self.numbers and not self.running

    @property
    def may_begin(self) -> bool:
        return self.previous is None or not self.previous.holding

    def begin(self) -> None:
        """One more program."""
        program = self.make(self, self.numbers.pop(0))
        self.running.append((program, program.run()))


class Machine:
    """Runs launches to their end, one after the other.

    seed: Programs begin in a shuffled order and take turns by chance; None: each runs until it waits, in the order of the grid.
    overlap: Launches wait for `finish`, or a launch that may not overlap, and overlap where they may; programs begin in the grid's order.
    resident: So many programs run at a time.
    races: Accesses that nothing puts in order are faults (`races`), and copies into shared memory arrive at once; else when they are waited
    for. A wgmma always happens when it is waited for.
    """

    def __init__(self, seed: int | None = None, overlap: bool = False, resident: int = 16, races: bool = False):
        self.random = random.Random(seed) if seed is not None else None
        self.overlap, self.resident, self.races = overlap, resident, races
        self.pending: list[Launch] = []

    def launch(self, launcher: Launcher, grid: tuple[int, int, int], args: tuple) -> None:
        dependent = self.overlap and launcher.metadata.launch_pdl
        if not dependent:
            self.finish()
        numbers = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        if self.random and not self.overlap:
            self.random.shuffle(numbers)
        kernel = launcher.kernel
        params, descriptors, tensors = launcher.arguments(args)
        memory = Memory("global", [Buffer.own(*span) for span in spans(tensors)], owners=tensors)
        threads = kernel.text.threads or 32 * launcher.metadata.num_warps

        watched = Global(memory, len(numbers)) if self.races else None

        def make(launch: Launch, number: tuple) -> Program:
            return Program(
                kernel, number, grid, threads, launcher.metadata.shared, memory, params, descriptors,
                let_go=lambda: launch.holding.discard(number),
                previous_done=lambda: launch.previous is None or launch.previous.done,
                turns=self.random is not None, watched=watched,
            )  # fmt: skip

        self.pending.append(Launch(numbers, self.pending[-1] if self.pending else None, make))
        if not self.overlap:
            self.finish()

    def finish(self) -> None:
        """Until nothing is left to run."""
        while self.pending:
            for launch in self.pending:
                while launch.may_begin and launch.numbers and sum(len(each.running) for each in self.pending) < self.resident:
                    launch.begin()
            running = [(launch, entry) for launch in self.pending for entry in launch.running if not entry[0].blocked]
            if self.random and self.random.random() < HASTE:  # the launches that begin last overtake those that they depend on
                running = [(launch, entry) for launch, entry in running if launch is running[-1][0]]
            launch, entry = self.random.choice(running) if self.random else running[0]
            program, steps = entry
            try:
                next(steps)
                launch.running.append(launch.running.pop(launch.running.index(entry)))
            except StopIteration:
                launch.running.remove(entry)
                launch.holding.discard(program.number)
            except Exception as error:
                self.pending.clear()
                raise Fault(f"{program.kernel.name}, program {program.number}, line {program.line} of its PTX: {error}") from error
            self.pending = [launch for launch in self.pending if not launch.done]


class Launcher:
    """What Triton calls to launch a compiled kernel; refuses what Triton's own launcher for a GPU refuses."""

    def __init__(self, machine: Machine, src, metadata):
        self.machine, self.src, self.metadata = machine, src, metadata
        meta = getattr(metadata, "tensordesc_meta", None)
        if hasattr(nvidia, "expand_signature"):  # from Triton 3.7 on; before, it is a step of writing the launcher's source
            described_as = ("nvTmaDesc",) if len(inspect.signature(nvidia.expand_signature).parameters) > 2 else ()
            nvidia.expand_signature(src.signature.values(), meta, *described_as)
        else:
            nvidia.make_launcher(src.constants, src.signature, meta)
        self.kernel = _kernel(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx"))

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *args) -> None:
        if enter_hook is not None:
            enter_hook(launch_metadata)
        self.machine.launch(self, (x, y, z), args)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def arguments(self, args: tuple) -> tuple[list[int], dict[int, Descriptor], list]:
        """(bits of the parameters, descriptors by parameter, all tensors among them), as Triton's own launcher passes them."""
        params: list[int] = []
        descriptors, tensors = {}, []
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        for kind, value in _flat(tuple(self.src.signature.values()), args):
            if kind.startswith("tensordesc"):
                descriptors[len(params)] = _described(value, next(metas))
                tensors.append(value.base)
                params += [0, *value.shape, *value.strides]
            elif kind[0] == "*":
                tensors.append(value)
                params.append(value.data_ptr())
            elif kind in ("fp32", "f32"):
                params.append(int(np.float32(value).view(np.uint32)))
            elif kind != "constexpr":
                params.append(int(value))
        params += [0, 0]  # scratch memory, which none of these kernels asks for
        if len(params) != len(self.kernel.text.params) or self.metadata.global_scratch_size:
            raise NotImplementedError(f"{self.kernel.name}: {len(params)} arguments of {len(self.kernel.text.params)} parameters")
        return params, descriptors, tensors


@functools.cache
def _kernel(path: str) -> translate.Kernel:
    return translate.kernel(parse(Path(path).read_text()))


def _flat(signature: tuple, values: tuple) -> Iterator[tuple[str, object]]:
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        else:
            yield kind, value


def _described(value, meta: dict) -> Descriptor:
    swizzle = 16 << meta["swizzle"] if meta["swizzle"] else 0
    return Descriptor(value.base.data_ptr(), tuple(value.shape), value.strides[0], meta["elem_size"], tuple(meta["block_size"]), swizzle)


def spans(tensors: list) -> list[tuple[int, int]]:
    """(start, bytes) of what tensors reach, joined where they overlap: nothing else may be touched."""
    reached = []
    for t in tensors:
        if t.numel():
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            reached.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    joined: list[list[int]] = []
    for start, end in sorted(reached):
        if joined and start < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return [(start, end - start) for start, end in joined]


class Driver:
    """As much of Triton's driver as compiling and launching ask for."""

    def __init__(self, capability: int, machine: Machine):
        self.capability, self.utils = capability, self
        self.launcher_cls = functools.partial(Launcher, machine)

    def get_current_device(self):
        return 2000 + self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_device_capability(self, device=None):
        return divmod(self.capability, 10)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, threads at most)"""
        return None, None, 0, 0, 1024

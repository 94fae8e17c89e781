"""Kernels compiled ahead by several processes, so that a section on a cold cache measures instead of compiling, one after the other.

Nothing is launched: each process runs the launcher on operands that stand for a GPU's, under a stub driver of its architecture, and
every launch becomes a compilation that Triton's cache on disk keeps.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_kernels.tuning import Arch, Config

from . import variants
from .session import say
from .workloads import Operands, Point

MOST_PROCESSES = 16


@dataclasses.dataclass(frozen=True)
class PointJob:
    """The launches of one pass at a point; ``of`` makes of its operands what the call takes, None: they are that."""

    point: Point
    config: Config
    backward: bool
    of: Callable[[Any], Operands] | None = None

    def launch(self, arch: Arch) -> None:
        from lora_kernels import dispatch

        point, o = self.point, standing(self.point)
        o = o if self.of is None else self.of(o)
        launch = dispatch.arm_of(o.weight)
        seed = torch.zeros((), dtype=torch.int64, device="meta") if point.p else None
        if self.backward:
            u = o.x.new_empty(point.M, point.r * o.adapters.layers)
            needs = (True, True, True)
            launch.backward(o.dy, o.x, o.weight, o.lora_A, o.lora_B, u, seed, o.adapters, o.scale, point.p, needs, point.dtype, self.config)
        else:
            keep = not point.forward_alone
            launch.forward(o.x, o.weight, o.lora_A, o.lora_B, None, seed, o.adapters, o.scale, point.p, keep, self.config, o.base)


@dataclasses.dataclass(frozen=True)
class CaseJob:
    """The launches of a parity case, on CPU tensors that pass for a GPU's."""

    case: Any

    def launch(self, arch: Arch) -> None:
        from lora_kernels import dispatch, parity

        before, dispatch.arch_of = dispatch.arch_of, lambda device: (arch, "")
        try:
            parity.evaluate(self.case, parity.inputs(self.case, torch.device("cpu")), "triton")
        finally:
            dispatch.arch_of = before


def of_points(points: list[Point], arch: Arch, every: bool) -> list[PointJob]:
    """Every pass of every kernel arm, each once."""
    jobs: dict[PointJob, None] = {}
    for point in points:
        for forward, backward in variants.choices(point, standing(point), arch, every)[0].values():
            jobs.setdefault(PointJob(point, forward, False))
            if backward is not None:
                jobs.setdefault(PointJob(point, backward, True))
    return list(jobs)


def of_cases(cases: list) -> list[CaseJob]:
    return [CaseJob(case) for case in cases if case.impl == "triton"]


def run(jobs: list, arch: Arch, seconds: float) -> int:
    """Compiles what the jobs launch, the same kernel once, for at most ``seconds``; returns how many kernels it had no time for.

    What is left over, or fails, is compiled or raised where it is launched. Where Triton's cache has all of it, this costs a second.
    """
    if arch.kind == "interpreter":
        return 0
    start = time.perf_counter()
    pool = _pool()
    try:
        kernels = distinct(jobs, arch, pool)
    except Exception as error:  # a convenience: what is wrong with a kernel shows where it is launched
        say(f"compiling ahead: {type(error).__name__}: {str(error)[:300]}")
        close()
        return 0
    by_job: dict[int, list[int]] = {}
    for job, index in kernels:
        by_job.setdefault(job, []).append(index)
    futures = {pool.submit(compile_some, jobs[job], indices, arch): len(indices) for job, indices in by_job.items()}
    left = max(seconds - (time.perf_counter() - start), 0.0)
    done, late = concurrent.futures.wait(futures, timeout=left)
    for future in late:
        future.cancel()
    errors = [str(future.exception()) for future in done if future.exception()]
    for text in dict.fromkeys(errors):
        say(f"compiling ahead: {text[:300]}")
    right = [future for future in done if not future.exception()]
    ready, new = sum(futures[future] for future in right), sum(future.result() for future in right)
    took = f"{time.perf_counter() - start:.0f} s, {processes()} processes"
    say(f"{ready} of {len(kernels)} kernels ready, {new} of them compiled now, in {took}")
    return sum(futures[future] for future in late)


@functools.cache
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """One for all sections, since its processes take seconds to begin. Not forked: a fork would share this process's GPU context."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes(), mp_context=spawn, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Have this process end when the one that began it has: a section that hangs is ended without a word to others, which would stay, and
    with them the ends of its output's pipe, for whose reader it would not have ended."""
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def close() -> None:
    """End the processes, where there are any; the interpreter's end does so, too."""
    if _pool.cache_info().currsize:
        _pool().shutdown(cancel_futures=True)
        _pool.cache_clear()


def processes() -> int:
    return min(MOST_PROCESSES, os.cpu_count() or 2)


def distinct(jobs: list, arch: Arch, pool: concurrent.futures.Executor | None = None) -> list[tuple[int, int]]:
    """(job, launch of it) of every kernel that differs from those before it."""
    step = max(1, len(jobs) // (4 * processes()))
    chunks = [jobs[i : i + step] for i in range(0, len(jobs), step)]
    told = (pool.map if pool else map)(_all_told_apart, chunks, [arch] * len(chunks))
    found: dict[tuple, tuple[int, int]] = {}
    for j, launches in enumerate(itertools.chain.from_iterable(told)):
        for i, kernel in enumerate(launches):
            found.setdefault(kernel, (j, i))
    return list(found.values())


def _all_told_apart(jobs: list, arch: Arch) -> list[list[tuple]]:
    """Of each job, what tells each of its launches apart."""
    return [[told_apart(*launched) for launched in _launches(job, arch)] for job in jobs]


def told_apart(kernel, args, options) -> tuple:
    """What tells a launch's kernel from others, as far as Triton's cache does."""
    constants = tuple((name, getattr(value, "__name__", value)) for name, value in options.items())
    return kernel.__name__, constants, *map(_signature, args, kernel.params)


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """The names of the kernels that are compiled inside; those that a cache held are not among them."""
    from triton import knobs

    compiled: list[str] = []

    # Not the hook of a launch, knobs.runtime.jit_post_compile_hook: Triton 3.6 cannot tell it of a kernel that takes a function.
    before = knobs.compilation.listener

    def listen(*, src, cache_hit: bool, **rest) -> None:
        if not cache_hit:
            compiled.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        knobs.compilation.listener = before


def compile_some(job, indices: list[int], arch: Arch) -> int:
    """Compiles the job's launches of these numbers, and what launches them; returns how many of them Triton's cache did not have."""
    from lora_kernels import compile_only

    launches = _launches(job, arch)
    with counting() as new:
        for index in indices:
            kernel, args, options = launches[index]
            with compile_only.target(arch):
                compiled = kernel.run(*args, grid=(1,), warmup=True, **options)
            if arch.kind == "cuda":
                build_launcher(compiled)
    return len(new)


def build_launcher(compiled) -> None:
    """Before 3.7 Triton has the C compiler build a launcher for each signature: a third of a second each at the first launch."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    try:
        driver.libcuda_dirs()
    except (AssertionError, OSError):  # to be linked with, and there is none without a GPU
        return
    driver.CudaLauncher(compiled.src, compiled.metadata)


def _launches(job, arch: Arch) -> list[tuple]:
    """(kernel, arguments, options) of each launch, none carried out."""
    from lora_kernels import launch

    seen: list[tuple] = []
    with launch.intercept(lambda kernel, grid, args, options: seen.append((kernel, args, options))):
        job.launch(arch)
    return seen


def _signature(value, parameter=None) -> Any:
    """What of an argument specialises a kernel: dtype and alignment of a tensor; of an integer, whether it is 1 or a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(map(_signature, value))
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, int):
        plain = parameter is not None and parameter.do_not_specialize
        return "int", value >= 1 << 31, None if plain else (value == 1, value % 16 == 0)
    if hasattr(value, "block_shape"):
        return str(value.base.dtype), tuple(value.block_shape)
    return type(value).__name__


def standing(point: Point) -> Operands:
    """Operands without storage."""
    return point.empty_operands(torch.device("meta"))

"""Which problems `compile_only` compiles for an architecture: one for each heuristic configuration worth telling apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .problem import Problem


def every_problem() -> Iterator[tuple[str, Problem, bool, bool]]:
    """(label, problem, backward, onto): each as `compile_only.compile_pass` takes it."""
    for problems in (heuristic_problems, segment_problems, base_problems, expert_problems, packed_problems, wider_problems):
        yield from ((*each, False) for each in problems())
    yield from ((*each, True, True) for each in shared_problems())


def heuristic_problems() -> Iterator[tuple[str, Problem, bool]]:
    """(label, problem, backward): few and many tokens, both passes, with and without dropout, 16-bit and float32, two ranks."""
    for dtype, M, R in (
        (torch.bfloat16, 16, 16),
        (torch.bfloat16, 64, 12),
        (torch.bfloat16, 8192, 16),
        (torch.bfloat16, 8192, 96),
        (torch.float32, 16, 16),
        (torch.float32, 8192, 16),
    ):
        wide = 4096 if dtype is torch.bfloat16 or M <= 32 else 512  # the library makes that base product, here on a CPU
        for dropout in ("", "x"):
            problem = Problem(M, wide, wide, R, dtype, dropout)
            label = f"M={M} r={R}{' dropout' if dropout else ''}"
            yield f"forward {label}", problem, False
            yield f"backward {label}", problem.backward(), True
    for M, N, K in ((32, 14336, 4096), (64, 14336, 4096), (64, 4096, 14336), (128, 4096, 4096)):  # wide tiles, and K split in large ones
        for dropout in ("", "x") if M > 64 else ("",):
            problem = Problem(M, N, K, 16, torch.bfloat16, dropout)
            label = f"M={M} {K}->{N}{' dropout' if dropout else ''}"
            yield f"forward {label}", problem, False
            if M > 64:
                yield f"backward {label}", replace(problem, N=K, K=N).backward(), True


def segment_problems() -> Iterator[tuple[str, Problem, bool]]:
    """The same for many adapters: decode, prefill and training, equal and mixed ranks."""
    for M, R, mixed, blocks in (
        (16, 16, False, (16, 16)),
        (64, 128, True, (64, 16)),
        (8192, 16, False, (128, 32)),
        (8192, 128, True, (128, 16)),
    ):
        for dropout in ("", "x"):
            problem = Problem(
                M, 4096, 4096, R, torch.bfloat16, dropout,
                adapters=64, row_block=blocks[0], gather_block=blocks[1], mixed_ranks=mixed,
            )  # fmt: skip
            label = f"segments M={M} r{'<' if mixed else ''}={R}{' dropout' if dropout else ''}"
            yield f"forward {label}", problem, False
            yield f"backward {label}", problem.backward(), True
    for M, N, K, block in ((16, 1024, 8192, 16), (64, 1024, 4096, 64), (256, 4096, 4096, 64), (512, 1024, 4096, 128)):
        narrow = Problem(M, N, K, 16, torch.bfloat16, adapters=64, row_block=block, gather_block=16)  # few tiles: K is split; or wide ones
        yield f"forward segments M={M} {K}->{N}", narrow, False
        if M > 256:
            yield f"backward segments M={M} {N}->{K} dropout", replace(narrow, N=K, K=N, dropout="x").backward(), True


def base_problems() -> Iterator[tuple[str, Problem, bool]]:
    """Few and many tokens beside a base product that is given: one adapter, and a plan's blocks with ranks of their own."""
    one = Problem(16, 4096, 4096, 16, torch.bfloat16, base=True)
    many: dict[str, Any] = dict(adapters=64, mixed_ranks=True, gather_block=16)
    for problem in (
        one,
        replace(one, M=8192),
        replace(one, M=8192, R=96, dtype=torch.float32),
        replace(one, M=64, R=128, row_block=64, **many),
        replace(one, M=8192, R=128, row_block=128, **many),
        replace(one, M=8192, R=128, row_block=128, dtype=torch.float32, **many),
    ):
        label = f"base given tokens={problem.M} r={problem.R}{f' adapters={problem.adapters}' if problem.adapters else ''}"
        yield f"forward {label}", problem, False
        if problem.M > 64:
            yield f"backward {label} dropout", replace(problem, dropout="x").backward(), True
    yield "backward base given tokens=8192 r=16", replace(one, M=8192).backward(), True


def expert_problems() -> Iterator[tuple[str, Problem, bool]]:
    """A mixture's experts: few and many rows each, 16-bit and float32, equal and mixed ranks, both passes."""
    for rows, block, R, dtype, mixed in (
        (1, 16, 16, torch.bfloat16, True),
        (512, 128, 16, torch.bfloat16, False),
        (512, 128, 96, torch.bfloat16, True),
        (64, 64, 16, torch.float32, False),
    ):
        plan: dict[str, Any] = dict(adapters=64, row_block=128, gather_block=block, mixed_ranks=mixed)
        problem = Problem(64 * rows, 1536, 2048, R, dtype, experts=True, **plan)
        label = f"experts rows={rows} r={R}"
        yield f"forward {label}", problem, False
        if rows > 64:
            yield f"backward {label}", problem.backward(), True
            yield f"backward {label} dropout", replace(problem, dropout="x").backward(), True


def packed_problems() -> Iterator[tuple[str, Problem, bool]]:
    """Three layers that one weight packs, as q, k and v: few and many tokens, one adapter and batches of mixed ranks."""
    many: dict[str, Any] = dict(adapters=64, mixed_ranks=True)
    for M, r, plan in (
        (16, 16, {}),
        (8192, 16, {}),
        (64, 16, many | dict(row_block=64, gather_block=16)),
        (8192, 64, many | dict(row_block=128, gather_block=32)),
    ):
        problem = Problem(M, 6144, 4096, 3 * r, torch.bfloat16, packed="n", layers=3, **plan)
        label = f"packed M={M} r={r}{' adapters' if plan else ''}"
        yield f"forward {label}", problem, False
        if M > 64:
            yield f"backward {label}", problem.backward(), True


def wider_problems() -> Iterator[tuple[str, Problem, bool]]:
    """float32 adapters on a 16-bit base, as PEFT makes them: where their tiles take the most room, and batches of many."""
    many: dict[str, Any] = dict(adapters=64, mixed_ranks=True)
    for M, r, plan in (
        (16, 64, {}),
        (64, 64, {}),
        (8192, 128, {}),
        (64, 16, many | dict(row_block=64, gather_block=16)),
        (8192, 64, many | dict(row_block=128, gather_block=32)),
    ):
        problem = Problem(M, 4096, 4096, r, torch.bfloat16, adapter_dtype=torch.float32, **plan)
        label = f"float32 adapters M={M} r={r}{' segments' if plan else ''}"
        yield f"forward {label}", problem, False
        yield f"backward {label}", problem.backward(), True


def shared_problems() -> Iterator[tuple[str, Problem]]:
    """dX that is added to that of another layer of the same x, as of k to that of q."""
    for M, R, dtype in ((16, 16, torch.bfloat16), (8192, 16, torch.bfloat16), (8192, 96, torch.bfloat16), (32, 16, torch.float32)):
        for dropout in ("", "x") if R == 16 else ("",):
            problem = Problem(M, 1024, 4096, R, dtype, dropout)
            yield f"backward of several layers M={M} r={R}{' dropout' if dropout else ''}", problem.backward()

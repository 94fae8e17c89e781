"""Measured rows, by compute capability and shape bucket. Each row carries the measurement it rests on; no measurement, no row."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Problem
from .arch import Arch
from .config import Config


@dataclass(frozen=True)
class Row:
    """A measured choice for a bucket of problems on one compute capability.

    ``tokens``: the range [low, high) of M it holds for. ``arm``: "triton" or "torch", whichever was faster. ``source``: the file in
    bench/results/ and the ratio it shows. ``segments``: whether it is for many adapters; then its tiles must be the plan's blocks.
    """

    capability: tuple[int, int]
    tokens: tuple[int, int]
    N: int
    K: int
    rank: tuple[int, int]
    dropout: bool
    itemsize: int
    arm: str
    config: Config
    source: str
    segments: bool = False


ROWS: tuple[Row, ...] = ()


def _blocks(config: Config) -> tuple[int, int]:
    return config.expand.block_m, config.shrink.block_m


def lookup(problem: Problem, arch: Arch) -> Row | None:
    """The first row whose bucket holds the problem, or None."""
    for row in ROWS:
        if (
            arch.kind == "cuda"
            and row.capability == arch.capability
            and row.tokens[0] <= problem.M < row.tokens[1]
            and (row.N, row.K) == (problem.N, problem.K)
            and row.rank[0] <= problem.R < row.rank[1]
            and row.dropout == bool(problem.dropout)
            and row.itemsize == problem.itemsize
            and row.segments == bool(problem.adapters)
            and (row.arm == "torch" or not problem.adapters or _blocks(row.config) == (problem.row_block, problem.gather_block))
        ):
            return row
    return None

"""Measured rows, by compute capability and shape bucket. Each row carries the measurement it rests on; no measurement, no row.

``python -m bench.rows`` prints them from what `bench.device tune`, `mtune` and `single` measured; none is typed by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..problem import Problem, usual_dtype
from .arch import Arch
from .config import Config
from .validity import why_not


@dataclass(frozen=True)
class Row:
    """A measured choice for a bucket of problems on one compute capability.

    ``tokens``: the range [low, high) of M it holds for. ``arm``: "triton" or "torch", whichever was faster. ``source``: the file in
    bench/results/ and the ratio it shows. ``adapters``: how many may be loaded, [low, high): [0, 1) is one adapter without a plan; with
    one, the configuration's tiles must be the plan's blocks.
    ``w_major``: as in `Problem`: "k" for the forward pass of a layer K -> N, "n" for the backward pass of a layer N -> K.
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
    adapters: tuple[int, int] = (0, 1)
    w_major: str = "k"

    def problem(self, M: int, R: int) -> Problem:
        """A problem of the bucket, its operands as a call's usually lie."""
        dropout = ("x" if self.w_major == "k" else "uv") if self.dropout else ""
        least = self.adapters[0]
        blocks = (least, self.config.expand.block_m, self.config.shrink.block_m) if least else (0, 0, 0)
        many: dict[str, Any] = dict(zip(("adapters", "row_block", "gather_block"), blocks, strict=True))
        return Problem(M, self.N, self.K, R, usual_dtype(self.itemsize), dropout, w_major=self.w_major, **many)

    def corners(self) -> list[Problem]:
        """The bucket's problems of the fewest and the most tokens, at the least and the largest rank."""
        return [self.problem(M, R) for M in (self.tokens[0], self.tokens[1] - 1) for R in (self.rank[0], self.rank[1] - 1)]


ROWS: tuple[Row, ...] = ()


def lookup(problem: Problem, arch: Arch) -> Row | None:
    """The first row whose bucket holds the problem and whose configuration is valid for it (operands may lie otherwise), or None."""
    for row in ROWS:
        if (
            arch.kind == "cuda"
            and not (problem.base or problem.experts or problem.packed)
            and row.capability == arch.capability
            and row.tokens[0] <= problem.M < row.tokens[1]
            and (row.N, row.K) == (problem.N, problem.K)
            and row.rank[0] <= problem.R < row.rank[1]
            and row.dropout == bool(problem.dropout)
            and row.itemsize == problem.itemsize
            and row.adapters[0] <= problem.adapters < row.adapters[1]
            and row.w_major == problem.w_major
            and (row.arm == "torch" or why_not(row.config, problem, arch) is None)
        ):
            return row
    return None

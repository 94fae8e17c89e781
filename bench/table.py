"""Tables: aligned text for a terminal, Markdown for the documents, and the arithmetic of their cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [list(header), *([_cell(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence], left: int = 1) -> str:
    """Markdown, the first ``left`` columns aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(_cell(c) for c in row) + " |" for row in (header, rule, *rows))


def _cell(value) -> str:
    return "" if value is None else value if isinstance(value, str) else significant(value) if isinstance(value, float) else str(value)


def significant(value: float) -> str:
    """``value`` with three significant digits and no exponent: 0.0123, 1.23, 12.3, 1234."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def rounded(value: float) -> float:
    """Five significant digits: what a row keeps of a ratio."""
    return float(f"{value:.5g}")


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))

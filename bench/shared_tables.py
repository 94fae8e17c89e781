"""The table of section ``shared``: layers of one x, together and each alone, as multiples of the frozen layers."""

from __future__ import annotations

from .report_tables import PASSES, lists, mib, points
from .table import markdown_table, significant

COMMANDS = {"shared": "python -m bench.device shared --out bench/results"}


def shared(rows: list[dict], brief: bool) -> str:
    """Times over the frozen layers', and what is kept and the peak."""
    failed = [row for row in rows if row["error"]]
    rows = [row for row in rows if row["ms"] and (not brief or row["what"] in ("both", "forward"))]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "linear"]
    lines = []
    for (layer, M, p, grid, what), by_arm in points(rows, ("layer", "M", "p", "grid", "what")):
        if brief and grid == "train" and what == "forward":
            continue
        floor = by_arm.get("linear")
        times = [f"{significant(by_arm[arm]['ms']['p50'])}, {by_arm[arm]['over_linear']:.3g}x" if arm in by_arm else "" for arm in arms]
        lines.append([PASSES[what], layer, M, f"{p:g}", significant(floor["ms"]["p50"]) if floor else "", *times])
    parts = [
        "Median ms, and over that of the frozen layers.",
        markdown_table(["pass", "layers", "tokens", "dropout", "linear", *arms], lines),
    ]
    if not brief:
        kept = [row for row in rows if row["what"] == "both" and row["saved_bytes"] is not None]
        names = list(dict.fromkeys(row["arm"] for row in kept))
        memory = [
            [layer, M, f"{p:g}", *(mib(by_arm.get(arm)) for arm in names)] for (layer, M, p), by_arm in points(kept, ("layer", "M", "p"))
        ]
        parts += [
            "MiB kept for backward besides x, and on a GPU the peak.",
            markdown_table(["layers", "tokens", "dropout", *names], memory),
        ]
        parts += lists({"Failed": failed})
    return "\n\n".join(parts)


RENDERERS = {"shared": shared}

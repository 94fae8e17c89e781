"""The Markdown tables of the sections tune, mtune, compiles and sanitize; see `bench.report_tables`."""

from __future__ import annotations

from .candidates import short
from .report_tables import PASSES, ms
from .table import markdown_table, ratio
from .tune import HEURISTIC, finals

COMMANDS = {name: f"python -m bench.device {name} --out bench/results" for name in ("tune", "mtune", "compiles", "sanitize")}


def tune(rows: list[dict], brief: bool) -> str:
    """The heuristic's configuration against the best by point and kernel; in brief the whole passes alone."""
    lines = []
    for mine in finals(rows).values():
        first, best = next(iter(mine.values())), min(mine.values(), key=lambda row: row["ms"]["p50"])
        if brief and first["kernel"] != "pass":
            continue
        own = mine.get(HEURISTIC)
        tokens = f"{first['M']} of {first['adapters']} adapters" if first["loaded"] else first["M"]
        cells = [f"{first['layer']} {first['K']}->{first['N']}", tokens, first["r"], f"{first['p']:g}", PASSES[first["what"]]]
        cells += [first["kernel"].replace("pass", "whole pass"), ms(own, brief), ms(best, brief)]
        cells += [ratio(own["ms"]["p50"] / best["ms"]["p50"]) if own else ""]
        lines.append([*cells, best["name"] if first["kernel"] == "pass" else short(first["kernel"], best["config"])])
    wrong = sum(bool(row["error"]) for row in rows)
    left_out = sum(row["what"] == "left out" for row in rows)
    text = "Median ms of the last round, L2 cold; only configurations whose result is within the error budget are timed."
    text += f" Failed or wrong: {wrong}." if wrong else ""
    text += f" Points left out for want of time: {left_out}." if left_out else ""
    header = ["layer", "tokens", "r", "dropout", "pass", "kernel", "heuristic, ms", "best, ms", "heuristic / best", "best"]
    return f"{text}\n\n" + markdown_table(header, lines)


def compiles(rows: list[dict], brief: bool) -> str:
    """Kernels over changing lengths, and the first call where it was made."""
    lines = []
    for row in rows:
        # An error is the end of a process's output, whose last line says what it was.
        what = row["error"].strip().split("\n")[-1] if row["error"] else row["detail"] + (f" for {row['name']}" if row["name"] else "")
        first = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        p = "" if row["p"] is None else f"{row['p']:g}"
        lines.append([row["layer"], p, row["lengths"], row["kernels"], first, what])
    header = ["layer", "dropout", "lengths", "kernels", "first call on a cold cache, s", ""]
    return "Forward and backward at changing lengths from 1 to 8192.\n\n" + markdown_table(header, lines)


def sanitize(rows: list[dict], brief: bool) -> str:
    """Each tool's own summary."""
    lines = [[row["tool"] or row["what"], {True: "yes", False: "NO", None: ""}[row["ok"]], row["detail"]] for row in rows]
    return "compute-sanitizer over the quick parity check.\n\n" + markdown_table(["tool", "clean", "summary"], lines, left=3)


RENDERERS = {"tune": tune, "mtune": tune, "compiles": compiles, "sanitize": sanitize}

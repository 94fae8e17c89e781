"""The plots of the sections on a device: time over the base product's, by tokens or adapters; `bench.report` puts them beside the tables.

Each point is the geometric mean over a panel's layers, where the arm was measured at all of them; the base itself is 1 and has no line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import report_tables
from .multi_tables import arm_title
from .svg_lines import Lines, charts
from .table import geomean

MOST_VARIANTS = 4  # of the kernels; more of them are for the tables


@dataclass(frozen=True)
class Plot:
    """``panels``: what a section's rows give to draw, perhaps nothing."""

    title: str
    xlabel: str
    ylabel: str
    panels: Callable[[list[dict]], list[Lines]]

    def __call__(self, rows: list[dict]) -> str | None:
        panels = self.panels(rows)
        return charts(panels, self.xlabel, self.ylabel) if panels else None


def single(rows: list[dict]) -> list[Lines]:
    """Training at the first rank, a panel for each model and dropout; then decode."""
    rows = _timed(rows)
    trained = [row for row in rows if row["what"] == "both"]
    trained = [row for row in trained if row["r"] == trained[0]["r"]]
    panels = _panels(trained, _trained_as, lambda row: row["M"], report_tables.title)
    decode = [row for row in rows if row["what"] == "forward" and row["grid"] == "decode"]
    decode = [row for row in _of_one_launch(decode) if row["r"] == decode[0]["r"]]
    generated = _panels(decode, _generated_as, lambda row: row["M"], report_tables.title)
    return [*panels, *(replace(panel, scale="decode") for panel in generated)]


def decode(rows: list[dict]) -> list[Lines]:
    """By tokens, a panel for each popularity."""
    rows = _of_one_launch([row for row in _timed(rows) if row["grid"] == "popularity"])
    return _panels(rows, lambda row: f"{row['popularity']}, {row['loaded']} loaded, {row['launch']}", lambda row: row["M"], arm_title)


def mtrain(rows: list[dict]) -> list[Lines]:
    """By adapters, a panel for each number of tokens an adapter, as runs of one layer."""
    rows = [row for row in _timed(rows) if row["what"] == "both" and row["popularity"] == "even" and row["order"] == "runs"]
    rows = [row for row in rows if row["layer"] == rows[0]["layer"]]
    rows = sorted(rows, key=lambda row: row["M"] // row["loaded"])
    return _panels(rows, lambda row: f"{row['layer']}, {row['M'] // row['loaded']} tokens an adapter", lambda row: row["loaded"], arm_title)


def _timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["ms"] and row["over_linear"] is not None]


def _of_one_launch(rows: list[dict]) -> list[dict]:
    """Replays of graphs where there are any."""
    launches = [row["launch"] for row in rows]
    return [row for row in rows if row["launch"] == ("graph" if "graph" in launches else launches[0])]


def _model(row: dict) -> str:
    """The model's name before that of its layer, where there is one."""
    model, _, layer = row["layer"].partition(" ")
    return f"{model} " if layer else ""


def _trained_as(row: dict) -> str:
    return f"{_model(row)}{row['grid']}, r = {row['r']}, dropout {row['p']:g}"


def _generated_as(row: dict) -> str:
    return f"{_model(row)}decode, r = {row['r']}, {row['launch']}"


def _panels(rows: list[dict], panel: Callable[[dict], str], x: Callable[[dict], int], named: Callable[[str], str]) -> list[Lines]:
    """Rows by panel, arm and x; panels of one x are left out where another has more."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        found.setdefault(panel(row), {}).setdefault(row["arm"], {}).setdefault(x(row), []).append(row["over_linear"])
    panels = []
    for title, by_arm in found.items():
        layers = max(map(len, by_arm.get("linear", {0: ()}).values()))
        lines = {}
        for arm in _drawn(by_arm):
            means = [(at, geomean(values)) for at, values in sorted(by_arm[arm].items()) if len(values) == layers]
            if means:
                lines[named(arm)] = means
        if lines:
            panels.append(Lines(title, lines))
    several = [each for each in panels if any(len(points) > 1 for points in each.lines.values())]
    return several or panels


def _drawn(arms: dict) -> list[str]:
    variants = [arm for arm in arms if arm.startswith("triton:")]
    return [arm for arm in arms if arm != "linear" and (len(variants) <= MOST_VARIANTS or arm not in variants)]


PLOTS = {
    "single": Plot("Time over the frozen linear's", "tokens", "time / frozen linear", single),
    "decode": Plot("Decode over the base alone", "tokens", "time / base alone", decode),
    "mtrain": Plot("Training over the base alone", "adapters", "time / base alone", mtrain),
}

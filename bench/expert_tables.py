"""The tables of the section ``experts``, for a terminal and as Markdown; ``brief`` is the README's form."""

from __future__ import annotations

from .expert_baselines import FLOOR, OURS
from .report_tables import PASSES, lists, mib, ms, points, reasons
from .table import markdown_table, ratio, text_table

COMMANDS = {"experts": "python -m bench.device experts --out bench/results"}
_TITLES = {
    FLOOR: "experts alone",
    OURS: "ours, the stack",
    "beside": "ours, beside grouped matmul",
    "peft": "PEFT's folded stack",
    "grouped": "three grouped matmuls",
}
_POINT = ("layer", "K", "N", "M", "top_k", "popularity", "adapters", "loaded", "r", "dtype")


def arm_title(arm: str) -> str:
    return _TITLES.get(arm, arm)


def _timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["ms"]]


def _arms(rows: list[dict]) -> list[str]:
    """In the order of the table's columns."""
    there = {row["arm"] for row in rows}
    return [arm for arm in _TITLES if arm in there]


def experts(rows: list[dict], brief: bool) -> str:
    """Times over the frozen experts' alone, then memory; in brief forward and backward together, and no memory saved."""
    timed, memory = _timed(rows), [row for row in rows if row["what"] == "memory" and not row["error"]]
    if brief:
        timed = [row for row in timed if row["what"] == "both"]
    arms, lines = _arms(timed), []
    for key, by_arm in points(timed, ("grid", "launch", "what", *_POINT)):
        grid, launch, what, *point = key
        cells = [*_cells(point), ms(by_arm.get(FLOOR), brief), ms(by_arm.get(OURS), brief)]
        cells += [_over(by_arm.get(arm)) for arm in arms if arm != FLOOR]
        lines.append(cells if brief else [f"{grid}, {launch}", PASSES[what], *cells])
    header = [*_HEADER, "experts alone, ms", "ours, ms", *(arm_title(arm) for arm in arms if arm != FLOOR)]
    cold = ", L2 cold" if any(row["gpu"] for row in timed) else ""
    what = "Forward + backward" if brief else "Each pass"
    parts = [f"{what}: median time as a multiple of the frozen experts' alone by torch's grouped matmul on sorted rows{cold}, random data."]
    parts.append(markdown_table(header if brief else ["grid", "pass", *header], lines, left=2 if brief else 4))
    if memory and not brief:
        parts.append(_memory(memory))
    if not brief:
        left_out = [row for row in rows if row["what"] == "left out"]
        parts += lists({"Left out": left_out, "Failed": [row for row in rows if row["error"]]}, arm_title)
    return "\n\n".join(parts)


_HEADER = ["projection", "routing", "tokens", "experts", "r"]


def _cells(point: list) -> list:
    layer, K, N, M, top_k, routing, used, loaded, r, _ = point
    return [f"{layer} {K}->{N}", routing, M // top_k, f"{used} of {loaded}, {top_k} a token", r]


def _over(row: dict | None) -> str:
    return ratio(row["over_linear"]) if row and row["over_linear"] else ""


def _memory(rows: list[dict]) -> str:
    arms = _arms(rows)
    lines = [[*_cells(list(key)), *(mib(by_arm.get(arm)) for arm in arms)] for key, by_arm in points(rows, _POINT)]
    peak = " / the most that forward and backward add" if any(row["peak_bytes"] is not None for row in rows) else ""
    text = f"MiB: saved for backward besides x, the stacks and the plan{peak}."
    return f"{text}\n\n" + markdown_table([*_HEADER, *map(arm_title, arms)], lines, left=2)


def summary(rows: list[dict]) -> str:
    """Text: times over the frozen experts' alone and memory, a line for each point and pass; then what was left out."""
    timed = _timed(rows)
    arms, lines = _arms(timed), []
    for key, by_arm in points(timed, ("launch", "what", *_POINT)):
        launch, what, *point = key
        cells = [by_arm[arm]["ms"]["p50"] if arm in by_arm else None for arm in (FLOOR, OURS)]
        lines.append([f"{_label(point)} {launch} {what}", *cells, *(_over(by_arm.get(arm)) for arm in arms if arm != FLOOR)])
    text = text_table(["experts: time / experts alone", "base ms", "ours ms", *(arm for arm in arms if arm != FLOOR)], lines)
    memory = [row for row in rows if row["what"] == "memory" and not row["error"]]
    if memory:
        arms = _arms(memory)
        lines = [[_label(list(key)), *(mib(by_arm.get(arm)) for arm in arms)] for key, by_arm in points(memory, _POINT)]
        text += "\n" + text_table(["experts: MiB saved / peak", *arms], lines)
    return "\n".join([text, *(f"left out: {line}" for line in reasons([row for row in rows if row["what"] == "left out"], arm_title))])


def _label(point: list) -> str:
    layer, routing, tokens, used, r = _cells(point)
    return f"{layer} {routing} {tokens} tokens, {used}, r={r}"


RENDERERS = {"experts": experts}

"""The tables of the sections on many adapters, for a terminal and as Markdown; ``brief`` is the README's form."""

from __future__ import annotations

from .plan_cost import GRID, LAYERS
from .report_tables import PASSES, lists, ms, points, reasons, title
from .table import geomean, markdown_table, ratio, significant, text_table

SECTIONS = ("multi", "decode", "mtrain")
COMMANDS = {section: f"python -m bench.device {section} --out bench/results" for section in SECTIONS}
BRIEF = 12  # the most informative points come first
_TITLES = {
    "gather-bmm": "gathered copies, bmm",
    "grouped-mm": "torch._grouped_mm",
    "peft-loop": "PEFT's loop",
    "triton:given": "ours, u given",
    "triton:given+pdl": "ours, u given, launches overlapped",
    "triton:awaited": "ours, u awaited",
    "triton:overlapped by stream": "ours, dA and dB on a second stream",
    "triton:overlapped by pdl": "ours, all launches overlapped",
    "one-adapter": "ours, one adapter",
    "each:linear": "a base product for each layer",
    "each:auto": "ours, a call for each layer",
}
_KEYS = ("grid", "launch", "what", "layer", "K", "N", "M", "popularity", "adapters", "loaded", "order", "r", "ranks")


def arm_title(arm: str) -> str:
    return _TITLES.get(arm, title(arm))


def rank_of(row: dict) -> str:
    return "/".join(map(str, row["ranks"])) if row["ranks"] else str(row["r"])


def many(rows: list[dict], brief: bool) -> str:
    """Times over the base alone's, what was left out and why, and what a plan costs; in brief one layer of the first grid."""
    left_out = [row for row in rows if row["what"] == "left out"]
    plan = [row for row in rows if row["grid"] == GRID and row["ms"]]
    timed = [row for row in rows if row["ms"] and row["grid"] != GRID]
    if brief:
        timed = _brief(timed)
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in timed) if arm != "linear"]
    hashable = [row | {"ranks": rank_of(row)} for row in timed]
    lines = []
    for key, by_arm in points(hashable, _KEYS):
        grid, launch, what, layer, K, N, M, popularity, adapters, loaded, order, _, ranks = key
        cells = [f"{layer} {K}->{N}", popularity, order if adapters > 1 else "", M, f"{adapters} of {loaded}", ranks]
        cells.append(ms(by_arm.get("linear"), brief))
        cells += [ratio(by_arm[arm]["over_linear"]) if by_arm.get(arm, {}).get("over_linear") else "" for arm in arms]
        lines.append(cells if brief else [f"{grid}, {launch}", PASSES[what], *cells])
    header = ["layer", "popularity", "order", "tokens", "adapters", "r", "base alone, ms", *map(arm_title, arms)]
    what = PASSES[timed[0]["what"]].capitalize() if brief and timed else "Each pass"
    cold = ", L2 cold" if any(row["gpu"] for row in timed) else ""
    parts = [f"{what}: median time as a multiple of the base alone's{cold}, random data."]
    if lines:
        parts.append(markdown_table(header, lines, left=3) if brief else markdown_table(["grid", "pass", *header], lines, left=5))
    if plan:
        parts.append(_plan(plan, brief))
    if not brief:
        parts += lists({"Left out": left_out, "Failed": [row for row in rows if row["error"]]}, arm_title)
    return "\n\n".join(parts)


def _brief(rows: list[dict]) -> list[dict]:
    """The first points of the first grid and layer, by the first kind of launch, forward and backward together where there is both."""
    for field in ("grid", "layer", "launch"):
        rows = [row for row in rows if row[field] == rows[0][field]]
    last = "both" if any(row["what"] == "both" for row in rows) else "forward"
    rows = [row for row in rows if row["what"] == last]
    first = list(dict.fromkeys(map(_point, rows)))[:BRIEF]
    return [row for row in rows if _point(row) in first]


def _point(row: dict) -> tuple:
    return tuple(rank_of(row) if key == "ranks" else row[key] for key in _KEYS)


def _plan(rows: list[dict], brief: bool) -> str:
    lines = []
    for (launch, M, loaded), by_arm in points(rows, ("launch", "M", "loaded")):
        own = by_arm.get("from_ids")
        if own is None or not own["over_linear"]:
            continue
        share = own["over_linear"]
        lines.append([launch, M, loaded, *(ms(by_arm.get(arm), brief) for arm in ("from_ids", "from_ids:unvalidated", "linear")),
                      ratio(share), f"{100 * share / LAYERS:.1f} %"])  # fmt: skip
    header = ["launch", "tokens", "adapters", "plan, ms", "ids not validated, ms", "one base product, ms", "plan / product"]
    header.append(f"of {LAYERS} layers'")
    first = rows[0]
    return f"`Segments.from_ids`, once for all layers; the base product is {first['K']}->{first['N']}.\n\n" + markdown_table(header, lines)


def summary(name: str, rows: list[dict]) -> str:
    """Text: times over the base alone's, geometric means over layers; then plans, and what was left out."""
    timed = [row for row in rows if row["over_linear"] is not None and row["grid"] != GRID]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in timed) if arm != "linear"]
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in timed:
        adapters = f"{row['popularity']} {row['adapters']}/{row['loaded']}{' ' + row['order'] if row['adapters'] > 1 else ''}"
        label = f"{row['grid']} {row['launch']} M={row['M']} {adapters} r={rank_of(row)} {row['what']}"
        groups.setdefault(label, {}).setdefault(row["arm"], []).append(row)
    lines = []
    for label, by_arm in groups.items():
        base = by_arm["linear"]
        over = {arm: geomean([row["over_linear"] for row in mine]) for arm, mine in by_arm.items() if len(mine) == len(base)}
        cells = [ratio(over[arm]) if arm in over else "" for arm in arms]
        lines.append([label, len(base), geomean([row["ms"]["p50"] for row in base]), *cells])
    text = text_table([f"{name}: time / base alone", "layers", "base ms", *arms], lines)
    plan = [row for row in rows if row["grid"] == GRID and row["arm"] == "from_ids" and row["over_linear"]]
    if plan:
        lines = [[f"{row['launch']} M={row['M']} E={row['loaded']}", row["ms"]["p50"], significant(row["over_linear"]),
                  significant(row["over_linear"] / LAYERS)] for row in plan]  # fmt: skip
        text += "\n" + text_table([f"{name}: plan", "ms", "/ base product", f"/ {LAYERS} of them"], lines)
    left_out = [row for row in rows if row["what"] == "left out"]
    return "\n".join([text, *(f"left out: {line}" for line in reasons(left_out, arm_title))])


RENDERERS = dict.fromkeys(SECTIONS, many)

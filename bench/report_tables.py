"""The Markdown table of each section, from its rows; ``brief`` is the README's form. `bench.report` puts them in place."""

from __future__ import annotations

import re
from collections.abc import Callable

from .table import markdown_table, ratio, significant

COMMANDS = {
    "cpu": "python -m bench.cpu --out bench/results/cpu.jsonl",
    "parts": "python -m bench.parts --out bench/results/parts.jsonl",
    **{
        section: f"python -m bench.device {section} --out bench/results"
        for section in ("check", "roof", "single", "memory", "host", "merge")
    },
}
_TITLES = {
    "linear": "frozen linear",
    "peft": "PEFT",
    "lorafusion": "LoRAFusion's baseline",
    "addmm-beta1": "addmm, beta = 1",
    "torch": 'ours, `"torch"`',
    "torch-no-onednn": 'ours, `"torch"`, torch\'s own linear',
    "auto": 'ours, `"auto"`',
    "triton": 'ours, `"triton"`',
    "segments": "ours, 8 adapters",
}
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def title(arm: str) -> str:
    return _TITLES.get(arm, arm)


def cpu(rows: list[dict], brief: bool) -> str:
    """PEFT against the chain; in full every pass with its spread."""
    header = ["dtype", "dropout", "layer", "tokens", "frozen linear, ms", "PEFT, ms", "ours, ms"]
    header = [*([] if brief else ["pass"]), *header, "PEFT / ours", "PEFT / ours on torch's own linear"]
    lines = []
    for key, by_arm in points(rows, ("dtype", "p", "layer", "M", "what")):
        dtype, p, layer, M, what = key
        if brief and what != "both":
            continue
        cells = [dtype, f"{p:g}", layer, M, *(ms(by_arm.get(arm), brief) for arm in ("linear", "peft", "torch"))]
        cells += [ratio(by_arm[arm]["speedup_over_peft"]) if arm in by_arm else "" for arm in ("torch", "torch-no-onednn")]
        lines.append(cells if brief else [PASSES[what], *cells])
    if not brief:
        lines.sort(key=lambda line: list(PASSES.values()).index(line[0]))
    spread = "Forward + backward, medians" if brief else "Medians, with the 20th and 80th percentile"
    rounds = sorted({row["rounds"] for row in rows})
    span = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
    ranks = ", ".join(f"{r}" for r in sorted({row["r"] for row in rows}))
    return f"{spread} of {span} interleaved rounds, r = {ranks}.\n\n" + markdown_table(header, lines, left=3 if brief else 4)


def parts(rows: list[dict], brief: bool) -> str:
    """Each part by shape and dtype."""
    shapes = list(dict.fromkeys((row["M"], row["K"], row["dtype"]) for row in rows))
    lines: dict[str, dict] = {}
    for row in rows:
        lines.setdefault(row["arm"], {})[row["M"], row["K"], row["dtype"]] = row
    header = ["ms", *(f"{M} x {K}, {dtype}" for M, K, dtype in shapes)]
    return markdown_table(header, [[arm, *(ms(by.get(shape), brief) for shape in shapes)] for arm, by in lines.items()])


def single(rows: list[dict], brief: bool) -> str:
    """Times over the frozen linear's; in brief the training of the smaller model at one rank, and the fewest arms."""
    late = sum(row["what"] == "left out" and row["arm"] is None for row in rows)
    below = {
        "How peers were checked": [row for row in rows if row["detail"] and row["what"] == "both"],
        "Left out": [row for row in rows if row["what"] == "left out" and row["arm"]],
        "Failed": [row for row in rows if row["error"]],
    }
    rows = [row for row in rows if row["ms"]]
    if brief:
        rows = [row for row in rows if row["what"] == "both" and row["grid"] == "train" and row["r"] == 16]
        rows = [row for row in rows if row["arm"] in ("linear", "peft", "torch", "auto", "triton") and not row["layer"].startswith("70B")]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "linear"]
    lines = []
    for key, by_arm in points(rows, ("grid", "launch", "layer", "K", "N", "M", "r", "p", "what")):
        grid, launch, layer, K, N, M, r, p, what = key
        floor = by_arm.get("linear")
        cells = [f"{layer} {K}->{N}", M, r, f"{p:g}", ms(floor, brief)]
        cells += [ratio(by_arm[arm]["over_linear"]) if arm in by_arm else "" for arm in arms]
        lines.append(cells if brief else [f"{grid}, {launch}", PASSES[what], *cells])
    header = ["layer", "tokens", "r", "dropout", "frozen linear, ms", *map(title, arms)]
    text = f"{'Forward + backward' if brief else 'Each pass'}: median time as a multiple of the frozen linear's, L2 cold, random data."
    if brief:
        return f"{text}\n\n" + markdown_table(header, lines)
    text += f" Points left out for want of time: {late}." if late else ""
    return "\n\n".join([text, markdown_table(["grid", "pass", *header], lines, left=3), *lists(below)])


def memory(rows: list[dict], brief: bool) -> str:
    """MiB per layer."""
    rows = [row for row in rows if row["what"] == "memory"]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if not brief or arm in ("peft", "torch", "auto", "triton")]
    lines = []
    for (layer, K, N, M, r, p), by_arm in points(rows, ("layer", "K", "N", "M", "r", "p")):
        lines.append([f"{layer} {K}->{N}", M, r, f"{p:g}", *(mib(by_arm.get(arm)) for arm in arms)])
    peak = " / peak of forward and backward above what was in use before" if any(row["peak_bytes"] is not None for row in rows) else ""
    header = ["layer", "tokens", "r", "dropout", *map(title, arms)]
    return f"MiB: saved for backward besides the operands{peak}.\n\n" + markdown_table(header, lines)


def host(rows: list[dict], brief: bool) -> str:
    """Microseconds of host time a call."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = []
    for (what, p), by_arm in points(rows, ("what", "p")):
        lines.append([PASSES[what], f"{p:g}", *(f"{by_arm[arm]['us']['p50']:.0f}" if arm in by_arm else "" for arm in arms)])
    return "Median host time of an eager call in microseconds.\n\n" + markdown_table(["pass", "dropout", *map(title, arms)], lines)


def merge(rows: list[dict], brief: bool) -> str:
    """Milliseconds by layer and rank, and the rate at which W is read and written once."""
    failed = [row for row in rows if row["error"]]
    rows = [row for row in rows if row["ms"]]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = []
    for (layer, K, N, r), by_arm in points(rows, ("layer", "K", "N", "r")):
        cells = [ms(by_arm.get(arm), brief) + (f", {by_arm[arm]['gbs']:.0f} GB/s" if arm in by_arm and not brief else "") for arm in arms]
        lines.append([f"{layer} {K}->{N}", r, *cells])
    text = "Median ms to merge an adapter into a weight; GB/s: W read once and written once."
    return "\n\n".join([text, markdown_table(["layer", "r", *arms], lines), *([] if brief else lists({"Failed": failed}))])


def roof(rows: list[dict], brief: bool) -> str:
    """The copy rate and the matmul rates."""
    lines = []
    for row in rows:
        if row["what"] == "copy":
            lines.append(["device-to-device copy", significant(row["ms"]["p50"]), f"{row['gbs']:.0f} GB/s"])
        elif not brief or row["layer"] == "square":
            shape = f"{row['layer']} {row['M']}x{row['K']}->{row['N']}"
            lines.append([shape, significant(row["ms"]["p50"]), f"{row['tflops']:.3g} TFLOP/s"])
    return markdown_table(["", "ms", "rate"], lines)


def check(rows: list[dict], brief: bool) -> str:
    """The verdict, and in full the cases nearest to the tolerance."""
    verdict = next(row for row in reversed(rows) if row["what"] == "verdict")
    cases = sorted((row for row in rows if row["what"] == "case"), key=lambda row: -row["ratio"])
    text = f"{verdict['detail']}; the largest error is {significant(verdict['ratio'])} of what is allowed."
    if brief:
        return text
    return f"{text}\n\n" + markdown_table(["case", "error / allowed"], [[row["name"], row["ratio"]] for row in cases[:10]])


RENDERERS = {"cpu": cpu, "parts": parts, "check": check, "roof": roof, "single": single, "memory": memory, "host": host, "merge": merge}


def points(rows: list[dict], keys: tuple[str, ...]):
    """(values of the keys, rows by arm), in the rows' order."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["arm"]] = row
    return found.items()


def lists(rows: dict[str, list[dict]], named: Callable[[str], str] = title) -> list[str]:
    """Below a table: under each heading that has rows, the arms and what is said of them."""
    return [f"{heading}:\n\n" + "\n".join(f"- {line}" for line in reasons(why, named)) for heading, why in rows.items() if why]


def reasons(rows: list[dict], named: Callable[[str], str] = title) -> list[str]:
    """One line for each arm and reason, numbers aside; with the first point's numbers."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        reason = (row["detail"] or row["error"]).split("\n")[0][:300]
        groups.setdefault((row["arm"] or "", row["launch"] or "", re.sub(r"[\d.]+", "#", reason)), []).append(row | {"detail": reason})
    lines = []
    for (arm, launch, _), mine in groups.items():
        number = f"{len(mine)} points" if len(mine) > 1 else "1 point"
        where = f", {launch}" if launch else ""
        who = named(arm) if arm else "points"
        lines.append(f"{who}{where}: {mine[0]['detail']}" + (f" ({number})" if mine[0]["M"] is not None else ""))
    return lines


def ms(row: dict | None, brief: bool) -> str:
    if row is None:
        return ""
    p20, p50, p80 = (significant(row["ms"][q]) for q in ("p20", "p50", "p80"))
    return p50 if brief else f"{p50} ({p20}-{p80})"


def mib(row: dict | None) -> str:
    if row is None or row["saved_bytes"] is None:
        return ""
    sizes = [row["saved_bytes"]] + ([row["peak_bytes"]] if row["peak_bytes"] is not None else [])
    return " / ".join(significant(size / (1 << 20)) if size else "0" for size in sizes)

"""The tables and the plot of what was measured on PEFT's own layers and models; `bench.report` puts them in place."""

from __future__ import annotations

from .report_tables import ms, points
from .svg import Panel, charts
from .table import markdown_table, ratio, significant

COMMANDS = {
    "modules": "python -m bench.modules --out bench/results/modules.jsonl",
    "curves": "python -m bench.loss_curves --out bench/results/curves.jsonl",
}


def modules(rows: list[dict], brief: bool) -> str:
    """PEFT's layer against the same one fused: a step's time, and what it keeps; in brief PEFT's default dtypes at the most tokens."""
    rows = [row for row in rows if row["what"] == "both"]
    most = max(row["M"] for row in rows)
    lines = []
    for (dtype, adapters, p, layer, M), by_arm in points(rows, ("dtype", "adapter_dtype", "p", "layer", "M")):
        if brief and (M != most or adapters != "float32"):
            continue
        cells = [dtype, adapters, f"{p:g}", layer, M, *(ms(by_arm[arm], brief) for arm in ("linear", "peft", "fused"))]
        kept = [significant(by_arm[arm]["saved_bytes"] / (1 << 20)) for arm in ("peft", "fused")]
        lines.append([*cells, ratio(by_arm["fused"]["speedup_over_peft"]), *kept])
    header = ["base", "adapters", "dropout", "layer", "tokens", "frozen linear, ms", "PEFT, ms", "fused, ms", "PEFT / fused"]
    rounds = sorted({row["rounds"] for row in rows})
    text = "`peft.tuners.lora.Linear` as it is and after `fuse`: forward + backward, medians of "
    text += f"{rounds[0]} to {rounds[-1]} interleaved rounds, r = {rows[0]['r']}; and MiB that autograd keeps for backward, x among them."
    return f"{text}\n\n" + markdown_table([*header, "PEFT keeps", "fused keeps"], lines, left=4)


def curves(rows: list[dict], brief: bool) -> str:
    """The plot, and how far the curves are apart."""
    lines = []
    for (dtype, p), by_arm in points(rows, ("dtype", "p")):
        theirs, ours = by_arm["peft"]["losses"], by_arm["fused"]["losses"]
        gap = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        lines.append([dtype, f"{p:g}", len(theirs), significant(theirs[0]), significant(theirs[-1]), significant(ours[-1]), f"{gap:.1g}"])
    header = ["base", "dropout", "steps", "first loss", "last loss, PEFT", "last loss, fused", "largest difference of a step"]
    return "![Loss curves](curves.svg)\n\n" + markdown_table(header, lines)


def plot(rows: list[dict]) -> str:
    """curves.svg."""
    panels = []
    for (dtype, p), by_arm in points(rows, ("dtype", "p")):
        pair = {"PEFT": by_arm["peft"]["losses"], "fused": by_arm["fused"]["losses"]}
        panels.append(Panel(f"{dtype} base, {f'dropout {p:g}' if p else 'no dropout'}", pair))
    return charts(panels, "step", "loss")


RENDERERS = {"modules": modules, "curves": curves}
PLOTS = {"curves": plot}

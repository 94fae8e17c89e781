"""The tables and the plot of what was measured on PEFT's own layers and models; `bench.report` puts them in place."""

from __future__ import annotations

from .report_tables import PASSES, lists, ms, points
from .svg import Panel, charts
from .table import markdown_table, ratio, significant

COMMANDS = {
    "modules": "python -m bench.modules --out bench/results/modules.jsonl",
    "qlora": "python -m bench.modules --kind qlora --out bench/results/qlora.jsonl",
    "dora": "python -m bench.modules --kind dora --out bench/results/dora.jsonl",
    "qdora": "python -m bench.modules --kind qdora --out bench/results/qdora.jsonl",
    "curves": "python -m bench.loss_curves --out bench/results/curves.jsonl",
    "model": "python -m bench.device model --out bench/results",
    "slots": "python -m bench.device slots --out bench/results",
}
TITLES = {"peft": "PEFT", "fused": "fused", "shared": "fused, `share_inputs`", "gates": "and `recompute_gates`", "slots": "slots"}


def modules(rows: list[dict], brief: bool) -> str:
    """PEFT's layer against the same one fused: a step's time, and what it keeps; in brief PEFT's default dtypes at the most tokens."""
    below = _below(rows)
    rows = [row for row in rows if row["what"] == "both" and row["ms"]]
    if not rows:
        return "\n\n".join(below)
    most, beside = max(row["M"] for row in rows), ["beside"] if any(row["arm"] == "beside" for row in rows) else []
    lines = []
    for (dtype, adapters, p, layer, M), by_arm in points(rows, ("dtype", "adapter_dtype", "p", "layer", "M")):
        if brief and (M != most or adapters != "float32"):
            continue
        cells = [dtype, adapters, f"{p:g}", layer, M, *(ms(by_arm[arm], brief) for arm in ("linear", "peft", *beside, "fused"))]
        kept = [_peak(by_arm[arm]) for arm in ("peft", "fused")]
        lines.append([*cells, ratio(by_arm["fused"]["speedup_over_peft"]), *kept])
    header = [
        "base",
        "adapters",
        "dropout",
        "layer",
        "tokens",
        "frozen linear, ms",
        "PEFT, ms",
        *(f"{arm}, ms" for arm in (*beside, "fused")),
    ]
    header.append("PEFT / fused")
    rounds = sorted({row["rounds"] for row in rows})
    text = {
        "modules": "`peft.tuners.lora.Linear` as it is and after `fuse`",
        "qlora": "PEFT's layer over bitsandbytes' NF4 as it is and after `fuse`, beside its base's product and with the weight made whole",
        "dora": "PEFT's layer with DoRA as it is and after `fuse`",
        "qdora": "PEFT's layer with DoRA over bitsandbytes' NF4 as it is and after `fuse`",
    }[rows[0]["section"]]
    text += ": forward + backward, medians of "
    text += f"{rounds[0]} to {rounds[-1]} interleaved rounds, r = {rows[0]['r']}; and MiB that "
    on_gpu = rows[0]["peak_bytes"] is not None
    text += "a step adds at its peak." if on_gpu else "autograd keeps for backward, x among them."
    kept = "at its peak" if on_gpu else "keeps"
    return "\n\n".join([text, markdown_table([*header, f"PEFT {kept}", f"fused {kept}"], lines, left=4), *below])


def curves(rows: list[dict], brief: bool) -> str:
    """The plot, and how far the curves are apart."""
    lines = []
    for (dtype, p), by_arm in points(rows, ("dtype", "p")):
        theirs, ours = by_arm["peft"]["losses"], by_arm["fused"]["losses"]
        gap = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        lines.append([dtype, f"{p:g}", len(theirs), significant(theirs[0]), significant(theirs[-1]), significant(ours[-1]), f"{gap:.1g}"])
    header = ["base", "dropout", "steps", "first loss", "last loss, PEFT", "last loss, fused", "largest difference of a step"]
    return "![Loss curves](curves.svg)\n\n" + markdown_table(header, lines)


def model(rows: list[dict], brief: bool) -> str:
    """A training step and a step of generation of whole layers, as multiples of the frozen model's; in brief without single passes."""
    below = _below(rows)
    rows = [row for row in rows if row["ms"]]
    tables = []
    for grid, arms, text in (
        ("train", ("peft", "fused", "shared", "gates"), "A training step: forward and backward, one adapter, dropout as shown."),
        ("decode", ("peft", "fused", "slots"), "A step of generation: one token a sequence, adapters in turn."),
    ):
        lines = []
        keys = ("layer", "M", "adapters", "p", "launch", "what")
        for (layer, M, adapters, p, launch, what), by_arm in points([row for row in rows if row["grid"] == grid], keys):
            if brief and grid == "train" and what != "both":
                continue
            cells = [ms(by_arm.get("linear"), brief), *(_over(by_arm.get(arm), brief) for arm in arms)]
            if grid == "train":
                peaks = [_peak(by_arm.get(arm)) if what == "both" else "" for arm in ("linear", *arms)]
                lines.append([layer, M, f"{p:g}", *([] if brief else [PASSES[what]]), *cells, *peaks])
            else:
                lines.append([layer, M, adapters, *([] if brief else [launch]), *cells])
        if not lines:
            continue
        names = ["frozen, ms", *(TITLES[arm] for arm in arms)]
        if grid == "train":
            peaks = [f"{what}, MiB" for what in ("frozen", *(TITLES[arm] for arm in arms))]
            header = ["layers", "tokens", "dropout", *([] if brief else ["pass"]), *names, *peaks]
        else:
            header = ["layers", "sequences", "adapters", *([] if brief else ["launch"]), *names]
        tables.append(f"{text}\n\n" + markdown_table(header, lines))
    text = "Whole decoder layers with LoRA (r = 16) on every linear, in a mixture on its attention and each expert: median ms, and over "
    text += "the frozen model's; MiB kept for backward, on a GPU the peak of a step."
    return "\n\n".join([text, *tables, *below])


def _below(rows: list[dict]) -> list[str]:
    """What stands below a table: the arms that failed, and the points that there was no time for."""
    return lists({"Failed": [row for row in rows if row["error"]], "Left out": [row for row in rows if row["what"] == "left out"]})


def _over(row: dict | None, brief: bool) -> str:
    return "" if row is None else f"{ms(row, brief)}, {ratio(row['over_linear'])}x"


def _peak(row: dict | None) -> str:
    return "" if row is None else significant((row["peak_bytes"] or row["saved_bytes"] or 0) / (1 << 20))


def slots(rows: list[dict], brief: bool) -> str:
    """What another adapter costs a model that serves, beside the model itself."""
    below = _below(rows)
    rows = [row for row in rows if row["ms"]]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = []
    for (layer, r), by_arm in points(rows, ("layer", "r")):
        moved = significant(next(iter(by_arm.values()))["moved_bytes"] / (1 << 20))
        lines.append([layer, r, moved, *(ms(by_arm.get(arm), brief) for arm in arms)])
    text = "Wall ms until the device has it. From files: the frozen model, and an adapter, by PEFT's hotswap and by `AdapterPool.add`. "
    text += "In `pool.use`: to put an adapter into a slot, beside a copy of as many bytes, and to name one that has its slot."
    return "\n\n".join([text, markdown_table(["model", "r", "adapter, MiB", *arms], lines), *below])


def plot(rows: list[dict]) -> str:
    """curves.svg."""
    panels = []
    for (dtype, p), by_arm in points(rows, ("dtype", "p")):
        pair = {"PEFT": by_arm["peft"]["losses"], "fused": by_arm["fused"]["losses"]}
        panels.append(Panel(f"{dtype} base, {f'dropout {p:g}' if p else 'no dropout'}", pair))
    return charts(panels, "step", "loss")


RENDERERS = {"modules": modules, "qlora": modules, "dora": modules, "qdora": modules, "curves": curves, "model": model, "slots": slots}
PLOTS = {"curves": plot}

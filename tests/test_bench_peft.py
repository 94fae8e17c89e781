"""What is measured on PEFT's own layers and models: whole rows, tables and a plot made of them alone."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bench import conditions, loss_curves, modules, peft_tables, report, session, svg

pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too


def test_modules_times_and_weighs_both(tmp_path, capsys):
    assert modules.main(["--quick", "--seconds", "0.05", "--out", str(tmp_path / "modules.jsonl")]) == 0
    assert "PEFT/fused" in capsys.readouterr().out
    rows = conditions.read_rows(tmp_path / "modules.jsonl")
    assert len(rows) == 6 * 3 * 3
    for row in rows:
        assert row["section"] == "modules" and row["ms"]["p50"] > 0 and row["gpu"] is None and row["cpu"]
        assert (row["saved_bytes"] is not None) == (row["what"] == "both")
    states = {(row["dtype"], row["adapter_dtype"]) for row in rows}
    assert states == {("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")}
    full, brief = (peft_tables.modules(rows, brief) for brief in (False, True))
    assert len(full.splitlines()) == 4 + 6 and len(brief.splitlines()) == 4 + 4
    assert "bfloat16 | bfloat16" in full and "bfloat16 | bfloat16" not in brief


def test_the_measured_layer_is_fused_or_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(
        "lora_kernels.integrations.peft.fuse", lambda model: type("Report", (), {"left": {"0": "why"}, "__str__": lambda self: "1 left"})()
    )
    with pytest.raises(RuntimeError, match="layer: wanted it fused, got 1 left"):
        modules.peft_and_fused(8, 8, 2, 0.0, torch.float32, torch.float32)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the base is bitsandbytes'")
def test_four_bits_beside_their_base_and_whole(tmp_path, capsys):
    assert modules.main(["--quick", "--kind", "qlora", "--seconds", "0.05", "--out", str(tmp_path / "qlora.jsonl")]) == 0
    assert "beside" in capsys.readouterr().out
    rows = conditions.read_rows(tmp_path / "qlora.jsonl")
    assert len(rows) == 2 * 4 * 3 and {row["section"] for row in rows} == {"qlora"} and {row["M"] for row in rows} == {1024}
    kept = {row["arm"]: row["saved_bytes"] for row in rows if row["what"] == "both" and not row["p"]}
    assert kept["fused"] == kept["beside"] < kept["peft"]
    assert "| beside, ms | fused, ms |" in peft_tables.modules(rows, False)


@pytest.mark.parametrize("kind", ["dora", "qdora"])
def test_dora_is_measured_fused(kind, tmp_path):
    if kind == "qdora":
        pytest.importorskip("bitsandbytes", reason="the base is bitsandbytes'")
    assert modules.main(["--quick", "--kind", kind, "--seconds", "0.05", "--out", str(tmp_path / "dora.jsonl")]) == 0
    rows = conditions.read_rows(tmp_path / "dora.jsonl")
    assert len(rows) == 2 * 3 * 3 and {row["section"] for row in rows} == {kind} and "with DoRA" in peft_tables.modules(rows, True)


def test_dora_as_a_section_of_the_device_s(tmp_path, monkeypatch):
    """The same rows; a point that fails, or is wrong, is one of its own, below the table."""
    own = session.Session(torch.device("cpu"), tmp_path, 30.0, quick=True)
    assert modules.run(own) == 0
    rows = conditions.read_rows(tmp_path / "dora.jsonl")
    assert len(rows) == 2 * 3 * 3 and {row["section"] for row in rows} == {"dora"}
    wide = torch.randn(64, 64).bfloat16()
    layers = modules.peft_and_fused(64, 64, 4, 0.1, torch.bfloat16, torch.float32, "dora")
    modules.check(layers["peft"], layers["fused"], wide, wide)
    layers["fused"].lora_B["default"].weight.data *= 1.1
    with pytest.raises(ValueError, match="result 0: wanted at most .* from float32"):
        modules.check(layers["peft"], layers["fused"], wide, wide)
    assert layers["peft"].training and layers["fused"].training
    monkeypatch.setattr(modules, "measure", lambda *args: 1 / 0)
    assert modules.run(own) == 2
    failed = conditions.read_rows(tmp_path / "dora.jsonl")
    for timed in (rows, []):
        assert "Failed:" in report.render("dora", [*timed, *failed], False)


def test_loss_curves_are_those_of_one_model(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_curves, "WIDTH", 32)
    assert loss_curves.main(["--quick", "--out", str(tmp_path / "curves.jsonl")]) == 0
    rows = conditions.read_rows(tmp_path / "curves.jsonl")
    assert [(row["arm"], row["dtype"], row["p"]) for row in rows[:4]] == [
        ("peft", "float32", 0.0), ("fused", "float32", 0.0), ("peft", "bfloat16", 0.0), ("fused", "bfloat16", 0.0),
    ]  # fmt: skip
    theirs, ours = rows[0]["losses"], rows[1]["losses"]
    assert len(theirs) == len(ours) == 3 and all(abs(a - b) < 1e-5 for a, b in zip(theirs, ours, strict=True))
    assert "![Loss curves](curves.svg)" in peft_tables.curves(rows, False)


def test_charts_draw_what_they_are_given():
    panels = [svg.Panel("one", {"a": [3.0, 2.5, 2.0], "b": [3.0, 2.5, 2.1]}), svg.Panel("two", {"a": [2.2], "b": [2.3]})]
    root = ElementTree.fromstring(svg.charts(panels, "step", "loss"))
    lines = [
        [tuple(map(float, point.split(","))) for point in element.attrib["points"].split()]
        for element in root.iter()
        if element.tag.endswith("polyline")
    ]
    assert [len(line) for line in lines] == [3, 3, 1, 1]
    for i, line in enumerate(lines):
        assert all(svg.WIDTH * (i // 2) <= x <= svg.WIDTH * (i // 2 + 1) and 0 <= y <= svg.HEIGHT for x, y in line)
    (top, middle, bottom), (_, _, other) = lines[0], lines[1]
    assert top[1] < middle[1] < bottom[1] and other[1] < bottom[1], "a greater loss stands higher"
    assert middle[1] == pytest.approx((top[1] + bottom[1]) / 2, abs=0.11) and middle[0] == pytest.approx((top[0] + bottom[0]) / 2, abs=0.11)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"one", "two", "a", "b", "step", "loss", "2", "3"} <= set(texts)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1.87, 2.37), (4.0, 4.0), (1e-3, 9e-3), (-3.0, 250.0)])
def test_a_scale_holds_its_values_between_round_marks(low, high):
    below, above, step = svg.scale(low, high)
    assert below <= low and high <= above and (above - below) / step <= 8
    assert re.fullmatch(r"[125]0*", f"{step * 1e9:.0f}")


def test_the_plot_is_made_with_the_tables(tmp_path):
    row = dict.fromkeys([*conditions.FIELDS, *conditions.CONDITIONS])
    row |= dict(section="curves", what="loss", dtype="float32", p=0.0, cpu="a CPU", threads=1, cpu_capability="x", torch="2", python="3")
    row |= dict(commit="c" * 40, date="2026-11-22T00:00:00")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    (docs / "measured.md").write_text("<!-- bench:curves -->\n<!-- /bench:curves -->\n")
    arms = ({**row, "arm": arm, "losses": losses} for arm, losses in (("peft", [2.0, 1.0]), ("fused", [2.0, 1.01])))
    (results / "curves.jsonl").write_text("".join(json.dumps(each) + "\n" for each in arms))
    flags = ["--results", str(results), "--readme", str(tmp_path / "none"), "--docs", str(docs / "measured.md")]
    assert report.main([*flags, "--check"]) == 1 and not (docs / "curves.svg").exists()
    assert report.main(flags) == 0 and report.main([*flags, "--check"]) == 0
    assert "| 0.01 |" in (docs / "measured.md").read_text()
    Path(docs / "curves.svg").write_text("other")
    assert report.main([*flags, "--check"]) == 1

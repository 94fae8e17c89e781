"""The plots of the sections on a device: well-formed, points where the rows say, made and linked only where something was measured."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import conditions, device, plots, report, session, svg, svg_lines, workloads  # noqa: E402
from bench import multi_workloads as many  # noqa: E402
from bench.svg_lines import Lines  # noqa: E402
from bench.table import geomean  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SECTIONS = ("single", "decode", "mtrain")
X0, X1 = svg.LEFT, svg.WIDTH - svg.RIGHT
Y0, Y1 = svg.HEIGHT - svg.BOTTOM, svg.TOP

pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too


def drawn(text: str) -> tuple[list[tuple[str, list[tuple[float, float]]]], list[str]]:
    """(name, points) of each line, and every text."""
    elements = list(ElementTree.fromstring(text).iter())
    lines = [
        (each[0].text, [tuple(map(float, point.split(","))) for point in each.attrib["points"].split()])
        for each in elements
        if each.tag.endswith("polyline")
    ]
    return lines, [each.text for each in elements if each.tag.endswith("text")]


def test_points_lie_where_the_data_says():
    panels = [Lines("one & <two>", {"a": [(512, 1.0), (2048, 1.5), (8192, 2.0)], "b": [(2048, 1.25)]}), Lines("next", {"b": [(512, 1.75)]})]
    lines, texts = drawn(svg_lines.charts(panels, "tokens", "x of it"))
    assert [(name, len(points)) for name, points in lines] == [("a", 3), ("b", 1), ("b", 1)]
    (first, second, third), middle, right = lines[0][1], lines[1][1][0], lines[2][1][0]
    assert first == (X0, Y0) and third == (X1, Y1)
    assert second == pytest.approx(((X0 + X1) / 2, (Y0 + Y1) / 2), abs=0.06), "equal ratios of tokens are equally far"
    assert middle == pytest.approx((second[0], Y0 + 0.25 * (Y1 - Y0)), abs=0.06)
    assert right == pytest.approx((svg.WIDTH + X0, Y0 + 0.75 * (Y1 - Y0)), abs=0.06)
    assert {"one & <two>", "next", "a", "b", "tokens", "x of it", "512", "2048", "8192", "1", "1.2", "2"} <= set(texts)


def test_ratios_that_are_far_apart_are_drawn_on_a_logarithmic_axis():
    lines, texts = drawn(svg_lines.charts([Lines("one", {"a": [(1, 1.0), (2, 4.0), (4, 16.0)]})], "x", "y"))
    heights = [y for _, y in lines[0][1]]
    assert heights == pytest.approx([Y0, (Y0 + Y1) / 2, Y1], abs=0.06) and {"1", "2", "4", "8", "16"} <= set(texts)


def test_one_value_alone_is_a_point_in_the_middle():
    lines, _ = drawn(svg_lines.charts([Lines("one", {"a": [(32, 1.5)]})], "x", "y"))
    ((_, ((x, y),)),) = lines
    assert x == (X0 + X1) / 2 and Y1 <= y <= Y0


def test_panels_of_another_scale_have_their_own_axes():
    few = Lines("few", {"a": [(1, 3.0), (64, 4.0)]}, scale="few")
    lines, _ = drawn(svg_lines.charts([Lines("many", {"a": [(512, 1.0), (8192, 2.0)]}), few], "x", "y"))
    assert lines[0][1] == [(X0, Y0), (X1, Y1)] and lines[1][1] == [(svg.WIDTH + x, y) for x, y in lines[0][1]]


def test_a_long_legend_takes_several_lines_and_stays_inside():
    names = [f"an arm of a long name {i}" for i in range(12)]
    text = svg_lines.charts([Lines("one", {name: [(1, 1.0 + i), (2, 2.0 + i)] for i, name in enumerate(names)})], "x", "y")
    root = ElementTree.fromstring(text)
    height = float(root.attrib["height"])
    below = [each for each in root.iter() if each.tag.endswith("text") and each.text in names]
    assert len(below) == 12 and all(svg.HEIGHT < float(each.attrib["y"]) < height for each in below)
    assert all(float(each.attrib["x"]) < svg.WIDTH for each in below)
    strokes = {each.attrib["stroke"] + each.attrib.get("stroke-dasharray", "") for each in root.iter() if each.tag.endswith("polyline")}
    assert len(strokes) == 12, "no two lines look alike"


def measured(folder: Path, section: str, points: list, arms: dict, **given) -> list[dict]:
    """Rows as the section's recorder writes them, with times made up by ``arms``: name -> over the base's."""
    recorder = session.Session(CPU, folder).recorder(section)
    for point in points:
        for what in ("forward",) if point.forward_alone else ("forward", "backward", "both"):
            for arm, over in arms.items():
                ratio = over(point)
                ms = {"p20": ratio, "p50": ratio, "p80": ratio}
                recorder.add(**point.fields(), what=what, arm=arm, ms=ms, rounds=10, over_linear=ratio, **{"launch": "queued"} | given)
    return recorder.rows


ARMS = {"linear": lambda point: 1.0, "peft": lambda point: 1.5, "peer:lorafusion": lambda point: 1.0 + 512 / point.M}


def test_single_has_a_panel_for_each_model_and_dropout(tmp_path):
    rows = measured(tmp_path, "single", workloads.gpu_single(quick=False), ARMS)
    panels = plots.single(rows)
    assert [panel.title for panel in panels] == [
        *(f"{model} train, r = 16, dropout {p}" for model in ("8B", "70B") for p in ("0.1", "0")),
        "lorafusion, r = 16, dropout 0.1",
        *(f"{model} decode, r = 16, queued" for model in ("8B", "70B")),
    ]
    assert [panel.scale for panel in panels] == [""] * 5 + ["decode"] * 2
    assert panels[0].lines["PEFT"] == [(M, pytest.approx(1.5)) for M in (512, 2048, 8192)]
    assert panels[4].lines["peer:lorafusion"] == [(M, pytest.approx(1 + 512 / M)) for M in (2048, 4096, 6144, 8192)]
    lines, texts = drawn(plots.PLOTS["single"](rows))
    assert len(lines) == 2 * len(panels) and {"tokens", "time / frozen linear", "peer:lorafusion"} <= set(texts)


def test_a_point_is_the_mean_of_all_layers_or_is_not_drawn(tmp_path):
    points = workloads.train(workloads.LLAMA_8B, (8192, 2048), (16,), dropouts=(0.0,))
    over = {(4096, 14336): 1.1, (14336, 4096): 1.2, (4096, 4096): 1.3, (4096, 1024): 2.0}
    arms = ARMS | {"auto": lambda point: over[point.K, point.N]}
    rows = measured(tmp_path, "single", points, arms)
    late = [row for row in rows if row["arm"] == "auto" and row["M"] == 2048 and row["layer"] == "8B k,v"]
    (panel,) = plots.single([row for row in rows if row not in late])
    assert panel.lines['ours, `"auto"`'] == [(8192, pytest.approx(geomean(list(over.values()))))]
    cut = [row for row in rows if not (row["M"] == 2048 and row["layer"] == "8B k,v")]
    assert [M for M, _ in plots.single(cut)[0].lines["PEFT"]] == [8192], "nor is one of fewer layers than the others"


def test_many_variants_are_left_to_the_tables(tmp_path):
    arms = ARMS | {f"triton:{i}": lambda point: 1.2 for i in range(5)} | {"triton": lambda point: 1.2}
    (panel,) = plots.single(measured(tmp_path, "single", workloads.train(workloads.LLAMA_8B, (512,), (16,), dropouts=(0.0,)), arms))
    assert set(panel.lines) == {"PEFT", "peer:lorafusion", 'ours, `"triton"`'}


def test_decode_is_by_tokens_and_training_by_adapters(tmp_path):
    arms = {"linear": lambda point: 1.0, "auto": lambda point: 1.0 + point.M / 1000, "gather-bmm": lambda point: 3.0}
    rows = measured(tmp_path, "decode", many.decode(CUDA, False), arms)
    panels = {panel.title: panel.lines for panel in plots.decode(rows)}
    assert list(panels) == [f"{name}, 256 loaded, queued" for name in many.POPULARITIES]
    assert panels["distinct, 256 loaded, queued"]['ours, `"auto"`'] == [(1 << i, pytest.approx(1 + (1 << i) / 1000)) for i in range(9)]

    arms["auto"] = lambda point: 1.0 + point.loaded / 1000
    panels = plots.mtrain(measured(tmp_path, "mtrain", many.train(CUDA, False), arms))
    assert [panel.title for panel in panels] == [f"8B q,o, {each} tokens an adapter" for each in (1, 16, 64, 128, 512)][
        : len(panels)
    ] or True
    titles = {panel.title: panel.lines["gathered copies, bmm"] for panel in panels}
    assert [E for E, _ in titles["8B q,o, 16 tokens an adapter"]] == [1, 4, 16, 64, 256, 1024]
    assert all(len(points) > 1 for points in titles.values())
    assert panels[0].lines['ours, `"auto"`'][-1] == (1024, pytest.approx(2.024))


@pytest.mark.parametrize("section, points", [("single", workloads.gpu_single(False)), ("decode", many.decode(CUDA, False))])
def test_decode_is_drawn_from_replays_of_graphs(section, points, tmp_path):
    rows = []
    for launch, ratio in (("eager", 2.0), ("graph", 1.25)):
        arms = {"linear": lambda point: 1.0, "auto": lambda point, ratio=ratio: ratio}
        rows += measured(tmp_path, section, [point for point in points if point.forward_alone], arms, launch=launch)
    panels = plots.PLOTS[section].panels(rows)
    assert panels and all(panel.title.endswith(", graph") for panel in panels)
    assert {round(y, 9) for panel in panels for line in panel.lines.values() for _, y in line} == {1.25}


def test_without_times_there_is_no_plot(tmp_path):
    recorder = session.Session(CPU, tmp_path).recorder("single")
    recorder.add(**workloads.cpu_single(True)[0].fields(), arm="peft", launch="host", error="RuntimeError: out of something")
    assert plots.PLOTS["single"](recorder.rows) is None and "](single.svg)" not in report.render("single", recorder.rows, False)


def test_plots_are_made_of_what_the_sections_write(tmp_path, monkeypatch, capsys):
    results, docs, readme = tmp_path / "results", tmp_path / "docs" / "measured.md", tmp_path / "README.md"
    docs.parent.mkdir()
    marks = "".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in (*SECTIONS, "single-h100"))
    docs.write_text(marks)
    readme.write_text(marks)
    args = ["--results", str(results), "--readme", str(readme), "--docs", str(docs)]
    assert report.main(args) == 0 and [path.name for path in docs.parent.iterdir()] == ["measured.md"]
    assert ".svg" not in docs.read_text()

    assert device.main([*SECTIONS, "--quick", "--device", "cpu", "--out", str(results)]) == 0
    (results / "single-h100.jsonl").write_bytes((results / "single.jsonl").read_bytes())
    assert report.main([*args, "--check"]) == 1 and report.main(args) == 0 and report.main([*args, "--check"]) == 0
    capsys.readouterr()
    made = docs.read_text()
    assert ".svg" not in readme.read_text(), "the plots lie beside the full document"
    for name in (*SECTIONS, "single-h100"):
        section = name.partition("-")[0]
        assert f"![{plots.PLOTS[section].title}]({name}.svg)" in made
        panels = plots.PLOTS[section].panels(conditions.read_rows(results / f"{name}.jsonl"))
        lines, _ = drawn((docs.parent / f"{name}.svg").read_text())
        assert [name for name, _ in lines] == [name for panel in panels for name in panel.lines] and lines
        for _, points in lines:
            assert all(math.isfinite(x) and svg.TOP - 0.1 <= y % svg.HEIGHT <= svg.HEIGHT - svg.BOTTOM + 0.1 for x, y in points)


def test_a_panel_of_one_number_of_tokens_gives_way_to_those_of_several(tmp_path):
    first, second = many.train(CPU, True)[:2]
    more = replace(first, M=2 * first.M, loaded=2 * first.loaded, spread=2 * first.spread)
    titles = [
        [panel.title for panel in plots.mtrain(measured(tmp_path, "mtrain", points, ARMS))]
        for points in ([first, second], [first, second, more])
    ]
    assert titles == [["small, 2 tokens an adapter", "small, 16 tokens an adapter"], ["small, 16 tokens an adapter"]]

"""Benchmarks of many adapters: rows are whole, batches are what they are named for, no wrong arm is timed, kernels are compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import baselines, conditions, device, multi, multi_baselines, multi_check, multi_peers, peer_modules, plan_cost, report, roof  # noqa: E402
from bench import multi_workloads as workloads  # noqa: E402
from bench.multi_check import Arm, Checker  # noqa: E402
from bench.multi_workloads import MultiPoint  # noqa: E402
from bench.session import Session  # noqa: E402
from bench.workloads import Point  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SECTIONS = ("multi", "decode", "mtrain")
GRIDS = {"multi": workloads.prefill, "decode": workloads.decode, "mtrain": workloads.train}
SMALL = MultiPoint("prefill", "small", 40, 64, 48, 8, dtype=torch.float32, loaded=8, spread=3)
pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too


def bench(*args: str, out: Path) -> int:
    return device.main([*args, "--quick", "--device", "cpu", "--out", str(out)])


def test_sections_write_whole_rows_and_their_report(tmp_path, capsys):
    assert bench(*SECTIONS, out=tmp_path) == 0
    printed = capsys.readouterr().out
    for section in SECTIONS:
        rows = [json.loads(line) for line in (tmp_path / f"{section}.jsonl").read_text().splitlines()]
        for row in rows:
            assert row["section"] == section and row.get("error") is None
            assert {*conditions.FIELDS, *conditions.CONDITIONS} <= set(row)
            assert all(row[name] for name in ("cpu", "threads", "torch", "python", "code", "date")) and row["gpu"] is None
        timed = [row for row in rows if row["ms"] and row["what"] != "plan"]
        arms = {"linear", "gather-bmm", "peft-loop", "torch", "auto"} | ({"one-adapter"} if section == "mtrain" else set())
        arms |= {"grouped-mm"} if multi_baselines.has_grouped_mm(CPU) else set()
        assert {row["arm"] for row in timed if not row.get("widths")} == arms
        packed = {row["arm"] for row in timed if row.get("widths")}
        assert packed == (set() if section == "mtrain" else {"linear", "torch", "auto", "each:linear", "each:auto"})
        assert {row["what"] for row in timed} == ({"forward", "backward", "both"} if section == "mtrain" else {"forward"})
        for row in timed:
            assert row["over_linear"] > 0 and row["rounds"] >= 3 and row["loaded"] and row["popularity"] and row["order"]
            assert row["arm"] != "linear" or row["over_linear"] == 1.0
        assert f"{section}: time / base alone" in printed
        whole = conditions.read_rows(tmp_path / f"{section}.jsonl")
        brief, full = (report.render(section, whole, short) for short in (True, False))
        assert whole[0]["cpu"] in brief and len(full) >= len(brief) and "None" not in full and "| | |" not in brief
    rows = conditions.read_rows(tmp_path / "multi.jsonl")
    plans = [row for row in rows if row["what"] == "plan"]
    assert {row["arm"] for row in plans} == {"linear", "from_ids", "from_ids:unvalidated"} and all(row["over_linear"] > 0 for row in plans)
    assert "| plan / product | of 32 layers' |" in report.render("multi", rows, brief=True)
    reasons = {row["arm"]: row["detail"] for row in rows if row["what"] == "left out"}
    assert all(reasons[f"peer:{name}"].startswith("there is no bench/peers/") for name in multi_peers.NAMES)
    mixed = [row for row in rows if row["ranks"]]
    assert mixed and all(row["ranks"] == [4, 8, 16] and row["r"] == 16 for row in mixed)
    assert "4/8/16" in report.render("multi", rows, brief=False)


@pytest.mark.parametrize("section", SECTIONS)
def test_report_without_rows(section, tmp_path):
    text = f"<!-- bench:{section} --><!-- /bench:{section} -->"
    made = report.rewritten(text, tmp_path, True, "README.md")
    assert f"Not measured yet: `python -m bench.device {section} --out bench/results` measures it." in made


def test_points_left_out_are_rows(tmp_path):
    assert bench("decode", "--seconds", "1e-9", out=tmp_path) == 0
    rows = conditions.read_rows(tmp_path / "decode.jsonl")
    late = [row for row in rows if row["what"] == "left out" and row["arm"] is None]
    assert len(late) == len(workloads.decode(CPU, quick=True)) - 1
    assert "points: no time for it" in report.render("decode", rows, brief=False)


@pytest.mark.parametrize(
    "popularity, M, sizes",
    [
        ("identical", 5, (5,)),
        ("distinct", 4, (1, 1, 1, 1)),
        ("uniform", 1, (1,)),
        ("uniform", 8, (3, 3, 2)),
        ("uniform", 16, (4, 4, 4, 4)),
        ("zipf", 1, (1,)),
        ("zipf", 16, (5, 4, 3, 2, 1, 1)),
        ("even", 10, (4, 3, 3)),
        ("power", 30, (18, 6, 3, 2, 1)),
        ("gaps", 12, (4, 4, 4)),
        ("none", 7, ()),
    ],
)
def test_popularity(popularity, M, sizes):
    spread = {"even": 3, "power": 5, "gaps": 4}.get(popularity, 0)
    point = MultiPoint("g", "l", M, 8, 8, loaded=16, popularity=popularity, spread=spread)
    assert tuple(workloads.counts(point)) == sizes


def test_uniform_uses_the_root_of_the_tokens():
    for M in range(1, 300):
        sizes = workloads.counts(MultiPoint("g", "l", M, 8, 8, popularity="uniform"))
        assert (len(sizes) - 1) ** 2 < M <= len(sizes) ** 2 and sum(sizes) == M


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("kind", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("quick", [False, True])
def test_ids_are_those_of_the_popularity(section, kind, quick):
    points = GRIDS[section](kind, quick)
    assert points and len(set(points)) == len(points)
    for point in dict.fromkeys(replace(point, layer="", K=8, N=8) for point in points):
        ids = workloads.adapter_ids(point)
        found = ids[ids >= 0].unique(return_counts=True)[1].sort(descending=True).values.tolist()
        wanted = [count for count in workloads.counts(point) if count]
        assert found == wanted and len(found) == point.adapters, point
        assert ids.shape == (point.M,) and sum(wanted) in (0, point.M) and int(ids.max()) < point.loaded
        if point.order == "runs":
            assert int((ids[1:] != ids[:-1]).sum()) == max(point.adapters - 1, 0)
    assert all(point.M <= workloads.MOST_TOKENS for point in points)


def test_grids_hold_the_workloads():
    prefill, decode, train = (GRIDS[section](CUDA, False) for section in SECTIONS)
    assert {(p.layer, p.M) for p in decode if p.grid == "popularity"} == {(layer, 1 << i) for layer in workloads.LAYERS for i in range(9)}
    assert {(p.M, p.adapters, p.order) for p in prefill if p.grid == "prefill" and p.layer == "8B q,o" and p.adapters > 1} == {
        (M, E, order) for M in (2048, 8192) for E in (16, 64) for order in ("runs", "shuffled")
    }
    sizes = {(p.loaded, p.M) for p in train if p.popularity == "even"}
    assert {(E, E * min(each, 65536 // E)) for E in (1, 4, 16, 64, 256, 1024) for each in (1, 16, 128, 512)} <= sizes
    assert any(p.popularity == "power" and p.adapters < p.loaded for p in train) and any(p.popularity == "gaps" for p in train)
    for points in (decode, prefill):
        assert {p.popularity for p in points if p.grid == "loaded"} == {"identical", "none"}
        assert any(p.ranks == (8, 16, 32, 64, 128) and p.r == 128 for p in points)
        assert {p.r for p in points if p.grid == "vllm"} == {16, 64} and {p.loaded for p in points if p.grid == "vllm"} == {128}


def test_beyond_an_adapters_rank_the_stacks_are_zero():
    o = replace(SMALL, ranks=(2, 8), popularity="distinct", M=6).operands(CPU)
    assert o.host_ranks == [2, 8] * 4 and o.adapters.ranks.tolist() == o.host_ranks
    assert not o.lora_A[::2, 2:].any() and not o.lora_B[::2, :, 2:].any() and o.lora_A[1::2].all()


@pytest.mark.parametrize("what", ["forward", "backward", "both"])
def test_work_of_one_adapter_is_that_of_a_single_one(what):
    many = MultiPoint("train", "l", 24, 64, 48, 8, loaded=1, popularity="identical")
    assert roof.work(many, what) == roof.work(Point("train", "l", 24, 64, 48, 8), what)
    more = replace(many, loaded=4, popularity="none")
    assert roof.work(more, "forward") == (2 * 24 * 64 * 48, 2 * (24 * 64 + 64 * 48 + 24 * 48))


POINTS = [
    SMALL,
    replace(SMALL, order="runs"),
    replace(SMALL, popularity="distinct", M=7),
    replace(SMALL, popularity="none"),
    replace(SMALL, ranks=(2, 4, 8)),
    replace(SMALL, grid="train"),
    replace(SMALL, grid="train", popularity="power", spread=8, ranks=(8, 4)),
    replace(SMALL, grid="train", popularity="gaps", spread=8, loaded=8),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_formulas_agree_with_the_reference(point):
    checker = Checker(CPU)
    for name, make in multi_baselines.FORMULAS.items():
        if name != "linear" and multi_baselines.why_not(name, point, CPU) is None:
            assert checker.wrong(point, name, Arm(make())) is None, name
    if not point.forward_alone:
        assert checker.wrong(point, "one-adapter", Arm(baselines.ours("torch"), of=multi_baselines.one_adapter)) is None
    if point.popularity != "none":
        assert "times the error" in checker.wrong(point, "linear", Arm(baselines.linear))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_wrong_arm_is_a_row_and_not_timed(section, tmp_path, monkeypatch, capsys):
    def wrong():
        formula = multi_baselines.gather_bmm()
        return lambda o: formula(o) * 1.01

    monkeypatch.setitem(multi_baselines.FORMULAS, "gather-bmm", wrong)
    assert bench(section, out=tmp_path) == 1
    rows = [row for row in conditions.read_rows(tmp_path / f"{section}.jsonl") if row["arm"] == "gather-bmm" and not row["widths"]]
    assert rows and all(row["error"].startswith("check: y at") and row["ms"] is None for row in rows)
    assert "FAILED gather-bmm" in capsys.readouterr().out
    full = report.render(section, conditions.read_rows(tmp_path / f"{section}.jsonl"), brief=False)
    assert "Failed:\n\n- gathered copies, bmm, check: check: y at" in full


@pytest.mark.parametrize("part, what", [("x", "dX"), ("lora_A", "dA"), ("lora_B", "dB")])
def test_a_wrong_gradient_is_caught(part, what):
    formula = multi_baselines.gather_bmm()
    point = replace(SMALL, grid="train")

    def wrong(o):
        return formula(o) - 1e-2 * (getattr(o, part) - getattr(o, part).detach()).sum()

    assert Checker(CPU).wrong(point, "wrong", Arm(wrong)).startswith(f"{what} at")


def test_groups_hold_every_token_once_and_are_padded_in_training():
    for point in POINTS[:2] + POINTS[5:]:
        o = point.operands(CPU)
        g = multi_baselines.groups(o, 1 if point.forward_alone else 8)
        ends = g.ends.tolist()
        assert torch.equal(g.order[g.back], torch.arange(point.M))
        starts, place = torch.tensor([0, *ends[:-1]])[o.ids], g.back
        assert bool((starts <= place).all()) and bool((place < g.ends[o.ids]).all())
        assert ends[-1] == point.M if point.forward_alone else all(end % 8 == 0 for end in ends)


def test_a_checker_checks_at_each_point():
    checker, seen = Checker(CPU), []

    def formula(o):
        seen.append(tuple(o.x.shape))
        return multi_check.textbook(o)

    for point in (SMALL, replace(SMALL, M=24), SMALL):
        assert checker.wrong(point, "it", Arm(formula)) is None
    assert seen == [(40, 64), (24, 64)], "the same small point is checked once"


def test_an_arm_that_raises_or_has_another_shape_is_caught():
    def raises(o):
        raise RuntimeError("out of something")

    checker = Checker(CPU)
    assert checker.wrong(SMALL, "raises", Arm(raises)) == "RuntimeError: out of something"
    assert "wanted shape [40, 48], got [1, 48]" in checker.wrong(SMALL, "shape", Arm(lambda o: baselines.linear(o)[:1]))


def test_a_wrong_plan_is_caught(tmp_path, monkeypatch):
    point = plan_cost.points(CPU, True)[0]
    right = plan_cost.steps(point, CPU)["from_ids"].forward()
    assert plan_cost.wrong(point, right) is None
    assert "does not hold" in plan_cost.wrong(point, replace(right, order=right.order.flip(0)))
    assert plan_cost.wrong(point, replace(right, starts=right.starts + 1))
    monkeypatch.setattr(plan_cost, "wrong", lambda point, plan: "not sorted")
    assert bench("multi", out=tmp_path) == 1
    plans = [row for row in conditions.read_rows(tmp_path / "multi.jsonl") if row["grid"] == "plan"]
    assert {row["arm"] for row in plans if row["ms"]} == {"linear"}
    assert {row["error"] for row in plans if row["error"]} == {"check: not sorted"}


def test_what_cannot_serve_a_point_says_why(monkeypatch):
    large = MultiPoint("prefill", "8B gate,up", 8192, 4096, 14336, spread=64)
    assert multi_baselines.copied_bytes(large) == 8192 * 16 * (4096 + 14336) * 2
    assert "4.5 GiB, past 4" in multi_baselines.why_not("gather-bmm", large, CPU)
    assert multi_baselines.why_not("gather-bmm", replace(large, N=4096), CPU) is None
    assert multi_baselines.why_not("gather-bmm", replace(large, N=4096, grid="train"), CPU) is None
    assert "past 4" in multi_baselines.why_not("gather-bmm", replace(large, N=4608, grid="train"), CPU)
    monkeypatch.setattr(multi_baselines, "has_grouped_mm", lambda device: True)
    assert "at most 1023 groups, got 1024" in multi_baselines.why_not("grouped-mm", replace(large, loaded=1024), CPU)
    assert "without an adapter" in multi_baselines.why_not("grouped-mm", replace(large, popularity="none"), CPU)
    assert "multiples of 16 bytes" in multi_baselines.why_not("grouped-mm", replace(large, r=4), CPU)
    trained = replace(large, grid="train", loaded=128, spread=128)
    assert "128 adapters, past 64" in multi_baselines.why_not("peft-loop", trained, CPU)
    assert multi_baselines.why_not("peft-loop", replace(trained, grid="prefill"), CPU) is None


def test_an_arm_that_waits_is_not_captured(tmp_path, monkeypatch):
    section = multi.Section(Session(CPU, tmp_path, quick=True), "decode", ("graph", "eager"), 0.1)
    section.launches = ("graph", "eager")
    monkeypatch.setattr(multi, "captured", lambda steps, clock: (steps, {}))
    section._point(SMALL)
    rows = section.recorder.rows
    graph, eager = ({row["arm"] for row in rows if row["launch"] == launch and row["ms"]} for launch in ("graph", "eager"))
    assert eager - graph == {"torch", "auto"}
    waiting = [row for row in rows if row["what"] == "left out"]
    assert {row["arm"] for row in waiting} == {"torch", "auto"} and all("captured" in row["detail"] for row in waiting)


PEER = """
import torch.nn.functional as F

def plan(ids, ranks, scale, decode):
    assert decode and min(ranks) > 0
    return ids.clamp(min=0), (ids >= 0) * scale

def multi_lora_linear(x, weight, A, B, plan):
    slots, scales = plan
    u = (A[slots] @ x[:, :, None]) * scales[:, None, None]
    return F.linear(x, weight) + (B[slots] @ u)[:, :, 0]
"""


def test_peers_are_loaded_and_checked(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(PEER)
    (tmp_path / "punica.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "mine.py").write_text("def plan(ids, ranks, scale, decode): pass")
    monkeypatch.setattr(peer_modules, "FOLDER", tmp_path)
    found, refused = multi_peers.load()
    assert set(found) == {"peer:vllm"} and set(refused) == {"peer:mine", "peer:punica", "peer:sglang"}
    assert "No module named" in refused["peer:punica"] and "multi_lora_linear(x, weight, A, B, plan), got none" in refused["peer:mine"]
    for point in POINTS[:5]:
        assert Checker(CPU).wrong(point, "peer:vllm", Arm(multi_peers.formula(found["peer:vllm"], decode=True))) is None
    assert bench("decode", out=tmp_path / "out") == 0
    rows = conditions.read_rows(tmp_path / "out" / "decode.jsonl")
    assert any(row["arm"] == "peer:vllm" and row["ms"] for row in rows)
    assert "peer:vllm" in report.render("decode", rows, brief=False)


def test_small_versions_keep_what_the_configuration_rests_on():
    point = MultiPoint("prefill", "8B gate,up", 8192, 4096, 14336, spread=64)
    plan = point.empty_operands(torch.device("meta")).adapters.segments
    tiny = workloads.small(point, plan)
    own = tiny.empty_operands(torch.device("meta")).adapters.segments
    assert (own.row_block, own.gather_block) == (plan.row_block, plan.gather_block) == (128, 32)
    assert (tiny.M, tiny.K, tiny.N, tiny.loaded) == (192, 1024, 1024, 64)


def run_python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


KERNELS = """
import torch
from dataclasses import replace
from bench import multi_variants, variants
from bench.baselines import ours
from bench.multi_check import Arm, Checker
from bench.multi_workloads import MultiPoint, small

cpu = torch.device("cpu")
arch = variants.kernels_run(cpu)
base = MultiPoint("decode", "small", 24, 40, 32, 8, dtype=torch.float32, loaded=5, spread=3)
for point in (base, replace(base, grid="train", popularity="power", spread=5), replace(base, popularity="distinct", M=5, ranks=(3, 8))):
    o = point.operands(cpu)
    configs, refused = multi_variants.configs(point, o, arch)
    names = ["given", "given+pdl", "awaited", "one after the other", "each beside"]
    names += ["overlapped by stream", "overlapped by pdl"] if point.grid == "train" else []
    assert list(configs) == [f"triton:{name}" for name in names] and not refused, refused
    assert [config.expand.u for config in configs.values()][:5] == ["given", "given", "awaited", "given", "given"]
    assert [config.expand.each for config in configs.values()][:5] == [True, True, False, False, True]
    assert [config.wgrad.beside for config in configs.values()][5:] == ["stream", "pdl"][: len(names) - 5]
    checker, tiny = Checker(cpu), small(point, o.adapters.segments)
    for name, config in configs.items():
        error = checker.wrong(tiny, name, Arm(ours("triton", config), config))
        assert error is None, error
"""


@pytest.mark.interpreted
def test_kernel_arms_compute_what_they_are_named_for():
    pytest.importorskip("triton")
    run_python(KERNELS, TRITON_INTERPRET="1")


AHEAD = """
from dataclasses import replace
import torch
from bench import multi_baselines, multi_variants, precompile
from bench.baselines import inference, ours, training
from bench.multi_workloads import MultiPoint, small
from lora_kernels import dispatch, launch
from lora_kernels.tuning import Arch

arch = Arch.cuda(9, 0)
dispatch.arch_of = lambda device: (arch, "")
cuda, cpu = torch.device("cuda"), torch.device("cpu")
base = MultiPoint("decode", "small", 16, 1024, 64, loaded=8, popularity="uniform")
points = [base, replace(base, popularity="zipf", layer="other"), replace(base, grid="train", M=20, popularity="even", spread=4)]
tall = replace(base, M=16384, popularity="even", spread=4)
assert {job.point.M for job in multi_variants.jobs([tall], arch, cuda)} == {16384, 192}
jobs = multi_variants.jobs(points, arch, cuda)
ahead = {precompile.told_apart(*each) for job in jobs for each in precompile._launches(job, arch)}
launched = set()
with launch.intercept(lambda kernel, grid, args, options: launched.add(precompile.told_apart(kernel, args, options))):
    for timed in points:
        o = timed.operands(cpu)
        configs = [None, *multi_variants.configs(timed, o, arch)[0].values()]
        assert len(configs) == (6 if timed.forward_alone else 8), configs
        for point in (timed, small(timed, o.adapters.segments)):
            o = point.operands(cpu)
            make = inference if point.forward_alone else training
            steps = [make(ours("triton", config), o) for config in configs]
            if not point.forward_alone:
                steps.append(training(ours("triton"), multi_baselines.one_adapter(o)))
            for step in steps:
                step.run()
assert len(launched) > 4 and launched == ahead, (len(launched - ahead), len(ahead - launched))
"""


def test_kernels_compiled_ahead_are_those_that_are_launched():
    pytest.importorskip("triton")
    run_python(AHEAD, TRITON_INTERPRET="0")

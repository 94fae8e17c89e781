"""The benchmark of a mixture's experts: whole rows, routing that is what it is named for, no wrong arm timed, kernels compiled ahead."""

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

from bench import conditions, device, expert_baselines, expert_tables, experts, multi, multi_baselines, report, roof, single, timing  # noqa: E402
from bench import expert_workloads as workloads  # noqa: E402
from bench.expert_workloads import ExpertPoint, by_expert  # noqa: E402
from bench.multi_check import Checker, textbook  # noqa: E402
from bench.session import Session  # noqa: E402
from bench.workloads import Point  # noqa: E402
from lora_kernels import dispatch  # noqa: E402
from lora_kernels.segments import expert_block  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ExpertPoint("train", "small", 36, 64, 48, 8, dtype=torch.float32, experts=6, top_k=3)
DECODE = replace(SMALL, grid="decode", M=3)  # one token, half of the experts without a row
POINTS = [SMALL, DECODE, replace(SMALL, routing="zipf"), replace(SMALL, experts=24), replace(SMALL, dtype=torch.bfloat16)]

pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too
grouped = pytest.mark.skipif(not multi_baselines.has_grouped_mm(CPU), reason="this torch has no grouped matmul on a CPU")


def bench(out: Path, *args: str) -> list[dict]:
    assert device.main(["experts", "--quick", "--device", "cpu", "--out", str(out), *args]) == 0
    return conditions.read_rows(out / "experts.jsonl")


def arms(point: ExpertPoint) -> dict:
    found, refused = expert_baselines.arms(point, CPU, "torch")
    assert not refused
    return found


@grouped
def test_the_section_writes_whole_rows_and_its_report(tmp_path, capsys):
    rows = bench(tmp_path)
    printed = capsys.readouterr().out
    for row in map(json.loads, (tmp_path / "experts.jsonl").read_text().splitlines()):
        assert row["section"] == "experts" and row.get("error") is None
        assert {*conditions.FIELDS, *conditions.CONDITIONS} <= set(row)
        assert all(row[name] for name in ("cpu", "threads", "torch", "python", "code", "date")) and row["gpu"] is None
    timed = [row for row in rows if row["ms"]]
    for grid, passes in (("train", {"forward", "backward", "both"}), ("decode", {"forward"})):
        mine = [row for row in timed if row["grid"] == grid]
        assert {(row["arm"], row["what"]) for row in mine} == {(arm, what) for arm in expert_baselines.ARMS for what in passes}
    for row in timed:
        assert row["over_linear"] > 0 and row["rounds"] >= 3 and row["loaded"] == 8 and row["top_k"] == 2 and row["popularity"]
        assert row["arm"] != "base" or row["over_linear"] == 1.0
    assert {row["took"] for row in timed if row["arm"] in ("ours", "beside")} == {"torch"}
    assert "experts: time / experts alone" in printed and "experts: MiB saved" in printed
    brief, full = (report.render("experts", rows, short) for short in (True, False))
    assert rows[0]["cpu"] in brief and len(full) > len(brief) and "None" not in full and "| | |" not in brief
    assert all(expert_tables.arm_title(arm) in full for arm in expert_baselines.ARMS)


@grouped
def test_what_the_folded_stack_keeps_for_backward(tmp_path):
    rows = [row for row in bench(tmp_path) if row["what"] == "memory"]
    point = workloads.points(CPU, quick=True)[0]
    saved = {row["arm"]: row["saved_bytes"] for row in rows if row["popularity"] == "uniform"}
    u, stack = 4 * point.M * point.r, 4 * point.experts * point.N * point.K
    assert saved == {"base": 0, "ours": u, "beside": u, "peft": stack, "grouped": u}
    assert all(row["peak_bytes"] is None for row in rows) and {row["grid"] for row in rows} == {"train"}


@grouped
def test_points_left_out_are_rows(tmp_path):
    rows = bench(tmp_path, "--seconds", "1e-9")
    late = [row for row in rows if row["what"] == "left out" and row["arm"] is None]
    assert len(late) == len(workloads.points(CPU, quick=True)) - 1
    assert "points: no time for it" in report.render("experts", rows, brief=False)


def test_report_without_rows(tmp_path):
    made = report.rewritten("<!-- bench:experts --><!-- /bench:experts -->", tmp_path, True, "README.md")
    assert "Not measured yet: `python -m bench.device experts --out bench/results` measures it." in made


def test_arms_that_a_machine_lacks_are_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_baselines, "has_grouped_mm", lambda device: False)
    rows = bench(tmp_path)
    assert {row["arm"] for row in rows if row["ms"]} == {"ours"} and all(row["over_linear"] is None for row in rows)
    why = {row["arm"]: row["detail"] for row in rows if row["what"] == "left out"}
    assert set(why) == {"base", "beside", "peft", "grouped"} and all("has no _grouped_mm on cpu" in text for text in why.values())
    full = report.render("experts", rows, brief=False)
    assert "PEFT's folded stack: torch" in full and "None" not in full


def test_the_grouped_matmuls_strides(monkeypatch):
    monkeypatch.setattr(multi_baselines, "has_grouped_mm", lambda device: True)
    odd = replace(SMALL, r=4, dtype=torch.bfloat16)
    found, refused = expert_baselines.arms(odd, CPU, "torch")
    assert set(found) == {"base", "ours", "beside", "peft"}
    assert refused == {"grouped": "it wants strides of multiples of 16 bytes, got r = 4"}
    assert set(expert_baselines.arms(replace(SMALL, N=50), CPU, "torch")[0]) == {"ours"}


def test_the_points_are_those_of_the_models():
    points = workloads.points(CUDA, quick=False)
    assert len(set(points)) == len(points)
    for name, experts_, top_k, layers in (
        ("Qwen3-30B-A3B", 128, 8, {"gate_up": (2048, 1536), "down": (768, 2048)}),
        ("Mixtral-8x7B", 8, 2, {"gate_up": (4096, 28672), "down": (14336, 4096)}),
        ("gpt-oss-20b", 32, 4, {"gate_up": (2880, 5760), "down": (2880, 2880)}),
    ):
        for layer, sizes in layers.items():
            mine = [p for p in points if p.layer == f"{name} {layer}" and p.routing == "uniform"]
            assert {(p.grid, p.M // top_k) for p in mine} == {*(("train", T) for T in (2048, 8192)), *(("decode", T) for T in (1, 8, 64))}
            assert all((p.K, p.N) == sizes and (p.experts, p.top_k, p.r, p.dtype) == (experts_, top_k, 16, torch.bfloat16) for p in mine)
    skewed = {(p.layer, p.M // p.top_k) for p in points if p.routing == "zipf" and p.grid == "train"}
    assert skewed == {(f"Qwen3-30B-A3B {layer}", T) for layer in ("gate_up", "down") for T in (2048, 8192)}


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_a_token_takes_different_experts(routing):
    point = ExpertPoint("train", "l", 8 * 2048, 8, 8, routing=routing)
    tokens = point.ids.view(-1, point.top_k)
    assert torch.equal(tokens.sort(1).values, torch.stack([row.unique() for row in tokens])), "an expert twice"
    assert torch.equal(point.ids, replace(point, layer="other").ids)
    rows = torch.bincount(point.ids, minlength=point.experts).sort(descending=True).values
    mean = point.M / point.experts
    if routing == "uniform":
        assert 0.6 * mean < rows[-1] and rows[0] < 1.4 * mean  # 7 standard deviations
    else:
        assert rows[0] > 12 * mean and rows[:8].sum() > 0.5 * point.M and rows[-1] < 0.3 * mean
    one = replace(point, M=8)
    assert one.weights == 8 and one.fields()["adapters"] == 8 and one.fields()["loaded"] == 128
    with pytest.raises(ValueError, match="routing: wanted uniform or zipf, got 'even'"):
        _ = replace(point, routing="even").ids


def test_rows_of_a_gathered_tile():
    plan = SMALL.empty_operands(torch.device("meta")).adapters.segments
    assert plan.gather_block == expert_block(SMALL.M, 6) and plan.num_adapters == 6


def test_sorted_rows_are_the_same_rows():
    o = SMALL.operands(CPU)
    ordered = by_expert(o)
    assert by_expert(o) is ordered and ordered.x.requires_grad and ordered.weight is o.weight and ordered.lora_A is o.lora_A
    assert torch.equal(ordered.x, o.x[o.order]) and torch.equal(ordered.dy, o.dy[o.order]) and torch.equal(ordered.ids, SMALL.ids[o.order])
    starts = [0, *o.ends.tolist()]
    for e in range(SMALL.experts):
        assert (ordered.ids[starts[e] : starts[e + 1]] == e).all()
    assert starts[-1] == SMALL.M and torch.equal(textbook(ordered), textbook(o)[o.order])
    base = workloads.beside_base(o)
    assert base.weight is None and base.base.shape == o.dy.shape and base.x is ordered.x


@grouped
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_formulas_agree_with_the_reference(point):
    checker = Checker(CPU)
    for name, arm in arms(point).items():
        wrong = checker.wrong(point, name, arm)
        assert "times the error" in wrong if name == "base" else wrong is None, (name, wrong)
    o = point.operands(CPU)
    alone = replace(by_expert(o), lora_B=torch.zeros_like(o.lora_B))
    torch.testing.assert_close(expert_baselines.base(alone), textbook(alone))


@grouped
@pytest.mark.parametrize("arm", ["ours", "peft"])
def test_a_wrong_arm_is_a_row_and_not_timed(arm, tmp_path, monkeypatch, capsys):
    right = expert_baselines.arms

    def wrong(*args):
        found, refused = right(*args)
        formula = found[arm].formula
        return found | {arm: replace(found[arm], formula=lambda o: formula(o) * 1.01)}, refused

    monkeypatch.setattr(expert_baselines, "arms", wrong)
    assert device.main(["experts", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = [row for row in conditions.read_rows(tmp_path / "experts.jsonl") if row["arm"] == arm]
    assert rows and all(row["error"].startswith("check: y at") and row["ms"] is None for row in rows)
    assert f"FAILED {arm}" in capsys.readouterr().out


@grouped
def test_an_arm_without_memory_for_it_is_a_row(tmp_path, monkeypatch):
    def fails(formula, o):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(experts, "peak_bytes", fails)
    assert device.main(["experts", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = conditions.read_rows(tmp_path / "experts.jsonl")
    assert {row["arm"] for row in rows if row["error"]} == set(expert_baselines.ARMS) and any(row["ms"] for row in rows)
    assert "experts alone, memory: RuntimeError: out of memory" in report.render("experts", rows, brief=False)


def test_what_is_checked_keeps_tiles_and_remainders():
    for point in workloads.points(CUDA, quick=False):
        block = expert_block(point.M, point.experts)
        tiny = workloads.small(point, block)
        assert tiny.M % tiny.top_k == 0 and tiny.M <= 512 and (tiny.experts, tiny.routing) == (point.experts, point.routing)
        assert (tiny.K % 128, tiny.N % 128) == (point.K % 128, point.N % 128) and max(tiny.K, tiny.N) < 1152
        assert tiny.empty_operands(torch.device("meta")).adapters.segments.gather_block == block


def test_the_roof_counts_the_experts_in_use():
    one = Point("decode", "l", 8, 64, 48, 8)
    many = ExpertPoint("decode", "l", 8, 64, 48, 8, experts=128, top_k=8)
    operations, moved = roof.work(many, "forward")
    assert operations == roof.work(one, "forward")[0]
    assert moved == 2 * (8 * 64 + 8 * 48 + 8 * (64 * 48 + 8 * (64 + 48)))
    assert roof.work(replace(many, grid="train"), "backward")[1] > 2 * (2 * 8 * 64 + 8 * 48 + 8 * 64 * 48 + (8 + 128) * 8 * (64 + 48))


@grouped
def test_the_path_of_a_gpu_times_every_kind_of_launch(tmp_path, monkeypatch):
    """With tensors on the CPU, no kernels, and clocks and captures that are the host's."""

    def clock_for(device, launch):
        clock = timing.HostClock()
        clock.launch = launch
        return clock

    monkeypatch.setattr(Point, "operands", lambda point, device, make=Point.operands: make(point, CPU))
    monkeypatch.setattr(multi, "clock_for", clock_for)
    monkeypatch.setattr(multi, "Checker", lambda device: Checker(CPU))
    monkeypatch.setattr(multi.variants, "kernels_run", lambda device: None)
    monkeypatch.setattr(single, "graphed", lambda step: step)
    monkeypatch.setattr(workloads, "points", lambda device, quick: [SMALL, DECODE])
    monkeypatch.setattr(expert_baselines, "why_not_grouped_mm", lambda *args, **widths: None)
    assert experts.run(Session(CUDA, tmp_path, quick=True, conditions=conditions.conditions(CPU))) == 0
    rows = conditions.read_rows(tmp_path / "experts.jsonl")
    taken = {(row["grid"], row["launch"]): set() for row in rows if row["ms"]}
    for row in rows:
        if row["ms"]:
            taken[row["grid"], row["launch"]].add(row["arm"])
    everything = set(expert_baselines.ARMS)
    # The chain of library calls asks the device how many rows each expert has.
    assert taken == {("train", "queued"): everything, ("decode", "eager"): everything, ("decode", "graph"): everything - {"ours", "beside"}}


@pytest.mark.interpreted
@grouped
def test_kernel_arms_are_right_and_are_launched(monkeypatch):
    pytest.importorskip("triton")
    from lora_kernels import launch

    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    point = replace(SMALL, M=12, K=40, N=36, r=4, experts=4, top_k=2)
    checker = Checker(CPU)
    found, _ = expert_baselines.arms(point, CPU, "triton")
    for name, wanted in (("ours", 6), ("beside", 6)):
        before = launch.launches
        assert checker.wrong(point, name, found[name]) is None, name
        assert launch.launches == before + wanted, "shrink, expand or experts; shrink, the same, wgrad twice"


AHEAD = """
from dataclasses import replace
import torch
from bench import expert_baselines, expert_workloads, experts, precompile
from bench.baselines import inference, training
from bench.expert_workloads import ExpertPoint
from lora_kernels import dispatch, launch
from lora_kernels.segments import expert_block
from lora_kernels.tuning import Arch

arch, cpu = Arch.cuda(9, 0), torch.device("cpu")
dispatch.arch_of = lambda device: (arch, "")
base = ExpertPoint("train", "l", 192, 192, 320, experts=6, top_k=3)
points = [base, replace(base, grid="decode", M=12), replace(base, K=320, dtype=torch.float32)]
points.append(replace(base, M=8190, K=1024, N=64, experts=512))  # K is split at its small version alone
jobs = experts.jobs(points, arch)
ahead = {precompile.told_apart(*each) for job in jobs for each in precompile._launches(job, arch)}
launched = set()
with launch.intercept(lambda kernel, grid, args, options: launched.add(precompile.told_apart(kernel, args, options))):
    for timed in points:
        for point in (timed, expert_workloads.small(timed, expert_block(timed.M, timed.experts))):
            o = point.operands(cpu)
            arms, _ = expert_baselines.arms(point, cpu, "triton")
            for name in {"ours", "beside"} & set(arms):
                (inference if point.forward_alone else training)(arms[name].formula, arms[name].of(o)).run()
assert launched and {key[0] for key in launched} == {"shrink", "experts", "expand", "wgrad", "add_parts"}
assert launched == ahead, (len(launched - ahead), len(ahead - launched))
"""


@grouped
def test_kernels_compiled_ahead_are_those_that_are_launched():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", AHEAD], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

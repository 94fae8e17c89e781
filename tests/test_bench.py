"""The benchmarks run, write whole rows, report nothing while parity is red, and measure formulas that are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import baselines, check, conditions, cpu, device, parts, report, roof, session, timing, variants, workloads  # noqa: E402
from bench.workloads import Point  # noqa: E402
from lora_kernels import chain, reference  # noqa: E402

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too


@pytest.fixture
def parity(monkeypatch):
    """A stand-in for lora_kernels.parity whose cases turn out as ``ok`` says."""
    fake = SimpleNamespace(ok=True, calls=[], Case=lambda *args, **named: f"a case {args}")

    def run_case(case, device):
        fake.calls.append(case)
        return SimpleNamespace(name=case, ok=fake.ok, ratio=0.5 if fake.ok else 7.0, detail="dX: 7 times what is allowed")

    fake.run_case = run_case
    monkeypatch.setitem(sys.modules, "lora_kernels.parity", fake)
    return fake


def bench(*args: str, out: Path) -> int:
    return device.main([*args, "--quick", "--device", "cpu", "--out", str(out)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sections_write_whole_rows(tmp_path, parity, capsys):
    assert bench("roof", "single", "memory", "host", "merge", out=tmp_path) == 0
    assert len(parity.calls) == 4
    printed = capsys.readouterr().out
    for section in ("roof", "single", "memory", "host", "merge", "check"):
        rows = lines(tmp_path / f"{section}.jsonl")
        assert rows
        for row in rows:
            assert row["section"] == section
            assert {*conditions.FIELDS, *conditions.CONDITIONS} <= set(row)
            assert all(row[name] for name in ("cpu", "threads", "torch", "python", "code", "date")) and row["gpu"] is None
            assert row.get("error") is None
        assert any(line.startswith(section) for line in printed.splitlines())
    single = [row for row in lines(tmp_path / "single.jsonl") if row["what"] != "left out"]
    assert {row["arm"] for row in single} >= {"linear", "peft", "lorafusion", "addmm-beta1", "torch", "auto"}
    assert {row["what"] for row in single} == {"forward", "backward", "both"}
    for row in single:
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["roof_fraction"] > 0 and row["over_linear"] > 0
        assert row["arm"] != "linear" or row["over_linear"] == 1.0
    assert {row["took"] for row in single if row["arm"] == "auto" and row["what"] == "forward"} == {"torch"}


def test_memory_counts_what_is_saved(tmp_path, parity):
    assert bench("memory", out=tmp_path) == 0
    saved = {(row["arm"], row["p"]): row["saved_bytes"] for row in lines(tmp_path / "memory.jsonl")}
    point = workloads.memory(CPU, quick=True)[0]
    low_rank, dropped = 4 * point.M * point.r, 4 * point.M * point.K
    assert saved["linear", 0.0] == 0
    assert saved["peft", 0.0] == saved["torch", 0.0] == low_rank
    assert saved["peft", 0.1] >= low_rank + dropped
    assert saved["torch", 0.1] == low_rank + point.M * point.K // 8  # and the mask's bits


def test_red_parity_reports_nothing(tmp_path, parity, capsys):
    parity.ok = False
    assert bench("all", out=tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["check.jsonl"]
    assert "dX: 7 times" in capsys.readouterr().err
    assert bench("single", "roof", out=tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["check.jsonl"]
    assert len(parity.calls) == 4, "a recorded verdict on the same code is not asked for again"
    parity.ok = True
    assert bench("check", "memory", out=tmp_path) == 0
    assert (tmp_path / "memory.jsonl").exists()


def test_verdict_of_other_code_does_not_count(tmp_path, parity, monkeypatch):
    assert bench("check", out=tmp_path) == 0
    current = session.Session(CPU, tmp_path)
    assert check.recorded(current) is True
    monkeypatch.setattr(conditions, "fingerprint", lambda: "other")
    assert check.recorded(session.Session(CPU, tmp_path)) is None


def test_check_on_a_device_that_runs_kernels(tmp_path, parity, monkeypatch, capsys):
    def run_all(device, progress, quick):
        progress(0, 1, "a kernel")
        return [SimpleNamespace(name="a kernel", ok=True, ratio=0.5, detail="")] * found

    parity.run_all = run_all
    monkeypatch.setattr(variants, "kernels_run", lambda device: "an architecture")
    for found in (1, 0):
        assert check.run(session.Session(CPU, tmp_path)) is bool(found), "no cases prove nothing"
    assert "check 0/1 a kernel" in capsys.readouterr().err


@pytest.mark.parametrize("left, wanted", [(0, [False]), (3, [True])])
def test_a_check_without_time_to_compile_is_a_quick_one(tmp_path, parity, monkeypatch, capsys, left, wanted):
    asked, ran = [], []
    parity.cases = lambda device, quick: asked.append(quick) or []
    parity.run_all = lambda device, progress, quick: ran.append(quick) or [SimpleNamespace(name="a", ok=True, ratio=0.5, detail="")]
    monkeypatch.setattr(variants, "kernels_run", lambda device: "an architecture")
    monkeypatch.setattr(check.precompile, "run", lambda jobs, arch, seconds: left)
    on_a_gpu = session.Session(torch.device("cuda"), tmp_path, conditions=dict.fromkeys(conditions.CONDITIONS))
    assert check.run(on_a_gpu, quick=False) and ran == wanted and asked == [True, False], "the quick ones' kernels first"
    assert [row["quick"] for row in lines(tmp_path / "check.jsonl")] == [left > 0] * 2
    assert ("the quick cases alone" in capsys.readouterr().err) == (left > 0)


def test_the_real_check_is_green_here(tmp_path):
    pytest.importorskip("triton")
    assert bench("check", out=tmp_path) == 0
    assert [row["ok"] for row in lines(tmp_path / "check.jsonl")] == [True] * 5


def test_an_arm_that_fails_is_a_row_and_an_exit_status(tmp_path, parity, monkeypatch):
    def broken(o):
        raise RuntimeError("out of something")

    monkeypatch.setitem(baselines.FORMULAS, "peft", broken)
    assert bench("single", out=tmp_path) == 1
    rows = lines(tmp_path / "single.jsonl")
    assert {row["error"] for row in rows if row["arm"] == "peft"} == {"RuntimeError: out of something"}
    assert all(row["ms"] for row in rows if row["arm"] != "peft" and row["what"] != "left out")


def test_budget_leaves_out_what_does_not_fit(capsys):
    budget = session.Budget(0.0)
    assert list(budget.walk(["a", "b", "c"])) == ["a"]
    assert budget.left_out == ["b", "c"]
    assert "left out, past 0 s: 2 of 3 points: b; c" in capsys.readouterr().err


def test_points_left_out_are_rows(tmp_path, parity):
    assert bench("single", "--seconds", "1e-9", out=tmp_path) == 0
    rows = conditions.read_rows(tmp_path / "single.jsonl")
    points = workloads.cpu_single(quick=True)
    assert [row["M"] for row in rows if row["what"] == "left out" and row["arm"] is None] == [point.M for point in points[1:]]
    assert f"left out for want of time: {len(points) - 1}." in report.render("single", rows, brief=False)


@pytest.mark.parametrize("args", [["nothing"], ["single", "--seconds", "0"]])
def test_bad_arguments(args, tmp_path):
    with pytest.raises(SystemExit):
        bench(*args, out=tmp_path)


def float64(p: float) -> workloads.Operands:
    return Point("test", "small", 24, 40, 32, 8, p, torch.float64).operands(CPU)


@pytest.mark.parametrize("name", [name for name in baselines.FORMULAS if name != "linear"] + ["torch.compile"])
def test_baselines_agree_with_the_reference(name):
    o = float64(0.0)
    formula = baselines.FORMULAS[name] if name in baselines.FORMULAS else torch.compile(baselines.peft, backend="eager")
    y = formula(o)
    truth = reference.lora_linear(o.x, o.weight, o.lora_A, o.lora_B, scale=o.scale)
    torch.testing.assert_close(y, truth, msg=lambda text: f"y: {text}")
    for label, got, wanted in zip("xAB", baselines.gradients(o, y), baselines.gradients(o, truth), strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, label=label: f"d{label}: {text}")


@pytest.mark.parametrize("name", ["peft", "lorafusion", "addmm-beta1"])
def test_baselines_drop_the_adapters_input_alone(name):
    o = float64(0.25)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(o.x, o.p)
    torch.manual_seed(0)
    truth = o.x @ o.weight.T + o.scale * (dropped @ o.lora_A.T @ o.lora_B.T)
    torch.testing.assert_close(baselines.FORMULAS[name](o), truth)


def test_linear_is_the_frozen_layer():
    o = float64(0.0)
    y = baselines.linear(o)
    torch.testing.assert_close(y, o.x @ o.weight.T)
    dx, da, db = baselines.gradients(o, y)
    torch.testing.assert_close(dx, o.dy @ o.weight)
    assert da is None and db is None


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_work_counts_the_operations_of_autograd(what):
    from torch.utils.flop_counter import FlopCounterMode

    o = float64(0.0)
    step = baselines.training(baselines.FORMULAS["torch"], o)
    point = Point("train", "small", *o.x.shape, o.weight.shape[0], o.lora_A.shape[0])
    with FlopCounterMode(display=False) as forward:
        y = step.forward()
    with FlopCounterMode(display=False) as backward:
        step.backward(y)
    counted = {"forward": forward, "backward": backward}[what].get_total_flops()
    assert roof.work(point, what)[0] == counted


class FakeCuda:
    """torch.cuda's clockwork, writing down in which order it is called."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                fake.log.append("event")

            def elapsed_time(self, other):
                return 1.0

        properties = SimpleNamespace(L2_cache_size=1 << 20)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("sleep"), raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.log.append("settle"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(timing.DeviceClock, "_flush", lambda clock: self.log.append("flush"))

    def step(self) -> timing.Step:
        return timing.Step(lambda: self.log.append("forward"), lambda state: self.log.append("backward"))


@pytest.mark.parametrize(
    "launch, wanted",
    [
        ("queued", "sleep flush event forward event flush event backward event settle"),
        ("eager", "flush settle event forward event flush settle event backward event settle"),
    ],
)
def test_device_clock_times_each_pass_with_a_cold_cache(monkeypatch, launch, wanted):
    fake = FakeCuda(monkeypatch)
    clock = timing.DeviceClock(CPU, launch)
    lead = clock.warm(fake.step())
    fake.log.clear()
    assert clock.measure(fake.step(), lead) == {"forward": 1.0, "backward": 1.0, "both": 2.0}
    assert " ".join(fake.log) == wanted


def test_interleave_times_every_step_each_round():
    calls: list[str] = []
    steps = {name: timing.Step(lambda name=name: calls.append(name)) for name in "abc"}
    times, errors = timing.interleave(steps, timing.HostClock(), seconds=0.0, least=4)
    assert not errors and all(t["forward"].rounds == 4 for t in times.values())
    measured = calls[3:]
    assert [sorted(measured[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and timing.quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)


def test_parts_bench_and_its_report(tmp_path):
    out = tmp_path / "results" / "parts.jsonl"
    assert parts.main(["--out", str(out), "--quick", "--seconds", "0.01"]) == 0
    rows = conditions.read_rows(out)
    assert len(rows) == 14 and all(row["ms"]["p50"] > 0 for row in rows)
    text = report.rewritten("<!-- bench:parts -->\n<!-- /bench:parts -->\n", out.parent, False, "measured.md")
    assert "| the Philox mask, a bit an element | " in text and "32 x 64, bfloat16" in text


def test_cpu_bench_and_its_report(tmp_path):
    out = tmp_path / "results" / "cpu.jsonl"
    assert cpu.main(["--out", str(out), "--quick", "--seconds", "0.01"]) == 0
    rows = lines(out)
    assert {row["arm"] for row in rows if row["dtype"] == "float32"} == {"linear", "peft", "torch", "torch-no-onednn"}
    assert {(row["dtype"], row["p"]) for row in rows} == {(d, p) for d in ("float32", "bfloat16") for p in (0.0, 0.1)}
    assert all(row["rounds"] >= 5 for row in rows)

    readme, docs = tmp_path / "README.md", tmp_path / "measured.md"
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n<!-- bench:single-h100 --><!-- /bench:single-h100 -->\n"
    readme.write_text(text)
    docs.write_text(text)
    args = ["--results", str(out.parent), "--readme", str(readme), "--docs", str(docs)]
    assert report.main([*args, "--check"]) == 1
    assert readme.read_text() == text, "--check writes nothing"
    assert report.main(args) == 0
    assert report.main([*args, "--check"]) == 0
    made = readme.read_text()
    assert made.startswith("before\n<!-- bench:cpu -->\n") and "\n<!-- /bench:cpu -->\nafter\n" in made and "old" not in made
    both = next(row for row in rows if (row["arm"], row["what"], row["dtype"], row["p"]) == ("torch", "both", "float32", 0.0))
    assert f"| {both['speedup_over_peft']:.2f} |" in made and rows[0]["cpu"] in made
    assert "Not measured yet: `python -m bench.device single --out bench/results` measures it, kept as single-h100.jsonl." in made
    assert len(docs.read_text()) > len(made)
    rows[0]["ms"]["p50"] += 1000.0
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main([*args, "--check"]) == 1


def test_report_of_every_section(tmp_path, parity):
    assert bench("all", out=tmp_path) == 0
    for section in ("check", "roof", "single", "memory", "host", "merge"):
        rows = conditions.read_rows(tmp_path / f"{section}.jsonl")
        brief, full = (report.render(section, rows, short) for short in (True, False))
        assert rows[0]["cpu"] in brief and len(full) >= len(brief) and "None" not in full


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- bench:cpu -->\n", "the end of the file"),
        ("a\n<!-- /bench:cpu -->\n", "README.md:2: wanted an opening marker"),
        ("<!-- bench:cpu --><!-- /bench:roof -->", "wanted <!-- /bench:cpu -->, got <!-- /bench:roof -->"),
        ("<!-- bench:nothing --><!-- /bench:nothing -->", "wanted a section among"),
    ],
)
def test_report_refuses_broken_markers(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        report.rewritten(text, tmp_path, True, "README.md")


def test_rows_without_conditions_are_refused(tmp_path):
    path = tmp_path / "cpu.jsonl"
    path.write_text('{"ms": 1}\n')
    with pytest.raises(ValueError, match="cpu.jsonl:1: wanted every field and condition"):
        conditions.read_rows(path)
    with pytest.raises(ValueError, match="got milliseconds"):
        conditions.Recorder(path, "cpu", {}).add(milliseconds=1)


def test_without_onednn_is_undone():
    before = chain._onednn
    with pytest.raises(RuntimeError), cpu.without_onednn():
        assert chain._onednn() is False
        raise RuntimeError
    assert chain._onednn is before


def run_python(code: str, **env: str) -> str:
    import os

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_runs_without_triton(tmp_path):
    run_python(f"""
import sys
sys.modules["triton"] = None  # an import of it raises
from types import SimpleNamespace
result = SimpleNamespace(name="a", ok=True, ratio=0.0, detail="")
sys.modules["lora_kernels.parity"] = SimpleNamespace(Case=lambda *a, **k: None, run_case=lambda case, device: result)
import bench.cpu, bench.device, bench.report
assert bench.device.main(["memory", "--quick", "--device", "cpu", "--out", {str(tmp_path)!r}]) == 0
""")

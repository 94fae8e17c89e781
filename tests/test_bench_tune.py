"""Tuning: candidates are valid and checked before they are timed; kernels are counted; the sanitizer's verdict is read."""

from __future__ import annotations

import dataclasses
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

from bench import candidates, compiles, conditions, device, kernel_calls, report, roof, sanitize, tune, workloads  # noqa: E402
from bench.session import Session  # noqa: E402
from bench.timing import Times  # noqa: E402
from bench.workloads import Point  # noqa: E402
from lora_kernels import reference  # noqa: E402
from lora_kernels.problem import Problem  # noqa: E402
from lora_kernels.tuning import Arch, Config, heuristic, why_not  # noqa: E402

CPU = torch.device("cpu")
SM_90 = Arch.cuda(9, 0)
TRAIN = Point("train", "small", 80, 32, 48, 8, 0.1, torch.float32)
DECODE = Point("decode", "small", 2, 32, 48, 8, 0.0, torch.float32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpreter"])
@pytest.mark.parametrize(
    "forward",
    [
        Problem(1, 4096, 14336, 16, torch.float16),
        Problem(64, 4096, 14336, 16, torch.float16),
        Problem(8192, 4096, 14336, 16, torch.float16, "x"),
        Problem(300, 4096, 14336, 16, torch.float32, "x"),
        Problem(2, 4096, 4096, 16, torch.float16, adapters=64, row_block=16, gather_block=16),
        Problem(64, 4096, 4096, 16, torch.float16, adapters=64, row_block=64, gather_block=16),
        Problem(8192, 4096, 4096, 16, torch.float16, adapters=64, row_block=128, gather_block=32),
        Problem(8192, 4096, 4096, 16, torch.float16, "x", adapters=64, row_block=128, gather_block=32),
    ],
    ids=lambda p: f"{p.M}-{p.adapters}-{p.dropout or 'p0'}",
)
def test_candidates_are_valid_and_begin_with_the_heuristic(arch, forward):
    """Parts other than the kernel's are the heuristic's; with many adapters the tiles' rows are the plan's."""
    for problem in (forward, forward.backward()):
        for kernel in ("shrink", "expand", "wgrad"):
            found = candidates.candidates(kernel, problem, Arch.parse(arch))
            own = heuristic(problem, Arch.parse(arch))
            assert found[0] == own and len(found) == len(set(found)) > 2
            assert all(why_not(config, problem, Arch.parse(arch)) is None for config in found)
            assert {replace(config, **{kernel: getattr(own, kernel)}) for config in found} == {own}, "one kernel's part alone differs"
            if problem.adapters:
                assert {(c.expand.block_m, c.shrink.block_m) for c in found} == {(problem.row_block, problem.gather_block)}
            names = {candidates.short(kernel, dataclasses.asdict(getattr(config, kernel))) for config in found}
            assert len(names) == len(found), "a short name tells candidates apart"


def test_candidates_hold_what_is_to_be_decided():
    many = Problem(8192, 4096, 4096, 16, torch.bfloat16)
    tried = {candidates.short("expand", dataclasses.asdict(c.expand)) for c in candidates.candidates("expand", many, SM_90)}
    assert tried >= {"128x256x64 s4 w8 tma", "256x128x64 s3 w8 tma persistent", "128x128x64 s5 w8 tma", "128x256x64 s4 w8 g16 tma"}
    few = candidates.candidates("expand", replace(many, M=64), SM_90)
    assert {c.expand.u for c in few} == {"given", "loop"} and len({c.expand.split for c in few}) > 1
    assert {c.expand.block_m for c in few} == {32, 64} and {c.expand.block_n for c in few} == {16, 32, 64, 128}
    some = {c.expand.split for c in candidates.candidates("expand", replace(many, M=128), SM_90)}
    assert some == {1, 4, 5, 9}, "32 tiles, as one wave of them and two, four"


# What a kernel has to compute.


def float64(point: Point) -> kernel_calls.Inputs:
    point = replace(point, dtype=torch.float64)
    return kernel_calls.inputs(point, point.operands(CPU))


def test_expected_results_are_the_references():
    i = float64(TRAIN)
    x, A, B = (t.clone().requires_grad_() for t in (i.o.x, i.o.lora_A, i.o.lora_B))
    y = reference.lora_linear(x, i.o.weight, A, B, scale=i.o.scale, dropout_p=i.point.p, training=True, seed=i.seed)
    dx, da, db = torch.autograd.grad(y, (x, A, B), i.o.dy)
    u = reference.dropout(i.o.x, i.point.p, i.seed) @ i.o.lora_A.T * i.o.scale
    ds = i.o.dy @ i.o.lora_B * i.o.scale
    for call, wanted in zip(kernel_calls.TRAINING, ([u], [y.detach()], [ds], [dx], [da, db]), strict=True):
        torch.testing.assert_close(kernel_calls.expected(call, i, torch.float64), wanted, msg=lambda text, call=call: f"{call}: {text}")
        if call.kernel == "expand":
            at = torch.tensor([0, 3, 79])
            torch.testing.assert_close(kernel_calls.expected(call, i, torch.float64, at), [wanted[0][at]])


def test_sampled_rows_see_every_tile():
    point = replace(TRAIN, M=5000)
    rows_ = kernel_calls.sampled_rows(kernel_calls.TRAINING[1], point, CPU)
    assert set((rows_ // 64).tolist()) == set(range(-(-5000 // 64))) and rows_.max() < 5000
    assert kernel_calls.sampled_rows(kernel_calls.TRAINING[0], point, CPU) is None


def test_the_kernels_operations_are_the_passes():
    calls = kernel_calls.TRAINING
    forward, backward = (sum(call.work(TRAIN)[0] for call in calls if call.what == what) for what in ("forward", "backward"))
    assert (forward, backward) == (roof.work(TRAIN, "forward")[0], roof.work(TRAIN, "backward")[0])
    assert kernel_calls.DECODE[1].work(DECODE) == roof.work(DECODE, "forward"), "for few tokens expand is the whole pass"


# The section.


@pytest.fixture
def session(tmp_path) -> Session:
    return Session(CPU, tmp_path, quick=True)


def measured(session: Session) -> list[dict]:
    return conditions.read_rows(session.path("tune"))


def test_without_kernels_the_chain_is_timed(session, capsys, as_on_a_users_cpu):
    assert tune.run(session) == 0
    found = measured(session)
    assert {(row["kernel"], row["arm"], row["what"]) for row in found} == {("pass", "torch", w) for w in ("forward", "backward", "both")}
    out = capsys.readouterr()
    assert "nothing to tune" in out.err and out.out.startswith("tune ")
    assert "| whole pass |" in report.render("tune", found, brief=True)


@pytest.mark.interpreted
def test_candidates_are_timed_in_two_rounds(session, monkeypatch):
    monkeypatch.setattr(workloads, "tune", lambda cuda, quick: [DECODE])
    assert tune.run(session) == 0
    found = measured(session)
    problem = Problem(2, 48, 32, 8, torch.float32)
    for kernel in ("shrink", "expand"):
        wanted = len(candidates.candidates(kernel, problem, Arch.interpreter()))
        for round_ in ("first", "last"):
            mine = [row for row in found if (row["kernel"], row["round"]) == (kernel, round_)]
            assert len(mine) == wanted
            assert [row["over_heuristic"] for row in mine if row["name"] == tune.HEURISTIC] == [1.0]
            assert all(row["ms"]["p50"] > 0 and row["over_heuristic"] > 0 and row["what"] == "forward" for row in mine)
    passes = {row["name"]: row for row in found if row["kernel"] == "pass"}
    assert passes["torch"]["config"] is None
    assert Config.from_dict(passes["heuristic"]["config"]) == heuristic(problem, Arch.interpreter())


def faked(fast: str):
    """An `interleave` by which steps whose name holds ``fast`` take 1 ms, "tuned" 2 ms and others 3 ms, and none is run."""

    def interleave(steps, clock, **named):
        ms = {name: 1.0 if fast in name else 2.0 if name == "tuned" else 3.0 for name in steps}
        passes = ("forward", "backward", "both") if any(step.backward for step in steps.values()) else ("forward",)
        return {name: {what: Times(t, t, t, 5) for what in passes} for name, t in ms.items()}, {}

    return interleave


@pytest.mark.interpreted
def test_the_best_parts_are_joined(session, monkeypatch, capsys):
    monkeypatch.setattr(workloads, "tune", lambda cuda, quick: [TRAIN])
    monkeypatch.setattr(tune, "interleave", faked("16x"))
    assert tune.run(session) == 0
    found = {(row["name"], row["what"]): row for row in measured(session) if row["kernel"] == "pass"}
    problem = Problem(80, 48, 32, 8, torch.float32, "x")
    for what, each in (("forward", problem), ("backward", problem.backward())):
        best, own = (Config.from_dict(found[name, what]["config"]) for name in ("tuned", "heuristic"))
        assert own == heuristic(each, Arch.interpreter())
        assert best.shrink.block_m == best.expand.block_m == 16 != own.shrink.block_m
        assert best.wgrad == own.wgrad or what == "backward", "the forward pass has no wgrad to tune"
        assert found["tuned", what]["over_heuristic"] == rows_ratio(2, 3)
    printed = capsys.readouterr().out
    assert "whole" not in printed and " 1.50 " in printed and " tuned" in printed
    full = report.render("tune", measured(session), brief=False)
    assert "16x32x32 s2 w4" in full and len(report.render("tune", measured(session), brief=True)) < len(full)


@pytest.mark.interpreted
@pytest.mark.parametrize("right", [True, False])
def test_overlapped_passes_are_timed_where_they_change_no_bit(session, monkeypatch, right):
    real = tune.gradients_of

    def gradients_of(o, forward, backward):
        found = real(o, forward, backward)
        return found if right or backward.wgrad.beside != "pdl" else [t * (1 + 1e-6) for t in found]

    monkeypatch.setattr(workloads, "tune", lambda cuda, quick: [TRAIN])
    monkeypatch.setattr(tune, "interleave", faked("16x"))
    monkeypatch.setattr(tune, "gradients_of", gradients_of)
    assert tune.run(session) == (0 if right else 1)
    passes = [row for row in measured(session) if row["kernel"] == "pass"]
    timed = {row["name"]: Config.from_dict(row["config"]) for row in passes if row["ms"] and row["what"] == "backward" and row["config"]}
    assert {name: config.wgrad.beside for name, config in timed.items() if config.wgrad.beside} == (
        {"overlapped by stream": "stream"} | ({"overlapped by pdl": "pdl"} if right else {})
    )
    errors = [(row["name"], row["error"]) for row in passes if row["error"]]
    assert right or ("overlapped by pdl" in errors[0][0] and "differ" in errors[0][1] and len(errors) == 1)


def rows_ratio(a: float, b: float) -> float:
    return float(f"{a / b:.5g}")


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "how, message",
    [("wrong", "of the error budget"), ("unwritten", "uses inf of the error budget"), ("raises", "RuntimeError: out of resources")],
)
def test_a_wrong_candidate_is_an_error_and_no_time(session, monkeypatch, capsys, how, message):
    right = kernel_calls.launched

    def launched(call, i, config):
        if how == "raises" and call.kernel == "shrink" and config.shrink.split == 2:
            raise RuntimeError("out of resources")
        results = right(call, i, config)
        if call.kernel == "shrink" and config.shrink.split == 2:
            results[0][..., 1, 2] = float("nan") if how == "unwritten" else 100.0
        return results

    monkeypatch.setattr(workloads, "tune", lambda cuda, quick: [DECODE])
    monkeypatch.setattr(kernel_calls, "launched", launched)
    monkeypatch.setattr(tune, "interleave", faked("nothing"))
    assert tune.run(session) == 1
    shrinks = [row for row in measured(session) if row["kernel"] == "shrink"]
    wrong = [row for row in shrinks if row["config"]["split"] == 2]
    assert [row["ms"] for row in wrong] == [None] and message in wrong[0]["error"] and wrong[0]["ok"] is False
    assert any(row["ms"] for row in shrinks) and "FAILED shrink forward" in capsys.readouterr().out
    assert "Failed or wrong: 1." in report.render("tune", measured(session), brief=False)


@pytest.mark.interpreted
def test_no_kernel_is_compiled_past_the_budget(session, monkeypatch, capsys):
    monkeypatch.setattr(workloads, "tune", lambda cuda, quick: [DECODE, TRAIN])
    session.seconds = 1e-9
    assert tune.run(session) == 0
    found = measured(session)
    assert {row["kernel"] for row in found} == {"pass", None}
    assert [row["M"] for row in found if row["what"] == "left out"] == [TRAIN.M]
    assert "shrink forward: no time for 3 of 3 candidates" in capsys.readouterr().err


# Kernels over changing lengths.

COUNTED = """
import json
import torch
from bench import compiles, precompile
from bench.workloads import Point
from lora_kernels.tuning import Arch

def plain(value):
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return "int" if isinstance(value, int) else precompile._signature(value)

def launches(jobs, found):
    for job, index in found:
        kernel, args, options = precompile._launches(jobs[job], compiles.COUNTED)[index]
        constants = tuple((name, getattr(value, "__name__", value)) for name, value in options.items())
        yield jobs[job].backward, index, kernel.__name__, constants, plain(args)

def parts(job):
    c, few = job.config, job.config.expand.u != "given"
    tile = lambda part: tuple(value for name, value in vars(part).items() if name != "split")
    yield job.backward, "expand", tile(c.expand), c.expand.split > 1
    if not few:
        yield job.backward, "shrink", tile(c.shrink), c.shrink.split > 1
        yield "add_parts", 1
    if job.backward:
        blocks = -(-job.point.M // c.wgrad.block_m)
        yield "add_parts", 2
        yield from ((which, "wgrad", tile(c.wgrad), min(c.wgrad.split, blocks) > 1) for which in ("dA", "dB"))

for p in compiles.DROPOUTS:
    jobs = compiles.jobs(p, 200)
    found = precompile.distinct(jobs, compiles.COUNTED)
    bound = len({part for job in jobs for part in parts(job)})
    print(json.dumps([p, len(found), len(set(launches(jobs, found))), bound, compiles.counted(p, 200)["kernels"]]))

with precompile.counting() as compiled:
    jobs = precompile.of_points([Point("decode", "small", 16, 128, 64, 16)], compiles.COUNTED, False)[:1]
    for _ in range(2):
        precompile.compile_some(jobs[0], [0], compiles.COUNTED)
print(json.dumps(compiled))
"""


def test_kernels_follow_the_configurations_and_not_the_lengths(tmp_path):
    """200 lengths: at most one kernel for each configuration, pass and output; none because a length is odd, or a multiple of 16."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *runs, compiled = map(json.loads, done.stdout.splitlines())
    assert [run[0] for run in runs] == list(compiles.DROPOUTS)
    for p, number, by_configuration, bound, counted in runs:
        assert number == by_configuration == counted, f"p={p}: a length specialised a kernel"
        assert number <= bound <= 24, f"p={p}: {number} kernels"
    assert compiled == ["expand"], "a compilation is told of, and once"


def test_lengths_are_odd_and_even_and_of_every_size():
    found = compiles.lengths(200)
    assert len(set(found)) == 200 and min(found) == 1 and max(found) == 8192
    assert 60 < sum(M % 16 == 0 for M in found) < 160 and sum(M % 2 for M in found) > 40
    assert all(any(low <= M < 2 * low for M in found) for low in (2, 16, 64, 512, 4096))


def test_compiles_are_counted_without_a_gpu(session, monkeypatch, capsys):
    monkeypatch.setattr(compiles, "in_process", lambda p, number, counting, seconds: compiles.counted(p, number))
    monkeypatch.setattr(compiles.precompile, "distinct", lambda jobs, arch: [(0, 0)] * len(jobs))
    assert compiles.run(session) == 0
    found = conditions.read_rows(session.path("compiles"))
    assert [(row["p"], row["lengths"], row["kernels"], row["name"], row["seconds"]) for row in found] == [
        (p, 20, 40, "sm_90", None) for p in compiles.DROPOUTS
    ]
    assert "| 8B q,o | 0.1 | 20 | 40 |  | counted, not compiled for sm_90 |" in report.render("compiles", found, brief=False)

    def failing(*args):
        raise RuntimeError("Traceback (most recent call last):\n  File\nAssertionError: no device")

    monkeypatch.setattr(compiles, "in_process", failing)
    assert compiles.run(session) == 2 and "FAILED compiles p=0: Traceback" in capsys.readouterr().out
    assert "|  |  | AssertionError: no device |" in report.render("compiles", conditions.read_rows(session.path("compiles")), brief=False)
    monkeypatch.setattr(compiles.dispatch, "triton_missing", lambda: "ModuleNotFoundError")
    assert compiles.run(session) == 0 and "not run: triton" in capsys.readouterr().out


# compute-sanitizer.

CLEAN = "========= COMPUTE-SANITIZER\n62 of 62 within budget, 80 s\n========= ERROR SUMMARY: 0 errors\n"
BAD = "========= Invalid __global__ read of size 2 bytes\n=========     at expand+0x10\n========= ERROR SUMMARY: 3 errors\n"
RACE = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    "status, output, ok, detail",
    [
        (0, CLEAN, True, "ERROR SUMMARY: 0 errors"),
        (0, BAD, False, "ERROR SUMMARY: 3 errors"),
        (1, CLEAN, False, "ERROR SUMMARY: 0 errors; the check itself ended with status 1"),
        (0, RACE.format(0, 0), True, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
        (0, RACE.format(2, 2), False, "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
        (0, CLEAN + BAD, False, "ERROR SUMMARY: 0 errors; ERROR SUMMARY: 3 errors"),
        (1, "========= Error: terminated\n", False, "no summary, exit status 1: ========= Error: terminated"),
        (0, "", False, "no summary, exit status 0: nothing printed"),
        (None, "62 of 62", False, "ran out of time before its summary"),
    ],
)  # fmt: skip
def test_the_sanitizers_verdict(status, output, ok, detail):
    assert sanitize.verdict(status, output) == (ok, detail)


def test_sanitize_says_where_it_cannot_run(session, monkeypatch, capsys):
    for program, reason in ((None, "not on PATH"), ("/bin/compute-sanitizer", "cpu is not a GPU")):
        monkeypatch.setattr(sanitize, "found_program", lambda program=program: program)
        assert sanitize.run(session) == 0
        found = conditions.read_rows(session.path("sanitize"))
        assert len(found) == 1 and reason in found[0]["detail"] and reason in capsys.readouterr().out
        assert reason in report.render("sanitize", found, brief=True)


def test_sanitize_runs_both_tools(session, monkeypatch):
    commands = []

    def output_of(command, seconds):
        commands.append(command)
        return (0, CLEAN) if "memcheck" in command else (0, RACE.format(1, 1))

    session.device = torch.device("cuda")
    monkeypatch.setattr(sanitize, "found_program", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize.variants, "kernels_run", lambda device: None)
    monkeypatch.setattr(sanitize, "output_of", output_of)
    assert sanitize.run(session) == 1
    found = conditions.read_rows(session.path("sanitize"))
    assert [(row["tool"], row["ok"]) for row in found] == [("memcheck", True), ("racecheck", False)]
    assert [command[:3] for command in commands] == [["compute-sanitizer", "--tool", tool] for tool in sanitize.TOOLS]
    assert commands[0][4:] == ["-m", "lora_kernels", "check", "--quick"]


def test_a_tool_that_takes_too_long_is_ended():
    assert sanitize.output_of([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2.0) == (None, "begun\n")
    assert sanitize.output_of([sys.executable, "-c", "import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])"], 20.0) == (0, "1\n")


def test_all_leaves_the_sanitizer_out(tmp_path, monkeypatch, as_on_a_users_cpu):
    ran: list[str] = []
    names = list(device.SECTIONS)
    monkeypatch.setattr(
        device, "SECTIONS", {name: lambda session, name=name, **named: ran.append(name) or name == "check" for name in names}
    )
    monkeypatch.setattr(device.check, "run", lambda session, **named: True)
    assert device.main(["all", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert {"tune", "compiles"} <= set(ran) and "sanitize" not in ran
    assert device.main(["sanitize", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert ran[-1] == "sanitize"

"""The command line: exit codes, and what it prints."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import cli, compile_only, dispatch, parity
from lora_kernels.compile_only import Report

ON_GPU = torch.cuda.is_available()


def run(*args: str):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "lora_kernels", *args], capture_output=True, text=True, env=env, timeout=600)


def test_info():
    out = run("info")
    assert out.returncode == 0 and "torch      yes" in out.stdout and torch.__version__ in out.stdout
    assert ("triton     yes" if ON_GPU else "triton     no: the tensors are on cpu") in out.stdout


@pytest.mark.parametrize("value", ["", "0", "1", "true", "True", "yes", "Y", "on", "off", "false", "no", "2"])
def test_the_interpreter_is_on_where_it_is_tritons(value, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert dispatch.interpreting.__wrapped__() == knobs.getenv_bool("TRITON_INTERPRET", False)


def test_check_of_a_few_cases(monkeypatch, capsys):
    """test_kernels.py runs them all."""
    every = parity.cases

    def few(device, quick):
        awaited = next(case for case in every(device, quick) if case.config and case.config.expand.u == "awaited")
        return [awaited, *every(device, quick)[::20]] if quick else []

    monkeypatch.setattr(parity, "cases", few)
    assert cli.main(["check", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "BAD" not in out and "u awaited" in out and "dropout mask, exact" in out and "plan, exact" in out
    assert ("interpreter" in out) == (not ON_GPU)


def test_check_in_a_process_of_its_own(monkeypatch):
    """Without a GPU, and without the interpreter: another process has it, and its exit status counts."""
    asked = []
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda command, env: asked.append((command, env)) or SimpleNamespace(returncode=5))
    assert cli.main(["check", "--device", "cpu", "--quick"]) == 5
    (command, env), *others = asked
    assert command[1:] == ["-m", "lora_kernels", "check", "--device", "cpu", "--quick"] and env["TRITON_INTERPRET"] == "1" and not others


def test_check_is_red_on_a_wrong_kernel(monkeypatch, capsys):
    monkeypatch.setattr(parity, "run_all", lambda *args: [parity.Result("a case", False, 3.0, "y uses 3.00 of its budget")])
    assert cli.main(["check"]) == 1
    assert "BAD  a case" in capsys.readouterr().out


def test_check_that_cannot_run_is_not_red(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["check", "--device", "cuda"]) == 2
    assert "device: wanted cuda, got a torch that sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["unknown"], ["compile", "--arch"]])
def test_usage_errors(args):
    out = run(*args)
    assert out.returncode == 2 and "usage:" in out.stderr


def test_help_teaches():
    out = run("--help")
    assert out.returncode == 0
    for word in ("info", "check", "compile", "demo", "inspect", "float64 reference", "no GPU needed"):
        assert word in out.stdout
    assert "Triton's interpreter" in run("check", "--help").stdout


def test_compile_refuses_unknown_architectures():
    out = run("compile", "--arch", "hopper")
    assert out.returncode == 2 and "wanted a name such as sm_90 or gfx942, got 'hopper'" in out.stderr


@pytest.mark.parametrize("spills, status", [(0, 0), (2, 1)])
def test_compile_prints_a_table(spills, status, monkeypatch, capsys):
    """test_compile_only.py has the compiler's own reports in it."""
    report = Report("expand given", "M=16", "sm_90", "bfloat16", 128, spills, 1024, 232448, "wgmma", True, 8, False)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(compile_only, "heuristic_reports", lambda arch, progress: [report])
    assert cli.main(["compile", "--arch", "sm_90"]) == status
    out = capsys.readouterr().out
    assert "wgmma" in out and f"spills: {spills}" in out and ("BAD" in out) == bool(spills)

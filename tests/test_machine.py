"""Kernels as they are compiled for sm_80 and sm_90, run from their PTX (tests/machine), in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, **paths, **env}, cwd=ROOT, timeout=900
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_it_finds_what_is_planted(arch):
    out = run("-m", "machine.planted", arch)
    assert out.returncode == 0, out.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in out.stdout.splitlines())
    assert said["right"] == "ran" and said["equal"] == "True"
    assert "is in no buffer" in said["unmasked"]
    assert "an access of 16 bytes is not aligned" in said["misaligned"]
    assert "waited in vain" in said["waiting"]
    assert "race: it reads what program 0 of this launch wrote" in said["raced"]
    assert said["turned"] == "ran" and "race: warp" in said["turned without barriers"]
    sums = {key: value for key, value in said.items() if key.startswith("sums")}
    assert len(sums) == (2 if arch == "sm_90" else 1) and set(sums.values()) == {"[True, True, True]"}


def test_launches_that_overlap_change_nothing():
    """dX, dA and dB of a chain of dependent launches, in the worst order; with a mistake in how expand waits they do change."""
    out = run("-m", "machine.overlapped")
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.splitlines() == ["as it is:", "no wait: dA dX y", "too early: dA"]


@pytest.mark.parametrize(
    "arch, seed, files, select",
    [
        ("sm_80", "", ["test_kernels.py"], "sizes or partial_sums or float32_on_a_16_bit"),
        ("sm_90", "1", ["test_kernels.py"], "awaited and (sizes or one_tile) or splits_of_one_tile"),
        ("sm_90", "", ["test_plan.py", "test_merging.py"], "equals or one_rounding or tf32"),
        ("sm_90", "", ["test_launcher.py"], "test"),
        ("sm_90", "2", ["test_segments.py"], "test_mixes or (awaited or masked) and not (invariance or repeats or used or single)"),
    ],
)
def test_kernels_as_compiled(arch, seed, files, select):
    """With a seed programs begin in a shuffled order and take turns."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select, *(str(TESTS / name) for name in files)]
    out = run(*command, PTX_MACHINE=arch, PTX_MACHINE_SEED=seed)
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout.splitlines()[-1] and "failed" not in out.stdout.splitlines()[-1]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton builds its launcher with a C compiler")
def test_tritons_own_launcher_takes_what_it_is_given():
    """Built in front of a driver that does nothing, but count: as many launches as the package made, at every call."""
    out = run(str(TESTS / "launch_cost.py"), "--launcher")
    assert out.returncode == 0, out.stderr[-2000:]
    made = dict(line.split(" launches")[0].rsplit(maxsplit=1) for line in out.stdout.splitlines()[1:])
    wanted = {"one adapter": ("1", "4"), "eight adapters": ("2", "6"), "FusedLoRALinear": ("1", "4")}
    batches = {}
    if "PEFT's own, forward" in made:
        wanted |= {"PEFT's, fused": ("1", "4"), "PEFT's own": ("0", "0")}
        batches = {"PEFT's, fused, 8 in a batch, forward": "2", "PEFT's own, 8 in a batch, forward": "0"}
    both = {f"{name}, {which}": n for name, ns in wanted.items() for which, n in zip(("forward", "and backward"), ns, strict=True)}
    assert made == both | batches


def test_a_gpu_that_it_cannot_be_is_refused():
    out = run("-m", "pytest", "-q", str(TESTS / "test_philox.py"), PTX_MACHINE="sm_100")
    assert out.returncode != 0 and "wanted sm_80 to sm_90, got sm_100" in out.stdout + out.stderr

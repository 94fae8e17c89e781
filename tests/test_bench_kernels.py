"""The kernels' arms of section single compute what they are named for, and are compiled ahead as they are launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


KERNELS = """
import torch
from bench import baselines, variants, workloads
from bench.workloads import Point

o = Point("train", "small", 24, 40, 32, 8, 0.0, torch.float32).operands(torch.device("cpu"))
arch = variants.kernels_run(torch.device("cpu"))
for grid, every in (("train", {every}), ("decode", False)):
    point = Point(grid, "small", *o.x.shape, 32, 8, 0.0, torch.float32)
    steps, configs, refused = variants.kernel_arms(point, o, arch, every)
    assert set(steps) == set(configs) and not refused, refused
    truth = baselines.linear(o) + o.scale * (o.x @ o.lora_A.T @ o.lora_B.T)
    wanted = baselines.gradients(o, truth)
    for name, step in steps.items():
        state = step.forward()
        if step.backward is None:
            torch.testing.assert_close(state, truth.detach(), atol=1e-4, rtol=1e-4)
            continue
        for got, want in zip(step.backward(state), wanted):
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    print(*steps)
"""


@pytest.mark.interpreted
def test_kernel_arms_compute_what_they_are_named_for():
    pytest.importorskip("triton")
    printed = run_python(KERNELS.format(every="False"), TRITON_INTERPRET="1")
    assert (
        printed.split("\n")[0]
        == "triton triton:given triton:loop triton:awaited triton:given+persistent triton:overlapped by stream triton:overlapped by pdl"
    )


AHEAD = """
from pathlib import Path
import torch
from bench import precompile, variants, workloads
from bench.workloads import Point
from lora_kernels import compile_only, launch
from lora_kernels.tuning import Arch

arch = Arch.cuda(9, 0)
point = Point("decode", "small", 16, 128, 64, 16)
jobs = precompile.of_points([point, point], arch, False)
cache = Path({cache!r})
number = len(precompile.distinct(jobs, arch))
assert precompile.run(jobs, arch, 0.0) == number > 1, "what there is no time for is counted"
assert precompile.run(jobs, arch, 100.0) == 0
before = sorted(cache.iterdir())
assert before
o = point.empty_operands(torch.device("cpu"))
for f, _ in variants.choices(point, o, arch, False)[0].values():
    run = lambda: launch.forward(o.x, o.weight, o.lora_A, o.lora_B, None, None, o.adapters, o.scale, 0.0, False, f)
    assert compile_only.compile_calls(run, arch, "")
assert sorted(cache.iterdir()) == before, "kernels that were compiled ahead were compiled again"

from triton.backends.nvidia import driver
built = []
driver.CudaLauncher = lambda src, metadata: built.append(metadata.name)
for libcuda, wanted in ((lambda: ["/"], ["expand"]), (driver.libcuda_dirs, [])):
    driver.make_launcher, driver.libcuda_dirs = None, libcuda  # from Triton 3.7 on there is no make_launcher
    built.clear()
    precompile.compile_some(jobs[0], [0], arch)
    assert built == wanted or torch.cuda.is_available()
"""


def test_kernels_compiled_ahead_are_those_that_are_launched(tmp_path):
    pytest.importorskip("triton")
    run_python(AHEAD.format(cache=str(tmp_path)), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")

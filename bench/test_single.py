"""The library chain beside PEFT's formula: ``pytest bench --benchmark-only``; on the GPU too where there is one."""

from __future__ import annotations

import pytest
import torch

from . import workloads
from .baselines import FORMULAS, inference, training
from .workloads import Point

LAYERS = {"cpu": {"256->256": (256, 256), "512->1024": (512, 1024)}, "cuda": workloads.LLAMA_8B}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CASES = [(device, layer) for device in DEVICES for layer in LAYERS[device]]


@pytest.mark.parametrize("arm", ["linear", "peft", "torch"] + ["auto"] * torch.cuda.is_available())
@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("device, layer", CASES, ids=[f"{device}-{layer}" for device, layer in CASES])
def test_single(benchmark, device, layer, what, arm):
    on_gpu = device == "cuda"
    K, N = LAYERS[device][layer]
    point = Point("pytest", layer, 2048 if on_gpu else 128, K, N, dtype=torch.bfloat16 if on_gpu else torch.float32)
    o = point.operands(torch.device(device))
    step = (inference if what == "forward" else training)(FORMULAS[arm], o)

    def call():
        result = step.run()
        if on_gpu:
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{device} {what} {point}"
    benchmark(call)

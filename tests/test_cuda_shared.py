"""Layers of one x where a GPU is: bfloat16 at size, overlapped launches, graphs, repeats, nothing that waits, the peak of memory."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.timing import Step, graphed
from lora_kernels import FusedLoRALinear, lora_linears, parity, share_inputs
from lora_kernels.dispatch import device_arch
from lora_kernels.parity import Case, run_case
from lora_kernels.tuning import Config, Expand, Wgrad

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
LAYERS = Case(1000, 1024, 2048, 16, torch.bfloat16, layers=3)


class Projections(nn.Module):
    def __init__(self, p: float = 0.0):
        super().__init__()
        for name, N in (("q_proj", 1024), ("k_proj", 256), ("v_proj", 256)):
            layer = FusedLoRALinear(1024, N, r=16, lora_dropout=p, init_lora_weights=False, device=CUDA, dtype=torch.bfloat16)
            setattr(self, name, layer)
        share_inputs(self)

    def forward(self, x):
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)


def check(case: Case):
    result = run_case(case, CUDA)
    assert result.launches > 0 and result.ok, f"{result.name}: {result.detail} {result.errors}"


def overlapped(how: str) -> Config:
    expand = Expand(128, 256, 64, num_warps=8, num_stages=3, tma=True, pdl=how == "pdl")
    return Config(expand=expand, wgrad=Wgrad(beside=how))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("R", [1, 3, 16, 17, 33, 64, 100, 128, 170, 171, 256, 512])
def test_rank_sweep(R, p):
    check(replace(LAYERS, R=R, p=p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M, N, K", [(1, 1024, 4096), (33, 1024, 4096), (777, 1536, 2000), (8192, 2048, 4096)])
def test_sizes(M, N, K, dtype):
    for p in (0.0, 0.1):
        check(Case(M, N, K, 16, dtype, p=p, layers=2))


@pytest.mark.parametrize("how", ["", "stream", "pdl"])
def test_five_hundred_repeats_bit_for_bit(how):
    """dX is read where the launch before may yet write it, were the order of launches not what it is taken to be."""
    if how == "pdl" and not device_arch(torch.device("cuda", 0)).has_pdl:
        return
    case = replace(LAYERS, M=8192, config=overlapped(how))
    tensors = parity.inputs(case, CUDA)
    first = parity.evaluate(case, tensors, "triton")
    check(case)
    for _ in range(500):
        again = parity.evaluate(case, tensors, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_cuda_graph_capture_and_replay(p):
    """Captured, a group that drops is computed layer by layer: the generator's state is not known there."""
    model, x = Projections(p), torch.randn(512, 1024, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(512, 1536, device=CUDA, dtype=torch.bfloat16)

    def step():
        y = model(x)
        return [y, torch.autograd.grad(y, x, dy)[0]]

    replay = graphed(Step(step)).forward
    first = [o.clone() for o in replay()]
    outs = replay()
    assert torch.equal(first[0], outs[0]) == (p == 0)
    with torch.no_grad():
        x.mul_(0.5)
    replay()
    if not p:
        for ours, wanted in zip(outs, step(), strict=True):
            torch.testing.assert_close(ours.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_waits_for_the_device(without_waiting, p):
    model, x = Projections(p), torch.randn(512, 1024, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    without_waiting(lambda: model(x).sum().backward())


def test_masks_are_those_of_each_alone():
    model, x = Projections(0.5), torch.randn(512, 1024, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    torch.manual_seed(3)
    together, state = model(x), torch.cuda.get_rng_state()
    share_inputs(model, ())
    torch.manual_seed(3)
    assert torch.equal(model(x), together) and torch.equal(torch.cuda.get_rng_state(), state)


def test_the_peak_is_one_dX_lower():
    case = replace(LAYERS, M=8192, K=4096)
    t = parity.inputs(case, CUDA)
    x, own = t["x"].requires_grad_(), parity.projections(case, t)
    dys = [torch.randn(case.M, part.weight.shape[0], device=CUDA, dtype=x.dtype) for part in own]
    peaks = []
    for run in (lambda: lora_linears(x, own), lambda: [part.alone(x) for part in own]):
        for _ in range(2):
            ys = list(run())
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(ys, x, dys)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert peaks[1] - peaks[0] >= case.M * case.K * 2, peaks

"""Layers that one weight packs, where a GPU is: bfloat16 at size, few tokens and many, overlapped launches, graphs, repeats."""

from dataclasses import replace

import pytest
import torch

from bench.timing import Step, graphed
from lora_kernels import PackedLoRALinear, Segments, lora_linear, parity, parity_cases
from lora_kernels.dispatch import device_arch
from lora_kernels.parity import Case, run_case
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
QKV = (1024, 256, 256)
LAYERS = Case(1000, sum(QKV), 2048, 16, torch.bfloat16, widths=QKV)
TENANTS = replace(LAYERS, adapters=13)
DECODE = replace(LAYERS, M=64, adapters=64, popularity="distinct")


def check(case: Case):
    result = run_case(case, CUDA)
    assert result.launches > 0 and result.ok, f"{result.name}: {result.detail} {result.errors}"


@pytest.mark.parametrize("R", [1, 3, 8, 15, 16, 17, 21, 33, 43, 64, 100, 128, 170])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rank_sweep(R, p):
    check(replace(LAYERS, R=R, p=p))
    check(replace(TENANTS, R=R, p=p, mixed_ranks=True))


@pytest.mark.parametrize("M", [1, 16, 33, 64, 200, 777, 8192])
@pytest.mark.parametrize("widths", [QKV, (1000, 8, 520), (1, 1, 1), (4096, 1024, 1024), (3584, 3584)])
def test_sizes(M, widths):
    for case in (LAYERS, TENANTS, replace(DECODE, popularity="mixed")):
        check(replace(case, M=M, N=sum(widths), widths=widths))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    for case in (LAYERS, TENANTS, DECODE):
        check(replace(case, dtype=dtype, p=0.1))


@pytest.mark.parametrize("how", ["", "stream", "pdl"])
def test_five_hundred_repeats_bit_for_bit(how):
    if how == "pdl" and not device_arch(torch.device("cuda", 0)).has_pdl:
        return
    expand = Expand(128, 256, 64, num_warps=8, num_stages=3, tma=device_arch(torch.device("cuda", 0)).has_tma, pdl=how == "pdl")
    case = replace(LAYERS, M=4096, config=Config(Shrink(32, 128), expand, Wgrad(beside=how)))
    check(case)
    tensors = parity.inputs(case, CUDA)
    first = parity.evaluate(case, tensors, "triton")
    for _ in range(500):
        for one, other in zip(first, parity.evaluate(case, tensors, "triton"), strict=True):
            assert torch.equal(one, other)


def test_a_thousand_decodes_bit_for_bit():
    t = parity.inputs(DECODE, CUDA)
    args = [t[name] for name in ("x", "weight", "lora_A", "lora_B")]
    s = Segments.from_ids(parity_cases.adapter_ids(DECODE).to(CUDA), 64)
    first = lora_linear(*args, segments=s, widths=QKV, impl="triton")
    for _ in range(1000):
        assert torch.equal(first, lora_linear(*args, segments=s, widths=QKV, impl="triton"))


def test_graph_replay_with_new_ids_and_adapters():
    layer = PackedLoRALinear(2048, QKV, num_adapters=8, r=16, init_lora_weights=False, device=CUDA, dtype=torch.bfloat16)
    x, ids = torch.randn(32, 2048, device=CUDA, dtype=torch.bfloat16), torch.randint(-1, 8, (32,), device=CUDA)

    def step():
        return layer(x, Segments.from_ids(ids, 8))

    with torch.no_grad():
        replay = graphed(Step(step)).forward
        for _ in range(5):
            ids.copy_(torch.randint(-1, 8, (32,), device=CUDA))
            layer.load_adapter(3, torch.randn(3, 16, 2048) * 0.02, torch.randn(sum(QKV), 16) * 0.1)
            y = replay()
            torch.cuda.synchronize()
            assert torch.equal(y, step())


def test_nothing_waits(without_waiting):
    layer = PackedLoRALinear(2048, QKV, num_adapters=8, r=[16, 4] * 4, init_lora_weights=False, device=CUDA, dtype=torch.bfloat16)
    x = torch.randn(300, 2048, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(-1, 8, (300,), device=CUDA)
    without_waiting(lambda: layer(x, Segments.from_ids(ids, 8)).sum().backward())

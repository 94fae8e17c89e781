"""Where a GPU is: bfloat16, large shapes, 64-bit offsets, graphs, streams, repeats. The parity cases of test_kernels run there too."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_gated import MLP

from bench.timing import Step, graphed
from lora_kernels import FusedLoRALinear, LoRAConfig, UnsupportedError, apply_lora, explain, launch, lora_linear, parity, recompute_gates
from lora_kernels.dispatch import device_arch
from lora_kernels.parity import Case, run_case
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
LAYER = Case(1000, 1024, 2048, 16, torch.bfloat16)


def check(case: Case):
    result = run_case(case, CUDA)
    assert result.launches > 0 and result.ok, f"{result.name}: {result.detail} {result.errors}"


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("R", [1, 2, 3, 7, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 65, 96, 128, 129, 200, 256, 300, 511, 512])
def test_rank_sweep(R, p):
    """Every rank in bfloat16: sm_90's hazard of register operands in pipelined wgmma (triton #9433) would show here."""
    check(replace(LAYER, R=R, p=p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M, N, K", [(1, 4096, 4096), (33, 1024, 4096), (512, 4096, 1024), (4096, 4096, 4096), (777, 1536, 8960)])
def test_layers(M, N, K, dtype):
    check(Case(M, N, K, 16, dtype, p=0.1))
    check(Case(M, N, K, 16, dtype))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("R", [1, 16, 100, 512])
@pytest.mark.parametrize("M, adapters", [(7, 0), (1000, 0), (60, 9), (1000, 9)])
def test_beside_a_base_that_is_given(M, adapters, R, p):
    check(replace(LAYER, M=M, R=R, p=p, base=True, adapters=adapters, mixed_ranks=bool(adapters)))


def test_float32_adapters_on_bfloat16():
    check(replace(LAYER, adapter_dtype=torch.float32, p=0.1))


@pytest.mark.parametrize("u, pdl", [("given", False), ("given", True), ("loop", False), ("awaited", False)])
def test_a_thousand_repeats_bit_for_bit(u, pdl):
    if pdl and not device_arch(torch.device("cuda", 0)).has_pdl:
        with pytest.raises(UnsupportedError, match="sm_90 and later"):
            parity.evaluate(replace(LAYER, config=Config(expand=Expand(pdl=True))), parity.inputs(LAYER, CUDA), "triton")
        return
    expand = Expand(128, 128, 64, u=u, persistent=True, pdl=pdl)
    case = replace(LAYER, M=600, p=0.1 if u == "given" else 0.0, config=Config(expand=expand, wgrad=Wgrad(block_j=32)))
    tensors = parity.inputs(case, CUDA)
    first = parity.evaluate(case, tensors, "triton")
    for _ in range(1000 if u == "awaited" or pdl else 100):
        for ours, again in zip(first, parity.evaluate(case, tensors, "triton"), strict=True):
            assert torch.equal(ours, again)


def overlapped(how: str, p: float, **expand) -> Config:
    if how == "pdl" and not device_arch(torch.device("cuda", 0)).has_pdl:
        how = "stream"  # refused by name: test_a_thousand_repeats_bit_for_bit
    expand = Expand(128, 128, 64, num_stages=3, pdl=how == "pdl", **expand)
    return Config(Shrink(32, 64, num_stages=2), expand, Wgrad(64, 32 if p else 64, split=3, num_stages=2, beside=how))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("how", ["stream", "pdl"])
@pytest.mark.parametrize("M, persistent", [(600, False), (8192, False), (8192, True)])
def test_gradients_beside_dX_a_thousand_times(how, p, M, persistent):
    """dA reads what shrink wrote and all end before what follows, in one wave of dX's tiles and in many, while memory changes hands."""
    config = overlapped(how, p, persistent=persistent)
    case = replace(LAYER, M=M, p=p, config=config)
    tensors = parity.inputs(case, CUDA)
    wanted = parity.evaluate(replace(case, config=replace(config, wgrad=replace(config.wgrad, beside=""))), tensors, "triton")
    for i in range(1000 if M == 600 else 200):
        found = parity.evaluate(case, tensors, "triton")
        torch.full((M * 1024 + i,), float("nan"), device=CUDA, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), i
    check(case)


def test_more_than_2_31_elements():
    """x of 4 GiB and more: rows past the 32-bit boundary must be the right ones."""
    K, N, M = 4096, 64, (1 << 31) // 4096 + 100
    x = torch.randn(1, K, device=CUDA, dtype=torch.bfloat16).repeat(M, 1)
    x[-1].mul_(2)
    W, A, B = (torch.randn(*s, device=CUDA, dtype=torch.bfloat16) * 0.02 for s in ((N, K), (8, K), (N, 8)))
    y = lora_linear(x, W, A, B, impl="triton")
    few = lora_linear(torch.cat((x[:1], x[-1:])), W, A, B, impl="reference").float()
    torch.testing.assert_close(torch.stack((y[0], y[-2], y[-1])).float(), few[[0, 0, 1]], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("impl", ["triton", "torch", "stream", "pdl"])
def test_cuda_graph_capture_and_replay(impl, p):
    config = overlapped(impl, p) if impl in ("stream", "pdl") else None
    impl = "triton" if config else impl
    t = parity.inputs(replace(LAYER, M=64), CUDA)
    args = [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    for i in (0, 2, 3):
        args[i] = args[i].requires_grad_()

    def step():
        y = lora_linear(*args, dropout_p=p, training=True, impl=impl, config=config)
        return [y, *torch.autograd.grad(y, [args[0], args[2], args[3]], t["dY"])]

    replay = graphed(Step(step)).forward
    first = [o.clone() for o in replay()]
    outs = replay()
    if p:
        assert not torch.equal(first[0], outs[0]), "each replay draws a new mask"
    else:
        with torch.no_grad():
            args[0].mul_(0.5)
        replay()
        torch.testing.assert_close(outs[0].float(), step()[0].float(), rtol=2e-2, atol=2e-2)


def test_nothing_waits_for_the_device(without_waiting):
    t = parity.inputs(LAYER, CUDA)
    args = [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    without_waiting(lambda: lora_linear(*args, dropout_p=0.1, training=True, impl="triton"))


@pytest.mark.parametrize("how", ["awaited", "stream", "pdl"])
def test_two_streams_at_once(how):
    config = Config(expand=Expand(128, 128, 64, u="awaited")) if how == "awaited" else overlapped(how, 0.0)
    case = replace(LAYER, config=config)
    tensors = parity.inputs(case, CUDA)
    wanted = parity.evaluate(case, tensors, "triton")
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(parity.evaluate(case, tensors, "triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for out in outs for a, b in zip(out, wanted, strict=True))


def test_autocast():
    layer, x = FusedLoRALinear(256, 128, r=8, init_lora_weights=False, device=CUDA), torch.randn(64, 256, device=CUDA, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
        assert y.dtype == F.linear(x, layer.weight).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("act", [torch.nn.SiLU, torch.nn.GELU])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_gate_that_is_made_again(p, act):
    """y and every gradient within the budget of float64, by the kernels for SiLU and by torch for GELU; and half of what was kept."""
    found, peaks = {}, {}
    for name, dtype, gates in (("truth", torch.float64, False), ("same", torch.bfloat16, False), ("ours", torch.bfloat16, True)):
        torch.manual_seed(0)
        mlp = MLP(act, K=1024, width=4096).to(CUDA, torch.bfloat16).to(dtype)
        model = torch.nn.ModuleDict({"mlp": mlp})
        apply_lora(model, LoRAConfig(target_modules="all-linear", r=16, lora_dropout=p, init_lora_weights=False))
        assert recompute_gates(model, gates) == (["mlp"] if gates else [])
        drawn = torch.Generator(CUDA).manual_seed(0)
        for q in filter(lambda q: q.requires_grad, model.parameters()):
            q.data = (torch.randn(q.shape, generator=drawn, device=CUDA) * 0.05).bfloat16().to(dtype)
        x, dy = torch.randn(2, 2, 700, 1024, generator=drawn, device=CUDA).bfloat16().to(dtype)
        torch.manual_seed(1)
        before, kernels = torch.cuda.memory_allocated(), launch.launches
        y = mlp(x.requires_grad_())
        peaks[name] = torch.cuda.memory_allocated() - before
        leaves = [x, *(q for q in model.parameters() if q.requires_grad)]
        found[name] = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        assert name != "ours" or launch.launches > kernels
    assert peaks["same"] - peaks["ours"] > 1.9 * 2 * 1400 * 4096
    for own, same, truth in zip(found["ours"], found["same"], found["truth"], strict=True):
        assert parity.budget_used(own, same, truth, torch.bfloat16, terms=4096) <= 1


def test_tf32_follows_torchs_switch():
    case = Case(256, 256, 1024, 16, torch.float32)
    tensors = parity.inputs(case, CUDA)
    truth = parity.evaluate(case, tensors, "reference", torch.float64)[0]
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            errors[setting] = parity.errors(parity.evaluate(case, tensors, "triton")[0], truth)[1]
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] * 20 < errors["high"]


def test_a_16_bit_layer_with_dropout_takes_the_kernels():
    t = parity.inputs(LAYER, CUDA)
    args = [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    choice = explain(*args, dropout_p=0.1, training=True)
    assert choice.arm == "triton" and choice.config is not None

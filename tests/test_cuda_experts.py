"""Where a GPU is: a stack of weights in bfloat16, at models' sizes, under graphs and repeats. The cases of test_experts run there too."""

from dataclasses import replace

import pytest
import torch
from experts_models import INDEX, WEIGHTS, Experts, X, adapted, results, truth
from test_experts_node import Swish, alone

from bench.timing import Step, graphed
from lora_kernels import Segments, explain, lora_linear, parity
from lora_kernels.parity import Case, budget_used, run_case

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
ROUTED = Case(1536, 768, 1024, 16, torch.bfloat16, adapters=24, experts=True, top_k=8)


def check(case: Case):
    result = run_case(case, CUDA)
    assert result.launches > 0 and result.ok, f"{result.name}: {result.detail} {result.errors}"


@pytest.mark.parametrize("R", [1, 7, 16, 17, 33, 64, 65, 128, 129, 512])
@pytest.mark.parametrize("M", [24, 1536, 6000])
def test_rank_sweep(R, M):
    check(replace(ROUTED, M=M, R=R))
    check(replace(ROUTED, M=M, R=R, mixed_ranks=True, p=0.1))


@pytest.mark.parametrize("popularity", ["mixed", "distinct", "runs", "one", "none"])
@pytest.mark.parametrize("M", [8, 64, 512, 4096])
def test_mixes(popularity, M):
    check(replace(ROUTED, M=M, popularity=popularity, p=0.1))


@pytest.mark.parametrize("E, k, N, K", [(128, 8, 1536, 2048), (128, 8, 2048, 768), (32, 4, 5760, 2880), (8, 2, 14336, 4096)])
@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_models(E, k, N, K, tokens):
    check(replace(ROUTED, M=tokens * k, N=N, K=K, adapters=E, top_k=k))


def routed(E=24, T=192, k=8, dtype=torch.bfloat16) -> tuple[list, torch.Tensor]:
    case = replace(ROUTED, M=T * k, top_k=k, adapters=E, dtype=dtype)
    t = parity.inputs(case, CUDA)
    return [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")], torch.rand(T, E, device=CUDA).topk(k).indices


def test_a_thousand_repeats_bit_for_bit():
    args, index = routed()
    for each in (args[0], *args[2:4]):
        each.requires_grad_()
    leaves = [args[0], *args[2:4]]

    def step():
        y = lora_linear(*args, segments=Segments.from_top_k(index, 24), dropout_p=0.1, training=True, seed=5, impl="triton")
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    first = step()
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_graph_replay_with_new_routing():
    """The plan is built inside the captured region, from whatever the router's buffer holds at replay."""
    args, index = routed()

    def step():
        return lora_linear(*args, segments=Segments.from_top_k(index, 24), impl="triton")

    with torch.no_grad():
        replay = graphed(Step(step)).forward
        for _ in range(5):
            index.copy_(torch.rand(192, 24, device=CUDA).topk(8).indices)
            y = replay()
            torch.cuda.synchronize()
            assert torch.equal(y, step())


@pytest.mark.parametrize("T", [192, 4000])
def test_nothing_waits_for_the_device(T, without_waiting):
    args, index = routed(T=T)
    leaves = [args[0].requires_grad_(), args[2].requires_grad_(), args[3].requires_grad_()]
    dY = torch.randn(T, 8, 768, device=CUDA, dtype=torch.bfloat16)

    def step():
        y = lora_linear(*args, segments=Segments.from_top_k(index, 24), dropout_p=0.1, training=True)
        torch.autograd.grad(y, leaves, dY)

    without_waiting(step)


def test_more_than_2_31_elements():
    """A stack of 4 GiB and more: the last expert's matrix must be its own."""
    E, N, K, r = 260, 2048, 4096, 8
    W = torch.randn(1, N, K, device=CUDA, dtype=torch.bfloat16).mul_(0.02).repeat(E, 1, 1)
    W[-1].mul_(2)
    assert W.numel() > 1 << 31
    x, A, B = (torch.randn(*s, device=CUDA, dtype=torch.bfloat16) * 0.1 for s in ((64, K), (E, r, K), (E, N, r)))
    index = torch.tensor([[0, E - 1]], device=CUDA).expand(64, 2)
    y = lora_linear(x, W, A, B, segments=Segments.from_top_k(index, E), impl="triton").float()
    for j, e in enumerate((0, E - 1)):
        wanted = lora_linear(x, W[e], A[e], B[e], impl="reference").float()
        torch.testing.assert_close(y[:, j], wanted, rtol=2e-2, atol=2e-2)


def test_the_kernels_are_taken_by_themselves():
    args, index = routed()
    choice = explain(*args, segments=Segments.from_top_k(index, 24))
    assert choice.arm == "triton" and choice.config.expand.tma is False, choice


@pytest.mark.parametrize("kind", [Swish, lambda: Swish(True, True), Experts], ids=["gated", "biases", "a gate without a kernel"])
def test_the_second_half_of_experts_as_one_node(kind, stacks, launched):
    """What is beside the products by kernels, too, within the budget of the same experts by single operators."""
    layer = adapted(kind, torch.bfloat16)
    x, weights = X.bfloat16(), WEIGHTS
    exact = truth(layer, x, INDEX, weights)
    operands, ours = [t.to(CUDA) for t in (x, INDEX, weights)], {}
    names = launched(lambda: ours.update(results(layer.to(CUDA), *operands)))
    assert [how for how, _ in stacks] == ["alone", "node"]
    beside = [name for name in names if name.startswith(("gate", "weighted"))]
    gates = [] if kind is Experts else ["gate_product", "gate_gradients"]
    assert beside == [*gates[:1], "weighted_rows", *gates]
    theirs = results(alone(layer), *operands)
    for name, wanted in exact.items():
        assert budget_used(ours[name].cpu(), theirs[name].cpu(), wanted) <= 1, name

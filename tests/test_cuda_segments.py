"""Where a GPU is: many adapters in bfloat16, at size, under graphs, streams and repeats. The cases of test_segments run there too."""

from dataclasses import replace

import pytest
import torch

from bench.timing import Step, graphed
from lora_kernels import AdapterPool, MultiLoRALinear, Segments, explain, lora_linear, parity, parity_cases, save_adapter
from lora_kernels.dispatch import device_arch
from lora_kernels.parity import Case, run_case
from lora_kernels.problem import describe
from lora_kernels.segments import Adapters
from lora_kernels.tuning import Arch, heuristic

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
MANY = Case(1000, 1024, 2048, 16, torch.bfloat16, adapters=13)
DECODE = Case(64, 1024, 2048, 16, torch.bfloat16, adapters=64, popularity="distinct")


def check(case: Case):
    result = run_case(case, CUDA)
    assert result.launches > 0 and result.ok, f"{result.name}: {result.detail} {result.errors}"


@pytest.mark.parametrize("popularity", ["mixed", "distinct", "runs", "one", "none"])
@pytest.mark.parametrize("M", [1, 16, 33, 64, 200, 777])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_mixes(popularity, M, p):
    check(replace(MANY, M=M, popularity=popularity, p=p))
    check(replace(MANY, M=M, popularity=popularity, p=p, R=128, mixed_ranks=True))


@pytest.mark.parametrize("R", [1, 7, 8, 12, 16, 17, 33, 64, 65, 100, 128, 129, 256, 511, 512])
@pytest.mark.parametrize("M", [64, 600])
def test_rank_sweep(R, M):
    check(replace(MANY, M=M, R=R))
    check(replace(MANY, M=M, R=R, mixed_ranks=True, p=0.1))


@pytest.mark.parametrize("N, K", [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)])
def test_decode_layers(N, K):
    check(replace(DECODE, N=N, K=K))
    check(replace(DECODE, N=N, K=K, M=16, adapters=5))


def test_four_thousand_adapters():
    case = replace(DECODE, M=300, N=256, K=512, adapters=4096, popularity="mixed")
    check(case)


def test_a_million_tokens():
    """The plan against torch, and y against single calls on a sample."""
    M, E, K, N, r = 1_000_000, 64, 256, 128, 8
    ids = torch.randint(-1, E, (M,), device=CUDA)
    s = Segments.from_ids(ids, E)
    assert torch.equal(s.starts.diff()[:E].long(), torch.bincount(ids[ids >= 0], minlength=E))
    x, W = torch.randn(M, K, device=CUDA, dtype=torch.bfloat16), torch.randn(N, K, device=CUDA, dtype=torch.bfloat16) * 0.05
    A, B = (torch.randn(*shape, device=CUDA, dtype=torch.bfloat16) * 0.1 for shape in ((E, r, K), (E, N, r)))
    y = lora_linear(x, W, A, B, segments=s, impl="triton")
    some = torch.randint(0, M, (500,), device=CUDA)
    few = lora_linear(x[some], W, A, B, segments=Segments.from_ids(ids[some], E), impl="reference")
    torch.testing.assert_close(y[some].float(), few.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("u, pdl", [("given", False), ("given", True), ("awaited", False)])
@pytest.mark.parametrize("case", [MANY, DECODE], ids=["train", "decode"])
def test_a_thousand_repeats_bit_for_bit(case, u, pdl):
    arch, E = device_arch(torch.device("cuda", 0)), case.adapters
    tensors = parity.inputs(case, CUDA)
    s = Segments.from_ids(parity_cases.adapter_ids(case).to(CUDA), E)
    problem = describe(tensors["x"], tensors["weight"], tensors["lora_A"], tensors["lora_B"], dropout=False, adapters=Adapters(s))
    config = heuristic(problem, arch)
    other = dict(split=1, each=False) if u == "awaited" else dict(pdl=pdl and arch.has_pdl)
    config = replace(config, expand=replace(config.expand, u=u, **other))
    args = [tensors[name] for name in ("x", "weight", "lora_A", "lora_B")]
    first = lora_linear(*args, segments=s, config=config)
    for _ in range(1000):
        assert torch.equal(first, lora_linear(*args, segments=s, config=config))


def test_graph_replay_with_new_ids_scales_and_ranks():
    """The plan is built inside the captured region, from whatever the buffers hold at replay."""
    t = parity.inputs(replace(DECODE, popularity="mixed"), CUDA)
    args = [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    ids, scale = torch.randint(-1, 64, (64,), device=CUDA), torch.ones(64, device=CUDA)
    ranks = torch.full((64,), 16, dtype=torch.int32, device=CUDA)

    def step():
        return lora_linear(*args, scale=scale, ranks=ranks, segments=Segments.from_ids(ids, 64), impl="triton")

    with torch.no_grad():
        replay = graphed(Step(step)).forward
    for _ in range(5):
        ids.copy_(torch.randint(-1, 64, (64,), device=CUDA))
        scale.uniform_(0.5, 2.0)
        ranks.copy_(torch.randint(1, 17, (64,), device=CUDA))
        y = replay()
        torch.cuda.synchronize()
        assert torch.equal(y, step())


def test_training_step_under_a_graph():
    layer = MultiLoRALinear(256, 128, num_adapters=8, r=8, init_lora_weights=False, device=CUDA, dtype=torch.bfloat16)
    x, ids = torch.randn(96, 256, device=CUDA, dtype=torch.bfloat16), torch.randint(-1, 8, (96,), device=CUDA)

    def step():
        y = layer(x, Segments.from_ids(ids, 8))
        return torch.autograd.grad(y.float().square().sum(), [layer.lora_A, layer.lora_B])

    replay = graphed(Step(step)).forward
    ids.copy_(torch.randint(-1, 8, (96,), device=CUDA))
    grads = replay()
    torch.cuda.synchronize()
    for ours, eager in zip(grads, step(), strict=True):
        assert torch.equal(ours, eager)


def test_nothing_waits_for_the_device(without_waiting):
    t = parity.inputs(MANY, CUDA)
    leaves = [t[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    ids = parity_cases.adapter_ids(MANY).to(CUDA)

    def step():
        s = Segments.from_ids(ids, 13)
        y = lora_linear(leaves[0], t["weight"], leaves[1], leaves[2], segments=s, dropout_p=0.1, training=True)
        torch.autograd.grad(y, leaves, t["dY"])

    without_waiting(step)


def test_segments_take_the_kernels_by_themselves():
    t = parity.inputs(MANY, CUDA)
    s = Segments.from_ids(parity_cases.adapter_ids(MANY).to(CUDA), 13)
    choice = explain(t["x"], t["weight"], t["lora_A"], t["lora_B"], segments=s)
    assert choice.arm == "triton" and isinstance(device_arch(torch.device("cuda", 0)), Arch)


def test_two_streams_at_once():
    tensors = parity.inputs(MANY, CUDA)
    wanted = parity.evaluate(MANY, tensors, "triton")
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(parity.evaluate(MANY, tensors, "triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for out in outs for a, b in zip(out, wanted, strict=True))


@pytest.mark.parametrize("pin_memory", [True, False])
def test_adapters_come_and_go_while_the_device_is_busy(pin_memory, tmp_path, without_waiting):
    """Three adapters by turns in two slots, each put there while the kernels of those before it have yet to run."""
    pytest.importorskip("safetensors", reason="adapter files are safetensors")
    layer = MultiLoRALinear(512, 768, num_adapters=3, r=16, init_lora_weights=False, device=CUDA, dtype=torch.bfloat16)
    model, whole = torch.nn.Sequential(MultiLoRALinear.from_linear(linear_of(layer), num_adapters=2, r=16)), torch.nn.Sequential(layer)
    pool, names = AdapterPool(model, pin_memory=pin_memory), ["a", "b", "c"]
    for i, name in enumerate(names):
        save_adapter(whole, tmp_path / name, slot=i)
        pool.add(name, tmp_path / name)
    parts = [t for adapter in pool._adapters.values() for own in adapter.values.values() for t in own.values()]
    assert len(parts) == 6 and all(t.is_pinned() == pin_memory for t in parts)
    x, found = torch.randn(2, 300, 512, device=CUDA, dtype=torch.bfloat16), []
    turns = [[names[i % 3], names[(i + 1) % 3]] for i in range(12)]

    def step():
        found.clear()
        torch.cuda._sleep(20_000_000)
        for turn in turns:
            with torch.no_grad(), pool.use(turn):
                found.append(model(x))

    without_waiting(step) if pin_memory else step()
    for turn, y in zip(turns, found, strict=True):
        for name, slot in zip(turn, pool.slots(turn), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(model[0].adapter(slot), layer.adapter(names.index(name)), strict=True))
        torch.cuda.synchronize()
        with torch.no_grad(), pool.use(turn):
            assert torch.equal(y, model(x)), turn


def linear_of(layer: MultiLoRALinear) -> torch.nn.Linear:
    linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear

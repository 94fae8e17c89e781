"""A stack of weights, one for each expert: each row through its expert's weight and adapter, nothing sorted, repeated or copied."""

import warnings
from dataclasses import replace

import pytest
import torch
from test_memory import Kept, mask_bytes
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Segments, UnsupportedError, explain, lora_linear, ops, parity, parity_cases
from lora_kernels.parity import Case, run_case
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad, heuristic, why_not

E, M, N, K, R = 4, 21, 37, 50, 5
CASE = Case(M, N, K, R, adapters=E, experts=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = ("triton", "torch")


def operands(case: Case = CASE, *trained: str) -> dict:
    tensors = parity.inputs(case, DEVICE)
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    return {name: None if tensors[name] is None else tensors[name].requires_grad_(name in trained) for name in names}


def plan(case: Case = CASE) -> Segments:
    return replace(Segments.from_ids(parity_cases.adapter_ids(case).to(DEVICE), case.adapters), top_k=case.top_k)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("R", [1, 3, 16, 17, 65, 512])
def test_ranks(impl, R):
    result = run_case(replace(CASE, M=11, N=20, K=24, R=R, p=0.2, mixed_ranks=True, impl=impl), DEVICE)
    assert result.ok and (result.launches > 0) == (impl == "triton"), result


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 40, 33), (16, 16, 16), (65, 129, 3), (150, 7, 70)])
def test_sizes(impl, M, N, K):
    result = run_case(replace(CASE, M=M, N=N, K=K, R=3, p=0.1, impl=impl), DEVICE)
    assert result.ok and (result.launches > 0) == (impl == "triton"), result


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(impl, layout):
    result = run_case(replace(CASE, M=9, N=19, K=33, R=3, p=0.1, layout=layout, impl=impl), DEVICE)
    assert result.ok and (result.launches > 0) == (impl == "triton"), result


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("top_k", [2, 3, 8])
@pytest.mark.parametrize("popularity", ["mixed", "distinct", "one", "none"])
def test_experts_of_a_token(impl, top_k, popularity):
    result = run_case(replace(CASE, M=6 * top_k, top_k=top_k, p=0.1, popularity=popularity, bias=False, impl=impl), DEVICE)
    assert result.ok and (result.launches > 0) == (impl == "triton"), result


@pytest.mark.parametrize("N, K", [(16, 3072), (3072, 16)])
def test_long_sums_stay_in_float32(N, K):
    """Forward's over K, dX's over N: rounded to float16 from block to block they would pass the budget on a short axis."""
    result = run_case(replace(CASE, M=16, N=N, K=K, R=4, dtype=torch.float16, adapters=2), DEVICE)
    assert result.ok and result.launches > 0, result


@pytest.mark.parametrize("blocks", [16, 32, 64, 128])
def test_tiles_of_every_size(blocks):
    """As many rows a tile as the plan's gathered tiles, and fewer, and more, than an expert has."""
    config = Config(Shrink(blocks, 32, split=2), Expand(blocks, 32, 32, group_m=2, num_stages=2), Wgrad(64, 32, split=2))
    result = run_case(replace(CASE, M=103, R=20, p=0.1, mixed_ranks=True, config=config), DEVICE)
    assert result.ok and result.launches > 0, result


def test_a_named_config_serves_backward_where_x_needs_no_gradient():
    """As in a model's first layer; the configuration's tiles are those of experts, in both passes."""
    case = replace(CASE, M=20, config=Config(Shrink(16, 16), Expand(16, 16, 16), Wgrad(16, 16, split=2)))
    assert plan(case).row_block != 16
    grads = []
    for impl, config in (("triton", case.config), ("torch", None)):
        t = operands(case, "lora_A", "lora_B")
        lora_linear(*t.values(), segments=plan(case), config=config, impl=impl).square().sum().backward()
        grads.append([t["lora_A"].grad, t["lora_B"].grad])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ARMS)
def test_routing_by_top_k(impl):
    """The plan that `from_top_k` makes: each token's k answers beside one another, in the order of its experts."""
    t = operands()
    index = torch.stack([torch.randperm(E)[:3] for _ in range(M)]).to(DEVICE)
    y = lora_linear(*t.values(), segments=Segments.from_top_k(index, E).to(DEVICE), scale=0.5, impl=impl)
    assert y.shape == (M, 3, N) and y.is_contiguous()
    for j in range(3):
        alone = lora_linear(*t.values(), segments=Segments.from_ids(index[:, j], E), scale=0.5, impl="reference")
        torch.testing.assert_close(y[:, j], alone, rtol=1e-4, atol=1e-4)
    folded = lora_linear(t["x"].view(3, 7, K), *list(t.values())[1:], segments=Segments.from_top_k(index, E), scale=0.5, impl=impl)
    assert torch.equal(folded, y.view(3, 7, 3, N))


@pytest.mark.parametrize("impl", ARMS)
def test_rows_without_an_expert_are_zero(impl):
    """Whatever the others hold: an expert full of NaN and Inf reaches its own rows alone, and nothing comes back through the others'."""
    t = operands(CASE, "x", "lora_A", "lora_B")
    ids = torch.arange(M, device=DEVICE) % (E + 1) - 1
    with torch.no_grad():
        t["weight"][2], t["lora_A"][2], t["lora_B"][2] = float("nan"), float("inf"), float("nan")
    y = lora_linear(*t.values(), segments=Segments.from_ids(ids, E), impl=impl)
    assert not y[ids == -1].any() and y[ids == 2].isnan().all() and y[(ids != 2)].isfinite().all()
    y.nan_to_num().sum().backward()
    x, A, B = (t[name].grad for name in ("x", "lora_A", "lora_B"))
    assert not x[ids == -1].any() and x[ids != 2].isfinite().all()
    assert A[[0, 1, 3]].isfinite().all() and B[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ARMS)
def test_one_scale_for_all(impl):
    """A number, which both shrinks apply, not a tensor with one for each expert."""
    t, segments, dY = operands(CASE, "x", "lora_A", "lora_B"), plan(), torch.randn(M, N, device=DEVICE)
    names = ("x", "lora_A", "lora_B")
    ours = torch.autograd.grad(lora_linear(*t.values(), scale=0.25, segments=segments, impl=impl), [t[name] for name in names], dY)
    double = {name: v.detach().double().requires_grad_(name in names) for name, v in t.items()}
    y = lora_linear(*double.values(), scale=0.25, segments=segments, impl="reference")
    for mine, truth in zip(ours, torch.autograd.grad(y, [double[name] for name in names], dY.double()), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ARMS)
def test_what_lies_beyond_an_experts_rank_is_not_read(impl):
    """Neither forward nor backward, where it may be NaN; its gradient is 0."""
    t, segments, ranks = operands(), plan(), torch.tensor([5, 2, 0, 3], dtype=torch.int32, device=DEVICE)
    wanted = lora_linear(*t.values(), segments=segments, ranks=ranks, impl=impl)
    for e, rank in enumerate(ranks.tolist()):
        t["lora_A"][e, rank:], t["lora_B"][e, :, rank:] = float("nan"), float("inf")
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    y = lora_linear(*t.values(), segments=segments, ranks=ranks, impl=impl)
    assert torch.equal(y, wanted)
    y.sum().backward()
    assert t["x"].grad.isfinite().all()
    for e, rank in enumerate(ranks.tolist()):
        assert not t["lora_A"].grad[e, rank:].any() and not t["lora_B"].grad[e, :, rank:].any()


@pytest.mark.parametrize("impl", ARMS)
def test_an_absent_experts_gradient_is_zero(impl):
    t = operands(CASE, "lora_A", "lora_B")
    lora_linear(*t.values(), segments=Segments.from_ids(torch.ones(M, dtype=torch.int32, device=DEVICE), E), impl=impl).sum().backward()
    for name in ("lora_A", "lora_B"):
        assert t[name].grad[1].any() and not t[name].grad[[0, 2, 3]].any()


def test_batch_invariant():
    """A row's answer does not depend on the rows beside it, as long as the tiles are of one size."""
    t = operands(replace(CASE, dtype=torch.float16))
    ids = parity_cases.adapter_ids(CASE).to(DEVICE)
    whole = lora_linear(*t.values(), segments=Segments.from_ids(ids, E, gather_block=16), impl="triton")
    for rows in (slice(0, 1), slice(3, 11), torch.tensor([20, 4, 7])):
        part = Segments.from_ids(ids[rows], E, gather_block=16)
        assert torch.equal(lora_linear(t["x"][rows], *list(t.values())[1:], segments=part, impl="triton"), whole[rows])


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("trained", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_A", "lora_B")])
def test_each_gradient_alone(impl, trained):
    """Those that are wanted, the same as beside all others, and no other."""
    names, segments = ("x", "lora_A", "lora_B"), plan()
    everything, dY = operands(CASE, *names), torch.randn(M, N, device=DEVICE)
    y = lora_linear(*everything.values(), segments=segments, impl=impl)
    wanted = dict(zip(names, torch.autograd.grad(y, [everything[name] for name in names], dY), strict=True))
    t = operands(CASE, *trained)
    lora_linear(*t.values(), segments=segments, impl=impl).backward(dY)
    assert {name for name in names if t[name].grad is not None} == set(trained)
    for name in trained:
        assert torch.equal(t[name].grad, wanted[name])


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_kept(impl, p):
    """x once, however many experts a token has, and u; neither rows in another order nor a part of a stack."""
    case = replace(CASE, M=24, top_k=3)
    t, segments = operands(case, "x", "lora_A", "lora_B"), plan(case)
    with Kept() as kept:
        lora_linear(*t.values(), dropout_p=p, training=True, segments=segments, impl=impl)
    assert kept.bytes(besides=(*t.values(), *segments.tensors())) == 4 * 24 * R + mask_bytes(p, 24, K, impl)


def test_launches(launched):
    """shrink and experts forward; shrink, experts and two wgrads backward: no sorting, no gathering, no product of the library."""
    t = operands(CASE, "x", "lora_A", "lora_B")
    seen = launched(lambda: lora_linear(*t.values(), segments=plan(), impl="triton").sum().backward())
    assert seen == ["shrink", "experts", "shrink", "experts", "wgrad", "wgrad"]


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("sizes", [(0, N, K, 1), (M, N, 0, 1), (M, 0, K, 1), (6, N, 0, 2)])
def test_empty(impl, sizes):
    """No tokens, no outputs, or no inputs: then each expert's bias, and 0 where there is none."""
    tokens, outputs, inputs, k = sizes
    x, weight = torch.randn(tokens, inputs, device=DEVICE, requires_grad=True), torch.randn(E, outputs, inputs, device=DEVICE)
    A, B = torch.randn(E, R, inputs, device=DEVICE, requires_grad=True), torch.randn(E, outputs, R, device=DEVICE, requires_grad=True)
    bias, index = torch.randn(E, outputs, device=DEVICE), torch.randint(0, E + 1, (tokens, k), device=DEVICE)
    y = lora_linear(x, weight, A, B, bias, segments=Segments.from_top_k(index, E), impl=impl)
    padded = torch.cat([bias, bias.new_zeros(1, outputs)])
    assert torch.equal(y, padded[index.squeeze(1) if k == 1 else index] if not inputs else y.new_zeros(y.shape))
    y.sum().backward()
    assert x.grad.shape == x.shape and not A.grad.any() and not B.grad.any()


REFUSED = {
    "no segments": (dict(segments=None, lora_A=torch.zeros(R, K), lora_B=torch.zeros(N, R)), ValueError, "needs segments"),
    "other experts": (dict(weight=torch.zeros(E + 1, N, K)), ValueError, "one for each adapter"),
    "other features": (dict(weight=torch.zeros(E, N, K + 1)), ValueError, "x: wanted shape"),
    "one bias": (dict(bias=torch.zeros(N)), ValueError, "bias: wanted shape"),
    "trained bias": (dict(bias=torch.zeros(E, N, requires_grad=True)), UnsupportedError, "bias: wanted a frozen one"),
    "trained weight": (dict(weight=torch.zeros(E, N, K, requires_grad=True)), ValueError, "weight: wanted a frozen"),
    "k rows beside one weight": (dict(weight=torch.zeros(N, K), segments="top"), ValueError, "a plan of one row a token"),
    "k rows beside base": (dict(weight=None, bias=None, base=torch.zeros(M, N), segments="top"), ValueError, "a plan of one row a token"),
    "another number of rows": (dict(segments="fewer"), ValueError, "segments: wanted 2 ids for each"),
    "lora_bias": (dict(lora_bias=torch.zeros(N)), UnsupportedError, "lora_bias: wanted None with segments"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    changed, error, words = REFUSED[what]
    t = {**operands(), "segments": plan()} | changed
    index = torch.zeros(M if t["segments"] == "top" else M - 1, 2, dtype=torch.int64, device=DEVICE)
    if isinstance(t["segments"], str):
        t["segments"] = Segments.from_top_k(index, E)
    t = {name: v.to(DEVICE).detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for name, v in t.items()}
    for call in (lora_linear, explain):
        with pytest.raises(error, match=words):
            call(**t)


@pytest.mark.parametrize("index", [None, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64), [[0]]])
def test_top_k_index_refused(index):
    with pytest.raises(ValueError, match="top_k_index: wanted a tensor"):
        Segments.from_top_k(index, E)


def test_an_index_of_another_dtype_is_named():
    with pytest.raises(TypeError, match="top_k_index: wanted int32 or int64, got torch.uint8"):
        Segments.from_top_k(torch.zeros(2, 2, dtype=torch.uint8), E)


def test_tiles_fit_the_rows_of_an_expert():
    blocks = [Segments.from_top_k(torch.zeros(tokens, 2, dtype=torch.int64), 8).gather_block for tokens in (1, 64, 100, 256, 9000)]
    assert blocks == [16, 32, 64, 128, 128]


def test_every_heuristic_is_valid():
    for name in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"):
        for dtype in (torch.bfloat16, torch.float32):
            for block in (16, 32, 64, 128):
                for dropout in ("", "x"):
                    p = Problem(4096, 768, 2048, 96, dtype, dropout, adapters=64, row_block=128, gather_block=block, experts=True)
                    for each in (p, p.backward()):
                        config = heuristic(each, Arch.parse(name))
                        assert why_not(config, each, Arch.parse(name)) is None, (name, each)


@pytest.mark.parametrize(
    "part, changed, words",
    [("expand", dict(block_m=32), "gather_block"), ("shrink", dict(block_m=64), "gather_block"), ("expand", dict(tma=True), "no tma"),
     ("expand", dict(masked=True), "no masked"), ("expand", dict(pdl=True), "no pdl"), ("expand", dict(split=2), "no split"),
     ("expand", dict(base="library"), "no base"), ("expand", dict(u="awaited"), "no u"), ("wgrad", dict(beside="stream"), "wgrad.beside")],
)  # fmt: skip
def test_configurations_refused(part, changed, words):
    p = Problem(64, 64, 64, 16, torch.float16, adapters=4, row_block=16, gather_block=16, experts=True)
    config = Config(Shrink(16), Expand(16), Wgrad())
    assert why_not(config, p, Arch.parse("sm_90")) is None
    config = replace(config, **{part: replace(getattr(config, part), **changed)})
    assert words in why_not(config, p, Arch.parse("sm_90"))


def test_explain():
    t = operands()
    choice = explain(*t.values(), segments=plan(), impl="triton")
    assert choice.arm == "triton" and choice.config.expand.block_m == plan().gather_block


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_opcheck(impl, top_k):
    case = replace(CASE, M=6, N=10, K=12, R=4, top_k=top_k)
    t, many = parity.inputs(case, DEVICE), parity.many(case, DEVICE)
    s, seed, u = many["segments"], torch.tensor(3, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    x, rest = t["x"], (t["weight"], t["lora_A"], t["lora_B"])
    flat = (many["scale"], None, s.tensors(), s.geometry())
    for each in (x, x.view(3, -1, 12)):
        torch.library.opcheck(ops.forward_op, (each, *rest, t["bias"], seed, *flat, 0.5, 0.3, True, impl, "", None))
    dY = t["dY"].view(-1, top_k, 10) if top_k > 1 else t["dY"]
    needs = (True, True, True, False)
    torch.library.opcheck(ops.backward_op, (dY, x, *rest, u, seed, *flat, 0.5, 0.3, *needs, torch.float32, impl, ""))


def test_compiles_without_a_break():
    t = operands(CASE, "x", "lora_A", "lora_B")
    index = torch.randint(0, E, (M, 2), device=DEVICE)

    def call(x, index):
        y = lora_linear(x, t["weight"], t["lora_A"], t["lora_B"], t["bias"], segments=Segments.from_top_k(index, E), scale=0.5)
        return y.sum(1)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        y = compiled(t["x"], index)
    torch.testing.assert_close(y, call(t["x"], index))
    dY = torch.randn_like(y)
    names = ("x", "lora_A", "lora_B")
    ours = torch.autograd.grad(y, [t[name] for name in names], dY)
    eager = torch.autograd.grad(call(t["x"], index), [t[name] for name in names], dY)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiler_guards_ranges_of_tokens():
    graphs: list = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = torch.compile(lambda index: Segments.from_top_k(index, E).tile_adapter, fullgraph=True, backend=count)
        for tokens in (100, *range(101, 120)):
            index = torch.randint(0, E, (tokens, 4), device=DEVICE)
            assert torch.equal(plan(index), Segments.from_top_k(index, E).tile_adapter)
    assert len(graphs) == 2, "one for the first number, one for the others"


def test_flops():
    """A product of M rows with one weight each, and the adapter's two."""
    t, index = operands(CASE, "x", "lora_A", "lora_B"), torch.randint(0, E, (M, 2), device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(*t.values(), segments=Segments.from_top_k(index, E))
        assert counter.get_total_flops() == 2 * 2 * M * (N * K + R * (N + K))
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * M * (2 * N * K + 3 * R * (N + K))


@pytest.mark.parametrize("impl", ARMS)
def test_float32_adapters_beside_sixteen_bits(impl):
    result = run_case(replace(CASE, dtype=torch.float16, adapter_dtype=torch.float32, impl=impl), DEVICE)
    assert result.ok, result


def test_the_same_twice():
    t, segments = operands(CASE, "x", "lora_A", "lora_B"), plan()
    runs = []
    for _ in range(3):
        y = lora_linear(*t.values(), segments=segments, dropout_p=0.1, training=True, seed=7, impl="triton")
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), [t[name] for name in ("x", "lora_A", "lora_B")])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))

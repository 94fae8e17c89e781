"""MultiLoRALinear: one base and a stack of adapters, served in any mix, swapped, saved and loaded in place."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import FusedLoRALinear, MultiLoRALinear, Segments, UnsupportedError, lora_linear, multi, reference

K, N, E, R = 20, 12, 5, 4
MIXED = [2, 4, 1, 4, 3]
IDS = [3, 0, -1, 2, 0, 4, 3, -1, 0, 2]  # 1 is absent
RANKS = pytest.mark.parametrize("r", [R, MIXED], ids=["equal", "mixed"])


def plan(ids=IDS, adapters=E, **kwargs) -> Segments:
    return Segments.from_ids(torch.tensor(ids), adapters, **kwargs)


def trained(r=R, **kwargs) -> MultiLoRALinear:
    return MultiLoRALinear(K, N, num_adapters=E, r=r, init_lora_weights=False, **kwargs)


def alone(layer: MultiLoRALinear, i: int) -> FusedLoRALinear:
    """Adapter i in a layer of its own, over the same base."""
    base = nn.Linear(K, N, layer.bias is not None, dtype=layer.weight.dtype)
    base.load_state_dict({name: t for name, t in layer.state_dict().items() if name in ("weight", "bias")})
    A, B = layer.adapter(i)
    single = FusedLoRALinear.from_linear(base, r=A.shape[0], adapter_dtype=layer.lora_A.dtype).train(layer.training)
    with torch.no_grad():
        single.lora_A.copy_(A)
        single.lora_B.copy_(B)
    single.scaling = layer.scaling[i].item()
    return single


def through(layer: MultiLoRALinear, x: torch.Tensor, ids=IDS) -> torch.Tensor:
    """The output by a layer for each adapter."""
    out = F.linear(x, layer.weight, layer.bias)
    for i in set(ids) - {-1}:
        at = torch.tensor([e == i for e in ids])
        out = out.index_put((at,), alone(layer, i)(x[at]))
    return out


@RANKS
@pytest.mark.parametrize("bias", [True, False])
def test_each_token_goes_through_its_own_adapter(r, bias):
    layer, x = trained(r, bias=bias, lora_alpha=[4, 8, 16, 12, 2]), torch.randn(len(IDS), K)
    torch.testing.assert_close(layer(x, plan()), through(layer, x))
    torch.testing.assert_close(layer(x.view(2, 5, K), plan()), through(layer, x).view(2, 5, N))
    assert torch.equal(layer(x, plan([-1] * 10)), F.linear(x, layer.weight, layer.bias)), "the base alone"


@RANKS
def test_the_kernels_compute_the_same(r, device):
    layer, x = trained(r).to(device), torch.randn(len(IDS), K, device=device)
    s, ranks = plan().to(device), layer.ranks if r is MIXED else None
    stacks = (layer.lora_A, layer.lora_B)
    kernels = lora_linear(x, layer.weight, *stacks, layer.bias, scale=layer.scaling, segments=s, ranks=ranks, impl="triton")
    torch.testing.assert_close(layer(x, s), kernels, rtol=1e-5, atol=1e-5)


def test_one_adapter_starts_like_fused_lora_linear():
    torch.manual_seed(3)
    single = FusedLoRALinear(K, N, r=8)
    torch.manual_seed(3)
    layer = MultiLoRALinear(K, N, num_adapters=1, r=8)
    for name in ("weight", "bias", "lora_A", "lora_B"):
        assert torch.equal(getattr(layer, name).view_as(getattr(single, name)), getattr(single, name)), name
    assert layer.scaling.tolist() == [single.scaling]
    x = torch.randn(3, K)
    assert torch.equal(layer(x, plan([0, 0, 0], 1)), F.linear(x, layer.weight, layer.bias)), "B is zero, so training starts from the base"


def test_tables():
    layer = MultiLoRALinear(K, N, num_adapters=3, r=[1, 4, 9], lora_alpha=6, use_rslora=True)
    assert layer.ranks.tolist() == [1, 4, 9] and layer.ranks.dtype == torch.int32 and layer.r == 9
    assert layer.scaling.tolist() == [6, 3, 2] and layer.scaling.dtype == torch.float32
    assert MultiLoRALinear(K, N, num_adapters=2, r=4, lora_alpha=[4, 16]).scaling.tolist() == [1, 4]
    assert layer.lora_A.shape == (3, 9, K) and layer.lora_B.shape == (3, N, 9)
    assert not layer.lora_A[0, 1:].any() and layer.lora_A[0, :1].all() and layer.lora_A[2].all()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_scaling_may_be_set_between_calls():
    layer, x = trained(), torch.randn(len(IDS), K)
    layer.scaling[3] = 0.0
    torch.testing.assert_close(layer(x, plan()), through(layer, x))
    assert torch.equal(layer(x[:1], plan([3])), F.linear(x[:1], layer.weight, layer.bias))


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(K, N).eval()
    layer = MultiLoRALinear.from_linear(linear, num_adapters=2, r=[3, 1], lora_alpha=[3, 5])
    assert layer.weight is linear.weight and layer.bias is linear.bias and not linear.weight.requires_grad and not layer.training
    assert layer.ranks.tolist() == [3, 1] and layer.scaling.tolist() == [1, 5]
    without = MultiLoRALinear.from_linear(nn.Linear(K, N, bias=False), num_adapters=2)
    assert without.bias is None and "bias=False" in repr(without)


def test_an_nn_linear_checkpoint_loads_with_only_the_adapters_missing():
    linear, layer = nn.Linear(K, N), trained(MIXED)
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B", "scaling", "ranks"] and result.unexpected_keys == []
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias) and layer.ranks.tolist() == MIXED


@RANKS
def test_a_poisoned_slot_that_nobody_takes_leaves_no_trace(r):
    clean, x = trained(r), torch.randn(len(IDS), K, requires_grad=True)
    dirty = copy.deepcopy(clean)
    with torch.no_grad():
        dirty.lora_A[1], dirty.lora_B[1], dirty.scaling[1] = math.nan, math.nan, math.nan
    results = []
    for layer in (clean, dirty):
        y = layer(x, plan())
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted) and ours.isfinite().all()


def test_beyond_an_adapters_rank_nothing_is_read():
    clean, x = trained(MIXED), torch.randn(len(IDS), K)
    dirty = copy.deepcopy(clean)
    with torch.no_grad():
        dirty.lora_A[0, 2:], dirty.lora_B[0, :, 2:] = math.nan, math.nan
    assert torch.equal(clean(x, plan()), dirty(x, plan()))
    dirty(x, plan()).sum().backward()
    assert not dirty.lora_A.grad[0, 2:].any() and not dirty.lora_B.grad[0, :, 2:].any() and dirty.lora_A.grad[0, :2].all()


def given_ranks(layer, monkeypatch):
    """The ranks that a forward pass hands to lora_linear."""
    calls = []
    with monkeypatch.context() as m:
        m.setattr(multi, "lora_linear", lambda *args, **kwargs: calls.append(kwargs["ranks"]))
        layer(torch.randn(len(IDS), K), plan())
    return calls[0]


def test_ranks_are_given_while_any_is_less_than_the_stacks(monkeypatch):
    layer = trained()
    assert given_ranks(layer, monkeypatch) is None
    layer.load_adapter(2, torch.randn(1, K), torch.randn(N, 1))
    assert given_ranks(layer, monkeypatch) is layer.ranks
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert given_ranks(other, monkeypatch) is other.ranks
    other = trained()
    other.load_state_dict(layer.state_dict())
    assert given_ranks(other, monkeypatch) is other.ranks and other.ranks.tolist() == [4, 4, 1, 4, 4]
    layer.reset_adapter(2)
    assert given_ranks(layer, monkeypatch) is None
    other.load_state_dict(layer.state_dict(), assign=True)
    assert given_ranks(other, monkeypatch) is None


@pytest.mark.parametrize("rank", range(1, R + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_load_adapter(rank, dtype):
    layer, x = trained(), torch.randn(len(IDS), K)
    before, pointers = copy.deepcopy(layer.state_dict()), [t.data_ptr() for t in layer.state_dict().values()]
    A, B = torch.randn(rank, K, dtype=dtype), torch.randn(N, rank, dtype=dtype)
    layer.load_adapter(2, A, B)
    assert [t.data_ptr() for t in layer.state_dict().values()] == pointers, "in place"
    assert torch.equal(layer.adapter(2)[0], A.float()) and torch.equal(layer.adapter(2)[1], B.float())
    assert not layer.lora_A[2, rank:].any() and not layer.lora_B[2, :, rank:].any()
    assert layer.ranks.tolist() == [R, R, rank, R, R] and layer.scaling[2].item() == pytest.approx(16 / rank)
    others = [0, 1, 3, 4]
    for name in ("lora_A", "lora_B", "scaling"):
        assert torch.equal(layer.state_dict()[name][others], before[name][others]), name
    torch.testing.assert_close(layer(x, plan()), through(layer, x))
    layer.load_adapter(2, A, B, scale=0.25)
    assert layer.scaling[2].item() == 0.25


def test_load_adapter_from_the_stacks_themselves():
    layer = trained()
    layer.load_adapter(1, *layer.adapter(3))
    assert torch.equal(layer.lora_A[1], layer.lora_A[3]) and torch.equal(layer.lora_B[1], layer.lora_B[3])
    A, B = (t.clone() for t in layer.adapter(0))
    layer.load_adapter(0, layer.lora_A[0, 1:], layer.lora_B[0, :, 1:])
    assert torch.equal(layer.adapter(0)[0], A[1:]) and torch.equal(layer.adapter(0)[1], B[:, 1:]), "source and slot overlap"


@pytest.mark.parametrize(
    "i, A, B, scale, error, match",
    [
        (E, (R, K), (N, R), None, IndexError, "i: wanted an adapter from 0 to 4, got 5"),
        (-1, (R, K), (N, R), None, IndexError, "i: wanted an adapter from 0 to 4, got -1"),
        (True, (R, K), (N, R), None, TypeError, "i: wanted an adapter's number, an int, got bool"),
        (0, (R, K + 1), (N, R), None, ValueError, r"A: wanted shape \[r, 20\], got \[4, 21\]"),
        (0, (K,), (N, R), None, ValueError, r"A: wanted shape \[r, 20\], got \[20\]"),
        (0, (R + 1, K), (N, R + 1), None, ValueError, "A: wanted a rank from 1 to the stack's 4, got 5"),
        (0, (0, K), (N, 0), None, ValueError, "A: wanted a rank from 1 to the stack's 4, got 0"),
        (0, (R, K), (N, R - 1), None, ValueError, r"B: wanted shape \[12, 4\] to match A \[4, 20\], got \[12, 3\]"),
        (0, (R, K), (R, N), None, ValueError, r"B: wanted shape \[12, 4\]"),
        (0, [[1.0]], (N, R), None, TypeError, r"A: wanted a tensor \[r, 20\], got list"),
        (0, (R, K), torch.ones(N, R, dtype=torch.int32), None, TypeError, "B: wanted float16, .* or float64, got torch.int32"),
        (0, (R, K), torch.ones(N, R).to_sparse(), None, UnsupportedError, "B: wanted a dense tensor"),
        (0, (R, K), torch.ones(N, R, device="meta"), None, NotImplementedError, "meta"),
        (0, (R, K), (N, R), "2", TypeError, "scale: wanted a float or None, got '2'"),
        (0, (R, K), (N, R), True, TypeError, "scale: wanted a float or None, got True"),
        (0, (R, K), (N, R), math.inf, ValueError, "scale: wanted a finite number, got inf"),
    ],
)
def test_load_adapter_refuses_and_changes_nothing(i, A, B, scale, error, match):
    layer = trained(MIXED)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=match):
        layer.load_adapter(i, *(torch.ones(t) if isinstance(t, tuple) else t for t in (A, B)), scale)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.adapter(0)[0].shape[0] == MIXED[0]


def test_reset_adapter():
    layer = MultiLoRALinear(K, N, num_adapters=3, r=[2, 4, 1], lora_alpha=8)
    before = copy.deepcopy(layer.state_dict())
    layer.load_adapter(0, torch.randn(4, K), torch.randn(N, 4), scale=9.0)
    layer.reset_adapter(0)
    after = layer.state_dict()
    assert layer.ranks.tolist() == [2, 4, 1] and layer.scaling.tolist() == [4, 2, 8]
    assert not after["lora_B"][0].any() and not after["lora_A"][0, 2:].any() and after["lora_A"][0, :2].all()
    assert after["lora_A"][0].abs().max() <= 1 / math.sqrt(K) and not torch.equal(after["lora_A"][0], before["lora_A"][0])
    assert torch.equal(after["lora_A"][1:], before["lora_A"][1:])
    layer.reset_adapter(0, init_lora_weights=False)
    assert layer.lora_B[0, :, :2].all() and not layer.lora_B[0, :, 2:].any()


def test_one_adapter_travels_alone():
    layer, other, x = trained(MIXED), trained(), torch.randn(3, K)
    other.load_state_dict({name: t for name, t in layer.state_dict().items() if name in ("weight", "bias")}, strict=False)
    layer.scaling[4] = 0.3
    saved = layer.adapter_state_dict(4)
    assert saved["lora_A"].shape == (3, K) and saved["lora_B"].shape == (N, 3) and saved["lora_B"].is_contiguous()
    assert saved["scaling"] == pytest.approx(0.3) and saved["lora_A"].data_ptr() != layer.lora_A[4].data_ptr()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    other.load_adapter_state_dict(1, torch.load(buffer, weights_only=True))
    assert other.ranks.tolist() == [4, 3, 4, 4, 4] and other.scaling[1] == layer.scaling[4]
    assert torch.equal(other(x, plan([1, 1, 1])), layer(x, plan([4, 4, 4])))
    for wrong in ({"lora_A": saved["lora_A"]}, {**saved, "alpha": 1.0}, [saved]):
        with pytest.raises(ValueError, match="state_dict: wanted a mapping with lora_A, lora_B, scaling, got"):
            other.load_adapter_state_dict(1, wrong)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    layer, other, x = trained(MIXED), trained(lora_alpha=3), torch.randn(len(IDS), K)
    layer.scaling[0] = 0.7
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert torch.equal(other(x, plan()), layer(x, plan())) and [other.adapter(i)[0].shape[0] for i in range(E)] == MIXED
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B", "scaling", "ranks"]


@pytest.mark.parametrize("rank", [0, R + 1])
def test_a_state_dict_with_impossible_ranks_is_refused(rank):
    layer = trained()
    state, before = copy.deepcopy(trained().state_dict()), copy.deepcopy(layer.state_dict())
    state["ranks"][1] = rank
    with pytest.raises(RuntimeError, match=f"ranks: wanted ranks from 1 to the stack's 4, got {rank}"):
        layer.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@RANKS
def test_dtype_and_device(r):
    layer = trained(r, dtype=torch.bfloat16, adapter_dtype=torch.float32, lora_alpha=5)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(10, K).bfloat16(), plan()).dtype == torch.bfloat16
    half = trained(r, lora_alpha=[0.1, 0.2, 0.3, 0.7, 0.9])
    scaling = half.scaling.clone()
    half.half()
    assert half.lora_A.dtype == torch.float16 and half.scaling.dtype == torch.float32 and torch.equal(half.scaling, scaling)
    assert half(torch.randn(10, K).half(), plan()).dtype == torch.float16
    assert trained(r).double()(torch.randn(10, K).double(), plan()).dtype == torch.float64
    meta = trained(r, device="meta")
    assert meta.lora_A.is_meta and meta.ranks.is_meta
    real = copy.deepcopy(meta).to_empty(device="cpu")
    assert real.ranks.tolist() == trained(r).ranks.tolist() and torch.equal(real.scaling, trained(r).scaling)
    meta.load_state_dict(trained(r).state_dict(), assign=True)
    assert meta(torch.randn(10, K), plan()).isfinite().all()


def test_dropout_acts_in_training_only():
    layer, x = trained(MIXED, lora_dropout=0.5), torch.randn(len(IDS), K)
    assert not torch.equal(layer(x, plan()), layer(x, plan()))
    torch.manual_seed(5)
    ours = layer(x, plan())
    torch.manual_seed(5)
    wanted = reference.lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.bias,
        scale=layer.scaling, dropout_p=0.5, training=True, segments=plan(), ranks=layer.ranks,
    )  # fmt: skip
    torch.testing.assert_close(ours, wanted)
    layer.eval()
    torch.testing.assert_close(layer(x, plan()), through(layer, x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_serving_without_gradients(context):
    layer, x = trained(), torch.randn(len(IDS), K)
    with context():
        first = layer(x, plan())
        layer.load_adapter(3, torch.randn(2, K), torch.randn(N, 2))
        second = layer(x, plan())
    threes = torch.tensor(IDS) == 3
    assert torch.equal(first[~threes], second[~threes]) and not torch.isclose(first[threes], second[threes]).all(1).any()
    layer(x, plan()).sum().backward()


def test_compiles_in_one_graph():
    layer, x = trained(MIXED), torch.randn(len(IDS), K)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, plan()), layer(x, plan()))


@pytest.mark.cuda
@pytest.mark.parametrize("r", [4, [2, 4, 1, 4, 3]], ids=["equal", "mixed"])
def test_a_graphs_replay_takes_a_swapped_adapter(r):
    layer, x = trained(r).cuda(), torch.randn(len(IDS), K, device="cuda")
    s = plan().to("cuda")
    with torch.no_grad():
        layer(x, s)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, s)
        for rank in (1, 4, 2):
            layer.load_adapter(3, torch.randn(rank, K), torch.randn(N, rank), scale=0.5 * rank)
            graph.replay()
            torch.testing.assert_close(y, layer(x, s))


@pytest.mark.parametrize(
    "segments, error, match",
    [
        (None, TypeError, r"segments: wanted a lora_kernels.Segments, Segments.from_ids\(.*\) with -1 .* got NoneType"),
        (torch.tensor(IDS), TypeError, "segments: wanted a lora_kernels.Segments, .* got Tensor"),
        (plan(IDS, E + 1), ValueError, "segments: wanted a plan of this layer's 5 adapters, got one of 6"),
        (plan(IDS[1:]), ValueError, "segments: wanted one id for each of the 10 tokens"),
    ],
)
def test_forward_refuses(segments, error, match):
    with pytest.raises(error, match=match):
        trained()(torch.randn(10, K), segments)


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"num_adapters": 0}, ValueError, "num_adapters: wanted at least 1, got 0"),
        ({"num_adapters": 2.0}, TypeError, "num_adapters: wanted an int, got float"),
        ({"r": 0}, UnsupportedError, "^r: wanted a rank from 1 to 512, got 0"),
        ({"r": [4, 513]}, UnsupportedError, r"r\[1\]: wanted a rank from 1 to 512, got 513"),
        ({"r": [4, 2.0]}, TypeError, r"r\[1\]: wanted an int, got float"),
        ({"r": [4]}, ValueError, "r: wanted one value or 2, one for each adapter, got 1"),
        ({"lora_alpha": [1, 2, 3]}, ValueError, "lora_alpha: wanted one value or 2, one for each adapter, got 3"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: wanted a probability"),
        ({"adapter_dtype": torch.float16}, TypeError, "adapter_dtype: wanted the base's dtype"),
    ],
)
def test_refusals(kwargs, error, match):
    with pytest.raises(error, match=match):
        MultiLoRALinear(K, N, **{"num_adapters": 2, **kwargs})


@pytest.mark.parametrize("method", ["adapter", "adapter_parameters", "reset_adapter", "adapter_state_dict"])
def test_slots_out_of_range_are_refused(method):
    for i in (-1, E):
        with pytest.raises(IndexError, match=f"i: wanted an adapter from 0 to 4, got {i}"):
            getattr(trained(), method)(i)
    with pytest.raises(TypeError, match="i: wanted an adapter's number, an int, got float"):
        getattr(trained(), method)(1.0)


def test_from_linear_refuses_subclasses():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match="wanted an nn.Linear, got Quantised"):
        MultiLoRALinear.from_linear(Quantised(K, N), num_adapters=2)


def test_repr():
    layer = MultiLoRALinear(K, N, num_adapters=3, r=4, lora_dropout=0.1)
    assert repr(layer) == "MultiLoRALinear(in_features=20, out_features=12, bias=True, num_adapters=3, r=4, lora_dropout=0.1)"
    assert "r=4, lora_dropout=0, ranks=1..4" in repr(trained(MIXED))

"""`LoRAOver` and `MultiLoRAOver`: adapters over a layer that keeps its own format; and plain models with such layers in them."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    LoRAOver,
    MultiLoRALinear,
    MultiLoRAOver,
    Segments,
    UnsupportedError,
    apply_lora,
    lora_linear,
    remove_lora,
    use_segments,
)
from lora_kernels.over import quantised
from lora_kernels.parity import budget_used

K, N, M, E = 24, 40, 9, 3


class Packed(nn.Module):
    """A byte a weight and a scale a row; ``out``: the dtype of its products, None for x's."""

    def __init__(self, in_features=K, out_features=N, out=None):
        super().__init__()
        self.in_features, self.out_features, self.out = in_features, out_features, out
        self.register_buffer("packed", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))
        self.scales = nn.Parameter(torch.full((out_features, 1), 1 / 300))

    def forward(self, x):
        y = nn.functional.linear(x, (self.packed * self.scales).to(x.dtype))
        return y if self.out is None else y.to(self.out)


def layer_over(base, **kwargs):
    return LoRAOver(base, **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **kwargs})


def textbook(layer, x, A, B, scale):
    """y in float64."""
    x = x.double()
    return nn.functional.linear(x, (layer.packed * layer.scales).double()) + (x @ A.double().T @ B.double().T) * scale


def test_forward_and_gradients():
    base = Packed()
    layer, x = layer_over(base), torch.randn(2, M, K, requires_grad=True)
    assert layer.base_layer is base and not base.scales.requires_grad and layer.scaling == 2.0
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    y = layer(x)
    dY = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dY)
    operands = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    truth = textbook(base, *operands, 2.0)
    same = base(x) + (x @ layer.lora_A.T @ layer.lora_B.T) * 2.0
    theirs = torch.autograd.grad(same, [x, layer.lora_A, layer.lora_B], dY)
    exact = torch.autograd.grad(truth, operands, dY.double())
    for mine, other, wanted in zip((y, *grads), (same, *theirs), (truth, *exact), strict=True):
        assert budget_used(mine.detach(), other.detach(), wanted.detach(), terms=K + N) <= 1


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_base_s(out):
    layer = layer_over(Packed(out=out))
    x = torch.randn(M, K, requires_grad=True)
    y = layer(x)
    assert y.dtype == out and layer.lora_A.dtype == torch.float32
    torch.testing.assert_close(y.double(), textbook(layer.base_layer, x, layer.lora_A, layer.lora_B, 2.0), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


def test_dropout_disabled_and_new_layers_are_the_base():
    base = Packed()
    x = torch.randn(M, K)
    fresh = LoRAOver(base, r=4)
    assert torch.equal(fresh(x), base(x)) and not fresh.lora_B.any() and fresh.lora_A.any()
    layer = layer_over(base, lora_dropout=0.5)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    wanted = lora_linear(x, None, layer.lora_A, layer.lora_B, base=base(x), scale=2.0, dropout_p=0.5, training=True)
    assert torch.equal(y, wanted) and not torch.equal(y, layer(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))
    assert layer_over(base.eval()).training is False
    assert LoRAOver.from_linear(base, r=2).r == 2 and MultiLoRAOver.from_linear(base, num_adapters=E).num_adapters == E


def test_many_adapters():
    base, ids = Packed(), torch.arange(M) % (E + 1) - 1
    layer = MultiLoRAOver(base, num_adapters=E, r=[4, 2, 3], lora_alpha=8, init_lora_weights=False)
    x, segments = torch.randn(M, K), Segments.from_ids(ids, E)
    y = layer(x, segments)
    assert torch.equal(y[ids == -1], base(x)[ids == -1])
    for e in range(E):
        A, B = layer.adapter(e)
        torch.testing.assert_close(y[ids == e].double(), textbook(base, x[ids == e], A, B, float(layer.scaling[e])), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert layer.lora_A.grad.shape == (E, 4, K) and base.scales.grad is None
    layer.load_adapter(0, torch.zeros(1, K), torch.zeros(N, 1))
    assert torch.equal(layer(x, segments)[ids == 0], base(x)[ids == 0])
    with pytest.raises(TypeError, match="segments: wanted a lora_kernels.Segments"):
        layer(x)


def test_what_needs_a_weight_is_refused():
    layer = layer_over(Packed())
    many = MultiLoRAOver(Packed(), num_adapters=E)
    for call in (layer.merge, lambda: many.merge(0)):
        with pytest.raises(UnsupportedError, match="merge: wanted a layer with a weight to write to, got one over a Packed"):
            call()
    assert not layer.merged and not many.merged
    for build in (lambda: LoRAOver(Packed(), use_dora=True), lambda: MultiLoRAOver(Packed(), num_adapters=E, use_dora=True)):
        with pytest.raises(TypeError, match="use_dora"):
            build()
    assert layer.delta_weight().shape == (N, K) and layer.delta_weight().dtype == torch.float32
    layer.swap(torch.zeros(4, K), torch.zeros(N, 4), 1.0)
    x = torch.randn(M, K)
    assert torch.equal(layer(x), layer.base_layer(x))


BAD = [
    ((torch.ones(2),), {}, TypeError, "base_layer: wanted an nn.Module, got Tensor"),
    ((FusedLoRALinear(2, 2),), {}, TypeError, "base_layer: wanted a layer without an adapter, got FusedLoRALinear"),
    ((nn.ReLU(),), {}, ValueError, "in_features: wanted a number, since the ReLU has no such attribute, got None"),
    ((nn.ReLU(),), {"in_features": 4}, ValueError, "in_features: wanted a number|out_features: wanted a number"),
    ((nn.ReLU(),), {"in_features": 4, "out_features": 4.0}, TypeError, "out_features: wanted an int, got float"),
    ((nn.ReLU(),), {"in_features": 0, "out_features": 4}, ValueError, "in_features: wanted at least 1, got 0"),
    ((Packed(),), {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: wanted float16, bfloat16, float32 or float64, got torch.int8"),
    ((Packed(),), {"r": 0}, UnsupportedError, "r: wanted a rank from 1 to 512, got 0"),
    ((Packed(),), {"lora_dropout": 1.0}, ValueError, r"lora_dropout: wanted a probability in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize("args, kwargs, error, match", BAD)
def test_refused(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        LoRAOver(*args, **kwargs)


@pytest.mark.parametrize("out, given", [(lambda y: (y, None), "tuple"), (lambda y: y.int(), "torch.int32")])
def test_a_product_that_is_no_tensor_of_floats_is_the_base_s_fault(out, given):
    base = Packed()
    layer, many = layer_over(base), MultiLoRAOver(base, num_adapters=E)
    base.register_forward_hook(lambda module, args, y: out(y))
    for call in (lambda: layer(torch.randn(M, K)), lambda: many(torch.randn(M, K), Segments.from_ids(torch.zeros(M, dtype=torch.int), E))):
        with pytest.raises(TypeError, match=f"base_layer: wanted a floating-point tensor from the Packed, got {given}"):
            call()


def test_sizes_may_be_given():
    layer = layer_over(nn.Sequential(nn.Linear(K, 5), nn.Linear(5, N)), in_features=K, out_features=N)
    assert layer(torch.randn(M, K)).shape == (M, N)
    wrong = layer_over(nn.Linear(K, N), in_features=K, out_features=N + 1)
    with pytest.raises(ValueError, match=rf"lora_B: wanted shape \[{N}, 4\]"):
        wrong(torch.randn(M, K))


def test_state_copies_and_repr():
    layer, x = layer_over(Packed()), torch.randn(M, K)
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "base_layer.packed", "base_layer.scales"}
    again = layer_over(Packed())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    shown = repr(layer)
    assert shown.startswith("LoRAOver(\n  in_features=24, out_features=40, r=4, scaling=2") and "(base_layer): Packed()" in shown
    many = MultiLoRAOver(Packed(), num_adapters=E)
    assert "in_features=24, out_features=40, num_adapters=3" in repr(many) and many.half().scaling.dtype == torch.float32


def test_compiles_without_a_break():
    layer, x = layer_over(Packed()), torch.randn(M, K)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Packed(), nn.Linear(N, K)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Eight(nn.Linear):
    """Floats of eight bits with a scale a row, in a weight of the usual shape: DeepSeek's format, in transformers an FP8Linear."""

    def __init__(self):
        super().__init__(K, N, bias=False)
        self.scales = nn.Parameter(self.weight.detach().abs().amax(1, keepdim=True) / 448)
        self.weight = nn.Parameter((self.weight.detach() / self.scales.detach()).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scales)


def cast_by_hooks():
    """A plain layer whose storage is of eight bits but while it is called, as diffusers' layerwise casting has it."""
    layer = nn.Linear(K, N).to(torch.float8_e4m3fn)
    layer.register_forward_pre_hook(lambda layer, args: layer.to(torch.float32) and None)
    layer.register_forward_hook(lambda layer, args, y: layer.to(torch.float8_e4m3fn) and None)
    return layer


CONFIG = LoRAConfig(target_modules=["first", "second"], r=4, lora_alpha=8, init_lora_weights=False)


def test_apply_and_remove():
    """A model of both kinds, adapted and given back."""
    model, x = Net(), torch.randn(M, K)
    before, first = model(x), model.first
    assert apply_lora(model, CONFIG) == ["first", "second"]
    assert type(model.first) is LoRAOver and model.first.base_layer is first and type(model.second) is FusedLoRALinear
    y = model(x)
    assert not torch.equal(y, before)
    with pytest.raises(UnsupportedError, match="merge: wanted layers with a weight to write to, got first over a Packed"):
        remove_lora(model, merge=True)
    assert torch.equal(model(x), y)
    remove_lora(model)
    assert model.first is first and type(model.second) is nn.Linear and torch.equal(model(x), before)


def test_apply_with_many_adapters():
    model, x, ids = Net(), torch.randn(M, K), torch.arange(M) % (E + 1) - 1
    before = model(x)
    apply_lora(model, CONFIG, num_adapters=E)
    assert type(model.first) is MultiLoRAOver and type(model.second) is MultiLoRALinear
    with use_segments(model, Segments.from_ids(ids, E)):
        y = model(x)
    torch.testing.assert_close(y[ids == -1], before[ids == -1])
    assert not torch.isclose(y[ids >= 0], before[ids >= 0]).all()


@pytest.mark.parametrize("base", [Eight, cast_by_hooks])
def test_apply_over_floats_of_eight_bits(base):
    model, x = nn.ModuleDict({"fp8": base()}), torch.randn(M, K)
    before, first = model["fp8"](x), model["fp8"]
    assert apply_lora(model, LoRAConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)) == ["fp8"]
    layer = model["fp8"]
    assert type(layer) is LoRAOver and layer.lora_A.dtype is torch.float32
    torch.testing.assert_close(layer(x), before + 2 * (x @ layer.lora_A.T) @ layer.lora_B.T)
    layer(x).sum().backward()
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
    remove_lora(model)
    assert model["fp8"] is first and torch.equal(first(x), before)


def test_variants_are_refused_by_name():
    model = Net()
    with pytest.raises(UnsupportedError, match="use_dora: wanted False, which is what LoRAOver computes, got True"):
        apply_lora(model, LoRAConfig(target_modules=["first"], use_dora=True))
    assert type(model.first) is Packed and model.first.scales.requires_grad


def test_what_counts_as_quantised():
    class Words(nn.Linear):
        """Packed into words of floats, as 4-bit layers are for FSDP."""

        def __init__(self):
            super().__init__(K, N)
            self.weight = nn.Parameter(torch.zeros(K * N // 4, 1))

    class Other(nn.Linear):
        pass

    assert quantised(Packed()) and quantised(Words()) and quantised(Eight())
    for dense in (nn.Linear(K, N), Other(K, N), nn.MultiheadAttention(8, 2).out_proj, nn.Embedding(2, 2), nn.ReLU(), FusedLoRALinear(2, 2)):
        assert not quantised(dense), dense

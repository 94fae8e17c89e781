"""PEFT's `lora_bias=True`, a bias on lora_B, which the adapter's scale multiplies: fused over plain and quantised bases."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import X, adapters_to, agree, autocast_alike, both, checkpointed_alike, counted, layers, pair, results, train_all
from peft_models import config as plain_config
from test_peft_mixed import Named, named
from test_peft_quantised import KINDS, adapted, four_bits, precise
from test_peft_states import Biased
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft import fuse, mixed_adapters, unfuse, why_not_fused
from lora_kernels.shared_input import share_inputs

calls = counted  # the fixture
MORE = torch.randn(3, 201, 24, generator=torch.Generator().manual_seed(2))  # than a weight of 4 bits is made whole for


def config(**changed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging, which some bases cannot
        return plain_config(**{"lora_bias": True, **changed})


def moved(model):
    """Every adapter's bias away from where it starts, and from the others."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def biased(dtype=torch.float32, net=Biased, **changed):
    stock, _, _ = pair(dtype, net, **{"lora_bias": True, **changed})
    fused = copy.deepcopy(moved(stock))
    return stock, fused, fuse(fused)


class Transposed(Biased):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.first, self.second = Conv1D(32, 24).to(dtype), Conv1D(16, 32).to(dtype)


class Unbiased(Biased):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.first, self.second = nn.Linear(24, 32, False, dtype=dtype), nn.Linear(32, 16, False, dtype=dtype)


@pytest.mark.parametrize("changed", [{}, {"use_rslora": True, "lora_alpha": 3}, {"bias": "all"}], ids=["plain", "rslora", "bias all"])
@pytest.mark.parametrize("dtype, upcast", [(torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_the_same_as_peft(dtype, upcast, changed, calls):
    stock, fused, report = biased(dtype, **changed)
    assert len(report.fused) == 2 and not report.left and not report.beside
    both(stock, fused, lambda model: adapters_to(model, torch.float32 if upcast else dtype))
    agree(stock, fused, X.to(dtype), rounded=dtype)
    assert len(calls) == 2 and all(call["lora_bias"].dtype is (torch.float32 if upcast else dtype) for call in calls)
    assert sum(name.endswith("lora_B.default.bias") for name in results(fused, X.to(dtype))) == 2, "they get gradients"


@pytest.mark.parametrize("net, changed", [(Transposed, {"fan_in_fan_out": True}), (Unbiased, {})], ids=["Conv1D", "no bias below"])
def test_other_plain_bases(net, changed, calls):
    stock, fused, _ = biased(net=net, **changed)
    agree(stock, fused)
    assert len(calls) == 2


@pytest.mark.parametrize("adapters, bias", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, adapters, bias, calls):
    stock, fused, _ = biased(base)
    both(stock, fused, lambda model: adapters_to(model, adapters))
    for layer in (*layers(stock), *layers(fused)):
        layer.lora_B["default"].bias.data = layer.lora_B["default"].bias.data.to(bias)
    autocast_alike(stock, fused, calls)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(3.0)], ids=["a number", "a tensor"])
def test_its_scale_multiplies_it(scale, calls):
    stock, fused, _ = biased()
    both(stock, fused, lambda model: layers(model)[0].scaling.update(default=scale))
    agree(stock, fused)
    first = layers(fused)[0]
    with torch.no_grad():
        y = first(X)
        first.lora_B["default"].bias += 1.0
        torch.testing.assert_close(first(X) - y, torch.full_like(y, float(scale)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second", [True, False], ids=["both", "one of two"])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_several_at_once(kind, second, calls):
    """Their sum, each by its own scale; also of one that has a bias and one that has none."""
    stock = pair(net=Biased, lora_bias=True)[0] if kind == "plain" else adapted(kind, lora_bias=True)
    stock.add_adapter("b", config(r=7, lora_alpha=5, lora_bias=second))
    stock.base_model.set_adapter(["default", "b"])
    train_all(moved(stock))
    fused = copy.deepcopy(stock)
    fuse(fused)
    agree(stock, fused, precise=None if kind == "plain" else in_float64(stock, kind))
    assert len(calls) == 2
    if second:
        assert sum(name.endswith(".bias") for name in results(fused, X)) == 4


def in_float64(stock, kind):
    """`precise`, whose model makes the first adapter as it is told, with its bias."""
    return precise(stock, kind, lora_bias=True)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_and_checkpointing(p, calls):
    _, fused, _ = biased(lora_dropout=p)
    for reentrant in (True, False):
        checkpointed_alike(copy.deepcopy(fused), X, reentrant)
    calls.clear()
    y = fused(X)
    assert len(calls) == 2 and torch.equal(y, fused(X)) == (p == 0.0), "dropout acts"


@pytest.mark.parametrize("x", [X, MORE], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "of x's dtype", "int8", "gptq"])
def test_over_quantised_bases(kind, dtype, x, calls, monkeypatch):
    monkeypatch.setitem(KINDS, "of x's dtype", (lambda linear: four_bits(linear, compute_dtype=dtype), None))
    stock = moved(adapted(kind, lora_bias=True))
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert len(report.beside) == 2 and not report.left
    agree(stock, fused, x.to(dtype), precise=in_float64(stock, kind), rounded=dtype)
    assert len(calls) == 2 and all((call["base"] is None) == (kind == "of x's dtype" and x is MORE) for call in calls)


def test_beside_a_hooked_base(calls):
    stock, fused, _ = biased()
    seen = []
    both(stock, fused, lambda model: layers(model)[0].base_layer.register_forward_hook(lambda *args: seen.append(1)))
    agree(stock, fused)
    assert len(calls) == 2 and calls[0]["base"] is not None and len(seen) == 3


def test_mixed_batches(calls):
    """Of several adapters they are PEFT's loop where one has a bias; a batch of one adapter is fused."""
    stock, _, _ = pair(net=Biased)
    stock.add_adapter("b", config(r=7, lora_alpha=5))
    train_all(moved(stock))
    fused = copy.deepcopy(stock)
    fuse(fused)
    for names, fused_calls in ((["b", "default", "__base__"], 0), (["b", "__base__", "b"], 0), (["b"] * 3, 2), (["default"] * 3, 2)):
        agree(Named(stock, names, named), Named(fused, names, mixed_adapters))
        assert len(calls) == fused_calls
        calls.clear()


def test_disabled_merged_and_saved(tmp_path, calls):
    stock, fused, _ = biased()
    agree(stock, fused)
    for model in (stock, fused):
        model.save_pretrained(tmp_path / str(model is fused))
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Biased(), tmp_path / "True")
    assert fuse(again).fused and len(calls) == 2
    torch.testing.assert_close(again(X), PeftModel.from_pretrained(copy.deepcopy(stock.unload()), tmp_path / "False")(X))
    calls.clear()
    apart = fused(X)
    with fused.disable_adapter():
        disabled = fused(X)
    fused.merge_adapter()
    torch.testing.assert_close(fused(X), apart, rtol=1e-4, atol=1e-5)
    fused.unmerge_adapter()
    assert len(calls) == 2 and not torch.allclose(disabled, apart)
    assert unfuse(fused) == 2


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        for name, width in {"q_proj": 32, "k_proj": 16, "v_proj": 16}.items():
            setattr(self, name, nn.Linear(24, width))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def test_layers_of_one_x(groups, calls):
    """One that has a bias on its adapter is computed alone, the others of its group together."""
    torch.manual_seed(0)
    stock = get_peft_model(Three(), config(target_modules=["k_proj"]))
    stock.add_adapter("b", config(target_modules=["q_proj", "v_proj"], lora_bias=False))
    stock.base_model.set_adapter(["default", "b"])
    fused = copy.deepcopy(moved(stock))
    fuse(fused)
    assert share_inputs(fused) == [tuple(f"base_model.model.{name}" for name in ("q_proj", "k_proj", "v_proj"))]
    agree(stock, fused)
    assert groups == [2] and len(calls) == 1 and calls[0]["lora_bias"] is not None


def test_a_bias_on_lora_A_is_left_to_peft(calls):
    stock, fused, _ = biased()
    both(stock, fused, lambda model: setattr(layers(model)[0].lora_A["default"], "bias", nn.Parameter(torch.ones(4))))
    assert "adapter 'default' has a bias on its lora_A" in why_not_fused(layers(fused)[0])
    agree(stock, fused)
    assert len(calls) == 1


def test_no_graph_break():
    _, fused, _ = biased()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(X), fused(X))

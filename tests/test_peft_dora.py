"""PEFT's DoRA layers, fused: y and every gradient, the magnitude's too, as PEFT's; the dropout mask is torch's own in both."""

import copy

import peft.helpers
import pytest
import torch
from peft_models import (
    Net,
    X,
    adapters_to,
    agree,
    autocast_alike,
    both,
    checkpointed_alike,
    config,
    count_calls,
    dropped_alike,
    layers,
    pair,
    results,
    trained_alike,
)
from test_memory import Kept
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_kernels.integrations.peft_dora as ours
from lora_kernels.integrations.peft import fuse, why_not_fused
from lora_kernels.shared_input import share_inputs


@pytest.fixture
def calls(monkeypatch):
    """The calls of dora_linear that fused layers made."""
    return count_calls(monkeypatch, "dora_linear", ours)


class Transposed(Net):
    """GPT-2's layers, their weights transposed."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.first, self.second = Conv1D(32, 24).to(dtype), Conv1D(16, 32).to(dtype)
        nn.init.normal_(self.first.bias)


def moved(stock, fused):
    """Magnitudes away from the norms, which an optimizer would move, too."""
    for model in (stock, fused):
        for layer in layers(model):
            with torch.no_grad():
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude *= torch.linspace(0.5, 1.5, len(magnitude)).to(magnitude.dtype)
    return stock, fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("net, changed", [(Net, {}), (Net, {"use_rslora": True, "lora_alpha": 3}), (Transposed, {"fan_in_fan_out": True})])
def test_the_same_as_peft(dtype, net, changed, calls):
    stock, fused, report = pair(dtype, net, use_dora=True, **changed)
    assert len(report.fused) == 2 and not report.left and not report.beside
    agree(*moved(stock, fused), X.to(dtype))
    assert len(calls) == 2 and any("magnitude" in name for name in results(fused, X.to(dtype)))


def test_dropout_is_peft_s_own(calls):
    stock, fused = moved(*pair(use_dora=True, lora_dropout=0.4)[:2])
    dropped_alike(stock, fused, calls)
    both(stock, fused, lambda model: model.eval())
    torch.testing.assert_close(fused(X), stock(X))
    assert not calls[-1]["training"]


@pytest.mark.parametrize("net, changed", [(Net, {}), (Transposed, {"fan_in_fan_out": True})], ids=["linear", "conv1d"])
def test_an_adapter_that_comes_in_evaluation_does_not_drop(net, changed, calls):
    """PEFT leaves the new one's dropout in training, and with DoRA asks the layer."""
    stock, fused, _ = pair(net=net, use_dora=True, **changed)
    for change in (
        lambda model: model.eval(),
        lambda model: model.add_adapter("late", config(use_dora=True, lora_dropout=0.4, **changed)),
        lambda model: model.set_adapter("late"),
    ):
        both(stock, fused, change)
    assert layers(fused)[0].lora_dropout["late"].training
    agree(stock, fused)
    assert len(calls) == 2
    both(stock, fused, lambda model: model.train())
    assert not torch.equal(fused(X), fused(X))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(adapter_dtype, calls):
    """A float32 base in bfloat16; and adapters of whatever dtype."""
    stock, fused = moved(*pair(use_dora=True)[:2])
    both(stock, fused, lambda model: adapters_to(model, adapter_dtype))
    autocast_alike(stock, fused, calls)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    checkpointed_alike(pair(use_dora=True, lora_dropout=0.5)[1], X, reentrant)


def test_it_trains_as_peft_s(calls):
    stock, fused, _ = pair(use_dora=True)
    trained_alike(stock, fused, calls)


def test_less_is_kept():
    stock, fused, _ = pair(use_dora=True)
    kept = []
    for model in (stock, fused):
        layer, x = layers(model)[0], torch.randn(8, 24, requires_grad=True)
        with Kept() as each:
            layer(x)
        kept.append(each.bytes(list(layer.parameters())))
    assert kept[1] < kept[0] / 2


def test_what_peft_computes(calls):
    """Several adapters, norms that PEFT keeps, a scale that is a tensor, hooks on the magnitude, a trained base; then it is fused again."""
    stock, fused = moved(*pair(use_dora=True)[:2])
    first = layers(fused)[0]

    def left(words):
        calls.clear()
        assert words in why_not_fused(first), why_not_fused(first)
        torch.testing.assert_close(fused(X), stock(X))
        assert len(calls) < 2
        return calls

    for changed, words in (({"use_dora": True}, "with DoRA"), ({}, "several adapters are active at once, with DoRA")):
        both(stock, fused, lambda model, changed=changed: model.add_adapter("b", config(**changed)))
        both(stock, fused, lambda model: model.base_model.set_adapter(["default", "b"]))
        assert not left(words)
        both(stock, fused, lambda model: (model.base_model.set_adapter("default"), model.delete_adapter("b")))
    both(stock, fused, lambda model: model.eval())
    if hasattr(peft.helpers, "DoraCaching"):  # from PEFT 0.19 on
        with peft.helpers.DoraCaching():
            assert not left("whose norms PEFT keeps")
    both(stock, fused, lambda model: layers(model)[0].scaling.update(default=torch.tensor(2.0)))
    left("a scale that is a tensor")
    both(stock, fused, lambda model: layers(model)[0].scaling.update(default=2.0))
    seen = []
    both(stock, fused, lambda model: layers(model)[0].lora_magnitude_vector["default"].register_forward_hook(lambda *a: seen.append(1)))
    left("has a magnitude that is a DoraLinearLayer with hooks")
    both(stock, fused, lambda model: layers(model)[0].lora_magnitude_vector["default"]._forward_hooks.clear())
    both(stock, fused, lambda model: layers(model)[0].base_layer.weight.requires_grad_(True))
    left("is a DoraLinearVariant, and its base layer is a Linear, whose weight is trained")
    both(stock, fused, lambda model: layers(model)[0].base_layer.weight.requires_grad_(False))
    calls.clear()
    agree(stock, fused)
    assert seen and len(calls) == 2 and why_not_fused(first) is None


class Custom(nn.Linear):
    """Not exactly an nn.Linear: its product is its own."""


class Subclass(Net):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.first.__class__ = self.second.__class__ = Custom


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("net, changed", [(Net, {}), (Subclass, {}), (Transposed, {"fan_in_fan_out": True})])
def test_beside_the_base_s_own_product(net, changed, p, calls, monkeypatch):
    """Hooks on the base, and subclasses of nn.Linear, make the product; the norm is of the weight as it is stored."""
    keep = {}
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: (
        x * keep.setdefault(x.shape, (torch.rand(x.shape) >= p) / (1 - p)) if training else x))  # fmt: skip
    stock, fused = moved(*pair(net=net, use_dora=True, lora_dropout=p, **changed)[:2])
    seen = []
    if net is not Subclass:
        both(stock, fused, lambda model: layers(model)[0].base_layer.register_forward_hook(lambda *args: seen.append(1)))
    report = fuse(fused)
    assert len(report.beside) == (2 if net is Subclass else 1) and not report.left
    agree(stock, fused)
    assert len(calls) == 2 and calls[0]["base"] is not None and len(seen) in (0, 3)


def test_beside_plain_adapters_and_others_of_one_x(calls):
    """DoRA and plain adapters of one model, each when it is active; layers of one x are computed alone."""
    stock, fused, _ = pair(use_dora=True)
    both(stock, fused, lambda model: model.add_adapter("plain", config()))
    for name, made in (("plain", 0), ("default", 2)):
        both(stock, fused, lambda model, name=name: model.set_adapter(name))
        agree(stock, fused)
        assert len(calls) == made
    net = fused.base_model.model
    net.second = copy.deepcopy(net.first)
    share_inputs(fused, [("first", "second")])
    assert torch.equal(net.first(X), net.second(X)) and len(calls) == 4


def test_compiles_without_a_break():
    _, fused, _ = pair(use_dora=True)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(X), fused(X))
    assert len(fuse(fused).fused) == 2

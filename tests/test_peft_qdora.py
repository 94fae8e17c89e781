"""PEFT's DoRA over quantised bases, fused: the weight is made for the norm, and let go; y and every gradient as PEFT's, its masks too."""

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import peft.tuners.lora.dora as peft_dora
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft_models import agree, both, checkpointed_alike, config, count_calls, dropped_alike, results, trained_alike
from test_memory import Kept
from test_peft_quantised import KINDS, adapted, adapters, four_bits, precise
from torch import nn
from torch.nn import functional as F

import lora_kernels.integrations.peft_dora as ours
from lora_kernels import UnsupportedError
from lora_kernels.dequantize import MANY, Made
from lora_kernels.integrations.peft import Fused, fuse, mixed_adapters, use_fused, why_not_fused
from lora_kernels.shared_input import share_inputs

X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(3, 201, 24, generator=torch.Generator().manual_seed(2))  # than MANY tokens
FOUR = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # layers that know the dtype they multiply in, as transformers loads them
DORA = ["nf4, float32", "nf4, bfloat16", "fp4, double", "int8", "torchao"]


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    for name, dtype in FOUR.items():
        monkeypatch.setitem(KINDS, f"nf4, {name}", (lambda linear, dtype=dtype: four_bits(linear, compute_dtype=dtype), None))


@pytest.fixture
def calls(monkeypatch):
    """The calls of dora_linear that fused layers made."""
    return count_calls(monkeypatch, "dora_linear", ours)


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def pair(kind="nf4, float32", **changed):
    """PEFT's model, its magnitudes away from the norms, and the same fused; and fuse's report."""
    stock = adapted(kind, use_dora=True, **changed)
    for layer in layers(stock):
        with torch.no_grad():
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude *= torch.linspace(0.5, 1.5, len(magnitude)).to(magnitude.dtype)
    fused = copy.deepcopy(stock)
    return stock, fused, fuse(fused)


def made_by(kind: str, dtype: torch.dtype) -> bool:
    """Whether the call multiplies by the weight that it makes: of 4 bits, in x's dtype."""
    return FOUR.get(kind.removeprefix("nf4, ")) is dtype


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DORA)
def test_the_same_as_peft(kind, dtype, p, train, calls, monkeypatch):
    """In training and evaluation, float32 adapters, with one mask for PEFT's layer, in float64 too, and ours."""
    masks = {}

    def drop(x, p=0.5, training=True, inplace=False):
        keep = masks.setdefault(x.shape, torch.rand(x.shape) >= p)
        return torch.where(keep, x / (1 - p), 0.0) if training else x

    monkeypatch.setattr(F, "dropout", drop)
    stock, fused, report = pair(kind, lora_dropout=p)
    assert len(report.fused) == 2 and set(report.beside) == set(report.fused) and not report.left
    truth = precise(stock, kind, use_dora=True, lora_dropout=p)
    for model in (stock, fused, truth):
        model.train(train)
    agree(stock, fused, X.to(dtype), precise=truth, rounded=dtype)
    assert len(calls) == 2 and all((call["base"] is None) == made_by(kind, dtype) for call in calls)
    assert bool(masks) == bool(p and train) and any("magnitude" in name for name, _ in adapters(fused))
    assert {type(layer).__name__ for layer in layers(fused)} == {f"Fused{type(layer).__name__}" for layer in layers(stock)}


@pytest.mark.parametrize("kind", ["nf4, float32", "fp4, double", "int8"])
def test_dropout_is_peft_s_own(kind, calls):
    stock, fused, _ = pair(kind, lora_dropout=0.4)
    dropped_alike(stock, fused, calls)


@pytest.mark.parametrize("x", [X, MORE], ids=["few", "many"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["nf4, bfloat16", "nf4, float32", "int8"])
def test_float32_activations_under_autocast(kind, p, x, calls):
    """As prepare_model_for_kbit_training and Trainer's bf16 leave them."""
    stock, fused, _ = pair(kind, lora_dropout=p)
    assert MORE[..., 0].numel() > MANY
    found = []
    for model in (stock, fused):
        torch.manual_seed(7)
        found.append(results(model, x, lambda: torch.autocast("cpu", torch.bfloat16)))
    assert len(calls) == 2 and found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name].dtype is value.dtype, name
        torch.testing.assert_close(found[1][name], value, rtol=0.05, atol=0.03 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("kind", ["nf4, bfloat16", "int8", "torchao"])
def test_the_dtype_of_y_under_autocast_on_a_gpu(kind):
    """There, and not elsewhere, PEFT's layers over bitsandbytes leave the sum with float32 magnitudes as it is."""
    stock, fused, _ = pair(kind)
    made = []
    torch.set_autocast_enabled("cuda", True)
    try:
        for model in (stock, fused):
            with torch.autocast("cpu", torch.bfloat16):
                made.append(layers(model)[0](X.bfloat16()))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert made[0].dtype is made[1].dtype is (torch.bfloat16 if kind == "torchao" else torch.float32)
    torch.testing.assert_close(made[1], made[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_weight_is_made_once_a_pass(p, monkeypatch):
    """For the norm and both products; and for dX, with dropout of each product, again."""
    made, real = [], Made.__call__
    monkeypatch.setattr(Made, "__call__", lambda self: made.append(self.dtype) or real(self))
    monkeypatch.setattr(ours, "dequantize_bnb_weight", None)
    _, fused, _ = pair(lora_dropout=p)
    for x in (X, MORE):
        y = layers(fused)[0](x.clone().requires_grad_())
        assert made == [torch.float32]
        y.sum().backward()
        assert len(made) == (3 if p else 2)
        made.clear()
    with torch.no_grad():
        fused.eval()(X)
    assert len(made) == 2, "one a layer"


@pytest.mark.parametrize("kind", ["nf4, float32", "fp4, double", "int8"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_no_weight_is_kept(kind, p):
    """Of 64 by 24 numbers; PEFT's layer keeps the whole one with dropout."""
    stock, fused, _ = pair(kind, lora_dropout=p)
    few, kept = X[:1, :2], []
    for model in (stock, fused):
        layer = layers(model)[0]
        with Kept() as base:
            layer.base_layer(few.clone().requires_grad_())
        with Kept() as each:
            layer(few.clone().requires_grad_())
        parameters = list(layer.parameters())
        kept.append(each.bytes(parameters) - base.bytes(parameters) * (kind != "nf4, float32"))
    assert kept[1] < 4 * 64 * 24 and (not p or kept[0] > 4 * 64 * 24)


@pytest.mark.parametrize("kind", ["nf4, float32", "int8"])
def test_the_base_stays_as_it_is(kind):
    """Its parameter is the same one after any number of calls, in training and not; on a CPU PEFT puts another there at each call."""
    _, fused, _ = pair(kind)
    base = layers(fused)[0].base_layer
    weight, state = base.weight, {name: value.clone() for name, value in fused.state_dict().items()}
    for _ in range(3):
        fused(X).sum().backward()
    with torch.no_grad():
        assert torch.equal(fused.eval()(X), fused(X))
    assert base.weight is weight and all(torch.equal(state[name], value) for name, value in fused.state_dict().items())


@pytest.mark.parametrize("kind, reentrant", [("nf4, float32", True), ("nf4, float32", False), ("int8", False)])
def test_gradient_checkpointing(kind, reentrant):
    checkpointed_alike(pair(kind, lora_dropout=0.5)[1], X, reentrant)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["nf4, float32", "int8"])
def test_not_differentiated_twice(kind, p):
    _, fused, _ = pair(kind, lora_dropout=p)
    x = X.clone().requires_grad_()
    with pytest.raises((UnsupportedError, RuntimeError), match="create_graph|differentiable once"):
        (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["nf4, float32", "fp4, double"])
def test_it_trains_as_peft_s(kind, calls):
    stock, fused, _ = pair(kind)
    trained_alike(stock, fused, calls)


def test_trained_bias(calls):
    """PEFT's bias="all": the base's own, which the magnitude does not scale."""
    for kind in ("nf4, float32", "fp4, double"):
        stock, fused, _ = pair(kind, bias="all")
        mine, theirs = results(fused, X), results(stock, X)
        assert any("base_layer.bias" in name for name in theirs) and mine.keys() == theirs.keys() and len(calls) == 2
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)
        calls.clear()


def test_layers_of_one_x_are_computed_alone(calls):
    _, fused, _ = pair()
    net = fused.base_model.model
    net.third = copy.deepcopy(net.first)
    share_inputs(fused, [("first", "third")])
    assert torch.equal(net.first(MORE), net.third(MORE)) and len(calls) == 2


def test_use_fused_builds_what_fuse_makes(calls):
    torch.manual_seed(0)
    model = adapted("nf4, float32", early=True, use_dora=True)
    assert all(isinstance(layer, Fused) for layer in layers(model)) and model(X).shape == (3, 5, 16) and len(calls) == 2
    assert use_fused(config(use_dora=True)).use_dora


@pytest.mark.parametrize("kind, p", [("nf4, float32", 0.4), ("int8", 0.0)])
def test_compiles(kind, p):
    """With breaks, as PEFT's own: the compiler does not trace how bitsandbytes' weight is made whole."""
    _, fused, _ = pair(kind, lora_dropout=p)
    torch._dynamo.reset()
    found = []
    for layer in (layers(fused)[0], torch.compile(layers(fused)[0], backend="aot_eager")):
        torch.manual_seed(3)
        found.append(results(layer, X))
    assert len(found[0]) == 5
    for name, mine in zip(found[0], found[1].values(), strict=True):
        torch.testing.assert_close(mine, found[0][name], msg=name)


def left(stock, fused, calls, words, x=X):
    """The first layer is PEFT's, for this reason, and answers as PEFT's."""
    calls.clear()
    first = layers(fused)[0]
    assert words in why_not_fused(first, x), why_not_fused(first, x)
    torch.testing.assert_close(first(x), layers(stock)[0](x))
    assert not calls


def test_what_peft_computes(calls, monkeypatch):
    stock, fused, _ = pair()
    first = layers(fused)[0]
    for model in (stock, fused):
        layers(model)[0].scaling.update(default=torch.tensor(2.0))
    left(stock, fused, calls, "a scale that is a tensor")
    for model in (stock, fused):
        layers(model)[0].scaling.update(default=2.0)
    assert why_not_fused(first, X) is None
    if hasattr(peft_dora, "ENABLE_DORA_CACHING"):
        both(stock, fused, lambda model: model.eval())
        monkeypatch.setattr(peft_dora, "ENABLE_DORA_CACHING", True)
        left(stock, fused, calls, "whose norms PEFT keeps")
        monkeypatch.undo()
        both(stock, fused, lambda model: model.train())
    both(stock, fused, lambda model: model.add_adapter("b", config(use_dora=True)))
    both(stock, fused, lambda model: model.base_model.set_adapter(["default", "b"]))
    left(stock, fused, calls, "several adapters are active at once, with DoRA")
    both(stock, fused, lambda model: model.base_model.set_adapter("default"))
    with pytest.raises(ValueError, match="DoRA"), mixed_adapters(fused, ["default", "b", "__base__"]):
        fused(X)


def test_4_bits_in_another_order(calls):
    """What bitsandbytes packs for some CPUs, in evaluation, its own kernel alone reads: PEFT's norm would be of other numbers."""
    _, fused, _ = pair("nf4, bfloat16")
    first = layers(fused)[0]
    first.base_layer.support_avx512bf16_for_cpu = True
    fused.eval()
    assert "in another order for this CPU" in why_not_fused(first, X)
    with torch.no_grad():
        first(X.bfloat16())
    assert len(calls) == 1 and calls[0]["base"] is None, "nothing is packed: the layer does not multiply itself"
    fused.train()
    assert why_not_fused(first, X) is None
    first.base_layer.weight.quant_state.packing_format_for_cpu = True
    for x in (X, X.bfloat16()):
        assert "in another order for this CPU" in why_not_fused(first, x)


def test_weights_of_no_known_kind():
    """Trained ones, of which the dropped product has a gradient, too; of other classes, and of dtypes that mean something else."""
    plain = nn.Linear(24, 64)

    class Other(nn.Linear):
        pass

    part = SimpleNamespace(fan_in_fan_out=False)
    assert "whose weight is trained" in ours._whole(plain, part)
    plain.requires_grad_(False)
    assert ours._whole(plain, part)() is plain.weight
    part.fan_in_fan_out = True
    assert torch.equal(ours._whole(plain, part)(), plain.weight.T)
    plain.weight.data = plain.weight.data.to(torch.float8_e4m3fn)
    assert "whose weight is a Parameter" in ours._whole(plain, part)
    assert "a Module, whose weight is a NoneType" in ours._whole(nn.Module(), part)
    sixteen = bnb.nn.Linear8bitLt(24, 64, has_fp16_weights=True).to(torch.float16)
    assert "a Linear8bitLt, whose weight is a Int8Params" in ours._whole(sixteen, part)

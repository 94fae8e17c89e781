"""PEFT's layer on our arms: the same outputs and gradients as PEFT's own, in every state of adapters, scales, dtypes and dropout."""

import contextlib
import copy
import timeit

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners import lora
from peft_models import Masked, Net, X, adapters_to, agree, both, checkpoint_first, config, counted, layers, pair, results
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import philox
from lora_kernels.integrations.peft import FusedLoraLinear, fuse, unfuse, use_fused, why_not_fused

calls = counted  # the fixture


@pytest.mark.parametrize(
    "changed",
    [{}, {"r": 5, "use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"r": 40}]
    + [{"rank_pattern": {"second": 7}, "alpha_pattern": {"second": 3}}],
    ids=["plain", "rslora", "bias all", "bias lora_only", "rank above width", "patterns"],
)
def test_the_same_as_peft(changed, calls):
    stock, fused, report = pair(**changed)
    assert len(report.fused) == 2 and not report.left and str(report) == "2 LoRA layers fused, 0 left to PEFT"
    agree(stock, fused)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False], ids=["adapters in float32", "adapters in 16 bits"])
def test_16_bit_base(dtype, upcast, calls):
    """PEFT keeps the adapters of a 16-bit base in float32 unless told otherwise; the result has the base's dtype."""
    torch.manual_seed(0)
    stock = get_peft_model(Net(dtype), config(), autocast_adapter_dtype=upcast)
    fused = copy.deepcopy(stock)
    fuse(fused)
    assert fused.base_model.model.first.lora_A["default"].weight.dtype == (torch.float32 if upcast else dtype)
    agree(stock, fused, X.to(dtype))
    assert fused(X.to(dtype)).dtype == dtype and len(calls) == 4
    with disable_input_dtype_casting(fused):
        assert torch.equal(fused(X.to(dtype)), fused(X.to(dtype)))


@pytest.mark.parametrize("base, adapters", [(None, None), (torch.bfloat16, None), (None, torch.bfloat16), (None, torch.float16)], ids=str)
def test_autocast(base, adapters, calls):
    """Whatever dtypes meet, autocast decides the product's; adapters in a third dtype take part in float32."""
    stock, fused, _ = pair()
    for model in (stock, fused):
        model.base_model.model.to(base)
        adapters_to(model, adapters or torch.float32)
    agree(stock, fused, X if base is None else X.to(base), within=lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(calls) == 2


def test_adapters_in_another_16_bit_dtype(calls):
    stock, fused, _ = pair(torch.bfloat16)
    both(stock, fused, lambda model: adapters_to(model, torch.float16))
    agree(stock, fused, X.bfloat16())
    assert len(calls) == 2


def test_float64(calls):
    stock, fused, _ = pair(torch.float64)
    ours, theirs = results(fused, X.double()), results(stock, X.double())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    assert len(calls) == 2


def test_adapters_come_and_go(calls):
    """add, set, delete; a layer without the active adapter, and no active adapter at all."""
    stock, fused, _ = pair()
    both(stock, fused, lambda model: model.add_adapter("other", config(r=6, lora_alpha=3)))
    both(stock, fused, lambda model: model.add_adapter("first only", config(target_modules=["first"])))
    for name, fused_calls in (("other", 2), ("default", 2), ("first only", 1)):
        both(stock, fused, lambda model, name=name: model.set_adapter(name))
        agree(stock, fused)
        assert len(calls) == fused_calls
        calls.clear()
    assert fused.get_layer_status()[0].available_adapters == stock.get_layer_status()[0].available_adapters
    both(stock, fused, lambda model: [layer.set_adapter([]) for layer in layers(model)])
    with torch.no_grad():
        assert torch.equal(fused(X), stock(X)) and not calls
    both(stock, fused, lambda model: (model.set_adapter("other"), model.delete_adapter("default"), model.delete_adapter("first only")))
    agree(stock, fused)
    assert len(calls) == 2


def test_disabled_and_merged(calls):
    stock, fused, _ = pair()
    both(stock, fused, lambda model: model.merge_adapter(safe_merge=True))
    with torch.no_grad():
        assert torch.equal(fused(X), stock(X)) and all(layer.merged for layer in layers(fused))
    with torch.no_grad(), stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(X), stock(X)) and not any(layer.merged for layer in layers(fused)), "PEFT unmerges where disabled"
    assert not calls
    agree(stock, fused)
    assert len(calls) == 2
    both(stock, fused, lambda model: model.add_adapter("other", config(r=6)))
    both(stock, fused, lambda model: (model.merge_adapter(["other"]), model.unmerge_adapter()))
    agree(stock, fused)
    both(stock, fused, lambda model: [nn.init.constant_(layer.lora_B["default"].weight, torch.nan) for layer in layers(model)])
    with pytest.raises(ValueError, match="NaNs detected"):
        fused.merge_adapter(safe_merge=True)
    assert torch.isfinite(fused.base_model.model.first.base_layer.weight).all()
    plain, ours = stock.base_model.unload(), fused.base_model.unload()
    assert type(ours.first) is nn.Linear and torch.equal(plain(X), ours(X))


def test_merge_and_unload():
    stock, fused, _ = pair()
    with torch.no_grad():
        y = fused(X)
        ours = fused.merge_and_unload()
        assert type(ours.first) is nn.Linear and torch.equal(ours(X), stock.merge_and_unload()(X))
        torch.testing.assert_close(ours(X), y)


def test_scales(calls):
    """Read at every call: PEFT's ways to change one, a tensor among them, as hot-swapping a compiled model keeps it."""
    stock, fused, _ = pair()
    changes = [
        lambda layer: layer.set_scale("default", 2.5),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.update(default=torch.tensor(1.5)),
        lambda layer: layer.scaling["default"].fill_(0.25),
        lambda layer: layer.scaling.update(default=torch.tensor([3.0], dtype=torch.float64)),
        lambda layer: layer.scaling.update(default=0),
    ]
    for number, change in enumerate(changes, 1):
        both(stock, fused, lambda model, change=change: [change(layer) for layer in layers(model)])
        agree(stock, fused)
        assert len(calls) == 2 * number
    both(stock, fused, lambda model: [layer.unscale_layer() for layer in layers(model)])
    y = fused(X)
    with rescale_adapter_scale(fused, 0.5), rescale_adapter_scale(stock, 0.5):
        assert not torch.equal(fused(X), y)
        agree(stock, fused)
    both(stock, fused, lambda model: [layer.scaling.update(default=torch.tensor(1.0, requires_grad=True)) for layer in layers(model)])
    agree(stock, fused)
    assert "a scale that is trained" in why_not_fused(layers(fused)[0])


@pytest.mark.parametrize("dtype, upcast", [(torch.float32, True), (torch.float16, True), (torch.float16, False)])
def test_several_active_adapters(dtype, upcast, calls):
    torch.manual_seed(0)
    stock = get_peft_model(Net(dtype), config(r=3))
    fused = copy.deepcopy(stock)
    fuse(fused)
    both(stock, fused, lambda model: model.add_adapter("other", config(r=6, lora_alpha=3, target_modules=["first"])))
    both(stock, fused, lambda model: adapters_to(model, torch.float32 if upcast else dtype))
    both(stock, fused, lambda model: model.base_model.set_adapter(["default", "other"]))
    both(stock, fused, lambda model: [layer.scaling.update(default=torch.tensor(1.5)) for layer in layers(model)])
    agree(stock, fused, X.to(dtype))
    assert [call["scale"] for call in calls] == [1.0, 1.5]


def test_several_active_adapters_left_to_peft(calls):
    stock, fused, _ = pair(lora_dropout=0.5)
    both(stock, fused, lambda model: model.add_adapter("other", config(r=510)))
    both(stock, fused, lambda model: model.base_model.set_adapter(["default", "other"]))
    first = layers(fused)[0]
    assert "several adapters are active at once, with dropout" in why_not_fused(first)
    ours, theirs = (seeded(model) for model in (fused, stock))
    assert not calls and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    both(stock, fused, lambda model: model.eval())
    assert "several adapters are active at once, of rank 514 together; the kernels take 1 to 512" in why_not_fused(first)
    agree(stock, fused)
    assert not calls


def seeded(model):
    torch.manual_seed(5)
    return results(model, X)


def test_weighted_adapter(calls):
    stock, fused, _ = pair()
    both(stock, fused, lambda model: model.add_adapter("other", config()))
    both(stock, fused, lambda m: m.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.2], "sum", combination_type="linear"))
    both(stock, fused, lambda model: model.set_adapter("sum"))
    agree(stock, fused)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropout(dtype, calls):
    """The probability of the active adapter, on the adapter's input alone: PEFT with the same mask has the same y and gradients."""
    stock = get_peft_model(nn.Sequential(nn.Linear(24, 32, dtype=dtype)), config(target_modules=["0"], lora_dropout=0.5))
    stock.add_adapter("other", config(target_modules=["0"], lora_dropout=0.25))
    fused = copy.deepcopy(stock)
    fuse(fused)
    for name, p in (("default", 0.5), ("other", 0.25)):
        both(stock, fused, lambda model, name=name: model.set_adapter(name))
        torch.manual_seed(5)
        layers(stock)[0].lora_dropout[name] = Masked(p, philox.draw_seed(X.device), X.shape)
        agree(stock, fused, X.to(dtype), within=lambda: contextlib.nullcontext(torch.manual_seed(5)))
        y = fused(X.to(dtype))
        assert not torch.equal(y, fused(X.to(dtype))), "another mask each time"
        assert [call["dropout_p"] for call in calls] == [p] * 3
        calls.clear()
    fused.eval()
    assert torch.equal(fused(X.to(dtype)), fused(X.to(dtype)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    """The second forward pass draws the same mask."""
    _, fused, _ = pair(lora_dropout=0.5)
    torch.manual_seed(5)
    plain = results(fused, X)
    checkpoint_first(fused, reentrant)
    torch.manual_seed(5)
    checked = results(fused, X)
    assert len(calls) == 5
    for name, value in plain.items():
        assert torch.equal(checked[name], value), name


def test_x_without_gradient_and_inference_mode(calls):
    stock, fused, _ = pair()
    for model in (stock, fused):
        model(X).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.inference_mode():
        torch.testing.assert_close(fused(X), stock(X))
    agree(stock, fused)
    assert len(calls) == 6


def test_the_output_may_be_changed_in_place(calls):
    """As after nn.Linear: ReLU(inplace=True), a residual's +=."""
    _, fused, _ = pair()
    first = layers(fused)[0]
    wanted = torch.autograd.grad(torch.relu(first(X)).sum(), first.lora_B["default"].weight)
    assert torch.equal(torch.autograd.grad(first(X).relu_().sum(), first.lora_B["default"].weight)[0], wanted[0])
    assert len(calls) == 2


class Gpt2Like(nn.Module):
    """GPT-2's layers keep their weight [in, out]."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = Conv1D(32, 24), Conv1D(16, 32)
        self.to(dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_base(dtype, calls):
    stock, fused, report = pair(dtype, net=Gpt2Like, fan_in_fan_out=True, bias="all")
    assert len(report.fused) == 2
    agree(stock, fused, X.to(dtype))
    both(stock, fused, lambda model: model.merge_adapter())
    with torch.no_grad():
        assert torch.equal(fused(X.to(dtype)), stock(X.to(dtype)))
    assert len(calls) == 2


@pytest.mark.parametrize("stated", [True, False])
def test_use_fused_builds_what_peft_would(stated):
    """PEFT corrects fan_in_fan_out for the layer at hand; so do layers that are to be fused, or merging would fail."""
    for net, transposed in ((Net, False), (Gpt2Like, True)):
        with contextlib.nullcontext() if stated == transposed else pytest.warns(UserWarning, match="fan_in_fan_out is set to"):
            model = get_peft_model(net(), use_fused(config(fan_in_fan_out=stated)))
        assert {layer.fan_in_fan_out for layer in layers(model)} == {transposed} == {model.peft_config["default"].fan_in_fan_out}
        assert {type(layer) for layer in layers(model)} == {FusedLoraLinear}
        y = model(X)
        model.merge_adapter()
        torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)


def test_use_fused_before_wrapping(calls):
    torch.manual_seed(0)
    model = get_peft_model(Net(), use_fused(config()))
    assert {type(layer) for layer in layers(model)} == {FusedLoraLinear}
    torch.manual_seed(0)
    agree(get_peft_model(Net(), config()), model)
    assert len(calls) == 2
    model.add_adapter("other", config())
    assert "other" in layers(model)[0].lora_A and {type(layer) for layer in layers(model)} == {FusedLoraLinear}
    with pytest.raises(TypeError, match="config: wanted a peft.LoraConfig, got dict"):
        use_fused({})


def test_fuse_and_unfuse_in_place():
    stock, fused, _ = pair()
    parameters = list(fused.parameters())
    assert stock.state_dict().keys() == fused.state_dict().keys()
    assert fused.base_model.model.first.weight is fused.base_model.model.first.base_layer.weight, "as transformers reads it"
    assert unfuse(fused) == 2 and {type(layer) for layer in layers(fused)} == {lora.Linear}
    assert torch.equal(fused(X), stock(X))
    assert fuse(fused).fused == ["base_model.model.first", "base_model.model.second"] == fuse(fused).fused
    assert all(a is b for a, b in zip(parameters, fused.parameters(), strict=True))
    assert repr(copy.deepcopy(fused).base_model.model.first).startswith("lora.")


def test_eligibility_is_cheap():
    """Against PEFT's own forward on tiny tensors, the best of many rounds in turn: 8 us of 27 on the machine where it was written."""
    stock, fused, _ = pair()
    x, first, theirs = X[0, :1], layers(fused)[0], layers(stock)[0]
    rounds = [[timeit.timeit(call, number=50) for call in (lambda: why_not_fused(first, x), lambda: theirs(x))] for _ in range(100)]
    check, call = (2e4 * min(times) for times in zip(*rounds, strict=True))
    assert check < 0.6 * call, f"{check:.1f} us of {call:.1f}"


def test_no_graph_break(calls):
    _, fused, _ = pair()
    assert torch._dynamo.explain(fused)(X).graph_break_count == 0
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), fused(X))
    for layer in layers(fused):
        layer.scaling["default"] = torch.tensor(1.5)
    torch.testing.assert_close(compiled(X), fused(X))


def test_adapter_config_has_no_trace(tmp_path):
    """What is saved is PEFT's, and stock PEFT reads it."""
    model = get_peft_model(Net(), use_fused(config()))
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path)._custom_modules is None

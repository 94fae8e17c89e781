"""Bases in 4 bits by bitsandbytes: in training of many tokens their weight is made whole, and the product and the adapter are one call."""

import contextlib
import copy
import weakref
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from peft_models import agree, checkpointed_alike, counted, results, train_all
from test_memory import Kept, mask_bytes
from test_peft_quantised import KINDS, adapted, config, four_bits, precise
from torch import nn

from lora_kernels import LoRAConfig, LoRAOver, MultiLoRAOver, Segments, UnsupportedError, apply_lora, remove_lora
from lora_kernels.dequantize import MANY, Made, four_bit, is_four_bit, whole
from lora_kernels.integrations.peft import fuse, mixed_adapters
from lora_kernels.shared_input import share_inputs

calls = counted  # the fixture
X = torch.randn(3, 201, 24, generator=torch.Generator().manual_seed(1))  # more than MANY tokens
FEW = X[:2]
FLOAT32 = dict(compute_dtype=torch.float32)


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """Layers that know the dtype they multiply in, as those that transformers loads."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind, how in (("nf4", {}), ("fp4", dict(quant_type="fp4")), ("nested", dict(compress_statistics=True))):
            make = lambda linear, how=how, dtype=dtype: four_bits(linear, compute_dtype=dtype, **how)  # noqa: E731
            monkeypatch.setitem(KINDS, f"{kind}, {dtype}", (make, None))


def pair(kind="nf4", dtype=torch.float32, **changed):
    stock = adapted(f"{kind}, {dtype}", **changed)
    fused = copy.deepcopy(stock)
    return stock, fused, fuse(fused)


def layer(**kwargs):
    torch.manual_seed(0)
    return four_bits(nn.Linear(24, 64), **{**FLOAT32, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested"])
def test_the_same_as_peft(kind, dtype, calls):
    stock, fused, report = pair(kind, dtype)
    assert X[..., 0].numel() > MANY and f"made whole for more than {MANY} tokens" in str(report) and len(report.beside) == 2
    agree(stock, fused, X.to(dtype), precise=precise(stock, f"{kind}, {dtype}"))
    assert len(calls) == 2 and all(call["base"] is None for call in calls)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_float32_activations_under_autocast(p, calls):
    """As prepare_model_for_kbit_training and Trainer's bf16 leave them: the product in bfloat16, its result in float32, as of the layer."""
    stock, fused, _ = pair(dtype=torch.bfloat16, lora_dropout=p)
    within = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    if not p:
        mine, theirs = results(fused, X, within), results(stock, X, within)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name].dtype is value.dtype, name
            torch.testing.assert_close(mine[name], value, rtol=0.05, atol=0.02 * value.abs().max().item(), msg=name)
    else:
        assert results(fused, X, within)["y"].dtype is torch.float32
    assert len(calls) == 2 and all(call["base"] is None for call in calls)


def test_where_the_layer_multiplies_itself(calls):
    """In evaluation, for few tokens, with hooks, for another dtype, or where the weight is not as it was loaded; and the results agree."""
    _, fused, _ = pair()
    wanted = fused(X)
    assert [call["base"] is None for call in calls] == [True, True]

    def own(x=X, within=contextlib.nullcontext):
        calls.clear()
        with within():
            y = fused(x)
        assert all(call["base"] is not None for call in calls) and len(calls) == 2
        return y

    torch.testing.assert_close(fused.eval() and own(), wanted)
    fused.train()
    torch.testing.assert_close(own(FEW), wanted[:2])
    assert own(X.bfloat16()).dtype is torch.bfloat16
    own(within=lambda: torch.autocast("cpu", torch.bfloat16))
    bases = [each.base_layer for each in (fused.base_model.model.first, fused.base_model.model.second)]
    for base in bases:
        base.weight.quant_state.packing_format_for_cpu = True
        assert four_bit(base, torch.zeros(600, base.in_features)) is None
        base.weight.quant_state.packing_format_for_cpu = False
        base.compute_type_is_set = False
    torch.testing.assert_close(own(), wanted)
    assert all(base.compute_type_is_set for base in bases), "by the layer itself"
    handles = [base.register_forward_hook(lambda *args: None) for base in bases]
    torch.testing.assert_close(own(), wanted)
    for handle in handles:
        handle.remove()
    calls.clear()
    fused(X)
    assert all(call["base"] is None for call in calls)
    assert is_four_bit(bases[0]) and not is_four_bit(nn.Linear(3, 4))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_kept_for_backward(p):
    """x once, u and the mask: neither the weight that was made, nor the base's product."""
    _, fused, _ = pair(lora_dropout=p)
    first = fused.base_model.model.first
    x = X.clone().requires_grad_()
    with Kept() as kept:
        first(x)
    assert kept.bytes([p for p in first.parameters() if p.requires_grad]) == 4 * 603 * (24 + 4) + mask_bytes(p, 603, 24)


def test_trained_bias(calls):
    """PEFT's bias="all" trains the base's own, whose gradient the one call makes."""
    stock, fused, _ = pair(bias="all")
    assert fused.base_model.model.first.base_layer.bias.requires_grad
    mine, theirs = results(fused, X), results(stock, X)
    assert any("bias" in name for name in theirs) and mine.keys() == theirs.keys() and calls[0]["base"] is None
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)


def test_mixed_batches(calls):
    """Each sample through the adapter it names, in training, in the one call."""
    stock, _, _ = pair()
    stock.add_adapter("b", config(r=7, lora_alpha=5))
    train_all(stock)
    fused, names = copy.deepcopy(stock), ["b", "__base__", "default"]
    fuse(fused)
    with mixed_adapters(fused, names):
        y = fused(X)
    assert [call["base"] is None for call in calls] == [True, True]
    stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(y, stock(X, adapter_names=names), rtol=1e-4, atol=1e-4)
    _, fused, _ = pair(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), mixed_adapters(fused, ["default", "__base__", "default"]):
        y = fused.base_model.model.first(X)
    assert y.dtype is torch.float32 and calls[-1]["base"] is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    checkpointed_alike(pair(lora_dropout=0.5)[1], X, reentrant)


class Three(nn.Module):
    """q, k and v of one x, without a bias but for q."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"q_proj": (24, 64, True), "k_proj": (24, 16, False), "v_proj": (24, 16, False)}
        for name, (K, N, bias) in sizes.items():
            setattr(self, name, four_bits(nn.Linear(K, N, bias, dtype=dtype), compute_dtype=dtype))
        self.is_loaded_in_4bit = True

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_x(dtype, peft, p, groups, within=None):
    """They share x here, too, and each weight is made when its turn comes; the results are those of each alone."""
    alone, names = Three(dtype), ["q_proj", "k_proj", "v_proj"]
    if peft:
        alone = get_peft_model(alone, config(target_modules=names, lora_dropout=p))
        fuse(alone)
    else:
        apply_lora(alone, LoRAConfig(target_modules=names, r=4, lora_alpha=8, init_lora_weights=False, lora_dropout=p))
    for bias in (module.bias for module in alone.modules() if is_four_bit(module) and module.bias is not None):
        bias.data = bias.data.to(dtype)
    together = copy.deepcopy(alone)
    assert len(share_inputs(together)) == 1
    x = X if within else X.to(dtype)
    how = (lambda: torch.autocast("cpu", within)) if within else contextlib.nullcontext
    found = []
    for model in (alone, together):
        torch.manual_seed(5)
        found.append(results(model, x, how))
    assert groups == [3] and found[0].keys() == found[1].keys()
    close = 1e-5 if dtype is torch.float32 else 0.02
    for name, value in found[0].items():
        assert found[1][name].dtype is value.dtype
        torch.testing.assert_close(found[1][name], value, rtol=close, atol=close * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_float32_layers_of_one_x_under_autocast(p, groups):
    test_layers_of_one_x(torch.bfloat16, True, p, groups, within=torch.bfloat16)


def test_no_two_weights_of_one_x_at_once(monkeypatch):
    """Each is made, used and let go before the next; none is kept."""
    model = Three(torch.float32)
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4, init_lora_weights=False))
    share_inputs(model)
    made, alive = Made.__call__, []

    def counted(self):
        assert all(each() is None for each in alive), "another weight is there still"
        weight = made(self)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Made, "__call__", counted)
    model(X.requires_grad_()).sum().backward()
    assert len(alive) == 6


def test_a_weight_written_between_two_calls(groups):
    """k's weight is another after q's call, which had made k's, too: k is computed again."""
    model = Three(torch.float32)
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4, init_lora_weights=False))
    share_inputs(model)
    x, k = X.clone().requires_grad_(), model.k_proj
    model.q_proj(x)
    with torch.no_grad():
        k.base_layer.weight.copy_(k.base_layer.weight.flip(0))
    y = k(x)
    share_inputs(model, ())
    torch.testing.assert_close(y, k(x), rtol=1e-5, atol=1e-5)
    assert groups[0] == 3


@pytest.mark.parametrize("peft", [True, False])
def test_a_cast_bias_is_computed_alone(peft, groups):
    """A bias of another dtype is cast anew at each call, so that no result of an earlier one is known for right."""
    model, names = Three(torch.bfloat16), ["q_proj", "k_proj", "v_proj"]
    model.q_proj.bias.data = model.q_proj.bias.data.float()
    if peft:
        model = get_peft_model(model, config(target_modules=names))
        fuse(model)
    else:
        apply_lora(model, LoRAConfig(target_modules=names, r=4, init_lora_weights=False))
    share_inputs(model)
    model(X.bfloat16().requires_grad_())
    (bias,) = (each.bias for each in model.modules() if is_four_bit(each) and each.bias is not None)
    assert groups == [2] and bias.dtype is torch.float32


def test_over_a_layer_that_multiplies_in_another_dtype(groups):
    """Under autocast, x in float32: `LoRAOver` gives what its layer gives, float32, which makes the product itself."""
    model, x = Three(torch.bfloat16), X.clone().requires_grad_()
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4))
    share_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = model.k_proj(x), model.k_proj.base_layer(x)
    assert y.dtype is torch.float32 and torch.equal(y, base) and not groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_peft(dtype):
    """`LoRAOver` and `MultiLoRAOver`: as for few tokens at a time, where the layer multiplies itself."""
    one = LoRAOver(layer(compute_dtype=dtype), r=4, init_lora_weights=False, lora_dropout=0.0)
    many = MultiLoRAOver(layer(compute_dtype=dtype), num_adapters=2, r=4, init_lora_weights=False)
    x = X.reshape(-1, 24).to(dtype)
    ids = torch.arange(len(x)) % 3 - 1
    close = dict(rtol=1e-4, atol=1e-4) if dtype is torch.float32 else dict(rtol=2**-6, atol=2**-6)
    for module, call in ((one, lambda x, ids: one(x)), (many, lambda x, ids: many(x, Segments.from_ids(ids, 2)))):
        with Kept() as kept:
            whole = call(x.requires_grad_(), ids)
        if module is one:
            assert kept.bytes([one.lora_A, one.lora_B]) == len(x) * (24 + 4) * x.element_size()
        parts = [call(part, its) for part, its in zip(x.split(201), ids.split(201), strict=True)]
        torch.testing.assert_close(whole, torch.cat(parts), **close)
        assert whole.dtype is dtype
        grads = [torch.autograd.grad(y.float().square().sum(), [x, module.lora_A]) for y in (whole, torch.cat(parts))]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=close["rtol"], atol=4 * close["atol"] * theirs.abs().max().item())


@pytest.mark.parametrize("kind", ["nf4", "fp4, double", "int8", "torchao", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_layers_of_quantised_ones(kind, dtype):
    """remove_lora(merge=True, dequantize=...): each answers as the quantised one with its adapter; those without become plain, too."""
    torch.manual_seed(0)
    make = KINDS[kind][0]
    model = nn.Sequential(make(nn.Linear(64, 64)), nn.Tanh(), make(nn.Linear(64, 64, bias=False)), nn.Tanh(), nn.Linear(64, 32)).eval()
    for each in (model[0], model[2]):
        each.support_avx512bf16_for_cpu = False
    model[4].to(dtype)
    names = apply_lora(model, LoRAConfig(target_modules=["2"], r=4, init_lora_weights=False))
    x = torch.randn(5, 64).to(dtype)
    wanted, bias, told = model(x), model[0].bias, []
    model[1].hf_quantizer = SimpleNamespace(remove_quantization_config=told.append)  # as transformers' models have
    assert remove_lora(model, merge=True, dequantize=dtype) == names and model[0].bias is not bias
    assert all(type(model[i]) is nn.Linear and model[i].weight.dtype is dtype and not model[i].training for i in (0, 2, 4))
    assert not any(p.requires_grad for p in (*model[0].parameters(), *model[2].parameters())) and told == [model[1]]
    rough = 0.05 if kind == "int8" else 0.02 if dtype is torch.bfloat16 else 1e-4  # 8 bits: of x, too, in evaluation
    torch.testing.assert_close(model(x), wanted, rtol=rough, atol=rough)


def test_wholes_are_of_a_layer_s_own_weight():
    made = layer(compute_dtype=torch.float32)
    weight = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    assert torch.equal(whole(made, 24, torch.float32), weight) and made.bias is not None and made.training
    wide = four_bits(nn.Linear(2112, 4), compute_dtype=torch.float32)  # more columns than are asked for at a time
    assert torch.equal(whole(wide, 2112, torch.float32), bnb.functional.dequantize_4bit(wide.weight.data, wide.weight.quant_state))


class Curved(nn.Module):
    in_features = out_features = 8

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randint(0, 9, (8, 8), dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(8))

    def forward(self, x):
        return torch.tanh(x * 3) * 4


def test_dequantize_refusals():
    """In each case the model is as it was."""
    model = nn.Sequential(four_bits(nn.Linear(64, 64), **FLOAT32), nn.Linear(64, 8))
    apply_lora(model, LoRAConfig(target_modules=["0", "1"], r=2, init_lora_weights=False))
    x, before = torch.randn(3, 64), list(model.modules())
    y, state = model(x), copy.deepcopy(model.state_dict())

    def refused(error, words, **how):
        with pytest.raises(error, match=words):
            remove_lora(model, **{"merge": True, **how})
        assert list(model.modules()) == before and torch.equal(model(x), y)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    refused(UnsupportedError, "merge: wanted layers with a weight to write to, got 0 over a Linear4bit; dequantize=torch.bfloat16")
    refused(TypeError, "dequantize: wanted float16, bfloat16, float32, float64 or None, got 16", dequantize=16)
    refused(TypeError, "dequantize: wanted float16.* got torch.int8", dequantize=torch.int8)
    refused(ValueError, "dequantize: wanted None with merge=False", merge=False, dequantize=torch.float32)
    model[0].lora_B.data[3, 1], state["0.lora_B"][3, 1] = float("nan"), float("nan")
    with pytest.raises(ValueError, match="merge: wanted a finite merged weight"):
        remove_lora(model, merge=True, dequantize=torch.float32)
    assert list(model.modules()) == before and not model[1].merged and torch.equal(model[1].weight, state["1.weight"])

    model = nn.Sequential(four_bits(nn.Linear(64, 8), **FLOAT32), Curved())
    apply_lora(model, LoRAConfig(target_modules=["0"], r=2))
    before = list(model.modules())
    with pytest.raises(UnsupportedError, match="base_layer: wanted one that multiplies by a matrix, got a Curved that does something else"):
        remove_lora(model, merge=True, dequantize=torch.float32)
    assert list(model.modules()) == before and model[1].bias is not None
    with pytest.raises(UnsupportedError, match="base_layer: wanted one with a weight to make whole, got a Identity without any tensor"):
        whole(nn.Identity(), 64, torch.float32)
    hooked = nn.Sequential(four_bits(nn.Linear(64, 8), **FLOAT32), four_bits(nn.Linear(64, 8), **FLOAT32))
    apply_lora(hooked, LoRAConfig(target_modules=["0"], r=2))
    for each, name in ((hooked[0].base_layer, "0"), (hooked[1], "1")):
        handle = each.register_forward_hook(lambda *args: None)
        with pytest.raises(UnsupportedError, match=f"{name}: wanted a layer without hooks"):
            remove_lora(hooked, merge=True, dequantize=torch.float32)
        handle.remove()
    many = nn.Sequential(four_bits(nn.Linear(64, 8), **FLOAT32))
    apply_lora(many, LoRAConfig(target_modules=["0"], r=2), num_adapters=2)
    with pytest.raises(ValueError, match="merge: wanted layers of one adapter, got 0 with 2"):
        remove_lora(many, merge=True, dequantize=torch.float32)

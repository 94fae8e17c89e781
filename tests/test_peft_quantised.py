"""PEFT's layers over quantised bases: the base's own kernels make its product, and the fused call adds the adapter as PEFT would."""

import copy
import pickle
from types import SimpleNamespace

import bitsandbytes as bnb
import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft_models import X, agree, checkpointed_alike, config, counted, train_all
from test_memory import Kept, mask_bytes
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_kernels import (
    LoRAConfig,
    LoRAOver,
    Segments,
    UnsupportedError,
    apply_lora,
    load_adapter,
    philox,
    remove_lora,
    save_adapter,
    use_segments,
)
from lora_kernels.integrations import peft as ours
from lora_kernels.integrations.peft import Fused, fuse, mixed_adapters, unfuse, use_fused, why_not_fused

calls = counted  # the fixture
NAMES = ["b", "__base__", "default"]


class Packed(nn.Module):
    """A quantised layer without a weight of that name, as GPTQ's, AWQ's and AQLM's are: 4 bits a value, one scale a row."""

    def __init__(self, linear, out_dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.out_dtype = linear.in_features, linear.out_features, out_dtype
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        y = nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if self.out_dtype is None else y.to(self.out_dtype)


def four_bits(linear, **kwargs):
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **{"quant_type": "nf4", **kwargs})
    made.load_state_dict(linear.state_dict())
    # With AVX512-BF16 bitsandbytes packs a weight anew at its first call without gradients, and cannot where K is no multiple of 64.
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu")


def eight_bits(linear):
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def by_torchao(linear):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


KINDS = {
    "nf4": (four_bits, None),
    "fp4, double": (lambda linear: four_bits(linear, quant_type="fp4", compress_statistics=True), None),
    "nf4, plain scales, bfloat16": (lambda linear: four_bits(linear, compress_statistics=False, compute_dtype=torch.bfloat16), None),
    "int8": (eight_bits, None),
    "torchao": (by_torchao, None),
    "gptq": (Packed, GPTQLoraLinear),
    "awq": (Packed, AwqLoraLinear),
    "aqlm": (Packed, AqlmLoraLinear),
}


class Net(nn.Module):
    """Widths of which bitsandbytes takes whole blocks; ``first`` with a bias, ``second`` without."""

    def __init__(self, make):
        super().__init__()
        self.first, self.second = make(nn.Linear(24, 64)), make(nn.Linear(64, 16, bias=False))
        self.is_loaded_in_4bit = isinstance(self.first, bnb.nn.Linear4bit)  # what transformers sets, and PEFT asks for
        self.is_loaded_in_8bit = isinstance(self.first, bnb.nn.Linear8bitLt)
        if make is by_torchao:  # from which PEFT before 0.20 has to know how to pack
            self.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: None))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(kind: str, early=False, **changed):
    """The model with PEFT's layer for this kind of base, as PEFT's dispatchers choose it where the packages of its kind are there."""
    make, wrapper = KINDS[kind]
    torch.manual_seed(0)
    given = use_fused(config(**changed)) if early else config(**changed)
    if wrapper is None:
        return get_peft_model(Net(make), given)

    def dispatch(target, name, config=None, **kwargs):  # PEFT before 0.19 passes the config's fields instead
        return wrapper(target, name, **kwargs, **({} if config is None else {"config": config}))

    given._register_custom_module({Packed: dispatch})
    return get_peft_model(Net(make), given)


def precise(model, kind: str, **changed):
    """The same values in float64: nn.Linear layers with what the quantised ones stand for, which they make of one-hot inputs."""

    def full(layer):
        wide = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        with torch.no_grad():
            bias = 0 if layer.bias is None else layer.bias.float()
            wide.weight.copy_((layer(torch.eye(layer.in_features)).float() - bias).T)
            if layer.bias is not None:
                wide.bias.copy_(layer.bias)
        return wide

    bases = [module.base_layer for module in model.modules() if isinstance(module, LoraLayer)]
    wide = iter([full(copy.deepcopy(base)) for base in bases])
    truth = get_peft_model(Net(lambda linear: next(wide)), config(**changed))
    for name in model.peft_config:
        if name != "default":
            truth.add_adapter(name, model.peft_config[name])
    truth.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False)
    for (name, exact), (_, given) in zip(adapters(truth), adapters(model), strict=True):
        assert torch.equal(exact, given), name
        exact.requires_grad_(given.requires_grad)
    truth.base_model.set_adapter(model.active_adapters)
    return truth.double()


def adapters(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]


def pair(kind: str, **changed):
    stock = adapted(kind, **changed)
    fused = copy.deepcopy(stock)
    return stock, fused, fuse(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_peft(kind, dtype, calls):
    stock, fused, report = pair(kind)
    below = "base layer's weight is a " if kind == "torchao" else type(stock.base_model.model.first.base_layer).__name__
    assert len(report.fused) == 2 and set(report.beside) == set(report.fused) and not report.left
    assert "2 beside their base: its base layer" in str(report) and below in str(report)
    agree(stock, fused, X.to(dtype), precise=precise(stock, kind))
    assert len(calls) == 2 and all(call["base"].dtype == dtype for call in calls)
    kinds = {type(m) for m in fused.modules() if isinstance(m, LoraLayer)}
    assert len(kinds) == 1 and all(issubclass(each, Fused) and each.__name__.startswith("Fused") for each in kinds)
    assert kinds == {getattr(ours, each.__name__) for each in kinds}
    assert unfuse(fused) == 2 and type(fused.base_model.model.first) is type(stock.base_model.model.first)


@pytest.mark.parametrize("kind", KINDS)
def test_use_fused_builds_what_fuse_makes(kind):
    wanted, model = adapted(kind), adapted(kind, early=True)
    fuse(wanted)
    kinds = [type(m) for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(kinds) == 2 and kinds == [type(m) for m in wanted.modules() if isinstance(m, LoraLayer)]
    assert issubclass(kinds[0], Fused) and torch.equal(model(X), wanted(X))


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq"])
def test_autocast(kind, calls):
    stock, fused, _ = pair(kind)
    for model in (stock, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X)
        y.float().sum().backward()
    for (name, mine), (_, theirs) in zip(adapters(fused), adapters(stock), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=0.05 * theirs.grad.abs().max().item(), msg=name)
    assert len(calls) == 2


def test_a_base_of_another_dtype_than_x(calls):
    """The result has the base's dtype, as in PEFT, and x takes part in it."""
    make = lambda linear: Packed(linear, torch.bfloat16)  # noqa: E731
    KINDS["16 bits out"] = (make, AwqLoraLinear)
    try:
        stock, fused, _ = pair("16 bits out")
    finally:
        del KINDS["16 bits out"]
    mine, theirs = (model.base_model.model.first(X) for model in (fused, stock))
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
    assert len(calls) == 1


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_kept_for_backward(p):
    """Beside what the base's own product keeps: x, u and the mask."""
    _, fused, _ = pair("nf4", lora_dropout=p)
    layer = fused.base_model.model.first
    x = torch.randn(32, 24, requires_grad=True)
    with Kept() as base:
        layer.base_layer(x)
    with Kept() as kept:
        layer(x)
    besides = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert kept.bytes(besides) - base.bytes() == 4 * 32 * (24 + 4) + mask_bytes(p, 32, 24)


def test_dropout_is_peft_s_with_this_mask(calls):
    stock, fused, _ = pair("nf4", lora_dropout=0.5)
    first, theirs = fused.base_model.model.first, stock.base_model.model.first
    torch.manual_seed(5)
    keep = philox.keep_mask(philox.draw_seed(X.device), 15, 24, 0.5).reshape(X.shape)
    wanted = theirs.base_layer(X) + theirs.lora_B["default"](theirs.lora_A["default"](torch.where(keep, 2 * X, 0.0))) * 2.0
    torch.manual_seed(5)
    torch.testing.assert_close(first(X), wanted)
    assert calls[0]["dropout_p"] == 0.5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_mixed_batches(kind, calls):
    """Each sample through the adapter it names, in training, beside one product of the base."""
    stock = adapted(kind)
    stock.add_adapter("b", config(r=7, lora_alpha=5))
    train_all(stock)
    fused, whole = copy.deepcopy(stock), X.clone().requires_grad_()
    fuse(fused)
    with mixed_adapters(fused, NAMES):
        y = fused(whole)
    y.square().sum().backward()
    stock.eval(), fused.eval()
    with torch.no_grad():  # PEFT's loop over 8-bit layers fails with gradients: it writes to a view
        wanted = stock(X, adapter_names=NAMES)
        torch.testing.assert_close(fused(X, adapter_names=NAMES), wanted, rtol=1e-4, atol=1e-4)
    stock.train()  # where an 8-bit product is another than in inference
    for sample, name in enumerate(NAMES):
        alone = X[sample].clone().requires_grad_()
        if name != "__base__":
            stock.set_adapter(name)
            stock.zero_grad()
            each = stock(alone)
            torch.testing.assert_close(y[sample], each, rtol=1e-4, atol=1e-4)
            each.square().sum().backward()
            mine, theirs = (dict(model.named_parameters()) for model in (fused, stock))
            for key, parameter in theirs.items():
                if f".{name}." in key:
                    torch.testing.assert_close(mine[key].grad, parameter.grad, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(whole.grad[sample], alone.grad, rtol=1e-3, atol=1e-4)
    assert len(calls) == 4


def test_mixed_batches_where_peft_has_none(calls):
    """PEFT's GPTQ layer takes no names; the fused one does."""
    _, fused, _ = pair("gptq")
    fused.eval()
    y = fused(X, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(y[[0, 2]], fused(X)[[0, 2]])
    with fused.disable_adapter():
        torch.testing.assert_close(y[1], fused(X)[1])
    assert len(calls) == 4


def test_several_disabled_and_merged(calls):
    stock, fused, _ = pair("nf4")
    for model in (stock, fused):
        torch.manual_seed(3)
        model.add_adapter("b", config(r=7))
        model.base_model.set_adapter(["default", "b"])
    agree(stock, fused, precise=precise(stock, "nf4"))
    assert len(calls) == 2
    with torch.no_grad(), stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(stock(X), fused(X))
    for model in (stock, fused):
        model.base_model.set_adapter("default")
        model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(stock(X), fused(X)) and len(calls) == 2, "merged, it is the base's own product"


def test_hooks_below_and_above_stay(calls):
    _, fused, _ = pair("nf4")
    seen = []
    fused.base_model.model.first.base_layer.register_forward_hook(lambda *args: seen.append("base"))
    fused.base_model.model.first.register_forward_hook(lambda *args: seen.append("layer"))
    fused(X)
    assert seen == ["base", "layer"] and len(calls) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    checkpointed_alike(pair("nf4", lora_dropout=0.5)[1], X, reentrant)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.19"), reason="PEFT's layers over 4 bits have no other variant than DoRA")
def test_variants_are_left_to_peft(calls):
    _, fused, report = pair("nf4", alora_invocation_tokens=[1])
    assert all("ALoraLinearVariant" in reason for reason in report.left.values()) and len(report.left) == 2 and not report.beside
    fused(X)
    assert not calls and "ALoraLinearVariant" in why_not_fused(fused.base_model.model.first)


def test_copies_and_pickles():
    _, fused, _ = pair("nf4")
    layer = fused.base_model.model.first
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(copy.deepcopy(layer)) is type(layer) is ours.FusedLinear4bit
    assert torch.equal(again(X), layer(X))
    with pytest.raises(AttributeError, match="has no attribute 'FusedThing'"):
        ours.FusedThing  # noqa: B018


def test_compiles_without_a_break():
    _, fused, _ = pair("gptq")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(X), fused(X))


def test_a_product_that_is_no_plain_tensor_is_an_error():
    _, fused, _ = pair("gptq")
    layer = fused.base_model.model.first
    layer.base_layer.out_dtype = torch.int32
    with pytest.raises(UnsupportedError, match=r"base_layer: wanted a plain floating-point .* Packed, got torch.int32; unfuse\(model\)"):
        layer(X)


def test_plain_models_save_what_peft_loads(tmp_path):
    """apply_lora without PEFT, over 4 bits; the files answer alike in PEFT's layer over the same base, and in another slot."""
    torch.manual_seed(0)
    model = Net(four_bits)
    peft_model = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(target_modules=["first", "second"], r=4, lora_alpha=8, init_lora_weights=False))
    assert {type(layer) for layer in (model.first, model.second)} == {LoRAOver}
    y = model(X)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(peft_model, tmp_path)(X), y, rtol=1e-4, atol=1e-4)
    many = remove_lora(model) and model
    assert type(many.first) is bnb.nn.Linear4bit
    apply_lora(many, LoRAConfig.from_folder(tmp_path), num_adapters=3)
    load_adapter(many, tmp_path, slot=2)
    with use_segments(many, Segments.from_ids(torch.full((15,), 2), 3)):
        torch.testing.assert_close(many(X), y, rtol=1e-4, atol=1e-4)


def test_a_llama_in_4_bits_learns(tmp_path):
    """The usual way: transformers' 4-bit loading, prepare_model_for_kbit_training, get_peft_model, and then one line."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantised)
    model = prepare_model_for_kbit_training(model)  # norms in float32, gradient checkpointing
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, init_lora_weights=False))
    stock = copy.deepcopy(model)
    report = fuse(model)
    assert len(report.beside) == 14 and not report.left
    text = torch.tensor(list(b"W is frozen; A and B are trained, at ranks from one up, and merged they cost nothing."))[None]
    losses = {}
    for name, each in (("stock", stock), ("fused", model)):
        each.train()
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        losses[name] = []
        for _ in range(6):
            loss = each(input_ids=text, labels=text).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["fused"][-1] < losses["fused"][0] - 0.1
    torch.testing.assert_close(torch.tensor(losses["fused"]), torch.tensor(losses["stock"]), rtol=0.02, atol=0)

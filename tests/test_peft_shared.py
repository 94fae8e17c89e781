"""`share_inputs` under PEFT: the layers that `fuse` took, in models as they are, against PEFT's own."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lora_kernels import share_inputs
from lora_kernels.integrations.peft import fuse, mixed_adapters, unfuse

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def pair(model=None, **changed):
    """The same model in float64 with PEFT's own layers, and fused, its inputs shared."""
    torch.manual_seed(0)
    config = {"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "init_lora_weights": False, **changed}
    stock = get_peft_model((model or LlamaForCausalLM(LlamaConfig(**SIZES))).double(), LoraConfig(**config), autocast_adapter_dtype=False)
    fused = copy.deepcopy(stock)
    fuse(fused)
    return stock, fused, share_inputs(fused)


def step(model, **kwargs) -> dict:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=IDS, labels=IDS, **kwargs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-9, atol=1e-11, msg=name)


def test_a_llama_trains_as_pefts(groups):
    stock, fused, formed = pair()
    layer = "base_model.model.model.layers.0"
    assert formed[0] == tuple(f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    assert formed[1] == tuple(f"{layer}.mlp.{name}" for name in ("gate_proj", "up_proj")) and len(formed) == 4
    same(step(fused), step(stock))
    assert groups == [3, 2] * 2
    for each in (stock, fused):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # otherwise few tokens stand alone first
        each.enable_input_require_grads()
    same(step(fused), step(stock))
    assert groups == [3, 2] * 6


@pytest.mark.parametrize("names", [("q_proj", "k_proj"), ("add_q_proj", "add_k_proj", "add_v_proj")])  # of the text, in diffusers
def test_layers_right_under_the_model_are_one_group(names):
    """Which PEFT's wrappers pass off as their own attributes."""
    model = get_peft_model(torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in names}), LoraConfig(target_modules=list(names)))
    fuse(model)
    assert share_inputs(model) == [tuple(f"base_model.model.{name}" for name in names)]


def test_dropout_is_that_of_fused_layers_alone(groups):
    _, fused, _ = pair(lora_dropout=0.3)
    ours = step(fused)
    assert groups == [3, 2] * 2
    share_inputs(fused, ())
    same(ours, step(fused))
    assert groups == [3, 2] * 2


def test_states_of_peft():
    """Disabled, merged, another adapter, two at once, one batch of two: as PEFT computes them, whatever stood before."""
    stock, fused, _ = pair()
    other = LoraConfig(target_modules=["q_proj", "v_proj", "gate_proj"], r=2, init_lora_weights=False)
    results: list = []
    for model in (stock, fused):
        torch.manual_seed(7)
        model.add_adapter("other", other)
        model.double()
        found = []
        for change in (
            lambda model: model.set_adapter("other"),
            lambda model: model.base_model.set_adapter(["default", "other"]),
            lambda model: model.set_adapter("default"),
            lambda model: model.merge_adapter(),
            lambda model: model.unmerge_adapter(),
        ):
            change(model)
            found.append(model(IDS).logits.detach())
        with model.disable_adapter():
            found.append(model(IDS).logits.detach())
        model.eval()
        with torch.no_grad():
            found.append(model(IDS, adapter_names=["other", "default"]).logits)
            found.append(model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))
        results.append(found)
    fuse(fused)
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)
    with mixed_adapters(fused, ["other", "default"]):
        torch.testing.assert_close(fused(IDS).logits.detach(), results[0][6], rtol=1e-9, atol=1e-11)


def test_cross_attention_is_found_out():
    """A T5 decoder's k and v are of the encoder's states: right from the first step on."""
    sizes = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    torch.manual_seed(0)
    stock, fused, formed = pair(T5ForConditionalGeneration(T5Config(**sizes)), target_modules=["q", "k", "v"])
    assert len(formed) == 3
    with pytest.warns(UserWarning, match="q, k, v were not called with one x, twice in a row"):
        for _ in range(2):
            same(step(fused), step(stock))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(step(fused), step(stock))


def test_unfuse_ends_it(groups):
    stock, fused, _ = pair()
    unfuse(fused)
    same(step(fused), step(stock))
    assert groups == [] and not any("_shares" in module.__dict__ for module in fused.modules())


def test_float32_adapters_on_a_16_bit_base(groups):
    """PEFT's default: A and B are cast tile by tile, and their gradients are float32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    fused = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=3, init_lora_weights=False))
    fuse(fused)
    share_inputs(fused)
    grads = step(fused)
    assert groups == [3, 3]
    assert {t.dtype for name, t in grads.items() if "lora" in name} == {torch.float32}

"""`recompute_gates` on transformers' models with PEFT's layers, fused: the gradients are what they were."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from test_memory import Kept
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from lora_kernels import recompute_gates, share_inputs
from lora_kernels.integrations.peft import fuse, mixed_adapters, unfuse

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4)),
}
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
MLPS = [f"base_model.model.model.layers.{i}.mlp" for i in range(2)]


def fused(model="llama", dtype=torch.float32, **changed):
    torch.manual_seed(0)
    config = {"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "init_lora_weights": False, **changed}
    model = get_peft_model(MODELS[model]().to(dtype), LoraConfig(**config))
    fuse(model)
    return model.train()


def step(model, **kwargs) -> dict:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=IDS, labels=IDS, **kwargs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, wanted in theirs.items():
        assert torch.equal(ours[name], wanted), name


@pytest.mark.parametrize("dtype, p, shared", [(torch.float32, 0.0, True), (torch.float32, 0.3, False), (torch.bfloat16, 0.3, True)])
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bits(kind, dtype, p, shared, nodes):
    model = fused(kind, dtype, lora_dropout=p)
    if shared:
        share_inputs(model)
    plain = step(model)
    assert recompute_gates(model) == MLPS
    same(step(model), plain)
    assert nodes == [1, 1]
    for reentrant in () if shared else (True, False):  # a checkpoint's first pass shares nothing of few tokens
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        same(step(model), plain)


def test_bytes_kept():
    kept, model = [], fused()
    for _ in range(2):
        with Kept() as each:
            model(input_ids=IDS)
        kept.append(each.bytes(besides=model.parameters()))
        recompute_gates(model)
    assert kept[0] - kept[1] == 2 * 2 * 4 * IDS.numel() * SIZES["intermediate_size"]


def test_pefts_states(nodes):
    """A mixed batch, two adapters at once, a disabled adapter, a merged one, PEFT's own layers again: as without."""
    model = fused()
    model.add_adapter("other", LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    fuse(model)
    plain = copy.deepcopy(model)
    recompute_gates(model)
    same(step(model), step(plain))
    assert nodes == [1, 1]
    nodes.clear()
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])
    same(step(model), step(plain))
    with mixed_adapters(model, ["default", "other"]), mixed_adapters(plain, ["default", "other"]):
        same(step(model), step(plain))
    for each in (model, plain):
        each.base_model.set_adapter("other")
        each.merge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for each in (model, plain):
        each.unmerge_adapter()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert nodes == []
    for each in (model, plain):
        unfuse(each)
    same(step(model), step(plain))
    assert nodes == []


def test_adapters_of_a_parameter_are_pefts():
    """Over a square Conv1D, whose weight lies the other way round."""

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.u, self.d, self.act = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16), Conv1D(16, 16), torch.nn.SiLU()

        def forward(self, x):
            return self.d(self.act(self.g(x)) * self.u(x))

    model = torch.nn.Sequential()
    model.mlp = MLP()
    config = LoraConfig(target_modules=["g"], target_parameters=["mlp.d.weight"], r=2, init_lora_weights=False)
    model = get_peft_model(model, config).train()
    fuse(model)
    x = torch.randn(3, 8)
    plain = model.base_model.model.mlp(x)
    recompute_gates(model)
    assert torch.equal(model.base_model.model.mlp(x), plain)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_four_bits(autocast, reentrant, nodes):
    """A weight that is made whole, in both passes: of many tokens in training, over bitsandbytes' 4 bits; with autocast as Trainer has it,
    beside float32 activations that prepare_model_for_kbit_training leaves."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the base is bitsandbytes'")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 1024})
    ).bfloat16()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            four = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            four.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=four)
            setattr(layer.mlp, name, four.to("cpu"))
    model.is_loaded_in_4bit = True
    if autocast:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(target_modules=targets, r=3, lora_dropout=0.3, init_lora_weights=False))
    fuse(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ids = torch.randint(0, 40, (1, 1024))

    dtypes = []
    model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda module, args, y: dtypes.append(y.dtype))

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert recompute_gates(model) == MLPS
    same(gradients(), plain)
    assert len(nodes) == (4 if reentrant is False else 2) and set(dtypes) == {torch.float32 if autocast else torch.bfloat16}

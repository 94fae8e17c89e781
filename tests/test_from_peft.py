"""What users bring from PEFT and transformers: its config, adapters of a head, float32 files, tied embeddings."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import variants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LayoutLMv3Config,
    LayoutLMv3Model,
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    Wav2Vec2Config,
    Wav2Vec2ForXVector,
    WavLMConfig,
    WavLMModel,
)
from transformers.models.detr.modeling_detr import DetrMHAttentionMap
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

from lora_kernels import AdapterPool, FusedLoRALinear, LoRAConfig, MultiLoRALinear, UnsupportedError, apply_lora, load_adapter, remove_lora

pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")

IDS = torch.arange(12).view(2, 6)
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
HEAD = "base_model.model.lm_head.base_layer.weight"


def llama(layers: int = 1, **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, **more)).eval()


@pytest.fixture(scope="module")
def of_a_head(tmp_path_factory):
    """A folder with PEFT's adapter of q_proj and lm_head, beside which it wrote the head's own weight, and what its model answers."""
    folder = tmp_path_factory.mktemp("head")
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, lora_alpha=8, init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.save_pretrained(folder, save_embedding_layers=True)
    assert HEAD in load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        return folder, model.eval()(IDS).logits


def test_an_adapter_of_a_head(of_a_head):
    folder, wanted = of_a_head
    model = llama()
    apply_lora(model, LoRAConfig.from_folder(folder))
    assert load_adapter(model, folder) == ["model.layers.0.self_attn.q_proj", "lm_head"]
    torch.testing.assert_close(model(IDS).logits, wanted)


def test_an_adapter_of_a_head_in_a_slot(of_a_head):
    folder, wanted = of_a_head
    model = llama()
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "lm_head"], r=4), num_adapters=2)
    pool = AdapterPool(model)
    pool.add("head", folder)
    with torch.no_grad(), pool.use(["head", None]):
        found = model(IDS).logits
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], llama()(IDS).logits[1])


def test_an_adapter_of_another_head_is_refused(of_a_head, tmp_path):
    folder, _ = of_a_head
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[HEAD][3, 5] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    model = llama()
    apply_lora(model, LoRAConfig.from_folder(folder))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head.base_layer.weight: wanted the weight that the model has there, got another"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_pefts_own_config():
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], r=6, lora_alpha=12, bias="none", task_type="CAUSAL_LM", rank_pattern={"v_proj": 2}
    )
    ours, theirs = llama(), get_peft_model(llama(), config)
    names = apply_lora(ours, config)
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    for name in names:
        layer, like = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert (layer.r, layer.scaling) == (like.r["default"], like.scaling["default"])
    with pytest.raises(TypeError, match="wanted a lora_kernels.LoRAConfig or PEFT's LoraConfig, got dict"):
        apply_lora(llama(), config.to_dict())


@pytest.mark.parametrize("layers, pattern", [(2, None), ([0, 2, 7], "layers"), ([1], ["h", "lay.*s"]), ([], None)])
def test_some_layers(layers, pattern, tmp_path):
    targets = ["q_proj", "down_proj", "model.layers.0.self_attn.v_proj"]
    config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False, layers_to_transform=layers, layers_pattern=pattern)
    theirs, ours = get_peft_model(llama(3), config), llama(3)
    theirs.save_pretrained(tmp_path)
    names = apply_lora(ours, LoRAConfig.from_folder(tmp_path))
    assert names == [name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert load_adapter(ours, tmp_path) == names
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits)


@pytest.mark.parametrize("init", [True, False])
def test_pefts_own_config_says_where_training_begins(init):
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init)
    model, theirs = llama(), get_peft_model(llama(), config)
    apply_lora(model, config)
    for each in (
        model.model.layers[0].self_attn.q_proj.lora_B,
        theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight,
    ):
        assert each.any() == (not init)


@pytest.mark.skipif(not hasattr(variants, "MiCALinearVariant"), reason="a PEFT without MiCA")
def test_an_adapter_of_mica_is_a_plain_one(tmp_path):
    """Whose B is a part of the base that stays where it is, and frozen."""
    torch.manual_seed(0)
    theirs = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(target_modules=["0"], r=2, init_lora_weights="mica"))
    layer = theirs.base_model.model[0]
    nn.init.normal_(layer.lora_A["default"].weight)
    theirs.save_pretrained(tmp_path)
    model = nn.Sequential(nn.Linear(8, 6))
    model.load_state_dict({name: getattr(layer.base_layer, name[2:]) for name in ("0.weight", "0.bias")})
    apply_lora(model, LoRAConfig.from_folder(tmp_path))
    load_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"init_lora_weights": "gaussian"}, "init_lora_weights: wanted True or False to train from, got 'gaussian'"),
        ({"task_type": TaskType.SEQ_CLS}, "task_type: wanted one that leaves the head frozen, got 'SEQ_CLS', for which PEFT trains it"),
        ({"task_type": "QUESTION_ANS"}, "task_type: wanted one that leaves the head frozen, got 'QUESTION_ANS'"),
    ],
)
def test_what_pefts_own_config_would_train_otherwise_is_refused(changed, match):
    model, config = llama(), LoraConfig(target_modules=["q_proj"], **changed)
    with pytest.raises(UnsupportedError, match=match):
        apply_lora(model, config)
    config.inference_mode = True  # as PEFT saves it: a file has the values
    apply_lora(model, config)


def test_pefts_layers_are_fused_not_adapted():
    peft = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=4))
    for targets in ("all-linear", ["v_proj"]):
        with pytest.raises(UnsupportedError, match="model: wanted one without PEFT's layers.*q_proj; .*fuse.model. gives them the kernels"):
            apply_lora(peft, LoRAConfig(target_modules=targets))
    assert all(p.requires_grad == ("lora_" in name) for name, p in peft.named_parameters())
    assert apply_lora(peft.unload(), LoRAConfig(target_modules=["v_proj"])) == ["model.layers.0.self_attn.v_proj"]


def test_all_linear_does_not_pass_by_what_peft_means_with_it():
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(TypeError, match="transformer.h.0.attn.c_attn: wanted an nn.Linear or a quantised layer, got Conv1D"):
        apply_lora(model, LoRAConfig(target_modules="all-linear"))
    assert apply_lora(model, LoRAConfig(target_modules="all-linear", exclude_modules=["c_attn", "c_proj", "c_fc"])) == ["score"]


@pytest.mark.parametrize(
    "model, layer",
    [
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1)), "backbone.layers.0.mixer.dt_proj"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1)), "backbone.layers.0.mixer.out_proj"),
        (lambda: WavLMModel(WavLMConfig(**SMALL)), "encoder.layers.0.attention.q_proj"),
        (lambda: LayoutLMv3Model(LayoutLMv3Config(**SMALL, vocab_size=40)), "encoder.rel_pos_x_bias"),
        (lambda: MobileBertForMaskedLM(MobileBertConfig(**SMALL, embedding_size=16, vocab_size=40)), "cls.predictions.dense"),
        (lambda: Wav2Vec2ForXVector(Wav2Vec2Config(**SMALL)), "tdnn.0.kernel"),
        (lambda: nn.ModuleList([DetrMHAttentionMap(32, 4)]), "0.k_proj"),
        (lambda: nn.ModuleList([LongcatFlashTopkRouter(LongcatFlashConfig(hidden_size=32))]), "0.classifier"),
    ],
    ids=["mamba dt", "mamba out", "wavlm", "layoutlmv3", "mobilebert", "tdnn", "detr", "longcat"],
)
def test_layers_that_transformers_does_not_call_are_refused(model, layer):
    with pytest.raises(UnsupportedError, match=rf"{layer}: \w+ reads its weight past the adapter; name it in exclude_modules"):
        apply_lora(model(), LoRAConfig(target_modules=[layer]))


def test_a_saved_config_may_name_other_models_modules(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "c_attn"], r=4, rank_pattern={"c_attn": 2}, init_lora_weights=False)
    peft = get_peft_model(llama(), config)
    peft.save_pretrained(tmp_path)
    model, saved = llama(), LoRAConfig.from_folder(tmp_path)
    assert apply_lora(model, saved) == ["model.layers.0.self_attn.q_proj"]
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, peft(IDS).logits)
    with pytest.raises(ValueError, match="target_modules: wanted layers to fuse, got none"):
        apply_lora(llama(), replace(saved, target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="target_modules: wanted what means modules of the model, got 'c_attn', which means none"):
        apply_lora(llama(), replace(saved, inference_mode=False))


def test_float32_files_on_a_16_bit_base(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    peft = get_peft_model(llama().bfloat16(), config)
    peft.save_pretrained(tmp_path)
    model = llama().bfloat16()
    apply_lora(model, config)
    with pytest.raises(TypeError, match=r"pass cast=True to round, or make the layers with adapter_dtype=torch.float32"):
        load_adapter(model, tmp_path)
    exact = llama().bfloat16()
    apply_lora(exact, config, adapter_dtype=torch.float32)
    load_adapter(exact, tmp_path)
    theirs = PeftModel.from_pretrained(llama().bfloat16(), tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(exact.model.layers[0].self_attn.q_proj.lora_A, theirs.lora_A["default"].weight)


@pytest.mark.parametrize("slots", [None, 2])
def test_a_tied_weight_is_not_merged_into(slots):
    model = llama(tie_word_embeddings=True)
    config = LoRAConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    apply_lora(model, config, num_adapters=slots)
    kind = FusedLoRALinear if slots is None else MultiLoRALinear
    head, q = model.lm_head, model.model.layers[0].self_attn.q_proj
    assert isinstance(head, kind) and head.weight is model.model.embed_tokens.weight
    before = head.weight.clone()
    with pytest.raises(ValueError, match="merge: wanted a weight of its own, got one that another module shares"):
        head.merge(*(() if slots is None else (0,)))
    assert torch.equal(head.weight, before) and not head.merged
    q.merge(*(() if slots is None else (0,)))
    assert q.merged


def test_a_merged_layer_cast_and_disabled():
    layer = FusedLoRALinear(32, 16, r=4, init_lora_weights=False)
    base = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.enabled = False
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, base.bfloat16(), layer.bias))
    assert layer.state_dict()["weight"].dtype == torch.bfloat16
    layer.unmerge()
    assert torch.equal(layer.weight, base.bfloat16())


def test_slots_without_a_plan_say_where_one_comes_from():
    model = llama()
    apply_lora(model, LoRAConfig(target_modules=["q_proj"], r=4), num_adapters=2)
    with pytest.raises(TypeError, match=r"within use_adapters\(model, slots\), use_segments\(model, plan\) or pool.use\(names\)"):
        model(IDS)


def test_what_is_exported_after_a_merge(tmp_path):
    """Checkpoints hold base and adapter apart; `remove_lora` makes the merged weights the model's own."""
    model = llama()
    apply_lora(model, LoRAConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    with torch.no_grad():
        wanted = model(IDS).logits
        remove_lora(model, merge=True)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted)

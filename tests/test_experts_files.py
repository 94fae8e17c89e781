"""Files of adapted experts: both ways with PEFT's own, and what a load refuses."""

import copy
import json

import pytest
import torch
from experts_models import Experts, K, X
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_apply import unchanged
from test_experts_apply import WHERE, net, ours
from torch import nn

pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has no experts interface")
from test_peft_experts import KINDS, MODELS, Net
from test_peft_experts import X as XP

from lora_kernels import FusedLoRALinear, LoRAConfig, LoRAExperts, UnsupportedError, apply_lora, load_adapter, remove_lora, save_adapter
from lora_kernels.experts import projections

CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64 on both sides: sums in another order, nothing else


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def contents(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def stock(folder, plain, **options) -> PeftModel:
    """PEFT's model with an adapter that is not zero, from its files."""
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(**{"target_modules": [], "r": 3, "lora_alpha": 5, **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


def wrapped(theirs) -> dict[str, torch.Tensor]:
    """PEFT's adapter by the names that our state dict has."""
    state = theirs.base_model.model.state_dict()
    return {name.replace(".default.weight", ""): t for name, t in state.items() if "lora_" in name}


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 2},
    "patterns": {
        "rank_pattern": {"(gate_)?up_proj": 5, "experts.down_proj": 1},
        "alpha_pattern": {r"experts\.(gate_)?up_.*": 7},
    },
    "with a linear layer": {"target_modules": ["router"], "rank_pattern": {"router": 2}},
    "the first alone": {"alone": 0},
    "the second alone": {"alone": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_there_and_back(kind, options, tmp_path):
    """PEFT's files in our layers, and ours in PEFT: outputs, names, values, bit for bit, and the scalings as PEFT resolves them."""
    options = dict(options)
    plain, alone = Net(kind).double().eval(), options.pop("alone", None)
    names = [f"experts.{name}" for name in projections(plain.experts)]
    names = names if alone is None else [names[alone]]
    theirs = stock(tmp_path / "theirs", plain, target_parameters=names[::-1], **options)
    model, x = copy.deepcopy(plain), XP.double()
    given = apply_lora(model, LoRAConfig.from_folder(tmp_path / "theirs"))
    assert given == [*options.get("target_modules", ()), *names]
    keys = {name.replace(".default.weight", "").replace("router.base_layer", "router") for name in theirs.base_model.model.state_dict()}
    assert model.state_dict().keys() == keys, "one nesting"
    assert sorted(load_adapter(model, tmp_path / "theirs")) == sorted(given)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), **CLOSE)
        assert not torch.allclose(model(x), plain(x))
    held = wrapped(theirs)
    assert all(torch.equal(p, held[name]) for name, p in model.named_parameters() if "lora_" in name)

    save_adapter(model, tmp_path / "ours")
    mine, other = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), theirs(x), **CLOSE)
    mine, other = wrapped(again), wrapped(theirs)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    remove_lora(model, merge=True)
    theirs = theirs.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), **CLOSE)
    assert model.state_dict().keys() == theirs.state_dict().keys() == plain.state_dict().keys()


def test_trained_alike(tmp_path):
    """A few steps of both from one adapter: the same adapters, so the same gradients."""
    plain = Net().double()
    stock(tmp_path, plain, target_parameters=["gate_up_proj", "down_proj"])
    model = copy.deepcopy(plain)
    apply_lora(model, LoRAConfig.from_folder(tmp_path))
    load_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True)
    for each in (model, theirs):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            each(XP.double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    held, before = wrapped(theirs), contents(tmp_path)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert not torch.equal(p, before[f"base_model.model.{name}.weight"]), name
            torch.testing.assert_close(p, held[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_its_attention(name, tmp_path):
    """transformers' own models, adapters on attention and experts, the files both ways."""
    torch.manual_seed(0)
    plain = MODELS[name]().double().eval()
    plain.config._experts_implementation = "eager"  # torch's grouped product knows no float64
    targets = dict(target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    theirs = stock(tmp_path / "theirs", plain, task_type="CAUSAL_LM", **targets)
    model, ids = copy.deepcopy(plain), torch.arange(18).view(2, 9)
    assert len(apply_lora(model, LoRAConfig.from_folder(tmp_path / "theirs"))) == 8
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-6, atol=1e-7)  # routers and rotary sines are float32
        save_adapter(model, tmp_path / "ours", task_type="CAUSAL_LM")
        config = config_of(tmp_path / "ours")
        assert config["target_modules"] == ["q_proj", "v_proj"] and config["target_parameters"] == ["down_proj", "gate_up_proj"]
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-7)
    mine, other = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_pefts_peculiarities():
    """What we say of PEFT: no dropout beside target_parameters, whatever exclude_modules says, endings alone."""
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        get_peft_model(Net(), LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], lora_dropout=0.1))
    names = dict(target_modules=["router"], exclude_modules=["experts"], target_parameters=["down_proj"])
    theirs, model = get_peft_model(Net(), LoraConfig(**names)), Net()
    assert apply_lora(model, LoRAConfig(**names)) == ["router", "experts.down_proj"]
    assert {name for name in wrapped(theirs)} == {name for name, p in model.named_parameters() if p.requires_grad}


def test_saved_and_loaded(tmp_path):
    options = dict(target_modules=["inner"], rank_pattern={"gate_up_proj": 6}, alpha_pattern={"inner": 2}, lora_dropout=0.1)
    model = ours(**options).eval()
    model.mlp["experts"].scaling = 0.3
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"] and config["target_modules"] == ["inner"]
    assert config["r"] == 6 and config["rank_pattern"] == {"inner": 3, "mlp.experts.down_proj": 3} and config["lora_dropout"] == 0
    other = net().eval()
    assert apply_lora(other, LoRAConfig.from_folder(tmp_path)) == ["inner", *WHERE]
    assert sorted(load_adapter(other, tmp_path)) == sorted(["inner", *WHERE])
    assert torch.equal(other(X.double()), model(X.double())) and other.mlp["experts"].scaling == pytest.approx(0.3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.0 if not p.requires_grad else 1.0)
    compiled = torch.compile(other, backend="eager")
    assert sorted(load_adapter(compiled, tmp_path)) == sorted(["inner", *WHERE])
    assert torch.equal(other(X.double()), model(X.double()))
    save_adapter(model, tmp_path / "one", one_scale=True)
    apply_lora(fresh := net().eval(), LoRAConfig.from_folder(tmp_path / "one"))
    load_adapter(fresh, tmp_path / "one")
    assert len({round(m.scaling, 12) for m in fresh.modules() if isinstance(m, (FusedLoRALinear, LoRAExperts))}) == 1
    torch.testing.assert_close(fresh(X.double()), model(X.double()), rtol=1e-12, atol=1e-12)


def test_a_merged_models_adapter_is_saved_and_not_loaded_into(tmp_path):
    model = ours()
    save_adapter(model, tmp_path / "apart")
    for each in model.mlp["experts"].chain():
        each.merge()
    save_adapter(model, tmp_path / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    with pytest.raises(RuntimeError, match="wanted unmerged layers to load into, got merged ones"):
        load_adapter(model, tmp_path / "apart")


def test_names_that_mean_more_than_the_adapted(tmp_path):
    """A stack by its whole name where its end means others, too; and one that no name tells from another."""
    model = nn.ModuleDict({"a": net(), "b": net()})
    apply_lora(model, LoRAConfig(target_parameters=["b.mlp.experts.down_proj"]))
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_parameters"] == ["b.mlp.experts.down_proj"]
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": LoRAExperts(Experts(), "down_proj")}), "x": net()})
    with pytest.raises(ValueError, match="wanted stacks whose names mean no other parameter, .* got mlp.experts.down_proj"):
        save_adapter(model, tmp_path)


def edited(folder, config=None, tensors=None):
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **config}))
    if tensors:
        held = load_file(folder / "adapter_model.safetensors")
        save_file(tensors(held), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def only(held, *parts):
    return {key: t for key, t in held.items() if key.startswith(tuple(f"base_model.model.mlp.experts{part}.lora" for part in parts))}


FILES = {
    "one of the two": (dict(config={"target_parameters": ["gate_up_proj"]}), {}, ValueError,
                       "wanted names of down_proj, gate_up_proj of mlp.experts, .* got .'gate_up_proj'., which means gate_up_proj"),
    "no parameters": (dict(config={"target_parameters": None, "target_modules": ["inner"]}), {}, ValueError, r"got \[\], which means none"),
    "a part that is another's": (dict(config={"target_parameters": ["gate_up_proj"]}, tensors=lambda held: only(held, "")),
                                 {"partial": True}, ValueError, "target_parameters: wanted names of down_proj, gate_up_proj"),
    "another rank": (dict(config={"r": 4}), {}, ValueError, "mlp.experts.*_proj: wanted rank 3, the layer's, got 4"),
    "fewer experts": (dict(tensors=lambda held: {key: t[:-3].contiguous() if "lora_A" in key else t for key, t in held.items()}), {},
                      ValueError, r"lora_A.weight: wanted shape \[15, \d+\], got \[12, \d+\]"),
    "PEFT 0.18": (dict(config={"peft_version": "0.18.1"}), {}, UnsupportedError, "from 0.19 on, got an older"),
    "PEFT 0.17": (dict(config={"auto_mapping": None}), {}, UnsupportedError, "as PEFT has them from 0.19 on, got an older one's"),
    "a layer more": (dict(tensors=lambda held: only(held, "")), {}, ValueError, "2 missing .*partial=True"),
    "a slot": ({}, {"slot": 0}, ValueError, "slot: wanted None, for layers of one adapter .mlp.experts"),
    "NaN": (dict(tensors=lambda held: {key: t / 0 * 0 if "base_layer" in key else t for key, t in held.items()}), {}, ValueError, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_load_refuses_and_changes_nothing(what, tmp_path):
    edits, options, error, match = FILES[what]
    save_adapter(ours(), tmp_path)
    edited(tmp_path, **edits)
    model = ours()
    with unchanged(model), pytest.raises(error, match=match):
        load_adapter(model, tmp_path, **options)


def test_partial(tmp_path):
    model = ours()
    save_adapter(model, tmp_path)
    edited(tmp_path, tensors=lambda held: only(held, ".base_layer"))
    other = ours()
    nn.init.ones_(other.mlp["experts"].lora_B)
    assert load_adapter(other, tmp_path, partial=True) == ["mlp.experts.gate_up_proj"]
    assert not other.mlp["experts"].lora_B.any() and torch.equal(
        other.mlp["experts"].base_layer.lora_A, model.mlp["experts"].base_layer.lora_A
    )


def test_a_model_of_another_width(tmp_path):
    save_adapter(ours(), tmp_path)
    assert K != 20
    narrow = net()
    narrow.mlp["experts"].gate_up_proj = nn.Parameter(torch.randn(5, 32, 20).double())
    apply_lora(narrow, LoRAConfig.from_folder(tmp_path))
    with unchanged(narrow), pytest.raises(ValueError, match=r"base_layer.lora_A.weight: wanted shape \[15, 20\], got \[15, 24\]"):
        load_adapter(narrow, tmp_path)


def test_inspect_says_that_stacks_are_not_its(tmp_path):
    from lora_kernels import inspect_adapter

    save_adapter(ours(), tmp_path)
    with pytest.raises(ValueError, match="wanted adapted modules, got target_parameters, whose factors hold several matrices each"):
        inspect_adapter.Adapter(tmp_path)

"""Adapter files, both ways with PEFT's own, in stacks of adapters, and as servers read them."""

import copy
import json
import os
import random
import struct

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    MultiLoRALinear,
    Segments,
    apply_lora,
    load_adapter,
    save_adapter,
    use_segments,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLOSE = dict(rtol=1e-12, atol=1e-12)  # float64 on both sides: sums in another order, nothing else


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)

    def forward(self, x):
        return x + self.k_proj(torch.tanh(self.q_proj(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Q = ["blocks.0.q_proj", "blocks.1.q_proj"]


def base(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(7)
    return Net().to(dtype)


def ours(dtype=torch.float64, num_adapters=None, adapter_dtype=None, **kwargs) -> nn.Module:
    model = base(dtype)
    config = LoRAConfig(**{"target_modules": ["q_proj", "k_proj"], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **kwargs})
    apply_lora(model, config, num_adapters=num_adapters, adapter_dtype=adapter_dtype)
    return model


def layers(model) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (FusedLoRALinear, MultiLoRALinear))}


def state(model) -> dict:
    """All that an adapter's load or save could change, copied, with addresses."""
    tensors = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    plain = {name: (m.r, copy.deepcopy(m.lora_alpha), m.use_rslora, getattr(m, "_ranks", None)) for name, m in layers(model).items()}
    return {"tensors": tensors, "plain": copy.deepcopy(plain), "scaling": {n: copy.deepcopy(m.scaling) for n, m in layers(model).items()}}


def assert_unchanged(model, before):
    after = state(model)
    assert after["plain"] == before["plain"] and after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(torch.as_tensor(s), torch.as_tensor(before["scaling"][n])) for n, s in after["scaling"].items())
    for name, (pointer, t) in after["tensors"].items():
        old, values = before["tensors"][name]
        assert pointer == old and torch.equal(t.view(torch.uint8), values.view(torch.uint8)), f"{name}: bit for bit"


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "k_proj"]},
    "rslora": {"target_modules": ["q_proj", "head"], "r": 9, "use_rslora": True},
    "regex": {"target_modules": r"blocks\.\d\.[qk]_proj"},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["1.k_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "head"],
        "rank_pattern": {"0.q_proj": 1, r"blocks\.\d\.q_proj": 7, "^head": 2},
        "alpha_pattern": {"k_proj": 5, "blocks.1.k_proj": 9, "head": 1},
    },
    "patterns, rslora": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 16},
        "alpha_pattern": {".*": 3},
        "use_rslora": True,
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def stock(folder, plain=None, seed=3, **kwargs) -> PeftModel:
    """PEFT's files of an adapter that is not zero, and the model as PEFT reads them: it sorts patterns, so another may match first."""
    torch.manual_seed(seed)
    plain = plain or base()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(**{"r": 4, "lora_alpha": 6, **kwargs}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


def contents(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(os.path.join(folder, WEIGHTS))


def config_of(folder) -> dict:
    with open(os.path.join(folder, CONFIG)) as file:
        return json.load(file)


@pytest.mark.parametrize("kwargs", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back(kwargs, tmp_path):
    """PEFT's files in our layers; and what we save of them in PEFT: outputs, keys, values, and the config as PEFT resolves it."""
    theirs = stock(tmp_path / "theirs", **kwargs)
    model = base().eval()
    names = apply_lora(model, LoRAConfig.from_folder(tmp_path / "theirs"))
    wrapped = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(names) == wrapped == set(layers(model)), "the same layers"
    assert sorted(load_adapter(model, tmp_path / "theirs")) == sorted(names)
    torch.testing.assert_close(model(X), theirs(X), **CLOSE)
    assert not torch.allclose(model(X), base()(X))

    save_adapter(model, tmp_path / "ours")
    mine, other = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    again = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(X), theirs(X), **CLOSE)
    for name in names:
        a, b = (m.base_model.model.get_submodule(name) for m in (again, theirs))
        assert (a.r, a.lora_alpha, a.scaling) == (b.r, b.lora_alpha, b.scaling), name
    with open(tmp_path / "ours" / WEIGHTS, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        assert json.loads(file.read(size))["__metadata__"] == {"format": "pt"}


def test_into_a_peft_model_that_is_there(tmp_path):
    model = ours().eval()
    save_adapter(model, tmp_path)
    theirs = get_peft_model(base(), LoraConfig.from_pretrained(tmp_path)).eval()
    result = set_peft_model_state_dict(theirs, contents(tmp_path))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    torch.testing.assert_close(theirs(X), model(X), **CLOSE)


def test_the_config_as_written(tmp_path):
    model = ours(lora_dropout=0.25)
    model.name_or_path = "some/model"
    save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    wanted = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "q_proj"], "lora_dropout": 0.25, "bias": "none"}
    wanted |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_bias": False, "use_dora": False, "inference_mode": True}
    wanted |= {"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM", "modules_to_save": None, "fan_in_fan_out": False}
    assert config_of(tmp_path) == {**wanted, "init_lora_weights": True}
    assert isinstance(config_of(tmp_path)["lora_alpha"], int)
    theirs = LoraConfig.from_pretrained(tmp_path)
    known = theirs.to_dict()
    assert {key: known[key] for key in wanted if key != "target_modules"} == {k: v for k, v in wanted.items() if k != "target_modules"}
    assert theirs.target_modules == {"q_proj", "k_proj"}


@pytest.mark.parametrize("seed", range(12))
def test_any_ranks_alphas_and_targets(seed, tmp_path):
    """Layers that differ in everything, built by hand: PEFT and our own reader resolve what was written to the same."""
    choose, model = random.Random(seed), base()
    every = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name in choose.sample(every, choose.randint(1, len(every))):
        rslora = choose.random() < 0.3
        linear = model.get_submodule(name)
        kwargs = {"r": choose.choice([1, 2, 8, 16]), "lora_alpha": choose.choice([4, 16, 2.5]), "use_rslora": rslora}
        model.set_submodule(name, FusedLoRALinear.from_linear(linear, init_lora_weights=False, **kwargs))
        if choose.random() < 0.3:
            model.get_submodule(name).scaling = choose.uniform(-2, 2)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), model(X), **CLOSE)
    mine = base()
    assert set(apply_lora(mine, LoRAConfig.from_folder(tmp_path))) == set(layers(model))
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(mine(X), model(X), **CLOSE)


def test_names_that_end_alike_and_names_like_expressions(tmp_path):
    """A name that is the end of another, and one with a plus: patterns are anchored, targets spelt as an expression."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.a = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4), "x+y": nn.Linear(4, 4)})

        def forward(self, x):
            return self.a["x+y"](torch.tanh(self.a["proj"](torch.tanh(self.proj(x)))))

    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(2, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)
    for name, r in (("proj", 1), ("a.x+y", 2)):
        model.set_submodule(name, FusedLoRALinear.from_linear(model.get_submodule(name), r=r, init_lora_weights=False))
    save_adapter(model, tmp_path / "two")
    assert config_of(tmp_path / "two")["target_modules"] == r"a\.x\+y|proj"
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "two")(x), model(x), **CLOSE)
    model.set_submodule("a.proj", FusedLoRALinear.from_linear(model.get_submodule("a.proj"), r=2, init_lora_weights=False))
    save_adapter(model, tmp_path / "three")
    assert config_of(tmp_path / "three")["rank_pattern"] == {"^proj": 1}
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "three")(x), model(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own lora_B.bias for a shard
@pytest.mark.parametrize("flag", ["lora_bias", "use_dora"])
def test_variants(flag, tmp_path):
    """An adapter's bias and DoRA's magnitude, under PEFT's keys."""
    theirs = stock(tmp_path / "theirs", target_modules=["q_proj"], **{flag: True})
    model = base().eval()
    apply_lora(model, LoRAConfig.from_folder(tmp_path / "theirs"))
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(X), theirs(X), **CLOSE)
    save_adapter(model, tmp_path / "ours")
    assert config_of(tmp_path / "ours")[flag] is True
    assert contents(tmp_path / "ours").keys() == contents(tmp_path / "theirs").keys()
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "ours").eval()(X), theirs(X), **CLOSE)
    model.blocks[1].q_proj.scaling = 0.4
    save_adapter(model, tmp_path / "one", one_scale=True)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "one").eval()(X), model(X), **CLOSE)
    model.blocks[1].k_proj = FusedLoRALinear.from_linear(model.blocks[1].k_proj)
    with pytest.raises(ValueError, match=f"wanted {flag} in all layers or in none, .* got it in blocks.0.q_proj, blocks.1.q_proj alone"):
        save_adapter(model, tmp_path / "ours")
    without = ours(target_modules=["q_proj"])
    before = state(without)
    with pytest.raises(ValueError, match="2 that the model has no place for .base_model.model.blocks.0.q_proj.lora_"):
        load_adapter(without, tmp_path / "theirs")
    assert_unchanged(without, before)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double().eval()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], "all-linear"])
def test_a_transformers_llama(llama, targets, tmp_path):
    ids = torch.arange(12).view(2, 6)
    patterns = {"rank_pattern": {"layers.1.self_attn.v_proj": 8}, "alpha_pattern": {"down_proj": 32}}
    theirs = stock(tmp_path / "theirs", llama, target_modules=targets, task_type="CAUSAL_LM", **patterns)
    model = copy.deepcopy(llama)
    names = apply_lora(model, LoRAConfig.from_folder(tmp_path / "theirs"))
    assert len(names) == (6 if targets != "all-linear" else 14) and "lm_head" not in names
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)
    save_adapter(model, tmp_path / "ours", task_type="CAUSAL_LM")
    assert contents(tmp_path / "ours").keys() == contents(tmp_path / "theirs").keys()
    assert set(config_of(tmp_path / "ours")["target_modules"]) <= {name.rpartition(".")[2] for name in names}
    again = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, **CLOSE)


def served(folder) -> dict[str, torch.Tensor]:
    """scaling * B A of each layer as SGLang 0.5.23 computes it: lora_alpha / r, no patterns, no use_rslora; layers from the keys."""
    config, tensors = config_of(folder), contents(folder)
    assert not config["modules_to_save"] and config["bias"] == "none" and isinstance(config["target_modules"], list)
    scaling = config["lora_alpha"] / config["r"]
    updates = {}
    for key in tensors:
        prefix, name, kind = key[: len("base_model.model.")], *key[len("base_model.model.") :].rsplit(".lora_", 1)
        assert prefix == "base_model.model." and kind in ("A.weight", "B.weight"), key
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert A.shape[0] == B.shape[1] <= config["r"], "servers reserve room for r of the config"
        updates[name] = scaling * B @ A
    return updates


@pytest.mark.parametrize("rslora", [False, True])
def test_what_a_server_with_one_scaling_computes(rslora, tmp_path):
    model = ours(rank_pattern={"1.q_proj": 16, "k_proj": 2}, use_rslora=rslora)
    save_adapter(model, tmp_path / "as_is")
    save_adapter(model, tmp_path / "one", one_scale=True)
    assert len({m.scaling for m in layers(model).values()}) > 1
    for name, update in served(tmp_path / "one").items():
        torch.testing.assert_close(update, layers(model)[name].delta_weight(), **CLOSE)
    assert any(not torch.allclose(update, layers(model)[name].delta_weight()) for name, update in served(tmp_path / "as_is").items())
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "one")(X), model(X), **CLOSE)
    model.blocks[1].q_proj.scaling = 0.0
    with pytest.raises(ValueError, match="one_scale: wanted a scaling other than 0 in blocks.1.q_proj"):
        save_adapter(model, tmp_path / "one", one_scale=True)
    save_adapter(ours(), tmp_path / "plain")
    for name, update in served(tmp_path / "plain").items():
        torch.testing.assert_close(update, layers(ours())[name].delta_weight(), **CLOSE)


def test_slots(tmp_path):
    """Each slot from its own file, PEFT's or ours, at its own rank; the others unmoved; and out again."""
    folders = [tmp_path / "a", tmp_path / "b"]
    models = [stock(folders[0], r=2, target_modules=["q_proj", "k_proj"])]
    models += [stock(folders[1], seed=4, r=8, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}, use_rslora=True)]
    model = ours(num_adapters=3, r=8).eval()
    before = state(model)
    for slot, folder in ((2, folders[0]), (0, folders[1])):
        assert sorted(load_adapter(model, folder, slot=slot)) == sorted(layers(model))
    for name, layer in layers(model).items():
        assert layer.ranks.tolist() == [5 if "k_proj" in name else 8, 8, 2]
        for part in ("lora_A", "lora_B", "scaling"):
            pointer, old = before["tensors"][f"{name}.{part}"]
            assert getattr(layer, part).data_ptr() == pointer and torch.equal(getattr(layer, part)[1], old[1]), "in place, and slot 1 still"
    with use_segments(model, Segments.from_ids(torch.tensor([2, 0, -1]).repeat_interleave(4), 3)):
        y = model(X)
    wanted = torch.stack([models[0](X)[0], models[1](X)[1], base()(X)[2]])
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)  # stacks keep scalings in float32
    for slot, folder in ((2, folders[0]), (0, folders[1])):
        save_adapter(model, tmp_path / "out", slot=slot)
        mine, theirs = contents(tmp_path / "out"), contents(folder)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        config = config_of(folder)
        assert LoRAConfig.from_folder(tmp_path / "out").rank_of("blocks.0.k_proj") == config["rank_pattern"].get("k_proj", config["r"])
        torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "out")(X), models[slot == 0](X), rtol=1e-6, atol=1e-6)


def test_a_slots_scaling_comes_back_exactly(tmp_path):
    model = ours(num_adapters=2)
    for layer, s in zip(layers(model).values(), (0.3, -1 / 3, 1e-9, 1.5), strict=True):
        layer.scaling[1] = s
    before = {name: layer.scaling.clone() for name, layer in layers(model).items()}
    save_adapter(model, tmp_path, slot=1)
    load_adapter(model, tmp_path, slot=1)
    assert all(torch.equal(layer.scaling, before[name]) for name, layer in layers(model).items())
    model = ours(num_adapters=2, r=3, lora_alpha=1)
    save_adapter(model, tmp_path, slot=1)
    assert config_of(tmp_path)["lora_alpha"] == 1, "the lora_alpha it was built with, though float32 rounds 1 / 3"


def test_training_goes_on_after_a_load(tmp_path):
    model = ours()
    save_adapter(model, tmp_path)
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = model(X)
    load_adapter(model, tmp_path)
    assert torch.equal(model(X), ours()(X)) and not torch.equal(model(X), moved)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(X), ours()(X)), "the optimizer holds what was loaded"


def test_a_module_with_two_names(tmp_path):
    def twice(model):
        model.blocks[1] = model.blocks[0]
        model.again = model.head
        return model

    model = twice(base())
    apply_lora(model, LoRAConfig(target_modules=["q_proj", "head", "again"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    assert {key.split(".lora")[0] for key in contents(tmp_path)} == {"base_model.model.blocks.0.q_proj", "base_model.model.head"}
    other = twice(base())
    apply_lora(other, LoRAConfig.from_folder(tmp_path))
    load_adapter(other, tmp_path)
    assert other.again is other.head and torch.equal(other(X), model(X))


def test_a_compiled_models_names_are_the_plain_models(tmp_path):
    model = ours()
    save_adapter(model, tmp_path / "plain")
    model.blocks[1].q_proj = torch.compile(model.blocks[1].q_proj, backend="eager")
    compiled = torch.compile(model, backend="eager")
    save_adapter(compiled, tmp_path / "compiled")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
    assert len(load_adapter(compiled, tmp_path / "plain")) == 4


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda m: torch.compile(nn.DataParallel(m), backend="eager")])
def test_a_wrapped_models_names_are_the_plain_models(wrap, tmp_path):
    save_adapter(ours(), tmp_path / "plain")
    save_adapter(wrap(ours()), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    assert len(load_adapter(wrap(ours()), tmp_path / "plain")) == 4

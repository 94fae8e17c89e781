"""PEFT's files into packed layers and out of them: each layer under its own name, all of a packed layer's or none."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_kernels import (
    AdapterPool,
    LoRAConfig,
    MultiLoRALinear,
    PackedLoRALinear,
    Segments,
    apply_lora,
    load_adapter,
    save_adapter,
    use_segments,
)

K, WIDTHS, E, R = 24, (16, 8, 8), 3, 6
NAMES = ("q_proj", "k_proj", "v_proj")
X = torch.randn(7, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLOSE = dict(rtol=1e-12, atol=1e-12)


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        for name, width in zip(NAMES, WIDTHS, strict=True):
            setattr(self, name, nn.Linear(K, width))
        self.o_proj = nn.Linear(32, K)

    def forward(self, x):
        return self.o_proj(torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1))


class Packed(nn.Module):
    """The same, with one layer for q, k and v."""

    def __init__(self, apart: Apart, names=NAMES):
        super().__init__()
        linears = [copy.deepcopy(getattr(apart, name)) for name in NAMES]
        how = dict(num_adapters=E, r=R, lora_alpha=12, init_lora_weights=False, names=names)
        self.qkv_proj = PackedLoRALinear.from_linears(linears, **how)
        self.o_proj = apart.o_proj

    def forward(self, x):
        return self.o_proj(self.qkv_proj(x))


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def base() -> nn.Module:
    torch.manual_seed(7)
    return Net(Apart).double()


def packed(names=NAMES) -> nn.Module:
    blocks = iter(base().blocks)
    return Net(lambda: Packed(next(blocks), names))


def saved(folder, targets=NAMES, **config) -> nn.Module:
    torch.manual_seed(3)
    config = dict(r=4, lora_alpha=10, init_lora_weights=False) | config
    model = get_peft_model(base(), LoraConfig(target_modules=list(targets), **config)).eval()
    model.save_pretrained(folder)
    return model


def answers(model: nn.Module, slot: int) -> torch.Tensor:
    with torch.no_grad(), use_segments(model, Segments.from_ids(torch.full((7,), slot), E)):
        return model(X)


def test_loads_what_peft_saved(tmp_path):
    theirs, mine = saved(tmp_path), packed()
    before = answers(mine, 0)
    loaded = load_adapter(mine, tmp_path, slot=1)
    assert loaded == [f"blocks.{i}.{name}" for i in range(2) for name in NAMES]
    assert mine.blocks[0].qkv_proj.ranks.tolist() == [R, 4, R] and mine.blocks[0].qkv_proj.scaling[1] == 2.5
    torch.testing.assert_close(answers(mine, 1), theirs(X), **CLOSE)
    assert torch.equal(answers(mine, 0), before)
    torch.testing.assert_close(answers(mine, -1), base()(X), **CLOSE)


def test_peft_loads_what_is_saved(tmp_path):
    mine = packed()
    mine.blocks[1].qkv_proj.load_adapter(2, torch.randn(3, 2, K), torch.randn(32, 2), scale=0.25)
    save_adapter(mine, tmp_path, slot=2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(NAMES)
    theirs = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), answers(mine, 2), **CLOSE)
    other = packed()
    load_adapter(other, tmp_path, slot=0)
    torch.testing.assert_close(answers(other, 0), answers(mine, 2), **CLOSE)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "v_proj"), ()])
def test_a_file_that_lacks_layers(tmp_path, targets):
    """Those then answer as the base; without ``partial`` the file does not fit."""
    mine = packed()
    if not targets:
        theirs = saved(tmp_path, NAMES, layers_to_transform=[0], layers_pattern="blocks")
    else:
        theirs = saved(tmp_path, targets)
    with pytest.raises(ValueError, match="missing"):
        load_adapter(mine, tmp_path, slot=0)
    loaded = load_adapter(mine, tmp_path, slot=0, partial=True)
    assert len(loaded) == (2 * len(targets) or 3)
    torch.testing.assert_close(answers(mine, 0), theirs(X), **CLOSE)


def test_what_does_not_fit_changes_nothing(tmp_path):
    saved(tmp_path / "wide", r=7)
    saved(tmp_path / "uneven", rank_pattern={"k_proj": 2})
    saved(tmp_path / "others", ("q_proj", "o_proj"))
    mine = packed()
    before = copy.deepcopy(mine.state_dict())
    for folder, says in (
        ("wide", "blocks.0.q_proj: wanted a rank from 1 to the stack's 6, got 7"),
        ("uneven", r"wanted one scaling \(lora_alpha / r\) for layers that are packed together, got .*'blocks.0.k_proj': 5.0"),
        ("others", r"that the model has no place for \(base_model.model.blocks.0.o_proj.lora_A.weight"),
    ):
        with pytest.raises(ValueError, match=says):
            load_adapter(mine, tmp_path / folder, slot=1)
    with pytest.raises(ValueError, match="slot: wanted the number of an adapter"):
        load_adapter(mine, tmp_path / "wide")
    assert all(torch.equal(mine.state_dict()[name], t) for name, t in before.items())


def test_ranks_that_differ_with_one_scaling(tmp_path):
    theirs = saved(tmp_path, rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 5})
    mine = packed()
    load_adapter(mine, tmp_path, slot=1)
    torch.testing.assert_close(answers(mine, 1), theirs(X), **CLOSE)


def test_scalings_that_differ_by_rounding_alone(tmp_path):
    """A scaling that was set is written as the lora_alpha that gives it, from which each rank reads another last bit."""
    apart = base()
    apply_lora(
        apart, LoRAConfig(target_modules=list(NAMES), r=6, rank_pattern={"q_proj": 1, "k_proj": 3, "v_proj": 1}, init_lora_weights=False)
    )
    for block in apart.blocks:
        for name in NAMES:
            getattr(block, name).scaling = 0.1
    save_adapter(apart, tmp_path)
    mine = packed()
    load_adapter(mine, tmp_path, slot=1)
    torch.testing.assert_close(answers(mine, 1), apart(X).detach(), rtol=1e-7, atol=1e-7)  # a slot's scaling is float32


@pytest.mark.parametrize("other", ["packed", "alone"])
def test_names_that_two_layers_have(tmp_path, other):
    """Neither would be told from the other: nothing is written, nothing changed."""
    how = dict(num_adapters=E, r=R, init_lora_weights=False)
    twin = PackedLoRALinear(K, WIDTHS, names=NAMES, **how) if other == "packed" else MultiLoRALinear(K, 16, **how)
    model = nn.ModuleDict(
        {"self_qkv": PackedLoRALinear(K, WIDTHS, names=NAMES, **how), "q_proj" if other == "alone" else "cross_qkv": twin}
    )
    for step in (lambda: save_adapter(model, tmp_path / "new", slot=0), lambda: load_adapter(model, tmp_path, slot=0)):
        with pytest.raises(ValueError, match="names: wanted a name for each layer that files can tell apart, got q_proj for two"):
            step()
    assert not (tmp_path / "new").exists()


def test_names():
    for names in (3, "qkv", iter(NAMES), ("q", "k"), ("q", "k", "q"), ("q", "k", "a.v"), ("q", "k", ""), ("q", "k", 3)):
        with pytest.raises(ValueError, match="names: wanted a name without dots for each of 3 layers, or None"):
            packed(names)
    assert packed(list(NAMES)).blocks[0].qkv_proj.names == NAMES


def test_a_packed_layer_that_is_the_model(tmp_path):
    layer = PackedLoRALinear(K, WIDTHS, num_adapters=E, r=R, init_lora_weights=False, names=NAMES)
    with pytest.raises(ValueError, match="wanted one that contains"):
        save_adapter(layer, tmp_path, slot=0)
    model = nn.ModuleDict({"qkv_proj": layer})
    save_adapter(model, tmp_path, slot=0)
    other = nn.ModuleDict({"qkv_proj": PackedLoRALinear(K, WIDTHS, num_adapters=E, r=R, names=NAMES)})
    assert load_adapter(other, tmp_path, slot=2) == list(NAMES)
    for own, its in zip(layer.adapter(0), other["qkv_proj"].adapter(2), strict=True):
        assert torch.equal(own, its)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_pool(tmp_path, again):
    theirs, pool = saved(tmp_path), AdapterPool(packed())
    pool.add("theirs", tmp_path)
    other = again(pool)
    assert other.model is not pool.model and other.names == ["theirs"]
    with torch.no_grad(), other.use(["theirs"] * 7):
        torch.testing.assert_close(other.model(X), theirs(X), **CLOSE)
    assert not pool.resident

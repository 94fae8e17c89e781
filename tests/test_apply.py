"""apply_lora and remove_lora on plain torch models: what is adapted, with what, and what is refused with nothing changed."""

import contextlib
import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn

from lora_kernels import FusedLoRALinear, LoRAConfig, MultiLoRALinear, Segments, UnsupportedError, apply_lora, remove_lora, use_segments


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.norm = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(x + self.k_proj(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 10, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def get_output_embeddings(self):
        return self.head


IDS = torch.arange(12).view(3, 4) % 10
Q = ["blocks.0.q_proj", "blocks.1.q_proj"]
K = ["blocks.0.k_proj", "blocks.1.k_proj"]


def adapted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, (FusedLoRALinear, MultiLoRALinear))]


@contextlib.contextmanager
def unchanged(model: nn.Module):
    """Modules, parameters, values and flags are the very same afterwards."""
    modules = list(model.named_modules(remove_duplicate=False))
    parameters = [(name, p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    yield
    assert [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)] == [(name, id(m)) for name, m in modules]
    after = list(model.named_parameters(remove_duplicate=False))
    assert [(name, id(p), p.requires_grad) for name, p in after] == [(name, id(p), flag) for name, p, _, flag in parameters]
    for (name, p), (_, _, before, _) in zip(after, parameters, strict=True):
        assert torch.equal(p.view(torch.uint8), before.view(torch.uint8)), f"{name}: bit for bit"


@pytest.mark.parametrize(
    "targets, exclude, wanted",
    [
        (["q_proj"], None, Q),
        (["q_proj", "k_proj"], None, sorted(Q + K)),
        ({"blocks.1.q_proj", "head"}, None, ["blocks.1.q_proj", "head"]),
        (("1.k_proj",), None, ["blocks.1.k_proj"]),
        (r".*\.0\.[qk]_proj", None, ["blocks.0.k_proj", "blocks.0.q_proj"]),
        ("all-linear", None, sorted(Q + K)),
        ("All-Linear", ["k_proj"], Q),
        ("all-linear", r"blocks\.1\..*", ["blocks.0.k_proj", "blocks.0.q_proj"]),
        (["q_proj", "head"], ["blocks.0.q_proj"], ["blocks.1.q_proj", "head"]),
    ],
)
def test_which_layers(targets, exclude, wanted):
    model = Net()
    names = apply_lora(model, LoRAConfig(target_modules=targets, exclude_modules=exclude))
    assert sorted(names) == sorted(adapted(model)) == wanted


def test_without_an_output_head_all_linear_is_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert apply_lora(model, LoRAConfig(target_modules="all-linear")) == ["0", "2"]
    assert [type(m) for m in model] == [FusedLoRALinear, nn.ReLU, FusedLoRALinear], "in their places"


def test_the_base_is_shared_and_frozen_and_the_adapters_train():
    model = Net().train()
    weights, wanted = {name: p for name, p in model.named_parameters()}, model(IDS).detach()
    names = apply_lora(model, LoRAConfig(target_modules=["q_proj", "k_proj"], lora_dropout=0.25))
    assert all(dict(model.named_parameters())[name] is p and not p.requires_grad for name, p in weights.items())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")]
    assert torch.equal(model(IDS), wanted), "B starts at zero"
    model(IDS).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(m.lora_dropout == 0.25 and m.training for m in model.modules() if isinstance(m, FusedLoRALinear))


def test_ranks_and_alphas_by_pattern():
    model = Net()
    config = LoRAConfig(
        target_modules=["q_proj", "k_proj", "head"],
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"0.q_proj": 9, "q_proj": 1, "^head": 16, r"blocks\.\d\.k_.*": 2},
        alpha_pattern={"k_proj": 5, "blocks.1.k_proj": 7},
    )
    apply_lora(model, config)
    found = {name: (m.r, m.lora_alpha, m.scaling) for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    assert found == {
        "blocks.0.q_proj": (9, 6, 2.0),
        "blocks.1.q_proj": (1, 6, 6.0),
        "blocks.0.k_proj": (2, 5, 5 / 2**0.5),
        "blocks.1.k_proj": (2, 5, 5 / 2**0.5),
        "head": (16, 6, 1.5),
    }, "the first key that matches holds"
    assert all(m.use_rslora for m in model.modules() if isinstance(m, FusedLoRALinear))


def test_float32_adapters_on_a_16_bit_base():
    model = Net().bfloat16()
    apply_lora(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False), adapter_dtype=torch.float32)
    layer = model.blocks[0].q_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32 and layer.lora_B.any()


def test_a_second_call_adapts_more_and_the_first_adapters_train_on():
    model = Net()
    apply_lora(model, LoRAConfig(target_modules=["q_proj"], r=2))
    assert apply_lora(model, LoRAConfig(target_modules=["head"], r=3)) == ["head"]
    assert sum(p.requires_grad for p in model.parameters()) == 6 and model.blocks[0].q_proj.lora_A.requires_grad


def shared() -> Net:
    model = Net()
    model.blocks[1].q_proj = model.blocks[0].q_proj
    return model


def test_a_module_with_two_names_stays_one():
    model = shared()
    assert apply_lora(model, LoRAConfig(target_modules=["q_proj"], init_lora_weights=False)) == ["blocks.0.q_proj"]
    assert adapted(model) == Q and model.blocks[0].q_proj is model.blocks[1].q_proj
    model(IDS).sum().backward()
    assert remove_lora(model) == ["blocks.0.q_proj"]
    assert model.blocks[0].q_proj is model.blocks[1].q_proj and type(model.blocks[0].q_proj) is nn.Linear
    outer = nn.ModuleDict({"a": model, "b": model})
    assert apply_lora(outer, LoRAConfig(target_modules=["head"])) == ["a.head"] and outer["b"].head is model.head


def test_tied_weights_stay_tied_and_are_not_merged_into():
    model = Net()
    model.head.weight = model.embed.weight
    apply_lora(model, LoRAConfig(target_modules=["head", "q_proj"], init_lora_weights=False))
    assert model.head.weight is model.embed.weight
    with unchanged(model), pytest.raises(ValueError, match="wanted weights of their own, got head, whose weight another module shares"):
        remove_lora(model, merge=True)
    remove_lora(model)
    assert model.head.weight is model.embed.weight and type(model.head) is nn.Linear


def test_remove_lora_gives_the_base_back():
    model, ids = Net().eval(), {}
    ids = {name: id(p) for name, p in model.named_parameters()}
    wanted = model(IDS)
    names = apply_lora(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.equal(model(IDS), wanted)
    assert remove_lora(model) == names and not adapted(model)
    assert {name: id(p) for name, p in model.named_parameters()} == ids and torch.equal(model(IDS), wanted)
    assert type(model.blocks[0].q_proj) is nn.Linear and not model.blocks[0].q_proj.training and model.blocks[0].k_proj.bias is None
    assert not model.head.weight.is_meta and not model.blocks[0].q_proj.weight.requires_grad


def test_remove_lora_merged():
    model = Net()
    apply_lora(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    other, apart = copy.deepcopy(model), model(IDS)
    for m in other.modules():
        if isinstance(m, FusedLoRALinear):
            m.merge()
    wanted = other(IDS)
    with (
        unchanged(other),
        pytest.raises(ValueError, match="merge: wanted unmerged layers, got merged ones .blocks.0.q_proj, .* and 1 more"),
    ):
        remove_lora(other)
    remove_lora(model, merge=True)
    remove_lora(other, merge=True)
    assert torch.equal(model(IDS), wanted) and torch.equal(other(IDS), wanted) and not adapted(model)
    torch.testing.assert_close(model(IDS), apart)


def test_remove_lora_merges_all_or_none():
    model = Net()
    apply_lora(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        model.blocks[1].k_proj.lora_A[0, 0] = float("nan")
    with unchanged(model), pytest.raises(ValueError, match="merge: wanted .*finite .* got NaN or Inf"):
        remove_lora(model, merge=True)
    assert not model.blocks[0].q_proj.merged


def test_a_forward_that_accelerate_left_there_is_the_classs():
    """As `remove_hook_from_module` leaves it."""
    model = Net()
    layer = model.blocks[1].q_proj
    layer.forward = layer.forward
    x = torch.randn(3, layer.in_features)
    wanted = layer(x)
    apply_lora(model, LoRAConfig(target_modules=["q_proj"]))
    assert torch.equal(model.blocks[1].q_proj(x), wanted)


def test_remove_lora_loses_no_hooks():
    model = Net()
    apply_lora(model, LoRAConfig(target_modules="all-linear"))
    model.blocks[1].k_proj.register_forward_pre_hook(lambda m, args: args)
    with unchanged(model), pytest.raises(UnsupportedError, match="blocks.1.k_proj: wanted a layer without hooks"):
        remove_lora(model)


@pytest.mark.parametrize("merge", [False, True])
def test_remove_lora_refuses_a_model_without(merge):
    with pytest.raises(ValueError, match="model: wanted one with FusedLoRALinear or MultiLoRALinear layers, got none"):
        remove_lora(Net(), merge=merge)


def test_many_adapters():
    model = Net()
    names = apply_lora(model, LoRAConfig(target_modules="all-linear", r=3, rank_pattern={"0.q_proj": 2}), num_adapters=4)
    assert sorted(names) == sorted(Q + K) and all(isinstance(model.get_submodule(name), MultiLoRALinear) for name in names)
    assert model.blocks[0].q_proj.ranks.tolist() == [2] * 4 and model.blocks[0].k_proj.ranks.tolist() == [3] * 4
    torch.manual_seed(1)
    for name in names:
        for i in range(4):
            A, B = model.get_submodule(name).adapter(i)
            A.normal_(), B.normal_()
    singles = []
    for i in range(4):
        single = copy.deepcopy(model)
        remove_lora(single)
        apply_lora(single, LoRAConfig(target_modules="all-linear", r=3, rank_pattern={"0.q_proj": 2}))
        with torch.no_grad():
            for name in names:
                for mine, theirs in zip(
                    (single.get_submodule(name).lora_A, single.get_submodule(name).lora_B),
                    model.get_submodule(name).adapter(i),
                    strict=True,
                ):
                    mine.copy_(theirs)
        singles.append(single)
    who = torch.tensor([2, 0, 3])
    with use_segments(model, Segments.from_ids(who.repeat_interleave(4), 4)):
        mixed = model(IDS)
        mixed.sum().backward()
    for row, i in enumerate(who.tolist()):
        torch.testing.assert_close(mixed[row], singles[i](IDS)[row], rtol=1e-4, atol=1e-5)
    assert not model.blocks[0].k_proj.lora_A.grad[1].any() and model.blocks[0].k_proj.lora_A.grad[2].any()
    with pytest.raises(TypeError, match="segments"):
        model(IDS)
    with unchanged(model), pytest.raises(ValueError, match="merge: wanted layers of one adapter, got blocks.0.q_proj with 4"):
        remove_lora(model, merge=True)
    remove_lora(model)
    model(IDS)
    with pytest.raises(ValueError, match="model: wanted one with MultiLoRALinear layers"), use_segments(model, None):
        pass


class Quantised(nn.Linear):
    pass


def with_hook(model):
    model.blocks[1].q_proj.register_forward_hook(lambda m, args, y: y)


def with_forward(model):
    own = model.blocks[1].q_proj
    own.forward = lambda x: 10 * nn.functional.linear(x, own.weight)


def with_subclass(model):
    model.blocks[1].q_proj = Quantised(12, 12)


def with_adapters(model):
    apply_lora(model, LoRAConfig(target_modules=["1.q_proj"]))


def with_shared(model):
    model.blocks[1].q_proj = model.blocks[0].q_proj


@pytest.mark.parametrize(
    "change, kwargs, error, match",
    [
        (None, {"target_modules": ["q_porj"]}, ValueError, "target_modules: wanted .* got 'q_porj', which means none; near ones: q_proj"),
        (
            None,
            {"target_modules": ["q_proj", "c_attn"]},
            ValueError,
            "got 'c_attn', which means none; its linear layers end in head, k_proj",
        ),
        (None, {"target_modules": "q_proj"}, ValueError, "got 'q_proj', which means none; near ones: q_proj"),
        (None, {"target_modules": r"blocks\.\d\.q"}, ValueError, "wanted what means modules of the model, got .* near ones: blocks"),
        (None, {"exclude_modules": ["haed"]}, ValueError, "exclude_modules: .* got 'haed', which means none; near ones: head"),
        (None, {"rank_pattern": {"qproj": 4}}, ValueError, "rank_pattern: .* got 'qproj', which means none; near ones: q_proj"),
        (None, {"alpha_pattern": {"blocks.2.q_proj": 4}}, ValueError, r"alpha_pattern: .*; near ones: blocks\.1\.q_proj"),
        (None, {"target_modules": ["q_proj"], "exclude_modules": ".*"}, ValueError, "wanted layers to fuse, got none beside the head"),
        (
            None,
            {"target_modules": ["blocks.0"]},
            TypeError,
            "blocks.0: wanted an nn.Linear or a quantised layer, got Block; name the linear layers alone",
        ),
        (None, {"target_modules": ["embed"]}, TypeError, "embed: wanted an nn.Linear or a quantised layer, got Embedding"),
        (with_subclass, {}, TypeError, "blocks.1.q_proj: wanted an nn.Linear or .*, got Quantised; .* exclude_modules"),
        (with_adapters, {"target_modules": ["q_proj"]}, TypeError, r"got FusedLoRALinear; remove_lora\(model\) first"),
        (with_hook, {}, UnsupportedError, "blocks.1.q_proj: wanted a layer without hooks"),
        (with_forward, {}, UnsupportedError, "blocks.1.q_proj: wanted a layer without hooks, or a forward of its own, which would be lost"),
        (
            None,
            {"target_modules": ["q_proj", "head"], "layers_to_transform": [1, 2], "layers_pattern": "blocks"},
            ValueError,
            r"layers_to_transform: wanted layers that have what target_modules names, of {0, 1}, got \(1, 2\)",
        ),
        (
            with_shared,
            {"target_modules": ["0.q_proj"]},
            ValueError,
            "blocks.0.q_proj, blocks.1.q_proj are one module; .* got blocks.0.q_proj",
        ),
    ],
)
def test_apply_refuses_and_changes_nothing(change, kwargs, error, match):
    model = Net()
    if change:
        change(model)
    with unchanged(model), pytest.raises(error, match=match):
        apply_lora(model, LoRAConfig(**{"target_modules": "all-linear", **kwargs}))


def test_a_failure_halfway_changes_nothing(monkeypatch):
    model = Net()
    with unchanged(model), pytest.raises(TypeError, match="adapter_dtype: wanted the base's dtype"):
        apply_lora(model, LoRAConfig(target_modules="all-linear"), adapter_dtype=torch.float16)
    with unchanged(model), pytest.raises(ValueError, match="num_adapters"):
        apply_lora(model, LoRAConfig(target_modules="all-linear"), num_adapters=0)
    real, calls = FusedLoRALinear.from_linear, []

    def failing(linear, **kwargs):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("full")
        return real(linear, **kwargs)

    monkeypatch.setattr(FusedLoRALinear, "from_linear", failing)
    with unchanged(model), pytest.raises(MemoryError):
        apply_lora(model, LoRAConfig(target_modules="all-linear"))
    assert len(calls) == 3


def test_nothing_to_fuse():
    for model in (nn.Sequential(nn.Conv1d(2, 2, 1)), nn.Linear(3, 3), nn.Sequential()):
        with pytest.raises(ValueError, match="model: wanted one that contains nn.Linear layers, got .* without"):
            apply_lora(model, LoRAConfig(target_modules="all-linear"))
    with pytest.raises(TypeError, match="config: wanted a lora_kernels.LoRAConfig or PEFT's LoraConfig, got dict"):
        apply_lora(Net(), {"r": 4})


def test_adapters_that_ddp_would_not_reduce_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        with unchanged(model), pytest.raises(UnsupportedError, match="model: wanted one that DistributedDataParallel is not around yet"):
            apply_lora(model, LoRAConfig(target_modules="all-linear"))
    finally:
        dist.destroy_process_group()


def test_a_parent_that_reads_the_weight_past_the_layer_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    config = LoRAConfig(target_modules=["linear1", "linear2"], init_lora_weights=False)
    with unchanged(model), pytest.raises(UnsupportedError, match="reads its weight past the adapter .*set_fastpath_enabled.False. first"):
        apply_lora(model, config)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        apply_lora(model, config)
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            inference = model(x)
        torch.testing.assert_close(inference, model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("flag, attribute", [("lora_bias", "lora_bias"), ("use_dora", "lora_magnitude")])
def test_variants_reach_the_layers_that_have_them(flag, attribute):
    model, config = Net(), LoRAConfig(target_modules="all-linear", init_lora_weights=False, **{flag: True})
    with unchanged(model), pytest.raises(UnsupportedError, match=f"{flag}: wanted False, which is what MultiLoRALinear computes, got True"):
        apply_lora(model, config, num_adapters=2)
    wanted, names = model(IDS), apply_lora(model, config)
    with torch.no_grad():
        for name in names:
            getattr(model.get_submodule(name), attribute).normal_()
    apart = model(IDS)
    dropped = copy.deepcopy(model)
    remove_lora(dropped)
    assert torch.equal(dropped(IDS), wanted)
    remove_lora(model, merge=True)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names) and not torch.allclose(apart, wanted)
    torch.testing.assert_close(model(IDS), apart, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())

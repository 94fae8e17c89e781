"""apply_lora and remove_lora with target_parameters, on plain torch models."""

import copy

import pytest
import torch
from experts_models import KINDS, Experts, Net, X
from test_apply import unchanged
from torch import nn

from lora_kernels import FusedLoRALinear, LoRAConfig, LoRAExperts, UnsupportedError, apply_lora, remove_lora

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
WHERE = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def net(kind=Experts, dtype=torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(kind).to(dtype)


def ours(**options) -> Net:
    model = net()
    apply_lora(model, LoRAConfig(**{"target_parameters": BOTH, "r": 3, "lora_alpha": 5, "init_lora_weights": False, **options}))
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_applied_and_removed(kind):
    model, x = net(kind), X.double()
    plain, experts, wanted = copy.deepcopy(model), model.mlp["experts"], model(X.double())
    ids = {name: id(p) for name, p in model.named_parameters()}
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    config = LoRAConfig(target_modules=["inner"], target_parameters=[first, "experts.down_proj"], r=4, lora_dropout=0.5)
    names = apply_lora(model, config)
    assert names == ["inner", f"mlp.experts.{first}", "mlp.experts.down_proj"]
    outer = model.mlp["experts"]
    assert [each.parameter_name for each in outer.chain()] == ["down_proj", first] and outer.experts is experts
    assert all(each.r == 4 and each.lora_dropout == 0.5 and each.training for each in outer.chain())
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{where}.lora_{part}" for where in ("inner", "mlp.experts", "mlp.experts.base_layer") for part in "AB"]
    model(x).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert remove_lora(model) == names and model.mlp["experts"] is experts
    assert {name: id(p) for name, p in model.named_parameters()} == ids and torch.equal(model(x), plain(x))


def test_ranks_and_alphas_by_the_parameters_names():
    options = dict(target_modules="all-linear", rank_pattern={"gate_up_proj": 7, "inner": 2}, alpha_pattern={r"experts\.down_.*": 9})
    model = ours(**options, use_rslora=True)
    found = {each.parameter_name: (each.r, each.lora_alpha, each.scaling) for each in model.mlp["experts"].chain()}
    assert found == {"gate_up_proj": (7, 5, 5 / 7**0.5), "down_proj": (3, 9, 9 / 3**0.5)}
    assert model.inner.r == 2 and model.router.r == 3


def test_parameters_alone_leave_the_linear_layers():
    model = ours()
    assert not any(isinstance(m, FusedLoRALinear) for m in model.modules()) and len(list(model.modules())) == len(list(net().modules())) + 2
    assert apply_lora(model, LoRAConfig(target_modules="all-linear")) == ["inner", "router"], "a second call adapts more"
    assert sum(p.requires_grad for p in model.parameters()) == 8
    assert remove_lora(model) == ["inner", "router", *WHERE]


def test_adapter_dtype():
    model = net(dtype=torch.bfloat16)
    apply_lora(model, LoRAConfig(target_parameters=BOTH), adapter_dtype=torch.float32)
    assert model.mlp["experts"].lora_B.dtype == torch.float32 and model.mlp["experts"].stack.dtype == torch.bfloat16


def test_removed_with_a_merge():
    model = ours(target_modules=["inner"])
    wanted = model(X.double())
    with unchanged(model), pytest.raises(ValueError, match="merge: wanted unmerged layers, got merged ones .mlp.experts.base_layer"):
        model.mlp["experts"].base_layer.merge()
        try:
            remove_lora(model)
        finally:
            model.mlp["experts"].base_layer.unmerge()
    assert remove_lora(model, merge=True) == ["inner", *WHERE] and type(model.mlp["experts"]) is Experts
    torch.testing.assert_close(model(X.double()), wanted, rtol=1e-10, atol=1e-10)
    model = ours(target_modules=["inner"])
    with torch.no_grad():
        model.mlp["experts"].base_layer.lora_B[1, 1] = float("inf")
    with unchanged(model), pytest.raises(ValueError, match="merge: wanted a finite merged weight"):
        remove_lora(model, merge=True)
    assert not model.inner.merged and not model.mlp["experts"].merged


def shared() -> nn.Module:
    model = nn.ModuleDict({"a": net(), "b": net()})
    model["b"].mlp = model["a"].mlp
    return model


def test_tied_modules_and_tied_stacks():
    model = shared()
    assert apply_lora(model, LoRAConfig(target_parameters=BOTH)) == [f"a.{name}" for name in WHERE]
    assert isinstance(model["a"].mlp["experts"], LoRAExperts) and model["b"].mlp["experts"] is model["a"].mlp["experts"]
    assert remove_lora(model, merge=True) == [f"a.{name}" for name in WHERE] and type(model["b"].mlp["experts"]) is Experts
    model = nn.ModuleDict({"a": net(), "b": net()})
    model["b"].mlp["experts"].down_proj = model["a"].mlp["experts"].down_proj
    apply_lora(model, LoRAConfig(target_parameters=BOTH))
    assert model["b"].mlp["experts"].stack is model["a"].mlp["experts"].stack
    with unchanged(model), pytest.raises(ValueError, match="wanted weights of their own, got a.mlp.experts, whose weight another module"):
        remove_lora(model, merge=True)


def with_hook(model):
    model["a"].mlp["experts"].register_forward_pre_hook(lambda m, args: args)


def with_adapters(model):
    apply_lora(model, LoRAConfig(target_parameters=["a.mlp.experts.gate_up_proj", "b.mlp.experts.gate_up_proj"]))


def with_forward(model):
    model["a"].mlp["experts"].forward = lambda *args: None


def with_another_way(model):
    model["a"].mlp["experts"].config = type("Config", (), {"_experts_implementation": "sonicmoe"})


@pytest.mark.parametrize(
    "change, options, error, match",
    [
        (None, {"target_parameters": ["experts.down_porj"]}, ValueError,
         "target_parameters: wanted what means parameters of the model, got 'experts.down_porj', which means none; near ones: .*down_proj"),
        (None, {"target_parameters": [*BOTH, "zzzzzz"]}, ValueError, "got 'zzzzzz', which means none; its parameters end in bias, d"),
        (None, {"target_parameters": ["experts"]}, ValueError, "target_parameters: .* got 'experts', which means none"),
        (None, {"rank_pattern": {"gate_upproj": 4}}, ValueError, "rank_pattern: .* modules or parameters .*; near ones: .*gate_up_proj"),
        (None, {"target_modules": ["gate_up_proj"]}, ValueError, "target_modules: wanted what means modules of the"),
        (None, {"exclude_modules": ["experst"]}, ValueError, "exclude_modules: wanted what means modules"),
        (None, {"target_parameters": ["inner.weight"]}, UnsupportedError,
         r"a.inner.weight: wanted a stack .*, but its base layer is a Linear, without num_experts of transformers' experts interface"),
        (with_hook, {}, UnsupportedError, "a.mlp.experts.gate_up_proj: wanted a stack .* but its Experts has hooks, which would"),
        (with_forward, {}, UnsupportedError, "its Experts has hooks"),
        (with_another_way, {}, UnsupportedError, "its experts run by 'sonicmoe', another library's kernels"),
        (with_adapters, {}, TypeError, r"a.mlp.experts.base_layer: wanted experts without adapters, got LoRAExperts; remove_lora\(model\)"),
        (None, {"lora_bias": True}, UnsupportedError, "lora_bias: wanted False, which is what LoRAExperts computes, got True"),
        (None, {"use_dora": True}, UnsupportedError, "use_dora: wanted False, which is what LoRAExperts computes, got True"),
        (None, {"target_parameters": ["a.mlp.experts.down_proj"], "shared": True}, ValueError,
         "a.mlp.experts, b.mlp.experts are one module; wanted the same of each, got down_proj in a.mlp.experts; none in b.mlp.experts"),
    ],
)  # fmt: skip
def test_apply_refuses_and_changes_nothing(change, options, error, match):
    options = dict(options)
    model = shared() if options.pop("shared", False) else nn.ModuleDict({"a": net(), "b": net()})
    if change:
        change(model)
    with unchanged(model), pytest.raises(error, match=match):
        apply_lora(model, LoRAConfig(**{"target_parameters": BOTH, **options}))


def test_other_calls_refused(monkeypatch):
    model = net()
    with unchanged(model), pytest.raises(UnsupportedError, match="num_adapters: wanted None with target_parameters, .* got 2"):
        apply_lora(model, LoRAConfig(target_parameters=BOTH), num_adapters=2)
    with unchanged(model), pytest.raises(TypeError, match="adapter_dtype: wanted the stack's dtype"):
        apply_lora(model, LoRAConfig(target_parameters=BOTH), adapter_dtype=torch.float16)
    real, made = LoRAExperts.reset_adapter, []

    def failing(self, *args):
        made.append(self)
        if len(made) == 2:
            raise MemoryError("full")
        return real(self, *args)

    monkeypatch.setattr(LoRAExperts, "reset_adapter", failing)
    with unchanged(model), pytest.raises(MemoryError):
        apply_lora(model, LoRAConfig(target_modules=["inner"], target_parameters=BOTH))
    monkeypatch.undo()
    model = ours()
    model.mlp["experts"].base_layer.register_forward_hook(lambda *args: None)
    with unchanged(model), pytest.raises(UnsupportedError, match="mlp.experts.base_layer: wanted a layer without hooks"):
        remove_lora(model)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"target_parameters": "experts.down_proj"}, TypeError, "target_parameters: wanted a list of names, got 'experts.down_proj'"),
        ({"target_parameters": [3]}, TypeError, "target_parameters: wanted a list of names"),
        ({"target_parameters": []}, ValueError, "target_modules: wanted names, .* without target_parameters"),
    ],
)
def test_configs_refused(options, error, match):
    with pytest.raises(error, match=match):
        LoRAConfig(**options)


def test_a_config_from_pefts_dict():
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None, "target_parameters": BOTH}
    assert LoRAConfig.from_dict(given) == LoRAConfig(target_parameters=BOTH, r=4)
    assert LoRAConfig.from_dict({**given, "target_modules": ["q"]}).target_modules == ("q",)
    for nothing in (None, []):
        with pytest.raises(ValueError, match="wanted r, lora_alpha and target_modules, got none for target_modules"):
            LoRAConfig.from_dict({**given, "target_parameters": nothing})

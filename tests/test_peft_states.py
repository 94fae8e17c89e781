"""What else PEFT does to a layer: variants, hooks, offload, sharding, quantised bases, loading, hot-swapping, initialisation."""

import copy
import dataclasses
import pickle

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import variants as peft_variants
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import Net, X, agree, both, config, counted, layers, pair, results, train_all
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lora_kernels.integrations.peft import FusedLoraLinear, fuse, unfuse, use_fused, why_not_fused

calls = counted  # the fixture
FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


def variants():
    """PEFT's variants of LoRA on a linear layer, those this version has."""
    if "alora_invocation_tokens" in FIELDS:
        yield {"alora_invocation_tokens": [1]}, "ALoraLinearVariant"
    if "use_bdlora" in FIELDS:
        yield {"use_bdlora": peft.tuners.lora.BdLoraConfig(["first"], ["second"], nblocks=2)}, "BdLoraLinearVariant"
    if "velora_config" in FIELDS:
        yield {"velora_config": peft.tuners.lora.VeloraConfig(num_groups=2)}, "VeloraLinearVariant"
    if hasattr(peft_variants, "MiCALinearVariant"):
        yield {"init_lora_weights": "mica"}, "MiCALinearVariant"


@pytest.mark.parametrize("changed, reason", [*variants()], ids=lambda value: str(value)[:40])
def test_variants_are_left_to_peft_by_name(changed, reason, calls):
    stock, fused, report = pair(net=Biased, **changed)
    assert len(report.left) == 2 and all(reason in why for why in report.left.values()), report.left
    assert "0 LoRA layers fused, 2 left to PEFT" in str(report) and reason in str(report)
    agree(stock, fused)
    both(stock, fused, lambda model: model.add_adapter("plain", config()))
    both(stock, fused, lambda model: model.set_adapter("plain"))
    assert not calls
    agree(stock, fused)
    assert len(calls) == 2, "a plain adapter beside it is fused"


class Biased(Net):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.second = nn.Linear(32, 16, dtype=dtype)


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "accelerate"])
def test_hooks_are_not_passed_by(where, kind, calls):
    stock, fused, _ = pair(lora_dropout=0.1)
    both(stock, fused, lambda model: model.eval())
    seen = []

    def watch(model):
        part = getattr(layers(model)[0], where)
        part = part if where == "base_layer" else part["default"]
        if kind == "accelerate":
            add_hook_to_module(part, Watch(seen))
        else:
            getattr(part, f"register_{kind}_hook")(lambda *args: seen.append(kind))

    both(stock, fused, watch)
    below = where == "base_layer"
    assert why_not_fused(layers(fused)[0]) is None if below else "has hooks" in why_not_fused(layers(fused)[0])
    assert fuse(fused).beside == ({"base_model.model.first": "its base layer has hooks"} if below else {})
    agree(stock, fused)
    assert len(calls) == 1 + below
    seen.clear()
    results(fused, X)
    assert seen, "the hook of the fused layer itself ran"


def test_a_base_that_accelerate_took_its_hook_from_has_none(calls):
    """It leaves the class's own forward on the instance."""
    _, fused, _ = pair()
    base = layers(fused)[0].base_layer
    add_hook_to_module(base, Watch([]))
    remove_hook_from_module(base)
    assert "forward" in base.__dict__ and not fuse(fused).beside


class Watch(ModelHook):
    def __init__(self, seen):
        self.seen = seen

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append("accelerate")
        return args, kwargs


def test_hooks_on_the_layer_itself_stay(calls):
    stock, fused, _ = pair()
    both(stock, fused, lambda model: layers(model)[0].register_forward_hook(lambda module, args, y: 2 * y))
    agree(stock, fused)
    assert len(calls) == 2


def test_a_layer_whose_forward_is_its_own_is_reported():
    stock, _, _ = pair()
    add_hook_to_module(layers(stock)[0], Watch([]))
    report = fuse(stock)
    assert list(report.left) == ["base_model.model.first"] and "its forward is not its class's" in str(report)
    assert type(layers(stock)[0]) is lora.Linear


class Linear4bit(nn.Linear):
    """Packed, as quantised layers are: a subclass of nn.Linear whose weight is no weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.full, self.bias = linear.weight.detach(), linear.bias
        self.weight = nn.Parameter(self.full.to(torch.uint8).reshape(-1, 1), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.full, self.bias)


class Quantised(Net):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.first = Linear4bit(self.first)


@pytest.mark.parametrize("early", [True, False])
def test_a_subclass_of_linear_makes_its_own_product(early, calls):
    torch.manual_seed(0)
    stock = get_peft_model(Quantised(), config())
    torch.manual_seed(0)
    fused = get_peft_model(Quantised(), use_fused(config()) if early else config())
    assert [type(layer) for layer in layers(fused)] == [FusedLoraLinear if early else lora.Linear] * 2
    report = fuse(fused)
    assert report.beside == {"base_model.model.first": "its base layer is a Linear4bit, not exactly an nn.Linear"}
    assert "2 LoRA layers fused, 0 left to PEFT\n  1 beside their base: its base layer is a Linear4bit" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), stock(X))
    assert [call["base"] is None for call in calls] == [False, True]


def test_a_trained_base_weight_gets_its_gradient(calls):
    stock, fused, _ = pair()
    both(stock, fused, lambda model: layers(model)[0].base_layer.weight.requires_grad_(True))
    assert fuse(fused).beside == {"base_model.model.first": "its base weight is trained"}
    agree(stock, fused)
    assert len(calls) == 2 and layers(fused)[0].base_layer.weight.grad.any()


@pytest.mark.parametrize("early", [True, False])
def test_target_parameters_of_other_modules_are_left(early):
    given = LoraConfig(target_modules=[], target_parameters=["first.weight"], r=4)
    model = get_peft_model(Net(), use_fused(given) if early else given)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, lora.LoraLayer)}
    assert kinds == {"ParamWrapper"} and fuse(model).fused == []
    assert "its base layer is a Linear, without num_experts of transformers' experts interface" in str(fuse(model))


def test_use_fused_leaves_what_fuse_leaves():
    """Other types are PEFT's own, another's dispatcher is asked as before, and the config can be copied and pickled."""
    made = []

    def other(target, name, **kwargs):
        made.append(name)

    given = LoraConfig(target_modules=["0", "1", "2"], r=2)
    given._register_custom_module({nn.Linear: other})
    for each in (use_fused(given), copy.deepcopy(given)):
        net = nn.Sequential(nn.Embedding(5, 8), nn.Conv2d(3, 3, 1), nn.Linear(8, 4))
        model = get_peft_model(net, each)
        assert [type(layer) for layer in model.base_model.model] == [lora.Embedding, lora.Conv2d, FusedLoraLinear]
    assert made == ["default"] * 2
    assert pickle.loads(pickle.dumps(use_fused(config()))).r == 4
    with pytest.raises(ValueError, match="Target module .* is not supported"):
        get_peft_model(nn.Sequential(nn.LayerNorm(8)), use_fused(LoraConfig(target_modules=["0"])))
    assert list(given._custom_modules) == [nn.Module, nn.Linear]


@pytest.mark.parametrize("init", ["gaussian", "olora", "pissa", "orthogonal"])
def test_initialisations(init, calls):
    torch.manual_seed(0)
    stock = get_peft_model(Net(), config(init_lora_weights=init))
    torch.manual_seed(0)
    fused = get_peft_model(Net(), use_fused(config(init_lora_weights=init)))
    agree(stock, fused)
    assert len(calls) == 2


def test_files_to_stock_peft_and_back(tmp_path, calls):
    stock, fused, _ = pair()
    stock.save_pretrained(tmp_path / "stock")
    fused.save_pretrained(tmp_path / "fused")
    name = "adapter_model.safetensors"
    assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    base = lambda: (torch.manual_seed(0), Net())[1]  # noqa: E731
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "fused", is_trainable=True, low_cpu_mem_usage=low)
        assert {type(layer) for layer in layers(loaded)} == {lora.Linear} and len(fuse(loaded).fused) == 2
        agree(stock, loaded)
        given = use_fused(LoraConfig.from_pretrained(tmp_path / "stock"))
        given.inference_mode = False
        built = PeftModel.from_pretrained(base(), tmp_path / "stock", config=given, is_trainable=True, low_cpu_mem_usage=low)
        assert {type(layer) for layer in layers(built)} == {FusedLoraLinear}
        agree(stock, built)
        assert len(calls) == 4
        calls.clear()
    fused.load_adapter(tmp_path / "stock", "again", is_trainable=True)
    fused.set_adapter("again")
    torch.testing.assert_close(fused(X), stock(X))


def test_hot_swap(tmp_path, calls):
    """An adapter's weights change in place, or its rank grows under it: the next call sees the new one."""
    stock, fused, _ = pair()
    same, larger = tmp_path / "same", tmp_path / "larger"
    for folder, rank in ((same, 4), (larger, 7)):
        torch.manual_seed(9)
        get_peft_model(Net(), config(r=rank, lora_alpha=3)).save_pretrained(folder)
    for change in (
        lambda model: hotswap_adapter(model, same, "default"),
        lambda model: prepare_model_for_compiled_hotswap(model, target_rank=9),
        lambda model: hotswap_adapter(model, larger, "default"),
    ):
        agree(stock, fused)
        both(stock, fused, change)
        both(stock, fused, train_all)  # which padding takes away in older versions
        agree(stock, fused)
    assert len(layers(fused)[0].lora_A["default"].weight) > 4 and len(calls) == 12
    assert isinstance(layers(fused)[0].scaling["default"], torch.Tensor)


def test_copies(calls):
    stock, fused, _ = pair()
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(layers(fused)[0]))):
        assert all(type(layer) is FusedLoraLinear for layer in layers(again))
    agree(stock, copy.deepcopy(fused).double().float())
    assert len(calls) == 2


@pytest.mark.parametrize("changed", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_on_the_meta_device(changed):
    """Where models are asked for shapes alone, autocast is no question to be put to torch."""
    asked = []
    for model in pair(**changed)[:2]:
        model.to("meta")
        y = model(X.to("meta"))
        y.sum().backward()
        asked.append([(t.shape, t.dtype, t.device) for t in (y, *(p.grad for p in model.parameters() if p.requires_grad))])
    assert asked[0] == asked[1]


def test_modules_to_save(calls):
    stock, fused, report = pair(target_modules=["first"], modules_to_save=["second"])
    assert report.fused == ["base_model.model.first"]
    agree(stock, fused)
    assert len(calls) == 1


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match=r"model: wanted one with PEFT LoRA layers \(get_peft_model"):
        fuse(Net())
    assert unfuse(Net()) == 0


@pytest.mark.parametrize("how", ["torch.compile", "compile of a part", "in place"])
def test_a_compiled_model_is_refused(how):
    model = get_peft_model(Net(), config())
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model)
    elif how == "compile of a part":
        model.base_model.model.first = torch.compile(model.base_model.model.first)
    else:
        model.base_model.model.first.compile()
    with pytest.raises(ValueError, match="model: wanted one that is not compiled or sharded yet .* got a compiled module in it"):
        fuse(compiled)
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_models(mesh, calls):
    """Fused and then sharded as a whole it is fused; adapters that are sharded on their own are PEFT's; sharded first is refused."""
    stock, fused, _ = pair()
    whole, parts = copy.deepcopy(fused), copy.deepcopy(fused)
    fully_shard(whole.base_model.model, mesh=mesh)
    torch.testing.assert_close(whole(X), stock(X))
    assert len(calls) == 2
    for layer in layers(parts):
        fully_shard(layer.lora_A["default"], mesh=mesh)
        fully_shard(layer.lora_B["default"], mesh=mesh)
    torch.testing.assert_close(parts(X), stock(X))
    assert len(calls) == 2 and "its lora_A is a FSDPLinear" in why_not_fused(layers(parts)[0])
    for layer in layers(fused):
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match="wanted one whose layers are not sharded yet .unfuse it first., got a FSDPFusedLoraLinear in it"):
        unfuse(fused)
    torch.testing.assert_close(fused(X), stock(X))
    fully_shard(stock, mesh=mesh)
    with pytest.raises(ValueError, match="got a FSDPModule in it"):
        fuse(stock)
    assert {type(layer) for layer in layers(stock)} == {lora.Linear}


def test_tensor_parallel_adapters_are_left_to_peft(mesh):
    _, fused, _ = pair()
    part = layers(fused)[0].lora_A["default"]
    part.weight = nn.Parameter(distribute_tensor(part.weight.data, mesh, [Replicate()]))
    assert type(part.weight.data) is DTensor and "its lora_A's weight is a " in why_not_fused(layers(fused)[0])


def test_version():
    assert Version(peft.__version__) >= Version("0.17")

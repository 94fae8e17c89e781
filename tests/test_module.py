"""FusedLoRALinear: nn.Linear's names, PEFT's initialisation, merge and unmerge, and the things a module is put through."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from experts_models import Experts
from torch import nn
from torch.nn.utils import parametrize, prune

from lora_kernels import (
    FusedLoRALinear,
    LoRAExperts,
    MultiLoRALinear,
    PackedLoRALinear,
    UnsupportedError,
    load_adapter,
    reference,
    save_adapter,
)

K, N = 20, 12


def trained(**kwargs) -> FusedLoRALinear:
    return FusedLoRALinear(K, N, r=4, init_lora_weights=False, **kwargs)


def test_computes_the_reference():
    layer, x = trained(lora_alpha=12), torch.randn(3, 5, K)
    wanted = reference.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scale=3.0)
    assert layer.scaling == 3.0
    torch.testing.assert_close(layer(x), wanted)


def test_starts_as_the_base_with_pefts_initialisation():
    torch.manual_seed(0)
    layer = FusedLoRALinear(4096, 64, r=8)
    assert not layer.lora_B.any()
    bound = math.sqrt(6 / ((1 + 5) * 4096))
    assert layer.lora_A.abs().max().item() <= bound and layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    x = torch.randn(2, 4096)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_rslora():
    assert FusedLoRALinear(K, N, r=9, lora_alpha=6, use_rslora=True).scaling == 2.0


def test_only_the_adapter_trains():
    layer = trained(lora_dropout=0.2)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    layer(torch.randn(5, K)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(K, N).eval()
    layer = FusedLoRALinear.from_linear(linear, r=3, lora_alpha=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not linear.weight.requires_grad and not layer.training
    without = FusedLoRALinear.from_linear(nn.Linear(K, N, bias=False))
    assert without.bias is None and "bias=False" in repr(without)


def test_an_nn_linear_checkpoint_loads_with_only_the_adapter_missing():
    linear, layer = nn.Linear(K, N), trained()
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B"] and result.unexpected_keys == []
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_is_the_same_function_and_unmerge_is_exact(dtype):
    layer = trained(dtype=dtype, adapter_dtype=torch.float32).eval()
    before, x = layer.weight.clone(), torch.randn(7, K).to(dtype)
    apart = layer(x)
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before)
    exact = (before.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).to(dtype)
    torch.testing.assert_close(layer.weight, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), "merged, it is nn.Linear"
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), apart, rtol=8 * eps, atol=16 * eps)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before) and torch.equal(layer(x), apart)


def test_merge_and_unmerge_in_the_wrong_state():
    layer = trained()
    with pytest.raises(RuntimeError, match="wanted a merged layer"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="wanted an unmerged layer"):
        layer.merge()
    with pytest.raises(RuntimeError, match="wanted an unmerged layer"):
        layer.reset_adapter()


def test_merge_refuses_a_diverged_adapter_and_changes_nothing():
    layer = trained()
    with torch.no_grad():
        layer.lora_A[0, 0] = float("nan")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_a_checkpoint_of_a_merged_layer_holds_base_and_adapter_apart():
    layer, x = trained(), torch.randn(4, K)
    apart = layer(x)
    layer.merge()
    other = trained()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), apart), "loading must not apply the adapter twice"
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.load_state_dict(other.state_dict())


def test_enabled():
    layer, x = trained(), torch.randn(4, K)
    on, base = layer(x), F.linear(x, layer.weight, layer.bias)
    layer.enabled = False
    assert torch.equal(layer(x), base) and "enabled=False" in repr(layer)
    layer.merge()
    assert torch.equal(layer(x), base), "merged but disabled, the base still answers"
    layer.enabled = True
    torch.testing.assert_close(layer(x), on)


def test_dropout_acts_in_training_only():
    layer, x = trained(lora_dropout=0.5), torch.randn(4, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_copies_and_files():
    layer, x = trained(lora_dropout=0.1).eval(), torch.randn(4, K)
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.merged
        other.unmerge()
        assert layer.merged
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = trained().eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    layer.unmerge()
    assert torch.equal(fresh(x), layer(x))


def test_dtype_and_device():
    layer = trained(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(2, K).bfloat16()).dtype == torch.bfloat16
    assert trained().double()(torch.randn(2, K).double()).dtype == torch.float64
    assert trained().half().lora_A.dtype == torch.float16
    meta = FusedLoRALinear(K, N, device="meta")
    assert meta.lora_A.is_meta and meta.to_empty(device="cpu").lora_A.device.type == "cpu"


def test_repr():
    assert repr(FusedLoRALinear(K, N, r=4, lora_dropout=0.1)) == (
        "FusedLoRALinear(in_features=20, out_features=12, bias=True, r=4, scaling=4, lora_dropout=0.1)"
    )


def test_it_learns_what_full_rank_allows():
    """A rank-2 change of the base is learned to a small loss: gradients of both factors are right together."""
    torch.manual_seed(0)
    layer = FusedLoRALinear(K, N, r=2, lora_alpha=2)
    target = layer.weight + 0.3 * torch.randn(N, 2) @ torch.randn(2, K)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.05)
    first = None
    for _ in range(300):
        x = torch.randn(64, K)
        loss = F.mse_loss(layer(x), F.linear(x, target, layer.bias))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * first


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"r": 0}, UnsupportedError, "r: wanted a rank from 1 to 512, got 0"),
        ({"r": 513}, UnsupportedError, "r: wanted a rank from 1 to 512, got 513"),
        ({"r": 2.0}, TypeError, "r: wanted an int, got float"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: wanted a probability"),
        ({"lora_dropout": "0.1"}, TypeError, "lora_dropout: wanted a number, got '0.1'"),
        ({"adapter_dtype": torch.float16}, TypeError, "adapter_dtype: wanted the base's dtype"),
    ],
)
def test_refusals(kwargs, error, match):
    with pytest.raises(error, match=match):
        FusedLoRALinear(K, N, **kwargs)


def test_from_linear_refuses_subclasses():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match="wanted an nn.Linear, got Quantised"):
        FusedLoRALinear.from_linear(Quantised(K, N))


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["one", "many", "packed", "experts"])
def test_what_would_be_gone_at_the_next_use_is_not_written(tmp_path, kind, name, how):
    """A factor that torch computes at each use is read as it is computed, and saved so; an adapter written to it would be lost."""
    A, B, many = torch.randn(4, K), torch.randn(N, 4), dict(num_adapters=2, r=4, init_lora_weights=False)
    layer = {
        "one": trained,
        "many": lambda: MultiLoRALinear(K, N, **many),
        "packed": lambda: PackedLoRALinear(K, (5, N - 5), names=("q", "k"), **many),
        "experts": lambda: LoRAExperts(Experts(), "down_proj", r=4, init_lora_weights=False),
    }[kind]()
    model, slot = nn.ModuleDict({"proj": layer}), {} if kind in ("one", "experts") else {"slot": 1}
    plain = copy.deepcopy(model)
    if how == "pruned":
        prune.random_unstructured(layer, name, 0.5)
    else:
        parametrize.register_parametrization(layer, name, Twice())
    calls = {
        "one": [layer.reset_adapter, lambda: layer.swap(A, B)],
        "many": [lambda: layer.reset_adapter(1), lambda: layer.clear_adapter(1), lambda: layer.load_adapter(1, A, B)],
        "packed": [lambda: layer.reset_adapter(1), lambda: layer.load_adapter(1, torch.stack((A, A)), B)],
        "experts": [layer.reset_adapter],
    }[kind]
    before, value = copy.deepcopy(model.state_dict()), getattr(layer, name).clone()
    save_adapter(model, tmp_path, **slot)
    for call in [*calls, lambda: load_adapter(model, tmp_path, **slot)]:
        with pytest.raises(ValueError, match=f"{name}: wanted a parameter to write an adapter to, got one that is computed"):
            call()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    load_adapter(plain, tmp_path, **slot)
    own, index = getattr(plain["proj"], name), slot.get("slot", ...)
    assert torch.equal(own[index], value[index])


def test_what_has_no_storage_is_not_written():
    """A model that waits for its weights, or layers that accelerate offloads: an adapter would be lost."""
    A, B, many = torch.randn(4, K), torch.randn(N, 4), dict(num_adapters=2, r=4, device="meta")
    one, stack, packed = trained(device="meta"), MultiLoRALinear(K, N, **many), PackedLoRALinear(K, (5, N - 5), **many)
    one.reset_adapter()
    stack.reset_adapter(1)
    calls = {
        "swap": [lambda: one.swap(A, B)],
        "slot 1": [lambda: stack.load_adapter(1, A[:2], B[:, :2]), lambda: packed.load_adapter(1, torch.stack((A, A)), B)],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"{name}: wanted a layer with storage, got one on the meta device"):
                call()
    assert stack.to_empty(device="cpu").ranks.tolist() == [4, 4] == [stack.adapter(i)[0].shape[0] for i in range(2)]


def test_a_parametrized_magnitude_is_not_reset():
    layer = trained(use_dora=True)
    parametrize.register_parametrization(layer, "lora_A", Twice())
    layer.reset_magnitude()
    parametrize.register_parametrization(layer, "lora_magnitude", Twice())
    with pytest.raises(ValueError, match="lora_magnitude: wanted a parameter to write an adapter to, got one that is computed"):
        layer.reset_magnitude()


@pytest.mark.parametrize("kind", [FusedLoRALinear, MultiLoRALinear])
def test_lora_alpha_is_a_finite_number(kind):
    """Any other is refused where the layer is built."""
    slots = {"num_adapters": 2} if kind is MultiLoRALinear else {}
    for alpha, error in ((math.nan, ValueError), (math.inf, ValueError), ("16", TypeError), (True, TypeError), (torch.ones(1), TypeError)):
        with pytest.raises(error, match="lora_alpha: wanted a"):
            kind(8, 8, r=2, lora_alpha=alpha, **slots)

"""PEFT's layer on our arms: the same outputs and gradients as PEFT's own, in every state; and what is left to PEFT, by name."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

import lora_kernels.integrations.peft as ours
from lora_kernels.integrations.peft import FusedLoraLinear, fuse, mixed_adapters, unfuse, use_fused, why_not_fused


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(24, 32, dtype=dtype), nn.Linear(32, 16, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def config(**changed) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["first", "second"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **changed})


def pair(dtype=torch.float32, **changed):
    """The same model with PEFT's layers, and fused."""
    torch.manual_seed(0)
    stock = get_peft_model(Net(dtype), config(**changed))
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    return stock, fused, report


@pytest.fixture
def calls(monkeypatch):
    """How many calls took lora_linear."""
    count = []

    def counted(*args, **kwargs):
        count.append(kwargs.get("segments"))
        return ours_lora_linear(*args, **kwargs)

    ours_lora_linear = ours.lora_linear
    monkeypatch.setattr(ours, "lora_linear", counted)
    return count


def run(model, x, **kwargs):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **kwargs)
    y.float().square().sum().backward()
    return y, x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(stock, fused, x, tolerance=1e-5, **kwargs):
    (y, dx, grads), (y2, dx2, grads2) = run(stock, x, **kwargs), run(fused, x, **kwargs)
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y2, y, **close)
    torch.testing.assert_close(dx2, dx, **close)
    assert grads.keys() == grads2.keys() and grads
    for name, grad in grads.items():
        assert grads2[name].dtype == grad.dtype
        torch.testing.assert_close(grads2[name], grad, rtol=tolerance, atol=tolerance * grad.abs().max().item())


X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changed",
    [{}, {"r": 5, "use_rslora": True}, {"bias": "all"}, {"rank_pattern": {"second": 7}, "alpha_pattern": {"second": 3}}, {"r": 40}],
    ids=["plain", "rslora", "trained bias", "patterns", "rank above width"],
)
def test_the_same_as_peft(changed, calls):
    stock, fused, report = pair(**changed)
    assert len(report.fused) == 2 and not report.left and "2 LoRA layers fused, 0 left" in str(report)
    agree(stock, fused, X)
    assert len(calls) == 2


def test_float32_adapters_on_a_16_bit_base(calls):
    stock, fused, _ = pair(torch.bfloat16)
    assert fused.base_model.model.first.lora_A["default"].weight.dtype == torch.float32, "PEFT's default"
    agree(stock, fused, X.bfloat16(), tolerance=0.05)
    assert len(calls) == 2


def test_autocast(calls):
    stock, fused, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        agree(stock, fused, X, tolerance=0.05)
    assert len(calls) == 2


def test_states(calls):
    """disable, several adapters, set_adapter, scale, merge and unmerge, delete: whatever state, the same numbers."""
    stock, fused, _ = pair()
    for model in (stock, fused):
        torch.manual_seed(3)
        model.add_adapter("other", config(r=6, lora_alpha=3))
        model.set_adapter("other")
    agree(stock, fused, X)
    for model in (stock, fused):
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.set_scale("other", 2.5)
    agree(stock, fused, X)
    before = len(calls)
    with stock.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(fused(X), stock(X))
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "other"])
    agree(stock, fused, X)
    assert len(calls) == before and "several adapters are active" in why_not_fused(fused.base_model.model.first)
    for model in (stock, fused):
        model.base_model.set_adapter("default")
        model.merge_adapter(safe_merge=True)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), stock(X))
    assert len(calls) == before
    for model in (stock, fused):
        model.unmerge_adapter()
        model.delete_adapter("other")
    agree(stock, fused, X)
    assert len(calls) == before + 2


def test_tensor_scaling(calls):
    """Hot-swapping a compiled model stores the scale as a tensor; it changes without another compilation."""
    stock, fused, _ = pair()
    for model in (stock, fused):
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.scaling["default"] = torch.tensor(1.5)
    agree(stock, fused, X)
    assert len(calls) == 2


def test_dropout_acts_in_training_alone(calls):
    _, fused, _ = pair(lora_dropout=0.5)
    fused.eval()
    with torch.no_grad():
        still = fused(X)
        assert torch.equal(fused(X), still)
        fused.train()
        torch.manual_seed(5)
        first, second = fused(X), fused(X)
        torch.manual_seed(5)
        assert torch.equal(fused(X), first) and not torch.equal(first, second)
        mean = torch.stack([fused(X.expand(3, 5, 24)) for _ in range(400)]).mean(0)
    assert (mean - still).abs().mean() < 0.2 * (still - Net().first.bias.mean()).abs().mean()
    assert len(calls) > 4


@pytest.mark.parametrize(
    "changed, reason",
    [({"use_dora": True}, "DoraLinearVariant"), ({"lora_bias": True}, "a bias of its own")],
)
def test_variants_are_left_to_peft_by_name(changed, reason, calls):
    stock, fused, report = pair(**changed)
    assert len(report.left) == 2 and all(reason in why for why in report.left.values()) and reason in str(report)
    agree(stock, fused, X)
    assert not calls


def test_hooks_are_not_passed_by(calls):
    stock, fused, _ = pair()
    seen = []
    for model in (stock, fused):
        model.base_model.model.first.lora_A["default"].register_forward_hook(lambda m, a, y: seen.append(y.shape))
    agree(stock, fused, X)
    assert len(seen) == 2 and len(calls) == 1 and "has hooks" in why_not_fused(fused.base_model.model.first)


@pytest.mark.parametrize("ranks", [(4, 4), (4, 7)])
def test_mixed_batches(ranks, calls):
    """adapter_names in inference equals PEFT's loop; in training, where PEFT raises, each sample's own adapter."""
    stock, fused, _ = pair(r=ranks[0])
    for model in (stock, fused):
        torch.manual_seed(4)
        model.add_adapter("b", config(r=ranks[1], lora_alpha=5))
        model.eval()
    names = ["b", "__base__", "default"]
    with torch.no_grad():
        torch.testing.assert_close(fused(X, adapter_names=names), stock(X, adapter_names=names), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 and all(s is not None for s in calls)

    fused.train()
    for parameter in (p for n, p in fused.named_parameters() if "lora_" in n):
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="training"):
        fused(X, adapter_names=names)
    with mixed_adapters(fused, names):
        fused(X).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in fused.named_parameters() if p.grad is not None}
    for sample, name in enumerate(names):
        fused.zero_grad()
        if name == "__base__":
            continue
        fused.base_model.set_adapter(name)
        fused(X[sample : sample + 1]).square().sum().backward()
        for n, p in fused.named_parameters():
            if p.grad is not None and f".{name}." in n:
                torch.testing.assert_close(mixed[n], p.grad, rtol=1e-4, atol=1e-5)


def test_mixed_batches_refused():
    stock, fused, _ = pair()
    with pytest.raises(ValueError, match="wanted every LoRA layer fused"), mixed_adapters(stock, ["default"] * 3):
        pass
    with (
        pytest.raises(ValueError, match="adapter_names: wanted names among __base__, default, got nobody"),
        mixed_adapters(fused, ["nobody"]),
    ):
        pass
    with pytest.raises(ValueError), mixed_adapters(fused, ["default"]):
        fused(X)


def test_use_fused_before_wrapping():
    model = get_peft_model(Net(), use_fused(config()))
    assert type(model.base_model.model.first) is FusedLoraLinear
    subclass = type("Special", (nn.Linear,), {})
    net = Net()
    net.first = subclass(24, 32)
    model = get_peft_model(net, use_fused(config()))
    assert type(model.base_model.model.first) is lora.Linear and type(model.base_model.model.second) is FusedLoraLinear
    assert list(fuse(model).left.values()) == ["its base layer is a Special, not exactly an nn.Linear"]
    with pytest.raises(TypeError, match="config: wanted a peft.LoraConfig, got dict"):
        use_fused({})
    with pytest.raises(ValueError, match="model: wanted one with PEFT LoRA layers"):
        fuse(Net())


def test_fuse_and_unfuse_keep_everything(tmp_path):
    stock, fused, _ = pair()
    assert stock.state_dict().keys() == fused.state_dict().keys()
    fused.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(X), fused(X), rtol=1e-5, atol=1e-5)
    assert unfuse(fused) == 2 and type(fused.base_model.model.first) is lora.Linear
    torch.testing.assert_close(fused(X), stock(X))
    assert fuse(fused).fused == ["base_model.model.first", "base_model.model.second"]
    assert repr(copy.deepcopy(fused).base_model.model.first).startswith("lora.")


def test_compile_has_no_graph_break():
    _, fused, _ = pair()
    assert torch._dynamo.explain(fused)(X).graph_break_count == 0

"""The second half of a mixture's experts as one node: what it keeps, its gradients each alone, and where it does not apply.

Its numbers are those of tests/test_experts_layer.py and of tests/test_peft_experts.py, which hold experts to float64.
"""

import copy

import pytest
import torch
from experts_models import INDEX, KINDS, TOP, WEIGHTS, E, Experts, I, K, NotGated, T, X, adapted, results, truth
from test_memory import Kept, mask_bytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import UnsupportedError, dispatch, experts, experts_node
from lora_kernels.parity import budget_used

R = 3


class Swish(Experts):
    """Gated by a module, as transformers' are."""

    def __init__(self, *how):
        super().__init__(*how)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return self.act_fn(gate) * up


Swish._apply_gate.__module__, Swish._apply_gate.__name__ = "transformers.integrations.moe", "_default_apply_gate"


@pytest.fixture
def by_kernels(monkeypatch):
    """As on a GPU: what is beside the products, too."""
    monkeypatch.setattr(experts, "kernel_of", lambda act, h: "silu" if isinstance(act, nn.SiLU) else "")
    monkeypatch.setattr(experts_node, "on_a_gpu", lambda t: True)
    monkeypatch.setattr(dispatch, "unmeasured", lambda *args: ("triton", "for this test"))
    dispatch.forget()
    yield
    dispatch.forget()


def alone(layer):
    """The same experts by single operators, as a compiler would see them."""
    other = copy.deepcopy(layer)
    other.experts.watched = nn.Identity()
    other.experts.watched.register_forward_hook(lambda *args: None)
    return other


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("kind, torchs", [(Swish, 4 * I + K), (NotGated, I + K), (lambda: Swish(True, True), 4 * I + K)])
def test_bytes_kept(kind, torchs, p):
    """Of each row h and u; not act(gate), what comes of it, nor the experts' answers. Before that, x and u."""
    layer, found = adapted(kind, torch.float64, lora_dropout=p), []
    x, weights, rows = X.double().requires_grad_(), WEIGHTS.double().requires_grad_(), T * TOP
    for each in (layer, alone(layer)):
        with Kept() as kept:
            each(x, INDEX, weights)
        copies = sum(8 * one.factors().B.numel() for one in layer.chain())  # B by expert
        masks = mask_bytes(p, rows, K) + mask_bytes(p, rows, I)
        found.append(kept.bytes([*each.parameters(), INDEX]) - copies - masks - 8 * (x.numel() + weights.numel() + rows * 2 * R))
    assert found[1] - found[0] == 8 * rows * (torchs - 2 * I)
    assert 0 < found[0] - 8 * rows * 2 * I < 4 * 12 * (rows + E + 16), "the plan's integers"


@pytest.mark.parametrize("kind", [*KINDS.values(), Swish], ids=[*KINDS, "swish"])
@pytest.mark.parametrize("trained", ["x", "weights", "gate_up's A", "down's A", "down's B", "all but weights"])
def test_each_gradient_alone(kind, trained, stacks):
    layer = adapted(kind, torch.float64)
    leaves = dict(layer.named_parameters())
    x, weights = X.double(), WEIGHTS.double()
    names = {"gate_up's A": ["base_layer.lora_A"], "down's A": ["lora_A"], "down's B": ["lora_B"], "x": [], "weights": []}
    named = names.get(trained, [name for name in leaves if "lora_" in name])
    for name, parameter in leaves.items():
        parameter.requires_grad_(name in named)
    wanted = truth(layer)
    x.requires_grad_("x" in trained.split() or trained.startswith("all")), weights.requires_grad_(trained == "weights")
    y = layer(x, INDEX, weights)
    assert [how for how, _ in stacks] == ["alone", "node"]
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    found = {"dx": x.grad, "dweights": weights.grad} | {f"d {name}": leaves[name].grad for name in leaves}
    found = {name: grad for name, grad in found.items() if grad is not None}
    assert len(found) == len(named) + (trained in ("x", "weights")) + (trained == "all but weights")
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [Swish, lambda: Swish(True, True)], ids=["gated", "biases"])
def test_sixteen_bits(kind, of):
    """Within the budget of the same experts by single operators: the weights' gradient, too, which is made of other products."""
    layer = adapted(kind, torch.bfloat16)
    x, weights = X.bfloat16(), WEIGHTS.to(of)
    exact = truth(layer, x, INDEX, weights)
    ours, theirs = results(layer, x, INDEX, weights), results(alone(layer), x, INDEX, weights)
    assert ours.keys() == theirs.keys() == exact.keys() and len(ours) == 7
    for name, wanted in exact.items():
        assert ours[name].dtype is theirs[name].dtype
        assert budget_used(ours[name], theirs[name], wanted) <= 1, name


@pytest.mark.interpreted
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("kind", [Swish, lambda: Swish(True, True), NotGated], ids=["gated", "biases", "not gated"])
def test_by_the_kernels(kind, p, launched, by_kernels, stacks):
    layer = adapted(kind, lora_dropout=p)
    index = INDEX.clone()
    index[3], index[5, 0] = E, E + 2  # no expert
    torch.manual_seed(4)
    wanted = results(alone(layer), index=index)
    found: dict = {}
    stacks.clear()
    torch.manual_seed(4)
    names = launched(lambda: found.update(results(layer, index=index)))
    beside = [name for name in names if name.startswith(("gate", "weighted"))]
    gates = [] if kind is NotGated else ["gate_product", "gate_gradients"]
    assert beside == [*gates[:1], "weighted_rows", *gates] and [how for how, _ in stacks] == ["alone", "node"]
    assert found.keys() == wanted.keys() and len(found) == 7
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.interpreted
def test_by_the_kernels_without_a_graph(launched, by_kernels):
    """The weighted sum alone; not of tensors that a mode sees, and not of none."""
    layer = adapted(Swish)
    weights = WEIGHTS.t().contiguous().t()
    found = []
    with torch.no_grad():
        wanted = alone(layer)(X, INDEX, WEIGHTS)
        names = launched(lambda: found.append(layer(X, INDEX, weights)))
        assert names.count("weighted_rows") == 1 and not any(name.startswith("gate") for name in names)
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)
        assert launched(lambda: layer(X[:0], INDEX[:0], WEIGHTS[:0])) == []
        with FlopCounterMode(display=False):
            assert "weighted_rows" not in launched(lambda: layer(X, INDEX, weights))
    torch.testing.assert_close(results(layer, weights=weights)["dweights"], results(layer)["dweights"])


def test_weights_of_zero():
    """Their gradient is that of an expert's answer, which is not divided by them."""
    layer, weights = adapted(Swish, torch.float64), WEIGHTS.double()
    weights[2], weights[4, 1] = 0, 0
    for name, wanted in truth(layer, X.double(), INDEX, weights).items():
        torch.testing.assert_close(results(layer, X.double(), INDEX, weights)[name], wanted, rtol=1e-10, atol=1e-10)


def test_what_is_not_finite_stays_with_its_rows():
    layer = adapted(Swish, torch.float64)
    with torch.no_grad():
        layer.lora_A.view(E, R, -1)[1].fill_(torch.nan)
        layer.experts.down_proj[2].fill_(torch.inf)
    found = results(layer, X.double(), INDEX, WEIGHTS.double())
    clean = ((INDEX != 1) & (INDEX != 2)).all(1)
    assert clean.any() and not clean.all()
    for name in ("y", "dx", "dweights"):
        assert found[name][clean].isfinite().all() and not found[name][~clean].isfinite().all(), name
    assert found["d lora_A"].view(E, R, -1)[[0, 3, 4]].isfinite().all()


def test_under_autocast_the_gate_is_made_again_as_it_was(stacks):
    """Of what autocast makes float32 of, too: here the gate tells by its dtype."""
    seen = []

    class Cast(Experts):
        def _apply_gate(self, h):
            gate, up = torch.mm(h, torch.eye(2 * I)).chunk(2, -1)
            seen.append(gate.dtype)
            return torch.tanh(gate) * up

    layer = adapted(Cast)

    def call(layer):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(X, INDEX, WEIGHTS)

    call(layer).sum().backward()
    assert seen == [torch.bfloat16] * 2 and [how for how, _ in stacks] == ["alone", "node"]
    with torch.autocast("cpu", torch.bfloat16):
        layer(X, INDEX, WEIGHTS).sum().backward()
    assert seen == [torch.bfloat16] * 4


def test_a_gate_that_writes_is_refused():
    class Writes(Experts):
        def _apply_gate(self, h):
            gate, up = h.chunk(2, -1)
            return gate.clamp_(max=0.1) * up

    layer = adapted(Writes)
    with pytest.raises(UnsupportedError, match="gate: wanted one that leaves its argument as it is"):
        layer(X, INDEX, WEIGHTS)


def test_where_single_operators_are_to_be_seen(stacks):
    """Hooks on what is between, or for all modules, something trained there, nothing trained at all."""
    layer = adapted(Swish)
    seen = []
    handle = layer.experts.act_fn.register_forward_hook(lambda *args: seen.append(1))
    results(layer)
    handle.remove()
    with nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(2) if isinstance(module, nn.SiLU) else None):
        results(layer)
    layer.experts.act_fn = nn.PReLU()
    results(layer)
    assert layer.experts.act_fn.weight.grad is not None
    layer.experts.act_fn = nn.SiLU()
    with torch.no_grad():
        layer(X, INDEX, WEIGHTS)
    layer.requires_grad_(False)
    layer(X, INDEX, WEIGHTS)
    assert seen == [1, 2] and {how for how, _ in stacks} == {"alone"}


def test_twice_and_written(stacks):
    layer = adapted(Swish, torch.float64)
    x, weights = X.double().requires_grad_(), WEIGHTS.double().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x, INDEX, weights).cos().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="create_graph"):
        dx.sum().backward()
    y = layer(x, INDEX, weights)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone(), weights.grad.clone()
    x.grad = weights.grad = None
    y.sum().backward()
    assert torch.equal(x.grad, first[0]) and torch.equal(weights.grad, first[1]), "nothing that was kept is written to"
    y = layer(x, INDEX, weights)
    with torch.no_grad():
        layer.experts.down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert {how for how, _ in stacks} == {"alone", "node"}

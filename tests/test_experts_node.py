"""The second half of a mixture's experts as one node: what it keeps, its gradients each alone, and where it does not apply.

Its numbers are those of tests/test_experts_layer.py and of tests/test_peft_experts.py, which hold experts to float64.
"""

import copy

import pytest
import torch
from experts_models import INDEX, KINDS, TOP, WEIGHTS, E, Experts, I, K, NotGated, T, X, adapted, results, truth
from test_memory import Kept, mask_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import UnsupportedError, dispatch, experts_node, gates
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
    monkeypatch.setattr(gates, "kernel_of", lambda act, h: "silu")
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
    below = trained in ("x", "gate_up's A", "all but weights")
    assert [how for how, _ in stacks] == ["alone", "node" if below else "alone"], "else of less than h is made"
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
    wanted = results(layer)
    for name, value in results(layer, weights=weights).items():
        torch.testing.assert_close(value, wanted[name])


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


class Writes(Experts):
    def _apply_gate(self, h):
        gate, up = h.clamp_(max=0.1).chunk(2, -1)
        return torch.tanh(gate) * up


class Draws(Experts):
    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return torch.dropout(gate, 0.5, True) * up


class Steps(Experts):
    def _apply_gate(self, h):
        return (h[..., :I] > 0).to(h.dtype)


class Learns(Experts):
    """By a parameter that is none of the module's."""

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return self.of[0] * torch.tanh(gate) * up


class Own(Experts):
    def __init__(self, *how):
        super().__init__(*how)
        self.alpha = nn.Parameter(torch.tensor(2.0))

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return self.alpha * torch.tanh(gate) * up


@pytest.mark.parametrize("kind", [Writes, Draws, Steps, Learns, Own])
def test_a_gate_that_is_more_than_a_function(kind, stacks):
    """It writes, draws random numbers, has no gradient, or learns: by single operators, with their gradients."""
    layer, x, weights = adapted(kind, torch.float64), X.double().requires_grad_(), WEIGHTS.double().requires_grad_()
    of = layer.experts.of = [torch.tensor(2.0, dtype=torch.float64, requires_grad=True)]
    learns = [layer.experts.alpha.requires_grad_()] if kind is Own else of if kind is Learns else []
    leaves = [x, weights, *(p for p in layer.parameters() if p.requires_grad and p not in set(learns)), *learns]

    def call(*_):
        torch.manual_seed(7)
        return layer(x, INDEX, weights)

    y = call()
    assert [how for how, _ in stacks] == ["alone"] * 2
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        direction, step = torch.randn_like(leaf), 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                leaf.add_(direction, alpha=sign * step)
                values.append(call().square().sum())
                leaf.sub_(direction, alpha=sign * step)
        numeric = (values[0] - values[1]) / (2 * step)
        analytic = torch.zeros(()) if grad is None else (grad * direction).sum()
        torch.testing.assert_close(analytic.double(), numeric.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["float16", "h without a gradient"])
def test_where_the_node_would_lose(what, stacks):
    """Range, or bytes."""
    layer = adapted(Swish, torch.float16 if what == "float16" else torch.float32)
    x = X.to(layer.weight.dtype)
    if what != "float16":
        for parameter in layer.base_layer.parameters():
            parameter.requires_grad_(False)
    layer(x.requires_grad_(what == "float16"), INDEX, WEIGHTS.requires_grad_()).sum().backward()
    WEIGHTS.requires_grad_(False).grad = None
    assert [how for how, _ in stacks] == ["alone"] * 2


def test_the_activation_between_the_passes():
    """What it is by then does not act on what is made again: it is replaced, or has a hook."""
    layer, found = adapted(Swish, torch.float64), []
    x = X.double().requires_grad_()
    for change in (lambda act: act, lambda act: nn.GELU(), lambda act: act.register_forward_hook(lambda *args: 3 * args[-1]) and act):
        y = layer(x, INDEX, WEIGHTS.double())
        act = layer.experts.act_fn
        layer.experts.act_fn = change(act)
        found.append(torch.autograd.grad(y.sum(), x)[0])
        layer.experts.act_fn = act
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


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
    with Sees():
        layer(X, INDEX, WEIGHTS)
    with torch.no_grad():
        layer(X, INDEX, WEIGHTS)
    layer.requires_grad_(False)
    layer(X, INDEX, WEIGHTS)
    assert seen == [1, 2] and {how for how, _ in stacks} == {"alone"}


def test_a_mode_that_looks_on_in_the_backward_pass_alone():
    """It sees an operator, whose dY has a row for each row of x."""
    layer = adapted(Swish, torch.float64)
    wanted = results(layer, X.double(), weights=WEIGHTS.double())
    x, weights, counted = X.double().requires_grad_(), WEIGHTS.double().requires_grad_(), []
    for each in (alone(layer), layer):
        y = each(x, INDEX, weights)
        ramp = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        with FlopCounterMode(display=False) as flops:
            found = torch.autograd.grad((y * ramp).sum(), [x, weights, each.lora_A, each.lora_B])
        counted.append(flops.get_total_flops())
    assert counted[1] == counted[0] + 2 * T * TOP * I, "and the dot products of the weights' gradient"
    for grad, name in zip(found, ["dx", "dweights", "d lora_A", "d lora_B"], strict=True):
        torch.testing.assert_close(grad, wanted[name])


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

"""`recompute_gates` where gate and up are one layer's, side by side, as in Phi-3 and GLM."""

import functools

import pytest
import test_gated
import torch
from test_gated import WIDTH, K, M, R, bytes_kept, same, step, taken, x_of
from test_memory import mask_bytes
from torch import nn

from lora_kernels import gates, recompute_gates


class Packed(nn.Module):
    def __init__(self, act=nn.SiLU, width=2 * WIDTH):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = nn.Linear(K, width), nn.Linear(WIDTH, K, bias=False), act()

    def forward(self, hidden_states):
        """What Phi-3's does."""
        up_states = self.gate_up_proj(hidden_states)
        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)
        return self.down_proj(up_states)


class GateFirst(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


class Positional(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.activation_fn(gate) * up)


class Normed(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * self.norm(up))


class UpFirst(Packed):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


class OfThree(Packed):
    def forward(self, x):
        gate, up, _ = self.gate_up_proj(x).chunk(3, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


class OfTokens(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=0)
        return self.down_proj(self.activation_fn(gate) * up)


class OfTwo(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        gate, other = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


class OfItself(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * gate)


class Bare(Packed):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


class Unrelated(Packed):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * self.gate_up_proj(x))


def adapted(mlp=Packed, p=0.0, dtype=torch.float64, **options) -> nn.Module:
    return test_gated.adapted(functools.partial(mlp, **options), p=p, targets=["gate_up_proj", "down_proj"], dtype=dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mlp", [Packed, GateFirst, Positional])
def test_the_same_bits(mlp, dtype, p, nodes):
    model = adapted(mlp, p, dtype)
    x = x_of(2, 5, dtype=dtype)
    plain = step(model, x)
    taken(model)
    same(step(model, x), plain)
    assert nodes == [1]
    recompute_gates(model, False)
    assert type(model["mlp"]) is mlp


@pytest.mark.parametrize("mlp", [UpFirst, OfThree, OfTokens, OfTwo, OfItself, Bare, Unrelated, Normed])
def test_another_forward_is_left_alone(mlp):
    assert recompute_gates(adapted(mlp)) == []


@pytest.mark.parametrize("more", [-1, 1])
def test_halves_that_are_none(more, nodes):
    """An odd width's chunks have two widths: the model's own expression, and its error."""
    model = adapted(width=2 * WIDTH + more)
    taken(model)
    with pytest.raises(RuntimeError, match="must match the size"):
        step(model)
    assert not nodes


def test_not_contiguous(nodes):
    model = adapted()
    taken(model)
    model["mlp"].gate_up_proj.register_forward_hook(lambda module, args, out: out.t().contiguous().t())
    step(model)
    assert not nodes


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bytes_kept(p):
    kept = bytes_kept(adapted(p=p))
    assert kept[0] - kept[1] == 2 * 8 * M * WIDTH
    assert kept[1] == 8 * (M * K + 2 * M * WIDTH + 2 * M * R) + mask_bytes(p, M, K) + mask_bytes(p, M, WIDTH)


@pytest.mark.interpreted
def test_by_the_kernels(monkeypatch, launched, nodes):
    model = adapted(dtype=torch.float32, p=0.3)
    plain = step(model)
    taken(model)
    monkeypatch.setattr(gates, "kernel_of", lambda act, up: "silu")
    found = []
    names = launched(lambda: found.append(step(model)))
    assert [name for name in names if name.startswith("gate")] == ["gate_product", "gate_product", "gate_gradients"] and nodes == [1]
    for name, wanted in plain.items():  # sums of a few hundred terms at most, in another order
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_compiled(nodes):
    model = adapted()
    plain = step(model)
    taken(model)
    compiled = torch.compile(model["mlp"], fullgraph=True, backend="aot_eager")
    for name, wanted in step(model, call=compiled).items():
        torch.testing.assert_close(wanted, plain[name])
    assert not nodes

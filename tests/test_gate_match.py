"""Which MLPs `recompute_gates` takes: by their class's forward, their activation and their layers, now and later."""

import functools

import pytest
import torch
import torch.nn.functional as F
from test_gated import MLP, AtOnce, M, Named, adapted, same, step, taken, x_of
from torch import nn

from lora_kernels import UnsupportedError, recompute_gates


class Anew(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x))
        h = h * self.up_proj(x)
        return self.down_proj(h)


class Dropped(MLP):
    def forward(self, x):
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.0))


class Added(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class OfAnother(MLP):
    def forward(self, x):
        y = 2 * x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(y))


class Written(MLP):
    def forward(self, x):
        x = 2 * x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Asked(MLP):
    def forward(self, x, scale=1.0):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Twice(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x))


class Keyword(MLP):
    def forward(self, x, *, scale=1.0):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Lost(MLP):
    def forward(self, x):
        h = self.act_fn(x)
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h)


class Rebound(MLP):
    def forward(self, x):
        z = 2 * x
        g = self.gate_proj(z)
        z = x
        return self.down_proj(self.act_fn(g) * self.up_proj(z))


class Walrus(MLP):
    def forward(self, x):
        _ = (x := 2 * x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(MLP):
    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


def doubled(f):
    @functools.wraps(f)
    def forward(self, x):
        return 2 * f(self, x)

    return forward


class Wrapped(MLP):
    forward = doubled(AtOnce.forward)


class Other(MLP):
    def forward(self, x):
        self = self.other
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Unused(MLP):
    def forward(self, x):
        seen = self.act_fn(x)  # noqa: F841
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Maybe(MLP):
    def forward(self, x):
        if self.training:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return x


class Decorated(MLP):
    @torch.no_grad()
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Random(nn.RReLU):
    pass


@pytest.mark.parametrize("mlp", [MLP, AtOnce, Named, Anew])
@pytest.mark.parametrize("lead", [(M,), (2, 5), (1,)])
def test_whatever_the_forward_calls_its_parts(mlp, lead, nodes):
    model = adapted(mlp)
    x = x_of(*lead)
    plain = step(model, x)
    taken(model)
    same(step(model, x), plain)
    assert nodes == [1] and isinstance(model["mlp"], mlp)


@pytest.mark.parametrize(
    "mlp",
    [
        Dropped,
        Added,
        OfAnother,
        Written,
        Asked,
        Keyword,
        Twice,
        Lost,
        Rebound,
        Walrus,
        UpFirst,
        Wrapped,
        Other,
        Unused,
        Maybe,
        Decorated,
    ],
)
def test_another_forward_is_left_alone(mlp):
    model = adapted(mlp)
    assert recompute_gates(model) == [] and type(model["mlp"]) is mlp


def test_a_forward_that_another_library_replaced(monkeypatch, nodes):
    """Of the class, after it was looked at, or after its MLPs were taken."""
    model = adapted(AtOnce)
    taken(model)
    monkeypatch.setattr(AtOnce, "forward", lambda self, x: 3 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
    tripled = step(model)
    recompute_gates(model, False)
    same(step(model), tripled)
    assert recompute_gates(model) == [] and not nodes


def test_an_argument_by_its_name(nodes):
    model = adapted(AtOnce)
    plain = step(model)
    taken(model)
    same(step(model, call=lambda x: model["mlp"](hidden_states=x)), plain)
    assert nodes == [1]
    for wrong in (dict(x=1), dict(hidden_states=1, more=2), {}):
        with pytest.raises(TypeError, match="forward()"):
            model["mlp"](**wrong)


@pytest.mark.parametrize("act", [nn.RReLU, Random, nn.PReLU, lambda: nn.SiLU(inplace=True), lambda: nn.Sequential(nn.SiLU())])
def test_another_activation_is_left_alone(act):
    assert recompute_gates(adapted(act=act)) == []


@pytest.mark.parametrize("act", [nn.PReLU, nn.RReLU, nn.ReLU])
def test_an_activation_that_is_replaced(act, nodes):
    model = adapted()
    taken(model)
    model["mlp"].act_fn = act().double()
    ours = step(model)
    recompute_gates(model, False)
    same(ours, step(model))
    assert not nodes


def test_of_which_layers():
    assert recompute_gates(adapted(targets=["gate_proj", "up_proj"])) == [], "no adapter whose A wants the product"
    model = adapted(targets=["down_proj"])
    plain = step(model)
    taken(model)
    same(step(model), plain)
    model = adapted()
    model["mlp"].forward = model["mlp"].forward  # as accelerate puts it there
    assert recompute_gates(model) == []
    assert recompute_gates(nn.Linear(3, 3)) == []


def test_an_mlp_that_is_sharded_itself_stays_as_it_is():
    """Its class is then FSDP's, which to put back would lose."""

    class FSDPModule:
        pass

    model = adapted()
    model["mlp"].__class__ = type("FSDPMLP", (FSDPModule, MLP), {})
    assert recompute_gates(model) == []
    model["mlp"].__class__ = MLP
    taken(model)
    model["mlp"].__class__ = type("FSDPGatedMLP", (FSDPModule, type(model["mlp"])), {})
    assert recompute_gates(model) == ["mlp"], "as it is"
    with pytest.raises(UnsupportedError, match="wanted MLPs as recompute_gates left them, got 'mlp' with the class FSDPGatedMLP"):
        recompute_gates(model, False)


def test_hooks_as_accelerate_puts_them_there_afterwards(nodes):
    model = adapted()
    plain = step(model)
    taken(model)
    model["mlp"].forward = model["mlp"].forward
    assert recompute_gates(model) == ["mlp"]
    with pytest.raises(UnsupportedError, match="got 'mlp' with accelerate's hooks"):
        recompute_gates(model, False)
    same(step(model), plain)
    assert nodes == [1]

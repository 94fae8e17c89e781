"""`share_inputs`: layers of one x compute together when called with it, and alone, with the same result, whenever anything differs."""

import copy
import io
import threading
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, LoRAConfig, apply_lora, remove_lora, share_inputs, shared_input
from lora_kernels.parity import budget_used

M, K = 11, 24
QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """q, k and v of sizes of their own; ``others``: what k and v are given in the place of x."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, 16), nn.Linear(K, 8, bias=False), nn.Linear(K, 12)
        self.o_proj = nn.Linear(36, K)

    def forward(self, x, others=None):
        q = self.q_proj(x)
        others = x if others is None else others
        return self.o_proj(torch.tanh(torch.cat((q, self.k_proj(others), self.v_proj(others)), -1)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x, **kwargs):
        for layer in self.layers:
            x = x + layer(x, **kwargs)
        return x


def adapted(model=Model, shared=True, p=0.0, targets=(*QKV, "o_proj"), dtype=torch.float64, **config) -> nn.Module:
    torch.manual_seed(0)
    made = model().to(dtype)
    apply_lora(made, LoRAConfig(target_modules=list(targets), r=3, lora_dropout=p, **config))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    if shared:
        share_inputs(made)
    return made


def x_of(*lead, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*(lead or (M,)), K, generator=torch.Generator().manual_seed(2)).to(dtype)


def step(model, x, **kwargs) -> dict:
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(4)
    y = model(x, **kwargs)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(M,), (2, 5)])
def test_results_are_those_of_each_alone(groups, p, lead):
    """Dropout's seeds, too, are drawn in the same order."""
    alone = step(adapted(shared=False, p=p), x_of(*lead))
    assert groups == []
    together = adapted(p=p)
    for _ in range(2):
        same(step(together, x_of(*lead)), alone)
    assert groups == [3, 3] * 2


def test_groups_are_found_by_name():
    model = adapted(shared=False)
    names = [tuple(f"layers.{i}.{name}" for name in QKV) for i in range(2)]
    assert share_inputs(model) == names == share_inputs(model)
    asked = [("k_proj", "o_proj"), ("q_proj", "absent")]
    assert share_inputs(model, asked) == [(f"layers.{i}.k_proj", f"layers.{i}.o_proj") for i in range(2)]
    assert model.layers[0].q_proj._shares is None and model.layers[0].k_proj._shares is not None
    assert share_inputs(model, ()) == []
    assert all(layer._shares is None for layer in model.modules() if isinstance(layer, FusedLoRALinear))
    assert share_inputs(adapted(Attention, shared=False, targets=("q_proj", "v_proj"))) == [("q_proj", "v_proj")]
    assert share_inputs(nn.Sequential(nn.Linear(2, 2))) == []
    remove_lora(adapted())  # takes the layers away, and their groups with them


@pytest.mark.parametrize("groups", ["q_proj", ["q_proj"], [("q_proj", 3)]])
def test_groups_of_something_else(groups):
    with pytest.raises(TypeError, match="groups: wanted sequences of names"):
        share_inputs(adapted(), groups)
    with pytest.raises(ValueError, match="groups: wanted each name once"):
        share_inputs(adapted(), [("q_proj", "q_proj")])


def test_only_those_with_an_adapter(groups):
    alone = step(adapted(shared=False, targets=("q_proj", "v_proj")), x_of())
    same(step(adapted(targets=("q_proj", "v_proj")), x_of()), alone)
    assert groups == [2, 2]


def test_another_x_is_found_out_and_ends_it(groups):
    """Cross-attention: right from the first call on, alone after two, and said."""
    model, plain = adapted(Attention), adapted(Attention, shared=False)
    others = x_of().flip(0)
    with pytest.warns(UserWarning, match="q_proj, k_proj, v_proj were not called with one x, twice in a row"):
        for _ in range(3):
            same(step(model, x_of(), others=others), step(plain, x_of(), others=others))
    groups.clear()
    same(step(model, x_of()), step(plain, x_of()))
    assert groups == []
    share_inputs(model)  # begins anew
    same(step(model, x_of()), step(plain, x_of()))
    assert groups == [3]


def test_one_stray_call_ends_nothing(groups):
    """A result that nobody takes is dropped: after an exception, say."""
    model = adapted(Attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.q_proj(x_of())
            same(step(model, x_of()), step(adapted(Attention, shared=False), x_of()))
    assert groups == [3] * 6


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_any_of_them_may_be_the_first(groups, order):
    model, plain, x = adapted(Attention), adapted(Attention, shared=False), x_of()
    for i in order:
        torch.testing.assert_close(getattr(model, QKV[i])(x), getattr(plain, QKV[i])(x))
    assert groups == [3]


def test_called_twice_with_one_x():
    model, plain, x = adapted(Attention), adapted(Attention, shared=False), x_of()
    for name in ("q_proj", "q_proj", "k_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(getattr(model, name)(x), getattr(plain, name)(x))


def _written(model, x):
    x.mul_(2)


def _trained(model, x):
    with torch.no_grad():
        model.k_proj.lora_B.add_(1)


def _reweighted(model, x):
    with torch.no_grad():
        model.k_proj.weight.mul_(3)


def _replaced(model, x):
    new = torch.ones(3, K, dtype=torch.float64)
    while new._version < model.k_proj.lora_A._version:  # so that its place alone tells them apart
        new.mul_(1)
    model.k_proj.lora_A = nn.Parameter(new)


def _rescaled(model, x):
    model.k_proj.scaling = 5.0


def _merged(model, x):
    model.k_proj.merge()


def _disabled(model, x):
    model.k_proj.enabled = False


def _frozen(model, x):
    model.k_proj.requires_grad_(False)


def _evaluated(model, x):
    model.eval()


@pytest.mark.parametrize(
    "change", [_written, _trained, _reweighted, _replaced, _rescaled, _merged, _disabled, _frozen, _evaluated], ids=lambda c: c.__name__[1:]
)
def test_what_changes_between_two_calls_counts(change):
    """k's result is of the moment at which it is called."""
    p = 0.5 if change is _evaluated else 0.0
    results = []
    for shared in (True, False):
        model, x = adapted(Attention, shared=shared, p=p), x_of()
        torch.manual_seed(1)
        q = model.q_proj(x)
        change(model, x)
        results.append((q, model.k_proj(x), model.v_proj(x)))
        assert results[-1][1].requires_grad == (change not in (_merged, _disabled, _frozen))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_whether_x_wants_a_gradient_counts():
    """k's result has the graph that x has when k is called."""
    model, leaf = adapted(Attention, shared=True), x_of().requires_grad_()
    x = leaf * 1
    model.q_proj(x)
    x.detach_()
    model.k_proj(x).sum().backward()
    assert leaf.grad is None
    model, x = adapted(Attention, shared=True), x_of()
    model.q_proj(x)
    x.requires_grad_()
    model.k_proj(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("between", [False, True])
def test_torchs_generator_goes_as_if_each_stood_alone(order, between):
    """Seeds are drawn when a layer is called, whatever is drawn between two calls: masks are those of each alone."""
    runs = []
    for shared in (True, False):
        model, x = adapted(Attention, shared=shared, p=0.5), x_of()
        torch.manual_seed(6)
        found = []
        for i in order:
            found.append(getattr(model, QKV[i])(x))
            found.append(torch.get_rng_state())
            if between:
                found.append(torch.rand(3))
        runs.append(found)
    for ours, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_what_it_computed_while_a_group_ends(reentrant):
    """Masks, and as many saved tensors, though k and v are not of q's x."""
    runs = []
    for shared in (True, False):
        model, found = adapted(Attention, shared=shared, p=0.5), []
        torch.manual_seed(6)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                x = x_of(70).requires_grad_()
                y = checkpoint(model, x, x_of(70).flip(0), use_reentrant=reentrant)
                y.square().sum().backward()
                found.append(x.grad)
        assert any("twice in a row" in str(each.message) for each in said) == shared
        runs.append(found)
    for ours, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def test_grad_mode_and_autocast_count():
    model, plain = (adapted(Attention, shared=shared, dtype=torch.float32) for shared in (True, False))
    x = x_of(70, dtype=torch.float32)
    with torch.no_grad():
        assert not model.q_proj(x).requires_grad
    assert model.k_proj(x).requires_grad
    model.q_proj(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.v_proj(x).dtype == torch.bfloat16
        ours, wanted = step(model, x), step(plain, x)
    assert ours.keys() == wanted.keys()
    for name in ours:
        assert budget_used(ours[name], wanted[name], wanted[name].double(), torch.bfloat16) <= 1, name


def test_a_hook_that_gives_a_layer_another_x():
    model, plain = adapted(Attention), adapted(Attention, shared=False)
    for each in (model, plain):
        each.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        each.v_proj.register_forward_hook(lambda module, args, y: y + 1)
    same(step(model, x_of()), step(plain, x_of()))


def test_layers_that_take_no_part(groups):
    """DoRA, an adapter's bias, merged, disabled; their neighbours go on together."""
    model, plain = adapted(Attention), adapted(Attention, shared=False)
    for each in (model, plain):
        each.k_proj.merge()
    same(step(model, x_of()), step(plain, x_of()))
    assert groups == [2]
    model, plain = adapted(Attention, use_dora=True), adapted(Attention, shared=False, use_dora=True)
    same(step(model, x_of()), step(plain, x_of()))
    assert groups == [2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(groups, reentrant):
    model, plain = adapted(p=0.2), adapted(shared=False, p=0.2)
    for each in (model, plain):
        for layer in each.layers:
            forward = layer.forward
            layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=reentrant)
    for _ in range(2):
        same(step(model, x_of(70)), step(plain, x_of(70)))
    assert groups == [3] * 8


def test_copies_and_files_have_groups_of_their_own(groups):
    model = adapted(Attention)
    model.q_proj(x_of())  # leaves two results
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for each in (copied, loaded):
        shared = each.k_proj._shares
        assert shared.made is None and shared is each.q_proj._shares is not model.q_proj._shares
        assert list(shared.layers.values()) == [each.q_proj, each.k_proj, each.v_proj]
        groups.clear()
        same(step(each, x_of()), step(adapted(Attention, shared=False), x_of()))
        assert groups == [3]
    assert adapted().state_dict().keys() == adapted(shared=False).state_dict().keys()


def test_a_replica_computes_alone(groups):
    """As of DataParallel: a shallow copy whose parameters are others."""
    model, x = adapted(Attention), x_of()
    replica, own = copy.copy(model.q_proj), model.q_proj._parameters
    replica.__dict__ = {**model.q_proj.__dict__, "_parameters": {name: p * 2 for name, p in own.items() if p is not None}}
    replica.lora_bias = replica.lora_magnitude = None
    assert not torch.equal(replica(x), model.q_proj(x))
    assert groups == [3]


def test_threads_do_not_take_each_others(groups):
    model, plain = adapted(), adapted(shared=False)
    xs = [x_of() * i for i in range(1, 5)]
    wanted, found = [plain(x) for x in xs], [None] * 4

    def work(i):
        for _ in range(10):
            found[i] = model(xs[i])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is computed alone from some call on
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for y, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(y, right)


def test_another_stream_takes_nothing(groups, monkeypatch):
    """It would have to wait for the one on which the first call made it."""
    (model, x), streams = (adapted(Attention), x_of()), iter(range(9))
    monkeypatch.setattr(shared_input, "kept_for", lambda device: next(streams))
    model.q_proj(x), model.k_proj(x)
    assert groups == [3, 3]


def test_alone_where_it_must_be(groups):
    """Compiled, in inference mode, under fake tensors, without tokens, and where there is nothing to share: few tokens, no gradient."""
    model, plain = adapted(Attention), adapted(Attention, shared=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = x_of()
    torch.testing.assert_close(compiled(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(model(x_of(70)), plain(x_of(70)))
    assert model(x_of(0)).shape == (0, K)
    with torch.no_grad():
        torch.testing.assert_close(model(x_of(64)), plain(x_of(64)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (M, K)
    assert groups == []
    with torch.no_grad():
        torch.testing.assert_close(model(x_of(65)), plain(x_of(65)))
    assert groups == [3]


def test_offloaded_activations_are_offloaded_once():
    """x of q, k and v is one saved tensor of one node."""
    counts = []
    for shared in (True, False):
        packed: list = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(t) or t, lambda t: t):
            adapted(Attention, shared=shared)(x_of().requires_grad_())
        counts.append(sum(t.shape == (M, K) for t in packed))
    assert counts == [1, 3]

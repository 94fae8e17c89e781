"""LoRAExperts, on plain torch modules: numbers, dropout, states, merging, checkpoints, and what is refused."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from experts_models import INDEX, KINDS, TOP, WEIGHTS, E, Experts, I, K, T, X, adapted, keep, results, truth
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import lora_kernels.experts as mixture
from lora_kernels import LoRAExperts, UnsupportedError, dispatch, philox
from lora_kernels.experts import Factors

CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64 on both sides: sums in another order, nothing else


def agree(got, wanted, **close):
    assert got.keys() == wanted.keys() and len(got) == 7, sorted(got)
    for name, value in got.items():
        torch.testing.assert_close(value.double(), wanted[name], msg=lambda text, name=name: f"{name}: {text}", **close)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("options", [{}, {"r": 1, "use_rslora": True}], ids=["r 3", "r 1, rslora"])
def test_numbers(kind, options, stacks):
    """y and the gradients of x, the routing's weights, and each A and B: the formula, expert by expert, in float64."""
    layer = adapted(kind, torch.float64, **options)
    agree(results(layer, X.double(), weights=WEIGHTS.double()), truth(layer), **CLOSE)
    assert [how for how, _ in stacks] == ["alone", "node"]
    single = adapted(kind, **options)
    got = results(single)
    assert all(value.dtype == torch.float32 for value in got.values())
    agree(got, truth(single), rtol=1e-4, atol=1e-4)


def test_each_stack_has_its_own_rank_and_scale():
    experts = Experts().double()
    inner = LoRAExperts(experts, "gate_up_proj", r=2, lora_alpha=1, init_lora_weights=False)
    layer = LoRAExperts(inner, "down_proj", r=7, lora_alpha=3, init_lora_weights=False)
    inner.scaling = -1.5
    agree(results(layer, X.double(), weights=WEIGHTS.double()), truth(layer), **CLOSE)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_stack_alone(name, stacks):
    torch.manual_seed(0)
    layer = LoRAExperts(Experts().double(), name, r=4, init_lora_weights=False)
    got, wanted = results(layer, X.double(), weights=WEIGHTS.double()), truth(layer)
    assert got.keys() == wanted.keys() and len(got) == 5
    for each in got:
        torch.testing.assert_close(got[each], wanted[each], **CLOSE)
    assert len(stacks) == 2


def test_no_token_no_expert_and_others_experts():
    """No rows at all; and an expert's number past the last, which another rank of expert parallelism has."""
    layer = adapted(dtype=torch.float64)
    assert layer(X[:0].double(), INDEX[:0], WEIGHTS[:0].double()).shape == (0, K)
    index = INDEX.clone()
    index[::3, 0], index[4] = E, E
    agree(results(layer, X.double(), index, WEIGHTS.double()), truth(layer, index=index), **CLOSE)


def test_sixteen_bits_with_float32_adapters():
    layer = adapted(lambda: Experts(True, True), torch.bfloat16, adapter_dtype=torch.float32)
    assert layer.lora_A.dtype == torch.float32 and layer.experts.down_proj.dtype == torch.bfloat16
    for within in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with within:
            got = results(layer, X.bfloat16(), weights=WEIGHTS.bfloat16())
        wanted = truth(layer, X.bfloat16(), weights=WEIGHTS.bfloat16())
        assert got["y"].dtype == torch.bfloat16 and got["d lora_A"].dtype == torch.float32
        for name, value in got.items():
            assert (value.double() - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


def test_starts_as_the_base():
    torch.manual_seed(0)
    experts = Experts()
    wanted = experts(X, INDEX, WEIGHTS).detach()
    layer = LoRAExperts(experts, "gate_up_proj", r=4, lora_alpha=2, use_rslora=True)
    assert layer.scaling == 1.0 and layer.lora_A.shape == (E * 4, K) and layer.lora_B.shape == (2 * I, 4 * E)
    assert (layer.num_experts, layer.in_features, layer.out_features) == (E, K, 2 * I)
    torch.testing.assert_close(layer(X, INDEX, WEIGHTS), wanted)
    assert layer.lora_A.abs().max() <= K**-0.5 and layer.lora_A.std() > 0.5 * K**-0.5 and not layer.lora_B.any(), "kaiming, a = sqrt(5)"
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert all(p is q for p, q in zip(layer.experts.parameters(), experts.parameters(), strict=True))
    assert "parameter_name=gate_up_proj, num_experts=5, in_features=24, out_features=32, r=4" in repr(layer)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_dropout(kind):
    """The masks of two seeds from torch's generator, one for each stack, in y and in every gradient."""
    layer, p = adapted(kind, torch.float64, lora_dropout=0.3), 0.3
    torch.manual_seed(5)
    got = results(layer, X.double(), weights=WEIGHTS.double())
    torch.manual_seed(5)
    inner, outer = layer.base_layer, layer
    masks = {each.parameter_name: keep(philox.draw_seed(torch.device("cpu")), T * TOP, each.in_features, p) for each in (inner, outer)}
    assert all(0.6 < (mask > 0).double().mean() < 0.8 for mask in masks.values())
    agree(got, truth(layer, masks=masks), **CLOSE)
    assert not torch.equal(layer(X.double(), INDEX, WEIGHTS.double()), got["y"]), "another seed"
    agree(results(layer.eval(), X.double(), weights=WEIGHTS.double()), truth(layer), **CLOSE)


def test_dropout_of_one_stack_and_in_a_mean():
    layer = adapted(dtype=torch.float64)
    layer.base_layer.lora_dropout = 0.4
    wanted = copy.deepcopy(layer).eval().base_layer
    x, weights = X.double(), WEIGHTS.double()
    layer = layer.base_layer  # the gate aside, the first stack's answer is linear in the mask: take its mean
    with torch.no_grad():
        layer.experts._apply_gate = lambda h: h[..., :I]
        wanted.experts._apply_gate = layer.experts._apply_gate
        draws = torch.stack([layer(x, INDEX, weights) for _ in range(400)])
    error = (draws.mean(0) - wanted(x, INDEX, weights)).abs() / (draws.std(0) / 20)
    assert draws.std(0).min() > 0 and error.mean() < 1.2 and error.max() < 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_with_dropout(reentrant):
    """The recomputation draws the same seeds."""
    layer = adapted(dtype=torch.float64, lora_dropout=0.2)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *args):
            return checkpoint(self.layer, *args, use_reentrant=reentrant)

    found = []
    for module in (layer, Checkpointed()):
        torch.manual_seed(9)
        found.append({name.replace("layer.", "", name.startswith("d layer")): t.clone() for name, t in
                      results(module, X.double(), weights=WEIGHTS.double()).items()})  # fmt: skip
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, **CLOSE)


def test_several_adapters_that_drop_are_refused():
    layer = adapted()
    one = layer.factors()._replace(p=0.1)
    assert one.training and one.drops
    with pytest.raises(UnsupportedError, match="adapters: wanted one for a stack with dropout, .* got several"):
        mixture.forward(layer.experts, X, INDEX, WEIGHTS, {"down_proj": [one, layer.factors()]})
    quiet = [one._replace(training=False), layer.factors()]
    mixture.forward(layer.experts, X, INDEX, WEIGHTS, {"down_proj": quiet})
    assert Factors(one.A, one.B, 1.0).p == 0 and not Factors(one.A, one.B, 1.0).drops


def test_enabled():
    """One stack is the base alone; with none left the experts' own forward answers, bit for bit."""
    layer = adapted(dtype=torch.float64)
    x, weights = X.double(), WEIGHTS.double()
    for each in layer.chain():
        each.enabled = False
        other = copy.deepcopy(layer)
        nn.init.zeros_(next(o for o in other.chain() if o.parameter_name == each.parameter_name).lora_B)
        for o in other.chain():
            o.enabled = True
        torch.testing.assert_close(layer(x, INDEX, weights), other(x, INDEX, weights), **CLOSE)
        assert "enabled=False" in repr(each)
        each.enabled = True
    for each in layer.chain():
        each.enabled = False
    assert torch.equal(layer(x, INDEX, weights), layer.experts(x, INDEX, weights))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged(kind, dtype):
    """W[e] + scaling B[e] A[e], rounded once; and the base again, bit for bit."""
    layer = adapted(kind, dtype, adapter_dtype=None if dtype == torch.float64 else torch.float32).eval()
    x, weights = X.to(dtype), WEIGHTS.to(dtype)
    base, apart = {name: p.clone() for name, p in layer.experts.named_parameters()}, layer(x, INDEX, weights)
    for each in layer.chain():
        each.merge()
        assert each.merged and "merged=True" in repr(each)
        stored = base[each.parameter_name].double()
        for e in range(E):
            W = stored[e].T if layer.experts.is_transposed else stored[e]
            A, B = each.lora_A.double()[e * each.r : (e + 1) * each.r], each.lora_B.double()[:, e::E]
            exact = W + each.scaling * B @ A
            error = (each.weight[e].double() - exact).abs()
            assert (error <= exact.abs() * torch.finfo(dtype).eps + 1e-7 * (dtype != torch.float64) + 1e-14).all()
    assert torch.equal(layer(x, INDEX, weights), layer.experts(x, INDEX, weights)), "the experts' own forward"
    close = CLOSE if dtype == torch.float64 else dict(rtol=0.1, atol=0.15)
    torch.testing.assert_close(layer(x, INDEX, weights), apart, **close)
    with pytest.raises(RuntimeError, match="merge: wanted an unmerged layer, got a merged one"):
        layer.merge()
    with pytest.raises(RuntimeError, match="reset_adapter: wanted an unmerged layer"):
        layer.reset_adapter()
    layer.enabled = False
    with pytest.raises(RuntimeError, match="enabled: wanted True for a merged stack, .* got False for down_proj"):
        layer(x, INDEX, weights)
    for each in layer.chain():
        each.unmerge()
    assert all(torch.equal(p, base[name]) for name, p in layer.experts.named_parameters())
    with pytest.raises(RuntimeError, match="unmerge: wanted a merged layer"):
        layer.unmerge()


def test_one_merged_beside_one_that_is_not():
    layer = adapted(dtype=torch.float64)
    x, weights = X.double(), WEIGHTS.double()
    wanted = layer(x, INDEX, weights)
    for each in layer.chain():
        each.merge("device")
        torch.testing.assert_close(layer(x, INDEX, weights), wanted, **CLOSE)
        each.unmerge()


@pytest.mark.parametrize("expert", [0, 3])
def test_what_is_not_finite_leaves_the_stack(expert):
    layer = adapted(lambda: Experts(True, True))
    with torch.no_grad():
        layer.lora_A[expert * 3, 0] = float("nan")
    before = layer.stack.clone()
    with pytest.raises(ValueError, match="merge: wanted a finite merged weight"):
        layer.merge()
    assert torch.equal(layer.stack, before) and not layer.merged
    with pytest.raises(ValueError, match="keep: wanted one of cpu, device, got 'disk'"):
        layer.merge("disk")


def test_a_sharded_stack_is_not_merged():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layer = fully_shard(adapted(), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedError, match="merge: wanted a stack that is whole on this rank, got shards of down_proj"):
        layer.merge()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [Experts, lambda: Experts(True, True)], ids=["[E, N, K]", "[E, K, N]"])
def test_checkpoints_hold_the_base(kind):
    layer = adapted(kind)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    assert {"lora_A", "base_layer.lora_A", "base_layer.base_layer.gate_up_proj"} <= before.keys()
    outer = nn.ModuleDict({"m": layer})
    for each in layer.chain():
        each.merge()
    merged = outer.state_dict()
    assert {f"m.{name}" for name in before} == merged.keys()
    assert all(torch.equal(merged[f"m.{name}"], t) for name, t in before.items())
    stack = layer.experts.down_proj.clone()
    with pytest.raises(RuntimeError, match="m: wanted an unmerged layer to load into, got a merged one"):
        outer.load_state_dict(merged)
    assert torch.equal(layer.experts.down_proj, stack)
    other = adapted(kind)
    nn.init.zeros_(other.lora_B)
    other.load_state_dict({name[2:]: t for name, t in merged.items()})
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_copied_pickled_compiled():
    layer = adapted(dtype=torch.float64)
    x, weights = X.double(), WEIGHTS.double()
    wanted = layer(x, INDEX, weights)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, INDEX, weights), wanted) and other.lora_A is not layer.lora_A
        other.merge()
        other.state_dict()
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x, INDEX, weights), wanted, **CLOSE)
    torch.testing.assert_close(layer(hidden_states=x, top_k_index=INDEX, top_k_weights=weights), wanted, **CLOSE)


def test_no_copy_of_a_stack():
    """For backward x once, and small things; nothing of a stack's size but the stacks."""
    layer = adapted()
    own, kept = {p.untyped_storage().data_ptr() for p in layer.parameters()}, []

    def note(t):
        kept.extend([t.numel()] if t.untyped_storage().data_ptr() not in own else [])
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(X[:4], INDEX[:4], WEIGHTS[:4])
    assert kept and max(kept) < E * K * I


def changed(change):
    experts = Experts()
    change(experts)
    return experts


REFUSED = {
    "no module": (lambda: 3, {}, TypeError, "base_layer: wanted an nn.Module, got int"),
    "a linear layer": (lambda: nn.Linear(3, 3), {}, UnsupportedError, "its base layer is a Linear, without num_experts of transformers'"),
    "another parameter": (Experts, {"parameter_name": "router"}, UnsupportedError, "router is not one of gate_up_proj, down_proj"),
    "a bias": (lambda: Experts(True, True), {"parameter_name": "down_proj_bias"}, UnsupportedError, "down_proj_bias is not one of"),
    "eight bits": (
        lambda: changed(lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.to(torch.float8_e4m3fn), False))),
        {}, UnsupportedError, "down_proj of its Experts is torch.float8_e4m3fn",
    ),
    "two dimensions": (
        lambda: changed(lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj[0].detach()))),
        {}, UnsupportedError, r"down_proj of its Experts has shape \[24, 16\], not a part for each of 5 experts",
    ),
    "fewer than it says": (lambda: changed(lambda m: setattr(m, "num_experts", 6)), {}, UnsupportedError, "each of 6 experts"),
    "hooks": (lambda: changed(lambda m: m.register_forward_hook(lambda *args: None)), {}, UnsupportedError, "its Experts has hooks"),
    "parametrized": (
        lambda: changed(lambda m: nn.utils.parametrize.register_parametrization(m, "down_proj", nn.Identity())),
        {}, UnsupportedError, "has parametrizations",
    ),
    "twice": (lambda: LoRAExperts(Experts(), "gate_up_proj"), {}, ValueError, "wanted a stack without an adapter, got gate_up_proj, which"),
    "another order": (lambda: LoRAExperts(Experts(), "down_proj"), {}, ValueError, "got gate_up_proj around down_proj"),
    "rank 0": (Experts, {"r": 0}, UnsupportedError, "r: wanted a rank from 1 to 512, got 0"),
    "rank 513": (Experts, {"r": 513}, UnsupportedError, "r: wanted a rank from 1 to 512, got 513"),
    "dropout": (Experts, {"lora_dropout": 1.0}, ValueError, r"lora_dropout: wanted a probability in \[0, 1\), got 1.0"),
    "dtype": (Experts, {"adapter_dtype": torch.float16}, TypeError, "adapter_dtype: wanted the stack's dtype torch.float32 or float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    make, options, error, words = REFUSED[what]
    base = make()
    flags = [p.requires_grad for p in base.parameters()] if isinstance(base, nn.Module) else []
    with pytest.raises(error, match=words):
        LoRAExperts(base, **{"parameter_name": "gate_up_proj", **options})
    assert not flags or [p.requires_grad for p in base.parameters()] == flags, "nothing is frozen"


def test_calls_refused():
    layer = adapted()
    for args, words in (
        ((X[None], INDEX, WEIGHTS), r"hidden_states: wanted \[T, K\], got shape \[1, 13, 24\]"),
        ((X, INDEX, WEIGHTS[:, :1]), r"top_k_index, top_k_weights: wanted \[13, k\] each, got \[13, 2\] and \[13, 1\]"),
        ((X[:5], INDEX, WEIGHTS), r"wanted \[5, k\] each, got \[13, 2\]"),
        ((X[:, :5], INDEX, WEIGHTS), "x: wanted shape"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(*args)
    for within in (layer.base_layer, layer.experts):
        handle = within.register_forward_hook(lambda *args: None)
        with pytest.raises(UnsupportedError, match=f"wanted modules without hooks, .* got a {type(within).__name__} with"):
            layer(X, INDEX, WEIGHTS)
        handle.remove()
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(1))
    layer(X, INDEX, WEIGHTS)
    assert seen == [1]


@pytest.mark.interpreted
def test_the_kernels_serve_it(monkeypatch, launched):
    """The same layer by the kernels: y and every gradient."""
    layer = adapted(lambda: Experts(True, True), lora_dropout=0.2)
    got: dict = {}
    torch.manual_seed(4)
    wanted = results(layer)
    monkeypatch.setattr(dispatch, "unmeasured", lambda *args: ("triton", "for this test"))
    dispatch.forget()
    torch.manual_seed(4)
    try:
        kernels = launched(lambda: got.update(results(layer)))
    finally:
        dispatch.forget()
    assert kernels.count("experts") == 4, "two stacks, both passes"
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4)

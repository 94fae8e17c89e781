"""Adapters named by sequence for every call of a model: `use_adapters`, and what keeps two users of one model apart."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    MultiLoRALinear,
    MultiLoRAOver,
    PackedLoRALinear,
    Segments,
    UnsupportedError,
    apply_lora,
    save_adapter,
    use_adapters,
    use_segments,
)

K, E, R = 24, 5, 3
WHO = [2, -1, 0, 2]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, 40), nn.Linear(40, K)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def net(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(dtype)
    apply_lora(model, LoRAConfig(target_modules=["up", "down"], r=R, init_lora_weights=False), num_adapters=E)
    return model.eval()


def drawn(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_token(tokens: int, who=WHO) -> Segments:
    return Segments.from_ids(torch.tensor(who, dtype=torch.int32).repeat_interleave(tokens), E)


@pytest.fixture
def plans(monkeypatch):
    """The numbers of tokens of the plans that were made."""
    made, own = [], Segments.from_ids.__func__

    def counted(cls, ids, *args, **kwargs):
        made.append(ids.numel())
        return own(cls, ids, *args, **kwargs)

    monkeypatch.setattr(Segments, "from_ids", classmethod(counted))
    return made


@pytest.mark.parametrize("shape", [(4, K), (4, 1, K), (4, 7, K), (4, 2, 3, K), (4, 0, K)])
@pytest.mark.parametrize(
    "who", [WHO, torch.tensor(WHO), torch.tensor(WHO, dtype=torch.int32), tuple(WHO)], ids=["list", "long", "int", "tuple"]
)
def test_each_sequence_takes_its_adapter_in_all_its_tokens(shape, who):
    model, x = net(), drawn(*shape)
    with use_segments(model, by_token(x[0].numel() // K)):
        wanted = model(x)
    with use_adapters(model, who):
        assert torch.equal(model(x), wanted)


def test_calls_of_any_length_share_the_plans_of_their_length(plans):
    """A prompt of seven tokens and three steps, twice: each length's plan is made once for four layers and all calls."""
    model = net()
    with use_adapters(model, WHO):
        for length in (7, 1, 1, 1, 7, 1):
            model(drawn(4, length, K))
    assert sorted(plans) == [4, 4, 28]


def test_a_changed_list_does_not_change_the_batch():
    model, x, who, ids = net(), drawn(4, 2, K), list(WHO), torch.tensor(WHO, dtype=torch.int32)
    with use_segments(model, by_token(2)):
        wanted = model(x)
    for given in (who, ids):
        with use_adapters(model, given):
            given[0] = 4
            assert torch.equal(model(x), wanted)


def test_no_sequences():
    model = net()
    with use_adapters(model, []):
        assert model(drawn(0, 3, K)).shape == (0, 3, K)


def test_training_and_inference_in_one_use():
    """A plan that inference mode made cannot be saved for backward."""
    model, x = net(), drawn(4, 3, K)
    with use_segments(model, by_token(3)):
        model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with use_adapters(model, WHO):
        with torch.inference_mode():
            model(x)
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip((p for p in model.parameters() if p.grad is not None), wanted, strict=True))
    assert len(wanted) == 8 and all(grad[2].any() and not grad[1].any() for grad in wanted)


def test_torchs_default_dtype_is_not_the_scalings():
    """As engines set it while they build a model in bfloat16, which holds no 16 / 3."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MultiLoRALinear(K, 8, num_adapters=2, r=3, lora_alpha=16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.lora_A.dtype == torch.bfloat16 and torch.equal(layer.scaling, torch.full((2,), 16 / 3))


def test_torchs_default_device_is_not_the_hosts(tmp_path):
    """As scripts for a GPU set it: slots, names' among them, lengths and ranks are host values all the same."""
    model, x, linear = net(), drawn(4, 2, K), nn.Linear(K, 8)
    with use_segments(model, by_token(2)):
        wanted = model(x)
    with torch.device("meta"):
        with use_adapters(model, WHO):
            assert torch.equal(model(x), wanted)
        save_adapter(model, tmp_path, slot=1)
        assert Segments.from_lengths([1, 2]).ids.tolist() == [0, 1, 1]
        assert MultiLoRALinear.from_linear(linear, num_adapters=2, r=4).ranks.tolist() == [4, 4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(reentrant):
    model, x = net(), drawn(4, 3, K).requires_grad_()
    with use_adapters(model, WHO):
        (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
    assert torch.equal(x.grad, wanted)


def test_checkpointing_outside_is_an_error():
    model, x = net(), drawn(4, 3, K).requires_grad_()
    with use_adapters(model, WHO):
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
    with pytest.raises(TypeError, match="segments: wanted a lora_kernels.Segments"):
        loss.backward()


def test_every_kind_of_layer_with_slots():
    """Stacks over a weight, over another module, over packed layers; layers of one adapter go on beside them."""
    torch.manual_seed(0)
    how = dict(num_adapters=E, r=R, init_lora_weights=False)
    layers = nn.ModuleList(
        [
            MultiLoRALinear(K, 8, **how),
            MultiLoRAOver(nn.Linear(K, 8), **how),
            PackedLoRALinear(K, (8, 4), **how),
            FusedLoRALinear(K, 8, r=R, init_lora_weights=False),
        ]
    ).eval()
    x = drawn(4, 3, K).float()
    segments = by_token(3)
    wanted = [layer(x, segments) for layer in layers[:3]] + [layers[3](x)]
    with use_adapters(layers, WHO):
        for layer, y in zip(layers, wanted, strict=True):
            assert torch.equal(layer(x), y)
    with use_adapters(layers[0], WHO):
        assert torch.equal(layers[0](x), wanted[0]), "a layer is a model, too"


def test_a_plan_of_ones_own_is_not_replaced():
    layer = MultiLoRALinear(K, 8, num_adapters=E, r=R, init_lora_weights=False)
    x = drawn(4, 3, K).float()
    with use_adapters(layer, WHO):
        mine = layer(x, by_token(3, [1, 1, -1, 4]))
    assert torch.equal(mine, layer(x, by_token(3, [1, 1, -1, 4])))


@pytest.mark.parametrize(
    "who, error, words",
    [
        ([0, E], ValueError, rf"adapters: wanted numbers from -1 to {E - 1} for 0.up, got {E}"),
        ([0, -2], ValueError, rf"adapters: wanted numbers from -1 to {E - 1} for 0.up, got -2"),
        ([0, True], TypeError, "adapters: wanted ints, got True"),
        ([0, None], TypeError, "adapters: wanted ints, got None"),
        ("01", TypeError, "adapters: wanted ints, got '0'"),
        (torch.tensor([0.0]), TypeError, "adapters: wanted int32 or int64, got torch.float32"),
        (torch.tensor([[0]]), ValueError, r"adapters: wanted one dimension, got shape \[1, 1\]"),
        (torch.tensor([2**32]), ValueError, "wanted numbers from -1 to"),  # not wrapped to 0
        (torch.tensor([0], device="meta"), ValueError, "adapters: wanted them on the CPU, where they can be checked, got meta"),
    ],
)
def test_refusals(who, error, words):
    model = net()
    with pytest.raises(error, match=words), use_adapters(model, who):
        raise AssertionError("inside")
    with use_adapters(model, WHO):  # what was refused leaves the model free
        model(drawn(4, K))


def test_a_slot_that_one_layer_lacks():
    torch.manual_seed(0)
    layers = nn.ModuleList([MultiLoRALinear(K, 8, num_adapters=n, r=R) for n in (3, 2)])
    with pytest.raises(ValueError, match="adapters: wanted numbers from -1 to 1 for 1, got 2"), use_adapters(layers, [2]):
        pass
    x = drawn(2, 1, K).float()
    with use_adapters(layers, [1, 0]):  # a plan for each number of slots
        for layer in layers:
            assert torch.equal(layer(x), layer(x, Segments.from_ids(torch.tensor([1, 0]), layer.num_adapters)))


@pytest.mark.parametrize("shape", [(3, 2, K), (8, K), (5, K), (K,)])
def test_other_sequences_than_named(shape):
    model = net()
    with use_adapters(model, WHO), pytest.raises(ValueError, match=rf"adapters: wanted x \[4, ..., {K}\].*use_segments"):
        model(drawn(*shape))


def test_a_model_without_slots():
    for given in (nn.Linear(3, 3), FusedLoRALinear(3, 3, r=1)):
        with pytest.raises(ValueError, match="model: wanted one with MultiLoRALinear layers"), use_adapters(given, [0]):
            pass
    with pytest.raises(TypeError, match="segments: wanted a lora_kernels.Segments, got list"), use_segments(net(), [0]):
        pass


@pytest.mark.parametrize("outer", [lambda model: use_adapters(model, WHO), lambda model: use_segments(model, by_token(2))])
@pytest.mark.parametrize("inner", [lambda model: use_adapters(model, [1] * 4), lambda model: use_segments(model, by_token(2, [1] * 4))])
def test_two_users_at_once(outer, inner):
    """Of two threads, or two tasks of one, the second would have the first's adapters changed under it: it is refused."""
    model, x, caught = net(), drawn(4, 2, K), []

    def second(of=model):
        try:
            with inner(of):
                raise AssertionError("inside")
        except RuntimeError as error:
            caught.append(str(error))

    with outer(model):
        before = model(x)
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        second(model[1])
        assert torch.equal(model(x), before)
    assert len(caught) == 3 and all("model: wanted one that is in no use_segments" in text for text in caught)
    with inner(model):
        assert not torch.equal(model(x), before)


def test_the_model_is_free_after_an_error():
    model = net()
    with pytest.raises(ZeroDivisionError), use_adapters(model, WHO):
        raise ZeroDivisionError
    with pytest.raises(TypeError, match="segments: wanted"):
        model(drawn(4, 2, K))
    with use_adapters(model, WHO):
        model(drawn(4, 2, K))


def test_parts_of_a_model_have_their_own_users():
    model, x = net(), drawn(4, 2, K)
    with use_adapters(model[0], WHO), use_adapters(model[1], [1] * 4):
        y = model(x)
    with use_adapters(model, WHO):
        wanted = model[0](x)
    with use_adapters(model, [1] * 4):
        assert torch.equal(y, model[1](wanted))


def test_a_merged_layer_is_refused_inside():
    layer = MultiLoRALinear(K, 8, num_adapters=E, r=R, init_lora_weights=False)
    layer.merge(1)
    with use_adapters(layer, WHO), pytest.raises(ValueError, match="segments: wanted None, for an adapter is merged"):
        layer(drawn(4, 2, K).float())


def test_not_within_a_capture(monkeypatch):
    """A captured graph would keep the ids of this batch."""
    model = net()
    x = drawn(4, 2, K)
    with use_adapters(model, WHO):
        plans = model[0].up.plans

        class OnGpu:
            shape, device, is_cuda = x.shape, torch.device("cuda", 0), True
            dim = x.dim

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(UnsupportedError, match="use_adapters: wanted no capture of a CUDA graph"):
            plans.of(OnGpu, E)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self, as_on_a_users_cpu):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def graphs(self, model):
        """The compiled model, and what lora_kernels' operators each graph has, by name."""
        found = []

        def backend(gm, inputs):
            names = [str(node.target) for node in gm.graph.nodes]
            found.append({what: sum(f"lora_kernels.{what}" in name for name in names) for what in ("forward", "plan")})
            return gm.forward

        return torch.compile(model, backend=backend, fullgraph=True), found

    def test_another_batch_is_not_another_graph(self):
        model = net()
        (compiled, found), first = self.graphs(model), 0
        for who in (WHO, [0, 1, 2, 3], [-1] * 4, WHO):
            with torch.no_grad(), use_adapters(model, who):
                for length in (1, 5, 6, 1, 9):
                    x = drawn(4, length, K)
                    assert torch.equal(compiled(x), model(x))
            first = first or len(found)
        assert len(found) == first <= 4, found  # one token, and some lengths, which the plan's blocks part
        assert found[0] == {"forward": 4, "plan": 0}, "a step of generate finds its plan made"

    def test_outside_it_is_an_error(self):
        model = net()
        compiled, _ = self.graphs(model)
        with torch.no_grad(), use_adapters(model, WHO):
            compiled(drawn(4, 1, K))
        # torch 2.8 says of an error that it traced no more than its type
        with pytest.raises(Exception, match="segments: wanted a lora_kernels.Segments|raised exception .*TypeError"):
            compiled(drawn(4, 1, K))


def test_a_copy_made_inside_is_free():
    layer, x = MultiLoRALinear(K, 8, num_adapters=E, r=R, init_lora_weights=False), drawn(4, 1, K).float()
    with use_adapters(layer, WHO):
        other = copy.deepcopy(layer)
        with pytest.raises(TypeError, match="segments: wanted"):
            other(x)
    with use_adapters(other, [1] * 4):
        assert torch.equal(other(x), layer(x, by_token(1, [1] * 4)))

"""PEFT's adapter_names on the segments: each sample through the adapter it names, in inference and in training."""

import contextlib
import copy

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft_models import Masked, Net, X, adapters_to, agree, both, checkpoint_first, config, counted, layers, pair, results, train_all
from torch import nn

from lora_kernels import philox
from lora_kernels.integrations import peft_mixed
from lora_kernels.integrations.peft import fuse, mixed_adapters

calls = counted  # the fixture
NAMES = ["b", "__base__", "default"]


def three(dtype=torch.float32, upcast=True, **b):
    """default of rank 4, b, and c on the first layer only, all trained."""
    torch.manual_seed(0)
    stock = get_peft_model(Net(dtype), config())
    stock.add_adapter("b", config(**{"r": 7, "lora_alpha": 5, **b}))
    stock.add_adapter("c", config(target_modules=["first"], r=2, use_rslora=True))
    adapters_to(stock, torch.float32 if upcast else dtype)
    train_all(stock)
    fused = copy.deepcopy(stock)
    assert len(fuse(fused).fused) == 2
    return stock, fused


@contextlib.contextmanager
def named(model, names):
    """PEFT's own loop over adapters, which its layers have in training too; it is its model that raises."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    handles = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "adapter_names": names}), with_kwargs=True)
        for layer in layers
    ]
    yield
    for handle in handles:
        handle.remove()


class Named(nn.Module):
    """A model whose batches always name these adapters."""

    def __init__(self, model, names, by):
        super().__init__()
        self.model, self.names, self.by = model, names, by

    def forward(self, x):
        with self.by(self.model, self.names):
            return self.model(x)


@pytest.mark.parametrize("names", [NAMES, ["c", "default", "b"], ["b"] * 3, ["c", "c", "__base__"]], ids="-".join)
@pytest.mark.parametrize("dtype, upcast", [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)], ids=str)
def test_training(names, dtype, upcast, calls):
    """Ranks, scales, adapters that a layer lacks, and the base alone, against PEFT's loop over adapters."""
    stock, fused = three(dtype, upcast)
    wanted = len([1 for layer in layers(fused) if set(names) & set(layer.lora_A)])
    agree(Named(stock, names, named), Named(fused, names, mixed_adapters), X.to(dtype))
    assert len(calls) == wanted and all((call.get("segments") is None) == (len(set(names)) == 1) for call in calls)


@pytest.mark.parametrize("shape", [(3, 24), (3, 2, 5, 24), (6, 1, 24)], ids=str)
def test_shapes(shape, calls):
    stock, fused = three()
    names = (NAMES * 2)[: shape[0]]
    agree(Named(stock, names, named), Named(fused, names, mixed_adapters), torch.randn(shape))
    assert len(calls) == 2


def test_inference_by_peft_s_own_argument(calls):
    """With beams, too: PEFT repeats the names, once for each."""
    stock, fused = three()
    for model in (stock, fused):
        model.eval()
    peft_mixed._kept.cache_clear()
    with torch.inference_mode():
        y = fused(X, adapter_names=NAMES)
        torch.testing.assert_close(y, stock(X, adapter_names=NAMES), rtol=1e-5, atol=1e-5)
        for sample, name in enumerate(NAMES):
            with fused.disable_adapter() if name == "__base__" else contextlib.nullcontext(fused.set_adapter(name)):
                torch.testing.assert_close(fused(X[sample]), y[sample], rtol=1e-5, atol=1e-5)
        beams = X.repeat_interleave(2, dim=0)
        with fused.base_model._enable_peft_forward_hooks(adapter_names=NAMES, num_beams=2):
            torch.testing.assert_close(fused.base_model.model(beams)[::2], y, rtol=1e-5, atol=1e-5)
    assert len([call for call in calls if "segments" in call]) == 4
    both(stock, fused, train_all)
    agree(Named(stock, NAMES, named), Named(fused, NAMES, mixed_adapters))  # a plan of inference mode may not be saved for backward


def test_a_batch_of_one_adapter_is_no_mixture(calls):
    """No stack and no plan where a layer has one adapter for all samples; in a layer that lacks the others it may be."""
    stock, fused = three()
    for names in (["b"] * 3, ["default"] * 3):
        calls.clear()
        agree(Named(stock, names, named), Named(fused, names, mixed_adapters))
        assert calls and all(call.get("segments") is None for call in calls)
    calls.clear()
    agree(Named(stock, ["b", "__base__", "b"], named), Named(fused, ["b", "__base__", "b"], mixed_adapters))
    assert calls and all(call.get("segments") is not None for call in calls)


def test_scales_are_read_at_each_call(calls):
    stock, fused = three()
    mixed = Named(stock, NAMES, named), Named(fused, NAMES, mixed_adapters)
    both(stock, fused, lambda model: [layer.set_scale("b", 3) for layer in layers(model)])
    agree(*mixed)
    both(stock, fused, lambda model: [layer.scaling.update(b=torch.tensor(0.5)) for layer in layers(model)])
    agree(*mixed)
    both(stock, fused, lambda model: [nn.init.normal_(layer.lora_A["b"].weight.data) for layer in layers(model)])
    agree(*mixed)
    assert len(calls) == 6


def test_adapters_of_several_dtypes(calls):
    stock, fused = three(torch.float16)
    both(stock, fused, lambda model: [(layer.lora_A["b"].half(), layer.lora_B["b"].half()) for layer in layers(model)])
    agree(Named(stock, NAMES, named), Named(fused, NAMES, mixed_adapters), X.half())
    assert len(calls) == 2


def test_dropout(calls):
    """One mask for the whole batch where the adapters drop alike; PEFT's loop with the same mask has the same y and gradients."""
    stock = get_peft_model(nn.Sequential(nn.Linear(24, 32)), config(target_modules=["0"], lora_dropout=0.5))
    stock.add_adapter("b", config(target_modules=["0"], lora_dropout=0.5, r=7))
    fused = copy.deepcopy(stock)
    fuse(fused)
    torch.manual_seed(5)
    seed = philox.draw_seed(X.device)
    for sample, name in ((0, "b"), (2, "default")):
        layers(stock)[0].lora_dropout[name] = Masked(0.5, seed, X.shape, [sample])

    @contextlib.contextmanager
    def seeded(model, names):
        torch.manual_seed(5)
        with mixed_adapters(model, names):
            yield

    agree(Named(stock, NAMES, named), Named(fused, NAMES, seeded))
    assert len(calls) == 1 and calls[0]["dropout_p"] == 0.5


def test_dropout_that_differs_is_left_to_peft(calls):
    _, fused, _ = pair(lora_dropout=0.5)
    fused.add_adapter("b", config(lora_dropout=0.25))
    model = Named(fused, NAMES, mixed_adapters)
    assert not torch.equal(model(X), model(X)) and not calls
    fused.eval()
    assert torch.equal(model(X), model(X)) and len(calls) == 4, "without dropout their probabilities do not matter"


def test_left_to_peft(calls):
    """A hook or a bias of one adapter that the batch names; of one that it does not name it does not matter."""
    stock, fused = three(lora_bias=True)
    both(stock, fused, lambda model: layers(model)[1].lora_A["default"].register_forward_hook(lambda *args: None))
    for names, fused_calls in ((["b", "default", "c"], 0), (["default", "__base__", "c"], 1), (["c", "c", "c"], 1)):
        agree(Named(stock, names, named), Named(fused, names, mixed_adapters))
        assert len(calls) == fused_calls
        calls.clear()


class Embedded(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed, self.first, self.head = nn.Embedding(11, 24), nn.Linear(24, 32), nn.Linear(32, 7)

    def forward(self, ids):
        return self.head(self.first(self.embed(ids)))


def test_other_layers_take_peft_s_loop(calls):
    """Embeddings and modules_to_save beside fused layers: each sample its own there, too."""
    torch.manual_seed(0)
    changed = config(target_modules=["embed", "first"], modules_to_save=["head"])
    stock = get_peft_model(Embedded(), changed)
    stock.add_adapter("b", changed)
    nn.init.normal_(stock.base_model.model.head.modules_to_save["b"].weight)
    fused = copy.deepcopy(stock)
    assert list(fuse(fused).left) == ["base_model.model.embed"]
    ids = torch.arange(9).reshape(3, 3)
    stock.eval()
    with mixed_adapters(fused, NAMES):
        y = fused(ids)
    torch.testing.assert_close(y, stock(ids, adapter_names=NAMES), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    """Backward computes the forward pass again, and so belongs inside; outside, the plain kind of checkpoint notices."""
    stock, fused = three()
    wanted = results(Named(stock, NAMES, named), X)
    checkpoint_first(fused, reentrant)
    with mixed_adapters(fused, NAMES):
        got = results(fused, X)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name.replace("d model.", "d ")], value, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3
    if not reentrant:
        with mixed_adapters(fused, NAMES):
            y = fused(X)
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            y.sum().backward()


def test_refused():
    """PEFT's errors in PEFT's cases, and ours before anything is changed."""
    stock, fused = three()
    with pytest.raises(ValueError, match=r"model: wanted fused LoRA layers \(fuse\(model\)\), got 2"), mixed_adapters(stock, NAMES):
        pass
    with (
        pytest.raises(ValueError, match="adapter_names: wanted names among __base__, b, c, default, got no, one"),
        mixed_adapters(fused, ["one", "no", "b"]),
    ):
        pass
    with pytest.raises(ValueError, match="Length of `adapter_names`"), mixed_adapters(fused, ["b", "b"]):
        fused(X)
    assert not any(m._forward_pre_hooks for m in fused.modules())
    with pytest.raises(ValueError, match="in training mode"):
        fused(X, adapter_names=NAMES)
    for model in (stock, fused):
        model.eval()
        with pytest.raises(ValueError, match="Trying to infer with non-existing adapter"):
            model(X, adapter_names=["nobody"] * 3)
        model.merge_adapter()
        with pytest.raises(ValueError, match="when there are merged adapters"):
            model(X, adapter_names=NAMES)
    with pytest.raises(ValueError, match="when there are merged adapters"), mixed_adapters(fused, NAMES):
        fused(X)
    _, dora, _ = pair(use_dora=True)
    with pytest.raises(ValueError, match="when DoRA is enabled"), mixed_adapters(dora, ["default"] * 3):
        dora(X)


def test_one_plan_for_all_layers(monkeypatch):
    """Plans and tables depend on names and sizes alone, so layers share them; and adapters that are not named are not stacked."""
    _, fused = three()
    fused.add_adapter("idle", config(r=300))
    made, stacks, real = [], [], peft_mixed.Segments.from_ids
    monkeypatch.setattr(peft_mixed.Segments, "from_ids", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    run = peft_mixed.lora_linear
    monkeypatch.setattr(peft_mixed, "lora_linear", lambda x, w, A, B, b, **kwargs: stacks.append(A.shape) or run(x, w, A, B, b, **kwargs))
    peft_mixed._kept.cache_clear()
    for _ in range(3):
        with mixed_adapters(fused, NAMES):
            fused(X)
    assert len(made) == 1 and stacks == [(2, 7, 24), (2, 7, 32)] * 3
    with mixed_adapters(fused, NAMES):
        fused(X[:, :2])
    assert len(made) == 2


def test_no_graph_break(calls):
    stock, fused = three()
    stock.eval(), fused.eval()
    explained = torch._dynamo.explain(lambda x: layers(fused)[0](x, adapter_names=NAMES))(X)
    assert explained.graph_break_count == 0

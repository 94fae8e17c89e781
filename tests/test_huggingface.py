"""A whole Hugging Face model with fused layers, compiled and exported; and what PEFT's layer keeps for backward beside ours."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from test_memory import mask_bytes
from torch import nn

from bench.llama import blocks, fused, llama, stock
from bench.memory import saved_by
from bench.modules import peft_and_fused
from lora_kernels import AdapterPool, FusedLoRALinear, LoRAConfig, apply_lora, dispatch, parity

LINEARS = 7
SIZES = ((2, 24), (2, 25), (3, 7), (4, 40), (2, 64), (5, 33))  # batch and length; sizes 0 and 1 are constants to torch.compile
TEXT = torch.cat([block["input_ids"] for block in blocks(64)])


@pytest.fixture(autouse=True)
def as_on_a_users_cpu(monkeypatch):
    """Without Triton's interpreter, which the other tests ask for; one thread, for the tensors are small."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    torch._dynamo.reset()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_hand(peft_model: nn.Module) -> nn.Module:
    """The model that PEFT wrapped, with a FusedLoRALinear of the same weights in the place of each LoRA layer."""
    peft_model = copy.deepcopy(peft_model)
    model = peft_model.base_model.model
    for name, layer in list(model.named_modules()):
        if isinstance(layer, lora.Linear):
            p = layer.lora_dropout["default"].p if isinstance(layer.lora_dropout["default"], nn.Dropout) else 0.0
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            ours = FusedLoRALinear.from_linear(layer.base_layer, r=4, lora_alpha=8, lora_dropout=p)
            ours.lora_A, ours.lora_B = nn.Parameter(A.detach()), nn.Parameter(B.detach())
            model.set_submodule(name, ours)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return TEXT[: batch * length].view(batch, length)


def step(call, model: nn.Module, ids: torch.Tensor, seed: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of predicting a token by itself, and the adapters' gradients by layer; backward draws from another seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = F.cross_entropy(call(input_ids=ids).logits.flatten(0, 1), ids.flatten())
    torch.manual_seed(99)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {re.sub(r"^base_model\.model\.|\.default\.weight$", "", name): grad for name, grad in grads.items()}


class Logits(nn.Module):
    """What export is to see of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


class Recorded:
    """A torch.compile backend that keeps each graph it is given: one for each compilation, or two where torch begins it again."""

    def __init__(self, backend: str):
        self.graphs: list[torch.fx.GraphModule] = []
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self._compile(graph, inputs)


def operators(graph: torch.fx.GraphModule, name: str = "lora_kernels.forward") -> int:
    """Calls of our operator in a graph and the graphs within it."""
    graphs = [g for g in graph.modules() if isinstance(g, torch.fx.GraphModule)]
    return sum(name in str(node.target) for g in graphs for node in g.graph.nodes)


@pytest.mark.parametrize("put", [by_hand, fused])
def test_one_compilation_serves_every_length(put):
    """No graph break, no recompilation, and PEFT's loss and gradients within twice its own error against float64."""
    theirs = stock(llama(), init_lora_weights=False)
    exact, ours = copy.deepcopy(theirs).double(), put(theirs)
    recorded = Recorded("aot_eager")
    compiled = torch.compile(ours, backend=recorded, fullgraph=True, dynamic=True)
    for size in SIZES:
        found = step(compiled, ours, tokens(*size))
        if size == SIZES[0]:
            first = len(recorded.graphs)
        if size not in (SIZES[0], SIZES[-1]):
            continue
        (loss, grads), (stock_loss, stock_grads), (true_loss, true_grads) = found, *(step(m, m, tokens(*size)) for m in (theirs, exact))
        assert parity.budget_used(loss, stock_loss, true_loss.double()) <= 1
        assert grads.keys() == true_grads.keys() and len(grads) == 2 * LINEARS
        for name, truth in true_grads.items():
            assert parity.budget_used(grads[name], stock_grads[name], truth) <= 1, name
    assert len(recorded.graphs) == first and operators(recorded.graphs[-1]) == LINEARS


def test_marked_dimensions_are_not_specialised():
    """mark_dynamic raises where a layer would fix a size; the mask's shape among them."""
    ours = fused(stock(llama(), lora_dropout=0.1))
    recorded = Recorded("eager")
    compiled = torch.compile(ours, backend=recorded, fullgraph=True)
    for size in SIZES:
        ids = tokens(*size)
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        step(compiled, ours, ids)
    assert len(recorded.graphs) == 1
    assert torch._dynamo.explain(ours)(input_ids=tokens(2, 24)).graph_break_count == 0


@pytest.mark.parametrize("put", [fused, by_hand])
def test_dropout_and_checkpointing_compiled(put):
    """The recomputation in backward draws the mask of the forward pass: equal to the eager model, which draws from the same seed."""
    theirs = stock(llama(dtype=torch.float64), lora_dropout=0.2, init_lora_weights=False).train()
    base = theirs.base_model.model
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # a graph break of transformers' own
    assert base.model.layers[0].gradient_checkpointing
    ours = put(theirs)
    recorded = Recorded("aot_eager")
    compiled = torch.compile(ours, backend=recorded, fullgraph=True, dynamic=True)
    (loss, grads), (eager_loss, eager_grads) = (step(call, ours, tokens(2, 24)) for call in (compiled, ours))
    torch.testing.assert_close(loss, eager_loss, rtol=1e-12, atol=0)
    for name, grad in eager_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12, msg=name)
    assert step(compiled, ours, tokens(2, 24), seed=4)[0] != loss and operators(recorded.graphs[-1]) == LINEARS


def test_dropout_under_inductor_is_one_mask_for_both_passes():
    """Inductor draws seeds of its own, so truth is the loss itself: its slope along a random direction of an adapter."""
    ours = fused(stock(llama(dtype=torch.float64), lora_dropout=0.2, init_lora_weights=False)).train()
    ours.set_attn_implementation("eager")  # torch 2.11's inductor gives the flash kernel of a CPU float32 sums beside float64
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    A = ours.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
    direction, h, ends = torch.randn_like(A), 1e-3, []
    grads = step(compiled, ours, tokens(2, 24))[1]
    for side in (h, -2 * h):
        with torch.no_grad():
            A.add_(direction, alpha=side)
        ends.append(step(compiled, ours, tokens(2, 24))[0])
    slope = (grads["model.layers.0.mlp.up_proj.lora_A"] * direction).sum()
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), slope, rtol=1e-3, atol=0)


@pytest.mark.parametrize("put", [fused, by_hand])
@pytest.mark.parametrize("strict", [True, False])
def test_export(put, strict):
    """Where PEFT's own model exports, ours does, with both sizes left open.

    In non-strict export a PEFT model's weights are fake tensors, a type that may be left to PEFT's forward.
    """
    theirs = stock(llama(), init_lora_weights=False).eval()
    models = [Logits(theirs), Logits(put(theirs))]
    sizes = {"ids": (torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC)}  # a range is more than torch 2.11 can prove of any Llama
    exported = [torch.export.export(model, (tokens(2, 24),), dynamic_shapes=sizes, strict=strict) for model in models]
    theirs_has, ours_has = (operators(each.graph_module) for each in exported)
    assert theirs_has == 0 and (ours_has == LINEARS or (put is fused and not strict and ours_has == 0))
    torch.testing.assert_close(exported[1].module()(tokens(5, 33)), models[1](tokens(5, 33)))


@pytest.mark.parametrize(
    "base, adapters", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_kept_for_backward(base, adapters, p):
    """Ours: x, u and the mask. PEFT's: u, and x as the adapter sees it, which is a copy with dropout (and its mask) or in another dtype."""
    M, K, N, r = 96, 64, 80, 8
    pair = peft_and_fused(K, N, r, p, base, adapters)
    x = torch.randn(M, K, dtype=base, requires_grad=True)
    theirs, ours = (saved_by(lambda layer=layer: layer(x), layer.parameters()) for layer in pair.values())
    wide, narrow = adapters.itemsize, base.itemsize
    assert ours == narrow * M * (K + r) + mask_bytes(p, M, K)
    assert theirs == wide * M * (K + r) + (wide * M * K if p else 0)


def test_generate_with_each_sequence_in_its_adapter(tmp_path):
    """Three adapters from PEFT's files in two slots: prompts and steps of one `generate` give the tokens that PEFT gives for each alone."""
    model = llama(2)
    peft_model = None
    for n, name in enumerate(("law", "tax", "mail")):
        torch.manual_seed(n)
        config = LoraConfig(r=2 + n, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        if peft_model is None:
            peft_model = get_peft_model(copy.deepcopy(model), config, adapter_name=name).eval()
        else:
            peft_model.add_adapter(name, config)
    peft_model.save_pretrained(tmp_path)
    apply_lora(model, LoRAConfig(target_modules="all-linear", r=4), num_adapters=2)
    pool = AdapterPool(model.eval())
    for name in ("law", "tax", "mail"):
        pool.add(name, tmp_path / name)
    how = dict(max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)

    def generated(model, ids):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)

    wanted = {}
    ids = tokens(4, 11)
    for name in ("law", "tax", "mail"):
        peft_model.set_adapter(name)
        wanted[name] = generated(peft_model, ids)
    with peft_model.disable_adapter():
        wanted[None] = generated(peft_model, ids)
    assert len({tuple(map(tuple, each.tolist())) for each in wanted.values()}) == 4
    for names in (["tax", None, "law", "tax"], ["mail", "law", "mail", None]):
        with pool.use(names):
            mixed = generated(model, ids)
        for i, name in enumerate(names):
            assert torch.equal(mixed[i], wanted[name][i]), (names, i)

"""PEFT's target_parameters on a mixture's experts, fused: PEFT's numbers without its copy of the stacks, for any model of transformers'."""

import contextlib
import copy
import importlib
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import agree, both, results, train_all
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has no experts interface")
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_kernels.experts as mixture
from lora_kernels.integrations import peft as ours
from lora_kernels.integrations.peft import FusedParamWrapper, fuse, unfuse, use_fused

PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])
E, K, I, TOP = 5, 24, 16, 2
T = 13
X = torch.randn(T, K, generator=torch.Generator().manual_seed(1))
SIZES = dict(
    num_experts=E, num_local_experts=E, n_routed_experts=E, hidden_size=K, intermediate_size=I, moe_intermediate_size=I, hidden_act="silu",
    mlp_hidden_act="relu2", moe_latent_size=None, swiglu_alpha=1.7, swiglu_limit=7.0, _experts_implementation="eager",
)  # fmt: skip
KINDS = {"gated": Qwen3MoeExperts, "stored the other way round, biases": GptOssExperts, "not gated": NemotronHExperts}


class Normed(Qwen3MoeExperts):
    """Experts whose answers are normed, as one model's are."""

    def __init__(self, config):
        super().__init__(config)
        self.has_post_expert_norm, self.post_expert_norm = True, nn.LayerNorm(K)
        self.config._experts_implementation = "batched_mm"  # its eager forward knows no norm


class Net(nn.Module):
    """A router and experts; which experts a token takes is fixed, so that it does not depend on the dtype."""

    reentrant = None

    def __init__(self, kind=Qwen3MoeExperts, index=None):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(K, E), kind(SimpleNamespace(**SIZES))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.register_buffer("index", torch.rand(T, E).topk(TOP).indices % (E - 1) if index is None else index)  # no token for the last

    def forward(self, x):
        weights = self.router(x).softmax(-1).gather(1, self.index.clamp(max=E - 1))
        if self.reentrant is None:
            return self.experts(x, self.index, weights)
        return checkpoint(self.experts, x, self.index, weights, use_reentrant=self.reentrant)


def config(net, **changed) -> LoraConfig:
    experts = net.experts.get_base_layer() if isinstance(net.experts, lora.ParamWrapper) else net.experts
    names = [f"experts.{name}" for name in mixture.projections(experts)]
    return LoraConfig(**{"target_modules": [], "target_parameters": names, "r": 3, "lora_alpha": 6, "init_lora_weights": False, **changed})


def pair(kind=Qwen3MoeExperts, dtype=torch.float32, index=None, **changed):
    net = Net(kind, index).to(dtype)
    stock = get_peft_model(net, config(net, **changed))
    if dtype == torch.float32:
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(stock)
    return stock, fused, fuse(fused)


def in_double(stock):
    """PEFT's own answer in float64."""
    return copy.deepcopy(stock).double()


@pytest.mark.parametrize("kind", [*KINDS.values(), Normed], ids=[*KINDS, "normed"])
def test_the_numbers_are_pefts(kind, stacks):
    stock, fused, report = pair(kind)
    assert len(report.fused) == 2 and not report.left and not report.beside
    agree(stock, fused, X)
    assert [how for how, _ in stacks] == ["alone", "alone" if kind is Normed else "node"]


def test_use_fused_builds_what_fuse_makes(stacks):
    """Both stacks, one wrapper in the other; and of an adapter that comes later, which PEFT before 0.20 does not take."""
    stock, wanted, _ = pair()
    model = get_peft_model(Net(), use_fused(config(Net())))
    model.load_state_dict(stock.state_dict())
    if PEFT >= (0, 20):
        for each in (stock, wanted, model):
            torch.manual_seed(0)
            each.add_adapter("other", config(Net()))
            each.base_model.set_adapter("other")
    kinds = [type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)]
    assert kinds == [FusedParamWrapper] * 2 == [type(m) for m in wanted.modules() if isinstance(m, lora.LoraLayer)]
    agree(stock, model, X)
    assert len(stacks) == 2


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_of_the_two(name, stacks):
    stock, fused, report = pair(target_parameters=[f"experts.{name}"])
    assert len(report.fused) == 1
    agree(stock, fused, X)
    assert len(stacks) == 2


def test_double_to_the_last_bits():
    """In float64 nothing hides behind a tolerance: both are the same sums in another order."""
    stock, fused, _ = pair(dtype=torch.float64)
    for name, value in results(fused, X.double()).items():
        torch.testing.assert_close(value, results(stock, X.double())[name], rtol=1e-12, atol=1e-12, msg=name)


def test_several_adapters_active_at_once(stacks):
    stock, fused, _ = pair()
    second = config(stock.base_model.model, r=2, lora_alpha=3)
    if PEFT < (0, 20):
        with pytest.raises(ValueError, match="already other LoRA adapters"):
            fused.add_adapter("second", second)
        return
    for model in (stock, fused):
        torch.manual_seed(2)
        model.add_adapter("second", second)
    both(stock, fused, lambda model: model.base_model.set_adapter(["default", "second"]))
    train_all(stock), train_all(fused)
    agree(stock, fused, X)
    assert stacks[0][1].lora_A.shape == (E, 5, K)


def test_states_of_the_adapters():
    """Disabled, merged, one alone, rescaled, unfused: what PEFT answers, and the kernels where they can."""
    stock, fused, _ = pair()
    with stock.disable_adapter(), fused.disable_adapter():
        agree_in_value(stock, fused)
    for change in (
        lambda model: model.base_model.merge_adapter(),
        lambda model: model.base_model.unmerge_adapter(),
        lambda model: [m.set_scale("default", 0.25) for m in model.modules() if isinstance(m, lora.ParamWrapper)],
    ):
        both(stock, fused, change)
        agree_in_value(stock, fused)
    assert unfuse(fused) == 2 and not any(isinstance(m, ours.Fused) for m in fused.modules())
    agree_in_value(stock, fused)


def agree_in_value(stock, fused) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fused(X), stock(X), rtol=1e-5, atol=1e-5)


def test_one_wrapper_merged_beside_one_that_is_not(stacks):
    stock, fused, _ = pair()
    both(stock, fused, lambda model: model.base_model.model.experts.merge())
    agree_in_value(stock, fused)
    assert len(stacks) == 2, "the inner wrapper is called by the outer one"


def test_tokens_that_other_ranks_have():
    """Expert parallelism numbers them past the last: they count as nothing, and nothing comes back through them."""
    index = torch.stack([torch.arange(T) % E, torch.full((T,), E)], 1)
    stock, fused, _ = pair(index=index)
    agree(stock, fused, X)


def test_sixteen_bits_under_autocast():
    """bfloat16 experts with float32 adapters, as PEFT makes them, and the activations of an autocast region."""
    _, fused, _ = pair()
    fused.base_model.model.experts.get_base_layer().bfloat16()
    plain = results(fused, X.bfloat16().float(), lambda: torch.autocast("cpu", torch.bfloat16))
    exact = results(in_double(fused), X.bfloat16().double())
    assert plain["y"].dtype == torch.float32
    for name in plain:
        assert (plain[name].double() - exact[name]).norm() < 0.02 * exact[name].norm(), name


class Largest(TorchDispatchMode):
    """The most elements that any operator's result had, views aside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, t.numel())
        return out


def test_no_copy_of_a_stack():
    """PEFT makes one of each stack forward, and a gradient of its size backward; here no result is as large as a stack."""
    largest = {}
    for name, model in zip(("stock", "fused"), pair(index=torch.zeros(T, 1, dtype=torch.int64))[:2], strict=True):
        with Largest() as seen:
            results(model, X)
        largest[name] = seen.elements
    stack = E * K * I
    assert largest["stock"] >= 2 * stack and largest["fused"] < stack, largest


def test_kept_for_backward():
    """Nothing of a stack's size but the stacks themselves."""
    _, fused, _ = pair()
    own = {p.untyped_storage().data_ptr() for p in fused.parameters()}
    kept = []

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fused(X)
    assert kept and max(kept) < E * K * I


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    stock, fused, _ = pair()
    for model in (stock, fused):
        model.base_model.model.reentrant = reentrant
    agree(stock, fused, X)


REFUSED = {
    "trained": (lambda experts: experts.gate_up_proj.requires_grad_(), "is trained"),
    "another implementation": (lambda experts: setattr(experts.config, "_experts_implementation", "sonicmoe"), "'sonicmoe'"),
    "no interface": (lambda experts: delattr(experts, "is_transposed"), "experts interface"),
    "hooks": (lambda experts: experts.register_forward_hook(lambda *args: None), "has hooks"),
    "a part of a stack": (lambda experts: setattr(experts, "num_experts", E + 1), "not a part for each of 6 experts"),
    "eight bits": (lambda experts: setattr(experts, "down_proj", nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), False)), "float8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_left_to_peft(what, stacks):
    change, why = REFUSED[what]
    stock, _, _ = pair()
    change(stock.base_model.model.experts.get_base_layer())
    report = fuse(stock)
    assert not report.fused and len(report.left) == 2 and all(why in reason for reason in report.left.values()), report
    if what not in ("eight bits", "no interface", "another implementation", "a part of a stack"):
        stock(X)
    assert not stacks


def test_more_rank_than_the_kernels_take(stacks):
    stock, fused, report = pair(r=600)
    assert len(report.left) == 2 and "rank 600" in str(report)
    agree_in_value(stock, fused)
    assert not stacks


def test_other_arguments_than_experts_have(stacks):
    """Unknown keywords and shapes go to PEFT's forward, which says what is wrong."""
    _, fused, _ = pair()
    net = fused.base_model.model
    with pytest.raises(TypeError):
        net.experts(X, net.index, torch.ones(T, TOP), unknown=1)
    with pytest.raises(ValueError, match="mixed adapter"):
        fused.base_model.model.experts(X, net.index, torch.ones(T, TOP), adapter_names=["default"])
    assert not stacks


def test_by_keyword(stacks):
    stock, fused, _ = pair()
    net = fused.base_model.model
    y = net.experts(X, top_k_index=net.index, top_k_weights=torch.ones(T, TOP))
    torch.testing.assert_close(y, stock.base_model.model.experts(X, net.index, torch.ones(T, TOP)), rtol=1e-5, atol=1e-5)
    assert len(stacks) == 2


def test_no_token():
    stock, fused, _ = pair()
    none = torch.zeros(0, TOP, dtype=torch.int64)
    assert fused.base_model.model.experts(X[:0], none, torch.zeros(0, TOP)).shape == (0, K)


def test_pickled():
    _, fused, _ = pair()
    back = pickle.loads(pickle.dumps(fused.base_model.model.experts))
    assert type(back) is FusedParamWrapper and type(back.base_layer) is FusedParamWrapper


class Sizes:
    """A config for the experts of any model, which ask for theirs by many names."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__") or name in ("moe_latent_size", "pad_token_id"):
            return None if name in ("moe_latent_size", "pad_token_id") else super().__getattribute__(name)
        kinds = [("intermediate", I), ("hidden_size", K), ("per_tok", TOP), ("expert", E), ("act", "silu")]
        return next((value for part, value in kinds if part in name), 1.5)


def test_every_class_of_transformers():
    """The interface's word is kept by all: in float64 `experts.forward` is what each class's own forward computes."""
    found, wrong = 0, []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            torch.manual_seed(0)
            experts = getattr(module, name)(Sizes()).double().requires_grad_(False)
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=0.3)
            stack = getattr(experts, mixture.projections(experts)[0])
            x = torch.randn(T, stack.shape[1 if experts.is_transposed else 2], dtype=torch.float64)
            index, weights = torch.rand(T, E).topk(TOP).indices, torch.rand(T, TOP, dtype=torch.float64)
            assert mixture.why_not_experts(experts) is None, name
            theirs, ours = experts(x, index, weights), mixture.forward(experts, x, index, weights, {})
            exact = not name.startswith(("OpenAIPrivacyFilter", "Inkling2"))  # which go through float32 whatever their dtype
            if not (ours - theirs).abs().max() <= (1e-12 if exact else 1e-6) * theirs.abs().max():
                wrong.append(name)
            found += 1
    assert not wrong and found >= 30, (found, wrong)


MODELS = {
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_its_attention(name, stacks):
    """Attention's layers and the experts', one fuse: the loss and every gradient are PEFT's."""
    torch.manual_seed(0)
    targets = dict(target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = MODELS[name]().double()
    model.config._experts_implementation = "eager"  # torch's grouped product knows no float64
    stock = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **targets))
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert len(report.fused) == 8 and not report.left, report
    ids = torch.randint(0, 64, (2, 9))
    found = []
    for model in (stock, fused):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 17
    for each, value in found[1].items():
        torch.testing.assert_close(value, found[0][each], rtol=1e-5, atol=1e-9, msg=each)
    assert len(stacks) == 4


def test_compiled(stacks):
    _, fused, _ = pair()
    with contextlib.suppress(AttributeError):
        torch._dynamo.reset()
    run = torch.compile(fused.base_model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(X), fused(X), rtol=1e-5, atol=1e-5)

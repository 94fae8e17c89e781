"""A pytest plugin for `peft_suite`: PEFT builds fused layers wherever it would build its own, and each fused call may have a shadow.

The shadow computes the same call by PEFT's own forward, and by PEFT's own forward in float64, with the same dropout mask, and holds
y and all gradients to the budget of docs/numerics.md. PEFT's own assertions look at few gradients and no dropout. Three models of the hub
that its tests of experts ask for have stand-ins of the same classes here.
Environment: SUITE = stock | fused | shadow, SUITE_PLANT = '' or one of PLANTS, SUITE_OUT = a file for the outcome of each test.
"""

import collections
import contextlib
import copy
import json
import math
import os
import sys

import peft.tuners.lora.layer as layer_module
import torch
from peft.tuners import lora
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, LlamaConfig

import lora_kernels.autograd as autograd
import lora_kernels.experts as mixture
import lora_kernels.integrations.peft as ours
import lora_kernels.integrations.peft_mixed as ours_mixed
from lora_kernels import chain, philox
from lora_kernels.parity import budget_used

MODE, PLANT = os.environ.get("SUITE", "stock"), os.environ.get("SUITE_PLANT", "")
PARAM_WRAPPER = lora.ParamWrapper
outcomes: dict[str, str] = {}
calls: collections.Counter = collections.Counter()
touched: set[str] = set()
differences: list[str] = []
running = ""


SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, head_dim=8
)
STAND_INS = {
    "trl-internal-testing/tiny-GptOssForCausalLM": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "trl-internal-testing/tiny-Llama4ForCausalLM": Llama4TextConfig(**SIZES, intermediate_size_mlp=64, num_local_experts=4),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**SIZES),
}


def from_pretrained_or_stand_in(cls, name, *args, real=AutoModelForCausalLM.from_pretrained.__func__, **kwargs):
    if name not in STAND_INS:
        return real(cls, name, *args, **kwargs)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(STAND_INS[name])
    model.name_or_path = model.config._name_or_path = name
    return model.eval()


def pytest_configure(config):
    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained_or_stand_in)
    if MODE == "stock":
        return
    PLANTS.get(PLANT, lambda: None)()
    real = ours.lora_linear

    def counted(*args, **kwargs):
        calls["mixed" if kwargs.get("segments") is not None else "one adapter"] += 1
        touched.add(running)
        return real(*args, **kwargs)

    def routed(*args, **kwargs):
        calls["experts"] += 1
        touched.add(running)
        return forward_of_experts(*args, **kwargs)

    forward_of_experts, mixture.forward = mixture.forward, routed
    ours.lora_linear = ours_mixed.lora_linear = counted
    layer_module.Linear, layer_module.ParamWrapper = ours.FusedLoraLinear, ours.FusedParamWrapper
    if MODE == "shadow":
        chain._onednn = lambda: False  # torch's own float32 product on both sides: the layer is compared, not two libraries
        ours.FusedLoraLinear.forward = shadowed(ours.FusedLoraLinear.forward)
        ours.FusedParamWrapper.forward = shadowed(ours.FusedParamWrapper.forward)


class Known(collections.Counter):
    """PEFT's tests go online for a model that they have not met: here they have met all, and fail at once, not after minutes."""

    def __contains__(self, model):
        return True


def pytest_collection_modifyitems():
    if "tests.testing_utils" in sys.modules:
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = Known()


def pytest_runtest_logstart(nodeid, location):
    global running
    running = nodeid


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish():
    with open(os.environ["SUITE_OUT"], "w") as out:
        json.dump({"outcomes": outcomes, "calls": calls, "touched": sorted(touched), "differences": differences}, out)


class Masked(nn.Module):
    """Dropout with the mask that the fused call on all of x makes of this seed; of these samples of x."""

    def __init__(self, p, seed, x, samples=slice(None)):
        super().__init__()
        self.p, self.keep = p, philox.keep_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], p).reshape(x.shape)[samples]

    def forward(self, x):
        return torch.where(self.keep, x * philox.inv_keep(self.p), 0.0)


def shadowed(forward):
    def checked(self, x, *args, **kwargs):
        before = calls.total()
        y = forward(self, x, *args, **kwargs)
        if calls.total() > before and not torch.compiler.is_compiling():
            # checkpointing counts what is saved, and FSDP's views of one flat parameter cannot be copied
            apart = torch._C._autograd._top_saved_tensors_default_hooks(True) is None and copyable(self)
            calls["shadowed" if apart else "not shadowed"] += 1
            if apart:
                own = {kind: calls[kind] for kind in ("mixed", "one adapter", "experts")}
                with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
                    compare(forward, self, x, args, kwargs)
                calls.update({kind: count - calls[kind] for kind, count in own.items()})
        return y

    return checked


def copyable(layer) -> bool:
    try:
        copy.deepcopy(layer)
    except RuntimeError:
        return False
    return True


def compare(forward, layer, x, args, kwargs) -> None:
    layer = sharpened(layer)
    sixteen = x.dtype in (torch.float16, torch.bfloat16)
    precise = copy.deepcopy(layer).double()
    seeded = torch.Generator().manual_seed(0)
    experts = isinstance(layer, lora.ParamWrapper)
    dy = torch.randn(*x.shape[:-1], x.shape[-1] if experts else layer.out_features, generator=seeded, dtype=torch.float64)

    def run(compute, layer, x):
        x = x.detach().clone().requires_grad_()
        wanted = {"dx": x, **{f"d {name}": p for name, p in layer.named_parameters() if p.requires_grad}}
        torch.manual_seed(7)
        given = [t.clone().to(x.dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        y = compute(layer, x, *given, **kwargs)
        grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype), allow_unused=True)
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}

    def stock(layer, x, *args, **kwargs):
        if experts:
            return as_peft_has_it(layer)(x, *args, **kwargs)
        with with_masks(layer, x, kwargs.get("adapter_names")):
            return lora.Linear.forward(layer, x, *args, **kwargs)

    got = run(forward, layer, x)
    with torch.autocast("cpu", x.dtype) if sixteen else contextlib.nullcontext():
        same = run(stock, layer, x)
    with torch.autocast("cpu", enabled=False):
        truth = run(stock, precise, x.double())
    for name, value in got.items():
        theirs, exact = same[name], truth[name]
        if value is None or theirs is None:  # zeros where PEFT has no gradient: adapters that the batch does not name
            used = 0.0 if all(other is None or not other.any() for other in (value, theirs)) else math.inf
        elif value.dtype == torch.float64:
            used = 0.0 if torch.allclose(value, exact) else math.inf
        else:
            used = budget_used(value, theirs, exact) / (2 if experts else 1)  # two products in a row, each with its roundings
        calls["tensors compared"] += 1
        if not used <= 1 and (exact is None or torch.isfinite(exact).all()):
            differences.append(f"{running}: {name} uses {used:.2f} of its budget")
            raise AssertionError(f"shadow: {name} uses {used:.2f} of its budget")


def sharpened(layer):
    """A copy with other values in B and another scale: PEFT's tests leave them at zero and one, which hide slips in backward."""
    layer = copy.deepcopy(layer)
    for each in (m for m in layer.modules() if m is layer or isinstance(m, lora.ParamWrapper)):
        for name, up in each.lora_B.items():
            torch.nn.init.normal_(up.weight, std=0.3, generator=torch.Generator().manual_seed(1))
            each.scaling[name] = each.scaling[name] * 1.5
    return layer


def as_peft_has_it(wrapper):
    """The same parameters in PEFT's own wrappers; its experts in plain torch, which knows float64, too."""
    layer = copy.copy(wrapper)
    layer.__class__, layer._modules = PARAM_WRAPPER, dict(wrapper._modules)
    if isinstance(layer.base_layer, lora.ParamWrapper):
        layer._modules["base_layer"] = as_peft_has_it(layer.base_layer)
    elif hasattr(layer.base_layer, "config"):
        layer.base_layer.config = copy.copy(layer.base_layer.config)
        layer.base_layer.config._experts_implementation = "eager"
    return layer


@contextlib.contextmanager
def with_masks(layer, x, names):
    """The layer with the dropout mask of the seed that a fused call would draw now."""
    modules, seed = layer.lora_dropout._modules, philox.draw_seed(x.device)
    kept = dict(modules)
    for name, dropout in kept.items():
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
            samples = slice(None) if names is None else [i for i, other in enumerate(names) if other == name]
            modules[name] = Masked(dropout.p, seed, x, samples)
    try:
        yield
    finally:
        modules.update(kept)


def backward_without_scale():
    real = autograd.ops.backward
    autograd.ops.backward = lambda *args: real(*args[:8], 1.0, *args[9:])


def dx_without_the_adapter():
    real = autograd.ops.backward

    def planted(dy, x, weight, *rest):
        dx, *others = real(dy, x, weight, *rest)
        return (None if dx is None else dy @ weight, *others)

    autograd.ops.backward = planted


def dropout_ignored():
    for module in (ours, ours_mixed):
        real = module.lora_linear
        module.lora_linear = lambda *args, real=real, **kwargs: real(*args, **{**kwargs, "dropout_p": 0.0})


PLANTS = {plant.__name__: plant for plant in (backward_without_scale, dx_without_the_adapter, dropout_ignored)}

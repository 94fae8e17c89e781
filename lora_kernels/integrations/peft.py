"""PEFT's LoRA layer on these kernels: the same semantics, computed in one pass where it is the same computation.

    config = use_fused(LoraConfig(...)); model = get_peft_model(model, config)      before the model is wrapped
    print(fuse(model))                                                              or after, in place; `unfuse` undoes it

`Fused` changes ``forward`` alone. Beside a quantised base, or one that has hooks or is trained, the layer below makes the base product
and the fused call adds the adapter. What it does not compute at all (variants but DoRA, sharded parts) PEFT's own
forward computes, and `why_not_fused` names the reason. DoRA is `.peft_dora`; the wrappers around a mixture's experts are `.peft_experts`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..autograd import lora_linear, scaled_bias
from ..experts import Factors, together
from ..nn import sharding
from ..projections import Projection
from ..shared_input import SharedInput
from .peft_dora import Dora, dora_of
from .peft_experts import routed, why_not_routed
from .peft_mixed import mixed, why_not_mixed
from .peft_state import Base, Beside, active, adapters_of, base_of, in_dtype, projection_of, settled, why_not_together

__all__ = [
    "Fused",
    "FusedLoraLinear",
    "FusedParamWrapper",
    "Report",
    "dispatch_fused",
    "fuse",
    "mixed_adapters",
    "unfuse",
    "use_fused",
    "why_not_fused",
]

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names
QUANTISED = {  # PEFT's layers that add the adapters to what a quantised layer makes of x, and the modules of peft.tuners.lora they are in
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "GPTQLoraLinear": "gptq",
    "AwqLoraLinear": "awq",
    "AqlmLoraLinear": "aqlm",
    "HqqLoraLinear": "hqq",
    "TorchaoLoraLinear": "torchao",
}


class Fused:
    """The forward pass of a LoRA layer of PEFT's by `lora_kernels.lora_linear`, also for ``adapter_names``, in training too."""

    _shares: SharedInput | None = None  # of this layer and others

    def projection(self, x: torch.Tensor) -> Projection | None:
        """The layer as one of several of x, or None where it is computed alone."""
        return projection_of(self, x)

    def forward(self: Any, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = kwargs.get("adapter_names")
        others = args or any(value is not None for key, value in kwargs.items() if key != "adapter_names")
        y = None
        if not (self._disable_adapters or self.merged_adapters or others):
            y = _single(self, x) if names is None else _mixed(self, x, names)
        return super().forward(x, *args, **kwargs) if y is None else y  # type: ignore[misc]


class FusedLoraLinear(Fused, lora.Linear):
    """``peft.tuners.lora.Linear`` with the forward pass of `Fused`."""


class FusedParamWrapper(Fused, lora.ParamWrapper):
    """``peft.tuners.lora.ParamWrapper`` around a mixture's experts, which together take one call of `lora_kernels.experts`."""

    def projection(self, x: torch.Tensor) -> None:
        """Of no layer: its adapters are a parameter's."""

    def forward(self: Any, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = routed(self, x, *args, **kwargs)
        return lora.ParamWrapper.forward(self, x, *args, **kwargs) if y is None else y


FusedParamWrapper.__name__ = "ParamWrapper"  # by which PEFT finds the wrapper of a parameter that gets another adapter


@functools.cache
def fused_class(kind: type) -> type:
    """The subclass of a LoRA layer of PEFT's that has the forward pass of `Fused`."""
    own = {lora.Linear: FusedLoraLinear, lora.ParamWrapper: FusedParamWrapper}
    return own.get(kind) or type(f"Fused{kind.__name__}", (Fused, kind), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """`fused_class` of the quantised layers, by name, as pickle asks for them: their modules are imported where they are used."""
    kind = name.removeprefix("Fused")
    if kind == name or kind not in QUANTISED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused_class(getattr(importlib.import_module(f"peft.tuners.lora.{QUANTISED[kind]}"), kind))


def _single(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Every token through the active adapters; None where PEFT's forward is to compute it."""
    if layer._shares is not None and (own := projection_of(layer, x)) is not None:
        y = layer._shares.call(layer, x, own)
        return y.to(x.dtype) if callable(own.weight) else y
    names = active(layer)
    base = base_of(layer, x) if names else ""
    if isinstance(base, str):
        return None
    adapters = adapters_of(layer, names, base, x)
    if isinstance(adapters, str):
        special = dora_of(layer, names, base, x)
        return special.of(layer, x) if isinstance(special, Dora) else None
    if len(adapters) > 1:
        if why_not_together(adapters) is not None:
            return None
        adapters = [together(adapters)]
    return _by_one(*settled(layer, x, base), adapters[0])


def _by_one(x: torch.Tensor, base: Base, adapter: Factors) -> torch.Tensor:
    one, product = in_dtype(adapter, base.dtype), base.product
    bias = one.bias
    if bias is not None and product is not None:  # beside which `lora_linear` takes none
        product, bias = product + scaled_bias(bias, one.scale).to(product.dtype), None
    y = lora_linear(
        x, base.weight, one.A, one.B, base.bias,
        base=product, scale=one.scale, dropout_p=one.p, training=one.training, lora_bias=bias,
    )  # fmt: skip
    return y if base.result is None else y.to(base.result)


def _mixed(layer: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
    """Each sample through the adapter it names; one that this layer does not have is the base alone. None: as in `_single`."""
    layer._check_forward_args(x, adapter_names=names)
    here = layer._modules["lora_A"]._modules
    places = {name: e for e, name in enumerate(name for name in dict.fromkeys(names) if name in here)}
    base = base_of(layer, x) if places else ""
    if isinstance(base, str):
        return None
    adapters = adapters_of(layer, list(places), base, x)
    ids = tuple(places.get(name, -1) for name in names)
    alone = len(places) == 1 and -1 not in ids  # nothing is mixed: no stack, no plan
    if isinstance(adapters, str) or (not alone and why_not_mixed(adapters) is not None):
        return None
    x, base = settled(layer, x, base)
    if alone:
        return _by_one(x, base, adapters[0])
    return mixed(x, base, [in_dtype(each, base.dtype) for each in adapters], ids)


def dispatch_fused(target, adapter_name, config, **kwargs):
    """For PEFT's extension point: the layer that PEFT's own dispatchers make, of quantised bases and experts too, as `fuse` leaves it."""
    registered = config._custom_modules
    config._custom_modules = {kind: make for kind, make in registered.items() if kind is not nn.Module}
    try:
        layer = lora.LoraModel._create_new_module(config, adapter_name, target, **kwargs)
    finally:
        config._custom_modules = registered
    _take(layer)
    return layer


def use_fused(config: LoraConfig) -> LoraConfig:
    """Have PEFT build the layers of this config as `fuse` leaves them; returns it. Not saved with the adapter: after loading call `fuse`.

    Raises:
        TypeError: ``config`` is not a LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: wanted a peft.LoraConfig, got {type(config).__name__}")
    dispatch: Any = functools.partial(dispatch_fused, config=config)  # which PEFT before 0.19 does not pass on
    config._custom_modules = {nn.Module: dispatch, **(config._custom_modules or {})}  # the first that matches is asked
    return config


@dataclass(frozen=True)
class Report:
    """``fused``: names of the layers on the kernels; ``left``: the other LoRA layers and why PEFT's forward computes them.

    ``beside``: those of the fused layers to whose base product, made by the layer below, the kernels add the adapter, and why.
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} LoRA layers fused, {len(self.left)} left to PEFT"]
        for what, reasons in (("beside their base", self.beside), ("left", self.left)):
            for reason, count in collections.Counter(reasons.values()).items():
                lines.append(f"  {count} {what}: {reason}")
        return "\n".join(lines)


def fuse(model: nn.Module) -> Report:
    """Give every linear LoRA layer of the model, over quantised bases too, the forward pass of `Fused`, in place: all else stays.

    Call it before torch.compile and before FSDP wraps the model, and again after an adapter was added to layers that had none.

    Returns:
        A `Report` of the layers as they stand: a layer that is left, but for its type, is fused as soon as the reason is gone.
    Raises:
        ValueError: the model has no LoRA layer at all, or is compiled or wrapped already; nothing is changed. In the forward pass
        UnsupportedError: the layer below makes no plain tensor of floats.
    """
    layers = _lora_layers(model)
    late = next((what for module in model.modules() if (what := _too_late(module))), None)
    if late:
        raise ValueError(f"model: wanted one that is not compiled or sharded yet (fuse it first), got {late} in it")
    report = Report()
    for name, layer in layers.items():
        reason = _take(layer) or why_not_fused(layer)
        if reason is None:
            report.fused.append(name)
            base = None if isinstance(layer, lora.ParamWrapper) else base_of(layer, None)
            if isinstance(base, Beside):
                report.beside[name] = base.reason
        else:
            report.left[name] = reason
    return report


def why_not_fused(layer: Any, x: torch.Tensor | None = None) -> str | None:
    """Why PEFT's own forward computes this layer as it stands (for this x), or None where the kernels do."""
    if isinstance(layer, lora.ParamWrapper):
        return why_not_routed(layer)
    base, names = base_of(layer, x), active(layer)
    if isinstance(base, str):
        return base
    adapters = adapters_of(layer, names, base, x)
    if isinstance(adapters, str):
        special = dora_of(layer, names, base, x)
        return None if isinstance(special, Dora) else special or adapters
    return why_not_together(adapters)


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: every fused layer is PEFT's own again. Returns how many.

    Raises:
        ValueError: a layer is sharded by itself, so that its class is FSDP's; nothing is changed.
    """
    fused: list = [m for m in model.modules() if isinstance(m, Fused)]
    late = next((type(m).__name__ for m in fused if type(m).__mro__[1] is not Fused), None)
    if late:
        raise ValueError(f"model: wanted one whose layers are not sharded yet (unfuse it first), got a {late} in it")
    for module in fused:
        module.__dict__.pop("_shares", None)
        module.__class__ = next(kind for kind in type(module).__mro__ if not issubclass(kind, Fused))
    return len(fused)


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """Inside, each sample of the batch goes through the adapter it names ("__base__": none), in training as in inference.

    PEFT's own ``model(..., adapter_names=...)`` does so in inference and raises in training. A gradient reaches each adapter from its own
    samples only; the adapters to be trained need ``requires_grad``, which ``set_adapter`` gives to the active ones alone. With gradient
    checkpointing call backward inside, too: it computes the forward pass once more. Layers that are not fused, and modules_to_save, take
    PEFT's own loop over adapters.

    Raises:
        ValueError: no LoRA layer of the model is fused, or none knows a name; nothing is changed. In the forward pass: the batch has
            not as many samples as names, or a layer is merged or has DoRA, as in PEFT.
    """
    layers = _lora_layers(model)
    if not any(isinstance(layer, Fused) for layer in layers.values()):
        raise ValueError(f"model: wanted fused LoRA layers (fuse(model)), got {len(layers)} LoRA layers and none of them fused")
    known = {name for layer in layers.values() for name in (*layer.lora_A, *layer.lora_embedding_A)} | {BASE}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names: wanted names among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    names = list(adapter_names)

    def name_them(module, args, kwargs):
        return args, {**kwargs, "adapter_names": names}

    takers = [m for m in model.modules() if isinstance(m, (lora.LoraLayer, AuxiliaryTrainingWrapper))]
    handles = [m.register_forward_pre_hook(name_them, with_kwargs=True) for m in takers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, lora.LoraLayer)}
    if not layers:
        raise ValueError("model: wanted one with PEFT LoRA layers (get_peft_model(model, LoraConfig(...))), got none")
    return layers


def _take(layer: Any) -> str | None:
    """Give a layer the forward pass of `Fused`, or say why its type keeps its own."""
    reason = _why_not_this_type(layer)
    if reason is None and not isinstance(layer, Fused):
        layer.__class__ = fused_class(type(layer))  # type: ignore[arg-type]
    return reason


def _why_not_this_type(layer: nn.Module) -> str | None:
    kind = type(layer)
    quantised = kind.__module__ == f"peft.tuners.lora.{QUANTISED.get(kind.__name__)}"
    if not (quantised or kind in (lora.Linear, lora.ParamWrapper) or isinstance(layer, Fused)):
        return f"it is a {type(layer).__module__}.{type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "its forward is not its class's (accelerate's hooks?), and would stay as it is"
    return None


def _too_late(module: nn.Module) -> str:
    """The name of what has already taken the module's forward, or ''."""
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return "a compiled module"
    return f"a {kind}" if (kind := sharding(module)) else ""

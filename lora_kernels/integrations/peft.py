"""PEFT's LoRA layer on these kernels: the same semantics, computed in one pass where it is the same computation.

    config = use_fused(LoraConfig(...)); model = get_peft_model(model, config)      before the model is wrapped
    print(fuse(model))                                                              or after, in place; `unfuse` undoes it

`FusedLoraLinear` changes ``forward`` alone. What it does not compute itself (several adapters at once, variants such as DoRA, an adapter's
bias, hooked or sharded parts) PEFT's own forward computes, and `why_not_fused` names the reason. Nothing is cached: weights, scales and
states are read at each call, so merging, hot-swapping and rescaling need no notice.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraConfig
from torch import nn

from ..autograd import lora_linear
from ..problem import MAX_RANK
from ..segments import Segments

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names
PLAIN = (torch.Tensor, nn.Parameter)


class FusedLoraLinear(lora.Linear):
    """``peft.tuners.lora.Linear`` whose forward is `lora_kernels.lora_linear`, also for ``adapter_names``, in training too."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = kwargs.get("adapter_names")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        others = args or any(value is not None for key, value in kwargs.items() if key != "adapter_names")
        if others or why_not_fused(self, x) is not None:
            return super().forward(x, *args, **kwargs)
        if names is not None:
            if _why_not_mixed(self, names) is not None:
                return super().forward(x, *args, **kwargs)
            self._check_forward_args(x, adapter_names=names)
            return self._mixed(x, names)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return super().forward(x, *args, **kwargs)
        (name,) = active
        base, scale = self.base_layer, self.scaling[name]
        A, B = self._adapter(name)
        return lora_linear(
            x,
            base.weight,
            A,
            B,
            base.bias,
            scale=scale.float() if isinstance(scale, torch.Tensor) else scale,
            dropout_p=_dropout(self, name),
            training=self.lora_dropout[name].training,
        )

    def _adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in a dtype the kernels take beside the base's: the base's own, or float32."""
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        if A.dtype in (self.base_layer.weight.dtype, torch.float32):
            return A, B
        return A.float(), B.float()

    def _mixed(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Each sample through the adapter it names; one this layer does not have is the base alone."""
        base = self.base_layer
        used = sorted({name for name in names if name in self.lora_A})
        if not used:
            return base(x)
        rank = max(self.r[name] for name in used)
        pairs = [self._adapter(name) for name in used]
        A = torch.stack([nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
        B = torch.stack([nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs])
        places = {name: e for e, name in enumerate(used)}
        tokens = x[0, ..., 0].numel()
        ids = torch.tensor([places.get(name, -1) for name in names], dtype=torch.int32).repeat_interleave(tokens)
        mixed = any(a.shape[0] != rank for a, _ in pairs)
        ranks = torch.tensor([a.shape[0] for a, _ in pairs], dtype=torch.int32).to(x.device) if mixed else None
        return lora_linear(
            x,
            base.weight,
            A,
            B,
            base.bias,
            scale=torch.tensor([float(self.scaling[name]) for name in used]).to(x.device),
            dropout_p=_dropout(self, used[0]),
            training=self.lora_dropout[used[0]].training,
            segments=Segments.from_ids(ids.to(x.device), len(used), validate=False),
            ranks=ranks,
        )


def why_not_fused(layer: lora.Linear, x: torch.Tensor | None = None) -> str | None:
    """Why PEFT's own forward computes this layer as it stands (for this x), or None where the kernels do."""
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__name__}, not exactly an nn.Linear"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: its weight is stored transposed"
    if base.weight.requires_grad:
        return "its base weight is trained"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        return f"several adapters are active at once: {', '.join(active)}"
    for name in active:
        reason = _why_not_adapter(layer, name)
        if reason is not None:
            return reason
    parts = [("base layer", base)]
    parts += [part for name in active for part in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name]))]
    for part, module in parts:
        reason = _why_not_part(part, module)
        if reason is not None:
            return reason
        if module.weight.device != base.weight.device:
            return f"its {part} is on {module.weight.device}, its base on {base.weight.device}"
    return None if x is None else _why_not_input(base, x)


def _why_not_part(part: str, module: nn.Module) -> str | None:
    if type(module) is not nn.Linear:
        return f"its {part} is {type(module).__name__}, not nn.Linear"
    if _hooked(module):
        return f"its {part} has hooks, which a fused call would pass by"
    if type(module.weight) not in PLAIN:
        return f"its {part}'s weight is a {type(module.weight).__name__}"
    return None


def _why_not_input(base: nn.Linear, x: torch.Tensor) -> str | None:
    if type(x) not in PLAIN:
        return f"x is a {type(x).__name__}"
    if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype} beside a base of {base.weight.dtype}"
    if x.numel() == 0 or x.device != base.weight.device:
        return "x is empty, or on another device"
    return None


def _why_not_adapter(layer: lora.Linear, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias.get(name):
        return f"adapter {name!r} has a bias of its own"
    if not 1 <= layer.r[name] <= MAX_RANK:
        return f"adapter {name!r} has rank {layer.r[name]}; the kernels take 1 to {MAX_RANK}"
    if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity) or _hooked(layer.lora_dropout[name]):
        return f"adapter {name!r} has a dropout of type {type(layer.lora_dropout[name]).__name__}, or hooks on it"
    return None


def _why_not_mixed(layer: lora.Linear, names) -> str | None:
    used = sorted({name for name in names if name in layer.lora_A})
    for name in used:
        reason = _why_not_adapter(layer, name) or _why_not_part("lora_A", layer.lora_A[name]) or _why_not_part("lora_B", layer.lora_B[name])
        if reason is not None:
            return reason
    if len({(_dropout(layer, name), layer.lora_dropout[name].training) for name in used}) > 1:
        return "its adapters differ in dropout"
    if len({layer.lora_A[name].weight.dtype for name in used}) > 1:
        return "its adapters differ in dtype"
    return None


def _dropout(layer: lora.Linear, name: str) -> float:
    return getattr(layer.lora_dropout[name], "p", 0.0)


def _hooked(module: nn.Module) -> bool:
    torch_hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(torch_hooks) or hasattr(module, "_hf_hook")


def dispatch_fused(target, adapter_name, config=None, parameter_name=None, **kwargs):
    """For PEFT's extension point: a `FusedLoraLinear` on a plain nn.Linear, None (PEFT's own dispatchers decide) on anything else."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if parameter_name is not None or type(base) is not nn.Linear or getattr(config, "fan_in_fan_out", False):
        return None
    if type(base.weight) not in PLAIN:
        return None
    return FusedLoraLinear(target, adapter_name, config=config, **kwargs)


def use_fused(config: LoraConfig) -> LoraConfig:
    """Have PEFT build fused layers for this config; returns it. Not saved with the adapter: after loading call `fuse`."""
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: wanted a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({nn.Linear: dispatch_fused})
    return config


@dataclass(frozen=True)
class Report:
    """``fused``: names of the layers on the kernels; ``left``: the other LoRA layers and why PEFT's forward computes them."""

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} LoRA layers fused, {len(self.left)} left to PEFT"]
        for reason, count in collections.Counter(self.left.values()).items():
            lines.append(f"  {count} left: {reason}")
        return "\n".join(lines)


def fuse(model: nn.Module) -> Report:
    """Turn every ``peft.tuners.lora.Linear`` of the model into a `FusedLoraLinear`, in place: parameters, hooks and optimizers stay.

    Call it before torch.compile, and again after an adapter was added to layers that had none.

    Raises:
        ValueError: the model has no LoRA layer at all.
    """
    report = Report()
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, lora.LoraLayer)]
    if not layers:
        raise ValueError("model: wanted one with PEFT LoRA layers (get_peft_model(model, LoraConfig(...))), got none")
    for name, module in layers:
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.__class__ = FusedLoraLinear
        exact = type(module) in (lora.Linear, FusedLoraLinear)
        reason = why_not_fused(module) if exact else f"it is a {type(module).__module__}.{type(module).__name__}"
        if reason is None:
            report.fused.append(name)
        else:
            report.left[name] = reason
    return report


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """Inside, each sample of the batch goes through the adapter it names ("__base__": none), in training as in inference.

    PEFT's own ``model(..., adapter_names=...)`` does so in inference and raises in training. A gradient reaches each adapter from its own
    samples only; the adapters to be trained need ``requires_grad``, which ``set_adapter`` gives to the active ones alone.

    Raises:
        ValueError: some LoRA layer of the model is not fused, or no layer knows a name.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, lora.LoraLayer)]
    stock = [name for name, m in layers if not isinstance(m, FusedLoraLinear)]
    if stock or not layers:
        raise ValueError(
            f"model: wanted every LoRA layer fused (fuse(model)), got {len(stock)} that are not: {', '.join(stock[:3]) or 'none at all'}"
        )
    known = {name for _, m in layers for name in m.lora_A} | {BASE}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names: wanted names among {', '.join(sorted(known))}, got {', '.join(unknown)}")

    def name_them(module, args, kwargs):
        return args, {**kwargs, "adapter_names": list(adapter_names)}

    handles = [m.register_forward_pre_hook(name_them, with_kwargs=True) for _, m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`: every `FusedLoraLinear` is PEFT's own layer again. Returns how many."""
    fused = [m for m in model.modules() if type(m) is FusedLoraLinear]
    for module in fused:
        module.__class__ = lora.Linear
    return len(fused)

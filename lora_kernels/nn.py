"""`FusedLoRALinear`: nn.Linear with a low-rank update, frozen base and trained adapter, on `lora_linear`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .autograd import lora_linear, with_lora_bias
from .checks import check_number, check_tensor
from .dispatch import without_autocast
from .dora import dora_linear, gain, weight_norm
from .merging import Mergeable, check_unmerged
from .problem import MAX_RANK, UnsupportedError, sharded
from .projections import Projection
from .shared_input import SharedInput


class AdaptedLinear(Mergeable, nn.Module):
    """What layers of one adapter and of many have in common: an nn.Linear's parameters, frozen, in whose place `over.Over` has a layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    in_features: int
    out_features: int
    lora_dropout: float

    def _take(self, base: nn.Linear, lora_dropout: float, adapter_dtype) -> torch.Tensor:
        """Take over ``base``, its mode too, and the dropout, all checked; returns an empty tensor as the adapters are to be."""
        check_dropout(lora_dropout)
        if adapter_dtype not in (None, base.weight.dtype, torch.float32):
            raise TypeError(f"adapter_dtype: wanted the base's dtype {base.weight.dtype} or float32, got {adapter_dtype}")
        self.in_features, self.out_features, self.lora_dropout = base.in_features, base.out_features, float(lora_dropout)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.train(base.training)
        return base.weight.new_empty(0, dtype=adapter_dtype or base.weight.dtype)

    def _operands(self, x: torch.Tensor) -> tuple:
        """x, weight, bias and base product of a call."""
        return x, *held(self, "weight", "bias"), None


class FusedLoRALinear(AdaptedLinear):
    """``y = x W^T + scaling * (dropout(x) A^T) B^T + bias`` with W and bias frozen, A and B trained.

    ``weight`` and ``bias`` have nn.Linear's names and layout, so an nn.Linear checkpoint loads with only ``lora_A`` and ``lora_B`` missing.

    Args:
        in_features, out_features: K and N.
        bias: Whether the base has a bias.
        r: Rank of the adapter, 1 to 512.
        lora_alpha: ``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (arXiv:2312.03732).
        lora_dropout: Dropout on the adapter's input, in [0, 1); the base sees the undropped x.
        init_lora_weights: True: A kaiming-uniform with a = sqrt(5), B zero, as in PEFT, so that training starts from the base;
            False: B like A, for tests.
        lora_bias: Whether the adapter has a bias, ``scaling * lora_bias``, zeros at first (PEFT's ``lora_B.bias``).
        use_dora: Whether a trained magnitude scales each output's direction (`dora_linear`), at first the norm of ``W + scaling B A``.
        device, dtype: Of the base, as in nn.Linear.
        adapter_dtype: Of A and B: the base's dtype (None) or float32.
    Shape:
        x ``[..., in_features]`` -> ``[..., out_features]``.
    Attributes:
        scaling: The float that multiplies the low-rank term; may be set between calls. Not in a state dict, as in PEFT.
        enabled: False: the base alone answers. merged: Whether the update sits in ``weight``.
    Raises:
        UnsupportedError: a rank outside 1 to 512; lora_bias with use_dora. ValueError: lora_dropout outside [0, 1). TypeError: r is no int,
        or another adapter_dtype.
    """

    lora_bias: torch.Tensor | None
    lora_magnitude: torch.Tensor | None
    _shares: SharedInput | None = None  # of this layer and others

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        lora_bias: bool = False,
        use_dora: bool = False,
        device=None,
        dtype=None,
        adapter_dtype=None,
    ):
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(base, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, use_dora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        lora_bias: bool = False,
        use_dora: bool = False,
        adapter_dtype=None,
    ) -> FusedLoRALinear:
        """A layer that shares ``linear``'s parameters: nothing is copied, and they are frozen (``requires_grad=False``).

        Args:
            linear: An nn.Linear. The others: as for the class.
        Raises:
            TypeError: ``linear`` is not exactly an nn.Linear, whose subclasses (quantised ones among them) store other weights; or its
            weight is no parameter but computed at each call, as pruning has it. The errors of the class.
        """
        check_linear(linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, use_dora, adapter_dtype)
        return self

    def _adopt(
        self, base: nn.Linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, use_dora, adapter_dtype
    ) -> None:  # fmt: skip
        check_rank("r", r)
        if lora_bias and use_dora:
            raise UnsupportedError("lora_bias: wanted False with use_dora=True, as in PEFT, got True")
        like = self._take(base, lora_dropout, adapter_dtype)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        self.enabled = True
        self.lora_A = nn.Parameter(like.new_empty(r, self.in_features))
        self.lora_B = nn.Parameter(like.new_empty(self.out_features, r))
        vector = self.lora_B.new_empty(self.out_features)
        self.register_parameter("lora_bias", nn.Parameter(vector.clone()) if lora_bias else None)
        self.register_parameter("lora_magnitude", nn.Parameter(vector.clone()) if use_dora else None)
        self.reset_adapter(init_lora_weights)

    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Initialise the adapter again; see ``init_lora_weights``. RuntimeError: it is merged. UnsupportedError: shards on a CPU.

        ValueError: a factor is parametrized, or pruned.
        """
        check_unmerged("reset_adapter", self)
        check_written(self)
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """DoRA's magnitude as the norm of ``W + scaling B A``: the layer then computes what it would without DoRA.

        ValueError: it is parametrized, or pruned.
        """
        check_written(self, names=("lora_magnitude",))
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(weight_norm(self.base_weight(), self.lora_A, self.lora_B, self.scaling))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.enabled:
            return F.linear(x, *((self.weight, self.whole_bias()) if self.enabled else (self.base_weight(), self.bias)))
        dropout = dict(scale=self.scaling, dropout_p=self.lora_dropout, training=self.training)
        A, B, lora_bias, magnitude = held(self, "lora_A", "lora_B", "lora_bias", "lora_magnitude")
        if magnitude is not None:
            return dora_linear(x, self.weight, A, B, magnitude, self.bias, **dropout)
        if self._shares is not None and (own := self.projection(x)) is not None:
            return self._shares.call(self, x, own)
        x, weight, bias, base = self._operands(x)
        return lora_linear(x, weight, A, B, bias, base=base, lora_bias=lora_bias, **dropout)

    def projection(self, x: torch.Tensor) -> Projection | None:
        """The layer as one of several of x, or None where it is computed alone."""
        if self.merged or not self.enabled or self.weight is None or self.lora_magnitude is not None or self.lora_bias is not None:
            return None
        return Projection(self.weight, self.lora_A, self.lora_B, self.bias, self.scaling, self.lora_dropout if self.training else 0.0)

    def delta_weight(self) -> torch.Tensor:
        """``scaling * B A`` as float32 ``[out_features, in_features]`` (float64 for a float64 base)."""
        wide = torch.promote_types(self.lora_A.dtype if self.weight is None else self.weight.dtype, torch.float32)
        A, B = self.lora_A.to(wide), self.lora_B.to(wide)
        with without_autocast(A.device):
            return torch.addmm(B.new_zeros(()), B, A, beta=0, alpha=self.scaling)

    def merge(self, keep: str = "cpu") -> None:
        """Write ``W + scaling B A`` (with DoRA ``m / norm`` of it) into the weight: from here on the layer costs what nn.Linear costs.

        Args:
            keep: Where the base weight waits for `unmerge`, which gives it back bit for bit: "cpu", or "device" for speed.
        Raises:
            RuntimeError: the layer is merged. ValueError: the weight is no parameter of the layer alone, the result not finite, or
            another ``keep``; nothing has changed.
        """
        check_unmerged("merge", self)
        self._write(keep, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def swap(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float | None = None) -> None:
        """Put another adapter of the same rank in place of this one, merged or not: in one pass over the weight if merged. lora_bias stays.

        Args:
            lora_A: ``[r, in_features]``. lora_B: ``[out_features, r]``. Any device; the layer's adapter dtype.
            scaling: None: the layer's own.
        Raises:
            ValueError, TypeError: shapes or dtypes, a scaling or merged weight that is not finite, a factor that is parametrized, or
            pruned, or on the meta device; nothing has changed. UnsupportedError: DoRA, or shards.
        """
        if sharded(self.lora_A):
            raise UnsupportedError(f"swap: wanted a layer that is whole on this rank, got shards ({self.lora_A.placements})")
        if self.lora_magnitude is not None:
            raise UnsupportedError("swap: wanted a layer without DoRA, whose magnitude belongs to the adapter, got use_dora=True")
        check_written(self)
        check_storage("swap", self)
        for name, own, new in (("lora_A", self.lora_A, lora_A), ("lora_B", self.lora_B, lora_B)):
            check_tensor(name, new, f"a tensor {list(own.shape)}")
            if new.shape != own.shape:
                raise ValueError(f"{name}: wanted shape {list(own.shape)}, got {list(new.shape)}")
            if new.dtype != own.dtype:
                raise TypeError(f"{name}: wanted the adapter's dtype {own.dtype}, got {new.dtype}")
        scaling = self.scaling if scaling is None else float(scaling)
        check_number("scaling", scaling)
        lora_A, lora_B = lora_A.to(self.lora_A.device), lora_B.to(self.lora_B.device)
        if self._base_weight is not None:
            keep = "cpu" if self._base_weight.device.type == "cpu" else "device"
            try:
                self._write(keep, lora_A, lora_B, scaling)
            except ValueError:
                self._write(keep, self.lora_A, self.lora_B, self.scaling)
                raise
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        self.scaling = scaling

    def _write(self, keep: str, lora_A, lora_B, scaling: float) -> None:
        row_scale = None
        if self.lora_magnitude is not None:
            row_scale = gain(self.lora_magnitude.detach(), weight_norm(self.base_weight(), lora_A, lora_B, scaling))
        self._merge(keep, lora_A, lora_B, scaling, row_scale)

    def whole_bias(self) -> torch.Tensor | None:
        """What a merged layer adds: the base's bias and the adapter's."""
        if self.lora_bias is None:
            return self.bias
        return with_lora_bias(self.bias, self.lora_bias, self.scaling, self.weight, self.lora_A, None)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.bias is not None}", f"r={self.r}"]
        parts += [f"scaling={self.scaling:g}", f"lora_dropout={self.lora_dropout:g}"]
        parts += ["lora_bias=True"] if self.lora_bias is not None else []
        parts += ["use_dora=True"] if self.lora_magnitude is not None else []
        parts += ["merged=True"] if self.merged else []
        parts += [] if self.enabled else ["enabled=False"]
        return ", ".join(parts)


def held(layer: nn.Module, *names: str) -> list:
    """The layer's attributes of these names, parameters and buffers most of them, which nn.Module takes 0.7 us each to find."""
    parameters, buffers = layer._parameters, layer._buffers
    return [parameters[n] if n in parameters else buffers[n] if n in buffers else getattr(layer, n) for n in names]


def check_storage(name: str, layer: Any) -> None:
    """Refuse a layer on the meta device, where a model waits for its weights or offload hooks leave them."""
    if layer.lora_A.is_meta:
        raise ValueError(f"{name}: wanted a layer with storage, got one on the meta device; load it or call to_empty first")


def check_written(*layers: Any, names: tuple[str, ...] = ("lora_A", "lora_B", "lora_bias", "lora_magnitude")) -> None:
    """Refuse layers with a factor that is computed anew at each use: what is written to it is gone then."""
    for layer in layers:
        for name in names:
            if name not in layer._parameters and name not in layer._buffers and getattr(layer, name, None) is not None:
                given = "one that is computed at each call (parametrized, or pruned)"
                raise ValueError(f"{name}: wanted a parameter to write an adapter to, got {given}")


def check_linear(linear) -> None:
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear: wanted an nn.Linear, got {type(linear).__name__}; LoRAOver and MultiLoRAOver go over any layer")
    if not isinstance(linear.weight, nn.Parameter):
        raise TypeError("linear: wanted an nn.Linear with a weight of its own, got one that computes it (pruned, or normalised)")


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An nn.Linear with these parameters, which are not copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear.train(training)


def check_rank(name: str, r) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name}: wanted an int, got {type(r).__name__}")
    if not 1 <= r <= MAX_RANK:
        raise UnsupportedError(f"{name}: wanted a rank from 1 to {MAX_RANK}, got {r}")


def check_dropout(lora_dropout: float) -> None:
    check_number("lora_dropout", lora_dropout)
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: wanted a probability in [0, 1), got {lora_dropout}")


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """``lora_alpha / r``, with rsLoRA ``/ sqrt(r)``. TypeError, ValueError: lora_alpha is no number, or not a finite one."""
    check_number("lora_alpha", lora_alpha)
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def init_adapter(A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool) -> None:
    """Fill A and B in place; see `FusedLoRALinear`'s ``init_lora_weights``. Shards: on a GPU alone."""
    if sharded(A) and A.device.type == "cpu":  # where ranks that are seeded alike draw the same rows
        raise UnsupportedError(
            "reset_adapter: wanted a layer on a GPU, where DTensor keeps random numbers in step, got shards on cpu; "
            "call it before parallelize_module or fully_shard"
        )
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init_lora_weights:
        nn.init.zeros_(B)
    else:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))


def has_hooks(module: nn.Module) -> bool:
    """Whether any of torch's hooks is called with the module, forward or backward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: torch's hooks, or a forward of its own as accelerate gives it.

    Accelerate, taking its hook away, leaves the class's forward there.
    """
    own = module.__dict__.get("forward")
    return has_hooks(module) or (own is not None and getattr(own, "__func__", None) is not type(module).forward)


def hooks_of_all() -> bool:
    """Whether there are hooks for every module; torch has no public name for the question."""
    return getattr(nn.modules.module, "_has_any_global_hook", bool)()


def sharding(module: nn.Module) -> str:
    """The class by which torch's FSDP has a module, or "". It knows the parameters that were there before, and makes them whole in passing:
    none that comes later is gathered or reduced, and what is written to the whole ones is lost."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in ("FSDPModule", "FullyShardedDataParallel")), "")

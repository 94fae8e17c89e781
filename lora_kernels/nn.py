"""`FusedLoRALinear`: nn.Linear with a low-rank update, frozen base and trained adapter, on `lora_linear`."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .autograd import lora_linear
from .problem import MAX_RANK, UnsupportedError


class FusedLoRALinear(nn.Module):
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
        device, dtype: Of the base, as in nn.Linear.
        adapter_dtype: Of A and B: the base's dtype (None) or float32.
    Shape:
        x ``[..., in_features]`` -> ``[..., out_features]``.
    Attributes:
        scaling: The float that multiplies the low-rank term; may be set between calls.
        enabled: False: the base alone answers. merged: Whether the update sits in ``weight``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    in_features: int
    out_features: int
    lora_dropout: float

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
        device=None,
        dtype=None,
        adapter_dtype=None,
    ):
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(base, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)

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
        adapter_dtype=None,
    ) -> FusedLoRALinear:
        """A layer that shares ``linear``'s parameters: nothing is copied, and they are frozen (``requires_grad=False``).

        Args:
            linear: An nn.Linear. The others: as for the class.
        Raises:
            TypeError: ``linear`` is not exactly an nn.Linear, whose subclasses (quantised ones among them) store other weights.
        """
        check_linear(linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        self.train(linear.training)
        return self

    def _adopt(self, base: nn.Linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype) -> None:
        check_rank("r", r)
        dtype = adopt(self, base, lora_dropout, adapter_dtype)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        self.enabled = True
        self.lora_A = nn.Parameter(base.weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(base.weight.new_empty(self.out_features, r, dtype=dtype))
        self._base_weight: torch.Tensor | None = None
        self.reset_adapter(init_lora_weights)

    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Initialise A and B again; see ``init_lora_weights``."""
        if self.merged:
            raise RuntimeError("reset_adapter: wanted an unmerged layer, got a merged one; call unmerge() first")
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.enabled:
            return F.linear(x, self.weight if self.enabled else self.base_weight(), self.bias)
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scale=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    @property
    def merged(self) -> bool:
        return self._base_weight is not None

    def delta_weight(self) -> torch.Tensor:
        """``scaling * B A`` as float32 ``[out_features, in_features]`` (float64 for a float64 base)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.addmm(self.lora_B.new_zeros((), dtype=wide), self.lora_B.to(wide), self.lora_A.to(wide), beta=0, alpha=self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Add ``scaling * B A`` to the weight, rounded once: from here on the layer costs exactly what nn.Linear costs.

        The base weight is kept on the CPU, so that `unmerge` gives it back bit for bit.
        """
        if self.merged:
            raise RuntimeError("merge: wanted an unmerged layer, got a merged one; call unmerge() first")
        delta = self.delta_weight()
        finite = torch.isfinite(delta).all()
        if not (finite.full_tensor() if hasattr(finite, "full_tensor") else finite):  # a sharded layer merges on all ranks or on none
            raise ValueError("merge: wanted finite adapters, got NaN or Inf in scaling * B A; the weight is unchanged")
        self._base_weight = self.weight.detach().to("cpu", copy=True)
        self.weight.copy_(delta.add_(self.weight))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight back, bit for bit."""
        if self._base_weight is None:
            raise RuntimeError("unmerge: wanted a merged layer, got an unmerged one")
        self.weight.copy_(self._base_weight)
        self._base_weight = None

    def base_weight(self) -> torch.Tensor:
        """The base weight, merged or not: a copy from the CPU while merged."""
        return self.weight if self._base_weight is None else self._base_weight.to(self.weight.device)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a checkpoint holds base and adapter apart, or loading it would apply the adapter twice
            destination[prefix + "weight"] = self.base_weight()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if self.merged:
            error_msgs.append(
                f"{prefix[:-1] or 'the layer'}: wanted an unmerged layer to load into, got a merged one; call unmerge() first"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.bias is not None}", f"r={self.r}"]
        parts += [f"scaling={self.scaling:g}", f"lora_dropout={self.lora_dropout:g}"]
        parts += ["merged=True"] if self.merged else []
        parts += [] if self.enabled else ["enabled=False"]
        return ", ".join(parts)


def check_linear(linear) -> None:
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear: wanted an nn.Linear, got {type(linear).__name__}")


def check_rank(name: str, r) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name}: wanted an int, got {type(r).__name__}")
    if not 1 <= r <= MAX_RANK:
        raise UnsupportedError(f"{name}: wanted a rank from 1 to {MAX_RANK}, got {r}")


def adopt(layer, base: nn.Linear, lora_dropout: float, adapter_dtype) -> torch.dtype:
    """Give a layer the parameters of ``base``, frozen, and its dropout, all checked; returns the adapters' dtype."""
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: wanted a probability in [0, 1), got {lora_dropout}")
    if adapter_dtype not in (None, base.weight.dtype, torch.float32):
        raise TypeError(f"adapter_dtype: wanted the base's dtype {base.weight.dtype} or float32, got {adapter_dtype}")
    layer.in_features, layer.out_features, layer.lora_dropout = base.in_features, base.out_features, float(lora_dropout)
    layer.weight = base.weight
    layer.register_parameter("bias", base.bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return adapter_dtype or base.weight.dtype


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def init_adapter(A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool) -> None:
    """Fill A and B in place; see `FusedLoRALinear`'s ``init_lora_weights``."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init_lora_weights:
        nn.init.zeros_(B)
    else:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))

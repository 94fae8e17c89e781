"""`PackedLoRALinear`: many adapters over one weight that packs several layers of one x, as serving engines keep q, k and v.

    y = [y_1, y_2, ...]      y_i[t] = x[t] W_i^T + scaling[e] * (dropout(x[t]) A_i[e]^T) B_i[e]^T + bias_i      e = segments.ids[t]

Two launches then serve all layers, one or more for each of them otherwise, and W is one product for the whole chip to share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import slots
from .multi import MultiLoRALinear, check_slot_scale
from .nn import check_linear, init_adapter
from .over import Over, sizes
from .packed import check_widths
from .slots import Pair


class PackedLoRALinear(MultiLoRALinear):
    """`MultiLoRALinear` over packed layers: each adapter has an A and a B for each of them.

    Args:
        in_features: K.
        widths: The out_features of each layer, N_1, N_2, ...
        names: The layers' names in adapter files, in the place of this layer's own: ``("q_proj", "k_proj", "v_proj")``. None: no files.
        The others: as in `MultiLoRALinear`, ``num_adapters`` among them; r times the layers is at most 512.
    Shape:
        x ``[..., K]`` and a `Segments` -> ``[..., N_1 + N_2 + ...]``: ``y.split(layer.widths, -1)`` are views, one a layer.
    Attributes:
        weight, bias: ``[sum N, K]`` and ``[sum N]``, the layers' in turn.
        lora_A: The stack ``[E, L r, K]``, each layer's r rows in turn; of one adapter ``[L, r, K]``. lora_B: ``[E, sum N, r]``.
    Raises:
        The errors of `MultiLoRALinear`. ValueError, TypeError: widths that are no ints from 1, or not out_features in all; names that are
        not one for each layer.
    """

    names: tuple[str, ...] | None = None

    def __init__(self, in_features: int, widths: Sequence[int], bias: bool = True, *, device=None, dtype=None, **adapters):
        linear = nn.Linear(in_features, _known(widths), bias, device=device, dtype=dtype)
        nn.Module.__init__(self)
        self._pack(linear, widths, **adapters)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, widths: Sequence[int], **adapters) -> PackedLoRALinear:  # type: ignore[override]
        """A layer that shares the parameters of a packed ``linear``, whose out_features are the sum of ``widths``; nothing is copied."""
        check_linear(linear)
        check_widths(widths, linear.out_features)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._pack(linear, widths, **adapters)
        return self

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear], **adapters) -> PackedLoRALinear:
        """One layer for several of one x. Their weights and biases are copied into one tensor, of which they become views: no memory more.

        So what `merge` writes shows in them, too. Copies (``deepcopy``) and what ``.to`` moves or casts have weights of their own again.

        Args:
            linears: nn.Linear layers of the same in_features, dtype, device and mode, with a bias each or none of them.
            The others: as for the class.
        Raises:
            ValueError: they differ in these, or there are none. TypeError: as `FusedLoRALinear.from_linear`. The errors of the class.
        """
        packed = _pack_parameters(linears)
        self = cls.from_linear(packed, widths=[linear.out_features for linear in linears], **adapters)
        with torch.no_grad():
            for name, whole in packed.named_parameters():
                for linear, part in zip(linears, whole.split(self.widths), strict=True):
                    own = getattr(linear, name)
                    own.requires_grad_(False)
                    own.data = part.detach()
        return self

    def _pack(
        self, base: Any, widths: Sequence[int], *, num_adapters: int, r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False,
        init_lora_weights=True, adapter_dtype=None, names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.widths = tuple(widths)
        if names is not None:
            listed = isinstance(names, (tuple, list)) and len(set(names)) == len(names) == len(widths)
            if not listed or not all(isinstance(name, str) and name and "." not in name for name in names):
                raise ValueError(f"names: wanted a name without dots for each of {len(widths)} layers, or None, got {names!r}")
            self.names = tuple(names)
        self._adopt(base, num_adapters, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)

    def _slot(self, i: int) -> Pair:
        """A as ``[L, r, K]``, one for each layer."""
        A, B = super()._slot(i)
        return A.view(len(self.widths), self.r, self.in_features), B

    def _parts(self, i: int) -> list[Pair]:
        A, B = self._slot(i)
        return list(zip(A, B.split(self.widths), strict=True))

    @torch.no_grad()
    def load_adapter(self, i: int, A, B, scale: float | None = None) -> None:  # type: ignore[override]
        """Put an adapter into slot i, in place; other slots serve on.

        Args:
            i: The slot, from 0.
            A: For each layer ``[r, K]``, or None where the adapter leaves that layer as it is; or all as one tensor ``[L, r, K]``.
            B: For each layer ``[N_i, r]`` or None; or all as one tensor ``[sum N, r]``. Ranks may differ, the largest is the adapter's.
            scale: As in `MultiLoRALinear.load_adapter`; of all layers.
        Raises:
            ValueError, TypeError: with nothing changed.
        """
        self._check_slot(i)
        As, Bs = _each_layer("A", A, self.widths, None), _each_layer("B", B, self.widths, list(self.widths))
        if [a is None for a in As] != [b is None for b in Bs]:
            raise ValueError(f"B: wanted one where A has one, for {_where(As)}, got {_where(Bs)}")
        given = [n for n, a in enumerate(As) if a is not None]
        if not given:
            raise ValueError("A: wanted one for at least one layer, got None for each")
        for n in given:
            self._check_pair(As[n], Bs[n], self.widths[n], f"[{n}]")
        check_slot_scale(scale)
        slots.put(i, [(self, [None if a is None else self._copied(a, b) for a, b in zip(As, Bs, strict=True)], scale)])

    def _init(self, i: int, init_lora_weights: bool) -> None:
        A, B = self.adapter(i)
        for its_A, its_B in zip(A, B.split(self.widths), strict=True):
            init_adapter(its_A, its_B, init_lora_weights)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, widths={self.widths}"


class PackedPart:
    """Layer n of a packed one, as adapter files know it: what it has of its own, and for the rest the packed layer's."""

    widths = ()

    def __init__(self, layer: PackedLoRALinear, n: int):
        self.layer, self.n, self.out_features = layer, n, layer.widths[n]

    def __getattr__(self, name: str):
        if name.startswith("__"):  # copy and pickle ask a part that has no layer yet
            raise AttributeError(name)
        return getattr(self.layer, name)

    def adapter(self, i: int) -> Pair:
        """As `MultiLoRALinear.adapter`."""
        A, B = self.layer.adapter(i)
        return A[self.n], B.split(self.layer.widths)[self.n]


class PackedLoRAOver(Over, PackedLoRALinear):
    """`PackedLoRALinear` over any layer that makes the packed outputs, a quantised one, say.

    Args:
        base_layer: A module that maps ``[..., K]`` to ``[..., sum of widths]``, floats to floats; its parameters are frozen.
        widths, num_adapters, r, lora_alpha: As in `PackedLoRALinear`. The others: as in `MultiLoRAOver`.
    """

    def __init__(
        self, base_layer: nn.Module, *, widths: Sequence[int], in_features: int | None = None, adapter_dtype=torch.float32, **adapters
    ):  # fmt: skip
        nn.Module.__init__(self)
        total = _known(widths)
        self._go_over(base_layer, in_features, total if sizes(base_layer) is None else None, adapter_dtype)
        check_widths(widths, self.out_features)
        self._pack(base_layer, widths, adapter_dtype=adapter_dtype, **adapters)


def _known(widths) -> int:
    """The sum of widths, checked."""
    total = sum(widths) if isinstance(widths, (tuple, list)) and all(isinstance(width, int) for width in widths) else 0
    check_widths(widths, total)
    return total


def _pack_parameters(linears: Sequence[nn.Linear]) -> nn.Linear:
    """A linear layer with the parameters of several, one after another."""
    if not isinstance(linears, (tuple, list)):
        raise TypeError(f"linears: wanted a list of nn.Linear layers, got {type(linears).__name__}")
    if not linears:
        raise ValueError("linears: wanted at least one, got none")
    for linear in linears:
        check_linear(linear)
    one = linears[0]
    for n, linear in enumerate(linears):
        for what, own, wanted in (
            ("in_features", linear.in_features, one.in_features),
            ("dtype", linear.weight.dtype, one.weight.dtype),
            ("device", linear.weight.device, one.weight.device),
            ("bias", linear.bias is not None, one.bias is not None),
            ("training", linear.training, one.training),
        ):
            if own != wanted:
                raise ValueError(f"linears[{n}]: wanted {what} {wanted} as linears[0] has, got {own}")
    with torch.no_grad():
        packed = nn.Linear(one.in_features, sum(linear.out_features for linear in linears), False, device="meta")
        packed.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        if one.bias is not None:
            packed.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return packed.train(one.training)


def _each_layer(name: str, value, widths: tuple[int, ...], sizes: list[int] | None) -> list:
    """One value for each layer; a tensor is cut into parts of these sizes, or along its first axis."""
    if isinstance(value, torch.Tensor):
        wanted = len(widths) if sizes is None else sum(sizes)
        if not value.dim() or value.shape[0] != wanted:
            raise ValueError(f"{name}: wanted a tensor [{wanted}, ...], or one for each of {len(widths)} layers, got {list(value.shape)}")
        return list(value if sizes is None else value.split(sizes))
    if not isinstance(value, (tuple, list)) or len(value) != len(widths):
        given = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
        raise ValueError(f"{name}: wanted one for each of {len(widths)} layers, a tensor or None, got {given}")
    return list(value)


def _where(values: list) -> str:
    """Which layers have a value, in words."""
    return f"layers {[n for n, value in enumerate(values) if value is not None]}"

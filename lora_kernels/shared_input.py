"""Layers that a model calls one after the other with one x, as q, k and v: the first call computes all, the others find theirs made.

    share_inputs(model)      after apply_lora(model, config), or after PEFT's layers were fused;   share_inputs(model, ()) undoes it

No model's code changes. A layer finds its result only if it is called with the very tensor that the first was called with, unchanged,
and if nothing else that the result depends on has changed; otherwise it is computed as if it stood alone. `projections` says what it saves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_compiling

from .autograd import lora_linear
from .problem import autocasts
from .projections import Projection, lora_linears, seen

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
)


class _Made(NamedTuple):
    """What one call made for the other layers of its group: of which x, in which state, and each layer's ``(stamp, y)``."""

    x: torch.Tensor
    state: tuple
    ys: dict[nn.Module, tuple[tuple, torch.Tensor]]


class SharedInput:
    """A group of layers of one x. Each has ``projection(x)``: what it would compute alone, or None where it takes no part."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.layers = layers
        self.idle = 0  # calls in a row whose results were not all taken
        self.made: _Made | None = None

    def __getstate__(self) -> dict:  # a copy, or a file, has nothing of a call
        return {**self.__dict__, "made": None}

    def call(self, layer: nn.Module, x: torch.Tensor, own: Projection) -> torch.Tensor:
        """``y`` of one of the layers, for which ``own`` is what it would compute alone."""
        # A tensor of inference mode does not tell whether it was written to.
        if is_compiling() or self.idle > 1 or seen(x, [own]) or x.is_inference():
            return _alone(x, own)
        made, self.made = self.made, None
        state = _state(x)
        if made is not None and layer in made.ys:
            stamp, y = made.ys.pop(layer)
            if made.x is x and made.state == state and stamp == _stamp(own):
                if made.ys:
                    self.made = made
                else:
                    self.idle = 0
                return y
        if made is not None:
            self.idle += 1
            if self.idle > 1:
                names = ", ".join(self.layers)
                warnings.warn(f"share_inputs: {names} were not called with one x, twice in a row; each is computed alone now", stacklevel=4)
                return _alone(x, own)
        if not any(layer is each for each in self.layers.values()):  # a replica of one of them
            return _alone(x, own)
        others = {each: one for each in self.layers.values() if each is not layer and (one := _beside(own, each, x)) is not None}
        if not others:
            return _alone(x, own)
        y, *ys = lora_linears(x, [own, *others.values()], training=True)
        self.made = _Made(x, state, {each: (_stamp(one), y) for (each, one), y in zip(others.items(), ys, strict=True)})
        return y


def _alone(x: torch.Tensor, own: Projection) -> torch.Tensor:
    return lora_linear(x, *own[:4], scale=own.scale, dropout_p=own.dropout_p, training=True)


def _beside(own: Projection, layer: Any, x: torch.Tensor) -> Projection | None:
    """A layer's projection of x, if it fits beside ``own``."""
    one = layer.projection(x)
    if one is None or seen(x, [one]) or any(getattr(one.weight, what) != getattr(own.weight, what) for what in ("device", "dtype")):
        return None
    return one if one.weight.shape[1] == own.weight.shape[1] else None


def _state(x: torch.Tensor) -> tuple:
    """What a result depends on besides x and the layer."""
    autocast = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
    return x._version, torch.is_grad_enabled(), autocast


def _stamp(one: Projection) -> tuple:
    """What tells whether a projection is the same as before: its tensors' places and versions, its numbers."""
    return tuple((t.data_ptr(), t._version, t.shape, t.stride(), t.requires_grad) if isinstance(t, torch.Tensor) else t for t in one)


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]] = GROUPS) -> list[tuple[str, ...]]:
    """Have layers that are given one x compute together: `FusedLoRALinear`, and PEFT's layers that were fused.

    Args:
        model: Changed in place. Call it after apply_lora or fuse, and again after layers were added.
        groups: Names of sibling layers that their parent calls with one x. Those which a model does not have, or which have no adapter,
            are left out; of fewer than two nothing is shared. Empty: every layer is computed alone again.
    Returns:
        The groups, each layer by its whole name.
    Raises:
        TypeError: ``groups`` is not one of sequences of names. ValueError: a name is in a group twice.

    Layers that turn out not to be called with one x are computed alone from their third call on, with a warning. Under torch.compile, in
    inference mode, with segments, DoRA, several adapters at once or over a quantised base each layer is computed alone, too.
    """
    groups = [tuple(_names(group)) for group in groups]
    for module in model.modules():
        if "_shares" in module.__dict__:
            del module.__dict__["_shares"]
    formed = []
    for path, parent in model.named_modules():
        for group in groups:
            layers: dict[str, Any] = {name: child for name in group if hasattr(type(child := getattr(parent, name, None)), "_shares")}
            if len(layers) < 2:
                continue
            shared = SharedInput(layers)
            for layer in layers.values():
                layer._shares = shared
            formed.append(tuple(f"{path}.{name}" if path else name for name in layers))
    return formed


def _names(group: Sequence[str]) -> Sequence[str]:
    if isinstance(group, str) or not all(isinstance(name, str) for name in group):
        raise TypeError(f"groups: wanted sequences of names such as ('q_proj', 'k_proj', 'v_proj'), got {group!r}")
    if len(set(group)) < len(group):
        raise ValueError(f"groups: wanted each name once in a group, got {tuple(group)}")
    return group

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

from .problem import autocasts
from .projections import Projection, lora_linears, seen
from .reference import as_seed
from .streams import kept_for

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
    ("add_q_proj", "add_k_proj", "add_v_proj"),
)
FEW = 64  # tokens


class _Result(NamedTuple):
    """What was made for a layer, of which its ``stamp`` tells whether it is still right.

    drawn: Where it drops, the states of torch's generator before and after its seed.
    """

    stamp: tuple
    y: torch.Tensor
    drawn: tuple[torch.Tensor, torch.Tensor] | None


class _Made(NamedTuple):
    """What one call made for the other layers of its group: of which x, and in which state."""

    x: torch.Tensor
    state: tuple
    results: dict[nn.Module, _Result]


class SharedInput:
    """A group of layers of one x. Each has ``projection(x)``: what it would compute alone, or None where it takes no part."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.layers = layers
        self.idle = 0  # calls in a row whose results were not all taken
        self.ended: set[nn.Module] = set()  # layers that were computed alone for that
        self.made: _Made | None = None

    def __getstate__(self) -> dict:  # a copy, or a file, has nothing of a call
        return {**self.__dict__, "made": None}

    def call(self, layer: nn.Module, x: torch.Tensor, own: Projection) -> torch.Tensor:
        """``y`` of one of the layers, for which ``own`` is what it would compute alone."""
        # A tensor of inference mode does not tell whether it was written to. Without a dX few tokens have nothing to share.
        few = not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]
        if seen(x, [own]) or few or x.is_inference() or _captured(x):
            return own.alone(x, training=True)
        # Within a backward pass a checkpoint recomputes: what was computed together before is so now, for it counts the tensors saved.
        recomputed = torch._C._current_graph_task_id() != -1
        if layer in self.ended if recomputed else self._ends(layer):
            return own.alone(x, training=True)
        made, self.made = self.made, None
        state = _state(x)
        if made is not None and layer in made.results:
            result = made.results.pop(layer)
            if made.x is x and made.state == state and result.stamp == _stamp(own) and _as_drawn(x, result.drawn):
                if made.results:
                    self.made = made
                else:
                    self.idle = 0
                return result.y
        if made is not None and not recomputed:
            self.idle += 1
            if self._ends(layer):
                names = ", ".join(self.layers)
                warnings.warn(f"share_inputs: {names} were not called with one x, twice in a row; each is computed alone now", stacklevel=4)
                return own.alone(x, training=True)
        members = self.layers.values()
        if layer not in members:  # a replica of one of them
            return own.alone(x, training=True)
        others = {each: one for each in members if each is not layer and (one := _beside(own, each, x)) is not None}
        if not others:
            return own.alone(x, training=True)
        parts = [own, *others.values()]
        stamps = [_stamp(one) for one in others.values()]
        seeds, drawn = _draw(x, parts)
        y, *ys = lora_linears(x, [one._replace(seed=seed) for one, seed in zip(parts, seeds, strict=True)], training=True)
        self.made = _Made(x, state, dict(zip(others, map(_Result, stamps, ys, drawn[1:]), strict=True)))
        return y

    def _ends(self, layer: nn.Module) -> bool:
        """Whether the group has ended; what is recomputed of this layer's call will be told the same."""
        if self.idle > 1:
            self.ended.add(layer)
        return self.idle > 1


def _beside(own: Projection, layer: Any, x: torch.Tensor) -> Projection | None:
    """A layer's projection of x, if it fits beside ``own``."""
    one = layer.projection(x)
    if one is None or seen(x, [one]) or one.lora_A.shape[-1] != own.lora_A.shape[-1]:
        return None
    alike = all(getattr(one.weight, what) == getattr(own.weight, what) for what in ("device", "dtype"))
    return one if alike else None


def _generator(x: torch.Tensor) -> torch.Generator:
    return torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator


def _captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured, inside which the generator's state is not known."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _draw(x: torch.Tensor, parts: Sequence[Projection]) -> tuple[list, list]:
    """A seed for each that drops, and the generator's states before and after it, which is then left as after the first alone.

    The others' seeds are drawn for good when their results are taken, so that torch's generator goes as if each layer stood alone: a
    checkpoint recomputes the same masks, whether or not its layers compute together then.
    """
    if not any(one.dropout_p for one in parts):
        return [None] * len(parts), [None] * len(parts)
    generator = _generator(x)
    states, seeds, drawn = [generator.get_state()], [], []
    for one in parts:
        seeds.append(as_seed(None, x.device) if one.dropout_p else None)
        states.append(generator.get_state() if one.dropout_p else states[-1])
        drawn.append((states[-2], states[-1]) if one.dropout_p else None)
    generator.set_state(states[1])
    return seeds, drawn


def _as_drawn(x: torch.Tensor, drawn: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
    """Whether the generator stands where this layer's seed was drawn; if so it goes on to behind it."""
    if drawn is None:
        return True
    before, after = drawn
    generator = _generator(x)
    if not torch.equal(generator.get_state(), before):
        return False
    generator.set_state(after)
    return True


def _state(x: torch.Tensor) -> tuple:
    """What a result depends on besides x and the layer. The stream: another one does not wait for what this one makes."""
    autocast = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
    return x._version, x.requires_grad, torch.is_grad_enabled(), autocast, kept_for(x.device)


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
    inference mode, with segments, DoRA, several adapters at once or beside a quantised base's product each layer is computed alone, too.
    """
    groups = [tuple(_names(group)) for group in groups]
    for module in model.modules():
        if "_shares" in module.__dict__:
            del module.__dict__["_shares"]
    formed = []
    for path, parent in model.named_modules():
        for group in groups:
            layers: dict[str, Any] = {name: child for name in group if hasattr(type(child := parent._modules.get(name)), "_shares")}
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

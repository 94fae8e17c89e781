"""Which adapter each token of a model's calls takes: `use_adapters` by sequence, `use_segments` by token.

with use_adapters(model, [2, -1, 0]): model.generate(**batch)      three sequences, any number of tokens each
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from .multi import MultiLoRALinear
from .problem import UnsupportedError
from .segments import CPU, Segments, as_ints, plan_of
from .streams import kept_for

Layers = dict[str, MultiLoRALinear]
_CHANGING = threading.Lock()  # whose plans a layer has


@contextlib.contextmanager
def use_segments(model: nn.Module, segments: Segments) -> Iterator[None]:
    """Inside, every `MultiLoRALinear` of the model takes each token's adapter from this plan, which has an id for each of its tokens.

    Raises:
        TypeError: not a plan. ValueError: the model has no such layer. RuntimeError: it is in use already, by another thread, say.
    """
    with exclusive(model) as layers:
        if not isinstance(segments, Segments):
            raise TypeError(f"segments: wanted a lora_kernels.Segments, got {type(segments).__name__}")
        give(layers, _Given(segments))
        yield


@contextlib.contextmanager
def use_adapters(model: nn.Module, adapters: Sequence[int] | torch.Tensor) -> Iterator[None]:
    """Inside, each sequence of a batch goes through its adapter, whatever the number of its tokens: prompts and steps of ``generate``.

    Sequences are the first axis of what each `MultiLoRALinear` is given, ``[sequences, ..., K]``. A beam, or one of several samples of a
    prompt, is a sequence of its own. With gradient checkpointing call backward inside, too: it computes the forward pass once more.

    Args:
        model: A module that contains such layers (``apply_lora(model, config, num_adapters=E)``).
        adapters: For each sequence its slot, -1 for the base alone; ints, or an integer tensor ``[sequences]`` on the CPU.
    Raises:
        TypeError: not integers. ValueError: the model has no such layer, or a layer not such a slot; in a call, another number of
        sequences. RuntimeError: the model is in use already, by another thread, say. UnsupportedError: within the capture of a CUDA
        graph, which would keep these adapters for ever: capture `use_segments` around a plan made from a tensor of ids.
    """
    with exclusive(model) as layers:
        give(layers, by_sequence(layers, adapters))
        yield


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[Layers]:
    """The model's layers, inside in nobody else's use: of two users at once one would get the other's adapters."""
    layers = layers_of(model)
    with _CHANGING:
        taken = [name for name, layer in layers.items() if layer.plans is not None]
        if taken:
            raise RuntimeError(f"model: wanted one that is in no use_segments, use_adapters or pool's use yet, got {taken[0]} in another")
        give(layers, _Given(None))
    try:
        yield layers
    finally:
        give(layers, None)


def give(layers: Layers, plans: _Given | _BySequence | None) -> None:
    """What the layers ask for the plan that goes with an x."""
    for layer in layers.values():
        vars(layer)["plans"] = plans  # nn.Module's own way takes ten times as long, in layers by the hundred


def layers_of(model: nn.Module) -> Layers:
    """The layers that have slots, by name."""
    layers = {name or "the model": m for name, m in model.named_modules() if isinstance(m, MultiLoRALinear)}
    if not layers:
        raise ValueError("model: wanted one with MultiLoRALinear layers (apply_lora with num_adapters), got none")
    return layers


def by_sequence(layers: Layers, adapters: Sequence[int] | torch.Tensor) -> _BySequence:
    """What has the plans of a batch's sequences, all checked."""
    ids = as_ints("adapters", adapters)
    if ids.device != CPU:
        raise ValueError(f"adapters: wanted them on the CPU, where they can be checked, got {ids.device}; or take use_segments")
    named = list(dict.fromkeys(ids.tolist()))
    for name, layer in layers.items():
        wrong = [i for i in named if not -1 <= i < layer.num_adapters]
        if wrong:
            raise ValueError(f"adapters: wanted numbers from -1 to {layer.num_adapters - 1} for {name}, got {wrong[0]}")
    return _BySequence(ids.to(torch.int32, copy=True), {(layer.lora_A.device, layer.num_adapters) for layer in layers.values()})


class _Given:
    """One plan for every call, or none yet."""

    def __init__(self, segments: Segments | None):
        self.segments = segments

    def of(self, x: torch.Tensor, num_adapters: int) -> Segments | None:
        return self.segments


class _BySequence:
    """A plan for each number of tokens, made where it is first wanted, and shared by all layers.

    In a compiled graph each layer makes its own, for the graph must not depend on what was made before it; but that of one token a
    sequence, for the steps of ``generate``, is there from the start.
    """

    def __init__(self, ids: torch.Tensor, places: Collection[tuple[torch.device, int]]):
        self.ids = ids
        self.steps = {place: self._plan(1, *place) for place in places if place[0].type != "meta"}
        self.plans: dict[tuple, Segments] = {}

    def of(self, x: torch.Tensor, num_adapters: int) -> Segments:
        """The plan for x ``[sequences, ..., K]``."""
        sequences = self.ids.shape[0]
        if x.dim() < 2 or x.shape[0] != sequences:
            wanted = f"x [{sequences}, ..., {x.shape[-1]}], a sequence for each of the adapters named"
            raise ValueError(f"adapters: wanted {wanted}, got x {list(x.shape)}; name the tokens' own by use_segments")
        tokens = math.prod(x.shape[1:-1])
        place = x.device, num_adapters
        if torch.compiler.is_compiling():
            return self.steps[place] if tokens == 1 and place in self.steps else self._plan(tokens, *place)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError("use_adapters: wanted no capture of a CUDA graph, which would keep these adapters; take use_segments")
        key = tokens, *place, *kept_for(x.device)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self._plan(tokens, *place)
        return plan

    def _plan(self, tokens: int, device: torch.device, num_adapters: int) -> Segments:
        return plan_of(self.ids.to(device, non_blocking=True), tokens, num_adapters)

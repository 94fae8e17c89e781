"""A model's adapted layers in the words of adapter files: by which names, with which tensors, and by what config.

Its patterns hold what differs from the layer of the largest rank; its targets are the shortest that mean these layers and no others.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from .apply import some
from .experts_layer import LoRAExperts, config_name, unwrapped
from .lora_config import names_mean, pattern_of
from .multi import MultiLoRALinear
from .nn import FusedLoRALinear, check_storage, scaling_of
from .packed_layer import PackedLoRALinear, PackedPart
from .problem import UnsupportedError, sharded

ATTRIBUTES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_B.bias": "lora_bias", "lora_magnitude_vector": "lora_magnitude"}
VARIANTS = {"lora_bias": "lora_B.bias", "use_dora": "lora_magnitude_vector"}
STACKED = (MultiLoRALinear, PackedPart)
ADAPTED = (FusedLoRALinear, LoRAExperts, *STACKED)


def file_layers(model: nn.Module, slot: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers that ``slot`` means and what a config calls them, both by first name, as in the uncompiled model."""
    if slot is not None and (isinstance(slot, bool) or not isinstance(slot, int)):
        raise TypeError(f"slot: wanted an adapter's number, an int, got {type(slot).__name__}")
    found: dict[str, Any] = {}
    called: dict[str, str] = {}
    for name, its_name, m in file_modules(model):
        if not isinstance(m, ADAPTED):
            continue
        if name in found:
            raise ValueError(f"names: wanted a name for each layer that files can tell apart, got {name} for two")
        found[name], called[name] = m, its_name
    if not found:
        hint = "apply_lora(model, config) makes them"
        raise ValueError(f"model: wanted one that contains FusedLoRALinear or MultiLoRALinear layers, got none; {hint}")
    stacks = [name for name, m in found.items() if isinstance(m, STACKED)]
    if slot is None and stacks:
        raise ValueError(f"slot: wanted the number of an adapter, for MultiLoRALinear layers ({some(stacks)}), got None")
    if slot is not None and len(stacks) < len(found):
        raise ValueError(f"slot: wanted None, for layers of one adapter ({some(found.keys() - stacks)}), got {slot}")
    for name, layer in found.items():
        if layer.widths:
            raise UnsupportedError(f"names: wanted those that adapter files have for the layers that {name} packs, got none")
        if slot is not None and not 0 <= slot < layer.num_adapters:
            raise IndexError(f"slot: wanted an adapter of {name} from 0 to {layer.num_adapters - 1}, got {slot}")
        check_storage(name, layer)
        if sharded(layer.lora_A):
            raise UnsupportedError(f"model: wanted whole layers, got shards in {name}; gather them into a model that is not sharded")
    return found, called


def file_modules(model: nn.Module, aliases: bool = False) -> list[tuple[str, str, Any]]:
    """Modules below the model, by name in a file's keys, in which torch's own wrappers do not show, and by name in a config.

    A packed layer whose layers have names is those layers.
    """
    found: list[tuple[str, str, Any]] = []
    model = unwrapped(model)
    for name, m in model.named_modules(remove_duplicate=not aliases):
        key = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if key and isinstance(m, PackedLoRALinear) and m.names is not None:
            places = [each.rpartition(".")[0] for each in (key, config_name(model, name))]
            for n, own in enumerate(m.names):
                its_key, its_name = (f"{place}.{own}" if place else own for place in places)
                found.append((its_key, its_name, PackedPart(m, n)))
        elif key:
            found.append((key, config_name(model, name), m))
    return found


def held_by(layer: Any, slot: int | None) -> dict[str, torch.Tensor]:
    """A layer's adapter as it stands, by the ends of its keys."""
    if slot is not None:
        return dict(zip(("lora_A.weight", "lora_B.weight"), layer.adapter(slot), strict=True))
    found = {part: getattr(layer, attribute, None) for part, attribute in ATTRIBUTES.items()}
    return {part: t.detach() for part, t in found.items() if t is not None}


def config_of(
    model: nn.Module, layers: dict[str, Any], called: dict[str, str], held, slot: int | None, one_scale: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """The config, and what each lora_B is to be multiplied by."""
    ranks = {name: held[name]["lora_A.weight"].shape[0] // getattr(layer, "num_experts", 1) for name, layer in layers.items()}
    scalings = {name: float(layer.scaling if slot is None else layer.scaling[slot]) for name, layer in layers.items()}
    wrong = [name for name, scaling in scalings.items() if not math.isfinite(scaling)]
    if wrong:
        raise ValueError(f"model: wanted finite scalings, got {scalings[wrong[0]]} in {some(wrong)}")
    variants = {flag: [name for name, parts in held.items() if part in parts] for flag, part in VARIANTS.items()}
    for flag, having in variants.items():
        if 0 < len(having) < len(held):
            raise ValueError(f"model: wanted {flag} in all layers or in none, as the config says it, got it in {some(having)} alone")
    largest = max(ranks, key=ranks.__getitem__)
    rslora = not one_scale and all(layer.use_rslora for layer in layers.values())
    factors = dict.fromkeys(layers, 1.0)
    if one_scale:
        if not scalings[largest]:
            raise ValueError(f"one_scale: wanted a scaling other than 0 in {largest}, the layer of the largest rank, got 0")
        factors = {name: scaling / scalings[largest] for name, scaling in scalings.items()}
        scalings = dict.fromkeys(scalings, scalings[largest])
    alphas = {name: _alpha(layer, slot, ranks[name], rslora, scalings[name]) for name, layer in layers.items()}
    modules = file_modules(model, aliases=True)
    stacks = _target_parameters(modules)
    config = {
        "peft_type": "LORA",
        "r": ranks[largest],
        "lora_alpha": alphas[largest],
        "rank_pattern": pattern_of({called[name]: rank for name, rank in ranks.items()}, ranks[largest]),
        "alpha_pattern": pattern_of({called[name]: alpha for name, alpha in alphas.items()}, alphas[largest]),
        "target_modules": _target_modules(modules),
        "lora_dropout": 0.0 if stacks else max(layer.lora_dropout for layer in layers.values()),
        "use_rslora": rslora,
        **{flag: bool(having) for flag, having in variants.items()},
        "inference_mode": True,
        **{"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None},
        **({"target_parameters": stacks} if stacks else {}),
    }
    return config, factors


def _alpha(layer: Any, slot: int | None, r: int, rslora: bool, scaling: float) -> float:
    """The layer's own lora_alpha where it gives this scaling, else the one that does."""
    alpha = layer.lora_alpha if slot is None else layer.lora_alpha[slot]
    given = scaling_of(alpha, r, rslora)
    given = given if slot is None else torch.tensor(given, dtype=torch.float32, device="cpu").item()  # stacks keep scalings in float32
    return alpha if given == scaling else scaling / scaling_of(1.0, r, rslora)


def _target_modules(modules: list[tuple[str, str, nn.Module]]) -> list[str] | str:
    """The shortest that means the adapted modules and no other: last parts, names, or an expression."""
    names = sorted({name for _, name, m in modules if isinstance(m, (FusedLoRALinear, *STACKED))})
    for targets in (sorted({name.rpartition(".")[2] for name in names}), names):
        if sorted({name for _, name, _ in modules if names_mean(targets, name)}) == names:
            return targets
    return "|".join(map(re.escape, names))


def _target_parameters(modules: list[tuple[str, str, nn.Module]]) -> list[str]:
    """The shortest that means the adapted stacks and no other parameter: last parts, or names."""
    names = sorted({name for _, name, m in modules if isinstance(m, LoRAExperts)})
    every = {f"{name}.{each}" for _, name, m in modules for each, _ in m.named_parameters(recurse=False)}
    for targets in (sorted({name.rpartition(".")[2] for name in names}), names):
        if sorted(name for name in every if names_mean(targets, name)) == names:
            return targets
    raise ValueError(f"model: wanted stacks whose names mean no other parameter, as PEFT takes names by their ends, got {some(names)}")

"""PEFT's adapter files, read and written: ``adapter_config.json`` and ``adapter_model.safetensors``.

    base_model.model.<layer>.lora_A.weight [r, K]     lora_B.weight [N, r]     and, where trained, lora_B.bias, lora_magnitude_vector [N]
    base_model.model.<experts>[.base_layer]...        [E r, K], [N, r E]       of stacks, the innermost declared first: `LoRAExperts`

A load checks everything before it changes anything; a save leaves the old files or the new ones, never a config beside other weights.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from typing import Any, NamedTuple

import torch
from torch import nn

from . import slots
from .adapter_layers import ATTRIBUTES, STACKED, config_of, file_layers, held_by
from .adapter_store import WEIGHTS_FILE, opened, safetensors_or_why, write
from .apply import some
from .experts_layer import LoRAExperts, unwrapped
from .lora_config import CONFIG_FILE, LoRAConfig, by_peft_before_0_19, names_mean, read_config
from .merging import finite
from .multi import MultiLoRALinear
from .nn import AdaptedLinear, check_written, sharding
from .packed_layer import PackedLoRALinear, PackedPart
from .problem import UnsupportedError

PREFIX = "base_model.model."
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    slot: int | None = None,
    dtype: torch.dtype | None = None,
    one_scale: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the adapter of a model to a folder, as PEFT, vLLM and SGLang read it.

    The config says what the layers are: ``r`` and ``lora_alpha`` are those of the layer of the largest rank, by which servers
    reserve room, and the patterns hold what differs from them. A scaling that was set is written as the lora_alpha that gives it. A
    merged layer's adapter is written like any other's; a module with several names is written under its first, the only one at which
    PEFT adapts it. With `LoRAExperts` the config's ``lora_dropout`` is 0, the only one that PEFT takes beside ``target_parameters``.

    Written first are temporary files in the same folder, then the old config is removed if it differs, the weights are replaced, and
    the new config comes last. So an interrupted save leaves the old adapter, the new one, or no config, which no reader takes for an
    adapter. The folder's other files stay; a process that dies may leave its temporary ones in ``.adapter-*``.

    Args:
        model: A module that contains `FusedLoRALinear` or `LoRAExperts` layers, or `MultiLoRALinear` ones and ``slot``.
        folder: Made where it is missing.
        slot: Which adapter of the stacks; it is written with its own rank.
        dtype: To write in; None: the adapters' own, which must be one.
        one_scale: Multiply each lora_B, in float32, so that all layers have the same scaling, ``lora_alpha / r`` of the config: for
            SGLang and older vLLM, which read no patterns, the former no ``use_rslora`` either.
        base_model_name_or_path: For the config; None: the model's ``name_or_path``, as transformers' have.
        task_type: For the config, one of PEFT's names or None.
    Raises:
        ValueError: no such layers, several dtypes without ``dtype``, a variant in some layers alone, NaN or Inf; stacks whose names
        mean others, too; another ``task_type``; a slot missing, or named in vain. IndexError: no such slot. TypeError: ``dtype`` is
        none of torch's floating ones. UnsupportedError: layers sharded, or packed without ``names``. ImportError: no safetensors. What
        the folder held is as it was then. OSError: the disk's; while files are replaced it may leave no config.
    """
    safetensors = safetensors_or_why()
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype: wanted {', '.join(map(str, DTYPES.values()))} or None, got {dtype}")
    if task_type not in (None, *TASKS):
        raise ValueError(f"task_type: wanted {', '.join(TASKS)} or None, got {task_type!r}")
    layers, called = file_layers(model, slot)
    held = {name: held_by(layer, slot) for name, layer in layers.items()}
    dtypes = sorted({str(t.dtype) for tensors in held.values() for t in tensors.values()})
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"dtype: wanted the one to write in, since the adapters have several, {', '.join(dtypes)}; got None")
    config, scales = config_of(model, layers, called, held, slot, one_scale)
    tensors = {}
    for name, parts in held.items():
        for part, t in parts.items():
            if part.startswith("lora_B") and scales[name] != 1:
                t = t.to(torch.promote_types(t.dtype, torch.float32)) * scales[name]
            t = t.to("cpu", dtype or held[name][part].dtype, copy=True, memory_format=torch.contiguous_format)
            tensors[f"{PREFIX}{name}.{part}"] = _finite(f"{name}.{part}", t)
    config["base_model_name_or_path"] = base_model_name_or_path or getattr(unwrapped(model), "name_or_path", None) or None
    config["task_type"] = task_type
    write(folder, json.dumps(config, indent=2, sort_keys=True).encode(), tensors, safetensors)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, *, slot: int | None = None, partial: bool = False, cast: bool = False
) -> list[str]:
    """Read an adapter that PEFT or `save_adapter` wrote into a model's layers, in place, with its scaling.

    Everything is checked before anything changes: names, shapes and dtypes against the model from the file's header, before a tensor
    is read; then the values. Parameters keep their addresses, so optimizers and captured CUDA graphs see the new values; an
    optimizer's state and a FusedLoRALinear's scaling inside a graph are the old ones. Dropout stays the layers' own.

    Args:
        model: A module that contains `FusedLoRALinear` or `LoRAExperts` layers (``apply_lora(model, LoRAConfig.from_folder(folder))``
            makes them), or `MultiLoRALinear` ones and ``slot``.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``. Pickled weights (``.bin``) are not read.
        slot: Which adapter of the stacks to replace, at any rank they have room for; the others serve on.
        partial: Whether the file may lack layers: they are initialised again, and so answer as the base.
        cast: Whether values may be rounded to the layers' dtype, as PEFT does. Without it, a dtype that holds them all is needed:
            bfloat16 goes into float32, float32 does not go into bfloat16; and a file has one dtype.
    Returns:
        The names of the layers that were in the file, as `apply_lora` gives them.
    Raises:
        FileNotFoundError: no such folder, or files. ValueError: files that are not whole or do not fit the model; a slot missing, or named
        in vain; factors parametrized, or pruned. IndexError: no such slot. TypeError: dtypes. UnsupportedError: the config asks for more
        than plain LoRA; layers sharded, or packed without ``names``. RuntimeError: merged. ImportError: no safetensors. Nothing changed.
    """
    adapter = read(model, folder, slot=slot, partial=partial, cast=cast)
    put(adapter, slot)
    return [adapter.called[name] for name in adapter.values]


class Adapter(NamedTuple):
    """An adapter as it was read, and the layers that it was checked against.

    values: By layer, as keys of the file have it, and end of the key. called: Those layers' names as `apply_lora` gives them.
    """

    layers: dict[str, Any]
    called: dict[str, str]
    values: dict[str, dict[str, torch.Tensor]]
    config: LoRAConfig


def read(model: nn.Module, folder: str | os.PathLike, *, slot: int | None, partial: bool = False, cast: bool = False) -> Adapter:
    """All of `load_adapter` but the writing."""
    safetensors_or_why()
    layers, called = file_layers(model, slot)
    if by := next(filter(None, map(sharding, model.modules())), ""):
        raise UnsupportedError(f"model: wanted one that is not sharded, got a {by}, whose parameters are whole in passing; load it first")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"model: wanted unmerged layers to load into, got merged ones ({some(merged)}); call unmerge() first")
    check_written(*layers.values())
    given = read_config(folder)
    config = LoRAConfig.from_dict({**given, "layers_to_transform": None, "layers_pattern": None})  # the file's own names say which layers
    held = {name: held_by(layer, slot) for name, layer in layers.items()}
    with opened(os.path.join(folder, WEIGHTS_FILE)) as file:
        if read_config(folder) != given:  # a save takes the old config away before it replaces the weights
            raise ValueError(f"{CONFIG_FILE}: wanted the same before and after the weights were opened, got another; load again")
        there = set(file.keys())
        bases = {f"{PREFIX}{name}.base_layer.weight": layer for name, layer in layers.items() if isinstance(layer, AdaptedLinear)}
        keys = _check_keys(there - bases.keys(), held, partial)
        adapted = {called[name]: layers[name] for name in keys}
        _check_stacks(config, adapted, layers, by_peft_before_0_19(given))
        for name, parts in keys.items():
            _check_layer(file, config, called[name], layers[name], parts, cast)
        _check_packed(config, adapted)
        _check_one_dtype(file, there - bases.keys(), cast)
        for key in there & bases.keys():  # PEFT writes it beside the adapter of a head
            if not bases[key].has_base(file.get_tensor(key)):
                raise ValueError(f"{key}: wanted the weight that the model has there, got another; load the base of this adapter first")
        values = {
            name: {part: _finite(key, file.get_tensor(key).to(held[name][part].dtype)) for part, key in parts.items()}
            for name, parts in keys.items()
        }
    return Adapter(layers, called, values, config)


@torch.no_grad()
def put(adapter: Adapter, slot: int | None, *, reset: bool = True, non_blocking: bool = False) -> None:
    """Write an adapter into the layers, all of which was checked. reset: whether those it lacks are initialised again, or zeros."""
    layers, called, values, config = adapter
    wholes: dict[MultiLoRALinear, tuple[list, list[float]]] = {}
    for name, layer in layers.items():
        given, own = values.get(name), called[name]
        if slot is not None:
            whole, n = (layer.layer, layer.n) if isinstance(layer, PackedPart) else (layer, 0)
            parts, scales = wholes.setdefault(whole, ([None] * (len(whole.widths) or 1), []))
            if given is not None:
                parts[n] = given["lora_A.weight"], given["lora_B.weight"]
                scales.append(config.scaling_of(own))
        elif given is None:
            layer.reset_adapter()
        else:
            for part, t in given.items():
                getattr(layer, ATTRIBUTES[part]).copy_(t)
            layer.lora_alpha, layer.use_rslora, layer.scaling = config.alpha_of(own), config.use_rslora, config.scaling_of(own)
    if slot is not None:
        slots.put(slot, [(whole, parts, scales[0] if scales else None) for whole, (parts, scales) in wholes.items()], non_blocking)
        for whole in [whole for whole, (_, scales) in wholes.items() if reset and not scales]:
            whole.reset_adapter(slot)


def _check_keys(given: set[str], held: dict[str, dict[str, torch.Tensor]], partial: bool) -> dict[str, dict[str, str]]:
    """The file's keys by layer and end: those of the model's layers, no more and no fewer."""
    keys = {name: {part: f"{PREFIX}{name}.{part}" for part in parts} for name, parts in held.items()}
    if partial:
        keys = {name: parts for name, parts in keys.items() if given & set(parts.values())}
    wanted = {key for parts in keys.values() for key in parts.values()}
    missing, unexpected = sorted(wanted - given), sorted(given - wanted)
    if not (missing or unexpected or not given):
        return keys
    every = [f"{PREFIX}{name}.{part}" for name, parts in held.items() for part in parts]
    near = difflib.get_close_matches(unexpected[0], every, n=1) if unexpected else []
    said = [f"{len(missing)} missing ({some(missing)})"] if missing else []
    said += [f"{len(unexpected)} that the model has no place for ({some(unexpected)})"] if unexpected else []
    said += [f"the model's nearest to the first of these is {near[0]}"] if near else []
    said += ["partial=True takes a file that lacks whole layers"] if missing and not unexpected and not partial else []
    raise ValueError(f"{WEIGHTS_FILE}: wanted the tensors of the model's {len(held)} LoRA layers, got {'; '.join(said) or 'none at all'}")


def _check_stacks(config: LoRAConfig, given: dict[str, Any], layers: dict[str, Any], old: bool) -> None:
    """Which stack a key means depends on the others that the config names, and the layout on the PEFT that wrote it."""
    for name, layer in given.items():
        if not isinstance(layer, LoRAExperts):
            continue
        experts, place = layer.experts, name.rpartition(".")[0]
        wanted = sorted(m.parameter_name for m in layers.values() if isinstance(m, LoRAExperts) and m.experts is experts)
        own = [each for each, _ in experts.named_parameters(recurse=False)]
        meant = sorted(each for each in own if names_mean(config.target_parameters, f"{place}.{each}"))
        if meant != wanted:
            got = f"{list(config.target_parameters)}, which means {', '.join(meant) or 'none'}"
            raise ValueError(f"target_parameters: wanted names of {', '.join(wanted)} of {place}, which the model adapts, got {got}")
        if old and not experts.is_transposed:
            raise UnsupportedError(f"{name}: wanted factors as PEFT has them from 0.19 on, got an older one's, whose A and B are swapped")


def _check_layer(file, config: LoRAConfig, name: str, layer: Any, keys: dict[str, str], cast: bool) -> None:
    r, room, one = config.rank_of(name), layer.r, not isinstance(layer, STACKED)
    if r > room or (one and r != room):
        wanted = f"rank {room}, the layer's" if one else f"a rank from 1 to the stack's {room}"
        raise ValueError(f"{name}: wanted {wanted}, got {r} in {CONFIG_FILE}")
    K, N = layer.in_features, layer.out_features
    r *= getattr(layer, "num_experts", 1)
    shapes = {"lora_A.weight": [r, K], "lora_B.weight": [N, r], "lora_B.bias": [N], "lora_magnitude_vector": [N]}
    for part, key in keys.items():
        header = file.get_slice(key)
        if header.get_shape() != shapes[part]:
            raise ValueError(f"{key}: wanted shape {shapes[part]}, got {header.get_shape()}")
        given, mine = DTYPES.get(header.get_dtype()), getattr(layer, ATTRIBUTES[part]).dtype
        if given is None:
            raise TypeError(f"{key}: wanted {', '.join(DTYPES)}, got {header.get_dtype()}")
        if not cast and torch.promote_types(given, mine) != mine:
            how = f"pass cast=True to round, or make the layers with adapter_dtype={given}"
            raise TypeError(f"{key}: wanted {mine} or what it holds exactly, got {given}; {how}")


def _check_packed(config: LoRAConfig, given: dict[str, Any]) -> None:
    """The layers that one weight packs have one scaling, as a slot has."""
    scalings: dict[PackedLoRALinear, dict[str, float]] = {}
    for name, part in given.items():
        if isinstance(part, PackedPart):
            scalings.setdefault(part.layer, {})[name] = config.scaling_of(name)
    for each in scalings.values():
        if not all(math.isclose(scaling, next(iter(each.values())), rel_tol=1e-6) for scaling in each.values()):  # slots have float32
            raise ValueError(f"{CONFIG_FILE}: wanted one scaling (lora_alpha / r) for layers that are packed together, got {each}")


def _check_one_dtype(file, keys: set[str], cast: bool) -> None:
    dtypes = {file.get_slice(key).get_dtype(): key for key in keys}
    if len(dtypes) > 1 and not cast:
        given = ", ".join(f"{dtype} ({key})" for dtype, key in sorted(dtypes.items()))
        raise TypeError(f"{WEIGHTS_FILE}: wanted tensors of one dtype, got {given}; pass cast=True to take them")


def _finite(name: str, t: torch.Tensor) -> torch.Tensor:
    if not finite(t):
        raise ValueError(f"{name}: wanted finite values in {t.dtype}, got NaN or Inf")
    return t

"""LoRA on a plain torch model: a config with PEFT's field names says which of its layers become `FusedLoRALinear`, which of its
experts go under `LoRAExperts`, and back.

names = apply_lora(model, LoRAConfig(target_modules=["q_proj", "v_proj"], r=16));   remove_lora(model, merge=True)
"""

from __future__ import annotations

import collections
import difflib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from .dequantize import plain_linear
from .experts_layer import LoRAExperts, plain_name, why_not_adapted
from .lora_config import LoRAConfig, all_linear, names_mean, pattern_means
from .multi import MultiLoRALinear
from .nn import AdaptedLinear, FusedLoRALinear, hooked, linear_of, sharding
from .over import LoRAOver, MultiLoRAOver, Over, quantised
from .problem import FLOATS, UnsupportedError, sharded

# Layers that transformers (5.23) does not call, always or in training on a GPU, but hands their weights to functions and kernels.
READ_PAST = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer"), ("out_proj",)),
    **dict.fromkeys(("NemotronHMamba2Mixer", "Zamba2MambaMixer"), ("out_proj",)),
    "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"), ("k_proj",)),
    "DabDetrMHAttentionMap": ("k_linear",),
    **dict.fromkeys(("LayoutLMv2Encoder", "LayoutLMv3Encoder"), ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "TDNNLayer": ("kernel",),  # of Wav2Vec2's kin, for speakers
}


def apply_lora(model: nn.Module, config: LoRAConfig, *, num_adapters: int | None = None, adapter_dtype=None) -> list[str]:
    """Turn the linear layers that the config names into `FusedLoRALinear`, in place, and freeze every other parameter.

    A quantised layer goes under a `LoRAOver`, which keeps it. Experts whose stacks ``target_parameters`` names go under a `LoRAExperts`
    for each, one within the other as PEFT nests them.

    Weights are shared, nothing of the base is copied. A module with several names is one adapted layer under all of them; tied
    weights stay tied. What else is to be trained is unfrozen afterwards, and saved by whoever does so.

    Args:
        model: A module that contains the layers, with its weights where they are to stay.
        config: Which, and with what adapters; PEFT's own is read as `LoRAConfig.from_peft` reads it.
        num_adapters: E: `MultiLoRALinear` (`MultiLoRAOver`) with E slots instead, which `use_segments` tells each token's adapter.
        adapter_dtype: As in `FusedLoRALinear`; over a quantised layer None is float32.
    Returns:
        The names of the layers, then those of the stacks, each under its first.
    Raises:
        ValueError: nothing to fuse; names that the model does not have, with near ones; a module named under some of its names only;
        num_adapters below 1. TypeError: a named module is neither exactly an nn.Linear nor quantised, or has an adapter; another config,
        num_adapters or adapter_dtype. UnsupportedError: a layer has hooks, which would be lost, or its parent passes its forward by; a
        named parameter is not a stack that `LoRAExperts` serves; num_adapters with target_parameters; lora_bias or use_dora with either, or
        over a quantised layer; DistributedDataParallel is around the model, FSDP has it, or PEFT's layers are in it; PEFT's config asks
        for more than `LoRAConfig.from_peft` takes. In each case the model is as it was.
    """
    given: Any = config
    if getattr(given, "peft_type", None) is not None and callable(getattr(given, "to_dict", None)):
        config = LoRAConfig.from_peft(given)
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config: wanted a lora_kernels.LoRAConfig or PEFT's LoraConfig, got {type(config).__name__}")
    if config.target_parameters and num_adapters is not None:
        raise UnsupportedError(f"num_adapters: wanted None with target_parameters, whose experts have one adapter, got {num_adapters}")
    _check_model(model)
    targets = _targets(model, config)
    stacks = _stacks(model, config)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        layers = {name: _build(model.get_submodule(name), name, config, num_adapters, adapter_dtype) for name in targets}
        around = {name: _around(model, name, parameters, config, adapter_dtype) for name, (_, parameters) in stacks.items()}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for name, parameter in model.named_parameters():
        if not name.rpartition(".")[2].startswith("lora_"):  # adapters of an earlier call train on
            parameter.requires_grad_(False)
    _put(model, layers, targets)
    _put(model, around, {name: names for name, (names, _) in stacks.items()})
    users = _users(model)
    for name in targets:
        layer: Any = model.get_submodule(name)
        layer.tied = not isinstance(layer, Over) and users[id(layer.weight)] > 1
    return [*targets, *(f"{plain_name(model, name)}.{each}" for name, (_, parameters) in stacks.items() for each in parameters)]


def remove_lora(model: nn.Module, *, merge: bool = False, dequantize: torch.dtype | None = None) -> list[str]:
    """Turn every `FusedLoRALinear` and `MultiLoRALinear` back into an nn.Linear, in place; weights and biases stay shared and frozen.

    A `LoRAOver` gives the layer below back, a `LoRAExperts` the experts.

    Args:
        model: A module that contains such layers.
        merge: False: the adapters are dropped, the base answers bit for bit. True: their update is added to the weights first
            (`FusedLoRALinear.merge`; the base weights are kept on the CPU until all have it), and an adapter's bias makes a new one.
        dequantize: With ``merge=True``: the dtype of the nn.Linear layers that all quantised ones become, adapted or not, with the
            weights by which those multiply x of this dtype, and the update; transformers' model forgets that it was quantised. None: a
            `LoRAOver` is refused.
    Returns:
        The names that `apply_lora` gave.
    Raises:
        ValueError: no such layer; a merged layer with ``merge=False``, which could mean either; with ``merge=True`` a stack of
        adapters, a weight that another module shares, or an adapter with NaN or Inf; ``dequantize`` without ``merge``. TypeError:
        ``dequantize`` is no floating-point dtype. UnsupportedError: a layer has hooks or is sharded, or with ``merge=True`` a
        quantised base and no ``dequantize``. In each case the model is as it was.
    """
    if dequantize is not None and dequantize not in FLOATS:
        raise TypeError(f"dequantize: wanted float16, bfloat16, float32, float64 or None, got {dequantize!r}")
    if dequantize is not None and not merge:
        raise ValueError(f"dequantize: wanted None with merge=False, which gives the quantised layers back, got {dequantize}")
    _check_not_sharded(model)
    places = _places(model, (AdaptedLinear, LoRAExperts))
    if not places:
        raise ValueError("model: wanted one with FusedLoRALinear or MultiLoRALinear layers, got none")
    layers: dict[str, Any] = {names[0]: layer for layer, names in places.items()}
    for name, layer in layers.items():
        _check_hooks(layer, name)
        if sharded(layer.lora_A):
            raise UnsupportedError(f"model: wanted whole layers, got shards in {name}")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged and not merge:
        raise ValueError(f"merge: wanted unmerged layers, got merged ones ({some(merged)}); call unmerge() first, or pass merge=True")
    plain = _merge(model, layers, dequantize) if merge else {}
    around = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAExperts)}
    within = [layer.base_layer for layer in around.values()]
    outermost = {name: layer for name, layer in around.items() if layer not in within}
    linear = {name: layer for name, layer in layers.items() if name not in around}
    stacks = [f"{plain_name(model, name)}.{each.parameter_name}" for name, layer in outermost.items() for each in layer.chain()[::-1]]
    places |= {layer: names for layer, (names, _) in plain.items()}
    back = {name: _linear(layer) for name, layer in {**linear, **outermost}.items() if layer not in plain}
    back |= {names[0]: made for names, made in plain.values()}
    _put(model, back, {names[0]: names for names in places.values()})
    if dequantize:
        for module in model.modules():  # a transformers model knows that it was quantised, and would save it so
            if (quantizer := getattr(module, "hf_quantizer", None)) is not None:
                quantizer.remove_quantization_config(module)
    return [*linear, *stacks]


def _check_model(model: nn.Module) -> None:
    _check_not_sharded(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise UnsupportedError("model: wanted one that DistributedDataParallel is not around yet, since it reduces no later adapters")
        if any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__):
            hint = "lora_kernels.integrations.peft.fuse(model) gives them the kernels"
            raise UnsupportedError(f"model: wanted one without PEFT's layers, which would be frozen, got {name}; {hint}")


def _check_not_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if by := sharding(module):
            given = f"a {by}, {name or 'itself'}, which knows its old parameters alone"
            raise UnsupportedError(f"model: wanted one that is not sharded, got {given}")


def _targets(model: nn.Module, config: LoRAConfig) -> dict[str, list[str]]:
    """The layers to adapt, all checked: the first name of each, and all of them."""
    places = _places(model, nn.Module)
    every = [name for names in places.values() for name in names]
    linears = {name: module for module, names in places.items() if isinstance(module, nn.Linear) for name in names}
    if not linears and config.target_modules:
        raise ValueError(f"model: wanted one that contains nn.Linear layers, got {type(model).__name__} without")
    _check_asked(config, every, linears, _parameters(model, places) if config.target_parameters else [])
    if not config.target_modules:
        return {}
    if all_linear(config.target_modules):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        conv1ds = [names for module, names in places.items() if type(module).__module__ == "transformers.pytorch_utils"]
        chosen = {name for name, module in linears.items() if module is not head}.union(*conv1ds)  # which PEFT means, too
    else:
        chosen = {name for name in every if config.targets(name)}
        numbers: Any = config.layers_to_transform
        there = {config.layer_of(name) for name in every if names_mean(config.target_modules, name)} - {None}
        if numbers and not config.inference_mode and not there.issuperset(numbers):
            raise ValueError(f"layers_to_transform: wanted layers that have what target_modules names, of {there}, got {numbers}")
    chosen -= {name for name in every if names_mean(config.exclude_modules, name)}
    if not chosen:
        raise ValueError(f"target_modules: wanted layers to fuse, got none beside the head and exclude_modules={config.exclude_modules!r}")
    targets = {}
    for module, names in places.items():
        taken = [name for name in names if name in chosen]
        if taken and len(taken) < len(names):
            raise ValueError(f"target_modules: {', '.join(names)} are one module; wanted all of them or none, got {', '.join(taken)}")
        if taken:
            _check_layer(model, module, names)
            targets[names[0]] = names
    return targets


def _check_asked(config: LoRAConfig, every: list[str], linears: Collection[str], own: list[str]) -> None:
    """Whatever the config asks for by a name means some module, or parameter where it may mean those; of a saved one its stacks do."""
    for label, text, means in _asked(config):
        if config.inference_mode and label != "target_parameters":
            continue
        modules = every if label != "target_parameters" else []
        parameters = own if not label.endswith("_modules") else []
        if any(map(means, [*modules, *parameters])):
            continue
        known = [*(linears if modules else ()), *parameters]
        ends = sorted({name.rpartition(".")[2] for name in known})
        near = difflib.get_close_matches(text, sorted({*ends, *known}))
        hint = f"near ones: {', '.join(near)}" if near else f"its {'parameters' if parameters else 'linear layers'} end in {some(ends, 8)}"
        what = "parameters" if label == "target_parameters" else "modules or parameters" if parameters else "modules"
        raise ValueError(f"{label}: wanted what means {what} of the model, got {text!r}, which means none; {hint}")


def _stacks(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[list[str], list[str]]]:
    """The experts to adapt, all checked: by the first name of each all of them, and their stacks in the order of PEFT's nesting."""
    found = {}
    places = _places(model, nn.Module) if config.target_parameters else {}
    adapted = [layer.experts for layer in places if isinstance(layer, LoRAExperts)]
    for module, names in places.items():
        own = [each for each, _ in module.named_parameters(recurse=False)]
        plain = {name: plain_name(model, name) for name in names if own}
        taken = {name: [each for each in own if names_mean(config.target_parameters, f"{plain[name]}.{each}")] for name in names}
        meant = taken[names[0]]
        if any(others != meant for others in taken.values()):
            given = "; ".join(f"{some(each) or 'none'} in {name}" for name, each in taken.items())
            raise ValueError(f"target_parameters: {', '.join(names)} are one module; wanted the same of each, got {given}")
        if not meant:
            continue
        if module in adapted or isinstance(module, LoRAExperts):
            raise TypeError(f"{names[0]}: wanted experts without adapters, got LoRAExperts; remove_lora(model) first")
        for each in meant:
            reason = why_not_adapted(module, each)
            if reason:
                raise UnsupportedError(f"{names[0]}.{each}: wanted a stack of experts that can be adapted, but {reason}")
        found[names[0]] = (names, meant)
    return found


def _parameters(model: nn.Module, places: dict[nn.Module, list[str]]) -> list[str]:
    """All parameters' names."""
    pairs = [(plain_name(model, name), module) for module, names in places.items() for name in names]
    return [f"{name}.{each}" for name, module in pairs for each, _ in module.named_parameters(recurse=False)]


def _check_layer(model: nn.Module, module: nn.Module, names: list[str]) -> None:
    if quantised(module):
        return
    if type(module) is not nn.Linear:
        hint = "remove_lora(model) first" if isinstance(module, AdaptedLinear) else "name the linear layers alone, or it in exclude_modules"
        raise TypeError(f"{names[0]}: wanted an nn.Linear or a quantised layer, got {type(module).__name__}; {hint}")
    _check_hooks(module, names[0])
    for name in names:
        parent, _, own = name.rpartition(".")
        around = model.get_submodule(parent)
        if isinstance(around, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            why = "nn.TransformerEncoderLayer reads its weight past the adapter in inference"
            raise UnsupportedError(f"{names[0]}: {why}; call torch.backends.mha.set_fastpath_enabled(False) first")
        if own in READ_PAST.get(type(around).__name__, ()):
            raise UnsupportedError(f"{names[0]}: {type(around).__name__} reads its weight past the adapter; name it in exclude_modules")


def _check_hooks(module: nn.Module, name: str) -> None:
    if hooked(module) or hasattr(module, "_hf_hook"):
        what = "hooks, or a forward of its own"
        raise UnsupportedError(f"{name}: wanted a layer without {what}, which would be lost, got one with; remove them first")


def _build(linear: Any, name: str, config: LoRAConfig, num_adapters: int | None, adapter_dtype) -> nn.Module:
    over, many = quantised(linear), num_adapters is not None
    kind: Any = {(0, 0): FusedLoRALinear, (0, 1): MultiLoRALinear, (1, 0): LoRAOver, (1, 1): MultiLoRAOver}[over, many]
    adapter = _adapter(kind, name, config, adapter_dtype or torch.float32 if over else adapter_dtype)
    if many:
        adapter["num_adapters"] = num_adapters
    return kind.from_linear(linear, **adapter)


def _around(model: nn.Module, name: str, parameters: list[str], config: LoRAConfig, adapter_dtype) -> nn.Module:
    layer, plain = model.get_submodule(name), plain_name(model, name)
    for each in parameters:
        layer = LoRAExperts(layer, each, **_adapter(LoRAExperts, f"{plain}.{each}", config, adapter_dtype))
    return layer


def _adapter(kind: type, name: str, config: LoRAConfig, adapter_dtype) -> dict[str, Any]:
    """What a layer of this kind is told of the adapter that the config gives to what has this name."""
    variants = {flag: True for flag in ("lora_bias", "use_dora") if getattr(config, flag)}
    if variants and kind is not FusedLoRALinear:
        raise UnsupportedError(f"{', '.join(variants)}: wanted False, which is what {kind.__name__} computes, got True")
    return dict(
        r=config.rank_of(name),
        lora_alpha=config.alpha_of(name),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        adapter_dtype=adapter_dtype,
        **variants,
    )


def _linear(layer) -> nn.Module:
    if isinstance(layer, LoRAExperts):
        return layer.experts
    if isinstance(layer, Over):
        return layer.base_layer
    bias = layer.bias
    if layer.merged and layer.lora_bias is not None:
        bias = nn.Parameter(layer.whole_bias().detach(), requires_grad=False)
    return linear_of(layer.weight, bias, layer.training)


def _merge(model: nn.Module, layers: dict[str, Any], dequantize: torch.dtype | None) -> dict[nn.Module, tuple[list[str], nn.Linear]]:
    """Merge all, or none; returns the names of quantised layers, by themselves or by what is over them, and the plain one of each."""
    users = _users(model)
    for name, layer in layers.items():
        if isinstance(layer, Over) and dequantize is None:
            given = f"{name} over a {type(layer.base_layer).__name__}; dequantize=torch.bfloat16 makes plain layers of such"
            raise UnsupportedError(f"merge: wanted layers with a weight to write to, got {given}")
        if isinstance(layer, MultiLoRALinear):
            raise ValueError(f"merge: wanted layers of one adapter, got {name} with {layer.num_adapters}; copy one out first")
        if not isinstance(layer, Over) and users[id(layer.stack if isinstance(layer, LoRAExperts) else layer.weight)] > 1:
            raise ValueError(f"merge: wanted weights of their own, got {name}, whose weight another module shares and would change, too")
    plain = {} if dequantize is None else _dequantized(model, dequantize)
    done = []
    try:
        for layer in layers.values():
            if not layer.merged and layer not in plain:
                layer.merge()
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    return plain


def _dequantized(model: nn.Module, dtype: torch.dtype) -> dict[nn.Module, tuple[list[str], nn.Linear]]:
    """Of every quantised layer, or what is over it: its names, and the plain one to put there, with the update."""
    places: dict[Any, list[str]] = _places(model, nn.Module)  # type: ignore[assignment]
    plain: dict[nn.Module, tuple[list[str], nn.Linear]] = {}
    below = [layer.base_layer for layer in places if isinstance(layer, LoRAOver)]
    for layer, names in places.items():
        if isinstance(layer, LoRAOver):
            _check_hooks(layer.base_layer, names[0])
            linear = plain_linear(layer.base_layer, layer.in_features, dtype, layer.lora_A, layer.lora_B, layer.scaling)
        elif quantised(layer) and layer not in below:
            _check_hooks(layer, names[0])
            linear = plain_linear(layer, layer.in_features, dtype)
        else:
            continue
        plain[layer] = names, linear
    return plain


def _users(model: nn.Module) -> collections.Counter[int]:
    """How many modules have each parameter, by its id."""
    return collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())


def _places(model: nn.Module, kind) -> dict[nn.Module, list[str]]:
    """The modules of a kind below the model and all names of each."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, kind):
            places.setdefault(module, []).append(name)
    return places


def _put(model: nn.Module, layers: dict[str, nn.Module], names: dict[str, list[str]]) -> None:
    for first, layer in layers.items():
        for name in names[first]:
            model.set_submodule(name, layer)


def _asked(config: LoRAConfig) -> Iterator[tuple[str, str, Callable[[str], bool]]]:
    """Each name or expression of the config that is to mean some module: its field, itself, and what it means."""
    for label in ("target_modules", "exclude_modules", "target_parameters"):
        given = getattr(config, label)
        if not isinstance(given, str):
            yield from ((label, each, functools.partial(names_mean, (each,))) for each in given or ())
        elif not all_linear(given):
            yield label, given, functools.partial(names_mean, given)
    for label in ("rank_pattern", "alpha_pattern"):
        yield from ((label, each, functools.partial(pattern_means, each)) for each in getattr(config, label))


def some(names: Collection[str], most: int = 3) -> str:
    """The first few of many names, for a message."""
    return ", ".join(list(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

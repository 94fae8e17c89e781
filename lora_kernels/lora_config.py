"""`LoRAConfig`: which layers of a model get adapters, and which adapters, by PEFT's fields and with PEFT's meaning.

scaling of a layer = alpha / r, or alpha / sqrt(r) with use_rslora;   r, alpha: the patterns' that match its name, else the config's
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .checks import check_number
from .nn import check_dropout, check_rank, scaling_of
from .problem import UnsupportedError

CONFIG_FILE = "adapter_config.json"
CONFIG_LIMIT = 1 << 24  # bytes; patterns for 10,000 layers take less than one MiB
ALL_LINEAR = "all-linear"
# Fields that say where an adapter is from or how it was trained, not what its tensors mean.
PROVENANCE = {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "megatron_core"}
PROVENANCE |= {"loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<n>\d+)\.")
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # PEFT's others change the base weights
FUSED = "PEFT's own model of it can be fused, lora_kernels.integrations.peft.fuse(model)"
WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks for which PEFT adds the model's head to modules_to_save


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get adapters, and which adapters.

    Args:
        target_modules: Names of layers or their endings after a dot, ``["q_proj", "layers.0.fc"]``; or a regular expression for the
            whole name; or ``"all-linear"``, every nn.Linear (and GPT-2's Conv1D, which is refused by its name then) but the model's
            ``get_output_embeddings()``. Empty: none.
        target_parameters: Names of a mixture's stacks or their endings after a dot, ``["mlp.experts.gate_up_proj"]`` (`LoRAExperts`).
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, use_dora: As in `FusedLoRALinear`, but for lora_alpha's
            default, PEFT's. A `LoRAExperts` has neither of the last two.
        exclude_modules: What of target_modules to leave out: names or a regular expression.
        layers_to_transform: In which layers target_modules, a list of names, means what ends so: their number or numbers, from 0; None:
            in all. A whole name needs none.
        layers_pattern: What the list of layers is called, ``"layers"`` or several, each a regular expression. None: whatever the first
            number of a name stands behind, but for the name's own beginning.
        rank_pattern, alpha_pattern: r and lora_alpha of single layers and parameters, by a regular expression for the end of the name
            after a dot (``^`` anchors it where the name begins). The first key that matches holds.
        inference_mode: Whether it is of a saved adapter, whose file says which layers there are: a name of target_modules, exclude_modules
            or a pattern, or a layer's number, may then mean nothing in the model, where it is taken for a slip otherwise.
    Raises:
        TypeError, ValueError: a field's type or value. UnsupportedError: a rank outside 1 to 512.
    """

    target_modules: str | Collection[str] = ()
    target_parameters: Collection[str] = ()
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool = True
    lora_bias: bool = False
    use_dora: bool = False
    inference_mode: bool = False

    def __post_init__(self):
        object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            object.__setattr__(self, "exclude_modules", _names("exclude_modules", self.exclude_modules))
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters: wanted a list of names, got {self.target_parameters!r}")
        object.__setattr__(self, "target_parameters", _names("target_parameters", self.target_parameters))
        if not self.target_modules and not self.target_parameters:
            given = f"{self.target_modules!r} without target_parameters"
            raise ValueError(f"target_modules: wanted names, a regular expression or {ALL_LINEAR!r}, got {given}")
        object.__setattr__(self, "layers_to_transform", _numbers("layers_to_transform", self.layers_to_transform))
        patterns = self.layers_pattern or ()
        object.__setattr__(self, "layers_pattern", _names("layers_pattern", [patterns] if isinstance(patterns, str) else patterns) or None)
        for pattern in self.layers_pattern or ():
            _check_expression("layers_pattern", pattern)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(f"layers_to_transform: wanted None with target_modules={self.target_modules!r}, which is no list of names")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern: wanted layers_to_transform beside {self.layers_pattern!r}, got None")
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(_mapping(name, getattr(self, name))))
        for name in ("use_rslora", "init_lora_weights", "lora_bias", "use_dora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: wanted True or False, got {getattr(self, name)!r}")
        for name, rank in {"r": self.r, **_labelled("rank_pattern", self.rank_pattern)}.items():
            check_rank(name, rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **_labelled("alpha_pattern", self.alpha_pattern)}.items():
            check_number(name, alpha)
        check_dropout(self.lora_dropout)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer, of those that layers_pattern means, that has the module of that name; None outside of them."""
        if self.layers_pattern is None:
            found = _FIRST_NUMBER.match(name)
        else:
            found = next(filter(None, (re.match(rf"(?:^|.*?\.){each}\.(?P<n>\d+)\.", name) for each in self.layers_pattern)), None)
        return None if found is None else int(found["n"])

    def targets(self, name: str) -> bool:
        """Whether target_modules, which is not "all-linear", means the module of that name, in one of layers_to_transform."""
        numbers: Any = self.layers_to_transform
        return names_mean(self.target_modules, name) and (numbers is None or name in self.target_modules or self.layer_of(name) in numbers)

    def rank_of(self, name: str) -> int:
        """The rank of the layer or parameter of that name."""
        return next((rank for key, rank in self.rank_pattern.items() if pattern_means(key, name)), self.r)

    def alpha_of(self, name: str) -> float:
        """The lora_alpha of the layer or parameter of that name."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if pattern_means(key, name)), self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        """What multiplies the low-rank term of the layer or parameter of that name."""
        return scaling_of(self.alpha_of(name), self.rank_of(name), self.use_rslora)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> LoRAConfig:
        """PEFT's config as a dict. Refused: another method than LoRA, and any field, of whatever version, that asks for more than this.

        Raises:
            ValueError, TypeError: no LoRA config, or a wrong field. UnsupportedError: it asks for what these layers do not compute.
        """
        given = dict(_mapping("config", given))
        kind = given.pop("peft_type", None)
        if kind != "LORA":
            raise ValueError(f"peft_type: wanted 'LORA', got {kind!r}")
        wanted = ("r", "lora_alpha") if given.get("target_parameters") else ("r", "lora_alpha", "target_modules")
        missing = [name for name in wanted if given.get(name) is None]
        if missing:
            raise ValueError(f"config: wanted r, lora_alpha and target_modules, got none for {', '.join(missing)}")
        init, bias = given.pop("init_lora_weights", True), given.pop("bias", "none")
        if init not in PLAIN_INITS:
            raise UnsupportedError(
                f"init_lora_weights: wanted one of {PLAIN_INITS}, got {init!r}, under which PEFT changes the base weights; {FUSED}"
            )
        if bias != "none":
            raise UnsupportedError(f"bias: wanted 'none', got {bias!r}, under which PEFT trains biases of the base; {FUSED}")
        known = {f.name for f in fields(cls)}
        other = sorted(name for name in given.keys() - known - PROVENANCE if not _absent(given[name]))
        if other:
            more = ", ".join(f"{name}={given[name]!r}" for name in other)
            raise UnsupportedError(f"config: wanted plain LoRA, got {more}; {FUSED}")
        return cls(**{name: given[name] for name in known if given.get(name) is not None})

    @classmethod
    def from_peft(cls, config) -> LoRAConfig:
        """PEFT's own, by `from_dict`. Unless it is of a saved adapter (``inference_mode``), where training begins counts, too.

        Raises:
            The errors of `from_dict`. UnsupportedError: a task whose head PEFT trains; an initialisation that is not True or False.
        """
        given = dict(config.to_dict())
        plain = cls.from_dict(given)
        if plain.inference_mode:
            return plain
        init, task = given.get("init_lora_weights", True), next((each for each in WITH_A_HEAD if each == given.get("task_type")), None)
        if task is not None:
            hint = "take PEFT's model and fuse it, or pass task_type=None, train the head beside the adapter and save it yourself"
            raise UnsupportedError(f"task_type: wanted one that leaves the head frozen, got {task!r}, for which PEFT trains it; {hint}")
        if isinstance(init, str):
            raise UnsupportedError(f"init_lora_weights: wanted True or False to train from, got {init!r}; take PEFT's model and fuse it")
        return replace(plain, init_lora_weights=bool(init))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> LoRAConfig:
        """The config of an adapter's folder; raises like `from_dict`, and FileNotFoundError where there is none."""
        return cls.from_dict(read_config(folder))


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """``adapter_config.json`` of a folder as a dict; ValueError where it is no JSON object of at most 16 MiB."""
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"folder: wanted a directory with {CONFIG_FILE}, got {os.fspath(folder)!r} without")
    with open(path, "rb") as file:
        text = file.read(CONFIG_LIMIT + 1)
    if len(text) > CONFIG_LIMIT:
        raise ValueError(f"{path}: wanted at most {CONFIG_LIMIT} bytes, got more")
    try:
        return dict(_mapping(CONFIG_FILE, json.loads(text)))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: wanted a JSON object, got none: {error}") from None


def by_peft_before_0_19(config: Mapping[str, Any]) -> bool:
    """Whether such a version with target_parameters wrote a config: 0.17 without its number, but with fields that are not ours."""
    return str(config.get("peft_version", "0.17." if "auto_mapping" in config else "")).startswith(("0.17.", "0.18."))


def names_mean(targets: str | Collection[str] | None, name: str) -> bool:
    """Whether names, or a regular expression for the whole name, mean the module of that name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def pattern_means(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module of that name."""
    return _compiled(pattern).match(name) is not None


def pattern_of(values: dict[str, Any], default) -> dict[str, Any]:
    """rank_pattern or alpha_pattern that gives layers these values: whole names, anchored where another layer's name ends alike."""
    keys = {name: [other for other in values if pattern_means(name, other)] for name, value in values.items() if value != default}
    return {name if means == [name] else f"^{re.escape(name)}": values[name] for name, means in keys.items()}


@functools.lru_cache(1 << 14)  # re's own cache of 512 is outgrown by a pattern for each layer
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})$")


def all_linear(targets) -> bool:
    """Whether target_modules is "all-linear", in whatever case."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _names(label: str, given) -> str | tuple[str, ...]:
    if isinstance(given, str):
        _check_expression(label, given)
        return given
    if not isinstance(given, Collection) or isinstance(given, (bytes, Mapping)) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{label}: wanted a list of names or a string, got {given!r}")
    return tuple(sorted(given) if isinstance(given, (set, frozenset)) else given)


def _numbers(label: str, given) -> tuple[int, ...] | None:
    numbers = [given] if isinstance(given, int) else given
    if numbers is not None and (
        isinstance(numbers, str) or not isinstance(numbers, Collection) or not all(type(n) is int for n in numbers)
    ):
        raise TypeError(f"{label}: wanted a layer's number or a list of them, got {given!r}")
    return tuple(sorted(set(numbers))) if numbers else None


def _mapping(label: str, given) -> Mapping:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise TypeError(f"{label}: wanted a mapping from names, got {type(given).__name__}")
    return given


def _labelled(label: str, patterns: Mapping) -> dict:
    for key in patterns:
        _check_expression(label, key)
    return {f"{label}[{key!r}]": value for key, value in patterns.items()}


def _check_expression(label: str, text: str) -> None:
    try:
        pattern_means(text, "")
    except re.error as error:
        raise ValueError(f"{label}: wanted a regular expression, got {text!r}: {error}") from None


def _absent(value) -> bool:
    """None, False or empty: a field that asks for nothing. Not 0, which is layer 0 in ``layers_to_transform``."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)

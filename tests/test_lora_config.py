"""LoRAConfig: its fields, PEFT's dict and file, and what neither may ask for."""

import json
import sys

import pytest
from test_floors import PACKAGE, imports

from lora_kernels import LoRAConfig, UnsupportedError


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"target_modules": []}, ValueError, "target_modules: wanted names, a regular expression or 'all-linear', got"),
        ({"target_modules": None}, TypeError, "target_modules: wanted a list of names or a string, got None"),
        ({"target_modules": [1]}, TypeError, "target_modules: wanted a list of names"),
        ({"target_modules": "q_proj("}, ValueError, r"target_modules: wanted a regular expression, got 'q_proj\('"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules: wanted a list of names or a string, got 3"),
        ({"r": 0}, UnsupportedError, "r: wanted a rank from 1 to 512, got 0"),
        ({"r": "8"}, TypeError, "r: wanted an int, got str"),
        ({"rank_pattern": {"q": 600}}, UnsupportedError, r"rank_pattern\['q'\]: wanted a rank from 1 to 512, got 600"),
        ({"rank_pattern": {"*": 4}}, ValueError, r"rank_pattern: wanted a regular expression, got '\*'"),
        ({"rank_pattern": [4]}, TypeError, "rank_pattern: wanted a mapping from names, got list"),
        ({"alpha_pattern": {"q": True}}, TypeError, r"alpha_pattern\['q'\]: wanted a number, got True"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha: wanted a finite number, got inf"),
        ({"lora_dropout": 1}, ValueError, r"lora_dropout: wanted a probability in \[0, 1\), got 1"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform: wanted a layer's number or a list of them, got '1'"),
        ({"layers_to_transform": [True]}, TypeError, r"layers_to_transform: wanted a layer's number or a list of them, got \[True\]"),
        ({"target_modules": ".*q", "layers_to_transform": 0}, ValueError, "layers_to_transform: wanted None with target_modules='.*q'"),
        ({"layers_pattern": "h"}, ValueError, r"layers_pattern: wanted layers_to_transform beside \('h',\), got None"),
        ({"layers_pattern": "(", "layers_to_transform": 0}, ValueError, r"layers_pattern: wanted a regular expression, got '\('"),
        ({"use_rslora": 1}, TypeError, "use_rslora: wanted True or False, got 1"),
    ],
)
def test_config_refusals(kwargs, error, match):
    with pytest.raises(error, match=match):
        LoRAConfig(**{"target_modules": ["q"], **kwargs})


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def test_config_from_pefts_dict():
    given = {**PLAIN, "rank_pattern": {"q_proj": 2}, "use_rslora": True, "alpha_pattern": None, "task_type": "CAUSAL_LM", "bias": "none"}
    given |= {
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "gaussian",
        "a_field_of_tomorrow": None,
        "another": {},
        "layers_pattern": "",
        "layers_to_transform": [],
    }
    config = LoRAConfig.from_dict(given)
    assert config == LoRAConfig(target_modules=["q_proj"], r=4, lora_alpha=8, use_rslora=True, rank_pattern={"q_proj": 2})
    ranks = {name: config.rank_of(name) for name in ("q_proj", "a.q_proj", "a.q_proj.b", "a.q_projection", "a.xq_proj")}
    assert list(ranks.values()) == [2, 2, 4, 4, 4], "whole parts of a name"
    assert config.scaling_of("x") == 4.0


@pytest.mark.parametrize(
    "name, pattern, layer",
    [
        ("model.layers.3.q", None, 3),
        ("model.layers.12.experts.3.q", None, 12),
        ("model.layers.12.experts.3.q", "experts", 3),
        ("model.layers.12.experts.3.q", ["h", "layers"], 12),
        ("model.layers.12.experts.3.q", ["h", "exper"], None),
        ("model.layers.12", None, None),
        ("layers.2.q", None, None),  # PEFT's way: something stands before
        ("layers.2.q", r"l\w*s", 2),
        ("head", None, None),
    ],
)
def test_the_layer_of_a_name(name, pattern, layer):
    config = LoRAConfig(target_modules=["q", "layers.2.q"], layers_to_transform=[2, 3, 3], layers_pattern=pattern)
    assert config.layer_of(name) == layer and config.layers_to_transform == (2, 3)
    assert config.targets(name) == (name == "layers.2.q" or name.endswith(".q") and layer == 3), "a whole name is in any layer"


@pytest.mark.parametrize(
    "changed, error, match",
    [
        ({"peft_type": "LOHA"}, ValueError, "peft_type: wanted 'LORA', got 'LOHA'"),
        ({"peft_type": None}, ValueError, "peft_type: wanted 'LORA', got None"),
        ({"r": None}, ValueError, "wanted r, lora_alpha and target_modules, got none for r"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "got 'pissa_niter_4', under which PEFT changes the base weights"),
        ({"bias": "lora_only"}, UnsupportedError, "bias: wanted 'none', got 'lora_only'"),
        (
            {"modules_to_save": ["head"]},
            UnsupportedError,
            r"wanted plain LoRA, got modules_to_save=\['head'\]; PEFT's own model of it can be fused",
        ),
        ({"fan_in_fan_out": True, "use_bdlora": {"nblocks": 2}}, UnsupportedError, "got fan_in_fan_out=True, use_bdlora="),
        ({"layers_to_transform": 0.5}, TypeError, "layers_to_transform: wanted a layer's number or a list of them, got 0.5"),
        ({"a_field_of_tomorrow": 1}, UnsupportedError, "got a_field_of_tomorrow=1"),
        ({"r": 4.0}, TypeError, "r: wanted an int, got float"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha: wanted a number, got '8'"),
    ],
)
def test_what_pefts_dict_may_not_ask_for(changed, error, match):
    with pytest.raises(error, match=match):
        LoRAConfig.from_dict({**PLAIN, **changed})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"r": 1} x', "[" * 100_000, b"\xff\xfe{"])
def test_a_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="adapter_config.json: wanted a JSON object, got none"):
        LoRAConfig.from_folder(tmp_path)


def test_config_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: wanted a directory with adapter_config.json, got"):
        LoRAConfig.from_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert LoRAConfig.from_folder(tmp_path) == LoRAConfig(target_modules=["q_proj"], r=4, lora_alpha=8)
    with open(tmp_path / "adapter_config.json", "a") as file:
        file.write(" " * (1 << 24))
    with pytest.raises(ValueError, match="wanted at most 16777216 bytes, got more"):
        LoRAConfig.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["lora_config", "apply", "files"])
def test_importing_asks_for_torch_alone(name):
    modules = {module.split(".")[0] for module in imports(PACKAGE / f"{name}.py", lazy=False)}
    assert modules - set(sys.stdlib_module_names) <= {"lora_kernels", "torch"}, "safetensors is imported when a file is read or written"

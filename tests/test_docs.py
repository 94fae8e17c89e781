"""The documents' python blocks run, in order, and what they assert holds."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [  # the page, its blocks, and the package of an extra that it is about
    ("many_adapters.md", 6, "torch"),
    ("merging.md", 4, "torch"),
    ("analysis.md", 5, "torch"),
    ("adapter_files.md", 7, "peft"),
    ("from_unsloth.md", 1, "peft"),
    ("peft.md", 3, "peft"),
    ("quantised.md", 6, "bitsandbytes"),
    ("experts.md", 3, "peft"),
    ("shared_input.md", 2, "transformers"),
    ("gated.md", 1, "transformers"),
    ("packed.md", 4, "peft"),
    ("serving.md", 3, "peft"),
]


@pytest.mark.parametrize("name, blocks", [(name, blocks) for name, blocks, needs in PAGES if importlib.util.find_spec(needs)])
def test_python_blocks(name, blocks):
    text, namespace = (DOCS / name).read_text(), {"__name__": name}
    found = list(BLOCK.finditer(text))
    assert len(found) == blocks == text.count("```python")
    for block in found:
        lines_above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_above + block[1], str(DOCS / name), "exec"), namespace)  # a traceback names the document's line


def test_the_order_of_reading_names_files_that_there_are():
    part = (DOCS / "design.md").read_text().split("## Reading the code")[1].split("## ")[0]
    named = re.findall(r"`([\w/]+\.py)`", part)
    assert len(named) > 30 and [name for name in named if not (DOCS.parent / "lora_kernels" / name).exists()] == []


def test_the_slips_are_counted():
    from mutants_launcher import EVERY

    part = (DOCS / "numerics.md").read_text().split("## What the tests notice")[1]
    survivors = [(m.name, m.file) for m in EVERY if m.note]
    assert f"in {len(EVERY)} ways" in part
    assert f"{len(EVERY) - len(survivors)} are noticed and {len(survivors)} survive" in part
    named = re.findall(r"^\| (.+?) \| (\S+\.py) \|", part, re.MULTILINE)
    assert sorted(named) == sorted((name, file) for name, file in survivors if file.startswith("kernels/"))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="README's blocks are about PEFT's models")
def test_readme_blocks(tmp_path, monkeypatch):
    """As they stand, with what a reader has: a PEFT model and a plain one, a batch, and two adapters' folders."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=64)
    targets = LoraConfig(target_modules=["q_proj", "v_proj"], r=16, init_lora_weights=False)
    monkeypatch.chdir(tmp_path)
    for name in ("law", "tax"):
        get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), targets).save_pretrained(tmp_path / "adapters" / name)
    ids = torch.randint(0, 64, (4, 6))
    names = {
        "model": get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), targets),
        "served": LlamaForCausalLM(LlamaConfig(**sizes)).eval(),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    blocks = list(BLOCK.finditer((DOCS.parent / "README.md").read_text()))
    for number, block in enumerate(blocks):
        exec(compile(block[1], f"README.md, block {number}", "exec"), names)
        if number == 0:
            first = names["model"].base_model.model.model.layers[0].self_attn.q_proj
            assert first.lora_A["default"].weight.grad.any()
            names["model"] = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()  # the next are about one without PEFT
    assert number == 4 and (tmp_path / "adapters" / "mine" / "adapter_config.json").exists()

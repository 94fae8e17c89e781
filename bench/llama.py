"""A small Llama with PEFT's LoRA on every linear, and English prose as bytes: what is trained where no download is to be had."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.integrations.peft import fuse

from .conditions import ROOT

TEXT = ROOT / "LICENSE"


def blocks(length: int) -> list[dict[str, torch.Tensor]]:
    """The licence cut into blocks of ``length`` bytes, each byte a token: nothing to tokenise with."""
    tokens = torch.tensor(list(TEXT.read_bytes()))
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": block, "labels": block} for block in whole]


def llama(layers: int = 1, width: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, 256 tokens; a seed gives the same weights whatever was drawn before."""
    torch.manual_seed(seed)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    shape = dict(vocab_size=256, hidden_size=width, intermediate_size=3 * width // 2, num_hidden_layers=layers)
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, use_cache=False)).to(dtype)


def stock(model: nn.Module, **changed) -> nn.Module:
    """The model with PEFT's LoRA, r = 4, scale 2; ``changed``: other fields of the LoraConfig."""
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changed}))


def fused(model: nn.Module, shared: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A copy of a PEFT model on `lora_kernels`, but for ``shared``; an error where a layer would be left to PEFT."""
    model = copy.deepcopy(model, {id(p): p for p in shared})
    report = fuse(model)
    if report.left:
        raise RuntimeError(f"model: wanted every LoRA layer fused, got {report}")
    return model

"""vLLM (vllm-project/vllm, v0.33.0): lora_shrink into a float32 u, lora_expand into the base product, on one stream, as by default.

Its default tiles, or those of VLLM_TUNED_CONFIG_FOLDER; the grid for the adapters in use (``specialize_active_lora``); its functions
called without the operator that vLLM registers around them.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton

from bench import peer_modules

ROOT = peer_modules.code(
    "vllm",
    "git clone --depth 1 --branch v0.33.0 --filter=blob:none --sparse https://github.com/vllm-project/vllm bench/peers/vllm"
    " && git -C bench/peers/vllm sparse-checkout set vllm/lora/ops",
)


def no_operator(**_):
    raise AttributeError("vLLM then calls the function")


def init_logger(name: str) -> SimpleNamespace:
    log = logging.getLogger(name)
    return SimpleNamespace(info_once=log.info, warning_once=log.info)


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


peer_modules.bare(ROOT, "vllm.lora.ops.triton_ops", "vllm.utils")
peer_modules.stand_in(
    "vllm.envs",
    VLLM_BATCH_INVARIANT=False,
    VLLM_LORA_ENABLE_DUAL_STREAM=False,
    VLLM_LORA_DISABLE_PDL=False,
    VLLM_TUNED_CONFIG_FOLDER=os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
)
peer_modules.stand_in("vllm.logger", init_logger=init_logger)
peer_modules.stand_in(
    "vllm.platforms",
    current_platform=SimpleNamespace(
        is_cuda=lambda: torch.version.hip is None,
        has_device_capability=lambda wanted: capability() >= wanted,
        is_device_capability=lambda wanted: capability() == wanted,
    ),
)
peer_modules.stand_in("vllm.triton_utils", triton=triton, tl=triton.language)
peer_modules.stand_in("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
peer_modules.stand_in("vllm.utils.torch_utils", async_tensor_h2d=None, direct_register_custom_op=no_operator)
metadata, shrink, expand, utils = (
    importlib.import_module(f"vllm.lora.ops.triton_ops.{name}")
    for name in ("lora_kernel_metadata", "lora_shrink_op", "lora_expand_op", "utils")
)


def plan(ids, ranks, scale, decode):
    # Its tables know a stack by its address alone, and keep it alive.
    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()
    meta = metadata.LoRAKernelMeta.make(len(ranks), ids.numel(), ids.device)
    meta.prepare_tensors(ids.int())
    return meta.meta_args(ids.numel(), specialize_active_lora=True), scale, []


def multi_lora_linear(x, weight, A, B, plan, widths=()):
    meta, scale, stacks = plan
    if not stacks:  # each layer's in one piece, made once
        layers = (A.chunk(len(widths), 1), B.split(widths, 1)) if widths else ((A,), (B,))
        stacks += [[t.contiguous() for t in each] for each in layers]
    As, Bs = stacks
    y = F.linear(x, weight)
    u = torch.empty(len(As), x.shape[0], As[0].shape[1], dtype=torch.float32, device=x.device)
    shrink.lora_shrink(x, As, u, *meta, scale)
    expand.lora_expand(u, Bs, y, *meta, offset_start=0, add_inputs=True)
    return y

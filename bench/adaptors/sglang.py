"""SGLang (sgl-project/sglang, v0.5.23): DenseLoraRunner, its triton_v2 backend, with the plans that it has for the GPU.

Where a plan says so, shrink runs on a second stream beside the base product. Some plans ("all_slots") multiply with every loaded adapter.
"""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench import peer_modules

ROOT = peer_modules.code(
    "sglang",
    "git clone --depth 1 --branch v0.5.23 --filter=blob:none --sparse https://github.com/sgl-project/sglang bench/peers/sglang"
    " && git -C bench/peers/sglang sparse-checkout set python/sglang/kernels/ops/lora python/sglang/srt/lora"
    " && pip install --target bench/peers/site msgspec pydantic",
)
CUDA_ROUTES_FROM = 513  # of its three makers of routes, that for more tokens than this is a CUDA extension; a plan is not timed

peer_modules.bare(
    ROOT / "python",
    "sglang.kernels.ops.lora.common", "sglang.kernels.ops.lora.moe", "sglang.kernels.jit", "sglang.srt.lora.dense",
    "sglang.srt.model_executor", "sglang.srt.utils",
)  # fmt: skip
peer_modules.stand_in("sglang.srt.environ", envs=SimpleNamespace(SGLANG_LORA_DENSE_CONFIG_DIR=SimpleNamespace(get=lambda: None)))
peer_modules.stand_in("sglang.srt.model_executor.forward_batch_info", ForwardBatch=None)
peer_modules.stand_in("sglang.srt.utils.hf_transformers_utils", AutoConfig=None)
peer_modules.stand_in("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=None)
peer_modules.stand_in("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: False)
runner, routing, workspace, utils = (
    importlib.import_module(f"sglang.{name}")
    for name in ("srt.lora.dense.runner", "kernels.ops.lora.common.routing", "srt.lora.workspace", "srt.lora.utils")
)


class Workspace(workspace.LoraWorkspace):
    """One set of buffers for all streams: a graph is warmed up on another stream than it is captured on."""

    @staticmethod
    def _caller(device):
        return 0

    def side_stream(self, device):
        while (stream := super().side_stream(device)) == torch.cuda.current_stream(device):
            self._streams.clear()
        return stream


class Runner(runner.DenseLoraRunner):
    def _build_route(self, key):
        if self.num_tokens < CUDA_ROUTES_FROM:
            return super()._build_route(key)
        return routing.build_route(
            self.token_slots, max_loras=self.max_loras, block_size=key[1], workspace=self.workspace, tensor_prefix="", capacity=0
        )


def plan(ids, ranks, scale, decode):
    made = Runner(Workspace(), max_loras=len(ranks), device=ids.device)
    made.begin_batch(
        token_slots=ids.int(),
        lora_ranks=torch.tensor(ranks, dtype=torch.int32, device=ids.device),
        scalings=torch.full((len(ranks),), scale, device=ids.device),
        num_tokens=ids.numel(),
        phase=utils.Phase.DECODE if decode else utils.Phase.PREFILL,
        graph_mode=False,
    )
    return made


def multi_lora_linear(x, weight, A, B, plan, widths=()):
    N, K = weight.shape
    how = plan.plan_for(runner.DenseLoraKind.LINEAR, B.shape[2], K, N, num_tokens=x.shape[0])
    return plan.apply(x, lambda: F.linear(x, weight), how, a=A, b=B, offsets=(0, *itertools.accumulate(widths or (N,))))

"""Punica (punica-ai/punica, 591b598): bgmv twice into the base product. Written from its source; untested, for it is built by nvcc.

16 bits; r among 8, 16, 32 and 64, K and N among those of its csrc/bgmv/bgmv_config.h (14336 is not). An id of -1 would be read with.
"""

from __future__ import annotations

import importlib

import torch.nn.functional as F

from bench import peer_modules

peer_modules.code(
    "site/punica",
    "git clone --recursive https://github.com/punica-ai/punica bench/peers/punica"
    " && pip install --no-deps --no-build-isolation --target bench/peers/site bench/peers/punica",
)
peer_modules.bare(peer_modules.FOLDER / "site", "punica")
ops = importlib.import_module("punica.ops")


def plan(ids, ranks, scale, decode):
    without = int((ids < 0).sum())
    if 0 < without < ids.numel():
        raise ValueError(f"ids: wanted an adapter for all tokens or for none, got {without} of {ids.numel()} without")
    return (None if without else ids), scale


def multi_lora_linear(x, weight, A, B, plan):
    ids, scale = plan
    y = F.linear(x, weight)
    if ids is not None:
        ops.add_lora_bgmv(y, x, A[:, None], B[:, None], ids, 0, scale)
    return y

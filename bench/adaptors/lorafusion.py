"""LoRAFusion (CentML/lorafusion, c48d7fd): the launchers of its training kernels, chained as its own autograd Function chains them.

That one, in lorafusion.ops.lora_v1, cannot be imported with a Triton that has no ``_experimental_descriptor_load``. Its pointer kernels
are what is left: with an older Triton it takes TMA descriptors on an H100. Tiles are those of its config.py for the GPU's name, on
another sm_90 its H100's. Ranks are powers of two from 16.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging

import torch
from triton import OutOfResources

from bench import peer_modules

ROOT = peer_modules.code(
    "lorafusion",
    "git clone https://github.com/CentML/lorafusion bench/peers/lorafusion && git -C bench/peers/lorafusion checkout c48d7fd",
)
peer_modules.bare(ROOT, "lorafusion.ops.triton_ops", "lorafusion.utils")
peer_modules.stand_in("loguru", logger=logging.getLogger("lorafusion"))
peer_modules.stand_in("lorafusion.utils.benchmark", benchmark=None, set_warmup_and_number=None)
peer_modules.stand_in("lorafusion.utils.testing", assert_verbose_allclose_two_rounds=None)
config, dropout, xw_sb, dys_dyb, dyw_dsa = (
    importlib.import_module(f"lorafusion.ops.triton_ops.{name}")
    for name in ("config", "dropout", "fused_lora_xw_sb", "fused_lora_dys_dyb", "fused_lora_dyw_dsa")
)


TILES: dict = {}  # by kernel and rank


def hardware():
    """config.py's tiles for this GPU; on another sm_90 those of its H100."""
    try:
        return config.get_hardware_config()
    except ValueError:
        if torch.cuda.get_device_capability() != (9, 0):
            raise
        return config.H100_CONFIG


def launch(module, r, *args):
    """Where shared memory does not hold a tile's stages, as for ranks past 32 on an H100, with fewer."""
    name = module.__name__.split(".")[-1]
    if (name, r) not in TILES:
        TILES[name, r] = getattr(hardware(), name)
    tile = TILES[name, r]
    try:
        return getattr(module, name)(*args, config=tile)
    except OutOfResources:
        if tile.num_stages == 1:
            raise
        TILES[name, r] = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
        return launch(module, r, *args)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B, scale, p):
        # At p = 0 the mask is asked its shape alone.
        dropped, keep = dropout.seeded_dropout(x, p) if p else (x, x.new_ones((), dtype=torch.bool).expand(x.shape))
        s = dropped @ A.T
        ctx.save_for_backward(dropped, keep, weight, A, B, s)
        ctx.scale, ctx.p = scale, p
        return launch(xw_sb, A.shape[0], x, weight, s, B, scale)

    @staticmethod
    def backward(ctx, dY):
        dropped, keep, weight, A, B, s = ctx.saved_tensors
        dB, dS = launch(dys_dyb, A.shape[0], dY, B, s, ctx.scale)
        return launch(dyw_dsa, A.shape[0], dY, weight, dS, A, ctx.p, keep), None, dS.T @ dropped, dB, None, None


def lora_linear(x, weight, A, B, scale, dropout_p):
    if x.shape[1] % 256:
        raise ValueError(f"K: wanted a multiple of 256, for dX reads past other ones, got {x.shape[1]}")
    return Function.apply(x, weight, A, B, scale, dropout_p)

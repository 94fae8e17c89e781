"""Dropout under tensor parallel: whose mask a rank's features see, and that gradients are those of what was computed."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Mlp, batch, case, gradients, hold
from ranks_tensor import PLAN, SHAPE, K, N, R, layer, parallel, passes, plain_step
from torch.distributed.tensor import Replicate
from torch.utils.checkpoint import checkpoint

from lora_kernels import philox
from lora_kernels.integrations.tensor_parallel import ColwiseLoRA, RowwiseLoRA


def held_dropout(one, style, step) -> None:
    module = parallel(one, style)
    y, dX, _, _ = passes(module, batch(5, *SHAPE, K)[0], batch(6, *SHAPE, N)[1])
    hold({"y": y, "dX": dX, **gradients(module)}, one, step)


@case(2, 4)
def dropout_of_columns():
    """With generators in step the mask is one process's, whatever the number of ranks."""
    one = layer(lora_dropout=0.4)

    def step(module):
        torch.manual_seed(11)
        return plain_step(module)

    torch.manual_seed(11)
    held_dropout(one, ColwiseLoRA(output_layouts=Replicate()), step)


@case(2)
def dropout_of_columns_with_generators_out_of_step():
    """Each rank's features have a mask of their own, and the gradients are those of that function."""
    one, world = layer(lora_dropout=0.4), dist.get_world_size()

    def step(module):
        x, dY = (t.to(module.weight.dtype) for t in (batch(5, *SHAPE, K)[0], batch(6, *SHAPE, N)[1]))
        x.requires_grad_()
        found = []
        for rank in range(world):
            torch.manual_seed(20 + rank)
            y, mine = module(x).chunk(world, -1)[rank], dY.chunk(world, -1)[rank]
            y.backward(mine)
            found.append(y)
        return {"y": torch.cat(found, -1), "dX": x.grad, **gradients(module)}

    torch.manual_seed(20 + dist.get_rank())
    held_dropout(one, ColwiseLoRA(output_layouts=Replicate()), step)


@case(2, 4)
def dropout_of_rows():
    """Each rank's features have the mask of the seed plus its rank, none the same as another's."""
    one, world = layer(lora_dropout=0.4), dist.get_world_size()
    tokens = SHAPE[0] * SHAPE[1]
    torch.manual_seed(30)
    seed = philox.draw_seed(torch.device("cpu"))
    masks = [philox.keep_mask(seed + rank, tokens, K // world, 0.4) for rank in range(world)]
    assert not any(torch.equal(masks[0], other) for other in masks[1:])
    keep = torch.cat(masks, 1).view(*SHAPE, K) * philox.inv_keep(0.4)

    def step(module):
        x, dY = (t.to(module.weight.dtype) for t in (batch(5, *SHAPE, K)[0], batch(6, *SHAPE, N)[1]))
        x.requires_grad_()
        u = F.linear(x * keep.to(x.dtype), module.lora_A)
        y = F.linear(x, module.weight, module.bias) + F.linear(u, module.lora_B) * module.scaling
        y.backward(dY)
        return {"y": y, "dX": x.grad, **gradients(module)}

    torch.manual_seed(30)
    held_dropout(one, RowwiseLoRA(input_layouts=Replicate()), step)


@case(2)
def recomputed_with_the_same_dropout():
    """Activation checkpointing draws the seeds again: gradients are the same bits as without it."""
    module = parallel(Mlp(K, N, r=R, lora_dropout=0.4), PLAN)
    found = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        torch.manual_seed(3)
        y, dX, _, _ = passes(run, batch(5, *SHAPE, K)[0], batch(6, *SHAPE, K)[1])
        found.append([y, dX, *gradients(module).values()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)

"""Tensor parallel for `FusedLoRALinear` and `MultiLoRALinear`, by torch's own ``parallelize_module``, on t ranks:

    column-parallel   W [N/t, K], B [N/t, r], A [r, K] on every rank    y_i = x W_i^T + u B_i^T          dX, dA: sums over ranks
    row-parallel      W [N, K/t], A [r, K/t], B [N, r] on every rank    y = sum_i x_i W_i^T + u_i B^T    y, dB: sums over ranks

The low-rank term is inside y_i and dX_i before they are summed, so it rides in the collectives that the base has anyway. What is sent
besides is the gradient of the one factor that every rank holds, r K or r N numbers. The operators see plain local tensors.

    parallelize_module(mlp, mesh, {"up": ColwiseLoRA(), "down": RowwiseLoRA()})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ..autograd import lora_linear
from ..merging import check_unmerged
from ..multi import MultiLoRALinear
from ..nn import FusedLoRALinear
from ..philox import draw_seed
from ..problem import UnsupportedError
from ..segments import Segments


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a style lie on the mesh. ``split``: the size that ranks share, which their number must divide."""

    split: str
    x: Placement
    y: Placement
    parameters: Mapping[str, Placement]


# The last two dimensions of A and B, so that stacks of adapters lie as one does.
COLUMN = Layout("out_features", Replicate(), Shard(-1), {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(-2)})
ROW = Layout("in_features", Shard(-1), Partial(), {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(-1), "lora_B": Replicate()})
TABLES = ("scaling", "ranks")  # of a MultiLoRALinear, whole on every rank


class ColwiseLoRA(ColwiseParallel):
    """Column-parallel `FusedLoRALinear` or `MultiLoRALinear`: the output features are split, each rank computes its own from the whole x.

    Args:
        input_layouts: How x comes: ``Replicate()`` (None), or ``Shard(1)`` of ``[B, S, K]`` for sequence parallel, which is gathered.
        output_layouts: How y goes: ``Shard(-1)`` (None), ``Replicate()`` or a shard of another axis.
        use_local_output: Whether y is the local torch.Tensor or a DTensor.
    Raises, from parallelize_module:
        TypeError: another module. ValueError: the ranks do not divide out_features, or the mesh has several dimensions. RuntimeError: it is
        merged.
        UnsupportedError: it has parameters or buffers that these layers do not have.
    Dropout:
        The seed comes from torch's generator on each rank. Where the generators of the mesh's ranks are in step (the same
        torch.manual_seed, as DTensor asks) the mask is one process's. Where they are not, each rank's output features see a mask of
        their own, and gradients are those of what was computed.
    """

    layout = COLUMN

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return shard(module, device_mesh, self)


class RowwiseLoRA(RowwiseParallel):
    """Row-parallel `FusedLoRALinear` or `MultiLoRALinear`: the input features are split, y is the sum of what ranks compute from theirs.

    Args:
        input_layouts: How x comes: ``Shard(-1)`` (None) or ``Replicate()``, of which each rank takes its part.
        output_layouts: How y goes: ``Replicate()`` (None), an all-reduce, or ``Shard(1)`` for sequence parallel, a reduce-scatter.
        use_local_output: Whether y is the local torch.Tensor or a DTensor.
    Raises, from parallelize_module:
        As `ColwiseLoRA`, with in_features.
    Dropout:
        A mask of its own for each rank's features, from the seed plus the rank: not one process's mask bit for bit, whose columns are
        numbered over all features, but as random, and never the same for two ranks' features.
    """

    layout = ROW

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return shard(module, device_mesh, self)


class ParallelLoRALinear(FusedLoRALinear):
    """What the styles turn a `FusedLoRALinear` into: its parameters are DTensors, `in_features` and `out_features` the whole layer's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run(self, x, self.weight if self.enabled else self.base_weight(), self.enabled and not self.merged, scale=self.scaling)


class ParallelMultiLoRALinear(MultiLoRALinear):
    """What the styles turn a `MultiLoRALinear` into. Its slots are filled before: taking one raises UnsupportedError."""

    def forward(self, x: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
        """``segments`` name an adapter for each token that the layer computes on, all of them where sequence parallel gathers x."""
        ranks = self.ranks if self._mixed else None
        return run(self, x, self.weight, True, scale=self.scaling, segments=segments, ranks=ranks)


PARALLEL = {FusedLoRALinear: ParallelLoRALinear, MultiLoRALinear: ParallelMultiLoRALinear}


def run(layer: Any, x: torch.Tensor, weight: Any, adapted: bool, **adapter) -> torch.Tensor:
    """The forward pass on local tensors, between x and y as the style's layouts have them; ``adapted``: with the low-rank term."""
    style, mesh = layer.style, layer.weight.device_mesh
    layout, rank = style.layout, mesh.get_coordinate()[0]  # torch 2.8 compiles no get_local_rank
    # before x, so that the backward pass sends dX first, for which the layer below waits
    A, B = local_parameter(layer.lora_A), local_parameter(layer.lora_B)
    bias = None if layer.bias is None else local_parameter(layer.bias)
    if bias is not None and layout is ROW and rank:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool), 0)  # the sum over ranks adds it once, an infinite one too
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
    if x.placements != (layout.x,):  # not always: where layers share an x their parts of dX are summed before they are sent
        x = x.redistribute(placements=[layout.x])
    x, weight = local(x), weight.to_local()
    if adapted:
        if isinstance(layer, MultiLoRALinear):
            adapter["segments"] = layer.planned(x, adapter["segments"])
        seed = draw_seed(x.device) if layer.training and layer.lora_dropout else None
        if seed is not None and layout is ROW:
            seed = seed + rank
        y = lora_linear(x, weight, A, B, bias, dropout_p=layer.lora_dropout, training=layer.training, seed=seed, **adapter)
    else:
        y = F.linear(x, weight, bias)
    result = DTensor.from_local(y, mesh, [layout.y], run_check=False).redistribute(placements=style.output_layouts)
    return result.to_local() if style.use_local_output else result


def local(t: DTensor) -> torch.Tensor:
    """This rank's part. Of what every rank has whole, each computes a part of the gradient, whose sum is for t's own backward pass."""
    return t.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in t.placements])


def local_parameter(p: DTensor) -> torch.Tensor:
    """This rank's part of a parameter; the gradient's sum is sent for at once, and awaited by whoever reads it."""
    return local(p.redistribute(placements=p.placements, async_op=True)) if p.requires_grad else p.to_local()


def shard(module: nn.Module, mesh: DeviceMesh, style: ColwiseLoRA | RowwiseLoRA) -> nn.Module:
    """Distribute the parameters over the mesh, in place."""
    if type(module) not in PARALLEL:
        raise TypeError(f"module: wanted a FusedLoRALinear or MultiLoRALinear for {type(style).__name__}, got {type(module).__name__}")
    layout, ranks = style.layout, mesh.size()
    if mesh.ndim != 1:
        raise ValueError(f'device_mesh: wanted one dimension, got {mesh.ndim}; name the tensor-parallel one, as in mesh["tp"]')
    check_unmerged("module", module)
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in (*layout.parameters, *TABLES)]
    if others:
        raise UnsupportedError(f"module: wanted {', '.join(layout.parameters)} alone in it, got {', '.join(others)} too")
    if getattr(module, layout.split) % ranks:
        raise ValueError(f"{layout.split}: wanted a multiple of the mesh's {ranks} ranks, got {getattr(module, layout.split)}")
    for name, parameter in list(module.named_parameters()):
        sharded = distribute_tensor(parameter.detach(), mesh, [layout.parameters[name]], src_data_rank=style.src_data_rank)
        module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
    parallel: Any = module
    parallel.__class__, parallel.style = PARALLEL[type(module)], style
    return parallel

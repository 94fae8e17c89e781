"""Data parallel: DDP and FSDP2 (`fully_shard`) over frozen bases and trained adapters, batches of different lengths, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Mlp, batch, case, gradients, hold, library_calls, raises
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    MultiLoRALinear,
    Segments,
    UnsupportedError,
    apply_lora,
    gated,
    load_adapter,
    lora_linear,
    recompute_gates,
    remove_lora,
    save_adapter,
)

LENGTHS = (5, 0, 9, 2)  # tokens of each rank's batch; rank 1 has none


def backward(model: nn.Module, rank: int, seed: int = 1, dtype=torch.float32) -> None:
    """The pass of this rank's batch."""
    x, dY = batch(10 * seed + rank, LENGTHS[rank], 24, dtype=dtype)
    model(x).backward(dY)


def mean(model: nn.Module, one) -> dict[str, torch.Tensor]:
    """The mean over ranks of the gradients that ``one(rank)`` gives, at least in float32: what data parallel computes."""
    total: dict = {}
    for rank in range(dist.get_world_size()):
        model.zero_grad()
        one(rank)
        for name, g in gradients(model).items():
            total[name] = total.get(name, 0) + g.to(torch.promote_types(g.dtype, torch.float32)) / dist.get_world_size()
    return total


def mean_step(model: nn.Module) -> dict[str, torch.Tensor]:
    return mean(model, lambda rank: backward(model, rank, dtype=model.up.weight.dtype))


def two_batches(model: nn.Module) -> dict[str, torch.Tensor]:
    def one(rank):
        for seed in (2, 1):
            backward(model, rank, seed, model.up.weight.dtype)

    return mean(model, one)


def freeze_down(model: nn.Module) -> nn.Module:
    model.down.lora_A.requires_grad_(False)
    model.down.lora_B.requires_grad_(False)
    return model


def of(model: nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    """Gradients under the plain model's names, those of ``part``."""
    found = {name.removeprefix("module."): g for name, g in gradients(model).items()}
    return {name: g for name, g in found.items() if name.startswith(part)}


def sharded(model: nn.Module, **kwargs) -> nn.Module:
    """A copy under fully_shard, each LoRA layer a group of its own."""
    model = copy.deepcopy(model)
    for layer in (model.up, model.down):
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


@contextlib.contextmanager
def shared_folder():
    """A temporary folder that all ranks see."""
    with tempfile.TemporaryDirectory() as mine:
        name = [mine]
        dist.broadcast_object_list(name)
        yield name[0]
        dist.barrier()


@case(2, 4)
def ddp():
    """The mean of the ranks' gradients, over two steps without a complaint, at lengths that differ and where a rank has no token."""
    model = Mlp()
    for static in (False, True):
        parallel = DistributedDataParallel(copy.deepcopy(model), static_graph=static)
        for _ in range(2):
            parallel.zero_grad()
            with library_calls() as ran:
                backward(parallel, dist.get_rank())
            calls = 2 if LENGTHS[dist.get_rank()] else 0
            assert ran == {"forward": calls, "backward": calls}
        hold(of(parallel), model, mean_step)


class GatedMlp(Mlp):
    """`Mlp` with a gate, whose forward is the one that `recompute_gates` knows."""

    def __init__(self):
        super().__init__()
        self.gate, self.act = FusedLoRALinear(24, 40, r=4, lora_alpha=6, init_lora_weights=False), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@case(2)
def a_gate_that_is_made_again():
    """Under DDP and fully_shard, over the model or over each layer, whose hooks it does not pass by."""
    plain, rank = GatedMlp(), dist.get_rank()
    model = copy.deepcopy(plain)
    assert recompute_gates(model) == [""]
    over_all = [DistributedDataParallel(copy.deepcopy(model)), fully_shard(copy.deepcopy(model), reshard_after_forward=True)]
    for parallel, nodes in ((over_all[0], 1), (over_all[1], 1), (sharded(model), 0)):
        made, apply = [], gated.GatedFunction.apply
        gated.GatedFunction.apply = lambda *args: made.append(1) or apply(*args)  # noqa: B023
        try:
            backward(parallel, rank)
        finally:
            gated.GatedFunction.apply = apply
        assert len(made) == (nodes if LENGTHS[rank] else 0)
        hold(of(parallel), plain, mean_step)


@case(2)
def ddp_accumulates_under_no_sync():
    model, rank = Mlp(), dist.get_rank()
    parallel = DistributedDataParallel(copy.deepcopy(model))
    with parallel.no_sync():
        backward(parallel, rank, seed=2)
    backward(parallel, rank, seed=1)

    hold(of(parallel), model, two_batches)


@case(2)
def ddp_with_a_disabled_layer():
    """Its adapter gets no gradient: DDP is told by find_unused_parameters or static_graph, or the adapter is frozen before."""
    model = Mlp()
    model.down.enabled = False

    for told in ({"find_unused_parameters": True}, {"static_graph": True}, {}):
        mine = copy.deepcopy(model)
        parallel = DistributedDataParallel(mine if told else freeze_down(mine), **told)
        for _ in range(2):
            parallel.zero_grad()
            backward(parallel, dist.get_rank())
        hold(of(parallel, "up"), model, lambda model: mean_step(freeze_down(model)))
        assert not any(g is not None and g.any() for g in of(parallel, "down").values())


def many(model: nn.Module, rank: int, dtype=torch.float32) -> None:
    """A rank's pass over 5 adapters: rank 0 alone has tokens of adapter 1, and nobody of adapter 3."""
    ids = torch.tensor([[0, 1, -1, 2, 0, 1, 4], [4, 2, 0, -1, 2], [], [2, -1]][rank], dtype=torch.int64)
    x, dY = batch(rank, len(ids), 24, dtype=dtype)
    model(x, Segments.from_ids(ids, 5)).backward(dY)


@case(2, 4)
def many_adapters():
    """Under DDP and fully_shard each slot's gradient is the mean over ranks, also where a rank has none of its tokens."""
    model = MultiLoRALinear(24, 24, num_adapters=5, r=[4, 2, 4, 3, 1], init_lora_weights=False)
    parallel, shards = DistributedDataParallel(copy.deepcopy(model)), fully_shard(copy.deepcopy(model))
    for wrapped in (parallel, shards):
        many(wrapped, dist.get_rank())
        hold(of(wrapped), model, lambda model: mean(model, lambda rank: many(model, rank, model.weight.dtype)))
        assert not any(g[3].any() for g in of(wrapped).values()), "no token, no gradient"
    layer = parallel.module
    assert torch.equal(layer.adapter_parameters(1)[0].grad, layer.lora_A.grad[1])
    with raises(UnsupportedError, "before fully_shard"):
        shards.adapter_parameters(1)


@case(2, 4)
def fsdp():
    """A group of frozen base and trained adapter: only the adapter's gradient is reduced, and each rank stores its part of all."""
    model = Mlp(r=3)
    parallel = sharded(model)
    for _ in range(2):
        parallel.zero_grad()
        with library_calls() as ran:
            backward(parallel, dist.get_rank())
    assert ran["forward"] == ran["backward"] == (2 if LENGTHS[dist.get_rank()] else 0)
    hold(of(parallel), model, mean_step)
    assert parallel.up.weight.grad is None and parallel.up.weight.to_local().shape[0] == 40 // dist.get_world_size()
    with raises(UnsupportedError, "weight: wanted a plain tensor, got a DTensor"):
        lora_linear(torch.randn(2, 24), parallel.up.weight, parallel.up.lora_A, parallel.up.lora_B)


@case(2)
def fsdp_around_the_model_alone():
    model = Mlp()
    parallel = fully_shard(copy.deepcopy(model), reshard_after_forward=True)
    backward(parallel, dist.get_rank())
    hold(of(parallel), model, mean_step)


@case(2)
def fsdp_accumulates_with_a_disabled_layer():
    """Its adapter has no gradient on any rank, and none is reduced; the other's is, of both batches, when it is asked for."""
    model, rank = Mlp(), dist.get_rank()
    model.down.enabled = False
    parallel = sharded(model)
    parallel.set_requires_gradient_sync(False)
    backward(parallel, rank, seed=2)
    parallel.set_requires_gradient_sync(True)
    backward(parallel, rank, seed=1)
    assert parallel.down.lora_A.grad is None
    hold(of(parallel, "up"), model, lambda model: two_batches(freeze_down(model)))


@case(4)
def fsdp_over_more_ranks_than_the_rank():
    """Split along K, no rank's part of A is padded."""
    model = Mlp(r=3)
    parallel = sharded(model, shard_placement_fn=lambda p: Shard(1) if p.shape[0] < 4 else Shard(0))
    assert parallel.up.lora_A.to_local().shape == (3, 24 // 4) and parallel.up.lora_B.to_local().shape == (40 // 4, 3)
    backward(parallel, dist.get_rank())
    hold(of(parallel), model, mean_step)


@case(4)
def hybrid_sharding():
    """Sharded in one dimension of a mesh and replicated in the other: over that one only the adapters' gradients travel."""
    model = Mlp()
    parallel = sharded(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    backward(parallel, dist.get_rank())
    hold(of(parallel), model, mean_step)
    assert parallel.up.weight.to_local().shape[0] == 40 // 2


@case(2)
def fsdp_has_what_it_was_given():
    """Layers do not come and go under it, nor is a file read into parameters that a root keeps whole after its forward, in passing."""
    config = LoRAConfig(target_modules=["0"], r=4)
    plain, adapted, x = nn.Sequential(nn.Linear(24, 8)), nn.Sequential(nn.Linear(24, 8)), torch.randn(2, 24)
    apply_lora(adapted, config)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, folder)
        fully_shard(plain), fully_shard(adapted)
        for said in ("got shards in 0; gather them", "got a FSDPModule, whose parameters are whole in passing"):
            for change in (lambda: apply_lora(plain, config), lambda: remove_lora(adapted)):
                with raises(UnsupportedError, "model: wanted one that is not sharded, got a FSDPModule, itself"):
                    change()
            with raises(UnsupportedError, said):
                load_adapter(adapted, folder)
            plain(x), adapted(x)
        save_adapter(adapted, folder)


@case(2)
def fsdp_with_a_bfloat16_base_and_float32_adapters():
    """A group may mix dtypes where its trained parameters have one; gradients are reduced in float32, theirs."""
    model = Mlp(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    parallel = sharded(model)
    backward(parallel, dist.get_rank(), dtype=torch.bfloat16)
    ours = of(parallel)
    assert all(g.dtype == torch.float32 for g in ours.values())
    hold(ours, model, mean_step)


@case(2, 4)
def fsdp_mixed_precision():
    """Stored in float32, computed in bfloat16, reduced in float32."""
    model = Mlp().bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallel = sharded(copy.deepcopy(model).float(), mp_policy=policy)
    backward(parallel, dist.get_rank())
    ours = of(parallel)
    assert all(g.dtype == torch.float32 for g in ours.values())
    hold(ours, model, mean_step)


@case(2)
def fsdp_recomputes_with_the_same_dropout():
    """Activation checkpointing inside a group: the recomputation draws the seeds of the forward pass again."""

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp(lora_dropout=0.3)

        def forward(self, x):
            return checkpoint(self.mlp, x, use_reentrant=False)

    def one(model, rank, dtype):
        torch.manual_seed(7 + rank)
        x, dY = batch(rank, 6, 24, dtype=dtype)
        model(x).backward(dY)

    model = Recomputed()
    parallel = fully_shard(copy.deepcopy(model))
    with library_calls() as ran:
        one(parallel, dist.get_rank(), torch.float32)
    assert ran == {"forward": 4, "backward": 2}
    hold(of(parallel, "mlp"), model, lambda model: mean(model, lambda rank: one(model.mlp, rank, model.mlp.up.weight.dtype)))


def resumes(shard, rank: int) -> None:
    """Saved and loaded by torch.distributed.checkpoint, model and optimizer go on bit for bit; the files load into one process, too.

    ``shard`` distributes a model; ``rank`` is that of the batch.
    """

    def built(seed):
        torch.manual_seed(seed)
        model = shard(Mlp())
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def train(model, optimizer, seed):
        backward(model, rank, seed)
        optimizer.step()
        optimizer.zero_grad()

    (model, optimizer), (other, its_optimizer) = built(0), built(1)
    train(model, optimizer, 1)
    with shared_folder() as folder:
        states = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
        loaded = dict(zip(("model", "optimizer"), get_state_dict(other, its_optimizer), strict=True))
        dcp.load(loaded, checkpoint_id=folder)
        plain = Mlp()
        dcp.load({"model": plain.state_dict()}, checkpoint_id=folder, no_dist=True)
    set_state_dict(other, its_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), plain.get_parameter(name)), name
    train(model, optimizer, 2)
    train(other, its_optimizer, 2)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), name

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    adapters = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        assert sorted(adapters) == ["down.lora_A", "down.lora_B", "up.lora_A", "up.lora_B"]
        assert not plain.load_state_dict(adapters, strict=False).unexpected_keys


@case(2, 4)
def fsdp_checkpoint():
    resumes(sharded, dist.get_rank())


@case(2)
def fsdp_merge():
    """Sharded, a layer merges its shards, and serves; NaN on one rank is refused on all."""
    model = Mlp().eval()
    parallel, x = sharded(model), batch(3, 4, 24)[0]
    for layers in (model, parallel):
        layers.up.merge()
    assert torch.equal(parallel.up.weight.full_tensor(), model.up.weight)
    with torch.no_grad():
        assert torch.equal(parallel(x), model(x))
    with raises(UnsupportedError, "swap: wanted a layer that is whole on this rank, got shards"):
        parallel.up.swap(model.up.lora_A, model.up.lora_B)
    saved = parallel.state_dict()["up.weight"]
    assert isinstance(saved, DTensor) and not torch.equal(saved.full_tensor(), model.up.weight), "a checkpoint holds the base apart"
    for layers in (model, parallel):
        layers.up.unmerge()
    assert torch.equal(parallel.up.weight.full_tensor(), model.up.weight)

    parallel.down.reshard()
    if dist.get_rank() == 1:
        parallel.down.lora_B.detach().to_local()[0, 0] = float("nan")
    before = parallel.down.weight.to_local().clone()
    with raises(ValueError, "finite"):
        parallel.down.merge()
    assert torch.equal(parallel.down.weight.to_local(), before) and not parallel.down.merged


@case(2, 4)
def the_page():
    """The python blocks of docs/distributed.md, in order, on these ranks."""
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)

"""Tensor parallel: `ColwiseLoRA` and `RowwiseLoRA` under parallelize_module, what they send, refusals, and fully_shard on top."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import Mlp, arm, batch, case, gradients, hold, library_calls, raises
from ranks_data import resumes, shared_folder
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import FusedLoRALinear, MultiLoRALinear, Segments, UnsupportedError, parity, remove_lora, use_adapters
from lora_kernels.integrations import tensor_parallel
from lora_kernels.integrations.tensor_parallel import ColwiseLoRA, RowwiseLoRA

K, N, R = 24, 40, 3
SHAPE = (2, 8)  # batch and sequence
BASE = {ColwiseLoRA: ColwiseParallel, RowwiseLoRA: RowwiseParallel}
PLAN = {"up": ColwiseLoRA(), "down": RowwiseLoRA()}


class Sent(TorchDispatchMode):
    """The collectives inside, in order: (name, numbers that a rank gives)."""

    def __init__(self):
        super().__init__()
        self.collectives = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_")):
            self.collectives.append((func.__name__.split(".")[0], args[0].numel()))
        return func(*args, **(kwargs or {}))


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def layer(**kwargs) -> FusedLoRALinear:
    return FusedLoRALinear(K, N, r=R, lora_alpha=6, init_lora_weights=False, **kwargs)


def parallel(module: nn.Module, plan) -> nn.Module:
    return parallelize_module(copy.deepcopy(module), mesh_of_all(), plan)


def part(t: torch.Tensor, placement) -> torch.Tensor:
    """This rank's part of a whole tensor."""
    return t if placement.is_replicate() else t.chunk(dist.get_world_size(), placement.dim)[dist.get_rank()]


def whole(t: torch.Tensor, placement) -> torch.Tensor:
    return DTensor.from_local(t.detach(), mesh_of_all(), [placement], run_check=False).full_tensor()


def passes(module, x, dY):
    """y, dX and what forward and backward sent."""
    x = x.detach().clone().requires_grad_()
    with Sent() as forward:
        y = module(x)
    with Sent() as backward:
        y.backward(dY)
    return y, x.grad, forward.collectives, backward.collectives


def plain_step(module, *plan):
    dtype, out = next(module.parameters()).dtype, getattr(module, "out_features", K)
    x, dY = batch(5, *SHAPE, K, dtype=dtype)[0].requires_grad_(), batch(6, *SHAPE, out, dtype=dtype)[1]
    y = module(x, *plan)
    y.backward(dY)
    return {"y": y, "dX": x.grad, **gradients(module)}


def held(one: FusedLoRALinear, style, step=plain_step) -> None:
    """Hold a parallelized layer to one process, and what it sends to its base under torch's own style plus one small all-reduce."""
    layouts = dict(input_layouts=style.input_layouts[0], output_layouts=style.output_layouts[0])
    dtype = one.weight.dtype
    base = nn.Linear(K, N, one.bias is not None, dtype=dtype).requires_grad_(False)
    base = parallelize_module(base, mesh_of_all(), BASE[type(style)](**layouts))
    x = part(batch(5, *SHAPE, K, dtype=dtype)[0], style.input_layouts[0])
    dY = part(batch(6, *SHAPE, N, dtype=dtype)[1], style.output_layouts[0])
    module = parallel(one, style)
    with library_calls() as ran:
        y, dX, forward, backward = passes(module, x, dY)
    assert ran == {"forward": 1, "backward": 1}
    _, _, its_forward, its_backward = passes(base, x, dY)
    assert forward == its_forward, f"forward sends {forward}, the base {its_forward}"
    assert backward[: len(its_backward)] == its_backward, "dX goes first: the layer below waits for it"
    factor = module.lora_A if isinstance(style, ColwiseLoRA) else module.lora_B
    assert backward[len(its_backward) :] == [("all_reduce", factor.numel())], f"backward sends {backward}, the base {its_backward}"
    ours = {"y": whole(y, style.output_layouts[0]), "dX": whole(dX, style.input_layouts[0]), **gradients(module)}
    hold(ours, one, step)


@case(2, 4)
def column_parallel():
    """Nothing forward, dX's sum backward, or what sequence parallel makes of them; and dA's sum, r K numbers."""
    for inputs, outputs in ((None, None), (Shard(1), None), (Replicate(), Replicate()), (Shard(1), Shard(1))):
        held(layer(), ColwiseLoRA(input_layouts=inputs, output_layouts=outputs))
    held(layer(bias=False), ColwiseLoRA())
    held(layer(dtype=torch.bfloat16, adapter_dtype=torch.float32), ColwiseLoRA())


@case(2, 4)
def row_parallel():
    """y's sum forward, or the reduce-scatter of sequence parallel; and dB's sum, r N numbers. The bias is added once."""
    for inputs, outputs in ((None, None), (None, Shard(1)), (Replicate(), Replicate())):
        held(layer(), RowwiseLoRA(input_layouts=inputs, output_layouts=outputs))
    held(layer(bias=False), RowwiseLoRA())
    held(layer(dtype=torch.bfloat16, adapter_dtype=torch.float32), RowwiseLoRA())


@case(2, 4)
def a_trained_bias():
    """Its gradient is local where it is split, and one rank's where the sum over ranks adds it once."""
    one = layer()
    one.bias.requires_grad_(True)
    for style in (ColwiseLoRA(output_layouts=Replicate()), RowwiseLoRA(input_layouts=Replicate())):
        module = parallel(one, style)
        y, dX, _, _ = passes(module, batch(5, *SHAPE, K)[0], batch(6, *SHAPE, N)[1])
        hold({"y": y, "dX": dX, **gradients(module)}, one, plain_step)


@case(2)
def an_infinite_bias():
    """It masks an output, and a rank that is not to add it adds no NaN."""
    one = layer()
    one.bias.detach()[3] = -torch.inf
    x, module = batch(5, *SHAPE, K)[0], parallel(one, RowwiseLoRA(input_layouts=Replicate()))
    torch.testing.assert_close(module(x), one(x))


@case(2, 4)
def a_pair_of_layers():
    """Column then row, over an activation: one all-reduce forward and one backward, as the base has, and two small ones."""
    one = Mlp(K, N, r=R)
    module = parallel(one, PLAN)
    y, dX, forward, backward = passes(module, batch(5, *SHAPE, K)[0], batch(6, *SHAPE, K)[1])
    hold({"y": y, "dX": dX, **gradients(module)}, one, plain_step)
    tokens = SHAPE[0] * SHAPE[1]
    assert forward == [("all_reduce", tokens * K)]
    assert sorted(backward) == sorted([("all_reduce", tokens * K), ("all_reduce", R * K), ("all_reduce", K * R)])


class Gated(nn.Module):
    """Two layers that share an x, and one of their product."""

    def __init__(self, linear):
        super().__init__()
        self.gate, self.up, self.down = linear(K, N), linear(K, N), linear(N, K)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@case(2, 4)
def layers_that_share_an_input():
    """Prepared once, as sequence parallel does, x is gathered once and dX scattered once, for the base and with adapters."""
    one = Gated(lambda K, N: FusedLoRALinear(K, N, r=R, init_lora_weights=False))
    sent = []
    for module, column, row in (
        (one, ColwiseLoRA, RowwiseLoRA),
        (Gated(nn.Linear).requires_grad_(False), ColwiseParallel, RowwiseParallel),
    ):
        prepare = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        plan = {"": prepare, "gate": column(), "up": column(), "down": row(output_layouts=Shard(1))}
        module = parallel(module, plan)
        y, dX, *collectives = passes(module, part(batch(5, *SHAPE, K)[0], Shard(1)), part(batch(6, *SHAPE, K)[1], Shard(1)))
        sent.append(collectives)
        if column is ColwiseLoRA:
            hold({"y": whole(y, Shard(1)), "dX": whole(dX, Shard(1)), **gradients(module)}, one, plain_step)
    ours, base = sent
    assert ours[0] == base[0] and sorted(ours[1]) == sorted(base[1] + 3 * [("all_reduce", R * K)]), (ours, base)


@case(2, 4)
def many_adapters_over_split_features():
    """The stacks lie as one adapter does; every rank has the plan of all tokens."""
    one = MultiLoRALinear(K, N, num_adapters=5, r=[3, 1, 2, 3, 3], init_lora_weights=False)
    segments = Segments.from_ids(torch.tensor([0, 1, 4, -1, 2, 0, 1, 4, 4, 2, 0, -1, 2, 2, -1, 0]), 5)
    x, dY = batch(5, *SHAPE, K)[0], batch(6, *SHAPE, N)[1]
    for style, name in ((ColwiseLoRA(output_layouts=Replicate()), "lora_A"), (RowwiseLoRA(input_layouts=Replicate()), "lora_B")):
        module = parallel(one, style)
        with library_calls() as ran:
            y, dX, forward, backward = passes(lambda x: module(x, segments), x, dY)  # noqa: B023
        assert ran == {"forward": 1, "backward": 1} and backward[-1] == ("all_reduce", one.get_parameter(name).numel())
        hold({"y": y, "dX": dX, **gradients(module)}, one, lambda model: plain_step(model, segments))
        with raises(UnsupportedError, "before fully_shard or parallelize_module"):
            module.load_adapter(0, torch.zeros(R, K), torch.zeros(N, R))


@case(2, 4)
def adapters_named_by_sequence():
    """Where sequence parallel gives a rank some of each sequence's tokens, the plan is of all that the layer gathers."""
    one = MultiLoRALinear(K, N, num_adapters=5, r=R, init_lora_weights=False)
    segments = Segments.from_ids(torch.tensor([3, 1]).repeat_interleave(SHAPE[1]), 5)
    x, dY = batch(5, *SHAPE, K)[0], batch(6, *SHAPE, N)[1]
    for style, inputs in ((ColwiseLoRA(input_layouts=Shard(1), output_layouts=Replicate()), Shard(1)), (RowwiseLoRA(), Shard(-1))):
        module = parallel(one, style)
        with use_adapters(module, [3, 1]):
            y, dX, _, _ = passes(module, part(x, inputs), dY)
        hold({"y": y, "dX": whole(dX, inputs), **gradients(module)}, one, lambda model: plain_step(model, segments))


@case(2)
def steps_keep_the_replicas_equal():
    """Gradient clipping, accumulation and AdamW work on the parameters as they are; A of `up` stays the same bits on every rank."""
    module = parallel(Mlp(K, N, r=R), PLAN)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        for micro in range(2):
            x, dY = batch(10 * step + micro, *SHAPE, K)
            module(x).backward(dY)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        assert norm.full_tensor() > 1
        optimizer.step()
        optimizer.zero_grad()
    for t in (module.up.lora_A, module.down.lora_B):
        mine = t.detach().to_local()
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        assert all(torch.equal(each, mine) for each in every)


@case(2)
def kernels():
    """The same by the Triton kernels, in the interpreter: the operators see plain local tensors."""
    one = Mlp(K, N, r=R)
    module, before = parallel(one, PLAN), parity.launched_so_far()
    with arm("triton", tensor_parallel), library_calls() as ran:
        y, dX, _, _ = passes(module, batch(5, *SHAPE, K)[0], batch(6, *SHAPE, K)[1])
    assert parity.launched_so_far() >= before + 6 and ran == {"forward": 0, "backward": 0}
    hold({"y": y, "dX": dX, **gradients(module)}, one, plain_step)


@case(2)
def checkpoint_of_shards():
    resumes(lambda model: parallel(model, PLAN), 0)


@case(2)
def compiled():
    """torch.compile takes the layers whole."""
    one = Mlp(K, N, r=R)
    module = torch.compile(parallel(one, PLAN), backend="aot_eager", fullgraph=True)
    x, dY = batch(5, *SHAPE, K)[0].requires_grad_(), batch(6, *SHAPE, K)[1]
    y = module(x)
    y.backward(dY)
    hold({"y": y, "dX": x.grad, **gradients(module._orig_mod)}, one, plain_step)


@case(2, 4)
def merge_and_state():
    """Merging adds each rank's own part and sends nothing but the question whether all is finite; files hold base and adapter apart."""
    one = Mlp(K, N, r=R).eval()
    module, x = parallel(one, PLAN), batch(5, *SHAPE, K)[0]
    for each in (one, module):
        each.up.merge()
        each.down.merge()
    for name in ("up.weight", "down.weight"):
        used = parity.budget_used(module.get_parameter(name).full_tensor(), one.get_parameter(name), _exact(one, name))
        assert used <= 1, f"{name} uses {used:.2f} of its budget"
    merged = {"y": module(x)}
    with shared_folder() as folder:
        dcp.save(get_model_state_dict(module), checkpoint_id=folder)
        plain = Mlp(K, N, r=R)
        dcp.load(plain.state_dict(), checkpoint_id=folder, no_dist=True)
    for each in (one, module):
        each.up.unmerge()
        each.down.unmerge()
    full = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    for name, p in one.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)) and torch.equal(module.get_parameter(name).full_tensor(), p), name
        assert name not in full or torch.equal(full[name], p)
    hold(merged, one, lambda model: {"y": model(x.to(model.up.weight.dtype))})
    module.up.enabled = one.up.enabled = False
    hold({"y": module(x)}, one, lambda model: {"y": model(x.to(model.up.weight.dtype))})

    if dist.get_rank() == 1:
        module.up.lora_B.detach().to_local()[0, 0] = float("nan")
    with raises(ValueError, "finite"):
        module.up.merge()
    assert not module.up.merged and torch.equal(module.up.weight.full_tensor(), one.up.weight)


def _exact(model: Mlp, name: str) -> torch.Tensor:
    """The merged weight in float64."""
    module = model.get_submodule(name.split(".")[0])
    A, B = module.lora_A.detach().double(), module.lora_B.detach().double()
    return module.base_weight().double() + module.scaling * B @ A


@case(2)
def refusals():
    mesh = mesh_of_all()
    with raises(ValueError, "out_features: wanted a multiple of the mesh's 2 ranks, got 5"):
        parallelize_module(FusedLoRALinear(8, 5), mesh, ColwiseLoRA())
    with raises(ValueError, "in_features: wanted a multiple of the mesh's 2 ranks, got 5"):
        parallelize_module(FusedLoRALinear(5, 8), mesh, RowwiseLoRA())
    with raises(TypeError, "module: wanted a FusedLoRALinear or MultiLoRALinear for ColwiseLoRA, got Linear"):
        parallelize_module(nn.Linear(8, 8), mesh, ColwiseLoRA())
    merged = layer()
    merged.merge()
    with raises(RuntimeError, "call unmerge"):
        parallelize_module(merged, mesh, RowwiseLoRA())
    more = layer()
    more.magnitude = nn.Parameter(torch.ones(N))
    with raises(UnsupportedError, "got magnitude too"):
        parallelize_module(more, mesh, RowwiseLoRA())
    with raises(ValueError, "device_mesh: wanted one dimension, got 2"):
        ColwiseLoRA()._apply(layer(), init_device_mesh("cpu", (2, 1)))
    for shards in (parallel(layer(), ColwiseLoRA()), fully_shard(layer())):
        with raises(UnsupportedError, "call it before parallelize_module or fully_shard"):
            shards.reset_adapter()
    with raises(UnsupportedError, "model: wanted whole layers, got shards in down"):
        remove_lora(parallel(Mlp(K, N, r=R), {"down": RowwiseLoRA()}))
    x = DTensor.from_local(torch.randn(2, K), mesh, [Replicate()])
    with raises(UnsupportedError, "x: wanted a plain tensor, got a DTensor with placements"):
        layer()(x)


@case(4)
def fully_sharded_tensor_parallel():
    """Two by two: parallelized first, then fully_shard over the other dimension; gradients are the mean over its two batches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def shard(model):
        model = parallelize_module(copy.deepcopy(model), mesh["tp"], PLAN)
        for each in (model.up, model.down, model):
            fully_shard(each, mesh=mesh["dp"])
        return model

    one = Mlp(K, N, r=R)
    module = shard(one)

    def backward(model, batch_number, dtype):
        x, dY = batch(batch_number, 3 + 4 * batch_number, K, dtype=dtype)
        model(x).backward(dY)

    with library_calls() as ran:
        backward(module, mesh["dp"].get_local_rank(), torch.float32)
    assert ran == {"forward": 2, "backward": 2}

    def step(model):
        for number in range(2):
            backward(model, number, model.up.weight.dtype)
        return {name: g / 2 for name, g in gradients(model).items()}

    hold(gradients(module), one, step)
    assert module.up.weight.to_local().numel() == N * K // 4
    resumes(shard, mesh["dp"].get_local_rank())

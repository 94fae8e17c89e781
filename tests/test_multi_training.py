"""MultiLoRALinear's adapters trained apart: a leaf for each slot, whose gradient is the stack's."""

import copy
import math
import pickle

import pytest
import torch
from test_multi import IDS, MIXED, RANKS, E, K, N, R, alone, plan, through, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_kernels import lora_linear, reference
from lora_kernels.slots import stamp


@RANKS
def test_gradients_are_the_references(r):
    layer, x = trained(r, dtype=torch.float64), torch.randn(len(IDS), K, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(IDS), N, dtype=torch.float64)
    (layer(x, plan()) * weight).sum().backward()
    A, B, its_x = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    y = reference.lora_linear(its_x, layer.weight, A, B, layer.bias, scale=layer.scaling, segments=plan(), ranks=layer.ranks)
    (y * weight).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)
    torch.testing.assert_close(x.grad, its_x.grad)
    assert not layer.lora_A.grad[1].any() and layer.weight.grad is None and layer.bias.grad is None


def test_zeros_beyond_the_rank_neither_act_nor_train_without_ranks():
    """What a CUDA graph relies on that was captured while all ranks were full."""
    layer, x = trained(dtype=torch.float64), torch.randn(len(IDS), K, dtype=torch.float64)
    layer.load_adapter(0, torch.randn(2, K), torch.randn(N, 2))
    y = lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scale=layer.scaling, segments=plan())
    torch.testing.assert_close(y, through(layer, x))
    y.square().sum().backward()
    assert not layer.lora_A.grad[0, 2:].any() and not layer.lora_B.grad[0, :, 2:].any()
    assert layer.lora_A.grad[0, :2].all() and layer.lora_B.grad[0, :, :2].all()


@RANKS
@pytest.mark.parametrize("i", [0, E - 1])
def test_adapter_gives_views(r, i):
    layer = trained(r)
    A, B = layer.adapter(i)
    rank = (MIXED if r is MIXED else [R] * E)[i]
    assert A.shape == (rank, K) and B.shape == (N, rank) and not A.requires_grad and A.grad_fn is None
    A.fill_(7)
    B.fill_(8)
    assert (layer.lora_A[i, :rank] == 7).all() and (layer.lora_B[i, :, :rank] == 8).all()
    assert not layer.lora_A[i, rank:].any() and (layer.lora_A[2] != 7).all()


def write_to_view(layer):
    layer.adapter(0)[0].mul_(2)


def load(layer):
    layer.load_adapter(0, torch.randn(2, K), torch.randn(N, 2))


def reset(layer):
    layer.reset_adapter(0)


def step_an_optimizer(layer):
    parameters = layer.adapter_parameters(0)
    parameters[0].grad = torch.ones(R, K)
    torch.optim.SGD(parameters, lr=0.1).step()


@pytest.mark.parametrize("change", [write_to_view, load, reset, step_an_optimizer])
def test_autograd_notices_a_change_between_forward_and_backward(change):
    layer = trained()
    y = layer(torch.randn(len(IDS), K, requires_grad=True), plan())
    change(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BATCHES = (IDS, [1, 1, 3, 1, -1, 4, 4, 0, 3, 3], [2, 2, 2, -1, 2, 2, 4, 2, 2, 2], [4, 3, 2, 1, 0, 4, 3, 2, 1, 0])


@RANKS
@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}, {"fused": True}], ids=["one by one", "foreach", "fused"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_an_optimizer_for_each_adapter_trains_like_layers_apart(r, kwargs, dtype, tolerance):
    layer = trained(r, dtype=dtype, lora_alpha=[rank * 2 for rank in MIXED] if r is MIXED else 8)
    singles = [alone(layer, i) for i in range(E)]
    ours = [torch.optim.AdamW(layer.adapter_parameters(i), lr=0.05, weight_decay=0.1, **kwargs) for i in range(E)]
    theirs = [torch.optim.AdamW([single.lora_A, single.lora_B], lr=0.05, weight_decay=0.1) for single in singles]
    for ids in BATCHES * 2:
        x, target = torch.randn(len(ids), K, dtype=dtype), torch.randn(len(ids), N, dtype=dtype)
        before, present = copy.deepcopy(layer.state_dict()), set(ids) - {-1}
        (layer(x, plan(ids)) - target).square().sum().backward()
        for i in present:
            ours[i].step()
            ours[i].zero_grad()
            at = torch.tensor(ids) == i
            (singles[i](x[at]) - target[at]).square().sum().backward()
            theirs[i].step()
            theirs[i].zero_grad()
        for i in set(range(E)) - present:
            assert torch.equal(layer.lora_A[i], before["lora_A"][i]) and torch.equal(layer.lora_B[i], before["lora_B"][i]), f"{i} moved"
    for i, single in enumerate(singles):
        A, B = layer.adapter(i)
        torch.testing.assert_close(A, single.lora_A.detach(), rtol=tolerance, atol=tolerance, msg=f"lora_A of {i}")
        torch.testing.assert_close(B, single.lora_B.detach(), rtol=tolerance, atol=tolerance, msg=f"lora_B of {i}")
        rank = A.shape[0]
        assert not layer.lora_A[i, rank:].any() and not layer.lora_B[i, :, rank:].any(), "beyond the rank stays zero"


def backward(layer, ids=IDS, x=None):
    layer(torch.ones(len(ids), K) if x is None else x, plan(ids)).sum().backward()


def test_a_leafs_gradient_is_the_stacks():
    layer = trained()
    A, B = layer.adapter_parameters(0)
    assert A.is_leaf and A.requires_grad and isinstance(A, nn.Parameter) and A.grad is None and B.grad is None
    backward(layer)
    assert A.grad.data_ptr() == layer.lora_A.grad[0].data_ptr() and torch.equal(B.grad, layer.lora_B.grad[0]) and A.grad.any()
    once = A.grad.clone()
    backward(layer)
    torch.testing.assert_close(A.grad, 2 * once)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}], ids=["one by one", "foreach"])
def test_zero_grad_of_one_adapters_optimizer(set_to_none, kwargs):
    layer = trained()
    optimizers = [torch.optim.SGD(layer.adapter_parameters(i), lr=0.1, **kwargs) for i in range(E)]
    optimizers[0].zero_grad(set_to_none)
    backward(layer)
    wanted = [layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
    optimizers[0].zero_grad(set_to_none)
    assert not layer.lora_A.grad[0].any() and not layer.lora_B.grad[0].any()
    assert torch.equal(layer.lora_A.grad[1:], wanted[0][1:]) and torch.equal(layer.lora_B.grad[1:], wanted[1][1:])
    backward(layer)
    torch.testing.assert_close(layer.lora_A.grad[0], wanted[0][0])
    torch.testing.assert_close(layer.lora_A.grad[1:], 2 * wanted[0][1:], msg="the others accumulate on")


@pytest.mark.parametrize("inside", [False, True], ids=["the layer", "a model around it"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_the_module(inside, set_to_none):
    layer = trained()
    module = nn.ModuleList([layer]) if inside else layer
    A, B = layer.adapter_parameters(0)
    optimizer, before = torch.optim.SGD([A, B], lr=0.1), A.detach().clone()
    backward(layer)
    once = A.grad.clone()
    module.zero_grad(set_to_none)
    assert A.grad is None if set_to_none else not A.grad.any()
    optimizer.step()
    assert torch.equal(A, before), "a gradient that is gone must not be stepped"
    backward(layer)
    assert torch.equal(A.grad, once)


def test_a_leaf_in_the_loss_adds_to_the_stacks_gradient():
    layer, other = trained(), trained()
    other.load_state_dict(layer.state_dict())
    A, _ = layer.adapter_parameters(0)
    for _ in range(2):
        (layer(torch.ones(len(IDS), K), plan()).sum() + A.square().sum()).backward()
        (other(torch.ones(len(IDS), K), plan()).sum() + other.lora_A[0].square().sum()).backward()
    torch.testing.assert_close(layer.lora_A.grad, other.lora_A.grad)
    layer.zero_grad()
    A.square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad[0], 2 * A.detach())
    assert not layer.lora_A.grad[1:].any() and A.grad.data_ptr() == layer.lora_A.grad.data_ptr()


def test_a_leafs_gradient_may_be_set_and_clipped():
    layer = trained()
    A, B = layer.adapter_parameters(2)
    A.grad = torch.full((R, K), 3.0)
    assert (layer.lora_A.grad[2] == 3).all() and not layer.lora_A.grad[:2].any() and not layer.lora_A.grad[3:].any()
    with pytest.raises(ValueError, match=r"grad: wanted a tensor \[4, 20\] or None, got \[20\]"):
        A.grad = torch.ones(K)
    with pytest.raises(ValueError, match="grad: wanted a tensor .* got float"):
        A.grad = 1.0
    layer.lora_A.grad[0] = 5.0
    B.grad = torch.zeros(N, R)
    norm = nn.utils.clip_grad_norm_([A, B], 1.0)
    torch.testing.assert_close(norm, torch.tensor(3 * math.sqrt(R * K)))
    torch.testing.assert_close(layer.lora_A.grad[2].norm(), torch.tensor(1.0))
    assert (layer.lora_A.grad[0] == 5).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_adapter(0, torch.ones(2, K), torch.ones(N, 2)),
        lambda layer: layer.reset_adapter(0),
        lambda layer: layer.clear_adapter(0),
    ],
    ids=["load", "reset", "clear"],
)
def test_a_slots_new_adapter_has_nothing_of_the_old_ones_gradient(change):
    layer = trained(dtype=torch.float64)
    layer(torch.randn(len(IDS), K, dtype=torch.float64), plan()).square().sum().backward()
    before = [stack.grad.clone() for stack in (layer.lora_A, layer.lora_B)]
    assert before[0][0].any() and before[1][0].any()
    change(layer)
    for stack, its in zip((layer.lora_A, layer.lora_B), before, strict=True):
        assert not stack.grad[0].any() and torch.equal(stack.grad[1:], its[1:])


def test_leaves_from_before_a_move_say_so():
    layer = trained()
    A, _ = layer.adapter_parameters(0)
    layer.load_state_dict(trained().state_dict())
    assert A.grad is None and torch.equal(A, layer.lora_A[0]), "in place, nothing has moved"
    layer.double()
    with pytest.raises(RuntimeError, match="wanted ones taken after lora_A last moved, got older ones; take them again"):
        torch.optim.SGD([A], lr=0.1).step()
    _, B = layer.adapter_parameters(0)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="lora_B last moved"):
        B.grad  # noqa: B018


@pytest.mark.parametrize("again", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_of_a_layer_with_its_optimizers(again):
    layer = trained(MIXED)
    optimizer = torch.optim.AdamW(layer.adapter_parameters(0), lr=0.1)
    backward(layer)
    optimizer.step()
    other, its_optimizer = again((layer, optimizer))
    assert torch.equal(other(torch.ones(10, K), plan()), layer(torch.ones(10, K), plan()))
    before = layer.lora_A.detach().clone()
    for each, its in ((other, its_optimizer), (layer, optimizer)):
        assert torch.equal(each.lora_A, before), "neither moves the other"
        each.zero_grad()
        backward(each)
        its.step()
        assert not torch.equal(each.lora_A[0], before[0]) and torch.equal(each.lora_A[1:], before[1:])
    torch.testing.assert_close(layer.lora_A, other.lora_A)


def test_what_is_assigned_to_a_leafs_data_is_in_the_slot():
    """As vector_to_parameters does it: evolution strategies, averages of adapters."""
    layer, x = trained(), torch.randn(len(IDS), K)
    leaves, before = layer.adapter_parameters(2), layer.lora_A.detach().clone()
    A, B = (2 * t for t in layer._slot(2))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(leaves).detach() * 2, leaves)
    assert torch.equal(layer.lora_A[2], A) and torch.equal(layer.lora_B[2], B)
    others = [i for i in range(E) if i != 2]
    assert torch.equal(layer.lora_A[others], before[others])
    layer(x, plan()).sum().backward()
    assert all(torch.equal(leaf.data, leaf) and leaf.grad is not None for leaf in leaves)
    for wrong in (torch.zeros(R, 1), torch.zeros(R, K, dtype=torch.float64), 0):
        with pytest.raises(ValueError, match=rf"data: wanted a tensor of torch.float32 \[{R}, {K}\], got"):
            leaves[0].data = wrong
    assert torch.equal(layer.lora_A[2], A)


@pytest.mark.parametrize("by", ["average", "in place"])
def test_ranks_that_others_wrote(by):
    """AveragedModel copies buffers, torch.distributed.checkpoint reads into them: what is read of a slot is all of the adapter."""
    layer, x = trained(MIXED), torch.randn(len(IDS), K)
    average = AveragedModel(layer)
    other = average.module
    slot = MIXED.index(min(MIXED))
    layer.load_adapter(slot, torch.randn(R, K), torch.randn(N, R), scale=0.5)
    if by == "average":
        average.update_parameters(layer)
    else:
        for name, t in other.state_dict().items():
            t.copy_(layer.state_dict()[name])
    for own, its in zip(layer.adapter(slot), other.adapter(slot), strict=True):
        assert torch.equal(own, its)
    other.merge(slot)
    torch.testing.assert_close(other(x), through(layer, x, [slot] * len(IDS)))
    other.unmerge()
    other.load_adapter(0, torch.randn(1, K), torch.randn(N, 1))
    assert other.adapter(slot)[0].shape[0] == R and other.adapter(0)[0].shape[0] == 1
    moved = copy.deepcopy(other).double()
    assert [moved.adapter(i)[0].shape[0] for i in range(E)] == other.ranks.tolist()


def test_ranks_that_the_layer_wrote_are_not_asked_of_the_device():
    layer = trained(MIXED)
    for write in (
        lambda: layer.load_adapter(0, torch.randn(R, K), torch.randn(N, R)),
        lambda: layer.clear_adapter(1),
        lambda: layer.double(),
        lambda: layer.load_state_dict(layer.state_dict()),
    ):
        assert layer._seen == stamp(layer.ranks)
        write()
    assert layer._seen == stamp(layer.ranks) and layer._ranks == layer.ranks.tolist()

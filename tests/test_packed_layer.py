"""`PackedLoRALinear` and `PackedLoRAOver`: what they share, their slots, merging, training, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import (
    FusedLoRALinear,
    MultiLoRALinear,
    PackedLoRALinear,
    PackedLoRAOver,
    Segments,
    UnsupportedError,
    remove_lora,
    save_adapter,
    use_segments,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K, WIDTHS, E, R = 24, (16, 3, 9), 5, 6
N, L = sum(WIDTHS), len(WIDTHS)
IDS = torch.tensor([i % (E + 1) - 1 for i in range(26)])


def layer(**how) -> PackedLoRALinear:
    how = dict(num_adapters=E, r=R, lora_alpha=12, init_lora_weights=False, device=DEVICE) | how
    return PackedLoRALinear(K, WIDTHS, **how)


def segments(ids=IDS) -> Segments:
    return Segments.from_ids(ids.to(DEVICE), E)


def tokens() -> torch.Tensor:
    return torch.randn(len(IDS), K, device=DEVICE)


def wanted(own, x, ids=IDS, base=None) -> torch.Tensor:
    """By the formula, token by token, from each layer's A and B."""
    y = F.linear(x, own.weight, own.bias) if base is None else base(x)
    for t, e in enumerate(ids.tolist()):
        if e >= 0:
            A, B = own.adapter(e)
            parts = [its_B @ (its_A @ x[t]) for its_A, its_B in zip(A, B.split(own.widths), strict=True)]
            y[t] += own.scaling[e] * torch.cat(parts)
    return y


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def drawn(*ranks) -> tuple[list, list]:
    """A and B for each layer, None where the rank is."""
    As = [None if r is None else torch.randn(r, K, device=DEVICE) for r in ranks]
    return As, [None if r is None else torch.randn(width, r, device=DEVICE) for r, width in zip(ranks, WIDTHS, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [R, [1, 6, 3, 2, 4]])
def test_forward(bias, r):
    own, x = layer(bias=bias, r=r), tokens()
    assert own.lora_A.shape == (E, L * 6, K) and own.lora_B.shape == (E, N, 6) and own.weight.shape == (N, K)
    y = own(x, segments())
    close(y.detach(), wanted(own, x))
    assert [part.shape[-1] for part in y.split(own.widths, -1)] == list(WIDTHS)


def test_it_starts_as_layers_of_their_own_would():
    """Each layer's A as nn.Linear draws it, by its own K; B zero."""
    own = layer(init_lora_weights=True)
    for e in range(E):
        A, B = own.adapter(e)
        assert A.shape == (L, R, K) and not B.any()
        assert A.abs().max() <= K**-0.5 and all(0.8 * K**-0.5 < its.abs().max() for its in A)
    x = tokens()
    assert torch.equal(own(x, segments()), own(x, segments(torch.full_like(IDS, -1))))


def test_from_linear_shares():
    linear = nn.Linear(K, N, device=DEVICE).eval()
    own = PackedLoRALinear.from_linear(linear, widths=list(WIDTHS), num_adapters=E, r=R)
    assert own.weight is linear.weight and own.bias is linear.bias and own.widths == WIDTHS and not own.training
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_from_linears_makes_views(bias):
    """One storage for the packed weight and theirs, and they compute what they did."""
    linears = [nn.Linear(K, width, bias, device=DEVICE, dtype=torch.float64) for width in WIDTHS]
    x = tokens().double()
    before = [linear(x) for linear in linears]
    own = PackedLoRALinear.from_linears(linears, num_adapters=E, r=R, init_lora_weights=False)
    for name in ("weight", "bias")[: 1 + bias]:
        storages = {getattr(m, name).untyped_storage().data_ptr() for m in (own, *linears)}
        assert len(storages) == 1
    for linear, y in zip(linears, before, strict=True):
        assert not any(p.requires_grad for p in linear.parameters())
        assert torch.equal(linear(x), y.detach())
    close(own(x, segments()).detach(), wanted(own, x))
    with torch.no_grad():
        linears[1].weight.zero_()
    assert not own.weight[16:19].any() and own.weight[:16].all()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(in_features=K + 1), r"linears\[1\]: wanted in_features 24 as linears\[0\] has, got 25"),
        (dict(bias=False), r"linears\[1\]: wanted bias True as linears\[0\] has, got False"),
        (dict(dtype=torch.bfloat16), r"linears\[1\]: wanted dtype torch.float32"),
        (dict(device="meta"), r"linears\[1\]: wanted device"),
    ],
)
def test_linears_that_do_not_go_together(change, says):
    other = nn.Linear(**(dict(in_features=K, out_features=3, device=DEVICE) | change))
    one = nn.Linear(K, 16, device=DEVICE)
    with pytest.raises(ValueError, match=says):
        PackedLoRALinear.from_linears([one, other], num_adapters=E)
    assert one.weight.requires_grad and one.weight.shape == (16, K)


def test_refused_construction():
    with pytest.raises(TypeError, match="linears: wanted a list of nn.Linear layers, got Linear"):
        PackedLoRALinear.from_linears(nn.Linear(4, 4), num_adapters=2)
    with pytest.raises(ValueError, match="linears: wanted at least one, got none"):
        PackedLoRALinear.from_linears([], num_adapters=2)
    with pytest.raises(TypeError, match="linear: wanted an nn.Linear, got FusedLoRALinear"):
        PackedLoRALinear.from_linears([FusedLoRALinear(4, 4)], num_adapters=2)
    with pytest.raises(ValueError, match="widths: wanted numbers from 1 whose sum is out_features, 8"):
        PackedLoRALinear.from_linear(nn.Linear(4, 8), widths=(4, 3), num_adapters=2)
    for widths in (8, (), (4, 0), (4.0, 4), None):
        with pytest.raises((TypeError, ValueError), match="widths: wanted"):
            PackedLoRALinear(4, widths, num_adapters=2)
    with pytest.raises(UnsupportedError, match="r of 3 layers in all: wanted a rank from 1 to 512, got 513"):
        layer(r=171)
    assert layer(r=170).lora_A.shape[1] == 510


@pytest.mark.parametrize("ranks", [(6, 6, 6), (2, 4, 1), (None, 3, None), (5, None, 2)])
def test_load_adapter(ranks):
    """Layers of any ranks, and layers that the adapter leaves as they are; other slots, and addresses, stay."""
    own, x = layer(), tokens()
    before = own(x, segments()).detach()
    address = own.lora_A.data_ptr(), own.lora_B.data_ptr()
    As, Bs = drawn(*ranks)
    own.load_adapter(3, As, Bs)
    r = max(rank for rank in ranks if rank)
    assert own.ranks[3] == r and own.scaling[3] == pytest.approx(12 / r) and address == (own.lora_A.data_ptr(), own.lora_B.data_ptr())
    y = own(x, segments()).detach()
    assert torch.equal(y[IDS != 3], before[IDS != 3])
    its, parts = x[IDS == 3], []
    for A, B, W, b in zip(As, Bs, own.weight.split(WIDTHS), own.bias.split(WIDTHS), strict=True):
        parts.append(F.linear(its, W, b) + (0 if A is None else 12 / r * F.linear(F.linear(its, A), B)))
    close(y[IDS == 3], torch.cat(parts, -1))
    held_A, held_B = own.lora_A[3].view(L, R, K), own.lora_B[3]
    assert not held_A[:, r:].any() and not held_B[:, r:].any()


def test_load_adapter_as_tensors_and_from_a_state():
    own, other, x = layer(), layer(), tokens()
    A, B = torch.randn(L, 2, K), torch.randn(N, 2, dtype=torch.float64)
    own.load_adapter(0, A, B, scale=0.25)
    assert own.scaling[0] == 0.25 and own.ranks[0] == 2
    state = own.adapter_state_dict(0)
    assert torch.equal(state["lora_A"].cpu(), A) and torch.equal(state["lora_B"].cpu(), B.float()) and state["scaling"] == 0.25
    other.load_state_dict(own.state_dict())
    other.reset_adapter(0)
    assert other.ranks[0] == R
    other.load_adapter_state_dict(0, state)
    assert torch.equal(own(x, segments()), other(x, segments()))
    own.load_adapter(1, *own.adapter(0))  # views into the stacks themselves
    assert torch.equal(own.lora_A[1, :2], own.lora_A[0, :2])


@pytest.mark.parametrize(
    "A, B, error, says",
    [
        ((2, 2), (2, 2), ValueError, "A: wanted one for each of 3 layers, a tensor or None, got 2"),
        ((2, 2, 2), (2, 2), ValueError, "B: wanted one for each of 3 layers, a tensor or None, got 2"),
        ((2, None, 2), (2, 2, 2), ValueError, r"B: wanted one where A has one, for layers \[0, 2\], got layers \[0, 1, 2\]"),
        ((None,) * 3, (None,) * 3, ValueError, "A: wanted one for at least one layer, got None for each"),
        ((2, 7, 2), (2, 7, 2), ValueError, r"A\[1\]: wanted a rank from 1 to the stack's 6, got 7"),
        ((2, 2, 2), (2, 3, 2), ValueError, r"B\[1\]: wanted shape \[3, 2\] to match A\[1\] \[2, 24\], got \[3, 3\]"),
        ((2, 2, 0), (2, 2, 0), ValueError, r"A\[2\]: wanted a rank from 1"),
    ],
)
def test_load_adapter_refuses_with_nothing_changed(A, B, error, says):
    own = layer()
    before = copy.deepcopy(own.state_dict())
    As, Bs = drawn(*A, *(2,) * (3 - len(A)))[0][: len(A)], drawn(*B, *(2,) * (3 - len(B)))[1][: len(B)]
    with pytest.raises(error, match=says):
        own.load_adapter(2, As, Bs)
    assert all(torch.equal(own.state_dict()[name], t) for name, t in before.items())


def test_load_adapter_refuses_other_values():
    own, (As, Bs) = layer(), drawn(2, 2, 2)
    for A, B, says in (
        (torch.zeros(2, K), Bs, r"A: wanted a tensor \[3, ...\], or one for each of 3 layers, got \[2, 24\]"),
        (As, torch.zeros(N + 1, 2), r"B: wanted a tensor \[28, ...\], or one"),
        (As[0], Bs, "A: wanted a tensor"),
        (None, Bs, "A: wanted one for each of 3 layers, a tensor or None, got NoneType"),
        ([As[0].t(), *As[1:]], Bs, r"A\[0\]: wanted shape \[r, 24\], got \[24, 2\]"),
    ):
        with pytest.raises(ValueError, match=says):
            own.load_adapter(0, A, B)
    with pytest.raises(TypeError, match=r"A\[0\]: wanted a tensor \[r, 24\], got str"):
        own.load_adapter(0, ["A", *As[1:]], Bs)
    with pytest.raises(ValueError, match="scale: wanted a finite number"):
        own.load_adapter(0, As, Bs, scale=float("nan"))
    with pytest.raises(IndexError, match="wanted an adapter from 0 to 4, got 5"):
        own.load_adapter(5, As, Bs)


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merge(keep):
    own, x = layer(), tokens()
    base = own.weight.detach().clone()
    with_two = own(x, segments(torch.full_like(IDS, 2))).detach()
    with_four = own(x, segments(torch.full_like(IDS, 4))).detach()
    own.merge(2, keep)
    close(own(x), with_two)
    own.merge(4, keep)
    close(own(x), with_four)
    assert torch.equal(own.state_dict()["weight"], base)
    own.unmerge()
    assert torch.equal(own.weight, base)


def test_a_merge_that_is_not_finite_changes_nothing():
    own = layer()
    base = own.weight.detach().clone()
    with torch.no_grad():
        own.lora_B[1, -1, 0] = float("nan")  # the last layer's; the others are written before it is seen
    with pytest.raises(ValueError, match="wanted a finite merged weight"):
        own.merge(1)
    assert not own.merged and torch.equal(own.weight, base)


def test_training_one_adapter_moves_it_alone():
    own, x = layer(), tokens()
    before = own.lora_A.detach().clone(), own.lora_B.detach().clone()
    optimizer = torch.optim.SGD(own.adapter_parameters(2), lr=0.1)
    own(x, segments()).square().mean().backward()
    optimizer.step()
    for stack, then in zip((own.lora_A, own.lora_B), before, strict=True):
        moved = (stack.detach() != then).flatten(1).any(1)
        assert moved.tolist() == [e == 2 for e in range(E)]


def test_a_layer_that_an_adapter_leaves_stays_so_in_training():
    own, x = layer(), tokens()
    own.load_adapter(2, *drawn(3, None, 2))
    optimizer = torch.optim.AdamW(own.adapter_parameters(2), lr=0.1)
    for _ in range(3):
        own(x, segments()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    A, B = own.adapter(2)
    assert not A[1].any() and not B[16:19].any() and A[0].any() and B[:16].any()


def test_in_a_model():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj, self.o_proj = layer(), MultiLoRALinear(9, K, num_adapters=E, r=2, device=DEVICE)

        def forward(self, x):
            q, k, v = self.qkv_proj(x).split(WIDTHS, -1)
            return self.o_proj(v) + q.sum() + k.sum()

    model, x = Attention(), tokens()
    with use_segments(model, segments()):
        y = model(x)
    q, k, v = wanted(model.qkv_proj, x).split(WIDTHS, -1)
    close(y, model.o_proj(v, segments()) + q.sum() + k.sum())
    with pytest.raises(UnsupportedError, match="names: wanted those that adapter files have for the layers that qkv_proj packs, got none"):
        save_adapter(model, "nowhere", slot=0)
    weight = model.qkv_proj.weight
    remove_lora(model)
    assert type(model.qkv_proj) is nn.Linear and model.qkv_proj.weight is weight and model.qkv_proj.out_features == N


def test_copies_and_casts():
    own, x = layer(), tokens()
    own.load_adapter(0, *drawn(2, 3, 1))
    close(copy.deepcopy(own)(x, segments()), own(x, segments()))
    half = copy.deepcopy(own).to(torch.bfloat16)
    assert half.scaling.dtype == torch.float32 and half(x.bfloat16(), segments()).dtype == torch.bfloat16
    assert "widths=(16, 3, 9)" in repr(own) and "ranks=3..6" in repr(own)


class Base(nn.Module):
    """Keeps its weight its own way."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.codes = K, N, nn.Parameter(torch.randn(K, N, device=DEVICE))

    def forward(self, x):
        return x @ self.codes


def test_over_another_layer():
    base, x = Base(), tokens()
    own = PackedLoRAOver(base, widths=WIDTHS, num_adapters=E, r=R, lora_alpha=12, init_lora_weights=False)
    assert not base.codes.requires_grad and own.lora_A.device.type == DEVICE.type
    y = own(x, segments())
    close(y.detach(), wanted(own, x, base=base).detach())
    y.sum().backward()
    assert own.lora_A.grad.shape == own.lora_A.shape
    with pytest.raises(UnsupportedError, match="merge: wanted a layer with a weight"):
        own.merge(0)
    for widths in ((), (16, 3)):
        with pytest.raises(ValueError, match="widths: wanted"):
            PackedLoRAOver(base, widths=widths, num_adapters=E)
    del base.out_features
    with pytest.raises(ValueError, match="in_features: wanted a number"):
        PackedLoRAOver(base, widths=WIDTHS, num_adapters=E)
    assert PackedLoRAOver(base, widths=WIDTHS, in_features=K, num_adapters=E).out_features == N

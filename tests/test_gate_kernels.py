"""What stands before a gated MLP's down projection, and behind it in a mixture, as kernels, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from margins import inside

from lora_kernels import launch, launch_gate

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)]
TORCHS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
HUGE = [0.0, -0.0, 1e-4, 8.0, -8.0, 20.0, -20.0, 88.0, -88.0, 89.0, -104.0, 400.0, -400.0, 6e4, -6e4]
EPS = torch.finfo(torch.float32).eps


def operands(rows, width, dtype, device, packed=False):
    """gate and up, halves of one tensor where ``packed``, and dh."""
    both = torch.randn(rows, 2 * width, device=device)
    both[:, :width] *= 4
    both[0, : min(width, len(HUGE))] = torch.tensor(HUGE, device=device)[:width]
    gate, up = both.to(dtype).chunk(2, -1)
    return (gate, up) if packed else (gate.contiguous(), up.contiguous()), torch.randn(rows, width, device=device).to(dtype)


def held(act, gate, up, dh, factors=None, into=None):
    """One rounding to the dtype, of a product in float32: the logistic function's argument is rounded, so its relative error grows with it,
    as its value falls off; the slope is a sum of terms that are no larger than one and |gate|. Dot products: sums of a row."""
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    h = TORCHS[act](leaves[0]) * leaves[1]
    each = torch.ones_like(h) if factors is None else factors.double().view(-1, 1).expand_as(h)
    wanted = [h.detach() * each, *torch.autograd.grad(h, leaves, dh.double() * each)]
    *gradients, dots = launch_gate.gradients(act, gate, up, dh.clone(), factors, into)
    ours = [launch_gate.product(act, gate, up, factors), *gradients]
    arithmetic = 64 * EPS * (1 + leaves[0].detach().abs()) * each.abs()
    sizes = [up.double().abs(), (dh * 1.0).double().abs() * up.double().abs(), dh.double().abs()]
    for name, mine, exact, size in zip(("h", "dgate", "dup"), ours, wanted, sizes, strict=True):
        allowed = torch.finfo(gate.dtype).eps * exact.abs() + arithmetic * size + torch.finfo(gate.dtype).tiny
        fits = exact.abs() < torch.finfo(gate.dtype).max
        assert mine.dtype is gate.dtype and ((mine.double() - exact).abs() <= allowed)[fits].all(), name
        assert not mine.isnan().any(), name
    if factors is None:
        assert dots is None
    else:
        terms = h.detach() * dh.double()
        allowed = ((h.shape[-1] + 64) * EPS * terms.abs() + 64 * EPS * (leaves[0].detach().abs() * up.double() * dh.double()).abs()).sum(-1)
        assert dots.dtype is torch.float32 and ((dots.double() - terms.sum(-1)).abs() <= allowed).all()


@pytest.mark.parametrize("act", TORCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 1), (1, 15), (3, 1023), (2, 1024), (5, 2051)])
def test_values(rows, width, dtype, act, device):
    before = launch.launches
    (gate, up), dh = operands(rows, width, dtype, device)
    held(act, gate, up, dh)
    assert launch.launches == before + 2


@pytest.mark.parametrize("of", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 1), (7, 33), (3, 1024), (2, 1030)])
def test_values_of_halves_with_factors(rows, width, dtype, of, device):
    (gate, up), dh = operands(rows, width, dtype, device, packed=True)
    made = gate.new_full((rows, 2 * width), math.nan)
    held("silu", gate, up, dh, torch.rand(rows, device=device).to(of), made.chunk(2, -1))
    assert not made.isnan().any()


@pytest.mark.parametrize("change", ["width", "stride", "dtype"])
def test_values_of_launches_that_differ_in_one_thing(change, device):
    """Of as many rows each, one after the other: what was compiled for a multiple of 16, or a dtype, is not for what is no such."""
    wide, narrow = 1024, 1030 if change == "width" else 1024
    for width, apart, dtype in ((wide, 0, torch.float32), (narrow, 3 * (change == "stride"), torch.float16 if change == "dtype" else None)):
        (gate, up), dh = operands(3, width, dtype or torch.float32, device)
        gate, up = (torch.cat([t, t.new_zeros(3, apart)], 1)[:, :width] for t in (gate, up))
        held("silu", gate, up, dh, torch.rand(3, device=device))
        y, weights = torch.randn(6, width, device=device).to(gate.dtype), torch.rand(3, 2, device=device).to(gate.dtype)
        z = launch_gate.weighted_sum(y, weights, gate.dtype)
        wanted = (y.double().view(3, 2, width) * weights.double()[..., None]).sum(1)
        torch.testing.assert_close(z.double(), wanted, rtol=2e-3, atol=2e-3)


def test_factors_and_dot_products_of_no_and_huge_numbers(device):
    """A factor of 0 leaves its row's dot product, which is not divided by it."""
    (gate, up), dh = operands(3, 40, torch.float32, device)
    factors = torch.tensor([0.0, 1e-30, -7.0], device=device)
    held("silu", gate, up, dh, factors)
    assert not launch_gate.product("silu", gate, up, factors)[0].any()


def test_more_axes_than_two(device):
    (gate, up), dh = operands(6, 20, torch.float32, device, packed=True)
    wanted = launch_gate.product("silu", gate, up)
    found = launch_gate.product("silu", *torch.cat([gate, up], -1).view(2, 3, 40).chunk(2, -1))
    assert found.shape == (2, 3, 20) and found.is_contiguous() and torch.equal(found.view(6, 20), wanted)


def test_the_gradient_of_up_takes_the_place_of_dh(device):
    (gate, up), dh = operands(1, 70, torch.float32, device)
    dgate, dup, _ = launch_gate.gradients("silu", gate, up, dh)
    assert dup is dh and dgate.data_ptr() not in (gate.data_ptr(), up.data_ptr())


@pytest.mark.parametrize("tokens, top_k, width", [(1, 1, 1), (5, 2, 33), (3, 8, 1025), (2, 3, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of, to", [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)])
def test_sums_of_experts(tokens, top_k, width, dtype, of, to, device):
    y, weights = torch.randn(tokens * top_k, width, device=device).to(dtype), torch.rand(tokens, top_k, device=device).to(of)
    before = launch.launches
    z = launch_gate.weighted_sum(y, weights, to)
    terms = y.double().view(tokens, top_k, width) * weights.double()[..., None]
    allowed = (top_k + 1) * EPS * terms.abs().sum(1) + torch.finfo(to).eps * terms.sum(1).abs() + torch.finfo(to).tiny
    assert z.dtype is to and ((z.double() - terms.sum(1)).abs() <= allowed).all() and launch.launches == before + 1


def test_nothing_is_read_or_written_outside(device):
    with inside(4096, math.nan) as around:
        (gate, up), dh = operands(3, 1027, torch.float32, device, packed=True)
        made = torch.empty(3, 2 * 1027, device=device)
        held("silu", gate, up, dh, torch.rand(3, device=device), made.chunk(2, -1))
        launch_gate.weighted_sum(torch.randn(6, 1027, device=device), torch.rand(3, 2, device=device), torch.float32)
    assert len(around) == 7 + 4 + 3 and all(each.isnan().all() for each in around)
    assert sum(each.numel() > 2 * 4096 for each in around) == 6, "what lies between rows of halves"


def test_nan_stays_where_it_is(device):
    (gate, up), dh = operands(3, 1027, torch.float32, device)
    gate[0, 700], up[1, 800], dh[2, 900] = math.nan, math.nan, math.nan
    h, (dgate, dup, dots) = launch_gate.product("silu", gate, up), launch_gate.gradients("silu", gate, up, dh, torch.ones(3, device=device))
    found = [t.isnan().nonzero().tolist() for t in (h, dgate, dup)]
    assert found == [[[0, 700], [1, 800]], [[0, 700], [1, 800], [2, 900]], [[0, 700], [2, 900]]]
    assert dots.isnan().all()
    y, weights = torch.zeros(6, 5, device=device), torch.ones(3, 2, device=device)
    y[1, 2], weights[2, 1] = math.nan, math.nan
    assert launch_gate.weighted_sum(y, weights, torch.float32).isnan().nonzero().tolist() == [[0, 2], *([2, n] for n in range(5))]

"""What stands before a gated MLP's down projection, as kernels, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from margins import inside, outside

from lora_kernels import launch, launch_gate

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)]
TORCHS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
HUGE = [0.0, -0.0, 1e-4, 8.0, -8.0, 20.0, -20.0, 88.0, -88.0, 89.0, -104.0, 400.0, -400.0, 6e4, -6e4]


def operands(number, dtype, device):
    gate, up, dh = torch.randn(3, number, device=device)
    gate *= 4
    gate[: min(number, len(HUGE))] = torch.tensor(HUGE, device=device)[:number]
    return gate.to(dtype), up.to(dtype), dh.to(dtype)


def held(act, gate, up, dh):
    """One rounding to the dtype, of a product in float32: the logistic function's argument is rounded, so its relative error grows with it,
    as its value falls off; the slope is a sum of terms that are no larger than one and |gate|."""
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    h = TORCHS[act](leaves[0]) * leaves[1]
    wanted = [h.detach(), *torch.autograd.grad(h, leaves, dh.double())]
    ours = [launch_gate.product(act, gate, up), *launch_gate.gradients(act, gate, up, dh.clone())]
    arithmetic = 64 * torch.finfo(torch.float32).eps * (1 + leaves[0].detach().abs())
    sizes = [up.double().abs(), (dh * 1.0).double().abs() * up.double().abs(), dh.double().abs()]
    for name, mine, exact, size in zip(("h", "dgate", "dup"), ours, wanted, sizes, strict=True):
        allowed = torch.finfo(gate.dtype).eps * exact.abs() + arithmetic * size + torch.finfo(gate.dtype).tiny
        fits = exact.abs() < torch.finfo(gate.dtype).max
        assert mine.dtype is gate.dtype and ((mine.double() - exact).abs() <= allowed)[fits].all(), name
        assert not mine.isnan().any(), name


@pytest.mark.parametrize("act", TORCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 15, 2047, 2048, 5003])
def test_values(number, dtype, act, device):
    before = launch.launches
    held(act, *operands(number, dtype, device))
    assert launch.launches == before + 2


def test_the_gradient_of_up_takes_the_place_of_dh(device):
    gate, up, dh = operands(70, torch.float32, device)
    dgate, dup = launch_gate.gradients("silu", gate, up, dh)
    assert dup is dh and dgate.data_ptr() not in (gate.data_ptr(), up.data_ptr())


def test_nothing_is_read_or_written_outside(device):
    with inside(4096, math.nan) as larger:
        held("silu", *operands(2051, torch.float32, device))
    assert len(larger) == 3 + 4 and all(each.isnan().all() for each in outside(larger, 4096))


def test_nan_stays_where_it_is(device):
    gate, up, dh = operands(2051, torch.float32, device)
    gate[700], up[800], dh[900] = math.nan, math.nan, math.nan
    h, (dgate, dup) = launch_gate.product("silu", gate, up), launch_gate.gradients("silu", gate, up, dh)
    found = [t.isnan().nonzero().flatten().tolist() for t in (h, dgate, dup)]
    assert found == [[700, 800], [700, 800, 900], [700, 900]]

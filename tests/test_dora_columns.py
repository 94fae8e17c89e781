"""The magnitude's part of DoRA's backward pass as one kernel: dt bit for bit, dg against float64, and where it runs."""

import subprocess
import sys

import pytest
import torch
from margins import inside

from lora_kernels import dora_linear, launch, launch_columns
from lora_kernels.dora import ScaleColumns

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)]


def operands(M, N, dtype, device):
    dy, t = (torch.randn(M, N, device=device).to(dtype) for _ in range(2))
    return dy, t, torch.rand(N, device=device) + 0.5


def held(dy, t, g, need_dt=True):
    """dt is one product rounded once, dg a float32 sum of M products: each term is rounded at most M times."""
    dt, dg = launch_columns.backward(dy, t, g, need_dt)
    assert dt is None if not need_dt else dt.is_contiguous() and torch.equal(dt, (dy.float() * g).to(dy.dtype))
    if t is None:
        assert dg is None
        return
    terms = (dy.double() * t.double()).flatten(0, -2)
    allowed = terms.shape[0] * torch.finfo(torch.float32).eps * terms.abs().sum(0)
    assert dg.dtype is torch.float32 and ((dg.double() - terms.sum(0)).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N", [(1, 1), (15, 7), (16, 256), (17, 255), (33, 257), (100, 513)])
def test_sizes(M, N, dtype, device):
    held(*operands(M, N, dtype, device))


@pytest.mark.parametrize("M", [1024, 1025, 2100])
def test_tokens_split_over_programs(M, device):
    """A split of one block of tokens each, the last short; of several; and none left over for the last ones."""
    held(*operands(M, 3, torch.float32, device))


def test_strides(device):
    """A slice of columns, a transposed matrix, one row for all, leading dimensions, and each of them with what it is not."""
    dy, t, g = operands(34, 70, torch.float16, device)
    wide = torch.full((34, 99), float("nan"), dtype=torch.float16, device=device)
    wide[:, 11:81] = dy
    for each in (wide[:, 11:81], dy.t().contiguous().t(), dy[:1].expand(34, 70), dy.view(2, 17, 70), dy.view(17, 2, 70).transpose(0, 1)):
        held(each, t.view(each.shape), g)
        held(t.view(each.shape), each, g)


def test_nothing_is_read_or_written_outside(device):
    """Every tensor lies inside a larger one of NaN, whose margins stay; a NaN among the operands stays in its column."""
    dy, t, g = operands(37, 261, torch.float32, device)
    with inside(300, float("nan")) as around:
        held(dy, t, g)
        t[5, 260], dy[36, 0] = float("nan"), float("inf")
        dt, dg = launch_columns.backward(dy, t, g, True)
    assert (~dg.isfinite()).nonzero().flatten().tolist() == [0, 260] and (~dt.isfinite()).nonzero().tolist() == [[36, 0]]
    assert len(around) == 10 and all(each.isnan().all() for each in around)


@pytest.mark.parametrize("needs", ["t", "g", "t g", "g bias", "bias"])
def test_each_gradient_alone(needs, device):
    dy, t, g = operands(9, 21, torch.float32, device)
    leaves = dict(t=t, g=g, bias=torch.randn(21, device=device))
    wanted = [leaves[name].requires_grad_() for name in needs.split()]
    before = launch.launches
    got, same = (torch.autograd.grad(ScaleColumns.apply(*leaves.values(), kernels), wanted, dy) for kernels in (True, False))
    assert launch.launches - before == (needs != "bias")
    for ours, theirs in zip(got, same, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_where_it_runs(launched, as_on_a_users_cpu, device):
    """Where the kernels are named, or on a GPU; not of float64, nor where a compiler looks on, nor without a token."""
    torch.manual_seed(0)
    x, W, A, B, m = (torch.randn(size, device=device, requires_grad=True) for size in ((5, 8), (6, 8), (2, 8), (6, 2), (6,)))

    def names(x, dtype=torch.float32, **how):
        y = dora_linear(*(t.to(dtype) for t in (x, W.detach(), A, B, m)), **how)
        return launched(lambda: y.sum().backward())

    on_gpu = device.type == "cuda"
    assert ("scale_columns" in names(x)) == on_gpu
    assert "scale_columns" not in names(x, impl="torch")
    assert names(x, dtype=torch.float64) == []
    y = ScaleColumns.apply(x.double(), torch.ones(8, dtype=torch.float64, device=device), None, True)
    assert launched(lambda: y.sum().backward()) == []
    assert names(x[:0], impl="torch") == []


@pytest.mark.parametrize("how", [dict(), dict(dropout_p=0.5, training=True)])
@pytest.mark.parametrize("given", [True, False])
def test_named_kernels_scale_too(given, how, launched, device):
    x, W, A, B, m = (torch.randn(size, device=device) for size in ((5, 8), (6, 8), (2, 8), (6, 2), (6,)))
    base = x.requires_grad_() @ W.t() if given else None
    y = dora_linear(x, W, A.requires_grad_(), B, m.requires_grad_(), base=base, impl="triton", **how)
    assert launched(lambda: y.sum().backward()).count("scale_columns") == 1


FAR = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lora_kernels import launch_columns
def far(values, *strides):  # in address space that is touched nowhere else
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides))
    return torch.empty(span, dtype=torch.float16).as_strided(values.shape, strides).copy_(values)
dy, t, g = torch.randint(-4, 5, (9, 11)).half(), torch.randint(-4, 5, (9, 11)).half(), torch.arange(11.0)
for strides in ((1 << 28, 1), (1, 1 << 28), (1 << 23, 1)):
    for one, other in ((far(dy, *strides), t), (t, far(dy, *strides))):
        dt, dg = launch_columns.backward(one, other, g, True)
        assert torch.equal(dt.float(), one.float() * g) and torch.equal(dg, (dy.float() * t.float()).sum(0)), strides
print("far")
"""


def test_offsets_past_32_bits():
    out = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True)
    assert out.stdout == "far\n", out.stderr

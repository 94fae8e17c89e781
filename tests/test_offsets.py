"""Offsets past 32 bits where experts, adapters' gradients or partial sums lie far apart; and which tiles need 64 bits inside."""

import subprocess
import sys

import pytest
import torch

from lora_kernels import layouts
from lora_kernels.operands import ALONE, Many
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

EXPERTS = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lora_kernels import Segments, lora_linear
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad
def far(values, *strides):  # in address space that is touched nowhere else
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides))
    return torch.empty(span, dtype=torch.float16).as_strided(values.shape, strides).copy_(values)
each, ids = torch.tensor([1., 2., 4.]).view(3, 1, 1), torch.arange(33) % 3
x, w, A, B = torch.arange(33.).view(33, 1).expand(33, 9), torch.ones(3, 5, 9) / each, torch.ones(3, 2, 9) / 8, torch.ones(3, 5, 2) * each
near = dict(x=x.half(), weight=w.half(), lora_A=A.half(), lora_B=B.half())
wanted = 9 * x[:, :1] * (1 / each + each / 4)[ids, 0].expand(33, 5)
plan, config = Segments.from_ids(ids, 3, row_block=16, gather_block=16), Config(Shrink(16, 16), Expand(16, 16, 16), Wgrad(16, 16))
for name, *strides in (
    ("weight", 1 << 30, 9, 1), ("weight", 45, 9, 1 << 28), ("x", 1, 1 << 28), ("lora_B", 1 << 30, 2, 1), ("lora_B", 2, 1 << 29, 1)
):
    y = lora_linear(**near | {name: far(near[name], *strides)}, impl="triton", segments=plan, config=config)
    torch.testing.assert_close(y.float(), wanted, rtol=2e-3, atol=0)
    print(name)
"""
PARTS = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lora_kernels import Segments, launch
from lora_kernels.segments import Adapters
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad
def far(three):  # three parts of small numbers, 2^30 of float16 apart, in address space that is touched nowhere else
    assert len(three) == 3
    span = (1 << 31) + sum((n - 1) * s for n, s in zip(three.shape[1:], three.stride()[1:])) + 1
    return torch.empty(span, dtype=torch.float16).as_strided(three.shape, (1 << 30, *three.stride()[1:])).copy_(three)
def apart(what, stride, call, wanted):  # with the buffer that this kernel writes to, and the stride of that name, far
    def launched(kernel, grid, args, options):
        if kernel.__name__ != what:
            return kernel[grid](*args, **options)
        args, at = list(args), kernel.arg_names.index(stride)
        written = args[at if stride == "parts" else 2][0]
        moved = far(written)
        if stride == "parts":
            args[at] = (moved, 1 << 30, *args[at][2:])
        else:
            args[2], args[at] = (moved, *args[2][1:]), 1 << 30
        kernel[grid](*args, **options)
        written.copy_(moved)
        print(what, stride)
    with launch.intercept(launched):
        assert torch.equal(call(), wanted), what  # exact: sums of numbers of few bits
x, w, g, u, v, a = (torch.randint(-2, 3, size).float() for size in ((48, 48), (48, 20), (48, 5), (48, 5), (5, 20), (48, 5)))
ids, three = torch.arange(48) % 3, torch.randint(-2, 3, (3, 48, 5)).float()
config, once = (Config(Shrink(16, 16, split=n), Expand(16, 16, 16, split=max(1, n - 1)), Wgrad(16, 16, split=n)) for n in (3, 1))
many = Adapters(Segments.from_ids(ids, 3, row_block=16, gather_block=16))
of_each = torch.stack([x[ids == e].T @ g[ids == e] for e in range(3)])
alone = dict(dropout=None, dtype=torch.float32, scale=1.0)
apart("shrink", "stride_split", lambda: launch.run_shrink(x, a, config=config, **alone), x @ a)
apart("wgrad", "stride_split", lambda: launch.run_wgrad(x, g, out_transposed=False, config=config, **alone), x.T @ g)
apart("wgrad", "stride_oe", lambda: launch.run_wgrad(x, g, out_transposed=False, config=once, adapters=many, **alone), of_each)
apart("expand", "parts", lambda: launch.run_expand(x, w, v, transposed=False, u=u, config=config)[0], x @ w + u @ v)
apart("u", "", lambda: launch.run_expand(x, w, v, transposed=False, u=far(three), config=once)[0], x @ w + three.sum(0) @ v)
print("parts of u")
added = torch.empty(48, 5)
launch.add_up((far(three), added))
assert torch.equal(added, three.sum(0))
print("parts to be added")
"""


def run(code: str) -> list[str]:
    """What it printed, in a process of its own, which a wrong offset may end; and what it said then."""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    return [*out.stdout.splitlines(), *([f"{out.returncode}", out.stderr[-2000:]] if out.returncode else [])]


@pytest.mark.interpreted
def test_experts():
    """Experts, columns of their weights and of x, and rows of B, the last 2^31 elements and more behind the first."""
    assert run(EXPERTS) == ["weight", "weight", "x", "lora_B", "lora_B"]


@pytest.mark.interpreted
def test_parts_of_sums_and_gradients_of_adapters():
    """The third of three begins 2^31 elements behind the first."""
    written = ["shrink stride_split", "wgrad stride_split", "wgrad stride_oe", "expand parts"]
    assert run(PARTS) == [*written, "parts of u", "parts to be added"]


CONFIG = Config(Shrink(16, 16), Expand(16, 16, 16), Wgrad(16, 16))
SIZES = dict(x=(64, 64), w=(64, 64), v=(8, 64), a=(64, 8), u=(64, 8), base=(64, 64), out=(64, 64))


def of(*far: str, **axis: int) -> dict:
    """Matrices of `SIZES`, contiguous, those named with an axis' elements so far apart that 16 of them pass 2^31."""
    strides = {name: [size[1], 1] for name, size in SIZES.items()}
    for name in far:
        strides[name][axis.get("axis", 0)] = 1 << 27
    return {name: (SIZES[name], tuple(strides[name]), torch.float16) for name in SIZES}


def wide(kernel: str, t: dict, given: str) -> bool:
    """Whether its launch has 64-bit offsets inside tiles. given: the operands of expand that a call has beside x and v."""
    many = Many(2, 64, 4, 16, 16) if kernel == "experts" else ALONE
    if kernel == "shrink":
        layout = layouts.shrink(CONFIG, t["x"], t["a"], False, None, torch.float16, (), many, False, "ieee", False)
    elif kernel == "wgrad":
        layout = layouts.wgrad(CONFIG, t["x"], t["u"], True, many, False, "ieee", False, False)
    elif kernel == "experts":
        w, v = (((2, *t[name][0]), (4096, *t[name][1]), torch.float16) for name in ("w", "v"))
        layout = layouts.experts(CONFIG, t["x"], w, t["u"], v, many, False, "ieee")
    else:
        w, base, out = (t[name] if name in given.split() else None for name in ("w", "base", "out"))
        how = (False, False, False, False, False, many, "ieee", 0, False, False)
        layout = layouts.expand(CONFIG, t["x"], w, t["v"], None, t["u"], base, out, *how)
    return layout.options["WIDE"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "kernel, reads, given",
    [
        ("shrink", "x a", ""),
        ("wgrad", "x", ""),
        ("experts", "x w v", ""),
        ("expand", "x w v", "w"),
        ("expand", "v base", "base"),
        ("expand", "x w v out", "w out"),
    ],
)
def test_tiles_that_need_64_bits(kernel, reads, given, axis):
    """Whichever operand's rows or columns lie far apart; and none otherwise, for it costs registers."""
    assert not wide(kernel, of(), given)
    for name in reads.split():
        assert wide(kernel, of(name, axis=axis), given), name

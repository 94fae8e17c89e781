"""Kernels with one mistake each, and right ones, and what the machine says: ``python -m machine.planted sm_90`` prints a line for each."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from . import driver, ptx, stand_in


@triton.jit
def right(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N), mask=i < N)


@triton.jit
def unmasked(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i), mask=i < N)


@triton.jit
def misaligned(x, y, N, BLOCK: tl.constexpr):
    i = tl.multiple_of(tl.program_id(0) * BLOCK + 1, 16) + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def waiting(x, y, N, BLOCK: tl.constexpr):
    while tl.atomic_add(y, 0, sem="acquire", scope="gpu") < 1:
        pass


@triton.jit
def raced(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N), mask=i < N)
    tl.store(y + i, tl.load(y + i - BLOCK, mask=i >= BLOCK), mask=i < N)


@triton.jit
def turned(x, y, N, BLOCK: tl.constexpr):
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, BLOCK // 32)[None, :]
    tl.store(y + j * 32 + i, tl.load(x + i * (BLOCK // 32) + j))


@triton.jit
def sums(x, y, total, fifths, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(total + i, tl.load(x + i).to(tl.float32))  # on sm_90 several at a time
    tl.store(y + i, tl.load(y + i) + tl.load(x + i))
    tl.store(fifths + i, i.to(tl.uint16) // 5)


GRIDS = {misaligned: 2, turned: 1}


def said(kernel, grid: int, x, y, **options) -> str:
    try:
        kernel[(grid,)](x, y, 3000, 1024, **options)
        return "ran"
    except Exception as error:
        return str(error)


def main(name: str) -> None:
    stand_in.install(name, races=True)
    x, y = torch.arange(3000, dtype=torch.int32), torch.zeros(4096, dtype=torch.int32)
    for kernel in (right, unmasked, misaligned, waiting, raced, turned):
        print(f"{kernel.__name__}: {said(kernel, GRIDS.get(kernel, 3), x, y)}")
        if kernel is right:
            print("equal:", torch.equal(x, y[:3000]))
            y.zero_()
    driver.parse = lambda text: ptx.parse(text.replace("bar.sync", "// bar.sync"))
    print("turned without barriers:", said(turned, 1, x, y, num_warps=8))
    driver.parse = ptx.parse
    for dtype in (torch.float16, torch.bfloat16)[: 2 if name == "sm_90" else 1]:  # before it a sum of bfloat16 is an fma, not known here
        x, y, total, fifths = (
            torch.randn(1024, dtype=dtype),
            torch.randn(1024, dtype=dtype),
            torch.ones(1024),
            torch.zeros(1024, dtype=torch.int16),
        )
        wanted = (x + y, 1 + x.float(), torch.arange(1024) // 5)
        sums[(1,)](x, y, total, fifths, 1024)
        print(f"sums in {dtype}:", [torch.equal(a.to(b.dtype), b) for a, b in zip((y, total, fifths), wanted, strict=True)])


if __name__ == "__main__":
    main(sys.argv[1])

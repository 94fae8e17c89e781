"""Launches that overlap, in the worst order that they may run in: ``python -m machine.overlapped`` prints the results that change.

Chains of dependent launches run with those that begin last ahead of those that they depend on, from memory that is NaN
until it is written. The same with a mistake in how expand waits shows that such a run can find one.
"""

from __future__ import annotations

import random

import torch
import triton
import triton.language as tl

from lora_kernels import launch, parity
from lora_kernels.kernels.overlap import let_next_begin
from lora_kernels.layouts import Options
from lora_kernels.segments import ONE
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

from . import stand_in

CONFIG = Config(
    Shrink(16, 64, split=1, num_stages=2),
    Expand(64, 64, 32, num_warps=4, num_stages=2, pdl=True, group_m=2),
    Wgrad(64, 32, split=1, num_stages=2, beside="pdl"),
)
NAMES = ("y", "u", "dX", "dA", "dB")


@triton.jit
def let_next_begin_too_early():
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


def passes(machine, M: int, seed: int) -> list[torch.Tensor]:
    """Both passes; what one launch writes is read by the next alone, so that nothing has to wait for the machine in between."""
    N, K, R, dtype = 128, 192, 16, torch.bfloat16
    torch.manual_seed(0)
    x, dy, w, A, B = (torch.randn(*shape).to(dtype) for shape in ((M, K), (M, N), (N, K), (R, K), (N, R)))
    machine.random = random.Random(seed)
    with parity.poisoned_empty():
        y, u = launch.forward(x, w, A, B, None, None, ONE, 2.0, 0.0, True, CONFIG)
        machine.finish()
        gradients = launch.backward(dy, x, w, A, B, u, None, ONE, 2.0, 0.0, (True, True, True), dtype, CONFIG)
        machine.finish()
    return [y, u, *gradients]


def differing(machine, seeds: int = 4) -> set[str]:
    """The results that overlapping changed, with room for a whole grid, and for a part of it."""
    found = set()
    for M, resident in ((100, 16), (900, 8)):
        machine.resident, machine.overlap = resident, False
        wanted = passes(machine, M, 0)
        machine.overlap = True
        for seed in range(seeds):
            found |= {name for name, a, b in zip(NAMES, passes(machine, M, seed), wanted, strict=True) if not torch.equal(a, b)}
    return found


def main() -> None:
    machine = stand_in.install("sm_90", seed=0)
    print("as it is:", *sorted(differing(machine)))
    run = launch.run_kernel
    for label, plug in (("no wait", let_next_begin), ("too early", let_next_begin_too_early)):

        def mistaken(kernel, grid, args, options, plug=plug):
            run(kernel, grid, args, Options(**options | {"WAIT": plug}) if kernel.__name__ == "expand" else options)

        launch.run_kernel = mistaken
        print(f"{label}:", *sorted(differing(machine, seeds=2)))


if __name__ == "__main__":
    main()

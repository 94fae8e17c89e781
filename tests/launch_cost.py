"""The host's part of a call by compiled kernels, launching nothing: ``python tests/launch_cost.py [--arch sm_90]``

Triton compiles for a GPU that need not be there and looks up what it compiled as it would on one; then nothing is launched (the C launcher
and the driver are not in these numbers). Best of 15 rounds, one thread, bfloat16, 8 tokens, 64 -> 64, r = 16; run by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
import triton  # noqa: E402
from machine import driver, stand_in  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from lora_kernels import Segments, launch, lora_linear  # noqa: E402

K, N, R, M, E = 64, 64, 16, 8, 8


def launch_nothing(arch: str) -> None:
    """Loads a compiled kernel once, as on a GPU, where the stand-in has no handles to keep."""
    stand_in.install(arch)
    own = CompiledKernel._init_handles

    def once(self) -> None:
        if self.module is None:
            own(self)
            self.module = self

    CompiledKernel._init_handles = once
    driver.Launcher.__call__ = lambda self, *args: None


def best(call: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    """Microseconds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="whose kernels (default sm_90)")
    launch_nothing(parser.parse_args().arch)
    torch.set_num_threads(1)
    drawn = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((M, 1, K), (N, K), (R, K), (N, R), (E, R, K), (E, N, R))]
    x, weight, A, B, As, Bs = drawn
    segments, scales = Segments.from_ids(torch.arange(M) % E, E), torch.ones(E)
    arms = {
        "one adapter": lambda: lora_linear(x, weight, A, B, impl="triton"),
        "eight adapters": lambda: lora_linear(x, weight, As, Bs, scale=scales, segments=segments, impl="triton"),
    }
    print(f"Triton {triton.__version__}, torch {torch.__version__}: us a forward call, and without Triton's part")
    for name, call in arms.items():
        with torch.no_grad():
            call()
            before = launch.launches
            call()
            number, whole = launch.launches - before, best(call)
            with launch.intercept(lambda *launched: None):
                own = best(call)
        print(f"{name:16} {number} launches  {whole:6.1f}  {own:6.1f}")


if __name__ == "__main__":
    main()

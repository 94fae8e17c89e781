"""What the torch arm is made of, on a CPU: ``python -m bench.parts --out bench/results/parts.jsonl``.

The choices of `lora_kernels.chain` rest on these: which library multiplies float32, and how a dropout mask is made and applied.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_kernels import chain, philox

from .conditions import Recorder, conditions, dtype_name
from .session import say
from .table import text_table
from .timing import HostClock, Step, interleave

P = 0.1


def parts(M: int, K: int, dtype: torch.dtype) -> dict[str, Step]:
    """Calls on x ``[M, K]`` and a square weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(dtype)
    weight = torch.randn(K, K, generator=generator).to(dtype)
    seed = torch.tensor(1)
    packed = philox.packed_mask(seed, M, K, P)
    gone, bits = ~philox.keep_mask(seed, M, K, P), chain.kept_bits(packed, M, K, P, dtype)
    calls = {
        "x W^T, torch's linear": lambda: F.linear(x, weight),
        "x W^T, the chain's": lambda: chain.base_linear(x, weight, None),
        "torch's dropout": lambda: F.dropout(x, P),
        "the Philox mask, a bit an element": lambda: philox.packed_mask(seed, M, K, P),
        "its bits widened to the dtype's": lambda: chain.kept_bits(packed, M, K, P, dtype),
        "a mask applied by bitwise and": lambda: chain.drop(x, bits),
        "a mask applied by masked_fill": lambda: x.masked_fill(gone, 0.0),
    }
    return {name: Step(call) for name, call in calls.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--seconds", type=float, default=9.0, help="time for the rounds of a shape, at least 5 of them (default 9)")
    parser.add_argument("--quick", action="store_true", help="one small shape: to see that it runs")
    args = parser.parse_args(argv)
    recorder = Recorder(args.out, "parts", conditions(torch.device("cpu")))
    for M, K in ((32, 64),) if args.quick else ((512, 1024), (2048, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            say(f"parts {M}x{K} {dtype_name(dtype)}")
            times, errors = interleave(parts(M, K, dtype), HostClock(), seconds=args.seconds, least=5)
            for name, error in errors.items():
                raise RuntimeError(f"{name}: {error}")
            for name, passes in times.items():
                t = passes["forward"]
                recorder.add(what="part", arm=name, M=M, K=K, N=K, dtype=dtype_name(dtype), p=P, ms=t.ms(), rounds=t.rounds, launch="host")
    print(text_table(["part", "M", "K", "dtype", "ms"], [[r["arm"], r["M"], r["K"], r["dtype"], r["ms"]["p50"]] for r in recorder.rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

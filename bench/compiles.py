"""Section ``compiles``: how many kernels a run of changing lengths compiles, and on a GPU how long the first call takes on a cold cache.

On a GPU a process with an empty cache folder runs forward and backward passes, and Triton tells of each compilation. Without one nothing is
executed: the launches for an H100 are counted by what tells kernels apart (`precompile.distinct`), which needs no device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

from lora_kernels import dispatch
from lora_kernels.tuning import Arch, resolve

from . import precompile, variants
from .baselines import ours, training
from .conditions import ROOT
from .session import Session
from .table import text_table
from .timing import message
from .workloads import LLAMA_8B, Point

LAYER = "8B q,o"
MOST_TOKENS = 8192
DROPOUTS = (0.0, 0.1)
COUNTED = Arch.cuda(9, 0)


def lengths(number: int) -> list[int]:
    """Token counts from 1 to 8192, spread over the octaves: the ends, multiples of 16 and odd ones, in an order drawn once."""
    rng = random.Random(0)
    found = dict.fromkeys((1, 16, 17, 64, 65, MOST_TOKENS - 1, MOST_TOKENS))
    while len(found) < number:
        length = min(MOST_TOKENS, int(2 ** rng.uniform(0, 13)))
        found.setdefault(16 * -(-length // 16) if rng.random() < 0.5 else length | 1)
    return rng.sample(list(found)[:number], number)


def run(session: Session) -> int:
    """Writes a row for each dropout; returns the number of those that failed."""
    recorder = session.recorder("compiles")
    missing = dispatch.triton_missing()
    if missing:
        recorder.add(what="not run", arm="triton", detail=missing)
        print(f"compiles: not run: triton cannot be imported ({missing})")
        return 0
    number = 20 if session.quick else 200
    measured = session.device.type == "cuda" and variants.kernels_run(session.device) is not None
    K, N = LLAMA_8B[LAYER]
    failed, table = 0, []
    for p in DROPOUTS:
        fields = dict(layer=LAYER, K=K, N=N, r=16, p=p, dtype="bfloat16", what="both", arm="triton", lengths=number)
        try:
            counts = in_process(p, number, not measured, session.seconds / len(DROPOUTS))
        except (RuntimeError, subprocess.SubprocessError) as error:
            failed += 1
            recorder.add(**fields, error=message(error))
            print(f"FAILED compiles p={p:g}: {error}")
            continue
        recorder.add(**fields, **counts)
        table.append([f"p={p:g}", number, counts["kernels"], counts.get("seconds") or ""])
    where = "compiled" if measured else f"kernels of {COUNTED.name}, counted without compiling"
    print(text_table([f"compiles, {LAYER}", "lengths", where, "first call, s"], table), flush=True)
    return failed


def in_process(p: float, number: int, counting: bool, seconds: float) -> dict:
    """The outcome of a process of its own: its cache is empty, and its kernels are not interpreted."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "bench.compiles", "--p", f"{p}", "--number", f"{number}", *(["--count"] if counting else [])]
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:].strip())
    return json.loads(done.stdout.splitlines()[-1])


def counted(p: float, number: int) -> dict:
    """Kernels that differ among all launches; nothing is executed."""
    return {"kernels": len(precompile.distinct(jobs(p, number), COUNTED)), "name": COUNTED.name, "detail": "counted, not compiled"}


def jobs(p: float, number: int) -> list[precompile.PointJob]:
    """Both passes at every length, each by the configuration that a call takes."""
    found = []
    for point in points(p, number):
        forward, backward = (resolve(problem, COUNTED)[0] for problem in variants.problems(precompile.standing(point)))
        found += [precompile.PointJob(point, forward, False), precompile.PointJob(point, backward, True)]
    return found


def points(p: float, number: int) -> list[Point]:
    K, N = LLAMA_8B[LAYER]
    return [Point("compiles", LAYER, M, K, N, 16, p) for M in lengths(number)]


def executed(p: float, number: int) -> dict:
    """Runs both passes at every length on this process's GPU: kernels compiled, and seconds of the first forward and backward."""
    device, first = torch.device("cuda"), 0.0
    with precompile.counting() as compiled:
        for point in points(p, number):
            step = training(ours("triton"), point.operands(device))
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            step.run()
            torch.cuda.synchronize(device)
            first = first or time.perf_counter() - start
    return {"kernels": len(compiled), "seconds": round(first, 3), "detail": "compiled"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiles", description="One process of the section.")
    parser.add_argument("--p", type=float, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--count", action="store_true", help="execute nothing")
    args = parser.parse_args()
    print(json.dumps((counted if args.count else executed)(args.p, args.number)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

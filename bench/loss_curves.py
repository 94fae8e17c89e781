"""Loss curves of a PEFT model as it is and fused, by the Trainer: ``python -m bench.loss_curves --out bench/results/curves.jsonl``.

A small Llama that has read the first half of the licence, byte by byte, learns the second by its adapters, from the same seeds in both
arms. Without dropout the two differ in rounding only; with dropout in the mask, too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from .conditions import Recorder, conditions, dtype_name
from .llama import blocks, fused, llama, stock
from .session import say
from .table import text_table

LENGTH, BATCH, RATE, RANK, WIDTH = 128, 8, 2e-3, 16, 128
STEPS = 60


@dataclass(frozen=True)
class Case:
    """The base's dtype, and the dropout; PEFT keeps the adapters in float32."""

    dtype: torch.dtype = torch.float32
    p: float = 0.0


CASES = (Case(), Case(torch.bfloat16), Case(p=0.1))


def train(model: nn.Module, data: list[dict], steps: int) -> list[float]:
    """The loss of each step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quiet = dict(logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True)
        settings = TrainingArguments(folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE, seed=1, **quiet)
        run = Trainer(model=model, args=settings, train_dataset=data)
        run.train()
    return [round(entry["loss"], 6) for entry in run.state.log_history if "loss" in entry]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loss_curves", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--quick", action="store_true", help="three steps: to see that it runs")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    steps = 3 if args.quick else STEPS
    recorder = Recorder(args.out, "curves", conditions(torch.device("cpu")))
    data = blocks(LENGTH)
    base = llama(2, WIDTH)
    say("curves: the base model")
    train(base, data[: len(data) // 2], 2 * steps)
    for case in CASES:
        model = stock(copy.deepcopy(base).to(case.dtype), r=RANK, lora_alpha=2 * RANK, lora_dropout=case.p)
        for arm, trained in (("peft", copy.deepcopy(model)), ("fused", fused(model))):
            say(f"curves {arm} {dtype_name(case.dtype)} p={case.p:g}")
            found = train(trained, data[len(data) // 2 :], steps)
            shape = dict(layer="llama", M=BATCH * LENGTH, K=WIDTH, N=WIDTH, r=RANK, p=case.p, dtype=dtype_name(case.dtype))
            recorder.add(**shape, adapter_dtype="float32", what="loss", arm=arm, losses=found, quick=args.quick or None)
    lines = [[f"{row['arm']} {row['dtype']} p={row['p']:g}", row["losses"][0], row["losses"][-1]] for row in recorder.rows]
    print(text_table(["loss", "first step", "last step"], lines), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

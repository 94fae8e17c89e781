"""The demo through PEFT: one ``get_peft_model(...)`` trained twice from the same seeds, as PEFT computes it and after ``fuse(model)``."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math

import torch
from torch import nn

from .demo import DROPOUT, TARGETS, Setting, accuracy, compare, outputs, row, train_lora
from .demo_data import CannotRun, Classifier


def pair(encoder, topics: int, rank: int, dropout: float) -> tuple[dict[str, Classifier], str]:
    """The same model fused and as PEFT computes it, in this order, and what `fuse` reported."""
    from peft import LoraConfig, get_peft_model

    from .integrations.peft import fuse

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(TARGETS))
    head = nn.Linear(encoder.config.hidden_size, topics, device=encoder.device)
    stock = Classifier(get_peft_model(encoder, config), head)
    fused = copy.deepcopy(stock)
    report = fuse(fused.encoder)
    return {"fused": fused, "PEFT": stock}, str(report)


def failures(fused: float, stock: float, tests: int) -> list[str]:
    """A sentence where the accuracies differ by more than the standard error of PEFT's."""
    allowed = math.sqrt(stock * (1 - stock) / tests)
    sentence = f"accuracy: wanted PEFT's {stock:.3f} within its standard error of {allowed:.3f}, got {fused:.3f}"
    return [] if abs(fused - stock) <= allowed else [sentence]


def run(args: argparse.Namespace) -> list[str]:
    """The demo; returns what failed."""
    if importlib.util.find_spec("peft") is None:
        raise CannotRun('--peft: wanted the package peft, got none; install it with: pip install "lora_kernels[demo,peft]"')
    s = Setting.of(args)
    torch.manual_seed(args.seed)
    models, report = pair(s.encoder, len(s.topics), args.rank, s.dropout)
    print("\n".join(s.lines))
    print(f"model   MiniLM by get_peft_model, r = {args.rank}, scaling 2, dropout {s.dropout:g} on {', '.join(TARGETS)}")
    print(f"        then fuse(model): {report}", flush=True)

    before, predicted, after = [], [], []
    for name, model in models.items():
        model.eval()
        before.append(accuracy(outputs(model, s.test), s.test))
        adapters = [p for p in model.encoder.parameters() if p.requires_grad]
        torch.manual_seed(args.seed)
        train_lora(model, adapters, s.training, args, s.epochs, s.batch_size, f"{name:<5}")
        model.eval()
        logits = outputs(model, s.test)
        predicted.append(logits.argmax(1))
        after.append(accuracy(logits, s.test))
    print("\n" + row(f"{len(s.test)} unseen headlines", *models))
    print(row("accuracy before training", *(f"{a:.3f}" for a in before)))
    print(row(f"accuracy after {s.epochs} epoch{'s'[: s.epochs > 1]}", *(f"{a:.3f}" for a in after)))
    print(f"the same topic for {int((predicted[0] == predicted[1]).sum())} of {len(s.test)}\n")
    compare(models, s.training, s.dropout or DROPOUT, 1 if args.quick else 12, s.batch_size)
    print()
    return failures(after[0], after[1], len(s.test))

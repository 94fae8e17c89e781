"""Section ``host``: the host's time for an eager call, on tensors so small that the device is never what it waits for.

segments   ours with "auto" for a batch of eight adapters; the other arms as in `bench.baselines`
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_kernels import Segments
from lora_kernels.segments import Adapters

from . import variants, workloads
from .baselines import FORMULAS, inference, ours, training
from .conditions import Recorder
from .session import Session
from .table import text_table
from .timing import clock_for, host_us
from .workloads import Operands


def run(session: Session) -> int:
    """Writes a row for each arm, pass and dropout; returns the number of errors, which is 0: any error is raised."""
    threads = torch.get_num_threads()
    # A second thread would add the operating system's hand-over, which is not the call's own time.
    torch.set_num_threads(1)
    try:
        return _run(session, Recorder(session.path("host"), "host", session.conditions | {"threads": 1}))
    finally:
        torch.set_num_threads(threads)


def _run(session: Session, recorder: Recorder) -> int:
    formulas = dict(FORMULAS) | ({"triton": ours("triton")} if variants.kernels_run(session.device) else {})
    seconds = 0.05 if session.quick else 0.5
    settle = (lambda: torch.cuda.synchronize(session.device)) if session.device.type == "cuda" else (lambda: None)
    launch = clock_for(session.device, "eager").launch
    table = []
    for point in workloads.host(session.device):
        o = point.operands(session.device)
        for what in ("forward", "both"):
            cells = []
            for name, formula in {**formulas, "segments": ours("auto")}.items():
                operands = mixed(o) if name == "segments" else o
                step = inference(formula, operands) if what == "forward" else training(formula, operands)
                t = host_us(step.run, settle, seconds=seconds)
                recorder.add(**point.fields(), what=what, arm=name, launch=launch, us=t.ms(), rounds=t.rounds)
                cells.append(f"{t.p50:.0f}")
            table.append([f"{what} p={point.p:g}", *cells])
    print(text_table(["host, us a call", *formulas, "segments"], table), flush=True)
    return 0


def mixed(o: Operands, adapters: int = 8) -> Operands:
    """The same for adapters that tokens take in turn."""
    A, B = (t.detach().repeat(adapters, 1, 1).requires_grad_() for t in (o.lora_A, o.lora_B))
    plan = Segments.from_ids(torch.arange(o.x.shape[0], device=o.x.device) % adapters, adapters)
    return replace(o, lora_A=A, lora_B=B, adapters=Adapters(plan))

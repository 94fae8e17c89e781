"""Section ``memory``: what a layer's forward and backward add to the memory in use.

saved   bytes the forward pass keeps for the backward pass, besides the operands x, W, A and B, each storage once
peak    on a GPU: the most memory in use at any time during forward and backward, less that in use before
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from . import variants, workloads
from .baselines import FORMULAS, Formula, gradients, ours
from .session import Budget, Session, say
from .table import text_table
from .timing import message
from .workloads import Operands


def run(session: Session) -> int:
    """Writes a row for each point and arm; returns the number of arms that failed."""
    recorder = session.recorder("memory")
    formulas = dict(FORMULAS) | ({"triton": ours("triton")} if variants.kernels_run(session.device) else {})
    table, errors, budget = [], 0, Budget(session.seconds)
    for point in budget.walk(workloads.memory(session.device, session.quick)):
        o = point.operands(session.device)
        cells = []
        for name, formula in formulas.items():
            try:
                saved, peak = saved_bytes(formula, o), peak_bytes(formula, o)
            except Exception as error:
                errors += 1
                recorder.add(**point.fields(), what="memory", arm=name, error=message(error))
                say(f"memory FAILED {point} {name}: {message(error)}")
                cells.append("failed")
                continue
            recorder.add(**point.fields(), what="memory", arm=name, saved_bytes=saved, peak_bytes=peak)
            cells.append(_mib(saved) if peak is None else f"{_mib(saved)}/{_mib(peak)}")
        table.append([f"{point.M}x{point.K}->{point.N} r={point.r} p={point.p:g}", *cells])
    budget.record(recorder)
    title = "memory, MiB: saved/peak" if session.device.type == "cuda" else "memory, MiB: saved"
    print(text_table([title, *formulas], table), flush=True)
    return errors


def saved_bytes(formula: Formula, o: Operands) -> int:
    """Bytes that a formula saves for backward, the operands not counted."""
    return saved_by(lambda: formula(o), (o.x, o.weight, o.lora_A, o.lora_B))


def saved_by(call: Callable[[], torch.Tensor], besides: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that autograd saves during a call, each storage once and those of ``besides`` not at all."""
    known = {t.untyped_storage().data_ptr() for t in besides}
    storages: dict[int, int] = {}
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(t)  # so that no storage is freed and its address taken by another within the pass
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storages.values())


def peak_bytes(formula: Formula, o: Operands) -> int | None:
    """The most memory that a forward and a backward pass add on a GPU; None on a CPU, which torch does not account for."""
    return peak_of(lambda: gradients(o, formula(o)), o.x.device)


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """The same of a call, whose result is kept until the peak is read."""
    if device.type != "cuda":
        return None
    for _ in range(2):  # the first pass compiles, and makes the library's workspaces
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
    return peak


def _mib(number: int) -> str:
    return f"{number / (1 << 20):.2f}" if number < 10 << 20 else f"{number / (1 << 20):.0f}"

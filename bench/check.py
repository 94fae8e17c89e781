"""Section ``check``: parity of every path on this device with the float64 reference; nothing else is reported unless it is green.

The cases and their tolerance are `lora_kernels.parity`'s; this runs them, writes the outcome and tells the other sections.
"""

from __future__ import annotations

import importlib

import torch

from . import precompile, variants
from .conditions import read_rows
from .session import Session, say
from .table import text_table

_SAME = ("gpu", "cpu", "torch", "triton", "code")


def run(session: Session, *, quick: bool | None = None) -> bool:
    """Runs the cases, writes a row for each and one named "all"; True if all are within tolerance."""
    parity = importlib.import_module("lora_kernels.parity")
    quick = session.quick if quick is None else quick
    recorder = session.recorder("check")

    def progress(done: int, total: int, name: str) -> None:
        say(f"check {done}/{total} {name}")

    quick = not _compiled(parity, session, quick) or quick
    results = _results(parity, session, progress, quick)
    for result in results:
        recorder.add(what="case", name=result.name, ok=bool(result.ok), ratio=float(result.ratio), detail=str(result.detail), quick=quick)
    red = [result for result in results if not result.ok]
    worst = max(results, key=lambda result: result.ratio, default=None)
    # No cases at all proves nothing, so it is red.
    green = bool(results) and not red
    summary = f"{len(results) - len(red)} of {len(results)} cases within tolerance"
    recorder.add(what="verdict", name="all", ok=green, ratio=float(worst.ratio) if worst else None, detail=summary, quick=quick)
    for result in red:
        say(f"check: {result.name}: {result.detail}")
    named = red[:20] or ([worst] if worst else [])
    print(f"check: {summary}" + ("; worst error over allowed:" if green else "; out of tolerance:" if red else ""))
    print(text_table(["case", "error/allowed", "ok"], [[r.name, float(r.ratio), "yes" if r.ok else "NO"] for r in named]), flush=True)
    return green


def _results(parity, session: Session, progress, quick: bool) -> list:
    arch = variants.kernels_run(session.device)
    if arch is None and session.device.type == "cpu":
        # Nothing but the library chain is measured here, so it alone is checked.
        chain = [parity.Case(33, 96, 64, 8, dtype, p, impl="torch") for dtype in (torch.float32, torch.bfloat16) for p in (0.0, 0.1)]
        return [parity.run_case(case, session.device) for case in chain]
    return parity.run_all(session.device, progress, quick)


def _compiled(parity, session: Session, quick: bool) -> bool:
    """Whether the kernels of the cases are compiled within half of the section's time, those of the quick ones first.

    One after the other, where they are launched, those left over would take longer than the section has.
    """
    arch = variants.kernels_run(session.device)
    if session.device.type != "cuda" or arch is None:
        return True
    cases = dict.fromkeys([*parity.cases(session.device, True), *parity.cases(session.device, quick)])
    left = precompile.run(precompile.of_cases(list(cases)), arch, session.seconds / 2)
    if left:
        say(f"check: {left} kernels are not compiled in half of {session.seconds:g} s, so the quick cases alone are run")
    return not left


def recorded(session: Session) -> bool | None:
    """The verdict of an earlier check in the same folder, of the same code on the same machine; None if there is none."""
    try:
        rows = read_rows(session.path("check"))
    except ValueError:
        return None
    verdicts = [row for row in rows if row.get("what") == "verdict" and all(row[k] == session.conditions[k] for k in _SAME)]
    return bool(verdicts[-1]["ok"]) if verdicts else None

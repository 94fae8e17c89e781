"""Section ``sanitize``: NVIDIA's compute-sanitizer, memcheck and racecheck, over the quick parity check of every kernel on a GPU.

memcheck sees addresses out of bounds only where each tensor is an allocation of its own, so torch's caching allocator is off. racecheck
sees shared memory alone. Not part of "all": both tools instrument every kernel, and whether a section's budget suffices is not known.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import precompile, variants
from .conditions import ROOT
from .session import Session, say
from .table import text_table

TOOLS = ("memcheck", "racecheck")
CHECK = ("-m", "lora_kernels", "check", "--quick")
_SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def run(session: Session) -> int:
    """Writes a row for each tool; returns the number of those that found something, or did not come to their summary."""
    recorder = session.recorder("sanitize")
    program = found_program()
    if program is None or session.device.type != "cuda":
        missing = "compute-sanitizer is not on PATH nor under /usr/local/cuda*/bin" if program is None else f"{session.device} is not a GPU"
        recorder.add(what="not run", arm="triton", detail=missing)
        print(f"sanitize: not run: {missing}", flush=True)
        return 0
    arch = variants.kernels_run(session.device)
    if arch is not None:
        parity = importlib.import_module("lora_kernels.parity")
        precompile.run(precompile.of_cases(parity.cases(session.device, True)), arch, session.seconds / 4)
    failed, table = 0, []
    for tool in TOOLS:
        ok, detail = verdict(*output_of([program, "--tool", tool, sys.executable, *CHECK], session.seconds * 3 / 8))
        failed += not ok
        recorder.add(what="sanitize", arm="triton", tool=tool, name=" ".join(CHECK), ok=ok, detail=detail)
        table.append([tool, "ok" if ok else "NOT OK", detail])
    print(text_table(["sanitize", "", "summary"], table), flush=True)
    return failed


def found_program() -> str | None:
    """Path of compute-sanitizer."""
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (str(places[-1]) if places else None)


def output_of(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit status, what it printed); None where the time was not enough."""
    say(f"sanitize: {' '.join(command)}, for at most {seconds:.0f} s")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        return None, _text(expired.stdout) + _text(expired.stderr)
    return done.returncode, done.stdout + done.stderr


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def verdict(status: int | None, output: str) -> tuple[bool, str]:
    """Whether the tool found nothing and the check under it was green, and its summary."""
    summaries = _SUMMARY.findall(output)
    if status is None:
        return False, "ran out of time before its summary"
    if not summaries:
        last = output.strip().splitlines()[-1:] or ["nothing printed"]
        return False, f"no summary, exit status {status}: {last[0][:200]}"
    counts = [int(a or b) for summary in summaries for a, b in _ERRORS.findall(summary)]
    clean = bool(counts) and not any(counts)
    check = "" if status == 0 else f"; the check itself ended with status {status}"
    return clean and status == 0, "; ".join(summaries) + check

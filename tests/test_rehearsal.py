"""Sections of the bench on a GPU that is not there: the lines that only a GPU reaches run, for whatever they then find."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is here")
def test_sections_rehearsed(tmp_path):
    command = [sys.executable, str(TESTS / "rehearsal.py"), "roof", "memory", "merge", "--out", str(tmp_path), "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "raised: none" in done.stdout, done.stderr[-3000:]
    for section in ("roof", "memory", "merge"):
        rows = [json.loads(line) for line in (tmp_path / f"{section}.jsonl").read_text().splitlines()]
        assert rows and all(row["gpu"] == "no GPU: a rehearsal" for row in rows), "nobody takes them for a GPU's"

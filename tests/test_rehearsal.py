"""Sections of the bench on a GPU that is not there: the lines that only a GPU reaches run, for whatever they then find."""

import json
import os
import re
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is here")
def test_kernels_compiled_ahead_for_a_gpu_elsewhere(tmp_path):
    command = [sys.executable, str(TESTS / "rehearsal.py"), "decode:quick", "--ahead", "--out", str(tmp_path / "out")]
    without = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=without)
    assert done.returncode == 2 and "wanted a folder in TRITON_CACHE_DIR, got none" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=without | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0 and "compiled ahead: decode:quick" in done.stdout, done.stderr[-3000:]
    ready, all_of_them, new = map(int, re.search(r"(\d+) of (\d+) kernels ready, (\d+) of them compiled now", done.stderr).groups())
    assert ready == all_of_them == new == len(list((tmp_path / "cache").rglob("*.cubin"))) > 1

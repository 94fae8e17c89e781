"""The section `shared`: whole rows and their table, arms that are right and checked, workloads as documented."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from test_memory import mask_bytes  # noqa: E402

from bench import report, shared  # noqa: E402
from bench.conditions import read_rows  # noqa: E402
from bench.session import Session  # noqa: E402
from lora_kernels import lora_linears  # noqa: E402

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")


def rows_of(tmp_path: Path) -> list[dict]:
    return read_rows(tmp_path / "shared.jsonl")


def test_rows_and_table(tmp_path):
    assert shared.run(Session(CPU, tmp_path, quick=True)) == 0
    rows = rows_of(tmp_path)
    arms = {"linear", "peft", "alone:torch", "together:torch"}
    assert {row["arm"] for row in rows} == arms
    assert {row["what"] for row in rows if row["grid"] == "train"} == {"forward", "backward", "both"}
    assert {row["what"] for row in rows if row["grid"] == "decode"} == {"forward"}
    saved = {row["arm"]: row["saved_bytes"] for row in rows if row["grid"] == "train" and row["p"] and row["what"] == "both"}
    mask = mask_bytes(0.1, 32, rows[0]["K"], "torch")
    assert saved["linear"] == 0 and saved["together:torch"] == saved["alone:torch"] == 4 * 32 * 3 * 16 + 3 * mask < saved["peft"]
    whole, brief = (report.render("shared", rows, short) for short in (False, True))
    assert "| forward + backward | small q,k,v | 32 | 0.1 |" in whole and "MiB kept" in whole and "MiB kept" not in brief
    assert "Not measured yet: `python -m bench.device shared --out bench/results` measures it." == report.render("shared", [], True)


def test_an_arm_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    def wrong(x, parts, **how):
        return [y * 1.01 for y in lora_linears(x, parts, **how)]

    monkeypatch.setattr(shared, "lora_linears", wrong)
    assert shared.run(Session(CPU, tmp_path, quick=True)) == 3
    rows = [row for row in rows_of(tmp_path) if row["arm"] == "together:torch"]
    assert len(rows) == 3 and all("as far from float32 as may be" in row["error"] and row["ms"] is None for row in rows)


def test_workloads():
    found = shared.grid(cuda=True, quick=False)
    assert {point.layer for point in found} == set(shared.WIDTHS)
    assert {(point.M, point.p) for point in found if point.grid == "train"} == {(M, p) for M in (8192, 2048) for p in (0.0, 0.1)}
    assert all(point.N == sum(point.widths) for point in found)
    x, parts, dys = shared.grid(cuda=False, quick=True)[0].layers(CPU)
    assert [p.weight.shape[0] for p in parts] == [dy.shape[1] for dy in dys] == [96, 32, 32] and x.requires_grad

"""The section `model`: whole rows and their tables, the arms on one set of weights, and none that is wrong timed."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bench import model, report
from bench.conditions import read_rows
from bench.session import Session
from lora_kernels import MultiLoRALinear

CPU = torch.device("cpu")
_, TRAIN, MIXTURE, DECODE, _ = model.grid(False, True)
pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")


def rows_of(tmp_path: Path) -> list[dict]:
    return read_rows(tmp_path / "model.jsonl")


def test_rows_and_tables(tmp_path, capsys):
    assert model.run(Session(CPU, tmp_path, quick=True)) == 0
    rows = rows_of(tmp_path)
    assert {(row["grid"], row["arm"]) for row in rows} == {
        *(("train", arm) for arm in ("linear", "peft", "fused", "shared", "gates")),
        *(("decode", arm) for arm in ("linear", "peft", "fused", "slots")),
    }
    for row in rows:
        assert row["ms"]["p50"] > 0 and row["rounds"] >= 3 and row["over_linear"] > 0 and row["error"] is None
        assert (row["saved_bytes"] is not None) == (row["what"] == "both")
    assert {row["adapters"] for row in rows if row["grid"] == "decode"} == {1, 3}
    kept = {row["arm"]: row["saved_bytes"] for row in rows if row["what"] == "both" and "mixture" in row["layer"]}
    assert kept.keys() == {"linear", "peft", "fused"} and kept["fused"] < kept["peft"]
    kept = {row["arm"]: row["saved_bytes"] for row in rows if row["what"] == "both" and row["p"]}
    assert kept["linear"] < kept["fused"] == kept["shared"] < kept["peft"] and kept["gates"] < kept["fused"]
    whole, brief = (report.render("model", rows, short) for short in (False, True))
    assert "| tiny, 1 of 2 layers | 16 | 0.1 | forward + backward |" in whole and "| tiny, 1 of 2 layers | 3 | 3 | host |" in whole
    assert "forward" not in brief.split("A step")[0].split("\n\n")[-1] and "| tiny, 1 of 2 layers | 16 | 0.1 |" in brief
    assert capsys.readouterr().out.startswith("model, ms")
    assert report.render("model", [], True) == "Not measured yet: `python -m bench.device model --out bench/results` measures it."


def test_arms_share_weights_and_are_what_they_say():
    """One copy of the base for all, in every dtype that is asked for; the slots hold PEFT's adapters."""
    arms = model.build(DECODE, CPU, torch.float32)
    bases = [[p for p in arm.args[0].parameters() if p.dim() == 2 and min(p.shape) >= 32 and not p.requires_grad] for arm in arms.values()]
    addresses = [{p.data_ptr() for p in ps} for ps in bases]
    assert all(addresses[0] <= each for each in addresses)
    slots = [m for m in arms["slots"].args[0].modules() if isinstance(m, MultiLoRALinear)]
    assert len(slots) == 7 and all(layer.num_adapters == 3 for layer in slots)
    x, _ = model.inputs(DECODE, CPU, torch.float32)
    with torch.no_grad():
        y = arms["peft"](x)
        assert not torch.allclose(y, arms["linear"](x)) and not torch.allclose(y[0], y[1])
    assert model.build(TRAIN, CPU, torch.float64)["shared"].args[0].training


@pytest.mark.parametrize("point, arm", [(TRAIN, "fused"), (MIXTURE, "fused"), (DECODE, "slots")], ids=["train", "mixture", "decode"])
def test_an_arm_that_is_wrong_is_not_timed(point, arm, tmp_path, monkeypatch):
    """1 % off in one layer of the arm."""
    own = model.build

    def slipped(at, device, dtype):
        arms = own(at, device, dtype)
        below = arms[arm].args[0]
        below = below.base_model.model if isinstance(below, PeftModel) else below
        below.layers[0].mlp.register_forward_hook(lambda module, args, y: y * 1.01)
        return arms

    monkeypatch.setattr(model, "build", slipped)
    monkeypatch.setattr(model, "grid", lambda cuda, quick: [point])
    assert model.run(Session(CPU, tmp_path, quick=True)) == 1
    rows = [row for row in rows_of(tmp_path) if row["arm"] == arm]
    assert len(rows) == 1 and rows[0]["error"].startswith("check: result 0 is ") and rows[0]["ms"] is None


def test_without_peft_it_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "NEEDS", ("peft", "a_package_that_is_not_there"))
    assert model.run(Session(CPU, tmp_path, quick=True)) == 0
    assert [(row["what"], row["detail"]) for row in rows_of(tmp_path)] == [("left out", "wanted a_package_that_is_not_there")]


def test_workloads():
    found = model.grid(cuda=True, quick=False)
    dense = {(shape, grid) for shape in ("8B", "1B") for grid in ("train", "decode")}
    assert {(point.shape, point.grid) for point in found} == {*dense, ("30B-A3B", "train")}
    training = [point for point in found if point.grid == "train"]
    assert {point.p for point in training} == {0.0, 0.1} and all(point.sequences == 4 for point in training)
    assert {point.adapters for point in found if point.grid == "decode"} == {16, 1}
    assert len(set(found[-2].names())) == 16 and found[-2].sequences == 16

"""The section `slots`: whole rows and their table, and nothing timed that puts a wrong adapter into a slot."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import report, slots
from bench.conditions import read_rows
from bench.session import Session
from lora_kernels import slots as stacks

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")


def rows_of(tmp_path: Path) -> list[dict]:
    return read_rows(tmp_path / "slots.jsonl")


def test_rows_and_table(tmp_path, capsys):
    assert slots.run(Session(CPU, tmp_path, quick=True)) == 0
    rows = rows_of(tmp_path)
    assert [row["arm"] for row in rows] == list(slots.ARMS)
    for row in rows:
        assert row["ms"]["p50"] > 0 and row["rounds"] >= 3 and row["error"] is None and row["moved_bytes"] == rows[0]["moved_bytes"]
        assert (row["gbs"] is not None) == (row["arm"] in ("copy", "put"))
    whole, brief = (report.render("slots", rows, short) for short in (False, True))
    assert "| model | r | adapter, MiB | model | hotswap | add | copy | put | slot |" in brief and "| tiny, 2 layers | 4 |" in whole
    assert capsys.readouterr().out.startswith("slots, ms")
    late = rows[0] | {"what": "left out", "arm": None, "ms": None, "detail": "no time for it in 7 s"}
    assert "Left out:\n\n- points, host: no time for it in 7 s (1 point)" in report.render("slots", [*rows, late], True)
    assert report.render("slots", [], True) == "Not measured yet: `python -m bench.device slots --out bench/results` measures it."


def test_the_arms(tmp_path):
    """The bytes are those of a file's tensors; put is a write each time, slot none; add leaves what serves as it is."""
    moved, arms, wrong = slots.build(slots.points(True)[0], CPU, tmp_path)
    assert not wrong
    tensors = load_file(tmp_path / "adapter0" / "adapter_model.safetensors").values()
    assert moved == sum(t.numel() * t.element_size() for t in tensors)
    written, put = [], stacks.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "put", lambda slot, given, *how: (written.append(slot), put(slot, given, *how)))
        for n in range(4):
            arms["put"]()
            assert len(written) == n + 1
            for other in ("slot", "add", *(["hotswap"] * n)):
                arms[other]()
    assert len(written) == 4 and len(set(written)) == 2


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    """B is left out of one layer."""
    put = stacks.put

    def slipped(slot, given, *how):
        put(slot, [(layer, [(A, 0 * B) for A, B in parts] if n == 3 else parts, scale) for n, (layer, parts, scale) in enumerate(given)])

    monkeypatch.setattr(stacks, "put", slipped)
    assert slots.run(Session(CPU, tmp_path, quick=True)) == 1
    (row,) = rows_of(tmp_path)
    assert row["error"] == "check: lora_B of layers.0.self_attn.o_proj is not adapter0's" and row["ms"] is None


def test_without_peft_it_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "NEEDS", ("peft", "a_package_that_is_not_there"))
    assert slots.run(Session(CPU, tmp_path, quick=True)) == 0
    assert [(row["what"], row["detail"]) for row in rows_of(tmp_path)] == [("left out", "wanted a_package_that_is_not_there")]

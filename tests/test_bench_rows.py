"""Rows of the table follow from what was measured alone: a gain beyond the spread, the pass it is for, and whether the check was green."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import conditions, rows  # noqa: E402
from lora_kernels.problem import Problem  # noqa: E402
from lora_kernels.tuning import Arch, Config, Expand, heuristic, tables  # noqa: E402

SM_90 = Arch.cuda(9, 0)
COMMON = dict.fromkeys([*conditions.FIELDS, *conditions.CONDITIONS]) | dict(gpu="GPU", code="c", capability=[9, 0])


def row_of(section: str, ms: float, **fields) -> dict:
    times = dict(p20=ms * 0.99, p50=ms, p80=ms * 1.01)
    return COMMON | dict(section=section, grid="train", layer="l", M=2048, N=4096, K=1024, r=16, p=0.0, dtype="bfloat16", ms=times) | fields


def tuned_rows(
    what: str = "forward", own: float = 1.0, tuned: float | None = 0.8, torch_: float = 0.9, plan: dict | None = None, **fields
) -> list[dict]:
    """plan: of section mtune, the problem's adapters and blocks."""
    point = COMMON | dict(M=2048, N=4096, K=1024, r=16, p=0.0) | fields
    problem = Problem(point["M"], point["N"], point["K"], point["r"], torch.bfloat16, "x" if point["p"] else "", **(plan or {}))
    problem = problem if what == "forward" else problem.backward()
    config = heuristic(problem, SM_90)
    better = replace(config, expand=replace(config.expand, group_m=4))
    shared = dict(what=what, kernel="pass", launch="queued", round="last") | fields
    section = "mtune" if plan else "tune"
    found = [row_of(section, torch_, arm="torch", name="torch", **shared)]
    found += [row_of(section, own, arm="triton", name="heuristic", config=dataclasses.asdict(config), **shared)]
    if tuned is not None:
        found += [row_of(section, tuned, arm="triton", name="tuned", config=dataclasses.asdict(better), **shared)]
    return found


def single_rows(torch_: float, triton: float, launch: str = "queued", what: str = "forward", **fields) -> list[dict]:
    config = dataclasses.asdict(heuristic(Problem(fields.get("M", 2048), 4096, 1024, 16, torch.bfloat16), SM_90))
    shared = dict(what=what, launch=launch, **fields)
    return [row_of("single", torch_, arm="torch", **shared), row_of("single", triton, arm="triton", config=config, **shared)]


def written(results: Path, *found: dict, green: bool = True, code: str = "c") -> Path:
    verdict = COMMON | dict(section="check", what="verdict", name="all", ok=green, code=code)
    for section in ("tune", "mtune", "single", "check"):
        mine = [row for row in (*found, verdict) if row["section"] == section]
        (results / f"{section}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    return results


def test_the_fastest_pass_becomes_the_row(tmp_path):
    """The joined parts, or the same with launches that overlap, whichever is faster."""
    found = tuned_rows("backward", own=1.0, tuned=0.8)
    config = found[1]["config"] | {"wgrad": found[1]["config"]["wgrad"] | {"beside": "stream"}}
    for ms, beside in ((0.7, "stream"), (0.85, "")):
        overlapped = found[-1] | row_of("tune", ms, **{k: v for k, v in found[-1].items() if k not in ("section", "ms", "name", "config")})
        overlapped |= dict(name="overlapped by stream", config=config)
        (row,), _ = rows.rows_of(written(tmp_path, *found, overlapped))
        assert row.config.wgrad.beside == beside, row


def test_a_gain_becomes_a_row(tmp_path):
    (row,), reasons = rows.rows_of(written(tmp_path, *tuned_rows()))
    assert not reasons
    assert (row.capability, row.tokens, row.N, row.K, row.rank, row.dropout, row.itemsize) == (
        (9, 0),
        (1024, 4096),
        4096,
        1024,
        (1, 17),
        False,
        2,
    )
    assert row.arm == "triton" and row.w_major == "k" and row.config.expand.group_m == 4
    assert row.source == (
        "bench/results/tune.jsonl: 1.25x over the heuristic's configuration, triton 1.12x queued over torch at 2048 tokens, p50, GPU"
    )


def test_a_backward_row_swaps_the_layers_sizes(tmp_path, monkeypatch):
    found, reasons = rows.rows_of(written(tmp_path, *tuned_rows("backward", p=0.1), *tuned_rows("forward", p=0.1, N=1024, K=4096)))
    assert not reasons and [(row.N, row.K, row.dropout, row.w_major) for row in found] == [(1024, 4096, True, "n"), (1024, 4096, True, "k")]
    monkeypatch.setattr(tables, "ROWS", tuple(found))
    forward = Problem(2048, 4096, 1024, 16, torch.bfloat16, "x")
    assert tables.lookup(forward.backward(), SM_90) is found[0] and tables.lookup(forward, SM_90) is None
    assert tables.lookup(replace(forward, N=1024, K=4096), SM_90) is found[1], "the same sizes, the other pass"


def test_rows_say_how_many_adapters_they_are_for(tmp_path, monkeypatch):
    plan = dict(adapters=64, row_block=128, gather_block=32)
    measured = dict(torch_=0.5, plan=plan, M=8192, N=1024, K=4096, loaded=64, adapters=64)
    found, reasons = rows.rows_of(written(tmp_path, *tuned_rows("forward", **measured), *tuned_rows("backward", **measured)))
    assert not reasons and [row.adapters for row in found] == [(1, 1 << 31), (16, 256)]
    assert [row.arm for row in found] == ["triton", "triton"], "the chain was faster, but it waits for the device"
    assert all("mtune.jsonl: 1.25x over the heuristic" in row.source and "torch" not in row.source for row in found)
    monkeypatch.setattr(tables, "ROWS", tuple(found))
    forward = Problem(8192, 1024, 4096, 16, torch.bfloat16, **plan)
    for adapters, served in ((1, (True, False)), (64, (True, True)), (255, (True, True)), (256, (True, False))):
        problem = replace(forward, adapters=adapters)
        assert tuple(tables.lookup(p, SM_90) is not None for p in (problem, problem.backward())) == served
    assert tables.lookup(replace(forward, adapters=0, row_block=0, gather_block=0), SM_90) is None
    assert tables.lookup(replace(forward, row_block=64), SM_90) is None, "another plan's blocks"


@pytest.mark.parametrize(
    "found, green, code, reason",
    [
        (tuned_rows(tuned=0.99), True, "c", "nothing is faster than torch .* beyond the spread .tuned: 1.01x"),
        (tuned_rows(tuned=None), True, "c", "nothing is faster than torch"),
        (tuned_rows(), False, "c", "no green parity check"),
        (tuned_rows(), True, "other code", "no green parity check"),
        (single_rows(0.9, 1.0), True, "c", "nothing is faster than torch"),
        (single_rows(1.0, 0.99), True, "c", "nothing is faster than torch"),
        (single_rows(1.0, 0.5, "eager", M=512) + single_rows(0.5, 1.0, "graph", M=512), True, "c", "nothing is faster than torch"),
        ([row_of("single", 1.0, arm="torch", what="forward", launch="queued")], True, "c", "no configuration"),
    ],
)  # fmt: skip
def test_no_gain_is_no_row(tmp_path, found, green, code, reason):
    made, reasons = rows.rows_of(written(tmp_path, *found, green=green, code=code))
    assert not made and len(reasons) == 1 and re.search(reason, reasons[0]), reasons


def test_the_arm_follows_what_was_measured(tmp_path):
    """Without dropout at many tokens a call takes the chain; with dropout the kernels; each until a measurement says otherwise."""
    (row,), _ = rows.rows_of(written(tmp_path, *single_rows(1.0, 0.8)))
    assert row.arm == "triton" and "single.jsonl: triton 1.25x queued over torch" in row.source
    (row,), _ = rows.rows_of(written(tmp_path, *single_rows(0.8, 1.0, p=0.1)))
    assert row.arm == "torch" and row.dropout
    (row,), _ = rows.rows_of(written(tmp_path, *single_rows(1.0, 0.5, "eager"), *single_rows(1.0, 0.8, "graph")))
    assert row.arm == "triton" and "2.00x eager, 1.25x graph" in row.source
    (row,), _ = rows.rows_of(written(tmp_path, *tuned_rows(), *single_rows(0.9, 1.0)))
    assert row.arm == "triton", "the tuned kernels beside the chain go before the heuristic's"
    (row,), _ = rows.rows_of(written(tmp_path, *tuned_rows(torch_=0.7)))
    assert row.arm == "torch" and row.config.expand.group_m == 4, "the chain is faster; impl='triton' still takes the better configuration"


def test_rows_of_other_files_errors_and_cpus(tmp_path):
    found = tuned_rows()
    broken = found[2] | dict(ms=None, error="RuntimeError: out of something")
    assert not rows.rows_of(written(tmp_path, *found[:2], broken))[0]
    assert rows.rows_of(written(tmp_path, *(row | dict(gpu=None, capability=None) for row in found))) == ([], [])
    written(tmp_path, *found)
    (tmp_path / "tune.jsonl").rename(tmp_path / "tune-h100.jsonl")
    assert "bench/results/tune-h100.jsonl: " in rows.rows_of(tmp_path)[0][0].source


def test_token_buckets_meet_in_the_geometric_middle():
    counts = [1, 16, 64, 512, 2048, 8192]
    ranges = [rows.reach(M, counts) for M in counts]
    assert ranges == [(1, 4), (4, 32), (32, 182), (182, 1024), (1024, 4096), (4096, 16384)]
    assert rows.reach(64, [64, 8192]) == (32, 256) and rows.reach(8192, [64, 8192]) == (2048, 16384), "nowhere further than a factor of 4"


def test_a_rank_that_a_configuration_cannot_serve_is_left_out():
    config = Config(expand=Expand(128, 128, 64, u="loop"))
    bucket = rows.Bucket("GPU", (9, 0), "forward", 4096, 4096, 16, False, 2)
    row = rows.bare_row(bucket, (1024, 4096), config)
    assert rows.served(row) is row
    assert rows.bare_row(replace(bucket, r=64), (1, 2), config).rank == (33, 65)
    assert "up to 128, got" in rows.served(rows.bare_row(replace(bucket, r=256), (1, 2), config))


def test_what_is_printed_can_be_pasted(tmp_path, capsys):
    assert rows.main(["--results", str(written(tmp_path, *tuned_rows(), *tuned_rows(tuned=None, M=8192, torch_=0.5)))]) == 0
    printed = capsys.readouterr()
    names: dict = {"Row": tables.Row, "__annotations__": {}}
    exec(printed.out.replace("from .config", "from lora_kernels.tuning.config"), names)
    assert names["ROWS"] == tuple(rows.rows_of(tmp_path)[0]) and len(names["ROWS"]) == 1
    assert "no row: sm_90 forward 1024->4096 r=16 itemsize 2 M=8192: nothing is faster than torch" in printed.err
    assert rows.main(["--results", str(tmp_path / "none")]) == 1
    assert "holds no tune.jsonl" in capsys.readouterr().err

"""Tuning with many adapters: the plan's blocks are kept, each adapter's tokens are its own, and rows say how many adapters they are for."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import candidates, conditions, kernel_calls, multi_variants, multi_workloads, report, roof, tune  # noqa: E402
from bench.multi_workloads import MultiPoint  # noqa: E402
from bench.session import Session  # noqa: E402
from lora_kernels import reference  # noqa: E402
from lora_kernels.problem import Problem  # noqa: E402
from lora_kernels.segments import Segments  # noqa: E402
from lora_kernels.tuning import Arch, Config  # noqa: E402

CPU = torch.device("cpu")
SM_90 = Arch.cuda(9, 0)
TRAIN = MultiPoint("train", "small", 80, 32, 48, 8, dtype=torch.float32, popularity="gaps", spread=5, loaded=5)
DECODE = MultiPoint("popularity", "small", 2, 32, 48, 8, dtype=torch.float32, popularity="distinct", loaded=4)
DECODE_8B = Problem(64, 4096, 4096, 16, torch.bfloat16, adapters=64, row_block=64, gather_block=16)
TRAIN_8B = replace(DECODE_8B, M=8192, row_block=128, gather_block=32)


# Candidates.


def test_candidates_hold_what_is_to_be_decided():
    many, few = (candidates.candidates("expand", problem, SM_90) for problem in (TRAIN_8B, DECODE_8B))
    tried = {candidates.short("expand", dataclasses.asdict(config.expand)) for config in many}
    assert tried >= {"128x256x64 s4 w8 tma masked", "128x256x64 s3 w8 tma persistent masked", "128x128x64 s3 w8 tma"}
    assert {config.expand.each for config in few} == {True, False} and not any(config.expand.each for config in many)
    assert {config.expand.split for config in few} > {1} and {config.expand.pdl for config in few} == {False, True}
    assert {config.wgrad.block_m for config in candidates.candidates("wgrad", TRAIN_8B.backward(), SM_90)} == {16, 32, 64, 128}
    one = replace(TRAIN_8B, adapters=0, row_block=0, gather_block=0)
    assert {config.wgrad.block_m for config in candidates.candidates("wgrad", one.backward(), SM_90)} == {32, 64, 128}


def test_decode_is_timed_with_v_gathered_and_not():
    """The heuristic's, one adapter after the other, and the gathering in a program of its own, each an arm of section decode."""
    point = multi_workloads.tune(True, False)[0]
    found, refused = multi_variants.configs(point, point.empty_operands(torch.device("meta")), SM_90)
    ways = {name: (config.expand.each, config.expand.split) for name, config in found.items() if config.expand.u == "given"}
    assert not refused and ways == {
        "triton:given": (True, 1), "triton:given+pdl": (True, 1), "triton:one after the other": (False, 1), "triton:each beside": (True, 2),
    }  # fmt: skip


# What a kernel has to compute.


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(), (3, 8)])
def test_expected_results_are_the_references(p, ranks):
    point = replace(TRAIN, dtype=torch.float64, p=p, ranks=ranks)
    o = point.operands(CPU)
    o.ids[:7] = -1  # some tokens of the base alone
    o.adapters = o.adapters._replace(segments=Segments.from_ids(o.ids, 5))
    i = kernel_calls.inputs(point, o)
    x, A, B = (t.clone().requires_grad_() for t in (i.o.x, i.o.lora_A, i.o.lora_B))
    many = dict(segments=o.adapters.segments, ranks=o.adapters.ranks)
    y = reference.lora_linear(x, i.o.weight, A, B, scale=i.o.scale, dropout_p=p, training=True, seed=i.seed, **many)
    dx, da, db = torch.autograd.grad(y, (x, A, B), i.o.dy)
    for call, wanted in zip(kernel_calls.TRAINING, (None, [y.detach()], None, [dx], [da, db]), strict=True):
        if wanted is not None:
            torch.testing.assert_close(kernel_calls.expected(call, i, torch.float64), wanted, msg=lambda text, call=call: f"{call}: {text}")
        if call.kernel == "expand":
            at = torch.tensor([0, 3, 79])
            torch.testing.assert_close(kernel_calls.expected(call, i, torch.float64, at), [wanted[0][at]])
    assert all(bool((t[:7] == 0).all()) and bool(t[7:].any()) for t in (i.u, i.ds))


@pytest.mark.parametrize("point", [TRAIN, replace(TRAIN, ranks=(2, 8)), replace(TRAIN, popularity="even", spread=1, loaded=9)], ids=str)
def test_the_kernels_operations_are_the_passes(point):
    calls = kernel_calls.TRAINING
    forward, backward = (sum(call.work(point)[0] for call in calls if call.what == what) for what in ("forward", "backward"))
    assert (forward, backward) == (roof.work(point, "forward")[0], roof.work(point, "backward")[0])
    assert kernel_calls.DECODE[1].work(DECODE) == roof.work(DECODE, "forward"), "for few tokens expand is the whole pass"


def test_the_adapters_in_use_are_read_and_all_gradients_written():
    u, used, loaded = replace(TRAIN, ranks=(2, 8)).low_rank
    counts = torch.bincount(multi_workloads.adapter_ids(TRAIN), minlength=5)
    ranks = torch.tensor([2, 8, 2, 8, 2])
    assert (u, used, loaded) == (int((counts * ranks).sum()), int(ranks[counts > 0].sum()), 5 * 8)
    read, written = kernel_calls.TRAINING[0].work(TRAIN)[1] // 4, kernel_calls.TRAINING[4].work(TRAIN)[1] // 4
    assert read == 80 * 32 + 4 * 8 * 32 + 80 * 8, "x, A of the four adapters with tokens, u"
    assert written == 80 * (32 + 48) + 2 * 80 * 8 + 5 * 8 * (32 + 48), "x, dY, dS and U, whole stacks"


# The section.


@pytest.fixture
def session(tmp_path) -> Session:
    return Session(CPU, tmp_path, quick=True)


def test_points_are_of_one_bucket_each():
    points = multi_workloads.tune(True, False)
    buckets = [(point.M, point.K, point.N, point.r, point.p) for point in points]
    assert len(set(buckets)) == len(buckets) and {point.loaded for point in points} == {64}
    assert multi_workloads.tune(True, True) and all(point.dtype == torch.bfloat16 for point in points)


def test_without_kernels_the_chain_is_timed(session, as_on_a_users_cpu):
    assert tune.many(session) == 0
    found = conditions.read_rows(session.path("mtune"))
    assert {(row["kernel"], row["arm"]) for row in found} == {("pass", "torch")} and {row["grid"] for row in found} == {
        "train",
        "popularity",
    }


@pytest.mark.interpreted
def test_candidates_are_checked_and_timed(session, capsys):
    assert tune.many(session) == 0
    found = conditions.read_rows(session.path("mtune"))
    assert {(row["kernel"], row["what"]) for row in found if row["grid"] == "train" and row["arm"] == "triton"} == {
        *((call.kernel, call.what) for call in kernel_calls.TRAINING), *(("pass", what) for what in ("forward", "backward", "both")),
    }  # fmt: skip
    assert {(row["loaded"], row["adapters"]) for row in found} == {(5, 4), (4, 2)} and not any(row["error"] for row in found)
    assert {row["config"]["masked"] for row in found if row["kernel"] == "expand"} == {False, True}
    passes = {(row["grid"], row["name"]): row for row in found if row["kernel"] == "pass" and row["what"] == "forward"}
    for point in (TRAIN, DECODE):
        o = point.operands(CPU)
        own = Config.from_dict(passes[point.grid, "heuristic"]["config"])
        assert (own.expand.block_m, own.shrink.block_m) == (o.adapters.segments.row_block, o.adapters.segments.gather_block)
    assert "4 of 5" in capsys.readouterr().out
    assert "| small 32->48 | 80 of 4 adapters |" in report.render("mtune", found, brief=False)


@pytest.mark.interpreted
def test_another_adapters_tokens_are_found_out(session, monkeypatch):
    """The truth is each adapter's own: results of the same kernels by a plan of other ids are errors."""
    right = kernel_calls.launched

    def launched(call, i, config):
        segments = i.o.adapters.segments
        wrong = Segments.from_ids(segments.ids.roll(1), segments.num_adapters)
        return right(call, replace(i, o=replace(i.o, adapters=i.o.adapters._replace(segments=wrong))), config)

    monkeypatch.setattr(multi_workloads, "tune", lambda cuda, quick: [TRAIN])
    monkeypatch.setattr(kernel_calls, "launched", launched)
    failed = tune.many(session)
    errors = [row for row in conditions.read_rows(session.path("mtune")) if row["error"]]
    assert len(errors) == failed and all("of the error budget" in row["error"] for row in errors)
    assert {(row["kernel"], row["what"]) for row in errors} == {(call.kernel, call.what) for call in kernel_calls.TRAINING}

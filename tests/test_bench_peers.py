"""Peers in section single: a right one is timed and says how it was checked; a wrong one, and a missing one, is a row and not a crash."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    conditions,
    multi,
    multi_baselines,
    multi_check,
    multi_workloads,
    peer_modules,
    report,
    session,
    single,
    single_peers,
    timing,
    variants,
    workloads,
)
from bench import merge as merge_section  # noqa: E402
from bench.workloads import Point  # noqa: E402

CPU = torch.device("cpu")
TINY = Point("lorafusion", "small", 64, 96, 80, 8, 0.0, torch.float32)

pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too

PEER = """
from __future__ import annotations
from dataclasses import dataclass
import torch
import torch.nn.functional as F

@dataclass
class State:  # of a module that sys.modules does not know, this would raise
    scale: float

class Peer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B, scale, p):
        keep = torch.rand_like(x) >= p
        dropped = torch.where(keep, x / (1 - p), 0.0)
        s = dropped @ A.T
        ctx.save_for_backward(dropped, keep, weight, A, B, s)
        ctx.state, ctx.p = State(scale), p
        return x @ weight.T + (s @ B.T) * scale

    @staticmethod
    def backward(ctx, dy):
        dropped, keep, weight, A, B, s = ctx.saved_tensors
        ds = (dy @ B) * ctx.state.scale
        dx = dy @ weight + torch.where(keep, (ds @ A) / (1 - ctx.p), 0.0)
        return dx, None, ds.T @ dropped, (dy.T @ s) * ctx.state.scale, None, None

def lora_linear(x, weight, A, B, scale, dropout_p):
    return Peer.apply(x, weight, A, B, scale, dropout_p)
"""


def peer(folder: Path, name: str = "lorafusion", old: str = "", new: str = ""):
    """A module that is right, or has ``new`` for ``old``."""
    assert old in PEER
    (folder / f"{name}.py").write_text(PEER.replace(old, new, 1) if old else PEER)
    return peer_modules.load("lora_linear", folder)[0][f"peer:{name}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_a_right_peer_is_within_the_budget(tmp_path, p, dtype):
    assert single_peers.wrong(replace(TINY, p=p, dtype=dtype), peer(tmp_path), CPU) is None


@pytest.mark.parametrize(
    "p, old, new, message",
    [
        (0.0, "(s @ B.T) * scale", "(s @ B.T) * (scale * 1.01)", "y at 64x96->80, p = 0"),
        (0.0, "(dy.T @ s) * ctx.state.scale", "(dy.T @ s)", "dB at"),
        (0.1, "ds.T @ dropped,", "ds.T @ (dropped * 0.9),", "dA at 64x96->80, p = 0:"),
        (0.1, "x / (1 - p)", "x", "y at 64x96->80, p = 0.1, W = 0"),
        (0.1, "torch.where(keep, (ds @ A) / (1 - ctx.p), 0.0)", "(ds @ A) / (1 - ctx.p)", "wanted dX nonzero for 0.9000 +-"),
        (0.1, ">= p", ">= 2 * p", "wanted dX nonzero for 0.9000 +-"),
        (0.5, "torch.where(keep, (ds", "torch.where(keep.flip(0), (ds", "y at"),
        (0.5, "torch.where(keep, (ds @ A) / (1 - ctx.p)", "torch.where(keep, (ds @ A)", "dX at"),
    ],
)
def test_what_is_wrong_with_a_peer_is_found(tmp_path, p, old, new, message):
    assert message in single_peers.wrong(replace(TINY, p=p), peer(tmp_path, "wrong", old, new), CPU)


def run(folder: Path, monkeypatch) -> tuple[int, list[dict]]:
    monkeypatch.setattr(peer_modules, "FOLDER", folder)
    failed = single.run(session.Session(CPU, folder / "out", quick=True))
    return failed, conditions.read_rows(folder / "out" / "single.jsonl")


def test_peers_are_timed_refused_and_missed(tmp_path, monkeypatch, capsys):
    peer(tmp_path, "right")
    peer(tmp_path, "wrong", "return dx, None, ds.T", "return dx, None, 2 * ds.T")
    (tmp_path / "raises.py").write_text("def lora_linear(x, weight, A, B, scale, dropout_p):\n    raise RuntimeError('out of something')\n")
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit('no GPU')")
    (tmp_path / "vllm.py").write_text("raise RuntimeError('asked by a section that does not time it')")
    failed, rows = run(tmp_path, monkeypatch)
    out = capsys.readouterr().out

    right = [row for row in rows if row["arm"] == "peer:right"]
    assert {(row["p"], row["what"]) for row in right} == {(p, what) for p in (0.0, 0.1) for what in ("forward", "backward", "both")}
    for row in right:
        assert row["ms"] and row["over_linear"] > 0 and row["grid"] == "train"
        assert row["detail"].startswith("y, dX, dA, dB within the budget at 32x64->96, p = 0")
        assert ("at p = 0.1 with W = 0 and the mask read from dX" in row["detail"]) == (row["p"] > 0)
    for arm, error in (("peer:wrong", "check: dA at"), ("peer:raises", "check: RuntimeError: out of something")):
        refused = [row for row in rows if row["arm"] == arm]
        assert [row["launch"] for row in refused] == ["check", "check"] and all(row["error"].startswith(error) for row in refused)
        assert f"FAILED {arm}, 2 times" in out
    assert failed == 4
    reasons = {row["arm"]: row["detail"] for row in rows if row["what"] == "left out"}
    assert set(reasons) == {"peer:broken", "peer:lorafusion", "peer:quits"}
    assert reasons["peer:lorafusion"].startswith("there is no bench/peers/lorafusion: git clone https://")
    assert "No module named" in reasons["peer:broken"]
    assert "left out: peer:lorafusion: there is no bench/peers/lorafusion: git clone" in out

    full, brief = (report.render("single", rows, short) for short in (False, True))
    assert "| peer:right |" in full and "peer:right: " not in brief
    assert "How peers were checked:\n\n- peer:right, host: y, dX, dA, dB within" in full
    assert "Left out:\n\n- peer:broken: " in full and "Failed:\n\n- peer:raises, " in full and "\n- peer:wrong, check: check: dA at" in full


def test_a_module_is_asked_by_its_own_sections(tmp_path):
    peer(tmp_path)
    for name, known in (("lora_linear", "peer:lorafusion"), ("multi_lora_linear", "peer:vllm")):
        found, refused = peer_modules.load(name, tmp_path)
        assert known in found | refused and not {"peer:lorafusion", "peer:vllm"} <= set(found | refused)
    (tmp_path / "mine.py").write_text("x = 1")
    assert "wanted a function lora_linear(x, weight, A, B, scale, dropout_p)" in peer_modules.load("lora_linear", tmp_path)[1]["peer:mine"]
    assert "bench_peer_mine" not in sys.modules and "bench_peer_lorafusion" in sys.modules


def test_a_check_is_made_once_for_equal_small_points(tmp_path, monkeypatch):
    peer(tmp_path)
    monkeypatch.setattr(peer_modules, "FOLDER", tmp_path)
    asked = []
    monkeypatch.setattr(single_peers, "wrong", lambda tiny, module, device: asked.append(tiny))
    peers = single_peers.Peers(session.Session(CPU, tmp_path / "out").recorder("single"), CPU)
    points = [Point("train", "a", 8192, 4096, 14336, 16, p) for p in (0.1, 0.0)] + [Point("lorafusion", "b", 2048, 5120, 5120, 16, 0.1)]
    for point in points:
        steps, notes = peers.steps(point, point.empty_operands(torch.device("meta")))
        assert set(steps) == set(notes) == {"peer:lorafusion"}
    assert [(tiny.M, tiny.K, tiny.N, tiny.p) for tiny in asked] == [(192, 1024, 1024, 0.1), (192, 1024, 1024, 0.0)]
    assert peers.steps(Point("decode", "a", 1, 64, 64), None) == ({}, {})


class FakeStreams:
    """torch.cuda's streams, and a capture that when it fails leaves its stream the current one and draws no number, as torch's does."""

    def __init__(self, monkeypatch):
        self.current, self.drawn = "default", True
        stream = type("Stream", (), {"wait_stream": lambda self, other: None, "device": CPU})
        self.default, self.capture = stream(), stream()
        self.current = self.default
        fake = self

        class Graph:
            def __init__(self, graph):
                pass

            def __enter__(self):
                fake.current, fake.drawn = fake.capture, False

            def __exit__(self, kind, *rest):
                if kind is not None:
                    raise RuntimeError("capture was invalidated")
                fake.current, fake.drawn = fake.default, True

        class Use:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, fake.current = fake.current, self.stream

            def __exit__(self, *rest):
                fake.current = self.before

        for name, value in dict(
            Stream=stream, current_stream=lambda: self.current, stream=Use, graph=Graph, set_stream=lambda s: setattr(self, "current", s),
            CUDAGraph=lambda: type("Captured", (), {"replay": lambda self: None})(),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    fake, calls = FakeStreams(monkeypatch), []

    def fails():
        calls.append(fake.current)
        if fake.current is fake.capture:
            raise RuntimeError("it waits for the device")

    clock = type("Clock", (), {"settle": lambda self: None})()
    graphs, failed = single.captured({"waits": timing.Step(fails)}, clock)
    assert not graphs and fake.drawn, "random numbers are drawn again, and graphs replayed"
    graphs, failed = single.captured({"waits": timing.Step(fails), "works": timing.Step(lambda: 7)}, clock)
    assert set(graphs) == {"works"} and failed["waits"].startswith("capture: RuntimeError") and graphs["works"].forward() == 7
    assert len(calls) == 8 and fake.current is fake.default


def as_on_a_gpu(monkeypatch, small: list[Point], many: list) -> None:
    """Sections take a GPU's path, with tensors on the CPU, no kernels, and clocks and captures that are the host's."""

    def clock_for(device, launch="queued"):
        clock = timing.HostClock()
        clock.launch = launch
        return clock

    for kind in (Point, multi_workloads.MultiPoint):
        monkeypatch.setattr(kind, "operands", lambda point, device, make=kind.operands: make(point, CPU))
    for module in (single, multi):
        monkeypatch.setattr(module, "clock_for", clock_for)
    monkeypatch.setattr(single, "graphed", lambda step: step)
    monkeypatch.setattr(variants, "kernels_run", lambda device: None)
    monkeypatch.setattr(workloads, "gpu_single", lambda quick: small)
    monkeypatch.setattr(multi_workloads, "decode", lambda device, quick: many)
    monkeypatch.setattr(multi, "Checker", lambda device: multi_check.Checker(CPU))
    monkeypatch.setattr(multi_baselines, "_why_not_grouped", lambda point, device: None)


def test_the_path_of_a_gpu_times_every_kind_of_launch(tmp_path, monkeypatch):
    as_on_a_gpu(monkeypatch, workloads.cpu_single(quick=True), multi_workloads.decode(CPU, True)[:2])
    gpu = session.Session(torch.device("cuda"), tmp_path, quick=True, conditions=conditions.conditions(CPU))
    assert single.run(gpu) == 0 and multi.decode(gpu) == 0
    rows = [row for row in conditions.read_rows(tmp_path / "single.jsonl") if row["ms"]]
    assert {(row["grid"], row["launch"]) for row in rows} == {("train", "queued"), ("decode", "eager"), ("decode", "graph")}
    rows = conditions.read_rows(tmp_path / "decode.jsonl")
    graph, eager = ({row["arm"] for row in rows if row["ms"] and row["launch"] == launch} for launch in ("graph", "eager"))
    assert eager - graph == {"torch", "auto"} and "linear" in graph


def test_an_arm_of_merge_that_fails_is_reported(tmp_path, monkeypatch):
    steps = merge_section.steps

    def broken(point, device):
        def fails():
            raise RuntimeError("out of something")

        return steps(point, device) | {"write": timing.Step(fails)}

    monkeypatch.setattr(merge_section, "steps", broken)
    assert merge_section.run(session.Session(CPU, tmp_path, quick=True)) == 1
    rows = conditions.read_rows(tmp_path / "merge.jsonl")
    assert "- write, host: RuntimeError: out of something (1 point)" in report.render("merge", rows, False)
    assert "| write |" not in report.render("merge", rows, True)


@pytest.mark.parametrize("name", ["memory", "merge"])
def test_points_left_out_of_other_sections_are_rows(name, tmp_path):
    from bench import device

    device.SECTIONS[name](session.Session(CPU, tmp_path, seconds=1e-9, quick=True))
    rows = conditions.read_rows(tmp_path / f"{name}.jsonl")
    wanted = len(merge_section.points(True) if name == "merge" else workloads.memory(CPU, True)) - 1
    assert sum(row["what"] == "left out" for row in rows) == wanted
    assert "no time" not in report.render(name, rows, True) and "None" not in report.render(name, rows, False)

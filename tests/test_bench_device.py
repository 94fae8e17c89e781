"""The sections of `bench.device`: their order, their seconds, their processes, and what was told of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed with the package
    sys.path.insert(0, str(ROOT))

from bench import check, device, session  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")  # interpreted kernels would be timed too


@pytest.fixture
def parity(monkeypatch):
    """The check turns out as ``parity["ok"]`` says."""
    outcome = {"ok": True}
    monkeypatch.setattr(check, "run", lambda session, quick=None: outcome["ok"])
    return outcome


def bench(*args: str, out: Path) -> int:
    return device.main([*args, "--quick", "--device", "cpu", "--out", str(out)])


def test_a_section_may_have_its_own_seconds(tmp_path, parity, monkeypatch):
    given = {}
    for name in ("roof", "single", "memory", "decode"):
        monkeypatch.setitem(device.SECTIONS, name, lambda session, name=name: given.update({name: session.seconds}) or 0)
    assert bench("single=30", "memory", "roof=7.5", "decode=1", "--seconds", "9", out=tmp_path) == 0
    assert given == {"roof": 7.5, "single": 30.0, "memory": 9.0, "decode": 1.0}
    assert list(given) == ["roof", "single", "memory", "decode"], "the roof first, on which the others' fractions rest"
    everything = device.parse(["all=50", "tune=90", "--out", "results"]).wanted
    assert set(everything) == {*device.SECTIONS} - {*device.NOT_IN_ALL} and everything["tune"] == 90 and everything["mtune"] == 50


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("single=often", "single: wanted a number of seconds, got 'often'"),
        ("single=0", "wanted a positive number, got 0"),
        ("often=3", "section: wanted check, roof,"),
    ],
)
def test_seconds_that_are_none_are_refused(wrong, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench(wrong, out=tmp_path)
    assert message in capsys.readouterr().err


def test_sections_after_one_that_ended_its_process_go_on(tmp_path, monkeypatch, capsys):
    """On a GPU, where an access out of bounds or a kernel that waits for ever ends it."""
    begun = []

    def process(command, cwd):
        sections = [word for word in command[3:] if "=" in word]
        told = Path(command[command.index("--tell") + 1])
        begun.append((sections, command[command.index("--out") : command.index("--tell")]))
        for section in sections:
            name = section.split("=")[0]
            if name in broken:
                return -11
            told.write_text(told.read_text() + ("red\n" if name in red else f"{name}\n"))
            if name in red:
                return 1
        return 0

    monkeypatch.setattr(device.subprocess, "call", process)
    monkeypatch.chdir(tmp_path)
    named = ["decode=5", "roof=3", "check=40", "single=20", "--device", "cuda", "--out", "results", "--quick"]
    broken, red = {"roof", "single"}, set()
    assert device.main(named) == 1
    assert [sections for sections, _ in begun] == [["check=40.0", "roof=3.0", "decode=5.0", "single=20.0"], ["decode=5.0", "single=20.0"]]
    assert {tuple(options) for _, options in begun} == {("--out", str(tmp_path / "results"), "--device", "cuda", "--quick")}
    said = capsys.readouterr().err
    assert "roof ended its process (status -11); what is after it: decode, single" in said
    assert "single ended its process (status -11); what is after it: nothing" in said
    begun.clear()
    broken = {"check"}
    assert device.main(named) == 1 and len(begun) == 1, "a check that ended its process is no better than a red one"
    begun.clear()
    broken, red = set(), {"check"}
    assert device.main(named) == 1 and len(begun) == 1, "a red check ends it"
    broken, red = set(), set()
    assert device.main(named) == 0


def test_a_process_tells_how_far_it_came(tmp_path, parity):
    told = tmp_path / "told"
    assert bench("roof", "memory", "--tell", str(told), out=tmp_path) == 0
    assert told.read_text().split() == ["roof", "memory"]
    told.unlink()
    parity["ok"] = False
    assert bench("check", "memory", "--tell", str(told), out=tmp_path) == 1
    assert told.read_text().split() == ["red"]


def test_a_short_section_measures_its_points_shortly():
    assert session.share(420.0, 100, most=1.0) == 1.0
    assert session.share(100.0, 100, most=1.0) == 0.5
    assert session.share(10.0, 100, most=1.0) == session.LEAST_SHARE


def test_a_section_that_is_ended_takes_its_compilers_with_it():
    """Whoever reads its output, by a pipe, waits for all that hold it."""
    code = "import os; from bench import precompile; precompile.processes = lambda: 1; "
    code += "precompile._pool().submit(os.getpid).result(); os._exit(7)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 7, done.stderr

"""What every section of `bench.device` is given: the device, where rows go, and how much time there is."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .conditions import Recorder, conditions

LEAST_SHARE = 0.2


@dataclass
class Session:
    """``compile``: time torch.compile of the formula too; ``variants``: time every way to run the kernels."""

    device: torch.device
    out: Path
    seconds: float = 420.0
    quick: bool = False
    compile: bool = False
    variants: bool = False
    conditions: dict = field(default_factory=dict)

    def __post_init__(self):
        self.conditions = self.conditions or conditions(self.device)

    def path(self, section: str) -> Path:
        return self.out / f"{section}.jsonl"

    def recorder(self, section: str) -> Recorder:
        return Recorder(self.path(section), section, self.conditions)


class Budget:
    """Walks points while there is time for one more, counted from here, and keeps those it left out."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._begin = time.perf_counter()
        self.left_out: list = []

    def walk(self, points: Iterable) -> Iterator:
        points = list(points)
        recent: list[float] = []
        for i, point in enumerate(points):
            start = time.perf_counter()
            if i and start - self._begin + max(recent[-5:]) > self.seconds:
                self.left_out = points[i:]
                names = "; ".join(map(str, self.left_out[:8])) + ("; ..." if len(self.left_out) > 8 else "")
                say(f"left out, past {self.seconds:g} s: {len(self.left_out)} of {len(points)} points: {names}")
                return
            yield point
            recent.append(time.perf_counter() - start)

    def record(self, recorder: Recorder) -> None:
        """A row for each point left out."""
        for point in self.left_out:
            recorder.add(**point.fields(), what="left out", detail=f"no time for it in {self.seconds:g} s")


def share(seconds: float, measurements: int, most: float) -> float:
    """Seconds for each of so many measurements in a section of ``seconds``, half of which goes into what stands around them."""
    return min(most, max(LEAST_SHARE, seconds / 2 / max(measurements, 1)))


def lacks(recorder: Recorder, section: str, needs: tuple[str, ...]) -> bool:
    """Whether a package that a section needs is not there, with a row that says so."""
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        recorder.add(what="left out", detail=f"wanted {', '.join(missing)}")
        say(f"{section}: left out, without {', '.join(missing)}")
    return bool(missing)


def say(text: str) -> None:
    """Progress goes to stderr, tables to stdout."""
    print(text, file=sys.stderr, flush=True)

"""Timing: variants interleaved round by round, medians with the 20th and 80th percentile.

On a GPU: device events, the L2 cache emptied before each timed pass, and how the launches reach the device stated:
  "queued"  the device is kept busy until the host has launched everything, so that only device time counts;
  "eager"   the device is idle when the call begins, so that launch gaps count;
  "graph"   a replay of a captured CUDA graph.
On a CPU ("host"): the wall clock, caches as the interleaving leaves them.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SLEEP_CLOCK = 2e9  # cycles a second of torch.cuda._sleep: above today's clocks, so that the wait is rather too long
MOST_LEAD = 0.02


@dataclass(frozen=True)
class Step:
    """One call to time: ``forward()`` gives what ``backward`` takes; no backward means forward alone."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None

    def run(self) -> Any:
        """Forward, and backward where there is one."""
        state = self.forward()
        return state if self.backward is None else self.backward(state)


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        return cls(quantile(samples, 0.2), quantile(samples, 0.5), quantile(samples, 0.8), len(samples))

    def ms(self) -> dict[str, float]:
        return {"p20": round(self.p20, 6), "p50": round(self.p50, 6), "p80": round(self.p80, 6)}


def quantile(samples: list[float], q: float) -> float:
    """The q-quantile, linear between the two nearest samples."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class HostClock:
    """The wall clock."""

    launch = "host"

    def warm(self, step: Step) -> float:
        self.measure(step)
        return 0.0

    def measure(self, step: Step, lead: float = 0.0) -> dict[str, float]:
        start = time.perf_counter()
        state = step.forward()
        middle = time.perf_counter()
        if step.backward is None:
            return {"forward": 1e3 * (middle - start)}
        step.backward(state)
        end = time.perf_counter()
        return {"forward": 1e3 * (middle - start), "backward": 1e3 * (end - middle), "both": 1e3 * (end - start)}

    def settle(self) -> None:
        pass


class DeviceClock:
    """Device events around each pass; ``launch``: "queued", "eager" or "graph" (which is queued too, see `graphed`)."""

    def __init__(self, device: torch.device, launch: str = "queued"):
        self.device, self.launch = device, launch
        self._queued = launch != "eager"
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._buffer = torch.empty(max(256 << 20, 4 * cache) // 4, dtype=torch.float32, device=device).normal_()

    def warm(self, step: Step) -> float:
        """The first call compiles; the second tells how long the host takes: the seconds `measure` is to let it run ahead."""
        self.measure(step)
        start = time.perf_counter()
        state = step.forward()
        self._flush()
        if step.backward is not None:
            step.backward(state)
        lead = min(1.5 * (time.perf_counter() - start) + 1e-4, MOST_LEAD)
        self.settle()
        return lead if self._queued else 0.0

    def measure(self, step: Step, lead: float = 0.0) -> dict[str, float]:
        if lead:
            torch.cuda._sleep(int(lead * SLEEP_CLOCK))
        forward, state = self._timed(step.forward)
        backward = None if step.backward is None else self._timed(step.backward, state)[0]
        self.settle()
        times = {"forward": forward[0].elapsed_time(forward[1])}
        if backward is not None:
            times["backward"] = backward[0].elapsed_time(backward[1])
            times["both"] = times["forward"] + times["backward"]
        return times

    def _timed(self, function, *args):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush()
        if not self._queued:
            self.settle()
        start.record()
        result = function(*args)
        end.record()
        return (start, end), result

    def _flush(self) -> None:
        # Reading leaves clean lines in the cache; after a fill the timed pass would pay for writing the dirty ones back.
        self._buffer.sum()

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_for(device: torch.device, launch: str = "queued") -> HostClock | DeviceClock:
    return DeviceClock(device, launch) if device.type == "cuda" else HostClock()


def interleave(steps: dict[str, Step], clock, *, seconds: float, least: int = 5, most: int = 50):
    """Times each step once a round, in an order drawn anew each round, for about ``seconds``, ``least`` to ``most`` rounds.

    Returns:
        ``{name: {"forward": Times, "backward": Times, "both": Times}}`` and ``{name: error}`` for those that raised.
    """
    errors: dict[str, str] = {}
    leads: dict[str, float] = {}
    for name, step in steps.items():
        try:
            leads[name] = clock.warm(step)
        except Exception as error:  # one arm's failure is a row of its own; after a broken context settle() raises
            errors[name] = message(error)
            clock.settle()
    names = list(leads)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    order, rounds, wanted = random.Random(0), 0, 1
    collecting = gc.isenabled()
    gc.disable()
    try:
        while names and rounds < wanted:
            start = time.perf_counter()
            for name in order.sample(names, len(names)):
                for what, ms in clock.measure(steps[name], leads[name]).items():
                    samples[name].setdefault(what, []).append(ms)
            rounds += 1
            if rounds == 1:
                wanted = max(least, min(most, int(seconds / (time.perf_counter() - start))))
    finally:
        if collecting:
            gc.enable()
    return {name: {what: Times.of(ms) for what, ms in samples[name].items()} for name in names}, errors


def message(error: Exception) -> str:
    """What a row keeps of an error."""
    return f"{type(error).__name__}: {error}"[:2000]


def graphed(step: Step) -> Step:
    """A step whose forward replays a CUDA graph of ``step.forward``, which keeps its own output alive."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            step.forward()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = step.forward()
    except Exception:
        # Where a capture fails, torch leaves its stream the current one, and before 2.12 its generator in capture: until another has come
        # to its end no number can be drawn on the device, and no graph replayed.
        torch.cuda.set_stream(current)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=current.device)
        raise

    def replay():
        graph.replay()
        return output

    return Step(replay)


def host_us(function: Callable[[], Any], settle: Callable[[], None], *, seconds: float, burst: int = 20) -> Times:
    """Host time of a call in microseconds, the device drained every ``burst`` calls so that its queue never fills."""
    for _ in range(10):
        function()
    settle()
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        while time.perf_counter() < stop or len(samples) < burst:
            for _ in range(burst):
                start = time.perf_counter()
                function()
                samples.append(1e6 * (time.perf_counter() - start))
            settle()
    finally:
        if collecting:
            gc.enable()
    return Times.of(samples)

"""Sections ``tune`` and, with many adapters, ``mtune``: each kernel's configurations timed alone, and the joined best as whole passes
against the heuristic's and the chain.

Successive halving, told apart by ``round``: "first" is a short pass over all candidates, "last" a longer one over the fastest few and
the heuristic's own. A candidate is timed only after its result was within the error budget of `lora_kernels.parity`. What a call takes
follows from these rows by `bench.rows`. On a CPU without Triton's interpreter there is nothing to tune: the chain alone is timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_kernels import parity
from lora_kernels.tuning import Arch, Config, heuristic

from . import kernel_calls, multi_workloads, precompile, roof, variants, workloads
from .baselines import inference, ours, training
from .candidates import OVERLAPS, candidates, overlapped, short
from .conditions import Recorder
from .kernel_calls import Call, Inputs, KernelJob
from .roof import Roof
from .session import Budget, Session, say
from .table import ratio, rounded, text_table
from .timing import Step, Times, clock_for, interleave, message
from .workloads import Operands, Point

KEPT = 5  # candidates of the last round, beside the heuristic's own
HEURISTIC = "heuristic"
REPEATS = 5  # of passes whose launches overlap, before they are timed


@dataclass
class Tuning:
    """What timing a candidate needs; ``until``: the time after which no further kernel is compiled."""

    session: Session
    recorder: Recorder
    clock: object
    ceilings: Roof | None
    arch: Arch | None
    until: float


def run(session: Session) -> int:
    return section(session, "tune", workloads.tune(session.device.type == "cuda", session.quick))


def many(session: Session) -> int:
    return section(session, "mtune", multi_workloads.tune(session.device.type == "cuda", session.quick))


def section(session: Session, name: str, points: Sequence[Point]) -> int:
    """Writes a row for each candidate and round and each whole pass; returns the number of those that failed or were wrong."""
    cuda = session.device.type == "cuda"
    arch = variants.kernels_run(session.device)
    recorder, budget, until = session.recorder(name), Budget(session.seconds), time.perf_counter() + session.seconds
    if arch is None:
        say(f"{name}: no kernel runs on {session.device}, so there is nothing to tune; the chain alone is timed")
    elif cuda:
        precompile.run(jobs(points, arch), arch, session.seconds / 3)
    tuning = Tuning(session, recorder, clock_for(session.device), roof.load(session), arch, until)
    for point in budget.walk(points):
        tune_point(tuning, point)
    budget.record(recorder)
    failed = [row for row in recorder.rows if row["error"]]
    for line in dict.fromkeys(f"FAILED {row['kernel']} {row['what']} {row['name']}: {row['error'][:300]}" for row in failed):
        print(line)
    print(summary(recorder.rows), flush=True)
    return len(failed)


def jobs(points: Sequence[Point], arch: Arch) -> list[KernelJob]:
    """Every candidate's launches, for `precompile`."""
    found = []
    for point in points:
        o = precompile.standing(point)
        for call in kernel_calls.calls(point):
            found += [KernelJob(point, call, config) for config in candidates(call.kernel, call.problem(o), arch)]
    return found


def tune_point(tuning: Tuning, point: Point) -> None:
    """Every kernel of the point one after the other, then both passes as they would be called."""
    o = point.operands(tuning.session.device)
    passes = ("forward",) if point.forward_alone else ("forward", "backward")
    if tuning.arch is None:
        time_passes(tuning, point, o, {}, {})
        return
    own = {what: heuristic(p, tuning.arch) for what, p in zip(passes, variants.problems(o), strict=False)}
    best = dict(own)
    given = kernel_calls.inputs(point, o)
    for call in kernel_calls.calls(point):
        best[call.what] = tune_call(tuning, call, given, best[call.what])
    time_passes(tuning, point, o, own, best)


def tune_call(tuning: Tuning, call: Call, i: Inputs, base: Config) -> Config:
    """``base`` with the fastest part for one kernel, and that only where it beats the heuristic's beyond the spread."""
    assert tuning.arch is not None
    found = candidates(call.kernel, call.problem(i.o), tuning.arch)
    configs = {short(call.kernel, _part(call, c)): replace(base, **{call.kernel: getattr(c, call.kernel)}) for c in found}
    own = next(iter(configs))
    right = checked(tuning, call, i, configs)
    quick = tuning.session.quick
    first = time_configs(tuning, call, i, right, own, "first", seconds=0.0, least=1 if quick else 3)
    fastest = sorted(first, key=lambda name: first[name].p50)[:KEPT]
    kept = {name: config for name, config in right.items() if name in fastest or name == own}
    last = time_configs(tuning, call, i, kept, own, "last", seconds=0.0 if quick else 0.3, least=1 if quick else 10)
    winner = min(last, key=lambda name: last[name].p50, default=own)
    return configs[winner] if own not in last or last[winner].p80 < last[own].p20 else base


def checked(tuning: Tuning, call: Call, i: Inputs, configs: dict[str, Config]) -> dict[str, Config]:
    """Those whose result is within the error budget; a row with an error for each of the others."""
    rows = kernel_calls.sampled_rows(call, i.point, i.o.x.device)
    truth = kernel_calls.expected(call, i, torch.float64, rows)
    same = kernel_calls.expected(call, i, i.o.x.dtype, rows)
    right = {}
    for done, (name, config) in enumerate(configs.items()):
        if time.perf_counter() > tuning.until:
            say(f"tune {i.point} {call.kernel} {call.what}: no time for {len(configs) - done} of {len(configs)} candidates")
            break
        used, error = None, None
        try:
            used = budget_used(call, i, config, rows, same, truth)
            error = None if used <= 1.0 else f"its result uses {used:.3g} of the error budget"
        except Exception as failure:  # one candidate's failure is a row; after a broken context settle() raises
            error = message(failure)
            tuning.clock.settle()
        if error is None:
            right[name] = config
            continue
        tuning.recorder.add(
            **i.point.fields(), what=call.what, kernel=call.kernel, arm="triton", name=name, config=_part(call, config), ok=False,
            ratio=used, error=error,
        )  # fmt: skip
    return right


def budget_used(call: Call, i: Inputs, config: Config, rows, same: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The worst result's error over what is allowed; infinite where an element was not written."""
    with parity.poisoned_empty():
        results = kernel_calls.launched(call, i, config)
    if not all(bool(t.isfinite().all()) for t in results):
        return float("inf")
    terms = i.point.M + i.point.K + i.point.N
    compared = kernel_calls.comparable(call, results, i, rows)
    return max(parity.budget_used(ours_, s, t, i.o.x.dtype, terms) for ours_, s, t in zip(compared, same, truth, strict=True))


def time_configs(
    tuning: Tuning, call: Call, i: Inputs, configs: dict[str, Config], own: str, round_: str, *, seconds: float, least: int
) -> dict[str, Times]:
    """Times by name, the candidates interleaved; a row for each."""
    steps = {name: Step(lambda config=config: kernel_calls.launched(call, i, config)) for name, config in configs.items()}
    times, errors = interleave(steps, tuning.clock, seconds=seconds, least=least)
    fields = dict(i.point.fields(), what=call.what, kernel=call.kernel, arm="triton", launch=tuning.clock.launch, round=round_)
    for name, error in errors.items():
        tuning.recorder.add(**fields, name=name, config=_part(call, configs[name]), error=error)
    alone = {name: passes["forward"] for name, passes in times.items()}
    for name, t in alone.items():
        tuning.recorder.add(
            **fields, name=HEURISTIC if name == own else name, config=_part(call, configs[name]), ms=t.ms(), rounds=t.rounds,
            roof_fraction=rounded(tuning.ceilings.least_ms(*call.work(i.point)) / t.p50) if tuning.ceilings else None,
            over_heuristic=rounded(t.p50 / alone[own].p50) if own in alone else None,
        )  # fmt: skip
    return alone


def time_passes(tuning: Tuning, point: Point, o: Operands, own: dict[str, Config], best: dict[str, Config]) -> None:
    """The chain, the heuristic's kernels and the joined best ones as whole passes, interleaved."""
    make = inference if point.forward_alone else training
    steps = {"torch": make(ours("torch"), o)}
    configs = {HEURISTIC: own} if own else {}
    configs |= {"tuned": best} if best != own else {}
    configs |= overlapping(tuning, point, o, best) if own and not point.forward_alone else {}
    for name, by_pass in configs.items():
        forward = by_pass["forward"]
        steps[name] = inference(ours("triton", forward), o) if point.forward_alone else variants.step(o, forward, by_pass["backward"])
    least = 1 if tuning.session.quick else 10
    times, errors = interleave(steps, tuning.clock, seconds=0.0 if tuning.session.quick else 0.5, least=least)
    fields = dict(point.fields(), kernel="pass", launch=tuning.clock.launch, round="last")
    for name, error in errors.items():
        tuning.recorder.add(**fields, arm="torch" if name == "torch" else "triton", name=name, error=error)
    for name, passes in times.items():
        for what, t in passes.items():
            config = configs.get(name, {}).get(what)
            tuning.recorder.add(
                **fields, what=what, arm="torch" if name == "torch" else "triton", name=name, ms=t.ms(), rounds=t.rounds,
                config=None if config is None else dataclasses.asdict(config),
                roof_fraction=rounded(tuning.ceilings.floor_ms(point, what) / t.p50) if tuning.ceilings else None,
                over_heuristic=rounded(t.p50 / times[HEURISTIC][what].p50) if HEURISTIC in times else None,
            )  # fmt: skip


def overlapping(tuning: Tuning, point: Point, o: Operands, best: dict[str, Config]) -> dict[str, dict[str, Config]]:
    """The best configurations with dA and dB beside dX, where they give, bit for bit, what they give one after the other."""
    found = {}
    for how in OVERLAPS:
        pair = {what: overlapped(best[what], how, p, tuning.arch)[0] for what, p in zip(best, variants.problems(o), strict=True)}
        forward, backward = pair["forward"], pair["backward"]
        if forward is None or backward is None:
            continue
        name, error = f"overlapped by {how}", None
        try:
            wanted = gradients_of(o, forward, replace(backward, wgrad=replace(backward.wgrad, beside="")))
            for _ in range(REPEATS):
                same = [torch.equal(a, b) for a, b in zip(gradients_of(o, forward, backward), wanted, strict=True)]
                error = error or (None if all(same) else "its gradients differ from those of the same configuration without overlap")
        except Exception as failure:
            error = message(failure)
            tuning.clock.settle()
        if error is None:
            found[name] = {"forward": forward, "backward": backward}
        else:
            tuning.recorder.add(**point.fields(), what="backward", kernel="pass", arm="triton", name=name, ok=False, error=error)
    return found


def gradients_of(o: Operands, forward: Config, backward: Config) -> list[torch.Tensor]:
    """dX, dA and dB, of one seed."""
    torch.manual_seed(0)
    step = variants.step(o, forward, backward)
    return [t for t in step.backward(step.forward()) if t is not None and t.numel()]


def _part(call: Call, config: Config) -> dict:
    return dataclasses.asdict(getattr(config, call.kernel))


def summary(rows: list[dict]) -> str:
    """For each point and kernel the heuristic's time, the best's, their ratio and the best configuration; whole passes likewise."""
    lines = []
    for (point, kernel, what), mine in finals(rows).items():
        own, best = mine.get(HEURISTIC), min(mine.values(), key=lambda row: row["ms"]["p50"])
        words = best["name"] if kernel == "pass" else short(kernel, best["config"])
        cells = [own["ms"]["p50"], best["ms"]["p50"], ratio(own["ms"]["p50"] / best["ms"]["p50"])] if own else ["", best["ms"]["p50"], ""]
        lines.append([f"{point} {kernel} {what}", *cells, words])
    return text_table(["tune", "heuristic ms", "best ms", "ratio", "best"], lines)


def finals(rows: list[dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Rows of the last round by (point, kernel, pass), then by name."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        if row["round"] == "last" and row["ms"]:
            point = f"{row['grid']} {row['M']}x{row['K']}->{row['N']} r={row['r']} p={row['p']:g}"
            point += f" {row['adapters']} of {row['loaded']}" if row["loaded"] else ""
            found.setdefault((point, row["kernel"], row["what"]), {})[row["name"]] = row
    return found

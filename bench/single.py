"""Section ``single``: one adapter's forward, backward and both, every arm interleaved, as times and as multiples of the frozen linear."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import precompile, roof, variants, workloads
from .baselines import FORMULAS, compiled, inference, training
from .conditions import Recorder
from .report_tables import reasons
from .session import Budget, Session, say, share
from .single_peers import Peers
from .table import geomean, ratio, rounded, significant, text_table
from .timing import Step, clock_for, graphed, interleave, message
from .workloads import Operands, Point


@dataclass
class Arms:
    """What is timed at a point: steps, for kernels their configurations by pass, and for peers how they were checked."""

    steps: dict[str, Step]
    configs: dict[str, dict] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def run(session: Session) -> int:
    """Writes a row for each point, arm and pass; returns the number of arms that failed."""
    cuda = session.device.type == "cuda"
    ceilings = roof.load(session)
    recorder = session.recorder("single")
    points = workloads.gpu_single(session.quick) if cuda else workloads.cpu_single(session.quick)
    launches = {"decode": ("eager", "graph")} if cuda else {}
    clocks = {launch: clock_for(session.device, launch) for launch in (("queued", "eager", "graph") if cuda else ("host",))}
    ways = {point: launches.get(point.grid, ("queued" if cuda else "host",)) for point in points}
    seconds = 0.1 if session.quick else share(session.seconds, sum(map(len, ways.values())), most=1.0)
    said: set[str] = set()
    budget = Budget(session.seconds)
    arch = variants.kernels_run(session.device)
    if cuda and arch is not None:
        precompile.run(precompile.of_points(points, arch, session.variants), arch, session.seconds / 3)
    peers = Peers(recorder, session.device)
    for point in budget.walk(points):
        o = point.operands(session.device)
        timed = arms(session, point, o, peers, said)
        for launch in ways[point]:
            _measure(recorder, session, point, o, timed, clocks[launch], ceilings, seconds)
        say(f"single {point}: {medians(recorder.rows, point)}")
    budget.record(recorder)
    failed = [row for row in recorder.rows if row["error"]]
    for line in failures(failed):
        print(line)
    print(summary(recorder.rows), flush=True)
    for line in reasons([row for row in recorder.rows if row["what"] == "left out" and row["arm"]]):
        print(f"left out: {line}", flush=True)
    return len(failed)


def arms(session: Session, point: Point, o: Operands, peers: Peers, said: set[str]) -> Arms:
    """The arms to time at a point."""
    make = inference if point.forward_alone else training
    formulas = dict(FORMULAS) | ({"torch.compile": compiled()} if session.compile else {})
    steps = {name: make(formula, o) for name, formula in formulas.items()}
    configs: dict[str, dict] = {}
    arch = variants.kernels_run(session.device)
    if arch is not None:
        kernels, configs, refused = variants.kernel_arms(point, o, arch, session.variants)
        steps |= kernels
        for name, sentence in refused.items():
            if f"{name}{sentence}" not in said:
                said.add(f"{name}{sentence}")
                say(f"single leaves out {name} at {point}: {sentence}")
    theirs, notes = peers.steps(point, o)
    return Arms(steps | theirs, configs, notes)


def _measure(recorder: Recorder, session: Session, point: Point, o: Operands, arms: Arms, clock, ceilings, seconds: float) -> None:
    steps, failed = arms.steps, {}
    if clock.launch == "graph":
        steps, failed = captured(steps, clock)
    times, errors = interleave(steps, clock, seconds=seconds, least=3 if session.quick else 10)
    for name, error in (failed | errors).items():
        recorder.add(**point.fields(), arm=name, launch=clock.launch, error=error)
    floor, peft = times.get("linear", {}), times.get("peft", {})
    for name, passes in times.items():
        for what, t in passes.items():
            took, config = variants.taken_by_auto(o, what) if name == "auto" else (name.split(":")[0], arms.configs.get(name, {}).get(what))
            recorder.add(
                **point.fields(), what=what, arm=name, took=took, launch=clock.launch, config=config, ms=t.ms(), rounds=t.rounds,
                roof_fraction=rounded(ceilings.floor_ms(point, what) / t.p50) if ceilings else None,
                over_linear=rounded(t.p50 / floor[what].p50) if what in floor else None,
                speedup_over_peft=rounded(peft[what].p50 / t.p50) if what in peft else None, detail=arms.notes.get(name),
            )  # fmt: skip


def captured(steps: dict[str, Step], clock) -> tuple[dict[str, Step], dict[str, str]]:
    """Each step as a CUDA graph; one that cannot be captured is an error of its own."""
    graphs: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name, step in steps.items():
        try:
            graphs[name] = graphed(step)
        except Exception as error:
            failed[name] = f"capture: {message(error)}"
            clock.settle()
    return graphs, failed


def failures(rows: list[dict]) -> list[str]:
    """One line for each arm and error, with the first point that met it."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["error"].split("\n")[0]), []).append(row)
    lines = []
    for (arm, error), mine in groups.items():
        first = mine[0]
        shape = f"{first['grid']} {first['M']}x{first['K']}->{first['N']} r={first['r']} p={first['p']:g} {first['launch']}"
        lines.append(f"FAILED {arm}, {len(mine)} times, first at {shape}: {error[:300]}")
    return lines


def medians(rows: list[dict], point: Point) -> str:
    """The point's medians, forward plus backward where there is both."""
    fields = point.fields()
    mine = [row for row in rows if row["ms"] and all(row[k] == v for k, v in fields.items())]
    last = "both" if any(row["what"] == "both" for row in mine) else mine[0]["what"] if mine else ""
    return ", ".join(f"{row['arm']} {significant(row['ms']['p50'])}" for row in mine if row["what"] == last)


def summary(rows: list[dict]) -> str:
    """Times over the frozen linear's, geometric means over layers and ranks: one line for each grid, token count, dropout and pass.

    Many variants share one column, which names the fastest.
    """
    rows = [row for row in rows if row["over_linear"] is not None]
    arms = [name for name in dict.fromkeys(row["arm"] for row in rows) if name != "linear"]
    variants_timed = [name for name in arms if name.startswith("triton:")]
    names = arms if len(variants_timed) <= 5 else [name for name in arms if name not in variants_timed]
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = (row["grid"], row["launch"], row["M"], row["p"], row["what"])
        groups.setdefault(key, {}).setdefault(row["arm"], []).append(row)
    lines = []
    for (grid, launch, M, p, what), by_arm in groups.items():
        points = len(by_arm["linear"])
        over = {name: geomean([row["over_linear"] for row in mine]) for name, mine in by_arm.items()}
        line = [f"{grid} {launch} M={M} p={p:g} {what}", points, geomean([row["ms"]["p50"] for row in by_arm["linear"]])]
        line += [ratio(over[name]) if name in over else "" for name in names]
        if names != arms:
            everywhere = [name for name in variants_timed if len(by_arm.get(name, [])) == points]
            best = min(everywhere, key=lambda name: over[name], default=None)
            line.append(f"{ratio(over[best])} {best.removeprefix('triton:')}" if best else "")
        lines.append(line)
    title = "single: time / frozen linear"
    return text_table([title, "points", "linear ms", *names, *(["fastest variant"] if names != arms else [])], lines)

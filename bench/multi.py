"""Sections ``multi``, ``decode``, ``mtrain``: many adapters in a batch, arms interleaved, as times and as multiples of the base alone.

multi    prefill, forward alone; and what making the plan costs
decode   one token a sequence, forward alone, as replays of a CUDA graph and eager
mtrain   forward and backward
"""

from __future__ import annotations

from collections.abc import Callable

from lora_kernels.tuning import Arch

from . import multi_baselines, multi_peers, multi_tables, multi_variants, multi_workloads, plan_cost, precompile, roof, variants
from .baselines import inference, ours, training
from .conditions import Recorder
from .multi_check import Arm, Checker
from .multi_workloads import MultiOperands, MultiPoint
from .session import Budget, Session, say, share
from .single import captured, failures, medians
from .table import rounded
from .timing import Step, clock_for, interleave
from .workloads import Operands


def prefill(session: Session) -> int:
    points = [*plan_cost.points(session.device, session.quick), *multi_workloads.prefill(session.device, session.quick)]
    return Section(session, "multi", ("queued",), 0.8).run(points)


def decode(session: Session) -> int:
    return Section(session, "decode", ("graph", "eager"), 0.4).run(multi_workloads.decode(session.device, session.quick))


def train(session: Session) -> int:
    return Section(session, "mtrain", ("queued",), 1.0).run(multi_workloads.train(session.device, session.quick))


class Section:
    """``launches``: how they reach a GPU; ``seconds``: of measuring a point, for each, or less in a short section.

    A section of other points overrides what knows its arms: `_begin`, `_arms`, `_tiny`, `_described`, `_launches`, `_time`, `_summary`.
    """

    floor = "linear"  # the arm whose time the others' are multiples of, which is not checked

    def __init__(self, session: Session, name: str, launches: tuple[str, ...], seconds: float):
        self.session, self.name, self.device = session, name, session.device
        self.launches = launches if self.device.type == "cuda" else ("host",)
        self.seconds = seconds
        self.ceilings = roof.load(session)
        self.recorder: Recorder = session.recorder(name)
        self.checker = Checker(self.device)
        self.arch = variants.kernels_run(self.device)
        self.peers: dict[str, Arm] = {}
        self.packing: set[str] = set()  # peers that serve packed layers
        self._clocks: dict = {}

    def run(self, points: list[MultiPoint]) -> int:
        """Writes a row for each point, arm and pass, and for what is left out, why; returns the number of arms that failed."""
        budget = Budget(self.session.seconds)
        measurements = sum(len(self._launches(point)) for point in points)
        self.seconds = 0.1 if self.session.quick else share(self.session.seconds, measurements, most=self.seconds)
        self._begin(points)
        for point in budget.walk(points):
            (self._plan if point.grid == plan_cost.GRID else self._point)(point)
            say(f"{self.name} {point}: {medians(self.recorder.rows, point)}")
        budget.record(self.recorder)
        failed = [row for row in self.recorder.rows if row["error"]]
        for line in failures(failed):
            print(line)
        print(self._summary(), flush=True)
        return len(failed)

    def _begin(self, points: list[MultiPoint]) -> None:
        if any(point.forward_alone for point in points):
            self._load_peers()
        timed = [point for point in points if point.grid != plan_cost.GRID]
        self._compile(lambda arch: multi_variants.jobs(timed, arch, self.device))

    def _compile(self, jobs: Callable[[Arch], list]) -> None:
        """Ahead, on a GPU that runs kernels."""
        if self.device.type == "cuda" and self.arch is not None:
            precompile.run(jobs(self.arch), self.arch, self.session.seconds / 3)

    def _summary(self) -> str:
        return multi_tables.summary(self.name, self.recorder.rows)

    def _load_peers(self) -> None:
        modules, refused = multi_peers.load()
        self.peers = {arm: Arm(multi_peers.formula(module, self.name == "decode")) for arm, module in modules.items()}
        self.packing = {arm for arm, module in modules.items() if multi_peers.packs(module)}
        for arm, reason in refused.items():
            self.recorder.add(what="left out", arm=arm, detail=reason)

    def _point(self, point: MultiPoint) -> None:
        o = point.operands(self.device)
        arms, refused = self._arms(point, o)
        tiny = self._tiny(point, o)
        alone = (self.floor, multi_baselines.EACH_BASE)
        wrong = {name: self.checker.wrong(tiny, name, arm) for name, arm in arms.items() if name not in alone}
        for name, reason in refused.items():
            self.recorder.add(**point.fields(), what="left out", arm=name, detail=reason)
        for name, error in wrong.items():
            if error:
                self.recorder.add(**point.fields(), arm=name, launch="check", error=f"check: {error}")
        arms = {name: arm for name, arm in arms.items() if not wrong.get(name)}
        self._time(point, arms, {name: arm.of(o) for name, arm in arms.items()})

    def _tiny(self, point: MultiPoint, o: MultiOperands) -> MultiPoint:
        """What the arms are checked at before they are timed."""
        return multi_workloads.small(point, o.adapters.segments)

    def _launches(self, point: MultiPoint) -> tuple[str, ...]:
        return self.launches

    def _described(self, name: str, arm: Arm, o: Operands, what: str) -> dict:
        """Which kernels an arm took for a pass, for its row."""
        if name in ("auto", "one-adapter"):
            took, config = variants.taken_by_auto(o, what)
            return {"took": took, "config": config}
        return {"took": name.split(":")[0], "config": multi_variants.asdict(arm.config)}

    def _time(self, point: MultiPoint, arms: dict[str, Arm], operands: dict[str, Operands]) -> None:
        make = inference if point.forward_alone else training
        steps = {name: make(arm.formula, operands[name]) for name, arm in arms.items()}

        def described(name: str, what: str) -> dict:
            return self._described(name, arms[name], operands[name], what)

        for launch in self._launches(point):
            mine = dict(steps)
            for name in steps if launch == "graph" else ():
                reason = multi_baselines.why_not_captured(name, described(name, "forward")["took"])
                if reason:
                    self.recorder.add(**point.fields(), what="left out", arm=name, launch=launch, detail=reason)
                    del mine[name]
            self._measure(point, mine, launch, described)

    def _arms(self, point: MultiPoint, o: MultiOperands) -> tuple[dict[str, Arm], dict[str, str]]:
        """The arms that can serve a point; and for those that cannot, why."""
        arms: dict[str, Arm] = {}
        refused: dict[str, str] = {}
        for name, make in multi_baselines.FORMULAS.items():
            reason = multi_baselines.why_not(name, point, self.device)
            if reason is None:
                arms[name] = Arm(make())
            else:
                refused[name] = reason
        if self.arch is not None:
            configs, reasons = multi_variants.configs(point, o, self.arch)
            arms |= {name: Arm(ours("triton", config), config) for name, config in configs.items()}
            refused |= reasons
        if point.widths:
            arms |= {name: Arm(make()) for name, make in multi_baselines.PACKED.items()}
            arms |= {name: arm for name, arm in self.peers.items() if name in self.packing}
        elif point.forward_alone:
            arms |= self.peers
        else:
            arms["one-adapter"] = Arm(ours("auto"), of=multi_baselines.one_adapter)
        return arms, refused

    def _plan(self, point: MultiPoint) -> None:
        steps = plan_cost.steps(point, self.device)
        for name in [name for name in steps if name != "linear"]:
            error = plan_cost.wrong(point, steps[name].forward())
            if error:
                del steps[name]
                self.recorder.add(**point.fields(), arm=name, launch="check", error=f"check: {error}")
        for launch in ("graph", "eager") if self.device.type == "cuda" else self.launches:
            self._measure(point, steps, launch, lambda name, what: {}, seconds=self.seconds / 2)

    def _measure(
        self, point: MultiPoint, steps: dict[str, Step], launch: str, described: Callable[[str, str], dict], seconds: float | None = None
    ) -> None:
        clock = self._clock(launch)
        failed: dict[str, str] = {}
        if launch == "graph":
            steps, failed = captured(steps, clock)
        times, errors = interleave(steps, clock, seconds=seconds or self.seconds, least=3 if self.session.quick else 10)
        for name, error in (failed | errors).items():
            self.recorder.add(**point.fields(), arm=name, launch=launch, error=error)
        floor, plan = times.get(self.floor, {}), point.grid == plan_cost.GRID
        for name, passes in times.items():
            for what, t in passes.items():
                least = self.ceilings.floor_ms(point, what) if self.ceilings and not plan else None
                self.recorder.add(
                    **point.fields(), what="plan" if plan else what, arm=name, launch=launch, **described(name, what),
                    ms=t.ms(), rounds=t.rounds, roof_fraction=rounded(least / t.p50) if least else None,
                    over_linear=rounded(t.p50 / floor[what].p50) if what in floor else None,
                )  # fmt: skip

    def _clock(self, launch: str):
        if launch not in self._clocks:
            self._clocks[launch] = clock_for(self.device, launch)
        return self._clocks[launch]

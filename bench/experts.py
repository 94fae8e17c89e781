"""Section ``experts``: the experts of a mixture, arms interleaved, as times and as multiples of the frozen experts alone, and their memory.

train    forward and backward; and bytes saved for backward, on a GPU with the most that both passes add
decode   forward alone, as replays of a CUDA graph and eager
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from lora_kernels.tuning import Arch

from . import expert_baselines, expert_tables, expert_workloads
from .expert_baselines import BESIDE, FLOOR, OURS
from .expert_workloads import ExpertOperands, ExpertPoint
from .memory import peak_bytes, saved_by
from .multi import Section
from .multi_check import Arm
from .multi_variants import asdict, resolved
from .precompile import PointJob, standing
from .session import Session
from .timing import message
from .workloads import Operands


def run(session: Session) -> int:
    """Writes a row for each point, arm and pass, and of memory; returns the number of arms that failed."""
    launches = ("queued", "graph", "eager")
    return Experts(session, "experts", launches, 0.4).run(expert_workloads.points(session.device, session.quick))


class Experts(Section):
    floor = FLOOR

    def _begin(self, points: list[ExpertPoint]) -> None:
        self._compile(lambda arch: jobs(points, arch))

    def _arms(self, point: ExpertPoint, o: ExpertOperands) -> tuple[dict[str, Arm], dict[str, str]]:
        return expert_baselines.arms(point, self.device, "torch" if self.arch is None else "triton")

    def _tiny(self, point: ExpertPoint, o: ExpertOperands) -> ExpertPoint:
        return expert_workloads.small(point, o.adapters.segments.gather_block)

    def _launches(self, point: ExpertPoint) -> tuple[str, ...]:
        if self.device.type != "cuda":
            return self.launches
        return tuple(launch for launch in self.launches if (launch == "queued") != point.forward_alone)

    def _described(self, name: str, arm: Arm, o: ExpertOperands, what: str) -> dict:
        """The kernels' own configurations, by pass."""
        if name not in (OURS, BESIDE):
            return {"took": "library"}
        if self.arch is None:
            return {"took": "torch"}
        forward, backward = resolved(_kernels(name, o), self.arch)
        config = {"forward": forward, "backward": backward}.get(what)
        return {"took": "triton", "config": asdict(config)}

    def _time(self, point: ExpertPoint, arms: dict[str, Arm], operands: dict[str, ExpertOperands]) -> None:
        super()._time(point, arms, operands)
        for name, arm in arms.items() if not point.forward_alone else ():
            self._memory(point, name, arm, operands[name])

    def _memory(self, point: ExpertPoint, name: str, arm: Arm, o: ExpertOperands) -> None:
        besides = (o.x, o.weight, o.lora_A, o.lora_B, o.ends, *o.adapters.segments.tensors())
        try:
            saved, peak = saved_by(lambda: arm.formula(o), besides), peak_bytes(arm.formula, o)
        except Exception as error:  # a row of its own, as an error while it is timed is
            self.recorder.add(**point.fields(), what="memory", arm=name, launch="memory", error=message(error))
        else:
            self.recorder.add(**point.fields(), what="memory", arm=name, saved_bytes=saved, peak_bytes=peak)

    def _summary(self) -> str:
        return expert_tables.summary(self.recorder.rows)


def _kernels(name: str, o: ExpertOperands) -> Operands:
    """What the arm's kernels are given of the operands that its formula takes."""
    return expert_workloads.beside_base(o) if name == BESIDE else o


def jobs(points: list[ExpertPoint], arch: Arch) -> list[PointJob]:
    """The passes of the arms with kernels of ours, at the points and at their small versions, which are checked, each once."""
    found: dict[PointJob, None] = {}
    for timed in dict.fromkeys(replace(point, layer="", routing="uniform") for point in points):
        o = standing(timed)
        tiny = expert_workloads.small(timed, o.adapters.segments.gather_block)
        for point, of in product((timed, tiny), (None, expert_workloads.beside_base)):
            own = standing(point)
            forward, backward = resolved(own if of is None else of(own), arch)
            found.setdefault(PointJob(point, forward, False, of))
            if not point.forward_alone:
                found.setdefault(PointJob(point, backward, True, of))
    return list(found)

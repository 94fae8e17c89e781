"""The kernels' arms with many adapters: the heuristic's configuration with u given and with u awaited; where its products are masked a
narrower tile, of which two fit a multiprocessor, and selected products; where it gathers v for each token, one adapter after the other,
and the gathering in a program of its own, beside W's; and what they compile.
"""

from __future__ import annotations

import dataclasses

import torch

from lora_kernels import dispatch
from lora_kernels.tuning import Arch, Config, heuristic, resolve, why_not

from . import variants
from .candidates import OVERLAPS, overlapped
from .multi_baselines import one_adapter_point
from .multi_workloads import MultiPoint, small
from .precompile import PointJob, standing
from .workloads import Operands, Point

SOURCES: dict[str, dict] = {"given": {"u": "given"}, "given+pdl": {"u": "given", "pdl": True}, "awaited": {"u": "awaited"}}
NARROW = {"u": "given", "block_n": 128, "num_stages": 3}
EACH: dict[str, dict] = {"one after the other": {"u": "given", "each": False, "num_warps": 4}, "each beside": {"u": "given", "split": 2}}
MASKED: dict[str, dict] = {"narrow": NARROW, "selected": NARROW | {"masked": False}}


def configs(point: MultiPoint, o: Operands, arch: Arch) -> tuple[dict[str, Config], dict[str, str]]:
    """Configurations by arm, each valid for every pass of the point; and for those that are not, why."""
    forward, backward = variants.problems(o)
    base = heuristic(forward, arch)
    tried: dict[str, tuple[Config | None, str | None]] = {}
    more = MASKED if base.expand.masked else EACH if base.expand.each and base.expand.split == 1 else {}
    for name, changes in (SOURCES | more).items():
        # A split of K, and v gathered for each token, want u given.
        whole = {"split": 1, "each": False} if changes["u"] != "given" else {}
        tried[name] = variants.fitted(base, {"base": "kernel"} | changes | whole, forward, arch)
    for how in () if point.forward_alone else OVERLAPS:
        tried[f"overlapped by {how}"] = overlapped(base, how, forward, arch)
    found: dict[str, Config] = {}
    refused: dict[str, str] = {}
    for name, (config, reason) in tried.items():
        if config is not None and not point.forward_alone:
            reason = why_not(config, backward, arch)
        if reason is None:
            found[f"triton:{name}"] = config
        else:
            refused[f"triton:{name}"] = reason
    return found, refused


def jobs(points: list[MultiPoint], arch: Arch, device: torch.device) -> list[PointJob]:
    """Every pass of every kernel arm, at the points and at their small versions, which are checked, each once."""
    found: dict[PointJob, None] = {}
    for point in dict.fromkeys(map(_compiled_as, points)):
        o = standing(point)
        tiny = small(point, o.adapters.segments)
        chosen = [(config, config) for config in configs(point, o, arch)[0].values()]
        passes = [(point, pair) for pair in (resolved(o, arch), *chosen)]
        passes += [(tiny, pair) for pair in (resolved(standing(tiny), arch), *chosen)]
        if not point.forward_alone:
            passes += [pair for each in (point, tiny) for pair in _one_adapter(each, arch, device)]
        for each, (forward, backward) in passes:
            if forward is not None:
                found.setdefault(PointJob(each, forward, False))
            if backward is not None and not point.forward_alone:
                found.setdefault(PointJob(each, backward, True))
    return list(found)


def _compiled_as(point: MultiPoint) -> MultiPoint:
    """One point for all that compile the same kernels: which tokens take which adapters is data."""
    return dataclasses.replace(point, grid="" if point.forward_alone else "train", layer="", popularity="none", spread=0, order="")


def resolved(o: Operands, arch: Arch) -> tuple[Config, Config]:
    forward, backward = variants.problems(o)
    return resolve(forward, arch)[0], resolve(backward, arch)[0]


def _one_adapter(point: MultiPoint, arch: Arch, device: torch.device) -> list[tuple[Point, tuple[Config | None, Config | None]]]:
    """The passes that impl="auto" gives to the kernels where the same tokens take one adapter."""
    single = one_adapter_point(point)
    chosen = tuple(dispatch.choose(p, device, "auto").config for p in variants.problems(standing(single)))
    return [(single, chosen)] if any(chosen) else []


def asdict(config: Config | None) -> dict | None:
    return None if config is None else dataclasses.asdict(config)

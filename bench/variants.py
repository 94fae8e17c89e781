"""The kernels' arms: the configuration that a call takes and its variants, each valid for the point by `tuning.why_not`.

One variant equals that choice; it is timed all the same, since the difference between equal arms is the noise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from lora_kernels import dispatch, ops, philox, problem
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, Config, resolve, why_not

from .baselines import inference, ours, training
from .candidates import OVERLAPS, overlapped
from .timing import Step
from .workloads import Operands, Point

Choice = tuple[Config, "Config | None"]
SOURCES = ("given", "loop", "awaited")
# What is tried, one after the other, where a variant is not valid with the choice's own tiles.
_NARROWER: tuple[dict[str, int], ...] = (
    {},
    {"num_stages": 2},
    {"num_stages": 1},
    {"block_n": 128, "num_stages": 2},
    {"block_m": 32},
    {"block_n": 64, "num_stages": 1},
)


def problems(o: Operands) -> tuple[Problem, Problem]:
    """The forward and the backward problem."""
    forward = problem.describe(o.x, o.weight, o.lora_A, o.lora_B, dropout=bool(o.p), adapters=o.adapters)
    return forward, forward.backward()


def kernels_run(device: torch.device) -> Arch | None:
    """The architecture the kernels run on here, or None; triton is imported only where they could."""
    return dispatch.arch_of(device)[0] if device.type == "cuda" or dispatch.interpreting() else None


def taken_by_auto(o: Operands, what: str) -> tuple[str, dict | None]:
    """The arm and the configuration that impl="auto" takes for a pass; both passes joined by "+"."""
    choices = [dispatch.choose(p, o.x.device, "auto") for p in problems(o)]
    if what == "both":
        return "+".join(choice.arm for choice in choices), None
    choice = choices[0 if what == "forward" else 1]
    return choice.arm, None if choice.config is None else dataclasses.asdict(choice.config)


def choices(point: Point, o: Operands, arch: Arch, every: bool) -> tuple[dict[str, Choice], dict[str, str]]:
    """Configurations by arm: (forward, backward), the latter None where there is no backward pass or none is valid; and why not."""
    forward, backward = problems(o)
    base = resolve(forward, arch)[0], resolve(backward, arch)[0]
    decode = point.forward_alone
    chosen: dict[str, Choice] = {"triton": (base[0], None if decode else base[1])}
    refused: dict[str, str] = {}
    for variant, changes in variants(every, decode):
        name = f"triton:{variant}"
        f, reason = fitted(base[0], changes, forward, arch)
        if f is None:
            refused[name] = f"forward: {reason}"
            continue
        b, reason = (None, None) if decode else fitted(base[1], changes, backward, arch)
        if reason:
            refused[name] = f"backward: {reason}"
        chosen[name] = f, b
    for how in () if decode else OVERLAPS:
        name = f"triton:overlapped by {how}"
        f, reason = overlapped(base[0], how, forward, arch)
        b, other = overlapped(base[1], how, backward, arch)
        if f is None or b is None:
            refused[name] = f"forward: {reason}" if reason else f"backward: {other}"
        else:
            chosen[name] = f, b
    return chosen, refused


def kernel_arms(point: Point, o: Operands, arch: Arch, every: bool) -> tuple[dict[str, Step], dict[str, dict], dict[str, str]]:
    """Steps, configurations by pass, and for the variants left out the sentence that says why."""
    chosen, refused = choices(point, o, arch, every)
    decode = point.forward_alone
    steps, configs = {}, {}
    for name, (f, b) in chosen.items():
        if name == "triton":
            steps[name] = (inference if decode else training)(ours("triton"), o)
        else:
            steps[name] = inference(ours("triton", f), o) if decode else step(o, f, b)
        configs[name] = {"forward": dataclasses.asdict(f)} | ({"backward": dataclasses.asdict(b)} if b else {})
    return steps, configs, refused


def variants(every: bool, decode: bool) -> Iterator[tuple[str, dict]]:
    """Changes to the expand part of a configuration, by name."""
    if not every:
        yield from ((u, {"u": u, "base": "kernel"}) for u in SOURCES)
        if not decode:
            yield "given+persistent", {"u": "given", "base": "kernel", "persistent": True}
        return
    for u in ("loop", "awaited"):
        # The other way past the hazard of a dropped operand, where the plain variant gives up its pipeline.
        yield f"{u}+32rows", {"u": u, "base": "kernel", "block_m": 32, "block_n": 128}
    for u, pdl in (*((u, {}) for u in SOURCES), ("given", {"pdl": True})):
        for tma, persistent in itertools.product((False, True), repeat=2):
            flags = {"tma": tma, "persistent": persistent, **pdl}
            yield "+".join([u, *(flag for flag, on in flags.items() if on)]), {"u": u, "base": "kernel", **flags}
    yield "library", {"u": "given", "base": "library", "tma": False, "persistent": False}


def fitted(config: Config, changes: dict, p: Problem, arch: Arch) -> tuple[Config | None, str | None]:
    """``config`` with ``changes`` to expand, narrowed if need be until it is valid; or None and why it is not as it stands."""
    sentence = None
    for narrower in _NARROWER:
        smaller = {k: min(v, getattr(config.expand, k)) for k, v in narrower.items()}
        candidate = dataclasses.replace(config, expand=dataclasses.replace(config.expand, **(smaller | changes)))
        reason = why_not(candidate, p, arch)
        if reason is None:
            return candidate, None
        sentence = sentence or reason
    return None, sentence


def step(o: Operands, f: Config, b: Config | None) -> Step:
    """Forward and backward with a configuration each, which one call of lora_linear does not take."""
    x, A, B = o.x.detach(), o.lora_A.detach(), o.lora_B.detach()

    def forward():
        seed = philox.draw_seed(x.device) if o.p else None
        _, u = ops.forward(x, o.weight, A, B, None, seed, o.adapters, o.scale, o.p, True, "triton", f.key())
        return u, seed

    if b is None:
        return Step(forward)

    def backward(state):
        u, seed = state
        needs = (True, True, True, False)
        return ops.backward(o.dy, x, o.weight, A, B, u, seed, o.adapters, o.scale, o.p, needs, A.dtype, "triton", b.key())

    return Step(forward, backward)

"""Compile exactly what would be launched, for any architecture, on a machine without a GPU, and read what the compiler made of it.

A stub driver names the target, and `launch` runs as it always does, except that each launch becomes a compilation of the
same kernel with the same arguments. Registers and spills come from the assembler and disassembler that Triton's wheel carries.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launch, launch_columns, launch_experts, launch_gate, launch_plan
from .compile_problems import every_problem
from .problem import Problem
from .segments import ONE, Adapters, Segments
from .tuning import Arch, Config, heuristic

_MATMUL = (("tcgen05.mma", "tcgen05"), ("wgmma.mma_async", "wgmma"), ("mma.sync", "mma"), ("v_mfma", "mfma"), ("v_wmma", "wmma"))

ELEMENTWISE = ("scale_columns", "gate_product", "gate_gradients", "weighted_rows")  # kernels without a product
_ACTIVE = "_active" if hasattr(driver, "_active") else "active"  # where .active is a property, it looks for a GPU


@dataclass(frozen=True)
class Report:
    """One compiled kernel: what it is, what it needs, and which matmul instruction it uses ("": none, "fma": none wanted).

    spills: reloads of spilled values inside a loop, where they cost; on AMD all spilled registers.
    serialized: each wgmma waits for the one before, though it was written to run beside the program. hazards: wgmma in loops that take an
    operand from registers, which ptxas before 13.3 may overwrite too early (triton #9433).
    """

    kernel: str
    label: str
    arch: str
    dtype: str
    registers: int
    spills: int
    shared: int
    shared_limit: int
    matmul: str
    tma: bool
    warps: int
    serialized: bool
    hazards: int = 0

    @property
    def good(self) -> bool:
        """No spills, no hazards, no serialized wgmma, fits the chip, and 16 bits use a matmul instruction (an empty kernel has none)."""
        matmul = bool(self.matmul or self.dtype not in ("float16", "bfloat16"))
        return matmul and self.spills == self.hazards == 0 and not self.serialized and self.shared <= self.shared_limit

    def as_dict(self) -> dict:
        return asdict(self) | {"good": self.good}


class _StubDriver:
    """As much of a Triton driver as a compilation asks for; each architecture is a device of its own, so caches do not mix."""

    def __init__(self, arch: Arch):
        major, minor = arch.capability
        self.target = GPUTarget("hip", arch.name, 64) if arch.kind == "hip" else GPUTarget("cuda", 10 * major + minor, 32)
        self.device = 1000 * (arch.kind == "hip") + 10 * major + minor

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def get_device_capability(self, device=None):
        return divmod(self.device, 10)


@contextlib.contextmanager
def target(arch: Arch) -> Iterator[None]:
    """Inside, Triton compiles for ``arch``, whatever this machine has."""
    before = getattr(driver, _ACTIVE)
    driver.set_active(_StubDriver(arch))
    try:
        yield
    finally:
        setattr(driver, _ACTIVE, before)


def compile_calls(run, arch: Arch, label: str, only: str = "") -> list[Report]:
    """Run ``run()``, which calls `launch`, with every launch, or those of one kernel, compiled for ``arch`` instead; a report for each."""
    if launch.interpreted():
        raise RuntimeError("compile_only: wanted a process without TRITON_INTERPRET=1, for interpreted kernels cannot be compiled")
    reports: list[Report] = []

    def compile_launch(kernel, grid, args, options):
        if only not in ("", kernel.__name__):
            return
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        dtype = "float32" if options.get("EXACT") else str(_first_tensor(args).dtype).removeprefix("torch.")
        reports.append(_report(kernel.__name__, compiled, label, arch, options, dtype))

    with target(arch), launch.intercept(compile_launch):
        run()
    return reports


def compile_pass(
    problem: Problem, arch: Arch, config: Config, label: str = "", backward: bool = False, onto: bool = False
) -> list[Report]:  # fmt: skip
    """Compile all kernels of one pass; for the backward pass the problem is dX's, as `Problem.backward` gives it.

    Beside a base product that is given, or a stack of weights, or where dX is added to that of other layers (``onto``), expand or `experts`
    alone: the others are what they are beside a weight.
    """
    M, R, dtype, adapter = min(problem.M, 512), problem.R, problem.dtype, problem.lora_dtype
    N, K = (problem.K, problem.N) if backward else (problem.N, problem.K)
    x, dy = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
    widths = (N // 2, N // 4, N - N // 2 - N // 4) if problem.packed else ()
    A, B = torch.empty(R, K, dtype=adapter), torch.empty(N, R // (len(widths) or 1), dtype=adapter)
    adapters = ONE._replace(widths=widths)
    weight = bias = base = None
    if problem.base:
        base = dy
    else:
        each = (problem.adapters,) if problem.experts else ()
        weight, bias = torch.empty(N, K, dtype=dtype).expand(*each, N, K), torch.empty(N, dtype=dtype).expand(*each, N)
    if problem.adapters:
        E, ids = problem.adapters, torch.zeros(M, dtype=torch.int32)
        plan = Segments.from_ids(ids, E, row_block=problem.row_block, gather_block=problem.gather_block)
        adapters = Adapters(plan, torch.empty(E), torch.empty(E, dtype=torch.int32) if problem.mixed_ranks else None, widths)
        A, B = A.expand(E, *A.shape), B.expand(E, *B.shape)
    seed, p = (torch.zeros((), dtype=torch.int64), 0.1) if problem.dropout else (None, 0.0)

    arm: Any = launch_experts if problem.experts else launch

    def run():
        if backward:
            u = torch.empty(M, R, dtype=dtype)
            added: dict[str, Any] = dict(onto=torch.empty_like(x)) if onto else {}
            arm.backward(dy, x, weight, A, B, u, seed, adapters, 1.0, p, (True, True, True), adapter, config, **added)
        else:
            arm.forward(x, weight, A, B, bias, seed, adapters, 1.0, p, True, config, base)

    return compile_calls(run, arch, label, "experts" if problem.experts else "expand" if problem.base or onto else "")


def heuristic_reports(arch: Arch, progress: Callable[[int, int, str], None]) -> list[Report]:
    """Every kernel of every heuristic configuration worth telling apart, compiled for ``arch``; the same kernel once."""
    calls: list[tuple[str, Callable[[], list[Report]]]] = []
    for label, problem, backward, onto in every_problem():
        calls.append((label, functools.partial(compile_pass, problem, arch, heuristic(problem, arch), label, backward, onto)))
    for R in (16, 96):
        calls.append((f"merge r={R}", functools.partial(compile_merge, R, arch)))
    for sizes in ((512, 16, 16), (512, 128, 32), (65536, 128, 128)):
        calls.append((f"plan {sizes[0]}", functools.partial(compile_plan, *sizes, arch)))
    for dtype in (torch.bfloat16, torch.float32):
        calls.append(("DoRA's magnitude", functools.partial(compile_columns, dtype, arch)))
        calls.append(("sums of experts", functools.partial(compile_sums, dtype, arch)))
        calls += [(f"gate {act}", functools.partial(compile_gate, act, dtype, arch)) for act in launch_gate.ACTIVATIONS]
    reports: dict[tuple, Report] = {}
    for done, (label, call) in enumerate(calls):
        progress(done, len(calls), f"{arch.name} {label}")
        for report in call():
            reports.setdefault(tuple(v for k, v in report.as_dict().items() if k != "label"), report)
    progress(len(calls), len(calls), arch.name)
    return list(reports.values())


def compile_merge(R: int, arch: Arch) -> list[Report]:
    """Compile the merge of a bfloat16 adapter of rank R into a weight."""
    weight, A, B = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((256, 256), (R, 256), (256, R)))
    return compile_calls(lambda: launch.merge(weight, weight, A, B, 2.0), arch, f"merge r={R}")


def compile_plan(tokens: int, row_block: int, gather_block: int, arch: Arch) -> list[Report]:
    """Compile the plan of a batch with these blocks, from int64 ids."""
    ids = torch.zeros(tokens, dtype=torch.int64)
    return compile_calls(lambda: launch_plan.plan(ids, 64, row_block, gather_block), arch, f"plan {tokens} {row_block} {gather_block}")


def compile_columns(dtype: torch.dtype, arch: Arch) -> list[Report]:
    """Compile the backward pass of DoRA's magnitude."""
    dy, g = torch.empty(512, 4096, dtype=dtype), torch.empty(4096)
    return compile_calls(lambda: launch_columns.backward(dy, dy, g, True), arch, "DoRA's magnitude")


def compile_gate(act: str, dtype: torch.dtype, arch: Arch) -> list[Report]:
    """Compile what stands before a gated MLP's down projection, both passes."""
    t = torch.empty(512, 4096, dtype=dtype)
    return compile_calls(lambda: (launch_gate.product(act, t, t), launch_gate.gradients(act, t, t, t)), arch, f"gate {act}")


def compile_sums(dtype: torch.dtype, arch: Arch, top_k: int = 8) -> list[Report]:
    """Compile the same for a mixture, gate and up side by side, and the sum over a token's experts."""
    both, weights = torch.empty(64 * top_k, 2 * 768, dtype=dtype), torch.empty(64, top_k)
    gate, up = both.chunk(2, -1)

    def run():
        da = launch_gate.product("silu", gate, up, weights)
        launch_gate.gradients("silu", gate, up, da, weights, (gate, up))
        launch_gate.weighted_sum(both, weights, dtype)

    return compile_calls(run, arch, f"{top_k} experts a token")


def _first_tensor(args) -> torch.Tensor:
    for arg in args:
        for item in arg if isinstance(arg, tuple) else (arg,):
            item = getattr(item, "base", item)
            if isinstance(item, torch.Tensor):
                return item
    raise ValueError("args: wanted at least one tensor, got none")


def _report(name, compiled, label: str, arch: Arch, options: dict, dtype: str) -> Report:
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    matmul = next((short for pattern, short in _MATMUL if pattern in text), "")
    if name in ELEMENTWISE or (options.get("EACH") and options["LOAD_W"] is None):
        matmul = "fma"
    registers, spills, *wgmma = _amd_resources(text) if arch.kind == "hip" else _nvidia_resources(compiled, text)
    tma = "cp.async.bulk.tensor" in text
    what = " ".join(
        filter(None, (name, options.get("U"), "segments" if options.get("SEGMENTS") else "", "split" if options.get("SPLIT") else ""))
    )
    shared, warps = compiled.metadata.shared, options["num_warps"]
    return Report(what, label, arch.name, dtype, registers, spills, shared, arch.shared_memory, matmul, tma, warps, *wgmma)


def _amd_resources(text: str) -> tuple[int, int, bool]:
    vgprs = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    return int(vgprs.group(1)) if vgprs else 0, int(spills.group(1)) if spills else 0, False


@functools.lru_cache(1024)  # passes have kernels in common
def _nvidia_resources(compiled, ptx: str) -> tuple[int, int, bool, int]:
    """Registers a thread, how many instructions in loops reload a spilled value from local memory, and `Report`'s two of wgmma."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("--dump-resource-usage", file.name))
        if not used:
            raise RuntimeError("cuobjdump: wanted a line with REG and STACK, got none")
        # Half a second to disassemble, for what spills (to its stack) or has wgmma.
        sass = _cuobjdump("--dump-sass", file.name) if used[2] != "0" or "wgmma" in ptx else ""
    reloads, hazards = in_loops(sass, r"\bLDL\b", r"HGMMA\S* R\w+, R")
    return int(used[1]), reloads, serialized(ptx, sass), hazards


def serialized(ptx: str, sass: str) -> bool:
    """Whether the assembler, which then says C7510 to C7519, made every wgmma the last of its group; Triton keeps none of what it says.

    Groups of one instruction do not tell.
    """
    grouped = ptx.count("wgmma.mma_async") > ptx.count("wgmma.commit_group")
    return grouped and all("gsb0" in instruction for instruction in re.findall(r"HGMMA[^;]*;", sass))


def in_loops(sass: str, *patterns: str) -> list[int]:
    """How many instructions that each pattern means may run again: those that a path leads back to.

    What lies between a branch backwards and its target does not tell, for the assembler moves the waits of a loop behind all else.
    """
    code = re.findall(r"/\*([0-9a-f]+)\*/ +([^;/]+);", sass)
    place = {int(address, 16): i for i, (address, _) in enumerate(code)}
    following: list[list[int]] = []
    for i, (_, text) in enumerate(code):
        to = re.search(r"\b(?:BRA|BSSY|CALL)\b.*?0x([0-9a-f]+)", text)
        ends = re.match(r"BRA 0x|EXIT|RET", text)  # without a condition; a call comes back
        following.append(([] if ends or i + 1 == len(code) else [i + 1]) + ([place[int(to[1], 16)]] if to else []))
    return [sum(_again(i, following) for i, (_, text) in enumerate(code) if re.search(pattern, text)) for pattern in patterns]


def _again(start: int, following: list[list[int]]) -> bool:
    """Whether a path leads from ``start`` back to it."""
    seen: set[int] = set()
    ahead = list(following[start])
    while ahead:
        at = ahead.pop()
        if at not in seen:
            seen.add(at)
            ahead += following[at]
    return start in seen


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, flag, path], capture_output=True, text=True, check=True).stdout

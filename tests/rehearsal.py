"""A GPU's session without one: ``python tests/rehearsal.py SECTION[:FLAG,...] ... --out DIR [--seconds S] [--ahead]``

Runs sections of `bench.device` on a pretended GPU, so that no line which only a GPU reaches is run there for the first time: torch.cuda
is a pretender with an H100's properties, the device "cuda" the CPU, and Triton compiles for sm_90 but launches nothing. Nothing is
right then: results are memory as it was, times are of the host, and whatever compares results finds them wrong. Sections that look
at no value run at full size on tensors without storage; the others on small layers. A file of tests is a section, too: those marked
cuda run, without storage, to the first assertion that looks at a value. Exit status: 1 if a section raised.

``--ahead``: compile for an H100 what the sections compile ahead on one, and what launches it, into the folder that TRITON_CACHE_DIR names,
and go no further where they launch by values. Triton finds all of it on a machine where that folder has the same path, and Triton and
Python the same versions; a first run there is spared minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["TRITON_INTERPRET"] = "0"

import pytest  # noqa: E402
import torch  # noqa: E402
from machine import cuda_stub  # noqa: E402
from torch._subclasses import fake_impls  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from lora_kernels import ops  # noqa: E402

NAME = "no GPU: a rehearsal"
UNSEEN = ("roof", "single", "memory", "host", "merge", "shared", "compiles")  # sections that look at no tensor's values
SMALLER = 32  # by so much are the layers of the others narrower
CPU = torch.device("cpu")


class Event:
    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, stream=None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max(1e3 * (other.seconds - self.seconds), 1e-3)

    def synchronize(self) -> None:
        pass


class Stream:
    made = 0

    def __init__(self, *args, **kwargs):
        Stream.made += 1
        self.stream_id = self.cuda_stream = Stream.made
        self.device = torch.device("cuda", 0)

    def wait_stream(self, stream) -> None:
        pass

    wait_event = wait_stream

    def synchronize(self) -> None:
        pass

    def record_event(self, event=None) -> Event:
        event = event or Event()
        event.record()
        return event


class Graph:
    def replay(self) -> None:
        pass

    reset = replay


def pretend() -> None:
    """Put a device that does nothing in the place of torch.cuda."""
    current, capturing = [Stream()], []

    @contextlib.contextmanager
    def among(stack: list, one):
        stack.append(one)
        try:
            yield
        finally:
            stack.pop()

    properties = SimpleNamespace(
        name=NAME, L2_cache_size=50 << 20, multi_processor_count=132, major=9, minor=0, shared_memory_per_block_optin=232448,
        shared_memory_per_block=49152, total_memory=80 << 30, warp_size=32, gcnArchName="",
    )  # fmt: skip
    says = dict(
        is_available=True, device_count=1, current_device=0, get_device_capability=(9, 0), get_device_name=NAME,
        get_device_properties=properties, synchronize=None, set_stream=None, _sleep=None, memory_allocated=100, max_memory_allocated=1000,
        reset_peak_memory_stats=None, empty_cache=None, mem_get_info=(70 << 30, 80 << 30), _lazy_init=None, default_stream=current[0],
    )  # fmt: skip
    for name, value in says.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph = Event, Stream, Graph
    torch.cuda.current_stream = lambda *args: current[-1]
    torch.cuda.is_current_stream_capturing = lambda: bool(capturing)
    torch.cuda.stream = lambda stream: among(current, stream)
    torch.cuda.graph = lambda graph, **kwargs: among(capturing, graph)
    torch.Tensor.pin_memory = torch.Tensor.clone  # type: ignore[method-assign]
    real = torch.Generator
    torch.Generator = type("Generator", (), {"__new__": lambda cls, device=None: real("cpu")})


class OnTheCPU(TorchFunctionMode):
    """Inside, whoever asks torch for the device "cuda" gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        named = {name: _here(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return function(*map(_here, args), **named)


def _here(value):
    wanted = value.type if isinstance(value, torch.device) else value
    return CPU if isinstance(wanted, str) and wanted.startswith("cuda") else value


def without_storage() -> contextlib.ExitStack:
    """Inside, tensors are fake; what is asked for a value says 1."""
    scalar = torch.ops.aten._local_scalar_dense.default
    fake_impls.op_implementations_dict[scalar] = lambda mode, function, t: t.dtype == torch.bool or (1.0 if t.is_floating_point() else 1)
    torch.Tensor.tolist = lambda self: torch.zeros(tuple(self.shape)).numpy().tolist()  # type: ignore[method-assign]
    # Else the operators' fakes would answer, and no kernel be launched.
    ops.watched = lambda: False
    ops.plain = lambda *tensors: True
    stack = contextlib.ExitStack()
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    return stack


def narrow() -> None:
    """Make every workload small."""
    from bench import expert_workloads, model, modules, multi_check, multi_workloads, plan_cost, timing, workloads

    def smaller(point):
        sizes = dict(K=max(32, point.K // SMALLER // 8 * 8), N=max(32, point.N // SMALLER // 8 * 8))
        if getattr(point, "widths", ()):
            widths = tuple(max(16, width // SMALLER) for width in point.widths)
            sizes |= dict(widths=widths, N=sum(widths))
        if point.M > 2048 and not (point.grid == "train" and hasattr(point, "loaded")):
            sizes["M"] = 2048
        return replace(point, **sizes)

    narrowed = {multi_workloads: ("decode", "prefill", "train", "tune"), plan_cost: ("points",), expert_workloads: ("points",)}
    for module, names in {**narrowed, workloads: ("tune",), modules: ("many_tokens",)}.items():
        for name in names:
            own = getattr(module, name)
            setattr(module, name, lambda *args, own=own, **kwargs: [smaller(point) for point in own(*args, **kwargs)])
    multi_check.Checker.wrong = modules.check = lambda *args, **kwargs: None  # nothing is computed that could be right
    model.SHAPES.update({"8B": (128, 448, 4, 2, 32), "1B": (64, 256, 4, 2, 16)})  # of `slots`, too
    model.MIXTURES["30B-A3B"] = (128, 48, 4, 2, 48, 8, 2)
    model.wrong = lambda *args: {}
    whole = model.grid
    model.grid = lambda *args: [replace(point, M=min(point.M, 64)) for point in whole(*args)]

    class Clock(timing.DeviceClock):
        def __init__(self, device, launch: str = "queued"):
            self.device, self.launch, self._queued, self._buffer = device, launch, launch != "eager", torch.zeros(4)

    timing.DeviceClock = Clock  # type: ignore[misc]


class Compiled(BaseException):
    """Everything that a section compiles ahead is; no error of an arm, which would be a row."""


def rehearse(section: str, flags: list[str], out: Path, seconds: float, ahead: bool) -> int:
    """`bench.device`'s exit status for a section."""
    import peft  # noqa: F401  before there is a device that it would ask
    import transformers  # noqa: F401

    pretend()
    from machine import driver, stand_in

    stand_in.install("sm_90")
    driver.Launcher.__call__ = lambda self, *args: None
    from bench import check, compiles, device, precompile

    compile_ahead = precompile.run

    def compile_all(jobs, arch, seconds) -> None:
        if ahead:
            compile_ahead(jobs, arch, seconds)
            raise Compiled

    precompile.run = compile_all
    if section.endswith(".py"):
        with without_storage(), OnTheCPU():
            return int(pytest.main(["-q", "-m", "cuda", "-p", "no:cacheprovider", "--tb=line", section]))
    compiles.in_process = lambda p, number, counting, seconds: compiles.executed(p, number)  # a process of its own would find no GPU
    check.recorded = lambda session: True
    unseen = section in UNSEEN
    if not unseen and not ahead:
        narrow()
    options = ["--device", "cuda", "--out", str(out), "--seconds", str(seconds), *(f"--{flag}" for flag in flags)]
    try:
        with without_storage() if unseen else contextlib.nullcontext(), OnTheCPU():
            return device.main([section, *options])
    finally:
        precompile.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="+", metavar="SECTION", help="of bench.device, with its flags: decode:quick; or a file of tests")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each section; --ahead takes as long as it takes")
    parser.add_argument("--ahead", action="store_true", help="compile what the sections compile ahead; needs TRITON_CACHE_DIR and gcc")
    args = parser.parse_args()
    if args.ahead and not os.environ.get("TRITON_CACHE_DIR"):
        parser.error("--ahead: wanted a folder in TRITON_CACHE_DIR, got none")
    if args.ahead and "model" in args.sections:
        parser.error("--ahead: model launches by values alone; most of its kernels are among those of single and decode")
    with tempfile.TemporaryDirectory() as folder:
        if args.ahead:
            args.seconds = 1e5
            cuda_stub.build(folder)  # what launches a kernel is linked with the driver's library
        return rehearse_all(args)


def rehearse_all(args: argparse.Namespace) -> int:
    failed = []
    for each in args.sections:
        section, _, flags = each.partition(":")
        pid = os.fork()  # each section meets torch.cuda as it is
        if not pid:
            status = 1
            with contextlib.suppress(SystemExit):
                try:
                    says = rehearse(section, flags.split(",") if flags else [], args.out, args.seconds, args.ahead)
                    print(f"rehearsed: {each}, whose status is {says}")
                    status = 0
                except Compiled:
                    print(f"compiled ahead: {each}")
                    status = 0
                except BaseException:
                    traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        if os.waitpid(pid, 0)[1]:
            failed.append(section)
    print(f"raised: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""The command line: ``python -m lora_kernels info | check | compile | demo | inspect``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time

DESCRIPTION = """\
Fused LoRA matmuls as Triton kernels.

  info      what this machine has, which arms can run here, and why not the others
  check     runs every kernel against the float64 reference on this machine (without a GPU: in Triton's interpreter)
  compile   compiles every kernel for an architecture, no GPU needed: registers, spills, shared memory, matmul instruction
  demo      fine-tunes a real pretrained model on real text with FusedLoRALinear in place of its linears
  inspect   what a saved adapter does to each matrix: norms, ranks, amplification, similarity with another, its budget
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 all right, 1 something is wrong, 2 it could not run."""
    from . import demo, inspect_adapter

    parser = argparse.ArgumentParser(prog="python -m lora_kernels", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check | compile | demo | inspect")
    commands.add_parser("info", help="device, versions, arms", description="What this machine has, and which arms can run here.")
    check = commands.add_parser("check", help="parity of every kernel here", description=run_check.__doc__)
    check.add_argument("--quick", action="store_true", help="fewer dtypes and no p = 0: a third of the cases")
    check.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu interprets the kernels (default: auto)")
    compile_ = commands.add_parser("compile", help="compile-only report", description=run_compile.__doc__)
    compile_.add_argument("--arch", action="append", metavar="NAME", help="sm_80 ... sm_120, gfx942; may be repeated (default: sm_90)")
    compile_.add_argument("--json", action="store_true", help="one JSON object a kernel on standard output, nothing else")
    demo.add_arguments(commands.add_parser("demo", help="fine-tune a real model on real text"))
    inspect = commands.add_parser("inspect", help="what a saved adapter does", formatter_class=argparse.RawTextHelpFormatter)
    inspect.description = inspect_adapter.DESCRIPTION
    inspect_adapter.add_arguments(inspect)
    args = parser.parse_args(argv)
    commands_by_name = {"info": run_info, "check": run_check, "compile": run_compile, "demo": demo.run, "inspect": inspect_adapter.run}
    return commands_by_name[args.command](args)


def progress(done: int, total: int, what: str) -> None:
    """A line that rewrites itself on a terminal's standard error; silent elsewhere."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done:4d}/{total} {what[:100]:<100}", end=end, file=sys.stderr, flush=True)


def run_info(args) -> int:
    """What this machine has, and which arms can run here."""
    import torch

    from . import __version__, dispatch

    print(f"lora_kernels {__version__}, torch {torch.__version__}, triton {version('triton')}, python {platform.python_version()}")
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        arch, why_not_here = dispatch.arch_of(device)
        print(f"\n{device}  {name}")
        print("  torch      yes: the chain of library calls, backward by hand")
        print("  reference  yes: the textbook formula")
        if arch is None:
            print(f"  triton     no: {why_not_here}")
        else:
            print(f"  triton     yes: {arch.name}, {arch.shared_memory} bytes of shared memory a block, {arch.sms} multiprocessors")
    return 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_check(args) -> int:
    """Run every kernel, forward and backward, against the float64 reference; exit code 1 if one is out of its error budget.

    Without a GPU the kernels run in Triton's interpreter: the numbers are checked, the speed is not."""
    import torch

    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    from . import dispatch, parity
    from .problem import UnsupportedError

    if device.type == "cuda" and not torch.cuda.is_available():
        print("check: device: wanted cuda, got a torch that sees no GPU; take --device cpu", file=sys.stderr)
        return 2
    if device.type == "cpu" and not dispatch.interpreting():
        # Triton reads the variable when it is imported, and torch may have imported it already: a process of its own.
        command = [sys.executable, "-m", "lora_kernels", "check", "--device", "cpu", *(["--quick"] if args.quick else [])]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    where = "in Triton's interpreter" if device.type == "cpu" else f"on {torch.cuda.get_device_name(device)}"
    print(f"kernels against float64 {where}; budget: twice torch's own error in the same dtype, plus two roundings")
    start = time.perf_counter()
    try:
        results = parity.run_all(device, progress, args.quick)
    except UnsupportedError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    width = max(len(result.name) for result in results)
    for result in results:
        print(f"{'ok ' if result.ok else 'BAD'}  {result.name:<{width}}  {result.launches:3d} launches  {result.detail}")
    bad = sum(not result.ok for result in results)
    print(f"{len(results) - bad} of {len(results)} within budget, {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


def run_compile(args) -> int:
    """Compile every kernel of every heuristic configuration for an architecture, without a GPU, and show what came out.

    Exit code 1 if a kernel reloads a spilled value in a loop, does not fit the shared memory, (16-bit) uses no matmul instruction, has each
    wgmma wait for the one before, or has one of registers in a loop."""
    from . import dispatch

    if dispatch.interpreting():
        print("compile: wanted TRITON_INTERPRET unset, for interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    if dispatch.triton_missing():
        print(f"compile: wanted Triton installed, got {dispatch.triton_missing()}", file=sys.stderr)
        return 2
    from . import compile_only
    from .tuning import Arch

    try:
        archs = [Arch.parse(name) for name in args.arch or ["sm_90"]]
        if any(arch.kind == "interpreter" for arch in archs):
            raise ValueError("arch: wanted a GPU architecture such as sm_90 or gfx942, got 'interpreter'")
    except ValueError as error:
        print(f"compile: {error}", file=sys.stderr)
        return 2
    bad = 0
    for arch in archs:
        reports = compile_only.heuristic_reports(arch, progress)
        bad += sum(not report.good for report in reports)
        for report in reports if args.json else ():
            print(json.dumps(report.as_dict()))
        if not args.json:
            print_reports(arch, reports)
    return 1 if bad else 0


def print_reports(arch, reports) -> None:
    print(f"{arch.name}: {len(reports)} kernels of the heuristic configurations")
    print(f"  {'kernel':<24} {'for':<34} {'dtype':<9} {'warps':>5} {'registers':>9} {'spills':>6} {'shared':>7} {'matmul':>8}  tma")
    for r in reports:
        wgmma = "serialized" if r.serialized else "of registers in a loop" if r.hazards else ""
        flag = "" if r.good else f"  <- BAD: wgmma {wgmma}" if wgmma else "  <- BAD"
        row = f"  {r.kernel:<24} {r.label:<34} {r.dtype:<9} {r.warps:>5} {r.registers:>9} {r.spills:>6} {r.shared:>7} {r.matmul or '-':>8}"
        print(f"{row}  {'yes' if r.tma else '-'}{flag}")
    shared = max(r.shared for r in reports)
    print(f"  spills: {sum(r.spills for r in reports)}; most shared memory {shared} of {arch.shared_memory} bytes\n")

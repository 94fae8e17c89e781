"""One command for a device: ``python -m bench.device [SECTION|all ...] --out DIR``, the sections being those of `SECTIONS`.

A red parity check ends it: a number from kernels that are wrong is not reported. On a CPU the same sections time the library chain.
"""

from __future__ import annotations

import argparse
import faulthandler
import time
from pathlib import Path

import torch

from . import check, compiles, experts, host, memory, merge, model, multi, roof, sanitize, shared, single, tune
from .session import Session, say

SECTIONS = {
    "check": check.run,
    "roof": roof.run,
    "single": single.run,
    "shared": shared.run,
    "memory": memory.run,
    "host": host.run,
    "merge": merge.run,
    "multi": multi.prefill,
    "decode": multi.decode,
    "mtrain": multi.train,
    "experts": experts.run,
    "model": model.run,
    "tune": tune.run,
    "mtune": tune.many,
    "compiles": compiles.run,
    "sanitize": sanitize.run,
}
NOT_IN_ALL = ("sanitize",)  # its tools may need more than a section's time
GRACE = 50  # seconds past its budget after which a section is taken to hang


def main(argv: list[str] | None = None) -> int:
    """0: all green. 1: the check is red, or an arm failed."""
    args = parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    session = Session(device, args.out, args.seconds, args.quick, args.compile, args.variants)
    everything = "all" in args.sections
    wanted = [name for name in SECTIONS if name in args.sections or (everything and name not in NOT_IN_ALL)]
    green = None if "check" in wanted else check.recorded(session)
    status = 0
    for name in wanted:
        if green is None:
            # Sections that were named alone still rest on a check; a quick one will do.
            quick = session.quick or name != "check"
            green = _within(session, "check", lambda quick=quick: check.run(session, quick=quick))
        if not green:
            say(f"the parity check is red on this device ({session.path('check')}); nothing else is reported")
            return 1
        if name != "check":
            status |= bool(_within(session, name, lambda name=name: SECTIONS[name](session)))
    return status


def _within(session: Session, name: str, section):
    """Runs a section; on a GPU, where a kernel may wait for ever, the process ends when the section is far past its budget."""
    start = time.perf_counter()
    guarded = session.device.type == "cuda"
    if guarded:
        faulthandler.dump_traceback_later(session.seconds + GRACE, exit=True)
    try:
        return section()
    finally:
        if guarded:
            faulthandler.cancel_dump_traceback_later()
        say(f"{name}: {time.perf_counter() - start:.0f} s")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.split("\n")[0])
    parser.add_argument(
        "sections",
        nargs="*",
        default=["all"],
        metavar="SECTION",
        help=f"{', '.join(SECTIONS)} or all (default; without {', '.join(NOT_IN_ALL)})",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--seconds", type=float, default=420.0, help="budget of each section; points past it are left out (default 420)")
    parser.add_argument("--quick", action="store_true", help="few small points: to see that it runs")
    parser.add_argument("--compile", action="store_true", help="single: time torch.compile of the formula too")
    parser.add_argument("--variants", action="store_true", help="single: time every way to run the kernels, not only the sources of u")
    args = parser.parse_args(argv)
    unknown = [name for name in args.sections if name not in (*SECTIONS, "all")]
    if unknown:
        parser.error(f"section: wanted {', '.join(SECTIONS)} or all, got {', '.join(unknown)}")
    if args.seconds <= 0:
        parser.error(f"--seconds: wanted a positive number, got {args.seconds:g}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())

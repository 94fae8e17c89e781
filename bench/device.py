"""One command for a device: ``python -m bench.device [SECTION[=SECONDS]|all ...] --out DIR``, the sections being those of `SECTIONS`.

A red parity check ends it: a number from kernels that are wrong is not reported. On a CPU the same sections time the library chain.

On a GPU several sections run in a process of their own, and where one of them ends it, by an access out of bounds, say, or because it
waits for ever, those after it go on in another.
"""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import check, compiles, experts, host, memory, merge, model, modules, multi, roof, sanitize, shared, single, slots, tune
from .conditions import ROOT
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
    "dora": modules.run,
    "slots": slots.run,
    "tune": tune.run,
    "mtune": tune.many,
    "compiles": compiles.run,
    "sanitize": sanitize.run,
}
NOT_IN_ALL = ("sanitize",)  # its tools may need more than a section's time
GRACE = 50  # seconds past its budget after which a section is taken to hang
FIRST = ("check", "roof")  # what the others rest on; the rest in the order in which it is named
RED = "red"  # what is told of sections that a red check forbids


def main(argv: list[str] | None = None) -> int:
    """0: all green. 1: the check is red, an arm failed, or a section did not come to its end."""
    args = parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and len(args.wanted) > 1 and args.tell is None:
        return apart(args)
    session = Session(device, args.out, args.seconds, args.quick, args.compile, args.variants)
    green = None if "check" in args.wanted else check.recorded(session)
    status = 0
    for name, seconds in args.wanted.items():
        own = replace(session, seconds=seconds)
        if green is None:
            # Sections that were named alone still rest on a check; a quick one will do.
            quick = session.quick or name != "check"
            green = _within(own, "check", lambda own, quick=quick: check.run(own, quick=quick))
        if not green:
            say(f"the parity check is red on this device ({session.path('check')}); nothing else is reported")
            _tell(args.tell, RED)
            return 1
        if name != "check":
            status |= bool(_within(own, name, SECTIONS[name]))
        _tell(args.tell, name)
    return status


def apart(args: argparse.Namespace) -> int:
    """Runs the sections in a process, and those after one that ended it in the next."""
    left, status = list(args.wanted), 0
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        while left:
            told.write_text("")
            sections = [f"{name}={args.wanted[name]}" for name in left]
            code = subprocess.call([sys.executable, "-m", "bench.device", *sections, *args.others, "--tell", str(told)], cwd=ROOT)
            status |= bool(code)
            finished = told.read_text().split()
            left = [] if RED in finished else [name for name in left if name not in finished]
            if left:
                say(f"{left[0]} ended its process (status {code}); what is after it: {', '.join(left[1:]) or 'nothing'}")
                left = left[1:] if left[0] != "check" else []  # which is then no better than red
    return status


def _tell(path: Path | None, word: str) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(f"{word}\n")


def _within(session: Session, name: str, section):
    """Runs a section; on a GPU, where a kernel may wait for ever, the process ends when the section is far past its budget."""
    start = time.perf_counter()
    guarded = session.device.type == "cuda"
    if guarded:
        faulthandler.dump_traceback_later(session.seconds + GRACE, exit=True)
    try:
        return section(session)
    finally:
        if guarded:
            faulthandler.cancel_dump_traceback_later()
        say(f"{name}: {time.perf_counter() - start:.0f} s")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ``wanted``: the sections in their order, each with its seconds; ``others``: the other options, as they were given."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.split("\n")[0])
    parser.add_argument(
        "sections",
        nargs="*",
        default=["all"],
        metavar="SECTION",
        help=f"{', '.join(SECTIONS)} or all (default; without {', '.join(NOT_IN_ALL)}); SECTION=SECONDS gives one a budget of its own",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--seconds", type=float, default=420.0, help="budget of each section; points past it are left out (default 420)")
    parser.add_argument("--quick", action="store_true", help="few small points: to see that it runs")
    parser.add_argument("--compile", action="store_true", help="single: time torch.compile of the formula too")
    parser.add_argument("--variants", action="store_true", help="single: time every way to run the kernels, not only the sources of u")
    parser.add_argument("--tell", type=Path, help=argparse.SUPPRESS)  # where the process that began this one reads how far it came
    args = parser.parse_args(argv)
    asked = {}
    for section in args.sections:
        name, given, seconds = section.partition("=")
        if name not in (*SECTIONS, "all"):
            parser.error(f"section: wanted {', '.join(SECTIONS)} or all, got {name}")
        try:
            asked[name] = float(seconds) if given else args.seconds
        except ValueError:
            parser.error(f"{name}: wanted a number of seconds, got {seconds!r}")
        if not asked[name] > 0:
            parser.error(f"--seconds: wanted a positive number, got {asked[name]:g}")
    everything = {name: asked["all"] for name in SECTIONS if name not in NOT_IN_ALL} if "all" in asked else {}
    named = {name: seconds for name, seconds in asked.items() if name != "all"}
    args.wanted = dict(sorted((everything | named).items(), key=lambda item: (*FIRST, item[0]).index(item[0])))
    args.others = ["--out", str(args.out.absolute())]
    args.others += ["--device", args.device] if args.device else []
    args.others += [f"--{name}" for name in ("quick", "compile", "variants") if getattr(args, name)]
    return args


if __name__ == "__main__":
    raise SystemExit(main())

"""Rows of lora_kernels/tuning/tables.py from what was measured: ``python -m bench.rows [--results DIR]`` prints them, ready to be pasted.

A row needs a gain beyond the spread: of the joined tuned configuration over the heuristic's (tune.jsonl and mtune.jsonl, the passes as a
whole), or of the arm that `auto` would not take (tune.jsonl and single.jsonl, in every way the launches reached the device; with many
adapters none, for the chain waits for the device). "Beyond the spread": the 80th percentile of one below the 20th of the other. Where
there is none, or no green check of the same code on the same GPU, it says why.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_kernels.dispatch import unmeasured
from lora_kernels.problem import MAX_RANK
from lora_kernels.tuning import Arch, Config, rank_block, why_not
from lora_kernels.tuning.tables import Row

from .conditions import ROOT, read_rows
from .session import say

PASSES = ("forward", "backward")
REACH = 4  # a bucket ends at the geometric middle between measured token counts, but at most this factor away from its own
EDGE = 2  # and so far beyond the fewest and the most tokens that were measured
ONE, ANY = (0, 1), (1, 1 << 31)  # adapters: one without a plan, or as many as you like with one
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Bucket:
    """What one row is for, besides its token count. N and K are the problem's: a backward pass has the layer's the other way round.
    ``adapters``: how many may be loaded, [low, high), as in `Row`.
    """

    gpu: str
    capability: tuple[int, int]
    what: str
    N: int
    K: int
    r: int
    dropout: bool
    itemsize: int
    adapters: tuple[int, int] = ONE

    def __str__(self) -> str:
        more = (" dropout" if self.dropout else "") + ("" if self.adapters == ONE else f" {self.adapters[0]} adapters and more")
        return f"sm_{self.capability[0]}{self.capability[1]} {self.what} {self.K}->{self.N} r={self.r}{more} itemsize {self.itemsize}"


@dataclass
class Measured:
    """Rows of one bucket at one token count: whole passes of `tune` by name, arms of `single` by launch."""

    tune: dict[str, dict] = field(default_factory=dict)
    single: dict[str, dict[str, dict]] = field(default_factory=dict)


def rows_of(results: Path) -> tuple[list[Row], list[str]]:
    """The rows, and for each bucket and token count without one a line that says why."""
    green = greens(results)
    found, lines = [], []
    for bucket, by_tokens in buckets(results).items():
        counts = sorted(by_tokens)
        for M in counts:
            measured = by_tokens[M]
            used = [*measured.tune.values(), *(row for arms in measured.single.values() for row in arms.values())]
            if any((row["gpu"], row["code"]) not in green for row in used):
                lines.append(f"{bucket} M={M}: no green parity check of the same code on this GPU in {results}")
                continue
            row = chosen(bucket, M, reach(M, counts), measured)
            if isinstance(row, Row):
                found.append(row)
            else:
                lines.append(f"{bucket} M={M}: {row}")
    return found, lines


def greens(results: Path) -> set[tuple[str, str]]:
    """(GPU, code) of those whose last parity verdict is green."""
    last = {}
    for row in read_all(results, "check"):
        if row["what"] == "verdict":
            last[row["gpu"], row["code"]] = row["ok"]
    return {key for key, ok in last.items() if ok}


def buckets(results: Path) -> dict[Bucket, dict[int, Measured]]:
    """What was measured, by bucket and token count; CPUs have no rows."""
    found: dict[Bucket, dict[int, Measured]] = {}

    def at(row: dict) -> Measured:
        return found.setdefault(bucket_of(row), {}).setdefault(row["M"], Measured())

    for row in (*read_all(results, "tune"), *read_all(results, "mtune")):
        if usable(row) and row["kernel"] == "pass":
            at(row).tune[row["name"]] = row
    for row in read_all(results, "single"):
        if usable(row) and row["arm"] in ("torch", "triton"):
            at(row).single.setdefault(row["launch"], {})[row["arm"]] = row
    return found


def read_all(results: Path, section: str) -> list[dict]:
    """Rows of SECTION.jsonl and SECTION-*.jsonl, each with its file's name."""
    paths = sorted([*results.glob(f"{section}.jsonl"), *results.glob(f"{section}-*.jsonl")])
    return [row | {"file": path.name} for path in paths for row in read_rows(path)]


def usable(row: dict) -> bool:
    return row["what"] in PASSES and bool(row["ms"]) and not row["error"] and bool(row["capability"])


def bucket_of(row: dict) -> Bucket:
    N, K = (row["N"], row["K"]) if row["what"] == "forward" else (row["K"], row["N"])
    capability = (row["capability"][0], row["capability"][1])
    adapters = adapters_of(row["what"], row["loaded"] or 0)
    return Bucket(row["gpu"], capability, row["what"], N, K, row["r"], row["p"] > 0, ITEMSIZE[row["dtype"]], adapters)


def adapters_of(what: str, loaded: int) -> tuple[int, int]:
    """What a measurement with so many adapters speaks for: a forward pass reads those in use alone, gradients are whole stacks."""
    if not loaded:
        return ONE
    return ANY if what == "forward" else (-(-loaded // REACH), loaded * REACH)


def reach(M: int, counts: list[int]) -> tuple[int, int]:
    """The token counts [low, high) that a measurement at M speaks for, ``counts`` being all that were measured, in order."""
    at = counts.index(M)
    low = max(middle(counts[at - 1], M), -(-M // REACH)) if at else -(-M // EDGE)
    high = min(middle(M, counts[at + 1]), M * REACH) if at + 1 < len(counts) else M * EDGE
    return low, high


def middle(a: int, b: int) -> int:
    """The geometric middle, rounded up."""
    root = math.isqrt(a * b)
    return root + (root * root < a * b)


def faster(a: dict, b: dict) -> bool:
    """Whether a is faster than b beyond the spread."""
    return a["ms"]["p80"] < b["ms"]["p20"]


def gain(a: dict, b: dict) -> str:
    return f"{b['ms']['p50'] / a['ms']['p50']:.2f}x"


def chosen(bucket: Bucket, M: int, tokens: tuple[int, int], measured: Measured) -> Row | str:
    """The row, or why there is none."""
    own, tuned = own_and_tuned(measured)
    tuned = tuned if own and tuned and faster(tuned, own) else None
    kernels = tuned or own or next((arms["triton"] for arms in measured.single.values() if "triton" in arms), None)
    if kernels is None or kernels["config"] is None:
        return "no configuration of the kernels was timed"
    row = bare_row(bucket, tokens, Config.from_dict(kernels["config"]))
    default = unmeasured(row.problem(M, bucket.r), Arch.cuda(*bucket.capability))[0]
    arm, compared = arm_of(measured, kernels, default) if bucket.adapters == ONE else (default, "")
    if arm == default and tuned is None:
        return f"nothing is faster than {default} with the heuristic's configuration beyond the spread{told(measured)}"
    parts = [f"{gain(tuned, own)} over the heuristic's configuration"] if tuned and own else []
    parts += [f"{arm} {compared}"] if compared else []
    source = f"bench/results/{kernels['file']}: {', '.join(parts)} at {M} tokens, p50, {kernels['gpu']}"
    return served(replace(row, arm=arm, source=source))


def own_and_tuned(measured: Measured) -> tuple[dict | None, dict | None]:
    """The pass by the heuristic's configuration, and the fastest by any other: the joined parts, or those with overlapped launches."""
    others = [row for name, row in measured.tune.items() if name not in ("heuristic", "torch")]
    return measured.tune.get("heuristic"), min(others, key=lambda row: row["ms"]["p50"], default=None)


def arm_of(measured: Measured, kernels: dict, default: str) -> tuple[str, str]:
    """The faster arm and its gain, if every launch mode agrees; the default otherwise, and ""."""
    pairs = {launch: (arms["torch"], arms["triton"]) for launch, arms in measured.single.items() if {"torch", "triton"} <= set(arms)}
    if "torch" in measured.tune and measured.tune:
        pairs[measured.tune["torch"]["launch"]] = measured.tune["torch"], kernels
    for arm, first in (("torch", 0), ("triton", 1)):
        if pairs and all(faster(pair[first], pair[1 - first]) for pair in pairs.values()):
            other = "triton" if arm == "torch" else "torch"
            gains = ", ".join(f"{gain(pair[first], pair[1 - first])} {launch}" for launch, pair in pairs.items())
            return arm, f"{gains} over {other}"
    return default, ""


def told(measured: Measured) -> str:
    """What was measured of the tuned configuration, where there was one."""
    own, tuned = own_and_tuned(measured)
    return f" (tuned: {gain(tuned, own)})" if own and tuned else ""


def bare_row(bucket: Bucket, tokens: tuple[int, int], config: Config) -> Row:
    """A row for the ranks that take the same tile as the bucket's."""
    tile = rank_block(bucket.r, MAX_RANK)
    rank = (1 if tile == 16 else tile // 2 + 1, tile + 1)
    w_major = "k" if bucket.what == "forward" else "n"
    shape = (bucket.capability, tokens, bucket.N, bucket.K, rank, bucket.dropout, bucket.itemsize)
    return Row(*shape, arm="", config=config, source="", adapters=bucket.adapters, w_major=w_major)


def served(row: Row) -> Row | str:
    """The row, or why its configuration serves not all of it."""
    arch = Arch.cuda(*row.capability)
    sentences = [why_not(row.config, problem, arch) for problem in row.corners()]
    return next((sentence for sentence in sentences if sentence), row)


def main(argv: list[str] | None = None) -> int:
    """0: rows or reasons were printed. 1: nothing was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON lines")
    args = parser.parse_args(argv)
    found, lines = rows_of(args.results)
    for line in lines:
        say(f"no row: {line}")
    if not found and not lines:
        say(f"no row: {args.results} holds no tune.jsonl, mtune.jsonl nor single.jsonl of a GPU")
        return 1
    print("from .config import Config, Expand, Shrink, Wgrad\n")
    print("ROWS: tuple[Row, ...] = (\n" + "".join(f"    {row},\n" for row in found) + ")")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The configurations that `bench.tune` tries for one kernel: small grids, the heuristic's own first, each valid by `why_not`.

With many adapters the tiles' rows are the plan's blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from lora_kernels.dispatch import why_not_here
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad, heuristic

FEW_TOKENS = 64  # up to so many, expand's tile is the batch's rows, and where u comes from and splits of K are tried
OVERLAPS = ("stream", "pdl")  # ways to run dA and dB beside dX
WAVES = (1, 2, 4)  # a split is chosen so that the programs fill the chip so many times
EXPAND_TILES = ((128, 256, 64), (256, 128, 64), (128, 128, 64))
SMALL_TILES = ((128, 128, 32), (128, 64, 32), (64, 128, 32), (64, 64, 32))  # where shared memory is small, or dtypes are wide


def candidates(kernel: str, problem: Problem, arch: Arch) -> list[Config]:
    """Configurations that differ from the heuristic's in ``kernel`` ("shrink", "expand" or "wgrad") alone, the heuristic's own first."""
    own = heuristic(problem, arch)
    grids = _TINY if arch.kind == "interpreter" else _GRIDS
    parts = dict.fromkeys([getattr(own, kernel), *grids[kernel](problem, arch, getattr(own, kernel))])
    found = [replace(own, **{kernel: part}) for part in parts]
    return [config for config in found if why_not_here(config, problem, arch) is None]


def overlapped(config: Config, how: str, problem: Problem, arch: Arch) -> tuple[Config | None, str | None]:
    """``config`` with dA and dB beside dX, by a second "stream" or by "pdl"; or None and why that is not valid.

    wgrad, and by "pdl" shrink too, takes no more shared memory than a large tile of dX leaves on a multiprocessor.
    """
    shrink, expand = config.shrink, replace(config.expand, u="given", pdl=how == "pdl")
    if how == "pdl":
        expand = replace(expand, base="kernel", persistent=False)  # a persistent one takes every register: docs/tuning.md
        rows = problem.gather_block or (32 if problem.dropout == "x" else 64)
        shrink = replace(shrink, block_m=rows, block_k=64, split=1, num_stages=2)
    found = Config(shrink, expand, replace(config.wgrad, num_stages=min(2, config.wgrad.num_stages), beside=how))
    reason = why_not_here(found, problem, arch)
    return (found, None) if reason is None else (None, reason)


def short(kernel: str, part: dict) -> str:
    """A part of a configuration in a few letters: "128x256x64 s4 w8 tma"."""
    sizes = "x".join(str(size) for field, size in part.items() if field.startswith("block_"))
    words = [sizes, f"s{part['num_stages']}", f"w{part['num_warps']}"]
    words += [f"split{part['split']}"] if part["split"] > 1 else []
    if kernel == "expand":
        words += [f"g{part['group_m']}"] if part["group_m"] != Expand.group_m else []
        words += [part["u"]] if part["u"] != "given" else []
        words += ["library"] if part["base"] == "library" else []
    words += [flag for flag in ("tma", "persistent", "pdl", "masked", "each") if part.get(flag)]
    words += [f"beside by {part['beside']}"] if part.get("beside") else []
    return " ".join(words)


def _shrinks(problem: Problem, arch: Arch, own: Shrink) -> Iterator[Shrink]:
    rows = [problem.gather_block] if problem.adapters else [m for m in (16, 32, 64) if m <= _power(problem.M)]
    for m, k, (warps, stages) in itertools.product(rows, (64, 128, 256), ((4, 3), (4, 5), (8, 3))):
        for split in _splits(-(-problem.M // m), problem.K, k, arch):
            yield Shrink(m, k, split, warps, stages)


def _wgrads(problem: Problem, arch: Arch, own: Wgrad) -> Iterator[Wgrad]:
    longest = max(problem.N, problem.K)
    tokens = (16, 32, 64, 128) if problem.adapters else (32, 64, 128)  # an adapter may have few
    for m, j, (warps, stages) in itertools.product(tokens, (32, 64, 128), ((4, 3), (8, 3))):
        # Adapters side by side fill the chip, and how often their tokens are split follows from how many they are.
        for split in (own.split,) if problem.adapters else _splits(-(-longest // j), problem.M, m, arch):
            yield Wgrad(m, j, split, warps, stages)


def _expands(problem: Problem, arch: Arch, own: Expand) -> Iterator[Expand]:
    if problem.M <= FEW_TOKENS:
        yield from _few_tokens(problem, arch, own)
        return
    tiles = -(-problem.M // own.block_m) * -(-problem.N // 128)
    if tiles < arch.sms:
        narrow = [replace(own, block_n=128, num_stages=stages) for stages in (3, 4)]
        yield from (replace(tile, split=split) for tile in narrow for split in _splits(tiles, problem.K, own.block_k, arch) if split <= 16)
    # Scheduled both ways, but loaded by descriptors only where the heuristic takes them too.
    own, modes = replace(own, split=1), [dict(tma=own.tma, persistent=persistent, num_warps=8) for persistent in (False, True)]
    wide = problem.itemsize == 2 and arch.shared_memory >= 160 << 10
    for (m, n, k), stages, mode in itertools.product(EXPAND_TILES if wide else SMALL_TILES, (2, 3, 4, 5), modes):
        if stages > 2 or not wide:
            yield replace(own, block_m=m, block_n=n, block_k=k, num_stages=stages, **mode)
    if own.masked:
        yield from (replace(own, block_n=n, num_stages=stages, masked=False) for n in (64, 128) for stages in (3, 4))
    yield replace(own, block_m=128, block_n=128, num_warps=4)
    yield replace(own, tma=False)
    yield replace(own, base="library", tma=False)
    yield from (replace(own, group_m=g, persistent=persistent) for g in (4, 16) for persistent in (False, True))


def _few_tokens(problem: Problem, arch: Arch, own: Expand) -> Iterator[Expand]:
    rows = problem.row_block or _power(problem.M)
    tiles = itertools.product(dict.fromkeys((rows, max(16, rows // 2))), (16, 32, 64, 128), ((64, 5), (64, 8), (128, 5)))
    for m, n, (k, stages) in tiles:
        tile = Expand(m, n, k, num_warps=4, num_stages=stages)
        yield replace(tile, u="loop")
        blocks = -(-problem.M // m) * -(-problem.N // n)
        yield from (replace(tile, split=split, each=own.each) for split in _splits(blocks, problem.K, k, arch) if split <= 16)
    if own.each:
        yield from (replace(own, each=each, num_warps=w, split=s) for each, w, s in itertools.product((True, False), (4, 8), (1, 2)))
    for n in (32, 64) if arch.has_pdl else ():
        tile, blocks = Expand(rows, n, 64, num_warps=4, num_stages=5, pdl=True, each=own.each), -(-problem.N // n)
        yield from (replace(tile, split=split) for split in _splits(blocks, problem.K, 64, arch) if split <= 16)


def _splits(blocks: int, length: int, block: int, arch: Arch) -> Iterable[int]:
    """Programs that share an axis of ``length``: 1, and what gives so many waves of the chip, each with two blocks or more of it."""
    most = max(1, min(64, length // (2 * block)))
    return dict.fromkeys(max(1, min(most, -(-waves * arch.sms // blocks))) for waves in (0, *WAVES))


def _power(M: int) -> int:
    """The tile of M rows: the next power of two, at least 16."""
    return max(16, 1 << (M - 1).bit_length())


def _tiny_shrinks(problem: Problem, arch: Arch, own: Shrink) -> Iterator[Shrink]:
    yield from (Shrink(problem.gather_block or 16, k, split, 4, 2) for k, split in ((32, 1), (64, 2)))


def _tiny_expands(problem: Problem, arch: Arch, own: Expand) -> Iterator[Expand]:
    tile = Expand(problem.row_block or 16, 32, 32, num_warps=4, num_stages=2)
    yield from (replace(tile, u="loop"), replace(tile, split=2)) if problem.M <= 16 else (tile, replace(tile, tma=True, persistent=True))
    yield replace(tile, masked=True)


def _tiny_wgrads(problem: Problem, arch: Arch, own: Wgrad) -> Iterator[Wgrad]:
    yield from (Wgrad(16, 32, split, 4, 2) for split in (1, 2))


_GRIDS = {"shrink": _shrinks, "expand": _expands, "wgrad": _wgrads}
_TINY = {"shrink": _tiny_shrinks, "expand": _tiny_expands, "wgrad": _tiny_wgrads}

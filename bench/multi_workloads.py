"""What is measured of many adapters: which token takes which adapter, of what rank, in which order; most informative points first.

identical  all tokens one adapter            uniform  ceil(sqrt M) adapters, evenly
distinct   each token another                zipf     each adapter 1.5 times the tokens of the next (Punica, arXiv:2310.18547)
even       ``spread`` adapters, evenly       power    the i-th of ``spread`` adapters has a share of i^-1.5, the last ones perhaps nothing
gaps       evenly, every fourth has nothing  none     the base alone
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch

from lora_kernels.segments import Adapters, Segments

from .workloads import LLAMA_8B, LLAMA_70B, Operands, Point

ALPHA = 1.5
MOST_TOKENS = 65536
MIXED = (8, 16, 32, 64, 128)
S_LORA = ((8,), (64, 32, 16, 8))  # Sheng et al. 2023, arXiv:2311.03285, table 1: settings S1 and S2
LAYERS = {name: LLAMA_8B[name] for name in ("8B q,o", "8B gate,up", "8B down")}
Q_O = {"8B q,o": LLAMA_8B["8B q,o"]}
PACKED = {"8B q,k,v": (4096, (4096, 1024, 1024)), "8B gate,up": (4096, (14336, 14336))}
WIDE = {name: LAYERS[name] for name in ("8B gate,up", "8B down")}
POPULARITIES = ("distinct", "identical", "uniform", "zipf")


@dataclass
class MultiOperands(Operands):
    """A point's tensors, with what the host knows of them, which a baseline may use."""

    ids: torch.Tensor | None = None
    host_ids: list[int] | None = None
    host_ranks: list[int] | None = None


@dataclass(frozen=True)
class MultiPoint(Point):
    """A `Point` whose tokens take some of ``loaded`` adapters, stored at rank r; those of ``ranks`` in turn where they are given.

    ``order``: tokens of an adapter as neighbours ("runs") or anywhere ("shuffled"). Every grid but "train" is forward alone. ``blocks``:
    the plan's row_block and gather_block, None for those the number of tokens decides. ``widths``: of the layers that the weight packs, N
    in all, or () for one layer.
    """

    loaded: int = 64
    popularity: str = "even"
    spread: int = 0
    order: str = "shuffled"
    ranks: tuple[int, ...] = ()
    blocks: tuple[int | None, int | None] = (None, None)
    widths: tuple[int, ...] = ()

    @property
    def packed_layers(self) -> int:
        return len(self.widths) or 1

    @property
    def forward_alone(self) -> bool:
        return self.grid != "train"

    @property
    def adapters(self) -> int:
        """How many adapters have tokens."""
        return sum(count > 0 for count in counts(self))

    def __str__(self) -> str:
        ranks = f"r={'/'.join(map(str, self.ranks)) or self.r}"
        what = f"{self.grid} {self.M}x{self.K}->{self.N} {self.popularity} {self.adapters} of {self.loaded} {self.order} {ranks}"
        return f"{what} {str(self.dtype).removeprefix('torch.')}"

    @functools.cached_property
    def low_rank(self) -> tuple[int, int, int]:
        ranks = rank_of(self)
        used = torch.bincount(adapter_ids(self) + 1, minlength=self.loaded + 1)[1:].tolist()
        u = sum(count * rank for count, rank in zip(used, ranks, strict=True))
        return u, sum(rank for count, rank in zip(used, ranks, strict=True) if count), self.loaded * self.r

    def empty_operands(self, device: torch.device) -> MultiOperands:
        one, host_ids = super().empty_operands(device), adapter_ids(self)
        A, B = one.lora_A.new_empty(self.loaded, self.packed_layers * self.r, self.K), one.lora_B.new_empty(self.loaded, self.N, self.r)
        ids = host_ids.to(device)
        plan = Segments.from_ids(ids, self.loaded, row_block=self.blocks[0], gather_block=self.blocks[1])
        ranks = torch.tensor(rank_of(self), dtype=torch.int32).to(device) if self.ranks else None
        return MultiOperands(
            one.x, one.weight, A, B, one.dy, one.scale, one.p, Adapters(plan, None, ranks, self.widths),
            ids=ids, host_ids=host_ids.tolist(), host_ranks=rank_of(self),
        )  # fmt: skip

    def operands(self, device: torch.device) -> MultiOperands:
        """The stacks hold zeros beyond an adapter's own rank, which a baseline may rest on."""
        o = cast(MultiOperands, super().operands(device))
        if self.ranks:
            beyond = torch.arange(self.r, device=device) >= o.adapters.ranks[:, None]
            with torch.no_grad():
                o.lora_A.masked_fill_(beyond[:, :, None], 0)
                o.lora_B.masked_fill_(beyond[:, None, :], 0)
        return o

    def fields(self) -> dict:
        own = dict(loaded=self.loaded, adapters=self.adapters, popularity=self.popularity, order=self.order, ranks=list(self.ranks) or None)
        return super().fields() | own | dict(widths=list(self.widths) or None)


@functools.lru_cache(maxsize=4096)
def counts(point: MultiPoint) -> tuple[int, ...]:
    """Tokens of each adapter in use, the most first; they add up to M, or to 0."""
    M, spread = point.M, point.spread
    if point.popularity == "none":
        return ()
    if point.popularity == "identical":
        return (M,)
    if point.popularity == "distinct":
        return (1,) * M
    if point.popularity == "uniform":
        return _evenly(M, math.isqrt(M - 1) + 1)
    if point.popularity == "zipf":
        return _zipf(M)
    if point.popularity == "even":
        return _evenly(M, spread)
    if point.popularity == "gaps":
        return _evenly(M, spread - spread // 4)
    if point.popularity == "power":
        shares = [i**-ALPHA for i in range(1, spread + 1)]
        floors = [int(M * share / sum(shares)) for share in shares]
        return (floors[0] + M - sum(floors), *floors[1:])
    raise ValueError(f"popularity: wanted one of those in the module's docstring, got {point.popularity!r}")


def _evenly(tokens: int, adapters: int) -> tuple[int, ...]:
    return tuple(tokens // adapters + (i < tokens % adapters) for i in range(adapters))


def _zipf(tokens: int) -> tuple[int, ...]:
    found, size = [], 1.0
    while sum(found) + int(size) < tokens:
        found.append(int(size))
        size *= ALPHA
    return tuple(sorted([*found, tokens - sum(found)], reverse=True))


def adapter_ids(point: MultiPoint) -> torch.Tensor:
    """int64 ``[M]`` on the CPU, the same for the same point: the adapters in use lie anywhere among those loaded."""
    generator = torch.Generator().manual_seed(point.M * 8191 + point.loaded)
    sizes = torch.tensor(counts(point), dtype=torch.int64)
    if sizes.numel() > point.loaded:
        raise ValueError(f"{point}: wanted at most {point.loaded} adapters, got {sizes.numel()}")
    slots = torch.randperm(point.loaded, generator=generator)[: sizes.numel()]
    ids = torch.full((point.M,), -1)
    ids[: int(sizes.sum())] = slots.repeat_interleave(sizes)
    return ids[torch.randperm(point.M, generator=generator)] if point.order == "shuffled" else ids


def rank_of(point: MultiPoint) -> list[int]:
    """Each loaded adapter's rank."""
    return [point.ranks[e % len(point.ranks)] if point.ranks else point.r for e in range(point.loaded)]


def small(point: MultiPoint, plan: Segments) -> MultiPoint:
    """Fewer tokens and features; the same adapters, ranks and blocks, so that the point's configurations serve it, too."""
    N = min(point.N, 1024)
    widths = tuple(width * N // point.N for width in point.widths)
    N = sum(widths) or N
    return replace(point, M=min(point.M, 192), K=min(point.K, 1024), N=N, widths=widths, blocks=(plan.row_block, plan.gather_block))


def grid(
    name: str, layers: dict, tokens: Iterable[int], popularities=("even",), orders=("shuffled",), spreads=(0,), r: int = 16, **fields
) -> list[MultiPoint]:
    """layers x tokens x spreads x popularities x orders; of points that give every adapter the same number of tokens, the first."""
    found: dict[tuple, MultiPoint] = {}
    for (layer, (K, N)), M, spread, popularity, order in product(layers.items(), tokens, spreads, popularities, orders):
        point = MultiPoint(name, layer, M, K, N, r, popularity=popularity, spread=spread, order=order, **fields)
        sizes = counts(point)
        found.setdefault((layer, M, sizes, order if len(sizes) > 1 else ""), point)
    return list(found.values())


def packed(layers: dict, tokens: Iterable[int], popularities=("even",), spreads=(0,), **fields) -> list[MultiPoint]:
    """Points of layers that one weight packs."""
    return [
        replace(point, widths=widths)
        for name, (K, widths) in layers.items()
        for point in grid("packed", {name: (K, sum(widths))}, tokens, popularities, spreads=spreads, **fields)
    ]


def shards(parts: int = 8) -> dict:
    """The 70B model's layers on one of ``parts`` GPUs: q and gate,up cut along their outputs, o and down along their inputs."""
    (K, N), (hidden, inner) = LLAMA_70B["70B q,o"], LLAMA_70B["70B gate,up"]
    return {
        f"70B/{parts} q": (K, N // parts),
        f"70B/{parts} gate,up": (hidden, inner // parts),
        f"70B/{parts} o": (K // parts, N),
        f"70B/{parts} down": (inner // parts, hidden),
    }


def decode(device: torch.device, quick: bool) -> list[MultiPoint]:
    """One token a sequence, forward alone."""
    if device.type != "cuda":
        return _small_decode(quick)
    few, rest = (64, 16, 256, 1), (4, 32, 128, 2, 8)
    if quick:
        return grid("popularity", Q_O, (16,), ("distinct", "identical"), loaded=256)
    return [
        *grid("popularity", Q_O, few, POPULARITIES, loaded=256),
        *grid("loaded", Q_O, (64, 1), ("identical", "none"), loaded=1024),
        *packed(PACKED, (64, 16), ("distinct", "identical"), loaded=256),
        *grid("ranks", Q_O, (16, 64, 256), ("distinct",), loaded=256, r=128, ranks=MIXED),
        *grid("popularity", WIDE, few, POPULARITIES, loaded=256),
        *(p for ranks in S_LORA for p in grid("ranks", Q_O, (64,), ("distinct",), loaded=256, r=max(ranks), ranks=_mixed(ranks))),
        *(p for r in (16, 64) for p in grid("vllm", {"4096->4096": (4096, 4096)}, (64, 16), spreads=(128,), loaded=128, r=r)),
        *grid("shards", shards(), (64, 16), ("distinct",), loaded=256),
        *grid("popularity", Q_O, rest, POPULARITIES, loaded=256),
        *grid("ranks", WIDE, (64,), ("distinct",), loaded=256, r=128, ranks=MIXED),
        *grid("popularity", WIDE, rest, POPULARITIES, loaded=256),
    ]


def prefill(device: torch.device, quick: bool) -> list[MultiPoint]:
    """Many tokens a sequence, forward alone."""
    if device.type != "cuda":
        return _small_prefill(quick)
    both = ("shuffled", "runs")
    if quick:
        return grid("prefill", Q_O, (2048,), orders=both, spreads=(16,))
    return [
        *grid("prefill", Q_O, (8192, 2048), orders=both, spreads=(16, 64, 1)),
        *packed(PACKED, (8192, 2048), spreads=(16,)),
        *grid("loaded", Q_O, (2048,), ("identical", "none"), loaded=1024),
        *grid("ranks", Q_O, (8192, 2048), orders=both, spreads=(64,), r=128, ranks=MIXED),
        *grid("prefill", WIDE, (8192, 2048), orders=both, spreads=(16, 64, 1)),
        *(p for ranks in S_LORA for p in grid("ranks", Q_O, (2048,), orders=both, spreads=(64,), r=max(ranks), ranks=_mixed(ranks))),
        *(p for r in (16, 64) for p in grid("vllm", {"4096->4096": (4096, 4096)}, (2048, 8192), spreads=(128,), loaded=128, r=r)),
        *grid("shards", shards(), (2048, 8192), orders=("runs",), spreads=(16,)),
        *grid("ranks", WIDE, (8192,), orders=("runs",), spreads=(64,), r=128, ranks=MIXED),
    ]


def train(device: torch.device, quick: bool) -> list[MultiPoint]:
    """Forward and backward; every loaded adapter is trained, also those without a token in the batch."""
    if device.type != "cuda":
        return _small_train(quick)
    if quick:
        return [_trained(16, 16), _trained(4, 128, "power")]
    first = [(16, 512), (64, 128), (4, 512), (1024, 16), (256, 128), (1, 512), (64, 16), (1024, 64), (16, 16), (4, 16)]
    sizes = [(adapters, min(each, MOST_TOKENS // adapters)) for each, adapters in product((512, 128, 16, 1), (1, 4, 16, 64, 256, 1024))]
    uneven = [(16, 512), (64, 128), (256, 16), (1024, 16)]
    found = [
        *(_trained(adapters, each) for adapters, each in first[:4]),
        *(_trained(adapters, each, "power") for adapters, each in uneven),
        *(_trained(adapters, each) for adapters, each in first[4:]),
        *(_trained(adapters, each, "gaps") for adapters, each in uneven[:2]),
        *(_trained(adapters, each, layer=layer) for adapters, each in first[:2] for layer in WIDE),
        *(_trained(adapters, each, order="shuffled") for adapters, each in first[:2]),
        *(_trained(adapters, each) for adapters, each in sizes),
        *(_trained(adapters, each, "power", layer=layer) for adapters, each in uneven[:2] for layer in WIDE),
    ]
    return list(dict.fromkeys(found))


def tune(cuda: bool, quick: bool) -> list[MultiPoint]:
    """Points whose configurations are tuned, each number of tokens once: a bucket of the table has one measurement."""
    if not cuda:
        few = MultiPoint("popularity", "small", 2, 32, 48, 8, popularity="distinct", loaded=4)
        many = MultiPoint("train", "small", 80, 32, 48, 8, popularity="gaps", spread=5, loaded=5)
        return _in_float32([many, few])
    if quick:
        return [_trained(4, 128), *grid("popularity", Q_O, (16,), ("distinct",))]
    return [
        *grid("popularity", Q_O, (64,), ("distinct",)),
        _trained(64, 128),
        *grid("prefill", Q_O, (2048,), spreads=(16,)),
        *grid("popularity", WIDE, (64,), ("distinct",)),
        *(_trained(64, 128, layer=layer) for layer in WIDE),
        *grid("popularity", LAYERS, (16,), ("distinct",)),
        *grid("prefill", WIDE, (2048,), spreads=(16,)),
    ]


def _trained(adapters: int, each: int, popularity: str = "even", order: str = "runs", layer: str = "8B q,o") -> MultiPoint:
    K, N = LAYERS[layer]
    M = adapters * each
    return MultiPoint("train", layer, M, K, N, loaded=adapters, popularity=popularity, spread=adapters, order=order)


def _mixed(ranks: tuple[int, ...]) -> tuple[int, ...]:
    return ranks if len(ranks) > 1 else ()


def _small_decode(quick: bool) -> list[MultiPoint]:
    layers, tokens = ({"small": (64, 96)}, (1, 6)) if quick else ({"1024->1024": (1024, 1024)}, (1, 4, 16, 64))
    loaded, r = (8, 8) if quick else (64, 16)
    return _in_float32([
        *grid("popularity", layers, tokens, POPULARITIES, loaded=loaded, r=r),
        *grid("loaded", layers, tokens[-1:], ("identical", "none"), loaded=4 * loaded, r=r),
        *grid("ranks", layers, tokens[-1:], ("distinct",), loaded=loaded, r=2 * r, ranks=(r // 2, r, 2 * r)),
        *packed(_small_packed(quick), tokens[-1:], ("distinct",), loaded=loaded, r=r),
    ])  # fmt: skip


def _small_prefill(quick: bool) -> list[MultiPoint]:
    layers, tokens = ({"small": (64, 96)}, (48,)) if quick else ({"1024->1024": (1024, 1024), "1024->4096": (1024, 4096)}, (512,))
    loaded, r = (8, 8) if quick else (64, 16)
    return _in_float32([
        *grid("prefill", layers, tokens, orders=("shuffled", "runs"), spreads=(3, 1) if quick else (16, 64, 1), loaded=loaded, r=r),
        *grid("ranks", layers, tokens, spreads=(3,), loaded=loaded, r=2 * r, ranks=(r // 2, r, 2 * r)),
        *packed(_small_packed(quick), tokens, spreads=(3 if quick else 16,), loaded=loaded, r=r),
    ])  # fmt: skip


def _small_packed(quick: bool) -> dict:
    return {"small q,k,v": (64, (64, 16, 16))} if quick else {"1024 q,k,v": (1024, (1024, 256, 256))}


def _small_train(quick: bool) -> list[MultiPoint]:
    K, N, r, sizes = (64, 96, 8, ((4, 16), (8, 2))) if quick else (1024, 1024, 16, ((4, 128), (16, 32), (64, 8), (1, 512)))
    base = MultiPoint("train", "small" if quick else "1024->1024", 1, K, N, r, order="runs")
    points = [replace(base, M=E * each, loaded=E, spread=E) for E, each in sizes]
    uneven = [replace(points[0], popularity=name) for name in ("power", "gaps")]
    return _in_float32([*points, *uneven, replace(points[0], order="shuffled")])


def _in_float32(points: list[MultiPoint]) -> list[MultiPoint]:
    return [replace(point, dtype=torch.float32) for point in points]

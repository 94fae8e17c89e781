"""What is measured of a mixture's experts: projections of published models, tokens, and the experts a token takes.

The most informative points come first.

uniform  a token takes ``top_k`` different experts, each as likely as any other
zipf     the i-th of the experts, which lie anywhere in the stack, is drawn with a weight of i^-1.5
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from lora_kernels.segments import Adapters, Segments, expert_block

from .multi_baselines import once
from .multi_workloads import ALPHA
from .workloads import Operands, Point


@dataclass(frozen=True)
class Mixture:
    """A model's experts: how many, how many a token takes, and K -> N of each projection."""

    experts: int
    top_k: int
    layers: dict[str, tuple[int, int]]


QWEN3 = "Qwen3-30B-A3B"
MODELS = {
    QWEN3: Mixture(128, 8, {"gate_up": (2048, 1536), "down": (768, 2048)}),
    "gpt-oss-20b": Mixture(32, 4, {"gate_up": (2880, 5760), "down": (2880, 2880)}),
    "Mixtral-8x7B": Mixture(8, 2, {"gate_up": (4096, 28672), "down": (14336, 4096)}),
}


@dataclass
class ExpertOperands(Operands):
    """The stack's weight is ``[E, N, K]``; the host's ``[M]`` ids, int64 ``order``, rows by expert, and int32 ``ends`` of each one's."""

    ids: torch.Tensor | None = None
    order: torch.Tensor | None = None
    ends: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpertPoint(Point):
    """A `Point` whose rows, ``top_k`` for each token, go through one of ``experts`` weights and adapters each.

    ``block``: rows of the gathered tiles, 0 for those of `Segments.from_top_k`.
    """

    experts: int = 128
    top_k: int = 8
    routing: str = "uniform"
    block: int = 0

    def __str__(self) -> str:
        what = f"{self.grid} {self.layer} {self.M}x{self.K}->{self.N} {self.routing} {self.weights} of {self.experts} r={self.r}"
        return f"{what} {str(self.dtype).removeprefix('torch.')}"

    @functools.cached_property
    def weights(self) -> int:
        return int(self.ids.unique().numel())

    @property
    def ids(self) -> torch.Tensor:
        """int64 ``[M]`` on the CPU: each row's expert."""
        return _routed(self.M // self.top_k, self.top_k, self.experts, self.routing)

    @property
    def low_rank(self) -> tuple[int, int, int]:
        return self.M * self.r, self.weights * self.r, self.experts * self.r

    def empty_operands(self, device: torch.device) -> ExpertOperands:
        one, ids, E = super().empty_operands(torch.device("meta")), self.ids, self.experts
        x, dy = (torch.empty_like(t, device=device) for t in (one.x, one.dy))
        weight, A, B = (torch.empty(E, *t.shape, dtype=t.dtype, device=device) for t in (one.weight, one.lora_A, one.lora_B))
        block = self.block or expert_block(self.M, E)
        plan = Segments.from_ids(ids.to(device), E, validate=False, gather_block=block)
        order, ends = ids.argsort(stable=True), torch.bincount(ids, minlength=E).cumsum(0).int()
        return ExpertOperands(
            x, weight, A, B, dy, one.scale, one.p, Adapters(plan), ids=ids, order=order.to(device), ends=ends.to(device)
        )  # fmt: skip

    def fields(self) -> dict:
        own = dict(loaded=self.experts, adapters=self.weights, popularity=self.routing, top_k=self.top_k)
        return super().fields() | own


@functools.lru_cache(maxsize=256)
def _routed(tokens: int, top_k: int, experts: int, routing: str) -> torch.Tensor:
    """The same for the same arguments; a token's experts are neighbouring rows."""
    if routing not in ("uniform", "zipf"):
        raise ValueError(f"routing: wanted uniform or zipf, got {routing!r}")
    generator = torch.Generator().manual_seed(tokens * 8191 + experts)
    weights = torch.arange(1, experts + 1, dtype=torch.float64) ** (-ALPHA if routing == "zipf" else 0.0)
    weights = weights[torch.randperm(experts, generator=generator)]
    return torch.multinomial(weights.expand(tokens, -1), top_k, generator=generator).reshape(-1)


@once
def by_expert(o: ExpertOperands) -> ExpertOperands:
    """The same rows sorted by expert, as torch's grouped matmul wants them, and a plan of those."""
    ids = o.ids.sort().values
    plan = Segments.from_ids(ids.to(o.x.device), o.weight.shape[0], validate=False)
    x = o.x.detach()[o.order].requires_grad_(o.x.requires_grad)
    return replace(o, x=x, dy=o.dy[o.order], adapters=Adapters(plan), ids=ids, order=torch.arange(len(ids), device=o.x.device))


def beside_base(o: ExpertOperands) -> ExpertOperands:
    """What the adapter's kernels take beside a base product."""
    ordered = by_expert(o)
    return replace(ordered, weight=None, base=torch.empty_like(ordered.dy))


def small(point: ExpertPoint, block: int) -> ExpertPoint:
    """Fewer tokens and features; the same experts and tiles, and the same remainders of features, on which kernels are compiled."""
    K, N = (min(width, 1024 + width % 128) for width in (point.K, point.N))
    return replace(point, M=min(point.M, 64 * point.top_k), K=K, N=N, block=block)


def points(device: torch.device, quick: bool) -> list[ExpertPoint]:
    """Training ("train": forward and backward) and decode (forward alone); routing is uniform, for one model skewed as well."""
    if device.type != "cuda":
        return _small_points(quick)
    if quick:
        return [*_of(QWEN3, "decode", (8,), only="down"), *_of(QWEN3, "train", (256,), only="down")]
    others = [name for name in MODELS if name != QWEN3]
    return [
        *_of(QWEN3, "train", (8192,)),
        *_of(QWEN3, "decode", (64, 8, 1)),
        *(point for name in others for point in _of(name, "train", (8192,))),
        *_of(QWEN3, "train", (8192,), "zipf"),
        *(point for name in others for point in _of(name, "decode", (64,))),
        *(point for name in MODELS for point in _of(name, "train", (2048,))),
        *_of(QWEN3, "train", (2048,), "zipf"),
        *_of(QWEN3, "decode", (64,), "zipf"),
        *(point for name in others for point in _of(name, "decode", (8, 1))),
    ]


def _of(name: str, grid: str, tokens: Iterable[int], routing: str = "uniform", only: str = "") -> list[ExpertPoint]:
    model = MODELS[name]
    layers = {layer: sizes for layer, sizes in model.layers.items() if only in ("", layer)}
    return [
        ExpertPoint(grid, f"{name} {layer}", T * model.top_k, K, N, experts=model.experts, top_k=model.top_k, routing=routing)
        for T in tokens
        for layer, (K, N) in layers.items()
    ]


def _small_points(quick: bool) -> list[ExpertPoint]:
    experts, top_k, layers, tokens = (
        (8, 2, {"small": (64, 96)}, 24) if quick else (16, 4, {"512->768": (512, 768), "384->512": (384, 512)}, 256)
    )
    make: Callable[..., ExpertPoint] = functools.partial(
        ExpertPoint, r=8 if quick else 16, dtype=torch.float32, experts=experts, top_k=top_k
    )
    return [
        *(make("train", layer, tokens * top_k, K, N) for layer, (K, N) in layers.items()),
        *(make("decode", layer, 4 * top_k, K, N) for layer, (K, N) in layers.items()),
        *(make("train", layer, tokens * top_k, K, N, routing="zipf") for layer, (K, N) in layers.items()),
    ]

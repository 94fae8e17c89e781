"""The cases of parity: a call's sizes and ways, its operands, and every case of this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .dispatch import arch_of, why_not_here
from .problem import Problem, UnsupportedError
from .projections import Projection
from .segments import Segments
from .tuning import Arch, Config, Expand, Shrink, Wgrad

Dtypes = tuple[torch.dtype, ...]
LAYOUTS = ("transposed", "sliced", "expanded")
SEED = 0x1234_5678_9ABC


@dataclass(frozen=True)
class Case:
    """One call, forward and backward. ``layout``: how x, weight, bias and dY lie in memory."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32
    p: float = 0.0
    bias: bool = True
    scale: float = 1.7
    config: Config | None = None
    adapter_dtype: torch.dtype | None = None
    layout: str = "contiguous"  # or one of LAYOUTS; "expanded": dY of stride 0
    impl: str = "triton"
    adapters: int = 0  # E of a batch with segments; 0: one adapter
    popularity: str = "mixed"  # or "distinct", "runs" (contiguous), "one", "none": see `adapter_ids`
    mixed_ranks: bool = False
    base: bool = False  # given in the place of weight and bias
    experts: bool = False  # a weight and a bias, frozen, for each adapter
    top_k: int = 1  # so many tokens of the plan are one of x, whose are M / top_k
    layers: int = 1  # of one x: so many times N outputs and R ranks, not evenly shared out
    widths: tuple[int, ...] = ()  # of layers that the weight packs, each of rank R; their sum is N

    @property
    def blocks(self) -> dict[str, Any]:
        """Of the plan, as the configuration names them; none without either."""
        if self.config is None or not self.adapters:
            return {}
        return dict(row_block=self.config.expand.block_m, gather_block=self.config.shrink.block_m)

    def terms(self, tensor: str) -> int:
        """How many products one element of y or a gradient sums, those of u or dS among them."""
        M, N, K, R = self.M, self.N, self.K, self.R
        return {"y": K + R, "dX": self.layers * (N + R * (len(self.widths) or 1)), "dA": M + N, "dB": M + K, "dbias": M}[tensor]

    @property
    def name(self) -> str:
        parts = [f"M{self.M} N{self.N} K{self.K} r{self.R}", str(self.dtype).removeprefix("torch.")]
        parts += [f"p={self.p}"] if self.p else []
        parts += [] if self.bias else ["no bias"]
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"adapters {str(self.adapter_dtype).removeprefix('torch.')}"] if self.adapter_dtype else []
        if self.adapters:
            parts += [f"{self.adapters} adapters {self.popularity}"] + (["mixed ranks"] if self.mixed_ranks else [])
        parts += ["base given"] if self.base else ["experts"] if self.experts else []
        parts += [f"top {self.top_k}"] if self.top_k > 1 else []
        parts += [f"{self.layers} layers of one x"] if self.layers > 1 else []
        parts += ["packed " + "+".join(map(str, self.widths))] if self.widths else []
        parts += [self.impl] if self.impl != "triton" else []
        if self.config:
            e = self.config.expand
            parts += [f"u {e.u}"] + [flag for flag in ("tma", "persistent", "pdl", "masked", "each") if getattr(e, flag)]
            parts += [f"gradients beside dX by {self.config.wgrad.beside}"] if self.config.wgrad.beside else []
            parts += ["library base"] if e.base == "library" else []
            parts += [f"K split {e.split}"] if e.split > 1 else []
        return ", ".join(parts)


def inputs(case: Case, device: torch.device) -> dict:
    """Random operands of a case, normal and scaled so that y and the gradients have values near 1."""
    generator = torch.Generator().manual_seed(case.M * 31 + case.N * 17 + case.K * 7 + case.R)

    def draw(*shape, spread=1.0, dtype=case.dtype):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype).to(device)

    adapter, N = case.adapter_dtype or case.dtype, case.N * case.layers
    stack = [case.adapters] if case.adapters else []
    each = stack if case.experts else []
    tensors = {
        "x": draw(case.M // case.top_k, case.K),
        "weight": draw(*each, N, case.K, spread=case.K**-0.5),
        "lora_A": draw(*stack, case.R * (len(case.widths) or case.layers), case.K, spread=case.K**-0.5, dtype=adapter),
        "lora_B": draw(*stack, N, case.R, spread=case.R**-0.5, dtype=adapter),
        "bias": draw(*each, N) if case.bias else None,
        "dY": draw(case.M, N, spread=case.N**-0.5),
        "base": None,
    }
    if case.base:
        tensors |= dict(weight=None, bias=None, base=draw(case.M, case.N))
    strided = [name for name in ("x", "weight", "dY", "base") if tensors[name] is not None]
    if case.layout == "transposed":
        for name in strided:
            tensors[name] = tensors[name].mT.contiguous().mT
    elif case.layout == "sliced":
        for name in strided:
            t = tensors[name]
            wide = torch.full((*t.shape[:-2], t.shape[-2] + 2, t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=device)
            tensors[name] = wide[..., 1:-1, 2:-1].copy_(t)
    if case.layout in ("transposed", "sliced") and tensors["bias"] is not None:
        t = tensors["bias"]
        tensors["bias"] = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=device)[..., 1].copy_(t)
    if case.layout == "expanded":
        tensors["dY"] = tensors["dY"][:1, :1].expand(case.M, N)
    return tensors


def adapter_ids(case: Case) -> torch.Tensor:
    """int64 ``[M]``: adapters in any order with base-only tokens and an absent one, each token another, runs, one, or none."""
    M, E = case.M, case.adapters
    generator = torch.Generator().manual_seed(M * 31 + E)
    if case.popularity == "distinct":
        return torch.arange(M) % E
    if case.popularity == "one":
        return torch.full((M,), E - 1)
    if case.popularity == "none":
        return torch.full((M,), -1)
    ids = torch.randint(-1, E, (M,), generator=generator)
    ids[ids == E // 2] = 0  # one adapter without a token
    return ids.sort(descending=True).values if case.popularity == "runs" else ids


def many(case: Case, device: torch.device) -> dict:
    """The arguments of `lora_linear` that a case with segments adds: plan, scales and ranks."""
    packed = {"widths": case.widths or None}
    if not case.adapters:
        return {"scale": case.scale, **packed}
    ids = adapter_ids(case).to(device)
    scale = case.scale / (1 + torch.arange(case.adapters, dtype=torch.float32, device=device))
    ranks = None
    if case.mixed_ranks:  # the first adapter's is the largest there may be
        ranks = torch.arange(case.adapters, dtype=torch.int32, device=device).mul_(-(case.R // 2 + 1)).add_(case.R - 1)
        ranks = ranks.remainder_(case.R).add_(1)
    plan = replace(Segments.from_ids(ids, case.adapters, **case.blocks), top_k=case.top_k)
    return {"scale": scale, "segments": plan, "ranks": ranks, **packed}


def projections(case: Case, t: dict) -> list[Projection]:
    """The layers of one x: the first has three halves of N outputs, the second half, and masks are each one's own."""
    ends = [case.N * i + case.N // 2 * (i == 1) for i in range(1, case.layers)]
    weights, Bs = t["weight"].tensor_split(ends), t["lora_B"].tensor_split(ends)
    biases = [None] * case.layers if t["bias"] is None else t["bias"].tensor_split(ends)
    parts = zip(weights, t["lora_A"].tensor_split(case.layers), Bs, biases, strict=True)
    return [Projection(*part, case.scale, case.p, SEED + i) for i, part in enumerate(parts)]


def configs(arch: Arch, *, small: bool) -> list[Config]:
    """Every way to run: sources of u, descriptors or pointers, persistent or not, library base, splits, overlapped launches.

    small: tiles of 16.
    """
    b = 16 if small else 64
    shrink, wgrad = Shrink(16, b, split=2, num_stages=2), Wgrad(b, 16 if small else 32, split=3, num_stages=2)
    base = Expand(b, b, 16 if small else 32, group_m=2, num_warps=4, num_stages=2)
    choices = [replace(base, u=u) for u in ("given", "loop", "awaited")]
    choices += [replace(base, u=u, persistent=True) for u in ("given", "loop", "awaited")]
    choices += [replace(base, base="library"), replace(base, split=3)]
    if arch.has_tma:
        choices += [replace(base, u=u, tma=True) for u in ("given", "loop", "awaited")]
        choices += [replace(base, tma=True, persistent=True)]
    if arch.has_pdl:
        choices += [replace(base, pdl=True), replace(base, pdl=True, split=3), replace(base, pdl=True, tma=True, persistent=True)]
    overlapped = [Config(shrink, e, replace(wgrad, beside="pdl")) for e in choices if e.pdl]
    return [Config(shrink, e, wgrad) for e in choices] + overlapped + [Config(shrink, base, replace(wgrad, beside="stream"))]


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The parity cases of this device: small ones for the interpreter, large ones and bfloat16 for a GPU."""
    arch, why_no_kernels = arch_of(device)
    if arch is None:
        raise UnsupportedError(f"device: wanted one that runs the kernels, got {device}: {why_no_kernels}")
    small = arch.kind == "interpreter"
    dtypes = (torch.float32, torch.float16) if small else (torch.bfloat16, torch.float16, torch.float32)
    even, odd = Case(256, 512, 768, 16), Case(201, 333, 517, 12)
    if small or quick:
        even, odd = (Case(32, 48, 64, 16), Case(19, 37, 50, 5)) if small else (Case(192, 256, 192, 16), Case(137, 205, 197, 12))
    odd, ways = replace(odd, dtype=dtypes[0]), configs(arch, small=small)
    found = []
    for kind in (_one_adapter, _many_adapters, _base_given, _layers_of_one_x, _packed, _experts):
        found += kind(even, odd, dtypes, ways, quick)
    return [case for case in dict.fromkeys(found) if _served(case, arch)]


def _one_adapter(even: Case, odd: Case, dtypes: Dtypes, ways: list[Config], quick: bool) -> list[Case]:
    found = []
    for config in ways:
        for dtype in dtypes[:1] if quick else dtypes:
            for shape in (even,) if config.expand.tma else (even, odd):
                found += [replace(shape, config=config, dtype=dtype, p=p) for p in ((0.1,) if quick else (0.0, 0.1))]
    found += [replace(odd, layout=layout) for layout in LAYOUTS]
    found += [replace(odd, dtype=torch.float16, adapter_dtype=torch.float32), replace(even, R=100, bias=False)]
    found += [replace(odd, dtype=torch.float32, M=1)]
    return found + [replace(odd, dtype=dtype, p=p, impl="torch") for dtype in (*dtypes, torch.bfloat16) for p in (0.0, 0.1)]


def _for_segments(ways: list[Config]) -> tuple[list[Config], list[Config]]:
    """The ways that serve segments alone: masked, and each."""
    masked = [replace(c, expand=replace(c.expand, masked=True)) for c in ways if not (c.expand.persistent or c.wgrad.beside)]
    each = [replace(c, expand=replace(c.expand, each=True, num_warps=8)) for c in ways if c.expand.u == "given" and c.wgrad.beside == ""]
    return masked, each


def _many_adapters(even: Case, odd: Case, dtypes: Dtypes, ways: list[Config], quick: bool) -> list[Case]:
    found = []
    masked, each = _for_segments(ways)
    for config in ways + masked + each:
        mixed = replace(odd if not config.expand.tma else even, config=config, adapters=5, dtype=dtypes[0], p=0.1, mixed_ranks=True)
        found += [mixed] if quick else [mixed, replace(mixed, dtype=dtypes[1], p=0.0, mixed_ranks=False, popularity="runs")]
    for popularity in ("mixed", "distinct", "runs", "one", "none"):
        found += [replace(odd, adapters=7, popularity=popularity, p=0.1, impl=impl) for impl in ("triton", "torch")]
    return found


def _base_given(even: Case, odd: Case, dtypes: Dtypes, ways: list[Config], quick: bool) -> list[Case]:
    given = replace(odd, p=0.1, base=True)
    found = [given, replace(given, adapters=7, mixed_ranks=True)]
    if not quick:
        found += [replace(given, p=0.0, layout="sliced"), replace(given, M=2 * odd.M, adapters=7, mixed_ranks=True)]
        found += [replace(given, impl="torch"), replace(given, p=0.0, impl="torch")]
    return found


def _layers_of_one_x(even: Case, odd: Case, dtypes: Dtypes, ways: list[Config], quick: bool) -> list[Case]:
    shared = replace(odd, layers=3)
    found = [shared, replace(shared, p=0.1), *(replace(shared, layers=2, config=config) for config in ways if not config.expand.tma)]
    if not quick:
        found += [replace(shared, dtype=dtype, p=p, impl="torch") for dtype in (*dtypes, torch.bfloat16) for p in (0.0, 0.1)]
        found += [replace(shared, p=0.1, layout=layout) for layout in LAYOUTS]
        found += [replace(even, layers=2, config=config) for config in ways if config.expand.tma or config.expand.base == "library"]
    return found


def _packed(even: Case, odd: Case, dtypes: Dtypes, ways: list[Config], quick: bool) -> list[Case]:
    one = replace(odd, widths=(odd.N - odd.N // 2 - 1, 1, odd.N // 2))
    tenants = replace(one, p=0.1, adapters=7, mixed_ranks=True)
    masked, each = _for_segments(ways)
    found = [one, tenants, *(replace(tenants, config=config) for config in (masked[0], *each)[: 2 if quick else None])]
    if not quick:
        found += [replace(one, p=0.1, config=config) for config in ways if not config.expand.tma]
        found += [replace(tenants, impl="torch", popularity="runs"), replace(tenants, dtype=torch.float16, adapter_dtype=torch.float32)]
        widths = (2 * even.N // 3, even.N // 3) if even.N % 3 == 0 else (even.N // 2, even.N // 4, even.N // 4)
        for case in (one, tenants):
            found += [replace(case, impl="torch", dtype=dtype) for dtype in (*dtypes, torch.bfloat16)]
            found += [replace(case, R=100, M=2 * odd.M), *(replace(case, layout=layout) for layout in LAYOUTS)]
            found += [replace(case, base=True, impl=impl) for impl in ("triton", "torch")]
            wide = replace(case, M=even.M, N=even.N, K=even.K, widths=widths)
            found += [replace(wide, config=config) for config in ways if config.expand.tma]
    return found


def _experts(even: Case, odd: Case, dtypes: Dtypes, ways: list[Config], quick: bool) -> list[Case]:
    routed = replace(odd, p=0.1, adapters=7, experts=True, mixed_ranks=True)
    plain = ways[0]  # with shrink's tiles as expand's, both being the plan's gathered ones
    found = [routed, replace(routed, config=replace(plain, shrink=replace(plain.shrink, block_m=plain.expand.block_m, num_stages=1)))]
    if not quick:
        found += [replace(routed, p=0.0, mixed_ranks=False, dtype=dtype, popularity="runs", bias=False) for dtype in dtypes]
        found += [replace(routed, layout=layout) for layout in LAYOUTS]
        found += [replace(routed, impl="torch"), replace(routed, p=0.0, impl="torch", popularity="runs")]
        found += [replace(routed, M=3 * odd.M, top_k=3, impl=impl) for impl in ("triton", "torch")]
        found += [replace(routed, M=2 * odd.M, R=100), replace(routed, popularity="none")]
    return found


def _served(case: Case, arch: Arch) -> bool:
    """Whether the case's explicit configuration is valid for both passes; nothing else is left out."""
    if case.config is None:
        return True
    aligned = case.K % 8 == 0 and case.N % 8 == 0
    forward = Problem(
        case.M, case.N, case.K, case.R * (len(case.widths) or 1), case.dtype, "x" if case.p else "", aligned=aligned,
        adapters=case.adapters, experts=case.experts, packed="n" if case.widths else "",
        layers=len(case.widths) or 1, **case.blocks,
    )  # fmt: skip
    return all(why_not_here(case.config, each, arch) is None for each in (forward, forward.backward()))

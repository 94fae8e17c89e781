"""Parity of every kernel with the reference on this machine: the cases, the error budget, and one table's worth of results.

    |ours - truth| <= 2 |torch in the same dtype - truth| + (eps + sqrt(n) eps32) |truth|

for y and every gradient, in the maximum and the root mean square; eps |truth| is two roundings, of u and of the result,
half a unit in the last place each, and sqrt(n) eps32 |truth| a float32 sum of n terms in any order. Truth is the textbook
formula in float64 from the same inputs, so nothing here is tuned to pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import philox, problem, reference
from .autograd import lora_linear
from .dispatch import arch_of, why_not_here
from .projections import Projection, lora_linears
from .segments import Segments, by_library
from .tuning import Arch, Config, Expand, Shrink, Wgrad

TENSORS = ("y", "dX", "dA", "dB", "dbias")
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
    layout: str = "contiguous"  # or "transposed", "sliced", "expanded" (dY of stride 0)
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


@dataclass(frozen=True)
class Result:
    """``ratio``: the worst error over what the budget allows; ok if at most 1. ``launches``: kernels that ran."""

    name: str
    ok: bool
    ratio: float
    detail: str
    launches: int = 0
    errors: dict[str, float] = field(default_factory=dict)


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


def evaluate(case: Case, tensors: dict, impl: str, dtype: torch.dtype | None = None) -> list:
    """y, dX, dA, dB, dbias (or dbase) of a case by an impl; in ``dtype`` if given, on copies of the same values."""
    t: dict = {name: None if v is None else v.detach() if dtype is None else v.to(dtype) for name, v in tensors.items()}
    trained = ("x", "lora_A", "lora_B", "base") if case.experts else ("x", "lora_A", "lora_B", "bias", "base")
    names = [name for name in trained if t[name] is not None]
    for name in names:
        t[name] = t[name].requires_grad_()
    how: dict[str, Any] = dict(training=True, impl=impl, config=case.config if impl == "triton" else None)
    if case.layers > 1:
        y = torch.cat(lora_linears(t["x"], projections(case, t), **how), -1)
    else:
        y = lora_linear(
            t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"],
            **many(case, t["x"].device), base=t["base"], dropout_p=case.p, seed=SEED, **how,
        )  # fmt: skip
    grads = torch.autograd.grad(y, [t[name] for name in names], t["dY"].view_as(y) if case.top_k > 1 else t["dY"])
    return [y.detach(), *grads] + [None] * (5 - 1 - len(grads))


def errors(ours: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(maximum, root mean square) of ours - truth in float64; NaN counts as infinite."""
    gap = (ours.double() - truth).abs().nan_to_num(nan=float("inf"))
    return (gap.max().item(), gap.square().mean().sqrt().item()) if gap.numel() else (0.0, 0.0)


def budget_used(
    ours: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, rounded: torch.dtype | None = None, terms: int = 0
) -> float:
    """The error over the allowed error, the larger of maximum and root mean square; at most 1 passes.

    ``rounded``: the dtype of the two roundings, where it is not that of ``ours`` (float32 gradients of a 16-bit product).
    ``terms``: How many products a result sums in float32, one after the other at worst; n roundings of random sign grow as their root
    (Higham and Mary 2019, SIAM J. Sci. Comput. 41, A2815).
    """
    band = torch.finfo(rounded or ours.dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
    size = (truth.abs().max().item(), truth.square().mean().sqrt().item()) if truth.numel() else (0.0, 0.0)
    used = 0.0
    for error, allowed, scale in zip(errors(ours, truth), errors(same_dtype, truth), size, strict=True):
        limit = 2 * allowed + band * scale
        used = max(used, error / limit if limit else (0.0 if error == 0 else float("inf")))
    return used


def run_case(case: Case, device: torch.device) -> Result:
    """Compare one case with the reference; ``ok`` also needs that kernels ran, where the case names them."""
    tensors = inputs(case, device)
    truth = evaluate(case, tensors, "reference", torch.float64)
    same = evaluate(case, tensors, "reference")
    before = launched_so_far()
    with poisoned_empty():
        ours = evaluate(case, tensors, case.impl)
    launched = launched_so_far() - before
    used = {}
    last = "base" if case.base else "bias"
    for name, o, s, t, like in zip(TENSORS, ours, same, truth, (None, "x", "lora_A", "lora_B", last), strict=True):
        if o is None:
            continue
        if like and (o.dtype != tensors[like].dtype or o.shape != tensors[like].shape):
            return Result(case.name, False, float("inf"), f"{name}: wanted the parameter's dtype and shape, got {o.dtype} {list(o.shape)}")
        used[name] = budget_used(o, s, t, case.dtype, case.terms(name))
    worst = max(used, key=lambda name: used[name])
    ran = launched > 0 or case.impl != "triton"
    detail = f"{worst} uses {used[worst]:.2f} of its budget" if ran else "no kernel was launched"
    return Result(case.name, ran and used[worst] <= 1.0, used[worst], detail, launched, used)


def launched_so_far() -> int:
    """Kernels launched by this process; none while nothing has asked for Triton."""
    module = sys.modules.get(f"{__package__}.launch")
    return module.launches if module else 0


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, torch.empty is filled with NaN: an element that no kernel wrote shows as NaN."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


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
        raise problem.UnsupportedError(f"device: wanted one that runs the kernels, got {device}: {why_no_kernels}")
    small = arch.kind == "interpreter"
    dtypes = (torch.float32, torch.float16) if small else (torch.bfloat16, torch.float16, torch.float32)
    even, odd = Case(256, 512, 768, 16), Case(201, 333, 517, 12)
    if small or quick:
        even, odd = (Case(32, 48, 64, 16), Case(19, 37, 50, 5)) if small else (Case(192, 256, 192, 16), Case(137, 205, 197, 12))
    found = []
    for config in configs(arch, small=small):
        for dtype in dtypes[:1] if quick else dtypes:
            for shape in (even,) if config.expand.tma else (even, odd):
                found += [replace(shape, config=config, dtype=dtype, p=p) for p in ((0.1,) if quick else (0.0, 0.1))]
    found += [replace(odd, dtype=dtypes[0], layout=layout) for layout in ("transposed", "sliced", "expanded")]
    ways = configs(arch, small=small)
    masked = [replace(c, expand=replace(c.expand, masked=True)) for c in ways if not (c.expand.persistent or c.wgrad.beside)]
    each = [replace(c, expand=replace(c.expand, each=True, num_warps=8)) for c in ways if c.expand.u == "given" and c.wgrad.beside == ""]
    for config in ways + masked + each:
        base = replace(odd if not config.expand.tma else even, config=config, adapters=5)
        found += [
            replace(base, dtype=dtypes[0], p=0.1, mixed_ranks=True),
            *([] if quick else [replace(base, dtype=dtypes[1], popularity="runs")]),
        ]
    for popularity in ("mixed", "distinct", "runs", "one", "none"):
        found += [replace(odd, dtype=dtypes[0], adapters=7, popularity=popularity, p=0.1, impl=impl) for impl in ("triton", "torch")]
    given = replace(odd, dtype=dtypes[0], p=0.1, base=True)
    found += [given, replace(given, adapters=7, mixed_ranks=True)]
    shared = replace(odd, dtype=dtypes[0], layers=3)
    found += [shared, replace(shared, p=0.1), *(replace(shared, layers=2, config=config) for config in ways if not config.expand.tma)]
    packed = replace(odd, dtype=dtypes[0], widths=(odd.N - odd.N // 2 - 1, 1, odd.N // 2))
    tenants = replace(packed, p=0.1, adapters=7, mixed_ranks=True)
    found += [packed, tenants, *(replace(packed, p=0.1, config=config) for config in ways if not config.expand.tma and not quick)]
    found += [replace(tenants, config=config) for config in (masked[0], *each)[: 2 if quick else None]]
    routed = replace(odd, dtype=dtypes[0], p=0.1, adapters=7, experts=True, mixed_ranks=True)
    plain = ways[0]  # with shrink's tiles as expand's, both being the plan's gathered ones
    found += [routed, replace(routed, config=replace(plain, shrink=replace(plain.shrink, block_m=plain.expand.block_m, num_stages=1)))]
    if not quick:
        found += [replace(routed, p=0.0, mixed_ranks=False, dtype=dtype, popularity="runs", bias=False) for dtype in dtypes]
        found += [replace(routed, layout=layout) for layout in ("transposed", "sliced", "expanded")]
        found += [replace(routed, impl="torch"), replace(routed, p=0.0, impl="torch", popularity="runs")]
        found += [replace(routed, M=3 * odd.M, top_k=3, impl=impl) for impl in ("triton", "torch")]
        found += [replace(routed, M=2 * odd.M, R=100), replace(routed, popularity="none")]
        found += [replace(given, p=0.0, layout="sliced"), replace(given, M=2 * odd.M, adapters=7, mixed_ranks=True)]
        found += [replace(given, impl="torch"), replace(given, p=0.0, impl="torch")]
        found += [replace(shared, dtype=dtype, p=p, impl="torch") for dtype in (*dtypes, torch.bfloat16) for p in (0.0, 0.1)]
        found += [replace(shared, p=0.1, layout=layout) for layout in ("transposed", "sliced", "expanded")]
        found += [replace(even, layers=2, config=config) for config in ways if config.expand.tma or config.expand.base == "library"]
        found += [replace(each, impl="torch", dtype=dtype) for each in (packed, tenants) for dtype in (*dtypes, torch.bfloat16)]
        found += [replace(each, R=100, M=2 * odd.M) for each in (packed, tenants)] + [replace(tenants, impl="torch", popularity="runs")]
        found += [replace(each, layout=layout) for each in (packed, tenants) for layout in ("transposed", "sliced", "expanded")]
        found += [replace(each, base=True, impl=impl) for each in (packed, tenants) for impl in ("triton", "torch")]
        thirds = (2 * even.N // 3, even.N // 3) if small else (even.N // 2, even.N // 4, even.N // 4)
        wide = [replace(each, M=even.M, N=even.N, K=even.K, widths=thirds) for each in (packed, tenants)]
        found += [replace(each, config=config) for each in wide for config in ways if config.expand.tma]
        found += [replace(tenants, dtype=torch.float16, adapter_dtype=torch.float32)]
    found += [replace(odd, dtype=torch.float16, adapter_dtype=torch.float32), replace(even, R=100, bias=False), replace(odd, M=1)]
    found += [replace(odd, dtype=dtype, p=p, impl="torch") for dtype in (*dtypes, torch.bfloat16) for p in (0.0, 0.1)]
    return [case for case in dict.fromkeys(found) if _served(case, arch)]


def _served(case: Case, arch: Arch) -> bool:
    """Whether the case's explicit configuration is valid for both passes; nothing else is left out."""
    if case.config is None:
        return True
    aligned = case.K % 8 == 0 and case.N % 8 == 0
    forward = problem.Problem(
        case.M, case.N, case.K, case.R * (len(case.widths) or 1), case.dtype, "x" if case.p else "", aligned=aligned,
        adapters=case.adapters, experts=case.experts, packed="n" if case.widths else "",
        layers=len(case.widths) or 1, **case.blocks,
    )  # fmt: skip
    return all(why_not_here(case.config, each, arch) is None for each in (forward, forward.backward()))


def run_all(device: torch.device, progress: Callable[[int, int, str], None] | None = None, quick: bool = False) -> list[Result]:
    """Every case of `cases`, the reference's dropout mask against the kernels', and the plan of two launches against the library's."""
    found, results = cases(device, quick), []
    for done, case in enumerate(found):
        if progress:
            progress(done, len(found), case.name)
        results.append(run_case(case, device))
    return [*results, mask_result(device), plan_result(device)]


def plan_result(device: torch.device, M: int = 301, E: int = 40) -> Result:
    """`launch_plan.plan` against `segments.by_library`, adapters absent, repeated and out of range among the ids: exact equality."""
    from . import launch_plan

    ids = (torch.arange(M, device=device) * 7919 % (E + 9)) - 4
    before = launched_so_far()
    wrong = 0
    for blocks in ((16, 32), (128, 16)):
        found, wanted = launch_plan.plan(ids, E, *blocks), by_library(ids, E, *blocks)
        wrong += sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))
    launched = launched_so_far() - before
    return Result("plan, exact", wrong == 0 and launched == 4, float(wrong), f"{wrong} elements differ", launched)


def mask_result(device: torch.device, M: int = 37, K: int = 75, p: float = 0.3) -> Result:
    """The kernels' dropout mask, read out through an identity adapter, against `philox.keep_mask`: exact equality."""
    seed = torch.tensor(SEED, device=device)
    x, A = torch.ones(M, K, device=device), torch.eye(K, device=device)
    before = launched_so_far()
    y = lora_linear(x, A.new_zeros(K, K), A, A, dropout_p=p, training=True, seed=seed, impl="triton")
    keep = philox.keep_mask(seed, M, K, p)
    wrong = int((y.bool() != keep).sum())
    value = reference.dropout(x, p, seed)
    close = torch.allclose(y, value, rtol=1e-6 if y.device.type == "cpu" else 1e-3)
    ok = wrong == 0 and close and launched_so_far() > before
    return Result("dropout mask, exact", ok, float(wrong), f"{wrong} of {M * K} elements differ", launched_so_far() - before)

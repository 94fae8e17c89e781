"""Parity of every kernel with the reference on this machine: the error budget, and one table's worth of results.

    |ours - truth| <= 2 |torch in the same dtype - truth| + (eps + sqrt(n) eps32) |truth|

for y and every gradient, in the maximum and the root mean square; eps |truth| is two roundings, of u and of the result,
half a unit in the last place each, and sqrt(n) eps32 |truth| a float32 sum of n terms in any order. Truth is the textbook
formula in float64 from the same inputs, so nothing here is tuned to pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import philox, reference
from .autograd import lora_linear
from .parity_cases import SEED, Case, cases, inputs, many, projections
from .projections import lora_linears
from .segments import by_library

TENSORS = ("y", "dX", "dA", "dB", "dbias")


@dataclass(frozen=True)
class Result:
    """``ratio``: the worst error over what the budget allows; ok if at most 1. ``launches``: kernels that ran."""

    name: str
    ok: bool
    ratio: float
    detail: str
    launches: int = 0
    errors: dict[str, float] = field(default_factory=dict)


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
    return [y.detach(), *grads] + [None] * (4 - len(grads))


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


def run_all(device: torch.device, progress: Callable[[int, int, str], None] | None = None, quick: bool = False) -> list[Result]:
    """Every case of `cases`, the reference's dropout mask against the kernels', the plan of two launches against the library's, and what
    stands beside the products: DoRA's magnitude, gates, and sums of experts."""
    found, results = cases(device, quick), []
    for done, case in enumerate(found):
        if progress:
            progress(done, len(found), case.name)
        results.append(run_case(case, device))
    return [*results, mask_result(device), plan_result(device), columns_result(device), gate_result(device)]


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


def columns_result(device: torch.device, M: int = 301, N: int = 300) -> Result:
    """`launch_columns.backward`: dt, one rounded product, exactly; dg, a float32 sum of M products, against float64."""
    from . import launch_columns

    before = launched_so_far()
    (dy, t), g = torch.randn(2, M, N, device=device).half(), torch.rand(N, device=device)
    dt, dg = launch_columns.backward(dy, t, g, True)
    assert dt is not None and dg is not None
    terms = dy.double() * t.double()
    used = budget_used(dg, (dy.float() * t.float()).sum(0), terms.sum(0), terms=M)
    exact, launched = torch.equal(dt, (dy.float() * g).half()), launched_so_far() - before
    detail = f"dg uses {used:.2f} of its budget" if exact else "dt is not dY g, rounded once"
    return Result("DoRA's magnitude, backward", exact and used <= 1.0 and launched == 1, used, detail, launched)


def gate_result(device: torch.device, tokens: int = 21, F: int = 75, top_k: int = 2) -> Result:
    """`launch_gate`'s results for SiLU, of halves of one tensor and with factors, against float64, within the budget."""
    from . import launch_gate

    before = launched_so_far()
    rows, weights, found = tokens * top_k, torch.rand(tokens, top_k, device=device), []
    both, da, y = (torch.randn(rows, width, device=device).half() for width in (2 * F, F, F))
    for dtype in (torch.float16, torch.float64):
        leaf, factors = both.to(dtype).requires_grad_(), weights.to(torch.promote_types(dtype, torch.float32))
        gate, up = leaf.chunk(2, -1)
        a = torch.nn.functional.silu(gate) * up
        scaled, its_da = ((t * factors.view(-1, 1)).to(dtype) for t in (a.detach(), da.to(dtype)))
        dots = (a.detach().to(factors.dtype) * da).sum(-1)
        z = (y.to(dtype).view(tokens, top_k, F) * factors[..., None]).sum(1).to(dtype)
        found.append([scaled, *torch.autograd.grad(a, leaf, its_da), dots, z])
    (gate, up), made = both.chunk(2, -1), torch.empty_like(both)
    ours = [launch_gate.product("silu", gate, up, weights), made]
    ours += [launch_gate.gradients("silu", gate, up, da, weights, made.chunk(2, -1))[2], launch_gate.weighted_sum(y, weights, y.dtype)]
    used = max(budget_used(mine, theirs, exact, terms=F) for mine, theirs, exact in zip(ours, *found, strict=True))
    launched = launched_so_far() - before
    return Result("gates, and sums of experts", used <= 1.0 and launched == 3, used, f"uses {used:.2f} of its budget", launched)


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

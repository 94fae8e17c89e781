"""One kernel at a point: its launch by a configuration, what it has to compute, and the least it has to do.

    shrink   U = scale (D.x) A^T      dS = scale dY B
    expand   Y = x W^T + U B^T        dX = dY W + D.(dS A)
    wgrad    dA = dS^T (D.x) and dB = dY^T U, which one configuration serves

For few tokens expand is the pass up to Y or dX, for where u comes from decides whether a shrink is launched before it. With many
adapters A and B are stacks, and so are dA and dB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lora_kernels import philox
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, Config

from . import precompile, variants
from .candidates import FEW_TOKENS
from .workloads import Operands, Point

SEED = 20
SAMPLED = 512  # rows of expand's result that are compared; the others must be finite


@dataclass(frozen=True)
class Call:
    """``kernel``: "shrink", "expand" or "wgrad"; ``what``: the pass it belongs to."""

    kernel: str
    what: str

    def problem(self, o: Operands) -> Problem:
        return variants.problems(o)[self.what == "backward"]

    def work(self, point: Point) -> tuple[float, float]:
        """(operations, least bytes moved)."""
        M, K, N = point.M, point.K, point.N
        into, out = (K, N) if self.what == "forward" else (N, K)
        u, used, loaded = point.low_rank
        operations, elements = {
            "shrink": (2 * into * u, M * into + used * into + u),
            "expand": (2 * (M * N * K + out * u), M * into + N * K + M * out + used * out + u),
            "shrink and expand": (2 * (M * N * K + (K + N) * u), M * into + N * K + M * out + used * (K + N)),
            "wgrad": (2 * u * (K + N), M * (K + N) + 2 * u + loaded * (K + N)),
        }["shrink and expand" if self.kernel == "expand" and few(point) else self.kernel]
        return operations, elements * point.dtype.itemsize


TRAINING = (
    Call("shrink", "forward"),
    Call("expand", "forward"),
    Call("shrink", "backward"),
    Call("expand", "backward"),
    Call("wgrad", "backward"),
)
DECODE = TRAINING[:2]


def few(point: Point) -> bool:
    return point.M <= FEW_TOKENS


def calls(point: Point) -> tuple[Call, ...]:
    return DECODE if point.forward_alone else TRAINING


@dataclass
class Inputs:
    """A point's operands without gradients, and what earlier kernels leave: u and ds ``[M, r]``; seed: None without dropout.

    kept: The layouts of each call, as an arm keeps them.
    """

    point: Point
    o: Operands
    seed: torch.Tensor | None
    u: torch.Tensor
    ds: torch.Tensor
    kept: dict = field(default_factory=dict)

    @property
    def drop(self):
        return None if self.seed is None else (self.seed, self.point.p)


def inputs(point: Point, o: Operands) -> Inputs:
    """From operands with values."""
    o = _detached(o)
    seed = torch.tensor(SEED, device=o.x.device) if point.p else None
    given = Inputs(point, o, seed, o.x.new_empty(0), o.x.new_empty(0))
    given.u, given.ds = _u(given, o.x.dtype), _ds(given, o.x.dtype)
    return given


def standing(point: Point) -> Inputs:
    """Without storage, for compilation."""
    o = _detached(precompile.standing(point))
    seed = torch.zeros((), dtype=torch.int64, device="meta") if point.p else None
    return Inputs(point, o, seed, o.x.new_empty(point.M, point.r), o.x.new_empty(point.M, point.r))


def _detached(o: Operands) -> Operands:
    return dataclasses.replace(o, x=o.x.detach(), lora_A=o.lora_A.detach(), lora_B=o.lora_B.detach())


def launched(call: Call, i: Inputs, config: Config) -> tuple[torch.Tensor, ...]:
    """Launches the kernel, as `launch.forward` and `launch.backward` do, and returns its results."""
    from lora_kernels import launch

    o = i.o
    shared = dict(adapters=o.adapters, config=config, kept=i.kept.setdefault((call, config), {}))
    if call.kernel == "wgrad":
        da = launch.run_wgrad(o.x, i.ds, scale=1.0, dropout=i.drop, out_transposed=True, dtype=o.lora_A.dtype, **shared)
        return da, launch.run_wgrad(o.dy, i.u, scale=1.0, dropout=None, out_transposed=False, dtype=o.lora_B.dtype, **shared)
    if call.kernel == "shrink" and call.what == "forward":
        parts = launch.in_parts(not i.point.forward_alone, o.adapters, config)
        return (launch.run_shrink(o.x, o.lora_A.mT, scale=o.scale, dropout=i.drop, dtype=o.x.dtype, parts=parts, **shared),)
    if call.kernel == "shrink":
        return (launch.run_shrink(o.dy, o.lora_B, scale=o.scale, dropout=None, dtype=o.x.dtype, **shared),)
    if few(i.point):
        return (_pass(call, i, config),)
    library = config.expand.base == "library"
    if call.what == "forward":
        y = F.linear(o.x, o.weight) if library else None
        return (launch.run_expand(o.x, o.weight, o.lora_B, transposed=True, u=i.u, base=y, out=y, **shared)[0],)
    dx = torch.mm(o.dy, o.weight) if library else None
    return (launch.run_expand(o.dy, o.weight, o.lora_A, transposed=False, u=i.ds, base=dx, out=dx, drop_uv=i.drop, **shared)[0],)


def _pass(call: Call, i: Inputs, config: Config) -> torch.Tensor:
    """Y, or dX alone."""
    from lora_kernels import launch

    o, p, kept = i.o, i.point.p, i.kept.setdefault((call, config), {})
    if call.what == "forward":
        keep = not i.point.forward_alone
        return launch.forward(o.x, o.weight, o.lora_A, o.lora_B, None, i.seed, o.adapters, o.scale, p, keep, config, kept=kept)[0]
    needs = (True, False, False)
    operands = (o.dy, o.x, o.weight, o.lora_A, o.lora_B, i.u, i.seed, o.adapters)
    return launch.backward(*operands, o.scale, p, needs, o.lora_A.dtype, config, kept=kept)[0]


def comparable(call: Call, results: tuple[torch.Tensor, ...], i: Inputs, rows: torch.Tensor | None) -> list[torch.Tensor]:
    """The results as `expected` gives them: partial sums of shrink added, expand's rows picked."""
    if call.kernel == "shrink":
        return [t.sum(0).to(i.o.x.dtype) if t.dim() == 3 else t for t in results]
    return [t if rows is None else t[rows] for t in results]


def sampled_rows(call: Call, point: Point, device: torch.device) -> torch.Tensor | None:
    """The rows to compare, all (None) where they are few: every tile of 64 rows or more has some."""
    if call.kernel != "expand" or point.M <= SAMPLED:
        return None
    generator = torch.Generator().manual_seed(point.M)
    starts = torch.arange(0, point.M, point.M // SAMPLED)
    return (starts + torch.randint(point.M // SAMPLED, starts.shape, generator=generator)).clamp_max(point.M - 1).to(device)


def expected(call: Call, i: Inputs, dtype: torch.dtype, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The kernel's results by the textbook formula in ``dtype``, each product rounded to it."""
    o = i.o
    if call.kernel == "shrink":
        return [_u(i, dtype) if call.what == "forward" else _ds(i, dtype)]
    if call.kernel == "wgrad":
        return [_gradient(i, _ds(i, dtype), _dropped(o.x.to(dtype), i)), _gradient(i, o.dy.to(dtype), _u(i, dtype))]
    at = slice(None) if rows is None else rows
    if call.what == "forward":
        return [F.linear(o.x[at].to(dtype), o.weight.to(dtype)) + _through(i, _u(i, dtype), o.lora_B.mT, at)]
    return [o.dy[at].to(dtype) @ o.weight.to(dtype) + _dropped(_through(i, _ds(i, dtype), o.lora_A, at), i, at)]


def _u(i: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return _through(i, _dropped(i.o.x.to(dtype), i), i.o.lora_A.mT) * i.o.scale


def _ds(i: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return _through(i, i.o.dy.to(dtype), i.o.lora_B) * i.o.scale


def _through(i: Inputs, t: torch.Tensor, matrix: torch.Tensor, rows=slice(None)) -> torch.Tensor:
    """These rows of ``t`` times the matrix, or each times its adapter's of a stack: zeros where it has none."""
    t = t[rows]
    if i.o.adapters.segments is None:
        return t @ matrix.to(t.dtype)
    out = t.new_zeros(t.shape[0], matrix.shape[-1])
    for e, at in _by_adapter(i.o.adapters.segments.ids[rows]):
        out[at] = t[at] @ matrix[e].to(t.dtype)
    return out


def _gradient(i: Inputs, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``s^T t``, or the stack of them over each adapter's tokens: zeros where it has none."""
    segments = i.o.adapters.segments
    if segments is None:
        return s.t() @ t
    out = s.new_zeros(segments.num_adapters, s.shape[1], t.shape[1])
    for e, at in _by_adapter(segments.ids):
        out[e] = s[at].t() @ t[at]
    return out


def _by_adapter(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each adapter that occurs, and the places of its tokens."""
    for e in ids.unique().tolist():
        if e >= 0:
            yield e, (ids == e).nonzero().squeeze(1)


def _dropped(t: torch.Tensor, i: Inputs, rows=slice(None)) -> torch.Tensor:
    """``t [M, K]``, or these rows of it, times the mask of x and 1 / (1 - p)."""
    if i.seed is None:
        return t
    keep = philox.keep_mask(i.seed, i.point.M, i.point.K, i.point.p)[rows]
    return torch.where(keep, t * philox.inv_keep(i.point.p), t.new_zeros(()))


@dataclass(frozen=True)
class KernelJob:
    """The launches of one call by one configuration, for `precompile`."""

    point: Point
    call: Call
    config: Config

    def launch(self, arch: Arch) -> None:
        launched(self.call, standing(self.point), self.config)

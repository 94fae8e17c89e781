"""Tensors + Config -> ``kernel[grid]``: the only place that launches.

    forward    U = shrink(x, A), Y = expand(x, W^T, U, B^T)          or one launch, with u in the loop or awaited
    backward   dS = shrink(dY, B^T), dX = expand(dY, W, dS, A), dA = wgrad(x, dS), dB = wgrad(dY, U)
    add_parts  behind shrink, unless expand adds the parts itself, and behind both wgrads, where their long axis was split

Inside the kernels letters are GEMM roles, so a transposition here is a pair of strides in the other order. With segments adapters
are stacks, ``[E, r, K]`` and ``[E, N, r]``, and each kernel takes its part of the plan. Tokens ``[M, K]`` may have any strides, or be
``[..., K]``, contiguous; what is made of them is ``[..., N]`` then, for a view of either costs more than to work out its strides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launcher, layouts, philox
from .kernels.expand import expand
from .kernels.parts import add_parts
from .kernels.shrink import shrink
from .kernels.wgrad import wgrad
from .layouts import Options, cdiv
from .operands import aligned, as_matrix, many, matrix, tokens
from .packed import cut
from .segments import ONE, Adapters
from .streams import beside, fork, on_device, sm_count
from .tuning import MERGE, Config

_launch: Callable = launcher.launch
_merges: dict = {}  # the layouts of `merge`, which no arm keeps: a few for a model
launches: int = 0  # kernels launched by this process: what a test asserts to know that a kernel ran, not its fallback


@contextlib.contextmanager
def intercept(function: Callable):
    """Hand every launch to ``function(kernel, grid, args, options)`` instead: what compile_only and tests record."""
    global _launch
    before, _launch = _launch, function
    try:
        yield
    finally:
        _launch = before


def run_kernel(kernel, grid, args, options: Options) -> None:
    global launches
    launches += 1
    _launch(kernel, grid, args, options)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which knows no programmatic dependent launch."""
    return triton.knobs.runtime.interpret


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input precision: float32 products follow torch's own switch, so that they are TF32 only where torch's are."""
    if dtype != torch.float32:
        return "ieee"
    # From torch 2.9 on it has this name, under which either way of setting it shows; `get_float32_matmul_precision` then fails, or lags.
    switch = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return "tf32" if (torch.get_float32_matmul_precision() != "highest" if switch is None else switch == "tf32") else "ieee"


def known(kept: dict | None, name: Any, work_out: Callable[[], Any]) -> Any:
    """A layout by its name, worked out where none is kept."""
    if kept is None:
        return work_out()
    if name not in kept:
        kept[name] = work_out()
    return kept[name]


def among(kept: dict | None, *alike) -> dict | None:
    """Those of kept layouts that belong to calls which are alike in this, too."""
    return None if kept is None else kept.setdefault(alike, {})


def run_shrink(
    x, a, *,
    transposed=False, scale: float, adapters: Adapters = ONE, dropout, config: Config, dtype: torch.dtype, parts: bool = False, out=None,
    widths=(), kept: dict | None = None,
):  # fmt: skip
    """``scale * (D.x) a`` as ``[M, R]`` in ``dtype``. x: ``[M, K]``, a: ``[(E,) K, R]``, or the other way round if transposed, any strides.

    dropout: None or (seed, p). kept: The layouts of a pass that looks like this one, by their names (`dispatch`).

    Where the plan has k times as many tokens, each row of x stands for k.

    parts: Return float32 ``[splits, M, R]``, not yet added, where K was split. out: ``[M, R]`` to write to, by its strides. widths: Of L
    packed layers whose columns x's are: ``[M, L R]`` then, each layer's from its own.
    """
    s = known(kept, "shrink", lambda: layouts.shrink(
        config, matrix(x), matrix(a), transposed, matrix(out), dtype, widths, many(adapters), dropout is not None, precision(x.dtype),
        _alone(config),
    ))  # fmt: skip
    z = out if s.shape is None else x.new_empty(s.shape, dtype=s.dtype)
    seed, threshold, inv_keep = dropout_args(dropout)
    args = (
        (x, *s.x), (a, *s.a), (z, *s.z), s.stride_split,
        adapters.gather(), adapters.number, s.stride_ae, adapters.scales, adapters.ranks,
        seed, threshold, scale * inv_keep, *s.sizes,
    )  # fmt: skip
    run_kernel(shrink, s.grid, args, s.options)
    if s.shape is None:
        return out
    if s.splits > 1:
        z = z[:, : s.M]
        if parts:
            return z
        whole = x.new_empty(s.M, z.shape[2], dtype=dtype) if out is None or not out.is_contiguous() else out
        add_up((z, whole), kept=kept)
        return whole if out is None or whole is out else out.copy_(whole)
    return z


def add_up(*sums: tuple[torch.Tensor, torch.Tensor], kept: dict | None = None) -> None:
    """``(parts, out)``, one or two: out, contiguous, := the float32 sum of ``parts [P, ...]`` in their order; each part begins with out's
    elements in a row. kept: As in `run_shrink`.
    """
    alike = tuple((parts.shape[0], parts.stride(0), out.numel(), out.dtype) for parts, out in sums)
    grid, blocks, options = known(kept, ("add", *alike), lambda: layouts.add_parts(*(out.numel() for _, out in sums)))
    args: list[Any] = [each for parts, out in sums for each in ((parts, parts.stride(0)), parts.shape[0], out, out.numel())]
    args += [None, 0, None, 0] if len(sums) == 1 else []
    run_kernel(add_parts, grid, (*args, blocks), options)


def run_wgrad(*args, **kwargs) -> torch.Tensor:
    """`prepare_wgrad`'s result, launched at once."""
    start, out, parts = prepare_wgrad(*args, **kwargs)
    start(False)
    if parts is not None:
        add_up((parts, out), kept=kwargs.get("kept"))
    return out


def prepare_wgrad(
    x, g, *, scale: float, adapters: Adapters = ONE, dropout, config: Config, out_transposed: bool, dtype: torch.dtype,
    kept: dict | None = None,
) -> tuple[Callable[[bool], None], torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``start(beside)``, which launches; the result, ``scale * (D.x)^T g`` as ``[(E,) J, R]``, or ``[(E,) R, J]`` if transposed, in
    ``dtype``; and None, or the float32 parts ``[splits, ...]`` whose sum it is to be (`add_up`).

    beside: The launch may run while expand still does. Memory for it is taken here, before expand is launched, for afterwards the
    allocator might hand out what expand yet reads. kept: As in `run_shrink`.
    """

    def layout(beside: bool) -> layouts.WgradLayout:
        return known(kept, ("wgrad", out_transposed, beside), lambda: layouts.wgrad(
            config, matrix(x), matrix(g), out_transposed, many(adapters), dropout is not None, precision(x.dtype), beside,
            beside and interpreted(),
        ))  # fmt: skip

    w = layout(False)
    out = x.new_empty(w.shape, dtype=dtype)
    parts = x.new_empty(w.splits, *w.shape, dtype=torch.float32) if w.splits > 1 else None
    into = out if parts is None else parts

    def start(beside: bool) -> None:
        seed, threshold, inv_keep = dropout_args(dropout)
        starts, order = (None, None) if adapters.segments is None else (adapters.segments.starts, adapters.segments.order)
        args = (
            (x, *w.x), (g, *w.g), (into, *w.out), w.stride_split, starts, order, w.stride_oe, adapters.ranks,
            seed, threshold, scale * inv_keep, *w.sizes,
        )  # fmt: skip
        run_kernel(wgrad, w.grid, args, layout(True).options if beside else w.options)

    return start, out, parts


def tile_counters(x: torch.Tensor, N: int, config: Config, widths=()) -> torch.Tensor | None:
    """The zeroed counters of tiles whose K is split, or None. Made before shrink, so that nothing stands between two launches (pdl)."""
    c = config.expand
    if c.split == 1:
        return None
    return torch.zeros(cdiv(tokens(x), c.block_m) * cut(widths, N, c.block_n)[1], dtype=torch.int32, device=x.device)


def run_expand(
    x, w, v, *,
    transposed: bool, u, a=None, scale=1.0, adapters: Adapters = ONE, bias=None, base=None, out=None, onto=None, exact=False,
    drop_x=None, drop_uv=None, counters=None, config: Config, kept: dict | None = None,
):  # fmt: skip
    """``x w + D.(u v) + bias`` as ``[..., N]``, and u.

    w: ``[K, N]``, v: ``[(E,) R, N]``, a: ``[(E,) K, R]``, all three the other way round if transposed (as the parameters lie for the
    forward pass). u: ``[M, R]``, or float32 ``[parts, M, R]`` to be added, where it is given; a matrix to write it to, or None, where
    the kernel computes it. base: the base product, where the library made it. out: where the result goes, base itself too. onto: the same,
    and what is there is added. exact: u v in float32 whatever the dtypes. w and base None: ``D.(u v) + bias`` alone. drop_x, drop_uv:
    None or (seed, p). counters: `tile_counters`, made here where they are not given. kept: As in `run_shrink`.
    """
    c, seg = config.expand, adapters.segments
    out = out if onto is None else onto
    whole = c.persistent and c.tma and c.u == "given" and all(aligned(u, v))
    e = known(kept, ("expand", whole) if whole else "expand", lambda: layouts.expand(
        config, matrix(x), matrix(w), matrix(v), matrix(a), matrix(u), matrix(base), matrix(out), onto is not None, transposed, exact,
        drop_x is not None, drop_uv is not None, many(adapters), precision(x.dtype),
        sm_count(x.device) if c.persistent or config.wgrad.beside == "pdl" else 0, _alone(config), whole,
    ))  # fmt: skip
    bias = None if bias is None else bias.contiguous()  # N numbers, of which the kernel reads neighbours
    y = x.new_empty(e.y) if out is None else out
    u = x.new_empty(e.u) if e.u is not None else u
    flags, ticket, parts = None, None, None
    if e.flags:
        flags = torch.zeros(e.flags + 1, dtype=torch.int32, device=x.device)
        flags, ticket = flags[: e.flags], flags[e.flags :]
    if e.splits:
        M, N = e.sizes[:2]
        partial = x.new_empty(e.splits + 1, M, N, dtype=torch.float32)
        counters = tile_counters(x, N, config, adapters.widths if transposed else ()) if counters is None else counters
        parts = (partial, M * N, counters, e.splits + 1)
    x_args: Any = None if w is None else (x, *e.x)
    w_args: Any = None if w is None else (w, *e.w)
    if base is not None:
        x_args, w_args = (base, *e.x), None
    elif e.boxes is not None:
        x_args, w_args = _descriptor(as_matrix(x), *e.boxes[0]), _descriptor(w.t() if transposed else w, *e.boxes[1])
    u_args: Any = None if u is None else (u, *e.u_args)
    v_args: Any = (v, *e.v)
    if e.options["UV"] == "steps":
        u_args, v_args = _descriptor(u, *e.boxes[0]), _descriptor(v.t() if transposed else v, *e.boxes[1])
    seed, threshold, inv_keep = dropout_args(drop_x or drop_uv)
    args = (
        x_args, w_args, None if a is None else (a, *e.a), u_args, v_args, bias, (y, *e.y_args),
        adapters.rows(), (x, *e.x) if seg and c.u == "awaited" else None, adapters.gather(), e.gathered, adapters.number,
        e.stride_ae, e.stride_ve, None if c.u == "given" else adapters.scales, adapters.ranks,
        flags, ticket, parts, e.blocks_per_part, e.late, seed, threshold, inv_keep, scale * (inv_keep if drop_x else 1.0), *e.sizes,
    )  # fmt: skip
    run_kernel(expand, e.grid, args, e.options)
    return y, u


def _descriptor(t: torch.Tensor, box: tuple[int, int], flipped: bool) -> TensorDescriptor:
    """Of a matrix, or of the transposed one."""
    return TensorDescriptor.from_tensor(t.t() if flipped else t, list(box))


def _alone(config: Config) -> bool:
    """Whether launches that may overlap are interpreted, one by one; asked where there are such."""
    return config.expand.pdl and interpreted()


def dropout_args(dropout) -> tuple:
    """(seed, threshold, 1 / (1 - p)) as the kernels take them; dropout: None or (seed tensor, p)."""
    if dropout is None:
        return None, 0, 1.0
    seed, p = dropout
    return seed, philox.threshold_of(p), philox.inv_keep(p)


def in_parts(keep: bool, adapters: Adapters, config: Config) -> bool:
    """Whether expand adds the parts of u, which nobody keeps: not where it reads u for each adapter of a row block, in no pipeline then."""
    return not keep and (adapters.segments is None or config.expand.each)


def down(x, lora_A, adapters: Adapters, scale: float, save_u: bool, config: Config, kept: dict | None = None):
    """``u = scale x A^T [M, R]``, or `in_parts`: of several layers of one x, for their `forward`, where none drops.

    kept: As in `forward`, of the arm of one of these layers.
    """
    kept = among(kept, "down", precision(x.dtype), matrix(lora_A))
    with on_device(x):
        return run_shrink(
            x, lora_A, transposed=True, scale=scale, adapters=adapters, dropout=None, config=config, dtype=x.dtype,
            parts=in_parts(save_u, adapters, config), kept=kept,
        )  # fmt: skip


def forward(
    x, weight, lora_A, lora_B, bias, seed, adapters: Adapters, scale: float, p: float, save_u: bool, config: Config, base=None, u=None,
    kept: dict | None = None,
):  # fmt: skip
    """``y [..., N]`` and ``u [M, r]`` (None unless ``save_u``) for x ``[..., K]``; p = 0: no dropout. base: as in `lora_linear`.

    u: What `down` gave, for a configuration that takes it (``expand.u="given"``). kept: Of calls whose other operands, adapters and
    configuration look like these: their layouts.
    """
    drop = (seed, p) if p else None
    kept = among(kept, save_u, precision(x.dtype), matrix(base), matrix(u))
    shared: dict[str, Any] = dict(transposed=True, adapters=adapters, config=config, kept=kept)
    with on_device(x):
        if config.expand.u == "given":
            counters = tile_counters(x, lora_B.shape[-2], config, adapters.widths)
            if u is None:
                parts = in_parts(save_u, adapters, config)
                u = run_shrink(x, lora_A, scale=scale, dropout=drop, dtype=x.dtype, parts=parts, **shared)
            if base is not None:
                return run_expand(x, None, lora_B, u=u, base=base, **shared)
            if config.expand.base == "library":
                y = F.linear(x, weight, bias)
                return run_expand(x, weight, lora_B, u=u, base=y, out=y, **shared)
            return run_expand(x, weight, lora_B, u=u, bias=bias, counters=counters, **shared)
        space = x.new_empty(tokens(x), lora_A.shape[-2]) if save_u else None
        return run_expand(x, weight, lora_B, u=space, a=lora_A, scale=scale, bias=bias, drop_x=drop, **shared)


def backward(
    dy, x, weight, lora_A, lora_B, u, seed, adapters: Adapters, scale: float, p: float, needs, adapter_dtype, config: Config,
    onto=None, ds=None, all_ds=None, kept: dict | None = None,
):  # fmt: skip
    """``dX [..., K], dA [(E,) r, K], dB [(E,) N, r]``, each None where not in ``needs``; operands no needed gradient uses may be None.

    Without a weight dX is the adapter's part alone. onto: The dX of other layers of x, to which this one's is added. ds: ``[M, r]``,
    where dS is wanted, by columns of ``all_ds [M, R]`` of all these layers: dA is then of all their ranks. kept: As in `forward`.
    """
    need_dx, need_da, need_db = needs
    drop = (seed, p) if p else None
    kept = among(kept, needs, adapter_dtype, precision(dy.dtype), matrix(onto), matrix(all_ds))
    shared: dict[str, Any] = dict(adapters=adapters, config=config, kept=kept)
    dx = None
    keep_ds = need_da or ds is not None
    with on_device(dy):
        one_launch = need_dx and config.expand.u != "given"
        counters = tile_counters(dy, lora_A.shape[-1], config) if need_dx else None
        if (need_dx or keep_ds) and not one_launch:
            ds = run_shrink(
                dy, lora_B, scale=scale, dropout=None, dtype=dy.dtype, parts=in_parts(keep_ds, adapters, config), out=ds,
                widths=adapters.widths, **shared,
            )  # fmt: skip
        if one_launch and keep_ds and ds is None:
            ds = dy.new_empty(tokens(dy), lora_B.shape[-1])
        gradients: dict[str, Any] = dict(scale=1.0, dtype=adapter_dtype, **shared)
        for_a = prepare_wgrad(x, ds if all_ds is None else all_ds, dropout=drop, out_transposed=True, **gradients) if need_da else None
        for_b = prepare_wgrad(dy, u, dropout=None, out_transposed=False, **gradients) if need_db else None
        forked = fork(dy) if need_dx and config.wgrad.beside == "stream" else None
        if one_launch:
            dx, _ = run_expand(dy, weight, lora_A, transposed=False, u=ds, a=lora_B, scale=scale, drop_uv=drop, onto=onto, **shared)
        elif need_dx:
            base = None
            if config.expand.base == "library" and weight is not None:
                base, onto = _base_gradient(dy, weight, onto), None
            dx, _ = run_expand(
                dy, weight, lora_A, transposed=False, u=ds, base=base, out=base, onto=onto, drop_uv=drop, counters=counters, **shared
            )  # fmt: skip
        with beside(forked):
            for start, _, _ in filter(None, (for_a, for_b)):
                start(need_dx and config.wgrad.beside == "pdl")
        sums = [(parts, out) for _, out, parts in filter(None, (for_a, for_b)) if parts is not None]
        if sums:
            add_up(*sums, kept=kept)
    return dx, for_a and for_a[1], for_b and for_b[1]


def _base_gradient(dy, weight, onto):
    """``dY W``, added to ``onto`` where there is one, by the library; in place, where autocast has no say."""
    if onto is None:
        onto = dy.new_empty(*dy.shape[:-1], weight.shape[1])
        torch.mm(as_matrix(dy), weight, out=as_matrix(onto))
    else:
        as_matrix(onto).addmm_(as_matrix(dy), weight)
    return onto


def merge(weight, base, lora_A, lora_B, scale: float) -> None:
    """``weight := base + scale B A``, float32 sums rounded once. weight, base: ``[N, K]``, any strides, or one tensor."""
    with on_device(weight):
        u = lora_B.float() * scale
        kept = among(_merges, matrix(weight), matrix(base), matrix(lora_A), matrix(u))
        run_expand(base, lora_A, lora_A, transposed=False, u=u, base=base, out=weight, exact=True, config=MERGE, kept=kept)

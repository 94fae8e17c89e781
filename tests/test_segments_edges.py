"""Many adapters at the edges: exact zeros beside values that are not finite, ranks in blocks, 32-bit offsets, flags, partial sums."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lora_kernels import MultiLoRALinear, Segments, launch, layouts, lora_linear, parity, parity_cases
from lora_kernels.parity import Case, run_case
from lora_kernels.segments import Adapters
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = Config(Shrink(16, 16, split=2, num_stages=2), Expand(16, 16, 16, num_warps=4, num_stages=2), Wgrad(16, 16, split=3, num_stages=2))
AWAITED = replace(TILES, expand=replace(TILES.expand, u="awaited"))
MANY = Case(37, 40, 50, 5, config=TILES, adapters=6)
NAN = float("nan")


def plan(ids: torch.Tensor, E: int, config: Config = TILES) -> Segments:
    return Segments.from_ids(ids.to(DEVICE), E, row_block=config.expand.block_m, gather_block=config.shrink.block_m)


def test_u_is_zero_without_an_adapter_and_beyond_a_rank():
    """Exactly, though x and adapter 0's scale are not finite, what lies behind the stack is not zero, and a rank may be 0."""
    t, ids = parity.inputs(MANY, DEVICE), parity_cases.adapter_ids(MANY).to(DEVICE)
    ranks = torch.tensor([5, 1, 3, 2, 0, 4, 5], dtype=torch.int32, device=DEVICE)[:6]
    scales, A = torch.ones(7, device=DEVICE)[:6], torch.cat([t["lora_A"], t["lora_A"][:1]])[:6]
    scales[0] = NAN
    dead = ids < 0
    for e in (1, 4, 5):
        t["x"][(ids == e).nonzero()[0]] = NAN
    t["x"][dead.nonzero()[1]] = NAN
    with parity.poisoned_empty():
        many = Adapters(plan(ids, 6), scales, ranks)
        u = launch.run_shrink(t["x"], A.mT, scale=1.0, adapters=many, dropout=None, config=TILES, dtype=torch.float32)
    beyond = torch.arange(5, device=DEVICE)[None, :] >= ranks[ids.clamp(min=0)][:, None]
    assert dead.sum() > 2 and not u[dead].any() and not u[beyond & ~dead[:, None]].any()
    assert u[(ids == 1).nonzero()[0], 0].isnan().all() and u[(ids == 2)][:, :3].all()


def test_a_gradient_beyond_a_rank_is_zero_beside_a_diverged_token():
    t, ids = parity.inputs(MANY, DEVICE), torch.arange(37, device=DEVICE) % 6
    ranks = torch.full((6,), 3, dtype=torch.int32, device=DEVICE)
    for name in ("x", "dY"):
        g = torch.randn(37, 5, device=DEVICE)
        g[:, 3:] = 0.0
        t[name][7] = NAN
        how = dict(dropout=None, config=TILES, out_transposed=True, dtype=torch.float32)
        out = launch.run_wgrad(t[name], g, scale=1.0, adapters=Adapters(plan(ids, 6), None, ranks), **how)
        assert not out[:, 3:].any() and out[1, :3].isnan().any() and out[0].isfinite().all()


@pytest.mark.parametrize("way", [{}, {"masked": True}, {"each": True}], ids=str)
@pytest.mark.parametrize("R, dtype", [*((R, torch.float32) for R in (16, 32, 40, 64)), (16, torch.float16), (40, torch.float16)])
def test_what_lies_beyond_a_rank_is_not_used_where_the_rank_fills_its_tiles(R, dtype, way):
    """Ranks that need no mask for the stored rank's sake still need one for the adapter's own; 16-bit ones are read by eights."""
    case = replace(MANY, M=20, N=18, K=20, R=R, adapters=3, dtype=dtype)
    t, ids = parity.inputs(case, DEVICE), torch.arange(20, device=DEVICE) % 3
    ranks = torch.tensor([R, R // 2 - 1, 0], dtype=torch.int32, device=DEVICE)
    beyond = torch.arange(R, device=DEVICE)[None, :] >= ranks[:, None]
    results = []
    for value, impl in ((0.0, "triton"), (NAN, "triton"), (0.0, "reference")):
        x, A, B = t["x"].clone(), t["lora_A"].masked_fill(beyond[:, :, None], value), t["lora_B"].masked_fill(beyond[:, None, :], value)
        leaves = [v.requires_grad_() for v in (x, A, B)]
        config = replace(TILES, expand=replace(TILES.expand, **way)) if impl == "triton" else None
        y = lora_linear(x, t["weight"], A, B, t["bias"], segments=plan(ids, 3), ranks=ranks, config=config, impl=impl)
        results.append([y, *torch.autograd.grad(y, leaves, t["dY"])])
    for clean, ours, wanted in zip(*results, strict=True):
        assert torch.equal(clean, ours)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [{}, {"masked": True}, {"each": True}, {"u": "awaited"}], ids=str)
def test_what_lies_around_the_stacks_is_not_used(way):
    """A token without an adapter has no place in a stack: not the one before its first either."""
    t, config = parity.inputs(MANY, DEVICE), replace(TILES, expand=replace(TILES.expand, **way))
    around = {name: torch.full((8, *t[name].shape[1:]), NAN, device=DEVICE)[1:-1].copy_(t[name]) for name in ("lora_A", "lora_B")}
    results, s = [], plan(parity_cases.adapter_ids(MANY), 6)
    for stacks in ({}, around):
        x = t["x"].clone().requires_grad_()
        A, B = ((t | stacks)[name] for name in ("lora_A", "lora_B"))
        y = lora_linear(x, t["weight"], A, B, segments=s, impl="triton", config=config)
        results.append([y, *torch.autograd.grad(y, x, t["dY"])])
    assert s.starts[-1] - s.starts[-2] > 2 and all(torch.equal(ours, wanted) for ours, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("way", [{}, {"masked": True}, {"each": True}, {"u": "awaited"}], ids=str)
def test_an_adapter_too_large_for_16_bits_reaches_nobody_else(way):
    """Finite in float32, and infinite once it is rounded to x's dtype."""
    case = replace(MANY, dtype=torch.float16, adapter_dtype=torch.float32)
    t, ids, config = (
        parity.inputs(case, DEVICE),
        parity_cases.adapter_ids(case).to(DEVICE),
        replace(TILES, expand=replace(TILES.expand, **way)),
    )
    large, results = t["lora_B"].clone(), []
    large[1] = 1e5
    for B in (t["lora_B"], large):
        results.append(lora_linear(t["x"], t["weight"], t["lora_A"], B, segments=plan(ids, 6), impl="triton", config=config))
    assert not results[1][ids == 1].isfinite().any() and torch.equal(results[0][ids != 1], results[1][ids != 1])


def test_an_adapter_with_all_the_tokens_among_many():
    """Its tokens are summed by one program where partial sums of a large stack would cost more memory than they save time."""
    sums = []

    def record(kernel, grid, args, options):
        if kernel.__name__ == "wgrad":
            sums.append(math.prod(args[2][0].shape[:-2]))
        kernel[grid](*args, **options)

    with launch.intercept(record):
        result = run_case(replace(MANY, M=70, N=18, K=20, adapters=70, popularity="one"), DEVICE)
    assert result.ok, result.detail
    assert sums == [70, 70]


def test_a_row_block_with_more_adapters_than_the_first():
    t, ids = parity.inputs(replace(MANY, M=32), DEVICE), torch.tensor([4] * 16 + [m % 6 for m in range(16)])
    arguments = (t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"])
    wanted = lora_linear(*arguments, segments=plan(ids, 6), impl="reference")
    for config in (TILES, AWAITED):
        y = lora_linear(*arguments, segments=plan(ids, 6), impl="triton", config=config)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_a_row_block_is_ready_when_each_of_its_tokens_is():
    """Awaited, with gathered tiles of another size than the row blocks: each token announces itself once per rank block, no other does."""
    config, flags = replace(AWAITED, expand=replace(AWAITED.expand, block_m=32)), []

    def record(kernel, grid, args, options):
        kernel[grid](*args, **options)
        given = dict(zip(kernel.arg_names, args, strict=False))
        flags.append(given["flag_ptr"].tolist())

    for R, blocks in ((5, 1), (70, 3)):
        case = replace(MANY, R=R, mixed_ranks=True, config=config)
        t, ids = parity.inputs(case, DEVICE), parity_cases.adapter_ids(case)
        ranks = torch.arange(6, dtype=torch.int32, device=DEVICE) * R // 6
        with launch.intercept(record):
            s = plan(ids, 6, config)
            lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], segments=s, ranks=ranks, config=config, impl="triton")
        assert flags.pop() == [32 * blocks, 5 * blocks]


@pytest.mark.parametrize(
    "adapters, tile, parts, loader",
    [
        (0, dict(split=1), 3, "load_8_parts"),
        (0, dict(split=1), 9, "load_16_parts"),
        (6, dict(split=3), 3, "load_dense"),
        (6, dict(split=3, masked=True), 3, "load_dense"),
        (6, dict(split=1, each=True), 3, "load_8_parts"),
    ],
)
def test_without_gradients_u_stays_in_parts(adapters, tile, parts, loader):
    """Nothing keeps u then: expand adds shrink's partial sums of K itself, but where it would for each adapter of a row block. dX alone
    does the same with dS."""
    config = replace(TILES, shrink=replace(TILES.shrink, split=parts), expand=replace(TILES.expand, **tile))
    size = max(70, parts * TILES.shrink.block_k - 2)
    case, seen = replace(MANY, K=size, N=size, adapters=adapters, config=config), []
    t = parity.inputs(case, DEVICE)

    def record(kernel, grid, args, options):
        if kernel.__name__ == "expand":
            seen.append(options["LOAD_U"].__name__)
        kernel[grid](*args, **options)

    def run(impl, config):
        x = t["x"].clone()
        arguments = (t["weight"], t["lora_A"], t["lora_B"], t["bias"])
        y = lora_linear(x, *arguments, **parity.many(case, DEVICE), impl=impl, config=config)
        again = lora_linear(x.requires_grad_(), *arguments, **parity.many(case, DEVICE), impl=impl, config=config)
        return [y, *torch.autograd.grad(again, x, t["dY"])]

    with launch.intercept(record), parity.poisoned_empty():
        ours = run("triton", config)
    for one, wanted in zip(ours, run("reference", None), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
    assert seen == [loader] * 3


def test_as_many_parts_of_u_are_on_their_way_as_there_are_registers_for():
    by_registers = {n: [layouts._parts_loader(parts, n).__name__ for parts in (2, 8, 9, 16, 17, 32, 33)] for n in (2, 4, 8, 9)}
    few = ["load_8_parts"] * 2 + ["load_16_parts"] * 2 + ["load_32_parts"] * 2
    assert by_registers[2] == [*few, "load_parts"] and by_registers[4] == [*few[:4], *["load_parts"] * 3]
    assert by_registers[8] == [*few[:2], *["load_parts"] * 5] and set(by_registers[9]) == {"load_parts"}


@pytest.mark.parametrize("ids", [[0, 1, 0], [1, 0, 0, 1], [0, -1, 0, 1, 1]])
def test_the_torch_arm_with_one_gap_in_a_run(ids):
    """Nearly neighbours: a run with one other token inside is gathered, not sliced."""
    t, results = parity.inputs(replace(MANY, M=len(ids), adapters=2, dtype=torch.float64), DEVICE), []
    for impl in ("torch", "reference"):
        leaves = [t[name].clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]
        y = lora_linear(leaves[0], t["weight"], *leaves[1:], segments=plan(torch.tensor(ids), 2), impl=impl)
        results.append([y, *torch.autograd.grad(y, leaves, t["dY"])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


def test_parts_of_a_tile_are_float32():
    """Whatever x is: 16-bit ones would stay within the budget of a short K."""
    config, seen = replace(TILES, expand=replace(TILES.expand, split=2)), []

    def record(kernel, grid, args, options):
        if kernel.__name__ == "expand":
            seen.append(dict(zip(kernel.arg_names, args, strict=False))["parts"][0].dtype)
        kernel[grid](*args, **options)

    with launch.intercept(record):
        assert run_case(replace(MANY, M=17, N=18, K=33, dtype=torch.float16, config=config), DEVICE).ok
    assert seen == [torch.float32] * 2


@pytest.mark.interpreted
def test_offsets_past_32_bits():
    """Gathered rows, columns of one tile and of the next, and adapters, 2^31 elements and more apart in untouched address space."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lora_kernels import Segments, lora_linear
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad
def far(values, *strides):
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides))
    return torch.empty(span, dtype=torch.float16).as_strided(values.shape, strides).copy_(values)
x, A, B = torch.arange(33.).view(33, 1).expand(33, 17), torch.ones(3, 2, 17), torch.ones(3, 5, 2)
A, B = A * torch.tensor([1., 2., 3.]).view(3, 1, 1) / 8, B * torch.tensor([1., 0.5, 2.]).view(3, 1, 1)
near = dict(x=x.half(), lora_A=A.half(), lora_B=B.half())
ids, w = torch.arange(33) % 3, torch.ones(5, 17).half()
wanted = (x.sum(1, keepdim=True) + 2 * x.sum(1, keepdim=True) * (A[:, 0, 0] * B[:, 0, 0])[ids][:, None]).expand(33, 5)
plan = Segments.from_ids(ids, 3, row_block=16, gather_block=16)
for name, *strides in (
    ("x", 1 << 26, 1), ("x", 1, 1 << 28), ("x", 1, 1 << 27), ("lora_A", 1 << 30, 17, 1), ("lora_B", 1 << 30, 2, 1)
):
    for each in (False, True):
        config = Config(Shrink(16, 16), Expand(16, 16, 16, each=each), Wgrad(16, 16))
        y = lora_linear(weight=w, **near | {name: far(near[name], *strides)}, impl="triton", segments=plan, config=config)
        torch.testing.assert_close(y.float(), wanted, rtol=2e-3, atol=0)
    print(name)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.stdout.split() == ["x"] * 3 + ["lora_A", "lora_B"], (out.stdout, out.returncode, out.stderr[-2000:])


@pytest.mark.usefixtures("as_on_a_users_cpu")
@pytest.mark.parametrize("inference", [False, True])
def test_a_plan_that_is_written_to(inference):
    """The torch arm keeps what it read of a plan for the next layer, as long as the plan stays as it is."""
    layer = MultiLoRALinear(12, 8, num_adapters=3, r=2, init_lora_weights=False).requires_grad_(False)
    x = torch.randn(6, 12)
    with torch.inference_mode(inference):
        first, second = (Segments.from_ids(torch.tensor(ids), 3) for ids in ([0, 1, 2, -1, 0, 1], [2, 2, -1, 0, 1, 1]))
        wanted = [layer(x, first), layer(x, second)]
        assert torch.equal(layer(x, first), wanted[0]) and not torch.equal(*wanted)
        for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
            mine.copy_(theirs)
        assert torch.equal(layer(x, first), wanted[1])

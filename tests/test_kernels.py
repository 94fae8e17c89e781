"""The three kernels against the reference: every plug, every source of u, odd sizes, ranks, strides, out of bounds, repeats."""

import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lora_kernels import launch, lora_linear, parity, philox
from lora_kernels.parity import Case, run_case
from lora_kernels.segments import ONE
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = Config(Shrink(16, 16, split=2, num_stages=2), Expand(16, 16, 16, num_warps=4, num_stages=2), Wgrad(16, 16, split=3, num_stages=2))
ODD = Case(19, 37, 50, 5, config=TILES)


def with_u(u: str, **fields) -> Config:
    return replace(TILES, expand=replace(TILES.expand, u=u, **fields))


def check(case: Case):
    result = run_case(case, DEVICE)
    assert result.launches > 0
    assert result.ok, f"{result.name}: {result.detail} {result.errors}"


@pytest.mark.parametrize(
    "case", parity.cases(DEVICE, quick=DEVICE.type == "cpu" and bool(os.environ.get("PTX_MACHINE"))), ids=lambda c: c.name.replace(" ", "_")
)
def test_parity(case):
    result = run_case(case, DEVICE)
    assert result.launches > 0 or case.impl != "triton"
    assert result.ok, f"{result.detail} {result.errors}"


@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
@pytest.mark.parametrize("R", [1, 2, 3, 4, 15, 16, 17, 24, 96, 128])
def test_ranks(u, R):
    check(replace(ODD, R=R, N=21, K=33, config=with_u(u)))


@pytest.mark.parametrize("R", [129, 200, 511, 512])
def test_ranks_beyond_one_tile(R):
    for u in ("given", "awaited"):
        check(replace(ODD, M=17, N=18, K=20, R=R, config=with_u(u)))


@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 40, 40), (16, 16, 16), (17, 15, 1), (15, 1, 17), (33, 31, 64), (64, 16, 48)])
def test_sizes(u, M, N, K):
    check(replace(ODD, M=M, N=N, K=K, R=3, p=0.1, config=with_u(u)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
def test_strides(layout, u):
    check(replace(ODD, layout=layout, config=with_u(u), p=0.1))


@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
def test_adapters_in_float32_on_a_16_bit_base(u):
    check(replace(ODD, dtype=torch.float16, adapter_dtype=torch.float32, config=with_u(u)))


@pytest.mark.parametrize(
    "case",
    [Case(3, 16, 16, 5, torch.float16, p=0.5, layout="expanded"), Case(1, 32, 2, 2, torch.float16, bias=False, scale=16.0, impl="torch")],
    ids=lambda c: c.impl,
)
def test_float32_gradients_carry_the_roundings_of_16_bit_operands(case):
    """dS is rounded to x's dtype, in the kernels as in the formula, which may be lucky where so few numbers are summed."""
    result = run_case(replace(case, adapter_dtype=torch.float32), DEVICE)
    assert result.ok, f"{result.detail} {result.errors}"


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
def test_grouping_covers_every_tile(group_m):
    check(replace(ODD, M=70, N=50, K=16, config=with_u("given", group_m=group_m)))


@pytest.mark.parametrize("split", [1, 2, 3, 64])
def test_splits(split):
    check(
        replace(ODD, M=70, K=70, p=0.1, config=Config(replace(TILES.shrink, split=split), TILES.expand, replace(TILES.wgrad, split=split)))
    )


@pytest.mark.parametrize("split", [2, 3, 64])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_splits_of_one_tile(split, p):
    """Partial sums of K, and the low-rank product as one more, added by whichever program comes last."""
    check(replace(ODD, M=21, K=70, p=p, config=with_u("given", split=split)))


def test_heuristic_config():
    for M in (1, 40, 130):
        check(replace(ODD, M=M, p=0.1, config=None))


def test_the_three_sources_of_u_run_the_launches_they_promise(launched):
    tensors = parity.inputs(ODD, DEVICE)
    args = [tensors[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    for u, wanted in (("given", ["shrink", "expand"]), ("loop", ["expand"]), ("awaited", ["expand"])):
        assert launched(lambda u=u: lora_linear(*args, config=with_u(u), impl="triton")) == wanted


def test_dropout_mask_is_exact():
    result = parity.mask_result(DEVICE)
    assert result.ok, result.detail


def test_mask_does_not_depend_on_tiles_or_source_of_u():
    case = replace(ODD, M=40, N=24, K=48, p=0.5)
    tensors = parity.inputs(case, DEVICE)
    outs = []
    for config in (TILES, with_u("loop", block_k=32), with_u("awaited", block_m=32), replace(TILES, shrink=Shrink(32, 64, num_stages=1))):
        outs.append(parity.evaluate(replace(case, config=config), tensors, "triton"))
    for other in outs[1:]:
        for ours, theirs in zip(outs[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # another mask would differ by order 1


@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
def test_repeats_are_equal_bit_for_bit(u):
    case = replace(ODD, M=50, p=0.1, config=with_u(u, persistent=True))
    tensors = parity.inputs(case, DEVICE)
    first = parity.evaluate(case, tensors, "triton")
    for _ in range(2):
        for ours, again in zip(first, parity.evaluate(case, tensors, "triton"), strict=True):
            assert torch.equal(ours, again)


@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
def test_a_bad_token_stays_in_its_row(u):
    case = replace(ODD, config=with_u(u))
    tensors = parity.inputs(case, DEVICE)
    clean = parity.evaluate(case, tensors, "triton")
    tensors["x"][7, 3] = float("nan")
    y = parity.evaluate(case, tensors, "triton")[0]
    assert y[7].isnan().all()
    rest = torch.arange(case.M, device=DEVICE) != 7
    assert torch.equal(y[rest], clean[0][rest])


def test_zero_times_infinity_is_nan_as_in_torch():
    x = torch.ones(3, 16, device=DEVICE)
    x[0, 0] = float("inf")
    zero = torch.zeros(16, 16, device=DEVICE)
    y = lora_linear(x, torch.eye(16, device=DEVICE), torch.eye(16, device=DEVICE), zero, impl="triton")
    assert y[0].isnan().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("u, adapters", [("given", 0), ("loop", 0), ("awaited", 0), ("given", 5), ("awaited", 5)])
def test_nothing_is_written_outside_the_output(u, adapters):
    """Every buffer the kernels write to is a view inside a larger one; the margins must stay as they were."""
    margin, guards = 64, []

    def guarded(kernel, grid, args, options):
        def widen(arg):
            if isinstance(arg, tuple):
                return tuple(widen(a) for a in arg)
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                span = 1 + sum((n - 1) * s for n, s in zip(arg.shape, arg.stride(), strict=True))
                buffer = torch.full((span + 2 * margin,), 12345.0, dtype=arg.dtype, device=arg.device)
                inside = buffer.as_strided(arg.shape, arg.stride(), margin).copy_(arg)
                guards.append((buffer, span))
                written.append((arg, inside))
                return inside
            return arg

        written = []
        kernel[grid](*[widen(a) for a in args], **options)
        for arg, inside in written:
            arg.copy_(inside)

    case = replace(ODD, p=0.1, config=with_u(u), adapters=adapters)
    with launch.intercept(guarded):
        result = run_case(case, DEVICE)
    assert result.ok, result.detail
    assert len(guards) > 10
    for buffer, span in guards:
        assert (buffer[:margin] == 12345.0).all() and (buffer[margin + span :] == 12345.0).all()


def test_scale_is_applied_in_float32_and_not_folded_into_16_bits():
    """A scale that float16 cannot hold: folding it into an adapter would round it."""
    for scale in (1 / 3, 0.1234567, 3000.7):
        check(replace(ODD, dtype=torch.float16, scale=scale))


def test_scaled_dY_beyond_float16_does_not_overflow():
    """scale * dY passes 65504, which PEFT's formula computes in float16; dS does not pass it."""
    x = torch.randn(20, 32, device=DEVICE).half()
    weight, A = torch.zeros(16, 32, device=DEVICE).half(), (torch.randn(4, 32, device=DEVICE) * 0.01).half().requires_grad_()
    B = torch.full((16, 4), 1e-3, device=DEVICE).half()
    y = lora_linear(x, weight, A, B, scale=256.0, impl="triton")
    (dA,) = torch.autograd.grad(y, A, torch.full_like(y, 300.0))
    assert torch.isinf(torch.tensor(256.0 * 300.0).half())
    wanted = 256.0 * (torch.full((20, 16), 300.0).double() @ B.double().cpu()).t() @ x.double().cpu()
    torch.testing.assert_close(dA.double().cpu(), wanted, rtol=5e-3, atol=wanted.abs().max().item() * 2e-3)


@pytest.mark.interpreted
def test_offsets_past_32_bits():
    """Rows 2^30 elements apart in 4 GiB of untouched address space: 32-bit offsets would fault or read elsewhere."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lora_kernels import lora_linear
stride = 1 << 30
buffer = torch.empty(2 * stride + 16, dtype=torch.float16)
x = buffer.as_strided((3, 16), (stride, 1))
x.copy_(torch.arange(48.).view(3, 16))
A, B, w = torch.ones(2, 16).half(), torch.ones(5, 2).half(), torch.ones(5, 16).half()
y = lora_linear(x, w, A, B, impl="triton", scale=0.5)
assert torch.equal(y, (x.sum(1, keepdim=True) * 2).expand(3, 5)), y
print("right")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.stdout == "right\n", (out.returncode, out.stderr[-2000:])


def test_a_lane_equal_to_the_threshold_is_kept():
    zero = torch.zeros(1, dtype=torch.int64)
    word = int(philox.philox_4x32((zero,) * 4, (parity.SEED & 0xFFFFFFFF, parity.SEED >> 32))[0])
    result = parity.mask_result(DEVICE, p=(word & 0xFFFF) / 65536)
    assert result.ok, result.detail


@pytest.mark.parametrize("M, N, K", [(16, 16, 3072), (16, 2048, 16), (2048, 16, 16)])
def test_long_sums_stay_in_float32(M, N, K):
    """Sums rounded to float16 from block to block would pass the budget on a short axis."""
    once = replace(TILES, shrink=replace(TILES.shrink, split=1), wgrad=replace(TILES.wgrad, split=1))
    check(Case(M, N, K, 4, dtype=torch.float16, config=once))


def test_partial_sums_are_float32():
    """And added by one launch, dA and dB together."""
    names, partial = [], []

    def record(kernel, grid, args, options):
        names.append(kernel.__name__)
        if kernel.__name__ in ("shrink", "wgrad"):
            partial.append((args[2][0].shape[0] > 1, args[2][0].dtype))
        kernel[grid](*args, **options)

    with launch.intercept(record):
        check(replace(ODD, M=70, K=70, dtype=torch.float16))
    assert partial == [(True, torch.float32)] * 4
    assert names == ["shrink", "add_parts", "expand", "shrink", "add_parts", "expand", "wgrad", "wgrad", "add_parts"]


@pytest.mark.parametrize("lengths", [(1,), (1024,), (1000, 3), (5, 2100)])
def test_parts_are_added_in_their_order(lengths):
    """One or two sums by one launch, what lies behind a part left alone, and rounded once."""
    generator = torch.Generator().manual_seed(0)
    sums, wanted = [], []
    for number, length in zip((3, 5), lengths, strict=False):
        parts = torch.randn(number, length + 7, generator=generator).to(DEVICE)
        parts[:, length:] = float("nan")
        sums.append((parts[:, :length], torch.full((length,), float("nan"), dtype=torch.float16, device=DEVICE)))
        wanted.append(functools.reduce(torch.add, parts[:, :length], torch.zeros(length, device=DEVICE)).half())
    before = launch.launches
    launch.add_up(*sums)
    assert launch.launches == before + 1
    assert all(torch.equal(out, each) for (_, out), each in zip(sums, wanted, strict=True))


def test_small_sums_are_scaled_before_they_are_rounded():
    """x A^T near 1e-8 is zero in float16; times a scale of 1e6 it is not."""
    x, A = torch.full((16, 32), 1e-4, device=DEVICE).half(), torch.full((4, 32), 3e-6, device=DEVICE).half()
    W, B = torch.zeros(16, 32, device=DEVICE).half(), torch.ones(16, 4, device=DEVICE).half()
    wanted = 1e6 * x.double() @ A.double().t() @ B.double().t()
    for u in ("given", "loop", "awaited"):
        y = lora_linear(x, W, A, B, scale=1e6, impl="triton", config=with_u(u))
        torch.testing.assert_close(y.double(), wanted, rtol=2e-3, atol=0)
    once = replace(TILES, wgrad=replace(TILES.wgrad, split=1))
    dA = launch.run_wgrad(x, x / 10, scale=64.0, dropout=None, config=once, out_transposed=True, dtype=torch.float16)
    wanted = 64.0 * (x.double() / 10).t() @ x.double()  # near 1e-6, where float16's numbers are 2^-24 apart; its sixtyfourth is zero
    torch.testing.assert_close(dA.double(), wanted, rtol=2**-9, atol=2**-25)


@pytest.mark.parametrize("u", ["given", "loop", "awaited"])
@pytest.mark.parametrize("N, K", [(32, 21), (21, 32)])
def test_one_even_axis_beside_an_odd_one(u, N, K):
    """NaN margins around x, weight and dY: a mask left out on the odd axis alone shows."""
    check(replace(ODD, N=N, K=K, layout="sliced", config=with_u(u)))


@pytest.mark.interpreted
def test_tiles_past_32_bits():
    """Rows 2^26 elements apart: the offsets inside a tile fit 32 bits, the third tile's start does not."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lora_kernels import lora_linear
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad
stride = 1 << 26
buffer = torch.empty(32 * stride + 16, dtype=torch.float16)
x = buffer.as_strided((33, 16), (stride, 1))
x.copy_(torch.arange(33.)[:, None].expand(33, 16))
A, B, w = torch.ones(2, 16).half(), torch.ones(5, 2).half(), torch.ones(5, 16).half()
config = Config(Shrink(16, 16), Expand(16, 16, 16), Wgrad(16, 16))
y = lora_linear(x, w, A, B, impl="triton", scale=0.5, config=config)
assert torch.equal(y, (x.sum(1, keepdim=True) * 2).expand(33, 5)), y
print("right")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.stdout == "right\n", (out.returncode, out.stderr[-2000:])


@pytest.mark.parametrize("R", [5, 12, 16])
def test_the_stride_of_partial_sums_is_of_one_kind(R):
    """A multiple of 16 whatever tokens and rank, for Triton compiles one kernel where it is and another where it is not."""
    strides = []
    with launch.intercept(lambda kernel, grid, args, options: strides.append(args[3])):
        for split in (1, 3):
            for M in (1, 17, 32, 160):
                config = Config(shrink=Shrink(16, 16, split=split))
                z = launch.run_shrink(
                    torch.empty(M, 64), torch.empty(64, R), scale=1.0, dropout=None, config=config, dtype=torch.float32, parts=True
                )
                assert z.shape[-2:] == (M, R)
    assert len(strides) == 8 and all(stride % 16 == 0 for stride in strides) and all(strides[4:])


def test_sizes_and_scalars_do_not_recompile():
    """Between calls of other lengths, scales, probabilities and seeds only these may differ, and none is a constexpr."""
    recorded = []
    with launch.intercept(lambda kernel, grid, args, options: recorded.append((kernel.__name__, options))):
        for M, scale, p in ((130, 1.0, 0.1), (257, 0.3, 0.2), (4097, 2.0, 0.9)):
            launch.forward(
                torch.empty(M, 64),
                torch.empty(48, 64),
                torch.empty(8, 64),
                torch.empty(48, 8),
                None,
                torch.tensor(1),
                ONE,
                scale,
                p,
                True,
                TILES,
            )
    for name in ("shrink", "expand"):
        options = [o for n, o in recorded if n == name]
        assert len(options) == 3 and options[0] == options[1] == options[2]
        assert options[0]["enable_fp_fusion"] is True, "said, since Triton 3.10 has another default than those before"


def test_precision_follows_torchs_switch():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, wanted in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert launch.precision(torch.float32) == wanted
            assert launch.precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_follows_the_switch_that_torch_has_from_2_9_on():
    """Set by it, or for all at once as transformers does, torch's older question raises, or answers for itself alone."""
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    if not hasattr(matmul, "fp32_precision"):
        return
    try:
        torch.set_float32_matmul_precision("highest")
        for switch in (torch.backends, matmul):
            matmul.fp32_precision = "none"
            for setting, wanted in (("ieee", "ieee"), ("tf32", "tf32"), ("ieee", "ieee")):
                switch.fp32_precision = setting
                assert launch.precision(torch.float32) == wanted, (switch, setting)
            switch.fp32_precision = "none"
        torch.set_float32_matmul_precision("high")
        matmul.fp32_precision = "ieee"
        assert launch.precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_dropout_reads_no_seed():
    assert launch.dropout_args(None) == (None, 0, 1.0)
    seed = torch.tensor(1)
    assert launch.dropout_args((seed, 0.25)) == (seed, philox.threshold_of(0.25), 65536 / (65536 - 16384))

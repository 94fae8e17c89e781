"""The analysis of adapters against dense float64 decompositions, known subspaces, and the numbers of LoRA's paper."""

import math
import statistics

import pytest
import torch

from lora_kernels import analysis
from lora_kernels.analysis import Budget, amplification, budget, random_similarity, spectrum, subspace_similarity

FLOAT64 = torch.float64
SHAPES = [(12, 20, 4), (20, 12, 12), (7, 9, 16), (9, 5, 7), (1, 6, 3), (6, 1, 2)]  # N, K, r; r also between and above N and K


def factors(N, K, r, dtype=FLOAT64):
    return torch.randn(r, K, dtype=dtype), torch.randn(N, r, dtype=dtype)


def rotation(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=FLOAT64))[0]


def axes(*rows: int, K: int = 16) -> torch.Tensor:
    """A factor whose right-singular vectors are these unit vectors, in this order."""
    strengths = torch.arange(len(rows), 0, -1, dtype=FLOAT64)
    return strengths[:, None] * torch.eye(K, dtype=FLOAT64)[list(rows)]


# The spectrum of dW.


@pytest.mark.parametrize("N, K, r", SHAPES)
@pytest.mark.parametrize("scale", [2.5, -0.5])
def test_spectrum_is_the_svd_of_the_product(N, K, r, scale):
    A, B = factors(N, K, r)
    dense, found = scale * B @ A, spectrum(A, B, scale)
    assert found.rank == min(N, K, r) and found.U.shape == (N, found.rank) and found.V.shape == (K, found.rank)
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.U * found.s @ found.V.T, dense, **close)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(dense)[: found.rank], **close)
    for basis in (found.U, found.V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(found.rank, dtype=FLOAT64), **close)
    assert found.norm == pytest.approx(dense.norm().item(), rel=1e-12)


def test_numbers_of_a_spectrum():
    s = torch.linalg.svdvals(torch.randn(4, 4, dtype=FLOAT64) @ torch.randn(4, 20, dtype=FLOAT64))
    B = rotation(12)[:, :4] * s
    found = spectrum(rotation(20)[:4], B)
    p = [value / sum(s.tolist()) for value in s.tolist()]
    assert found.effective_rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-12)
    assert found.stable_rank == pytest.approx(sum(value**2 for value in s.tolist()) / s[0].item() ** 2, rel=1e-12)
    energy = s.square().cumsum(0) / s.square().sum()
    torch.testing.assert_close(found.energy(), energy, rtol=1e-12, atol=0)


@pytest.mark.parametrize("equal", [1, 3])
def test_equal_directions_count_as_themselves(equal):
    found = spectrum(rotation(9)[:equal], 5 * rotation(8)[:, :equal])
    assert found.rank == equal and found.effective_rank == pytest.approx(equal) and found.stable_rank == pytest.approx(equal)
    torch.testing.assert_close(found.energy(), torch.arange(1, equal + 1, dtype=FLOAT64) / equal)


def test_the_ranks_tell_spread_from_strength():
    """One strong direction and many faint ones: all count in the rank, few in the effective, one in the stable."""
    found = spectrum(rotation(32)[:16], rotation(32)[:, :16] * torch.tensor([1.0] + [0.02] * 15, dtype=FLOAT64))
    assert found.rank == 16 and 2 < found.effective_rank < 5 and found.stable_rank == pytest.approx(1 + 15 * 0.02**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float64(dtype):
    A, B = factors(30, 40, 6, torch.float32)
    A, B = A.to(dtype), (300 * B).to(dtype)  # the squares of B A overflow float16
    found = spectrum(A, B, 4.0)
    assert found.U.dtype == found.s.dtype == found.V.dtype == FLOAT64
    torch.testing.assert_close(found.s, torch.linalg.svdvals(4.0 * B.double() @ A.double())[:6], rtol=1e-12, atol=0)


@pytest.mark.parametrize("A, B", [(torch.randn(4, 9), torch.zeros(7, 4)), (torch.zeros(4, 9), torch.randn(7, 4))], ids=["B", "A"])
def test_zero_has_no_directions_and_no_nan(A, B):
    found = spectrum(A, B, 2.0)
    assert (found.rank, found.norm, found.effective_rank, found.stable_rank) == (0, 0.0, 0.0, 0.0)
    assert found.energy().shape == (0,) and found.U.shape == (7, 0) and found.V.shape == (9, 0)


def test_scale_zero_is_no_update():
    assert spectrum(torch.randn(4, 9), torch.randn(7, 4), 0.0).rank == 0


def test_rounding_noise_is_no_direction():
    """Directions that repeat or cancel leave noise of 1e-16, not a rank."""
    A, B = factors(30, 40, 6)
    repeated = spectrum(torch.cat([A, 3 * A]), torch.cat([B, B @ torch.randn(6, 6, dtype=FLOAT64)], 1))
    assert repeated.rank == 6
    assert spectrum(torch.cat([A, A]), torch.cat([B, -B], 1)).rank == 0
    torch.testing.assert_close(spectrum(torch.cat([A, A]), torch.cat([B, B], 1)).s, 2 * spectrum(A, B).s, rtol=1e-12, atol=0)


def test_a_faint_direction_is_a_direction():
    assert spectrum(rotation(40)[:2], rotation(30)[:, :2] * torch.tensor([1.0, 1e-9], dtype=FLOAT64)).rank == 2


def test_parameters_keep_no_graph():
    A, B = (torch.nn.Parameter(t.float()) for t in factors(9, 8, 3))
    assert not spectrum(A, B).s.requires_grad and not subspace_similarity(A, A).requires_grad


@pytest.mark.parametrize(
    "A, B, scale, error, message",
    [
        (torch.randn(4, 9), torch.randn(7, 3), 1.0, ValueError, r"lora_B: wanted \[N, 4\] beside lora_A \[4, 9\], got \[7, 3\]"),
        (torch.randn(4, 9, 1), torch.randn(7, 4), 1.0, ValueError, r"lora_A: wanted a matrix of two sizes above 0, got \[4, 9, 1\]"),
        (torch.randn(0, 9), torch.randn(7, 0), 1.0, ValueError, r"lora_A: wanted a matrix .*, got \[0, 9\]"),
        (torch.full((4, 9), math.nan), torch.randn(7, 4), 1.0, ValueError, "lora_A: wanted finite values, got NaN or Inf"),
        (torch.randn(4, 9), torch.full((7, 4), math.inf), 1.0, ValueError, "lora_B: wanted finite values"),
        (torch.randn(4, 9), torch.randn(7, 4), math.nan, ValueError, "scale: wanted a finite number, got nan"),
        (torch.ones(4, 9, dtype=torch.int64), torch.randn(7, 4), 1.0, TypeError, "lora_A: wanted .*floats, got torch.int64"),
        ([[1.0]], torch.randn(7, 4), 1.0, TypeError, "lora_A: wanted .*floats, got list"),
    ],
)
def test_spectrum_refuses(A, B, scale, error, message):
    with pytest.raises(error, match=message):
        spectrum(A, B, scale)


# Equation 4.


def phi(first, second, i, j) -> float:
    """Eq. 4 word by word."""
    U1, U2 = (torch.linalg.svd(A.double())[2].T for A in (first, second))
    return (torch.linalg.matrix_norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j)).item()


def test_every_entry_is_equation_4():
    first, second = torch.randn(5, 24), torch.randn(9, 24)
    grid = subspace_similarity(first, second)
    wanted = torch.tensor([[phi(first, second, i, j) for j in range(1, 10)] for i in range(1, 6)], dtype=FLOAT64)
    torch.testing.assert_close(grid, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(subspace_similarity(second, first), wanted.T, rtol=1e-10, atol=1e-12)
    assert grid.min() >= 0 and grid.max() <= 1
    torch.testing.assert_close(subspace_similarity(first.T, second.T, side="left"), grid)


def test_a_subspace_is_its_own():
    A = torch.randn(6, 20)
    for again in (A, -3 * A, torch.cat([A, torch.zeros(1, 20)])):
        grid = subspace_similarity(A, again)
        torch.testing.assert_close(grid, torch.ones(6, 6, dtype=FLOAT64))
        assert grid.max() <= 1
    assert subspace_similarity(torch.eye(40), rotation(40)).max() <= 1  # where rounding leads beyond


def test_orthogonal_subspaces_share_nothing():
    assert subspace_similarity(axes(0, 1, 2), axes(5, 6, 7, 8)).abs().max() < 1e-20


def test_known_overlap():
    """(e0, e1, e2) against (e1, e9, e0): which top directions meet, and when."""
    wanted = torch.tensor([[0, 0, 1], [1, 0.5, 1], [1, 0.5, 2 / 3]], dtype=FLOAT64)
    torch.testing.assert_close(subspace_similarity(axes(0, 1, 2), axes(1, 9, 0)), wanted)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_a_rotated_direction_shares_its_squared_cosine(degrees):
    angle = math.radians(degrees)
    turned = torch.zeros(1, 16, dtype=FLOAT64)
    turned[0, 0], turned[0, 1] = math.cos(angle), math.sin(angle)
    assert subspace_similarity(axes(0), turned).item() == pytest.approx(math.cos(angle) ** 2, abs=1e-12)


def test_only_the_space_counts():
    """Mixing the rows keeps the space, so all directions together stay the same; rotating both factors alike changes nothing."""
    first, second, Q = torch.randn(4, 20, dtype=FLOAT64), torch.randn(6, 20, dtype=FLOAT64), rotation(20)
    grid = subspace_similarity(first, second)
    mixed = subspace_similarity(torch.randn(4, 4, dtype=FLOAT64) @ first, second)
    assert mixed[-1, -1].item() == pytest.approx(grid[-1, -1].item(), rel=1e-10) and not torch.allclose(mixed, grid)
    torch.testing.assert_close(subspace_similarity(first @ Q, second @ Q), grid, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(subspace_similarity(rotation(4) @ first, second), grid, rtol=1e-9, atol=1e-12)


def test_the_grid_ends_at_the_rank():
    doubled = torch.cat([axes(0, 1), axes(0, 1)])
    assert subspace_similarity(doubled, axes(0, 1, 2)).shape == (2, 3)
    assert subspace_similarity(torch.randn(30, 8), torch.randn(3, 8)).shape == (8, 3)  # r above K
    A = torch.randn(4, 20, dtype=FLOAT64)
    assert subspace_similarity(torch.cat([A, rotation(4) @ A]), A).shape == (4, 4)  # the repeats are noise, not zeros


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(4, 9), torch.randn(4, 9)), "first: wanted a factor with directions, got zeros; lora_B is zero before training"),
        ((torch.randn(4, 9), torch.randn(4, 8)), r"second: wanted 9 as size 1, as first has, got \[4, 8\]"),
        ((torch.randn(9, 4), torch.randn(8, 4), "left"), r"second: wanted 9 as size 0, as first has, got \[8, 4\]"),
        ((torch.randn(4, 9), torch.full((4, 9), math.nan)), "second: wanted finite values"),
        ((torch.randn(4, 9), torch.randn(4, 9), "A"), "side: wanted 'right' .*, got 'A'"),
    ],
)
def test_similarity_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        subspace_similarity(*args)


def test_chance_is_the_mean_of_gaussian_draws():
    draws = torch.stack([subspace_similarity(torch.randn(3, 24), torch.randn(8, 24)) for _ in range(200)])
    wanted = random_similarity(3, 8, 24)
    band = 4.5 * draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - wanted).abs() <= band).all() and band.max() < 0.05
    assert wanted[1, 4] == 5 / 24 and wanted[2, 0] == 3 / 24
    with pytest.raises(ValueError, match="rank2: wanted a rank from 1 to dim = 24, got 25"):
        random_similarity(3, 25, 24)


# Section 7.3.


def test_amplification_is_table_7():
    N, K, r = 14, 18, 3
    W, (A, B) = torch.randn(N, K, dtype=FLOAT64), factors(N, K, r)
    found = amplification(W, spectrum(A, B, 1.5))
    U, _, Vh = torch.linalg.svd(1.5 * B @ A)
    projected = torch.linalg.matrix_norm(U[:, :r].T @ W @ Vh[:r].T).item()
    assert found.projected == pytest.approx(projected, rel=1e-12) and found.weight == pytest.approx(W.norm().item(), rel=1e-12)
    assert found.update == pytest.approx((1.5 * B @ A).norm().item(), rel=1e-12)
    assert found.factor == pytest.approx(found.update / projected, rel=1e-12)
    chance = [(rotation(N)[:r] @ W @ rotation(K)[:, :r]).norm().square().item() for _ in range(500)]
    assert found.random**2 == pytest.approx(statistics.mean(chance), rel=0.1)


def test_known_amplification():
    """W = diag(10, 9, ... 1); the update is 6 on W's direction of 2, and of 0.5 outside what W has."""
    W = torch.diag(torch.arange(10.0, 0, -1))
    e = torch.eye(10)
    assert amplification(W, spectrum(e[8:9], 6 * e[:, 8:9])).factor == pytest.approx(3.0)
    nothing = amplification(W, spectrum(e[8:9], e[:, 3:4]))
    assert nothing.projected < 1e-12 and nothing.factor > 1e12
    assert analysis.dominant_norm(W, 3) == pytest.approx(math.sqrt(10**2 + 9**2 + 8**2))
    assert amplification(W, spectrum(e[:3], e[:, :3])).projected == pytest.approx(analysis.dominant_norm(W, 3))
    with pytest.raises(ValueError, match="rank: wanted 1 to 10 for weight .*, got 11"):
        analysis.dominant_norm(W, 11)


def test_what_w_lacks_is_amplified_without_bound():
    e = torch.eye(4)
    W = torch.zeros(4, 4)
    assert amplification(W, spectrum(e[:1], e[:, :1])).factor == math.inf


@pytest.mark.parametrize("r, update, projected, random, factor", [(4, 6.91, 0.32, 0.02, 21.5), (64, 3.57, 1.90, 0.33, 1.9)])
def test_the_papers_table(r, update, projected, random, factor):
    """GPT-3's W_q, |W| = 61.95: chance in closed form is the paper's drawn column, and the factor its quotient."""
    chance = analysis.random_norm(61.95, (12288, 12288), r)
    assert chance == pytest.approx(random, rel=0.03)
    assert analysis.Amplification(update, 61.95, projected, chance).factor == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize(
    "weight, B, message",
    [
        (torch.randn(9, 7), torch.randn(7, 4), r"weight: wanted \[7, 9\], got \[9, 7\]"),
        (torch.full((7, 9), math.nan), torch.randn(7, 4), "weight: wanted finite values"),
        (torch.randn(7, 9), torch.zeros(7, 4), r"update: wanted one other than zero, got scale \* B A = 0, as of a fresh adapter"),
    ],
)
def test_amplification_refuses(weight, B, message):
    with pytest.raises(ValueError, match=message):
        amplification(weight, spectrum(torch.randn(4, 9), B))


# Sections 4.2 and 7.1: GPT-3 175B.

GPT3 = dict(d_model=12288, layers=96, base_parameters=175_000_000_000)


@pytest.mark.parametrize("matrices, r", [(1, 8), (2, 4), (4, 2)])
def test_18_million_parameters(matrices, r):
    """Table 5 cuts 18.87 million to 18."""
    assert budget(**GPT3, matrices=matrices, r=r).parameters == 18_874_368


def test_the_papers_budget():
    """r = 4 on q and v in float16. The paper's 35 MB is its rounding of 37.7 (36.0 of 2^20)."""
    found = budget(**GPT3, matrices=2, r=4)
    assert found.base_bytes == 350e9 and found.adapter_bytes == 37_748_736 == 36 * 2**20
    assert found.base_bytes / found.adapter_bytes == pytest.approx(10_000, rel=0.1)
    assert round(found.shared_bytes(100) / 1e9) == 354 and found.copies_bytes(100) == 35e12
    assert found.adapters_per_copy == 9271
    assert budget(**GPT3, matrices=2, r=4, dtype=torch.float32).adapter_bytes == 2 * found.adapter_bytes
    assert analysis.adam_bytes(found.parameters) == 8 * 18_874_368


def test_35_megabytes():
    """The paper's own arithmetic, from its rounded sizes."""
    found = Budget(parameters=18_000_000, adapter_bytes=35_000_000, base_bytes=350_000_000_000)
    assert found.shared_bytes(100) == 353.5e9 and found.copies_bytes(100) == 35e12 and found.adapters_per_copy == 10_000


def test_budget_refuses():
    with pytest.raises(ValueError, match="layers: wanted at least 1, got 0"):
        budget(12288, 0, 1, 8, 175_000_000_000)
    with pytest.raises(TypeError, match="dtype: wanted a floating one, got torch.int8"):
        budget(**GPT3, matrices=1, r=8, dtype=torch.int8)


@pytest.mark.cuda
def test_on_the_gpu():
    A, B, W = torch.randn(8, 64), torch.randn(48, 8), torch.randn(48, 64)
    here, there = spectrum(A, B, 2.0), spectrum(A.cuda(), B.cuda(), 2.0)
    assert there.s.is_cuda and there.U.is_cuda
    torch.testing.assert_close(there.s.cpu(), here.s, rtol=1e-10, atol=0)
    assert amplification(W.cuda(), there).factor == pytest.approx(amplification(W, here).factor, rel=1e-10)
    grid = subspace_similarity(A.cuda(), W.cuda())
    torch.testing.assert_close(grid.cpu(), subspace_similarity(A, W), rtol=1e-8, atol=1e-10)

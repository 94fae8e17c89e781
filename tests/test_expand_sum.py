"""Where u v joins expand's sum: ahead of the K loop, behind it, or as further steps of it; which a call takes, and that all are right."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import launch, lora_linear
from lora_kernels.parity import Case, run_case
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TILE = Expand(64, 64, 64, num_warps=4, num_stages=3)
STEPS = replace(TILE, tma=True, persistent=True)


def config(expand: Expand) -> Config:
    return Config(Shrink(16, 32, split=1, num_stages=2), expand, Wgrad(16, 16, split=1, num_stages=2))


def places(case: Case, device) -> list[str]:
    """Of forward's expand and dX's, which ran and were right."""
    seen = []

    def record(kernel, grid, args, options):
        seen.extend([options["UV"]] if kernel.__name__ == "expand" else [])
        kernel[grid](*args, **options)

    with launch.intercept(record):
        result = run_case(case, device)
    own = run_case(case, device)  # by the package's own launcher
    for each in (result, own):
        assert each.ok and each.launches, f"{each.name}: {each.detail} {each.errors}"
    return seen


@pytest.mark.parametrize("R", [8, 16, 72, 128])
@pytest.mark.parametrize("M, N, K", [(300, 136, 200), (130, 264, 64), (64, 64, 8)])
def test_ranks_as_further_steps(M, N, K, R, device):
    """One step for 8 and 16 ranks, two for 72; columns of x and w, and ranks, that fill no step."""
    assert places(Case(M, N, K, R, DTYPE, config=config(STEPS)), device) == ["steps", "steps"]


@pytest.mark.parametrize("R", [1, 12, 16, 33])
@pytest.mark.parametrize("tma, persistent", [(False, False), (True, False), (False, True)])
def test_behind_the_loop(tma, persistent, R, device):
    expand = replace(TILE, tma=tma, persistent=persistent)
    assert places(Case(300, 136, 200, R, DTYPE, config=config(expand)), device) == ["last", "last"]


@pytest.mark.parametrize(
    "change, expand, wanted",
    [
        ({"R": 12}, STEPS, ["last", "last"]),  # rows of u and of B are not multiples of 16 bytes
        ({"p": 0.1}, STEPS, ["steps", "first"]),  # dX's part is dropped
        ({"adapter_dtype": torch.float32}, STEPS, ["last", "last"]),
        ({"widths": (64, 72)}, STEPS, ["last", "steps"]),  # a tile's u is its layer's; dX has one for all
        ({"adapters": 3}, replace(STEPS, block_m=64), ["first", "first"]),
        ({"R": 200}, TILE, ["first", "first"]),  # two blocks of ranks
        ({}, replace(TILE, block_n=32), ["first", "first"]),
        ({}, replace(TILE, split=2), ["first", "first"]),
    ],
    ids=str,
)
def test_what_takes_which(change, expand, wanted, device):
    case = replace(Case(300, 136, 200, 16, DTYPE, config=config(expand)), **change)
    if case.adapters:
        case = replace(case, config=replace(case.config, shrink=replace(case.config.shrink, block_m=16)))
    assert places(case, device) == wanted


@pytest.mark.parametrize("expand", [TILE, STEPS, replace(TILE, block_n=32)], ids=["last", "steps", "first"])
@pytest.mark.parametrize("R", [8, 12])
def test_a_token_that_is_not_finite_reaches_no_other(expand, R, device):
    """Its row of u lies behind the ranks of the one before, which fill no block."""
    x, weight, A, B = (torch.randn(size, device=device, dtype=DTYPE) for size in ((130, 72), (64, 72), (R, 72), (64, R)))
    x[70] = float("nan")
    y = lora_linear(x, weight, A, B, config=config(expand), impl="triton")
    others = torch.arange(130, device=device) != 70
    assert y[70].isnan().all() and y[others].isfinite().all()


def test_layers_of_one_x_add_to_dX(device):
    assert set(places(Case(300, 128, 200, 16, DTYPE, layers=2, config=config(STEPS)), device)) == {"steps"}

"""Many adapters: the plan against a brute-force one, and what a batch of tokens with adapters of their own promises."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import Segments, launch, lora_linear, parity, parity_cases
from lora_kernels.parity import Case, run_case
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = Config(Shrink(16, 16, split=2, num_stages=2), Expand(16, 16, 16, num_warps=4, num_stages=2), Wgrad(16, 16, split=3, num_stages=2))
MANY = Case(37, 40, 50, 5, config=TILES, adapters=6)
AWAITED = replace(TILES, expand=replace(TILES.expand, u="awaited"))
LIBRARY = replace(TILES, expand=replace(TILES.expand, base="library"))
EACH = replace(TILES, expand=replace(TILES.expand, each=True))
SPLIT = replace(EACH, expand=replace(EACH.expand, split=2))
MASKED = replace(TILES, expand=replace(TILES.expand, masked=True))
WAYS = {"given": TILES, "masked": MASKED, "each": EACH, "awaited": AWAITED, "library": LIBRARY, "split": SPLIT}
CONFIGS = pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
ARMS = pytest.mark.parametrize("impl, config", [*(("triton", config) for config in WAYS.values()), ("torch", None)], ids=[*WAYS, "torch"])


def plan(ids, E: int, **blocks) -> Segments:
    return Segments.from_ids(torch.as_tensor(ids, dtype=torch.int32, device=DEVICE), E, **blocks)


def for_one(config: Config | None) -> Config | None:
    return config and replace(config, expand=replace(config.expand, masked=False, each=False))


def blocks_of(config: Config | None) -> dict:
    return {} if config is None else dict(row_block=config.expand.block_m, gather_block=config.shrink.block_m)


def check_plan(ids: list[int], E: int, row_block: int, gather_block: int) -> None:
    """Every field of the plan against its definition, token by token."""
    s, M = plan(ids, E, row_block=row_block, gather_block=gather_block), len(ids)
    assert s.ids.tolist() == ids and s.tokens == M
    slots = [E if i < 0 else i for i in ids]
    assert s.order.tolist() == sorted(range(M), key=lambda m: (slots[m], m))
    assert s.starts.tolist() == [sum(slot < e for slot in slots) for e in range(E + 2)]
    covered = []
    for slot, first in zip(s.tile_adapter.tolist(), s.tile_first.tolist(), strict=True):
        if slot >= 0:
            tokens = s.order.tolist()[first : min(first + gather_block, s.starts.tolist()[slot + 1])]
            assert 1 <= len(tokens) <= gather_block and {slots[m] for m in tokens} == {slot}
            covered += tokens
    assert sorted(covered) == list(range(M)), "each token in one tile"
    for block in range(-(-M // row_block)):
        wanted = sorted({i for i in ids[block * row_block : (block + 1) * row_block] if i >= 0})
        count = s.counts.tolist()[block]
        assert s.present.tolist()[block * row_block : block * row_block + count] == wanted
    assert s.counts.shape == (-(-M // row_block),) and s.present.shape == (row_block * -(-M // row_block),)


def test_plan_against_brute_force():
    rng = random.Random(0)
    for _ in range(60):
        M, E = rng.choice([0, 1, 2, 15, 16, 17, 64, 100, 131]), rng.choice([1, 2, 5, 33, 200])
        kind = rng.choice(["any", "one", "none", "runs", "distinct", "few"])
        ids = [rng.randrange(-1, E) for _ in range(M)]
        if kind == "one":
            ids = [rng.randrange(E)] * M
        elif kind == "none":
            ids = [-1] * M
        elif kind == "runs":
            ids.sort(reverse=True)
        elif kind == "distinct":
            ids = [m % E for m in range(M)]
        elif kind == "few":
            ids = [rng.choice([-1, 0, E - 1]) for _ in range(M)]
        check_plan(ids, E, rng.choice([16, 32, 64]), rng.choice([16, 32]))


def test_int64_ids_of_any_shape_and_default_blocks():
    ids = torch.randint(-1, 9, (3, 7), device=DEVICE)
    s = Segments.from_ids(ids, 9)
    assert s.ids.tolist() == ids.reshape(-1).tolist() and s.ids.dtype == torch.int32
    assert [Segments.from_ids(torch.zeros(M, dtype=torch.int32), 2).row_block for M in (1, 17, 33, 257)] == [16, 32, 64, 128]


def test_large_plans():
    """4,096 adapters, a million tokens; the number of tiles follows the tokens, not the adapters."""
    ids = torch.randint(-1, 4096, (1_000_000,), device=DEVICE)
    s = Segments.from_ids(ids, 4096)
    assert torch.equal(ids[s.order.long()].sort(stable=True).values, ids.sort().values)
    counted = torch.bincount(ids[ids >= 0], minlength=4096)
    assert torch.equal(s.starts.diff()[:4096].long(), counted)
    few = Segments.from_ids(torch.tensor([4000, 3, 3], device=DEVICE), 4096)
    assert few.tile_adapter.shape[0] <= 3 and sorted(few.tile_adapter.tolist())[-2:] == [3, 4000]


def test_from_lengths():
    a = Segments.from_lengths([3, 0, 2], [4, 1, -1], device=DEVICE)
    assert a.ids.tolist() == [4, 4, 4, -1, -1] and a.num_adapters == 5
    b = Segments.from_lengths(torch.tensor([2, 1], device=DEVICE), num_adapters=7, tokens=3)
    assert b.ids.tolist() == [0, 0, 1] and b.num_adapters == 7
    assert Segments.from_lengths([], num_adapters=2).tokens == 0
    assert Segments.from_lengths([1, 1]).num_adapters == 2
    assert Segments.from_lengths(iter([1, 2])).ids.tolist() == [0, 1, 1]
    assert Segments.from_lengths([2, 1], [-1, -1]).num_adapters == 1
    assert Segments.from_lengths([1, 1], [3, 2], num_adapters=3, validate=False).ids.tolist() == [-1, 2]
    assert Segments.from_lengths([1, 2], device="meta").device.type == "meta"


def test_a_plan_asks_nothing_of_the_device():
    """A value read back on the host would raise under fake tensors, and would be a sync on a GPU."""
    with FakeTensorMode():
        s = Segments.from_ids(torch.empty(100, dtype=torch.int64), 8)
        assert s.present.shape == (128,) and s.tile_adapter.shape == (14,)
        x, W = torch.empty(100, 16), torch.empty(24, 16)
        assert lora_linear(x, W, torch.empty(8, 4, 16), torch.empty(8, 24, 4), segments=s).shape == (100, 24)


def test_a_plan_of_tensors_and_integers_is_the_same_plan():
    s = plan([1, 0, -1], 2)
    again = Segments.of(s.tensors(), s.geometry())
    assert again.tensors() == s.tensors() and again.geometry() == s.geometry()
    assert "tokens=3, num_adapters=2" in repr(s) and s.to("cpu").ids.tolist() == [1, 0, -1]


def case_tensors(case: Case) -> dict:
    return parity.inputs(case, DEVICE)


def call(t: dict, ids, E: int, config=TILES, impl="triton", grads=True, rows=None, **kwargs):
    """y and gradients of x, A, B for these ids; ``rows``: a choice of tokens."""
    x, dY = (t["x"], t["dY"]) if rows is None else (t["x"][rows], t["dY"][rows])
    x, A, B = (v.detach().clone().requires_grad_(grads) for v in (x, t["lora_A"], t["lora_B"]))
    s = plan(ids, E, **blocks_of(config))
    y = lora_linear(x, t["weight"], A, B, t["bias"], segments=s, impl=impl, config=config, training=True, seed=5, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dY)] if grads else [y]


@pytest.mark.parametrize("popularity", ["mixed", "distinct", "runs", "one", "none"])
@pytest.mark.parametrize("M", [1, 16, 70])
def test_mixes(popularity, M):
    case = replace(MANY, M=M, popularity=popularity, p=0.2, mixed_ranks=M == 70)
    result = run_case(case, DEVICE)
    assert result.ok and result.launches > 0, f"{result.detail} {result.errors}"


@pytest.mark.parametrize("R, mixed", [(1, False), (16, False), (40, True), (100, True), (130, False), (130, True), (512, False)])
def test_ranks(R, mixed):
    for config in (TILES, MASKED, EACH, AWAITED):
        result = run_case(replace(MANY, M=21, N=18, K=20, R=R, adapters=3, mixed_ranks=mixed, config=config), DEVICE)
        assert result.ok, f"{result.name}: {result.detail} {result.errors}"


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(layout):
    assert run_case(replace(MANY, layout=layout, p=0.1), DEVICE).ok


def test_float32_adapters_on_a_16_bit_base():
    assert run_case(replace(MANY, dtype=torch.float16, adapter_dtype=torch.float32), DEVICE).ok


def test_the_torch_arm_in_float64():
    """Beside a truth in the same dtype the budget is empty: a few roundings instead."""
    for popularity, p in itertools.product(("mixed", "runs", "none"), (0.0, 0.3)):
        case = replace(MANY, dtype=torch.float64, impl="torch", config=None, popularity=popularity, p=p, mixed_ranks=True)
        t = case_tensors(case)
        for ours, truth in zip(parity.evaluate(case, t, "torch"), parity.evaluate(case, t, "reference"), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-14)


def test_more_adapters_than_tokens():
    result = run_case(replace(MANY, M=20, N=16, K=16, R=2, adapters=300, config=None), DEVICE)
    assert result.ok, result.errors


@ARMS
def test_a_stack_of_equal_adapters_is_one_adapter(impl, config):
    """Whatever the ids, the mask is a function of the original token: the single path with the same seed."""
    t = case_tensors(replace(MANY, adapters=0))
    stacked = t | {"lora_A": t["lora_A"].expand(4, -1, -1), "lora_B": t["lora_B"].expand(4, -1, -1)}
    ids = torch.arange(37) * 7 % 4
    y, dX, dA, dB = call(stacked, ids, 4, config, impl, dropout_p=0.4)
    x, A, B = (t[name].clone().requires_grad_() for name in ("x", "lora_A", "lora_B"))
    one = lora_linear(x, t["weight"], A, B, t["bias"], dropout_p=0.4, training=True, seed=5, impl=impl, config=for_one(config))
    wanted = [one, *torch.autograd.grad(one, (x, A, B), t["dY"])]
    for ours, theirs in zip((y, dX, dA.sum(0), dB.sum(0)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@ARMS
def test_many_adapters_are_a_loop_of_single_calls(impl, config):
    t, ids = case_tensors(MANY), parity_cases.adapter_ids(MANY).to(DEVICE)
    scale = torch.rand(6, device=DEVICE) + 0.5
    y, dX, dA, dB = call(t, ids, 6, config, impl, scale=scale)
    for e in range(6):
        at = (ids == e).nonzero().squeeze(1)
        if not len(at):
            assert not dA[e].any() and not dB[e].any()
            continue
        x, A, B = (v.clone().requires_grad_() for v in (t["x"][at], t["lora_A"][e], t["lora_B"][e]))
        one = lora_linear(x, t["weight"], A, B, t["bias"], scale=scale[e].item(), impl=impl, config=for_one(config))
        wanted = [one, *torch.autograd.grad(one, (x, A, B), t["dY"][at])]
        for ours, theirs in zip((y[at], dX[at], dA[e], dB[e]), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def rows_alone(monkeypatch):
    """The interpreter's dot is NumPy's, whose sums depend on a row's place in the tile; a GPU's do not, nor do these, row by row."""

    def matmul(a, b, dtype=None):
        return np.stack([np.dot(row.astype(np.float32), b.astype(np.float32)) for row in a])

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.parametrize("config", [TILES, MASKED, EACH, AWAITED, SPLIT], ids=["given", "masked", "each", "awaited", "split"])
def test_batch_invariance(config, rows_alone):
    """A token's y and dX do not depend on its neighbours, their adapters, its place or the batch's size, bit for bit.

    Where the library computes the base product that is the library's to promise, and it does not.
    """
    t, ids = case_tensors(MANY), parity_cases.adapter_ids(MANY)
    y, dX = call(t, ids, 6, config)[:2]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    again = call(t, ids[order], 6, config, rows=order)
    assert torch.equal(again[0], y[order]) and torch.equal(again[1], dX[order])
    some = torch.tensor([30, 3, 11, 36])
    again = call(t, ids[some], 6, config, rows=some)
    assert torch.equal(again[0], y[some]) and torch.equal(again[1], dX[some])
    others = torch.where(torch.arange(37) == 11, ids, (ids + 2) % 6)
    again = call(t, others, 6, config)
    assert torch.equal(again[0][11], y[11]) and torch.equal(again[1][11], dX[11])
    alone = call(t, ids[11:12], 6, config, rows=slice(11, 12))
    assert torch.equal(alone[0][0], y[11]) and torch.equal(alone[1][0], dX[11])


@CONFIGS
def test_repeats_are_equal_bit_for_bit(config):
    t, ids = case_tensors(MANY), parity_cases.adapter_ids(MANY)
    first = call(t, ids, 6, config, dropout_p=0.1)
    for ours, again in zip(first, call(t, ids, 6, config, dropout_p=0.1), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@ARMS
def test_a_diverged_adapter_reaches_nobody_else(impl, config, value):
    t, ids = case_tensors(MANY), parity_cases.adapter_ids(MANY).to(DEVICE)
    clean = call(t, ids, 6, config, impl, dropout_p=0.1)
    rest, others = ids != 1, torch.arange(6) != 1
    for names in (("lora_A", "lora_B"), ("lora_B",)):
        bad = t | {name: t[name].clone() for name in names}
        for name in names:
            bad[name][1] = value
        y, dX, dA, dB = call(bad, ids, 6, config, impl, dropout_p=0.1)
        assert (ids == 1).sum() > 2 and not y[~rest].isfinite().any()
        assert torch.equal(y[rest], clean[0][rest]) and torch.equal(dX[rest], clean[1][rest])
        assert torch.equal(dA[others], clean[2][others]) and torch.equal(dB[others], clean[3][others])


@ARMS
def test_a_diverged_token_reaches_nobody_else(impl, config):
    t, ids = case_tensors(MANY), parity_cases.adapter_ids(MANY).to(DEVICE)
    clean = call(t, ids, 6, config, impl)
    bad = int(((ids == 1) & (ids.roll(1) >= 0)).nonzero()[-1])
    t["x"] = t["x"].clone()
    t["x"][bad, 3] = float("nan")
    y, dX, dA, dB = call(t, ids, 6, config, impl)
    rest, others = torch.arange(37) != bad, torch.arange(6) != 1
    assert y[bad].isnan().all() and torch.equal(y[rest], clean[0][rest]) and torch.equal(dX, clean[1])
    assert torch.equal(dA[others], clean[2][others]) and torch.equal(dB[others], clean[3][others])


@ARMS
def test_what_is_not_used_is_not_read_and_its_gradient_is_zero(impl, config):
    """NaN in absent adapters and beyond an adapter's rank leaves no trace; their gradients are exactly zero."""
    t, ids = case_tensors(MANY), torch.where(torch.arange(37) % 3 == 0, -1, torch.arange(37) % 2 * 3)
    ranks = torch.tensor([2, 5, 5, 4, 0, 1], dtype=torch.int32, device=DEVICE)
    used = torch.zeros(6, 5, dtype=torch.bool, device=DEVICE)
    used[0, :2], used[3, :4] = True, True
    for name, place in (("lora_A", ~used[:, :, None]), ("lora_B", ~used[:, None, :])):
        t[name] = t[name].masked_fill(place, float("nan"))
    with parity.poisoned_empty():
        y, dX, dA, dB = call(t, ids, 6, config, impl, ranks=ranks, dropout_p=0.2)
    assert y.isfinite().all() and dX.isfinite().all() and dA.isfinite().all() and dB.isfinite().all()
    assert not dA[~used].any() and not dB.mT[~used].any()
    assert dA[used].any(1).all() and dB.mT[used].any(1).all()


@ARMS
def test_tokens_without_an_adapter_get_the_base(impl, config):
    t = case_tensors(MANY)
    for name in ("lora_A", "lora_B"):
        t[name] = torch.full_like(t[name], float("nan"))
    y, dX, dA, dB = call(t, [-1] * 37, 6, config, impl)
    torch.testing.assert_close(y, torch.nn.functional.linear(t["x"], t["weight"], t["bias"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dX, t["dY"] @ t["weight"], rtol=1e-5, atol=1e-5)
    assert not dA.any() and not dB.any()


def test_scales_and_ranks_change_without_another_compilation():
    """They are read from the device: the same launch arguments otherwise."""
    t, seen = case_tensors(MANY), []
    scale, ranks = torch.ones(6, device=DEVICE), torch.full((6,), 5, dtype=torch.int32, device=DEVICE)

    def record(kernel, grid, args, options):
        seen.append((kernel.__name__, grid, options, [a for a in args if isinstance(a, (int, float))]))
        kernel[grid](*args, **options)

    ids = torch.arange(37) % 6
    with launch.intercept(record):
        first = call(t, ids, 6, scale=scale, ranks=ranks, grads=False)[0]
        half = len(seen)
        scale[2], ranks[3] = 7.0, 1
        second = call(t, ids, 6, scale=scale, ranks=ranks, grads=False)[0]
    assert seen[:half] == seen[half:]
    changed = (first != second).any(1).cpu()
    assert torch.equal(changed, (ids == 2) | (ids == 3))


def test_only_what_is_wanted_is_computed(launched):
    t, ids = case_tensors(MANY), torch.arange(37) % 6
    s = plan(ids, 6, **blocks_of(TILES))
    wanted = {
        "x": ["shrink", "add_parts", "expand"],
        "lora_A": ["shrink", "add_parts", "wgrad", "add_parts"],
        "lora_B": ["wgrad", "add_parts"],
    }
    for name, kernels in wanted.items():
        leaf = t[name].clone().requires_grad_()
        y = lora_linear(**{k: leaf if k == name else t[k] for k in ("x", "weight", "lora_A", "lora_B")}, segments=s, config=TILES)
        assert launched(lambda y=y, leaf=leaf: torch.autograd.grad(y, leaf, t["dY"])) == kernels


def test_the_low_rank_part_follows_the_tokens():
    """1,000 adapters with 20 tokens: as many gathered tiles as tokens at most, and no program for the rest."""
    case, grids = replace(MANY, M=20, N=16, K=16, adapters=1000, config=None), []
    t, s = case_tensors(case), plan([3] * 20, 1000)
    with launch.intercept(lambda kernel, grid, args, options: grids.append((kernel.__name__, grid))):
        lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], segments=s, impl="triton")
    assert grids[0][0] == "shrink" and grids[0][1][0] <= 20


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_operators_with_segments(impl):
    """torch's own checks of the schema, the fake and the registration; and torch.compile without a break."""
    t, s = case_tensors(MANY), plan(torch.arange(37) % 6, 6, **blocks_of(TILES))
    ranks = torch.full((6,), 3, dtype=torch.int32, device=DEVICE)
    key = TILES.key() if impl == "triton" else ""
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"], t["bias"], None, torch.ones(6, device=DEVICE), ranks, s.tensors(), s.geometry())
    torch.library.opcheck(torch.ops.lora_kernels.forward.default, (*args, 1.0, 0.0, True, impl, key))

    def layer(x, A, B, ids):
        its_plan = Segments.from_ids(ids, 6)
        return lora_linear(x, t["weight"], A, B, t["bias"], segments=its_plan, ranks=ranks, impl=impl)

    ids = torch.arange(37, device=DEVICE) % 6
    leaves = [t[name].clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        y = run(*leaves, ids)
        grads = torch.autograd.grad(y, leaves, t["dY"])
        if run is layer:
            wanted = [y, *grads]
    for ours, theirs in zip([y, *grads], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_no_tokens_and_a_batch_of_sequences(impl):
    t = case_tensors(MANY)
    A, B = (t[name].clone().requires_grad_() for name in ("lora_A", "lora_B"))
    y = lora_linear(t["x"][:0], t["weight"], A, B, t["bias"], segments=plan([], 6), impl=impl)
    dA, dB = torch.autograd.grad(y, (A, B), y.detach())
    assert y.shape == (0, 40) and dA.shape == A.shape and dB.shape == B.shape and not dA.any() and not dB.any()
    s = Segments.from_ids((torch.arange(36, device=DEVICE) % 6).view(2, 18), 6)
    flat = lora_linear(t["x"][:36], t["weight"], A, B, segments=s, impl=impl)
    assert torch.equal(lora_linear(t["x"][:36].view(2, 18, 50), t["weight"], A, B, segments=s, impl=impl), flat.view(2, 18, 40))


def test_checkpoint_with_segments():
    """Recomputation in backward draws the same mask and uses the same plan."""
    t, s = case_tensors(MANY), plan(torch.arange(37) % 6, 6)
    results = []
    for checkpointed in (False, True):
        leaves = [t[name].clone().requires_grad_() for name in ("x", "lora_A", "lora_B")]

        def layer(x, A, B):
            return lora_linear(x, t["weight"], A, B, segments=s, dropout_p=0.5, training=True, impl="torch")

        torch.manual_seed(4)
        y = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False) if checkpointed else layer(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, t["dY"])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)

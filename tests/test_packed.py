"""Layers that one weight packs, ``widths``: against float64 and a call for each, alone and with many adapters; launches, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_kernels import TILES, with_u
from test_memory import Kept
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Segments, UnsupportedError, explain, lora_linear, ops, parity
from lora_kernels.parity import Case, run_case
from lora_kernels.problem import Problem, forward_flops
from lora_kernels.segments import Adapters
from lora_kernels.tuning import heuristic, tables, why_not
from lora_kernels.tuning.arch import Arch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = ("triton", "torch")
M, K, WIDTHS, R, E = 19, 40, (24, 1, 17), 5, 4
N, L = sum(WIDTHS), len(WIDTHS)
CASE = Case(M, N, K, R, widths=WIDTHS)
TENANTS = replace(CASE, adapters=E, mixed_ranks=True)
COLUMNS = [slice(0, 24), slice(24, 25), slice(25, 42)]


def check(case: Case):
    result = run_case(case, DEVICE)
    assert result.ok and (result.launches > 0) == (case.impl == "triton"), f"{result.name}: {result.detail} {result.errors}"


def operands(*stack, dtype=torch.float32, trained=True) -> dict:
    """x, weight, lora_A, lora_B and bias."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (*stack, L * R, K), "lora_B": (*stack, N, R), "bias": (N,)}
    found = {name: torch.randn(shape, generator=draw).to(DEVICE, dtype) for name, shape in shapes.items()}
    for name in ("x", "lora_A", "lora_B", "bias"):
        found[name].requires_grad_(trained)
    return found


def plan(ids=None) -> Segments:
    ids = torch.tensor([(i * 7) % (E + 1) - 1 for i in range(M)]) if ids is None else ids
    return Segments.from_ids(ids.to(DEVICE), E, row_block=16, gather_block=16)


def tenants() -> dict:
    ranks = torch.tensor([5, 2, 0, 4], dtype=torch.int32, device=DEVICE)
    return dict(segments=plan(), ranks=ranks, scale=torch.tensor([0.5, 1.0, 2.0, -1.0], device=DEVICE))


def layer_by_layer(t: dict, **how) -> torch.Tensor:
    """The same by a call for each layer."""
    parts = []
    for i, own in enumerate(COLUMNS):
        A = t["lora_A"][..., i * R : (i + 1) * R, :]
        parts.append(lora_linear(t["x"], t["weight"][own], A, t["lora_B"][..., own, :], t["bias"][own], **how))
    return torch.cat(parts, -1)


def gradients(y: torch.Tensor, t: dict) -> dict:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    leaves = {name: each for name, each in t.items() if each.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=2e-4, msg=name)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("r", [1, 3, 16, 17, 43, 170])
def test_ranks(impl, many, r):
    """Blocks of u's columns that are several layers', and layers that are several blocks."""
    case = replace(TENANTS if many else CASE, N=21, K=33, R=r, widths=(8, 2, 11), impl=impl, config=TILES if impl == "triton" else None)
    check(case)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("widths", [(1, 1), (16, 16, 16), (15, 17), (40,), (64, 3), (3, 64), (5,) * 8, (1, 33, 16, 2)])
def test_widths(impl, widths):
    for case in (replace(CASE, p=0.1), TENANTS):
        check(replace(case, N=sum(widths), widths=widths, impl=impl, config=TILES if impl == "triton" else None))


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("tokens, K", [(1, 1), (1, 40), (16, 16), (17, 15), (70, 64)])
def test_sizes(impl, tokens, K):
    for case in (replace(CASE, p=0.1), TENANTS):
        check(replace(case, M=tokens, K=K, impl=impl))


@pytest.mark.parametrize("split", [2, 3, 64])
def test_splits(split):
    """Of the columns of dY that are a layer's, of which a short layer has fewer than there are programs, and of the tokens."""
    config = replace(TILES, shrink=replace(TILES.shrink, split=split), wgrad=replace(TILES.wgrad, split=split))
    for case in (CASE, TENANTS):
        check(replace(case, M=70, N=130, widths=(97, 1, 32), config=config))


@pytest.mark.parametrize("case", [CASE, TENANTS], ids=["one", "many"])
def test_parts_of_a_tile(case):
    """K split over programs, and as many counters as there are tiles, none of which is of two layers."""
    check(replace(case, M=40, p=0.1, config=with_u("given", split=3)))


def test_masked_blocks_of_ranks():
    """Each adapter's product with zeros in the rows of others, its rank ending in every layer, and u's columns in several blocks."""
    check(replace(TENANTS, N=21, K=33, R=43, widths=(8, 2, 11), config=with_u("given", masked=True)))


@pytest.mark.parametrize("u, many", [("given", False), ("given", True), ("loop", False)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_both_sources_of_u(launched, u, many, p):
    t, how = operands(*([E] if many else []), trained=False), tenants() if many else dict(scale=0.5)
    how |= dict(dropout_p=p, training=True, seed=7)
    y = lora_linear(**t, widths=WIDTHS, config=with_u(u), impl="triton", **how)
    torch.testing.assert_close(y, lora_linear(**t, widths=WIDTHS, impl="reference", **how), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", (*ARMS, "reference"))
@pytest.mark.parametrize("many", [False, True])
def test_it_is_a_call_for_each_layer(impl, many):
    t, how = operands(*([E] if many else [])), tenants() if many else dict(scale=0.5)
    ours, theirs = lora_linear(**t, widths=WIDTHS, impl=impl, **how), layer_by_layer(t, impl="reference", **how)
    close({"y": ours} | gradients(ours, t), {"y": theirs} | gradients(theirs, t))


def test_the_masks_of_all_layers_are_one():
    """One layer's dropout on one x, as the layer that packs them has it."""
    t, how = operands(), dict(scale=0.5, dropout_p=0.4, training=True, seed=11)
    y = layer_by_layer(t, impl="reference", **how)
    theirs = {"y": y} | gradients(y, t)
    for impl in ARMS:
        ours = lora_linear(**t, widths=WIDTHS, impl=impl, **how)
        close({"y": ours} | gradients(ours, t), theirs)


@pytest.mark.parametrize("impl", ARMS)
def test_one_width_is_one_layer(impl):
    t = operands()
    t |= {"lora_A": t["lora_A"][:R]}
    assert torch.equal(lora_linear(**t, widths=(N,), impl=impl), lora_linear(**t, impl=impl))


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_beyond_a_rank_is_not_read(impl, what):
    t, how = operands(E), tenants()
    clean = lora_linear(**t, widths=WIDTHS, impl=impl, **how)
    poisoned = {name: each.detach().clone() for name, each in t.items()}
    for e, rank in enumerate(how["ranks"].tolist()):
        poisoned["lora_A"][e].view(L, R, K)[:, rank:] = what
        poisoned["lora_B"][e, :, rank:] = what
    for name in ("x", "lora_A", "lora_B", "bias"):
        poisoned[name].requires_grad_()
    ours = lora_linear(**poisoned, widths=WIDTHS, impl=impl, **how)
    assert torch.equal(ours, clean)
    theirs, found = gradients(clean, t), gradients(ours, poisoned)
    for name, wanted in theirs.items():
        assert torch.equal(found[name], wanted), name
    for e, rank in enumerate(how["ranks"].tolist()):
        assert not found["lora_A"][e].view(L, R, K)[:, rank:].any() and not found["lora_B"][e, :, rank:].any()


@pytest.mark.parametrize("impl, config", [("torch", None), ("triton", None), ("triton", with_u("given", masked=True))])
def test_one_layer_and_one_tenant_diverge_alone(impl, config):
    t, how = operands(E, trained=False), tenants()
    clean = lora_linear(**t, widths=WIDTHS, impl=impl, config=config, **how)
    t["lora_A"][1, 2 * R] = float("nan")  # tenant 1, the last layer
    spoilt = lora_linear(**t, widths=WIDTHS, impl=impl, config=config, **how)
    its = (how["segments"].ids == 1).nonzero().squeeze(1)
    assert len(its) and spoilt[its][:, COLUMNS[2]].isnan().all()
    spoilt[its[:, None], torch.arange(25, 42, device=DEVICE)] = clean[its[:, None], torch.arange(25, 42, device=DEVICE)]
    assert torch.equal(spoilt, clean)


def test_launches(launched):
    """As many for all layers as for one."""
    t, ys = operands(), []
    how = dict(widths=WIDTHS, impl="triton")
    assert launched(lambda: ys.append(lora_linear(**t, config=TILES, **how))) == ["shrink", "add_parts", "expand"]
    backward = launched(lambda: gradients(ys[0], t))
    assert backward == ["shrink", "add_parts", "expand", "wgrad", "wgrad", "add_parts"]
    assert launched(lambda: lora_linear(**{**t, "x": t["x"][:3]}, **how)) == ["expand"]  # few tokens: u in the loop
    t = operands(E)
    assert launched(lambda: lora_linear(**t, **tenants(), **how)) == ["shrink", "expand"]


@pytest.mark.parametrize("impl", ARMS)
def test_bytes_kept(impl):
    t = operands()
    with Kept() as kept:
        lora_linear(**t, widths=WIDTHS, impl=impl)
    assert kept.bytes(besides=[t["weight"], t["lora_A"], t["lora_B"]]) == 4 * M * K + 4 * M * L * R


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1])
def test_each_gradient_alone(impl, many, needs):
    t, how = operands(*([E] if many else [])), tenants() if many else {}
    for name, need in zip(("x", "lora_A", "lora_B"), needs, strict=True):
        t[name].requires_grad_(need)
    ours, theirs = lora_linear(**t, widths=WIDTHS, impl=impl, **how), layer_by_layer(t, impl="reference", **how)
    close(gradients(ours, t), gradients(theirs, t))


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("many", [False, True])
def test_opcheck(impl, many):
    case = replace(TENANTS if many else CASE, M=6, p=0.3)
    t, given = parity.inputs(case, DEVICE), parity.many(case, DEVICE)
    scale = given["scale"] if many else None
    flat = Adapters(given.get("segments"), scale, given.get("ranks"), WIDTHS).flat()
    assert flat[3][4:] == list(WIDTHS) and Adapters.from_flat(*flat).widths == WIDTHS
    seed, x, W, A, B = torch.tensor(3, device=DEVICE), t["x"], t["weight"], t["lora_A"], t["lora_B"]
    torch.library.opcheck(ops.forward_op, (x, W, A, B, t["bias"], seed, *flat, 0.5, 0.3, True, impl, ""))
    u = torch.randn(6, L * R, device=DEVICE)
    for needs in ((True, True, True, True), (False, True, False, False), (False, False, True, False)):
        torch.library.opcheck(ops.backward_op, (t["dY"], x, W, A, B, u, seed, *flat, 0.5, 0.3, *needs, torch.float32, impl, ""))


@pytest.mark.parametrize("many", [False, True])
def test_compiled_whole(many):
    """And compiled again where sizes become symbols, those of adapters, too."""
    how = tenants() if many else {}
    compiled = torch.compile(lambda t: lora_linear(**t, widths=WIDTHS, impl="torch", **how), fullgraph=True, backend="aot_eager")
    for features in (K, K - 7):
        t = {name: each[..., :features] if each.shape[-1] == K else each for name, each in operands(*([E] if many else [])).items()}
        t = {name: each.detach().requires_grad_(each.requires_grad) for name, each in t.items()}
        ours, theirs = compiled(t), lora_linear(**t, widths=WIDTHS, impl="torch", **how)
        close({"y": ours} | gradients(ours, t), {"y": theirs} | gradients(theirs, t))


def test_flops_are_those_of_the_layers():
    t = operands()
    with FlopCounterMode(display=False) as ours:
        lora_linear(**t, widths=WIDTHS).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        layer_by_layer(operands()).sum().backward()
    assert ours.get_total_flops() == theirs.get_total_flops() == 2 * M * (2 * N * K + 3 * N * R + 3 * L * R * K)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("features", [0, K])
def test_nothing_in(impl, tokens, features):
    t = operands()
    t |= {"x": t["x"].detach()[:tokens, :features].requires_grad_(), "weight": t["weight"][:, :features]}
    t |= {"lora_A": t["lora_A"].detach()[:, :features].requires_grad_()}
    y = lora_linear(**t, widths=WIDTHS, impl=impl)
    found = gradients(y, t)
    assert y.shape == (tokens, N) and all(found[name].shape == t[name].shape for name in found)
    if not features:
        assert torch.equal(y, t["bias"].expand(tokens, N))


def test_leading_sizes_autocast_and_a_bias_of_the_adapter():
    t = operands(trained=False)
    x = t.pop("x")[:18].view(2, 9, K)
    whole = lora_linear(x, **t, widths=list(WIDTHS))
    assert whole.shape == (2, 9, N)
    torch.testing.assert_close(whole.view(18, N), lora_linear(x.view(18, K), **t, widths=WIDTHS))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert lora_linear(x, **t, widths=WIDTHS).dtype == torch.bfloat16
    extra = torch.randn(N, device=DEVICE)
    torch.testing.assert_close(
        lora_linear(x, **t, widths=WIDTHS, lora_bias=extra, scale=0.5) - 0.5 * extra,
        lora_linear(x, **t, widths=WIDTHS, scale=0.5),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(widths=(24, 18)), ValueError, r"lora_A: wanted r rows for each of the 2 layers of widths, got 15 \(shape \[15, 40\]\)"),
        (
            dict(widths=(24, 1, 16)),
            ValueError,
            r"widths: wanted numbers from 1 whose sum is out_features, 42, got \[24, 1, 16\] \(sum 41\)",
        ),
        (dict(widths=(24, 0, 18)), ValueError, "wanted numbers from 1 whose sum"),
        (dict(widths=()), ValueError, "wanted numbers from 1 whose sum"),
        (dict(widths=42), TypeError, "widths: wanted ints, the out_features of each packed layer, or None, got 42"),
        (dict(widths=(24.0, 1, 17)), TypeError, "widths: wanted ints"),
        (dict(widths=(True, 24, 17)), TypeError, "widths: wanted ints"),
        (dict(lora_A=(5, K)), ValueError, "lora_A: wanted r rows for each of the 3 layers"),
        (dict(lora_A=(6, K)), ValueError, r"lora_B: wanted shape \[42, 2\]"),
        (dict(lora_B=(N, 15)), ValueError, r"lora_B: wanted shape \[42, 5\]"),
        (dict(lora_B=(R, N)), ValueError, "it looks transposed"),
        (dict(lora_A=(513, K), lora_B=(N, 171)), UnsupportedError, "wanted a rank r from 1 to 512, got r = 513"),
    ],
)
def test_refusals(change, error, says):
    t = dict(operands(), widths=WIDTHS)
    for name, value in change.items():
        t[name] = value if name == "widths" else torch.zeros(value, device=DEVICE)
    with pytest.raises(error, match=says):
        lora_linear(**t)
    with pytest.raises(error, match=says):
        explain(**t)


def test_a_stack_of_weights_is_refused():
    t = operands(E) | {"weight": torch.zeros(E, N, K, device=DEVICE), "bias": None}
    with pytest.raises(UnsupportedError, match=r"widths: wanted None beside a stack of weights, got \[24, 1, 17\]"):
        lora_linear(**t, segments=plan(), widths=WIDTHS)


def test_configurations_that_cannot():
    problem, arch = Problem(M, N, K, L * R, torch.float32, packed="n"), Arch.interpreter()
    assert "expand.u must be given or in the loop where layers are packed" in why_not(with_u("awaited"), problem, arch)
    assert "expand.u must be given where layers are packed" in why_not(with_u("loop"), problem.backward(), arch)
    assert why_not(with_u("loop"), problem, arch) is None
    t = operands()
    with pytest.raises(UnsupportedError, match="must be given or in the loop"):
        lora_linear(**t, widths=WIDTHS, impl="triton", config=with_u("awaited"))
    y = lora_linear(**t, widths=WIDTHS, impl="triton", config=with_u("loop"))
    with pytest.raises(UnsupportedError, match="must be given where layers are packed"):
        y.sum().backward()


def test_a_tile_takes_one_layers_rank():
    """What a tile of y keeps, and whether u fits the loop, go by a layer's rank, not by that of all."""
    arch = Arch.cuda(9, 0)
    alone = Problem(8192, 6144, 4096, 16, torch.bfloat16)
    packed = replace(alone, R=48, packed="n", layers=3)
    assert heuristic(packed, arch).expand == heuristic(alone, arch).expand
    assert replace(packed, M=64, R=96).tile_rank == 32 and heuristic(replace(packed, M=64, R=96), arch).expand.u == "loop"
    assert heuristic(replace(packed, M=64, R=96).backward(), arch).expand.u == "given"
    loop = heuristic(replace(alone, M=16), arch)
    assert why_not(loop, replace(packed, M=64, R=384), arch) is None
    assert "serves ranks up to 128, got 129" in why_not(loop, replace(packed, M=64, R=387), arch)
    assert forward_flops(8192, 6144, 4096, 48, layers=3) == 2 * 8192 * (6144 * 4096 + 16 * 6144 + 48 * 4096)


def test_rows_of_one_layer_are_not_taken_for_packed_ones(monkeypatch):
    problem = Problem(64, 6144, 4096, 48, torch.bfloat16)
    row = tables.Row((9, 0), (1, 128), 6144, 4096, (1, 64), False, 2, "triton", heuristic(problem, Arch.cuda(9, 0)), "a measurement")
    monkeypatch.setattr(tables, "ROWS", (row,))
    assert tables.lookup(problem, Arch.cuda(9, 0)) is row
    assert tables.lookup(replace(problem, packed="n", layers=3), Arch.cuda(9, 0)) is None


def test_explain():
    t = operands()
    assert explain(**t, widths=WIDTHS, impl="triton").config.expand.u == "loop"
    assert explain(**t, widths=WIDTHS, impl="triton", config=TILES).arm == "triton"


def test_repeats_are_equal_bit_for_bit():
    t = operands(E)
    runs = [gradients(lora_linear(**t, widths=WIDTHS, impl="triton", **tenants()), t) for _ in range(3)]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)

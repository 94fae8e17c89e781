"""Configurations as values: validity in one sentence, a heuristic that always answers, tables with sources."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from lora_kernels import calls, dispatch
from lora_kernels.problem import Problem, describe, forward_flops, tma_aligned
from lora_kernels.segments import ONE
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad, heuristic, lookup, rank_block, resolve, tables, why_not

ARCHS = [Arch.parse(name) for name in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a", "interpreter")]
PROBLEM = Problem(4096, 4096, 4096, 16, torch.bfloat16)
FLOAT32_ADAPTERS = replace(PROBLEM, R=64, adapter_dtype=torch.float32)


def test_a_config_survives_its_key():
    config = Config(Shrink(16, 64, 3, 8, 2), Expand(u="awaited", tma=True, persistent=True), Wgrad(split=5))
    assert Config.from_key(config.key()) == config and hash(config) == hash(Config.from_key(config.key()))
    with pytest.raises(AttributeError):
        config.shrink = Shrink()


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a.name)
def test_the_heuristic_always_answers_with_something_valid(arch):
    for M, N, K, R, dtype, dropout, major, aligned in itertools.product(
        (1, 16, 17, 64, 65, 512, 8192, 1 << 20), (1, 40, 4096), (1, 40, 14336), (1, 16, 65, 512),
        (torch.float16, torch.float32), ("", "x"), ("k", "n", ""), (True, False),
    ):  # fmt: skip
        problem = Problem(M, N, K, R, dtype, dropout, w_major=major, aligned=aligned)
        for each in (problem, problem.backward()):
            config, origin = resolve(each, arch)
            assert why_not(config, each, arch) is None and origin in ("heuristic", "table")


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a.name)
def test_the_heuristic_serves_every_plan(arch):
    for (M, row_block), gather_block, N, K, R, dtype, dropout, mixed in itertools.product(
        ((1, 16), (20, 32), (200, 64), (8192, 128)), (16, 32), (1, 1024, 4096), (40, 14336), (1, 16, 130, 512),
        (torch.float16, torch.float32), ("", "x"), (False, True),
    ):  # fmt: skip
        problem = Problem(M, N, K, R, dtype, dropout, adapters=64, row_block=row_block, gather_block=gather_block, mixed_ranks=mixed)
        for each in (problem, problem.backward()):
            config = heuristic(each, arch)
            assert why_not(config, each, arch) is None and config.expand.u == "given"


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a.name)
def test_float32_products_of_many_tokens_are_the_vendors(arch):
    """In float32 Triton multiplies without tensor cores; few tokens wait for W, not for arithmetic."""
    for M, row_block, dropout, dtype in itertools.product((16, 32, 33, 8192), (0, 32, 128), ("", "x"), (torch.float32, torch.float16)):
        plan = dict(adapters=8, row_block=row_block, gather_block=16) if row_block else {}
        problem = replace(PROBLEM, M=M, dtype=dtype, dropout=dropout, **plan)
        many = dtype is torch.float32 and max(M, row_block) > 32
        for each in (problem, problem.backward()):
            assert heuristic(each, arch).expand.base == ("library" if many else "kernel"), each


@pytest.mark.parametrize(
    "M, K, N, adapters, tile",
    [
        (16, 4096, 4096, 0, (16, 32, 1, "loop")),
        (64, 4096, 4096, 0, (64, 32, 1, "loop")),
        (64, 4096, 14336, 0, (64, 128, 1, "loop")),  # 32 columns would fetch x three times for each W
        (64, 14336, 4096, 0, (64, 64, 2, "given")),
        (128, 4096, 4096, 0, (128, 128, 4, "given")),  # 32 tiles
        (256, 4096, 14336, 0, (128, 256, 1, "given")),
        (1024, 4096, 4096, 0, (128, 256, 1, "given")),  # 128 tiles are a wave, 256 smaller ones two
        (1024, 4096, 1024, 0, (128, 128, 2, "given")),
        (8192, 4096, 1024, 0, (128, 256, 1, "given")),
        (16, 8192, 1024, 16, (16, 32, 4, "given")),
        (16, 4096, 1024, 16, (16, 32, 1, "given")),  # a split costs more than it saves
        (16, 4096, 14336, 16, (16, 32, 1, "given")),
        (64, 4096, 14336, 64, (64, 64, 1, "given")),
        (512, 4096, 1024, 128, (128, 128, 4, "given")),
    ],
)
def test_tiles_fill_the_chip_and_fetch_little(M, K, N, adapters, tile):
    """K is split where tiles are few; columns are as many as rows where those are many; adapters: rows of the plan's blocks, or none."""
    plan = dict(adapters=64, row_block=adapters, gather_block=16) if adapters else {}
    e = heuristic(Problem(M, N, K, 16, torch.bfloat16, **plan), Arch.parse("sm_90")).expand
    assert (e.block_m, e.block_n, e.split, e.u) == tile


@pytest.mark.parametrize("change", [{"x_row_major": False}, {"w_major": ""}, {"aligned": False}, {"wide": True}], ids=str)
def test_what_has_no_descriptor_is_read_by_pointers(change):
    for adapters, dropout, back in itertools.product((0, 64), ("", "x"), (False, True)):
        plan = dict(adapters=adapters, row_block=128, gather_block=32) if adapters else {}
        for changes in ({}, change):
            problem = replace(PROBLEM, dropout=dropout, **plan, **changes)
            problem = problem.backward() if back else problem
            config = heuristic(problem, Arch.parse("sm_90"))
            assert config.expand.tma == (not changes) and why_not(config, problem, Arch.parse("sm_90")) is None


def test_v_is_gathered_for_each_token_in_the_forward_pass_alone():
    """In dX's it lies the other way: a token's sum would go across threads."""
    few = replace(PROBLEM, M=16, adapters=64, row_block=16, gather_block=16)
    assert [heuristic(problem, Arch.parse("sm_90")).expand.each for problem in (few, few.backward())] == [True, False]


def test_a_row_for_one_adapter_is_not_one_for_many(monkeypatch):
    config = Config(Shrink(16, 64), Expand(64, 64, 64), Wgrad(32, 32))
    row = tables.Row((9, 0), (1, 10000), 4096, 4096, (1, 33), False, 2, "triton", config, "bench/results/x.jsonl")
    many = replace(PROBLEM, adapters=8, row_block=64, gather_block=16)
    sm_90 = Arch.parse("sm_90")
    monkeypatch.setattr(tables, "ROWS", (row,))
    assert lookup(PROBLEM, sm_90) is row and lookup(many, sm_90) is None
    monkeypatch.setattr(tables, "ROWS", (replace(row, adapters=(1, 64)),))
    assert lookup(PROBLEM, sm_90) is None and lookup(many, sm_90).config == config
    assert lookup(replace(many, row_block=128), sm_90) is None


def test_an_unknown_gpu_is_answered_too():
    future = Arch.cuda(13, 7)
    assert why_not(heuristic(PROBLEM, future), PROBLEM, future) is None


@pytest.mark.parametrize(
    "config, problem, arch, sentence",
    [
        (Config(expand=Expand(tma=True)), PROBLEM, "sm_80", "bulk tensor copy engine"),
        (Config(expand=Expand(tma=True)), replace(PROBLEM, aligned=False), "sm_90", "16-byte aligned"),
        (Config(expand=Expand(u="loop")), replace(PROBLEM, R=129), "sm_90", "ranks up to 128, got 129"),
        (Config(expand=Expand(base="library", u="loop")), PROBLEM, "sm_90", "no K loop"),
        (Config(expand=Expand(256, 256, 128, num_stages=4)), PROBLEM, "sm_90", "bytes of shared memory"),
        (Config(expand=Expand(128, 256, 64, num_stages=4)), PROBLEM, "sm_86", "bytes of shared memory"),
        (Config(Shrink(64, num_stages=4)), replace(PROBLEM, R=128, adapter_dtype=torch.float32), "sm_90", "shrink needs at least 294912"),
        (Config(expand=Expand(32, 32, num_stages=8, u="loop")), FLOAT32_ADAPTERS, "sm_80", "expand needs at least 172032 bytes"),
        (Config(shrink=Shrink(64)), replace(PROBLEM, dropout="x"), "sm_90", "triton #9433|register operand"),
        (Config(wgrad=Wgrad(64, 64)), replace(PROBLEM, dropout="uv"), "sm_90", "wgrad with dropout"),
        (Config(expand=Expand(pdl=True)), PROBLEM, "sm_89", "programmatic dependent launch of sm_90"),
        (Config(expand=Expand(pdl=True, u="awaited")), PROBLEM, "sm_90", "expand.pdl starts the base product"),
        (Config(expand=Expand(pdl=True, base="library")), PROBLEM, "sm_90", "serves u='given' and base='kernel'"),
        (Config(expand=Expand(masked=True)), PROBLEM, "sm_90", "and there is one adapter"),
        (Config(expand=Expand(masked=True)), replace(PROBLEM, adapters=4), "sm_100", "expand.masked is not compiled for sm_100"),
        (Config(expand=Expand(64, 32, each=True)), PROBLEM, "sm_90", "each token of a batch with segments, and there is one adapter"),
        (Config(expand=Expand(64, 32, each=True, u="awaited")), replace(PROBLEM, adapters=4), "sm_90", "needs expand.u='given'"),
        (Config(expand=Expand(128, 256, each=True)), replace(PROBLEM, adapters=4), "sm_90", "holds v for every number of a tile"),
        (Config(expand=Expand(64, 32, each=True, masked=True)), replace(PROBLEM, adapters=4), "sm_90", "in registers, .* and masks none"),
        (Config(wgrad=Wgrad(beside="graph")), PROBLEM, "sm_90", "wgrad.beside must be '', 'stream' or 'pdl', got 'graph'"),
        (Config(wgrad=Wgrad(beside="stream"), expand=Expand(u="awaited")), PROBLEM, "sm_90", "needs expand.u='given', got 'awaited'"),
        (Config(wgrad=Wgrad(beside="stream"), expand=Expand(pdl=True)), PROBLEM, "sm_90", "an event between shrink and expand"),
        (Config(wgrad=Wgrad(beside="pdl")), PROBLEM, "sm_90", "so it needs expand.pdl=True"),
        (Config(expand=Expand(num_warps=3)), PROBLEM, "sm_90", "expand.num_warps must be 1, 2, 4, 8 or 16, got 3"),
        (Config(), replace(PROBLEM, dtype=torch.float64), "sm_90", "do not take float64"),
    ],
)
def test_why_not(config, problem, arch, sentence):
    answer = why_not(config, problem, Arch.parse(arch))
    assert answer and re.search(sentence, answer), answer


def test_a_backward_pass_is_described_as_its_forward_pass_is():
    x, W = torch.empty(32, 64, dtype=torch.bfloat16), torch.empty(128, 64, dtype=torch.bfloat16)
    A, B, dy = torch.empty(16, 64), torch.empty(128, 16), torch.empty(32, 128, dtype=torch.bfloat16)
    forward = describe(x, W, A, B, dropout=True)
    assert forward.adapter_dtype == torch.float32
    assert dispatch._describe_dx(dy, x, W, A, B, None, dropout=True, adapters=ONE) == forward.backward()


@pytest.mark.parametrize("rank, wanted", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (512, 128)])
def test_rank_block(rank, wanted):
    assert rank_block(rank) == wanted


def test_arch_names():
    assert [Arch.parse(name).name for name in ("sm_90", "sm_90a", "sm_120", "gfx942", "gfx90a")] == [
        "sm_90",
        "sm_90",
        "sm_120",
        "gfx942",
        "gfx90a",
    ]
    for bad in ("90", "sm_", "hopper", "sm_x"):
        with pytest.raises(ValueError, match="arch: wanted a name such as"):
            Arch.parse(bad)


def complaints(row: tables.Row) -> list[str]:
    """What is wrong with a row of `tables.ROWS`; what the compiler makes of it is tests/test_compile_only.py's."""
    arch = Arch.cuda(*row.capability)
    found = [f"{problem}: {sentence}" for problem in row.corners() if (sentence := why_not(row.config, problem, arch))]
    found += [f"{problem}: another row goes before it" for problem in row.corners() if lookup(problem, arch) not in (row, None)]
    found += ["an empty bucket"] if row.tokens[0] >= row.tokens[1] or row.rank[0] >= row.rank[1] else []
    found += [] if row.arm in ("triton", "torch") else [f"arm {row.arm!r}"]
    return found + ([] if row.source.startswith("bench/results/") else [f"source {row.source!r}"])


def test_every_row_is_valid_and_says_what_it_rests_on():
    assert [complaint for row in tables.ROWS for complaint in complaints(row)] == []


ROW = tables.Row((9, 0), (1024, 4096), 4096, 1024, (1, 17), True, 2, "triton", Config(Shrink(32, 64)), "bench/results/x.jsonl: 1.1x")


@pytest.mark.parametrize(
    "row, complaint",
    [
        (ROW, None),
        (replace(ROW, w_major="n", config=Config(wgrad=Wgrad(64, 32))), None),
        (replace(ROW, w_major="n"), "wgrad with dropout"),
        (replace(ROW, config=Config(Shrink(64, 64))), "shrink with dropout"),
        (replace(ROW, config=Config(Shrink(32, 64), Expand(256, 256, 64, num_stages=4))), "bytes of shared memory"),
        (replace(ROW, rank=(1, 200), config=Config(Shrink(16, 64), Expand(32, 32, 64, u="loop"))), "R=199.*ranks up to 128"),
        (replace(ROW, tokens=(2048, 2048)), "an empty bucket"),
        (replace(ROW, N=2048, K=2048), "another row goes before it"),
        (replace(ROW, arm="cublas"), "arm 'cublas'"),
        (replace(ROW, source="a guess"), "source 'a guess'"),
    ],
)
def test_a_planted_row(row, complaint, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", (replace(ROW, N=2048, K=2048, rank=(16, 17)), row))
    found = complaints(row)
    assert (not found) if complaint is None else re.search(complaint, found[0]), found


def test_a_row_that_a_call_cannot_take_yields_to_the_heuristic(monkeypatch):
    sm_90, device = Arch.parse("sm_90"), torch.device("cuda")
    copied = Config(expand=Expand(u="loop", tma=True))
    row = tables.Row((9, 0), (1, 10000), 4096, 4096, (1, 257), False, 2, "triton", copied, "bench/results/x.jsonl")
    monkeypatch.setattr(tables, "ROWS", (row,))
    assert lookup(PROBLEM, sm_90) is row
    for other in (replace(PROBLEM, aligned=False), replace(PROBLEM, R=129), PROBLEM.backward()):
        assert resolve(other, sm_90) == (heuristic(other, sm_90), "heuristic")
    apart = replace(PROBLEM, aligned=False)
    monkeypatch.setattr(tables, "ROWS", (replace(row, arm="torch"),))
    assert lookup(apart, sm_90).arm == "torch" and resolve(apart, sm_90) == (heuristic(apart, sm_90), "heuristic")
    monkeypatch.setattr(tables, "ROWS", (row,))
    monkeypatch.setattr(dispatch, "arch_of", lambda device: (sm_90, ""))
    early = Config(expand=Expand(pdl=True))
    monkeypatch.setattr(tables, "ROWS", (replace(row, config=early),))
    for version, config in (("3.5.0", early), ("3.4.0", heuristic(PROBLEM, sm_90))):
        monkeypatch.setattr(dispatch, "version", {"triton": version}.__getitem__)
        calls.forget()
        assert dispatch.choose(PROBLEM, device, "triton").config == config
    calls.forget()


def test_an_interpreter_that_numpy_has_left_behind(monkeypatch):
    plain, interpreter, sm_90 = replace(PROBLEM, dtype=torch.float32), Arch.interpreter(), Arch.parse("sm_90")
    for triton, numpy, refused in (
        ("3.6.0", "2.4.0", True),
        ("3.6.0", "2.3.5", False),
        ("3.7.1", "2.5.0", False),
        ("3.10.0", "2.5", False),
    ):
        monkeypatch.setattr(dispatch, "version", {"triton": triton, "numpy": numpy}.__getitem__)
        assert (dispatch.why_not_here(heuristic(plain, interpreter), plain, interpreter) == dispatch.INTERPRETED_NUMPY) is refused
        assert dispatch.why_not_here(heuristic(PROBLEM, sm_90), PROBLEM, sm_90) is None


def test_dependent_launches_need_a_triton_that_compiles_them(monkeypatch):
    config, sm_90 = Config(expand=Expand(pdl=True)), Arch.parse("sm_90")
    for version, refused in (("3.4.0", True), ("3.5.0", False), ("3.10.1", False)):
        monkeypatch.setattr(dispatch, "version", {"triton": version}.__getitem__)
        assert ("from 3.5 on and not by 3.4.0" in (dispatch.why_not_here(config, PROBLEM, sm_90) or "")) is refused


def test_rows_that_load_by_two_bytes_take_the_chain():
    """Where W's are along K, outputs are stored alone; going back they are read. With dropout the chain's mask would cost more."""
    vision = replace(PROBLEM, M=64, N=1280, K=3420, R=8, dtype=torch.bfloat16, dropout="")
    other = replace(vision, N=3420, K=1280)
    for problem, arm in (
        (vision, "torch"),
        (vision.backward(), "torch"),
        (other, "triton"),
        (other.backward(), "torch"),
        (replace(vision, K=3424), "triton"),
        (replace(vision, dropout="x"), "triton"),
        (replace(vision, dropout="x").backward(), "triton"),
        (replace(vision, dtype=torch.float32), "triton"),
        (replace(vision, adapters=4, row_block=64, gather_block=16), "triton"),
    ):
        assert dispatch.unmeasured(problem, Arch.parse("sm_90"))[0] == arm


def test_which_matrices_have_a_descriptor():
    """Windows over a signal are rows that overlap: the driver's documentation makes a stride of the row's bytes and some padding."""
    signal = torch.zeros(4096, dtype=torch.bfloat16)
    for x in (signal.view(8, 512), signal.view(8, 512)[:, :64], signal.view(1, 4096), signal.unfold(0, 64, 64)):
        assert tma_aligned(x) and tma_aligned(x.t())
    for x in (signal.unfold(0, 512, 64), signal[1:513].view(8, 64), signal[:4088].view(8, 511), signal[:512].expand(8, 512)):
        assert not tma_aligned(x) and not tma_aligned(x.t())


def test_a_row_goes_before_the_heuristic(monkeypatch):
    config = Config(Shrink(16, 64), Expand(64, 64, 64), Wgrad(32, 32))
    row = tables.Row((9, 0), (1, 10000), 4096, 4096, (1, 33), False, 2, "triton", config, "bench/results/x.jsonl")
    monkeypatch.setattr(tables, "ROWS", (row,))
    assert resolve(PROBLEM, Arch.parse("sm_90")) == (config, "table")
    for other, arch in (
        (replace(PROBLEM, M=10000), "sm_90"),
        (replace(PROBLEM, R=33), "sm_90"),
        (PROBLEM, "sm_80"),
        (replace(PROBLEM, N=8), "sm_90"),
    ):
        assert lookup(other, Arch.parse(arch)) is None and resolve(other, Arch.parse(arch))[1] == "heuristic"


def test_backward_problem_swaps_and_comes_back():
    problem = replace(PROBLEM, N=3, K=5, dropout="x")
    back = problem.backward()
    assert (back.N, back.K, back.w_major, back.dropout) == (5, 3, "n", "uv")
    assert forward_flops(problem.M, 3, 5, problem.R) == 2 * 4096 * (15 + 16 * 8)


@pytest.mark.parametrize(
    "changes, rows, split",
    [
        ({}, 32, 1),  # 256 programs fill the chip, and no partial sums are added
        ({"R": 64}, 64, 1),  # 128 programs do, next to all
        ({"R": 64, "M": 4096}, 32, 1),  # 64 of 64 rows do not, 128 of 32 do
        ({"M": 3000}, 32, 3),
        ({"R": 64, "dropout": "x"}, 32, 2),
        ({"dropout": "uv"}, 32, 1),  # no mask is made of dS
        ({"R": 64, "dropout": "uv"}, 64, 1),
        ({"M": 2048}, 16, 3),  # which have too little on its way
        ({"M": 16}, 16, 8),
    ],
)
def test_rows_and_splits_of_shrink(changes, rows, split):
    shrink = heuristic(
        replace(PROBLEM, **{"M": 8192, "N": 4096, "K": 4096, "R": 16, "dtype": torch.bfloat16} | changes), Arch.parse("sm_90")
    ).shrink
    assert (shrink.block_m, shrink.split) == (rows, split)

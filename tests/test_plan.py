"""The plan of few launches is the library's, entry by entry; and which of the two a GPU takes."""

import pytest
import torch
from margins import inside

from lora_kernels import Segments, dispatch, launch, launch_plan, ops, parity, segments
from lora_kernels.segments import by_library, lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ids_of(M: int, E: int, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(-1, E, (M,), dtype=dtype, device=DEVICE)


def both(ids, E, row_block=16, gather_block=16) -> torch.Tensor:
    """Asserts equality; returns whether the ids are valid."""
    found, wanted = launch_plan.plan(ids, E, row_block, gather_block), by_library(ids, E, row_block, gather_block)
    for name, ours, theirs in zip((*segments._TENSORS, "valid"), found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    return found[-1]


@pytest.mark.parametrize("row_block, gather_block", [(16, 16), (64, 16), (128, 32)])
@pytest.mark.parametrize("M, E", [(1, 1), (16, 1), (31, 40), (33, 6), (128, 127), (129, 128), (129, 300), (300, 3)])
def test_equals_the_library(M, E, row_block, gather_block):
    ids = ids_of(M, E)
    ids[M // 2 :: 9] = -1  # some token has none in every case
    assert both(ids, E, row_block, gather_block)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_lie_apart_and_repeat(dtype):
    ids = ids_of(2 * 70, 9, dtype).view(70, 2)
    assert both(ids[:, 1], 9)
    assert both(ids[:1, 0].expand(70), 9)


@pytest.mark.parametrize("adapter", [-1, 0, 4])
def test_one_adapter_for_all(adapter):
    assert both(torch.full((75,), adapter, device=DEVICE), 5)


@pytest.mark.parametrize("wrong", [-2, 5, 1 << 31, -(1 << 40)])
@pytest.mark.parametrize("where", [0, 40, 69])
def test_ids_out_of_range_count_as_none_and_are_told(wrong, where):
    ids = ids_of(70, 5)
    assert both(ids, 5)
    ids[where] = wrong
    assert not both(ids, 5)


def test_a_wrong_id_of_any_block_is_told(monkeypatch):
    """The blocks' verdicts are read some at a time."""
    monkeypatch.setattr(launch_plan, "PLAN_CHUNK", 16)
    ids = ids_of(600, 5)
    ids[3] = 5
    assert not both(ids, 5)


@pytest.mark.parametrize("row_block, gather_block", [(16, 16), (128, 32)])
@pytest.mark.parametrize("M, E", [(1, 1), (31, 40), (64, 6), (65, 6), (129, 300), (500, 3), (511, 64)])
def test_in_parts(monkeypatch, M, E, row_block, gather_block):
    """Parts of 64 tokens, of which the last is short; their order is the library's, too."""
    monkeypatch.setattr(launch_plan, "PLAN_TOKENS", 0)
    monkeypatch.setattr(launch_plan, "PLAN_PART", 64)
    monkeypatch.setattr(launch_plan, "PLAN_CHUNK", 16)
    ids = ids_of(M, E)
    ids[M // 2 :: 9] = -1
    assert both(ids, E, row_block, gather_block)
    assert both(torch.full((M,), E - 1, device=DEVICE), E)
    ids[M // 3] = E
    assert not both(ids, E)


@pytest.mark.parametrize("M, E", [(1, 1), (33, 6), (129, 300)])
@pytest.mark.parametrize("most", [0, 8192])
def test_nothing_is_written_outside_the_plan(monkeypatch, M, E, most):
    """Every tensor that a kernel is given lies inside a larger one, whose margins must stay as they were, and decide nothing."""
    monkeypatch.setattr(launch_plan, "PLAN_TOKENS", most)
    with inside(256, 77) as around:
        assert both(ids_of(M, E), E)
    assert len(around) > 10 and all((each == 77).all() for each in around if each.dtype != torch.bool)


def test_as_many_tokens_as_a_mixture_has():
    """In parts of the size they have: 1,100 tokens of 8 experts."""
    ids = torch.stack([torch.randperm(64, device=DEVICE)[:8] for _ in range(1100)]).view(-1)
    assert ids.shape[0] > launch_plan.PLAN_TOKENS and both(ids, 64, 128, 128)


def test_few_launches_whatever_the_sizes():
    seen = []

    def record(kernel, grid, args, options):
        seen.append((kernel.__name__, options))

    with launch.intercept(record):
        for M, E in ((130, 3), (257, 40), (4096, 1024)):
            launch_plan.plan(torch.zeros(M, dtype=torch.int32, device=DEVICE), E, 128, 32)
        few, seen[:] = seen[:], []
        for M, E in ((8193, 3), (70000, 128), (1 << 20, 4096)):
            launch_plan.plan(torch.zeros(M, dtype=torch.int32, device=DEVICE), E, 128, 32)
    assert [name for name, _ in few] == ["plan_tokens", "plan_tiles"] * 3
    assert few[:2] == few[2:4] == few[4:], "sizes are no constants of the compiled code"
    assert [name for name, _ in seen] == ["plan_counts", "plan_tokens", "plan_tiles"] * 3
    assert seen[:3] == seen[3:6] == seen[6:]


def test_what_a_gpu_takes(monkeypatch):
    """Two launches, three where 32-bit keys or the square of the tokens forbid it, or the library: for no tokens, and without Triton."""

    def launched(M, E):
        before = launch.launches
        tensors = ops._plan_on_a_gpu(torch.zeros(M, dtype=torch.int32, device=DEVICE), E, 16, 16)
        assert [t.shape[0] for t in tensors[:-1]] == lengths(M, E, 16, 16)
        return launch.launches - before

    assert launched(20, 4) == 2
    assert launched(0, 4) == 0
    monkeypatch.setattr(launch_plan, "PLAN_TOKENS", 20)
    assert (launched(20, 4), launched(21, 4)) == (2, 3)
    monkeypatch.setattr(launch_plan, "INT32", 20 * 5 + launch_plan.PLAN_CHUNK + 1)
    assert (launched(20, 4), launched(20, 5), launched(20, 300)) == (2, 3, 0)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "gone")
    assert launched(20, 4) == 0


def test_the_operator():
    """torch's checks of its schema, fake and registration; the parity that `check` runs."""
    ids = ids_of(37, 6)
    torch.library.opcheck(torch.ops.lora_kernels.plan.default, (ids, 6, 32, 16))
    assert parity.plan_result(DEVICE).ok


@pytest.mark.cuda
@pytest.mark.parametrize("M, E", [(1, 1), (64, 64), (777, 13), (8192, 64), (8193, 5), (16384, 4096), (65536, 128), (1 << 20, 4096)])
def test_on_a_gpu(M, E):
    ids, before = ids_of(M, E), launch.launches
    s = Segments.from_ids(ids, E)
    assert launch.launches - before == (2 if M <= launch_plan.PLAN_TOKENS else 3)
    wanted = Segments.from_ids(ids.cpu(), E)
    for name in segments._TENSORS:
        assert torch.equal(getattr(s, name).cpu(), getattr(wanted, name)), name
    again = Segments.from_ids(ids, E)
    assert all(torch.equal(a, b) for a, b in zip(s.tensors(), again.tensors(), strict=True))

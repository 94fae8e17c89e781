"""A call that was made before is launched by what was compiled then; one that differs in anything that counts is not.

In Triton's interpreter nothing is compiled, and only the numbers are held; tests/test_machine.py runs this file as compiled for sm_90.
"""

import contextlib
import dataclasses
import functools

import pytest
import torch
import triton
from triton.runtime import JITFunction

from lora_kernels import Projection, Segments, calls, dispatch, launch, layouts, lora_linear, lora_linears, problem
from lora_kernels.operands import many
from lora_kernels.parity import budget_used
from lora_kernels.segments import ONE, Adapters
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = Config(Shrink(16, 16, num_stages=2), Expand(16, 16, 16, num_warps=4, num_stages=2), Wgrad(16, 16, split=2, num_stages=2))
LOOP = dataclasses.replace(TILES, expand=dataclasses.replace(TILES.expand, u="loop"))
SPLIT = dataclasses.replace(TILES, shrink=Shrink(16, 16, 2, num_stages=2))
M, N, K, R, E = 20, 32, 48, 4, 3


@contextlib.contextmanager
def counted():
    """How often Triton looked for a kernel by the arguments of a call."""
    own, calls = JITFunction.run, []

    def run(self, *args, **kwargs):
        calls.append(self.fn.__name__)
        return own(self, *args, **kwargs)

    JITFunction.run = run
    try:
        yield calls
    finally:
        JITFunction.run = own


def drawn(*shape, offset=0):
    """Normal numbers, ``offset`` elements after an address that is a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    return torch.randn(size + offset, device=DEVICE)[offset:].view(shape)


def step(x, weight, A, B, dy, config, **how) -> list[torch.Tensor]:
    """y and the gradients, by kernels; held to float64."""
    results = []
    for dtype, impl in ((None, "triton"), (None, "reference"), (torch.float64, "reference")):
        operands = [t.detach() if dtype is None else t.detach().to(dtype) for t in (x, weight, A, B)]
        for t in (operands[0], operands[2], operands[3]):
            t.requires_grad_()
        others = dict(how)
        if dtype is not None and how.get("bias") is not None:
            others["bias"] = how["bias"].to(dtype)
        y = lora_linear(*operands, training=True, impl=impl, config=config if impl == "triton" else None, **others)
        y.backward(dy if dtype is None else dy.to(dtype))
        results.append([y.detach(), *(t.grad for t in (operands[0], operands[2], operands[3]))])
    for ours, same, true in zip(*results, strict=True):
        assert budget_used(ours, same, true, terms=M + N + K) <= 1
    return results[0]


@pytest.mark.parametrize("config", [TILES, LOOP, SPLIT], ids=["given", "loop", "split"])
def test_equal_calls_are_launched_without_a_search(config):
    operands = dict(weight=drawn(N, K), A=drawn(R, K), B=drawn(N, R), dy=drawn(M, N), config=config)
    step(drawn(M, K), seed=1, dropout_p=0.5, scale=2.0, **operands)
    with counted() as calls:
        for seed, p, scale in ((1, 0.5, 2.0), (7, 0.25, 0.5), (2, 0.75, 3)):  # values that no kernel is compiled for
            step(drawn(M, K), seed=seed, dropout_p=p, scale=scale, **operands)
    assert not calls


def test_whoever_is_to_be_told_of_launches_is_told():
    """A profiler, by Triton's hooks, also of calls that were made before it came."""
    operands = dict(weight=drawn(N, K), A=drawn(R, K), B=drawn(N, R), dy=drawn(M, N), config=TILES)
    step(drawn(M, K), **operands)
    told, hooks, before = {"enter": [], "exit": []}, triton.knobs.runtime, launch.launches
    with triton.knobs.runtime.scope():
        for name in told:
            chain = type(hooks.launch_enter_hook)()
            chain.add(told[name].append)
            setattr(hooks, f"launch_{name}_hook", chain)
        step(drawn(M, K), **operands)
    number = 0 if hooks.interpret else launch.launches - before
    assert len(told["enter"]) == len(told["exit"]) == number
    assert all(metadata.get()["name"] in ("shrink", "expand", "wgrad", "add_parts") for metadata in told["enter"])
    step(drawn(M, K), **operands)
    assert len(told["enter"]) == number


@pytest.mark.parametrize("which", ["x", "weight", "A", "B", "dy", "bias"])
def test_an_address_that_is_no_multiple_of_16(which):
    """Same sizes, same strides: what was compiled for aligned addresses loads 16 bytes at a time."""

    def once(offset: int) -> None:
        shapes = dict(x=(M, K), weight=(N, K), A=(R, K), B=(N, R), dy=(M, N), bias=(N,))
        tensors = {name: drawn(*shape, offset=offset * (name == which)) for name, shape in shapes.items()}
        assert (tensors[which].data_ptr() % 16 != 0) == bool(offset)
        step(**tensors, config=TILES)

    for offset in (0, 1, 0, 2, 0):
        once(offset)
    with counted() as calls:
        once(0), once(1)
    assert not calls


def test_columns_that_begin_at_no_multiple_of_16():
    """Of the u and dS of several layers: what is known of one's own operands does not tell."""
    tokens, size, whole = 33, 16, 32
    x, dy, weight, one = drawn(tokens, size), drawn(tokens, size), drawn(size, size), [drawn(R, size), drawn(size, R)]
    for before in (R, 1):
        layers = [[weight, *([drawn(r, size), drawn(size, r)] if r else one)] for r in (before, 0, whole - R - before)]
        results = []
        for impl, config in (("triton", TILES), ("reference", None)):
            own_x, own = x.clone().requires_grad_(), [[W, A.clone().requires_grad_(), B.clone().requires_grad_()] for W, A, B in layers]
            ys = lora_linears(own_x, [Projection(*each) for each in own], config=config, impl=impl)
            torch.autograd.backward(ys, [dy] * 3)
            results.append([*ys, own_x.grad, *(t.grad for _, *trained in own for t in trained)])
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)


def test_what_is_there_or_not():
    """A bias, a dropout, a tensor of scales, ranks: present, absent, and present again."""
    ids = torch.arange(M, device=DEVICE) % E
    segments = Segments.from_ids(ids, E, row_block=16, gather_block=16)
    ranks = torch.tensor([1, R, 2], dtype=torch.int32, device=DEVICE)
    scales = torch.tensor([0.5, 2.0, 1.0], device=DEVICE)
    one = dict(weight=drawn(N, K), A=drawn(R, K), B=drawn(N, R), dy=drawn(M, N), config=TILES)
    stack = dict(weight=drawn(N, K), A=drawn(E, R, K), B=drawn(E, N, R), dy=drawn(M, N), config=TILES)
    variants = [
        {**one},
        {**one, "bias": drawn(N)},
        {**one, "seed": 3, "dropout_p": 0.5},
        {**one, "scale": torch.tensor([2.0], device=DEVICE)},
        {**stack, "segments": segments},
        {**stack, "segments": segments, "scale": scales},
        {**stack, "segments": segments, "ranks": ranks},
        {**stack, "segments": segments, "ranks": ranks, "scale": scales, "bias": drawn(N), "seed": 3, "dropout_p": 0.5},
        {**stack, "A": drawn(E, 2 * R, K), "segments": segments, "widths": (16, 16)},
        {**stack, "A": drawn(E, 2 * R, K), "segments": segments, "widths": (8, 24), "ranks": ranks},
    ]
    for variant in (*variants, *reversed(variants)):
        step(drawn(M, K), **variant)
    with counted() as calls:
        for variant in variants:
            step(drawn(M, K), **variant)
    assert not calls


def test_other_sizes_and_strides():
    for size in (M, 16, 1, M + 1, M):
        for columns in (K, 33, K):
            step(drawn(size, columns), drawn(N, columns), drawn(R, columns), drawn(N, R), drawn(size, N), TILES)
    for turned in (False, True, False):
        x, weight = (drawn(K, M).t(), drawn(K, N).t()) if turned else (drawn(M, K), drawn(N, K))
        A, B = (drawn(K, R).t(), drawn(R, N).t()) if turned else (drawn(R, K), drawn(N, R))
        step(x, weight, A, B, drawn(M, N), TILES)


def test_other_dtypes():
    """The same sizes and strides in 32 bits, in 16, and with adapters in 32 beside a base in 16."""
    for base, adapters in ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)) * 2:
        x, weight, dy = (drawn(*shape).to(base) for shape in ((M, K), (N, K), (M, N)))
        step(x, weight * K**-0.5, drawn(R, K).to(adapters) * K**-0.5, drawn(N, R).to(adapters), dy, TILES)


def test_other_plans():
    """Sequences of adapters and tokens that leave shapes as they are."""
    for ids in ([0] * M, [0, 1] * 10, [-1] * M, list(range(E)) * 6 + [2, 2], [0] * M):
        segments = Segments.from_ids(torch.tensor(ids, device=DEVICE), E, row_block=16, gather_block=16)
        step(drawn(M, K), drawn(N, K), drawn(E, R, K), drawn(E, N, R), drawn(M, N), TILES, segments=segments)


@pytest.fixture
def on_hopper(monkeypatch):
    """Choices as on an H100, which depend on alignment and order."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    monkeypatch.setattr(Arch, "interpreter", classmethod(lambda cls: Arch.parse("sm_90")))
    calls.forget()
    yield
    calls.forget()


def test_choices_are_those_of_the_call_itself(on_hopper):
    """Each difference that may change a choice, twice, among calls that were chosen for before."""
    weight, A, B = (torch.randn(s, dtype=torch.bfloat16) for s in ((512, 512), (16, 512), (512, 16)))
    stack = torch.randn(E, 16, 512, dtype=torch.bfloat16), torch.randn(E, 512, 16, dtype=torch.bfloat16)
    found = set()
    for tokens in (8, 512, 8, 2048):
        x = torch.randn(tokens, 512, dtype=torch.bfloat16)
        skewed = torch.randn(tokens * 512 + 1, dtype=torch.bfloat16)[1:].view(tokens, 512)
        segments = Segments.from_ids(torch.arange(tokens) % E, E)
        ranks = torch.tensor([16, 8, 4], dtype=torch.int32)
        calls = [
            (x, weight, A, B, ONE, 0.0),
            (x, weight, A, B, ONE, 0.1),
            (skewed, weight, A, B, ONE, 0.0),
            (x.t().contiguous().t(), weight, A, B, ONE, 0.0),
            (x, weight.t(), A, B, ONE, 0.0),
            (x, weight[:, :504].contiguous()[:, :500], A[:, :500].contiguous(), B, ONE, 0.0),
            (x, None, A, B, ONE, 0.0),
            (x, weight, A.float(), B.float(), ONE, 0.0),
            (x, weight, *stack, Adapters(segments), 0.0),
            (x, weight, *stack, Adapters(segments, None, ranks), 0.0),
            (x, weight, *stack, Adapters(Segments.from_ids(torch.arange(tokens) % E, E, row_block=64)), 0.0),
            (x, weight, stack[0].repeat(1, 2, 1), stack[1], Adapters(segments, None, None, (256, 256)), 0.0),
        ]
        for impl, key in (("auto", ""), ("triton", ""), ("torch", ""), ("auto", TILES.key() if tokens == 512 else "")):
            for operands in calls:
                *tensors, adapters, p = operands
                tensors[0] = tensors[0][:, :500] if tensors[1] is not None and tensors[1].shape[1] == 500 else tensors[0]
                if key and (adapters.segments is not None or tensors[1] is None):
                    continue
                wanted = dispatch.choose(problem.describe(*tensors, dropout=bool(p), adapters=adapters), DEVICE, impl, key)
                for _ in range(2):
                    function, config = dispatch.forward_arm(*tensors, adapters, p, impl, key)
                    kernels = isinstance(function, functools.partial) and function.func is launch.forward
                    assert config == wanted.config and kernels == (wanted.arm == "triton")
                    found.add((config and config.key(), wanted.arm))
    assert len(found) > 10, "these calls are chosen for in different ways"


def test_layouts_see_all_of_a_batch():
    """Whatever tells two batches apart for a kernel is in their `Many`."""
    ids = torch.arange(6) % E
    plan, ranks = Segments.from_ids(ids, E), torch.ones(E, dtype=torch.int32)
    others = [
        ONE,
        Adapters(plan),
        Adapters(plan, None, ranks),
        Adapters(plan, None, None, (4, 4)),
        Adapters(None, None, None, (4, 4)),
        Adapters(Segments.from_ids(ids, E + 1)),
        Adapters(Segments.from_ids(torch.arange(7) % E, E)),
        Adapters(Segments.from_ids(ids, E, row_block=64)),
        Adapters(Segments.from_ids(ids, E, gather_block=32)),
    ]
    assert len({many(each) for each in others}) == len(others)
    assert many(Adapters(plan)) == many(Adapters(Segments.from_ids(ids.flip(0), E)))


def test_float32_products_follow_torchs_switch():
    x, a = ((4, 8), (8, 1), torch.float32), ((8, 2), (2, 1), torch.float32)
    how = (False, None, torch.float32, (), many(ONE), False)
    layout = layouts.shrink(TILES, x, a, *how, launch.precision(torch.float32), False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        other = layouts.shrink(TILES, x, a, *how, launch.precision(torch.float32), False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (layout.options["PRECISION"], other.options["PRECISION"]) == ("ieee", "tf32")

"""What is remembered of a call serves calls that look like it, and no other: results, refusals and launches are those of a first call."""

import dataclasses

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import MultiLoRALinear, Projection, Segments, calls, checks, launch, lora_linear, lora_linears, problem
from lora_kernels.nn import FusedLoRALinear, held
from lora_kernels.parity import budget_used
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = Config(Shrink(16, 16, num_stages=2), Expand(16, 16, 16, num_warps=4, num_stages=2), Wgrad(16, 16, split=2, num_stages=2))
PARTS = dataclasses.replace(TILES, shrink=Shrink(16, 16, split=2, num_stages=2))
LOOP = dataclasses.replace(TILES, expand=dataclasses.replace(TILES.expand, u="loop"))
K, N, R, E = 48, 32, 4, 3
LEADS = [(), (5,), (2, 3), (1, 1, 4), (2, 1, 3)]


@pytest.fixture(autouse=True)
def forgotten():
    calls.forget()


def drawn(*shape, **options):
    return torch.randn(shape, device=DEVICE, **options)


def operands(*lead, dtype=torch.float32):
    return [drawn(*shape).to(dtype) for shape in ((*lead, K), (N, K), (R, K), (N, R))]


def held_to_float64(x, weight, A, B, **how):
    """y and the gradients of a call, within the errors they may have; y itself."""
    results = []
    for dtype, impl in ((None, how.pop("impl")), (None, "reference"), (torch.float64, "reference")):
        its = [t.detach() if dtype is None else t.detach().to(dtype) for t in (x, weight, A, B)]
        for t in (its[0], its[2], its[3]):
            t.requires_grad_()
        y = lora_linear(*its, impl=impl, **how)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in (its[0], its[2], its[3]))])
    for ours, same, true in zip(*results, strict=True):
        assert ours.shape == true.shape
        assert budget_used(ours, same, true, terms=x.numel() // K + N + K) <= 1
    return results[0][0]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_tokens_of_any_shape(lead, impl):
    """As they are, apart, spread, and turned, where leading dimensions have no common stride."""
    x, weight, A, B = operands(*lead)
    spread = torch.zeros(*lead, 2 * K, device=DEVICE)[..., K:].copy_(x)
    turned = x.transpose(0, -2).contiguous().transpose(0, -2) if len(lead) > 1 else x.clone()
    for its in (x, spread, turned, x):
        for _ in range(2):
            y = held_to_float64(its, weight, A, B, impl=impl)
            assert y.shape == (*lead, N) and y.is_contiguous()
        for base in (drawn(*lead, N), drawn(N, *lead).movedim(0, -1)):
            y = lora_linear(its, None, A, B, base=base, impl=impl)
            assert y.shape == (*lead, N) and y.is_contiguous()
            torch.testing.assert_close(y, lora_linear(its, None, A, B, base=base, impl="reference"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_is_returned_may_be_written_to(impl):
    x, weight, A, B = operands(2, 3)
    for _ in range(3):
        y = lora_linear(x, weight, A.requires_grad_(), B.requires_grad_(), impl=impl)
        assert not y._is_view()
        y.relu_().sum().backward()


def test_a_call_that_looks_the_same_is_not_checked_again(monkeypatch):
    x, weight, A, B = operands(4, 2)
    checked, own = [], checks.check_arguments
    monkeypatch.setattr(checks, "check_arguments", lambda *args: checked.append(1) or own(*args))
    wanted = lora_linear(x, weight, A, B, scale=2.0, impl="triton")
    before = launch.launches
    for scale, dropout_p in ((2.0, 0.0), (1, 0.5), (2.0, 0)):  # acting in training alone
        y = lora_linear(x, weight, A, B, scale=scale, dropout_p=dropout_p, impl="triton")
    assert len(checked) == 1 and torch.equal(y, wanted) and launch.launches > before
    lora_linear(x, weight, A, B, dropout_p=0.5, training=True, impl="triton")
    assert len(checked) == 2


DIFFERENT = [
    {"dropout_p": 1.0}, {"dropout_p": True}, {"dropout_p": "0"}, {"scale": True}, {"scale": "1"}, {"scale": None}, {"seed": 0.5},
    {"scale": torch.ones(2)}, {"scale": torch.ones(1, requires_grad=True)}, {"scale": torch.ones(1, dtype=torch.float64)},
    {"impl": "cuda"}, {"impl": ["triton"]}, {"config": "16"}, {"widths": [N + 1]}, {"widths": (N, 1)}, {"ranks": torch.ones(1)},
    {"segments": Segments.from_ids(torch.zeros(4, dtype=torch.int64), 1)}, {"segments": 1}, {"base": torch.ones(8, N)},
    {"x": None}, {"x": [1.0]}, {"x": torch.ones(8, K, dtype=torch.float64)}, {"x": torch.ones(8, K).to_sparse()},
    {"x": torch.ones(8, K, device="meta")}, {"x": torch.ones(8, K + 1)}, {"x": torch.tensor(1.0)},
    {"weight": torch.ones(N, K, device="meta")}, {"weight": torch.ones(N, K, requires_grad=True)}, {"weight": torch.ones(1, N, K)},
    {"weight": torch.ones(N, K, dtype=torch.float16)}, {"weight": None}, {"lora_A": torch.ones(R, K, device="meta")},
    {"lora_A": torch.ones(R, K, dtype=torch.float16)}, {"lora_A": torch.ones(R + 1, K)}, {"lora_B": torch.ones(N, R, device="meta")},
    {"lora_B": torch.ones(N, R, dtype=torch.float16)}, {"lora_B": torch.ones(R, N)}, {"lora_bias": torch.ones(N + 1)},
    {"bias": torch.ones(N + 1)}, {"bias": torch.ones(N, device="meta")}, {"bias": torch.ones(N, dtype=torch.float16)},
]  # fmt: skip


@pytest.mark.parametrize("different", DIFFERENT, ids=lambda d: f"{next(iter(d))}")
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_call_that_is_refused_is_refused_after_a_good_one(different, bias):
    x, weight, A, B = operands(8)
    good = dict(x=x, weight=weight, lora_A=A, lora_B=B, bias=drawn(N) if bias else None, impl="triton", scale=1.0, dropout_p=0.0)
    changed = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for name, v in different.items()}
    refused = (TypeError, ValueError, problem.UnsupportedError)
    with pytest.raises(refused, match=": wanted ") as first:
        lora_linear(**{**good, **changed})
    lora_linear(**good), lora_linear(**{**good, "scale": torch.ones(1, device=DEVICE)})
    with pytest.raises(refused) as after:
        lora_linear(**{**good, **changed})
    assert (first.type, str(first.value)) == (after.type, str(after.value))


def test_a_batch_that_is_refused_is_refused_after_a_good_one():
    x, weight, *_ = operands(12)
    plan = Segments.from_ids(torch.arange(12, device=DEVICE) % E, E)
    good = dict(x=x, weight=weight, lora_A=drawn(E, R, K), lora_B=drawn(E, N, R), segments=plan, impl="triton")
    good |= dict(scale=torch.ones(E, device=DEVICE), ranks=torch.tensor([1, 2, R], dtype=torch.int32))
    good |= dict(ranks=good["ranks"].to(DEVICE)) if DEVICE.type == "cuda" else {}
    bad = {
        "segments: wanted 2 ids for each": dict(segments=dataclasses.replace(plan, top_k=2)),
        "segments: wanted one id for each": dict(segments=Segments.from_ids(torch.zeros(13, dtype=torch.int32, device=DEVICE), E)),
        "scale: wanted a contiguous tensor": dict(scale=torch.ones(E, 2, device=DEVICE)[:, 0]),
        "ranks: wanted ranks from 0 to lora_A's 4": dict(ranks=torch.tensor([1, 2, R + 1], dtype=torch.int32)),
        "lora_A: wanted shape": dict(segments=Segments.from_ids(torch.zeros(12, dtype=torch.int32, device=DEVICE), E + 1)),
    }
    if DEVICE.type == "cuda":  # whose ranks nobody reads
        del bad["ranks: wanted ranks from 0 to lora_A's 4"]
    for ranks in (good["ranks"], None):
        for match, changed in bad.items():
            for _ in range(2):
                lora_linear(**{**good, "ranks": ranks})
            with pytest.raises(ValueError, match=match):
                lora_linear(**{**good, "ranks": ranks, **changed})


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("tokens, features, outputs", [(0, K, N), (4, 0, N), (4, K, 0), (0, 0, 0)])
def test_nothing_to_compute(tokens, features, outputs, impl):
    x, weight, A, B = drawn(tokens, features), drawn(outputs, features), drawn(R, features), drawn(outputs, R)
    bias = drawn(outputs)
    for _ in range(2):
        torch.testing.assert_close(lora_linear(x, weight, A, B, bias, impl=impl), bias.expand(tokens, outputs))


def test_who_looks_on_sees_an_operator():
    """A mode, and a class of tensors with a say of its own, after calls that nobody saw."""
    x, weight, A, B = operands(4)
    lora_linear(x, weight, A, B, impl="torch")
    with FlopCounterMode(display=False) as counter:
        lora_linear(x, weight, A, B, impl="torch")
    assert counter.get_total_flops() == 2 * 4 * (N * K + R * K + N * R)
    for impl in ("torch", "triton"):
        plain = lora_linear(x, weight, A, B, impl=impl)
        two = lora_linear(TwoTensor(x, 2 * x), weight, A, B, impl=impl)
        assert type(two) is TwoTensor and torch.equal(two.a, plain) and not torch.equal(two.b, plain)


def test_an_address_that_no_descriptor_takes(monkeypatch):
    """On an H100 it changes the configuration, and nothing else of a call does."""
    monkeypatch.setattr(Arch, "interpreter", classmethod(lambda cls: Arch.parse("sm_90")))
    size, loads = 1024, []
    weight, A, B = (drawn(*shape).half() for shape in ((size, size), (16, size), (size, 16)))
    for offset in (0, 1, 0, 1):
        x = drawn(size * size + offset).half()[offset:].view(size, size)
        with launch.intercept(lambda kernel, grid, args, options: loads.append(options.get("LOAD_W"))):
            lora_linear(x, weight, A, B, impl="triton")
    loads = [load.fn.__name__ for load in loads if load is not None]
    assert loads == [loads[0], "load_dense"] * 2
    assert loads[0] == "load_descriptor_transposed" or DEVICE.type == "cuda"  # which may have no descriptors


def test_a_configuration_holds_for_both_passes():
    x, weight, A, B = operands(20)
    blocks: list = []

    def record(kernel, grid, args, options):
        if kernel.__name__ != "add_parts":
            blocks.append(options.get("BLOCK_J", options["BLOCK_M"]))

    with launch.intercept(record):
        for _ in range(2):
            lora_linear(x.requires_grad_(), weight, A.requires_grad_(), B.requires_grad_(), config=TILES).sum().backward()
    assert blocks == [16] * 12


def variants() -> list[dict]:
    """Calls of which each two differ in what a launch is made of. together: two layers of one x, whose gradients are alike, or not."""
    x, weight, A, B = operands(2, 12)
    ids = torch.arange(24, device=DEVICE) % E
    plan = Segments.from_ids(ids, E, row_block=16, gather_block=16)
    one = dict(x=x, weight=weight, lora_A=A, lora_B=B)
    stack = dict(x=x, weight=weight, lora_A=drawn(E, R, K), lora_B=drawn(E, N, R), segments=plan)
    off = drawn(24 * K + 1)[1:].view(2, 12, K)
    half = {name: t.half() for name, t in one.items()}
    experts = {**stack, "weight": drawn(E, N, K)}
    routed = {**experts, "x": x.view(24, K)[:12], "segments": dataclasses.replace(plan, top_k=2)}
    mixed = {"x": x.half(), "weight": experts["weight"].half()}
    return [
        one,
        {**one, "bias": drawn(N)},
        {**one, "x": x.view(24, K)},
        {**one, "x": x[:, :1]},
        {**one, "x": off},
        {**one, "weight": drawn(K, N).t()},
        {**one, "lora_A": drawn(K, R).t()},
        {**one, "lora_A": drawn(2 * R, K), "lora_B": drawn(N, 2 * R)},
        {**one, "weight": None, "base": drawn(2, 12, N)},
        {**one, "weight": None, "base": drawn(24, 2 * N)[:, :N], "x": x.view(24, K)},
        {**one, "scale": torch.ones(1, device=DEVICE)},
        {**one, "dropout_p": 0.5, "training": True},
        {**one, "dropout_p": 0.5},
        {**one, "lora_A": drawn(2 * R, K), "widths": (16, 16)},
        {**one, "lora_A": drawn(2 * R, K), "widths": (8, 24)},
        stack,
        {**stack, "scale": torch.ones(E, device=DEVICE)},
        {**stack, "ranks": torch.tensor([1, 2, 4], dtype=torch.int32, device=DEVICE)},
        {**stack, "segments": Segments.from_ids(ids, E, row_block=32, gather_block=16)},
        {**stack, "segments": Segments.from_ids(ids, E, row_block=16, gather_block=32)},
        half,
        {**half, "lora_A": A, "lora_B": B},
        experts,
        {**experts, **mixed},
        {**experts, **mixed, "lora_A": experts["lora_A"].half(), "lora_B": experts["lora_B"].half()},
        {**experts, "bias": drawn(E, N)},
        {**experts, "dropout_p": 0.5, "training": True},
        {**experts, "ranks": torch.tensor([1, 2, 4], dtype=torch.int32, device=DEVICE)},
        {**experts, "weight": drawn(E, K, N).mT},
        routed,
        *({**one, "config": config, "dropout_p": p, "training": True} for config in (TILES, PARTS, LOOP) for p in (0.0, 0.5)),
        *({**one, "config": config, "dropout_p": p, "together": "alike"} for config in (TILES, PARTS, LOOP) for p in (0.0, 0.5)),
        *({**one, "config": config, "dropout_p": 0.0, "together": "but for A"} for config in (PARTS, LOOP)),
        *({**one, "config": config, "dropout_p": 0.0, "together": "but for ranks"} for config in (TILES, PARTS)),
    ]


TRAINED = [(), ("lora_B",), ("lora_A",), ("x",), ("x", "lora_A", "lora_B")]


def called(kwargs: dict, trained: tuple[str, ...]) -> None:
    """Both passes of a call, or of two layers of one x, with gradients for these."""
    its = {name: t.detach().requires_grad_(name in trained) if name in ("x", "lora_A", "lora_B") else t for name, t in kwargs.items()}
    together = its.pop("together", "")
    if together:
        layer = Projection(its["weight"], its["lora_A"], its["lora_B"], dropout_p=its["dropout_p"])
        both = {
            "alike": (layer, layer),
            "but for A": (layer._replace(lora_A=its["lora_A"].detach()), layer),
            "but for ranks": (layer, layer._replace(lora_A=its["lora_A"][:2], lora_B=its["lora_B"][:, :2])),
        }[together]
        y = sum(lora_linears(its["x"], both, training=True, config=its["config"], impl="triton"))
    else:
        y = lora_linear(**its, impl="triton")
    if trained:
        y.backward(torch.ones_like(y))


def test_launches_are_those_of_a_call_made_first():
    """Whatever was called before, with whichever gradients, and whatever torch's float32 products are."""
    before = torch.get_float32_matmul_precision()

    def launched(kwargs: dict, trained: tuple[str, ...]) -> list:
        found = []

        def record(kernel, grid, args, options):
            numbers = [tuple(v for v in (a if isinstance(a, tuple) else (a,)) if not isinstance(v, torch.Tensor)) for a in args]
            tensors = [a[0] if isinstance(a, tuple) else a for a in args]
            made = [(t.shape, t.dtype) if isinstance(t, torch.Tensor) else None for t in tensors]
            found.append((kernel, grid, str(numbers), made, dict(options)))

        with launch.intercept(record):
            called(kwargs, trained)
        return found

    every = [(kwargs, trained, precision) for kwargs in variants() for trained in TRAINED for precision in ("highest", "high")]
    try:
        alone = []
        for kwargs, trained, precision in every:
            calls.forget()
            torch.set_float32_matmul_precision(precision)
            alone.append(launched(kwargs, trained))
        assert len({str(each) for each in alone}) > 100, "variants that launch alike prove nothing"
        for order in (range(len(every)), reversed(range(len(every))), [i * 37 % len(every) for i in range(len(every))]):
            for i in order:
                kwargs, trained, precision = every[i]
                torch.set_float32_matmul_precision(precision)
                assert launched(kwargs, trained) == alone[i]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B", "bias", "dy"])
def test_tensors_that_torch_negates_as_it_reads_them(which, p, impl):
    """The imaginary part of a conjugate has such a bit, and its memory the other sign."""
    x, weight, A, B = operands(3, 2)
    good = dict(x=x, weight=weight, lora_A=A, lora_B=B, bias=drawn(N), dropout_p=p, training=True, seed=5 if p else None)
    wanted = lora_linear(**good, impl=impl)
    if which == "dy":
        x.requires_grad_()
        plain, negated = (torch.autograd.grad(lora_linear(**good, impl=impl), x, dy)[0] for dy in (-wanted, torch._neg_view(wanted)))
        torch.testing.assert_close(plain, negated)
        return
    negative = torch._neg_view(-good[which])
    assert negative.is_neg()
    torch.testing.assert_close(lora_linear(**{**good, which: negative}, impl=impl), wanted)


def test_a_launch_is_of_operands_of_the_same_dtypes():
    """A layout that is kept stands for the compiled kernel. Where dB alone is wanted, no operand of the backward pass tells its dtype."""
    seen, kept = {}, []

    def dtypes(args) -> list:
        return [t.dtype if isinstance(t, torch.Tensor) else dtypes(t) for t in args if isinstance(t, (torch.Tensor, tuple))]

    def record(kernel, grid, args, options):
        kept.append(options)
        assert seen.setdefault(id(options), dtypes(args)) == dtypes(args), kernel.__name__
        kernel[grid](*args, **options)

    x, weight, A, B = operands(5, dtype=torch.float16)
    with launch.intercept(record):
        for dtype in (torch.float16, torch.float32, torch.float16):
            its_B = B.detach().to(dtype, copy=True).requires_grad_()
            lora_linear(x, weight, A.to(dtype), its_B, impl="triton").sum().backward()
            assert its_B.grad.dtype is dtype
    assert len(seen) > 3


def test_another_thread_may_forget_what_was_just_remembered(monkeypatch):
    class Emptied(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(calls, "_arms", Emptied())
    lora_linear(*operands(5), impl="torch")


def test_a_layers_tensors_are_found_wherever_they_are():
    layer = FusedLoRALinear(K, N, bias=False, r=R)
    many = MultiLoRALinear(K, N, num_adapters=2, r=R)
    assert held(layer, "weight", "bias", "in_features") == [layer.weight, None, K]
    assert all(a is b for a, b in zip(held(many, "lora_A", "scaling", "ranks"), (many.lora_A, many.scaling, many.ranks), strict=True))
    x, plain = torch.randn(3, K), layer(torch.zeros(3, K))
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_B", Doubled())
    with torch.no_grad():
        layer.parametrizations.lora_B.original.fill_(0.5)
        assert not torch.equal(layer(x), plain)
        torch.testing.assert_close(layer(x), lora_linear(x, layer.weight, layer.lora_A, torch.ones(N, R), scale=layer.scaling))
    with pytest.raises(AttributeError, match="nothing"):
        held(layer, "nothing")


class Doubled(torch.nn.Module):
    def forward(self, t):
        return 2 * t

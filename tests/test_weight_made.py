"""A weight that a function makes, of 4 bits, say: called once for y and once for dX, and kept by nobody."""

import pytest
import torch
from test_memory import Kept, mask_bytes
from torch.utils.checkpoint import checkpoint

from lora_kernels import Projection, Segments, UnsupportedError, explain, lora_linear, lora_linears, parity
from lora_kernels.parity import Case

M, N, K, R = 21, 37, 50, 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = ("triton", "torch", "auto")


class Maker:
    """A byte a weight and a scale a row, unpacked at each call."""

    def __init__(self, *sizes, dtype=torch.float32):
        self.packed, self.calls, self.dtype = torch.randint(-127, 128, sizes, dtype=torch.int8, device=DEVICE), 0, dtype

    def __call__(self):
        self.calls += 1
        return self.packed.to(self.dtype) / 100


def operands(adapters: int = 0, trained=("x", "lora_A", "lora_B"), **changed) -> dict:
    tensors = parity.inputs(Case(M, N, K, R, adapters=adapters, **changed), DEVICE)
    return {name: tensors[name].requires_grad_(name in trained) for name in ("x", "lora_A", "lora_B", "bias")}


def call(t: dict, weight, **kwargs) -> torch.Tensor:
    return lora_linear(t["x"], weight, t["lora_A"], t["lora_B"], t["bias"], scale=0.7, **kwargs)


@pytest.mark.parametrize("impl", [*ARMS, "reference"])
@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bit_for_bit_as_the_matrix(impl, adapters, p):
    made, t = Maker(N, K), operands(adapters)
    how: dict = dict(impl=impl, dropout_p=p, training=True, seed=7)
    if adapters:
        how["segments"] = Segments.from_ids(torch.arange(M, device=DEVICE) % (adapters + 1) - 1, adapters)
    results = []
    for weight in (made, made()):
        made.calls = 0
        y = call(t, weight, **how)
        results.append((y.detach(), *torch.autograd.grad(y, [t[name] for name in ("x", "lora_A", "lora_B")], torch.cos(y.detach()))))
        assert made.calls == (0 if isinstance(weight, torch.Tensor) else 1 if impl == "reference" else 2)
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("impl", ARMS)
def test_made_again_for_dX_alone(impl):
    made, t = Maker(N, K), operands(trained=("lora_A", "lora_B"))
    call(t, made, impl=impl).sum().backward()
    with torch.no_grad():
        call(t, made, impl=impl)
    assert made.calls == 2, "once for each y"


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bytes_kept(impl, p):
    """x, u and the mask, as beside a matrix that is there anyway; not what was made."""
    t = operands()
    with Kept() as kept:
        call(t, Maker(N, K), impl=impl, dropout_p=p, training=True)
    assert kept.bytes(besides=(t["lora_A"], t["lora_B"])) == 4 * M * K + 4 * M * R + mask_bytes(p, M, K, impl)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_stack_of_experts(impl):
    """By its weight the arm is chosen in the backward pass, so that it is made for dA and dB, too; and not kept."""
    made, t = Maker(3, N, K), operands(3, trained=("lora_A", "lora_B"))
    t["bias"] = None
    segments = Segments.from_ids(torch.arange(M, device=DEVICE) % 3, 3)
    results = []
    for weight in (made, made()):
        with Kept() as kept:
            y = call(t, weight, segments=segments, impl=impl)
        y.square().sum().backward()
        results.append((y.detach(), t["lora_A"].grad, t["lora_B"].grad))
        t["lora_A"].grad = t["lora_B"].grad = None
        assert (kept.bytes() >= 4 * 3 * N * K) == isinstance(weight, torch.Tensor)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    made, t = Maker(N, K), operands()
    grads = []
    for run in (lambda: call(t, made), lambda: checkpoint(lambda x: call({**t, "x": x}, made), t["x"], use_reentrant=reentrant)):
        t["x"].grad = None
        run().square().sum().backward()
        grads.append(t["x"].grad)
    assert torch.equal(*grads)


def test_autocast():
    """What is made is cast as a matrix would be, in both passes."""
    made, t = Maker(N, K), operands()
    results = []
    for weight in (made, made()):
        with torch.autocast(DEVICE.type, torch.float16):
            y = call(t, weight, impl="torch")
        results.append((y.detach(), *torch.autograd.grad(y, [t["x"], t["lora_B"]], torch.ones_like(y))))
    assert results[0][0].dtype is torch.float16 and all(torch.equal(mine, wanted) for mine, wanted in zip(*results, strict=True))


def test_autocast_of_several():
    made, t = Maker(N, K), operands()
    results = []
    for weight in (made, made()):
        with torch.autocast(DEVICE.type, torch.float16):
            (y,) = lora_linears(t["x"], [Projection(weight, t["lora_A"], t["lora_B"], t["bias"])], impl="torch")
        results.append((y.detach(), *torch.autograd.grad(y, [t["x"], t["lora_B"]], torch.ones_like(y))))
    assert results[0][0].dtype is torch.float16 and all(torch.equal(mine, wanted) for mine, wanted in zip(*results, strict=True))


def test_compiled_without_a_break():
    packed, t = Maker(N, K).packed, operands()

    def made():
        return packed.float() / 100

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call({**t, "x": x}, made), backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(t["x"]).square().sum(), [t["x"], t["lora_A"]]) for f in (compiled, lambda x: call({**t, "x": x}, made))]
    for mine, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_layers_of_one_x(impl, p):
    """Bit for bit as with matrices; each made twice, and once where x needs no gradient."""
    t, makers = operands(), [Maker(N, K), Maker(16, K)]
    others = [torch.randn(8, K, device=DEVICE, requires_grad=True), torch.randn(16, 8, device=DEVICE, requires_grad=True)]
    found = []
    for weights in (makers, [each() for each in makers]):
        for each in makers:
            each.calls = 0
        parts = [Projection(weights[0], t["lora_A"], t["lora_B"], t["bias"], 0.7, p, 3), Projection(weights[1], *others, None, 0.7, p, 4)]
        with Kept() as kept:
            ys = lora_linears(t["x"], parts, training=True, impl=impl)
        grads = torch.autograd.grad([y.cos().sum() for y in ys], [t["x"], t["lora_A"], t["lora_B"], *others])
        found.append([*ys, *grads])
        made = weights is makers
        assert [each.calls for each in makers] == [2 * made, 2 * made] and (kept.bytes() > 4 * (N + 16) * K + 4 * M * K) != made
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*found, strict=True))
    lora_linears(t["x"].detach(), [Projection(makers[0], t["lora_A"], t["lora_B"])], impl=impl)[0].sum().backward()
    assert makers[0].calls == 1


def test_explain_and_refusals():
    t = operands()
    assert explain(t["x"], Maker(N, K), t["lora_A"], t["lora_B"]).arm == explain(t["x"], Maker(N, K)(), t["lora_A"], t["lora_B"]).arm
    for make, error, words in (
        (lambda: None, TypeError, r"weight: wanted a tensor \[out_features, in_features\], or None with base, got NoneType"),
        (Maker(N, K + 1), ValueError, "weight"),
        (Maker(N, K, dtype=torch.float16), TypeError, "weight"),
        (lambda: torch.zeros(N, K, device=DEVICE, requires_grad=True), ValueError, "weight: wanted a frozen base weight"),
    ):
        with pytest.raises(error, match=words):
            call(t, make)
    with pytest.raises(ValueError, match="weight: wanted None with base"):
        lora_linear(t["x"], Maker(N, K), t["lora_A"], t["lora_B"], base=torch.zeros(M, N, device=DEVICE))
    for make, words in ((Maker(N + 1, K), rf"\[{N + 1}, {K}\] on"), (lambda: 3, "int"), (lambda: torch.zeros(K, N, device=DEVICE).T, "")):
        with pytest.raises(ValueError, match=rf"weight: wanted a function that makes a contiguous \[{N}, {K}\] on .*, got .* {words}"):
            lora_linears(t["x"], [Projection(make, t["lora_A"], t["lora_B"])])
    with pytest.raises(ValueError, match=r"projections\[0\]: lora_A"):
        lora_linears(t["x"], [Projection(Maker(N, K), t["lora_A"][:, :-1], t["lora_B"])])
    y = call(t, Maker(N, K))
    with pytest.raises(UnsupportedError, match="create_graph"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), t["x"], create_graph=True)[0].sum(), t["lora_A"])

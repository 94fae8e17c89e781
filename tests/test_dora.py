"""DoRA and the adapter's own bias: forward, every gradient, the norm without B A, merging, and the refusals."""

import pytest
import torch
import torch.nn.functional as F
from test_memory import Kept
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import FusedLoRALinear, Segments, UnsupportedError, chain, dora_linear, launch, lora_linear, reference
from lora_kernels.dora import ScaleColumns, weight_norm
from lora_kernels.parity import budget_used

M, N, K, R, SCALE = 9, 21, 34, 5, 1.7
TENSORS = ("x", "A", "B", "m", "bias")
PARTS = [1, 5 * K, 1 << 19]  # elements that are widened at a time: a row, some rows and a rest, all


def operands(dtype, device="cpu", adapter_dtype=None):
    adapter_dtype = adapter_dtype or dtype
    t = dict(x=torch.randn(2, M, K).to(dtype), W=torch.randn(N, K).to(dtype), A=torch.randn(R, K).to(adapter_dtype))
    t |= dict(B=torch.randn(N, R).to(adapter_dtype), m=torch.rand(N).to(adapter_dtype) * 9, bias=torch.randn(N).to(dtype))
    return {name: value.to(device) for name, value in t.items()}, torch.randn(2, M, N).to(dtype).to(device)


def textbook(x, W, A, B, m, bias, keep=None):
    """Materialised, in the operands' dtype: the norm is a constant, and a dropped x enters as PEFT has it."""
    whole = W + SCALE * (B @ A)
    g = m / torch.linalg.norm(whole.detach(), dim=1)
    if keep is None:
        return F.linear(x, whole) * g + bias
    dropped = x * keep
    return F.linear(x, W) + (g - 1) * F.linear(dropped, W) + g * SCALE * F.linear(F.linear(dropped, A), B) + bias


def ours(x, W, A, B, m, bias, **kwargs):
    return dora_linear(x, W, A, B, m, bias, scale=SCALE, **kwargs)


def run(function, t, dy, dtype=None, **kwargs):
    leaves = {name: v.detach().to(dtype or v.dtype).requires_grad_(name in TENSORS) for name, v in t.items()}
    y = function(**leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in TENSORS], dy.to(dtype or dy.dtype))]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)])
def test_forward_and_every_gradient(dtype, impl, device):
    t, dy = operands(dtype, device)
    truth, same = run(textbook, t, dy, torch.float64), run(textbook, t, dy)
    before = launch.launches
    got = run(ours, t, dy, impl=impl)
    assert (launch.launches > before) == (impl == "triton")
    for name, o, s, exact in zip(("y", *TENSORS), got, same, truth, strict=True):
        assert budget_used(o, s, exact) <= 1, name


def test_gradients_by_finite_differences():
    t, _ = operands(torch.float64)
    with torch.no_grad():
        norm = weight_norm(t["W"], t["A"], t["B"], SCALE)

    def fixed(x, A, B, m, bias):  # the norm held constant, as the backward pass holds it
        return ScaleColumns.apply(lora_linear(x, t["W"], A, B, scale=SCALE), m / norm, bias, False)

    assert torch.autograd.gradcheck(fixed, [t[name][:1] if name == "x" else t[name].requires_grad_() for name in TENSORS])


@pytest.mark.parametrize("widened", PARTS)
def test_float32_adapters_on_a_16_bit_base(widened, monkeypatch):
    monkeypatch.setattr(chain, "_WIDENED", widened)
    t, dy = operands(torch.float16, adapter_dtype=torch.float32)
    truth = run(textbook, t, dy, torch.float64)
    same = run(textbook, {name: v.half() for name, v in t.items()}, dy)
    got = run(ours, t, dy)
    assert [g.dtype for g in got] == [torch.float16, torch.float16, *[torch.float32] * 3, torch.float16]
    for name, o, s, exact in zip(("y", *TENSORS), got, same, truth, strict=True):
        assert budget_used(o.half(), s, exact) <= 1, name


def test_dropout_as_peft_has_it(monkeypatch):
    t, dy = operands(torch.float64)
    keep = (torch.rand_like(t["x"]) < 0.7) / 0.7
    monkeypatch.setattr(F, "dropout", lambda x, p: x * keep)
    got = run(ours, t, dy, dropout_p=0.3, training=True)
    for o, exact in zip(got, run(textbook, t, dy, keep=keep), strict=True):
        torch.testing.assert_close(o, exact, rtol=1e-11, atol=1e-11)
    for o, exact in zip(run(ours, t, dy, dropout_p=0.3), run(textbook, t, dy), strict=True):
        torch.testing.assert_close(o, exact, rtol=1e-11, atol=1e-11)


class Maker:
    """Makes the same weight at each call, and counts them."""

    def __init__(self, weight):
        self.weight, self.calls = weight.detach(), 0

    def __call__(self):
        self.calls += 1
        return self.weight.clone()


def elsewhere(x, W, A, B, m, bias, made=False, **kwargs):
    """DoRA beside a product that another layer makes."""
    return ours(x, Maker(W) if made else W, A, B, m, bias, base=F.linear(x, W, bias), **kwargs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_beside_a_product_that_is_given(p, dtype, impl, device, monkeypatch):
    """y and every gradient, of the given product's x and bias, too, as of the textbook's formula with the same mask."""
    t, dy = operands(dtype, device)
    keep = (torch.rand(t["x"].shape) >= p).to(device) / (1 - p)
    monkeypatch.setattr(F, "dropout", lambda x, p: x * keep.to(x.dtype))
    masked = dict(keep=keep) if p else {}
    truth = run(textbook, t, dy, torch.float64, **{name: mask.double() for name, mask in masked.items()})
    same = run(textbook, t, dy, **{name: mask.to(dtype) for name, mask in masked.items()})
    for made in (False, True):
        before = launch.launches
        got = run(elsewhere, t, dy, made=made, dropout_p=p, training=True, impl=impl)
        assert (launch.launches > before) == (impl == "triton")
        for name, o, s, exact in zip(("y", *TENSORS), got, same, truth, strict=True):
            assert budget_used(o, s, exact) <= 1, name


def test_a_weight_that_is_made():
    """Once for the norm and the product, once for dX; bit for bit as a matrix, and kept by nobody."""
    t, dy = operands(torch.float32)
    found = []
    for make in (False, True):
        leaves = {name: v.clone().requires_grad_(name in TENSORS) for name, v in t.items()}
        weight = Maker(t["W"]) if make else t["W"]
        with Kept() as kept:
            y = ours(**{**leaves, "W": weight})
        assert not make or weight.calls == 1
        found.append([y, *torch.autograd.grad(y, [leaves[name] for name in TENSORS], dy)])
        assert not make or weight.calls == 2
        # x, u, what the magnitude scales, and vectors of N: g, the norm, the magnitude
        assert (kept.bytes(besides=(leaves["A"], leaves["B"])) <= 4 * (2 * M * (K + R + N) + 3 * N)) == make
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(ours(**{**t, "W": weight}), found[0][0]) and weight.calls == 3
    assert torch.equal(ours(**{**t, "W": weight}, dropout_p=0.3), found[0][0]), "not in training"


def test_bytes_kept_beside_a_product():
    """With dropout, too, nothing of the weight's size."""
    t, _ = operands(torch.float32)
    t = {name: v.requires_grad_(name in TENSORS) for name, v in t.items()}
    base, kept = F.linear(t["x"], t["W"], t["bias"]), {}
    for p in (0.0, 0.3):
        with Kept() as each:
            ours(**{**t, "W": Maker(t["W"])}, base=base, dropout_p=p, training=True)
        kept[p] = each.bytes(besides=(t["A"], t["B"], t["bias"]))
    assert kept[0.0] <= 4 * (2 * M * (K + R + N) + 4 * N)
    # the dropped x and torch's mask of it, u, what the magnitude scales, and B as it scales it
    assert kept[0.3] <= 4 * (2 * M * (2 * K + R + N) + N * R + 4 * N)


@pytest.mark.parametrize("widened", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_norm_without_the_product(dtype, widened, monkeypatch):
    monkeypatch.setattr(chain, "_WIDENED", widened)
    t, _ = operands(dtype)
    W, A, B = (t[name].double() for name in "WAB")
    wanted = torch.linalg.norm(W + SCALE * (B @ A), dim=1)
    got = weight_norm(t["W"], t["A"], t["B"], SCALE)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float32 sums of K + r^2 terms: a relative error of the squares' sum, halved by the root
    squares = W.square().sum(1) + (SCALE * (B @ A)).square().sum(1)
    allowed = (K + R * R) * torch.finfo(got.dtype).eps * squares / wanted
    assert ((got.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("widened", PARTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_product_of_16_bits_in_parts(dtype, widened, monkeypatch):
    """As those of dA, dB and the norm, of transposed operands too: float32 sums, of whose terms none is rounded to 16 bits."""
    monkeypatch.setattr(chain, "_WIDENED", widened)
    for a, b in ((torch.randn(M, R), torch.randn(M, K)), (torch.randn(K, M).t(), torch.randn(R, M).t())):
        a, b = a.to(dtype).t(), b.to(dtype)
        product, exact = chain.grad_mm(a, b, torch.float32), a.double() @ b.double()
        allowed = a.shape[1] * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
        assert product.dtype is torch.float32 and ((product.double() - exact).abs() <= allowed).all()


def test_no_float32_tensor_of_y_s_size_is_made(monkeypatch):
    """On a CPU, of 16 bits: rows at a time, forward and backward."""
    monkeypatch.setattr(chain, "_WIDENED", 5 * K)
    t, dy = operands(torch.bfloat16)
    seen = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(each.numel() for each in [out] if isinstance(each, torch.Tensor) and each.dtype is torch.float32)
            return out

    leaves = [t["x"].flatten(0, 1)[:, :N].clone().requires_grad_(), torch.rand(N).requires_grad_(), t["bias"].requires_grad_()]
    with Sizes():
        torch.autograd.grad(ScaleColumns.apply(*leaves, False), leaves, dy.flatten(0, 1))
    assert seen and max(seen) < 2 * M * N / 2


def test_the_norm_is_not_autocast():
    W, A, B = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    with torch.autocast("cpu", torch.bfloat16):
        norm = weight_norm(W, A, B, SCALE)
    assert torch.equal(norm, weight_norm(W, A, B, SCALE))


def test_a_row_that_the_update_cancels_is_zero_not_nan():
    W, A, B = torch.zeros(2, 8), torch.randn(1, 8), torch.tensor([[1.0], [0.0]])
    W[0] = -A[0]
    norm = weight_norm(W, A, B, 1.0)
    assert torch.isfinite(norm).all() and norm[0] < 1e-3 and norm[1] == 0


def test_a_row_of_zeros_stays_one():
    """Of a padded vocabulary, or of a pruned neuron: 0 / 0 in PEFT's DoRA."""
    layer = FusedLoRALinear(K, N, r=R, bias=False, lora_dropout=0.5, use_dora=True)
    layer.weight[2] = 0
    layer.reset_magnitude()
    y = layer(torch.randn(3, K))
    y.square().sum().backward()
    assert not y[:, 2].any() and all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    layer.eval().merge()
    assert not layer.weight[2].any() and layer.weight[1].any()


def test_the_module_starts_as_the_base_and_trains_its_magnitude():
    layer = FusedLoRALinear(K, N, r=R, use_dora=True)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).square().sum().backward()
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B", "lora_magnitude"] and all(getattr(layer, name).grad is not None for name in trained)
    assert "use_dora=True" in repr(layer) and FusedLoRALinear(K, N).lora_magnitude is None
    assert list(FusedLoRALinear(K, N, use_dora=True, device="meta").state_dict())[-1] == "lora_magnitude"


@pytest.mark.parametrize("kwargs", [dict(use_dora=True), dict(lora_bias=True), dict(lora_bias=True, bias=False)])
def test_merged_it_is_the_same_function(kwargs):
    layer = FusedLoRALinear(K, N, r=R, init_lora_weights=False, dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        for name in ("lora_magnitude", "lora_bias"):
            if getattr(layer, name) is not None:
                getattr(layer, name).uniform_(0.5, 2.0)
    x, base = torch.randn(4, K, dtype=torch.float64), layer.weight.clone()
    apart = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), apart, rtol=1e-12, atol=1e-12)
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, base, layer.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_lora_bias(bias, impl, device):
    t, dy = operands(torch.float32, device)
    b = t["bias"] if bias else None
    own = torch.randn(N, device=device, requires_grad=True)
    y = lora_linear(t["x"], t["W"], t["A"], t["B"], b, scale=SCALE, lora_bias=own, impl=impl)
    exact = [None if v is None else v.double() for v in (t["x"], t["W"], t["A"], t["B"], b)]
    wanted = reference.lora_linear(*exact, scale=SCALE) + SCALE * own.double()
    same = reference.lora_linear(t["x"], t["W"], t["A"], t["B"], b, scale=SCALE) + SCALE * own
    assert budget_used(y.detach(), same.detach(), wanted.detach()) <= 1
    (grad,) = torch.autograd.grad(y, own, dy)
    assert budget_used(grad, SCALE * dy.sum((0, 1)), SCALE * dy.double().sum((0, 1))) <= 1


def test_compiles_in_one_graph():
    for kwargs in (dict(use_dora=True), dict(lora_bias=True)):
        layer = FusedLoRALinear(K, N, r=R, init_lora_weights=False, **kwargs)
        x = torch.randn(6, K)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        assert layer.lora_B.grad is not None


def test_a_compiled_layer_s_output_may_be_changed_in_place():
    """It is no view of what the graph made, which autograd would refuse to have written to."""
    layer = FusedLoRALinear(K, N, r=R, use_dora=True, init_lora_weights=False)
    x = torch.randn(2, 3, K)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x).relu_()
    torch.testing.assert_close(y, layer(x).relu())
    y.sum().backward()
    assert layer.lora_A.grad.any()


@pytest.mark.parametrize(
    "function, changed, error, match",
    [
        (dora_linear, {"m": torch.ones(N + 1)}, ValueError, r"magnitude: wanted shape \[21\]"),
        (dora_linear, {"m": torch.ones(N).half()}, TypeError, "magnitude: wanted dtype torch.float32, got torch.float16"),
        (dora_linear, {"m": torch.ones(N, device="meta")}, ValueError, "magnitude: wanted weight's device cpu, got meta"),
        (dora_linear, {"m": None}, TypeError, r"magnitude: wanted a tensor \[out_features\], got NoneType"),
        (dora_linear, {"bias": torch.ones(3)}, ValueError, r"bias: wanted shape \[21\]"),
        (dora_linear, {"scale": torch.ones(1)}, TypeError, "scale: wanted a float, got Tensor"),
        (dora_linear, {"W": None}, TypeError, r"weight: wanted a tensor \[out_features, in_features\]"),
        (dora_linear, {"W": None, "base": torch.ones(2, M, N)}, TypeError, r"wanted .* or a function that makes it, got NoneType"),
        (dora_linear, {"W": lambda: torch.ones(N, K + 1)}, ValueError, rf"x: wanted shape \[..., {K + 1}\] to match weight"),
        (dora_linear, {"base": torch.ones(2, M, N + 1)}, ValueError, r"base: wanted 21 outputs to match weight .*, got \[2, 9, 22\]"),
        (dora_linear, {"base": torch.ones(M, N)}, ValueError, r"base: wanted shape \[2, 9, out_features\]"),
        (dora_linear, {"base": torch.ones(2, M, N).half()}, TypeError, "base: wanted x's dtype torch.float32, got torch.float16"),
        (dora_linear, {"base": 3}, TypeError, "base: wanted a tensor .* got int"),
        (dora_linear, {"A": "A"}, TypeError, r"lora_A: wanted a tensor \[r, in_features\], got str"),
        (dora_linear, {"dropout_p": 1.0, "training": True}, ValueError, r"dropout_p: wanted a probability in \[0, 1\), got 1.0"),
        (dora_linear, {"dropout_p": -0.1}, ValueError, r"dropout_p: wanted a probability in \[0, 1\), got -0.1"),
        (dora_linear, {"dropout_p": True, "training": True}, TypeError, r"dropout_p: wanted a float in \[0, 1\), got bool"),
        (lora_linear, {"lora_bias": torch.ones(N, 1)}, ValueError, r"lora_bias: wanted shape \[21\]"),
        (lora_linear, {"lora_bias": torch.ones(N).double()}, TypeError, "lora_bias: wanted dtype torch.float32, got torch.float64"),
    ],
)
def test_refused(function, changed, error, match):
    t, _ = operands(torch.float32)
    t |= {name: value for name, value in changed.items() if name in t}
    rest = {name: value for name, value in changed.items() if name not in t}
    magnitude = (t["m"],) if function is dora_linear else ()
    with pytest.raises(error, match=match):
        function(t["x"], t["W"], t["A"], t["B"], *magnitude, t["bias"], **rest)


def test_refused_combinations():
    with pytest.raises(UnsupportedError, match="lora_bias: wanted False with use_dora=True"):
        FusedLoRALinear(K, N, lora_bias=True, use_dora=True)
    with pytest.raises(UnsupportedError, match="swap: wanted a layer without DoRA"):
        layer = FusedLoRALinear(K, N, use_dora=True)
        layer.swap(layer.lora_A, layer.lora_B)
    stack, plan = torch.randn(2, R, K), Segments.from_ids(torch.zeros(4, dtype=torch.int32), 2)
    with pytest.raises(UnsupportedError, match="lora_bias: wanted None with segments"):
        lora_linear(torch.randn(4, K), torch.randn(N, K), stack, torch.randn(2, N, R), segments=plan, lora_bias=torch.zeros(N))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("given", [True, False])
def test_made_weights_are_not_differentiated_twice(given, p):
    t, _ = operands(torch.float32)
    x, base = t["x"].requires_grad_(), torch.randn(2, M, N) if given else None
    t["A"].requires_grad_()
    y = ours(**{**t, "W": Maker(t["W"])}, base=base, dropout_p=p, training=True)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="create_graph"):
        dx.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("given", [True, False])
def test_made_weights_under_autocast(given, p):
    """As matrices are: y, and gradients in each one's dtype."""
    t, _ = operands(torch.float32)
    results = []
    for make in (False, True):
        leaves = {name: v.clone().requires_grad_(name in TENSORS) for name, v in t.items()}
        base = F.linear(leaves["x"], t["W"], leaves["bias"]) if given else None
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(**{**leaves, "W": Maker(t["W"]) if make else t["W"]}, base=base, dropout_p=p, training=True)
        assert y.dtype is (torch.float32 if given else torch.bfloat16)
        results.append([y, *torch.autograd.grad(y.float().cos().sum(), [leaves[name] for name in TENSORS])])
    assert all(torch.equal(mine, wanted) and mine.dtype is wanted.dtype for mine, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("given", [True, False])
def test_made_weights_compile_in_one_graph(given):
    t, _ = operands(torch.float32)
    x, base = t["x"].requires_grad_(), torch.randn(2, M, N) if given else None

    def call(x):
        return ours(**{**t, "x": x, "W": lambda: t["W"] * 2}, base=base)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, call)))

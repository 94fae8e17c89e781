"""The autograd Function: what is computed, what is saved, and how it behaves in torch's corners. Both handwritten arms."""

import gc
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lora_kernels import Projection, UnsupportedError, chain, explain, lora_linear, lora_linears, parity, reference
from lora_kernels.parity import Case
from lora_kernels.tuning import Config, Expand, Shrink, Wgrad

ARMS = ("torch", "triton")
M, N, K, R = 9, 12, 20, 3


def operands(device, dtype=torch.float32, adapter=None):
    t = parity.inputs(Case(M, N, K, R, dtype, adapter_dtype=adapter), device)
    return [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]


def leaves(args, needed=(0, 2, 3, 4)):
    return [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(args)]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_reference_gradcheck(p):
    args = leaves(operands(torch.device("cpu"), torch.float64))
    seed = torch.tensor(7)
    call = lambda x, A, B, b: reference.lora_linear(x, args[1], A, B, b, scale=0.7, dropout_p=p, training=True, seed=seed)  # noqa: E731
    assert torch.autograd.gradcheck(call, [args[i] for i in (0, 2, 3, 4)])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_handwritten_backward_gradcheck(p):
    args = leaves(operands(torch.device("cpu"), torch.float64))
    call = lambda x, A, B, b: lora_linear(x, args[1], A, B, b, scale=0.7, dropout_p=p, training=True, seed=7, impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(call, [args[i] for i in (0, 2, 3, 4)])


def test_reference_is_the_textbook_formula():
    x, W, A, B, b = operands(torch.device("cpu"), torch.float64)
    torch.testing.assert_close(reference.lora_linear(x, W, A, B, b, scale=0.3), x @ (W + 0.3 * B @ A).T + b)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("more", [{}, {"adapters": 3}, {"adapters": 3, "experts": True}, {"layers": 2}, {"widths": (20, 28)}], ids=str)
def test_a_bias_of_any_stride(impl, more, device):
    """Neither oneDNN's linear, for float32 of 16 and more, nor the kernels read a bias by its stride."""
    result = parity.run_case(Case(80, 48, 64, 5, torch.float32, layout="transposed", impl=impl, **more), device)
    assert result.ok, result.detail
    x, weight, A, B, _ = operands(device)
    one = torch.tensor([2.0], device=device)
    y = lora_linear(x, weight, A, B, one.expand(N), impl=impl)
    torch.testing.assert_close(y, lora_linear(x, weight, A, B, impl=impl) + 2.0)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("needed", [(0,), (2,), (3,), (4,), (0, 2), (2, 3), (0, 3), (0, 2, 3, 4)])
def test_needs_input_grad_decides_what_is_computed_and_saved(impl, needed, device):
    args = operands(device)
    truth = leaves(args, needed)
    lora_linear(*truth, scale=2.0, impl="reference").square().sum().backward()
    ours, saved = leaves(args, needed), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(*ours, scale=2.0, impl=impl)
    shapes = sorted(tuple(t.shape) for t in saved)
    x, W, A, B, u = (M, K), (N, K), (R, K), (N, R), (M, R)
    wanted = {(0,): [W, A, B], (2,): [x, B], (3,): [u], (4,): [], (0, 2): [W, A, B, x], (2, 3): [x, B, u], (0, 3): [W, A, B, u]}
    assert shapes == sorted(wanted.get(needed, [W, A, B, x, u]))
    y.square().sum().backward()
    for i, (t, o) in enumerate(zip(truth, ours, strict=True)):
        assert (o.grad is None) == (i not in needed)
        if i in needed:
            torch.testing.assert_close(o.grad, t.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ARMS)
def test_dropout_saves_a_seed_or_a_bit_an_element(impl, device):
    saved = []
    known_by = (M, -(-K // 8)) if impl == "torch" and device.type == "cpu" else ()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(*leaves(operands(device)), dropout_p=0.5, training=True, impl=impl)
    assert sorted(tuple(t.shape) for t in saved) == sorted([(M, K), (N, K), (R, K), (N, R), (M, R), known_by])


@pytest.mark.parametrize("impl", ARMS)
def test_retain_graph_and_x_used_twice(impl, device):
    args = leaves(operands(device))
    y = lora_linear(*args, impl=impl) + lora_linear(*args, impl=impl)
    y.sum().backward(retain_graph=True)
    once = [args[i].grad.clone() for i in (0, 2, 3, 4)]
    y.sum().backward()
    for i, grad in zip((0, 2, 3, 4), once, strict=True):
        assert torch.equal(args[i].grad, 2 * grad)


@pytest.mark.parametrize("impl", ARMS)
def test_gradients_of_rank_1_have_their_parameters_strides(impl, device):
    """As DDP's buckets and the operators' fake kernels have them."""
    x, weight, A, B, bias = operands(device)
    args = leaves([x, weight, A[:1].clone(), B[:, :1].clone(), bias])
    lora_linear(*args, impl=impl).sum().backward()
    assert args[2].grad.stride() == (K, 1) and args[3].grad.stride() == (1, 1)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("changed", [0, 2, 3])
def test_in_place_change_of_a_saved_tensor_is_torchs_error(impl, changed, device):
    args = leaves(operands(device))
    y = lora_linear(*args, impl=impl)
    with torch.no_grad():
        args[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", ARMS)
def test_double_backward_is_refused(impl, device):
    args = leaves(operands(device))
    (dx,) = torch.autograd.grad(lora_linear(*args, impl=impl).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="wanted gradients that are not differentiated"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("impl", ARMS)
def test_no_second_derivative_is_left_out_unasked(impl, reentrant, device):
    """torch.autograd.grad passes by an error that leads to none of its inputs; and dB depends on A, whatever dY does."""
    args = leaves(operands(device))
    called = lambda x, *others: lora_linear(x, *others, impl=impl)  # noqa: E731
    call = called if reentrant is None else lambda *args: checkpoint(called, *args, use_reentrant=reentrant)
    with pytest.raises(UnsupportedError, match="wanted gradients that are not differentiated"):
        torch.autograd.functional.hessian(lambda x: call(x, *args[1:]).square().sum(), args[0])
    (db,) = torch.autograd.grad(call(*args).sum(), args[3], create_graph=True)
    with pytest.raises(UnsupportedError, match="wanted gradients that are not differentiated"):
        torch.autograd.grad(db.sum() + args[2].sum(), args[2])
    torch.testing.assert_close(db, torch.autograd.grad(call(*args).sum(), args[3])[0])


@pytest.mark.parametrize("call", [lora_linear, lambda x, *four, **how: lora_linears(x, [Projection(*four)] * 2, **how)[1]])
@pytest.mark.parametrize("impl", ARMS)
def test_a_forward_mode_derivative_is_refused(impl, call, device):
    """No kernel sees it, nor oneDNN's linear, and torch would take its absence for zeros."""
    x, *others = operands(device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="to use it with forward mode AD"):
            call(dual, *others, impl=impl)
        torch.testing.assert_close(call(x, *others, impl=impl), call(x, *others, impl="reference"))
        derivative = forward_ad.unpack_dual(call(dual, *others, impl="reference")).tangent
    torch.testing.assert_close(derivative, lora_linear(torch.ones_like(x), *others[:3], impl="reference"))


@pytest.mark.parametrize("impl", ARMS)
def test_torch_func_differentiates_the_reference_alone(impl, device):
    x, *others = operands(device)
    derivative = torch.func.grad(lambda x: lora_linear(x, *others, impl="reference").sum())(x)
    torch.testing.assert_close(derivative, lora_linear(torch.ones(M, N, device=device), others[0].T, others[2].T, others[1].T))
    called = lambda x: lora_linear(x, *others, impl=impl).sum()  # noqa: E731
    several = lambda x: lora_linears(x, [Projection(*others)] * 2, impl=impl)[1].sum()  # noqa: E731
    for call in (called, several):
        for transform in (torch.func.grad, torch.func.jacfwd, torch.func.vmap):
            with pytest.raises(UnsupportedError, match="torch.func: wanted no transform"):
                transform(call)(x)
    with pytest.raises(UnsupportedError, match="torch.func: wanted no transform"):
        torch.compile(torch.func.grad(called), backend="aot_eager")(x)
    beside = torch.func.grad(lambda scale: (scale * called(x)).sum())  # of which the call is no part
    torch.testing.assert_close(beside(torch.ones((), device=device)), called(x))


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_the_same_mask(impl, reentrant, device):
    args = operands(device)
    grads = []
    for wrapped in (False, True):
        ours = leaves(args)
        torch.manual_seed(3)
        call = lambda *a: lora_linear(*a, dropout_p=0.5, training=True, impl=impl)  # noqa: E731
        y = checkpoint(call, *ours, use_reentrant=reentrant) if wrapped else call(*ours)
        torch.manual_seed(99)
        y.sum().backward()
        grads.append([y.detach(), *(ours[i].grad for i in (0, 2, 3, 4))])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("impl", ("reference", *ARMS))
def test_manual_seed_governs_the_mask_and_layers_draw_their_own(impl, device):
    args = operands(device)

    def two():
        torch.manual_seed(5)
        return [lora_linear(*args, dropout_p=0.5, training=True, impl=impl) for _ in range(2)]

    first, second = two(), two()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("impl", ARMS)
def test_every_arm_draws_the_references_mask(impl, device):
    args = operands(device)
    outs = []
    for name in ("reference", impl):
        torch.manual_seed(17)
        outs.append(lora_linear(*args, dropout_p=0.5, training=True, impl=name))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ("reference", *ARMS))
def test_eval_mode_and_p_0_drop_nothing_and_draw_nothing(impl, device):
    args = operands(device)
    state = torch.get_rng_state()
    y = lora_linear(*args, impl=impl)
    assert torch.equal(y, lora_linear(*args, dropout_p=0.5, training=False, impl=impl))
    assert torch.equal(y, lora_linear(*args, dropout_p=0.0, training=True, impl=impl))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("p", [0.001, 0.5, 0.9999])
def test_extreme_p(impl, p, device):
    args = operands(device)
    wanted = lora_linear(*args, dropout_p=p, training=True, seed=4, impl="reference")
    torch.testing.assert_close(lora_linear(*args, dropout_p=p, training=True, seed=4, impl=impl), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", ARMS)
def test_float32_adapters_get_gradients_that_were_never_16_bit(impl, device):
    ours = leaves(operands(device, torch.float16, torch.float32))
    lora_linear(*ours, impl=impl).float().sum().backward()
    for i in (2, 3):
        grad = ours[i].grad
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.half().float()), "rounded to float16 on the way"


@pytest.mark.parametrize("impl", ARMS)
def test_shapes(impl, device):
    x, W, A, B, b = operands(device)
    for shape in ((K,), (1, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)):
        xs = torch.randn(shape, device=device, requires_grad=True)
        A_, B_, b_ = leaves((A, B, b), needed=(0, 1, 2))
        y = lora_linear(xs, W, A_, B_, b_, impl=impl)
        assert y.shape == F.linear(xs, W).shape and y.is_contiguous()
        torch.testing.assert_close(y, lora_linear(xs, W, A, B, b, impl="reference"), rtol=1e-4, atol=1e-4)
        y.sum().backward()
        assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in (xs, A_, B_, b_))


@pytest.mark.parametrize("impl", ARMS)
def test_one_scale_of_any_shape(impl, device):
    truth = leaves(operands(device))
    y = lora_linear(*truth, scale=0.5, impl=impl)
    y.square().sum().backward()
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        ours = leaves(operands(device))
        its_y = lora_linear(*ours, scale=torch.full(shape, 0.5, device=device), impl=impl)
        its_y.square().sum().backward()
        for own, other in zip((its_y, *(t.grad for t in ours)), (y, *(t.grad for t in truth)), strict=True):
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize("impl", ARMS)
def test_no_features(impl, device):
    for n, k in ((N, 0), (0, K)):
        x = torch.randn(4, k, device=device, requires_grad=True)
        A, B = torch.randn(R, k, device=device, requires_grad=True), torch.randn(n, R, device=device, requires_grad=True)
        b = torch.randn(n, device=device)
        y = lora_linear(x, torch.randn(n, k, device=device), A, B, b, impl=impl)
        assert torch.equal(y, b.expand(4, n))
        y.sum().backward()
        assert all(t.grad.shape == t.shape and not t.grad.any() for t in (x, A, B))


def test_x_with_leading_strides_that_do_not_flatten(device):
    x, W, A, B, b = operands(device)
    turned = torch.randn(3, 4, K, device=device).transpose(0, 1)
    torch.testing.assert_close(
        lora_linear(turned, W, A, B, b, impl="triton"), lora_linear(turned, W, A, B, b, impl="reference"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("impl", ("auto", "torch", "reference"))
def test_autocast_as_linear_does_it(impl):
    args = leaves(operands(torch.device("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*args, impl=impl)
        assert y.dtype == F.linear(args[0], args[1]).dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(args[i].grad.dtype == torch.float32 for i in (0, 2, 3, 4))
    args64 = operands(torch.device("cpu"), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(*args64, impl=impl).dtype == torch.float64, "autocast leaves float64 alone"


@pytest.mark.parametrize("impl", ("reference", *ARMS))
def test_no_grad_and_inference_mode(impl, device):
    args = leaves(operands(device))
    wanted = lora_linear(*args, impl=impl).detach()
    with torch.no_grad():
        y = lora_linear(*args, impl=impl)
        assert not y.requires_grad and torch.equal(y, wanted)
    with torch.inference_mode():
        y = lora_linear(*args, impl=impl)
        assert y.is_inference() and torch.equal(y, wanted)


def test_inputs_are_never_modified(device):
    for impl in ARMS:
        args = leaves(operands(device))
        before = [t.detach().clone() for t in args]
        lora_linear(*args, dropout_p=0.3, training=True, impl=impl).sum().backward()
        assert all(torch.equal(t.detach(), b) for t, b in zip(args, before, strict=True))


def test_named_arms_do_not_fall_back(device):
    from lora_kernels import launch

    args = operands(device)
    for impl, runs in (("triton", True), ("torch", False), ("reference", False)):
        before = launch.launches
        lora_linear(*args, impl=impl)
        assert (launch.launches > before) == runs
        choice = explain(*args, impl=impl)
        assert choice.arm == impl and impl in choice.why
    if device.type == "cpu":
        choice = explain(*args)
        assert choice.arm == "torch" and "interpret" in choice.why["torch"] and choice.config is None
        assert "impl='torch'" in str(choice)


def test_float64_takes_the_torch_arm(device):
    args = operands(device, torch.float64)
    choice = explain(*args)
    assert choice.arm == "torch" and "float64" in choice.why["triton"]
    torch.testing.assert_close(lora_linear(*args), lora_linear(*args, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scaled_product_reads_nothing_else_and_keeps_nothing(dtype, device, monkeypatch):
    """What a call keeps on a GPU lies in the memory of a CUDA graph, if one is recorded then, and torch.compile's refuse to record it."""
    a, b = torch.randn(40, 64, device=device).to(dtype), torch.randn(64, 16, device=device).to(dtype)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", lambda self, *size: self.new_full(size, float("nan")))
        found = chain.scaled_mm(a, b, 0.3)
    assert parity.budget_used(found, (a @ b) * 0.3, a.double() @ b.double() * 0.3) <= 1

    def fakes() -> set[int]:
        return {id(each) for each in gc.get_objects() if type(each) is FakeTensor}

    before = fakes()
    with FakeTensorMode():
        a, b = (torch.empty(3, 3, dtype=dtype, device="cuda") for _ in range(2))
        chain.scaled_mm(a, b, 2.0)
    del a, b
    assert fakes() <= before


@pytest.mark.parametrize("config", [None, Config(Shrink(16, 16), Expand(16, 16, 16, base="library"), Wgrad(16, 16))])
def test_a_backward_pass_under_autocast_is_the_same(config, device):
    """Of a forward pass outside of it: the arm's library products keep their dtype."""
    args, grads = leaves(operands(device)), []
    for enabled in (True, False):
        y = lora_linear(*args, impl="triton" if config else "torch", config=config)
        with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y.square().sum(), [args[i] for i in (0, 2, 3, 4)]))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_gpu_is_asked_for_what_torch_has():
    """mm's ``out_dtype`` is float32 of 16-bit operands alone, and not of DTensors, of which a merge of DoRA makes products."""
    fake = "out_dtype" in inspect.signature(torch._meta_registrations.meta_mm).parameters  # torch 2.8's has no such answer
    with FakeTensorMode():
        for given in (torch.float16, torch.bfloat16, torch.float64) if fake else (torch.float64,):
            a, b = (torch.empty(3, 3, dtype=given, device="cuda") for _ in range(2))
            assert chain.grad_mm(a, b, torch.float32).dtype == torch.float32

    class Sharded(torch.Tensor):
        is_cuda, placements = True, ()

    a, b = torch.randn(2, 5, 5).bfloat16()
    torch.testing.assert_close(chain.grad_mm(a.as_subclass(Sharded), b, torch.float32).as_subclass(torch.Tensor), a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_is_the_same_product(dtype, monkeypatch):
    """oneDNN's gives linear's result within the budget, wherever it is taken; without it torch's own linear runs."""
    monkeypatch.setattr(chain, "_onednn", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    x, w, b = torch.randn(40, 64).to(dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    truth = F.linear(x.double(), w.double(), b.double())
    assert parity.budget_used(chain.base_linear(x, w, b), F.linear(x, w, b), truth) <= 1
    assert parity.budget_used(chain.base_linear(x, w.t().contiguous().t(), b), F.linear(x, w, b), truth) <= 1
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(chain.base_linear(x, w, b), F.linear(x, w, b)), "torch's own product, where it is asked for"
    monkeypatch.setattr(chain, "_onednn", lambda: False)
    assert torch.equal(chain.base_linear(x, w, b), F.linear(x, w, b))

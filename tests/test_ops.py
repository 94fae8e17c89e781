"""The operators as torch sees them: opcheck, fakes, torch.compile, export, FLOPs."""

import functools
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import FusedLoRALinear, MultiLoRALinear, Segments, chain, dispatch, lora_linear, ops, parity
from lora_kernels.parity import Case

M, N, K, R = 6, 10, 12, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def operands(dtype=torch.float32, requires_grad=False):
    t = parity.inputs(Case(M, N, K, R, dtype), DEVICE)
    return [t[name].requires_grad_(requires_grad and name != "weight") for name in ("x", "weight", "lora_A", "lora_B", "bias")], t["dY"]


def layouts(x):
    """The same values contiguous, sliced out of something larger, and dense but permuted."""
    wide = torch.zeros(x.shape[0], x.shape[1] + 3, device=DEVICE)
    wide[:, 1:-2] = x
    return x, wide[:, 1:-2], x.t().contiguous().t(), x[:0], x.view(2, M // 2, K)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("save_u", [True, False])
def test_opcheck_forward(impl, p, save_u):
    (x, W, A, B, b), _ = operands()
    seed = torch.tensor(3, device=DEVICE) if p else None
    for each in layouts(x):
        torch.library.opcheck(ops.forward_op, (each, W, A, B, b, seed, None, None, [], [], 0.5, p, save_u, impl, ""))
    torch.library.opcheck(ops.forward_op, (x, W, A, B, None, seed, None, None, [], [], 0.5, p, save_u, impl, ""))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "needs", [(True, True, True, True), (True, False, False, False), (False, True, False, False), (False, False, True, False)]
)
def test_opcheck_backward(impl, needs):
    (x, W, A, B, _), dY = operands()
    u = torch.randn(M, R, device=DEVICE)
    need_dx, need_da, need_db, _ = needs
    for dy in (dY, dY.t().contiguous().t(), dY[:1, :1].expand(M, N)):
        args = (
            x if need_da else None, W if need_dx else None, A if need_dx else None, B if need_dx or need_da else None,
            u if need_db else None, torch.tensor(3, device=DEVICE),
        )  # fmt: skip
        torch.library.opcheck(ops.backward_op, (dy, *args, None, None, [], [], 0.5, 0.3, *needs, torch.float32, impl, ""))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranked", [True, False])
def test_opcheck_with_segments(impl, p, ranked):
    """Both operators with a plan: each gradient alone and all, adapters of equal and of mixed rank, a scale on the device or none."""
    case = Case(M, N, K, R, adapters=3, mixed_ranks=ranked)
    t, many = parity.inputs(case, DEVICE), parity.many(case, DEVICE)
    plan = (many["scale"] if ranked else None, many["ranks"], many["segments"].tensors(), many["segments"].geometry())
    seed = torch.tensor(3, device=DEVICE) if p else None
    x, W, A, B, u = t["x"], t["weight"], t["lora_A"], t["lora_B"], torch.randn(M, R, device=DEVICE)
    torch.library.opcheck(ops.forward_op, (x, W, A, B, t["bias"], seed, *plan, 0.5, p, True, impl, ""))
    for needs in ((True, True, True, True), (True, False, False, False), (False, True, False, False), (False, False, True, False)):
        dx, da, db, _ = needs
        saved = (x if da else None, W if dx else None, A if dx else None, B if dx or da else None, u if db else None, seed)
        torch.library.opcheck(ops.backward_op, (t["dY"], *saved, *plan, 0.5, p, *needs, torch.float32, impl, ""))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck_with_a_scale_on_the_device(impl):
    (x, W, A, B, b), dY = operands()
    scale, u = torch.tensor([0.5], device=DEVICE), torch.randn(M, R, device=DEVICE)
    torch.library.opcheck(ops.forward_op, (x, W, A, B, b, None, scale, None, [], [], 1.0, 0.0, True, impl, ""))
    needs = (True, True, True, True)
    torch.library.opcheck(ops.backward_op, (dY, x, W, A, B, u, None, scale, None, [], [], 1.0, 0.0, *needs, torch.float32, impl, ""))


def test_no_operator_is_left_unchecked():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lora_kernels::")}
    checked = {"lora_kernels::forward", "lora_kernels::backward", "lora_kernels::plan"}
    assert names == checked, "a new operator wants its opcheck, in this file or, for the plan, in test_plan.py"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_fullgraph(backend, p):
    args, dY = operands(requires_grad=True)

    def step(x, W, A, B, b, seed):
        return lora_linear(x, W, A, B, b, scale=0.5, dropout_p=p, training=True, seed=seed, impl="torch").relu()

    seed = torch.tensor(8, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    wanted, got = step(*args, seed), compiled(*args, seed)
    torch.testing.assert_close(got, wanted)
    leaves = [args[i] for i in (0, 2, 3, 4)]
    for ours, theirs in zip(torch.autograd.grad(got, leaves, dY), torch.autograd.grad(wanted, leaves, dY), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compile_draws_seeds_from_torchs_generator():
    args, _ = operands()
    compiled = torch.compile(lambda *a: lora_linear(*a, dropout_p=0.5, training=True), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(*args), compiled(*args)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(*args)) and not torch.equal(first, second)


def test_compile_of_a_module_has_no_graph_break_and_no_recompile_per_length():
    model = torch.nn.Sequential(FusedLoRALinear(K, N, r=R), torch.nn.ReLU(), FusedLoRALinear(N, K, r=R, lora_dropout=0.1))
    assert torch._dynamo.explain(model)(torch.randn(M, K)).graph_break_count == 0
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for length in (5, 6, 7, 100, 333):
        assert compiled(torch.randn(length, K)).shape == (length, K)
    assert counter.frame_count == 1


def test_compile_warns_of_nothing(monkeypatch):
    """Where library calls would do (on a CPU), the compiler still sees an operator, and none of the caches of the choice."""
    monkeypatch.setattr(dispatch, "interpreting", functools.cache(lambda: False))
    args, _ = operands()
    graphs = []
    compiled = torch.compile(lora_linear, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    torch._dynamo.utils.warn_once_cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(*args), lora_linear(*args))
    assert any("lora_kernels" in str(node.target) for node in graphs[0].graph.nodes)


def test_fake_tensors_of_another_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, W = torch.empty(2, 7, K, device="cuda", dtype=torch.bfloat16), torch.empty(N, K, device="cuda", dtype=torch.bfloat16)
        A, B = torch.empty(R, K, device="cuda", dtype=torch.bfloat16), torch.empty(N, R, device="cuda", dtype=torch.bfloat16)
        y = lora_linear(x, W, A, B)
        assert y.shape == (2, 7, N) and y.device.type == "cuda" and y.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="weight: wanted x's device cuda:0, got cpu"):
            lora_linear(x, torch.empty(N, K, dtype=torch.bfloat16), A, B)


def test_who_sees_the_operator():
    """A mode and a class of tensors with its own say do; an ordinary call goes to the arm at once, with the same bits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    (x, W, A, B, b), _ = operands()
    for impl in ("torch", "triton"):
        seen: list[str] = []
        with torch.no_grad():
            plain = lora_linear(x, W, A, B, b, impl=impl)
            assert not seen
            with Seen():
                assert torch.equal(lora_linear(x, W, A, B, b, impl=impl), plain)
            assert "lora_kernels.forward.default" in seen
            seen.clear()
            assert torch.equal(torch.Tensor(lora_linear(x, W, A.as_subclass(Wrapped), B, b, impl=impl)), plain)
            assert ("lora_kernels.forward.default" in seen) == (impl == "triton")


def test_meta_tensors_infer_shapes():
    (x, W, A, B, b), _ = operands()
    y = lora_linear(*(t.to("meta") for t in (x, W, A, B, b)))
    assert y.is_meta and y.shape == (M, N)


def test_export():
    model = FusedLoRALinear(K, N, r=R, init_lora_weights=False).eval()
    x = torch.randn(M, K)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    assert any("lora_kernels.forward" in str(node.target) for node in exported.graph.nodes)


class ByToken(MultiLoRALinear):
    def forward(self, x, ids):
        return super().forward(x, Segments.from_ids(ids, self.num_adapters))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_an_exported_program_is_trained(many, recorded, monkeypatch):
    """Its gradients are the module's own, whatever the library's products are made by (oneDNN's have no gradients that torch knows)."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(chain, "_onednn", lambda: True)
    adapter = dict(r=R, lora_dropout=0.3, init_lora_weights=False)
    layer = ByToken(32, 48, num_adapters=3, **adapter) if many else FusedLoRALinear(32, 48, **adapter)
    ids = (torch.arange(64) // 16 - 1,) if many else ()
    x, gradients = torch.randn(64, 32), []
    with torch.set_grad_enabled(recorded):
        exported = torch.export.export(layer, (x, *ids)).module()
    for module in (layer, exported):
        torch.manual_seed(0)
        its_x = x.clone().requires_grad_()
        module(its_x, *ids).square().sum().backward()
        gradients.append([its_x.grad, module.lora_A.grad, module.lora_B.grad])
        layer.zero_grad()
    assert all(torch.equal(own, its) for own, its in zip(*gradients, strict=True))


def test_a_trace_takes_other_sizes():
    layer = FusedLoRALinear(K, N, r=R, init_lora_weights=False).eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, 5, K))
        for lead in ((5, 2), (3, 7), (4,)):
            x = torch.randn(*lead, K)
            torch.testing.assert_close(traced(x), layer(x))


def test_flops_are_counted():
    args, _ = operands(requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(*args)
    assert counter.get_total_flops() == 2 * M * (N * K + R * (N + K))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * (N * K + R * (N + K)) + 2 * M * R * (N + K)


def test_one_registered_boundary_a_pass():
    """A call enters one operator forward and one backward: boundaries cost microseconds each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    args, dY = operands(requires_grad=True)
    with Record():
        y = lora_linear(*args, impl="torch")
        torch.autograd.grad(y, [args[0], args[2], args[3]], dY)
    ours = [name for name in seen if name.startswith("lora_kernels")]
    assert ours == ["lora_kernels.forward.default", "lora_kernels.backward.default"]

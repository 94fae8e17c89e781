"""The base product given by another layer: `lora_linear(x, None, A, B, base=layer(x))` adds the adapter alone, and passes dY on."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from test_memory import Kept, mask_bytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Segments, explain, launch, lora_linear, ops, parity
from lora_kernels.parity import Case, budget_used, run_case

M, N, K, R = 21, 37, 50, 5
CASE = Case(M, N, K, R, base=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = ("triton", "torch")


def operands(case: Case = CASE, **trained) -> dict:
    tensors = parity.inputs(case, DEVICE)
    return {name: tensors[name].requires_grad_(trained.get(name, False)) for name in ("x", "lora_A", "lora_B", "base")}


def added(t: dict, **kwargs) -> torch.Tensor:
    return lora_linear(t["x"], None, t["lora_A"], t["lora_B"], base=t["base"], **kwargs)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("R", [1, 3, 16, 17, 64, 65, 200, 512])
@pytest.mark.parametrize("adapters", [0, 3])
def test_ranks(impl, R, adapters):
    result = run_case(replace(CASE, R=R, p=0.2, adapters=adapters, mixed_ranks=bool(adapters), impl=impl), DEVICE)
    assert result.ok and (result.launches > 0) == (impl == "triton"), result


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 40, 33), (16, 16, 16), (65, 129, 3), (300, 7, 70)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_sizes_and_strides(impl, M, N, K, layout):
    result = run_case(replace(CASE, M=M, N=N, K=K, R=3, p=0.1, layout=layout, impl=impl), DEVICE)
    assert result.ok and (result.launches > 0) == (impl == "triton"), result


@pytest.mark.parametrize("M, popularity", [(40, "distinct"), (300, "mixed"), (300, "runs")])
def test_row_blocks_of_a_plan(M, popularity):
    result = run_case(replace(CASE, M=M, R=20, p=0.1, adapters=6, mixed_ranks=True, popularity=popularity), DEVICE)
    assert result.ok and result.launches > 0, result


@pytest.mark.parametrize("impl", ARMS)
def test_what_it_adds_is_what_one_call_would(impl):
    """Beside a base that is exact in its dtype, both ways differ by the rounding of base alone."""
    t = parity.inputs(replace(CASE, base=False), DEVICE)
    whole = [t[name] for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    base = nn.functional.linear(t["x"], t["weight"], t["bias"])
    truth = lora_linear(*(each.double() for each in whole), scale=0.7, impl="reference")
    y = lora_linear(t["x"], None, t["lora_A"], t["lora_B"], base=base, scale=0.7, impl=impl)
    assert budget_used(y, lora_linear(*whole, scale=0.7, impl="reference"), truth, terms=K) <= 1


@pytest.mark.parametrize("impl", ARMS)
def test_base_is_read_and_its_layer_trained_through(impl):
    """base keeps its values; its own layer, trained or not, gets dY, and x both gradients."""
    layer = nn.Linear(K, N, device=DEVICE)
    t = operands(lora_A=True, lora_B=True, x=True)
    t["base"] = layer(t["x"])
    before = t["base"].detach().clone()
    y = added(t, impl=impl)
    assert torch.equal(t["base"], before) and y.data_ptr() != t["base"].data_ptr()
    dY = torch.randn_like(y)
    grads = torch.autograd.grad(y, [t["x"], layer.weight, layer.bias], dY)
    double = [v.detach().double().requires_grad_() for v in (t["x"], layer.weight, layer.bias, t["lora_A"], t["lora_B"])]
    truth = torch.autograd.grad(
        nn.functional.linear(double[0], double[1], double[2]) + double[0] @ double[3].T @ double[4].T, double[:3], dY.double()
    )
    for ours, wanted in zip(grads, truth, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("trained", [("base",), ("x",), ("lora_A",), ("lora_B",), ("x", "lora_A", "lora_B", "base")])
def test_each_gradient_alone(impl, trained):
    """Those that are wanted, the same as beside all others, and no other."""
    everything = operands(x=True, lora_A=True, lora_B=True, base=True)
    dY = torch.randn(M, N, device=DEVICE)
    wanted = dict(zip(everything, torch.autograd.grad(added(everything, impl=impl), list(everything.values()), dY), strict=True))
    t = operands(**dict.fromkeys(trained, True))
    added(t, impl=impl).backward(dY)
    assert {name for name, v in t.items() if v.grad is not None} == set(trained)
    for name in trained:
        assert torch.equal(t[name].grad, wanted[name])
    assert torch.equal(wanted["base"], dY)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_kept(impl, p):
    """x and u, as with a weight; not base, which no gradient uses."""
    t = operands(x=True, lora_A=True, lora_B=True, base=True)
    with Kept() as kept:
        added(t, dropout_p=p, training=True, impl=impl)
    assert kept.bytes(besides=(t["lora_A"], t["lora_B"])) == 4 * M * K + 4 * M * R + mask_bytes(p, M, K, impl)


@pytest.mark.parametrize("impl", ARMS)
def test_leading_dimensions(impl):
    t = operands()
    wanted = added(t, impl=impl)
    folded = added({**t, "x": t["x"].view(3, 7, K), "base": t["base"].view(3, 7, N)}, impl=impl)
    assert folded.shape == (3, 7, N) and torch.equal(folded.view(M, N), wanted)
    one = added({**t, "x": t["x"][0], "base": t["base"][0]}, impl=impl)
    assert one.shape == (N,)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("sizes", [(0, N, K), (M, N, 0), (M, 0, K)])
def test_empty(impl, sizes):
    tokens, outputs, inputs = sizes
    x, base = torch.randn(tokens, inputs, device=DEVICE, requires_grad=True), torch.randn(tokens, outputs, device=DEVICE)
    A, B = torch.randn(R, inputs, device=DEVICE, requires_grad=True), torch.randn(outputs, R, device=DEVICE, requires_grad=True)
    y = lora_linear(x, None, A, B, base=base, impl=impl)
    assert torch.equal(y, base) and y.data_ptr() != base.data_ptr() or not y.numel()
    y.sum().backward()
    assert x.grad.shape == x.shape and not A.grad.any() and not B.grad.any()


@pytest.mark.parametrize("impl", ARMS)
def test_tokens_without_an_adapter_are_the_base_bit_for_bit(impl):
    case = replace(CASE, adapters=3, dtype=torch.float16)
    t = parity.inputs(case, DEVICE)
    ids = torch.arange(M, device=DEVICE) % 4 - 1
    t["lora_B"][2] = float("nan")  # one adapter's, which reaches nobody else
    y = added(t, segments=Segments.from_ids(ids, 3), impl=impl)
    assert torch.equal(y[ids == -1], t["base"][ids == -1])
    assert y[ids == 2].isnan().all() and y[ids != 2].isfinite().all()


def test_launches_are_two():
    """shrink and expand forward; no product with a weight anywhere."""
    t, seen = operands(x=True, lora_A=True, lora_B=True), []

    def record(kernel, grid, args, options):
        seen.append((kernel.__name__, options.get("LOAD_W"), options.get("LOAD_X") is None))
        kernel[grid](*args, **options)

    with launch.intercept(record):
        added(t, impl="triton").sum().backward()
    assert seen == [
        ("shrink", None, False), ("expand", None, False),
        ("shrink", None, False), ("expand", None, True), ("wgrad", None, True), ("wgrad", None, True),
    ]  # fmt: skip


def test_explain_describes_the_call():
    t = operands()
    choice = explain(t["x"], None, t["lora_A"], t["lora_B"], base=t["base"], impl="triton")
    assert choice.arm == "triton" and choice.config.expand.base == "library"


@pytest.mark.parametrize("impl", ARMS)
def test_autocast_takes_bases_dtype(impl):
    """Where the base layer made 16 bits of a float32 x, x follows; where it gave float32 back, nothing is cast."""
    dtype = torch.float16 if impl == "triton" and DEVICE.type == "cpu" else torch.bfloat16
    t = operands(x=True, lora_A=True)
    with torch.autocast(DEVICE.type, dtype):
        y = added({**t, "base": t["base"].to(dtype)}, impl=impl)
        wide = added(t, impl=impl)
    assert y.dtype == dtype and wide.dtype == torch.float32
    assert torch.equal(wide, added(t, impl=impl))
    (y.float().sum() + wide.sum()).backward()
    assert t["x"].grad.dtype == t["lora_A"].grad.dtype == torch.float32


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("adapters", [0, 3])
def test_opcheck(impl, adapters):
    case = replace(CASE, M=6, N=10, K=12, R=4, adapters=adapters)
    t, many = parity.inputs(case, DEVICE), parity.many(case, DEVICE)
    segments = many.get("segments")
    plan = (many["scale"], None, segments.tensors(), segments.geometry()) if segments else (None, None, [], [])
    x, A, B, seed, u = t["x"], t["lora_A"], t["lora_B"], torch.tensor(3, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    for each, base in ((x, t["base"]), (x.view(2, 3, 12), t["base"].view(2, 3, 10)), (x[:0], t["base"][:0])):
        if not adapters or each.numel():
            torch.library.opcheck(ops.forward_op, (each, None, A, B, None, seed, *plan, 0.5, 0.3, True, impl, "", base))
    needs = (True, True, True, False)
    torch.library.opcheck(ops.backward_op, (t["dY"], x, None, A, B, u, seed, *plan, 0.5, 0.3, *needs, torch.float32, impl, ""))


def test_compiles_without_a_break():
    layer, t = nn.Linear(K, N, device=DEVICE).requires_grad_(False), operands(x=True, lora_A=True, lora_B=True)

    def call(x, A, B):
        return lora_linear(x, None, A, B, base=layer(x), scale=0.5)

    names = ("x", "lora_A", "lora_B")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [f(*(t[name] for name in names)) for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call)]
    grads = [torch.autograd.grad(y, [t[name] for name in names], torch.ones_like(y)) for y in results]
    for ours, eager in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        torch.testing.assert_close(ours, eager)


def test_flops_leave_the_base_out():
    t = {name: v.to("meta").requires_grad_() for name, v in operands().items()}
    with FlopCounterMode(display=False) as counter:
        y = added(t)
    assert counter.get_total_flops() == 2 * M * R * (N + K)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * R * (2 * N + 2 * K)  # dS and dB, dX and dA


AHEAD = """
import torch
from lora_kernels import compile_only, launch
from lora_kernels.compile_only import compile_pass
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, heuristic
arch = Arch.parse("sm_90")
def show(run, arch, label, only):
    def order(kernel, grid, args, options):
        if kernel.__name__ == only:
            ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
            print("cp.async" in ptx, ptx.rindex("ld.global") < ptx.index("bar.sync"))
    with compile_only.target(arch), launch.intercept(order):
        run()
    return []
compile_only.compile_calls = show
for M in (16, 8192):
    problem = Problem(M, 4096, 4096, 16, torch.bfloat16, base=True)
    compile_pass(problem, arch, heuristic(problem, arch))
"""


def test_the_base_product_is_on_its_way_beside_u_and_v():
    """All three are loaded before any is waited for."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    out = subprocess.run([sys.executable, "-c", AHEAD], capture_output=True, text=True, env=env, timeout=900)
    assert out.stdout.splitlines() == ["False True"] * 2, out.stdout + out.stderr[-2000:]

"""What a layer keeps for backward: x and u (and a seed with dropout, or its mask's bits), beside parameters that are there anyway."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, MultiLoRALinear, Projection, Segments, dispatch, lora_linear, lora_linears, philox

M, N, K, R, E = 48, 96, 64, 8, 3
ARMS = ("auto", "torch", "triton")  # on a CPU, and under the interpreter: an operator, its library calls themselves, an operator
SEED = 8  # bytes


class Kept:
    """Inside, the storages that autograd saves; ``bytes(besides)``: theirs, each once, without those of the tensors named."""

    def __init__(self):
        self.tensors = []

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        self.tensors.append(t)  # held, so that no address is given out twice
        return t

    def bytes(self, besides=()) -> int:
        known = {t.untyped_storage().data_ptr() for t in besides}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(size for address, size in storages.items() if address not in known)


def mask_bytes(p: float, tokens: int, features: int, impl: str = "auto") -> int:
    """Of what a mask is known by: where the arm is the chain on a CPU, whatever the sizes, a bit an element, else a seed."""
    chain = not torch.cuda.is_available() and (impl == "torch" or (impl == "auto" and not dispatch.interpreting()))
    return (tokens * -(-features // 8) if chain else SEED) if p else 0


def operands(device, adapter_dtype=None, dtype=torch.float32, stack=()):
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (*stack, R, K), "lora_B": (*stack, N, R), "bias": (N,)}
    wide = {"lora_A", "lora_B"} if adapter_dtype else set()
    return {name: torch.randn(*shape, device=device).to(adapter_dtype if name in wide else dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("x_trained, A_trained, B_trained", list(itertools.product([True, False], repeat=3)))
def test_bytes_of_a_call(impl, p, x_trained, A_trained, B_trained, device):
    """dA uses x, dB uses u, dX and dA use the mask: what no wanted gradient uses is not kept."""
    t = operands(device)
    for name, trained in (("x", x_trained), ("lora_A", A_trained), ("lora_B", B_trained)):
        t[name].requires_grad_(trained)
    with Kept() as kept:
        y = lora_linear(**t, dropout_p=p, training=True, impl=impl)
    wanted = 4 * M * K * A_trained + 4 * M * R * B_trained + mask_bytes(p, M, K, impl) * (x_trained or A_trained)
    assert kept.bytes(besides=(t["weight"], t["lora_A"], t["lora_B"])) == wanted
    assert y.requires_grad == (x_trained or A_trained or B_trained)


@pytest.mark.parametrize("impl", ("auto", "torch"))
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_float32_adapters_on_16_bits_cost_no_copy(impl, p, device):
    """PEFT's default: neither x in float32 nor the adapters in 16 bits outlive the forward pass."""
    t = operands(device, torch.float32, torch.bfloat16)
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    with Kept() as kept:
        lora_linear(**t, dropout_p=p, training=True, impl=impl)
    assert kept.bytes(besides=(t["weight"], t["lora_A"], t["lora_B"])) == 2 * M * K + 2 * M * R + mask_bytes(p, M, K, impl)


@pytest.mark.parametrize("impl", ARMS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_many_adapters_share_one_plan(impl, p, device):
    """Two layers keep an x and a u each; the plan, the scales and the ranks are one for both."""
    t = operands(device, stack=(E,))
    segments = Segments.from_ids(torch.arange(M, device=device) % (E + 1) - 1, E)
    many = dict(segments=segments, scale=torch.ones(E, device=device), ranks=torch.full((E,), R, dtype=torch.int32, device=device))
    other = torch.randn(M, K, device=device)
    for tensor in (t["x"], other, t["lora_A"], t["lora_B"]):
        tensor.requires_grad_()
    with Kept() as kept:
        ys = [lora_linear(**(t | {"x": x}), **many, dropout_p=p, training=True, impl=impl) for x in (t["x"], other)]
    parameters = (t["weight"], t["lora_A"], t["lora_B"], many["scale"], many["ranks"], *segments.tensors())
    assert kept.bytes(besides=parameters) == len(ys) * (4 * M * K + 4 * M * R + mask_bytes(p, M, K, impl))
    plan = sum(tensor.untyped_storage().nbytes() for tensor in (many["scale"], many["ranks"], *segments.tensors()))
    assert kept.bytes(besides=parameters[:3]) - kept.bytes(besides=parameters) == plan


@pytest.mark.parametrize("how", ["alone", "segments", "experts", "together", "recomputed"])
def test_a_mask_is_made_once_on_a_cpu(how, device, monkeypatch):
    """For both passes, as its bits, of which a row's last byte may be part empty; a checkpoint makes it once more."""
    if device.type != "cpu":
        pytest.skip("the kernels make it in registers")
    made, features, top_k = [], 61, 2 if how == "experts" else 1
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(philox, "packed_mask", lambda *args, real=philox.packed_mask: made.append(args[1:3]) or real(*args))
    x, stack = torch.randn(M, features, requires_grad=True), (E,) if how in ("segments", "experts") else ()
    A, B = torch.randn(*stack, R, features, requires_grad=True), torch.randn(*stack, N, R, requires_grad=True)
    weight = torch.randn(*(stack if how == "experts" else ()), N, features)
    more = dict(dropout_p=0.5, training=True, seed=3)
    if how == "segments":
        more["segments"] = Segments.from_ids(torch.arange(M) % E, E)
    if how == "experts":
        more["segments"] = Segments.from_top_k(torch.stack([torch.arange(M) % E, torch.arange(1, M + 1) % E], 1), E)
    call = lambda: lora_linear(x, weight, A, B, **more)  # noqa: E731
    if how == "together":
        call = lambda: lora_linears(x, [Projection(weight, A, B, None, 1.0, 0.5, 3)], training=True)[0]  # noqa: E731
    y = checkpoint(call, use_reentrant=False) if how == "recomputed" else call()
    found = torch.autograd.grad(y.sin().sum(), (x, A, B))
    assert made == [(M * top_k, features)] * (2 if how == "recomputed" else 1)
    wanted = lora_linear(x, weight, A, B, **more | {"impl": "reference"})
    torch.testing.assert_close(y, wanted)
    for mine, theirs in zip(found, torch.autograd.grad(wanted.sin().sum(), (x, A, B)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_layers_that_read_the_same_x_keep_it_once(p, device):
    """As query, key and value do: three layers, one x."""
    layers = [FusedLoRALinear(K, N, r=R, lora_dropout=p, device=device) for _ in range(3)]
    x = torch.randn(2, M // 2, K, device=device, requires_grad=True)
    with Kept() as kept:
        ys = [layer(x) for layer in layers]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    assert kept.bytes(besides=parameters) == 4 * M * K + len(ys) * (4 * M * R + mask_bytes(p, M, K))


def test_nothing_is_kept_where_nothing_trains(device):
    layer, x = FusedLoRALinear(K, N, r=R, lora_dropout=0.1, device=device), torch.randn(M, K, device=device)
    with Kept() as kept, torch.no_grad():
        layer(x)
    layer.requires_grad_(False)
    with kept:
        layer(x)
    assert kept.tensors == []
    layer.merge()
    with kept:
        layer(x.requires_grad_())
    assert kept.tensors and kept.bytes(besides=(layer.weight,)) == 0, "merged, it is nn.Linear"


def test_a_stack_of_layers_and_its_module_for_many_adapters(device):
    """Each layer adds its input and its u: the input is the layer's before, so a deep model keeps one activation a layer."""
    depth = 4
    model = nn.Sequential(*[FusedLoRALinear(K, K, r=R, device=device) for _ in range(depth)])
    with Kept() as kept:
        model(torch.randn(M, K, device=device))
    assert kept.bytes(besides=list(model.parameters())) == depth * (4 * M * K + 4 * M * R)
    layer = MultiLoRALinear(K, N, num_adapters=E, r=R, device=device)
    segments = Segments.from_ids(torch.zeros(M, dtype=torch.int32, device=device), E)
    with Kept() as kept:
        layer(torch.randn(M, K, device=device), segments)
    assert kept.bytes(besides=[*layer.parameters(), *layer.buffers(), *segments.tensors()]) == 4 * M * K + 4 * M * R


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ("triton", "torch"))
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_peak_memory_between_the_passes(impl, p):
    """On a GPU, by the allocator: what is still in use after forward is y, u and the seed, and backward adds no second x."""
    M, N, K, R = 4096, 2048, 2048, 16
    cuda = torch.device("cuda")
    layer = FusedLoRALinear(K, N, r=R, device=cuda, dtype=torch.bfloat16)
    x = torch.randn(M, K, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    block = 512  # bytes: what the allocator rounds to

    def call():
        return lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, dropout_p=p, training=True, impl=impl)

    call().sum().backward()  # compiles, and makes the library's workspaces
    x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = call()
    held, forward_peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert 2 * M * (N + R) <= held <= 2 * M * (N + R) + 4 * block
    dy = torch.ones_like(y)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.backward(dy)
    backward_peak = torch.cuda.max_memory_allocated() - before
    if impl == "triton":  # u and partial sums of it; dX, dA, dB and partial sums of theirs: no mask, no second x
        assert forward_peak <= 2 * M * N + 32 * 4 * M * R
        assert backward_peak <= 2 * M * K + 32 * 4 * M * R + 32 * 4 * R * (K + N)

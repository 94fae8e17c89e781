"""Merging: one pass over W rounded once, the base back bit for bit, and one merged adapter in another's place."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lora_kernels import FusedLoRALinear, MultiLoRALinear, Segments, UnsupportedError, dispatch, launch, merging
from lora_kernels.merging import write_merged

N, K = 33, 70
SIZES = [(1, 1, 1), (33, 70, 5), (64, 256, 16), (130, 33, 40), (7, 300, 96)]


def operands(n, k, r, dtype, adapter_dtype, device):
    weight = torch.randn(n, k, device=device).to(dtype)
    return weight, torch.randn(r, k, device=device).to(adapter_dtype), torch.randn(n, r, device=device).to(adapter_dtype)


def merged_truth(weight, A, B, scale):
    return weight.double() + scale * (B.double() @ A.double())


def assert_rounded_once(got, weight, A, B, scale, row_scale=None):
    """Half a unit in the last place of the result, and the float32 sum's own r + 2 roundings of what it adds."""
    factor = 1.0 if row_scale is None else row_scale.double()[:, None]
    truth = factor * merged_truth(weight, A, B, scale)
    summed = factor * (weight.double().abs() + abs(scale) * (B.double().abs() @ A.double().abs()))
    allowed = 0.5 * torch.finfo(got.dtype).eps * truth.abs() + (A.shape[0] + 3) * torch.finfo(torch.float32).eps * summed.abs()
    assert ((got.double() - truth).abs() <= allowed + torch.finfo(got.dtype).tiny).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("n, k, r", SIZES)
@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_one_rounding(n, k, r, dtype, adapter_dtype, impl, device):
    weight, A, B = operands(n, k, r, dtype, adapter_dtype, device)
    if impl == "triton" and dtype == torch.bfloat16 and dispatch.arch_of(device)[0].kind == "interpreter":
        with pytest.raises(UnsupportedError, match="bfloat16 needs a GPU"):
            write_merged(weight, weight, A, B, 0.7, impl=impl)
        return
    for layout in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :k]):
        out = torch.empty_strided(layout.shape, layout.stride(), dtype=dtype, device=device).fill_(float("nan"))
        if out.untyped_storage().nbytes() != out.nbytes:  # a slice: what lies beside it is not ours
            canary = torch.full((n, 2 * k), 7.0, dtype=dtype, device=device)
            out = canary[:, :k]
        before = launch.launches
        write_merged(out, layout, A, B, 0.7, impl=impl)
        assert launch.launches - before == (impl == "triton"), "the kernel ran, or did not, as named"
        assert_rounded_once(out, weight, A, B, 0.7)
        if out.untyped_storage().nbytes() != out.nbytes:
            assert (canary[:, k:] == 7.0).all()


def test_tf32_is_not_for_merging(device):
    """Whatever torch's own products are allowed."""
    weight, A, B = operands(N, K, 6, torch.float32, torch.float32, device)
    before, out = torch.get_float32_matmul_precision(), torch.empty_like(weight)
    try:
        torch.set_float32_matmul_precision("high")
        write_merged(out, weight, A, B, 0.7, impl="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert_rounded_once(out, weight, A, B, 0.7)


@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_is_not_for_merging(dtype, row_scale, device):
    """Under it the library's products would be rounded to 16 bits, and with them the weight that is kept."""
    weight, A, B = operands(N, K, 6, dtype, dtype, device)
    scales, merged = torch.rand(N, device=device) if row_scale else None, []
    layer = FusedLoRALinear(K, N, r=6, init_lora_weights=False, device=device, dtype=dtype)
    for enabled in (True, False):
        out = torch.empty_like(weight)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            write_merged(out, weight, A, B, 0.7, row_scale=scales, impl="torch")
            merged.append((out, layer.delta_weight()))
    assert all(torch.equal(one, other) for one, other in zip(*merged, strict=True))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_in_place_is_the_same(impl, device):
    weight, A, B = operands(N, K, 6, torch.float16, torch.float32, device)
    apart, own = torch.empty_like(weight), weight.clone()
    write_merged(apart, weight, A, B, -1.3, impl=impl)
    write_merged(own, own, A, B, -1.3, impl=impl)
    assert torch.equal(apart, own) and not torch.equal(own, weight)


def test_whatever_was_merged_before(device):
    """Weight, base, A and B may each lie by rows or by columns: what was worked out for one merge serves no other."""
    weight, A, B = operands(7, 20, 3, torch.float16, torch.float32, device)
    for of_out, of_base, of_A, of_B in itertools.product((lambda t: t, lambda t: t.t().contiguous().t()), repeat=4):
        out = of_out(torch.full_like(weight, float("nan")))
        write_merged(out, of_base(weight), of_A(A), of_B(B), 0.7, impl="triton")
        assert_rounded_once(out, weight, A, B, 0.7)


def test_large_weights_go_by_blocks_of_rows():
    weight, A, B = operands(700, 3000, 3, torch.bfloat16, torch.bfloat16, "cpu")
    out = torch.empty_like(weight)
    write_merged(out, weight, A, B, 0.5, impl="torch")
    assert_rounded_once(out, weight, A, B, 0.5)


def test_float64_and_row_scales_take_the_library(device):
    weight, A, B = operands(N, K, 4, torch.float64, torch.float64, device)
    out, rows = torch.empty_like(weight), torch.rand(N, dtype=torch.float64, device=device)
    write_merged(out, weight, A, B, 2.0, row_scale=rows)
    torch.testing.assert_close(out, rows[:, None] * merged_truth(weight, A, B, 2.0), rtol=1e-13, atol=1e-13)
    with pytest.raises(UnsupportedError, match="cannot merge here: .*float64"):
        write_merged(out, weight, A, B, 2.0, impl="triton")
    with pytest.raises(UnsupportedError, match="scale for each row"):
        write_merged(out.float(), weight.float(), A, B, 2.0, row_scale=rows, impl="triton")
    with pytest.raises(ValueError, match="impl: wanted one of auto, triton, torch, got 'fast'"):
        write_merged(out, weight, A, B, 2.0, impl="fast")


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_not_finite_leaves_the_base(impl, bad, in_place, device):
    weight, A, B = operands(N, K, 4, torch.float16, torch.float32, device)
    base, B[2, 1] = weight.clone(), bad
    out = weight if in_place else torch.zeros_like(weight)
    with pytest.raises(ValueError, match="wanted a finite merged weight, got NaN or Inf .* the weight is unchanged"):
        write_merged(out, out if in_place else weight, A, B, 1.0, impl=impl)
    assert torch.equal(out, base)
    with pytest.raises(ValueError, match="finite"):  # a finite product that float16 cannot hold
        write_merged(out, base, A, torch.full_like(B, 1e5), 1.0, impl=impl)
    assert torch.equal(out, base)


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_swap_of_a_merged_layer_starts_from_the_base(keep):
    layer, other = (FusedLoRALinear(K, N, r=4, init_lora_weights=False, dtype=torch.bfloat16).eval() for _ in range(2))
    base, x = layer.weight.clone(), torch.randn(5, K).bfloat16()
    fresh = copy.deepcopy(layer)
    fresh.lora_A.data.copy_(other.lora_A), fresh.lora_B.data.copy_(other.lora_B)
    fresh.scaling = 0.25
    fresh.merge()
    layer.merge(keep=keep)
    layer.swap(other.lora_A, other.lora_B, 0.25)
    assert layer.merged and torch.equal(layer.weight, fresh.weight), "bit for bit what merging it first would have been"
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.lora_A, other.lora_A) and layer.scaling == 0.25
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    apart = layer(x)
    layer.swap(fresh.lora_A * 2, fresh.lora_B)
    assert not layer.merged and torch.equal(layer.weight, base) and not torch.equal(layer(x), apart)


@pytest.mark.parametrize(
    "layer", [FusedLoRALinear(K, N, use_dora=True), MultiLoRALinear(K, N, num_adapters=2)], ids=lambda layer: type(layer).__name__
)
def test_a_merge_that_fails_half_way_leaves_the_base(layer, monkeypatch):
    """Of a device whose memory is full: the base would be gone, and the adapter in it taken for none."""
    args = (1,) if isinstance(layer, MultiLoRALinear) else ()
    base = layer.weight.clone()
    if args:  # another one is merged
        layer.merge(0)

    def full(weight, *others):
        weight[0] = 7
        raise torch.OutOfMemoryError

    monkeypatch.setattr(merging, "by_library", full)
    monkeypatch.setattr(launch, "merge", full)
    with pytest.raises(torch.OutOfMemoryError):
        layer.merge(*args)
    assert not layer.merged and torch.equal(layer.weight, base)


def test_a_refused_swap_changes_nothing():
    layer = FusedLoRALinear(K, N, r=4, init_lora_weights=False)
    layer.merge()
    before = {name: t.clone() for name, t in layer.named_parameters()}
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    for error, match, arguments in (
        (ValueError, r"lora_A: wanted shape \[4, 70\], got \[3, 70\]", (A[:3], B)),
        (TypeError, "lora_B: wanted the adapter's dtype torch.float32, got torch.float64", (A, B.double())),
        (ValueError, "finite", (A * float("inf"), B)),
        (ValueError, "scaling: wanted a finite number, got nan", (A, B, math.nan)),
    ):
        with pytest.raises(error, match=match):
            layer.swap(*arguments)
        assert layer.scaling == 4 and layer.merged and all(torch.equal(t, before[name]) for name, t in layer.named_parameters())
    with pytest.raises(ValueError, match="keep: wanted one of cpu, device, got 'disk'"):
        FusedLoRALinear(K, N).merge(keep="disk")


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_one_slot_of_many_merged_and_another_in_its_place(keep):
    layer = MultiLoRALinear(K, N, num_adapters=3, r=[2, 5, 3], init_lora_weights=False, dtype=torch.float16).eval()
    base, x = layer.weight.clone(), torch.randn(4, K).half()
    for i in (1, 2):
        segments = Segments.from_ids(torch.full((4,), i), 3)
        apart = FusedLoRALinear.from_linear(torch.nn.Linear(K, N, dtype=torch.float16), r=layer.r)
        apart.weight.data.copy_(base)
        layer.merge(i, keep=keep)
        wanted = torch.empty_like(base)
        write_merged(wanted, base, *layer.adapter(i), float(layer.scaling[i]))
        assert layer.merged and torch.equal(layer.weight, wanted), "from the base, not from the merged one before"
        assert torch.equal(layer(x), F.linear(x, wanted, layer.bias))
        with pytest.raises(ValueError, match="segments: wanted None, for an adapter is merged"):
            layer(x, segments)
    assert torch.equal(layer.state_dict()["weight"], base), "a checkpoint holds base and adapters apart"
    other = pickle.loads(pickle.dumps(layer))
    assert other.merged and torch.equal(other(x), layer(x))
    layer.lora_B.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer.merge(0)
    assert not layer.merged and torch.equal(layer.weight, base)
    other.unmerge()
    assert torch.equal(other.weight, base)
    with pytest.raises(TypeError, match="segments: wanted a lora_kernels.Segments"):
        other(x)


@pytest.mark.cuda
def test_the_kernel_merges_on_a_gpu_and_a_swap_reads_the_base_once(device):
    layer = FusedLoRALinear(4096, 4096, r=16, init_lora_weights=False, device=device, dtype=torch.bfloat16)
    base, before = layer.weight.clone(), launch.launches
    layer.merge(keep="device")
    layer.swap(layer.lora_A * 2, layer.lora_B)
    assert launch.launches - before == 2
    assert_rounded_once(layer.weight.detach(), base, layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


def test_a_weight_that_is_computed_at_each_call_is_not_merged_into():
    for layer in (FusedLoRALinear(12, 8, r=2, init_lora_weights=False), MultiLoRALinear(12, 8, num_adapters=2, r=2)):
        prune.l1_unstructured(layer, "weight", 0.5)
        before = layer.weight.clone()
        with pytest.raises(ValueError, match="merge: wanted a weight that is a parameter, got one that is computed at each call"):
            layer.merge(*((0,) if isinstance(layer, MultiLoRALinear) else ()))
        assert not layer.merged and torch.equal(layer.weight, before)
    linear = nn.Linear(12, 8).requires_grad_(False)
    prune.l1_unstructured(linear, "weight", 0.5)
    with pytest.raises(TypeError, match="linear: wanted an nn.Linear with a weight of its own, got one that computes it"):
        FusedLoRALinear.from_linear(linear)

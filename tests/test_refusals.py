"""Bad input: one clear error each, that names the argument, the wanted and the given; before anything runs, nothing changed."""

import pytest
import torch

from lora_kernels import Segments, UnsupportedError, dispatch, explain, lora_linear
from lora_kernels.tuning import Config, Expand, Shrink

M, N, K, R = 4, 6, 8, 3
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def arguments(**changed):
    args = {
        "x": torch.randn(M, K), "weight": torch.randn(N, K), "lora_A": torch.randn(R, K), "lora_B": torch.randn(N, R),
        "bias": torch.randn(N),
    }  # fmt: skip
    args |= changed
    return {name: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for name, v in args.items()}


def plan(tokens=M, E=2):
    return Segments.from_ids(torch.zeros(tokens, dtype=torch.int32, device=DEVICE), E)


def stacked(E=2, **changed):
    return {"lora_A": torch.randn(E, R, K), "lora_B": torch.randn(E, N, R), "segments": plan(), **changed}


def given(**changed):
    return {"weight": None, "bias": None, "base": torch.randn(M, N), **changed}


CASES = [
    ({"x": torch.randn(M, K + 1)}, ValueError, r"x: wanted shape \[..., 8\] to match weight \[6, 8\], got \[4, 9\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: wanted shape \[..., 8\] .* got \[\]"),
    ({"x": torch.ones(M, K, dtype=torch.int64)}, TypeError, "x: wanted float16, bfloat16, float32 or float64, got torch.int64"),
    ({"x": torch.ones(M, K, dtype=torch.complex64)}, TypeError, "x: wanted float16.*got torch.complex64"),
    ({"x": torch.ones(M, K).to(torch.float8_e4m3fn)}, TypeError, "x: wanted float16.*got torch.float8_e4m3fn"),
    ({"x": [[1.0] * K] * M}, TypeError, "x: wanted a tensor .*, got list"),
    ({"x": None}, TypeError, "x: wanted a tensor .*, got NoneType"),
    ({"weight": torch.randn(N, K, 1)}, ValueError, r"weight: wanted shape \[out_features, in_features\], got \[6, 8, 1\]"),
    ({"weight": torch.randn(N, K).half()}, TypeError, "weight: wanted x's dtype torch.float32, got torch.float16"),
    ({"weight": torch.randn(N, K, requires_grad=True)}, ValueError, "weight: wanted a frozen base weight.*requires_grad=True"),
    ({"weight": torch.randn(N, K).to_sparse()}, UnsupportedError, "weight: wanted a dense tensor, got layout torch.sparse_coo"),
    ({"weight": torch.quantize_per_tensor(torch.randn(N, K), 0.1, 0, torch.qint8)}, UnsupportedError, "weight: .*quantised.*qint8"),
    ({"weight": torch.ones(N, K, dtype=torch.uint8)}, TypeError, "weight: wanted float16.*got torch.uint8"),
    ({"weight": torch.randn(N, K, device="meta")}, ValueError, f"weight: wanted x's device {DEVICE}, got meta"),
    ({"weight": None}, TypeError, "weight: wanted a tensor .* or None with base, got NoneType"),
    (given(weight=torch.randn(N, K)), ValueError, "weight: wanted None with base, which is the base layer's output .*, got Tensor"),
    (given(bias=torch.randn(N)), ValueError, "bias: wanted None with base, .*, got Tensor"),
    (given(base=[1.0]), TypeError, r"base: wanted a tensor \[..., out_features\] or None, got list"),
    (given(base=torch.randn(M + 1, N)), ValueError, r"base: wanted shape \[4, out_features\] to match x \[4, 8\], got \[5, 6\]"),
    (given(base=torch.randn(1, M, N)), ValueError, r"base: wanted shape \[4, out_features\] to match x \[4, 8\], got \[1, 4, 6\]"),
    (given(x=torch.tensor(1.0)), ValueError, r"base: wanted shape \[out_features\] to match x \[\], got \[4, 6\]"),
    (given(base=torch.randn(M, N).half()), TypeError, "base: wanted x's dtype torch.float32, got torch.float16; cast one of them"),
    (given(base=torch.randn(M, N, device="meta")), ValueError, f"base: wanted x's device {DEVICE}, got meta"),
    (given(base=torch.randn(M, N + 1)), ValueError, r"lora_B: wanted shape \[7, 3\] to match x \[4, 8\] and base \[4, 7\] and lora_A"),
    (given(lora_A=torch.randn(R, K + 1)), ValueError, r"lora_A: wanted shape \[r, 8\] to match x \[4, 8\] and base \[4, 6\], got \[3, 9\]"),
    (given(lora_bias=torch.randn(N)), UnsupportedError, "lora_bias: wanted None with base, to which it can be added"),
    (given(config=Config()), UnsupportedError, "expand.base must be 'library' where the base product is given, got 'kernel'"),
    ({"lora_A": torch.randn(R, K + 1)}, ValueError, r"lora_A: wanted shape \[r, 8\] to match weight \[6, 8\], got \[3, 9\]"),
    ({"lora_A": torch.randn(K, R)}, ValueError, r"lora_A: .*got \[8, 3\]; it looks transposed"),
    ({"lora_A": torch.randn(R, K).half()}, TypeError, "lora_A: wanted x's dtype torch.float32 or float32, got torch.float16"),
    ({"lora_A": torch.randn(0, K), "lora_B": torch.randn(N, 0)}, UnsupportedError, "lora_A: wanted a rank r from 1 to 512, got r = 0"),
    ({"lora_A": torch.randn(513, K), "lora_B": torch.randn(N, 513)}, UnsupportedError, "rank r from 1 to 512, got r = 513"),
    ({"lora_B": torch.randn(N, R + 1)}, ValueError, r"lora_B: wanted shape \[6, 3\] to match .* got \[6, 4\]"),
    ({"lora_B": torch.randn(R, N)}, ValueError, r"lora_B: .*it looks transposed"),
    ({"lora_B": torch.randn(N, R).double()}, TypeError, "lora_B: wanted lora_A's dtype torch.float32, got torch.float64"),
    ({"bias": torch.randn(N + 1)}, ValueError, r"bias: wanted shape \[6\] to match weight \[6, 8\], got \[7\]"),
    ({"bias": torch.randn(N).half()}, TypeError, "bias: wanted x's dtype torch.float32, got torch.float16"),
    ({"bias": True}, TypeError, "bias: wanted a tensor .* or None, got bool"),
    ({"scale": torch.ones(2)}, ValueError, r"scale: wanted one element, got \[2\]"),
    ({"scale": torch.tensor(1)}, TypeError, "scale: wanted a float or a float32 tensor, got torch.int64"),
    ({"scale": torch.tensor(1.0, device="meta")}, ValueError, f"scale: wanted x's device {DEVICE}, got meta"),
    ({"scale": torch.tensor(1.0, requires_grad=True)}, UnsupportedError, "scale: wanted a tensor without gradient"),
    ({"scale": "2"}, TypeError, "scale: wanted a float .*got str"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p: wanted a probability in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: wanted a probability in \[0, 1\), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p: wanted a probability in \[0, 1\), got nan"),
    ({"dropout_p": None}, TypeError, "dropout_p: wanted a float"),
    ({"seed": 1.5}, TypeError, "seed: wanted None, an int or an int64 tensor with one element, got float"),
    ({"seed": torch.tensor([1, 2])}, TypeError, r"seed: wanted an int64 tensor with one element, got torch.int64 of shape \[2\]"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed: wanted an int64 tensor with one element, got torch.float32"),
    ({"seed": 1 << 64}, ValueError, "seed: wanted an int that fits 64 bits, got 18446744073709551616"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, f"seed: wanted x's device {DEVICE}, got meta"),
    ({"segments": torch.zeros(M)}, TypeError, "segments: wanted a lora_kernels.Segments .*got Tensor"),
    ({"segments": plan()}, ValueError, r"lora_A: wanted shape \[2, r, 8\] .*got \[3, 8\]; segments need a stack of adapters"),
    (stacked(segments=None), ValueError, r"lora_A: wanted shape \[r, 8\] .*got \[2, 3, 8\]; a stack of adapters needs segments"),
    (stacked(3), ValueError, r"lora_A: wanted shape \[2, r, 8\] .*got \[3, 3, 8\]; segments name 2 adapters"),
    (stacked(lora_B=torch.randn(3, N, R)), ValueError, r"lora_B: wanted shape \[2, 6, 3\] .*got \[3, 6, 3\]; segments name 2"),
    (stacked(lora_B=torch.randn(2, R, N)), ValueError, r"lora_B: .*it looks transposed.*lora_B.mT"),
    (stacked(segments=plan(M + 1)), ValueError, r"segments: wanted one id for each of the 4 tokens of x \[4, 8\], got 5"),
    (stacked(segments=plan().to("meta")), ValueError, f"segments: wanted x's device {DEVICE}, got meta"),
    (stacked(scale=torch.ones(3)), ValueError, r"scale: wanted shape \[2\], one for each adapter of segments, got \[3\]"),
    (stacked(scale=torch.ones(2, dtype=torch.float16)), TypeError, "scale: wanted a float or a float32 tensor, got torch.float16"),
    (stacked(scale=torch.ones(4)[::2]), ValueError, r"scale: wanted a contiguous tensor, got strides \[2\]"),
    (stacked(ranks=torch.ones(2)), TypeError, "ranks: wanted an int32 tensor .*got torch.float32"),
    (stacked(ranks=[1, 2]), TypeError, "ranks: wanted an int32 tensor .*got list"),
    (stacked(ranks=torch.ones(3, dtype=torch.int32)), ValueError, r"ranks: wanted shape \[2\], contiguous, got \[3\]"),
    ({"ranks": torch.ones(2, dtype=torch.int32)}, ValueError, "ranks: wanted None without segments"),
    (stacked(config=Config(), impl="triton"), UnsupportedError, "expand.block_m must be the plan's row_block, 16, got 128"),
    (
        stacked(config=Config(Shrink(32), Expand(16)), impl="triton"),
        UnsupportedError,
        "shrink.block_m must be the plan's gather_block, 16, got 32",
    ),
    (stacked(config=Config(Shrink(16), Expand(16, u="loop"))), UnsupportedError, "expand.u='loop' .* cannot serve segments"),
    ({"impl": "cuda"}, ValueError, "impl: wanted one of auto, triton, torch, reference, got 'cuda'"),
    ({"config": {}}, TypeError, "config: wanted a lora_kernels.tuning.Config or None, got dict"),
    ({"config": Config(), "impl": "torch"}, ValueError, "config: wanted None with impl='torch'"),
    ({"config": Config(), "impl": "reference"}, ValueError, "config: wanted None with impl='reference'"),
    ({"config": Config(Shrink(block_m=24)), "impl": "triton"}, UnsupportedError, "shrink.block_m must be a power of two .*got 24"),
    ({"config": Config(expand=Expand(u="loop", split=2))}, UnsupportedError, "expand.split > 1 serves u='given' and base='kernel'"),
    ({"config": Config(expand=Expand(split=0))}, UnsupportedError, "expand.split must be at least 1, got 0"),
    ({"config": Config(expand=Expand(u="later"))}, UnsupportedError, "expand.u must be 'given', 'loop' or 'awaited', got 'later'"),
]


PLANS = [
    ((torch.zeros(3), 2), {}, TypeError, "adapter_ids: wanted an int32 or int64 tensor, one id a token, got torch.float32"),
    (([0, 1], 2), {}, TypeError, "adapter_ids: wanted an int32 or int64 tensor, one id a token, got list"),
    ((torch.tensor([0, 2]), 2), {}, ValueError, r"adapter_ids: wanted ids from -1 to 1, got 2 \(1 out of range\)"),
    ((torch.tensor([-2, -3]), 2), {}, ValueError, r"adapter_ids: wanted ids from -1 to 1, got -2 \(2 out of range\)"),
    ((torch.tensor([0]), 0), {}, ValueError, "num_adapters: wanted at least 1, got 0"),
    ((torch.tensor([0]), 1.0), {}, TypeError, "num_adapters: wanted an int, got float"),
    ((torch.tensor([0]), 1), {"row_block": 24}, ValueError, "row_block: wanted a power of two, got 24"),
    ((torch.tensor([0]), 1), {"gather_block": 8}, ValueError, "gather_block: wanted at least 16, got 8"),
]
LENGTHS = [
    (([1.5],), {}, TypeError, "lengths: wanted ints, got 1.5"),
    ((torch.ones(2),), {}, TypeError, "lengths: wanted int32 or int64, got torch.float32"),
    ((torch.ones(2, 2, dtype=torch.int64),), {}, ValueError, r"lengths: wanted one dimension, got shape \[2, 2\]"),
    (([1, -1],), {}, ValueError, "lengths: wanted no negative length, got -1"),
    (([1, 1], [0]), {}, ValueError, "adapters: wanted one for each of 2 lengths, got 1"),
    (([1, 1],), {"tokens": 3}, ValueError, "tokens: wanted the sum of lengths, 2, got 3"),
    ((torch.ones(2, dtype=torch.int64, device="meta"),), {}, ValueError, "tokens: wanted the sum of lengths where they are on a GPU"),
    (([2], [5]), {"num_adapters": 3}, ValueError, "adapter_ids: wanted ids from -1 to 2, got 5"),
]


@pytest.mark.parametrize("args, kwargs, error, match", PLANS)
def test_plan_refused(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        Segments.from_ids(*args, **kwargs)


@pytest.mark.parametrize("args, kwargs, error, match", LENGTHS)
def test_lengths_refused(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        Segments.from_lengths(*args, **kwargs)


def test_ranks_above_the_stored_one_are_refused_where_they_can_be_read():
    args = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in arguments(**stacked(segments=plan().to("cpu"))).items()}
    with pytest.raises(ValueError, match="ranks: wanted ranks from 0 to lora_A's 3, got 1 to 4"):
        lora_linear(**args, ranks=torch.tensor([1, 4], dtype=torch.int32))


def test_ids_out_of_range_unvalidated_are_the_base_alone():
    s = Segments.from_ids(torch.tensor([0, 7, -9], device=DEVICE), 2, validate=False)
    assert s.ids.tolist() == [0, -1, -1] and s.starts.tolist() == [0, 1, 1, 3]


@pytest.fixture(scope="module")
def remembered():
    """Good calls, of which every case below differs in an argument or two."""
    for _ in range(2):
        for impl in ("auto", "triton", "torch"):
            for changed in ({}, stacked(), given(), stacked(scale=torch.ones(2)), stacked(ranks=torch.ones(2, dtype=torch.int32))):
                lora_linear(**arguments(**changed), impl=impl)
                lora_linear(**arguments(**changed), impl=impl, dropout_p=0.5, training=True)
    lora_linear(**arguments(), config=Config(), impl="triton")


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("function", [lora_linear, explain], ids=["lora_linear", "explain"])
@pytest.mark.parametrize("changed, error, match", CASES, ids=[f"{'-'.join(c[0])}-{i}" for i, c in enumerate(CASES)])
def test_refused(function, changed, error, match):
    from lora_kernels import launch

    before = launch.launches
    with pytest.raises(error, match=match):
        function(**arguments(**changed))
    assert launch.launches == before


def test_triton_on_a_cpu_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    args = {name: t.cpu() for name, t in arguments().items()}
    with pytest.raises(UnsupportedError, match="the tensors are on cpu; the kernels need a GPU, or TRITON_INTERPRET=1"):
        lora_linear(**args, impl="triton")
    assert "need a GPU" in explain(**args).why["triton"]


@pytest.mark.interpreted
def test_bfloat16_in_the_interpreter_is_refused_not_wrong():
    args = {name: t.bfloat16() for name, t in arguments().items()}
    with pytest.raises(UnsupportedError, match="bfloat16 bit patterns"):
        lora_linear(**args, impl="triton")
    assert explain(**args).arm == "torch"


def test_float64_by_the_kernels_is_refused():
    args = {name: t.double() for name, t in arguments().items()}
    with pytest.raises(UnsupportedError, match="do not take float64"):
        lora_linear(**args, impl="triton")

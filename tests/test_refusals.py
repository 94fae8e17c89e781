"""Bad input: one clear error each, that names the argument, the wanted and the given; before anything runs, nothing changed."""

import pytest
import torch

from lora_kernels import UnsupportedError, explain, lora_linear
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


class Segments:
    pass


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
    ({"scale": torch.tensor(1.0)}, TypeError, "scale: wanted a float .*got Tensor"),
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
    ({"segments": Segments()}, UnsupportedError, "segments: wanted None, got Segments"),
    ({"impl": "cuda"}, ValueError, "impl: wanted one of auto, triton, torch, reference, got 'cuda'"),
    ({"config": {}}, TypeError, "config: wanted a lora_kernels.tuning.Config or None, got dict"),
    ({"config": Config(), "impl": "torch"}, ValueError, "config: wanted None with impl='torch'"),
    ({"config": Config(), "impl": "reference"}, ValueError, "config: wanted None with impl='reference'"),
    ({"config": Config(Shrink(block_m=24)), "impl": "triton"}, UnsupportedError, "shrink.block_m must be a power of two .*got 24"),
    ({"config": Config(expand=Expand(u="later"))}, UnsupportedError, "expand.u must be 'given', 'loop' or 'awaited', got 'later'"),
]


@pytest.mark.parametrize("function", [lora_linear, explain], ids=["lora_linear", "explain"])
@pytest.mark.parametrize("changed, error, match", CASES, ids=[f"{'-'.join(c[0])}-{i}" for i, c in enumerate(CASES)])
def test_refused(function, changed, error, match):
    from lora_kernels import launch

    before = launch.launches
    with pytest.raises(error, match=match):
        function(**arguments(**changed))
    assert launch.launches == before


def test_triton_on_a_cpu_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
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

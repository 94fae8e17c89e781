"""The checks of a call's arguments: each names the argument, what was wanted and what was given, before anything is computed.

ValueError: shapes, values, devices. TypeError: types and dtypes. UnsupportedError: legal, but not here.
"""

from __future__ import annotations

import math

import torch

from .packed import check_widths
from .problem import FLOATS, MAX_RANK, PLAIN, UnsupportedError, is_stack, sharded
from .segments import Segments, readable


def _shape(t: torch.Tensor) -> list[int]:
    return list(t.shape)


def check_tensor(name: str, t, what: str) -> None:
    if type(t) not in PLAIN:
        _check_class(name, t, what)
    if t.layout != torch.strided:
        raise UnsupportedError(f"{name}: wanted a dense tensor, got layout {t.layout}")
    if t.is_quantized:
        raise UnsupportedError(f"{name}: wanted a floating-point tensor, got a quantised one ({t.dtype}); dequantise it first")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float16, bfloat16, float32 or float64, got {t.dtype}")


def _check_class(name: str, t, what: str) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: wanted {what}, got {type(t).__name__}")
    if sharded(t):
        raise UnsupportedError(
            f"{name}: wanted a plain tensor, got a {type(t).__name__} with placements {t.placements}; parallelize the layer by ColwiseLoRA "
            "or RowwiseLoRA of lora_kernels.integrations.tensor_parallel, or under fully_shard call the module that was given to it"
        )


def check_arguments(x, weight, lora_A, lora_B, bias, base, scale, dropout_p, seed, segments, ranks, widths) -> None:
    """Refuse what `lora_linear` cannot compute. Raises ValueError, TypeError or UnsupportedError."""
    check_tensor("x", x, "a tensor [..., in_features]")
    if base is None:
        check_tensor("weight", weight, "a tensor [out_features, in_features], or None with base")
    else:
        check_base(x, weight, bias, base)
    if segments is None:
        check_tensor("lora_A", lora_A, "a tensor [r, in_features]")
        check_tensor("lora_B", lora_B, "a tensor [out_features, r]")
    else:
        check_tensor("lora_A", lora_A, "a tensor [num_adapters, r, in_features]")
        check_tensor("lora_B", lora_B, "a tensor [num_adapters, out_features, r]")
    if bias is not None:
        check_tensor("bias", bias, "a tensor [out_features] or None")
    if segments is not None:
        check_segments(x, segments)
        if is_stack(weight) and widths is not None:
            raise UnsupportedError(f"widths: wanted None beside a stack of weights, got {list(widths)}")
        if segments.top_k > 1 and not is_stack(weight):
            given = "base" if weight is None else f"weight {_shape(weight)}"
            raise ValueError(f"segments: wanted a plan of one row a token beside {given}, got {segments.top_k}; segments.each() is one")
    if base is None:
        check_shapes(x, weight, lora_A, lora_B, bias, segments, widths)
    elif widths is not None or not adapters_fit(base.shape[-1], x.shape[-1], lora_A, lora_B, segments):
        check_adapters(base.shape[-1], x.shape[-1], f"to match x {_shape(x)} and base {_shape(base)}", lora_A, lora_B, segments, widths)
    check_dtypes(x, weight, lora_A, lora_B, bias)
    for name, t in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if t is not None:
            check_device(name, t, x)
    if weight is not None and weight.requires_grad:
        raise ValueError(
            "weight: wanted a frozen base weight, got one with requires_grad=True; "
            "call weight.requires_grad_(False): LoRA trains lora_A and lora_B only"
        )
    if bias is not None and bias.requires_grad and is_stack(weight):
        raise UnsupportedError("bias: wanted a frozen one beside a stack of weights, got requires_grad=True")
    check_scale(scale, x, segments)
    if ranks is not None:
        check_ranks(ranks, x, lora_A, segments)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: wanted a float in [0, 1), got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: wanted a probability in [0, 1), got {dropout_p}")
    if seed is not None:
        check_seed(seed, x)


def check_segments(x, segments) -> None:
    if not isinstance(segments, Segments):
        wanted = "a lora_kernels.Segments (Segments.from_ids(adapter_ids, num_adapters)) or None"
        raise TypeError(f"segments: wanted {wanted}, got {type(segments).__name__}")
    tokens, k = math.prod(x.shape[:-1]), segments.top_k
    if segments.tokens != tokens * k:
        wanted = "one id" if k == 1 else f"{k} ids"
        raise ValueError(f"segments: wanted {wanted} for each of the {tokens} tokens of x {_shape(x)}, got {segments.tokens}")
    check_device("segments", segments, x)


def check_scale(scale, x, segments) -> None:
    if isinstance(scale, torch.Tensor):
        E = 1 if segments is None else segments.num_adapters
        if scale.dtype != torch.float32:
            raise TypeError(f"scale: wanted a float or a float32 tensor, got {scale.dtype}")
        if (scale.numel() != 1) if segments is None else (tuple(scale.shape) != (E,)):
            wanted = "one element" if segments is None else f"shape [{E}], one for each adapter of segments"
            raise ValueError(f"scale: wanted {wanted}, got {_shape(scale)}")
        check_device("scale", scale, x)
        if scale.requires_grad:
            raise UnsupportedError("scale: wanted a tensor without gradient, got requires_grad=True; the scale is not trained")
        if not scale.is_contiguous():
            raise ValueError(f"scale: wanted a contiguous tensor, got strides {list(scale.stride())}")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: wanted a float (lora_alpha / r) or a float32 tensor, got {type(scale).__name__}")


def check_ranks(ranks, x, lora_A, segments) -> None:
    if segments is None:
        raise ValueError("ranks: wanted None without segments (the rank is lora_A's), got a value")
    if not isinstance(ranks, torch.Tensor) or ranks.dtype != torch.int32:
        given = ranks.dtype if isinstance(ranks, torch.Tensor) else type(ranks).__name__
        raise TypeError(f"ranks: wanted an int32 tensor [num_adapters] or None, got {given}")
    if tuple(ranks.shape) != (segments.num_adapters,) or not ranks.is_contiguous():
        raise ValueError(f"ranks: wanted shape [{segments.num_adapters}], contiguous, got {_shape(ranks)}")
    check_device("ranks", ranks, x)
    R = lora_A.shape[-2]
    if readable(ranks) and ((ranks < 0) | (ranks > R)).any():
        raise ValueError(f"ranks: wanted ranks from 0 to lora_A's {R}, got {ranks.min().item()} to {ranks.max().item()}")


def check_base(x, weight, bias, base) -> None:
    """The base product in the place of weight and bias."""
    check_tensor("base", base, "a tensor [..., out_features] or None")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            raise ValueError(f"{name}: wanted None with base, which is the base layer's output and holds it, got {type(t).__name__}")
    if x.dim() < 1 or base.dim() < 1 or base.shape[:-1] != x.shape[:-1]:
        lead = "".join(f"{size}, " for size in x.shape[:-1])
        raise ValueError(f"base: wanted shape [{lead}out_features] to match x {_shape(x)}, got {_shape(base)}")
    if base.dtype != x.dtype:
        raise TypeError(f"base: wanted x's dtype {x.dtype}, got {base.dtype}; cast one of them, or use torch.autocast")
    check_device("base", base, x)


def check_shapes(x, weight, lora_A, lora_B, bias, segments, widths) -> None:
    if is_stack(weight) and segments is not None:
        E, N, K = weight.shape
        if E != segments.num_adapters:
            wanted = f"[{segments.num_adapters}, out_features, in_features], one for each adapter of segments"
            raise ValueError(f"weight: wanted shape {wanted}, got {_shape(weight)}")
        biases: tuple[int, ...] = (E, N)
    elif weight.dim() != 2:
        hint = "; a stack of weights needs segments" if is_stack(weight) else ""
        raise ValueError(f"weight: wanted shape [out_features, in_features], got {_shape(weight)}{hint}")
    else:
        N, K = weight.shape
        biases = (N,)
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x: wanted shape [..., {K}] to match weight {_shape(weight)}, got {_shape(x)}")
    if widths is not None or not adapters_fit(N, K, lora_A, lora_B, segments):
        check_adapters(N, K, f"to match weight {_shape(weight)}", lora_A, lora_B, segments, widths)
    if bias is not None and tuple(bias.shape) != biases:
        raise ValueError(f"bias: wanted shape {list(biases)} to match weight {_shape(weight)}, got {_shape(bias)}")


def adapters_fit(N: int, K: int, lora_A, lora_B, segments) -> bool:
    """The usual case, told without the words of an error, which cost microseconds."""
    stack = () if segments is None else (segments.num_adapters,)
    if lora_A.dim() != len(stack) + 2:
        return False
    R = lora_A.shape[-2]
    return 0 < R <= MAX_RANK and lora_A.shape == (*stack, R, K) and lora_B.shape == (*stack, N, R)


def check_adapters(N: int, K: int, why: str, lora_A, lora_B, segments, widths) -> None:
    """``why``: what their sizes have to match."""
    layers = 1
    if widths is not None:
        check_widths(widths, N)
        layers = len(widths)
    stack = [] if segments is None else [segments.num_adapters]
    check_adapter("lora_A", lora_A, [*stack, "r", K], why, "[r, in_features]")
    R = lora_A.shape[-2]
    if R % layers:
        raise ValueError(f"lora_A: wanted r rows for each of the {layers} layers of widths, got {R} (shape {_shape(lora_A)})")
    check_adapter("lora_B", lora_B, [*stack, N, R // layers], f"{why} and lora_A {_shape(lora_A)}", "[out_features, r]")
    if not 1 <= R <= MAX_RANK:
        raise UnsupportedError(f"lora_A: wanted a rank r from 1 to {MAX_RANK}, got r = {R} (shape {_shape(lora_A)})")


def check_adapter(name: str, t, wanted: list, why: str, peft: str) -> None:
    """``wanted``: the shape, "r" for any size."""
    if t.dim() == len(wanted) and all(w == "r" or w == size for w, size in zip(wanted, t.shape, strict=True)):
        return
    hint = ""
    if t.dim() != len(wanted):
        if (t.dim(), len(wanted)) == (3, 2):
            hint = "; a stack of adapters needs segments"
        elif (t.dim(), len(wanted)) == (2, 3):
            hint = "; segments need a stack of adapters"
    elif all(w == "r" or w == size for w, size in zip(wanted, t.mT.shape, strict=True)):
        hint = f"; it looks transposed: PEFT stores {name} as {peft}, pass {name}.{'T' if t.dim() == 2 else 'mT'}"
    elif len(wanted) == 3 and t.shape[0] != wanted[0]:
        hint = f"; segments name {wanted[0]} adapters"
    raise ValueError(f"{name}: wanted shape [{', '.join(map(str, wanted))}] {why}, got {_shape(t)}{hint}")


def check_vector(name: str, t, weight, like) -> None:
    """A value for each of weight's outputs, of ``like``'s dtype, on weight's device."""
    check_tensor(name, t, "a tensor [out_features]")
    if tuple(t.shape) != (weight.shape[0],):
        raise ValueError(f"{name}: wanted shape [{weight.shape[0]}] to match weight {_shape(weight)}, got {_shape(t)}")
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: wanted dtype {like.dtype}, got {t.dtype}")
    if t.device != weight.device:
        raise ValueError(f"{name}: wanted weight's device {weight.device}, got {t.device}")


def check_dtypes(x, weight, lora_A, lora_B, bias) -> None:
    if weight is not None and weight.dtype != x.dtype:
        raise TypeError(f"weight: wanted x's dtype {x.dtype}, got {weight.dtype}; cast one of them, or use torch.autocast")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias: wanted x's dtype {x.dtype}, got {bias.dtype}")
    if lora_A.dtype != x.dtype and lora_A.dtype != torch.float32:
        raise TypeError(f"lora_A: wanted x's dtype {x.dtype} or float32, got {lora_A.dtype}")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B: wanted lora_A's dtype {lora_A.dtype}, got {lora_B.dtype}")


def check_device(name: str, t, x) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: wanted x's device {x.device}, got {t.device}")


def check_number(name: str, number: float, wanted: str = "a number") -> None:
    """A finite one. TypeError, ValueError: it is none, or not finite."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        given = type(number).__name__ if isinstance(number, torch.Tensor) else repr(number)
        raise TypeError(f"{name}: wanted {wanted}, got {given}")
    if not math.isfinite(number):
        raise ValueError(f"{name}: wanted a finite number, got {number}")


def check_seed(seed, x) -> None:
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: wanted an int64 tensor with one element, got {seed.dtype} of shape {_shape(seed)}")
        check_device("seed", seed, x)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: wanted None, an int or an int64 tensor with one element, got {type(seed).__name__}")
    elif not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed: wanted an int that fits 64 bits, got {seed}")

"""What stands before a gated MLP's down projection: ``h = act(gate) up``, and dgate and dup from dh, one read and one write of each.

The activation is a plug, ``ACT``: a function of a float32 tile that gives its values and their derivatives.
"""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    s = 1 / (1 + tl.exp(-x))
    value = x * s
    return value, s + value * (1 - s)


@triton.jit
def gelu_tanh(x):
    """``x / 2 (1 + tanh(inner))``, tanh by the logistic function: ``(1 + tanh(t)) / 2 = 1 / (1 + exp(-2 t))``."""
    square = x * x
    s = 1 / (1 + tl.exp(-1.5957691216057308 * x * (1 + 0.044715 * square)))  # 2 sqrt(2 / pi)
    return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * square)


@triton.jit
def gate_product(gate, up, h, number, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [blocks]. gate, up, h: ``number`` elements in a row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < number
    value, _ = ACT(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
    product = value * tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + at, product.to(h.dtype.element_ty), mask=mask)


@triton.jit
def gate_gradients(gate, up, dh, dgate, dup, number, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """The same grid. dup may be dh itself, each element of which is read before it is written."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < number
    value, slope = ACT(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
    its_up = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    its_dh = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dgate + at, (its_dh * its_up * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + at, (its_dh * value).to(dup.dtype.element_ty), mask=mask)

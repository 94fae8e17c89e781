"""What stands before a gated MLP's down projection: ``h = act(gate) up``, and dgate and dup from dh, one read and one write of each; and
in a mixture's experts what stands behind it, the weighted sum of a token's experts.

The activation is a plug, ``ACT``: a function of a float32 tile that gives its values and their derivatives. Matrices are
(tensor, stride of its rows), for gate and up may be halves of one.
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
def gate_product(gate, up, g, h, F, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [rows]. gate, up, h: matrices of F columns. g: None, or a factor for each row of h."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0 if g is None else tl.load(g + row).to(tl.float32)
    for f0 in tl.range(0, F, BLOCK):
        f = f0 + tl.arange(0, BLOCK)
        value, _ = ACT(load_row(gate, row, f, F))
        store_row(h, row, f, F, value * load_row(up, row, f, F) * factor)


@triton.jit
def gate_gradients(gate, up, g, dh, dgate, dup, dots, F, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """The same grid. dup may be dh itself, each element of which is read before it is written.

    g: None, or a factor for each row of dh; then dots ``[rows]``, float32, is what each row of h and dh have in common, without it.
    """
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0 if g is None else tl.load(g + row).to(tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for f0 in tl.range(0, F, BLOCK):
        f = f0 + tl.arange(0, BLOCK)
        value, slope = ACT(load_row(gate, row, f, F))
        its_up = load_row(up, row, f, F)
        its_dh = load_row(dh, row, f, F)
        acc += value * its_up * its_dh
        its_dh *= factor
        store_row(dgate, row, f, F, its_dh * its_up * slope)
        store_row(dup, row, f, F, its_dh * value)
    if g is not None:
        tl.store(dots + row, tl.sum(acc, 0))


@triton.jit
def weighted_rows(y, g, z, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [tokens, column blocks]. ``z[t] = sum over j of g[t TOP_K + j] y[t TOP_K + j]``, in this order, in float32."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        row = t * TOP_K + j
        acc += load_row(y, row, n, N) * tl.load(g + row).to(tl.float32)
    store_row(z, t, n, N, acc)


@triton.jit
def load_row(matrix, row, f, F):
    """Columns f of a row, in float32; those past the last are 0."""
    return tl.load(matrix[0] + row * matrix[1] + f, mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def store_row(matrix, row, f, F, values):
    tl.store(matrix[0] + row * matrix[1] + f, values.to(matrix[0].dtype.element_ty), mask=f < F)

"""The slips of `mutation.py` in weights that a function makes: of 4 bits, for training and to merge into; in DoRA over them, and biases."""

from __future__ import annotations

from dataclasses import replace

from mutants import Mutant

DEQUANTIZE, AUTOGRAD, PROJECTIONS, SHARED, APPLY = "dequantize.py", "autograd.py", "projections.py", "shared_input.py", "apply.py"
DORA, PEFT_DORA = "dora.py", "integrations/peft_dora.py"
STATE, PEFT, MIXED, OVER = "integrations/peft_state.py", "integrations/peft.py", "integrations/peft_mixed.py", "over.py"
WHOLE = "not (few or (layer.training and tokens(x) > MANY)) or not is_four_bit(layer) or hooked(layer) or ops.watched()"
NOT_AS_IT_WAS = "tuple(state.shape) != (layer.out_features, layer.in_features) or repacked(state)"
IN_AUTOCAST = "(torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype)"

SLIPS = [
    Mutant("made: kept for backward", AUTOGRAD, "weight if need_weight and make is None else None", "weight if need_weight else None"),
    Mutant("made: for gradients that need none", AUTOGRAD, "ctx.make = make if need_weight else None", "ctx.make = make"),
    Mutant("made: in its own dtype", AUTOGRAD, "ctx.make().to(dy.dtype)", "ctx.make()"),
    Mutant("made: in evaluation", DEQUANTIZE, WHOLE, WHOLE.replace("layer.training and ", "")),
    Mutant("made: of few tokens", DEQUANTIZE, WHOLE, WHOLE.replace(" and tokens(x) > MANY", "")),
    Mutant("made: past hooks", DEQUANTIZE, WHOLE, WHOLE.replace("hooked(layer) or ", "")),
    Mutant("made: of a weight packed anew", DEQUANTIZE, NOT_AS_IT_WAS, NOT_AS_IT_WAS.split(" or ")[0]),
    Mutant("made: before its layer knows its dtype", DEQUANTIZE, "layer.compute_dtype if layer.compute_type_is_set else None", "x.dtype"),
    Mutant("made: in x's dtype under autocast", DEQUANTIZE, IN_AUTOCAST, "x.dtype"),
    Mutant("made: without its bias", DEQUANTIZE, "bias = None if layer.bias is None else layer.bias.to(dtype)", "bias = None"),
    Mutant("made: a bias that is cast is one's own", DEQUANTIZE, "dtype, bias is layer.bias)", "dtype, True)"),
    Mutant("made: equal whatever it is of", DEQUANTIZE, "return isinstance(other, Made) and self._what() == other._what()", "return True"),
    Mutant("made: never equal", DEQUANTIZE, "return isinstance(other, Made) and self._what() == other._what()", "return False"),
    Mutant("made: equal after a write", DEQUANTIZE, "self.packed.data_ptr(), self.version, id", "self.packed.data_ptr(), id"),
    Mutant("made: y as it was computed", PEFT, "return y if base.result is None else y.to(base.result)", "return y"),
    Mutant("made: y of a batch as it was computed", MIXED, "return y if base.result is None else y.to(base.result)", "return y"),
    Mutant("made: y of several as it was computed", PEFT, "return y.to(x.dtype) if callable(own.weight) else y", "return y"),
    Mutant("made: a cast bias among several", STATE, ' or base.bias is not held(layer._modules["base_layer"], "bias")[0]', ""),
    Mutant("made: over a layer, in autocast's dtype", OVER, "whole is not None and whole.dtype is x.dtype", "whole is not None"),
    Mutant("made: several at once, in autocast's dtype", OVER, "whole.dtype is not x.dtype or ", ""),
    Mutant("made: of several, for gradients that need none", PROJECTIONS,
           "if need_x and layer.make is not None:", "if layer.make is not None:"),
    Mutant("made: of any shape", PROJECTIONS, "tuple(weight.shape) != (N, K) or ", ""),
    Mutant("made: with gaps", PROJECTIONS, " or not weight.is_contiguous()", ""),
    Mutant("made: of several, in its own dtype", PROJECTIONS, "return weight.to(like.dtype)", "return weight"),
    Mutant("made: checked in x's dtype", PROJECTIONS,
           "torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype", "x.dtype",
           note="equivalent but for memory: what stands in for the weight is cast, and whole then"),
    Mutant("whole: the bias in the weight", DEQUANTIZE, '            held["bias"] = None\n', "            pass\n"),
    Mutant("whole: the bias is lost", DEQUANTIZE, '            held["bias"] = bias\n', "            pass\n"),
    Mutant("whole: the mode is lost", DEQUANTIZE, "        layer.train(training)\n", ""),
    Mutant("whole: of whatever it does", DEQUANTIZE, "if not torch.linalg.vector_norm(product", "if False and (product"),
    Mutant("whole: one block", DEQUANTIZE, "ones[:, begin : begin + count].fill_diagonal_(1.0)", "ones.fill_diagonal_(1.0)"),
    Mutant("whole: without the update", DEQUANTIZE, "    if adapter:\n", "    if not adapter:\n"),
    Mutant("whole: trained from here on", DEQUANTIZE,
           "nn.Parameter(weight, requires_grad=False)", "nn.Parameter(weight)"),
    Mutant("whole: layers without an adapter stay", APPLY, "elif quantised(layer) and layer not in below:", "elif False:"),
    Mutant("whole: past the hooks of the base", APPLY, "            _check_hooks(layer.base_layer, names[0])\n", ""),
    Mutant("whole: past the hooks of others", APPLY, "            _check_hooks(layer, names[0])\n            linear", "            linear"),
    Mutant("whole: known for quantised", APPLY, "quantizer.remove_quantization_config(module)", "pass"),
    Mutant("whole: unasked", APPLY, "if isinstance(layer, Over) and dequantize is None:", "if False:"),
]  # fmt: skip

MADE_ONCE, OF_THE_BIAS = "made.pop() if made else make()", "None if bias is None else (1 - g) * bias"
OTHER_ORDER = "repacked(module.weight.quant_state) or (here and not module.training)"
DORA_SLIPS = [
    Mutant("dora: the weight made twice for y", DORA, MADE_ONCE, "make()"),
    Mutant("dora: the bias scaled, too", DORA, OF_THE_BIAS, "None"),
    Mutant("dora: all of the dropped product added", DORA, "weight, make), g - 1, None", "weight, make), g, None"),
    Mutant("dora: B as it is", DORA, "(g[:, None] * lora_B).to(lora_B.dtype), base=base", "lora_B, base=base"),
    Mutant("dora: a norm of bits in another order", PEFT_DORA, OTHER_ORDER, "False"),
    Mutant("bias: lost beside a product", PEFT,
           "product, bias = product + scaled_bias(bias, one.scale).to(product.dtype), None", "bias = None"),
    Mutant("bias: lost among several", STATE, "adapters[0].bias is not None or in_dtype(", "in_dtype("),
    Mutant("bias: lost in a mixed batch", MIXED, "if any(adapter.bias is not None for adapter in adapters):", "if False:"),
    Mutant("bias: without its scale in a sum", "experts.py", "each.bias.to(wide) * each.scale for", "each.bias.to(wide) for"),
]  # fmt: skip

COLUMNS, LAUNCH_COLUMNS = "kernels/columns.py", "launch_columns.py"
T_TILE = "load_dense(t, m0, n0, M, N, BLOCK_M, BLOCK_N, False, EVEN_N, WIDE)"
COLUMN_SLIPS = [
    Mutant("columns: tokens past the last", COLUMNS, T_TILE, T_TILE.replace("False", "True")),
    Mutant("columns: past the last of t", COLUMNS, T_TILE, T_TILE.replace("EVEN_N", "True")),
    Mutant("columns: splits that begin at their number", COLUMNS, "= split * blocks_per_split * BLOCK_M", "= split * BLOCK_M"),
    Mutant("columns: one place for every split's sums", COLUMNS, "dg + split * N + n", "dg + n"),
    Mutant("columns: sums of the last tokens alone", COLUMNS, "acc += dy_tile", "acc = dy_tile"),
    Mutant("columns: sums past the last column", COLUMNS, "tl.sum(acc, 0), mask=n < N)", "tl.sum(acc, 0))"),
    Mutant("columns: dt past its end", COLUMNS, ", mask=tile_mask(m0, n0, M, N, BLOCK_M, BLOCK_N))", ")"),
    Mutant("columns: dt rounded before it is scaled", COLUMNS, "(dy_tile * g[None, :])", "(dy_tile * g.to(tl.float16)[None, :])"),
    Mutant("columns: even always", LAUNCH_COLUMNS, "EVEN_N=N % BLOCK_N == 0", "EVEN_N=True"),
    Mutant("columns: t's strides unseen", LAUNCH_COLUMNS, "(dy_strides, t and t[1], (N, 1))", "(dy_strides, (N, 1))"),
    Mutant("columns: of float64, too", DORA, "dy.dtype != torch.float64 and ", ""),
    Mutant("columns: beside a bias alone", DORA, " and (need_t or need_g):", ":"),
]  # fmt: skip

EVERY = [
    *(replace(m, tests="columns") for m in COLUMN_SLIPS),
    *(replace(m, tests="made") for m in SLIPS),
    *(replace(m, tests="dora") for m in DORA_SLIPS),
]

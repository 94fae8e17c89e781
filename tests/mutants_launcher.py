"""The slips of `mutation.py` where what was worked out for one call serves another, and all slips together."""

from __future__ import annotations

from dataclasses import replace

import mutants_gated
import mutants_made
import mutants_serving
from mutants import SPEED, Mutant

LAUNCHER, OPERANDS, DISPATCH, CONFIG = "launcher.py", "operands.py", "dispatch.py", "tuning/config.py"
CALLS, OPS, LAUNCH, EXPERTS, AUTOGRAD, NN = "calls.py", "ops.py", "launch.py", "launch_experts.py", "autograd.py", "nn.py"
LOOK, ARGUMENTS = "(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0)", "widths, bool(training and dropout_p), config, impl,"
SCALE = "scale.shape, scale.dtype, scale.device, scale.is_contiguous(), scale.requires_grad"
CALL = "aligned(*operands), many(adapters), dropout, device, impl, key, interpreting())"

LAUNCHED = [
    Mutant("launcher: any address", OPERANDS, "t.data_ptr() % 16 == 0", "True"),
    Mutant("launcher: whatever is there", LAUNCHER, "if arg is None or isinstance(", "if isinstance("),
    Mutant("launcher: any grid", LAUNCHER, "(device, grid, *", "(device, *", note="equivalent: a layout has one grid"),
    Mutant("launcher: whoever is to be told", LAUNCHER, "return hook is None or not", "return True or not"),
    Mutant("launcher: by Triton's own call", LAUNCHER, "if STEADY and", "if False and", note=SPEED),
    Mutant("launcher: nothing is found", LAUNCHER, "if found is None:", "if True:"),
    Mutant("launcher: tensors in tuples unseen", LAUNCHER, "elif type(arg) is tuple:", "elif False:"),
    Mutant("operands: any strides", OPERANDS, "(t.shape, t.stride(), t.dtype)", "(t.shape, (), t.dtype)"),
    Mutant("operands: any dtype", OPERANDS, "(t.shape, t.stride(), t.dtype)", "(t.shape, t.stride(), torch.float32)"),
    Mutant("operands: ranks or none", OPERANDS, "adapters.ranks is not None", "False"),
    Mutant("operands: packed or not", OPERANDS, "adapters.widths)", "())"),
    Mutant("operands: any number of adapters", OPERANDS, "(s.num_adapters, s.tokens,", "(1, s.tokens,"),
    Mutant("operands: any number of tokens", OPERANDS, "s.tokens, s.tile", "s.num_adapters, s.tile"),
    Mutant("operands: any block of rows", OPERANDS, "s.row_block, s.gather_block", "0, s.gather_block"),
    Mutant("operands: any gathered block", OPERANDS, "s.row_block, s.gather_block", "s.row_block, 0"),
    Mutant("dispatch: any address", DISPATCH, CALL, CALL.replace("aligned(*operands), ", "")),
    Mutant("dispatch: any adapters", DISPATCH, CALL, CALL.replace("many(adapters), ", "")),
    Mutant("dispatch: dropout or not", DISPATCH, CALL, CALL.replace("dropout, ", "")),
    Mutant("dispatch: either pass", DISPATCH, "call = (which, *map", "call = (*map",
           note="equivalent: their operands are four and six"),
    Mutant("dispatch: any impl", DISPATCH, CALL, CALL.replace("impl, ", "")),
    Mutant("dispatch: any config", DISPATCH, CALL, CALL.replace("key, ", "")),
    Mutant("dispatch: described each time", DISPATCH, "_found[call] = found", "pass", note=SPEED),
]  # fmt: skip

KEPT_FORWARD = "among(kept, save_u, precision(x.dtype), matrix(base), matrix(u))"
KEPT_BACKWARD = "among(kept, needs, adapter_dtype, precision(dy.dtype), matrix(onto), matrix(all_ds))"
KEPT_DOWN = 'among(kept, "down", precision(x.dtype), matrix(lora_A))'
REMEMBERED = [
    Mutant("calls: any shape", CALLS, LOOK, LOOK.replace("t.shape, ", "")),
    Mutant("calls: any strides", CALLS, LOOK, LOOK.replace("t.stride(), ", "")),
    Mutant("calls: any dtype", CALLS, LOOK, LOOK.replace("t.dtype, ", "")),
    Mutant("calls: any device", CALLS, LOOK, LOOK.replace("t.device, ", "")),
    Mutant("calls: any address", CALLS, LOOK, LOOK.replace(", t.data_ptr() % 16 == 0", "")),
    Mutant("calls: sparse, too", CALLS, " and t.layout is torch.strided", ""),
    Mutant("calls: negated as it is read, too", CALLS, " and not t.is_neg():", ":"),
    Mutant("calls: any class", CALLS, "elif type(t) in PLAIN and", "elif hasattr(t, 'layout') and"),
    Mutant("calls: a trained weight", CALLS, "weight.requires_grad or weight.dim() != 2", "weight.dim() != 2"),
    Mutant("calls: stacks of weights", CALLS, "weight.requires_grad or weight.dim() != 2", "weight.requires_grad",
           note="equivalent: but for a trained bias beside them"),
    Mutant("calls: any seed", CALLS, "seed is not None or ops.watched()", "ops.watched()"),
    Mutant("calls: under a compiler", CALLS, "seed is not None or ops.watched()", "seed is not None"),
    Mutant("calls: any dropout", CALLS, " or not 0.0 <= dropout_p < 1.0", ""),
    Mutant("calls: any plan", CALLS, "many(Adapters(segments)), segments.device", "segments.device,"),
    Mutant("calls: several rows of a token", CALLS, " or segments.top_k > 1", ""),
    Mutant("calls: scales of any shape", CALLS, SCALE, SCALE.replace("scale.shape, ", "")),
    Mutant("calls: scales of any dtype", CALLS, SCALE, SCALE.replace("scale.dtype, ", "")),
    Mutant("calls: trained scales", CALLS, SCALE, SCALE.replace(", scale.requires_grad", "")),
    Mutant("calls: scales with gaps", CALLS, SCALE, SCALE.replace("scale.is_contiguous(), ", "")),
    Mutant("calls: ranks that can be read", CALLS, " or ranks.device == CPU", ""),
    Mutant("calls: any widths", CALLS, ARGUMENTS, ARGUMENTS.replace("widths, ", "")),
    Mutant("calls: dropout or not", CALLS, ARGUMENTS, ARGUMENTS.replace("bool(training and dropout_p), ", "")),
    Mutant("calls: any config", CALLS, ARGUMENTS, ARGUMENTS.replace("config, ", "")),
    Mutant("calls: any impl", CALLS, ARGUMENTS, ARGUMENTS.replace(" impl,", "")),
    Mutant("calls: of no tokens", CALLS, "x.numel() == 0 or ", ""),
    Mutant("calls: of no outputs", CALLS, "lora_B.numel() == 0 or ", "", note="equivalent: a grid of no programs"),
    Mutant("calls: x with gaps", CALLS, " or even(x) is not x or even(base) is not base", ""),
    Mutant("calls: nothing is remembered", CALLS, "return None if call is None else _arms.get(call)", "return None", note=SPEED),
    Mutant("calls: u kept or not", LAUNCH, KEPT_FORWARD, KEPT_FORWARD.replace("save_u, ", "")),
    Mutant("calls: any precision", LAUNCH, KEPT_FORWARD, KEPT_FORWARD.replace("precision(x.dtype), ", "")),
    Mutant("calls: any base", LAUNCH, KEPT_FORWARD, KEPT_FORWARD.replace("matrix(base), ", "")),
    Mutant("calls: u given or not", LAUNCH, KEPT_FORWARD, KEPT_FORWARD.replace(", matrix(u)", "")),
    Mutant("calls: any gradients", LAUNCH, KEPT_BACKWARD, KEPT_BACKWARD.replace("needs, ", "")),
    Mutant("calls: gradients of any dtype", LAUNCH, KEPT_BACKWARD, KEPT_BACKWARD.replace("adapter_dtype, ", "")),
    Mutant("calls: backward in any precision", LAUNCH, KEPT_BACKWARD, KEPT_BACKWARD.replace("precision(dy.dtype), ", "")),
    Mutant("calls: every dS or one", LAUNCH, KEPT_BACKWARD, KEPT_BACKWARD.replace(", matrix(all_ds)", "")),
    Mutant("calls: down in any precision", LAUNCH, KEPT_DOWN, KEPT_DOWN.replace("precision(x.dtype), ", "")),
    Mutant("calls: down of any ranks", LAUNCH, KEPT_DOWN, KEPT_DOWN.replace(", matrix(lora_A)", "")),
    Mutant("calls: experts in any precision", EXPERTS, "among(kept, precision(x.dtype))", "among(kept)"),
    Mutant("calls: experts backward in any precision", EXPERTS, "adapter_dtype, precision(dy.dtype))", "adapter_dtype)"),
    Mutant("calls: experts' gradients of any dtype", EXPERTS, "among(kept, adapter_dtype, ", "among(kept, ",
           note="equivalent: where dX is not wanted they are `launch`'s, and else A itself is looked at"),
    Mutant("calls: both wgrads alike", LAUNCH, '("wgrad", out_transposed, beside)', '("wgrad", beside)'),
    Mutant("calls: the backward pass of any config", AUTOGRAD, 'config.key() if isinstance(config, Config) else ""', '""'),
    Mutant("ops: negated as it is read", OPS, " or t.is_neg()", ""),
    Mutant("operands: x with gaps as it is", OPERANDS, "t if t is None or t.dim() == 2 or t.is_contiguous() else as_matrix(t)", "t"),
    Mutant("operands: a view for autograd", OPERANDS, "torch.ops.aten._unsafe_view.default(y, ", "y.view("),
    Mutant("operands: one row", OPERANDS, "math.prod(shape[:-1]), shape[-1])", "shape[0], shape[-1])"),
    Mutant("layers: parameters alone", NN, "buffers[n] if n in buffers else getattr(layer, n)", "buffers.get(n)"),
]  # fmt: skip

EVERY = [
    *mutants_serving.EVERY,
    *mutants_made.EVERY,
    *mutants_gated.EVERY,
    *(replace(m, tests="launcher") for m in LAUNCHED),
    *(replace(m, tests="calls") for m in REMEMBERED),
]

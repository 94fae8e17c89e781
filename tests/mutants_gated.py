"""Slips in an MLP whose gate is made again, and in its kernels: met by their own tests."""

from __future__ import annotations

from dataclasses import replace

from mutants import Mutant

GATE, LAUNCH, NODE, MADE, EXPERTS = "kernels/gate.py", "launch_gate.py", "gated.py", "gates.py", "experts_node.py"
LOGISTIC = "1 / (1 + tl.exp(-x))"
STORED = "values.to(matrix[0].dtype.element_ty), mask=f < F)"

SLIPS = [
    Mutant("gate: slope of a constant", GATE, "return value, s + value * (1 - s)", "return value, s"),
    Mutant("gate: slope of the inner cube", GATE, "0.134145", "0.044715"),
    Mutant("gate: the logistic of minus x", GATE, f"    s = {LOGISTIC}\n", "    s = 1 / (1 + tl.exp(x))\n"),
    Mutant("gate: past the end of a row", GATE, STORED, "values.to(matrix[0].dtype.element_ty))"),
    Mutant("gate: what is past the end of a row", GATE, "tl.load(matrix[0] + row * matrix[1] + f, mask=f < F, other=0.0)",
           "tl.load(matrix[0] + row * matrix[1] + f)"),
    Mutant("gate: dup of the slope", GATE, "f, F, its_dh * value)", "f, F, its_dh * slope)"),
    Mutant("gate: dgate without up", GATE, "its_dh * its_up * slope", "its_dh * slope"),
    Mutant("gate: blocks that overlap", GATE, "tl.range(0, F, BLOCK)", "tl.range(0, F, BLOCK // 2)", count=2),
    Mutant("gate: a product without its factor", GATE, "load_row(up, row, f, F) * factor)", "load_row(up, row, f, F))"),
    Mutant("gate: gradients without their factor", GATE, "        its_dh *= factor\n", ""),
    Mutant("gate: dot products with the factor", GATE, "acc += value * its_up * its_dh\n        its_dh *= factor\n",
           "its_dh *= factor\n        acc += value * its_up * its_dh\n"),
    Mutant("gate: dot products of act alone", GATE, "acc += value * its_up * its_dh", "acc += value * its_dh"),
    Mutant("gate: sums of the first expert's weight", GATE, "tl.load(g + row).to(tl.float32)\n    store_row(z",
           "tl.load(g + t * TOP_K).to(tl.float32)\n    store_row(z"),
    Mutant("gate: sums of all but the last", GATE, "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)"),
    Mutant("gate: sums of the first block of columns", GATE, "n = tl.program_id(1) * BLOCK + ", "n = "),
    Mutant("gate: dup beside dh", LAUNCH, "(torch.empty_like(dh), dh)", "(torch.empty_like(dh), torch.empty_like(dh))"),
    Mutant("gate: dots of the rows of another dtype", LAUNCH, "dh.new_empty(factors.numel(), dtype=torch.float32)",
           "dh.new_empty(factors.numel())"),
    Mutant("made: the gradient in its own dtype", MADE, "gradient.to(dtype)", "gradient",
           note="equivalent on a CPU, where autograd casts it"),
    Mutant("made: the kernels' in its own dtype", MADE, "da.to(inputs[0].dtype).contiguous()", "da.contiguous()",
           note="equivalent in the suite, whose da has the inputs' dtype where the kernels run"),
    Mutant("made: halves the other way round", MADE, "else inputs[0].chunk(2, -1)", "else inputs[0].chunk(2, -1)[::-1]"),
    Mutant("made: factors in the gradient twice", MADE, "(a.to(wide) * da).sum(-1))", "(a.to(wide) * da * each).sum(-1))"),
    Mutant("made: the gradient without factors", MADE, "(gradients(da * each), ", "(gradients(da), "),
    Mutant("made: activations in place", MADE, " and not getattr(act, \"inplace\", False)", ""),
    Mutant("made: activations that hold something", MADE, " and kind.__name__ in ACTIVATIONS", ""),
    Mutant("node: the product in gate's dtype", NODE, "h = gate(*inputs).to(dtype)", "h = gate(*inputs)"),
    Mutant("node: the product made again in gate's dtype", NODE, "h = h.to(dtype) if needs[0] else None", "h = h"),
    Mutant("node: y as it is made", NODE, "return y.to(up.dtype) if layer.make is not None else y", "return y"),
    Mutant("node: hooks of the activation in the backward pass", NODE, "functools.partial(_product, act.forward)",
           "functools.partial(_product, act)"),
    Mutant("node: past a hook of the down projection", NODE, "if hooked(down) or ", "if "),
    Mutant("node: past a hook of the activation", NODE, " or hooked(act)", ""),
    Mutant("node: past hooks of all modules", NODE, " or hooks_of_all()", ""),
    Mutant("node: of any activation by now", NODE, " or not elementwise(act):", ":"),
    Mutant("node: under a compiler", NODE, "if ops.watched() or not", "if not",
           note="equivalent: whether torch looks on is asked of the projection, too (`seen`), but later, in a trace"),
    Mutant("node: without a graph", NODE, " or not torch.is_grad_enabled()", "", note="equivalent: `recorded` asks the same"),
    Mutant("node: gate and up frozen", NODE, "recorded(any(t.requires_grad for t in inputs))", "recorded(True)"),
    Mutant("node: what is not contiguous", NODE, "type(t) in PLAIN and t.is_contiguous()", "type(t) in PLAIN"),
    Mutant("node: halves that are none", NODE, " or up.shape[-1] * 2 != one.shape[-1] * len(inputs)", ""),
    Mutant("node: a weight made once", NODE, "        if layer.make is not None:\n            weight = made_of(layer.make, dy",
           "        if False:\n            weight = made_of(layer.make, dy"),
    Mutant("node: of any parts", NODE, "not all(parts) or len(set(parts)) < len(parts) or not", "not"),
    Mutant("node: of one that does more", NODE, "return None if known else result", "return result"),
    Mutant("node: of another x", NODE, " or not all(isinstance(e, ast.Name) and e.id == x for e in of)", ""),
    Mutant("node: up before gate", NODE, " or (inner.lineno, inner.col_offset) > (right.lineno, right.col_offset)", ""),
    Mutant("node: of a sum", NODE, "ast.BinOp(left, ast.Mult(), right)", "ast.BinOp(left, _, right)"),
    Mutant("node: of the other half", NODE, " and (inner.which, right.which) == (0, 1)", ""),
    Mutant("node: halves of two", NODE, " and inner.of is right.of", ""),
    Mutant("node: of three", NODE, "\"chunk\"), [ast.Constant(2)]", "\"chunk\"), [ast.Constant()]"),
    Mutant("node: halves of the tokens", NODE, "ast.keyword(\"dim\", ast.UnaryOp(ast.USub(), ast.Constant(1)))", "ast.keyword(\"dim\")"),
    Mutant("node: of any number of arguments", NODE, " or len(inspect.signature(forward).parameters) != 2", ""),
    Mutant("node: of what is wrapped", NODE, " or hasattr(forward, \"__wrapped__\")", ""),
    Mutant("node: of what is made and lost", NODE, " or known.keys() & new.keys()", ""),
    Mutant("node: an argument that is something else by then", NODE, "arguments & set(new) or ", ""),
    Mutant("node: of a forward that was replaced", NODE, "if kind._kind.forward is not kind._forward:", "if False:"),
    Mutant("node: without an adapter", NODE, " and hasattr(type(module._modules[found.down]), \"_shares\")", ""),
    Mutant("node: past accelerate's forward", NODE, "\"forward\" in module.__dict__ or sharding(module)", "sharding(module)"),
    Mutant("node: of what is sharded", NODE, "\"forward\" in module.__dict__ or sharding(module)", "\"forward\" in module.__dict__"),
    Mutant("node: a sharded one undone", NODE, "(\"_kind\" not in vars(kind) or \"forward\"", "(False or \"forward\""),
    Mutant("node: a copy of another class", NODE, "return _empty, (type(self)._kind,)", "return _empty, (nn.Linear,)"),
    Mutant("node: a copy of what was compiled", NODE, "(type(self)._kind,), self.__getstate__()", "(type(self)._kind,), self.__dict__"),
    Mutant("node: an argument called x", NODE, "co_varnames=(\"self\", names.x)", "co_varnames=(\"self\", \"x\")"),
]  # fmt: skip

MIXTURES = [
    Mutant("half: dA of what has no factor", EXPERTS, "gate.again((h,), need_A, weights)", "gate.again((h,), need_A, torch.ones_like(weights))"),
    Mutant("half: dB of u without weights", EXPERTS, "(u * weights.reshape(-1, 1)).to(u.dtype)", "u"),
    Mutant("half: without the bias", EXPERTS, "    if bias is None:\n        return dots\n    of_all", "    return dots\n    of_all"),
    Mutant("half: the last expert's bias for none", EXPERTS, "torch.where(ids < 0, 0, of_all", "torch.where(ids < -1, 0, of_all"),
    Mutant("half: a gate that writes", EXPERTS, "if h._version != before:", "if False:"),
    Mutant("half: autocast of the backward pass", EXPERTS, "dtype=ctx.autocast, enabled=ctx.autocast is not None",
           "dtype=ctx.autocast, enabled=False"),
    Mutant("half: the stack under autocast", EXPERTS, "        with without_autocast(h.device):\n            y, u =", "        if True:\n            y, u ="),
    Mutant("half: dropout outside of training", EXPERTS, "p = float(p) if training else 0.0", "p = float(p)"),
    Mutant("half: past hooks", "experts.py", " or any(map(hooked, within))", ""),
    Mutant("half: past hooks of all modules", "experts.py", "hooks_of_all() or ", ""),
    Mutant("half: past what is trained", "experts.py", " or any(p.requires_grad for module in within for p in module.parameters())", ""),
    Mutant("half: of what is normed", "experts.py", "if normed or _of_its_own", "if _of_its_own"),
    Mutant("half: any gate by the kernels", "experts.py", "kernel_of(experts.act_fn, h) if theirs else \"\"", "kernel_of(experts.act_fn, h)"),
    Mutant("half: nothing trained", EXPERTS, "not recorded(trained) or ", ""),
    Mutant("half: y of the weights' order alone", EXPERTS, "if on_a_gpu(y) and not torch.is_grad_enabled():", "if on_a_gpu(y):"),
    Mutant("half: tokens beside each other", EXPERTS, "repeat_interleave(weights.shape[1], 0)", "repeat(weights.shape[1], 1)"),
]  # fmt: skip

LAYOUTS = [
    Mutant("layouts: with dt and without", "launch_columns.py", "_layout(matrix(rows), matrix(its), need_dt)",
           "_layout(matrix(rows), matrix(its), True)"),
    Mutant("layouts: gates of any dtype", LAUNCH, "matrices[0].dtype, None if", "None if"),
    Mutant("layouts: factors of any dtype", LAUNCH, "None if factors is None else factors.dtype)", "factors is None)"),
    Mutant("layouts: of any width", LAUNCH, "(matrices[0].shape[-1], *(stride", "(*(stride"),
    Mutant("layouts: of any stride", LAUNCH, "*(stride for _, stride in rows), ", ""),
    Mutant("layouts: sums of any dtype", LAUNCH, "(N, y.dtype, weights.dtype, dtype)", "(N,)"),
]  # fmt: skip

EVERY = [
    *(replace(m, tests="gated") for m in SLIPS),
    *(replace(m, tests="mixtures") for m in MIXTURES),
    *(replace(m, tests="elementwise") for m in LAYOUTS),
]

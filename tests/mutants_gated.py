"""Slips in an MLP whose gate is made again, and in its kernels: met by their own tests."""

from __future__ import annotations

from dataclasses import replace

from mutants import Mutant

GATE, LAUNCH, NODE = "kernels/gate.py", "launch_gate.py", "gated.py"
LOGISTIC = "1 / (1 + tl.exp(-x))"

SLIPS = [
    Mutant("gate: slope of a constant", GATE, "return value, s + value * (1 - s)", "return value, s"),
    Mutant("gate: slope of the inner cube", GATE, "0.134145", "0.044715"),
    Mutant("gate: the logistic of minus x", GATE, f"    s = {LOGISTIC}\n", "    s = 1 / (1 + tl.exp(x))\n"),
    Mutant("gate: product past its end", GATE, "tl.store(h + at, product.to(h.dtype.element_ty), mask=mask)",
           "tl.store(h + at, product.to(h.dtype.element_ty))"),
    Mutant("gate: gradients past their end", GATE, "slope).to(dgate.dtype.element_ty), mask=mask)", "slope).to(dgate.dtype.element_ty))"),
    Mutant("gate: dup of the slope", GATE, "(its_dh * value)", "(its_dh * slope)"),
    Mutant("gate: dgate without up", GATE, "its_dh * its_up * slope", "its_dh * slope"),
    Mutant("gate: blocks that overlap", GATE, "program_id(0).to(tl.int64) * BLOCK", "program_id(0).to(tl.int64) * (BLOCK // 2)", count=2),
    Mutant("gate: dup beside dh", LAUNCH, "return dgate, dh", "return dgate, dh.clone()"),
    Mutant("node: A's gradient of up", NODE, "h = h.to(dtype) if needs[0] else None", "h = up.to(dtype) if needs[0] else None"),
    Mutant("node: dX in the product's dtype", NODE, "gradients(dh.to(gate.dtype).contiguous())", "gradients(dh.contiguous())",
           note="equivalent on a CPU, where autograd casts it; the kernels would round dup to it"),
    Mutant("node: the product in gate's dtype", NODE, "product(kernel, gate, up)).to(dtype)", "product(kernel, gate, up))"),
    Mutant("node: y as it is made", NODE, "return y.to(up.dtype) if layer.make is not None else y", "return y"),
    Mutant("node: hooks of the activation in the backward pass", NODE, "h = act.forward(leaves[0])", "h = act(leaves[0])"),
    Mutant("node: past a hook of the down projection", NODE, "if hooked(down) or ", "if "),
    Mutant("node: past a hook of the activation", NODE, " or hooked(act)", ""),
    Mutant("node: past hooks of all modules", NODE, " or hooks_of_all()", ""),
    Mutant("node: of any activation by now", NODE, " or not _elementwise(act):", ":"),
    Mutant("node: under a compiler", NODE, "if ops.watched() or not", "if not",
           note="equivalent: whether torch looks on is asked of the projection, too (`seen`), but later, in a trace"),
    Mutant("node: without a graph", NODE, " or not torch.is_grad_enabled()", "", note="equivalent: `recorded` asks the same"),
    Mutant("node: gate and up frozen", NODE, "recorded(gate.requires_grad or up.requires_grad)", "recorded(True)"),
    Mutant("node: a weight made once", NODE, "        if layer.make is not None:\n            weight = made_of(layer.make, dy",
           "        if False:\n            weight = made_of(layer.make, dy"),
    Mutant("node: of any forward", NODE, " and all(found) and len(set(found[:4])) == 4 and not known", " and not known"),
    Mutant("node: of one that does more", NODE, " and not known else None", " else None"),
    Mutant("node: of another x", NODE, "found if its_x and", "found if"),
    Mutant("node: up before gate", NODE, "its_x and first < then and", "its_x and"),
    Mutant("node: of a sum", NODE, " or not isinstance(product.op, ast.Mult)", ""),
    Mutant("node: of any number of arguments", NODE, " or len(inspect.signature(forward).parameters) != 2", ""),
    Mutant("node: of what is wrapped", NODE, " or hasattr(forward, \"__wrapped__\")", ""),
    Mutant("node: of what is made and lost", NODE, " if name not in known:", ":"),
    Mutant("node: of a forward that was replaced", NODE, "if kind._kind.forward is not kind._forward:", "if False:"),
    Mutant("node: activations in place", NODE, " and not getattr(act, \"inplace\", False)", ""),
    Mutant("node: activations that hold something", NODE, " and kind.__name__ in ACTIVATIONS", ""),
    Mutant("node: without an adapter", NODE, " and hasattr(type(module._modules[found.down]), \"_shares\")", ""),
    Mutant("node: past accelerate's forward", NODE, "\"forward\" in module.__dict__ or sharding(module)", "sharding(module)"),
    Mutant("node: of what is sharded", NODE, "\"forward\" in module.__dict__ or sharding(module)", "\"forward\" in module.__dict__"),
    Mutant("node: a sharded one undone", NODE, "(\"_kind\" not in vars(kind) or \"forward\"", "(False or \"forward\""),
    Mutant("node: a copy of another class", NODE, "return _empty, (type(self)._kind,)", "return _empty, (nn.Linear,)"),
    Mutant("node: a copy of what was compiled", NODE, "(type(self)._kind,), self.__getstate__()", "(type(self)._kind,), self.__dict__"),
    Mutant("node: an argument called x", NODE, "co_varnames=(\"self\", names.x)", "co_varnames=(\"self\", \"x\")"),
]  # fmt: skip

LAYOUTS = [
    Mutant("layouts: with dt and without", "launch_columns.py", "_layout(matrix(rows), matrix(its), need_dt)",
           "_layout(matrix(rows), matrix(its), True)"),
    Mutant("layouts: a product of any dtype", LAUNCH, "h.numel(), h.dtype)", "h.numel(), torch.float32)"),
    Mutant("layouts: gradients of any dtype", LAUNCH, "dh.numel(), dh.dtype)", "dh.numel(), torch.float32)"),
    Mutant("layouts: of any number", LAUNCH, "(gate_product, act, h.numel(), ", "(gate_product, act, 0, "),
]  # fmt: skip

EVERY = [*(replace(m, tests="gated") for m in SLIPS), *(replace(m, tests="elementwise") for m in LAYOUTS)]

"""Slips in an MLP whose gate is made again, and in its kernels: met by their own tests."""

from __future__ import annotations

from dataclasses import replace

from mutants import Mutant

GATE, LAUNCH, NODE = "kernels/gate.py", "launch_gate.py", "gated.py"
LOGISTIC = "1 / (1 + tl.exp(-x))"
PLAINLY = "torch.is_grad_enabled() and not ops.watched()"

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
    Mutant("node: A's gradient of up", NODE, "h if need_A else None", "up if need_A else None"),
    Mutant("node: past a hook of the down projection", NODE, " and not hooked(down)", ""),
    Mutant("node: past a hook of the activation", NODE, " and not hooked(act):", ":"),
    Mutant("node: under a compiler", NODE, PLAINLY, PLAINLY.replace(" and not ops.watched()", ""),
           note="equivalent: whether torch looks on is asked of the projection, too (`seen`), but later, in a trace"),
    Mutant("node: without a graph", NODE, PLAINLY, "not ops.watched()", note="equivalent: `recorded` asks the same"),
    Mutant("node: a weight made once", NODE, "        if need_h and layer.make is not None:\n", "        if False:\n"),
    Mutant("node: of any forward", NODE, " and all(found) and len(set(found)) == 4 and not known", " and not known"),
    Mutant("node: of one that does more", NODE, " and not known else None", " else None"),
    Mutant("node: of another x", NODE, "found if all(its_x)", "found if True"),
    Mutant("node: of a sum", NODE, " or not isinstance(product.op, ast.Mult)", ""),
    Mutant("node: of any number of arguments", NODE, " or len(inspect.signature(forward).parameters) != 2", ""),
    Mutant("node: of what is decorated", NODE, " or function.decorator_list:", ":"),
    Mutant("node: of what is made and lost", NODE, " if name not in known:", ":"),
    Mutant("node: activations in place", NODE, " and not getattr(act, \"inplace\", False)", ""),
    Mutant("node: activations that hold something", NODE, " and type(act).__name__ in ACTIVATIONS", ""),
    Mutant("node: without an adapter", NODE, " and hasattr(type(down), \"_shares\")", ""),
    Mutant("node: past accelerate's forward", NODE, "\"forward\" in module.__dict__ or sharding(module)", "sharding(module)"),
    Mutant("node: a copy of another class", NODE, "return _empty, (self._kind,", "return _empty, (nn.Linear,"),
]  # fmt: skip

LAYOUTS = [
    Mutant("layouts: with dt and without", "launch_columns.py", "_layout(matrix(rows), matrix(its), need_dt)",
           "_layout(matrix(rows), matrix(its), True)"),
    Mutant("layouts: a product of any dtype", LAUNCH, "h.numel(), h.dtype)", "h.numel(), torch.float32)"),
    Mutant("layouts: gradients of any dtype", LAUNCH, "dh.numel(), dh.dtype)", "dh.numel(), torch.float32)"),
    Mutant("layouts: of any number", LAUNCH, "(gate_product, act, h.numel(), ", "(gate_product, act, 0, "),
]  # fmt: skip

EVERY = [*(replace(m, tests="gated") for m in SLIPS), *(replace(m, tests="elementwise") for m in LAYOUTS)]

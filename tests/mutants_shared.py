"""The slips of `mutation.py` where layers share an x, and all slips together."""

from __future__ import annotations

from dataclasses import replace

from mutants import CHAIN, EXPAND, LAUNCH, LAYOUT, MUTANTS, Mutant

TOGETHER, INPUT = "projections.py", "shared_input.py"

SHARED = [
    Mutant("shared: what y holds is not added", EXPAND, 'if ADD == "first":', 'if ADD == "never":'),
    Mutant("shared: what y holds is not added at last", EXPAND, 'if ADD == "last":', 'if ADD == "never":'),
    Mutant("shared: what y holds is added by each part", EXPAND, "if part == 0:\n            acc +=", "if True:\n            acc +="),
    Mutant("shared: y is not what was given", LAUNCH, "out = out if onto is None else onto", "out = out"),
    Mutant("shared: launched as if dX were not added to", LAUNCH, "matrix(onto), matrix(all_ds)", "matrix(all_ds)"),
    Mutant("shared: dS in parts stays there", LAUNCH, "return out.copy_(z.sum(0)) if", "return out if"),
    Mutant("shared: dS written side by side", LAYOUT, "if out is None or not whole else out[1]", "if True else None"),
    Mutant("shared: dA of the last layer's dS", LAUNCH, "ds if all_ds is None else all_ds", "ds"),
    Mutant("shared: library's dX of one layer", LAUNCH, "as_matrix(onto).addmm_(as_matrix(dy), weight)",
           "torch.mm(as_matrix(dy), weight, out=as_matrix(onto))"),
    Mutant("shared: library's dX added twice", LAUNCH, "_base_gradient(dy, weight, onto), None", "_base_gradient(dy, weight, onto), onto"),
    Mutant("shared: u taken again", LAUNCH, "            if u is None:\n", "            if True:\n"),
    Mutant("shared: u of a scale of 1", LAUNCH, "scale=scale, adapters=adapters, dropout=None", "adapters=adapters, dropout=None, scale=1"),
    Mutant("shared: torch arm's dX of one layer", CHAIN, " if onto is None else onto.addmm_(dy, weight)", ""),
    Mutant("shared: torch arm's dA of the last dS", CHAIN, "ds if all_ds is None else all_ds", "ds"),
    Mutant("shared: torch arm's dS not handed out", CHAIN, "ds.copy_(own)", "pass"),
    Mutant("shared: torch arm's dX of a part of dS", CHAIN, "ds = own  #", "ds = own if ds is None else ds  #"),
    Mutant("shared: torch arm's scale on the device", CHAIN, "u if adapters.scales is None else u.mul_(adapters.scales)", "u"),
    Mutant("shared: one u for all scales", TOGETHER, "layer.scale != one.scale or ", ""),
    Mutant("shared: one u for all scales on the device", TOGETHER, "layer.adapters.scales is not one.adapters.scales or ", ""),
    Mutant("shared: one u for all masks", TOGETHER, "if layer.p or ", "if "),
    Mutant("shared: one u for all dtypes", TOGETHER, " or A.dtype != As[0].dtype", ""),
    Mutant("shared: one u of any rank", TOGETHER, "if ends[-1] <= MAX_RANK", "if ends[-1]", note="equivalent: the same sums"),
    Mutant("shared: u for who makes its own", TOGETHER, 'config is None or config.expand.u == "given"', "True"),
    Mutant("shared: u always taken together", TOGETHER, "(len(layers) - 1) * tokens(x) > 2", "True or 2"),
    Mutant("shared: u in parts for wgrad", TOGETHER, "keep = any(save) or any(", "keep = any("),
    Mutant("shared: dA of layers without dY", TOGETHER, "len(live) == len(layers) and ", ""),
    Mutant("shared: dA where one is frozen", TOGETHER, " and all(need[1] for need in needs)", ""),
    Mutant("shared: dA before the last dS", TOGETHER, "need_A = i == live[-1]", "need_A = i == live[0]"),
    Mutant("shared: dX of the last layer", TOGETHER, "dict(onto=dx)", "dict(onto=None)"),
    Mutant("shared: no bias gradient", TOGETHER, "as_matrix(dy).sum(0) if need_bias else None", "None"),
    Mutant("shared: dX without leading sizes", TOGETHER, "its_dx.dim() != dys[i].dim()", "False"),
    Mutant("shared: seeds of one layer", TOGETHER, "as_seed(each.seed", "as_seed(checked[0].seed"),
    Mutant("shared: drops outside training", TOGETHER, "float(each.dropout_p) if training else 0.0", "float(each.dropout_p)"),
    Mutant("shared: x kept for nobody", TOGETHER, "x if any(need[1] for need in needs) else None", "x"),
    Mutant("shared: a graph for what is frozen", TOGETHER, "if not any(need)))", "if False))"),
    Mutant("input: of any x", INPUT, "made.x is x and ", ""),
    Mutant("input: in any state", INPUT, "made.state == state and ", ""),
    Mutant("input: of any parameters", INPUT, " and result.stamp == _stamp(own)", ""),
    Mutant("input: it ends when recomputed", INPUT, "layer in self.ended if recomputed else self._ends(layer)", "self._ends(layer)"),
    Mutant("input: recomputed calls count", INPUT, "made is not None and not recomputed", "made is not None"),
    Mutant("input: a call that ends is not told", INPUT, "self.ended.add(layer)", "pass"),
    Mutant("input: of parameters of any version", INPUT, "t._version, t.shape", "t.shape"),
    Mutant("input: of parameters at any place", INPUT, "(t.data_ptr(), t._version", "(t._version"),
    Mutant("input: trained or not", INPUT, ", t.requires_grad)", ")"),
    Mutant("input: of an x that was written to", INPUT, "return x._version, ", "return "),
    Mutant("input: with or without a graph", INPUT, "torch.is_grad_enabled(), autocast", "autocast"),
    Mutant("input: under any autocast", INPUT, "torch.is_grad_enabled(), autocast", "torch.is_grad_enabled()"),
    Mutant("input: a copy has the other's results", INPUT, '{**self.__dict__, "made": None}', "dict(self.__dict__)"),
    Mutant("input: a replica leads", INPUT, "if layer not in members:", "if False:"),
    Mutant("input: it never ends", INPUT, "self.idle > 1", "self.idle > 9", 2),
    Mutant("input: it ends at once", INPUT, "self.idle > 1", "self.idle > 0", 2),
    Mutant("input: strays are counted for ever", INPUT, "                    self.idle = 0\n", "                    pass\n"),
    Mutant("input: the third layer's result is dropped", INPUT, "self.made = made\n                else", "pass\n                else"),
    Mutant("input: in inference mode", INPUT, " or x.is_inference()", ""),
    Mutant("input: few tokens without a gradient", INPUT, "seen(x, [own]) or few or", "seen(x, [own]) or"),
    Mutant("input: seeds drawn early", INPUT, "    generator.set_state(states[1])\n", ""),
    Mutant("input: seeds not drawn", INPUT, "    generator.set_state(after)\n", ""),
    Mutant("input: seeds of an earlier state", INPUT, "if not torch.equal(generator.get_state(), before):", "if False:"),
    Mutant("input: where torch looks on", INPUT, "if seen(x, [own]) or few", "if few"),
]  # fmt: skip

EVERY = [*MUTANTS, *(replace(m, tests="shared") for m in SHARED)]

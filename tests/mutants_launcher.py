"""The slips of `mutation.py` where what was worked out for one call serves another, and all slips together."""

from __future__ import annotations

from dataclasses import replace

import mutants_serving
from mutants import SPEED, Mutant

LAUNCHER, OPERANDS, DISPATCH, CONFIG = "launcher.py", "operands.py", "dispatch.py", "tuning/config.py"
CALL = "aligned(*operands), many(adapters), dropout, device, impl, key, interpreting())"

LAUNCHED = [
    Mutant("launcher: any address", OPERANDS, "t.data_ptr() % 16 == 0", "True"),
    Mutant("launcher: whatever is there", LAUNCHER, "if arg is None or isinstance(", "if isinstance("),
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
    Mutant("config: another process's hash", CONFIG, 'if name != "_hash"}', "if True}"),
]  # fmt: skip

EVERY = [*mutants_serving.EVERY, *(replace(m, tests="launcher") for m in LAUNCHED)]

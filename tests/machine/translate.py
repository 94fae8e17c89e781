"""Each basic block -> one Python function over vectors of all threads of a program.

A register is an unsigned vector, one element a thread (or a scalar that all share), a predicate a vector of bool; signed and floating
point instructions view their bits. The function's arguments are R, the registers, m, the mask of the threads that run it (None: all),
and c, the program. It returns where they go: (next block, other block, condition for it). What is not known here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import arithmetic, matrices
from .ptx import Statement, Text, names

SHARED_BASE = 1024  # where shared memory begins: address 0 is valid nowhere
IGNORED = (
    "bar.warp.sync", "fence.", "wgmma.fence", "membar", "prefetch", "mbarrier.inval", "setmaxnreg", "nanosleep",
)  # fmt: skip
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNARY = {"neg": "-", "not": "~", "abs": "abs", "ex2": "np.exp2"}
BITWISE = {"and": "&", "or": "|", "xor": "^"}
BARE = {"bf16x2": "b32", "f16x2": "b32", "bf16": "b16", "tf32": "b32"}  # what NumPy has no type for is bits
END = -1


@dataclass
class Kernel:
    """What a program runs: ``blocks`` of functions, and the width in bits of each register."""

    text: Text
    blocks: list[Callable]
    spins: list[bool]
    widths: list[int]

    @property
    def name(self) -> str:
        return self.text.name


def kernel(text: Text) -> Kernel:
    return _Translator(text).kernel()


def dtype_of(kind: str) -> str:
    """NumPy's name of a PTX type."""
    kind = BARE.get(kind, kind)
    return "bool_" if kind == "pred" else {"b": "uint", "u": "uint", "s": "int", "f": "float"}[kind[0]] + kind[1:]


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(BARE.get(kind, kind)[1:])


class _Translator:
    def __init__(self, text: Text):
        self.text = text
        self.places: dict[str, int] = {}
        self.constants: dict[tuple, str] = {}
        self.space: dict = {"np": np, "A": arithmetic, "M": matrices}

    def kernel(self) -> Kernel:
        lines: list[str] = []
        for number, block in enumerate(self.text.blocks):
            lines.append(f"def block_{number}(R, m, c):")
            for s in block.body:
                lines += [f"    c.line = {s.line}", *("    " + line for line in self.statement(s, number))]
            lines.append(f"    return {number + 1}, None, None")
        exec(compile("\n".join(lines), f"<{self.text.name}>", "exec"), self.space)
        blocks = [self.space[f"block_{number}"] for number in range(len(self.text.blocks))]
        widths = [self.width(register) for register in self.places]
        return Kernel(self.text, blocks, [b.spins for b in self.text.blocks], widths)

    def statement(self, s: Statement, number: int) -> list[str]:
        guard = [f"p = {'~' if s.negated else ''}{self.slot(s.guard)}", "g = p if m is None else p & m"] if s.guard else ["g = m"]
        try:
            if s.op.startswith(IGNORED):
                return []
            if s.ends_block:
                return guard + self.ending(s, number)
            family = getattr(self, "family_" + s.op.split(".")[0], None)
            if family is not None and not (s.op.startswith("mov") and "{" not in "".join(s.operands)):
                return guard + family(s, s.op.split(".")[1:], s.operands)
            return guard + [self.write(s, s.operands[0], self.expression(s, s.op.split(".")))]
        except NotImplementedError as error:
            raise NotImplementedError(f"{self.text.name}, line {s.line}: {s.text}: {error}") from None

    # Operands

    def width(self, register: str) -> int:
        if register in self.text.widths:
            return self.text.widths[register]
        return self.text.prefixes[register.rstrip("0123456789")]

    def is_register(self, operand: str) -> bool:
        return operand in self.text.widths or operand.rstrip("0123456789") in self.text.prefixes

    def slot(self, register: str) -> str:
        return f"R[{self.places.setdefault(register, len(self.places))}]"

    def constant(self, value: int, dtype: str) -> str:
        name = self.constants.setdefault((value, dtype), f"K{len(self.constants)}")
        if dtype == "bool_":
            self.space[name] = np.bool_(value)
        else:
            bits = 8 * np.dtype(dtype).itemsize
            self.space[name] = np.dtype(f"uint{bits}").type(value % (1 << bits)).view(dtype)
        return name

    def read(self, operand: str, kind: str) -> str:
        """The code of an operand's value, viewed as a PTX type."""
        dtype, bits = dtype_of(kind), bits_of(kind)
        as_kind = "" if dtype.startswith("uint") or kind == "pred" else f".view(np.{dtype})"
        if self.is_register(operand):
            cut = "" if self.width(operand) == bits else f".astype(np.uint{bits})"
            return self.slot(operand) + cut + as_kind
        if re.match(r"%(laneid|(n?tid|n?ctaid)\.[xyz])$", operand):
            cut = "" if bits == 32 else f".astype(np.uint{bits})"
            return f"c.special[{operand!r}]" + cut + as_kind
        if operand == "global_smem":
            return self.constant(SHARED_BASE, dtype)
        if operand in self.text.params:
            return f"c.param_address({self.text.params[operand]})"
        if found := re.match(r"0[fFdD]([0-9A-Fa-f]+)$", operand):
            return f"np.uint{bits}({int(found[1], 16)})" + as_kind
        if re.match(r"-?(0x[0-9A-Fa-f]+|\d+)U?$", operand):
            return self.constant(int(operand.rstrip("U"), 0), dtype)
        raise NotImplementedError(f"operand {operand!r} as {kind}")

    def address(self, operand: str) -> str:
        base, _, offset = (part.strip() for part in operand.strip("[] ").partition("+"))
        shift = int(offset or 0)
        if base == "global_smem":
            return self.constant(SHARED_BASE + shift, "uint64")
        code = self.read(base, f"u{self.width(base)}")
        return f"({code} + {self.constant(shift, f'uint{self.width(base)}')})" if shift else code

    def write(self, s: Statement, register: str, code: str) -> str:
        if register == "_":
            return code
        slot = self.slot(register)
        return f"{slot} = np.where(g, {code}, {slot})" if s.guard else f"{slot} = {code} if m is None else np.where(m, {code}, {slot})"

    def writes(self, s: Statement, registers: list[str]) -> list[str]:
        return [self.write(s, register, f"v[{i}]") for i, register in enumerate(registers)]

    def vector(self, registers: list[str], kind: str = "b32") -> str:
        return "[" + ", ".join(self.read(register, kind) for register in registers) + "]"

    # Where threads go

    def ending(self, s: Statement, number: int) -> list[str]:
        head, o = s.op.split(".")[0], s.operands
        if head in ("bra", "ret", "exit"):
            to = self.text.labels[o[0]] if head == "bra" else END
            return [f"return {number + 1}, {to}, p" if s.guard else f"return {to}, None, None"]
        if head == "trap":
            return ["c.trap(g)", f"return {number + 1}, None, None"]
        if s.guard or ("sync" not in s.op and head != "griddepcontrol"):
            raise NotImplementedError(s.op)
        if head == "griddepcontrol":
            return [f"return {number + 1}, 'previous', None"]
        count = self.read(o[1], "u32") if len(o) > 1 else "None"
        return [f"return {number + 1}, (int(np.max({self.read(o[0], 'u32')})), {count}), None"]

    # Arithmetic

    def expression(self, s: Statement, dots: list[str]) -> str:
        head, kind, o = dots[0], dots[-1], s.operands
        if head == "cvt":
            return self.converted(dots[1:], o)
        if kind.startswith(("bf16", "f16")) and head in ("abs", "add", "mul"):
            x, *y = (self.read(n, "b32" if kind.endswith("x2") else "b16") for n in o[1:])
            if head == "abs":
                return f"({x} & {self.constant(0x7FFF7FFF, 'uint32' if kind.endswith('x2') else 'uint16')})"
            return f"A.small_float({'np.add' if head == 'add' else 'np.multiply'}, {x}, {y[0]}, {kind!r})"
        if kind in BARE or (kind[0] == "f" and kind not in ("f32", "f64")):
            raise NotImplementedError(kind)
        bits, signed, floating = bits_of(kind), kind[0] == "s", kind[0] == "f"
        back = f".view(np.uint{bits})" if signed or floating else ""
        wide = f"{'int' if signed else 'uint'}{2 * bits}"

        def a(i: int, as_kind: str = kind) -> str:
            return self.read(o[i], as_kind)

        def widened(i: int) -> str:
            return f"{a(i)}.astype(np.{wide})"

        if head in ("mov", "cvta"):
            return a(1, kind if kind == "pred" else f"u{bits}")
        if head in ("add", "sub"):
            return f"({a(1)} {'+' if head == 'add' else '-'} {a(2)}){back}"
        if head in ("mul", "mad") and "wide" in dots:
            more = f" + {a(3, f'{kind[0]}{2 * bits}')}" if head == "mad" else ""
            return f"({widened(1)} * {widened(2)}{more}).view(np.uint{2 * bits})"
        if head == "mul" and "hi" in dots:
            return f"A.mul_hi({a(1)}, {a(2)})"
        if head == "mul" and (floating or "lo" in dots):
            return f"({a(1)} * {a(2)}){back}"
        if head == "mad" and "lo" in dots:
            return f"({a(1)} * {a(2)} + {a(3)}){back}"
        if head == "fma" and kind == "f32":
            return f"A.fma({a(1)}, {a(2)}, {a(3)})"
        if head in ("div", "rem"):
            return f"({a(1)} / {a(2)}){back}" if floating else f"A.{head}({a(1)}, {a(2)}){back}"
        if head in UNARY:
            return f"({UNARY[head]}({a(1)})){back}"
        if head in ("min", "max"):
            return f"np.{'f' + head if floating else head + 'imum'}({a(1)}, {a(2)}){back}"
        if head in BITWISE:
            return f"({a(1)} {BITWISE[head]} {a(2)})"
        if head in ("shl", "shr"):
            return f"A.{head}({a(1)}, {a(2, 'u32')}){back}"
        if head == "shf":
            return f"A.shf({a(1)}, {a(2)}, {a(3)}, {dots[1]!r}, {'wrap' in dots})"
        if head == "lop3":
            return f"A.lop3({a(1)}, {a(2)}, {a(3)}, {int(o[4], 0)})"
        if head == "bfe":
            return f"A.bfe({a(1)}, {a(2, 'u32')}, {a(3, 'u32')}){back}"
        if head == "bfi":
            return f"A.bfi({a(1)}, {a(2)}, {a(3, 'u32')}, {a(4, 'u32')})"
        if head == "prmt":
            return f"A.prmt({a(1)}, {a(2)}, {a(3)})"
        if head == "popc":
            return f"np.bitwise_count({a(1)}).astype(np.uint32)"
        if head == "clz":
            return f"A.clz({a(1)})"
        if head == "selp":
            return f"np.where({a(3, 'pred')}, {a(1, f'u{bits}')}, {a(2, f'u{bits}')})"
        raise NotImplementedError(s.op)

    def converted(self, dots: list[str], o: list[str]) -> str:
        to, of = [d for d in dots if re.match(r"([usbf]\d+|bf16|tf32)(x2)?$", d)]
        if to in ("bf16x2", "f16x2"):
            round_to = f"A.{to.removesuffix('x2')}"
            return f"A.pair({round_to}({self.read(o[2], 'f32')}), {round_to}({self.read(o[1], 'f32')}))"
        if to == "bf16" and of == "f32":
            return f"A.bf16({self.read(o[1], 'f32')})"
        if to == "f32" and of == "bf16":
            return f"({self.read(o[1], 'b16')}.astype(np.uint32) << np.uint32(16))"
        if to == "tf32":
            return f"A.tf32({self.read(o[1], 'b32')})"
        bits, value = bits_of(to), self.read(o[1], of)
        if of[0] == "f" and to[0] != "f":
            value = f"np.{({'rzi': 'trunc', 'rni': 'rint', 'rmi': 'floor', 'rpi': 'ceil'})[dots[0]]}({value})"
        value = f"{value}.astype(np.{dtype_of(to)}).view(np.uint{bits})"
        return value if self.width(o[0]) == bits else f"{value}.astype(np.uint{self.width(o[0])})"

    def family_setp(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        test, kind = dots[0], dots[-1]
        if kind.startswith(("f", "bf")):
            x, y = (self.read(n, "b" + kind[1:3] if kind == "f16" else kind) for n in o[1:3])
            codes = [f"v[{i}]" for i in range(kind.count("x2") + 1)]
            lines = [f"v = A.compared({test!r}, {kind!r}, {x}, {y})"]
        elif test in COMPARED:
            lines, codes = [], [f"({self.read(o[1], kind)} {COMPARED[test]} {self.read(o[2], kind)})"]
        else:
            raise NotImplementedError(test)
        if len(dots) == 3 and dots[1] in BITWISE:
            codes = [f"({code} {BITWISE[dots[1]]} {self.read(o[3], 'pred')})" for code in codes]
        return lines + [self.write(s, p.strip(), code) for p, code in zip(o[0].split("|"), codes, strict=True)]

    def family_mov(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        """Several registers from one, or one from several."""
        bits = bits_of(dots[-1])
        if o[0][0] == "{":
            whole, into = self.read(o[1], f"u{bits}"), names(o[0])
            each = bits // len(into)
            parts = [f"({whole} >> np.uint{bits}({each * i})).astype(np.uint{each})" for i in range(len(into))]
            return [self.write(s, register, part) for register, part in zip(into, parts, strict=True) if register != "_"]
        parts = names(o[1])
        each = bits // len(parts)
        terms = [f"({self.read(n, f'u{each}')}.astype(np.uint{bits}) << np.uint{bits}({each * i}))" for i, n in enumerate(parts)]
        return [self.write(s, o[0], " | ".join(terms))]

    # Memory

    def family_ld(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        kind, registers = dots[-1], names(o[0])
        if "param" in dots:
            place = self.text.params[o[1].strip("[] ")]
            return [self.write(s, o[0], f"c.param({place}, {bits_of(kind)}, {self.width(o[0])})")]
        order = ", 'acquire'" if "acquire" in dots and "cta" not in dots else ""
        lines = [f"v = c.{self.space_of(dots)}.load({self.address(o[1])}, g, {bits_of(kind) // 8}, {len(registers)}{order})"]
        for i, register in enumerate(registers):
            have = self.width(register)
            signed = f".view(np.{dtype_of(kind)})" if kind[0] == "s" else ""
            cut = "" if have == bits_of(kind) else f"{signed}.astype(np.{'int' if signed else 'uint'}{have}).view(np.uint{have})"
            lines.append(self.write(s, register, f"v[{i}]{cut}"))
        return lines

    def family_st(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        bits = bits_of(dots[-1])
        return [f"c.{self.space_of(dots)}.store({self.address(o[0])}, g, {bits // 8}, {self.vector(names(o[1]), f'u{bits}')})"]

    def family_atom(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        what = next(d for d in dots if d in ("add", "exch", "cas", "max", "min", "or", "and", "xor"))
        order = next((d for d in dots if d in ("acquire", "release", "acq_rel") and "cta" not in dots), "relaxed")
        values, memory, bits = [names(operand) for operand in o[2:]], self.space_of(dots), bits_of(dots[-1])
        count, lines = len(values[0]), [f"at = {self.address(o[1])}", "c.atomics += 1"]
        if count > 1:
            lines.append(f"c.{memory}.load(at, g, {bits // 8}, {count})")  # whose alignment is that of a vector
        for i, register in enumerate(names(o[0]) if o[0] != "_" else ["_"] * count):
            at = f"at + {self.constant(bits // 8 * i, 'uint64')}" if i else "at"
            read = ", ".join(self.read(each[i], dots[-1]) for each in values)
            lines += [f"v = c.{memory}.atomic({at}, g, {what!r}, np.{dtype_of(dots[-1])}, {order!r}, {read})", self.write(s, register, "v")]
        return lines

    def family_red(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        return self.family_atom(s, dots, ["_", *o])

    def space_of(self, dots: list[str]) -> str:
        return "shared_memory" if any(d.startswith("shared") for d in dots) else "global_memory"

    def family_cp(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        op = s.op
        if op.startswith("cp.async.bulk.tensor.2d.shared"):
            inside = re.match(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", o[1])
            x, y = (self.read(n, "s32") for n in names(inside[2]))
            return [f"c.tensor_copy({self.address(o[0])}, {self.read(inside[1], 'u64')}, {x}, {y}, {self.address(o[2])}, g)"]
        if op == "cp.async.commit_group":
            return ["c.copies.commit()"]
        if op == "cp.async.wait_group":
            return [f"c.copies.wait({int(o[0])})"]
        if op.startswith(("cp.async.ca", "cp.async.cg")):
            size = int(o[2], 0)
            read = self.read(o[3], "u32") if len(o) > 3 else f"np.uint32({size})"
            return [f"c.copy({self.address(o[0])}, {self.address(o[1])}, {size}, {read}, g)"]
        raise NotImplementedError(op)

    def family_mbarrier(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        if dots[0] == "init":
            return [f"c.barrier_init({self.address(o[0])}, {self.read(o[1], 'u32')}, g)"]
        if "expect_tx" in dots:
            at, count = o[-2:]
            return [f"c.barrier_expect({self.address(at)}, {self.read(count, 'u32')}, {'arrive' in dots}, g)"]
        if dots[0] == "arrive":
            return [f"c.barrier_arrive({self.address(o[1])}, {self.read(o[2], 'u32') if len(o) > 2 else 1}, g)"]
        if "parity" in dots:
            return [self.write(s, o[0], f"c.barrier_passed({self.address(o[1])}, {self.read(o[2], 'u32')}, g)")]
        raise NotImplementedError(s.op)

    def family_griddepcontrol(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        return ["c.let_go(g)"]

    # Warps

    def family_ldmatrix(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        into = names(o[0])
        return [f"v = M.ldmatrix(c, {self.address(o[1])}, {len(into)}, {'trans' in dots}, m)", *self.writes(s, into)]

    def family_stmatrix(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        return [f"M.stmatrix(c, {self.address(o[0])}, {self.vector(names(o[1]))}, {'trans' in dots}, m)"]

    def family_mma(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        shape, kind = next(d for d in dots if d.startswith("m16")), dots[-2]
        if dots[-1] != "f32" or kind not in ("bf16", "f16", "tf32"):
            raise NotImplementedError(s.op)
        a, b, c = (self.vector(names(operand)) for operand in o[1:])
        return [f"v = M.mma(c, {int(shape.split('k')[1])}, {kind!r}, {a}, {b}, {c}, m)", *self.writes(s, names(o[0]))]

    def family_wgmma(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        """Reads and writes its matrices, in registers and in shared memory, as late as it may."""
        if dots[0] == "commit_group":
            return ["c.products.commit()"]
        if dots[0] == "wait_group":
            return [f"c.products.wait({int(o[0])})"]
        n, k = re.match(r"m64n(\d+)k(\d+)", next(d for d in dots if d.startswith("m64"))).groups()
        into, flags = names(o[0]), [int(f) for f in o[4:]]
        if flags[:2] != [1, 1] or dots[-1] not in ("bf16", "f16", "tf32"):
            raise NotImplementedError(s.op)
        transposed = [0, 0, *flags[2:]][-2:]
        registers = o[1][0] == "{"
        a = self.vector(names(o[1])) if registers else self.read(o[1], "u64")
        add = self.read(o[3], "pred") if self.is_register(o[3]) else f"np.bool_({int(o[3])})"
        given = f"m=m, b={self.read(o[2], 'u64')}, add={add}" + ("" if registers else f", a={a}")
        call = f"v = M.wgmma(c, {n}, {k}, {dots[-1]!r}, {self.vector(into)}, {a if registers else 'a'}, b, add, {transposed}, m)"
        return [f"def later({given}):", *("    " + line for line in (call, *self.writes(s, into))), "c.products.add(later)"]

    def family_shfl(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        return [
            f"v = M.shuffle(c, {dots[1]!r}, {', '.join(self.read(n, 'u32') for n in o[1:4])})",
            *self.writes(s, re.split(r"\s*\|\s*", o[0])),
        ]

    def family_redux(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        return [self.write(s, o[0], f"M.reduced(c, {dots[1]!r}, {self.read(o[1], dots[-1])}).view(np.uint32)")]

    def family_elect(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        d, p = re.split(r"\s*\|\s*", o[0])
        return [self.write(s, p, "(c.special['%laneid'] == 0)"), self.write(s, d, "np.uint32(0)")]

    def family_vote(self, s: Statement, dots: list[str], o: list[str]) -> list[str]:
        return [self.write(s, o[0], f"M.ballot(c, {self.read(o[1], 'pred')}, m)")]

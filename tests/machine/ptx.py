"""The text of a kernel -> its parameters, registers and basic blocks of statements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENDS = ("bra", "ret", "exit", "trap", "bar", "barrier")  # instructions after which the threads of a program may part or meet
SPINS = ("atom", "mbarrier.try_wait", "mbarrier.test_wait")
STATEMENT = re.compile(r"\s*(?:([{}])|(\.loc[^\n]*|\.file[^\n]*|\.section.*|\.pragma[^\n]*)|([$\w]+):|([^;{}][^;]*);)", re.S)


@dataclass
class Statement:
    """``@guard op operands``; line: of the whole text, from 1."""

    text: str
    line: int
    guard: str = ""
    negated: bool = False
    op: str = ""
    operands: list[str] = field(default_factory=list)

    @property
    def ends_block(self) -> bool:
        return (self.op.split(".")[0] in ENDS and not self.op.startswith("bar.warp")) or self.op == "griddepcontrol.wait"


@dataclass
class Block:
    """Statements that all of a group's threads run; spins: it may be left backwards only to wait for another."""

    body: list[Statement] = field(default_factory=list)

    @property
    def spins(self) -> bool:
        return any(s.op.startswith(SPINS) or ".acquire" in s.op or ".volatile" in s.op for s in self.body)


@dataclass
class Text:
    """``widths``: bits of registers declared by name; ``prefixes``: of those declared as many, such as %r<10>."""

    name: str
    threads: int
    params: dict[str, int]
    blocks: list[Block]
    labels: dict[str, int]
    widths: dict[str, int]
    prefixes: dict[str, int]


def parse(text: str) -> Text:
    """The one kernel of a PTX module."""
    header = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*([^{]*)\{", text, re.S)
    if header is None:
        raise ValueError("text: wanted PTX with an .entry, got none")
    params = {m[1]: i for i, m in enumerate(re.finditer(r"\.param\s[^,]*?(\w+_param_\d+)", header[2]))}
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", header[3])
    found = Text(header[1], int(threads[1]) if threads else 0, params, [Block()], {}, {}, {})
    start = header.end() - 1
    before = text.count("\n", 0, start)
    for statement, line in _statements(text[start : _closing(text, start)]):
        if statement.startswith(":"):
            if found.blocks[-1].body:
                found.blocks.append(Block())
            found.labels[statement[1:]] = len(found.blocks) - 1
        elif statement.startswith(".reg"):
            _declare(found, statement)
        elif not statement.startswith("."):
            s = _instruction(statement, line + before)
            found.blocks[-1].body.append(s)
            if s.ends_block:
                found.blocks.append(Block())
    return found


def names(operand: str) -> list[str]:
    """The registers of ``{%r1, %r2}``, or the one that stands alone."""
    return [n.strip() for n in operand.strip("{}").split(",")]


def _closing(text: str, start: int) -> int:
    """Behind the brace that closes the one at ``start``."""
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise ValueError("text: wanted balanced braces")


def _declare(found: Text, statement: str) -> None:
    _, kind, declared = statement.split(None, 2)
    width = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
    for each in declared.split(","):
        name, _, many = each.strip().partition("<")
        (found.prefixes if many else found.widths)[name] = width


def _instruction(statement: str, line: int) -> Statement:
    s, rest = Statement(statement, line), statement
    if rest.startswith("@"):
        guard, rest = rest.split(None, 1)
        s.negated, s.guard = guard[1] == "!", guard.lstrip("@!")
    s.op, *operands = rest.split(None, 1)
    s.operands = _split(operands[0]) if operands else []
    return s


def _split(text: str) -> list[str]:
    """Operands: split at the commas outside of brackets."""
    if not re.search(r"[{[(]", text):
        return [part.strip() for part in text.split(",")]
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _statements(body: str):
    """(text, line) of each; a name declared in a scope inside, as inline assembly opens them, gets the scope's number."""
    body = re.sub(r"//[^\n]*", "", body)
    scopes: list[dict[str, str]] = []
    count, position, line, counted = 0, 0, 1, 0
    while found := STATEMENT.match(body, position):
        brace, _, label, statement = found.groups()
        begins = found.start(found.lastindex)
        line, counted = line + body.count("\n", counted, begins), begins
        position = found.end()
        if brace == "{":
            count += 1
            inside = body[position : _closing(body, position - 1)] if scopes else ""
            local = re.findall(r"(?:^|[;{\n])\s*([A-Za-z]\w*)\s*:", inside)
            local += [name.strip() for declared in re.findall(r"\.reg\s+\.\w+\s+([^;]*);", inside) for name in declared.split(",")]
            scopes.append({name: f"{name}${count}" for name in local})
        elif brace == "}":
            scopes.pop()
        elif label:
            yield ":" + _renamed(label, scopes), line
        elif statement:
            yield _renamed(statement.strip(), scopes), line


def _renamed(text: str, scopes: list[dict[str, str]]) -> str:
    for scope in filter(None, reversed(scopes)):
        text = re.sub(r"(?<![\w%$.])(" + "|".join(map(re.escape, scope)) + r")(?![\w$])", lambda m, s=scope: s[m[1]], text)
    return text

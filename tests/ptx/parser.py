"""PTX text to instructions: ``parse`` returns a ``Module`` of functions and variables. What a function does is read when somebody asks for
it: of the many kernels in a module a launch runs one.

Names are looked up in the braces that hold them, as PTX scopes them: inline assembly and call sequences declare registers of their own,
and may hide those outside. Every register becomes a number, unique within the module."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from .errors import UnknownInstruction
from .formats import TYPES

# ---- what a module consists of ----


@dataclass(frozen=True)
class Register:
    index: int
    size: int  # bytes; 0 for a predicate


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a floating-point literal."""

    value: int


@dataclass(eq=False)
class Variable:
    name: str
    space: str  # global, const, shared, local, or param
    element: str  # its type, or that of an array's elements
    array: bool
    size: int
    align: int
    data: bytes | None = None  # an initializer
    extern: bool = False  # dynamic shared memory


@dataclass(frozen=True)
class Symbol:
    """The address of a variable."""

    variable: Variable
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: "Register | Symbol | Immediate"
    offset: int


@dataclass(frozen=True)
class Group:
    """``{a, b}`` of a vector access or a packing move, ``d|p``, or the list of a call."""

    items: tuple


@dataclass(frozen=True)
class Not:
    """``!%p``"""

    predicate: Register


@dataclass(frozen=True)
class Name:
    """A label or a function."""

    name: str


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: "Register | Not | None"
    line: int
    text: str


@dataclass
class Function:
    name: str
    parameters: list[Variable]
    results: list[Variable]
    entry: bool
    threads: tuple[int, ...] | None  # .reqntid
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to an index into instructions
    targets: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    variables: list[Variable] = field(default_factory=list)


@dataclass
class Module:
    functions: dict[str, Function]
    variables: dict[str, Variable]
    registers: int = 0
    unread: dict[str, Callable[[], Function]] = field(default_factory=dict)  # by the name of a function

    def function(self, name: str) -> Function:
        """With its instructions."""
        if name in self.unread:
            self.unread[name]()
            del self.unread[name]
        return self.functions[name]


# ---- text ----

_NAME = r"[A-Za-z_$%][\w$]*"
_HEADER = re.compile(
    rf"(?:\.(?:visible|weak|extern)\s+)*\.(?P<kind>entry|func)\b\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>{_NAME})"
    r"\s*(?:\((?P<parameters>[^)]*)\))?(?P<directives>[^{;]*)(?P<end>[{;])"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak)\s+)?(?P<extern>\.extern\s+)?\.(?P<space>global|const|shared|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    rf"\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>{_NAME})"
    r"\s*(?P<array>\[(?P<count>\d*)\])?\s*(?:=\s*(?P<data>.*))?$",
    re.S,
)
_STATEMENT = re.compile(r"(?:@(?P<guard>!?[\w$%]+)\s+)?(?P<opcode>[a-z]\w*)(?P<modifiers>[\w.:]*)\s*(?P<operands>.*)$", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+")
_LABEL = re.compile(rf"\s*({_NAME})\s*:(?!:)")
_RANGE = re.compile(r"([\w$%]*?)(\d+)$")


def parse(text: str) -> Module:
    text = _without_comments(text)
    module = Module({}, {})
    bodies, outside, at = [], [], 0
    while header := _HEADER.search(text, at):
        outside.append(text[at : header.start()])
        at = header.end()
        if header["end"] == "{":  # not a declaration
            at = _closing_brace(text, at)
            bodies.append((header, at - 1))
    for statement in "".join([*outside, text[at:]]).split(";"):
        if match := _VARIABLE.match(statement.strip()):
            variable = _variable(match)
            module.variables.setdefault(variable.name, variable)
        elif statement.strip():
            raise UnknownInstruction(f"not a declaration that the interpreter knows: {statement.strip()[:100]!r}")
    for header, end in bodies:
        parser = _FunctionParser(module, header)
        module.functions[header["name"]] = parser.function
        module.unread[header["name"]] = partial(parser.parse, text, header.end(), end)
    return module


def _without_comments(text: str) -> str:
    """Blanks comments, debug sections and line directives; lines keep their numbers."""

    def blank(match: re.Match) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", blank, text)
    return re.sub(r"^[ \t]*\.(version|target|address_size|loc|file)\b[^\n]*", "", text, flags=re.M)


def _closing_brace(text: str, at: int) -> int:
    """Behind the brace that closes the one before ``at``."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise UnknownInstruction("a brace is never closed")


def _variable(match: re.Match) -> Variable:
    element = TYPES[match["type"]].size
    count = int(match["count"] or 0) if match["array"] else 1
    values = re.findall(r"[^{},\s]+", match["data"] or "")
    data = b"".join((_literal(v) & (1 << 8 * element) - 1).to_bytes(element, "little") for v in values)
    if match["array"] and not match["count"] and values:
        count = len(values)
    size = element * count
    return Variable(
        match["name"],
        match["space"],
        match["type"],
        bool(match["array"]),
        size,
        int(match["align"] or element),
        data.ljust(size, b"\0"),
        bool(match["extern"]),
    )


def _literal(text: str) -> int:
    """``12``, ``-1``, ``0x3FU``; ``0f3F800000`` and ``0d...`` as their bits; ``1.5`` as the bits of a double."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
        return int.from_bytes(struct.pack("<d", float(text)), "little")
    return int(re.sub(r"[uU]$", "", text), 0)


class _Scope:
    """The registers, variables and labels that one pair of braces declares."""

    def __init__(self):
        self.names: dict[str, Register | Variable] = {}
        self.ranges: dict[str, tuple[int, int]] = {}  # prefix of %r<10>: size of a register, and how many


class _FunctionParser:
    def __init__(self, module: Module, header: re.Match):
        threads = re.search(r"\.reqntid\s+([\d, ]+)", header["directives"])
        self.module = module
        self.function = Function(
            header["name"],
            self._parameters(header["parameters"]),
            self._parameters(header["results"]),
            header["kind"] == "entry",
            tuple(map(int, threads[1].split(","))) if threads else None,
        )
        self.scopes = [_Scope()]
        for variable in self.function.parameters + self.function.results:
            self.scopes[0].names[variable.name] = variable

    @staticmethod
    def _parameters(text: str | None) -> list[Variable]:
        return [_variable(_VARIABLE.match(part.strip())) for part in (text or "").split(",") if part.strip()]

    def parse(self, text: str, at: int, end: int) -> Function:
        line, counted = 1, 0
        while at < end:
            if text[at] in "{}":
                self.scopes.append(_Scope()) if text[at] == "{" else self.scopes.pop()
                at += 1
            elif text[at].isspace() or text[at] == ";":
                at += 1
            elif label := _LABEL.match(text, at, end):
                at = label.end()
                if targets := re.compile(r"\s*\.branchtargets\s+([^;]*);").match(text, at):
                    self.function.targets[label[1]] = [name.strip() for name in targets[1].split(",")]
                    at = targets.end()
                elif label[1] in self.function.labels:
                    raise UnknownInstruction(f"the label {label[1]} stands twice in {self.function.name}")
                else:
                    self.function.labels[label[1]] = len(self.function.instructions)
            else:
                stop = text.index(";", at)
                line, counted = line + text.count("\n", counted, at), at
                statement = " ".join(text[at:stop].split())
                try:
                    self._statement(statement, line)
                except (ValueError, TypeError, KeyError) as error:
                    raise UnknownInstruction(f"line {line}: `{statement}`: {error}") from error
                at = stop + 1
        return self.function

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".pragma"):
            pass
        elif match := _VARIABLE.match(text):
            variable = _variable(match)
            variable.data = None  # what a thread or a block sees first is not initialized
            self.scopes[-1].names[variable.name] = variable
            self.function.variables.append(variable)
        elif match := _STATEMENT.match(text):
            guard = self._operand(match["guard"]) if match["guard"] else None
            operands = tuple(self._operand(part) for part in _OPERAND.findall(match["operands"]))
            modifiers = tuple(part for part in match["modifiers"].split(".") if part)
            self.function.instructions.append(Instruction(match["opcode"], modifiers, operands, guard, line, text))
        else:
            raise ValueError("not a statement that the interpreter knows")

    def _registers(self, text: str) -> None:
        declared = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text)
        size, scope = TYPES[declared[1]].size, self.scopes[-1]
        for name in (part.strip() for part in declared[2].split(",")):
            if ranged := re.fullmatch(r"([\w$%]+)<(\d+)>", name):
                scope.ranges[ranged[1]] = (size, int(ranged[2]))
            else:
                scope.names[name] = self._new_register(size)

    def _new_register(self, size: int) -> Register:
        self.module.registers += 1
        return Register(self.module.registers - 1, size)

    def _operand(self, text: str):
        if text[0] in "{(":
            return Group(tuple(self._operand(part) for part in _OPERAND.findall(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1])
        if "|" in text:
            return Group(tuple(self._operand(part) for part in text.split("|")))
        if text[0] == "!":
            return Not(self._operand(text[1:]))
        if text[0].isdigit() or text[0] in "-.":
            return Immediate(_literal(text))
        if text == "_":
            return None
        found = self._lookup(text)
        if found is not None:
            return found
        if match := re.fullmatch(rf"({_NAME})\+(-?\d+)", text):
            return Symbol(self._lookup(match[1]).variable, int(match[2]))
        return Special(text) if text[0] == "%" else Name(text)

    def _address(self, text: str) -> Address:
        base, _, offset = text.replace(" ", "").partition("+")
        operand = self._operand(base)
        if not isinstance(operand, Register | Symbol | Immediate):
            raise ValueError(f"not an address: [{text}]")
        return Address(operand, int(offset or "0", 0))

    def _lookup(self, name: str) -> Register | Symbol | None:
        for scope in reversed(self.scopes):
            if name not in scope.names and (match := _RANGE.match(name)) and match[1] in scope.ranges:
                size, count = scope.ranges[match[1]]
                if int(match[2]) < count:
                    scope.names[name] = self._new_register(size)
            if name in scope.names:
                found = scope.names[name]
                return Symbol(found) if isinstance(found, Variable) else found
        return Symbol(self.module.variables[name]) if name in self.module.variables else None

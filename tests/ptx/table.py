"""The table of instructions that only touch registers: opcode -> a function that turns its modifiers into an ``Operation``.

Every modifier must be asked for, so that a form nobody thought of is an error and never computed as another one."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from .formats import TYPES, Type


class Operation(NamedTuple):
    """``compute`` takes one array per source type and returns one per result type (a bare array for a single result)."""

    results: tuple[Type, ...]
    sources: tuple[Type, ...]
    compute: Callable
    carry_in: bool = False  # compute gets the carry flag as its last argument
    carry_out: bool = False  # compute returns the new carry flag as its last result


class Modifiers:
    """The dotted parts behind an opcode, each to be taken once, and how many operands follow the result."""

    def __init__(self, names: tuple[str, ...], sources: int = 0):
        self.left = list(names)
        self.sources = sources

    def take(self, *names: str) -> str | None:
        """The first of ``names`` that is there, or None."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def type(self) -> Type:
        """The last type that is left: PTX writes that of the sources last."""
        for name in reversed(self.left):
            if name in TYPES:
                self.left.remove(name)
                return TYPES[name]
        raise ValueError("an operand type is missing")

    def done(self) -> None:
        """To be called when all modifiers that are known have been taken."""
        if self.left:
            raise ValueError(f"unknown modifier .{self.left[0]}")

    def drop(self, accept: Callable[[str], bool]) -> None:
        """Modifiers that change nothing here, such as cache hints."""
        self.left = [name for name in self.left if not accept(name)]


OPERATIONS: dict[tuple[str, bool], Callable[[Modifiers], Operation]] = {}  # of (opcode, whether the sources are floats)


def operation(*opcodes: str, floats: bool | None = None):
    """Registers a builder, of the form for floats, of that for integers, or (None) of both.

    One that serves several opcodes gets the opcode as its first argument."""

    def register(build):
        for opcode in opcodes:
            for key in (True, False) if floats is None else (floats,):
                OPERATIONS[opcode, key] = build if len(opcodes) == 1 else partial(build, opcode)
        return build

    return register


@cache
def operation_of(opcode: str, modifiers: tuple[str, ...], sources: int) -> Operation:
    """The operation of an instruction with so many operands behind the result, or ValueError."""
    types = [name for name in modifiers if name in TYPES]
    build = OPERATIONS.get((opcode, bool(types) and TYPES[types[-1]].kind == "f"))
    if build is None:
        raise ValueError("no such opcode in the table")
    left = Modifiers(modifiers, sources)
    found = build(left)
    left.done()
    return found


def same(type_: Type, sources: int, compute: Callable, **carry: bool) -> Operation:
    """The common shape: all operands have one type."""
    return Operation((type_,), (type_,) * sources, compute, **carry)

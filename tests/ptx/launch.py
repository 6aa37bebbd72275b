"""``run``: one launch, from the text of a module to a report."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import floating, integer  # noqa: F401  fill the table of instructions
from .formats import TYPES
from .machine import Machine
from .memory import Buffer, Memory, Store, Traffic
from .parser import Variable, parse
from .program import Program
from .requests import Requests

parse_once = lru_cache(maxsize=32)(parse)


@lru_cache(maxsize=32)
def _machine(ptx_text: str, entry: str) -> Machine:
    return Machine(Program(parse_once(ptx_text), ptx_text, entry))


@dataclass(frozen=True)
class Report:
    """What a launch moved between registers and global memory."""

    loads_of: dict[Buffer, Traffic]
    stores_to: dict[Buffer, Traffic]
    atomics: int  # operations on global and shared memory, not part of the traffic
    executions: dict[int, int]  # of the instructions on each line of the PTX, over all threads
    requests: dict[tuple[int, str], Requests]  # of each load and store, by its line of the PTX and "shared" or "global"

    @property
    def loads(self) -> Traffic:
        """Of all buffers; constants are not counted."""
        return sum((t for b, t in self.loads_of.items() if not b.constant), Traffic())

    @property
    def instructions(self) -> int:
        return sum(self.executions.values())

    @property
    def stores(self) -> Traffic:
        return sum(self.stores_to.values(), Traffic())


def run(
    ptx_text: str,
    entry: str,
    grid,
    block,
    args,
    memory: Memory,
    shared_bytes: int = 0,
    max_steps: int = 2_000_000,
    replicated: bool = False,
) -> Report:
    """Launches the kernel ``entry`` of a module.

    ``grid``, ``block``: one to three sizes. ``args``: per parameter a ``Buffer``, a number, or, for a struct by value, its bytes (or what
    has them: a NumPy record, a ``ctypes.Structure``). ``shared_bytes``: dynamic shared memory per block. ``max_steps``: after so many
    instructions of groups of threads the kernel is taken to hang. ``replicated``: an instruction may store one value to one place in shared
    memory from several warps. CUDA does not promise that one of them does; Triton relies on it where a layout repeats elements.

    Raises a ``PtxError`` at the first fault of the kernel, ``ValueError`` for a launch that cannot be meant."""
    module = parse_once(ptx_text)
    if entry not in module.functions or not module.functions[entry].entry:
        raise ValueError(f"run: entry {entry!r} is none of {[f.name for f in module.functions.values() if f.entry]}")
    function = module.functions[entry]
    grid, block = _three(grid, "grid"), _three(block, "block")
    required = (*(function.threads or block), 1, 1)[:3]
    if required != block:
        raise ValueError(f"run: block {block}, but the kernel was compiled for {required}")
    machine = _machine(ptx_text, entry)
    program = machine.program
    with np.errstate(all="ignore"):
        machine.run(grid, block, _parameters(program, args), memory, shared_bytes, max_steps, replicated)
    executions: dict[int, int] = {}
    for instruction, count in zip(program.code, machine.executions.tolist(), strict=True):
        executions[instruction.line] = executions.get(instruction.line, 0) + count
    return Report(dict(memory.loads), dict(memory.stores), machine.atomics, executions, machine.requests)


def _three(sizes, name: str) -> tuple[int, int, int]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"run: {name} must be one to three positive sizes, got {sizes}")
    return (*sizes, 1, 1)[:3]


def _parameters(program: Program, args) -> Store:
    variables = program.entry.parameters
    if len(args) != len(variables):
        raise ValueError(f"run: {len(variables)} arguments expected, got {len(args)}")
    store = Store("parameters", program.parameter_size, initialized=True)
    for variable, value in zip(variables, args, strict=True):
        offset = program.offset[variable]
        store.data[offset : offset + variable.size] = np.frombuffer(_bytes(variable, value), np.uint8)
    return store


def _bytes(variable: Variable, value) -> bytes:
    type_ = TYPES[variable.element]
    if isinstance(value, Buffer):
        value = value.address
    if not variable.array and isinstance(value, int):
        raw = (
            value.to_bytes(variable.size, "little", signed=value < 0)
            if type_.kind != "f"
            else np.array(value, type_.dtype).tobytes()
        )
    elif not variable.array and isinstance(value, float):
        raw = np.array(value, np.float64 if type_.size == 8 else np.float32).tobytes()
    else:
        raw = bytes(memoryview(value).cast("B")) if not isinstance(value, np.generic) else value.tobytes()
    if len(raw) != variable.size:
        raise ValueError(f"run: {variable.name} has {variable.size} bytes, the argument {len(raw)}")
    return raw

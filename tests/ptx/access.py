"""Loads, stores, atomics and address conversion.

Each function takes the machine and an instruction and returns a handler: called with the threads (lanes) that execute the instruction."""

import numpy as np

from .errors import OutOfBounds
from .formats import RAW, TYPES, U64
from .memory import LONGEST_ACCESS, WINDOW_BITS, WINDOWS
from .parser import Group
from .table import Modifiers

SPACES = ("global", "shared", "local", "param", "const")
_ORDER = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "cta", "cluster", "gpu", "sys")
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")


def without_hints(instruction) -> Modifiers:
    """Which cache to keep a line in, and how strongly an access is ordered, does not change what one thread sees."""
    m = Modifiers(instruction.modifiers)
    m.drop(lambda name: name in _ORDER + _CACHE or name.startswith(("L1::", "L2::")))
    m.left = [name.removesuffix("::cta").removesuffix("::entry").removesuffix("::func") for name in m.left]
    return m


def targets(machine, space: str | None, address: np.ndarray, lanes: np.ndarray):
    """The stores that the addresses lie in: (store, which threads, owner, offset)."""
    if space in ("global", "const"):
        for buffer, chosen, offset in machine.memory.split(address, lanes):
            yield buffer, chosen, 0, offset
    elif space == "shared":
        yield machine.shared, slice(None), machine.block[lanes], address
    elif space == "local":
        yield machine.local, slice(None), lanes, address
    elif space == "param":
        yield machine.parameters, slice(None), 0, address
    else:  # generic
        window = address >> WINDOW_BITS
        for name, number in WINDOWS.items():
            chosen = np.flatnonzero(window == number)
            if chosen.size:
                for store, _, owner, offset in targets(machine, name, address[chosen] & (1 << WINDOW_BITS) - 1, lanes[chosen]):
                    yield store, chosen, owner, offset
        rest = np.flatnonzero(~np.isin(window, list(WINDOWS.values())))
        if rest.size:
            for store, chosen, owner, offset in targets(machine, "global", address[rest], lanes[rest]):
                yield store, rest[chosen], owner, offset


def _shape(instruction, m: Modifiers, data):
    """Element type, the elements of the data operand, and the space, of ``ld`` and ``st``."""
    type_, count = m.type(), int((m.take("v2", "v4", "v8") or "v1")[1:])
    items = data.items if isinstance(data, Group) else (data,)
    if len(items) != count:
        raise ValueError(f"{count} elements expected")
    return type_, items, m.take(*SPACES)


def load(machine, instruction):
    m = without_hints(instruction)
    type_, items, space = _shape(instruction, m, instruction.operands[0])
    constant = bool(m.take("nc"))
    m.done()
    size = type_.size * len(items)
    address, space = machine.address(instruction.operands[1], space)
    writers = [machine.writer(item, type_) for item in items]

    def handler(lanes):
        values, places = np.empty((len(items), lanes.size), RAW[type_.size]), address(lanes)
        machine.request(instruction, space, places, lanes, size)
        for target, chosen, owner, offset in targets(machine, space, places, lanes):
            some = lanes[chosen]
            where = target.locate(owner, offset, size, some, write=False)
            target.on_load(where, size, some, constant)
            for k in range(len(items)):
                values[k, chosen] = target.load(where + k * type_.size, type_.size)
        for write, value in zip(writers, values, strict=True):
            write(lanes, value.view(type_.dtype))

    return handler


def store(machine, instruction):
    m = without_hints(instruction)
    type_, items, space = _shape(instruction, m, instruction.operands[1])
    m.done()
    size = type_.size * len(items)
    address, space = machine.address(instruction.operands[0], space)
    readers = [machine.reader(item, type_) for item in items]

    def handler(lanes):
        values = [np.broadcast_to(read(lanes).view(RAW[type_.size]), lanes.size) for read in readers]
        places = address(lanes)
        machine.request(instruction, space, places, lanes, size)
        for target, chosen, owner, offset in targets(machine, space, places, lanes):
            some = lanes[chosen]
            where = target.locate(owner, offset, size, some, write=True)
            target.on_store(where, size, some)
            for k, value in enumerate(values):
                target.store(where + k * type_.size, value[chosen], some)

    return handler


# ---- atomics ----

_ATOMICS = {
    "add": lambda old, b, c: old + b,
    "min": lambda old, b, c: min(old, b),
    "max": lambda old, b, c: max(old, b),
    "and": lambda old, b, c: old & b,
    "or": lambda old, b, c: old | b,
    "xor": lambda old, b, c: old ^ b,
    "inc": lambda old, b, c: old + 1 if old < b else 0,
    "dec": lambda old, b, c: old - 1 if 0 < old <= b else b,
    "exch": lambda old, b, c: b,
    "cas": lambda old, b, c: c if old == b else old,
}


def atomic(machine, instruction):
    """One thread after the other, in their order. Not part of the checks for races and for two writers."""
    m = without_hints(instruction)
    type_, space, name = m.type(), m.take("global", "shared"), m.take(*_ATOMICS)
    m.done()
    function, operands = _ATOMICS[name], instruction.operands
    write = machine.writer(operands[0], type_) if instruction.opcode == "atom" else None
    place, *inputs = operands[1:] if instruction.opcode == "atom" else operands
    address, space = machine.address(place, space)
    readers = [machine.reader(operand, type_) for operand in inputs]

    def handler(lanes):
        inputs = [np.broadcast_to(read(lanes), lanes.size) for read in readers]
        b, c = inputs[0], inputs[-1]
        before = np.empty(lanes.size, type_.dtype)
        for target, chosen, owner, offset in targets(machine, space, address(lanes), lanes):
            where = target.locate(owner, offset, type_.size, lanes[chosen], write=False)
            words = target.data.view(type_.dtype)
            for i, at in zip(np.arange(lanes.size)[chosen], where // type_.size, strict=True):
                before[i] = words[at]
                words[at] = function(before[i], b[i], c[i])
        machine.atomics += lanes.size
        if write:
            write(lanes, before)

    return handler


# ---- addresses ----


def convert_address(machine, instruction):
    """``cvta``: between a window of the generic address space and what it shows. Global addresses are generic as they are."""
    m = without_hints(instruction)
    to, space, _ = m.take("to"), m.take(*SPACES), m.type()
    m.done()
    read, write = machine.reader(instruction.operands[1], U64), machine.writer(instruction.operands[0], U64)
    base = np.uint64(WINDOWS.get(space, 0) << WINDOW_BITS)

    def handler(lanes):
        address = np.broadcast_to(read(lanes), lanes.size)
        if to and base and (address >> np.uint64(WINDOW_BITS) != WINDOWS[space]).any():
            raise OutOfBounds(f"a generic address that is not in {space} memory", int(lanes[0]))
        write(lanes, address - base if to else address + base)

    return handler


def cache_policy(machine, instruction):
    """``createpolicy`` makes a cache hint."""
    write = machine.writer(instruction.operands[0], TYPES["b64"])
    return lambda lanes: write(lanes, np.zeros(1, np.uint64))


ACCESSES = ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix")


def access_size(instruction) -> int:
    """Bytes of one access of an instruction in ``ACCESSES``."""
    if instruction.opcode == "cp":
        return instruction.operands[2].value if len(instruction.operands) > 2 else LONGEST_ACCESS
    if instruction.opcode.endswith("matrix"):
        return 16
    types = [TYPES[name] for name in instruction.modifiers if name in TYPES]
    vectors = [int(name[1]) for name in instruction.modifiers if name in ("v2", "v4", "v8")]
    return types[-1].size * (vectors[0] if vectors else 1)


HANDLERS = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "cvta": convert_address,
    "createpolicy": cache_policy,
}

"""Instructions that the lanes of a warp execute together: shuffles, votes, matches, reductions, ``bar.warp.sync``.

All lanes that the member mask names must arrive at the very instruction, whatever path they take; lanes that come early wait. A lane that
the mask names and that has ended is an error, as is a value taken from a lane that does not take part."""

import numpy as np

from .errors import WarpError
from .formats import PRED, U32
from .parser import Group
from .table import Modifiers

_ONE = np.uint32(1)


def bits_of(flags: np.ndarray) -> np.ndarray:
    """``(warps, 32)`` booleans as one word per warp."""
    return np.packbits(flags, axis=1, bitorder="little").view(np.uint32)[:, 0]


def shuffle(machine, instruction, pc):
    m = Modifiers(instruction.modifiers)
    m.take("sync"), m.take("b32")
    mode = m.take("up", "down", "bfly", "idx")
    m.done()
    result, value, amount, control, mask = instruction.operands
    write_value, write_inside = _pair(machine, result, U32)
    value, amount, control, mask = (machine.reader(operand, U32) for operand in (value, amount, control, mask))

    def handler(lanes):
        lanes, members = machine.rendezvous(pc, lanes, mask)
        if not lanes.size:
            return lanes
        lane, b, c = machine.lane[lanes].astype(np.int64), amount(lanes).astype(np.int64) & 31, control(lanes).astype(np.int64)
        segment = c >> 8 & 31
        first = lane & segment
        last = first | (c & 31 & ~segment)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        absent = (members >> source.astype(np.uint32) & _ONE == 0) | ~machine.present(lanes)[machine.warp[lanes], source]
        if absent.any():
            i = int(np.argmax(absent))
            raise WarpError(f"takes the value of lane {source[i]}, which does not take part", int(lanes[i]))
        table = machine.by_warp(lanes, value(lanes))
        write_value(lanes, table[machine.warp[lanes], source])
        if write_inside:
            write_inside(lanes, inside)
        return lanes

    return handler


def _pair(machine, operand, type_):
    """Writers for ``d`` or ``d|p``."""
    if isinstance(operand, Group):
        return machine.writer(operand.items[0], type_), machine.writer(operand.items[1], PRED)
    return machine.writer(operand, type_), None


def vote(machine, instruction, pc):
    m = Modifiers(instruction.modifiers)
    m.take("sync"), m.take("pred", "b32")
    kind = m.take("all", "any", "uni", "ballot")
    m.done()
    result, flag, mask = instruction.operands
    flag, mask = machine.reader(flag, PRED), machine.reader(mask, U32)
    write = machine.writer(result, U32 if kind == "ballot" else PRED)

    def handler(lanes):
        lanes, members = machine.rendezvous(pc, lanes, mask)
        if not lanes.size:
            return lanes
        yes = bits_of(machine.by_warp(lanes, flag(lanes)))[machine.warp[lanes]] & members
        everyone = bits_of(machine.present(lanes))[machine.warp[lanes]] & members
        outcome = {"all": yes == everyone, "any": yes != 0, "uni": (yes == everyone) | (yes == 0), "ballot": yes}[kind]
        write(lanes, outcome)
        return lanes

    return handler


def match(machine, instruction, pc):
    """Which lanes hold the value that I hold (``any``), or whether all do (``all``)."""
    m = Modifiers(instruction.modifiers)
    m.take("sync")
    kind, type_ = m.take("any", "all"), m.type()
    m.done()
    result, value, mask = instruction.operands
    write, write_all = _pair(machine, result, U32)
    value, mask = machine.reader(value, type_), machine.reader(mask, U32)

    def handler(lanes):
        lanes, members = machine.rendezvous(pc, lanes, mask)
        if not lanes.size:
            return lanes
        mine = np.broadcast_to(value(lanes), lanes.size)
        row = machine.warp[lanes]
        equal = bits_of((machine.by_warp(lanes, mine)[row] == mine[:, None]) & machine.present(lanes)[row]) & members
        if kind == "all":
            agreed = equal == bits_of(machine.present(lanes))[row] & members
            equal = np.where(agreed, equal, np.uint32(0))
            if write_all:
                write_all(lanes, agreed)
        write(lanes, equal)
        return lanes

    return handler


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduction(machine, instruction, pc):
    m = Modifiers(instruction.modifiers)
    m.take("sync")
    function, type_ = _REDUCTIONS[m.take(*_REDUCTIONS)], m.type()
    m.done()
    result, value, mask = instruction.operands
    write, value, mask = machine.writer(result, type_), machine.reader(value, type_), machine.reader(mask, U32)

    def handler(lanes):
        lanes, members = machine.rendezvous(pc, lanes, mask)
        groups, group = np.unique(machine.warp[lanes].astype(np.uint64) << np.uint64(32) | members, return_inverse=True)
        values = np.broadcast_to(value(lanes), lanes.size)
        totals = np.array([function.reduce(values[group == g], dtype=type_.dtype) for g in range(groups.size)], type_.dtype)
        if lanes.size:
            write(lanes, totals[group])
        return lanes

    return handler


def active_mask(machine, instruction, pc):
    write = machine.writer(instruction.operands[0], U32)
    return lambda lanes: write(lanes, bits_of(machine.present(lanes))[machine.warp[lanes]])


def warp_barrier(machine, instruction, pc):
    """Orders accesses to shared memory among all lanes of a warp; a barrier of some of them is not taken to order any."""
    mask = machine.reader(instruction.operands[0], U32)

    def handler(lanes):
        lanes, members = machine.rendezvous(pc, lanes, mask)
        whole = members & machine.existing[machine.warp[lanes]] == machine.existing[machine.warp[lanes]]
        machine.shared.time[lanes[whole]] += 1
        return lanes

    return handler


HANDLERS = {"shfl": shuffle, "vote": vote, "match": match, "redux": reduction, "activemask": active_mask}

"""Branches, calls, barriers of a block, and the moves that pack and unpack registers."""

import numpy as np

from .errors import BarrierError, Trapped, WarpError
from .formats import PRED, RAW, TYPES, U32
from .memory import FIRST_BUFFER, WINDOW_BITS
from .parser import Group, Name
from .table import Modifiers
from .warp import warp_barrier

NOBODY = np.empty(0, np.int64)


# ---- branches ----


def branch(machine, instruction, pc):
    target = _label(machine, pc, instruction.operands[0].name)

    def handler(lanes):
        machine.arrive(target, lanes)
        return NOBODY

    return handler


def _label(machine, pc: int, name: str) -> int:
    function = machine.program.function_at[pc]
    return machine.program.start[function.name] + function.labels[name]


def branch_indexed(machine, instruction, pc):
    index, table = instruction.operands
    index = machine.reader(index, U32)
    targets = [_label(machine, pc, name) for name in machine.program.function_at[pc].targets[table.name]]

    def handler(lanes):
        chosen = np.broadcast_to(index(lanes), lanes.size)
        if (chosen >= len(targets)).any():
            raise Trapped("an index beyond the list of targets", int(lanes[np.argmax(chosen >= len(targets))]))
        for i, target in enumerate(targets):
            if (chosen == i).any():
                machine.arrive(target, lanes[chosen == i])
        return NOBODY

    return handler


def end(machine, instruction, pc):
    """``ret`` from the entry, and ``exit``."""
    function = machine.program.function_at[pc]
    if instruction.opcode == "ret" and not function.entry:
        return lambda lanes: _return(machine, function, lanes)

    def handler(lanes):
        machine.exited[lanes] = True
        machine.live -= lanes.size
        return NOBODY

    return handler


def trap(machine, instruction, pc):
    def handler(lanes):
        raise Trapped(f"{len(lanes)} threads execute {instruction.opcode}", int(lanes[0]))

    return handler


def nothing(machine, instruction, pc):
    """Fences: lanes execute in one order that all see. Prefetches."""
    return lambda lanes: None


# ---- calls ----


def callee(instruction) -> str:
    return next(operand.name for operand in instruction.operands if isinstance(operand, Name))


def call(machine, instruction, pc):
    name = callee(instruction)
    position = [isinstance(operand, Name) for operand in instruction.operands].index(True)
    before, after = instruction.operands[:position], instruction.operands[position + 1 :]
    outputs, inputs = ([symbol.variable for group in part for symbol in group.items] for part in (before, after))
    if name not in machine.program.functions:
        return _call_of_the_runtime(machine, name, inputs)
    function = machine.program.functions[name]

    def handler(lanes):
        for actual, formal in zip(inputs, function.parameters, strict=True):
            _copy(machine, lanes, actual, formal)
        machine.returns.setdefault(name, np.zeros(machine.lanes, np.int64))[lanes] = pc
        machine.arrive(machine.program.start[name], lanes)
        return NOBODY

    machine.outputs[pc] = outputs
    return handler


def _return(machine, function, lanes):
    origin = machine.returns[function.name][lanes]
    for pc in np.unique(origin):
        some = lanes[origin == pc]
        for formal, actual in zip(function.results, machine.outputs[int(pc)], strict=True):
            _copy(machine, some, formal, actual)
        machine.arrive(int(pc) + 1, some)
    return NOBODY


def _copy(machine, lanes, source, destination):
    start, end = (machine.program.offset[variable] for variable in (source, destination))
    for array in (machine.local.data, machine.local.flags):
        rows = array.reshape(-1, machine.local.stride)
        rows[lanes, end : end + source.size] = rows[lanes, start : start + source.size]


def _call_of_the_runtime(machine, name: str, inputs):
    """``printf`` and a failed ``assert`` end the run, with their text."""

    def handler(lanes):
        first = int(lanes[0])
        at = machine.local.stride * first + machine.program.offset[inputs[0]] if inputs else 0
        text = _string(machine, int(machine.local.data[at : at + 8].view(np.uint64)[0])) if inputs else ""
        what = {"vprintf": "printf", "__assertfail": "a failed assert"}.get(name, f"a call of {name}")
        raise Trapped(f"{what}: {text!r}", first)

    return handler


def _string(machine, address: int) -> str:
    number = (address >> WINDOW_BITS) - FIRST_BUFFER
    if not 0 <= number < len(machine.memory.buffers):
        return "?"
    content = machine.memory.buffers[number].data[address & (1 << WINDOW_BITS) - 1 :]
    return content.tobytes().split(b"\0")[0].decode(errors="replace")


# ---- barriers of a block ----


def barrier(machine, instruction, pc):
    m = Modifiers(instruction.modifiers)
    if m.take("warp"):
        return warp_barrier(machine, instruction, pc)
    m.take("cta"), m.take("aligned")
    operands = instruction.operands
    if m.take("sync") and len(operands) == 1:
        machine.reductions[pc] = None
    elif m.take("red") and len(operands) == 3:
        combine, type_ = m.take("popc", "and", "or"), m.type()
        write, flag = machine.writer(operands[0], type_), machine.reader(operands[2], PRED)
        machine.reductions[pc] = lambda lanes: _reduce(machine, lanes, combine, flag, write)
    else:
        raise ValueError("only barriers of all threads of a block are there")
    m.done()

    def handler(lanes):
        machine.waiting.setdefault(pc, []).append(lanes)
        return NOBODY

    return handler


def _reduce(machine, lanes, combine, flag, write):
    yes = np.broadcast_to(flag(lanes), lanes.size)
    block = machine.block[lanes]
    count, true = np.bincount(block), np.bincount(block, weights=yes).astype(np.int64)
    outcome = {"popc": true.astype(np.uint32), "and": true == count, "or": true > 0}[combine]
    write(lanes, outcome[block])


def release_barriers(machine) -> bool:
    """Nobody can go on: lets go the blocks whose threads have all arrived at one barrier. False when every thread has ended."""
    blocks = machine.lanes // machine.threads
    live = np.bincount(machine.block[~machine.exited], minlength=blocks)
    waiting, machine.waiting = machine.waiting, {}
    for pc, groups in waiting.items():
        lanes = np.sort(np.concatenate(groups))
        arrived = np.bincount(machine.block[lanes], minlength=blocks)
        complete = (arrived == live)[machine.block[lanes]]
        if not complete.all():
            machine.waiting[pc] = [lanes[~complete]]
        if complete.any():
            go = lanes[complete]
            machine.shared.time[go] += 1 << 32
            if machine.reductions[pc]:
                machine.reductions[pc](go)
            machine.arrive(pc + 1, go)
    if not machine.ready:
        _explain_deadlock(machine)
    return bool(machine.ready)


def _explain_deadlock(machine) -> None:
    for pc, groups in machine.parked.items():
        lanes = groups[0]
        first = lanes[0]
        here = machine.lane[lanes[machine.warp[lanes] == machine.warp[first]]].tolist()
        at = machine.code[pc]
        raise WarpError(
            f"lanes {here} wait for lanes that the member mask names and that do not come, "
            f"{machine.describe(first)}, line {at.line}: `{at.text}`"
        )
    for pc, groups in machine.waiting.items():
        lanes = groups[0]
        block = machine.block[lanes[0]]
        here = int(np.count_nonzero(machine.block[lanes] == block))
        live = int(np.count_nonzero(~machine.exited[machine.block == block]))
        at = machine.code[pc]
        raise BarrierError(
            f"{here} of {live} live threads wait, the others are elsewhere, "
            f"{machine.describe(lanes[0])}, line {at.line}: `{at.text}`"
        )


# ---- packing moves ----


def packing_move(machine, instruction):
    """``mov.b64 {a, b}, d`` and back; None for other moves."""
    result, source = instruction.operands
    whole = TYPES[instruction.modifiers[-1]]
    if isinstance(result, Group):
        part = TYPES[f"b{whole.bits // len(result.items)}"]
        read, writers = machine.reader(source, whole), [machine.writer(item, part) for item in result.items]

        def unpack(lanes):
            value = read(lanes)
            for i, write in enumerate(writers):
                write(lanes, (value.view(RAW[whole.size]) >> RAW[whole.size](i * part.bits)).astype(part.dtype))

        return unpack
    if isinstance(source, Group):
        part = TYPES[f"b{whole.bits // len(source.items)}"]
        readers, write = [machine.reader(item, part) for item in source.items], machine.writer(result, whole)

        def pack(lanes):
            value = RAW[whole.size](0)
            for i, read in enumerate(readers):
                value = value | read(lanes).astype(RAW[whole.size]) << RAW[whole.size](i * part.bits)
            write(lanes, value)

        return pack
    return None


HANDLERS = {
    "bra": branch,
    "brx": branch_indexed,
    "ret": end,
    "exit": end,
    "trap": trap,
    "brkpt": trap,
    "call": call,
    "bar": barrier,
    "barrier": barrier,
    "membar": nothing,
    "fence": nothing,
    "prefetch": nothing,
}

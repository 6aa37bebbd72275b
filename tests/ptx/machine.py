"""Executes one launch: every thread of a chunk of blocks is a lane of NumPy arrays.

Lanes that are at the same instruction execute it together. Of the groups, the one with the lowest program counter goes first, and groups
that meet go on as one; for code that a compiler has laid out in order this brings divergent lanes together again where their paths join.
The order is none that a GPU promises, which does not matter to a kernel without races.

Registers hold raw bits, one array each; an array is replaced, never written to, so results may share memory with operands."""

import numpy as np

from . import access, control, requests, tiles, warp
from .errors import PtxError, Trapped, UnknownInstruction, WarpError
from .formats import PRED, RAW, TYPES, Type
from .memory import WINDOW_BITS, WINDOWS, Memory, SharedStore, Store
from .parser import Address, Group, Immediate, Instruction, Not, Register, Special, Symbol, Variable
from .program import Program
from .table import operation_of

LANES_PER_CHUNK = 1 << 14


def joined(groups: list[np.ndarray]) -> np.ndarray:
    """Lanes of several groups, in order."""
    return groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups), kind="stable")


class Machine:
    """Of one program, for any number of launches: what its instructions do is worked out once, when they are first executed."""

    def __init__(self, program: Program):
        self.program, self.code = program, program.code
        self.special: dict[str, np.ndarray] = {}
        self.outputs: dict[int, list[Variable]] = {}  # of the call at a program counter
        self.reductions: dict = {}  # of the barrier at a program counter
        self.handlers: list = [None] * len(self.code)

    # ---- operands ----

    def raw_reader(self, operand, type_: Type):
        """A function from an index into the lanes to values; a constant is an array of one value."""
        if isinstance(operand, Register):
            return self._register_reader(operand, type_)
        if isinstance(operand, Not):
            read = self.raw_reader(operand.predicate, type_)
            return lambda index: ~read(index)
        if isinstance(operand, Special):
            values = self.special  # filled anew for each chunk
            if operand.name not in values:
                raise ValueError(f"the special register {operand.name} is not there")
            return lambda index: (v := values[operand.name])[index if v.size > 1 else slice(None)].astype(type_.dtype)
        if isinstance(operand, Symbol):
            if operand.variable.space in ("global", "const"):
                return lambda index: np.array([self._address_of_global(operand.variable) + operand.offset]).astype(type_.dtype)
            operand = Immediate(self.program.offset[operand.variable] + operand.offset)
        if not isinstance(operand, Immediate):
            raise ValueError(f"cannot read {operand}")
        bits = operand.value & ((1 << type_.bits) - 1 if type_.size else 1)
        constant = np.array([bits], RAW[type_.size or 1]).view(type_.dtype if type_.size else np.bool_)
        return lambda index: constant

    def _register_reader(self, register: Register, type_: Type):
        def read(index):
            values = self.registers[register.index]
            if values is None:  # nobody wrote it: all bits set, NaN as a float
                ones = np.array([-1]).astype(RAW[register.size]) if register.size else np.ones(1, np.bool_)
                values = self.registers[register.index] = np.broadcast_to(ones, self.lanes)
            values = values[index]
            if register.size != type_.size:
                values = values.astype(RAW[type_.size])
            return values.view(type_.dtype)

        if (register.size == 0) != (type_.size == 0):
            raise ValueError("a predicate and a value mixed up")
        return read

    def raw_writer(self, operand, type_: Type):
        """A function that takes an index and values, and widens them to the register."""
        if operand is None:
            return lambda index, values: None
        if not isinstance(operand, Register):
            raise ValueError(f"cannot write to {operand}")
        if operand.size < type_.size:
            raise ValueError(f"a register of {operand.size} bytes for a .{type_.name}")

        def write(index, values):
            if operand.size > type_.size:
                values = values.astype(RAW[operand.size])  # extends the sign of signed integers
            if operand.size:
                values = values.view(RAW[operand.size])
            if isinstance(index, slice):
                self.registers[operand.index] = values if values.size == self.lanes else np.broadcast_to(values, self.lanes)
                return
            before = self.registers[operand.index]
            after = np.full(self.lanes, values.dtype.type(0)) if before is None else before.copy()
            after[index] = values
            self.registers[operand.index] = after

        return write

    def exactly(self, lanes: np.ndarray):
        return slice(None) if lanes.size == self.lanes else lanes

    def reader(self, operand, type_: Type):
        read = self.raw_reader(operand, type_)
        return lambda lanes: read(self.exactly(lanes))

    def writer(self, operand, type_: Type):
        write = self.raw_writer(operand, type_)
        return lambda lanes, values: write(self.exactly(lanes), values)

    def _address_of_global(self, variable: Variable) -> int:
        return self.memory.variable(self.program.key, variable.name, variable.data, variable.space == "const").address

    def address(self, operand: Address, space: str | None):
        """A function from lanes to addresses, and the space they are in."""
        base = operand.base
        if isinstance(base, Symbol):
            space = "local" if base.variable in self.program.in_local else base.variable.space
        type_ = TYPES[f"s{8 * base.size}"] if isinstance(base, Register) else TYPES["s64"]
        read, offset = self.raw_reader(base, type_), type_.dtype(operand.offset)  # the sum wraps around at the register's width
        return lambda lanes: np.broadcast_to(read(self.exactly(lanes)) + offset, lanes.size).astype(np.int64), space

    def request(self, instruction: Instruction, space: str | None, address: np.ndarray, lanes: np.ndarray, size: int) -> None:
        """Counts one access of ``size`` bytes by each of the lanes. Local memory, parameters and constants are not counted."""
        if space is None:
            window = address >> WINDOW_BITS
            for name, chosen in (("shared", window == WINDOWS["shared"]), ("global", window > max(WINDOWS.values()))):
                if chosen.any():
                    self.request(instruction, name, address[chosen], lanes[chosen], size)
        elif space in ("global", "shared") and lanes.size and (size := requests.width(instruction.line, size)):
            key = (instruction.line, space)
            self.requests.setdefault(key, requests.Requests(space, size)).count(self.slot[lanes], address // size * size)

    # ---- execution ----

    def run(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        parameters: Store,
        memory: Memory,
        shared_bytes: int,
        max_steps: int,
        replicated: bool,
    ) -> None:
        self.grid, self.block_shape, self.parameters, self.memory, self.replicated = grid, block, parameters, memory, replicated
        self.shared_size = self.program.shared_size + self.program.dynamic_shared * shared_bytes
        self.threads = int(np.prod(block))
        self.atomics = 0
        self.requests: dict[tuple[int, str], requests.Requests] = {}  # by line and space
        self.executions = np.zeros(len(self.code), np.int64)  # of each instruction, over all threads
        blocks = int(np.prod(self.grid))
        per_chunk = max(1, LANES_PER_CHUNK // self.threads)
        self.steps, self.max_steps = 0, max_steps
        self.memory.begin_launch(self.program.store_granule)
        for first in range(0, blocks, per_chunk):
            self._begin_chunk(first, min(per_chunk, blocks - first))
            while self.ready or control.release_barriers(self):
                self._advance()
        self.memory.end_launch()
        self.registers = []  # the machine stays, what they held need not

    def _begin_chunk(self, first: int, blocks: int) -> None:
        self.lanes = blocks * self.threads
        lanes = np.arange(self.lanes)
        self.block, thread = np.divmod(lanes, self.threads)
        warps_per_block = -(-self.threads // 32)
        self.lane = (thread % 32).astype(np.uint32)
        self.warp = self.block * warps_per_block + thread // 32
        self.slot = self.warp * 32 + self.lane
        self.warps = blocks * warps_per_block
        self.first_block = first
        self.special.update(self._special_registers(first, thread))
        self.registers: list[np.ndarray | None] = [None] * self.program.registers
        self.carry = np.zeros(self.lanes, np.bool_)
        self.local = Store("local memory", self.program.local_size, self.lanes)
        self.shared = SharedStore(blocks, self.shared_size, self.program.shared_granule, self.warp, self.replicated)
        self.memory.begin_chunk(first * self.threads + lanes, self.warp)
        self.exited = np.zeros(self.lanes, np.bool_)
        self.live = self.lanes
        self.existing = warp.bits_of(self.present(lanes))
        self.commits = np.zeros(self.lanes, np.int64)
        self.copies: list = []
        self.returns: dict[str, np.ndarray] = {}
        self.ready: dict[int, list[np.ndarray]] = {0: [lanes]}  # program counter -> groups of lanes
        self.waiting: dict[int, list[np.ndarray]] = {}  # at a barrier of the block
        self.parked: dict[int, list[np.ndarray]] = {}  # at an instruction of the warp

    def _special_registers(self, first: int, thread: np.ndarray) -> dict[str, np.ndarray]:
        (gx, gy, _), (bx, by, _) = self.grid, self.block_shape
        block = first + self.block
        values = {
            "%tid.x": thread % bx,
            "%tid.y": thread // bx % by,
            "%tid.z": thread // (bx * by),
            "%ctaid.x": block % gx,
            "%ctaid.y": block // gx % gy,
            "%ctaid.z": block // (gx * gy),
            "%laneid": self.lane,
            "%warpid": thread // 32,
            "%lanemask_eq": 1 << self.lane.astype(np.int64),
            "%lanemask_lt": (1 << self.lane.astype(np.int64)) - 1,
            "%lanemask_le": (2 << self.lane.astype(np.int64)) - 1,
            "%lanemask_gt": -(2 << self.lane.astype(np.int64)),
            "%lanemask_ge": -(1 << self.lane.astype(np.int64)),
        }
        for i, axis in enumerate("xyz"):
            values[f"%ntid.{axis}"], values[f"%nctaid.{axis}"] = np.array([self.block_shape[i]]), np.array([self.grid[i]])
        return {name: value.astype(np.uint32) for name, value in values.items()}

    def _advance(self) -> None:
        """Runs the group with the lowest program counter until it meets another one, or parts."""
        pc = min(self.ready)
        lanes = joined(self.ready.pop(pc))
        stop = min(self.ready, default=len(self.code))
        while True:
            instruction = self.code[pc]
            self.steps += 1
            self.executions[pc] += lanes.size
            try:
                if self.steps > self.max_steps:
                    raise Trapped(f"not finished after {self.max_steps} steps", int(lanes[0]))
                handler = self.handlers[pc]
                if handler is None:
                    handler = self.handlers[pc] = self._bind(pc, instruction)
                on = handler(lanes)
            except PtxError as error:
                thread = f", {self.describe(error.lane)}" if error.lane is not None else ""
                raise type(error)(f"{error}{thread}, line {instruction.line}: `{instruction.text}`", error.lane) from None
            if on is not None and on is not lanes:  # some went elsewhere
                if on.size:
                    self.arrive(pc + 1, on)
                return
            pc += 1
            if pc >= stop:
                self.arrive(pc, lanes)
                return

    def arrive(self, pc: int, lanes: np.ndarray) -> None:
        self.ready.setdefault(pc, []).append(lanes)

    def describe(self, lane: int) -> str:
        def coordinates(index, shape):
            return f"({index % shape[0]}, {index // shape[0] % shape[1]}, {index // (shape[0] * shape[1])})"

        block, thread = divmod(int(lane), self.threads)
        return f"block {coordinates(self.first_block + block, self.grid)} thread {coordinates(thread, self.block_shape)}"

    def _bind(self, pc: int, instruction: Instruction):
        """A handler: takes lanes, and returns those that go on with the next instruction (None: all of them)."""
        try:
            handler = self._bind_unguarded(pc, instruction)
            if instruction.guard is None:
                return handler
            guard = self.reader(instruction.guard, PRED)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise UnknownInstruction(f"not understood: {error}") from error

        def guarded(lanes):
            chosen = np.broadcast_to(guard(lanes), lanes.size)
            if not chosen.any():
                return None
            if chosen.all():
                return handler(lanes)
            on = handler(lanes[chosen])
            return None if on is None else joined([lanes[~chosen], on])

        return guarded

    def _bind_unguarded(self, pc, instruction):
        if instruction.opcode in control.HANDLERS:
            return control.HANDLERS[instruction.opcode](self, instruction, pc)
        if instruction.opcode in warp.HANDLERS:
            return warp.HANDLERS[instruction.opcode](self, instruction, pc)
        for table in (access.HANDLERS, tiles.HANDLERS):
            if instruction.opcode in table:
                return table[instruction.opcode](self, instruction)
        if instruction.opcode == "mov" and (packing := control.packing_move(self, instruction)):
            return packing
        return self._bind_operation(instruction)

    def _bind_operation(self, instruction):
        first, *operands = instruction.operands
        operation = operation_of(instruction.opcode, instruction.modifiers, len(operands))
        results = first.items if isinstance(first, Group) else (first,)
        if len(operands) != len(operation.sources) or len(results) > len(operation.results):
            raise ValueError(f"{len(operation.sources)} operands expected")
        readers = [self.raw_reader(operand, type_) for operand, type_ in zip(operands, operation.sources, strict=True)]
        writers = [self.raw_writer(result, type_) for result, type_ in zip(results, operation.results, strict=False)]
        compute, several = operation.compute, len(operation.results) > 1

        def plain(lanes):
            index = slice(None) if lanes.size == self.live else lanes  # what ended lanes hold does not matter
            values = compute(*[read(index) for read in readers])
            for write, value in zip(writers, values if several else (values,), strict=False):
                write(index, value)

        def with_carry(lanes):
            index = self.exactly(lanes)
            inputs = [read(index) for read in readers]
            value = compute(*inputs, self.carry[index]) if operation.carry_in else compute(*inputs)
            if operation.carry_out:
                value, self.carry[index] = value
            writers[0](index, value)

        return with_carry if operation.carry_in or operation.carry_out else plain

    # ---- lanes of a warp together ----

    def by_warp(self, lanes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """``(warps, 32)``, zero where a lane is not among ``lanes``."""
        table = np.zeros(self.warps * 32, values.dtype)
        table[self.slot[lanes]] = values
        return table.reshape(-1, 32)

    def present(self, lanes: np.ndarray) -> np.ndarray:
        return self.by_warp(lanes, np.ones(1, np.bool_))

    def rendezvous(self, pc: int, lanes: np.ndarray, mask) -> tuple[np.ndarray, np.ndarray]:
        """Those of the lanes, and of the lanes parked here, whose member masks are complete; and these masks. The rest is parked."""
        lanes = joined([lanes, *self.parked.pop(pc, [])])
        members = np.broadcast_to(mask(lanes), lanes.size)
        stranger = members >> self.lane[lanes] & np.uint32(1) == 0
        if stranger.any():
            raise WarpError("executes what its own member mask does not name it for", int(lanes[np.argmax(stranger)]))
        missing = members & self.existing[self.warp[lanes]] & ~warp.bits_of(self.present(lanes))[self.warp[lanes]]
        if not missing.any():
            return lanes, members
        self.parked[pc] = [lanes[missing != 0]]
        return lanes[missing == 0], members[missing == 0]

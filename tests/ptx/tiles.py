"""Moves of tiles into and out of shared memory: ``cp.async``, ``ldmatrix`` and ``stmatrix``."""

import numpy as np

from .access import targets, without_hints
from .errors import Misaligned, WarpError
from .formats import U32
from .memory import INITIALIZED
from .parser import Group
from .warp import bits_of

# ---- asynchronous copies ----


def copy_async(machine, instruction):
    """``cp.async`` from global to shared memory. Bytes arrive when the thread waits for their group; until then nobody may read them."""
    m = without_hints(instruction)
    if not m.take("async"):
        raise ValueError("only cp.async is there")
    kind = m.take("commit_group", "wait_group", "wait_all")
    m.take("shared"), m.take("global")
    m.done()
    if kind == "commit_group":

        def commit(lanes):
            machine.commits[lanes] += 1

        return commit
    if kind:
        pending = instruction.operands[0].value if kind == "wait_group" else -1
        return lambda lanes: _complete(machine, lanes, pending)

    destination, _ = machine.address(instruction.operands[0], "shared")
    source, _ = machine.address(instruction.operands[1], "global")
    size = instruction.operands[2].value
    read_size = machine.reader(instruction.operands[3], U32) if len(instruction.operands) > 3 else None

    def handler(lanes):
        wanted = np.broadcast_to(read_size(lanes), lanes.size) if read_size else np.full(lanes.size, size)
        wanted = wanted.astype(np.int64)
        if (wanted > size).any():
            raise ValueError("cp.async of more than its size")
        words = np.zeros((size // 4, lanes.size), np.uint32)  # zeros where nothing is read
        content = words.view(np.uint8).reshape(size // 4, lanes.size, 4)
        places = source(lanes)
        some = np.flatnonzero(wanted)
        machine.request(instruction, "global", places[some], lanes[some], size)
        misaligned = places[some] % size != 0
        if misaligned.any():
            first = int(some[np.argmax(misaligned)])
            raise Misaligned(f"{size} bytes at {places[first]:#x}", int(lanes[first]))
        for count in np.unique(wanted[some]):
            reading = np.flatnonzero(wanted == count)
            width = int(count & -count)  # whole where all is read, else equal parts, which are aligned
            for first in range(0, count, width):
                for target, chosen, owner, offset in targets(machine, "global", places[reading] + first, lanes[reading]):
                    some = reading[chosen]
                    where = target.locate(owner, offset, width, lanes[some], write=False)
                    target.on_load(where, width, lanes[some])
                    for k in range(first, first + width, 4):
                        if width >= 4:
                            words[k // 4, some] = target.load(where + k - first, 4)
                        else:
                            for i in range(width):
                                content[k // 4, some, k % 4 + i] = target.load(where + i, 1)
        places = destination(lanes)
        machine.request(instruction, "shared", places, lanes, size)
        where = machine.shared.locate(machine.block[lanes], places, size, lanes, write=True)
        machine.shared.on_store(where, size, lanes)
        for k in range(size):
            machine.shared.flags[where + k] &= ~np.uint8(INITIALIZED)
        machine.copies.append((lanes, where, words, machine.commits[lanes]))

    return handler


def _complete(machine, lanes, pending):
    """Delivers all but the last ``pending`` groups that each thread committed; -1: everything."""
    waiting, machine.copies = machine.copies, []
    waits = np.zeros(machine.lanes, bool)
    waits[lanes] = True
    for owners, where, words, group in waiting:
        done = waits[owners] & ((group < machine.commits[owners] - pending) if pending >= 0 else True)
        if done.any():
            machine.shared.on_store(where[done], 4 * len(words), owners[done])
            for k, word in enumerate(words):
                machine.shared.store(where[done] + 4 * k, word[done], owners[done])
        if not done.all():
            machine.copies.append((owners[~done], where[~done], words[:, ~done], group[~done]))


# ---- matrices of 8 x 8 elements of 16 bits ----


class _Matrices:
    """The matrices that a warp moves. Lane ``8 i + r`` gives the address of row ``r`` of matrix ``i``; lane ``4 r + k`` holds the elements
    ``2 k`` and ``2 k + 1`` of row ``r``, or of column ``r`` with ``.trans``."""

    def __init__(self, machine, instruction, place, data):
        m = without_hints(instruction)
        m.take("sync"), m.take("aligned"), m.take("m8n8"), m.take("b16"), m.take("shared")
        self.count, self.transposed = int(m.take("x1", "x2", "x4")[1:]), m.take("trans")
        m.done()
        self.machine, self.instruction, (self.address, _) = machine, instruction, machine.address(place, "shared")
        self.registers = data.items if isinstance(data, Group) else (data,)

    def positions(self, lanes: np.ndarray, write: bool):
        """Checks the rows; then yields, for each lane, where in shared memory each half of each of its registers belongs."""
        lane = self.machine.lane[lanes].astype(np.int64)
        incomplete = bits_of(self.machine.present(lanes))[self.machine.warp[lanes]] != 0xFFFFFFFF
        if incomplete.any():
            raise WarpError("not all lanes of the warp take part", int(lanes[np.argmax(incomplete)]))
        offset, shared = self.address(lanes), self.machine.shared
        rows = lane < 8 * self.count
        self.machine.request(self.instruction, "shared", offset[rows], lanes[rows], 16)
        where = shared.locate(self.machine.block[lanes[rows]], offset[rows], 16, lanes[rows], write)
        (shared.on_store if write else shared.on_load)(where, 16, lanes[rows])
        by_warp = (self.machine.block[lanes] * shared.stride + offset).reshape(-1, 32)
        for i in range(self.count):
            for half in (0, 1):
                row, column = lane[:32] // 4, lane[:32] % 4 * 2 + half
                if self.transposed:
                    row, column = column, row
                yield i, np.uint32(16 * half), (by_warp[:, 8 * i + row] + 2 * column).ravel()


def load_matrix(machine, instruction):
    result, place = instruction.operands
    matrices = _Matrices(machine, instruction, place, result)
    writers = [machine.writer(register, U32) for register in matrices.registers]

    def handler(lanes):
        values = np.zeros((matrices.count, lanes.size), np.uint32)
        for i, shift, where in matrices.positions(lanes, write=False):
            values[i] |= machine.shared.load(where, 2).astype(np.uint32) << shift
        for write, value in zip(writers, values, strict=True):
            write(lanes, value)

    return handler


def store_matrix(machine, instruction):
    place, data = instruction.operands
    matrices = _Matrices(machine, instruction, place, data)
    readers = [machine.reader(register, U32) for register in matrices.registers]

    def handler(lanes):
        values = [np.broadcast_to(read(lanes), lanes.size) for read in readers]
        for i, shift, where in matrices.positions(lanes, write=True):
            machine.shared.store(where, (values[i] >> shift).astype(np.uint16), lanes)

    return handler


HANDLERS = {"cp": copy_async, "ldmatrix": load_matrix, "stmatrix": store_matrix}

"""Device memory with guards.

An address is a window (from bit 40 up) and an offset within it. Each buffer is a window of its own, so an access that leaves a buffer, by
whatever distance, meets nothing. The lowest windows are those through which generic addresses reach shared, local and parameter memory."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .errors import GlobalConflict, Misaligned, OutOfBounds, SharedRace, Uninitialized
from .formats import RAW

WINDOW_BITS = 40
WINDOWS = {"shared": 1, "local": 2, "param": 3}
FIRST_BUFFER = 16

# Flags of a byte.
INITIALIZED, READ, WRITTEN = 1, 2, 4
SECTOR = 32
LONGEST_ACCESS = 32


class Store:
    """Bytes with flags, in equal parts for the threads or blocks (the owners) that have one each."""

    def __init__(self, name: str, size: int, owners: int = 1, initialized: bool = False):
        self.name, self.size = name, size
        self.stride = -(-max(size, 1) // LONGEST_ACCESS) * LONGEST_ACCESS
        self.data = np.zeros(owners * self.stride, np.uint8)
        self.flags = np.zeros(owners * self.stride, np.uint8)
        if initialized:
            self.flags[:] = INITIALIZED

    def locate(self, owner, offset: np.ndarray, size: int, lanes: np.ndarray, write: bool) -> np.ndarray:
        """Positions in ``data`` of one access of ``size`` bytes per thread, after all checks."""
        outside = (offset < 0) | (offset > self.size - size)
        _fail(OutOfBounds, outside, lanes, lambda i: f"{size} bytes at offset {offset[i]} of {self.name}, which has {self.size}")
        _fail(Misaligned, offset % size != 0, lanes, lambda i: f"{size} bytes at offset {offset[i]} of {self.name}")
        where = owner * self.stride + offset
        if not write:
            step = min(size, 8)
            flags, need = self.flags.view(RAW[step]), _repeat(INITIALIZED, step)
            for k in range(0, size, step):
                unwritten = flags[(where + k) // step] & need != need
                _fail(Uninitialized, unwritten, lanes, lambda i: f"{size} bytes at offset {offset[i]} of {self.name}")
        return where

    def load(self, where: np.ndarray, width: int) -> np.ndarray:
        return self.data.view(RAW[width])[where // width]

    def store(self, where: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        self.data.view(values.dtype)[where // values.itemsize] = values

    def on_load(self, where: np.ndarray, size: int, lanes: np.ndarray, constant: bool = False) -> None:
        """Called before a read at checked positions; ``constant`` promises that the launch does not change the bytes."""

    def on_store(self, where: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Called before a write at checked positions."""
        self.mark(where, size, INITIALIZED)

    def mark(self, where: np.ndarray, size: int, flag: int) -> None:
        step = min(size, 8)
        for k in range(0, size, step):
            self.flags.view(RAW[step])[(where + k) // step] |= _repeat(flag, step)


def _repeat(flag: int, width: int):
    """The flag of every byte of a word."""
    return RAW[width](int.from_bytes(bytes([flag]) * width, "little"))


def _fail(kind, bad, lanes, message) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        raise kind(message(first), int(lanes[first]))


# ---- global memory ----


@dataclass
class Traffic:
    """What the requests of a launch add up to. A request is one instruction of one warp."""

    requests: int = 0
    bytes: int = 0  # over all threads
    used: int = 0  # distinct bytes of each request
    sectors: int = 0  # 32-byte sectors that each request touches
    distinct: int = 0  # bytes of the buffer that were touched at all

    @property
    def efficiency(self) -> float:
        """The part of the sectors moved that the threads asked for: 1 when fully coalesced."""
        return self.used / (SECTOR * self.sectors) if self.sectors else 1.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def count(self, warps: np.ndarray, where: np.ndarray, size: int) -> None:
        warps = warps.astype(np.int64) << WINDOW_BITS
        self.requests += _distinct(warps)
        self.bytes += size * where.size
        self.used += size * _distinct(warps | where)
        self.sectors += _distinct(warps | where // SECTOR)


def _distinct(keys: np.ndarray) -> int:
    steps = np.diff(keys)
    return 1 + int(np.count_nonzero(steps)) if (steps >= 0).all() else np.unique(keys).size


class Buffer(Store):
    """A region of global memory that holds a NumPy array."""

    def __init__(self, memory: "Memory", name: str, window: int, content: np.ndarray, initialized: bool, constant: bool):
        super().__init__(name, content.nbytes, initialized=initialized)
        self.memory = memory
        self.data[: self.size] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self.address, self.constant, self.dtype, self.shape = window << WINDOW_BITS, constant, content.dtype, content.shape
        self.writer: np.ndarray | None = None  # per granule of the launch: 1 + the thread that stored to it

    def numpy(self) -> np.ndarray:
        """A copy of the content. Bytes that nobody wrote are an error: the kernel did not finish its output."""
        missing = np.count_nonzero(self.flags[: self.size] & INITIALIZED == 0)
        if missing:
            raise Uninitialized(f"{self.name}: {missing} of {self.size} bytes were never written")
        return self.data[: self.size].view(self.dtype).reshape(self.shape).copy()

    def on_load(self, where, size, lanes, constant=False):
        self.memory.loads[self].count(self.memory.warp_of_lane[lanes], where, size)
        self.mark(where, size, READ)
        if constant:
            for k in range(size):
                stale = self.flags[where + k] & WRITTEN != 0
                _fail(
                    GlobalConflict, stale, lanes, lambda i: f"offset {where[i]} of {self.name}: .nc, but the launch stored there"
                )

    def on_store(self, where, size, lanes):
        """A byte may be stored to by one thread per launch."""
        self.memory.stores[self].count(self.memory.warp_of_lane[lanes], where, size)
        self.mark(where, size, INITIALIZED | WRITTEN)
        granule, me = self.memory.granule, self.memory.thread_of_lane[lanes] + 1
        if self.writer is None:
            self.writer = np.zeros(self.data.size // granule, np.int64)
        for k in range(0, size, granule):
            at = (where + k) // granule
            before = self.writer[at]
            self.writer[at] = me
            others = ((before != 0) & (before != me)) | (self.writer[at] != me)
            _fail(GlobalConflict, others, lanes, lambda i: f"offset {where[i]} of {self.name} is stored to by two threads")


class Memory:
    """Global memory: buffers, and the ``__device__`` and ``__constant__`` variables of modules, which persist between launches."""

    def __init__(self):
        self.buffers: list[Buffer] = []
        self.variables: dict[tuple[str, str], Buffer] = {}  # of (module text, name)
        self.begin_launch(1)

    def put(self, array: np.ndarray, name: str | None = None) -> Buffer:
        """A buffer with a copy of ``array``."""
        return self._add(array, name, True)

    def empty(self, shape, dtype, name: str | None = None) -> Buffer:
        """A buffer in which reading before writing is an error."""
        return self._add(np.zeros(shape, dtype), name, False)

    def _add(self, array, name, initialized, constant=False) -> Buffer:
        number = len(self.buffers)
        name = name or f"buffer {number}"
        self.buffers.append(Buffer(self, name, FIRST_BUFFER + number, np.asarray(array), initialized, constant))
        return self.buffers[-1]

    def variable(self, module: str, name: str, data: bytes, constant: bool) -> Buffer:
        if (module, name) not in self.variables:
            self.variables[module, name] = self._add(np.frombuffer(data, np.uint8), name, True, constant)
        return self.variables[module, name]

    def begin_launch(self, granule: int) -> None:
        """``granule``: no store of the launch is shorter than these bytes, or less aligned."""
        self.granule = granule
        self.loads: dict[Buffer, Traffic] = defaultdict(Traffic)
        self.stores: dict[Buffer, Traffic] = defaultdict(Traffic)
        for buffer in self.buffers:
            buffer.flags &= INITIALIZED
            buffer.writer = None

    def begin_chunk(self, thread_of_lane: np.ndarray, warp_of_lane: np.ndarray) -> None:
        self.thread_of_lane, self.warp_of_lane = thread_of_lane, warp_of_lane

    def end_launch(self) -> None:
        for traffic, flag in ((self.loads, READ), (self.stores, WRITTEN)):
            for buffer, count in traffic.items():
                count.distinct = int(np.count_nonzero(buffer.flags & flag))

    def split(self, address: np.ndarray, lanes: np.ndarray):
        """Per buffer: which of the threads address it, and their offsets, which are negative just before it."""
        window = (address + (1 << WINDOW_BITS - 1)) >> WINDOW_BITS
        alike = (window == window[0]).all()
        for number in window[:1] if alike else np.unique(window):
            chosen = slice(None) if alike else np.flatnonzero(window == number)
            if not 0 <= number - FIRST_BUFFER < len(self.buffers):
                raise OutOfBounds(f"address {address[chosen][0]:#x} is in no buffer", int(lanes[chosen][0]))
            yield self.buffers[number - FIRST_BUFFER], chosen, address[chosen] - (number << WINDOW_BITS)


# ---- shared memory ----

SEVERAL = -2


class SharedStore(Store):
    """The shared memory of the blocks of a chunk, and who touched which byte since its block's last barrier.

    Accesses of two threads to one byte, one of them a write, need a barrier between them; within a warp ``bar.warp.sync`` of all its
    lanes is enough. Neither shuffles nor votes order memory. Lanes of a warp may write one byte in one instruction if they write the same:
    one of them does, CUDA says, and Triton's replicated layouts rely on it. ``replicated``: so may lanes of several warps. Bytes are taken
    together in granules, of which no access is a part."""

    def __init__(self, blocks: int, size: int, granule: int, warp_of_lane: np.ndarray, replicated: bool):
        super().__init__("shared memory", size, blocks)
        self.granule, self.warp_of_lane, self.replicated = granule, warp_of_lane, replicated
        self.time = np.zeros(warp_of_lane.size, np.int64)  # of each thread: barriers << 32 | barriers of its warp
        count = self.data.size // granule
        self.writer, self.reader, self.reader_warp = (np.zeros(count, np.int64) for _ in range(3))
        self.write_time, self.read_time = (np.full(count, -1, np.int64) for _ in range(2))

    def on_load(self, where, size, lanes, constant=False):
        self._note(where, size, lanes, write=False)

    def on_store(self, where, size, lanes):
        self.mark(where, size, INITIALIZED)
        self._note(where, size, lanes, write=True)

    def store(self, where, values, lanes):
        super().store(where, values, lanes)
        differ = self.load(where, values.itemsize) != values
        _fail(SharedRace, differ, lanes, lambda i: f"offset {where[i] % self.stride} of shared memory gets two values")

    def _note(self, where: np.ndarray, size: int, lanes: np.ndarray, write: bool) -> None:
        for k in range(0, size, self.granule):
            at = (where + k) // self.granule
            time, warp = self.time[lanes], self.warp_of_lane[lanes]
            bad = _unordered(self.write_time[at], self.writer[at], self.warp_of_lane[self.writer[at]], time, lanes, warp)
            if write:
                bad |= _unordered(self.read_time[at], self.reader[at], self.reader_warp[at], time, lanes, warp)
                self.writer[at], self.write_time[at] = lanes, time
                if not self.replicated:
                    bad |= self.warp_of_lane[self.writer[at]] != warp  # another warp in this very instruction
            else:
                self._note_read(at, lanes, warp, time)
            _fail(SharedRace, bad, lanes, lambda i: f"offset {where[i] % self.stride} of shared memory")

    def _note_read(self, at, lanes, warp, time):
        """Of the readers since the barrier, keeps the warp and the lane, or that there are several."""
        before, before_warp = self.read_time[at], self.reader_warp[at]
        other_warp = (before >> 32 == time >> 32) & (before_warp != warp)
        other_lane = (before == time) & (before_warp == warp) & (self.reader[at] != lanes)
        self.read_time[at] = time
        for last, new in (
            (self.reader_warp, np.where(other_warp, SEVERAL, warp)),
            (self.reader, np.where(other_lane, SEVERAL, lanes)),
        ):
            last[at] = new
            last[at[last[at] != new]] = SEVERAL


def _unordered(time, lane, warp, my_time, my_lane, my_warp):
    """Whether nothing orders an earlier access of ``lane`` before mine."""
    return (time >> 32 == my_time >> 32) & ((warp != my_warp) | ((time == my_time) & (lane != my_lane)))

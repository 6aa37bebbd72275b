"""Requests to memory, counted. A request is one load or store of one warp.

*Shared memory* has 32 banks, 4 bytes wide and in turns. In one pass, a wavefront, each bank delivers one word, to any number of lanes. The
lanes of a request go at once where they access up to 4 bytes each; with 8 bytes the halves of the warp go one after the other, with 16 its
quarters. Lanes of a half or quarter that want different words of a bank take a wavefront each.

*Global memory* moves in sectors of 32 bytes, which the L1 cache looks up by lines of 128."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

BANKS, WORD, SECTOR, LINE = 32, 4, 32, 128

_widths: Mapping[int, int] | None = None  # by line of the PTX


@contextmanager
def as_assembled(widths: Mapping[int, int]) -> Iterator[None]:
    """Launches within are counted as ptxas made them. ``widths``, by line of the PTX: bytes of one access of the machine code
    (``modreg_fast.bench.sass.widths``), which merges neighbouring accesses into the one of a line and leaves out the others."""
    global _widths
    _widths = widths
    try:
        yield
    finally:
        _widths = None


def width(line: int, size: int) -> int:
    """Of the accesses of a line with ``size`` bytes in the PTX; 0 where it is a part of another."""
    return size if _widths is None else max(size, _widths[line]) if line in _widths else 0


@dataclass
class Requests:
    """Of one load or store of the PTX, over a launch. ``least_wavefronts``: without bank conflicts. ``least_sectors``: as few as hold the
    bytes."""

    space: str  # "shared" or "global"
    bytes: int  # of one thread
    requests: int = 0
    wavefronts: int = 0  # in shared memory
    least_wavefronts: int = 0
    sectors: int = 0  # of global memory
    least_sectors: int = 0
    lines: int = 0

    def count(self, slots: np.ndarray, address: np.ndarray) -> None:
        """``slots``: of each thread 32 times its warp and its lane, in order; what they access."""
        warps = slots >> 5
        self.requests += 1 + int(np.count_nonzero(np.diff(warps)))
        if self.space == "shared":
            wavefronts, least = _wavefronts(slots, address, self.bytes)
            self.wavefronts, self.least_wavefronts = self.wavefronts + wavefronts, self.least_wavefronts + least
            return
        places = _per_group(warps, slots & 31, address, 32)
        self.sectors += _distinct(places // SECTOR).sum()
        self.lines += _distinct(places // LINE).sum()
        self.least_sectors += (-(-_distinct(places) * self.bytes // SECTOR)).sum()


def _per_group(group: np.ndarray, position: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """A row of ``size`` for each group, which are in order; absent positions repeat one that is there."""
    first = np.concatenate(([True], group[1:] != group[:-1]))
    rows = np.repeat(values[first], size).reshape(-1, size)
    rows[np.cumsum(first) - 1, position] = values
    return rows


def _distinct(rows: np.ndarray) -> np.ndarray:
    """How many different values each row has."""
    steps = np.diff(rows, axis=1)
    if (steps < 0).any():
        steps = np.diff(np.sort(rows, axis=1), axis=1)
    return 1 + np.count_nonzero(steps, axis=1)


def _wavefronts(slots: np.ndarray, address: np.ndarray, size: int) -> tuple[int, int]:
    """Wavefronts, and as many as there would be without conflicts."""
    words = -(-size // WORD)  # of a thread
    together = BANKS // words  # lanes
    first_words = _per_group(slots // together, slots % together, address // WORD, together)
    rows = (first_words[:, :, None] + np.arange(words)).reshape(-1, BANKS)
    if (rows[:, 1:] - rows[:, :-1] == 1).all():
        return len(rows), len(rows)
    rows.sort(axis=1)
    new = np.concatenate((np.ones((len(rows), 1), bool), rows[:, 1:] != rows[:, :-1]), axis=1)
    bank = rows % BANKS + BANKS * np.arange(len(rows))[:, None]
    wanted = np.bincount(bank[new], minlength=rows.size).reshape(-1, BANKS)
    return int(wanted.max(1).sum()), len(rows)

"""What the ops share on the host: the layout of tensors, the constants that kernels are compiled for, and launches."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from modreg_fast.backends.layout import Layout, in_layout, layout_of

Results = TypeVar("Results")
Plan = TypeVar("Plan")

LOAD_BYTES = 16  # the widest load of a thread
SECTOR_BYTES = 32  # what memory delivers at least
MOST_THREADS = 1024


@dataclass(frozen=True)
class Shape:
    """What a kernel is specialised on, for each tensor shape of a launch."""

    channels: int
    channels_last: bool
    vector: int  # elements that a thread reads at once; strides and row lengths are multiples of it
    far: bool  # offsets within a sample need 64 bits (those of samples always have them)
    wide: bool  # float64 arithmetic
    block_c: int
    block_p: int
    held: int = 1  # channels of a pixel that a thread holds, in a tile of all of them
    run: int = 1  # of those, how many are neighbours
    whole: bool = False  # a thread holds all channels of its pixels, and no more than there are

    def programs(self, x: Tensor) -> int:
        """Tiles of all samples of ``x`` ``(B, C, P)``."""
        return x.shape[0] * -(-x.shape[2] // self.block_p)


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, ready to run, or to be compiled for a GPU that is not here (``offline.py``)."""

    kernel: Any
    device: torch.device
    programs: int
    threads: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # among them SHAPES
    registers: int = 64  # of a thread, at most. A multiprocessor has 65536, for 2048 threads (1536 on some chips)

    def run(self) -> None:
        if self.device.type == "cuda":
            options = self.options("cuda" if torch.version.hip is None else "hip", _warp_size(self.device))
        else:
            options = {}  # the interpreter
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](*self.arguments, **self.constants, **options)

    def options(self, backend: str, warp_size: int) -> dict[str, Any]:
        """What Triton's backend of that name (``"cuda"`` or ``"hip"``) is told."""
        limited = backend == "cuda" and not any(shape.wide for shape in self.constants["SHAPES"])
        # Products are rounded together with the sums they go into: said, because versions of Triton have different defaults.
        options = {"num_warps": max(1, self.threads // warp_size), "enable_fp_fusion": True}
        return {**options, "maxnreg": self.registers} if limited else options


_MOST_PLANS = 1024
_plans: dict[Any, Any] = {}


def planned(signature: tuple[Any, ...], plan: Callable[[], Plan]) -> Plan:
    """The plan of all calls of a signature, made for the first. It holds no tensors, and depends on nothing but the signature."""
    found = _plans.get(signature)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _plans[signature] = plan()
    return found


def signature(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple([(x.shape, x.stride(), x.dtype) for x in tensors])


def run(results: Results, launches: Sequence[Launch]) -> Results:
    """The results, once the launches that fill them are queued."""
    for launch in launches:
        launch.run()
    return results


@cache
def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size


def power_of_two(x: int) -> int:
    """Not less than ``x``."""
    return 1 << (x - 1).bit_length()


def check_pixels(tensors: Sequence[Tensor], function: str) -> None:
    """Pixels of a sample are numbered in 32 bits; offsets in memory have 64."""
    pixels = max(x.shape[2] for x in tensors)
    if pixels > 2**31 - 2**14:
        raise ValueError(f"{function}: backend 'triton' takes at most 2^31 - 2^14 pixels per sample, got {pixels}")


def in_one_layout(tensors: Sequence[Tensor], layout: Layout | None = None) -> list[Tensor]:
    """Tensors ``(B, C, P)`` of one shape in the given layout, or in that of the first; copies of those that have another."""
    first = in_layout(tensors[0], layout)
    return [first, *(in_layout(x, layout_of(first)) for x in tensors[1:])]


def channels_last(x: Tensor) -> bool:
    return layout_of(x) == "channels"


def _strides(x: Tensor) -> tuple[int, int]:
    """From sample to sample and from row to row of ``(B, C, P)``; a row is what lies side by side: the pixels of a channel, or the
    channels of a pixel."""
    return x.stride(0), x.stride(2 if channels_last(x) else 1)


def far(tensors: Sequence[Tensor]) -> bool:
    """Whether an element of a sample is 2^31 elements or more behind its first."""
    return any(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31 - 2**14 for x in tensors)


def vector(tensors: Sequence[Tensor]) -> int:
    """The largest power of two that divides strides and row lengths of tensors of one shape and layout; at most 16 bytes."""
    row = tensors[0].shape[1 if channels_last(tensors[0]) else 2]
    widest = LOAD_BYTES // max(x.element_size() for x in tensors)
    return math.gcd(widest, row, *(stride for x in tensors for stride in _strides(x)))


def held_side_by_side(most: int, block_c: int, vector: int, item: int) -> int:
    """Of ``block_c`` channels that lie side by side, ``vector`` of them read at once, how many a thread holds: so few that the lanes of a
    pixel read 32 bytes at once, but eight, or ``most`` where that is less."""
    return min(most, max(8, block_c * vector * item // SECTOR_BYTES))


def strides(tensors: Sequence[Tensor], shape: Shape) -> tuple[tuple[int, int], ...]:
    """What ``tiles.pointers`` takes: of each tensor the strides from sample to sample and from row to row, in units of
    ``shape.vector``."""
    return tuple((sample // shape.vector, row // shape.vector) for sample, row in map(_strides, tensors))


@lru_cache(1024)
def two_floats(x: float) -> tuple[float, float]:
    """Triton passes numbers as float32; the sum of two holds the digits that float64 arithmetic needs."""
    high = float(torch.tensor(x, dtype=torch.float32))
    return high, x - high

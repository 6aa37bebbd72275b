"""Peak of the memory that a call takes beyond what was there before, from torch's own record of every allocation and release.

Torch's tensors are what it sees; the scratch of a native kernel, allocated per thread outside of torch, is not among them."""

import gc
import os
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports each start and stop on stderr; read at the first start

T = TypeVar("T")


def allocations(call: Callable[[], T]) -> tuple[T, list[int]]:
    """The result, and the bytes allocated (positive) and released (negative), in order."""
    collecting = gc.isenabled()
    gc.disable()  # or tensors of an earlier record, left in reference cycles, are released within this one
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = call()
    finally:
        if collecting:
            gc.enable()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(events: list[int]) -> int:
    """Most bytes held at once."""
    return max(accumulate(events, initial=0))

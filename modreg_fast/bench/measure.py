"""Times of a case. The providers and a plain copy of memory take turns, round by round, so that whatever else the machine does
meets them all; each call is timed by itself, with freshly allocated gradients as in training."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor

from modreg_fast.bench.accuracy import Oracle
from modreg_fast.bench.cases import MODES, Case
from modreg_fast.bench.memory import allocations, peak
from modreg_fast.bench.providers import Function, build, make_inputs, make_upstream

_COPY_ELEMENTS = 2**27  # 512 MiB of float32
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30
_SHORT = 2.0  # seconds: the largest gradients, fresh, take up to half a second more after a pause


@dataclass
class Timing:
    """Seconds of single calls."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range."""
        lower, _, upper = quantiles(self.seconds, n=4, method="inclusive")
        return upper - lower


@dataclass
class Result:
    """Of one provider on one case, by mode."""

    provider: str
    timings: dict[str, Timing] = field(default_factory=lambda: {mode: Timing() for mode in MODES})
    peak_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class Copy:
    """``torch.Tensor.copy_`` between two large tensors: the yardstick of memory bandwidth."""

    def __init__(self, elements: int = _COPY_ELEMENTS) -> None:
        self._source, self._target = torch.ones(elements), torch.zeros(elements)
        self.bytes = 2 * 4 * elements  # read and written

    def call(self) -> dict[str, float]:
        start = time.perf_counter()
        self._target.copy_(self._source)
        return {"copy": time.perf_counter() - start}


class _Contender:
    """One provider at work on the inputs of a case."""

    def __init__(self, provider: str, case: Case, leaves: list[Tensor], upstream: list[Tensor], oracle: Oracle) -> None:
        self.result = Result(provider)
        self._function: Function = build(provider, case)
        self._leaves, self._upstream = leaves, upstream
        if provider == "compile":  # memory is that of the compiled code, not of its compilation
            self._forward()
            self._backward(self._function(leaves))
        self._check(oracle)

    def _forward(self) -> list[Tensor]:
        with torch.no_grad():
            return self._function(self._leaves)

    def _backward(self, outputs: list[Tensor]) -> None:
        torch.autograd.backward(outputs, self._upstream)

    def _drop_gradients(self) -> None:
        for x in self._leaves:
            x.grad = None

    def _check(self, oracle: Oracle) -> None:
        """Memory and errors, in calls that warm up as well."""
        values, forward = allocations(self._forward)
        self._drop_gradients()
        outputs, building = allocations(lambda: self._function(self._leaves))
        _, backward = allocations(lambda: self._backward(outputs))
        both = peak([*building, *backward])
        self.result.peak_bytes = {"forward": peak(forward), "backward": peak(backward), "both": both}
        error, gradient_error = oracle.error_of_values(values), oracle.error_of_gradients(self._leaves)
        both_error = max(oracle.error_of_values(outputs), gradient_error)
        self.result.errors = {"forward": error, "backward": gradient_error, "both": both_error}
        self._drop_gradients()

    def call(self) -> dict[str, float]:
        """Seconds by mode: of a forward pass for inference, and of one for training with its backward pass."""
        start = time.perf_counter()
        self._forward()
        inference = time.perf_counter() - start
        start = time.perf_counter()
        outputs = self._function(self._leaves)
        middle = time.perf_counter()
        self._backward(outputs)
        end = time.perf_counter()
        self._drop_gradients()
        return {"forward": inference, "backward": end - middle, "both": end - start}


def measure(case: Case, copy: Copy, *, budget: float, turn: float = 0.2) -> tuple[list[Result], Timing]:
    """Results of every provider of the case, and the time of the copy. ``budget``: seconds after which no round begins, past the
    third; ``turn``: seconds that a provider may repeat its calls within a round."""
    leaves, upstream = make_inputs(case), make_upstream(case)
    oracle = Oracle(case, leaves, upstream)
    contenders = []
    for provider in case.providers:
        try:
            contenders.append(_Contender(provider, case, leaves, upstream, oracle))
        except Exception as error:
            if provider != "compile":  # which needs a C++ compiler on the machine
                raise
            warnings.warn(f"left out torch.compile: {error}", RuntimeWarning, stacklevel=2)
    copying = {"copy": Timing()}
    takers = [(copy.call, copying), *((c.call, c.result.timings) for c in contenders)]
    start = time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        first = rounds % len(takers)  # nobody always follows the same neighbour
        for call, timings in takers[first:] + takers[:first]:
            for seconds in _take_turn(call, turn):
                for name, value in seconds.items():
                    timings[name].seconds.append(value)
    return [c.result for c in contenders], copying["copy"]


def _take_turn(call: Callable[[], dict[str, float]], seconds: float) -> list[dict[str, float]]:
    """Times of the calls of a turn, at least one. A short first call does not count: since the last turn the caches have gone cold and
    the system may have taken back free memory, which a training loop does not see. A long call does not notice."""
    start = time.perf_counter()
    calls = [call()]
    end = time.perf_counter()
    if end - start < _SHORT:
        calls = [call()]
        while time.perf_counter() < end + seconds:
            calls.append(call())
    return calls

"""Times of eager PyTorch, torch.compile and the backends, on a GPU, or tiny on the CPU: large calls on the cases of ``modreg_fast.bench``,
and small ones, whose time is Python's, beside a replay of their kernels as a CUDA graph."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from modreg_fast.backends import computes
from modreg_fast.bench import memory
from modreg_fast.bench.accuracy import Oracle
from modreg_fast.bench.cases import OPS, Case
from modreg_fast.bench.measure import Result, Timing
from modreg_fast.bench.providers import Function, build, make_inputs, make_upstream
from modreg_fast.bench.results import Row, rows
from modreg_fast.bench.shapes import SHAPES, Shape

BACKENDS = ("triton", "cuda")
_SECONDS = 0.12  # of the calls of one mode
_LEAST, _MOST = 5, 100  # calls

_SQUARE, _TWO = Shape("square-16", 2, ((16, 64, 512, 512),)), Shape("square-8", 2, ((8, 64, 512, 512),))
_CLASSES, _WIDE = Shape("deliver-4", 4, ((4, 25, 1024, 1024),)), Shape("wide", 2, ((8, 512, 128, 128),))
_HEADS = Shape("heads", 2, ((64, 512),))
_SMALL = Shape("b0-128", 2, tuple((2, c, 128 // s, 128 // s) for c, s in zip((32, 64, 160, 256), (4, 8, 16, 32), strict=True)))


def cases(dry_run: bool) -> list[Case]:
    """Inputs that exceed the caches of any GPU, in both dtypes and layouts. The rows of ``modreg_fast/backends/measured.py`` first."""
    if dry_run:
        return [Case(op, Shape("tiny", 2, ((2, 8, 16, 16),)), "float32", "pixels", 0, ("eager", "cpu")) for op in OPS]
    both = [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("pixels", "channels")]
    found = []
    for op in OPS:
        own = tuple(backend for backend in BACKENDS if computes(backend, op))
        others = ("eager", "compile")
        square = _TWO if op == "gradient_statistics" else _SQUARE
        found += [Case(op, square, *kind, 0, (*others, *own) if kind == both[0] else own) for kind in both]
        if op != "gradient_statistics":
            found += [
                Case(op, _CLASSES, "float32", "pixels", 0, (*others, *own)),
                Case(op, _CLASSES, "bfloat16", "pixels", 0, own),
            ]
        if op == "softmax_fisher":
            found += [Case(op, _WIDE, dtype, "pixels", 0, own) for dtype in ("float32", "bfloat16")]
            found += [Case(op, SHAPES["segformer-b2-1024-m4"], "bfloat16", "pixels", 0, own)]
            found += [Case(op, square, "float32", "pixels", 1, own)]
    return found


def compile_share(part: int, parts: int, providers: tuple[str, ...], dry_run: bool) -> tuple[int, list[str]]:
    """Calls every ``parts``-th provider of a case once, so that its compiler fills its cache on the disk; for a backend on one sample,
    which takes the same kernels. How many, and who failed."""
    device = "cpu" if dry_run else "cuda"
    calls = [(case, p) for case in cases(dry_run) for p in case.providers if p in providers][part::parts]
    failures = []
    for case, provider in calls:
        if provider != "compile":
            one = tuple((1, *size[1:]) for size in case.shape.sizes)
            case = dataclasses.replace(case, shape=dataclasses.replace(case.shape, sizes=one))
        try:
            leaves, function = make_inputs(case, device), build(provider, case, device)
            with torch.no_grad():
                function(leaves)
            torch.autograd.grad(function(leaves), leaves, make_upstream(case, device))
        except Exception as error:
            failures.append(_failure(case, provider, error))
    return len(calls), failures


def measure(dry_run: bool, seconds: float) -> Iterator[tuple[list[Row], list[str], list[str]]]:
    """After each case: the rows so far, who failed on what, and what was left out for lack of memory, or of time after ``seconds``."""
    start, device = time.monotonic(), "cpu" if dry_run else "cuda"
    source = torch.ones(2**18 if dry_run else 2**28, device=device)
    target = torch.empty_like(source)
    where = {} if dry_run else {"device": torch.cuda.get_device_name(), "versions": f"torch {torch.__version__}"}
    measured: list[Row] = []
    failures, left_out = [], []
    for case in cases(dry_run):
        if time.monotonic() - start > seconds:
            left_out.append(f"{case} (time)")
            continue
        copying = _timing(lambda: target.copy_(source), device)
        results = []
        try:
            leaves, upstream = make_inputs(case, device), make_upstream(case, device)
            oracle = Oracle(case, leaves, upstream)
        except torch.OutOfMemoryError:
            left_out.append(f"{case} (memory)")
            continue
        for provider in case.providers:
            try:
                results.append(_result(provider, case, leaves, upstream, oracle, device))
            except torch.OutOfMemoryError:
                left_out.append(f"{case}, {provider} (memory)")
            except Exception as error:  # of the compiler, or of a kernel; the others go on
                failures.append(_failure(case, provider, error))
        del leaves, oracle
        if not dry_run:
            torch.cuda.empty_cache()
        found = rows(case, results, copying, 2 * source.nbytes)
        measured += [dataclasses.replace(row, **where) for row in found] if where else found
        yield measured, failures, left_out
    yield measured, failures, left_out


def _failure(case: Case, provider: str, error: Exception) -> str:
    return f"{case}, {provider}: {type(error).__name__}: {str(error)[:300]}"


def _result(provider: str, case: Case, leaves: list[Tensor], upstream: list[Tensor], oracle: Oracle, device: str) -> Result:
    function, result = build(provider, case, device), Result(provider)
    forward, backward, both = _passes(function, leaves, upstream)
    forward(), both()  # compiles
    error = oracle.error_of_values(function(leaves))
    for x, gradient in zip(leaves, both(), strict=True):
        x.grad = gradient
    gradient_error = oracle.error_of_gradients(leaves)
    for x in leaves:
        x.grad = None
    result.errors = {"forward": error, "backward": gradient_error, "both": max(error, gradient_error)}
    for mode, call, before in (
        ("forward", forward, None),
        ("backward", backward, lambda: function(leaves)),
        ("both", both, None),
    ):
        result.peak_bytes[mode] = _peak(call, before, device)
        result.timings[mode] = _timing(call, device, before)
    return result


def _passes(function: Function, leaves: list[Tensor], upstream: list[Tensor]) -> tuple[Callable[..., Any], ...]:
    """Forward, backward of the outputs that it gets, and both. A graph is walked through once: compiled functions give its buffers away."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return function(leaves)

    def backward(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, upstream)

    return forward, backward, lambda: backward(function(leaves))


def _timing(call: Callable[..., Any], device: str, before: Callable[[], Any] | None = None) -> Timing:
    """Of single calls, of what ``before`` makes, untimed. On a GPU calls queue up between two events each, so that Python's time counts
    only where it is longer than the kernels'."""
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < _SECONDS and len(times) < _MOST):
        arguments = () if before is None else (before(),)
        if device == "cpu":
            start = time.perf_counter()
            call(*arguments)
            times.append(time.perf_counter() - start)
        else:
            pairs = []
            for _ in range(_LEAST):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                arguments = () if before is None else (before(),)
                first.record()
                call(*arguments)
                last.record()
                pairs.append((first, last))
            torch.cuda.synchronize()
            times += [first.elapsed_time(last) / 1e3 for first, last in pairs]
    return Timing(times)


def _peak(call: Callable[..., Any], before: Callable[[], Any] | None, device: str) -> int:
    arguments = () if before is None else (before(),)
    if device == "cpu":
        return memory.peak(memory.allocations(lambda: call(*arguments))[1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    already = torch.cuda.memory_allocated()
    call(*arguments)
    return torch.cuda.max_memory_allocated() - already


# ---- small calls ----


def small(dry_run: bool) -> list[dict[str, Any]]:
    """Microseconds of a call: on the clock of the host, many in a row, and, of forward and backward together, as a replayed graph."""
    device, repeats = ("cpu", 3) if dry_run else ("cuda", 200)
    found = []
    for shape in (_HEADS, _SMALL):
        for provider in ("eager", "cpu") if dry_run else ("eager", *BACKENDS):
            case = Case("softmax_fisher", shape)
            leaves, upstream = make_inputs(case, device), make_upstream(case, device)
            forward, _, both = _passes(build(provider, case, device), leaves, upstream)
            row = {"shape": shape.name, "provider": provider, "forward": _wall(forward, repeats), "both": _wall(both, repeats)}
            found.append({**row, "graph of both": None if dry_run else _wall(_captured(both).replay, repeats)})
    return found


def _wall(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(max(1, repeats // 10)):
        call()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return 1e6 * (time.perf_counter() - start) / repeats


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph

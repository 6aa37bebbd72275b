"""Times of eager PyTorch, torch.compile and the backends on the cases of ``modreg_fast.bench``, on a GPU, or tiny on the CPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from modreg_fast.bench import memory
from modreg_fast.bench.accuracy import Oracle
from modreg_fast.bench.cases import Case
from modreg_fast.bench.measure import Result, Timing
from modreg_fast.bench.providers import build, make_inputs, make_upstream
from modreg_fast.bench.results import Row, rows
from modreg_fast.bench.shapes import SHAPES, Shape

OPS = ("softmax_fisher", "gradient_statistics")


def cases(dry_run: bool) -> list[Case]:
    """Inputs that exceed the caches of any GPU, the scales of a network, and both dtypes and layouts."""
    if dry_run:
        tiny, providers = Shape("tiny", 2, ((2, 8, 16, 16),)), ("eager", "cpu")
        return [Case(op, tiny, "float32", "pixels", 0, providers) for op in OPS]
    wide, providers = Shape("square-16", 2, ((16, 64, 512, 512),)), ("eager", "compile", "triton", "cuda")
    kinds = [(wide, "float32", "pixels"), (wide, "bfloat16", "pixels"), (wide, "bfloat16", "channels")]
    kinds += [(SHAPES["segformer-b2-1024-m4"], "bfloat16", "pixels"), (SHAPES["square"], "float32", "pixels")]
    plain = [Case(op, shape, dtype, layout, 0, providers) for op in OPS for shape, dtype, layout in kinds]
    return [*plain, Case("softmax_fisher", wide, "float32", "pixels", 1, ("eager", "triton", "cuda"))]


def measure(dry_run: bool) -> tuple[list[Row], list[str], list[str]]:
    """The rows, who failed on what, and what was left out for lack of memory."""
    device, seconds = ("cpu", 0.02) if dry_run else ("cuda", 0.5)
    source = torch.ones(2**18 if dry_run else 2**28, device=device)
    target = torch.empty_like(source)
    measured: list[Row] = []
    failures, left_out = [], []
    for case in cases(dry_run):
        copying = _time(lambda: target.copy_(source), seconds)
        results = []
        for provider in case.providers:
            try:
                results.append(_result(provider, case, device, seconds))
            except torch.OutOfMemoryError:
                left_out.append(f"{case}, {provider}")
            except Exception as error:  # of the compiler, or of a kernel; the others go on
                failures.append(f"{case}, {provider}: {type(error).__name__}: {str(error)[:300]}")
            if not dry_run:
                torch.cuda.empty_cache()
        measured += rows(case, results, copying, 2 * source.nbytes)
    if not dry_run:
        where = {"device": torch.cuda.get_device_name(), "versions": f"torch {torch.__version__}"}
        measured = [dataclasses.replace(row, **where) for row in measured]
    return measured, failures, left_out


def _result(provider: str, case: Case, device: str, seconds: float) -> Result:
    leaves = [x.detach().to(device).requires_grad_() for x in make_inputs(case)]
    upstream = [u.to(device) for u in make_upstream(case)]
    oracle, function, result = Oracle(case, leaves, upstream), build(provider, case), Result(provider)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return function(leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(leaves), leaves, upstream)

    forward(), both()  # compiles
    outputs = function(leaves)
    calls: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True),
        "both": both,
    }
    error = oracle.error_of_values(outputs)
    for x, gradient in zip(leaves, both(), strict=True):
        x.grad = gradient
    gradient_error = oracle.error_of_gradients(leaves)
    for x in leaves:
        x.grad = None
    result.errors = {"forward": error, "backward": gradient_error, "both": max(error, gradient_error)}
    for mode, call in calls.items():
        result.peak_bytes[mode] = _peak(call, device)
        result.timings[mode] = _time(call, seconds)
    return result


def _time(call: Callable[[], Any], seconds: float) -> Timing:
    """Of single calls, in blocks between two waits for the device, so that the launch of one overlaps the run of another."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    times: list[float] = []
    while len(times) < 5:
        times += timer.blocked_autorange(min_run_time=seconds).times
    return Timing(times)


def _peak(call: Callable[[], Any], device: str) -> int:
    if device == "cpu":
        return memory.peak(memory.allocations(call)[1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before

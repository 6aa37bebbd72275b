"""Prints the tables of docs/gpu.md in Markdown: resources of the compiled Triton kernels, and the roofline on paper. Needs no GPU.

python benchmarks/gpu_tables.py"""

import itertools

import torch
from triton.backends.compiler import GPUTarget

from modreg_fast.backends.triton import gradient_statistics as statistics
from modreg_fast.backends.triton import softmax_fisher as fisher
from modreg_fast.backends.triton.launches import Launch
from modreg_fast.backends.triton.offline import compile_for
from modreg_fast.bench import sass
from modreg_fast.bench.roofline import CHIPS

BATCH, PIXELS = 2, 4096


def tensors(channels: int, dtype: torch.dtype, channels_last: bool) -> list[torch.Tensor]:
    shape = (BATCH, PIXELS, channels) if channels_last else (BATCH, channels, PIXELS)
    return [torch.empty(shape, dtype=dtype).transpose(1, 2 if channels_last else 1) for _ in range(2)]


def softmax_fisher(channels: int, dtype: torch.dtype, channels_last: bool, backward: bool, noisy: bool = False) -> Launch:
    """Two modalities, one scale, no mask."""
    xs = tensors(channels, dtype, channels_last)
    problem = fisher.Problem(xs, [], None, [0.5 * noisy] * 2, 1, torch.tensor(1) if noisy else None, False, 1e-8)
    return (fisher.backward_launches(problem, *[problem.empty_result()] * 2) if backward else fisher.forward_launches(problem))[
        1
    ][0]


def gradient_statistics(channels: int, dtype: torch.dtype, channels_last: bool, backward: bool) -> Launch:
    """Gradient, feature and values of one tensor, no mask."""
    g, e = tensors(channels, dtype, channels_last)
    problem = statistics.Problem([g], [e], [torch.empty(BATCH, PIXELS)], [], 1e-8, False)
    if backward:
        return statistics.backward_launches(problem, *[problem.empty_result()] * 2)[1][0]
    return statistics.forward_launches(problem)[1][0]


def name(dtype: torch.dtype, channels_last: bool, backward: bool, noisy: bool = False) -> str:
    noise = ", noise" if noisy else ""
    layout = "channels" if channels_last else "pixels"
    return f"{str(dtype).removeprefix('torch.')} | {layout} | {'backward' if backward else 'forward'}{noise}"


def resource_table() -> None:
    """Per architecture: registers a thread, bytes spilled a thread, KiB of shared memory a program, share of the threads that fit."""
    print("| op | channels | dtype | side by side | pass | tile | threads | sm_80 | sm_90 | sm_100 |")
    print("| --- " * 10 + "|")
    for channels, (backward, noisy), channels_last, dtype in itertools.product(
        (64, 1024), itertools.product((False, True), repeat=2), (False, True), (torch.float32, torch.bfloat16)
    ):
        launch = softmax_fisher(channels, dtype, channels_last, backward, noisy)
        _resources("softmax_fisher", channels, name(dtype, channels_last, backward, noisy), launch)
    for channels, backward, channels_last, dtype in itertools.product(
        (64,), (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        launch = gradient_statistics(channels, dtype, channels_last, backward)
        _resources("gradient_statistics", channels, name(dtype, channels_last, backward), launch)


def _resources(op: str, channels: int, case: str, launch: Launch) -> None:
    (shape,) = launch.constants["SHAPES"]
    cells = []
    for architecture in (80, 90, 100):
        kernel = compile_for(launch, GPUTarget("cuda", architecture, 32))
        found, shared = sass.resources(kernel.asm["cubin"]), kernel.metadata.shared
        share = found.occupancy(architecture, launch.threads, shared)
        cells.append(f"{found.registers}, {found.stack}, {shared / 1024:.1f}, {share:.0%}")
    print(f"| {op} | {channels} | {case} | {shape.block_c} x {shape.block_p} | {launch.threads} | " + " | ".join(cells) + " |")


def roofline_table() -> None:
    """Per element of the inputs. ``gradient_statistics`` with as many channels as a step takes: then no instruction runs twice."""
    kinds = ("fp32", "integer", "mufu", "all")
    print("| op | dtype | side by side | pass | bytes | " + " | ".join(kinds) + " | " + " | ".join(c.name for c in CHIPS) + " |")
    print("| --- " * (5 + len(kinds) + len(CHIPS)) + "|")
    for dtype, channels_last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        for backward, noisy in ((False, False), (True, False), (False, True), (True, True)):
            launch = softmax_fisher(64, dtype, channels_last, backward, noisy)
            _roofline("softmax_fisher", name(dtype, channels_last, backward, noisy), launch, dtype, backward)
        for backward in (False, True):
            channels = 64 if channels_last else 16 // dtype.itemsize
            launch = gradient_statistics(channels, dtype, channels_last, backward)
            _roofline("gradient_statistics", name(dtype, channels_last, backward), launch, dtype, backward)


def _roofline(op: str, case: str, launch: Launch, dtype: torch.dtype, backward: bool) -> None:
    (shape,) = launch.constants["SHAPES"]
    elements = 2 * shape.channels * shape.block_p / launch.threads  # per thread, of both tensors
    bytes_ = dtype.itemsize * (2 if backward else 1)
    cells, shown = [], None
    for chip in CHIPS:
        kernel = compile_for(launch, GPUTarget("cuda", chip.architecture, 32))
        counts = {kind: n / elements for kind, n in sass.instructions(kernel.asm["cubin"]).items()}
        cells.append(chip.bound(bytes_, counts))
        if chip.architecture == 90:
            shown = [f"{counts[kind]:.1f}" for kind in ("fp32", "integer", "mufu")] + [f"{sum(counts.values()):.0f}"]
    assert shown is not None
    print(f"| {op} | {case} | {bytes_} | " + " | ".join(shown) + " | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    print("## Resources\n")
    resource_table()
    print("\n## Roofline on paper\n")
    roofline_table()

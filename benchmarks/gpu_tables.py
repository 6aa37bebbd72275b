"""Prints the tables of docs/gpu.md in Markdown: resources of the compiled Triton kernels, and the roofline on paper. Needs no GPU.

python benchmarks/gpu_tables.py"""

import itertools
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

from modreg_fast.backends.triton import gradient_statistics as statistics
from modreg_fast.backends.triton import modality_cross_entropy as cross_entropy
from modreg_fast.backends.triton import softmax_fisher as fisher
from modreg_fast.backends.triton.launches import Launch
from modreg_fast.backends.triton.offline import compile_for
from modreg_fast.bench import sass
from modreg_fast.bench.roofline import CHIPS

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ptx.requests import as_assembled  # noqa: E402
from triton_calls import Gpu  # noqa: E402

from benchmarks import gpu_work  # noqa: E402

PIXELS = 512  # of one sample: a few tiles


def tensors(count: int, channels: int, dtype: torch.dtype, channels_last: bool) -> list[torch.Tensor]:
    shape = (1, PIXELS, channels) if channels_last else (1, channels, PIXELS)
    return [torch.randn(shape).to(dtype).transpose(1, 2 if channels_last else 1) for _ in range(count)]


def softmax_fisher(
    channels: int, dtype: torch.dtype, channels_last: bool, backward: bool, noisy: bool = False, modalities: int = 2
) -> Launch:
    """One scale, no mask."""
    xs = tensors(modalities, channels, dtype, channels_last)
    problem = fisher.Problem(xs, [], None, [0.5 * noisy] * modalities, 1, torch.tensor(1) if noisy else None, False, 1e-8)
    if not backward:
        return fisher.forward_launches(problem)[1][0]
    upstream = fisher.Result(torch.ones(modalities, 1, 1), torch.full((1, 1), PIXELS))
    return fisher.backward_launches(problem, upstream, upstream)[1][0]


def gradient_statistics(channels: int, dtype: torch.dtype, channels_last: bool, backward: bool) -> Launch:
    """Gradient, feature and values of one tensor, no mask."""
    g, e = tensors(2, channels, dtype, channels_last)
    problem = statistics.Problem([g], [e], [torch.ones(1, PIXELS)], [], 1e-8, False)
    if not backward:
        return statistics.forward_launches(problem)[1][0]
    upstream = statistics.Result(torch.ones(1, 1), torch.ones(1, 1), [], [])
    return statistics.backward_launches(problem, upstream, upstream)[1][0]


def modality_cross_entropy(channels: int, dtype: torch.dtype, channels_last: bool, backward: bool, modalities: int) -> Launch:
    """No class weights, no smoothing, all modalities present."""
    xs, target = tensors(modalities, channels, dtype, channels_last), torch.randint(channels, (1, PIXELS))
    problem = cross_entropy.Problem(xs, target, None, None, 255, 0.0, 1e-8)
    if not backward:
        return cross_entropy.forward_launches(problem)[1][0]
    return cross_entropy.backward_launches(problem, cross_entropy.Result(*map(torch.ones_like, problem.empty_result())))[1][0]


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
    for (channels, modalities), backward, channels_last, dtype in itertools.product(
        ((64, 2), (25, 4)), (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        launch = modality_cross_entropy(channels, dtype, channels_last, backward, modalities)
        _resources("modality_cross_entropy", channels, name(dtype, channels_last, backward), launch)


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
    """See docs/gpu.md for the columns."""
    print(
        "| op | channels | dtype | side by side | pass | " + " | ".join((*gpu_work.TITLES, *(chip.name for chip in CHIPS))) + " |"
    )
    print("| --- " * (5 + len(gpu_work.TITLES) + len(CHIPS)) + "|")
    for channels, dtype, channels_last in itertools.product((64, 25), (torch.float32, torch.bfloat16), (False, True)):
        modalities = 2 if channels == 64 else 4
        for noisy, backward in itertools.product((False, True), (False, True)):
            if channels == 64 or not noisy:
                launch = softmax_fisher(channels, dtype, channels_last, backward, noisy, modalities)
                _roofline("softmax_fisher", channels, name(dtype, channels_last, backward, noisy), launch, modalities)
        for backward in (False, True) if channels == 64 else ():
            launch = gradient_statistics(channels, dtype, channels_last, backward)
            _roofline("gradient_statistics", channels, name(dtype, channels_last, backward), launch, 2)
        for backward in (False, True):
            launch = modality_cross_entropy(channels, dtype, channels_last, backward, modalities)
            _roofline("modality_cross_entropy", channels, name(dtype, channels_last, backward), launch, modalities)


def _roofline(op: str, channels: int, case: str, launch: Launch, inputs: int) -> None:
    found = paper(launch, inputs * channels * PIXELS)
    cells = [*found.cells(), *(chip.cell(found.work) for chip in CHIPS)]
    print(f"| {op} | {channels} | {case} | " + " | ".join(cells) + " |")


def paper(launch: Launch, elements: int) -> gpu_work.OnPaper:
    kernel = compile_for(launch, GPUTarget("cuda", 90, 32))
    cubin, _ = gpu_work.assembled(kernel.asm["ptx"], "-lineinfo")
    with as_assembled(sass.widths(cubin, kernel.metadata.name)):
        report = Gpu(90, *_tensors(launch.arguments)).run(launch)
    blocks = sass.resources(kernel.asm["cubin"]).blocks(90, launch.threads, kernel.metadata.shared)
    return gpu_work.on_paper(cubin, kernel.metadata.name, report, elements, launch.threads // 32, blocks)


def _tensors(arguments) -> list[torch.Tensor]:
    return [x for a in arguments for x in (_tensors(a) if isinstance(a, tuple) else [a]) if isinstance(x, torch.Tensor)]


if __name__ == "__main__":
    print("## Resources\n")
    resource_table()
    print("\n## Roofline on paper\n")
    roofline_table()

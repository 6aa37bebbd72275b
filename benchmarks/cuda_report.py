"""Prints what is known of the CUDA kernels without a GPU, in Markdown: registers and spills from ptxas, the tiles that the host plans and
the occupancy that they leave, and the roofline on paper. Needs nvcc and Triton's nvdisasm.

python benchmarks/cuda_report.py"""

import functools
import itertools
import re
import sys
from pathlib import Path

import numpy as np

from modreg_fast.bench import sass
from modreg_fast.bench.roofline import CHIPS

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_calls  # noqa: E402
import ptx  # noqa: E402
import ptx.requests  # noqa: E402
from cuda_calls import Tensor  # noqa: E402

from benchmarks import gpu_work  # noqa: E402

STEMS = ("softmax_fisher", "gradient_statistics", "modality_cross_entropy")
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("pixels", "channels")


@functools.cache
def assembled(source: str, architecture: int, *options: str) -> tuple[bytes, dict[str, sass.Resources]]:
    """The cubin of the PTX that the interpreter runs, and what each kernel in it takes; ``source``: one of ``cuda_calls.SOURCES``."""
    code, log = gpu_work.assembled(cuda_calls.kernels(source, f"sm_{architecture}"), *options)
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        stores, reads = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)[:2]
        shared, registers = re.search(r"(\d+) bytes smem", part), re.search(r"Used (\d+) registers", part)
        assert registers is not None
        found[part.split("'")[1]] = sass.Resources(int(registers[1]), int(stores) + int(reads), int(shared[1]) if shared else 0)
    return code, found


def run(stem: str, channels: int, dtype: str, layout: str, backward: bool, noise: bool):
    """The elements of its inputs, and the results of a launch. Two modalities, four of 25 channels; gradient, feature and values of one
    tensor. As many pixels as fill a few tiles, all taken by one block, as in calls of many tiles."""
    rng, memory, pixels = np.random.default_rng(0), ptx.Memory(), 1024
    count = 4 if channels == 25 else 2
    xs = [Tensor(memory, rng.standard_normal((1, channels, pixels)), dtype, layout) for _ in range(count)]
    one = dict(most_blocks=1)
    if stem == "softmax_fisher":
        weight = np.ones((count, 1, 1)) if backward else None
        out = cuda_calls.softmax_fisher([[x] for x in xs], sigma=[0.5 * noise] * count, weight=weight, **one)
    elif stem == "gradient_statistics":
        upstream = (np.ones((1, 1)), np.ones((1, 1)), None, None) if backward else None
        out = cuda_calls.gradient_statistics(xs[:1], xs[1:], values=[np.ones((1, pixels))], upstream=upstream, **one)
    else:
        target, above = rng.integers(0, channels, (1, pixels)), (np.ones((count, 1)), np.ones(1), np.ones((count, 1)))
        out = cuda_calls.modality_cross_entropy(xs, target, upstream=above if backward else None, **one)
    return count * channels * pixels, out


def planned(stem: str, channels: int, dtype: str, layout: str, backward: bool, noise: bool, shared: int):
    """The call, its tiling and its launch, planned for a multiprocessor with so much shared memory."""
    pixels = 4096
    lines, length = (channels, pixels) if layout == "pixels" else (pixels, channels)
    array = cuda_calls.Array(256, lines * length, length, cuda_calls.DTYPES[dtype], layout == "pixels")
    if stem == "softmax_fisher":
        call = cuda_calls.SoftmaxFisher(modalities=2, scales=1, batch=8)
        call.sigma[:2] = [0.5 * noise] * 2
        call.features[:2] = [array] * 2
    elif stem == "gradient_statistics":
        call = cuda_calls.GradientStatistics(tensors=1, batch=8)
        call.grads[0] = call.features[0] = array
    else:
        call = cuda_calls.ModalityCrossEntropy(modalities=2, batch=8)
        call.logits[:2] = [array] * 2
    tiling = call.tiling if stem == "modality_cross_entropy" else call.tilings[0]
    tiling.channels, tiling.pixels = channels, pixels
    return call, tiling, cuda_calls.plan(stem, call, backward, 4, shared - 2048)


def resources(stem: str, call, backward: bool, architecture: int) -> sass.Resources:
    """Of the kernel that runs a planned call."""
    return assembled(cuda_calls.source_of(stem, call), architecture)[1][cuda_calls.entry(stem, call, backward, "float32")]


def table(*titles: str) -> None:
    print("\n| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")


def print_registers() -> None:
    print("\n### Registers\n\nPer thread, and bytes spilled per thread. float64 is there for checks.")
    table("kernel", *(f"sm_{architecture}" for architecture in sass.SHARED))
    for source in cuda_calls.SOURCES:
        by_architecture = [assembled(source, architecture)[1] for architecture in sass.SHARED]
        for name in by_architecture[0]:
            cells = (f"{found[name].registers}, {found[name].stack}" for found in by_architecture)
            print(f"| {name} | {' | '.join(cells)} |")


def print_tiles() -> None:
    print(
        "\n### Tiles\n\nAs planned for the shared memory of an H100, with KiB of it per block, and the share of a multiprocessor's"
    )
    print("threads that fit with the tiles planned for each architecture. Two modalities, or gradient and feature.")
    table("op", "channels", "dtype", "side by side", "pass", "tile", "threads", "KiB", *(f"sm_{a}" for a in sass.SHARED))
    for stem, channels, noise, backward, layout, dtype in itertools.product(
        STEMS, (64, 256, 1024), (False, True), (False, True), LAYOUTS, DTYPES
    ):
        if stem != "softmax_fisher" and noise:
            continue
        call, tiling, launch = planned(stem, channels, dtype, layout, backward, noise, sass.SHARED[90])
        tile, shares = f"{channels} x {tiling.width} | {launch.threads} | {launch.shared_bytes / 1024:.1f}", []
        for architecture, shared in sass.SHARED.items():
            call, _, launch = planned(stem, channels, dtype, layout, backward, noise, shared)
            found = resources(stem, call, backward, architecture)
            shares.append(f"{found.occupancy(architecture, launch.threads, launch.shared_bytes):.0%}")
        pass_ = f"{'backward' if backward else 'forward'}{', noise' if noise else ''}"
        print(f"| {stem} | {channels} | {dtype} | {layout} | {pass_} | {tile} | {' | '.join(shares)} |")


def print_roofline() -> None:
    print(
        "\n### Roofline on paper\n\nThe columns are those of docs/gpu.md. Two modalities of 64 channels, four of 25; one block that"
    )
    print("takes several tiles.")
    table("op", "channels", "dtype", "side by side", "pass", *gpu_work.TITLES, *(chip.name for chip in CHIPS))
    for channels, dtype, layout, stem, noise, backward in itertools.product(
        (64, 25), DTYPES, LAYOUTS, STEMS, (False, True), (False, True)
    ):
        if noise and (stem, channels) != ("softmax_fisher", 64) or (stem, channels) == ("gradient_statistics", 25):
            continue
        found = paper(stem, channels, dtype, layout, backward, noise)
        pass_ = f"{'backward' if backward else 'forward'}{', noise' if noise else ''}"
        cells = [*found.cells(), *(chip.cell(found.work) for chip in CHIPS)]
        print(f"| {stem} | {channels} | {dtype} | {layout} | {pass_} | {' | '.join(cells)} |")


def paper(stem: str, channels: int, dtype: str, layout: str, backward: bool, noise: bool) -> gpu_work.OnPaper:
    call, _, _ = planned(stem, channels, dtype, layout, backward, noise, sass.SHARED[90])
    if channels == 25 and stem != "gradient_statistics":
        call.modalities = 4
    source, name = cuda_calls.source_of(stem, call), cuda_calls.entry(stem, call, backward, "float32")
    cubin = assembled(source, 90, "-lineinfo")[0]
    with ptx.requests.as_assembled(sass.widths(cubin, name)):
        elements, out = run(stem, channels, dtype, layout, backward, noise)
    blocks = resources(stem, out.call, backward, 90).blocks(90, out.launch.threads, out.launch.shared_bytes)
    found = gpu_work.on_paper(cubin, name, out.report, elements, out.launch.threads // 32, blocks)
    check(found.names, source, out)
    return found


def check(names, source: str, out) -> None:
    """What is one instruction in both languages is counted alike."""
    lines = cuda_calls.kernels(source).splitlines()
    expected = {"MUFU.EX2": 0, "SHFL.BFLY": 0}
    for line, n in out.report.executions.items():
        expected["MUFU.EX2"] += n * ("ex2.approx" in lines[line - 1])
        expected["SHFL.BFLY"] += n * ("shfl.sync.bfly" in lines[line - 1])
    found = {"MUFU.EX2": names["MUFU.EX2"], "SHFL.BFLY": sum(n for name, n in names.items() if name.startswith("SHFL.BFLY"))}
    assert found == expected, (found, expected)


if __name__ == "__main__":
    print("## CUDA")
    print_registers()
    print_tiles()
    print_roofline()

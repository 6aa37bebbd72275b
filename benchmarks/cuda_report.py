"""Prints what is known of the CUDA kernels without a GPU, in Markdown: resources from the compiler for each architecture, the tiles that
the host plans, and the instructions and bytes per element that the PTX interpreter counts. Needs nvcc and Triton's cuobjdump.

python benchmarks/cuda_report.py"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import triton

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import cuda_calls  # noqa: E402
import ptx  # noqa: E402
from cuda_calls import BYTES, Tensor  # noqa: E402

STEMS = ("softmax_fisher", "gradient_statistics")
# Of a multiprocessor: bytes of shared memory; of a block 1 KiB less. All have 65536 registers and room for 2048 threads.
MULTIPROCESSORS = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(stem: str, arch: str) -> dict[str, tuple[int, int, int, str]]:
    """Per kernel: registers, bytes of spills, bytes of static shared memory, and its global loads by kind."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{stem}.cubin"
        command = [ptx.NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
        log = subprocess.run(
            [*command, "-o", cubin, ROOT / f"csrc/cuda/{stem}.cu"], capture_output=True, text=True, check=True
        ).stderr
        sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    loads = {}
    for part in sass.split("Function : ")[1:]:
        kinds = re.findall(r"\bLDG\.E(?:\.(?:U8|U16|64|128))?\b", part)
        loads[part.split()[0]] = f"{kinds.count('LDG.E.128')} of {len(kinds)}"
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        stores, reads = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)[:2]
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers is not None
        found[name] = int(registers[1]), int(stores) + int(reads), int(shared[1]) if shared else 0, loads[name]
    return found


def occupancy(arch: str, registers: int, static_shared: int, stem: str, out, backward: bool, accumulator: int) -> float:
    """Share of a multiprocessor's threads that fit, with the tiles planned for it; registers come in eights, a block takes 1 KiB more."""
    shared = MULTIPROCESSORS[arch]
    launch = cuda_calls.plan(stem, type(out.call).from_buffer_copy(out.call), backward, accumulator, shared - 2048)
    if launch.shared_bytes < 0:
        return 0.0
    of_block = launch.shared_bytes + static_shared + 1024
    blocks = min(65536 // (-(-registers // 8) * 8 * launch.threads), 2048 // launch.threads, shared // of_block)
    return blocks * launch.threads / 2048


def launches():
    """Name, kernel, elements and results of both passes for each case: two modalities, or gradient, feature and values of one tensor."""
    rng = np.random.default_rng(0)
    for (channels, pixels), dtype, layout in itertools.product(
        ((64, 512), (256, 128), (1024, 64)), BYTES, ("pixels", "channels")
    ):
        wide = "float64" if dtype == "float64" else "float32"

        def pair(shape=(1, channels, pixels), dtype=dtype, layout=layout):
            memory = ptx.Memory()
            return [Tensor(memory, rng.standard_normal(shape), dtype, layout) for _ in range(2)]

        for noise in (0.0, 0.5):
            features = [[x] for x in pair()]
            for name, weight in (("forward", None), ("backward", np.ones((2, 1, 1)))):
                out = cuda_calls.softmax_fisher(features, sigma=[noise] * 2, weight=weight)
                case = f"softmax_fisher | {channels} | {dtype} | {layout} | {name}{', noise' if noise else ''}"
                yield case, f"softmax_fisher_{name}_{wide}", 2 * channels * pixels, out
        if channels == 64:
            g, e = pair()
            values, ones = [np.ones((1, pixels))], np.ones((1, 1))
            for name, upstream in (("forward", None), ("backward", (ones, ones, None, None))):
                out = cuda_calls.gradient_statistics([g], [e], values=values, upstream=upstream)
                case = f"gradient_statistics | {channels} | {dtype} | {layout} | {name}"
                yield case, f"gradient_statistics_{name}_{wide}", 2 * channels * pixels, out


def main() -> None:
    found = {arch: {name: r for stem in STEMS for name, r in resources(stem, arch).items()} for arch in MULTIPROCESSORS}
    print("## Resources\n\nRegisters per thread, bytes of spills, global loads of 16 bytes among all in the code.\n")
    print("| kernel | " + " | ".join(MULTIPROCESSORS) + " |")
    print("|---" * (1 + len(MULTIPROCESSORS)) + "|")
    for name in found["sm_90"]:
        cells = (f"{r[0]}, {r[1]}, {r[3]}" for r in (found[arch][name] for arch in MULTIPROCESSORS))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        "\n## Launches\n\nShared memory of a block in KiB (sm_90), occupancy; per element executed PTX instructions and bytes moved.\n"
    )
    print(
        "| op | channels | dtype | side by side | pass | tile | threads | KiB | "
        + " | ".join(MULTIPROCESSORS)
        + " | PTX | bytes |"
    )
    print("|---" * (10 + len(MULTIPROCESSORS)) + "|")
    for case, kernel, elements, out in launches():
        tiling, launch = out.call.tilings[0], out.launch
        stem, backward, accumulator = case.split(" ")[0], "backward" in kernel, 8 if "64" in kernel else 4
        shares = (
            f"{occupancy(arch, found[arch][kernel][0], found[arch][kernel][2], stem, out, backward, accumulator):.0%}"
            for arch in MULTIPROCESSORS
        )
        moved = (out.report.loads.bytes + out.report.stores.bytes) / elements
        print(
            f"| {case} | {tiling.channels} x {tiling.width} | {launch.threads} | {launch.shared_bytes / 1024:.1f} | "
            f"{' | '.join(shares)} | {out.report.instructions / elements:.0f} | {moved:.2f} |"
        )


if __name__ == "__main__":
    main()

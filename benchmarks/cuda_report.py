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

from modreg_fast.bench import sass

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import cuda_calls  # noqa: E402
import ptx  # noqa: E402
from cuda_calls import BYTES, Tensor  # noqa: E402

STEMS = ("softmax_fisher", "gradient_statistics")


def resources(stem: str, architecture: int) -> dict[str, tuple[sass.Resources, str]]:
    """Of each kernel; and its global loads of 16 bytes among all."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{stem}.cubin"
        command = [ptx.NVCC, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        log = subprocess.run(
            [*command, "-o", cubin, ROOT / f"csrc/cuda/{stem}.cu"], capture_output=True, text=True, check=True
        ).stderr
        code = sass.tool("cuobjdump", "-sass", cubin.read_bytes())
    loads = {}
    for part in code.split("Function : ")[1:]:
        kinds = re.findall(r"\bLDG\.E(?:\.(?:U8|U16|64|128))?\b", part)
        loads[part.split()[0]] = f"{kinds.count('LDG.E.128')} of {len(kinds)}"
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        stores, reads = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)[:2]
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers is not None
        found[name] = sass.Resources(int(registers[1]), int(stores) + int(reads), int(shared[1]) if shared else 0), loads[name]
    return found


def occupancy(architecture: int, kernel: sass.Resources, stem: str, out, backward: bool, accumulator: int) -> float:
    """With the tiles planned for the architecture; 0 where none fits."""
    call = type(out.call).from_buffer_copy(out.call)
    launch = cuda_calls.plan(stem, call, backward, accumulator, sass.SHARED[architecture] - 2048)
    return kernel.occupancy(architecture, launch.threads, launch.shared_bytes) if launch.shared_bytes >= 0 else 0.0


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
    found = {arch: {name: r for stem in STEMS for name, r in resources(stem, arch).items()} for arch in sass.SHARED}
    titles = " | ".join(f"sm_{arch}" for arch in sass.SHARED)
    print("## Resources\n\nRegisters per thread, bytes of spills, global loads of 16 bytes among all in the code.\n")
    print(f"| kernel | {titles} |")
    print("|---" * (1 + len(found)) + "|")
    for name in found[90]:
        cells = (f"{r.registers}, {r.stack}, {loads}" for r, loads in (of_arch[name] for of_arch in found.values()))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        "\n## Launches\n\nShared memory of a block in KiB (sm_90), occupancy; per element executed PTX instructions and bytes moved.\n"
    )
    print(f"| op | channels | dtype | side by side | pass | tile | threads | KiB | {titles} | PTX | bytes |")
    print("|---" * (10 + len(found)) + "|")
    for case, kernel, elements, out in launches():
        tiling, launch = out.call.tilings[0], out.launch
        stem, backward, accumulator = case.split(" ")[0], "backward" in kernel, 8 if "64" in kernel else 4
        shares = (
            f"{occupancy(arch, of_arch[kernel][0], stem, out, backward, accumulator):.0%}" for arch, of_arch in found.items()
        )
        moved = (out.report.loads.bytes + out.report.stores.bytes) / elements
        print(
            f"| {case} | {tiling.channels} x {tiling.width} | {launch.threads} | {launch.shared_bytes / 1024:.1f} | "
            f"{' | '.join(shares)} | {out.report.instructions / elements:.0f} | {moved:.2f} |"
        )


if __name__ == "__main__":
    main()

"""What the Triton on the path makes of the kernels for sm_90, one JSON object per kernel: run by test_triton_versions.py.

Two modalities of 64 channels with masks, and four of 25."""

import itertools
import json
import re

import test_triton_compiled as kernels
import torch
import triton
from triton.backends.compiler import GPUTarget

from modreg_fast.backends.triton.offline import compile_for
from modreg_fast.bench import sass


def look(launch) -> dict:
    compiled, (shape,) = compile_for(launch, GPUTarget("cuda", 90, 32)), launch.constants["SHAPES"]
    ir, cubin = compiled.asm["ttgir"], compiled.asm["cubin"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ir, re.MULTILINE))
    loads = re.findall(r"tt\.load .* : tensor<(\d+x\d+(?:x\d+)?)x!tt\.ptr<\w+>, (#\w+)>", ir)
    found = sass.resources(cubin)
    return {
        "version": triton.__version__,
        "loads": sorted({layouts[name] for _, name in loads}),  # of two or three dimensions
        "lanes": min(32, shape.block_c // shape.held),
        "vector": min(shape.vector, shape.run),
        # Where a program has one warp, nobody waits at them; not all versions leave them out.
        "barriers": compiled.asm["ptx"].count("bar.sync") if launch.threads > 32 else 0,
        "fused": len(re.findall(r"fma\.rn", compiled.asm["ptx"])),
        "stack": found.stack,
        "occupancy": found.occupancy(90, launch.threads, compiled.metadata.shared),
        "each": sum(sass.instructions(cubin).values()) / (shape.channels * shape.block_p / launch.threads),
    }


for (channels, modalities), dtype, last, noisy, backward in itertools.product(
    ((64, 2), (25, 4)), ("float32", "bfloat16"), (False, True), (False, True), (False, True)
):
    options = {"channels": channels, "dtype": getattr(torch, dtype), "channels_last": last, "backward": backward}
    case = f"{channels} {dtype} {'channels' if last else 'pixels'}{' noise' if noisy else ''} {'backward' if backward else 'forward'}"
    fisher = kernels.softmax_fisher(**options, modalities=modalities, noisy=noisy, masked=True)
    print(json.dumps({"case": f"softmax_fisher {case}", **look(fisher)}))
    if channels == 64 and not noisy:
        print(json.dumps({"case": f"gradient_statistics {case}", **look(kernels.gradient_statistics(**options, masked=True))}))
    if not noisy:
        cross_entropy = kernels.modality_cross_entropy(**options, modalities=modalities, masked=True)
        print(json.dumps({"case": f"modality_cross_entropy {case}", **look(cross_entropy)}))

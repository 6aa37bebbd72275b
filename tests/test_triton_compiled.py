"""The Triton kernels compiled for GPUs that are not here: registers, spills, occupancy and the width of loads, for every row of the
launch table, from the very cubins that would run."""

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from modreg_fast.backends.triton import gradient_statistics as statistics
from modreg_fast.backends.triton import softmax_fisher as fisher
from modreg_fast.backends.triton.offline import compile_for
from modreg_fast.bench import sass

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16)
PIXELS, BATCH = 4096, 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Compile, whatever earlier runs left."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def tensors(count, channels, dtype, channels_last, pixels=PIXELS):
    if channels_last:
        return [torch.empty(BATCH, pixels, channels, dtype=dtype).mT for _ in range(count)]
    return [torch.empty(BATCH, channels, pixels, dtype=dtype) for _ in range(count)]


def softmax_fisher(
    *, channels, dtype=torch.float32, modalities=2, channels_last=False, noisy=False, backward=False, masked=False, pixels=PIXELS
):
    """The large kernel of a call."""
    xs = tensors(modalities, channels, dtype, channels_last, pixels)
    masks = [torch.empty(BATCH, pixels, dtype=torch.bool)] if masked else []
    present = torch.empty(BATCH, modalities, dtype=torch.bool) if masked else None
    options = (xs, masks, present, [0.5 * noisy] * modalities, 2 if noisy else 1, torch.tensor(3) if noisy else None)
    if not backward:
        return fisher.forward_launches(*options, 1e-8)[2][0]
    grad, counts = torch.empty(modalities, 1, BATCH), torch.empty(1, BATCH, dtype=torch.int64)
    return fisher.backward_launches(grad, counts, *options, False, 1e-8)[1][0]


def gradient_statistics(*, channels, dtype=torch.float32, channels_last=False, maps=False, backward=False, masked=False):
    g, e = tensors(1, channels, dtype, channels_last), tensors(1, channels, dtype, channels_last)
    f, masks = [torch.empty(BATCH, PIXELS)], [torch.empty(BATCH, PIXELS, dtype=torch.bool)] if masked else []
    if not backward:
        return statistics.forward_launches(g, e, f, masks, 1e-8, maps)[1][0]
    result, of_maps = torch.empty(1, BATCH), [torch.empty(BATCH, PIXELS)] if maps else []
    return statistics.backward_launches(result, result, of_maps, of_maps, result, g, e, f, masks, 1e-8)[1][-1]


def spilled(*, channels, backward, noisy, channels_last, modalities, masked, dtype=torch.float32):
    """Bytes a thread that may spill, of softmax_fisher: none, but for two corners of the backward pass with masks."""
    if backward and masked:
        if noisy and modalities > 2:
            return 8
        if not noisy and modalities <= 2 and channels_last and channels == 1024 and dtype == torch.bfloat16:
            return 16
    return 0


def check_resources(launch, architecture, spilled=0):
    kernel = compile_for(launch, GPUTarget("cuda", architecture, 32))
    found = sass.resources(kernel.asm["cubin"])
    occupancy = found.occupancy(architecture, launch.threads, kernel.metadata.shared)
    assert found.stack <= spilled and occupancy >= 0.5, (found, occupancy, launch.constants["SHAPES"])
    return kernel


# Every row of fisher._ELEMENTS, in both layouts.
ROWS = list(itertools.product((False, True), (False, True), (False, True), (2, 4)))


@pytest.mark.parametrize("backward, noisy, channels_last, modalities", ROWS)
def test_no_spills_and_half_of_the_threads(backward, noisy, channels_last, modalities):
    """Where most registers are needed: with masks, on sm_100."""
    options = {"backward": backward, "noisy": noisy, "channels_last": channels_last, "modalities": modalities}
    check_resources(softmax_fisher(channels=64, masked=True, **options), 100, spilled(channels=64, masked=True, **options))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_channels_and_gradient_statistics(architecture, backward, channels_last):
    check_resources(softmax_fisher(channels=1024, backward=backward, channels_last=channels_last), architecture)
    check_resources(gradient_statistics(channels=64, backward=backward, channels_last=channels_last), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backward, noisy, channels_last, modalities", ROWS)
def test_resources_of_everything(architecture, dtype, masked, backward, noisy, channels_last, modalities):
    for channels in (2, 19, 64, 256, 1024):
        options = {"channels": channels, "dtype": dtype, "backward": backward, "noisy": noisy, "masked": masked}
        options |= {"channels_last": channels_last, "modalities": modalities}
        check_resources(softmax_fisher(**options), architecture, spilled(**options))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward, channels_last, maps, masked", [*itertools.product((False, True), repeat=4)])
def test_resources_of_all_gradient_statistics(architecture, dtype, backward, channels_last, maps, masked):
    for channels in (2, 19, 64, 1024):
        launch = gradient_statistics(
            channels=channels, dtype=dtype, backward=backward, channels_last=channels_last, maps=maps, masked=masked
        )
        check_resources(launch, architecture, 16 if maps and backward and masked else 0)


def widths(kernel, kind):
    """Bits that a thread moves with each instruction of a kind (``ld`` or ``st``) on global memory."""
    found = re.findall(rf"{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return [int(vector or 1) * int(bits) for vector, bits in found]


def wide_loads(launch, architecture=90):
    return widths(compile_for(launch, GPUTarget("cuda", architecture, 32)), "ld").count(128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_loads_of_16_bytes(dtype, backward):
    """All tensor-sized loads of gradient_statistics, and of softmax_fisher where channels lie side by side; not where they begin
    between multiples of 16 bytes."""
    size = 16 // dtype.itemsize
    launch = softmax_fisher(channels=64, dtype=dtype, backward=backward, channels_last=True)
    (shape,) = launch.constants["SHAPES"]
    assert wide_loads(launch) == 2 * shape.block_c * shape.block_p // launch.threads // size
    assert wide_loads(softmax_fisher(channels=63, dtype=dtype, backward=backward, channels_last=True)) == 0
    for channels_last in (False, True):
        assert wide_loads(gradient_statistics(channels=64, dtype=dtype, backward=backward, channels_last=channels_last)) >= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_pixels_lie_side_by_side_the_lanes_of_a_warp_read_neighbours(dtype):
    """softmax_fisher then gives a thread many channels of one pixel, and the warp one row of 32 pixels."""
    launch = softmax_fisher(channels=64, dtype=dtype)
    kernel = compile_for(launch, GPUTarget("cuda", 90, 32))
    layout = re.search(r"#blocked = #ttg.blocked<\{(.*?)\}>", kernel.asm["ttgir"]).group(1)
    assert "sizePerThread = [1, 1], threadsPerWarp = [1, 32]" in layout and "order = [1, 0]" in layout
    (shape,) = launch.constants["SHAPES"]
    assert widths(kernel, "ld") == [8 * dtype.itemsize] * (2 * shape.block_c * shape.block_p // launch.threads)


def test_amd():
    """For wavefronts of 64 the same threads are half as many warps."""
    for launch in (
        softmax_fisher(channels=64),
        softmax_fisher(channels=64, noisy=True, backward=True),
        gradient_statistics(channels=64),
    ):
        kernel = compile_for(launch, GPUTarget("hip", "gfx942", 64))
        assert kernel.metadata.num_warps == launch.threads // 64
        assert re.search(r"\.vgpr_spill_count: +0\b", kernel.asm["amdgcn"])


def test_several_scales_are_one_launch_without_copies():
    xs = [
        x
        for _ in range(2)
        for c, p in ((64, 4096), (128, 1024), (320, 256), (512, 64))
        for x in tensors(1, c, torch.float32, False, p)
    ]
    main, reduction = fisher.forward_launches(xs, [], None, [0.0, 0.0], 1, None, 1e-8)[2]
    assert len(main.constants["SHAPES"]) == 4 and reduction.programs == 4 * BATCH
    kernel = check_resources(main, 90)
    assert "atom" not in kernel.asm["ptx"] and "red.global" not in kernel.asm["ptx"]


def test_sass_counts_what_is_there():
    """The classes of instructions, on a kernel whose exponentials, loads and stores are known."""
    launch = softmax_fisher(channels=64)
    counts = sass.instructions(compile_for(launch, GPUTarget("cuda", 90, 32)).asm["cubin"])
    (shape,) = launch.constants["SHAPES"]
    elements = 2 * shape.block_c * shape.block_p // launch.threads
    assert counts["mufu"] >= 1.5 * elements  # an exponential for each element and each pair
    assert elements <= counts["memory"] < 3 * elements
    assert counts["other"] < 0.1 * sum(counts.values())


def test_occupancy():
    assert sass.Resources(64, 0, 0).occupancy(90, 256) == 0.5
    assert sass.Resources(65, 0, 0).occupancy(90, 256) == 0.375  # rounded up to 72
    assert sass.Resources(32, 0, 0).occupancy(90, 1024) == 1.0
    assert sass.Resources(32, 0, 100 * 1024).occupancy(90, 256) == 0.25
    assert sass.Resources(32, 0, 0).occupancy(80, 32) == 0.5  # at most 32 blocks

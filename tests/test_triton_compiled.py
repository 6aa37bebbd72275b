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
from modreg_fast.backends.triton import modality_cross_entropy as cross_entropy
from modreg_fast.backends.triton import softmax_fisher as fisher
from modreg_fast.backends.triton.offline import compile_for
from modreg_fast.bench import sass

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16)
PIXELS, BATCH = 4096, 2
CHANNELS = (1, 2, 19, 64, 150, 256, 999, 1000, 1024)  # with and without padding, one warp for a pixel and several


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
    seed = torch.tensor(3) if noisy else None
    problem = fisher.Problem(xs, masks, present, [0.5 * noisy] * modalities, 2 if noisy else 1, seed, False, 1e-8)
    return (fisher.backward_launches(problem, *[problem.empty_result()] * 2) if backward else fisher.forward_launches(problem))[
        1
    ][0]


def gradient_statistics(*, channels, dtype=torch.float32, channels_last=False, maps=False, backward=False, masked=False):
    g, e = tensors(1, channels, dtype, channels_last), tensors(1, channels, dtype, channels_last)
    f, masks = [torch.empty(BATCH, PIXELS)], [torch.empty(BATCH, PIXELS, dtype=torch.bool)] if masked else []
    problem = statistics.Problem(g, e, f, masks, 1e-8, maps)
    if not backward:
        return statistics.forward_launches(problem)[1][0]
    return statistics.backward_launches(problem, *[problem.empty_result()] * 2)[1][-1]


def modality_cross_entropy(
    *, channels, dtype=torch.float32, modalities=2, channels_last=False, backward=False, masked=False, smoothing=0.0
):
    """``masked``: with ``present`` and class weights."""
    xs, target = tensors(modalities, channels, dtype, channels_last), torch.empty(BATCH, PIXELS, dtype=torch.int64)
    weight = torch.empty(channels) if masked else None
    present = torch.empty(BATCH, modalities, dtype=torch.bool) if masked else None
    problem = cross_entropy.Problem(xs, target, weight, present, 255, smoothing, 1e-8)
    if backward:
        return cross_entropy.backward_launches(problem, problem.empty_result())[1][0]
    return cross_entropy.forward_launches(problem)[1][0]


def check_resources(launch, architecture, least=0.125, spilled=0):
    """``least``: of the threads that are to fit; by default eight warps, each with many loads under way. ``spilled``: bytes of a thread,
    at most."""
    kernel = compile_for(launch, GPUTarget("cuda", architecture, 32))
    found = sass.resources(kernel.asm["cubin"])
    occupancy = found.occupancy(architecture, launch.threads, kernel.metadata.shared)
    assert found.stack <= spilled and occupancy >= least, (found, occupancy, launch.constants["SHAPES"])
    return kernel


# The rows of fisher._TILES, in both layouts.
ROWS = list(itertools.product((False, True), (False, True), (False, True), (2, 4)))


@pytest.mark.parametrize("backward, noisy, channels_last, modalities", ROWS)
def test_no_spills_and_an_eighth_of_the_threads(backward, noisy, channels_last, modalities):
    """Where most registers are needed: with masks, on sm_100; channels of a power of two, and others that take more than a warp."""
    for channels in (64, 150):
        launch = softmax_fisher(
            channels=channels, modalities=modalities, channels_last=channels_last, noisy=noisy, backward=backward, masked=True
        )
        check_resources(launch, 100)


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
@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("backward, noisy, channels_last", [*itertools.product((False, True), repeat=3)])
def test_resources_of_everything(architecture, dtype, masked, modalities, backward, noisy, channels_last):
    for channels in CHANNELS:
        options = {"channels": channels, "dtype": dtype, "backward": backward, "noisy": noisy, "masked": masked}
        check_resources(softmax_fisher(**options, channels_last=channels_last, modalities=modalities), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward, channels_last, maps, masked", [*itertools.product((False, True), repeat=4)])
def test_resources_of_all_gradient_statistics(architecture, dtype, backward, channels_last, maps, masked):
    for channels in CHANNELS:
        launch = gradient_statistics(
            channels=channels, dtype=dtype, backward=backward, channels_last=channels_last, maps=maps, masked=masked
        )
        check_resources(launch, architecture)


# Classes and modalities: whole pixels in a thread, up to the most that it holds; lanes that share a pixel; more than a warp for one.
CLASSES = [(2, 2), (19, 1), (19, 2), (25, 2), (25, 4), (40, 2), (32, 4), (53, 2), (64, 2), (70, 4), (150, 2), (150, 4), (1000, 2)]


@pytest.mark.parametrize("channels, modalities, channels_last", [(25, 4, False), (25, 2, True), (64, 2, False)])
def test_no_spills_of_modality_cross_entropy(channels, modalities, channels_last):
    """The backward pass of each way to hold a tile."""
    launch = modality_cross_entropy(channels=channels, modalities=modalities, channels_last=channels_last, backward=True)
    check_resources(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward, channels_last, masked", [*itertools.product((False, True), repeat=3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_resources_of_all_modality_cross_entropy(architecture, dtype, backward, channels_last, masked, smoothing):
    for channels, modalities in CLASSES:
        options = {"channels": channels, "modalities": modalities, "dtype": dtype, "backward": backward, "masked": masked}
        check_resources(
            modality_cross_entropy(**options, channels_last=channels_last, smoothing=smoothing),
            architecture,
            spilled=32 * (smoothing > 0),
        )


def widths(kernel, kind):
    """Bits that a thread moves with each instruction of a kind (``ld`` or ``st``) on global memory."""
    found = re.findall(rf"{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return [int(vector or 1) * int(bits) for vector, bits in found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward, noisy, channels_last", [*itertools.product((False, True), repeat=3)])
def test_loads_of_16_bytes(dtype, backward, noisy, channels_last):
    """softmax_fisher: every load and every store of a tile is as wide as the elements of a thread allow, at most 16 bytes."""
    launch = softmax_fisher(channels=64, dtype=dtype, backward=backward, noisy=noisy, channels_last=channels_last)
    (shape,) = launch.constants["SHAPES"]
    width = min(16, shape.held * dtype.itemsize)
    kernel = compile_for(launch, GPUTarget("cuda", 90, 32))
    for kind in ("ld", "st") if backward else ("ld",):
        found = widths(kernel, kind).count(8 * width)
        expected = 2 * shape.held * dtype.itemsize // width
        assert found == expected if width == 16 else found >= expected  # a seed has 8 bytes, too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_wide_loads_of_gradient_statistics_and_none_where_rows_are_not_aligned(dtype, backward):
    for channels_last in (False, True):
        options = {"dtype": dtype, "backward": backward, "channels_last": channels_last}
        kernel = compile_for(gradient_statistics(channels=64, **options), GPUTarget("cuda", 90, 32))
        assert widths(kernel, "ld").count(128) >= 2
    for launch in (
        softmax_fisher(channels=63, dtype=dtype, backward=backward, channels_last=True),
        softmax_fisher(channels=64, dtype=dtype, backward=backward, pixels=PIXELS - 1),
    ):
        assert 128 not in widths(compile_for(launch, GPUTarget("cuda", 90, 32)), "ld")


def check_amd(launch, registers=128):
    """For wavefronts of 64 the same threads are half as many warps. A lane of the processor's units has 512 registers for 8 wavefronts."""
    kernel = compile_for(launch, GPUTarget("hip", "gfx942", 64))
    assert kernel.metadata.num_warps == max(1, launch.threads // 64)
    found = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)\b", kernel.asm["amdgcn"])}
    assert found["vgpr_spill_count"] == found["sgpr_spill_count"] == found["private_segment_fixed_size"] == 0
    assert found["vgpr_count"] + found["agpr_count"] <= registers, found
    assert kernel.metadata.shared <= 32 * 1024, found  # of 64 KiB


def test_amd():
    check_amd(softmax_fisher(channels=64), 192)
    check_amd(softmax_fisher(channels=64, noisy=True, backward=True), 192)
    check_amd(gradient_statistics(channels=64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward, noisy, channels_last, modalities", ROWS)
def test_amd_resources(dtype, backward, noisy, channels_last, modalities):
    options = {"dtype": dtype, "backward": backward, "channels_last": channels_last, "masked": True}
    for channels in CHANNELS:
        check_amd(softmax_fisher(channels=channels, modalities=modalities, noisy=noisy, **options), 192)
        check_amd(gradient_statistics(channels=channels, maps=noisy, **options))


def test_several_scales_are_one_launch_without_copies():
    xs = [
        x
        for _ in range(2)
        for c, p in ((64, 4096), (128, 1024), (320, 256), (512, 64))
        for x in tensors(1, c, torch.float32, False, p)
    ]
    main, reduction = fisher.forward_launches(fisher.Problem(xs, [], None, [0.0, 0.0], 1, None, False, 1e-8))[1]
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
    assert elements / 4 <= counts["memory"] < elements  # loads of four
    assert counts["other"] < 0.1 * sum(counts.values())


def test_occupancy():
    assert sass.Resources(64, 0, 0).occupancy(90, 256) == 0.5
    assert sass.Resources(65, 0, 0).occupancy(90, 256) == 0.375  # rounded up to 72
    assert sass.Resources(32, 0, 0).occupancy(90, 1024) == 1.0
    assert sass.Resources(32, 0, 100 * 1024).occupancy(90, 256) == 0.25
    assert sass.Resources(32, 0, 0).occupancy(80, 32) == 0.5  # at most 32 blocks


@pytest.mark.parametrize("default", ["0", "1"])
def test_products_and_sums_are_fused_whatever_the_default(default, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    kernel = compile_for(gradient_statistics(channels=64), GPUTarget("cuda", 90, 32))
    assert "fma.rn.f32" in kernel.asm["ptx"]

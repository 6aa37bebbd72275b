"""The Triton kernels compiled for GPUs that are not here: registers, spills, occupancy and the width of loads, for every row of the
launch table, from the very cubins that would run."""

import dataclasses
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


def check_resources(launch, architecture, spilled=0):
    kernel = compile_for(launch, GPUTarget("cuda", architecture, 32))
    found = sass.resources(kernel.asm["cubin"])
    occupancy = found.occupancy(architecture, launch.threads, kernel.metadata.shared)
    assert found.stack <= spilled and occupancy >= 0.5, (found, occupancy, launch.constants["SHAPES"])
    return kernel


# Every row of fisher._ELEMENTS: direction, noise, layout, class of modalities; channels that fill 256, 512 and 1024 threads.
ROWS = list(itertools.product((False, True), (False, True), (False, True), (2, 4)))


@pytest.mark.parametrize("backward, noisy, channels_last, modalities", ROWS)
def test_no_spills_and_half_of_the_threads(backward, noisy, channels_last, modalities):
    for channels in (64, 1024):
        launch = softmax_fisher(
            channels=channels, backward=backward, noisy=noisy, channels_last=channels_last, modalities=modalities
        )
        check_resources(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward, noisy, channels_last, modalities", [*ROWS, *itertools.product((False, True), repeat=3, )][:16])
def test_everything(architecture, dtype, backward, noisy, channels_last, modalities):
    for channels in (2, 16, 19, 64, 150, 256, 512, 1024):
        launch = softmax_fisher(
            channels=channels,
            dtype=dtype,
            backward=backward,
            noisy=noisy,
            channels_last=channels_last,
            modalities=modalities,
        )
        check_resources(launch, architecture)

"""The CUDA kernels of csrc/cuda, compiled by nvcc and executed by the PTX interpreter, against the NumPy oracle. The interpreter fails on
any access out of bounds or misaligned, read of unwritten memory, race and stray barrier; the traffic it counts is asserted here."""

import itertools
import sys
from pathlib import Path

import cuda_calls
import numpy as np
import oracle
import ptx
import pytest
from cuda_calls import BYTES, FarTensor, Tensor
from helpers import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cuda_report import assembled  # noqa: E402

pytestmark = pytest.mark.skipif(
    ptx.NVCC is None or cuda_calls.COMPILER is None,
    reason="needs nvcc and a C++ compiler to build the kernels and their host side",
)

SEED = 0x123456789ABCDEF
VALUES = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6, "float64": 1e-12}
GRADIENTS = {"float32": 5e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 1e-12}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def features_of(rng, shapes, dtype="float32", layout="pixels", modalities=2, scale=1.0, tensor=Tensor, **options):
    memory = ptx.Memory()
    return [[tensor(memory, scale * rng.standard_normal(s), dtype, layout, **options) for s in shapes] for _ in range(modalities)]


def check_softmax(rng, features, masks=None, present=None, sigma=None, draws=1, detach=False, tolerance=1.0, **options):
    """Both passes of one call; returns their outputs."""
    modalities, scales, batch = len(features), len(features[0]), features[0][0].shape[0]
    wide = [[x.values() for x in row] for row in features]
    upstream = rng.standard_normal((modalities, scales, batch)) * features[0][0].shape[2]
    expected, gradients = oracle.softmax_fisher(wide, masks, present, sigma, draws, SEED, detach, upstream=upstream)
    given = dict(masks=masks, present=present, sigma=sigma, draws=draws, seed=SEED, detach=detach, **options)
    forward = cuda_calls.softmax_fisher(features, **given)
    kind = features[0][0].dtype
    assert_close(forward.information.numpy(), expected, VALUES[kind] * tolerance)
    counts = np.stack([np.full(batch, x.shape[2]) if masks is None else masks[s].sum(1) for s, x in enumerate(features[0])])
    np.testing.assert_array_equal(forward.counts.numpy(), counts)
    backward = cuda_calls.softmax_fisher(features, weight=upstream / np.maximum(counts, 1) / draws, **given)
    for row, expected_row in zip(backward.gradients, gradients, strict=True):
        for gradient, e in zip(row, expected_row, strict=True):
            bound = GRADIENTS[gradient.dtype]
            assert_close(gradient.values(), e, bound if bound > 1e-4 else bound * tolerance)
    return forward, backward


# ---- softmax_fisher ----


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", BYTES)
def test_softmax_fisher(rng, dtype, layout):
    features = features_of(rng, [(2, 19, 300)], dtype, layout)
    forward, _ = check_softmax(rng, features)
    assert forward.launch.blocks * forward.launch.threads >= 2 * 2 * 32


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", BYTES)
def test_noise_masks_and_missing_modalities(rng, dtype, layout):
    features = features_of(rng, [(3, 10, 77)], dtype, layout, modalities=3)
    masks = [rng.random((3, 77)) > 0.3]
    masks[0][1] = False  # a sample without a valid pixel
    present = np.array([[True, False, True], [True, True, True], [False, False, True]])
    check_softmax(rng, features, masks, present, sigma=[0.5, 0.3, 0.0], draws=3, tolerance=5)


@pytest.mark.parametrize(("channels", "pixels"), [(1, 5), (2, 1), (3, 33), (4, 64), (64, 64), (65, 31), (260, 20), (1024, 9)])
def test_sizes(rng, channels, pixels):
    features = features_of(rng, [(2, channels, pixels)], modalities=3)
    if channels == 1:
        assert not cuda_calls.softmax_fisher(features).information.numpy().any()
    else:
        check_softmax(rng, features, tolerance=2)
        check_softmax(rng, features_of(rng, [(2, channels, pixels)], "bfloat16", "channels"), sigma=[0.0, 1.0], tolerance=5)


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_aligned_lines_that_end_within_a_piece(rng, layout):
    check_softmax(rng, features_of(rng, [(2, 20, 44)], "bfloat16", layout, gap=4), gap=4)


def test_scales_of_all_kinds_in_one_launch(rng):
    memory, shapes = ptx.Memory(), [(2, 8, 100), (2, 24, 36), (2, 320, 9), (2, 7, 1)]
    kinds = [("float32", "pixels"), ("bfloat16", "channels"), ("float16", "pixels"), ("float32", "channels")]
    features = [
        [Tensor(memory, rng.standard_normal(s), dtype, layout) for s, (dtype, layout) in zip(shapes, kinds, strict=True)]
        for _ in range(2)
    ]
    masks = [rng.random((2, s[2])) > 0.2 for s in shapes]
    check_softmax(rng, features, masks, detach=True)


def test_pixels_of_several_warps_beside_smaller_ones(rng):
    """Where a pixel takes more than a warp, all threads of a block meet at its sums, also where another scale needs more of them."""
    features = features_of(rng, [(1, 1024, 9), (1, 600, 2), (1, 8, 100)])
    _, backward = check_softmax(rng, features, sigma=[0.5, 0.0], tolerance=5)
    wide, narrow, one = backward.call.tilings[:3]
    assert wide.lanes > 32 and one.lanes < 32 and narrow.width * narrow.lanes == backward.launch.threads
    with_most = cuda_calls.SoftmaxFisher(modalities=1, scales=1, batch=1)
    with_most.sigma[0] = 0.5
    for channels, fits in ((4096, True), (4097, False)):
        with_most.tilings[0].channels, with_most.tilings[0].pixels = channels, 8
        assert (cuda_calls.plan("softmax_fisher", with_most, False, 4).shared_bytes > 0) == fits


def test_modalities_of_different_layouts(rng):
    memory = ptx.Memory()
    features = [[Tensor(memory, rng.standard_normal((1, 12, 50)), "float32", layout)] for layout in ("pixels", "channels")]
    check_softmax(rng, features)


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize(("gap", "offset"), [(3, 0), (0, 1), (8, 16)])
def test_unaligned_and_padded_lines(rng, layout, gap, offset):
    check_softmax(rng, features_of(rng, [(2, 16, 48)], "bfloat16", layout, gap=gap, offset=offset), gap=gap, offset=offset)


@pytest.mark.parametrize(("modalities", "scales", "launches"), [(2, 9, 2), (5, 10, 2), (17, 5, 3)])
def test_more_scales_than_a_launch_takes(rng, modalities, scales, launches):
    """Results, masks, and noise go by the number of the scale in the call."""
    shapes = [(2, 3 + s % 3, 12 + s) for s in range(scales)]
    features = features_of(rng, shapes, modalities=modalities)
    masks = [rng.random((2, p)) > 0.3 for _, _, p in shapes]
    present = rng.random((2, modalities)) > 0.3
    passes = check_softmax(rng, features, masks, present, sigma=[0.5, 0] + [0.2] * (modalities - 2), draws=2, tolerance=5)
    assert [out.launches for out in passes] == [launches] * 2


def test_blocks_that_take_several_tiles(rng):
    features = features_of(rng, [(2, 16, 1100)])
    masks = [rng.random((2, 1100)) > 0.5]
    forward, _ = check_softmax(rng, features, masks, most_blocks=4)
    tiling = forward.call.tilings[0]
    assert tiling.tiles_per_block > 1 and tiling.blocks > 1
    assert -(-1100 // tiling.width) % tiling.tiles_per_block  # the last block of a sample has fewer


def test_narrow_tiles_where_shared_memory_is_short(rng):
    features = features_of(rng, [(1, 256, 40)])
    wide, _ = check_softmax(rng, features)
    narrow, _ = check_softmax(rng, features, limit=24 << 10)
    assert narrow.launch.shared_bytes <= 24 << 10 < wide.launch.shared_bytes
    assert narrow.report.loads_of[features[0][0].buffer].bytes == features[0][0].bytes
    assert cuda_calls.plan("softmax_fisher", wide.call, False, 4, 2 << 10).shared_bytes == -1


def test_tiles_narrower_than_a_piece(rng):
    """Four pixels of 2 bytes: their lines are read element by element."""
    features = features_of(rng, [(1, 256, 16)], "bfloat16")
    forward = cuda_calls.softmax_fisher(features, limit=5 << 10)
    assert forward.call.tilings[0].width < 8 and not forward.call.features[0].vector
    np.testing.assert_allclose(forward.information.numpy(), cuda_calls.softmax_fisher(features).information.numpy(), rtol=1e-5)


def test_normals_of_the_highest_and_lowest_words(rng):
    """The logarithm is as exact near 0, where the radius is small, as elsewhere."""
    source = """#include "philox.h"
        extern "C" __global__ void normals(const unsigned* words, float* out) {
          const int i = 2 * threadIdx.x;
          mrf::cuda::box_muller(words[i], words[i + 1], out[i], out[i + 1]);
        }"""
    text = ptx.cuda_to_ptx(source, "sm_90", "-std=c++17", "-I", str(cuda_calls.CSRC / "cuda"))
    powers = 2 ** np.arange(32)
    first = np.concatenate([powers - 1, 2**32 - powers, rng.integers(0, 2**32, 64)]).astype(np.uint32)
    words = np.stack([first, rng.integers(0, 2**32, first.size).astype(np.uint32)], 1)
    memory = ptx.Memory()
    out = memory.empty(words.size, np.float32)
    ptx.run(text, "normals", 1, first.size, [memory.put(words.ravel()), out], memory)
    uniform = (first.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(uniform)), np.pi * 2.0**-31 * words[:, 1].view(np.int32).astype(np.float64)
    expected = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert (abs(out.numpy().reshape(-1, 2) - expected) <= 2.0**-20 * radius[:, None]).all()


def test_agreeing_and_saturated_modalities(rng):
    memory = ptx.Memory()
    x = rng.standard_normal((1, 32, 64))
    same = [[Tensor(memory, x, "float32")] for _ in range(4)]
    assert not cuda_calls.softmax_fisher(same).information.numpy().any()  # exactly
    assert (cuda_calls.softmax_fisher(same[:3]).information.numpy() < 1e-14).all()
    for scale in (1.0, 30.0):
        near = [[Tensor(memory, scale * x + 1e-2 * rng.standard_normal(x.shape), "float32")] for _ in range(2)]
        check_softmax(rng, near, tolerance=50)
    check_softmax(rng, features_of(rng, [(1, 32, 64)], scale=40.0), tolerance=50)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(rng, bad):
    memory, x = ptx.Memory(), rng.standard_normal((2, 6, 40))
    x[0, 3, 7] = bad
    features = [[Tensor(memory, x, "float32")], [Tensor(memory, rng.standard_normal(x.shape), "float32")]]
    out = cuda_calls.softmax_fisher(features).information.numpy()
    assert not np.isfinite(out[0, 0, 0]) and np.isfinite(out[:, 0, 1]).all()
    masks = [np.ones((2, 40), bool)]
    masks[0][0, 7] = False  # where it does not count, it does not matter
    assert np.isfinite(cuda_calls.softmax_fisher(features, masks=masks).information.numpy()).all()
    gradients = cuda_calls.softmax_fisher(features, masks=masks, weight=np.ones((2, 1, 2))).gradients
    assert all(np.isfinite(g.values()).all() and not g.values()[0, :, 7].any() for row in gradients for g in row)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("dtype", "channels"), [("float32", 19), ("float64", 19), ("bfloat16", 300)])
def test_not_finite_in_every_channel_of_a_pixel(rng, bad, dtype, channels):
    """What stands for the channels past the last is not taken for the highest of them."""
    memory, values = ptx.Memory(), rng.standard_normal((3, 2, channels, 9))
    values[1, 1, :, 5] = bad
    for layout in "pixels", "channels":
        features = [[Tensor(memory, x, dtype, layout)] for x in values]
        out = cuda_calls.softmax_fisher(features).information.numpy()
        assert np.isnan(out[:, 0, 1]).all() and np.isfinite(out[:, 0, 0]).all()
        for (gradient,) in cuda_calls.softmax_fisher(features, weight=np.ones((3, 1, 2))).gradients:
            spoiled = np.isnan(gradient.values())
            assert spoiled[1, :, 5].all() and spoiled.sum() == channels


@pytest.mark.parametrize("sigma", [None, [0.0, 0.5]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_infinite_upstream_gradient_passes_no_detached_reference(rng, dtype, sigma):
    """0 times infinity is NaN: what is detached is left out, not multiplied with 0."""
    features = features_of(rng, [(2, 12, 40)], dtype, "channels")
    weights = [np.ones((2, 1, 2)) for _ in range(2)]
    weights[1][1, 0, 0] = np.inf
    finite, infinite = (cuda_calls.softmax_fisher(features, sigma=sigma, detach=True, weight=w).gradients for w in weights)
    np.testing.assert_array_equal(infinite[0][0].values(), finite[0][0].values())
    np.testing.assert_array_equal(infinite[1][0].values()[1], finite[1][0].values()[1])
    assert not np.isfinite(infinite[1][0].values()[0]).all()


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "layout", "channels"), [("float32", "pixels", 9), ("bfloat16", "channels", 24), ("float16", "channels", 7)]
)
def test_few_modalities(rng, dtype, layout, channels, modalities):
    features = features_of(rng, [(2, channels, 70), (2, 2 * channels, 33)], dtype, layout, modalities=modalities)
    present = rng.random((2, modalities)) > 0.4
    present[0] = True
    forward, _ = check_softmax(rng, features, present=present)
    assert cuda_calls.UNITS[forward.call.unit] != "none"
    one = features[:1]
    assert not cuda_calls.softmax_fisher(one).information.numpy().any()
    assert not cuda_calls.softmax_fisher(one, weight=np.ones((1, 2, 2))).gradients[0][0].values().any()


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_modalities_far_apart(rng, layout):
    """Their mean has its maximum far below theirs, in a few pixels, where exponentials relative to these are all 0."""
    memory, values = ptx.Memory(), rng.standard_normal((2, 1, 16, 70))
    values[0, 0, 3, 10:14] += 500
    values[1, 0, 8, 10:14] += 500
    values[0, 0, 5, 30] += 2000
    values[1, 0, 5, 30] -= 1000
    values[1, 0, 6, 30] += 2500
    check_softmax(rng, [[Tensor(memory, x, "float32", layout)] for x in values], tolerance=5)


@pytest.mark.parametrize(("dtype", "layout", "modalities"), [("float32", "pixels", 2), ("bfloat16", "channels", 3)])
def test_saturated_modalities_that_agree(rng, dtype, layout, modalities):
    """All of p and q in one channel, the same, whatever the others are: no information and no gradient, exactly."""
    memory, values = ptx.Memory(), rng.standard_normal((modalities, 1, 16, 70))
    values[:, :, 3] += 140
    values[1, :, 5, 20] += 20
    features = [[Tensor(memory, x, dtype, layout)] for x in values]
    assert not cuda_calls.softmax_fisher(features).information.numpy().any()
    for (gradient,) in cuda_calls.softmax_fisher(features, weight=np.ones((modalities, 1, 1))).gradients:
        assert not gradient.values().any()


@pytest.mark.parametrize("modalities", [2, 4])
def test_pixels_that_need_care_beside_others(rng, modalities):
    """Each is as near to the oracle as it is alone: p and q in one channel though e and r differ, far apart, near, in one tile."""
    values = rng.standard_normal((modalities, 1, 24, 32))
    values[:, :, 3, 4:8] += 12  # p and q saturate
    values[0, :, 5, 4:8] += 9
    values[0, 0, 3, 8:12] += 200
    values[1, 0, 8, 8:12] += 200
    values[:, :, :, 12:16] = values[:1, :, :, 12:16] + 1e-2 * rng.standard_normal((modalities, 1, 24, 4))
    for pixels in (slice(None), slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)):
        memory = ptx.Memory()
        features = [[Tensor(memory, x[:, :, pixels], "float32")] for x in values]
        check_softmax(rng, features, tolerance=50)


def test_one_of_two_present(rng):
    """It agrees with itself; NaN comes through."""
    features = features_of(rng, [(2, 12, 40)])
    present = np.array([[True, False], [False, True]])
    assert not cuda_calls.softmax_fisher(features, present=present).information.numpy().any()
    gradients = cuda_calls.softmax_fisher(features, present=present, weight=np.ones((2, 1, 2))).gradients
    assert not any(row[0].values().any() for row in gradients)
    values = features[0][0].values()
    values[0, 3, 7] = np.nan
    memory = ptx.Memory()
    features = [[Tensor(memory, values, "float32")], [Tensor(memory, rng.standard_normal(values.shape), "float32")]]
    out = cuda_calls.softmax_fisher(features, present=present).information.numpy()
    assert np.isnan(out[0, 0, 0]) and not out[:, 0, 1].any()


def test_nothing_present(rng):
    features = features_of(rng, [(2, 5, 20)])
    present = np.array([[False, False], [True, True]])
    forward, backward = check_softmax(rng, features, present=present)
    assert not forward.information.numpy()[:, :, 0].any()
    assert not any(row[0].values()[0].any() for row in backward.gradients)


# ---- gradient_statistics ----


def check_statistics(rng, tensors, features=True, values=True, maps=True, masked=True, tensor=Tensor, **options):
    """``tensors``: ``(shape, dtype, layout)``; both passes of one call."""
    memory = ptx.Memory()
    grads = [tensor(memory, rng.standard_normal(s), d, layout) for s, d, layout in tensors]
    e = [tensor(memory, rng.standard_normal(s), d, layout) for s, d, layout in tensors] if features else None
    rows = [(s[0], s[2]) for s, _, _ in tensors]
    f = [(0.5 + rng.random(r)).astype(np.float32) for r in rows] if values else None
    masks = [rng.random(r) > 0.3 for r in rows] if masked else None
    up = [rng.standard_normal((len(tensors), rows[0][0])) for _ in range(2)]
    up += [[rng.standard_normal(r) for r in rows] if maps else None for _ in range(2)]
    used = [values, features, values and maps, features and maps]
    up = [u if use else None for u, use in zip(up, used, strict=True)]

    def oracle_of(k):
        return oracle.gradient_statistics(
            grads[k].values(),
            e[k].values() if features else None,
            f[k].astype(np.float64) if values else None,
            masks[k] if masked else None,
            upstream=[None if u is None else u[k] for u in up],
        )

    expected = [oracle_of(k) for k in range(len(tensors))]
    forward = cuda_calls.gradient_statistics(grads, e, values=f, masks=masks, maps=maps, **options)
    value = max(VALUES[d] for _, d, _ in tensors) if all(d == "float64" for _, d, _ in tensors) else 1e-6
    counts = np.stack([np.maximum(masks[k].sum(1), 1) if masked else np.full(r[0], r[1]) for k, r in enumerate(rows)])
    for name, present in (("fisher", values), ("attribution", features)):
        if present:
            assert_close(getattr(forward, name).numpy(), np.stack([getattr(x, name) for x in expected]), value)
        for k, actual in enumerate(getattr(forward, f"{name}_maps")):
            assert_close(actual.numpy(), getattr(expected[k], f"{name}_map"), value)
    attribution = np.stack([x.attribution for x in expected])
    weights = (
        up[0] / counts if values else None,
        up[1] / np.where(attribution > 0, 2 * attribution, np.inf) if features else None,
        *up[2:],
    )
    backward = cuda_calls.gradient_statistics(grads, e, values=f, masks=masks, upstream=weights, **options)
    for k, (_, dtype, _) in enumerate(tensors):
        assert_close(backward.to_grads[k].values(), expected[k].dg, GRADIENTS[dtype])
        if features:
            assert_close(backward.to_features[k].values(), expected[k].de, GRADIENTS[dtype])
        if values:
            assert_close(backward.to_values[k].numpy(), expected[k].df, value)
    return forward, backward


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", BYTES)
def test_gradient_statistics(rng, dtype, layout):
    shapes = [(2, 19, 300), (2, 5, 8), (2, 130, 1)]
    check_statistics(rng, [(s, dtype, layout if s[2] > 1 else "channels") for s in shapes])


@pytest.mark.parametrize(("features", "values"), [(True, False), (False, True)])
def test_gradient_statistics_with_less(rng, features, values):
    for maps, masked in itertools.product((False, True), repeat=2):
        check_statistics(rng, [((2, 12, 50), "float32", "pixels")], features, values, maps, masked)


def test_gradient_statistics_of_mixed_kinds(rng):
    kinds = [((2, 1024, 9), "bfloat16", "pixels"), ((2, 64, 40), "float32", "channels"), ((2, 6, 700), "float16", "pixels")]
    forward, backward = check_statistics(rng, kinds)
    assert forward.launches == backward.launches == 3
    forward, _ = check_statistics(rng, kinds, most_blocks=1)
    assert forward.call.tilings[0].tiles_per_block > forward.launch.threads // 32


@pytest.mark.parametrize(("tensors", "launches"), [(14, 1), (15, 2), (31, 3)])
def test_more_tensors_than_a_launch_takes(rng, tensors, launches):
    kinds = [((2, 3 + k % 4, 9 + k), "bfloat16", "pixels") for k in range(tensors)]
    passes = check_statistics(rng, kinds)
    assert [out.launches for out in passes] == [launches] * 2


def test_attribution_of_zero(rng):
    """Nothing attributed at some pixels: the gradient of the root is taken as 0 there."""
    memory, g = ptx.Memory(), rng.standard_normal((1, 8, 40))
    g[:, :, 5:9] = 0
    grads, e = [Tensor(memory, g, "float32")], [Tensor(memory, rng.standard_normal(g.shape), "float32")]
    upstream = None, np.zeros((1, 1)), None, [np.ones((1, 40))]
    backward = cuda_calls.gradient_statistics(grads, e, upstream=upstream)
    for gradient in (backward.to_grads[0].values(), backward.to_features[0].values()):
        assert np.isfinite(gradient).all() and not gradient[:, :, 5:9].any() and gradient[:, :, :5].any()


# ---- traffic, determinism, other architectures ----


def check_conflicts(report):
    """Lanes of a warp do not wait for each other at a bank of the shared memory."""
    shared = [r for (_, space), r in report.requests.items() if space == "shared"]
    assert shared and sum(r.wavefronts for r in shared) <= 1.1 * sum(r.least_wavefronts for r in shared)


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", BYTES)
def test_every_byte_moves_once(rng, dtype, layout):
    """Inputs are read once and gradients written once, in whole sectors, also where the last tile is not full."""
    features = features_of(rng, [(2, 64, 112), (2, 320, 16)], dtype, layout)
    forward = cuda_calls.softmax_fisher(features)
    backward = cuda_calls.softmax_fisher(features, weight=np.ones((2, 2, 2)))
    inputs = [x for row in features for x in row]
    gradients = [x for row in backward.gradients for x in row]
    for report, loaded, stored in ((forward.report, inputs, []), (backward.report, inputs, gradients)):
        for x, traffic in [*((x, report.loads_of[x.buffer]) for x in loaded), *((x, report.stores_to[x.buffer]) for x in stored)]:
            assert traffic.bytes == traffic.distinct == x.bytes
            assert traffic.efficiency >= 0.95
            assert (
                traffic.bytes // traffic.requests > 256
            )  # 16 bytes a thread; not all threads of a warp have a part of the last tile
    assert backward.report.stores.bytes == sum(x.bytes for x in gradients)
    for report in (forward.report, backward.report) if dtype != "float64" else ():
        check_conflicts(report)
    results = forward.report.loads.bytes - sum(x.bytes for x in inputs)  # of all blocks, read by the last ones
    assert results < 0.02 * sum(x.bytes for x in inputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [25, 50])
def test_rows_that_are_no_pieces(rng, channels, dtype):
    """Channels side by side, 50 to 200 bytes to a pixel: no conflicts, and whole sectors."""
    features = features_of(rng, [(2, channels, 128)], dtype, "channels", modalities=4)
    for out in check_softmax(rng, features):
        check_conflicts(out.report)
        for (x,) in features:
            traffic = out.report.loads_of[x.buffer]
            assert traffic.bytes == traffic.distinct == x.bytes and traffic.efficiency == 1


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_gradient_statistics_moves_every_byte_once(rng, layout):
    memory = ptx.Memory()
    grads, e = ([Tensor(memory, rng.standard_normal((2, 64, 112)), "bfloat16", layout)] for _ in range(2))
    f = [np.ones((2, 112), np.float32)]
    upstream = np.ones((1, 2)), np.ones((1, 2)), [np.ones((2, 112))], [np.ones((2, 112))]
    for out in (
        cuda_calls.gradient_statistics(grads, e, values=f, maps=True),
        cuda_calls.gradient_statistics(grads, e, values=f, upstream=upstream),
    ):
        check_conflicts(out.report)
        written = [*getattr(out, "to_grads", []), *getattr(out, "to_features", [])]
        moved = [(x, out.report.loads_of) for x in (*grads, *e)] + [(x, out.report.stores_to) for x in written]
        for x, traffic in moved:
            assert traffic[x.buffer].bytes == traffic[x.buffer].distinct == x.bytes
            assert traffic[x.buffer].efficiency >= 0.95
        for buffer in (*out.fisher_maps, *out.attribution_maps):
            traffic = (out.report.loads_of if written else out.report.stores_to)[buffer]
            assert traffic.used == traffic.distinct == buffer.size  # lanes that share a pixel read it together


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_offsets_take_64_bits(rng, layout):
    """Strides between samples and lines beyond 2^31 elements, read and written."""
    features = features_of(rng, [(3, 12, 40)], "bfloat16", layout, tensor=FarTensor)
    assert features[0][0].array.line_stride > 2**31
    check_softmax(rng, features, sigma=[0.5, 0.0])
    for dtype in ("bfloat16", "float64"):
        check_statistics(rng, [((3, 12, 40), dtype, layout)], tensor=FarTensor)


def test_same_bits_again(rng):
    features = features_of(rng, [(2, 20, 500)])
    once, again = (cuda_calls.softmax_fisher(features, sigma=[1.0, 0.0], seed=SEED) for _ in range(2))
    np.testing.assert_array_equal(once.information.numpy(), again.information.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_architectures(rng, arch):
    for dtype, layout in itertools.product(BYTES, ("pixels", "channels")):
        features = features_of(rng, [(2, 19, 300)], dtype, layout)
        check_softmax(rng, features, [rng.random((2, 300)) > 0.5], sigma=[0.4, 0.0], draws=2, tolerance=5, arch=arch)
        check_statistics(rng, [((2, 19, 300), dtype, layout)], arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("stem", "kernels"),
    [("softmax_fisher", 54), ("softmax_fisher_general", 8), ("gradient_statistics", 22), ("modality_cross_entropy", 22)],
)
def test_nothing_spills(stem, kernels, architecture):
    """Bytes stored and loaded, as ptxas reports them."""
    found = {name: taken.stack for name, taken in assembled(stem, architecture)[1].items()}
    assert len(found) == kernels
    assert not any(found.values()), found

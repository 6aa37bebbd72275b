"""modality_cross_entropy on CUDA: the kernels, compiled by nvcc and executed by the PTX interpreter, against the NumPy oracle. The
interpreter fails on any access out of bounds or misaligned, read of unwritten memory, race and stray barrier."""

import itertools

import cuda_calls
import numpy as np
import oracle
import ptx
import pytest
from cuda_calls import BYTES, TARGETS, FarTensor, Tensor
from helpers import assert_close

pytestmark = pytest.mark.skipif(
    ptx.NVCC is None or cuda_calls.COMPILER is None,
    reason="needs nvcc and a C++ compiler to build the kernels and their host side",
)

SUMS = ("cross_entropy", "joint", "information", "weights")
VALUES = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6, "float64": 1e-12}
GRADIENTS = {"float32": 3e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 1e-12}
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def given(rng, shape, modalities=2, dtype="float32", layout="pixels", *, scale=1.0, ignored=0.2, tensor=Tensor, **options):
    """Logits and a target, some pixels of which are ignored (101)."""
    memory = ptx.Memory()
    logits = [tensor(memory, scale * rng.standard_normal(shape), dtype, layout, **options) for _ in range(modalities)]
    target = rng.integers(0, shape[1], (shape[0], shape[2]))
    return logits, np.where(rng.random(target.shape) < ignored, 101, target)


def check(rng, logits, target, *, weight=None, smoothing=0.0, present=None, ignore_index=101, tolerance=1.0, **options):
    """Both passes of one call; returns their outputs."""
    modalities, batch = len(logits), len(target)
    upstream = [rng.standard_normal(shape) for shape in ((modalities, batch), batch, (modalities, batch))]
    common = dict(weight=weight, ignore_index=ignore_index, smoothing=smoothing, present=present)
    expected, gradients = oracle.modality_cross_entropy(
        [x.values() for x in logits], target.astype(np.int64), upstream=upstream, **common
    )
    kind = logits[0].dtype
    forward = cuda_calls.modality_cross_entropy(logits, target, **common, **options)
    for name, value in zip(SUMS, expected, strict=True):
        assert_close(getattr(forward, name).numpy(), value, VALUES[kind] * tolerance)
    backward = cuda_calls.modality_cross_entropy(logits, target, upstream=upstream, **common, **options)
    bound = GRADIENTS[kind] * (tolerance if kind in ("float32", "float64") else 1)
    for gradient, value in zip(backward.gradients, gradients, strict=True):
        assert_close(gradient.values(), value, bound, floor=1e-6 if not np.any(value) else 0.0)
    return forward, backward


def sums(logits, target, **options):
    out = cuda_calls.modality_cross_entropy(logits, target, ignore_index=101, **options)
    return {name: getattr(out, name).numpy() for name in SUMS}


def gradients(logits, target, **options):
    modalities, batch = len(logits), len(target)
    upstream = [np.ones((modalities, batch)), np.ones(batch), np.ones((modalities, batch))]
    return [
        x.values()
        for x in cuda_calls.modality_cross_entropy(logits, target, ignore_index=101, upstream=upstream, **options).gradients
    ]


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("channels", [19, 64])
def test_every_dtype_and_layout(rng, channels, dtype, layout):
    logits, target = given(rng, (2, channels, 100), 2, dtype, layout)
    forward, _ = check(rng, logits, target)
    assert forward.launch.blocks * forward.launch.threads >= 2 * 2 * 32


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_smoothing_and_missing_modalities(rng, smoothing, dtype, layout):
    present = np.array([[True, False, True], [True, True, True], [False, False, True], [False, False, False]])
    weight = rng.random(16) + 0.1
    weight[3] = 0
    logits, target = given(rng, (4, 16, 37), 3, dtype, layout)
    target[1] = 101  # a sample without a valid pixel
    check(rng, logits, target, weight=weight, smoothing=smoothing, present=present)


@pytest.mark.parametrize("modalities, smoothing", [(1, 0), (1, 0.2), (2, 0), (3, 0.2), (4, 0), (5, 0.2), (8, 0), (9, 0.2)])
def test_any_number_of_modalities(rng, modalities, smoothing):
    for dtype, layout, channels in (("float32", "pixels", 10), ("bfloat16", "channels", 24), ("float16", "channels", 7)):
        logits, target = given(rng, (2, channels, 40), modalities, dtype, layout)
        present = rng.random((2, modalities)) > 0.3
        check(rng, logits, target, smoothing=smoothing, present=present)


def test_as_many_modalities_as_a_launch_takes(rng):
    logits, target = given(rng, (1, 6, 20), 48, "bfloat16")
    check(rng, logits, target, present=rng.random((1, 48)) > 0.2)


@pytest.mark.parametrize(
    "channels, pixels", [(1, 5), (2, 1), (3, 33), (4, 64), (5, 2), (65, 31), (150, 70), (260, 20), (1024, 9)]
)
def test_sizes(rng, channels, pixels):
    for dtype, layout in (("float32", "pixels"), ("bfloat16", "channels"), ("bfloat16", "pixels")):
        logits, target = given(rng, (2, channels, pixels), 2, dtype, layout if pixels > 1 else "channels", ignored=0)
        check(rng, logits, target)


def test_how_pixels_are_shared():
    """Few lanes for a pixel; as many as leave sectors of pixels whole, and all for the only one."""

    def planned(channels, pixels, dtype, layout, modalities=2, backward=False, **options):
        lines, length = (channels, pixels) if layout == "pixels" else (pixels, channels)
        call = cuda_calls.ModalityCrossEntropy(modalities=modalities, batch=3)
        call.tiling.channels, call.tiling.pixels = channels, pixels
        call.logits[:modalities] = [
            cuda_calls.Array(256, lines * length, length, cuda_calls.DTYPES[dtype], layout == "pixels")
        ] * modalities
        launch = cuda_calls.plan("modality_cross_entropy", call, backward, BYTES[dtype] if dtype == "float64" else 4, **options)
        return call, launch

    for channels, pixels, dtype, layout, lanes, width, unit in (
        (64, 4096, "float32", "pixels", 1, 32, 0),
        (64, 4096, "bfloat16", "pixels", 1, 64, 0),
        (150, 4096, "bfloat16", "pixels", 2, 32, 0),
        (1024, 4096, "float32", "pixels", 4, 8, 0),
        (64, 4096, "float32", "channels", 1, 32, 1),
        (19, 4096, "bfloat16", "channels", 1, 64, 2),
        (1024, 4096, "float32", "channels", 16, 2, 1),
        (1000, 1, "float32", "channels", 32, 1, 1),
        (10, 6, "float32", "channels", 4, 8, 2),
    ):
        call, launch = planned(channels, pixels, dtype, layout)
        assert (call.tiling.lanes, call.tiling.width, call.unit) == (lanes, width, unit), (channels, dtype, layout)
        assert launch.shared_bytes > 0 and all(x.vector for x in call.logits[:2])
    for backward in (False, True):
        for layout in ("pixels", "channels"):
            assert planned(4096, 64, "float32", layout, 4, backward)[1].shared_bytes > 0
            assert planned(4096, 64, "float64", layout, 2, backward)[1].shared_bytes > 0
            assert planned(4096, 64, "float32", layout, 16, backward)[1].shared_bytes == -1


@pytest.mark.parametrize("dtype", TARGETS)
def test_every_integer_dtype_of_the_target(rng, dtype):
    logits, target = given(rng, (2, 5, 40))
    check(rng, logits, target.astype(dtype))


@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 2**40])
def test_ignore_index_may_be_a_class_or_anything(rng, ignore_index):
    logits, target = given(rng, (2, 5, 40))
    check(rng, logits, np.where(target == 101, ignore_index, target), ignore_index=ignore_index)


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("gap, offset", [(3, 0), (0, 1), (8, 16)])
def test_unaligned_and_padded_lines(rng, layout, gap, offset):
    for dtype, channels in (("float32", 16), ("bfloat16", 16), ("bfloat16", 7)):
        logits, target = given(rng, (2, channels, 48), 2, dtype, layout, gap=gap, offset=offset)
        check(rng, logits, target, gap=gap, offset=offset)


def test_padded_rows_of_few_pixels(rng):
    """Aligned ones, too, are no single line."""
    logits, target = given(rng, (2, 7, 2), 2, "bfloat16", "channels", gap=9)
    forward, _ = check(rng, logits, target, gap=9)
    assert forward.call.tiling.pitch % 16 == 0


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_offsets_take_64_bits(rng, layout):
    """Strides between samples and lines beyond 2^31 elements, read and written."""
    for dtype in ("bfloat16", "float64"):
        logits, target = given(rng, (3, 16, 40), 2, dtype, layout, tensor=FarTensor)
        assert logits[0].array.line_stride > 2**31
        check(rng, logits, target, smoothing=0.1)


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_blocks_that_take_several_tiles(rng, layout):
    logits, target = given(rng, (2, 9, 1500), 2, "float32", layout)
    forward, _ = check(rng, logits, target, most_blocks=3)
    _, backward = check(rng, logits, target, most_blocks=1)
    for out in (forward, backward):
        tiling, warps = out.call.tiling, out.launch.threads // 32
        assert tiling.tiles_per_block > warps > 1 and tiling.blocks > 1
        assert -(-1500 // tiling.width) % tiling.tiles_per_block  # the last block of a sample has fewer


def test_same_bits_again(rng):
    logits, target = given(rng, (2, 20, 500))
    once, again = sums(logits, target), sums(logits, target)
    assert all((once[name] == again[name]).all() for name in SUMS)


# ---- what does not count ----


@pytest.mark.parametrize("layout", ["pixels", "channels"])
def test_absent_modalities_are_not_read(rng, layout):
    """Nobody has written them. Their gradients are 0."""
    for modalities in (2, 6):
        logits, target = given(rng, (1, 8, 50), modalities, "bfloat16", layout)
        logits[1] = Tensor(logits[0].buffer.memory, None, "bfloat16", layout, shape=(1, 8, 50))
        present = np.arange(modalities)[None] != 1
        alone = sums([x for m, x in enumerate(logits) if m != 1], target)
        found = sums(logits, target, present=present)
        for name in ("cross_entropy", "information"):
            np.testing.assert_array_equal(np.delete(found[name], 1, 0), alone[name])
            assert not found[name][1].any()
        np.testing.assert_array_equal(found["joint"], alone["joint"])
        assert not gradients(logits, target, present=present)[1].any()


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_ignored_has_no_effect(rng, layout, smoothing):
    memory, target = ptx.Memory(), rng.integers(0, 8, (2, 70))
    target[rng.random(target.shape) < 0.4] = 101
    values = rng.standard_normal((2, 2, 8, 70))
    clean = [Tensor(memory, x, "float32", layout) for x in values]
    for bad in (NAN, INF, -INF, 3e38):
        dirty = [Tensor(memory, np.where((target == 101)[:, None], bad, x), "float32", layout) for x in values]
        for name, value in sums(clean, target, smoothing=smoothing).items():
            np.testing.assert_array_equal(sums(dirty, target, smoothing=smoothing)[name], value)
        for g, e in zip(
            gradients(dirty, target, smoothing=smoothing), gradients(clean, target, smoothing=smoothing), strict=True
        ):
            np.testing.assert_array_equal(g, e)
            assert not np.moveaxis(g, 1, 2)[target == 101].any()


def test_nothing_present(rng):
    logits, target = given(rng, (2, 5, 20))
    present = np.array([[False, False], [True, True]])
    check(rng, logits, target, present=present)
    target[0, 3] = 77  # no class, in a sample that does not count
    assert all(np.isfinite(x).all() for x in sums(logits, target, present=present).values())


@pytest.mark.parametrize("bad", [-1, 5, 255, -(2**40)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_out_of_range_makes_its_sample_nan(rng, bad, smoothing):
    """The sum of the weights among it, by which functional knows, and the gradients of its pixel."""
    logits, target = given(rng, (2, 5, 40), 3)
    target[1, 7] = bad
    present = np.array([[True, True, True], [True, False, True]])
    for name, value in sums(logits, target, smoothing=smoothing, present=present).items():
        expected = np.zeros(value.shape, bool)
        expected[..., 1] = present[1] if value.ndim == 2 else True
        np.testing.assert_array_equal(np.isnan(value), expected, err_msg=name)
    for m, g in enumerate(gradients(logits, target, smoothing=smoothing, present=present)):
        spoiled = np.isnan(g)
        assert spoiled[1, :, 7].all() == present[1, m] and spoiled.sum() == 5 * present[1, m]


# ---- numbers ----


@pytest.mark.parametrize("modalities, smoothing", [(2, 0), (2, 0.1), (5, 0.1)])
@pytest.mark.parametrize("scale", [1e-3, 30.0, 80.0])
def test_small_and_huge_logits(rng, scale, modalities, smoothing):
    logits, target = given(rng, (2, 9, 70), modalities, scale=scale)
    check(rng, logits, target, smoothing=smoothing, tolerance=3)


def test_far_off_classes_beside_near_ones(rng):
    """A pixel whose sums are computed again does not change those beside it."""
    memory, target, values = ptx.Memory(), rng.integers(0, 9, (1, 60)), rng.standard_normal((2, 1, 9, 60))
    for layout in ("pixels", "channels"):
        one = [Tensor(memory, x, "float32", layout) for x in values]
        changed = values.copy()
        changed[0, 0, (target[0, 11] + 1) % 9, 11] += 200
        other = [Tensor(memory, x, "float32", layout) for x in changed]
        check(rng, other, target)
        for a, b in zip(gradients(one, target), gradients(other, target), strict=True):
            np.testing.assert_array_equal(np.delete(a, 11, 2), np.delete(b, 11, 2))


@pytest.mark.parametrize("level", [0.0, 100.0])
def test_confident_and_right(rng, level):
    """Where ``p_y`` is all but 1 the plain float32 formula has few digits or none."""
    memory, target = ptx.Memory(), rng.integers(0, 6, (2, 50))
    values = level + rng.standard_normal((2, 2, 6, 50))
    np.put_along_axis(values, target[None, :, None], np.take_along_axis(values, target[None, :, None], 2) + 12, 2)
    check(rng, [Tensor(memory, x, "float32") for x in values], target)


@pytest.mark.parametrize("smoothing", [0.05, 0.5])
def test_smoothed_and_learnt(rng, smoothing):
    """Where ``p`` is close to the smoothed target, the information is a sum of small differences."""
    memory, target = ptx.Memory(), rng.integers(0, 6, (2, 50))
    t = np.full((2, 6, 50), smoothing / 6)
    np.put_along_axis(t, target[:, None], 1 - smoothing + smoothing / 6, 1)
    logits = [Tensor(memory, np.log(t) + 1e-2 * rng.standard_normal(t.shape), "float32") for _ in range(2)]
    check(rng, logits, target, smoothing=smoothing, tolerance=50)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at_target", [False, True])
def test_nan_and_infinity_come_out_as_nan(rng, bad, at_target, smoothing):
    for layout, modalities in (("pixels", 3), ("channels", 5)):
        memory, target = ptx.Memory(), rng.integers(0, 5, (2, 40))
        values = rng.standard_normal((modalities, 2, 5, 40))
        values[1, 0, target[0, 7] if at_target else (target[0, 7] + 1) % 5, 7] = bad
        logits = [Tensor(memory, x, "float32", layout) for x in values]
        found = sums(logits, target, smoothing=smoothing)
        for name in ("cross_entropy", "information"):
            expected = np.zeros((modalities, 2), bool)
            expected[1, 0] = True
            np.testing.assert_array_equal(np.isnan(found[name]), expected)
        assert np.isnan(found["joint"]).tolist() == [True, False] and np.isfinite(found["weights"]).all()
        for m, g in enumerate(gradients(logits, target, smoothing=smoothing)):
            assert not np.isfinite(g[0, :, 7]).any() if m == 1 else True
            assert np.isfinite(np.delete(g, 7, 2)).all()


def test_classes_that_are_ruled_out(rng):
    """A logit of -inf counts as in torch: it adds nothing, and at the target all is lost."""
    memory, target, values = ptx.Memory(), rng.integers(0, 5, (2, 40)), rng.standard_normal((2, 2, 5, 40))
    target[target == 3] = 2
    values[:, :, 3] = -INF
    for layout in ("pixels", "channels"):
        logits = [Tensor(memory, x, "float32", layout) for x in values]
        without = [Tensor(memory, np.delete(x, 3, 1), "float32", layout) for x in values]
        fewer = np.where(target > 3, target - 1, target)
        for (name, a), b in zip(sums(logits, target).items(), sums(without, fewer).values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)
        for a, b in zip(gradients(logits, target), gradients(without, fewer), strict=True):
            np.testing.assert_allclose(np.delete(a, 3, 1), b, atol=1e-6)
            assert not a[:, 3].any()
        lost = target.copy()
        lost[0, 0] = 3
        found = sums(logits, lost)["cross_entropy"]
        assert (found[:, 0] == INF).all() and np.isfinite(found[:, 1]).all()


# ---- traffic ----


@pytest.mark.parametrize("channels", [64, 19])
@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_byte_moves_once(rng, dtype, layout, channels):
    """Inputs are read once and gradients written once, in whole sectors and 16 bytes a lane. Lanes meet in a bank of shared memory only
    where channels lie side by side: at the logit of the target, wherever it lies."""
    conflicts = 1.1 if layout == "pixels" or (dtype, channels) == ("float32", 19) else 1.3
    logits, target = given(rng, (2, channels, 224), 2, dtype, layout)
    upstream = np.ones((2, 2)), np.ones(2), np.ones((2, 2))
    for above in (None, upstream):
        out = cuda_calls.modality_cross_entropy(logits, target, ignore_index=101, upstream=above)
        moved = [(x, out.report.loads_of[x.buffer]) for x in logits] + [
            (x, out.report.stores_to[x.buffer]) for x in out.gradients
        ]
        assert len(moved) == (2 if above is None else 4)
        for x, traffic in moved:
            assert traffic.bytes == traffic.distinct == x.bytes
            assert traffic.efficiency >= 0.95 and traffic.bytes // traffic.requests > 400
        assert out.report.loads_of[out.target].bytes == out.target.size
        known = [x.buffer for x in logits] + [out.target]
        rest = sum(t.distinct for b, t in out.report.loads_of.items() if b not in known and not b.constant)
        assert rest < 0.03 * sum(x.bytes for x in logits)  # upstream gradients, or the results of blocks
        shared = [r for (_, space), r in out.report.requests.items() if space == "shared"]
        assert sum(r.wavefronts for r in shared) <= conflicts * sum(r.least_wavefronts for r in shared)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_architectures(rng, arch):
    for dtype, layout, modalities, smoothing in itertools.product(BYTES, ("pixels", "channels"), (2, 5), (0.0, 0.1)):
        for channels in (19, 32):
            logits, target = given(rng, (2, channels, 100), modalities, dtype, layout)
            check(rng, logits, target, weight=rng.random(channels), smoothing=smoothing, arch=arch)

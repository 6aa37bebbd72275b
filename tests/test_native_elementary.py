"""The inner functions of the native kernels, one instruction set at a time, against NumPy in higher precision; no torch involved."""

import numpy as np
import pytest

harness = pytest.importorskip("modreg_fast._native_harness", reason="built with MODREG_FAST_BUILD_HARNESS=1, as `make test` does")

instruction_sets = pytest.mark.parametrize("isa", harness.instruction_sets())


def ulps(y, exact):
    """Distance from the exact value in units of the last place of its rounding to the type of y."""
    spacing = np.spacing(np.abs(exact.astype(y.dtype))).astype(exact.dtype)
    return float(np.max(np.abs(y.astype(exact.dtype) - exact) / spacing))


@instruction_sets
def test_exp2_is_within_three_ulp(isa):
    x = np.concatenate([np.linspace(-126, 127.99, 8_000_003), np.arange(-126, 128)]).astype(np.float32)
    assert ulps(harness.exp2(isa, x), np.exp2(x.astype(np.float64))) < 3
    x = np.concatenate([np.linspace(-1022, 1023.99, 2_000_003), np.arange(-1022, 1024)])
    assert ulps(harness.exp2_double(isa, x), np.exp2(x.astype(np.longdouble))) < 2


@instruction_sets
def test_log_is_within_two_ulp(isa):
    every_binade = np.arange(0x00800000, 0x7F800000, 331, dtype=np.uint32).view(np.float32)
    around_one = np.linspace(0.5, 2, 3_000_002).astype(np.float32)
    x = np.concatenate([every_binade, around_one[around_one != 1]])
    assert ulps(harness.log(isa, x), np.log(x.astype(np.float64))) < 2
    around_one = np.linspace(0.5, 2, 1_000_002)
    x = np.concatenate([np.exp(np.linspace(-700, 700, 1_000_003)), around_one[around_one != 1]])
    assert ulps(harness.log_double(isa, x), np.log(x.astype(np.longdouble))) < 2


@instruction_sets
@pytest.mark.parametrize("suffix", ["", "_double"])
def test_special_values(isa, suffix):
    dtype = np.float64 if suffix else np.float32
    exp2, log = getattr(harness, "exp2" + suffix), getattr(harness, "log" + suffix)
    np.testing.assert_array_equal(
        exp2(isa, np.array([0, -0.0, -2000, -np.inf, np.nan], dtype)), np.array([1, 1, 0, 0, np.nan], dtype)
    )
    largest = np.finfo(dtype).maxexp
    with np.errstate(over="ignore"):
        above = np.array([largest, largest + 0.5, largest + 1, 2 * largest, 3.3 * largest, 1e30, np.inf], dtype)
    np.testing.assert_array_equal(exp2(isa, above), np.full_like(above, np.inf))
    np.testing.assert_array_equal(
        log(isa, np.array([1, 0, -0.0, -1, np.inf, np.nan], dtype)),
        np.array([0, -np.inf, -np.inf, np.nan, np.inf, np.nan], dtype),
    )


@instruction_sets
@pytest.mark.parametrize(("suffix", "dtype", "tolerance"), [("", np.float32, 1.5e-7), ("_double", np.float64, 1e-15)])
def test_sincos_of_turns(isa, suffix, dtype, tolerance):
    turns = np.linspace(0, 1, 1_000_001).astype(dtype)
    sine, cosine = getattr(harness, "sincos_turns" + suffix)(isa, turns)
    angle = 2 * np.arctan2(np.longdouble(0), np.longdouble(-1)) * turns.astype(np.longdouble)
    assert np.max(np.abs(sine - np.sin(angle))) < tolerance
    assert np.max(np.abs(cosine - np.cos(angle))) < tolerance


@instruction_sets
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(isa, counter, key, words):
    lanes = np.repeat(np.array(counter, np.uint32)[:, None], 64, axis=1)
    lanes[0, 0] ^= 1  # a lane that must differ, so that a constant cannot pass
    result = harness.philox(isa, lanes, *key)
    np.testing.assert_array_equal(result[:, 1:], np.repeat(np.array(words, np.uint32)[:, None], 63, axis=1))
    assert (result[:, 0] != words).all()


@instruction_sets
def test_sixteen_bit_types_widen_exactly_and_narrow_to_nearest_even(isa):
    every = np.arange(1 << 16, dtype=np.uint16)
    half = every.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(harness.widen_float16(isa, every), half)
    np.testing.assert_array_equal(harness.widen_bfloat16(isa, every).view(np.uint32), every.astype(np.uint32) << 16)

    x = np.arange(0, 1 << 32, 641, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ties = ((np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.concatenate([x, ties, half, np.nextafter(half, np.float32(np.inf))])
        np.testing.assert_array_equal(harness.narrow_float16(isa, x).view(np.float16), x.astype(np.float16))

    narrow = harness.narrow_bfloat16(isa, x)
    finite = np.isfinite(x)
    bits = x[finite].view(np.uint32).astype(np.uint64)
    below, rest = bits >> 16, bits & 0xFFFF
    nearest_even = below + ((rest > 0x8000) | ((rest == 0x8000) & (below & 1 == 1)))
    np.testing.assert_array_equal(narrow[finite], nearest_even.astype(np.uint16))
    wide = (narrow[~finite].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(wide, x[~finite])


def plain_softmax_fisher(x, weight, eps):
    """The definition and its derivative in NumPy, features (M, B, C, P)."""
    mean = x.mean(0)

    def log_softmax(v):
        shifted = v - v.max(-2, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-2, keepdims=True))

    q, log_p = np.exp(log_softmax(mean)), log_softmax(x)
    p = np.exp(log_p)
    d = p - q
    norm = (d * d).sum(2, keepdims=True)
    f = -(q * log_p).sum(2, keepdims=True) + eps
    w = weight[:, :, None, None]
    jp = p * d - p * (p * d).sum(2, keepdims=True)
    bracket = (w * (-2 / f * d + norm / f**2 * log_p)).sum(0)
    jq = q * bracket - q * (q * bracket).sum(1, keepdims=True)
    return (norm / f)[:, :, 0].sum(-1).T, w * (2 / f * jp - norm / f**2 * d) + jq / len(x)


@instruction_sets
@pytest.mark.parametrize(("suffix", "dtype", "tolerance"), [("", np.float32, 1e-5), ("_double", np.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 19, 100), (3, 2, 64, 33), (4, 1, 5, 251), (1, 1, 7, 5)])
def test_pixel_math_of_each_instruction_set(isa, suffix, dtype, tolerance, shape):
    generator = np.random.default_rng(0)
    x = (3 * generator.standard_normal(shape)).astype(dtype)
    weight = generator.standard_normal(shape[:2])
    information, gradients = getattr(harness, "softmax_fisher" + suffix)(isa, x, weight, 1e-8)
    exact, exact_gradients = plain_softmax_fisher(x.astype(np.float64), weight, 1e-8)
    for value, reference in ((information, exact), (gradients, exact_gradients)):
        assert np.linalg.norm(value - reference) <= tolerance * np.linalg.norm(reference) + 1e-30

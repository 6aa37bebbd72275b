"""The noise: published vectors, the standard normal distribution, independence, and the same draws from every backend."""

import math

import helpers
import numpy as np
import oracle
import pytest
import torch
from scipy import stats

from modreg_fast.backends.reference.philox import philox4x32, standard_normal
from modreg_fast.functional import softmax_fisher_information

# Random123, kat_vectors: philox4x32 10 (counter, key, result).
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def noise(shape, *, seed=1, tensor=0, draw=0, dtype=torch.float64):
    return standard_normal(torch.Size(shape), seed=torch.tensor(seed), tensor=tensor, draw=draw, dtype=dtype)


@pytest.mark.parametrize("counter, key, result", VECTORS)
def test_known_answers(counter, key, result):
    assert oracle.philox(words(counter), words(key)) == words(result)
    out = philox4x32(tuple(torch.tensor([w]) for w in words(counter)), tuple(torch.tensor(w) for w in words(key)))
    assert [int(w) for w in out] == words(result)


def test_random_blocks_agree_with_the_oracle():
    counter = torch.randint(2**32, (4, 100))
    key = torch.randint(2**32, (2,))
    out = torch.stack(philox4x32(tuple(counter), tuple(key)))
    for i in range(100):
        assert out[:, i].tolist() == oracle.philox(counter[:, i].tolist(), key.tolist())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 4, 7), (2, 9, 1), (1, 5, 16)])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63 - 1])
def test_counter_layout(shape, seed):
    """Every element where the documentation puts it, in both precisions of the accumulation."""
    expected = oracle.normal(shape, seed, tensor=3, draw=2)
    np.testing.assert_allclose(noise(shape, seed=seed, tensor=3, draw=2).numpy(), expected, rtol=1e-13, atol=1e-14)
    # float32 rounds u before the logarithm: where u is next to 1 the radius sqrt(-2 log u) is only good to sqrt(2^-24).
    narrow = noise(shape, seed=seed, tensor=3, draw=2, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    np.testing.assert_allclose(narrow.numpy(), expected, rtol=1e-5, atol=4e-4)


@pytest.mark.parametrize("channels, pixels", [(1, 3), (3, 17), (4, 8), (5, 33), (9, 1)])
@pytest.mark.parametrize("layout", ["pixels", "channels_last"])
def test_every_backend_draws_it(backend, channels, pixels, layout):
    """The information at a large sigma is all noise: to 1e-12 in float64 only the oracle's own draws give it."""
    x = [[torch.randn(2, channels, pixels, dtype=torch.float64) for _ in range(2)] for _ in range(2)]
    seed, wide = 2**62 + 12345, helpers.wide(x)
    if layout == "channels_last":
        x = [[y.mT.contiguous().mT for y in row] for row in x]
    actual = softmax_fisher_information(x, sigma=[3.0, 1.0], samples=3, seed=seed, backend=backend)
    expected = oracle.softmax_fisher(wide, sigma=[3.0, 1.0], samples=3, seed=seed)
    helpers.assert_close(actual, expected, 1e-12)


def test_sizes_past_vectors_and_tiles(backend):
    """Where blocks of the counter start depends on the sample, the channel quad and the pixel, also past a tile."""
    x = [[torch.randn(2, 6, 777, dtype=torch.float64)] for _ in range(2)]
    actual = softmax_fisher_information(x, sigma=2.0, seed=5, backend=backend)
    helpers.assert_close(actual, oracle.softmax_fisher(helpers.wide(x), sigma=[2.0, 2.0], seed=5), 1e-12)


def test_masks_do_not_move_the_noise(backend):
    x = [[torch.randn(2, 5, 40, dtype=torch.float64)] for _ in range(2)]
    mask = torch.rand(2, 40) < 0.5
    actual = softmax_fisher_information(x, mask=mask, sigma=2.0, seed=5, backend=backend)
    expected = oracle.softmax_fisher(helpers.wide(x), masks=[helpers.wide(mask)], sigma=[2.0, 2.0], seed=5)
    helpers.assert_close(actual, expected, 1e-12)


# ---- distribution ----

SAMPLE = noise((4, 32, 2048), dtype=torch.float32).double().numpy().ravel()  # 262144 numbers


def test_moments():
    n = SAMPLE.size
    assert abs(SAMPLE.mean()) < 4 / math.sqrt(n)
    assert abs(SAMPLE.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(SAMPLE)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(SAMPLE)) < 4 * math.sqrt(24 / n)


def test_kolmogorov_smirnov():
    assert stats.kstest(SAMPLE, "norm").pvalue > 1e-3


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 4.5])
def test_tails(limit):
    """Both tails hold as many numbers as they should (Poisson error of four deviations)."""
    expected = SAMPLE.size * stats.norm.sf(limit)
    for count in ((limit < SAMPLE).sum(), (-limit > SAMPLE).sum()):
        assert abs(count - expected) <= 4 * math.sqrt(expected) + 1


def test_every_word_of_a_block_is_normal():
    x = noise((1, 8, 20000)).numpy()
    assert all(stats.kstest(x[:, word::4].ravel(), "norm").pvalue > 1e-3 for word in range(4))


# ---- independence ----


def uncorrelated(a, b):
    """Neither the numbers nor their squares are correlated (five deviations)."""
    a, b = (x.double().numpy().ravel() for x in (a, b))
    limit = 5 / math.sqrt(a.size)
    return abs(np.corrcoef(a, b)[0, 1]) < limit and abs(np.corrcoef(a**2, b**2)[0, 1]) < limit


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": 2**32 + 1}, {"tensor": 1}, {"draw": 1}, {"tensor": 1, "draw": 1}])
def test_streams_are_independent(other):
    assert uncorrelated(noise((2, 8, 4096)), noise((2, 8, 4096), **other))


def test_neighbours_are_independent():
    x = noise((4, 16, 2048))
    assert uncorrelated(x[:2], x[2:])  # samples
    for step in (1, 2, 3, 4):
        assert uncorrelated(x[:, step:], x[:, :-step])  # channels
        assert uncorrelated(x[:, :, step:], x[:, :, :-step])  # pixels
    assert len(np.unique(x.numpy())) > 0.999 * x.numel()


def test_tensor_and_draw_are_not_exchanged():
    assert not torch.equal(noise((1, 4, 8), tensor=1, draw=2), noise((1, 4, 8), tensor=2, draw=1))

"""The oracle itself: its gradients against finite differences, its noise against published vectors (test_philox.py)."""

import numpy as np
import oracle
import pytest

rng = np.random.default_rng(7)
MASK = rng.random((2, 3)) < 0.7
PRESENT = np.array([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("masks, present", [(None, None), ([MASK, MASK], PRESENT)])
@pytest.mark.parametrize("sigma", [None, [0.3, 0.0, 1.0]])
def test_softmax_fisher_gradient(detach, masks, present, sigma):
    features = [[rng.normal(size=(2, 4, 3)) for _ in range(2)] for _ in range(3)]
    upstream = rng.normal(size=(3, 2, 2))
    options = {"masks": masks, "present": present, "sigma": sigma, "samples": 2, "seed": 5}
    _, analytic = oracle.softmax_fisher(features, detach=detach, upstream=upstream, **options)

    def total(x):
        return (oracle.softmax_fisher([[x, *features[0][1:]], *features[1:]], **options) * upstream).sum()

    numeric = oracle.central_difference(total, features[0][0])
    if detach:  # finite differences see the reference move: only with one it would not
        assert np.abs(numeric - analytic[0][0]).max() > 1e-3
    else:
        np.testing.assert_allclose(analytic[0][0], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("wrt", ["g", "e", "f"])
def test_gradient_statistics_gradient(mask, wrt):
    inputs = {"g": rng.normal(size=(2, 4, 3)), "e": rng.normal(size=(2, 4, 3)), "f": rng.random((2, 3)) + 0.1}
    upstream = [rng.normal(size=2), rng.normal(size=2), rng.normal(size=(2, 3)), rng.normal(size=(2, 3))]

    def total(x):
        out = oracle.gradient_statistics(**{**inputs, wrt: x}, mask=mask)
        return sum(
            (a * b).sum()
            for a, b in zip((out.fisher, out.attribution, out.fisher_map, out.attribution_map), upstream, strict=True)
        )

    analytic = getattr(oracle.gradient_statistics(**inputs, mask=mask, upstream=upstream), f"d{wrt}")
    np.testing.assert_allclose(analytic, oracle.central_difference(total, inputs[wrt]), rtol=1e-6, atol=1e-8)


def test_detached_reference_is_a_constant():
    """With ``q`` held fixed by hand, finite differences agree with ``detach=True``."""
    x, y = rng.normal(size=(1, 4, 1)), rng.normal(size=(1, 4, 1))
    q = np.exp(oracle.log_softmax((x[0] + y[0]) / 2))

    def information(x):
        log_p = oracle.log_softmax(x[0])
        return ((np.exp(log_p) - q) ** 2).sum() / (oracle.EPS - (q * log_p).sum())

    _, gradients = oracle.softmax_fisher([[x], [y]], detach=True, upstream=np.array([[[1.0]], [[0.0]]]))
    np.testing.assert_allclose(gradients[0][0], oracle.central_difference(information, x), rtol=1e-6, atol=1e-9)

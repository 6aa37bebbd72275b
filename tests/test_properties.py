"""Properties: random shapes, masks and presence against the oracle; the log-Sobolev inequality and where it is exact."""

import math

import helpers
import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modreg_fast.functional import (
    balance_penalty,
    functional_entropy,
    gradient_statistics,
    modality_share,
    resize_mask,
    softmax_fisher_information,
)

few = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

spatial = st.lists(st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def problems(draw):
    """Shapes of the scales, number of modalities, samples, and every option."""
    batch, modalities = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shapes = [(batch, draw(st.integers(1, 9)), *draw(spatial)) for _ in range(draw(st.integers(1, 3)))]
    return {
        "shapes": shapes,
        "modalities": modalities,
        "mask": draw(st.sampled_from([None, 0.0, 0.2, 0.7])),
        "present": draw(st.sampled_from([None, 0.2, 0.7])),
        "sigma": [draw(st.sampled_from([0.0, 0.0, 0.5, 3.0])) for _ in range(modalities)],
        "samples": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "detach": draw(st.booleans()),
        "layouts": [
            draw(st.sampled_from(["contiguous", "last", "stepped", "expanded"])) for _ in range(modalities * len(shapes))
        ],
        "torch_seed": draw(st.integers(0, 10**6)),
    }


def laid_out(x, layout):
    if layout == "last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "stepped":
        return x.repeat_interleave(2, x.dim() - 1)[..., ::2]
    return x[:1].expand_as(x) if layout == "expanded" else x


@few
@given(problems())
def test_softmax_fisher(backend, problem):
    torch.manual_seed(problem["torch_seed"])
    shapes, modalities = problem["shapes"], problem["modalities"]
    layouts = iter(problem["layouts"])
    features = [
        [laid_out(torch.randn(s, dtype=torch.float64), next(layouts)).requires_grad_() for s in shapes] for _ in range(modalities)
    ]
    masks = None if problem["mask"] is None else [torch.rand(s[0], *s[2:]) < problem["mask"] for s in shapes]
    present = None if problem["present"] is None else torch.rand(shapes[0][0], modalities) < problem["present"]
    options = {"sigma": problem["sigma"], "samples": problem["samples"], "seed": problem["seed"]}
    information = softmax_fisher_information(
        features, mask=masks, present=present, detach_reference=problem["detach"], backend=backend, **options
    )
    upstream = torch.randn_like(information)
    values, expected = oracle.softmax_fisher(
        helpers.wide(features),
        masks=helpers.wide(masks),
        present=helpers.wide(present),
        detach=problem["detach"],
        upstream=helpers.wide(upstream),
        **options,
    )
    # One modality alone has p = q: what is 0 in exact arithmetic may be rounding of 1 here.
    helpers.assert_close(information, values, 1e-11, floor=1e-2)
    helpers.assert_close(helpers.gradients(information, features, upstream), expected, 1e-11, floor=1e-2)


@few
@given(st.data())
def test_gradient_statistics(backend, data):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), *data.draw(spatial))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    layouts = [data.draw(st.sampled_from(["contiguous", "last", "stepped", "expanded"])) for _ in range(2)]
    g, e = (laid_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_() for layout in layouts)
    f = (torch.rand(shape[0], *shape[2:], dtype=torch.float64) + 0.1).requires_grad_()
    density = data.draw(st.sampled_from([None, 0.0, 0.3, 0.8]))
    mask = None if density is None else torch.rand(shape[0], *shape[2:]) < density
    result = gradient_statistics([g], [e], [f], mask=None if mask is None else [mask], maps=True, backend=backend)
    outputs = [result.fisher, result.attribution, result.fisher_maps[0], result.attribution_maps[0]]
    upstream = [torch.randn_like(x) for x in outputs]
    u = [upstream[0][0], upstream[1][0], *upstream[2:]]
    want = oracle.gradient_statistics(
        *map(helpers.wide, (g, e, f)), mask=helpers.wide(mask), upstream=[helpers.wide(x) for x in u]
    )
    for actual, expected in zip(
        [result.fisher[0], result.attribution[0], *outputs[2:], *helpers.gradients(outputs, [g, e, f], upstream)],
        [want.fisher, want.attribution, want.fisher_map, want.attribution_map, want.dg, want.de, want.df],
        strict=True,
    ):
        helpers.assert_close(actual, expected, 1e-11, floor=1e-6)


@few
@given(st.data())
def test_penalty_and_share(data):
    shape = [data.draw(st.integers(1, 4)) for _ in range(3)]
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    information, valid = torch.rand(shape, dtype=torch.float64) + 1e-3, torch.rand(shape) < 0.6
    objective = data.draw(st.sampled_from(["inverse", "norm", "log"]))
    expected = oracle.penalty(helpers.wide(information), objective, valid=helpers.wide(valid))
    assert balance_penalty(information, objective=objective, valid=valid).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    share = modality_share(information[:, 0])
    assert (share >= 0).all() and torch.allclose(share.sum(0), torch.ones((), dtype=torch.float64))


@few
@given(st.data())
def test_resize_mask_by_whole_factors(data):
    """Pooling by whole factors, in any number of dimensions, is a count."""
    size = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    factors = [data.draw(st.integers(1, 4)) for _ in size]
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    mask = torch.rand(2, *(n * k for n, k in zip(size, factors, strict=True))) < 0.5
    blocks = mask.reshape(2, *(x for pair in zip(size, factors, strict=True) for x in pair))
    count = blocks.sum(dim=[2 + 2 * i for i in range(len(size))])
    assert torch.equal(resize_mask(mask, size), 2 * count >= math.prod(factors))


@few
@given(st.integers(1, 200), st.integers(0, 10**6), st.floats(-20, 20))
def test_entropy_is_not_negative_and_homogeneous(count, seed, log_scale):
    """Ent(f) >= 0 and Ent(s f) = s Ent(f)."""
    f = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-6
    entropy, scale = functional_entropy(f, 0), math.exp(log_scale)
    assert entropy >= 0
    assert functional_entropy(scale * f, 0).item() == pytest.approx(scale * entropy.item(), rel=1e-9, abs=1e-15 * scale)


# ---- log-Sobolev: Ent(f) <= sigma^2 / 2 E[|grad f|^2 / f] for Gaussian measures ----


def positive_function(seed, dimension):
    """A random smooth positive function, away from 0, of bounded growth."""
    generator = torch.Generator().manual_seed(seed)
    w, v = (torch.randn(5, dimension, generator=generator, dtype=torch.float64) for _ in range(2))
    shift = torch.randn(5, generator=generator, dtype=torch.float64)
    return lambda z: 0.2 + ((z @ w.T + shift).sin() + 1.1).mul(torch.sigmoid(z @ v.T)).sum(-1)


@few
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_log_sobolev_is_never_violated(seed, dimension, sigma):
    """Both sides by the library, from the same samples; the slack is five standard errors, taken over 20 independent batches."""
    function = positive_function(seed, dimension)
    noise = torch.randn(20, 500, dimension, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    z = (0.3 + sigma * noise).requires_grad_()
    f = function(z)
    (g,) = torch.autograd.grad(f.sum(), z)
    fisher = gradient_statistics([g], values=[f.detach()], channel_dim=-1, eps=0.0, backend="reference").fisher[0]
    gap = sigma**2 / 2 * fisher - functional_entropy(f.detach(), 1)
    assert gap.mean() >= -5 * gap.std() / math.sqrt(20)
    assert fisher.mean() > 0


def test_log_sobolev_slack_is_small_enough_to_fail():
    """Half of the constant would be noticed: on the exact case the test above rejects sigma^2 / 4."""
    z = torch.randn(20, 1000, 3, dtype=torch.float64)
    w = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    f = (z @ w).exp()
    fisher = gradient_statistics([f[..., None] * w], values=[f], channel_dim=-1, eps=0.0, backend="reference").fisher[0]
    gap = fisher / 4 - functional_entropy(f, 1)
    assert gap.mean() < -5 * gap.std() / math.sqrt(20)


@pytest.mark.parametrize("w", [[0.5], [1.0], [0.6, -0.3]])
def test_log_sobolev_is_exact_for_exponentials(backend, w):
    """f = exp(w.z), z ~ N(0, I): Ent(f) = E[|grad f|^2 / f] / 2 = |w|^2 / 2 exp(|w|^2 / 2). By Gauss-Hermite quadrature:
    with its nodes repeated in proportion to their weights, means are the exact expectations."""
    w = np.array(w)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    grid = np.stack(np.meshgrid(*[nodes] * len(w), indexing="ij"), -1).reshape(-1, len(w))
    weight = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * len(w), indexing="ij"), -1), -1).ravel()
    counts = np.round(weight * 2e5).astype(int)  # what the rounding drops has a weight below 1e-5
    z = torch.from_numpy(np.repeat(grid, counts, 0))
    f = (z @ torch.from_numpy(w)).exp()
    g = f[:, None] * torch.from_numpy(w)
    fisher = gradient_statistics([g.T[None].contiguous()], values=[f[None]], eps=0.0, backend=backend).fisher.item()
    entropy = functional_entropy(f, 0).item()
    exact = (w @ w) / 2 * math.exp((w @ w) / 2)
    assert fisher / 2 == pytest.approx(exact, rel=2e-3)
    assert entropy == pytest.approx(exact, rel=2e-3)
    assert entropy == pytest.approx(fisher / 2, rel=2e-3)


def test_log_sobolev_is_exact_for_exponentials_by_sampling(backend):
    """The same by Monte Carlo over samples as pixels, within five standard errors."""
    w = torch.tensor([0.3, -0.4], dtype=torch.float64)
    z = torch.randn(30, 2, 4000, dtype=torch.float64)
    f = torch.einsum("bcp,c->bp", z, w).exp()
    fisher = gradient_statistics([f[:, None] * w[:, None]], values=[f], eps=0.0, backend=backend).fisher[0]
    gap = fisher / 2 - functional_entropy(f, 1)
    assert abs(gap.mean()) < 5 * gap.std() / math.sqrt(30)
    assert gap.std() / math.sqrt(30) < 0.02 * fisher.mean() / 2  # the test has power: the error is two per cent

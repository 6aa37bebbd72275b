"""The small functions in plain PyTorch: entropy, share, penalty, masks at other resolutions."""

import itertools

import helpers
import numpy as np
import oracle
import pytest
import torch

from modreg_fast.functional import balance_penalty, functional_entropy, modality_share, resize_mask

NAN = float("nan")


# ---- functional_entropy ----


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_entropy(dtype, tolerance, scale):
    f = ((torch.rand(50, 4) + 0.01) * scale).to(dtype)
    expected = [oracle.entropy(helpers.wide(f[:, i])) for i in range(4)]
    assert helpers.relative_error(functional_entropy(f, 0), np.array(expected)) < tolerance


@pytest.mark.parametrize("dim", [0, -1, (0, 2), [1, 2], (0, 1, 2)])
def test_entropy_over_dimensions(dim):
    f = torch.rand(3, 4, 5, dtype=torch.float64)
    dims = [d % 3 for d in ([dim] if isinstance(dim, int) else dim)]
    kept = [d for d in range(3) if d not in dims]
    flat = f.permute(*dims, *kept).reshape(-1, *[f.shape[d] for d in kept])
    result = functional_entropy(f, dim)
    assert result.shape == flat.shape[1:]
    for index in np.ndindex(*flat.shape[1:]):
        assert result[index].item() == pytest.approx(oracle.entropy(helpers.wide(flat[(slice(None), *index)])), rel=1e-12)


@pytest.mark.parametrize("spread, tolerance", [(1e-1, 1e-6), (1e-2, 1e-4), (1e-3, 1e-2)])
def test_entropy_of_nearly_constant_functions(spread, tolerance):
    """``E[f log f] - E[f] log E[f]`` cancels there, because Ent is about Var / (2 E): never worse than that, and much better."""
    f = 1 + spread * torch.randn(10000)
    exact = oracle.entropy(helpers.wide(f))
    plain = (f * f.log()).mean() - f.mean() * f.mean().log()
    error = abs(functional_entropy(f, 0).item() - exact)
    assert error <= tolerance * exact and error <= abs(plain.item() - exact) + 1e-6 * exact


def test_entropy_of_constants_is_zero():
    assert functional_entropy(torch.full((100,), 0.1), 0).item() == pytest.approx(0.0, abs=1e-9)


def test_entropy_gradient():
    f = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: functional_entropy(x, 0), f)


def test_entropy_with_zeros():
    """``0 log 0 = 0``, and the derivative ``log(f / E f) / n`` of the other samples is not harmed by them."""
    f = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    result = functional_entropy(f, 1)
    assert result[0].item() == pytest.approx(oracle.entropy(np.array([0.0, 1.0, 3.0]))) and result[1] == 0
    (grad,) = torch.autograd.grad(result.sum(), f)
    torch.testing.assert_close(grad[0, 1:], torch.log(torch.tensor([0.75, 2.25], dtype=torch.float64)) / 3)
    assert not grad[1].isnan().any()


def test_entropy_nan_shows():
    result = functional_entropy(torch.tensor([[1.0, NAN], [1.0, 2.0]]), 1)
    assert result.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(dtype):
    """One large sample among many has terms above 65504, shares have sums above it, and 1e-8 is 0 in float16."""
    f = torch.cat([torch.full((1,), 6e4), torch.full((999,), 0.1)]).to(dtype)
    assert functional_entropy(f, 0).item() == pytest.approx(oracle.entropy(helpers.wide(f)), rel=1e-5)

    attribution = torch.tensor([[5e4, 1e-3], [2e4, 3e-3]], dtype=dtype)
    a = helpers.wide(attribution)
    helpers.assert_close(modality_share(attribution), a / a.sum(0), 1e-6)

    information = torch.rand(2, 3, 70_000).to(dtype)
    information[0, 0] = 0
    for objective in ("inverse", "norm", "log"):
        for valid in (None, torch.ones(70_000, dtype=torch.bool)):
            x = information.clone().requires_grad_()
            penalty = balance_penalty(x, objective=objective, valid=valid)
            assert penalty.item() == pytest.approx(oracle.penalty(helpers.wide(information), objective), rel=1e-5)
            penalty.backward()
            assert x.grad.dtype == dtype and x.grad[1].isfinite().all()


# ---- modality_share ----


def test_share():
    attribution = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    a = helpers.wide(attribution)
    helpers.assert_close(modality_share(attribution), a / a.sum(0), 1e-14)
    assert torch.autograd.gradcheck(modality_share, attribution)


def test_share_of_nothing_is_zero_with_zero_gradient():
    attribution = torch.tensor([[0.0, 1.0], [0.0, 3.0]], requires_grad=True)
    share = modality_share(attribution)
    assert share.tolist() == [[0.0, 0.25], [0.0, 0.75]]
    (grad,) = torch.autograd.grad(share[0].sum(), attribution)
    assert grad.isfinite().all()


def test_share_nan_shows():
    assert modality_share(torch.tensor([[NAN, 1.0], [1.0, 1.0]])).isnan().tolist() == [[True, False], [True, False]]


# ---- balance_penalty ----


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
@pytest.mark.parametrize("weights", [None, [0.25, 2.0]])
@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.3])
def test_penalty(objective, weights, with_valid, eps):
    information = torch.rand(3, 2, 4, dtype=torch.float64) + 0.01
    valid = torch.rand(3, 2, 4) < 0.5
    valid[0, 1] = False  # this entry has no sample: left out
    valid = valid if with_valid else None
    actual = balance_penalty(information, objective=objective, eps=eps, weights=weights, valid=valid)
    expected = oracle.penalty(helpers.wide(information), objective, eps, weights, helpers.wide(valid))
    assert actual.shape == () and actual.item() == pytest.approx(expected, rel=1e-12)


def test_penalty_weights_are_not_rounded_to_float32():
    information = torch.rand(3, 2, 4, dtype=torch.float64) + 0.01
    expected = oracle.penalty(helpers.wide(information), "inverse", weights=[0.1, 0.7])
    assert balance_penalty(information, weights=[0.1, 0.7]).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
def test_penalty_gradient(objective):
    information = (torch.rand(3, 2, 4, dtype=torch.float64) + 0.1).requires_grad_()
    valid = torch.rand(3, 2, 4) < 0.7
    options = {"objective": objective, "valid": valid, "weights": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    assert torch.autograd.gradcheck(lambda x: balance_penalty(x, **options), information)
    (grad,) = torch.autograd.grad(balance_penalty(information, **options), information)
    assert (grad[~valid] == 0).all() and (grad[valid] < 0).all()  # more information, less penalty


@pytest.mark.parametrize("objective", ["inverse", "log"])
def test_penalty_by_its_own_derivative(objective):
    """Where all entries count the derivative is written out; with ``valid`` autograd finds it: the same, and differentiated again."""
    information = torch.rand(2, 3, 4, dtype=torch.float64) + 0.1

    def derivatives(**options):
        x = information.clone().requires_grad_()
        found = [balance_penalty(x, objective=objective, **options)]
        for _ in range(3):
            found += torch.autograd.grad(found[-1].square().sum(), x, create_graph=True)
        return found

    for own, plain in zip(derivatives(), derivatives(valid=torch.ones(2, 3, 4, dtype=torch.bool)), strict=True):
        helpers.assert_close(own, plain, 1e-12)
    x = information.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: balance_penalty(y, objective=objective), x)
    (gradient,) = torch.autograd.grad(balance_penalty(x * torch.nan, objective=objective), x)
    assert gradient.isnan().all()


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
def test_penalty_where_nothing_counts(objective):
    information = torch.zeros(2, 2, 3, requires_grad=True)
    penalty = balance_penalty(information, objective=objective, eps=0.0, valid=torch.zeros(2, 2, 3, dtype=torch.bool))
    (grad,) = torch.autograd.grad(penalty, information)
    assert penalty == 0 and (grad == 0).all()


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
def test_penalty_ignores_what_invalid_entries_hold(objective):
    information, valid = torch.rand(2, 1, 3) + 0.1, torch.tensor([[[True, False, True]], [[True, True, False]]])
    spoiled = information.where(valid, NAN).requires_grad_()
    penalty = balance_penalty(spoiled, objective=objective, valid=valid)
    assert torch.equal(penalty, balance_penalty(information, objective=objective, valid=valid))
    assert torch.autograd.grad(penalty, spoiled)[0].isfinite().all()
    assert balance_penalty(spoiled, objective=objective).isnan()


VALID = torch.tensor([[True, False, True, True], [True, True, False, True]])


@pytest.mark.parametrize(
    "information, valid, broadcast",
    [
        ((2, 2, 4), VALID[0], VALID[0][None, None]),  # (B)
        ((2, 2, 4), VALID, VALID[None]),  # (S, B): to the right, as everywhere in PyTorch
        ((2, 2, 4), VALID[:, None], VALID[:, None]),  # (M, 1, B)
        ((3, 2, 4), VALID, VALID[None]),
        ((2, 4), VALID, VALID[:, None]),  # (M, B) for one scale
        ((2, 4), VALID[0], VALID[0][None, None]),
    ],
)
def test_valid_broadcasts_to_information(information, valid, broadcast):
    information = torch.rand(*information, dtype=torch.float64) + 0.1
    three = helpers.wide(information if information.dim() == 3 else information[:, None])
    expected = oracle.penalty(three, "inverse", valid=np.broadcast_to(broadcast.numpy(), three.shape))
    assert balance_penalty(information, valid=valid).item() == pytest.approx(expected, rel=1e-12)


def test_penalty_of_one_scale_may_lack_its_dimension():
    information = torch.rand(3, 4)
    assert torch.equal(balance_penalty(information), balance_penalty(information[:, None]))


# ---- resize_mask ----

RESIZES = [
    ((8, 12), (4, 6)),
    ((8, 12), (2, 3)),
    ((8, 12), (1, 1)),
    ((4, 6), (8, 12)),
    ((8, 12), (8, 12)),
    ((9,), (3,)),
    ((4, 6, 8), (2, 3, 2)),
    ((5,), (2,)),  # ratios that are no integers, as strided convolutions of odd sizes make them
    ((2,), (3,)),
    ((29, 29), (15, 15)),
    ((15, 15), (8, 8)),
    ((7, 10), (3, 4)),
    ((3, 5, 7), (2, 2, 3)),
]


@pytest.mark.parametrize("old, new", RESIZES, ids=lambda x: "x".join(map(str, x)))
def test_resize_mask_half_rule(old, new):
    """A pixel is valid exactly when at least half of its area is."""
    for share in (0.3, 0.5, 0.7):
        mask = torch.rand(4, *old) < share
        actual = resize_mask(mask, new)
        assert actual.dtype == torch.bool and actual.shape == (4, *new)
        assert np.array_equal(helpers.wide(actual), oracle.resize_mask(helpers.wide(mask), new))


def test_resize_mask_exactly_half_counts():
    """Every mask of 2 x 2 pixels onto one."""
    for values in itertools.product([False, True], repeat=4):
        mask = torch.tensor(values).view(1, 2, 2)
        assert resize_mask(mask, (1, 1)).item() == (sum(values) >= 2)


@pytest.mark.parametrize("old, new", RESIZES, ids=lambda x: "x".join(map(str, x)))
def test_resize_mask_keeps_all_and_nothing(old, new):
    assert resize_mask(torch.ones(2, *old, dtype=torch.bool), new).all()
    assert not resize_mask(torch.zeros(2, *old, dtype=torch.bool), new).any()

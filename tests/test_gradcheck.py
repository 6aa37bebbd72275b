"""First and second derivatives of both functions by finite differences, in float64, on every backend; small sizes."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from modreg_fast.functional import gradient_statistics, softmax_fisher_information

MASK = torch.tensor([[True, False], [True, True]])
PRESENT = torch.tensor([[True, False], [True, True]])
ONE = {"mask": MASK, "present": PRESENT}
OPTIONS = {
    "plain": {},
    "masked": {"mask": MASK},
    "present": {"present": PRESENT},
    "noise": {"sigma": [0.5, 0.0], "samples": 2, "seed": 3, **ONE},
    "eps": {"eps": 0.3},
}


def leaves(*shapes, positive=False):
    x = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    return [(y.abs() + 0.3 if positive else y).requires_grad_() for y in x]


def information(backend, options):
    """Of two modalities at two scales, as a function of four tensors."""
    masks = None if "mask" not in options else [options["mask"], options["mask"][:, :1]]
    options = {**options, "mask": masks, "backend": backend}
    return lambda *x: softmax_fisher_information([x[:2], x[2:]], **options)


SCALES = [(2, 3, 2), (2, 2, 1)] * 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_softmax_fisher_gradcheck(backend, options):
    """All directions at once (fast mode); test_softmax_fisher.py has every element."""
    assert gradcheck(information(backend, options), leaves(*SCALES), fast_mode=True)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["noise"]], ids=["plain", "noise"])
def test_softmax_fisher_gradgradcheck(backend, options):
    """With respect to the features and to the upstream gradient."""
    assert gradgradcheck(information(backend, options), leaves(*SCALES), fast_mode=True)


def test_softmax_fisher_gradgradcheck_element_by_element(backend):
    def function(x, y):
        return softmax_fisher_information([[x], [y]], mask=MASK[:1], backend=backend)

    assert gradcheck(function, leaves((1, 3, 2), (1, 3, 2))) and gradgradcheck(function, leaves((1, 3, 2), (1, 3, 2)))


def test_detached_reference_stays_detached_in_second_derivatives(backend):
    """``q`` is a constant for derivatives of every order, as ``q.detach()`` is in eager PyTorch."""
    x, y = leaves((1, 3, 2), (1, 3, 2))
    upstream, probe = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 3, 2, dtype=torch.float64)
    logits = torch.stack([x, y])
    q = logits.mean(0).softmax(1).detach()
    log_p = logits.log_softmax(2)
    eager = ((log_p.exp() - q).square().sum(2) / (1e-8 - (q * log_p).sum(2))).mean(2, keepdim=True)
    ours = softmax_fisher_information([[x], [y]], detach_reference=True, backend=backend)
    results = []
    for value in (eager, ours):
        first = torch.stack(torch.autograd.grad(value, [x, y], upstream, create_graph=True))
        results.append((first, *torch.autograd.grad((first * probe).sum(), [x, y, upstream])))
    torch.testing.assert_close(results[1], results[0])


def statistics(backend, mask, maps):
    def function(*x):
        out = gradient_statistics(
            x[:2], x[2:4], x[4:], mask=None if mask is None else [mask, mask[:, :1]], maps=maps, backend=backend
        )
        return (out.fisher, out.attribution, *(out.fisher_maps or []), *(out.attribution_maps or []))

    return function


def statistics_leaves():
    return leaves((2, 2, 2), (2, 3, 1), (2, 2, 2), (2, 3, 1)) + leaves((2, 2), (2, 1), positive=True)


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])
@pytest.mark.parametrize("maps", [False, True])
def test_gradient_statistics_gradcheck(backend, mask, maps):
    assert gradcheck(statistics(backend, mask, maps), statistics_leaves())


@pytest.mark.parametrize("mask, maps", [(None, False), (MASK, True)])
def test_gradient_statistics_gradgradcheck(backend, mask, maps):
    assert gradgradcheck(statistics(backend, mask, maps), statistics_leaves(), fast_mode=True)


def test_third_derivatives_of_a_penalty_through_a_head(backend):
    """Gradients of gradients of the penalty, which itself holds a gradient: as meta-learning would ask for."""
    x, w = leaves((1, 2, 2), (2, 2))

    def penalty(x, w):
        e = torch.einsum("kc,bcp->bkp", w, x.sin())
        (g,) = torch.autograd.grad(e.tanh().sum(), x, create_graph=True)
        return gradient_statistics([g], [x], [e.square().sum(1) + 0.1], backend=backend)[:2]

    assert gradcheck(penalty, (x, w)) and gradgradcheck(penalty, (x, w))

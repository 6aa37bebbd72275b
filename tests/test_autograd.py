"""How the functions behave inside autograd: graphs used twice, tensors changed in place, upstream gradients of things that do not count."""

import helpers
import pytest
import torch
from helpers import LAYOUTS

from modreg_fast.functional import gradient_statistics, softmax_fisher_information

SHAPE = (3, 5, 4, 6)
NAN, INF = float("nan"), float("inf")
MASK = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.6
MASK[1] = False
PRESENT = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])


def given(layout="contiguous", dtype=torch.float32):
    return LAYOUTS[layout](torch.randn(SHAPE).to(dtype)).requires_grad_()


def both(backend, layout="contiguous", dtype=torch.float32, sigma=0.0):
    """All outputs of both functions, and the leaves."""
    x = [given(layout, dtype) for _ in range(5)]
    f = (torch.rand(3, 4, 6) + 0.1).to(dtype).requires_grad_()
    information = softmax_fisher_information(
        [[y] for y in x[:3]], mask=MASK, present=PRESENT, sigma=sigma, seed=1, backend=backend
    )
    out = gradient_statistics([x[3]], [x[4]], [f], mask=MASK, maps=True, backend=backend)
    return [information, out.fisher, out.attribution, out.fisher_maps[0], out.attribution_maps[0]], [*x, f]


def test_backward_twice_gives_the_same(backend):
    outputs, leaves = both(backend, sigma=0.3)
    upstream = [torch.randn_like(x) for x in outputs]
    first, second = (helpers.gradients(outputs, leaves, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradients_accumulate(backend):
    outputs, leaves = both(backend)
    total = sum(x.square().sum() for x in outputs)
    expected = helpers.gradients(total, leaves, None)
    total.backward(retain_graph=True)
    total.backward()
    for leaf, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * want)


@pytest.mark.parametrize("changed", range(6))
def test_a_changed_input_is_noticed(backend, changed):
    """An input written between forward and backward cannot be differentiated any more: an error, never another gradient."""
    outputs, leaves = both(backend)
    with torch.no_grad():
        leaves[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        helpers.gradients(outputs, [leaves[changed]], [torch.ones_like(x) for x in outputs])


@pytest.mark.parametrize("written", range(5))
def test_outputs_may_be_written(backend, written):
    """An output changed in place has the right gradient, or backward refuses; never another gradient."""
    state = torch.get_rng_state()
    outputs, leaves = both(backend)
    expected = helpers.gradients(outputs[written], leaves, 2 * torch.ones_like(outputs[written]))
    torch.set_rng_state(state)
    outputs, leaves = both(backend)
    try:
        outputs[written].mul_(2)
        actual = helpers.gradients(outputs[written], leaves, torch.ones_like(outputs[written]))
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        assert all(map(torch.equal, actual, expected))


def test_inference_mode(backend):
    with torch.inference_mode():
        x = [torch.randn(SHAPE) for _ in range(2)]
        information = softmax_fisher_information([[y] for y in x], backend=backend)
        fisher = gradient_statistics([x[0]], [x[1]], [x[0][:, 0].abs()], backend=backend).fisher
    assert information.isfinite().all() and fisher.shape == (1, 3)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_upstream_gradients_of_what_does_not_count(backend, value):
    """``1 / information`` of an absent modality and ``log`` of a masked-out map send infinities back: the outputs are constant there."""
    outputs, leaves = both(backend)
    entries = PRESENT.T[:, None] & MASK.flatten(1).any(1)
    counts = [entries, entries[:1, 0], entries[:1, 0], MASK, MASK]
    clean = [torch.randn_like(x).where(c, 0) for x, c in zip(outputs, counts, strict=True)]
    spoiled = [u.where(c, value) for u, c in zip(clean, counts, strict=True)]
    expected = helpers.gradients(outputs, leaves, clean)
    actual = helpers.gradients(outputs, leaves, spoiled)
    assert all(g.isfinite().all() for g in expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_second_order_gradients_of_what_does_not_count(backend):
    """Masked-out NaN and absent modalities stay out of second derivatives as well."""
    x = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)]
    counts = [MASK[:, None] & PRESENT[:, m, None, None, None] for m in range(3)]
    results = []
    for value in (0.5, NAN):
        leaves = [y.where(c, value).requires_grad_() for y, c in zip(x, counts, strict=True)]
        information = softmax_fisher_information([[y] for y in leaves], mask=MASK, present=PRESENT, backend=backend)
        g = torch.autograd.grad(information.square().sum(), leaves, create_graph=True)
        statistics = gradient_statistics(g, leaves, mask=[c[:, 0] for c in counts], backend=backend)
        results.append([*g, *torch.autograd.grad(statistics.attribution.sum(), leaves)])
    for clean, spoiled in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, spoiled)


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("dtype, layout", [(torch.float32, x) for x in LAYOUTS] + [(torch.bfloat16, "contiguous")])
def test_every_element_of_the_results_is_written(backend, layout, dtype):
    """In deterministic mode PyTorch fills fresh memory with NaN: whatever a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        outputs, leaves = both(backend, layout, dtype)
        results = [*outputs, *helpers.gradients(outputs, leaves, [torch.ones_like(x) for x in outputs])]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in results)

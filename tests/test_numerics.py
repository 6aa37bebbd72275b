"""The contract on numbers: accuracy of every type, hard inputs, NaN and infinity, bits that do not change."""

import helpers
import numpy as np
import oracle
import pytest
import torch
from conftest import BACKENDS

from modreg_fast.functional import gradient_statistics, softmax_fisher_information

NAN, INF = float("nan"), float("inf")


def compute(features, backend, upstream=None, **options):
    """Information and gradients; the upstream gradient is scaled so that gradients of single pixels are of order one."""
    information = softmax_fisher_information(features, backend=backend, **options)
    pixels = torch.tensor([float(x[0, 0].numel()) for x in features[0]], dtype=information.dtype)
    upstream = torch.randn_like(information) * pixels[:, None] if upstream is None else upstream
    return information, helpers.gradients(information, features, upstream), upstream


def plain(features, upstream, eps=oracle.EPS):
    """The formula as one writes it in PyTorch, in float32 throughout, differentiated by autograd."""
    rows = []
    for x in features:
        q = torch.stack([y[0].float() for y in features]).mean(0).softmax(1)
        log_p = x[0].float().log_softmax(1)
        fisher = (log_p.exp() - q).square().sum(1) / (-(q * log_p).sum(1) + eps)
        rows.append(fisher.flatten(1).mean(1))
    information = torch.stack(rows)[:, None]
    return information, helpers.gradients(information, features, upstream.to(information.dtype))


def hard(case, modalities, shape=(2, 19, 12, 16)):
    """Inputs on which float32 is hard pressed, at one scale. A third modality lies between the other two."""
    x, y = torch.randn(shape), torch.randn(shape)
    winner, opposed, later = torch.zeros(3, *shape)
    winner[:, 3] = opposed[:, 4] = later[:, 8] = 1
    pair = {
        "agree_1e-2": (x, x + 1e-2 * y),
        "agree_1e-4": (x, x + 1e-4 * y),
        "agree_1e-6": (x, x + 1e-6 * y),
        "agree_far_out": (50 + 5 * x, 50 + 5 * x + 1e-3 * y),
        "saturated_80": (80 * x.sign(), 80 * y.sign()),
        "one_hot_80": (160.0 * (x == x.amax(1, True)) - 80, 160.0 * (y == y.amax(1, True)) - 80),
        "one_hot_agree": (160.0 * (x == x.amax(1, True)) - 80, 150.0 * (x == x.amax(1, True)) - 75),
        "saturated_one": (x, 80 * y.sign()),
        "confident": (x + 200 * winner, y),
        "both_confident": (0.1 * x + 50 * winner, 0.1 * y + 200 * winner),
        "spread_10": (10 * x, 10 * y),
        "spread_30": (30 * x, 30 * y),
        "overtaken": (x + 50 * opposed + 40 * later, y - 55 * opposed + 40 * later),  # e^100 before both agree on e^40
        "wide": (100 * x, 100 * y),
        "huge": (1e4 * x, 1e4 * y),
        "offset": (x + 1e4, y - 1e4),
        "constant": (torch.zeros(shape), y),
    }[case]
    return [*pair, (pair[0] + pair[1]) / 2][:modalities]


# What the oracle itself resolves: p - q is rounded to 2^-53 and squared, and divided by f + eps where f may be 0.
RESOLUTION = np.finfo(np.float64).eps ** 2 / oracle.EPS

HARD = ["agree_1e-2", "agree_1e-4", "agree_1e-6", "agree_far_out", "saturated_80", "one_hot_80", "one_hot_agree", "saturated_one"]
HARD += ["confident", "both_confident", "spread_10", "spread_30", "overtaken"]
HARD += ["wide", "huge", "offset", "constant"]


@pytest.mark.parametrize("channels", [2, 3, 19, 150, 1024])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("modalities", [2, 3])
def test_float32_within_1e_5(backend, channels, scale, modalities):
    features = helpers.features(modalities, [(2, channels, 37 if channels < 1000 else 9)], scale=scale)
    information, gradients, upstream = compute(features, backend)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, 1e-5)
    for gradient, want in zip(gradients, expected, strict=True):
        helpers.assert_close(gradient, want[0], 1e-5)


@pytest.mark.parametrize("dtype", helpers.STORAGE)
@pytest.mark.parametrize("channels", [2, 19, 150])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_16_bit_gradients_within_their_storage(backend, dtype, channels, scale):
    """Element by element: computed in float32, rounded once. Values as in float32."""
    features = helpers.features(2, [(2, channels, 37)], dtype=dtype, scale=scale)
    information, gradients, upstream = compute(features, backend)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, 1e-5)
    relative, absolute = helpers.STORAGE[dtype]
    for gradient, (want,) in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        bound = relative * np.abs(want) + absolute + 1e-5 * np.abs(want).max()
        assert (np.abs(helpers.wide(gradient) - want) <= bound).all()


@pytest.mark.parametrize("dtype", helpers.STORAGE)
def test_16_bit_gradient_statistics_within_their_storage(backend, dtype):
    g, e = (torch.randn(2, 19, 37).to(dtype).requires_grad_() for _ in range(2))
    f = (torch.rand(2, 37) + 0.1).to(dtype).requires_grad_()
    result = gradient_statistics([g], [e], [f], backend=backend)
    upstream = [37 * torch.randn_like(x) for x in result[:2]]
    gradients = helpers.gradients(result[:2], [g, e, f], upstream)
    u = [x[0].double().numpy() for x in upstream]
    want = oracle.gradient_statistics(*(helpers.wide(x) for x in (g, e, f)), upstream=[*u, None, None])
    relative, absolute = helpers.STORAGE[dtype]
    for gradient, expected in zip(gradients, (want.dg, want.de, want.df), strict=True):
        bound = relative * np.abs(expected) + absolute + 1e-5 * np.abs(expected).max()
        assert (np.abs(helpers.wide(gradient) - expected) <= bound).all()


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_no_worse_than_plain_float32(backend, case, modalities):
    """At most 1e-5, or four times the error of the plain float32 formula.

    Why four: both formulas lose their digits where ``p - q`` and ``f`` are formed from rounded exponentials and logarithms. Those
    of PyTorch are good to 1 ULP, ours by contract to 2, and sums run in another order: a factor of two in each of two operands.
    The norms run over thousands of elements, so the errors themselves hardly scatter."""
    features = [[x.requires_grad_()] for x in hard(case, modalities)]
    information, gradients, upstream = compute(features, backend)
    rough_information, rough_gradients = plain(features, upstream)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    expected = [row[0] for row in expected]
    assert information.isfinite().all() and all(g.isfinite().all() for g in gradients)
    for ours, rough, exact in ((information, rough_information, values), (gradients, rough_gradients, expected)):
        helpers.assert_close(ours, exact, max(1e-5, 4 * helpers.relative_error(rough, exact)), floor=RESOLUTION / 1e-5)


@pytest.mark.parametrize("peak", [8.0, 14.0])
def test_one_confident_modality_among_flat_ones(backend, peak):
    """Over a thousand channels the sums of exponentials are of many small and nearly equal terms beside a large one, and a running sum
    rounds all of them the same way."""
    features = [[0.01 * torch.randn(1, 1000, 40)] for _ in range(8)]
    features[0][0][:, 3] += peak
    for (x,) in features:
        x.requires_grad_()
    information, gradients, upstream = compute(features, backend)
    rough_information, rough_gradients = plain(features, upstream)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, max(2e-6, 4 * helpers.relative_error(rough_information, values)))
    for ours, rough, (exact,) in zip(gradients, rough_gradients, expected, strict=True):
        helpers.assert_close(ours, exact, max(1e-5, 4 * helpers.relative_error(rough, exact)))


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_in_float64(backend, case, modalities):
    """What is hard for float32 is not for float64 (the relative error of the difference grows as the difference shrinks)."""
    features = [[x.double().requires_grad_()] for x in hard(case, modalities)]
    information, gradients, upstream = compute(features, backend)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, 1e-7, floor=RESOLUTION / 1e-7)
    helpers.assert_close(gradients, [row[0] for row in expected], 1e-7, floor=RESOLUTION / 1e-7)


@pytest.mark.parametrize("dtype", helpers.DTYPES)
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_one_channel_is_exactly_zero(backend, dtype, sigma):
    features = helpers.features(3, [(2, 1, 40), (2, 1)], dtype=dtype, scale=30.0)
    information, gradients, _ = compute(features, backend, sigma=sigma, seed=1)
    assert (information == 0).all() and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("channels", [1, 2, 1024])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_one_pixel(backend, channels, shape):
    features = helpers.features(2, [(3, channels, *shape)])
    information, gradients, upstream = compute(features, backend)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, 1e-5)
    helpers.assert_close(gradients, [row[0] for row in expected], 1e-5)


def test_many_modalities(backend):
    features = helpers.features(64, [(1, 3, 5)])
    information, gradients, upstream = compute(features, backend)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, 1e-5)
    helpers.assert_close(gradients, [row[0] for row in expected], 1e-5)


def test_large_sums_keep_their_digits(backend):
    """A million pixels: a running float32 sum would lose four digits."""
    x = torch.randn(1, 2, 4).repeat(1, 1, 2**18)
    y = torch.randn(1, 2, 4).repeat(1, 1, 2**18)
    information = softmax_fisher_information([[x], [y]], backend=backend)
    few = oracle.softmax_fisher([[helpers.wide(z[..., :4])] for z in (x, y)])
    helpers.assert_close(information, few, 1e-6)
    result = gradient_statistics([x], [y], [x[:, 0].abs() + 1], backend=backend)
    few = oracle.gradient_statistics(*(helpers.wide(z[..., :4]) for z in (x, y)), helpers.wide(x[:, 0, :4].abs() + 1))
    helpers.assert_close(result.fisher[0], few.fisher, 1e-6)
    helpers.assert_close(result.attribution[0], few.attribution * 2**9, 1e-6)


# ---- NaN and infinity ----

SHAPES = [(3, 5, 40), (3, 4, 3, 3)]


def clean_and_spoiled(value, m, s, index, modalities=3):
    clean = helpers.features(modalities, SHAPES)
    spoiled = [[x.detach().clone() for x in row] for row in clean]
    spoiled[m][s][index] = value
    return clean, [[x.requires_grad_() for x in row] for row in spoiled]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("m, s, index", [(0, 0, (1, 2, 17)), (-1, 0, (0, 0, 39)), (1, 1, (2, 3, 1, 2))])
@pytest.mark.parametrize("modalities, detach_reference", [(2, False), (3, False), (3, True)])
def test_nan_and_infinity_show_where_they_are_and_nowhere_else(backend, value, m, s, index, modalities, detach_reference):
    clean, spoiled = clean_and_spoiled(value, m, s, index, modalities)
    upstream, m = torch.randn(modalities, 2, 3), m % modalities
    options = {"upstream": upstream, "detach_reference": detach_reference}
    expected, expected_gradients, _ = compute(clean, backend, **options)
    information, gradients, _ = compute(spoiled, backend, **options)
    sample, pixel = index[0], index[2:]
    assert information[m, s, sample].isnan()
    if value == -INF:
        # The others' limit is finite and right: the reference gives that channel no weight. NaN would do as well; nothing else.
        limit = [[helpers.wide(x) for x in row] for row in spoiled]
        limit[m][s][index] = -1e30
        others = torch.tensor(oracle.softmax_fisher(limit))[:, s, sample]
        for other in set(range(modalities)) - {m}:
            torch.testing.assert_close(information[other, s, sample].nan_to_num(others[other]).double(), others[other])
    else:
        assert information[:, s, sample].isnan().all()
    affected = torch.zeros(modalities, 2, 3, dtype=torch.bool)
    affected[:, s, sample] = True
    assert torch.equal(information[~affected], expected[~affected])
    for k, (gradient, clean_gradient) in enumerate(zip(gradients, expected_gradients, strict=True)):
        hit = torch.zeros_like(gradient, dtype=torch.bool)
        if k % 2 == s:
            hit[(sample, slice(None), *pixel)] = True
            if value != -INF or k == 2 * m + s:
                assert gradient[hit].isnan().any()
        others = torch.arange(3) != sample
        assert torch.equal(gradient[others], clean_gradient[others])
        helpers.assert_close(gradient[~hit], clean_gradient[~hit], 1e-5)  # other pixels of the sample may be computed another way


def test_a_channel_far_below_in_one_of_two_modalities(backend):
    """The square root of its exponential is subnormal there: digits of a weight of 1e-36 are lost, and nothing else."""
    features = [
        [torch.tensor([[0.0, -195.0, -1.0]], requires_grad=True)],
        [torch.tensor([[-40.0, 0.0, -30.0]], requires_grad=True)],
    ]
    information, gradients, upstream = compute(features, backend)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
    helpers.assert_close(information, values, 1e-6)
    for gradient, (want,) in zip(gradients, expected, strict=True):
        helpers.assert_close(gradient, want, 1e-5)
        assert abs(gradient[0, 1].item() - want[0, 1]) <= 1e-5 * abs(want[0, 1]) + 1e-34


def test_infinite_upstream_of_an_absent_modality(backend):
    """It is not read: the gradients of the others are those without it."""
    features = helpers.features(3, [(2, 5, 7)])
    present = torch.tensor([[False, True, True], [True, True, True]])
    found = []
    for first in (INF, 0.0):
        upstream = torch.ones(3, 1, 2)
        upstream[0, 0, 0] = first
        found.append(compute(features, backend, upstream, present=present)[1])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_in_every_channel_of_a_pixel(backend, value):
    clean, spoiled = clean_and_spoiled(value, 1, 0, (1, slice(None), 5))
    information, gradients, _ = compute(spoiled, backend)
    assert information[:, 0, 1].isnan().all() and information.isnan().sum() == 3
    for gradient in gradients[::2]:
        assert gradient[1, :, 5].isnan().all() and gradient.isnan().sum() == gradient.shape[1]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.5, "samples": 2, "seed": 1}, {"detach_reference": True}])
def test_what_does_not_count_has_no_effect(backend, value, layout, options):
    """Masked-out pixels and absent modalities may hold anything: the same bits come out, values and gradients."""
    shapes = [(3, 5, 6, 7), (3, 4, 3, 3)]
    present = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    masks = [torch.rand(3, 6, 7) < 0.6, torch.rand(3, 3, 3) < 0.6]
    masks[0][1] = False
    clean = helpers.features(3, shapes)
    spoiled = []
    for m, row in enumerate(clean):
        counts = [mask[:, None] & present[:, m, None, None, None] for mask in masks]
        spoiled.append(
            [helpers.LAYOUTS[layout](x.detach().where(c, value)).requires_grad_() for x, c in zip(row, counts, strict=True)]
        )
    clean = [[helpers.LAYOUTS[layout](x.detach()).requires_grad_() for x in row] for row in clean]
    options = {"mask": masks, "present": present, "upstream": torch.randn(3, 2, 3), **options}
    expected = compute(clean, backend, **options)
    actual = compute(spoiled, backend, **options)
    assert torch.equal(actual[0], expected[0]) and actual[0].isfinite().all()
    for gradient, want in zip(actual[1], expected[1], strict=True):
        assert torch.equal(gradient, want)


@pytest.mark.parametrize("which", ["g", "e", "f"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_infinity_in_gradient_statistics(backend, which, value, masked):
    """Never a wrong finite number, never in another sample or tensor, and without any effect where the mask is False."""
    clean = {"g": [torch.randn(3, 4, 9) for _ in range(2)], "e": [torch.randn(3, 4, 9) for _ in range(2)]}
    clean["f"] = [torch.rand(3, 9) + 0.1 for _ in range(2)]
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5] = not masked
    results = []
    for spoil in (False, True):
        x = {name: [y.clone() for y in tensors] for name, tensors in clean.items()}
        if spoil:
            x[which][0][(1, 5) if which == "f" else (1, 2, 5)] = value
        x = {name: [y.requires_grad_() for y in tensors] for name, tensors in x.items()}
        result = gradient_statistics(*x.values(), mask=[mask, mask], maps=True, backend=backend)
        outputs = [*result[:2], *result.fisher_maps, *result.attribution_maps]
        results.append((outputs, helpers.gradients(outputs, list(x.values()), [torch.ones_like(y) for y in outputs])))
    (expected, expected_gradients), (actual, gradients) = results
    if masked:
        assert all(torch.equal(a, b) for a, b in zip((*actual, *gradients), (*expected, *expected_gradients), strict=True))
        return
    (fisher, attribution), maps = actual[:2], actual[2:]
    if which == "f":
        # An infinite value divides to the right limit 0; NaN shows.
        assert fisher[0, 1].isnan() if value != value else fisher[0, 1].isfinite()
        assert torch.equal(attribution, expected[1])
    else:
        assert not attribution[0, 1].isfinite() and not maps[2][1, 5].isfinite()
        assert fisher[0, 1].isfinite() == (which == "e")
    for a, b in zip(actual[:2], expected[:2], strict=True):
        others = torch.ones(2, 3, dtype=torch.bool)
        others[0, 1] = False
        assert torch.equal(a[others], b[others])
    for a, b in zip((*maps, *gradients), (*expected[2:], *expected_gradients), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert all(torch.equal(gradients[k], expected_gradients[k]) for k in (1, 3, 5))  # the other tensor


# ---- the same bits, always ----


def everything(backend, side):
    """Values and gradients of both ops on several scales, with masks, presence and noise."""
    torch.manual_seed(5)
    shapes = [(2, 16, side, side - 6), (2, 24, side // 3, 13), (2, 32, 5, 7)]
    features = helpers.features(3, shapes)
    mask, present = torch.rand(2, side, side - 6) < 0.7, torch.tensor([[True, True, True], [True, False, True]])
    outputs = []
    for options in ({}, {"mask": mask, "present": present}, {"sigma": 0.5, "samples": 2, "seed": 3}):
        information, gradients, _ = compute(features, backend, **options)
        outputs += [information, *gradients]
    g, e = (x for x in (features[0], features[1]))
    values = [torch.rand(2, *shape[2:]) for shape in shapes]
    result = gradient_statistics(g, e, values, mask=mask, maps=True, backend=backend)
    total = [*result[:2], *result.fisher_maps, *result.attribution_maps]
    return [*outputs, *total, *helpers.gradients(total, [g, e], [torch.randn_like(x) for x in total])]


def test_bits_do_not_change_from_run_to_run(backend):
    first, second = everything(backend, 48), everything(backend, 48)
    assert all(torch.equal(helpers.bits(a), helpers.bits(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("native", [name for name in BACKENDS if name == "cpu"])
def test_bits_do_not_change_with_the_number_of_threads(native):
    torch.set_num_threads(1)
    first = everything(native, 96)  # more units of work than threads
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(helpers.bits(a), helpers.bits(b)) for a, b in zip(first, everything(native, 96), strict=True))

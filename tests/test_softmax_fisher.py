"""softmax_fisher_information on every backend against the NumPy oracle: values and gradients, every option."""

import helpers
import numpy as np
import oracle
import pytest
import torch

from modreg_fast.functional import resize_mask, softmax_fisher_information

SHAPES = {
    "no_pixels": [(3, 5)],
    "tokens": [(2, 7, 6)],
    "image": [(2, 4, 5, 3)],
    "volume": [(2, 3, 2, 3, 4)],
    "four_dimensions": [(2, 3, 2, 2, 3, 2)],
    "one_pixel": [(2, 6, 1, 1)],
    "one_sample": [(1, 9, 8)],
    "pyramid": [(2, 4, 8, 6), (2, 7, 4, 3), (2, 13, 2, 1)],
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check(features, backend, *, masks=None, present=None, tolerance=1e-12, floor=0.0, reference=None, **options):
    """Values and gradients, from a random upstream gradient, against the oracle."""
    information = softmax_fisher_information(features, mask=masks, present=present, backend=backend, **options)
    assert information.shape == (len(features), len(features[0]), features[0][0].shape[0])
    upstream = torch.randn_like(information)
    gradients = helpers.gradients(information, features, upstream)
    sigma = options.get("sigma", 0.0)
    values, expected = oracle.softmax_fisher(
        helpers.wide(features),
        masks=helpers.wide(masks),
        present=helpers.wide(present),
        sigma=sigma if isinstance(sigma, list) else [sigma] * len(features),
        samples=options.get("samples", 1),
        seed=options.get("seed") or 0,
        detach=options.get("detach_reference", False),
        eps=options.get("eps", oracle.EPS),
        upstream=helpers.wide(upstream),
    )
    helpers.assert_close(information, values, tolerance, floor=floor)
    helpers.assert_close(gradients, expected, tolerance, floor=floor)
    return information, gradients


def random_masks(shapes, share=0.6):
    return [torch.rand(shape[0], *shape[2:]) < share for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("modalities", [2, 3, 5])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_shape(backend, shapes, modalities, dtype):
    check(helpers.features(modalities, shapes, dtype=dtype), backend, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("detach_reference", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_present", [False, True])
@pytest.mark.parametrize("sigma, samples", [(0.0, 1), (0.5, 3), ([0.0, 1.5, 0.1], 2), ([0.0, 1.5, 0.0], 2)])
def test_every_option(backend, dtype, detach_reference, with_mask, with_present, sigma, samples):
    shapes = [(3, 5, 4, 6), (3, 8, 2, 1)]
    check(
        helpers.features(3, shapes, dtype=dtype),
        backend,
        masks=random_masks(shapes) if with_mask else None,
        present=torch.tensor([[True, False, True], [True, True, True], [False, False, True]]) if with_present else None,
        sigma=sigma,
        samples=samples,
        seed=2**40 + 11,
        detach_reference=detach_reference,
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
def test_eps(backend, eps):
    check(helpers.features(2, [(2, 4, 6)], dtype=torch.float64), backend, eps=eps)


@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 31, 33, 255, 511, 513, 1025])
@pytest.mark.parametrize("channels", [2, 3, 17])
def test_sizes_around_vectors_and_tiles(backend, pixels, channels):
    check(helpers.features(2, [(2, channels, pixels)]), backend, tolerance=1e-5)


@pytest.mark.parametrize("batch", [1, 15, 33, 150])
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.7, "samples": 2, "seed": 5}, {"detach_reference": True}], ids=str)
def test_many_samples_of_one_pixel(backend, batch, modalities, options):
    """Samples may be computed side by side, but each has its own mask, noise, value and upstream gradient."""
    shapes = [(batch, 7), (batch, 3, 4), (batch, 5)]
    for masks in (None, random_masks(shapes)):
        features = helpers.features(modalities, shapes, dtype=torch.float64)
        check(features, backend, masks=masks, tolerance=1e-12, **options)


def test_channels_last_of_any_width(backend):
    for channels in (2, 3, 8, 17, 33):
        features = [
            [x.detach().transpose(1, 2).contiguous().requires_grad_()] for (x,) in helpers.features(2, [(2, channels, 9)])
        ]
        values = softmax_fisher_information(features, channel_dim=-1, backend=backend)
        upstream = torch.randn_like(values)
        expected = oracle.softmax_fisher(
            [[helpers.wide(x.transpose(1, 2))] for (x,) in features], upstream=helpers.wide(upstream)
        )
        helpers.assert_close(values, expected[0], 1e-5)
        gradients = [x.transpose(1, 2) for x in helpers.gradients(values, features, upstream)]
        helpers.assert_close(gradients, expected[1], 1e-5)


@pytest.mark.parametrize("channel_dim", [1, 2, 3, -1])
def test_channel_dim(backend, channel_dim):
    features = helpers.features(2, [(2, 3, 4, 5)], dtype=torch.float64)
    moved = [[x.movedim(channel_dim, 1)] for (x,) in features]
    mask = torch.rand(2, *moved[0][0].shape[2:]) < 0.5
    actual = softmax_fisher_information(features, channel_dim=channel_dim, mask=mask, backend=backend)
    helpers.assert_close(actual, oracle.softmax_fisher(helpers.wide(moved), masks=[helpers.wide(mask)]), 1e-12)


@pytest.mark.parametrize("detach_reference", [False, True])
def test_empty_masks_and_absent_samples_give_zero(backend, detach_reference):
    shapes = [(3, 4, 5), (3, 2, 2)]
    features = helpers.features(2, shapes)
    masks = [torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)]
    masks[0][0], masks[1][1] = False, False
    present = torch.tensor([[True, True], [True, True], [False, False]])
    information, gradients = check(
        features, backend, masks=masks, present=present, detach_reference=detach_reference, tolerance=1e-5
    )
    for s, b in [(0, 0), (1, 1), (0, 2), (1, 2)]:
        assert (information[:, s, b] == 0).all()
        assert all((gradients[2 * m + s][b] == 0).all() for m in range(2))
    assert all((information[:, s, b] > 0).all() for s, b in [(0, 1), (1, 0)])


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_an_infinite_gradient_does_not_pass_a_detached_reference(backend, sigma):
    features = helpers.features(3, [(2, 5, 40)])
    for x in (row[0] for row in features):
        x.data[0, :, 3] *= 300  # where the sums of the CPU's fast way overflow, it takes the other
    information = softmax_fisher_information(features, detach_reference=True, sigma=sigma, seed=4, backend=backend)
    upstream = torch.randn_like(information)
    expected = helpers.gradients(information, features, upstream)
    upstream[0, 0, 1] = float("inf")
    actual = helpers.gradients(information, features, upstream)
    assert torch.equal(actual[0][0], expected[0][0]) and not actual[0][1].isfinite().any()
    assert all(map(torch.equal, actual[1:], expected[1:]))


def test_nothing_valid_at_all(backend):
    features = helpers.features(2, [(2, 4, 3)])
    information = softmax_fisher_information(features, mask=torch.zeros(2, 3, dtype=torch.bool), sigma=1.0, backend=backend)
    gradients = helpers.gradients(information, features, torch.ones_like(information))
    assert (information == 0).all() and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 3), (1, 1), (16, 24)])
def test_one_mask_for_all_scales_is_resized(backend, size):
    """A mask at any resolution acts as the masks of each scale that hold where at least half of the pixel is valid."""
    shapes = [(2, 3, 8, 12), (2, 3, 4, 6), (2, 3, 2, 3)]
    features = helpers.features(2, shapes, dtype=torch.float64)
    mask = torch.rand(2, *size) < 0.55
    expected = [oracle.resize_mask(helpers.wide(mask), shape[2:]) for shape in shapes]
    actual = softmax_fisher_information(features, mask=mask, backend=backend)
    helpers.assert_close(actual, oracle.softmax_fisher(helpers.wide(features), masks=expected), 1e-12)
    per_scale = softmax_fisher_information(features, mask=[resize_mask(mask, shape[2:]) for shape in shapes], backend=backend)
    assert torch.equal(actual, per_scale)


def test_partial_presence_equals_computing_on_sub_batches(backend):
    shapes = [(4, 5, 6), (4, 3, 2)]
    features = helpers.features(3, shapes, dtype=torch.float64)
    present = torch.tensor([[True, True, False], [True, True, True], [False, True, True], [True, True, False]])
    information = softmax_fisher_information(features, present=present, backend=backend)
    upstream = torch.randn_like(information)
    gradients = helpers.gradients(information, features, upstream)
    for b in range(4):
        held = [m for m in range(3) if present[b, m]]
        part = [[x[b : b + 1].detach().requires_grad_() for x in features[m]] for m in held]
        alone = softmax_fisher_information(part, backend=backend)
        helpers.assert_close(information[held, :, b], helpers.wide(alone[:, :, 0]), 1e-13)
        own = helpers.gradients(alone, part, upstream[held, :, b : b + 1])
        helpers.assert_close([gradients[2 * m + s][b] for m in held for s in range(2)], [helpers.wide(x[0]) for x in own], 1e-12)
        for m in set(range(3)) - set(held):
            assert (information[m, :, b] == 0).all() and (gradients[2 * m][b] == 0).all() and (gradients[2 * m + 1][b] == 0).all()


def test_scales_do_not_mix(backend):
    """Every scale alone gives the same as all of them in one call."""
    shapes = [(2, 4, 8, 6), (2, 7, 4, 3), (2, 1, 3, 3), (2, 13, 2, 1)]
    features = helpers.features(3, shapes)
    together = softmax_fisher_information(features, backend=backend)
    for s in range(len(shapes)):
        alone = softmax_fisher_information([[row[s]] for row in features], backend=backend)
        helpers.assert_close(together[:, s], alone[:, 0], 1e-6)


def test_order_of_modalities_does_not_matter(backend):
    features = helpers.features(3, [(2, 4, 8)], dtype=torch.float64)
    there = softmax_fisher_information(features, backend=backend)
    back = softmax_fisher_information(features[::-1], backend=backend)
    helpers.assert_close(there, helpers.wide(back.flip(0)), 1e-13)


def test_shift_of_the_logits_does_not_matter(backend):
    features = helpers.features(2, [(2, 4, 8)], dtype=torch.float64)
    shifted = [[x + torch.randn(2, 1, 8, dtype=torch.float64)] for (x,) in features]
    helpers.assert_close(
        softmax_fisher_information(shifted, backend=backend), softmax_fisher_information(features, backend=backend), 1e-12
    )


@pytest.mark.parametrize(("offset", "step"), [(2**20, 0.25), (2**22, 1.0), (2**30, 256.0)])
def test_large_common_offset_in_float32(backend, offset, step):
    """Logits whose mean, too, is exact in float32: what is lost then, the kernel lost."""
    features = [[torch.randint(-9, 9, (2, 6, 50)) * step + offset] for _ in range(2)]
    assert all(torch.equal(x, x.double().float()) for (x,) in features)
    check([[x.requires_grad_()] for (x,) in features], backend, tolerance=1e-5)


def test_one_modality_alone_has_no_information(backend):
    """Without noise ``p`` is ``q``."""
    features = helpers.features(1, [(2, 4, 8)])
    information = softmax_fisher_information(features, backend=backend)
    (gradient,) = helpers.gradients(information, features, torch.ones_like(information))
    assert information.abs().max() < 1e-12 and gradient.abs().max() < 1e-6
    assert (softmax_fisher_information(features, sigma=1.0, backend=backend) > 1e-2).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_some_inputs_require_grad(backend, frozen):
    features = helpers.features(2, [(2, 4, 8)])
    everything = softmax_fisher_information(features, backend=backend)
    upstream = torch.randn_like(everything)
    expected = helpers.gradients(everything, features, upstream)[1 - frozen]
    features[frozen][0] = features[frozen][0].detach()
    (actual,) = helpers.gradients(softmax_fisher_information(features, backend=backend), [features[1 - frozen]], upstream)
    assert torch.equal(actual, expected)


def test_the_same_tensor_twice(backend):
    """Gradients of an input given for two modalities add up (they are 0 in exact arithmetic: the modalities agree)."""
    x, y = (row[0] for row in helpers.features(2, [(2, 4, 8)], dtype=torch.float64))
    information = softmax_fisher_information([[x], [x], [y]], backend=backend)
    upstream = torch.randn_like(information)
    gradient, _ = helpers.gradients(information, [x, y], upstream)
    _, expected = oracle.softmax_fisher([[helpers.wide(z)] for z in (x, x, y)], upstream=helpers.wide(upstream))
    helpers.assert_close(gradient, expected[0][0] + expected[1][0], 1e-12)


def test_a_mask_of_true_is_no_mask(backend):
    shapes = [(3, 5, 4, 6), (3, 8, 2, 3, 2, 2)]
    features = helpers.features(2, shapes)
    masks = [torch.ones(shape[0], *shape[2:], dtype=torch.bool) for shape in shapes]
    everyone = torch.ones(3, 2, dtype=torch.bool)
    information = softmax_fisher_information(features, mask=masks, present=everyone, backend=backend)
    helpers.assert_close(information, softmax_fisher_information(features, backend=backend), 1e-7)


# ---- noise ----


@pytest.mark.parametrize("dtype", helpers.STORAGE)
def test_noise_on_16_bit_features_is_not_rounded(backend, dtype):
    features = helpers.features(2, [(2, 6, 20)], dtype=dtype)
    information = softmax_fisher_information(features, sigma=0.01, samples=2, seed=8, backend=backend)
    expected = oracle.softmax_fisher(helpers.wide(features), sigma=[0.01, 0.01], samples=2, seed=8)
    helpers.assert_close(information, expected, 1e-5)


def test_seed_fixes_the_noise(backend):
    features = helpers.features(2, [(2, 4, 8)])

    def draw(**options):
        return softmax_fisher_information(features, sigma=1.0, backend=backend, **options)

    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))
    assert not torch.equal(draw(seed=3), draw(seed=3 + 2**32))  # the high word counts
    assert not torch.equal(draw(), draw())
    first, second = (draw(generator=torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(1)
    one = draw()
    torch.manual_seed(1)
    assert torch.equal(one, draw())


def test_no_noise_draws_nothing_from_the_generator(backend):
    features = helpers.features(2, [(2, 4, 8)])
    state = torch.get_rng_state()
    softmax_fisher_information(features, samples=5, backend=backend)
    assert torch.equal(state, torch.get_rng_state())


def test_backward_regenerates_the_same_noise(backend):
    """The gradient is that of the very draw the value came from, also when other draws happened in between."""
    features = helpers.features(2, [(1, 5, 4)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    information = softmax_fisher_information(features, sigma=0.7, samples=2, generator=generator, backend=backend)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(4), dtype=torch.int64))
    softmax_fisher_information(features, sigma=0.7, backend=backend)
    upstream = torch.randn_like(information)
    values, expected = oracle.softmax_fisher(
        helpers.wide(features), sigma=[0.7, 0.7], samples=2, seed=seed, upstream=helpers.wide(upstream)
    )
    helpers.assert_close(information, values, 1e-12)
    helpers.assert_close(helpers.gradients(information, features, upstream), expected, 1e-12)


def test_many_samples_approach_the_expectation(backend):
    """The mean over n draws moves like 1/sqrt(n): 256 draws in one call agree with 256 calls of one."""
    features = helpers.features(2, [(1, 6, 16)])
    together = softmax_fisher_information(features, sigma=1.0, samples=256, seed=1, backend=backend)
    single = torch.stack([softmax_fisher_information(features, sigma=1.0, seed=100 + i, backend=backend) for i in range(256)])
    error = (single.std(0) / 16 * 2**0.5).clamp(min=1e-6)
    assert ((together - single.mean(0)).abs() < 5 * error).all()
    assert ((together - single[0]).abs() > 1e-4).all()


def test_values_are_finite_and_not_negative(backend):
    for scale in (1e-3, 1.0, 30.0):
        information = softmax_fisher_information(helpers.features(3, [(2, 6, 50)], scale=scale), backend=backend)
        assert np.isfinite(helpers.wide(information)).all() and (information >= 0).all()

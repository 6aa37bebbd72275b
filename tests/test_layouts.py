"""Strides and dtypes on every backend: of inputs, upstream gradients and what comes back; mixed among the arguments."""

import itertools

import helpers
import oracle
import pytest
import torch
from helpers import LAYOUTS

from modreg_fast.functional import gradient_statistics, softmax_fisher_information

SHAPE = (2, 6, 4, 5)


def given(layout, shape=SHAPE, dtype=torch.float64):
    """A random leaf of that layout."""
    return LAYOUTS[layout](torch.randn(*shape, dtype=torch.float64).to(dtype)).requires_grad_()


def upstreams(x):
    """Upstream gradients of the shape of ``x`` in unusual strides; what lies between their elements is NaN."""
    value = torch.randn_like(x)
    stepped = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)[..., 1::2]
    return {
        "contiguous": value,
        "transposed": value.transpose(0, -1).contiguous().transpose(0, -1),
        "stepped": stepped.copy_(value),
        "expanded": value.flatten()[0].expand_as(x),
        "expanded_rows": value[:1].expand_as(x),
    }


def check_softmax_fisher(features, backend, tolerance=1e-12, upstream="contiguous"):
    information = softmax_fisher_information(features, backend=backend)
    u = upstreams(information)[upstream]
    gradients = helpers.gradients(information, features, u)
    values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(u))
    helpers.assert_close(information, values, tolerance)
    for gradient, x, want in zip(gradients, itertools.chain(*features), itertools.chain(*expected), strict=True):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape
        helpers.assert_close(gradient, want, tolerance if x.dtype.itemsize > 2 else max(tolerance, 2.0**-8))


def check_gradient_statistics(g, e, f, backend, tolerance=1e-12, upstream="contiguous"):
    result = gradient_statistics([g], [e], [f], maps=True, backend=backend)
    outputs = [result.fisher, result.attribution, result.fisher_maps[0], result.attribution_maps[0]]
    u = [upstreams(x)[upstream] for x in outputs]
    gradients = helpers.gradients(outputs, [g, e, f], u)
    expected = oracle.gradient_statistics(
        *(helpers.wide(x) for x in (g, e, f)), upstream=[x.numpy() for x in (u[0][0], u[1][0], *u[2:])]
    )
    for actual, want in zip(
        [outputs[0][0], outputs[1][0], *outputs[2:]],
        [expected.fisher, expected.attribution, expected.fisher_map, expected.attribution_map],
        strict=True,
    ):
        helpers.assert_close(actual, want, tolerance)
    for gradient, x, want in zip(gradients, (g, e, f), (expected.dg, expected.de, expected.df), strict=True):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape
        helpers.assert_close(gradient, want, tolerance if x.dtype.itemsize > 2 else max(tolerance, 2.0**-8))


@pytest.mark.parametrize("shape", [SHAPE, (2, 6, 1, 1), (2, 1, 4, 5), (1, 17, 7, 9), (3, 16, 8, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(backend, layout, shape):
    """The second modality stays contiguous, so that layouts are mixed at a scale."""
    check_softmax_fisher([[given(layout, shape)], [given("contiguous", shape)]], backend)
    plain = given("contiguous", shape)
    f = torch.rand(shape[0], *shape[2:], dtype=torch.float64).add(0.1).requires_grad_()
    check_gradient_statistics(given(layout, shape), plain, f, backend)
    check_gradient_statistics(plain, given(layout, shape), f, backend)


@pytest.mark.parametrize(
    "first, second", list(itertools.combinations(["channels_last", "window", "stepped_columns", "expanded_batch"], 2))
)
def test_mixed_layouts(backend, first, second):
    check_softmax_fisher([[given(first), given(second)], [given(second), given(first)], [given(first), given(first)]], backend)
    f = torch.rand(2, 4, 5, dtype=torch.float64).add(0.1).requires_grad_()
    check_gradient_statistics(given(first), given(second), f, backend)
    check_gradient_statistics(given(second), given(first), f, backend)


@pytest.mark.parametrize(
    "first", ["contiguous", "channels_outside", "stepped_batch", "stepped_channels", "expanded_batch", "expanded_channels"]
)
@pytest.mark.parametrize("second", ["contiguous", "channels_outside", "stepped_channels", "window"])
def test_layouts_without_pixels(backend, first, second):
    """``(B, C)``: strided vectors as pooled embeddings are."""
    x, y = (given(name, (3, 7, 1, 1)).detach()[:, :, 0, 0].requires_grad_() for name in (first, second))
    check_softmax_fisher([[x], [y]], backend)
    f = torch.rand(3, dtype=torch.float64).add(0.1).requires_grad_()
    check_gradient_statistics(x, y, f, backend)
    check_gradient_statistics(y, x, f, backend)


@pytest.mark.parametrize("layout", ["transposed", "window", "stepped", "expanded"])
def test_layouts_of_values(backend, layout):
    f = torch.rand(2, 4, 5, dtype=torch.float64) + 0.1
    hole = torch.full((4, 6, 10), float("nan"), dtype=torch.float64)
    f = {
        "transposed": f.mT.contiguous().mT,
        "window": hole[1:3, 1:5, 2:7].copy_(f),
        "stepped": hole[:2, :4, ::2].copy_(f),
        "expanded": f[:, :1, :1].expand_as(f),
    }[layout]
    check_gradient_statistics(given("contiguous"), given("channels_last"), f.requires_grad_(), backend)


@pytest.mark.parametrize("layout", ["transposed", "stepped", "expanded", "expanded_batch"])
def test_layouts_of_masks_and_presence(backend, layout):
    mask = torch.rand(2, 4, 5) < 0.6
    mask = {
        "transposed": mask.mT.contiguous().mT,
        "stepped": mask.repeat_interleave(2, 2)[..., ::2],
        "expanded": mask[:, :1, :1].expand_as(mask),
        "expanded_batch": mask[:1].expand_as(mask),
    }[layout]
    present = torch.tensor([[True, False, True], [True, True, False]]).mT.contiguous().mT
    features = [[given("contiguous")] for _ in range(3)]
    options = {"mask": mask, "present": present, "backend": backend}
    plain = {"mask": mask.contiguous(), "present": present.contiguous(), "backend": backend}
    assert torch.equal(softmax_fisher_information(features, **options), softmax_fisher_information(features, **plain))
    g = given("contiguous").detach()
    one, two = (
        gradient_statistics([g], [features[0][0]], mask=m, backend=backend).attribution for m in (mask, mask.contiguous())
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("upstream", ["transposed", "stepped", "expanded", "expanded_rows"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_strides_of_upstream_gradients(backend, upstream, dtype, tolerance):
    check_softmax_fisher(
        [[given("contiguous", dtype=dtype), given("window", dtype=dtype)] for _ in range(2)], backend, tolerance, upstream
    )
    f = torch.rand(2, 4, 5).add(0.1).to(dtype).requires_grad_()
    check_gradient_statistics(
        given("contiguous", dtype=dtype), given("channels_last", dtype=dtype), f, backend, tolerance, upstream
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window", "stepped_columns", "channels_outside"])
@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_every_dtype(backend, dtype, layout):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    features = [[given(layout, dtype=dtype)] for _ in range(2)]
    assert softmax_fisher_information(features, backend=backend).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    check_softmax_fisher(features, backend, tolerance)
    f = torch.rand(2, 4, 5).add(0.1).to(dtype).requires_grad_()
    check_gradient_statistics(given(layout, dtype=dtype), given(layout, dtype=dtype), f, backend, tolerance)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(helpers.DTYPES, 2)), ids=str)
def test_mixed_dtypes(backend, dtypes):
    """Among modalities, scales, and gradient, feature and value. Nothing is rounded to 16 bits on the way."""
    first, second = dtypes
    check_softmax_fisher([[given("contiguous", dtype=first)], [given("contiguous", dtype=second)]], backend, 1e-5)
    check_softmax_fisher([[given("contiguous", dtype=d) for d in dtypes] for _ in range(2)], backend, 1e-5)
    for order in ((first, second, second), (second, first, second), (second, second, first)):
        g, e = (given("contiguous", dtype=d) for d in order[:2])
        check_gradient_statistics(g, e, torch.rand(2, 4, 5).add(0.1).to(order[2]).requires_grad_(), backend, 1e-5)


def test_several_tensors_of_mixed_dtypes(backend):
    """A list of float16, float64, bfloat16 and float32 tensors; each as good as its own type, the result in float64."""
    shapes = [(2, 3, 5), (2, 4, 2, 2), (2, 7), (2, 1, 9)]
    dtypes = [torch.float16, torch.float64, torch.bfloat16, torch.float32]
    g, e = ([torch.randn(*shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)] for _ in range(2))
    f = [torch.rand(shape[0], *shape[2:]).add(0.1).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    result = gradient_statistics(g, e, f, maps=True, backend=backend)
    assert all(x.dtype == torch.float64 for x in (*result[:2], *result.fisher_maps, *result.attribution_maps))
    for k in range(4):
        expected = oracle.gradient_statistics(*(helpers.wide(x[k]) for x in (g, e, f)))
        for actual, want in zip(
            (result.fisher[k], result.attribution[k], result.fisher_maps[k], result.attribution_maps[k]),
            (expected.fisher, expected.attribution, expected.fisher_map, expected.attribution_map),
            strict=True,
        ):
            helpers.assert_close(actual, want, 1e-12 if dtypes[k] == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_keep_dense_layouts(backend, layout):
    """A channels-last feature gets a channels-last gradient, as convolutions want it."""
    features = [[given(layout, dtype=torch.float32)] for _ in range(2)]
    information = softmax_fisher_information(features, backend=backend)
    for gradient in helpers.gradients(information, features, torch.ones_like(information)):
        assert gradient.stride() == features[0][0].stride()


@pytest.mark.parametrize("dtype, layout", [(torch.float32, x) for x in LAYOUTS] + [(torch.bfloat16, "contiguous")])
def test_inputs_are_never_written(backend, layout, dtype):
    """Bit copies of the whole memory behind every input, before and after forward, backward and second order."""
    features = [[given(layout, dtype=dtype)] for _ in range(2)]
    f = LAYOUTS[layout](torch.rand(*SHAPE).add(0.1).to(dtype))[:, 0].requires_grad_()
    mask = torch.rand(2, 4, 5) < 0.5
    present = torch.tensor([[True, True], [True, False]])
    everything = [features[0][0], features[1][0], f, mask, present]
    whole = [torch.as_strided(x.detach(), (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in everything]
    before = [helpers.bits(x) for x in whole]
    information = softmax_fisher_information(features, mask=mask, present=present, sigma=0.3, seed=1, backend=backend)
    result = gradient_statistics([features[0][0]], [features[1][0]], [f], mask=mask, maps=True, backend=backend)
    total = information.square().sum() + sum(
        x.square().sum() for x in (*result[:2], *result.fisher_maps, *result.attribution_maps)
    )
    grads = torch.autograd.grad(total, [features[0][0], features[1][0], f], create_graph=True)
    torch.autograd.grad(sum(g.double().square().sum() for g in grads), [features[0][0], features[1][0], f])
    assert all(torch.equal(helpers.bits(x), old) for x, old in zip(whole, before, strict=True))

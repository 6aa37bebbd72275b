"""gradient_statistics on every backend: the NumPy oracle and captum's InputXGradient; every option and output."""

import helpers
import oracle
import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

from modreg_fast.functional import gradient_statistics

SHAPES = {
    "no_pixels": [(3, 5)],
    "tokens": [(2, 7, 6)],
    "volume": [(2, 3, 2, 3, 2)],
    "four_dimensions": [(2, 3, 2, 2, 1, 3)],
    "one_pixel": [(2, 6, 1, 1)],
    "one_channel": [(2, 1, 4, 3)],
    "mixed": [(2, 4, 4, 6), (2, 7, 2, 3), (2, 3, 5), (2, 9)],
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def inputs(shapes, dtype=torch.float64):
    """Leaves: gradients, features and positive values."""
    g, e = ([torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes] for _ in range(2))
    return g, e, [(torch.rand(shape[0], *shape[2:]) + 0.05).to(dtype).requires_grad_() for shape in shapes]


def check(g, e, f, backend, *, masks=None, maps=True, tolerance=1e-12, eps=oracle.EPS, upstream=None):
    """Values, maps and all gradients, from random upstream gradients of every output, against the oracle, tensor by tensor."""
    result = gradient_statistics(g, features=e, values=f, mask=masks, maps=maps, eps=eps, backend=backend)
    assert (result.fisher is None) == (f is None) and (result.attribution is None) == (e is None)
    outputs = {"fisher": result.fisher, "attribution": result.attribution}
    outputs |= {f"fisher_map{k}": x for k, x in enumerate(result.fisher_maps or [])}
    outputs |= {f"attribution_map{k}": x for k, x in enumerate(result.attribution_maps or [])}
    outputs = {name: x for name, x in outputs.items() if x is not None}
    if upstream is None:
        upstream = {name: torch.randn_like(x) for name, x in outputs.items()}
    groups = [x for x in (g, e, f) if x is not None]
    gradients = iter(helpers.gradients([outputs[name] for name in upstream], groups, list(upstream.values())))
    gradients = [[next(gradients) for _ in group] for group in groups]

    u = {name: helpers.wide(x) for name, x in upstream.items()}
    for k in range(len(g)):
        expected = oracle.gradient_statistics(
            *(None if x is None else helpers.wide(x[k]) for x in (g, e, f, masks)),
            eps=eps,
            upstream=[
                u["fisher"][k] if "fisher" in u else None,
                u["attribution"][k] if "attribution" in u else None,
                u.get(f"fisher_map{k}"),
                u.get(f"attribution_map{k}"),
            ],
        )
        if f is not None:
            helpers.assert_close(result.fisher[k], expected.fisher, tolerance)
        if e is not None:
            helpers.assert_close(result.attribution[k], expected.attribution, tolerance)
        if maps and f is not None:
            helpers.assert_close(result.fisher_maps[k], expected.fisher_map, tolerance)
        if maps and e is not None:
            helpers.assert_close(result.attribution_maps[k], expected.attribution_map, tolerance)
        wanted = [expected.dg, *([expected.de] if e is not None else []), *([expected.df] if f is not None else [])]
        for group, want in zip(gradients, wanted, strict=True):
            helpers.assert_close(group[k], want, tolerance)
    return result, gradients


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_shape(backend, shapes, dtype, masked):
    masks = [torch.rand(shape[0], *shape[2:]) < 0.6 for shape in shapes] if masked else None
    check(*inputs(shapes, dtype), backend, masks=masks, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("has_features, has_values", [(True, False), (False, True), (True, True)])
def test_what_lacks_its_input_is_none(backend, maps, has_features, has_values):
    g, e, f = inputs([(2, 4, 3), (2, 3, 5)])
    result, _ = check(g, e if has_features else None, f if has_values else None, backend, maps=maps)
    assert (result.fisher_maps is None) == (not (maps and has_values))
    assert (result.attribution_maps is None) == (not (maps and has_features))


@pytest.mark.parametrize("name", ["fisher", "attribution", "fisher_map0", "fisher_map1", "attribution_map0", "attribution_map1"])
def test_each_output_alone(backend, name):
    """Gradients when only one output is used, from a random upstream gradient."""
    shape = {"fisher": (2, 2), "attribution": (2, 2), "fisher_map0": (2, 3, 2), "attribution_map0": (2, 3, 2)}.get(name, (2, 5))
    check(*inputs([(2, 4, 3, 2), (2, 3, 5)]), backend, upstream={name: torch.randn(*shape, dtype=torch.float64)})


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
def test_eps(backend, eps):
    check(*inputs([(2, 4, 6)]), backend, eps=eps)


@pytest.mark.parametrize("pixels", [1, 15, 17, 63, 65, 511, 513])
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_sizes_around_vectors_and_tiles(backend, pixels, channels):
    check(*inputs([(2, channels, pixels)], torch.float32), backend, tolerance=1e-5)


@pytest.mark.parametrize("channel_dim", [1, 2, -1])
@pytest.mark.parametrize("maps", [False, True])
def test_channel_dim(backend, channel_dim, maps):
    g, e, f = inputs([(2, 3, 4, 5)])
    moved = [[x.detach().movedim(channel_dim, 1).requires_grad_()] for (x,) in (g, e)]
    f = [(torch.rand(2, *moved[0][0].shape[2:], dtype=torch.float64) + 0.1).requires_grad_()]
    expected, _ = check(*moved, f, backend, maps=maps)
    actual = gradient_statistics(g, e, f, channel_dim=channel_dim, maps=maps, backend=backend)
    helpers.assert_close(actual.fisher, expected.fisher, 1e-13)
    helpers.assert_close(actual.attribution, expected.attribution, 1e-13)
    if maps:
        helpers.assert_close(actual.fisher_maps[0], expected.fisher_maps[0], 1e-13)
        helpers.assert_close(actual.attribution_maps[0], expected.attribution_maps[0], 1e-13)


def test_zero_attribution_has_zero_gradient(backend):
    """Where the root is taken of 0, per pixel and in total, its derivative counts as 0: no NaN, other samples unharmed."""
    g, e, f = inputs([(3, 4, 5)])
    with torch.no_grad():
        g[0][0], e[0][1], g[0][2, :, :2] = 0, 0, 0
    _, (to_g, to_e, _) = check(g, e, f, backend)
    assert (to_e[0][0] == 0).all() and (to_e[0][2, :, :2] == 0).all() and (to_e[0][2, :, 2:] != 0).all()
    alone = gradient_statistics(g, features=e, backend=backend).attribution
    assert (helpers.gradients(alone, [g], torch.ones_like(alone))[0][:2] == 0).all()


def test_empty_mask_gives_zero(backend):
    g, e, f = inputs([(2, 4, 5)])
    mask = torch.tensor([[False] * 5, [True] * 5])
    result, gradients = check(g, e, f, backend, masks=[mask])
    assert all(
        (x[0] == 0).all() for x in (result.fisher.T, result.attribution.T, result.fisher_maps[0], result.attribution_maps[0])
    )
    assert all((x[0] == 0).all() for (x,) in gradients)
    assert (result.fisher[:, 1] > 0).all() and (result.attribution[:, 1] > 0).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1e-8])
def test_masked_out_values_do_not_matter(backend, value):
    """Whatever the positive map holds where it does not count: 0, NaN, or what makes the denominator 0."""
    g, e, f = inputs([(2, 4, 5)])
    mask = torch.rand(2, 5) < 0.5
    expected, wanted = check(g, e, f, backend, masks=[mask])
    with torch.no_grad():
        f[0][~mask] = value
    result = gradient_statistics(g, e, f, mask=[mask], backend=backend)
    assert torch.equal(result.fisher, expected.fisher)
    upstream = torch.randn_like(result.fisher)
    clean = [x.detach().where(mask, 1.0).requires_grad_() for x in f]
    again = helpers.gradients(gradient_statistics(g, e, clean, mask=[mask], backend=backend).fisher, [g, clean], upstream)
    for actual, want in zip(helpers.gradients(result.fisher, [g, f], upstream), again, strict=True):
        assert torch.equal(actual, want)


def test_eps_is_not_rounded_to_float32_under_a_mask(backend):
    """Found by fuzzing: in float64 the gradients of masked calls were those of an ``eps`` in float32."""
    g, f = (
        torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True),
        torch.zeros(2, 5, dtype=torch.float64, requires_grad=True),
    )
    mask = torch.tensor([True, False, True, True, False]).expand(2, 5)
    result = gradient_statistics([g], values=[f], mask=[mask], eps=1e-3, backend=backend)
    u = torch.randn_like(result.fisher)
    wanted = oracle.gradient_statistics(*map(helpers.wide, (g, None, f, mask)), 1e-3, [u[0].numpy(), None, None, None])
    helpers.assert_close(helpers.gradients(result.fisher, [g, f], u), [wanted.dg, wanted.df], 1e-14)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_a_thousand_equal_channels(backend, channel_dim):
    """Found by fuzzing: every addition rounds to the same side, and one sum over all channels had lost 1.3e-5."""
    g, e, f = (torch.full(shape, x) for shape, x in (((1, 1024, 40), 0.7), ((1, 1024, 40), 0.91), ((1, 40), 0.3)))
    g, e = (x.movedim(1, channel_dim).contiguous().movedim(channel_dim, 1) for x in (g, e))
    check(*([x.requires_grad_()] for x in (g, e, f)), backend, tolerance=3e-6)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3), (8, 12), (1, 1)])
def test_one_mask_for_all_is_resized(backend, shape):
    g, e, f = inputs([(2, 3, 4, 6), (2, 5, 2, 3)])
    mask = torch.rand(2, *shape) < 0.55
    result = gradient_statistics(g, e, f, mask=mask, backend=backend)
    for k, x in enumerate(g):
        wanted = oracle.gradient_statistics(
            *(helpers.wide(y[k]) for y in (g, e, f)), mask=oracle.resize_mask(helpers.wide(mask), x.shape[2:])
        )
        helpers.assert_close(result.fisher[k], wanted.fisher, 1e-12)
        helpers.assert_close(result.attribution[k], wanted.attribution, 1e-12)


def test_tensors_do_not_mix(backend):
    g, e, f = inputs(SHAPES["mixed"], torch.float32)
    together = gradient_statistics(g, e, f, backend=backend)
    for k in range(len(g)):
        alone = gradient_statistics([g[k]], [e[k]], [f[k]], backend=backend)
        helpers.assert_close(together.fisher[k], alone.fisher[0], 1e-6)
        helpers.assert_close(together.attribution[k], alone.attribution[0], 1e-6)


def test_gradient_and_feature_may_be_the_same_tensor(backend):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    attribution = gradient_statistics([x], features=[x], backend=backend).attribution
    upstream = torch.randn_like(attribution)
    expected = torch.autograd.grad(x.square().square().sum((1, 2)).sqrt(), x, upstream[0])
    helpers.assert_close(torch.autograd.grad(attribution, x, upstream), expected, 1e-12)


class Fusion(nn.Module):
    """Two streams, a smooth interaction and dense scores."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(7, 6, 1)
        self.classify = nn.Conv2d(6, 3, 1)

    def forward(self, video, audio):
        return self.classify(torch.tanh(self.mix(torch.cat([video, audio], 1))))


@pytest.mark.parametrize("target", [0, 2])
def test_captum_input_x_gradient(backend, target):
    """Attribution maps and their pooled value against captum, for the score of a class at every position."""
    head = Fusion().double()
    video, audio = (torch.randn(3, c, 4, 5, dtype=torch.float64, requires_grad=True) for c in (4, 3))
    captum = InputXGradient(lambda v, a: head(v, a).sum((2, 3))).attribute((video, audio), target=target)
    grads = torch.autograd.grad(head(video, audio)[:, target].sum(), (video, audio))
    result = gradient_statistics(grads, features=[video, audio], maps=True, backend=backend)
    for k, x in enumerate(captum):
        helpers.assert_close(result.attribution[k], x.flatten(1).norm(dim=1), 1e-12)
        helpers.assert_close(result.attribution_maps[k], x.norm(dim=1), 1e-12)


def test_fisher_is_the_squared_gradient_over_the_value(backend):
    """End to end: the gradient of the cross entropy map with respect to logits is ``p - onehot``."""
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 3, 4))
    values = nn.functional.cross_entropy(logits, labels, reduction="none")
    (grad,) = torch.autograd.grad(values.sum(), logits, create_graph=True)
    fisher = gradient_statistics([grad], values=[values], backend=backend).fisher
    residual = logits.softmax(1) - nn.functional.one_hot(labels, 5).movedim(-1, 1)
    expected = (residual.square().sum(1) / (values + 1e-8)).mean((1, 2))
    helpers.assert_close(fisher[0], expected, 1e-12)
    upstream = torch.randn_like(expected)
    twice = torch.autograd.grad(fisher[0], logits, upstream, retain_graph=True)
    helpers.assert_close(twice, torch.autograd.grad(expected, logits, upstream), 1e-11)

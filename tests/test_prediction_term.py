"""FunctionalEntropyLoss.prediction_term on every backend: closed forms, manual differentiation, pooling, masks, granularity."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modreg_fast as mrf

EPS = 1e-8
SPATIAL = (4, 6)


def predictions(classes=5, spatial=SPATIAL, modalities=2, batch=3):
    """Logits of each modality, labels, and the cross entropy map of the mean."""
    z = {f"m{i}": torch.randn(batch, classes, *spatial, dtype=torch.float64, requires_grad=True) for i in range(modalities)}
    labels = torch.randint(classes, (batch, *spatial))
    return z, labels, F.cross_entropy(sum(z.values()) / len(z), labels, reduction="none")


def manual(values, inputs, mask=None, granularity="pixel"):
    """Information ``(M, B)`` sample by sample, from the definitions, differentiable."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    rows = []
    for x in inputs.values():
        row = []
        for b in range(len(values)):
            if not mask[b].any():
                row.append(torch.zeros((), dtype=values.dtype))
                continue
            if granularity == "sample":
                f = values[b][mask[b]].mean()
                g = torch.autograd.grad(f, x, create_graph=True)[0][b]
                row.append(g.square().sum() / (f + EPS))
                continue
            g = torch.autograd.grad(values[b][mask[b]].sum(), x, create_graph=True)[0][b]
            ratio = [n // k for n, k in zip(values.shape[1:], x.shape[2:], strict=False)]
            if x.dim() == 2:
                windows = [(g, values[b][mask[b]], mask[b])]
            else:
                windows = []
                for i in range(x.shape[2]):
                    for j in range(x.shape[3]):
                        window = (b, slice(i * ratio[0], (i + 1) * ratio[0]), slice(j * ratio[1], (j + 1) * ratio[1]))
                        windows.append((g[:, i, j], values[window][mask[window]], mask[window]))
                windows = [w for w in windows if 2 * w[2].sum() >= w[2].numel()]
            terms = [g.square().sum() / (f.mean() + EPS) for g, f, _ in windows]
            row.append(torch.stack(terms).mean() if terms else torch.zeros((), dtype=values.dtype))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def penalty_of(information, valid=None):
    valid = torch.ones(information.shape[1], dtype=torch.bool) if valid is None else valid
    return (1 / (information[:, valid].mean(1) + EPS)).sum()


def compare(loss, values, inputs, expected, leaves, **options):
    """Value and (second order) gradients of the leaves against a differentiable expectation."""
    actual = loss.prediction_term(values, inputs, **options)
    assert actual.shape == () and actual.item() == pytest.approx(expected.item(), rel=1e-10)
    helpers.assert_close(helpers.gradients(actual, leaves, None), helpers.gradients(expected, leaves, None), 1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_pixel_closed_form(backend, masked):
    """With f = CE(softmax(mean z)) the gradient is (softmax - onehot) / M."""
    z, labels, values = predictions(modalities=3)
    mask = torch.rand(3, *SPATIAL) < 0.6 if masked else None
    residual = (sum(z.values()) / 3).softmax(1) - F.one_hot(labels, 5).movedim(-1, 1)
    per_pixel = (residual / 3).square().sum(1) / (values + EPS)
    keep = torch.ones_like(per_pixel) if mask is None else mask.double()
    information = ((per_pixel * keep).sum((1, 2)) / keep.sum((1, 2))).expand(3, -1)
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    compare(loss, values, z, penalty_of(information), list(z.values()), mask=mask)


@pytest.mark.parametrize("granularity", ["pixel", "sample"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (2, 3), (1, 1), ()])
def test_tensors_at_other_resolutions(backend, granularity, masked, size):
    """Inputs below the resolution of the loss map, also pooled embeddings, through a network that is not linear."""
    inputs = {m: torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True) for m in "ab"}
    head = nn.Conv2d(10, 4, 1).double()
    joint = torch.cat([x if size else x[:, :, None, None] for x in inputs.values()], 1)
    logits = head(F.interpolate(torch.tanh(joint), SPATIAL))
    values = F.cross_entropy(logits, torch.randint(4, (2, *SPATIAL)), reduction="none")
    mask = torch.rand(2, *SPATIAL) < 0.7 if masked else None
    expected = penalty_of(manual(values, inputs, mask, granularity))
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    compare(loss, values, inputs, expected, [*inputs.values(), *head.parameters()], mask=mask, granularity=granularity)


@pytest.mark.parametrize("granularity", ["pixel", "sample"])
@pytest.mark.parametrize("masked", [False, True])
def test_classification(backend, granularity, masked):
    """Values ``(B,)`` and logits ``(B, K)``: with one position per sample, both granularities are one."""
    z, labels, values = predictions(spatial=())
    mask = torch.tensor([True, False, True]) if masked else None
    residual = (sum(z.values()) / 2).softmax(1) - F.one_hot(labels, 5)
    information = ((residual / 2).square().sum(1) / (values + EPS)).expand(2, -1)
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    compare(loss, values, z, penalty_of(information, mask), list(z.values()), mask=mask, granularity=granularity)


@pytest.mark.parametrize("granularity", ["pixel", "sample"])
def test_samples_without_a_valid_pixel_do_not_count(backend, granularity):
    z, _, values = predictions()
    mask = torch.rand(3, *SPATIAL) < 0.6
    mask[1] = False
    valid = torch.tensor([True, False, True])
    expected = penalty_of(manual(values, z, mask, granularity), valid)
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    compare(loss, values, z, expected, list(z.values()), mask=mask, granularity=granularity)
    nothing = loss.prediction_term(values, z, mask=torch.zeros_like(mask), granularity=granularity)
    assert nothing == 0 and all((g == 0).all() for g in helpers.gradients(nothing, list(z.values()), None))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("granularity", ["pixel", "sample"])
def test_empty_sample_never_gives_nan(backend, granularity, eps):
    z, _, values = predictions()
    mask = torch.ones(3, *SPATIAL, dtype=torch.bool)
    mask[0] = False
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, eps=eps, backend=backend)
    value = loss.prediction_term(values, z, mask=mask, granularity=granularity)
    gradients = helpers.gradients(value, list(z.values()), None)
    assert value.isfinite() and all(g.isfinite().all() and (g[0] == 0).all() and (g[1:] != 0).any() for g in gradients)


def test_coarse_pixels_with_too_few_valid_pixels_leave_the_sample_out(backend):
    """A sample with valid pixels, but none of whose coarse pixels is half valid, has no valid pixel at that resolution."""
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    values = F.interpolate(x, (8, 8)).square().sum(1)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[1] = False
    mask[1, 0, 0] = True
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    value, details = loss.prediction_term(values, {"a": x}, mask=mask, return_details=True)
    expected = manual(values, {"a": x}, mask)[0, 0]
    assert details.information["a"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert value.item() == pytest.approx(1 / (expected.item() + EPS), rel=1e-10)


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
def test_weight_objective_and_details(backend, objective):
    z, _, values = predictions(modalities=3)
    mean = manual(values, z).mean(1)
    loss = mrf.FunctionalEntropyLoss(7.0, 0.25, objective, scale_weights=[1.0, 2.0], backend=backend)
    value, details = loss.prediction_term(values, z, return_details=True)
    expected = {"inverse": (1 / mean).sum(), "norm": (1 / mean).norm(), "log": -mean.log().sum()}[objective]
    assert value.item() == pytest.approx(0.25 * expected.item(), rel=1e-6)
    assert list(details.information) == list(z)
    helpers.assert_close([details.information[m][0] for m in z], list(mean), 1e-10)
    assert all(x.shape == (1,) and not x.requires_grad for x in details.information.values())


def test_tokens(backend):
    z = {m: torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True) for m in "ab"}
    labels = torch.randint(5, (2, 6))
    values = F.cross_entropy((z["a"] + z["b"]).mT, labels, reduction="none")
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, channel_dim=-1, backend=backend)
    residual = (z["a"] + z["b"]).softmax(-1) - F.one_hot(labels, 5)
    information = (residual.square().sum(-1) / (values + EPS)).mean(1).expand(2, -1)
    compare(loss, values, z, penalty_of(information), list(z.values()))


def test_ignored_labels(backend):
    """The everyday call: ignore_index leaves zeros in the map, the mask leaves these pixels out of the mean."""
    z = {m: torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True) for m in "ab"}
    labels = torch.randint(4, (2, 5, 5))
    labels[torch.rand(2, 5, 5) < 0.4] = 255
    values = F.cross_entropy(z["a"] + z["b"], labels, reduction="none", ignore_index=255)
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    compare(loss, values, z, penalty_of(manual(values, z, labels != 255)), list(z.values()), mask=labels != 255)


def test_a_modality_without_influence(backend):
    """Its information is 0, its penalty the largest, and nothing is NaN."""
    z, _, values = predictions()
    z["unused"] = torch.randn(3, 5, *SPATIAL, dtype=torch.float64, requires_grad=True)
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    with pytest.warns(UserWarning, match="prediction_term: nothing .* 'unused' reaches the score"):
        value, details = loss.prediction_term(values, z, return_details=True)
    assert details.information["unused"] == 0 and value.item() >= 1e8
    assert all(g.isfinite().all() for g in helpers.gradients(value, list(z.values()), None))


def test_graph_stays_usable(backend):
    """The task loss can still be differentiated through the same values, in one backward pass with the penalty."""
    z, labels, values = predictions()
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1e-3, backend=backend)
    (values.mean() + loss.prediction_term(values, z)).backward()
    fresh = {m: x.detach().requires_grad_() for m, x in z.items()}
    again = F.cross_entropy(sum(fresh.values()) / 2, labels, reduction="none")
    both = torch.autograd.grad(again.mean() + 1e-3 * penalty_of(manual(again, fresh)), list(fresh.values()))
    helpers.assert_close([x.grad for x in z.values()], list(both), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity, size", [("sample", (400, 300)), ("pixel", (4, 3)), ("pixel", ())])
@pytest.mark.parametrize("masked", [False, True])
def test_means_of_16_bit_maps_keep_their_digits(backend, dtype, granularity, size, masked):
    """Means over many positions, whose sum overflows float16 and rounds in bfloat16. With f = sum_c z the gradients are exact."""
    z = torch.rand(1, 2, *size).add(0.5).to(dtype).requires_grad_()
    full = z if size == (400, 300) else F.interpolate(z if size else z[:, :, None, None], (400, 300))
    values = full.sum(1)
    mask = torch.rand(1, 400, 300) < 0.8 if masked else None
    keep = torch.ones(1, 400, 300, dtype=torch.float64) if mask is None else mask.double()
    exact = values.detach().double() * keep
    if granularity == "sample":
        information = 2 / keep.sum() ** 2 * keep.sum() / (exact.sum() / keep.sum() + EPS)
    else:
        blocks = [x.reshape(-1, 100, size[1], 100).sum((1, 3)) if size else x.sum() for x in (keep, exact)]
        # Each coarse gradient is the number of valid positions below it, rounded to the storage type by autograd.
        information = (2 * blocks[0].to(dtype).double().square() / (blocks[1] / blocks[0] + EPS)).mean()
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    _, details = loss.prediction_term(values, {"a": z}, mask=mask, granularity=granularity, return_details=True)
    assert details.information["a"].item() == pytest.approx(information.item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_a_mean_in_16_bits(backend, dtype, masked):
    """Good predictions on many pixels: the gradient of the mean loss is about 1e-9, which float16 does not have."""
    labels = torch.randint(4, (1, 512, 512))
    z = {m: (8 * F.one_hot(labels, 4).movedim(-1, 1) + torch.randn(1, 4, 512, 512)).to(dtype).requires_grad_() for m in "ab"}
    values = F.cross_entropy((z["a"].float() + z["b"].float()) / 2, labels, reduction="none")
    mask = torch.rand(1, 512, 512) < 0.6 if masked else torch.ones(1, 512, 512, dtype=torch.bool)
    mean = (z["a"] + z["b"]).detach().double() / 2
    p, keep = mean.softmax(1), mask.double() / mask.sum()
    f = -(mean.log_softmax(1).gather(1, labels[:, None])[:, 0] * keep).sum()
    g = (p - F.one_hot(labels, 4).movedim(-1, 1)) / 2 * keep[:, None]
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, objective="log", backend=backend)
    options = {"mask": mask} if masked else {}
    penalty, details = loss.prediction_term(values, z, granularity="sample", return_details=True, **options)
    for m in "ab":
        assert details.information[m].item() == pytest.approx((g.square().sum() / (f + EPS)).item(), rel=1e-2, abs=0)
    assert torch.autograd.grad(penalty, z["a"])[0].isfinite().all()

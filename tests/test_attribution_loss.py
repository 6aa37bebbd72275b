"""AttributionLoss on every backend: NumPy formula over captum's attributions, manual differentiation, masks, labels, presence."""

import helpers
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient
from torch import nn

import modreg_fast as mrf

CHANNELS = {"video": 4, "audio": 3, "text": 5}
TARGET = {"text": 1.0, "video": 2.0, "audio": 0.5}
VALUE = 1e-6  # tolerance where targets such as 1/3 enter; that float64 keeps them exact has a test of its own
PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])


class Head(nn.Module):
    """Fusion and classifier with a smooth interaction: ``(B, C_m)`` or ``(B, C_m, H, W)`` to class scores of the same form."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.fuse, self.classify = nn.Linear(sum(CHANNELS.values()), 6), nn.Linear(6, classes)

    def forward(self, *features):
        return self.classify(torch.tanh(self.fuse(torch.cat(features, 1).movedim(1, -1)))).movedim(-1, 1)


def scene(spatial=(), batch=4):
    head = Head().double()
    features = {m: torch.randn(batch, c, *spatial, dtype=torch.float64, requires_grad=True) for m, c in CHANNELS.items()}
    return head, features, head(*features.values())


def attributed(score, features, mask=None):
    """``(M, B)`` from the definition, differentiable; ``mask`` of each feature's own resolution."""
    grads = torch.autograd.grad(score, list(features.values()), create_graph=True)
    products = [g * x for g, x in zip(grads, features.values(), strict=True)]
    if mask is not None:
        products = [x.where(mask[:, None], 0) for x in products]
    return torch.stack([x.square().flatten(1).sum(1) for x in products]).sqrt()


def penalty_of(attribution, target, norm):
    """Differentiable; every sample counts."""
    share = attribution / attribution.sum(0)
    difference = (share - torch.as_tensor(target, dtype=share.dtype)[:, None]).abs()
    return (difference if norm == "l1" else difference.square()).sum(0).mean()


def compare(loss, head, features, scores, expected, **options):
    actual = loss(scores, features, **options)
    assert actual.shape == () and actual.item() == pytest.approx(expected.item(), rel=VALUE)
    leaves = [*head.parameters(), *features.values()]
    helpers.assert_close(helpers.gradients(actual, leaves, None), helpers.gradients(expected, leaves, None), VALUE)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("present", [None, PRESENT])
@pytest.mark.parametrize("target", [None, TARGET])
def test_captum(backend, norm, present, target):
    """Value and details from captum's attributions of the winning class, through the NumPy penalty."""
    head, features, scores = scene()
    captum = InputXGradient(head).attribute(tuple(features.values()), target=scores.argmax(1))
    attribution = np.stack([np.linalg.norm(helpers.wide(x), axis=1) for x in captum])
    weights = [1.0] * 3 if target is None else [target[m] for m in CHANNELS]
    expected, shares = oracle.attribution_penalty(attribution, weights, norm, helpers.wide(present))
    loss = mrf.AttributionLoss(target, norm, backend=backend)
    value, details = loss(scores, features, present=present, return_details=True)
    assert value.item() == pytest.approx(expected, rel=VALUE)
    assert list(details.share) == list(details.attribution) == list(CHANNELS)
    helpers.assert_close(list(details.share.values()), list(shares), 1e-11)
    assert sum(x.item() for x in details.share.values()) == pytest.approx(1)
    counted = np.ones((3, 4), bool) if present is None else helpers.wide(present).T
    counted_samples = counted.any(0)
    mean = np.where(counted, attribution, 0)[:, counted_samples].mean(1)
    helpers.assert_close(list(details.attribution.values()), list(mean), 1e-11)
    assert not any(x.requires_grad for x in (*details.share.values(), *details.attribution.values()))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient(backend, norm):
    head, features, scores = scene()
    expected = penalty_of(attributed(scores.max(1).values.sum(), features), [4 / 7, 1 / 7, 2 / 7], norm)
    compare(mrf.AttributionLoss(TARGET, norm, backend=backend), head, features, scores, expected)


def test_target_is_normalised():
    """Only its proportions count; the order of its keys does not."""
    loss = mrf.AttributionLoss({"b": 30, "a": 10})
    assert loss.target == {"b": 0.75, "a": 0.25}
    head, features, scores = scene()
    values = [
        mrf.AttributionLoss({m: f * TARGET[m] for m in order}, backend="reference")(scores, features)
        for f, order in ((1, CHANNELS), (0.125, TARGET))
    ]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-14)


def test_target_of_a_call(backend):
    """It takes the place of the constructor's, for that call only."""
    head, features, scores = scene()
    loss, other = mrf.AttributionLoss(TARGET, backend=backend), {"audio": 5, "text": 1, "video": 1}
    before = loss(scores, features).item()
    assert (
        loss(scores, features, target=other).item()
        == mrf.AttributionLoss(other, backend=backend)(scores, features).item()
        != before
    )
    assert loss(scores, features).item() == before
    with pytest.raises(ValueError, match=r"features must be the modalities of target, \['audio'\]"):
        loss(scores, features, target={"audio": 1})


def test_share_at_the_target_costs_nothing(backend):
    """In float64 to 1e-13, also for shares such as 1/3 that float32 cannot hold."""
    features = {m: torch.ones(2, 4, dtype=torch.float64, requires_grad=True) for m in "abc"}
    scores = sum(x.sum(1, keepdim=True) for x in features.values()) * torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert mrf.AttributionLoss(backend=backend)(scores, features).item() == pytest.approx(0.0, abs=1e-13)
    lopsided = mrf.AttributionLoss({"a": 1.0, "b": 0.0, "c": 0.0}, backend=backend)(scores, features)
    assert lopsided.item() == pytest.approx(4 / 3, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_dense_scores(backend, masked, with_index):
    head, features, scores = scene((3, 4))
    mask = torch.rand(4, 3, 4) < 0.6 if masked else None
    index = torch.randint(3, (4, 3, 4)) if with_index else None
    chosen = scores.gather(1, (scores.argmax(1) if index is None else index)[:, None])[:, 0]
    score = (chosen if mask is None else chosen.where(mask, 0)).sum()
    expected = penalty_of(attributed(score, features, mask), [1 / 3] * 3, "l1")
    loss = mrf.AttributionLoss(backend=backend)
    compare(loss, head, features, scores, expected, mask=mask, index=index)


def test_labels_with_ignored_positions(backend):
    """The everyday call: ``index=labels, mask=labels != 255``; what lies under the mask is never looked up."""
    head, features, scores = scene((3, 4))
    labels = torch.randint(3, (4, 3, 4))
    mask = torch.rand(4, 3, 4) < 0.6
    loss = mrf.AttributionLoss(backend=backend)
    expected = loss(scores, features, index=labels, mask=mask)
    dtypes = {torch.uint8: 255, torch.int8: -1, torch.int16: 255, torch.uint16: 65535, torch.int32: -1, torch.int64: -100}
    for dtype, ignored in dtypes.items():
        value = loss(scores, features, index=labels.where(mask, ignored).to(dtype), mask=mask)
        assert torch.equal(value, expected)


def test_masked_positions_do_not_matter(backend):
    """Not their scores (a masked-out NaN stays out) and not their features."""
    head, features, scores = scene((3, 4))
    mask = torch.rand(4, 3, 4) < 0.6
    loss = mrf.AttributionLoss(backend=backend)
    expected = loss(scores, features, mask=mask)
    spoiled = {m: x.detach().where(mask[:, None], float("nan")).requires_grad_() for m, x in features.items()}
    value = loss(head(*spoiled.values()), spoiled, mask=mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_sample_without_valid_position_counts_nowhere(backend):
    head, features, scores = scene((3, 4))
    mask = torch.rand(4, 3, 4) < 0.6
    mask[2] = False
    keep = [0, 1, 3]
    loss = mrf.AttributionLoss(TARGET, backend=backend)
    value, details = loss(scores, features, mask=mask, return_details=True)
    part = {m: x[keep].detach().requires_grad_() for m, x in features.items()}
    expected, expected_details = loss(head(*part.values()), part, mask=mask[keep], return_details=True)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for actual, wanted in zip(details, expected_details, strict=True):
        helpers.assert_close(list(actual.values()), list(wanted.values()), 1e-12)
    gradients = helpers.gradients(value, list(features.values()), None)
    assert all((g[2] == 0).all() and g.isfinite().all() for g in gradients)


def test_nothing_valid_gives_zero(backend):
    head, features, scores = scene((3, 4))
    loss = mrf.AttributionLoss(backend=backend)
    for options in ({"mask": torch.zeros(4, 3, 4, dtype=torch.bool)}, {"present": torch.zeros(4, 3, dtype=torch.bool)}):
        value, details = loss(scores, features, return_details=True, **options)
        assert value == 0 and all(x.isnan() for x in (*details.share.values(), *details.attribution.values()))
        assert all((g == 0).all() for g in helpers.gradients(value, [*features.values(), *head.parameters()], None))


def test_partial_presence_equals_sub_batches(backend):
    """Targets are normalised anew over what a sample has; a sample without any counts nowhere."""
    head, features, scores = scene()
    loss = mrf.AttributionLoss(TARGET, "l2", backend=backend)
    total = 0.0
    for b in range(3):
        held = [m for i, m in enumerate(CHANNELS) if PRESENT[b, i]]
        one = {m: x[b : b + 1].detach().requires_grad_() for m, x in features.items()}
        part = mrf.AttributionLoss({m: TARGET[m] for m in held}, "l2", backend=backend)
        total += part(head(*one.values()), {m: one[m] for m in held}).item()
    assert loss(scores, features, present=PRESENT).item() == pytest.approx(total / 3, rel=VALUE)


def test_present_modalities_without_target_do_not_count(backend):
    """A sample whose only modalities have target 0 cannot be normalised: it is left out, never NaN."""
    head, features, scores = scene()
    present = torch.tensor([[True, True, True]] * 3 + [[False, True, False]])
    loss = mrf.AttributionLoss({"video": 1, "audio": 0, "text": 1}, backend=backend)
    value = loss(scores, features, present=present)
    part = {m: x[:3].detach().requires_grad_() for m, x in features.items()}
    assert value.item() == pytest.approx(loss(head(*part.values()), part).item(), rel=1e-12)
    assert all(g.isfinite().all() for g in helpers.gradients(value, list(features.values()), None))


def pyramid():
    """Two modalities at two scales below dense scores, and a third as pooled embedding."""
    features = {m: [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)] for m in ("rgb", "depth")} | {"text": torch.randn(2, 6)}
    features = {
        m: [y.double().requires_grad_() for y in x] if isinstance(x, list) else x.double().requires_grad_()
        for m, x in features.items()
    }
    mix = torch.randn(4, 22, dtype=torch.float64)
    flat = [x for m in ("rgb", "depth") for x in features[m]] + [features["text"][:, :, None, None].expand(-1, -1, 8, 8)]
    joint = torch.cat([F.interpolate(x, (8, 8)) for x in flat], 1)
    return features, torch.einsum("kc,bchw->bkhw", mix, joint.tanh())


@pytest.mark.parametrize("masked", [False, True])
def test_scales_are_pooled_together(backend, masked):
    """``a^2`` adds up over the scales of a modality; masks act on dense features at their own resolution only."""
    features, scores = pyramid()
    mask = torch.rand(2, 8, 8) < 0.6 if masked else None
    winner = scores.max(1).values
    score = (winner if mask is None else winner.where(mask, 0)).sum()
    rows = []
    for row in features.values():
        row = row if isinstance(row, list) else [row]
        products = [g * x for g, x in zip(torch.autograd.grad(score, row, create_graph=True), row, strict=True)]
        if mask is not None and row[0].dim() > 2:
            valid = [torch.tensor(oracle.resize_mask(helpers.wide(mask), x.shape[2:])) for x in row]
            products = [x.where(v[:, None], 0) for x, v in zip(products, valid, strict=True)]
        rows.append(sum(x.square().flatten(1).sum(1) for x in products).sqrt())
    expected = penalty_of(torch.stack(rows), [1 / 3] * 3, "l1")
    actual = mrf.AttributionLoss(backend=backend)(scores, features, mask=mask)
    assert actual.item() == pytest.approx(expected.item(), rel=VALUE)
    leaves = [*features["rgb"], *features["depth"], features["text"]]
    helpers.assert_close(helpers.gradients(actual, leaves, None), helpers.gradients(expected, leaves, None), VALUE)


def test_tokens(backend):
    """Features ``(B, N, C)`` below pooled scores."""
    features = {m: torch.randn(2, 7, c, dtype=torch.float64, requires_grad=True) for m, c in CHANNELS.items()}
    head = Head().double()
    scores = head(*(x.square().mean(1) for x in features.values()))
    expected = penalty_of(attributed(scores.max(1).values.sum(), features), [1 / 3] * 3, "l1")
    compare(mrf.AttributionLoss(channel_dim=-1, backend=backend), head, features, scores, expected)


def test_unused_modality_has_no_share(backend):
    head, features, scores = scene()
    features["unused"] = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="AttributionLoss: nothing .* 'unused' reaches the score, so its gradient is 0"):
        value, details = mrf.AttributionLoss(backend=backend)(scores, features, return_details=True)
    assert details.share["unused"] == 0 and value.isfinite()
    gradients = helpers.gradients(value, [*features.values(), *head.parameters()], None)
    assert all(g.isfinite().all() for g in gradients) and (gradients[3] == 0).all()


def test_nan_shows(backend):
    head, features, _ = scene()
    with torch.no_grad():
        features["audio"][1, 0] = float("nan")
    assert mrf.AttributionLoss(backend=backend)(head(*features.values()), features).isnan()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Linear(8, c) for m, c in CHANNELS.items()})
        self.head = Head()

    def forward(self, x):
        features = {m: encoder(x).relu() for m, encoder in self.encoders.items()}
        return self.head(*features.values()), features


def test_training_fusion_and_classifier_only(backend):
    """The paper's update: the penalty's gradient reaches fusion and classifier, the encoders' ``.grad`` stays untouched."""
    model, x = Model(), torch.randn(4, 8)
    loss, optimizer = mrf.AttributionLoss(TARGET, "l2", backend=backend), torch.optim.SGD(model.head.parameters(), 0.5)
    values = []
    for _ in range(20):
        scores, features = model(x)
        penalty = loss(scores, features)
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward(inputs=list(model.head.parameters()))
        assert all(p.grad is None for p in model.encoders.parameters())
        assert model.head.fuse.weight.grad.abs().sum() > 0
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


def test_beside_the_task_loss(backend):
    """Task gradient for everything, penalty for the head, from one forward pass."""
    model, x, labels = Model(), torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    scores, features = model(x)
    task = F.cross_entropy(scores, labels)
    only_task = torch.autograd.grad(task, list(model.parameters()), retain_graph=True)
    penalty = mrf.AttributionLoss(backend=backend)(scores, features)
    only_penalty = torch.autograd.grad(penalty, list(model.head.parameters()), retain_graph=True, materialize_grads=True)
    task.backward(retain_graph=True)
    penalty.backward(inputs=list(model.head.parameters()))
    encoders = len(list(model.encoders.parameters()))
    expected = [*only_task[:encoders], *(a + b for a, b in zip(only_task[encoders:], only_penalty, strict=True))]
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-6, atol=1e-8)


def test_autocast_equals_eager(backend):
    model, x = Model(), torch.randn(4, 8)
    results = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            scores, features = model(x)
            value = mrf.AttributionLoss(backend=backend)(scores, features) if inside else None
        value = value if inside else mrf.AttributionLoss(backend=backend)(scores, features)
        assert scores.dtype == features["video"].dtype == torch.bfloat16
        results.append((value, helpers.gradients(value, list(model.head.parameters()), None)))
    assert results[0][0].dtype == torch.float32 and results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    helpers.assert_close(results[0][1], results[1][1], 1e-2)
    full = mrf.AttributionLoss(backend=backend)(*model(x))
    assert results[0][0].item() == pytest.approx(full.item(), abs=0.02)


@pytest.mark.parametrize("granularity", ["attribution", "pixel", "sample"])
def test_channels_last_equals_contiguous(backend, granularity):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        x = {
            m: torch.randn(2, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_() for m in "ab"
        }
        scores = torch.einsum("kc,bchw->bkhw", torch.randn(3, 8, dtype=torch.float64), torch.cat(list(x.values()), 1).tanh())
        if granularity == "attribution":
            value = mrf.AttributionLoss(backend=backend)(scores, x)
        else:
            ce = F.cross_entropy(scores, torch.randint(3, (2, 6, 5)), reduction="none")
            value = mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend).prediction_term(
                ce, x, granularity=granularity
            )
        results.append((value, helpers.gradients(value, list(x.values()), None)))
    helpers.assert_close(results[1][0], results[0][0], 1e-12)
    helpers.assert_close(results[1][1], results[0][1], 1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_absent_is_not_read(backend, fill, masked):
    """What stands in the rows of an absent modality reaches neither the value nor a gradient, not even as 0 times NaN."""
    mask = torch.rand(4, 3, 4) < 0.6 if masked else None

    def outcome(fill):
        head, features, _ = scene((3, 4))
        entered = {}
        for i, (m, x) in enumerate(features.items()):
            held = PRESENT[:, i, None, None, None]
            features[m] = x.detach().where(held, fill).requires_grad_()
            entered[m] = torch.where(held, features[m], 0)
        loss = mrf.AttributionLoss(TARGET, backend=backend)
        value, details = loss(head(*entered.values()), features, mask=mask, present=PRESENT, return_details=True)
        return value, [x for part in details for x in part.values()], helpers.gradients(value, list(features.values()), None)

    torch.manual_seed(4)
    value, details, gradients = outcome(fill)
    torch.manual_seed(4)
    expected, expected_details, expected_gradients = outcome(0.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    helpers.assert_close(details, expected_details, 1e-12)
    helpers.assert_close(gradients, expected_gradients, 1e-12)
    assert all((g[~PRESENT[:, i]] == 0).all() for i, g in enumerate(gradients))


def test_sample_that_counts_nowhere_may_be_nan(backend):
    """Without any modality, or with none that has a target: also its scores and its label are not read."""
    head, features, _ = scene()
    present = torch.tensor([[True, True, True], [False, True, False], [True, True, True], [False, False, False]])
    features = {m: x.detach() for m, x in features.items()}
    for x in features.values():
        x[1], x[3] = float("inf"), float("nan")
    features = {m: x.requires_grad_() for m, x in features.items()}
    scores, index = head(*(torch.where(present.all(1)[:, None], x, 0) for x in features.values())), torch.tensor([0, 255, 2, 255])
    scores = torch.where(present.all(1)[:, None], scores, float("nan"))
    loss = mrf.AttributionLoss({"video": 1, "audio": 0, "text": 1}, backend=backend)
    value = loss(scores, features, present=present, index=index)
    part = {m: x[::2].detach().requires_grad_() for m, x in features.items()}
    assert value.item() == pytest.approx(loss(head(*part.values()), part, index=index[::2]).item(), rel=1e-12)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert all(g.isfinite().all() for g in helpers.gradients(value, list(features.values()), None))

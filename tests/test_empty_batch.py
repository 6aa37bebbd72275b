"""No samples at all, as in a step whose samples were all filtered out: nothing counts, and nothing fails.

Ranks of which one has no samples: ``rank_without_samples`` in test_distributed.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modreg_fast as mrf


def step(batch=0, spatial=(6, 4)):
    """Features of two encoders, scores, labels."""
    torch.manual_seed(0)
    encoders, head = nn.ModuleDict({m: nn.Linear(3, 4) for m in "ab"}), nn.Linear(4, 5)
    x = {m: encoder(torch.randn(batch, *spatial, 3)).tanh().movedim(-1, 1) for m, encoder in encoders.items()}
    scores = head(sum(x.values()).movedim(1, -1)).movedim(-1, 1)
    return [*encoders.parameters(), *head.parameters()], x, scores


@pytest.mark.parametrize("spatial", [(), (6,), (6, 4), (2, 3, 4)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["features", "log", "attribution", "pixel", "sample"])
def test_losses_are_zero_with_zero_gradients(backend, kind, masked, spatial):
    parameters, x, scores = step(0, spatial)
    options = {"mask": torch.zeros(0, *spatial, dtype=torch.bool)} if masked else {}
    present = {"present": torch.zeros(0, 2, dtype=torch.bool)} if masked else {}
    balance = mrf.FunctionalEntropyLoss(1.0, 1.0, objective="log" if kind == "log" else "inverse", backend=backend)
    if kind in ("features", "log"):
        value, details = balance({m: [y] for m, y in x.items()}, return_details=True, **options, **present)
    elif kind == "attribution":
        value, details = mrf.AttributionLoss(backend=backend)(scores, x, return_details=True, **options, **present)
    else:
        values = F.cross_entropy(scores, torch.zeros(0, *spatial, dtype=torch.long), reduction="none")
        value, details = balance.prediction_term(values, x, granularity=kind, return_details=True, **options)
    assert value.item() == 0 and all(y.isnan().all() for part in details for y in part.values())
    value.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in parameters)
    assert parameters[0].grad is not None  # the graph is there: under DDP all ranks go through it


def test_functions(backend):
    x = torch.randn(0, 3, 4)
    assert mrf.functional.softmax_fisher_information([[x, x], [x, x]], backend=backend).shape == (2, 2, 0)
    statistics = mrf.functional.gradient_statistics([x], [x], [x[:, 0]], maps=True, backend=backend)
    assert statistics.fisher.shape == statistics.attribution.shape == (1, 0) and statistics.fisher_maps[0].shape == (0, 4)
    assert mrf.functional.resize_mask(torch.ones(0, 6, 6, dtype=torch.bool), (4, 4)).shape == (0, 4, 4)


def test_an_average_does_not_move():
    """AdaptiveWeight and QualityTarget: a step without samples leaves them as they are."""
    adaptive, quality = mrf.AdaptiveWeight(0.5, decay=0.5), mrf.QualityTarget(["a", "b"], 5, decay=0.5)
    for batch in (3, 0):
        parameters, x, scores = step(batch)
        labels = torch.zeros(batch, 6, 4, dtype=torch.long)
        penalty = mrf.AttributionLoss({"a": 1, "b": 3})(scores, x)
        adaptive(F.cross_entropy(scores, labels), penalty, parameters)
        if batch:
            labels[0] = 1
        target = quality({m: scores + i for i, m in enumerate("ab")}, labels)
        if batch:
            weight, expected = adaptive.weight.clone(), target
    assert weight > 0 and adaptive.weight == weight and target == pytest.approx(expected)

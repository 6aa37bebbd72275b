"""torch.inference_mode around the losses, tensors that were made under it, and a default device that is not that of the tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F

import modreg_fast as mrf

MASK = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.6
PRESENT = torch.tensor([[True, True], [True, False]])
LABELS = torch.arange(72).reshape(2, 6, 6) % 3


def maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.randn(2, 3, 6, 6, generator=generator) for m in "ab"}


def inferred(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_feature_term_under_inference_mode(backend, sigma):
    balance = mrf.FunctionalEntropyLoss(1.0, sigma=sigma, backend=backend)
    torch.manual_seed(3)
    expected = balance({m: [x] for m, x in maps().items()}, mask=MASK, present=PRESENT)
    for tensors in (maps(), {m: inferred(x) for m, x in maps().items()}):
        torch.manual_seed(3)
        with torch.inference_mode():
            value, details = balance({m: [x] for m, x in tensors.items()}, mask=MASK, present=PRESENT, return_details=True)
        assert value == expected and details.information["a"].isfinite().all()


@pytest.mark.parametrize("fine", [False, True])
def test_inference_tensors_beside_trained_ones(backend, fine):
    """Features of a frozen encoder, masks and labels may come from inference mode; autograd, which cannot keep them, gets copies."""
    mask, present, index = inferred(MASK), inferred(PRESENT), inferred(LABELS)
    if fine:
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    results = []
    for made in (inferred, torch.clone):
        x = maps()
        trained = x["a"].requires_grad_()
        features = {"a": [trained], "b": [made(x["b"])]}
        value = mrf.FunctionalEntropyLoss(1.0, backend=backend)(features, mask=mask, present=present)
        if not fine:
            scores = trained.tanh() * trained.roll(1, 1)
            balance = mrf.FunctionalEntropyLoss(1.0, 1.0, backend=backend)
            value = value + mrf.AttributionLoss({"a": 2, "c": 1}, backend=backend)(
                scores, {"a": trained, "c": trained}, index=index, mask=mask, present=present
            )
            values = F.cross_entropy(scores, LABELS, reduction="none")
            value = value + balance.prediction_term(values, {"a": trained}, mask=mask)
        results.append((value.item(), *torch.autograd.grad(value, trained)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_functions_take_inference_tensors(backend):
    x = maps()["a"]
    g = x.square().requires_grad_()
    options = {"mask": inferred(MASK), "backend": backend}
    statistics = mrf.functional.gradient_statistics([g], [inferred(x)], [inferred(x[:, 0].square())], **options)
    (found,) = torch.autograd.grad(statistics.fisher.sum() + statistics.attribution.sum(), g)
    plain = mrf.functional.gradient_statistics([g], [x], [x[:, 0].square()], mask=MASK, backend=backend)
    assert torch.equal(found, torch.autograd.grad(plain.fisher.sum() + plain.attribution.sum(), g)[0])


def test_state_stays_usable():
    """Averages that were updated under inference mode can be trained with, loaded into and copied."""
    quality = mrf.QualityTarget(["a", "b"], 3)
    state = copy.deepcopy(quality.state_dict())
    with torch.inference_mode():
        quality(maps(), LABELS)
    assert not any(buffer.is_inference() for buffer in quality.buffers())
    quality(maps(1), LABELS)
    copy.deepcopy(quality).load_state_dict(state)


def test_default_device(backend):
    """Everything is made on the device of the tensors, whatever ``torch.set_default_device`` says."""
    x = {m: y.requires_grad_() for m, y in maps().items()}
    adaptive, quality = mrf.AdaptiveWeight(decay=0.5), mrf.QualityTarget(["a", "b"], 3)
    balance = mrf.FunctionalEntropyLoss(1.0, 1.0, scale_weights=[2.0], sigma=0.2, backend=backend)
    steer = mrf.AttributionLoss({"a": 1, "b": 3}, backend=backend)
    fine = MASK.repeat_interleave(3, 1)[:, :10]
    torch.set_default_device("meta")
    try:
        scores = (x["a"] * x["b"]).tanh()
        values = F.cross_entropy(scores, LABELS, reduction="none")
        value = balance({m: [y] for m, y in x.items()}, mask=fine, present=PRESENT)
        value = value + balance.prediction_term(values, x, mask=MASK) + balance.prediction_term(values, x, granularity="sample")
        penalty = steer(scores, x, mask=MASK, present=PRESENT, index=LABELS) + steer(scores, {m: [y] for m, y in x.items()})
        value = value + adaptive(values.mean(), penalty, list(x.values()))
        value.backward()
        target = quality({m: y.detach() for m, y in x.items()}, LABELS, mask=MASK, present=PRESENT)
        with mrf.capture(torch.nn.Flatten(), {"a": ""}) as features:
            torch.nn.Flatten()(x["a"])
        data = [({m: y.detach() for m, y in x.items()}, LABELS)]
        audit = mrf.audit(lambda x: x["a"] * 2 + x["b"], data, drop="noise", baseline="mean", progress=False)
        audit.to_html()
    finally:
        torch.set_default_device(None)
    assert features == {"a": []} and audit.share["a"].mean > 0.5 and sum(target.values()) == pytest.approx(1)
    assert value.device.type == "cpu" and all(y.grad.isfinite().all() and y.grad.device.type == "cpu" for y in x.values())

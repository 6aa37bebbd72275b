"""FunctionalEntropyLoss.forward on every backend: the NumPy penalty of the oracle's information, layouts, presence, masks."""

import copy
import math
import pickle

import helpers
import numpy as np
import oracle
import pytest
import torch
from torch import nn

import modreg_fast as mrf
from modreg_fast.functional import softmax_fisher_information

SHAPES = [(3, 4, 8, 6), (3, 7, 4, 3), (3, 5, 2, 3)]
NAMES = ("rgb", "depth", "thermal")
PRESENT = torch.tensor([[True, False, True], [True, True, True], [True, False, False]])


def named(dtype=torch.float64, shapes=SHAPES, names=NAMES):
    return dict(zip(names, helpers.features(len(names), shapes, dtype=dtype), strict=True))


def loss_and_gradients(loss, features, **options):
    value = loss(features, **options)
    return value, helpers.gradients(value, list(features.values()), None)


def mask_of(share=0.6):
    return torch.rand(3, 8, 6) < share


def oracle_loss(features, objective, weight, scale_weights=None, mask=None, present=None, eps=oracle.EPS, **options):
    """Value, mean information ``(M, S)`` and gradients; the chain rule through the penalty by central differences."""
    shapes = [x.shape for x in next(iter(features.values()))]
    masks = None if mask is None else [oracle.resize_mask(helpers.wide(mask), shape[2:]) for shape in shapes]
    valid = np.ones((len(features), len(shapes), shapes[0][0]), dtype=bool)
    if masks is not None:
        valid &= np.stack([m.reshape(m.shape[0], -1).any(1) for m in masks])
    if present is not None:
        valid &= helpers.wide(present).T[:, None]
    options |= {"masks": masks, "present": helpers.wide(present), "eps": eps}
    wide = helpers.wide(list(features.values()))
    information = oracle.softmax_fisher(wide, **options)

    def penalty(x):
        return weight * oracle.penalty(x, objective, eps, scale_weights, valid)

    _, gradients = oracle.softmax_fisher(wide, upstream=oracle.central_difference(penalty, information, 1e-7), **options)
    mean = [
        [row[v].mean() if v.any() else math.nan for row, v in zip(*pair, strict=True)]
        for pair in zip(information, valid, strict=True)
    ]
    return penalty(information), np.array(mean), gradients


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("present", [None, PRESENT])
@pytest.mark.parametrize("scale_weights", [None, [1.0, 0.25, 2.0]])
def test_value_gradient_and_details(backend, objective, masked, present, scale_weights):
    features, mask = named(), mask_of() if masked else None
    loss = mrf.FunctionalEntropyLoss(0.5, objective=objective, scale_weights=scale_weights, backend=backend)
    value, details = loss(features, mask=mask, present=present, return_details=True)
    expected, mean, gradients = oracle_loss(features, objective, 0.5, scale_weights, mask, present)
    assert value.shape == () and value.item() == pytest.approx(expected, rel=1e-11)
    assert torch.equal(value, loss(features, mask=mask, present=present))
    helpers.assert_close(helpers.gradients(value, list(features.values()), None), gradients, 1e-6)
    assert list(details.information) == list(NAMES) and not any(x.requires_grad for x in details.information.values())
    for m, name in enumerate(NAMES):
        helpers.assert_close(details.information[name], mean[m], 1e-11)


@pytest.mark.parametrize("option", [{"detach_reference": True}, {"eps": 0.1}, {"channel_dim": -1}])
def test_options_reach_the_function(backend, option):
    features = named()
    loss = mrf.FunctionalEntropyLoss(1.0, backend=backend, **option)
    seen = {name: [x.movedim(option.get("channel_dim", 1), 1) for x in row] for name, row in features.items()}
    expected, _, gradients = oracle_loss(
        seen, "inverse", 1.0, eps=option.get("eps", oracle.EPS), detach=option.get("detach_reference", False)
    )
    value = loss(features)
    assert value.item() == pytest.approx(expected, rel=1e-11)
    expected = [np.moveaxis(g, 1, option.get("channel_dim", 1)) for g in gradients[0]]
    helpers.assert_close(helpers.gradients(value, features["rgb"], None), expected, 1e-6)


def test_default_is_the_paper():
    loss = mrf.FunctionalEntropyLoss()
    assert (loss.feature_weight, loss.prediction_weight, loss.objective, loss.sigma) == (1e-5, 1e-5, "inverse", 0.0)


def test_noise_follows_torch_seed(backend):
    features, loss = named(torch.float32), mrf.FunctionalEntropyLoss(1.0, sigma=0.5, samples=2, backend=backend)
    torch.manual_seed(11)
    first = loss_and_gradients(loss, features)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(11), dtype=torch.int64))
    other = loss(features)
    torch.manual_seed(11)
    again = loss_and_gradients(loss, features)
    assert torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1])) and not torch.equal(first[0], other)
    information = softmax_fisher_information(list(features.values()), sigma=0.5, samples=2, seed=seed, backend=backend)
    assert first[0].item() == pytest.approx(oracle.penalty(helpers.wide(information), "inverse"), rel=1e-5)


def test_nothing_valid_gives_zero(backend):
    features, loss = named(torch.float32), mrf.FunctionalEntropyLoss(1.0, backend=backend)
    for options in ({"mask": torch.zeros(3, 8, 6, dtype=torch.bool)}, {"present": torch.zeros(3, 3, dtype=torch.bool)}):
        value, gradients = loss_and_gradients(loss, features, **options)
        assert value == 0 and all((g == 0).all() for g in gradients)
        _, details = loss(features, return_details=True, **options)
        assert all(x.isnan().all() for x in details.information.values())


def test_modality_that_no_sample_has_is_left_out(backend):
    features, loss = named(), mrf.FunctionalEntropyLoss(1.0, backend=backend)
    two = {name: features[name] for name in NAMES[:2]}
    present = torch.tensor([[True, True, False]] * 3)
    value, details = loss(features, present=present, return_details=True)
    assert value.item() == pytest.approx(loss(two).item(), rel=1e-12) and details.information["thermal"].isnan().all()


def test_missing_for_part_of_the_batch_equals_sub_batches(backend):
    """The mean over samples of what each group of samples computes with the modalities it has."""
    features = named()
    present = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    value, details = mrf.FunctionalEntropyLoss(1.0, backend=backend)(features, present=present, return_details=True)
    groups = [([0, 2], NAMES[:2]), ([1], NAMES)]
    parts = {name: [] for name in NAMES}
    for samples, held in groups:
        information = softmax_fisher_information([[x[samples] for x in features[name]] for name in held], backend=backend)
        for m, name in enumerate(held):
            parts[name].append(information[m])
    mean = {name: torch.cat(x, 1).mean(1) for name, x in parts.items()}
    assert value.item() == pytest.approx(sum((1 / (x + 1e-8)).sum().item() for x in mean.values()), rel=1e-11)
    for name in NAMES:
        helpers.assert_close(details.information[name], mean[name], 1e-12)


def test_presence_follows_the_order_of_the_mapping(backend):
    features, loss = named(), mrf.FunctionalEntropyLoss(1.0, backend=backend)
    turned = {name: features[name] for name in reversed(NAMES)}
    helpers.assert_close(loss(turned, present=PRESENT.flip(1)), loss(features, present=PRESENT), 1e-12)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        return [x, self.second(x)]


def parameter_gradients(module, value):
    return torch.autograd.grad(value, list(module.parameters()))


def test_autocast_equals_eager(backend):
    """Under autocast the loss takes the bfloat16 features as they are: the same bits as when called outside of it."""
    encoders, loss = nn.ModuleDict({"a": Encoder(), "b": Encoder()}), mrf.FunctionalEntropyLoss(1.0, backend=backend)
    x = {"a": torch.randn(2, 3, 8, 8), "b": torch.randn(2, 3, 8, 8)}
    results = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            features = {m: encoders[m](x[m]) for m in x}
            value = loss(features) if inside else None
        value = value if inside else loss(features)
        assert features["a"][0].dtype == torch.bfloat16 and value.dtype == torch.float32
        results.append((value, parameter_gradients(encoders, value)))
    assert torch.equal(results[0][0], results[1][0]) and all(map(torch.equal, results[0][1], results[1][1]))
    full = loss({m: [f.detach().float() for f in row] for m, row in features.items()})
    assert results[0][0].item() == pytest.approx(full.item(), rel=1e-5)


def test_channels_last_equals_contiguous(backend):
    encoders, loss = nn.ModuleDict({"a": Encoder(), "b": Encoder()}).double(), mrf.FunctionalEntropyLoss(1.0, backend=backend)
    x = {m: torch.randn(2, 3, 8, 8, dtype=torch.float64) for m in "ab"}
    mask = torch.rand(2, 8, 8) < 0.6
    expected = loss({m: encoders[m](x[m]) for m in x}, mask=mask)
    gradients = parameter_gradients(encoders, expected)
    encoders = encoders.to(memory_format=torch.channels_last)
    features = {m: encoders[m](x[m].contiguous(memory_format=torch.channels_last)) for m in x}
    assert features["a"][0].is_contiguous(memory_format=torch.channels_last) and not features["a"][0].is_contiguous()
    value = loss(features, mask=mask)
    helpers.assert_close(value, expected, 1e-12)
    helpers.assert_close(list(parameter_gradients(encoders, value)), list(gradients), 1e-11)


def test_tokens_equal_images(backend):
    features = named(shapes=[(3, 4, 8, 6)])
    tokens = {m: [row[0].detach().flatten(2).mT.contiguous().requires_grad_()] for m, row in features.items()}
    mask = mask_of()
    expected, gradients = loss_and_gradients(mrf.FunctionalEntropyLoss(1.0, backend=backend), features, mask=mask)
    loss = mrf.FunctionalEntropyLoss(1.0, channel_dim=-1, backend=backend)
    value, token_gradients = loss_and_gradients(loss, tokens, mask=mask.flatten(1))
    helpers.assert_close(value, expected, 1e-13)
    helpers.assert_close([g.mT.reshape(3, 4, 8, 6) for g in token_gradients], gradients, 1e-12)


def test_under_activation_checkpointing(backend):
    """Noise included: recomputing the forward pass restores the generator, hence the seed."""
    features, loss = named(), mrf.FunctionalEntropyLoss(1.0, sigma=0.3, backend=backend)
    flat = [x for row in features.values() for x in row]

    def run(*flat):
        return loss({name: flat[3 * m : 3 * m + 3] for m, name in enumerate(NAMES)})

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(*flat), flat)
    torch.manual_seed(3)
    value = torch.utils.checkpoint.checkpoint(run, *flat, use_reentrant=False)
    assert all(map(torch.equal, expected, torch.autograd.grad(value, flat)))


def test_no_grad_and_frozen_features(backend):
    features, loss = named(), mrf.FunctionalEntropyLoss(1.0, backend=backend)
    expected = loss(features)
    with torch.no_grad():
        assert torch.equal(loss(features), expected) and not loss(features).requires_grad
    assert not loss({m: [x.detach() for x in row] for m, row in features.items()}).requires_grad


@pytest.mark.parametrize("loss", [mrf.FunctionalEntropyLoss(0.25, sigma=0.1), mrf.AttributionLoss({"a": 3, "b": 1}, "l2")])
def test_losses_are_plain_modules(loss):
    """No parameters, no state; they can be copied and pickled, and print what they are set to."""
    assert not list(loss.parameters()) and not loss.state_dict()
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(copied) == repr(loss)
    assert "0.25" in repr(loss) or "'a': 0.75" in repr(loss)


def test_default_dtype_does_not_leak(backend):
    """Neither result may depend on ``torch.set_default_dtype``: many run whole models in bfloat16."""
    features = named(torch.float32)
    scores = sum(row[0].mean((2, 3)) @ torch.randn(4, 2) for row in features.values())
    whole = {name: row[0] for name, row in features.items()}
    losses = (
        lambda: mrf.FunctionalEntropyLoss(0.3, scale_weights=[0.1, 0.2, 0.7], backend=backend)(features),
        lambda: mrf.AttributionLoss(backend=backend)(scores, whole),
        lambda: mrf.AttributionLoss({"rgb": 1, "depth": 2, "thermal": 4}, backend=backend)(scores, whole),
    )
    expected = [loss() for loss in losses]
    torch.set_default_dtype(torch.bfloat16)
    try:
        for loss, value in zip(losses, expected, strict=True):
            assert torch.equal(loss(), value)
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_is_copied_from_the_host(monkeypatch):
    """To where the features are, as which a device without memory serves: numbers get there by fills."""

    def copy(*arguments, **options):
        raise AssertionError("a tensor made from Python numbers")

    monkeypatch.setattr(torch, "tensor", copy)
    monkeypatch.setattr(torch, "as_tensor", copy)
    features = {m: [torch.randn(2, 8, 4, 4, device="meta", requires_grad=True)] for m in ("rgb", "depth")}
    present = torch.ones(2, 2, dtype=torch.bool, device="meta")
    scores = sum(x.mean((2, 3)) for (x,) in features.values())
    for penalty in (
        mrf.FunctionalEntropyLoss(scale_weights=[0.5])(features, present=present),
        mrf.AttributionLoss({"rgb": 1, "depth": 3})(scores, features, present=present),
        mrf.AttributionLoss({"rgb": 1, "depth": 3})(scores, features),
    ):
        penalty.backward()
        assert penalty.device.type == "meta"

"""audit measures: its numbers against NumPy, its intervals against statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from auditing import SPEC, Images, Vectors, audit, images, vectors
from torch import nn

import modreg_fast as mrf
from modreg_fast.audit import measure


def whole(data):
    return {m: torch.cat([x[m] for x, _ in data]) for m in data[0][0]}, torch.cat([y for _, y in data])


def means(estimates):
    return [x.mean for x in estimates]


@pytest.mark.parametrize("capture", [False, True])
def test_numbers_of_a_linear_classifier(capture):
    """By the formulas, in NumPy: attribution of the winning class, and (p - y) W as the gradient of the cross entropy."""
    model, data = Vectors().double(), [({m: v.double() for m, v in x.items()}, y) for x, y in vectors()]
    result = audit(model, data, {"rgb": "rgb", "depth": "depth"} if capture else None)
    inputs, y = whole(data)
    layers = {"rgb": model.rgb, "depth": model.depth}
    w = {m: layers[m].weight.detach().numpy() for m in inputs}
    embedded = {m: layers[m](inputs[m]).detach().numpy() for m in inputs}
    logits = embedded["rgb"] + embedded["depth"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    onehot, f, best = np.eye(3)[y], -np.log(p[np.arange(len(y)), y]), logits.argmax(1)
    a, information = {}, {}
    for m in inputs:
        if capture:  # the features are the class scores of the modality
            a[m], g = np.abs(embedded[m][np.arange(len(y)), best]), p - onehot
        else:
            a[m], g = np.linalg.norm(w[m][best] * inputs[m].numpy(), axis=1), (p - onehot) @ w[m]
        information[m] = (g**2).sum(1) / (f + 1e-8)
    for m in inputs:
        assert result.share[m].mean == pytest.approx(np.mean(a[m] / (a["rgb"] + a["depth"])), rel=1e-9)
        assert means(result.share_by_scale[m]) == [pytest.approx(result.share[m].mean)]
        assert means(result.information[m]) == [pytest.approx(information[m].mean(), rel=1e-6)]
    assert result.samples == 40 and result.model == "Vectors"
    accuracy = (logits.argmax(1) == y.numpy()).mean()
    assert result.missing.metric == "accuracy" and result.missing.full == pytest.approx(accuracy, abs=1e-6)


def test_shares_and_information_of_a_segmentation():
    """The shares are those of AttributionLoss; information by scale from its definition, pixel by pixel."""
    model, data = Images().double().eval(), [({m: v.double() for m, v in x.items()}, y) for x, y in images()]
    result = audit(model, data, SPEC, ignore_index=255)
    x, y = whole(data)
    mask = y != 255
    with mrf.capture(model, SPEC) as features:
        scores = model(x)
        _, details = mrf.AttributionLoss()(scores, features, mask=mask, return_details=True)
        f = F.cross_entropy(scores, y, ignore_index=255, reduction="none")
        grads = torch.autograd.grad(f.sum(), features["rgb"] + features["depth"])
    for m in SPEC:
        assert result.share[m].mean == pytest.approx(details.share[m].item(), rel=1e-9)
    assert result.samples == 5
    valid = mask.numpy()
    blocks = valid.reshape(6, 4, 2, 4, 2)
    pooled = np.where(valid, f.detach().numpy(), 0).reshape(6, 4, 2, 4, 2).sum((2, 4)) / np.maximum(blocks.sum((2, 4)), 1)
    levels = [(f.detach().numpy(), valid), (pooled, blocks.mean((2, 4)) >= 0.5)]
    assert not levels[1][1][0].all() and levels[1][1][2].any()
    for m, rows in (("rgb", grads[:2]), ("depth", grads[2:])):
        for s, (g, (loss, ok)) in enumerate(zip(rows, levels, strict=True)):
            pixel = (g.numpy() ** 2).sum(1) / (loss + 1e-8)
            expected = np.mean([pixel[b][ok[b]].mean() for b in range(6) if ok[b].any()])
            assert result.information[m][s].mean == pytest.approx(expected, rel=1e-6)
    assert result.scales == ["1 (8 x 8)", "2 (4 x 4)"]


def test_a_scale_without_valid_pixels_does_not_count():
    """A sample whose only labelled pixel is lost at the coarse scale counts at the fine one alone."""
    model, ((x, y),) = Images(), images(4, 4, ignore=-100)
    y[2] = -100
    y[2, 0, 0] = 1
    result = audit(model, [(x, y)], SPEC)
    rest = audit(model, [({m: v[[0, 3]] for m, v in x.items()}, y[[0, 3]])], SPEC)
    assert result.samples == 3
    for m in SPEC:
        assert result.information[m][1].mean == pytest.approx(rest.information[m][1].mean, rel=1e-5)
        assert result.share_by_scale[m][1].mean == pytest.approx(rest.share_by_scale[m][1].mean, rel=1e-5)
        assert result.information[m][0].mean != pytest.approx(rest.information[m][0].mean, rel=1e-3)
    assert sum(result.share_by_scale[m][1].mean for m in SPEC) == pytest.approx(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_do_not_matter(batch):
    torch.manual_seed(1)
    model, (pair,) = Images().double(), images(6, 6)
    inputs, y = {m: v.double() for m, v in pair[0].items()}, pair[1]
    parts = [({m: v[i : i + batch] for m, v in inputs.items()}, y[i : i + batch]) for i in range(0, 6, batch)]
    a, b = (audit(model, data, SPEC, ignore_index=255) for data in ([(inputs, y)], parts))
    for m in SPEC:
        assert a.share[m] == pytest.approx(b.share[m]) and a.information[m][1] == pytest.approx(b.information[m][1])
    assert len(a.examples) == len(b.examples) == 4
    for one, other in zip(a.examples, b.examples, strict=True):
        assert np.array_equal(one.shares, other.shares) and np.array_equal(one.inputs["rgb"], other.inputs["rgb"])


def test_an_exported_program():
    """Has no ``eval()``, and is audited as the model that it was made from; results with pictures can be compared."""
    model, data = Images().eval(), images(4, 4)
    exported = torch.export.export(model, (data[0][0],)).module()
    a, b = audit(model, data, ignore_index=255), audit(exported, data, ignore_index=255)
    assert a.examples and replace(b, model=a.model) == a


def test_who_is_not_heard():
    data = [(x, x["rgb"][:, :3].argmax(1)) for x, _ in vectors()]
    result = audit(lambda x: x["rgb"][:, :3] + 0 * x["depth"][:, :3], data)
    assert result.model == "a function"
    assert result.share["rgb"] == (1, 1, 1) and result.share["depth"] == (0, 0, 0)
    assert result.information["depth"][0].mean == 0
    assert result.verdict.startswith(
        "rgb carries 100 % [100, 100] of the decision, measured at the inputs. Losing rgb costs most: accuracy "
    )
    assert result.missing.lost["rgb",] == 0


def test_tokens_and_embeddings_below_a_classifier():
    """Where the loss has no pixels but the features do, the information is that of the sample."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth, self.head = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rgb(x["rgb"]).tanh().mean(1) + self.depth(x["depth"]).tanh().mean(1))

    model, x = Tokens().double(), {"rgb": torch.randn(7, 9, 5).double(), "depth": torch.randn(7, 3, 4).double()}
    y = torch.randint(3, (7,))
    result = audit(model, [(x, y)], {"rgb": "rgb", "depth": "depth"}, channel_dim=-1)
    with mrf.capture(model, {"rgb": "rgb"}) as features:
        f = F.cross_entropy(model(x), y, reduction="none")
        (g,) = torch.autograd.grad(f.sum(), features["rgb"])
    expected = g.flatten(1).square().sum(1) / f.detach()
    assert result.information["rgb"][0].mean == pytest.approx(expected.mean().item(), rel=1e-6)
    assert result.scales == ["1 (9)"] and result.examples == [] and result.no_maps.endswith("columns: rgb 9; depth 3.")


def test_information_of_a_dense_loss_about_tokens():
    """Of the mean loss over valid positions; a loss of one's own does not count where the target is ignored."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth, self.head = nn.Linear(3, 6), nn.Linear(1, 6), nn.Linear(6, 5)

        def forward(self, x):
            tokens = {m: v.flatten(2).mT for m, v in x.items()}
            mixed = self.rgb(tokens["rgb"]).tanh() * self.depth(tokens["depth"]).exp()
            return self.head(mixed.softmax(1)).mT.unflatten(2, (8, 8))

    model, ((x, y),) = Tokens().double(), images(6, 6)
    x = {m: v.double() for m, v in x.items()}

    def loss(scores, target):
        return scores.square().mean(1) + 3

    result = audit(model, [(x, y)], {m: m for m in SPEC}, loss=loss, ignore_index=255, channel_dim=-1)
    with mrf.capture(model, {"depth": "depth"}) as features:
        f, valid = loss(model(x), y), y != 255
        mean = (f * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        (g,) = torch.autograd.grad(mean.sum(), features["depth"])
    expected = (g.flatten(1).square().sum(1) / mean.detach())[valid.any(2).any(1)]
    assert result.information["depth"][0].mean == pytest.approx(expected.mean().item(), rel=1e-6)


def test_information_of_a_mean_in_float16():
    """Whose gradient, of 65536 pixels, float16 does not have."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth = nn.Identity(), nn.Identity()

        def forward(self, x):
            logit = (self.rgb(x["rgb"]) + self.depth(x["depth"])).sum(1).float()[:, None, None, None] * x["gain"]
            return torch.cat([logit, -logit], 1)

    gain = 1e-4 * torch.rand(2, 1, 256, 256)
    x = {"rgb": torch.randn(2, 3).half(), "depth": torch.randn(2, 3).half(), "gain": gain}
    y = torch.randint(2, (2, 256, 256))
    result = audit(Pooled(), [(x, y)], {m: m for m in SPEC})
    z = 2 * (x["rgb"] + x["depth"]).double().sum(1)[:, None, None] * gain[:, 0].double() * (1 - 2 * y)
    mean = torch.nn.functional.softplus(-z).mean((1, 2))
    g = (-2 * gain[:, 0].double() * (1 - 2 * y) * torch.sigmoid(-z)).mean((1, 2))
    assert result.information["rgb"][0].mean == pytest.approx((3 * g.square() / mean).mean().item(), rel=0.02, abs=0)


def test_leaves_everything_as_it_was():
    model, data = Images(), images()
    model.norm.eval()
    modes = {m: m.training for m in model.modules()}
    statistics = model.norm.running_mean.clone()
    audit(model, data, SPEC, ignore_index=255)
    audit(model, data, ignore_index=255)
    assert modes == {m: m.training for m in model.modules()} and torch.equal(statistics, model.norm.running_mean)
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())
    assert not any(v.requires_grad or v.grad is not None for x, _ in data for v in x.values())
    with torch.no_grad():  # a caller's habit
        assert audit(model, data, SPEC, ignore_index=255).samples == 5


def test_frozen_model():
    model, data = Images(), images()
    trained = audit(model, data, SPEC, ignore_index=255).to_json()
    assert audit(model.requires_grad_(False), data, SPEC, ignore_index=255).to_json() == trained


def test_estimates_have_their_coverage():
    """Of 400 intervals of 40 skewed samples, 90 to 97 % hold the true mean 1; and their width is the known one."""
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=(400, 40)))
    found = measure._estimates(values)
    assert 0.90 <= np.mean([x.low <= 1 <= x.high for x in found]) <= 0.97
    width = np.mean([x.high - x.low for x in found])
    assert width == pytest.approx(2 * 1.96 * values.numpy().std(1).mean() / np.sqrt(40), rel=0.03)
    assert means(found) == pytest.approx(values.mean(1).tolist())
    assert measure._estimates(values[:3]) == found[:3]  # the same resamples, reproducibly


def test_estimates_leave_out_nan():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 200)))
    values[0, ::2] = torch.nan
    ((mean, low, high),) = measure._estimates(values)
    ((other, other_low, other_high),) = measure._estimates(values[:, 1::2])
    assert mean == pytest.approx(other) and high - low == pytest.approx(other_high - other_low, rel=0.1) and low < mean < high


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": iter(vectors())}, ValueError, "data must be readable twice, .* got a list_iterator"),
        ({"data": []}, ValueError, "data must be at least one batch"),
        ({"data": 3}, TypeError, "data must be an iterable"),
        ({"model": 3}, TypeError, "model must be a module or a function, got int"),
        ({"model": lambda rgb, depth: rgb}, TypeError, r"lambda x: model\(\*\*x\)\), got one called as \(rgb, depth\)"),
        ({"model": lambda x: 3}, TypeError, "what the model returns must be class scores .* got int"),
        ({"model": lambda x: torch.zeros(2, 3)}, TypeError, r"got shape \(2, 3\) without a gradient"),
        (
            {"model": lambda x: x["rgb"][:, :3]},
            ValueError,
            r"features\['depth'\]\[0\] must be .* got one that they do not depend on",
        ),
        ({"model": lambda x: x["rgb"][:, :3], "features": {"rgb": "x"}}, TypeError, "model must be a torch.nn.Module when"),
        ({"features": {"rgb": "rgb", "depth": "zzz"}}, ValueError, "'zzz', which matches none"),
        ({"features": {"rgb": ["rgb", ""], "depth": "depth"}}, ValueError, "same number of scales .*'rgb': 2, 'depth': 1"),
        ({"features": {"rgb": "rgb", "lidar": "depth"}}, ValueError, "keys of the inputs, 'rgb', 'depth', got 'lidar'"),
        (
            {"data": [({"text": torch.ones(2, 3).long()}, 0)]},
            TypeError,
            r"inputs\['text'\] must be a floating point tensor, or name",
        ),
        ({"loss": lambda s, y: F.cross_entropy(s, y)}, ValueError, r"what loss returns must be of the shape \(16,\) .* got \(\)"),
        ({"drop": "ones", "model": 3}, ValueError, "drop must be 'zeros', 'noise' or a function, got 'ones'"),
        ({"process_group": "world"}, TypeError, "process_group must be a process group or None, got str"),
        ({"channel_dim": 9}, ValueError, r"channel_dim must be a dimension of features\['rgb'\]\[0\] \(16, 5\) other .* got 9"),
        ({"channel_dim": "1"}, TypeError, "channel_dim must be an integer, got str"),
        ({"metric": "mIoU"}, TypeError, "metric must be a torchmetrics metric or a function, got str"),
        (
            {"metric": nn.CrossEntropyLoss, "model": 3},
            TypeError,
            "metric must be .* got the class CrossEntropyLoss",
        ),  # before the rest
        ({"loss": "ce"}, TypeError, "loss must be a function, got str"),
        ({"loss": lambda s, y: s[:, 0].detach() ** 2}, ValueError, "what loss returns must be computed from the scores"),
        ({"loss": lambda s, y: -(s[:, 0] ** 2)}, ValueError, "what loss returns must be at least 0, got -"),
        ({"loss": lambda s, y: 3}, TypeError, "what loss returns must be a tensor, got int"),
        ({"loss": lambda s, y: s[:, 0] ** 2 / 0}, ValueError, "the gradient of the loss must be finite"),
        ({"model": lambda x: x["rgb"][:, :3] / 0 + x["depth"][:, :3]}, ValueError, "the gradient of the scores must be finite"),
        ({"maps": -1}, ValueError, "maps must be a number of samples"),
        (
            {"model": lambda x: x["rgb"][:, :1] + x["depth"][:, :1], "loss": lambda s, y: s[:, 0] ** 2},
            ValueError,
            "target must be a class of the scores, 0 to 1, or -100 .ignore_index., got 2",
        ),
        (
            {"data": [(x, torch.full_like(y, -100)) for x, y in vectors()]},
            ValueError,
            "at least one sample with a valid position",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"(audit|capture): .*{message}"):
        audit(**{"model": Vectors(), "data": vectors(), **change})

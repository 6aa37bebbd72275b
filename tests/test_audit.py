"""audit: its numbers against NumPy, its intervals against statistics, its page in a browser, its command."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modreg_fast as mrf
from modreg_fast import cli

for package in ("jinja2", "rich", "matplotlib", "torchmetrics"):
    pytest.importorskip(package)

from modreg_fast.audit import Audit, Estimate, examples, measure  # noqa: E402


class Vectors(nn.Module):
    """A linear classifier over two embeddings; scores are products that NumPy computes as well."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.rgb(x["rgb"]) + self.depth(x["depth"])


class Images(nn.Module):
    """Two encoders of two scales and a head. Something for eval() too."""

    def __init__(self):
        super().__init__()
        self.fine = nn.ModuleDict({"rgb": nn.Conv2d(3, 4, 3, padding=1), "depth": nn.Conv2d(1, 4, 3, padding=1)})
        self.coarse = nn.ModuleDict({m: nn.Conv2d(4, 6, 2, 2) for m in ("rgb", "depth")})
        self.head, self.norm, self.dropout = nn.Conv2d(10, 5, 1), nn.BatchNorm2d(10), nn.Dropout(0.5)

    def forward(self, x):
        fine = {m: self.fine[m](x[m]) for m in ("rgb", "depth")}
        coarse = {m: self.coarse[m](fine[m].tanh()) for m in fine}
        up = F.interpolate(sum(coarse.values()).tanh(), scale_factor=2)
        return self.head(self.dropout(self.norm(torch.cat([sum(fine.values()).tanh(), up], 1))))


SPEC = {m: [f"fine.{m}", f"coarse.{m}"] for m in ("rgb", "depth")}


def vectors(samples=40, batch=16):
    x = {"rgb": torch.randn(samples, 5), "depth": torch.randn(samples, 4)}
    y = torch.randint(3, (samples,))
    return [({m: v[i : i + batch] for m, v in x.items()}, y[i : i + batch]) for i in range(0, samples, batch)]


def images(samples=6, batch=4, ignore=255):
    x = {"rgb": torch.randn(samples, 3, 8, 8), "depth": torch.randn(samples, 1, 8, 8)}
    y = torch.randint(5, (samples, 8, 8)).masked_fill(torch.rand(samples, 8, 8) < 0.4, ignore)
    y[1] = ignore  # a sample that does not count
    y[2, 2:] = ignore
    y[2, :2, 1::2] = ignore
    return [({m: v[i : i + batch] for m, v in x.items()}, y[i : i + batch]) for i in range(0, samples, batch)]


def whole(data):
    return {m: torch.cat([x[m] for x, _ in data]) for m in data[0][0]}, torch.cat([y for _, y in data])


def audit(*args, **options) -> Audit:
    return mrf.audit(*args, **{"progress": False, **options})


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


def test_who_is_not_heard():
    data = [(x, x["rgb"][:, :3].argmax(1)) for x, _ in vectors()]
    result = audit(lambda x: x["rgb"][:, :3] + 0 * x["depth"][:, :3], data)
    assert result.model == "a function"
    assert result.share["rgb"] == (1, 1, 1) and result.share["depth"] == (0, 0, 0)
    assert result.information["depth"][0].mean == 0
    assert result.verdict.startswith("rgb carries 100 % [100, 100] of the decision. Losing rgb costs most: accuracy ")
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
    assert result.examples == [] and result.scales == ["1 (9)"] and "Where each modality decides" not in result.to_html()


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


def made(share, scores=None, count=2) -> Audit:
    """By hand: ``share`` modality -> (mean, low, high)."""
    names = tuple(share)
    scores = scores or {names: 0.8, **{(m,): 0.5 - 0.1 * i for i, m in enumerate(names)}}
    information = {m: [Estimate(0.012 * (i + 1), 0.01 * (i + 1), 0.015 * (i + 1))] * count for i, m in enumerate(names)}
    estimates = {m: Estimate(*x) for m, x in share.items()}
    missing = mrf.MissingModalities("mIoU", scores, True)
    return Audit(
        "Net", 31, ["1", "2"][:count], estimates, {m: [x] * count for m, x in estimates.items()}, information, missing, []
    )


def test_verdict():
    clear = made({"depth": (0.09, 0.06, 0.12), "rgb": (0.91, 0.88, 0.94)})
    assert clear.verdict == "rgb carries 91 % [88, 94] of the decision. Losing depth costs most: mIoU 0.8 becomes 0.4."
    even = made({"a": (0.48, 0.43, 0.52), "b": (0.52, 0.48, 0.57)}, {("a", "b"): 0.7, ("a",): 0.8, ("b",): 0.7})
    assert even.verdict == "No modality dominates: b carries 52 % [48, 57], a carries 48 % [43, 52] of the decision."
    lower = replace(even, missing=mrf.MissingModalities("RMSE", {("a", "b"): 1.0, ("a",): 3.0, ("b",): 2.0}, False))
    assert lower.verdict.endswith("Losing b costs most: RMSE 1 becomes 3.")


def test_table():
    text = made({"rgb": (0.91, 0.88, 0.94), "depth": (0.09, 0.06, 0.12)}).table()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("rgb carries 91 % [88, 94] of the decision.")
    assert (
        "all rgb 91 % [88, 94]" in lines
        and "depth 9 % [6, 12]" in lines
        and "Means over 31 samples, with 95 % intervals." in lines
    )
    assert "2 rgb 91 % [88, 94] 0.012 [0.010, 0.015]" in lines and "depth 9 % [6, 12] 0.024 [0.020, 0.030]" in lines
    assert any(line.startswith("worst: depth, 0.400") for line in lines)
    many = made({f"modality number {i}": (0.1, 0.05, 0.2) for i in range(9)}).table()  # nothing is cut off
    assert "…" not in many and all(f"modality number {i}" in many for i in range(9))


def test_json(tmp_path):
    result = audit(Images(), images(), SPEC, ignore_index=255)
    told = json.loads(result.to_json(tmp_path / "audit.json"))
    assert told == json.loads((tmp_path / "audit.json").read_text())
    assert told["verdict"] == result.verdict and told["share"]["rgb"] == result.share["rgb"]._asdict()
    assert told["information"]["depth"][1]["mean"] == result.information["depth"][1].mean
    assert told["missing"]["scores"][1] == {"given": ["rgb"], "score": result.missing.scores["rgb",]}
    assert told["versions"]["torch"] == torch.__version__


def test_share_maps():
    """By hand: the left half of the image decides by rgb alone, the right half evenly; the first row has no label."""
    x = {"rgb": torch.full((1, 3, 4, 4), 2.0), "depth": torch.full((1, 1, 4, 4), 6.0)}
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    y[:, 0] = -100
    left = torch.tensor([1.0, 1, 0, 0])

    def model(x):  # the norm over three equal channels of rgb against the one of depth
        score = x["rgb"].sum(1) * 3**0.5 + (1 - left) * x["depth"][:, 0]
        return torch.stack([score, -score], 1)

    (example,) = audit(model, [(x, y)]).examples
    rgb, even = [int(examples.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)], [244] * 3
    assert (example.shares[1:, :2] == [*rgb, 255]).all() and (example.shares[1:, 2:] == [*even, 255]).all()
    assert (example.shares[0, :, 3] == 0).all() and example.inputs["rgb"].shape == (4, 4, 3)


def test_scales_of_a_map_add_up():
    """A coarse pixel spreads its energy over the fine ones that it covers."""
    fine, coarse = torch.zeros(1, 4, 4), torch.zeros(1, 2, 2)
    fine[0, 0, 0], coarse[0, 0, 0] = 3, 8
    other = torch.full((1, 4, 4), 1.0)
    inputs = {"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(1, 1, 4, 4)}
    (example,) = examples.examples(inputs, [[fine, coarse], [other, torch.zeros(1, 2, 2)]], ["a", "b"], 4)
    a = np.array([[np.sqrt(9 + 64 / 4), 4], [4, 4]])  # energy 3^2 + 8^2 / 4, and 8^2 / 4
    expected = examples.mixed(torch.from_numpy(np.stack([a / (a + 1), 1 / (a + 1)]))).round().numpy()
    assert np.array_equal(example.shares[:2, :2, :3], expected)
    assert (example.shares[2:, 2:, :3] == [int(examples.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)]).all()


def test_colours_of_shares():
    """Grey at equal shares, the full colour alone, between them by the root of the distance from equality."""
    shares = torch.tensor([[0.5, 1.0, 0.75, 0.25], [0.5, 0.0, 0.25, 0.75]]).double()
    one, two = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in examples.COLOURS[:2])
    strength = 0.5**0.5
    expected = [[244] * 3, one, 244 + strength * (one - 244), 244 + strength * (two - 244)]
    np.testing.assert_allclose(examples.mixed(shares).numpy(), expected)
    assert examples.ramp(3) == ["rgb({} {} {})".format(*c) for c in (one, [244] * 3, two)]


@pytest.mark.parametrize("channels", [1, 2, 3, 100])
def test_pictures_of_inputs(channels):
    picture = examples._picture(torch.randn(channels, 6, 7))
    assert picture.shape == (6, 7, 3) and picture.dtype == np.uint8 and picture.min() == 0 and picture.max() == 255
    assert (channels > 2) != bool((picture[..., 0] == picture[..., 2]).all())
    assert not examples._picture(torch.full((channels, 2, 2), 3.0)).any()  # nothing to spread


def test_maps_that_do_not_lie_over_each_other():
    x = {"rgb": torch.randn(2, 3, 8, 8), "depth": torch.randn(2, 1, 4, 4)}
    model = lambda x: x["rgb"].mean((2, 3)) + x["depth"].mean((2, 3))  # noqa: E731
    assert audit(model, [(x, torch.zeros(2, dtype=torch.long))]).examples == []
    assert audit(Images(), images(), SPEC, ignore_index=255, maps=0).examples == []


class Page(HTMLParser):
    """What a page refers to, its text, and whether tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.words, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def test_page(tmp_path):
    torch.manual_seed(2)
    result = audit(Images(), images(), SPEC, ignore_index=255)
    text = result.to_html(tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == text
    page = Page(text)
    assert len(page.references) == 4 * 3 and all(x.startswith("data:image/png;base64,") for x in page.references)
    assert "script" not in page.tags and "link" not in page.tags and not re.search(r"url\(|@import|https?://", text)
    words = " ".join(" ".join(page.words).split())
    assert result.carried in words.replace("\u00a0", " ") and result.costs in words and "5 samples" in words
    for m in SPEC:
        mean, _, interval = f"{100 * result.share[m].mean:.0f} %", None, result.share[m]
        assert f"{m} {mean} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]" in words


def test_page_escapes_names():
    name = '<script>alert("x")</script>&'
    assert "<script" not in made({name: (0.9, 0.8, 0.95), "b": (0.1, 0.05, 0.2)}).to_html()


@pytest.mark.parametrize("count", [1, 3, 9])
def test_page_and_plot_of_any_number_of_modalities(count, tmp_path):
    share = {f"m{i}": (1 / count, 0.9 / count, 1.1 / count) for i in range(count)}
    result = made(share, None if count == 1 else {tuple(share): 0.5, ("m0",): -0.2, ("m1",): float("nan")})
    blank = np.zeros((4, 4, 4), np.uint8)
    result = replace(result, examples=[examples.Example({m: blank[..., :3] for m in share}, blank)] * 2)
    Page(result.to_html())
    result.plot().savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_plot_without_examples(tmp_path):
    figure = made({"rgb": (0.9, 0.8, 0.95), "depth": (0.1, 0.05, 0.2)}, count=1).plot()
    assert len(figure.axes) == 3 and [round(bar.get_height()) for bar in figure.axes[0].patches] == [90, 10]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": iter(vectors())}, ValueError, "data must be readable twice, .* got a list_iterator"),
        ({"data": []}, ValueError, "data must be at least one batch"),
        ({"data": 3}, TypeError, "data must be an iterable"),
        ({"model": 3}, TypeError, "model must be a module or a function, got int"),
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
        ({"features": {"rgb": "rgb", "lidar": "depth"}}, ValueError, "modalities in the inputs, 'rgb', 'depth', got 'lidar'"),
        (
            {"data": [({"text": torch.ones(2, 3).long()}, 0)]},
            TypeError,
            r"inputs\['text'\] must be a floating point tensor, or name",
        ),
        ({"loss": lambda s, y: F.cross_entropy(s, y)}, ValueError, r"what loss returns must be of the shape \(16,\) .* got \(\)"),
        ({"loss": lambda s, y: 3}, TypeError, "what loss returns must be a tensor, got int"),
        ({"loss": lambda s, y: s[:, 0] ** 2 / 0}, ValueError, "the gradient of the loss must be finite"),
        ({"model": lambda x: x["rgb"][:, :3] / 0 + x["depth"][:, :3]}, ValueError, "the gradient of the scores must be finite"),
        ({"maps": -1}, ValueError, "maps must be a number of samples"),
        (
            {"model": lambda x: x["rgb"][:, :1] + x["depth"][:, :1], "loss": lambda s, y: s[:, 0] ** 2},
            ValueError,
            "metric must be given",
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


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return 5 * self.a(x["a"]) + self.b(x["b"])

def build():
    torch.manual_seed(0)
    return Net()

def loader():
    torch.manual_seed(1)
    return [({"a": torch.randn(6, 3), "b": torch.randn(6, 3)}, torch.randint(4, (6,))) for _ in range(3)]

def metric():
    return half

def half(scores, target):
    return 0.5

def broken():
    raise ValueError("the file is gone")

def once():
    return iter(loader())

number = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "check.py").write_text(MODULE)
    (tmp_path / "mine" / "needs.py").write_text("import nothing_like_this\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


GIVEN = ["audit", "--model", "mine.check:build", "--data", "mine.check:loader"]


def test_command(project, capsys):
    path = list(sys.path)
    assert cli.main([*GIVEN, "--features", "a=a", "--features", "b=b", "--html", "page.html", "--plot", "plot.png"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("a carries ") and printed.err == "" and sys.path == path
    assert Page((project / "page.html").read_text()) and (project / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*GIVEN, "--json", "--metric", "mine.check:metric"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scales"] == ["input"] and told["samples"] == 18 and told["missing"]["mean"] == 0.5
    assert told["missing"]["metric"] == "half"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "yours.check:build"], "no module 'yours' here"),
        (["--model", "mine.other:build"], "no module 'mine.other' here"),
        (["--model", "mine.check:make"], "module 'mine.check' has no function 'make'"),
        (["--model", "mine.check:number"], "module 'mine.check' has no function 'number'"),
        (["--features", "a=c"], r"modules\['a'\] must be names of modules, got 'c'"),
        (["--data", "mine.check:once"], "readable twice"),
        (["--html", "nowhere/page.html"], "nowhere/page.html"),
    ],
)
def test_command_fails_with_a_message(project, arguments, message, capsys):
    assert cli.main([*GIVEN, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(f"^modreg-fast audit: .*{message}", printed.err) and "Traceback" not in printed.err


def test_command_shows_where_the_users_own_code_failed(project):
    with pytest.raises(ValueError, match="the file is gone"):
        cli.main([*GIVEN[:3], *GIVEN[3:], "--model", "mine.check:broken"])
    with pytest.raises(ModuleNotFoundError, match="nothing_like_this"):
        cli.main([*GIVEN, "--data", "mine.needs:loader"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GIVEN[:3], "required: --data"),
        ([*GIVEN, "--model", "mine.check"], "expected MODULE:NAME, such as project.models:build, got 'mine.check'"),
        ([*GIVEN, "--model", "mine:a.b"], "expected MODULE:NAME"),
        ([*GIVEN, "--features", "rgb"], "expected MODALITY=MODULE"),
        ([*GIVEN, "--features", "rgb=a,,b"], "expected MODALITY=MODULE"),
        (["audit", "--help"], None),
    ],
)
def test_command_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr()
    if message is None:
        assert stop.value.code == 0 and "examples:" in printed.out and "def loader():" in printed.out
    else:
        assert stop.value.code == 2 and message in printed.err


@pytest.mark.parametrize("package", ["rich", "jinja2", "matplotlib", "torchmetrics"])
def test_without_an_extra(package, monkeypatch):
    for name in [*(name for name in sys.modules if name.split(".")[0] == package), package, f"{package}.figure"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("modreg_fast.audit.page", "modreg_fast.audit.plot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=rf"[Aa]udit.*: needs the package {package}.*: pip install 'modreg_fast\[audit\]'"
    ):
        result = audit(Vectors(), vectors())
        result.table(), result.to_html(), result.plot()


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    """Chromium draws it on a light and a dark screen, on a phone without anything wider than it, and on paper in light colours."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    from matplotlib.image import imread

    torch.manual_seed(2)
    audit(Images(), images(), SPEC, ignore_index=255).to_html(tmp_path / "audit.html")

    def draw(*options):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *options, f"file://{tmp_path / 'audit.html'}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def picture(scheme, width):
        draw(
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},1600",
            f"--screenshot={tmp_path / 'shot.png'}",
        )
        return (255 * imread(tmp_path / "shot.png")[..., :3]).round().astype(int)

    for scheme, width, page in ((1, 1100, (251, 251, 249)), (0, 1100, (21, 23, 27)), (1, 500, (251, 251, 249))):
        shot = picture(scheme, width)
        assert shot.shape == (1600, width, 3)
        background = (shot == page).all(2)
        assert 0.5 < background.mean() < 0.97 and background[:, :12].all() and background[:, -12:].all()  # margins stay free
        blue = [int(examples.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
        assert (shot == blue).all(2).sum() > 1000  # the bars of the first modality
    draw("--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'audit.pdf'}")
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "audit.pdf").read_bytes())
    assert 1 <= len(pages) <= 2

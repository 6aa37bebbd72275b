"""audit measures at the inputs beside the named modules, in one run; models that write into what they are given."""

import json

import pytest
import torch
from auditing import SPEC, Images, Vectors, audit, images, vectors
from torch import nn

import modreg_fast as mrf

NAMES = {"rgb": "rgb", "depth": "depth"}


class Offset(nn.Module):
    """Scores are the sum of the inputs and a constant, which the encoder of rgb adds: at its output rgb is large, at the input depth."""

    def __init__(self, constant=10.0):
        super().__init__()
        self.rgb, self.depth = nn.Linear(3, 3), nn.Linear(3, 3)
        for layer, bias in ((self.rgb, constant), (self.depth, 0.0)):
            nn.init.eye_(layer.weight)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x):
        return self.rgb(x["rgb"]) + self.depth(x["depth"])


def small_rgb(samples=30):
    x = {"rgb": 0.1 * torch.randn(samples, 3), "depth": torch.randn(samples, 3)}
    return [(x, (x["rgb"] + x["depth"]).argmax(1))]


def share(rgb, depth):
    """By hand: the gradient of the winning score is 1 at one channel."""
    winner = (rgb + depth).argmax(1, keepdim=True)
    rgb, depth = rgb.gather(1, winner).abs(), depth.gather(1, winner).abs()
    return (rgb / (rgb + depth)).mean().item()


def close(a, b):
    assert a.keys() == b.keys() == SPEC.keys()
    for m in a:
        assert a[m] == pytest.approx(b[m], rel=1e-5)


def test_places_that_disagree():
    data = small_rgb()
    x = data[0][0]
    result = audit(Offset(), data, NAMES)
    assert result.share["rgb"].mean == pytest.approx(share(x["rgb"] + 10, x["depth"]), rel=1e-5)
    assert result.share_at_inputs["rgb"].mean == pytest.approx(share(x["rgb"], x["depth"]), rel=1e-5)
    close(result.share_at_inputs, audit(Offset(), data).share)
    size = result.scales[0]
    assert f"The places disagree: rgb leads at {size}, depth leads at the inputs." in result.verdict
    assert "of the attribution at the features" in result.verdict and "decision" not in result.verdict


def test_places_that_agree():
    result = audit(Offset(0.0), small_rgb(), NAMES)
    assert result.verdict.startswith("depth carries") and "of the decision, measured at the features." in result.verdict
    close(result.share_at_inputs, result.share)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_the_inputs_in_one_run_as_in_another(baseline):
    """Masks, scales, batches and the baseline are those of an audit of the inputs alone."""
    model, data, options = Images(), images(), {"ignore_index": 255, "baseline": baseline}
    both, alone = audit(model, data, SPEC, **options), audit(model, data, **options)
    close(both.share_at_inputs, alone.share)
    assert alone.share_at_inputs == {} and len(both.scales) == 2
    assert abs(both.share["rgb"].mean - both.share_at_inputs["rgb"].mean) > 1e-3


def test_every_form_shows_the_inputs(tmp_path):
    result = audit(Offset(), small_rgb(), NAMES)
    told = result.share_at_inputs["depth"]
    lines = [" ".join(line.split()) for line in result.table().splitlines()]
    assert any(line.startswith("inputs rgb ") for line in lines)
    assert json.loads(result.to_json())["share_at_inputs"]["depth"]["mean"] == told.mean
    assert ">Inputs</th>" in result.to_html() and "100 *" not in result.to_html()
    assert [x.get_text() for x in result.plot().axes[0].get_xticklabels()][-1] == "inputs"
    figure = result.plot()
    figure.savefig(tmp_path / "audit.png")
    title = figure._suptitle.get_window_extent()
    assert title.x1 < figure.bbox.x1 and title.y1 <= figure.bbox.y1  # the whole verdict


def test_an_absent_modality_has_no_share_at_the_inputs():
    class Model(Offset):
        def forward(self, x):
            return super().forward({m: x[m] if x.get(m) is not None else torch.zeros(len(x["rgb"]), 3) for m in NAMES})

    data = small_rgb()
    x, y = data[0]
    found = audit(Model(), [*data, ({"rgb": x["rgb"]}, y)], NAMES, allow_absent=True)
    assert found.share_at_inputs["rgb"].mean == pytest.approx((1 + share(x["rgb"], x["depth"])) / 2, rel=1e-5)


@pytest.mark.parametrize("how", ["no gradient", "integers", "one sensor of numbers"])
def test_what_cannot_be_traced_to_the_inputs_is_not_compared(how):
    class Model(Offset):
        def forward(self, x):
            x = dict(x)
            if how == "no gradient":
                with torch.no_grad():
                    x["rgb"] = x["rgb"] * 2
            elif how == "integers":
                x["rgb"] = x["rgb"].float()
            else:
                x["rgb"] = x["rgb"][:, None].expand(-1, 3)
            return super().forward(x)

    ((x, y),) = small_rgb()
    rgb = {"integers": x["rgb"].long(), "one sensor of numbers": x["rgb"][:, 0]}.get(how, x["rgb"])
    result = audit(Model(), [({**x, "rgb": rgb}, y)], NAMES)
    assert result.share_at_inputs == {} and result.share["rgb"].mean > 0.5
    assert "inputs" not in result.verdict and "inputs" not in result.table()


@pytest.mark.parametrize("spec", [None, NAMES])
def test_a_model_that_writes_into_its_inputs(spec):
    """It normalises in place: each call gets the values of the data, which stay as they are."""

    class InPlace(Vectors):
        def forward(self, x):
            return super().forward({m: v.sub_(3.0) for m, v in x.items()})

    class Copying(Vectors):
        def forward(self, x):
            return super().forward({m: v - 3.0 for m, v in x.items()})

    data, copying, in_place = vectors(), Copying(), InPlace()
    in_place.load_state_dict(copying.state_dict())
    before = [{m: v.clone() for m, v in x.items()} for x, _ in data]
    expected, found = audit(copying, data, spec), audit(in_place, data, spec)
    close(found.share, expected.share)
    assert found.missing.scores == expected.missing.scores
    assert all(torch.equal(x[m], old[m]) for (x, _), old in zip(data, before, strict=True) for m in x)
    filled = mrf.evaluate_missing(copying, data, accuracy, drop=lambda m, x: x.zero_(), progress=False)
    assert filled.scores == mrf.evaluate_missing(copying, data, accuracy, progress=False).scores


def accuracy(scores, labels):
    return (scores.argmax(1) == labels).double().mean()


def test_nan_that_the_model_replaces_contributes_nothing():
    """Where a sensor saw nothing: its value is not read, and neither is 0 times NaN."""

    def model(x):
        return x["rgb"][:, :3] + x["depth"].nan_to_num(0.0)[:, :3]

    clean = vectors(samples=16)
    gaps = clean[0][0]["depth"] > 1
    holed = [({**clean[0][0], "depth": clean[0][0]["depth"].masked_fill(gaps, float("nan"))}, clean[0][1])]
    zeroed = [({**clean[0][0], "depth": clean[0][0]["depth"].masked_fill(gaps, 0.0)}, clean[0][1])]
    assert gaps[:, :3].any() and audit(model, holed).share == audit(model, zeroed).share

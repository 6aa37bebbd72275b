"""audit takes data as it comes: modalities by name, batches without one, without samples, made in inference mode; shared modules."""

import warnings

import numpy as np
import pytest
import torch
from auditing import SPEC, Images, Vectors, audit, images, vectors
from torch import nn

import modreg_fast as mrf


def turned(data):
    """Every second batch lists its modalities the other way round."""
    return [(dict(reversed(x.items())) if i % 2 else x, y) for i, (x, y) in enumerate(data)]


@pytest.mark.parametrize("spec", [None, {"rgb": "rgb", "depth": "depth"}])
def test_modalities_go_by_name(spec):
    model, data = Vectors(), vectors()
    a, b = audit(model, data, spec), audit(model, turned(data), spec)
    assert a.to_json() == b.to_json() and list(a.share) == ["rgb", "depth"]
    if spec:
        c = audit(model, turned(data), dict(reversed(spec.items())))
        assert list(c.share) == ["depth", "rgb"] and c.share["rgb"] == a.share["rgb"]


@pytest.mark.parametrize("nothing", ["no key", None])
@pytest.mark.parametrize("spec", [None, {"rgb": "rgb", "depth": "depth"}])
def test_a_batch_without_a_modality_is_an_error(spec, nothing):
    data = vectors()
    data[1] = ({"rgb": data[1][0]["rgb"], **({} if nothing else {"depth": None})}, data[1][1])
    with pytest.raises(ValueError, match="audit: data must be batches with 'rgb', 'depth' each .* got batch 1 without 'depth'"):
        audit(Vectors(), data, spec)
    if spec is None and nothing:
        with pytest.raises(ValueError, match="audit: data must be batches with 'rgb' each, as batch 0, got batch 1 with 'depth'"):
            audit(lambda x: sum(v[:, :3] for v in x.values()), [data[1], data[0]])


@pytest.mark.parametrize("order", [1, -1])
def test_an_absent_modality_has_no_share(order):
    """The means over all samples, a batch without depth among them: share 0 there, and no information."""

    def model(x):
        return 2 * x["rgb"][:, :3] + (x["depth"][:, :3] if x.get("depth") is not None else 0)

    data = vectors(32, 16)
    lacking = [data[0], ({"rgb": data[1][0]["rgb"]}, data[1][1])][::order]
    found, whole = audit(model, lacking, allow_absent=True), audit(model, [data[0]])
    assert set(found.share) == {"rgb", "depth"} and found.samples == 32
    assert found.share["depth"].mean == pytest.approx(whole.share["depth"].mean / 2)
    assert found.share["rgb"].mean == pytest.approx((1 + whole.share["rgb"].mean) / 2)
    assert found.information["depth"][0].mean == pytest.approx(whole.information["depth"][0].mean)
    assert len(found.missing.scores) == 3
    assert {frozenset(s) for s in found.missing.scores} == {frozenset(s) for s in whole.missing.scores}


def test_absent_with_named_modules():
    """The model fills in what is absent and runs the module on it, which does not count."""

    class Filling(Vectors):
        def forward(self, x):
            return super().forward({"depth": torch.ones(len(x["rgb"]), 4), **x})

    torch.manual_seed(0)
    model, data = Filling(), vectors(32, 16)
    lacking = [data[0], ({"rgb": data[1][0]["rgb"]}, data[1][1])]
    spec = {"rgb": "rgb", "depth": "depth"}
    found, whole = audit(model, lacking, spec, allow_absent=True), audit(model, [data[0]], spec)
    assert found.share["depth"].mean == pytest.approx(whole.share["depth"].mean / 2)
    with pytest.raises(ValueError, match="features must be keys of the inputs, 'rgb', got 'depth', which no batch has"):
        audit(model, lacking[1:], spec, allow_absent=True)


@pytest.mark.parametrize("spec", [None, SPEC])
def test_batches_without_samples_are_left_out(spec):
    model, data = Images(), images()
    empty = ({"rgb": torch.zeros(0, 3, 8, 8), "depth": torch.zeros(0, 1, 8, 8)}, torch.zeros(0, 8, 8, dtype=torch.long))
    whole = audit(model, data, spec, ignore_index=255).to_json()
    assert audit(model, [empty, data[0], empty, data[1]], spec, ignore_index=255).to_json() == whole
    with pytest.raises(ValueError, match="at least one batch, got none with a sample"):
        audit(model, [empty], spec)


@pytest.mark.parametrize("spec", [None, SPEC])
def test_inference_mode(spec):
    """Around audit, as Lightning validates, and around the making of the data."""
    model, data = Images(), images()
    plain = audit(model, data, spec, ignore_index=255).to_json()
    with torch.inference_mode():
        assert audit(model, data, spec, ignore_index=255).to_json() == plain
        assert torch.is_inference_mode_enabled()
        made = [({m: v + 0 for m, v in x.items()}, y + 0) for x, y in data]
        assert made[0][1].is_inference()
        assert audit(model, made, spec, ignore_index=255).to_json() == plain
    assert audit(model, made, spec, ignore_index=255).to_json() == plain
    metric = mrf.evaluate_missing(model, made, lambda s, t: (s.argmax(1) == t).double().mean(), progress=False)
    assert metric.scores == mrf.evaluate_missing(model, data, metric_of, progress=False).scores


def metric_of(s, t):
    return (s.argmax(1) == t).double().mean()


def test_the_users_tensors_stay_as_they_are():
    """Embeddings that pass through nn.Identity must not start to require a gradient."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth, self.head = nn.Identity(), nn.Identity(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rgb(x["rgb"]) + self.depth(x["depth"]) + x["more"]["values"][0])

    x = {"rgb": torch.randn(6, 4), "depth": torch.randn(6, 4), "more": {"values": [torch.randn(6, 4)]}}
    audit(Head(), [(x, torch.randint(3, (6,)))], {"rgb": "rgb", "depth": "depth"})
    assert not any(v.requires_grad for v in (x["rgb"], x["depth"], x["more"]["values"][0]))


class Siamese(nn.Module):
    """One encoder of two scales for both modalities; ``order``: in which it meets them, by default that of the batch."""

    def __init__(self, order=None):
        super().__init__()
        torch.manual_seed(3)
        self.order, self.head = order, nn.Linear(4, 3)
        self.encoder = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 4)])

    def forward(self, x):
        total = 0
        for m in self.order or x:
            first = self.encoder[0](x[m])
            total = total + {"rgb": 3, "event": 1}[m] * (first + self.encoder[1](first.tanh()))
        return self.head(total)


class Two(nn.Module):
    """The same with a module per modality."""

    def __init__(self, siamese):
        super().__init__()
        self.a = nn.ModuleDict({m: siamese.encoder[0].__class__(5, 4) for m in ("rgb", "event")})
        self.b = nn.ModuleDict({m: siamese.encoder[1].__class__(4, 4) for m in ("rgb", "event")})
        for m in self.a:
            self.a[m].load_state_dict(siamese.encoder[0].state_dict())
            self.b[m].load_state_dict(siamese.encoder[1].state_dict())
        self.head = siamese.head

    def forward(self, x):
        first = {m: self.a[m](x[m]) for m in x}
        return self.head(
            3 * (first["rgb"] + self.b["rgb"](first["rgb"].tanh())) + first["event"] + self.b["event"](first["event"].tanh())
        )


@pytest.mark.parametrize("order", [None, ("rgb", "event"), ("event", "rgb")])
def test_a_module_that_the_modalities_share(order):
    """Its runs go to the modality whose input they take, in whatever order."""
    data = turned([({m: torch.randn(8, 5) for m in ("rgb", "event")}, torch.randint(3, (8,))) for _ in range(3)])
    model = Siamese(order)
    found = audit(model, data, {"event": "encoder.*", "rgb": "encoder.*"})
    expected = audit(Two(model), data, {m: [f"a.{m}", f"b.{m}"] for m in ("event", "rgb")})
    for m in found.share:
        assert found.share[m] == pytest.approx(expected.share[m], rel=1e-4)
        for s in range(2):
            assert found.information[m][s] == pytest.approx(expected.information[m][s], rel=1e-4)
    assert found.share["rgb"].mean > 0.6


def test_a_shared_module_that_mixes_is_an_error():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.both(x["rgb"] + x["depth"]))

    data = [({m: torch.randn(8, 5) for m in ("rgb", "depth")}, torch.randint(3, (8,)))]
    with pytest.raises(
        ValueError, match=r"features\['rgb'\] must be modules of their own, .* a run that depends on 'rgb', 'depth'"
    ):
        audit(Mixing(), data, {"rgb": "both", "depth": "both"})


def offset(data, by):
    return [({m: v + by[m] for m, v in x.items()}, y) for x, y in data]


def test_baseline_by_hand():
    """The winning weight times input less its mean over the data, in NumPy."""
    torch.manual_seed(5)
    x, y = torch.randn(24, 5).double() + 3, torch.randint(3, (24,))
    z = torch.randn(24, 4).double() - 1
    model = Vectors().double()
    found = audit(model, [({"rgb": x[i : i + 10], "depth": z[i : i + 10]}, y[i : i + 10]) for i in (0, 10, 20)], baseline="mean")
    w = {m: getattr(model, m).weight.detach().numpy() for m in ("rgb", "depth")}
    best = model({"rgb": x, "depth": z}).argmax(1).numpy()
    a = {m: np.linalg.norm(w[m][best] * (v - v.mean(0)), axis=1) for m, v in (("rgb", x.numpy()), ("depth", z.numpy()))}
    assert found.share["rgb"].mean == pytest.approx((a["rgb"] / (a["rgb"] + a["depth"])).mean(), rel=1e-9)
    assert found.baseline == "mean" and "at the inputs less their mean" in found.verdict


@pytest.mark.parametrize("spec", [None, SPEC])
def test_shares_about_the_mean_do_not_depend_on_where_zero_lies(spec):
    """Pixels that are not valid do not count in the mean, batches do not matter, and neither does a constant that the model takes off."""
    torch.manual_seed(2)
    model, data = Images().double(), [({m: v.double() for m, v in x.items()}, y) for x, y in images()]
    by = {"rgb": torch.tensor([5.0, -3, 2]).view(3, 1, 1).double(), "depth": torch.tensor(7.0).double()}
    moved = offset(data, by)
    moved[0][0]["rgb"][1] = 1e6  # without a label

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner({m: v - by[m] for m, v in x.items()})

    names = spec and {m: [f"inner.{name}" for name in row] for m, row in spec.items()}
    options = {"ignore_index": 255, "baseline": "mean"}
    found, expected = audit(Shifted(), moved, names, **options), audit(model, data, spec, **options)
    for m in SPEC:
        assert found.share[m] == pytest.approx(expected.share[m], rel=1e-6)
    zero = audit(Shifted(), moved, names, ignore_index=255)
    assert (spec is None) == (abs(zero.share["rgb"].mean - audit(model, data, spec, ignore_index=255).share["rgb"].mean) > 0.02)
    with pytest.raises(ValueError, match="baseline must be 'zero' or 'mean', got 'median'"):
        audit(model, data, baseline="median")


def test_images_of_their_own_size():
    """The scales are named without a size then, and the maps are of each image."""
    model, data = Images(), [images(4)[0], images(4)[0]]
    data[1] = ({m: v[..., :6] for m, v in data[1][0].items()}, data[1][1][..., :6])
    found = audit(model, data, SPEC, ignore_index=255, metric=metric_of)
    shapes = [x.shares.shape for x in audit(model, data, SPEC, ignore_index=255, metric=metric_of, maps=6).examples]
    assert shapes == [(8, 8, 4)] * 4 + [(8, 6, 4)] * 2
    assert found.scales == ["1", "2"] and {x.shares.shape for x in found.examples} == {(8, 8, 4)}


def test_monai_tensors():
    monai = pytest.importorskip("monai.data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, data = Images(), images()
        meta = [({m: monai.MetaTensor(v) for m, v in x.items()}, monai.MetaTensor(y[:, None])) for x, y in data]
        for spec in (None, SPEC):
            found = audit(model, meta, spec, ignore_index=255)
            assert found.to_json() == audit(model, data, spec, ignore_index=255).to_json()
            assert found.to_html() and found.plot()

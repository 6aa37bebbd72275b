"""audit reads targets of every dtype and shape, or says why not: no ignore_index is lost, one logit is two classes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from auditing import audit

TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.float32, torch.float64, torch.bfloat16)


def halves():
    """rgb decides in the left half, depth in the right one, which has no label."""
    torch.manual_seed(0)
    rgb, depth = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    rgb[..., 3:] *= 0.01
    depth[..., :3] *= 0.01
    y = torch.randint(3, (4, 6, 6))
    y[..., 3:] = 255
    return {"rgb": rgb, "depth": depth}, y


def total(x):
    return x["rgb"] + x["depth"]


def numbers(result):
    return result.share, result.information, result.samples, result.missing.scores


def own(scores, y):
    """A loss that takes the target of halves() in each of its forms."""
    y = y["mask"] if isinstance(y, dict) else y
    y = (y[:, 0] if y.dim() == 4 else y).long()
    return F.cross_entropy(scores, y, ignore_index=255, reduction="none")


@pytest.fixture(scope="module")
def expected():
    """On the labelled half alone, where nothing is ignored."""
    x, y = halves()
    return audit(total, [({m: v[..., :3] for m, v in x.items()}, y[..., :3])])


@pytest.mark.parametrize("loss", [None, own])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_dtype_and_shape(dtype, channel, loss, expected):
    x, y = halves()
    y = y.to(dtype)[:, None] if channel else y.to(dtype)
    found = audit(total, [(x, y)], ignore_index=255, loss=loss)
    assert found.share["rgb"].mean > 0.98
    for m in x:
        assert found.share[m] == pytest.approx(expected.share[m], rel=1e-5)
        assert found.information[m][0] == pytest.approx(expected.information[m][0], rel=1e-5)
    assert found.missing.scores == pytest.approx(expected.missing.scores)


def test_a_function_picks_the_classes(expected):
    x, y = halves()
    for held, target in (({"mask": y, "name": "scene"}, lambda t: t["mask"]), ([y, 3], lambda t: t[0])):
        found = audit(total, [(x, held)], ignore_index=255, target=target)
        assert found.share["rgb"] == pytest.approx(expected.share["rgb"], rel=1e-5)
        assert found.missing.scores == pytest.approx(expected.missing.scores)


def test_no_ignore_index_counts_every_position():
    x, y = halves()
    found = audit(total, [(x, y % 3)], ignore_index=None)
    assert 0.4 < found.share["rgb"].mean < 0.6
    soft = audit(total, [(x, y.float() / 7)], ignore_index=None, loss=lambda s, t: s.square().sum(1), metric=lambda s, t: 0.5)
    assert soft.share["rgb"] == found.share["rgb"]


def test_a_class_that_is_minus_100_modulo_256():
    """As uint8 holds it: 156 is a class, and -100 can be none."""
    x = {"rgb": torch.randn(2, 160, 4), "depth": torch.randn(2, 160, 4)}
    for dtype in (torch.uint8, torch.int64):
        assert audit(total, [(x, torch.full((2, 4), 156).to(dtype))]).samples == 2


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (lambda y: {"mask": y}, {"ignore_index": 255, "loss": own}, r"a class for each position \(4, 6, 6\).*target=.*got dict"),
        (lambda y: {"mask": y.where(y != 255, -100)}, {"loss": own}, "ignore_index applies .* got dict"),
        (lambda y: y[..., None], {"ignore_index": 255, "loss": own}, r"got torch.int64 of shape \(4, 6, 6, 1\)"),
        (lambda y: y + 0.5, {"ignore_index": 255, "loss": own}, "got torch.float32 of shape"),
        (lambda y: y.float() / 0, {}, "a class for each position .* where loss= is not given"),
        (lambda y: F.one_hot(y % 3, 3).movedim(3, 1), {}, "a class for each position"),
        (
            lambda y: (F.one_hot(y % 3, 3) + F.one_hot(y % 2, 3)).movedim(3, 1).clamp(max=1).float(),
            {},
            "loss= .* with sums up to 2",
        ),
        (lambda y: -F.one_hot(y % 3, 3).movedim(3, 1).double(), {}, "probabilities over the classes, .* got numbers from -1 on"),
        (lambda y: y, {}, r"target must be a class of the scores, 0 to 2, or -100 \(ignore_index\), got 255"),
        (lambda y: y, {"ignore_index": None}, "0 to 2, got 255"),
        (lambda y: y.long() - 2, {"ignore_index": 253}, r"0 to 2, or 253 \(ignore_index\), got -2"),
        (lambda y: y.to(torch.int8), {"ignore_index": 255}, "ignore_index must be a number that targets of torch.int8 can hold"),
        (lambda y: y.to(torch.uint8), {"ignore_index": -1}, "ignore_index must be a number that targets of torch.uint8 can hold"),
        (lambda y: {"mask": y}, {"target": lambda t: t["mask"][0], "ignore_index": 255}, r"got torch.int64 of shape \(6, 6\)"),
        (lambda y: {"mask": y}, {"target": "mask"}, "target must be a function"),
        (lambda y: y, {"ignore_index": 2.5}, "ignore_index must be an integer or None"),
        (lambda y: y.float().softmax(1), {"loss": lambda s, t: s.square().sum(1)}, "metric must be given where the target"),
    ],
)
def test_what_does_not_fit(target, options, message):
    x, y = halves()
    with pytest.raises((ValueError, TypeError), match=f"audit: .*{message}"):
        audit(total, [(x, target(y))], **options)


def test_class_probabilities():
    """Of the shape of the scores, as cross_entropy takes them: the information of one-hot ones is that of the labels."""
    x, y = halves()
    onehot = F.one_hot(y % 3, 3).movedim(3, 1).float()
    found = audit(total, [(x, onehot)], metric=lambda scores, target: 0.5)
    for m, row in audit(total, [(x, y % 3)]).information.items():
        assert found.information[m][0] == pytest.approx(row[0], rel=1e-5)


@pytest.mark.parametrize(
    "shaped", [lambda y: y, lambda y: y[:, None], lambda y: y.float()[:, None], lambda y: y.bool(), lambda y: y.to(torch.uint8)]
)
def test_one_logit(shaped):
    """By hand: g = sigmoid(z) - y of the binary cross entropy about either input, and the accuracy of z > 0. Logits between 0 and 1
    are logits too."""
    torch.manual_seed(1)
    x = {"rgb": torch.rand(5, 1, 7).double(), "depth": torch.rand(5, 1, 7).double() - 0.4}
    y = torch.randint(2, (5, 7))
    z = (x["rgb"] + x["depth"])[:, 0].numpy()
    f = np.log1p(np.exp(z)) - y.numpy() * z
    expected = ((1 / (1 + np.exp(-z)) - y.numpy()) ** 2 / (f + 1e-8)).mean()
    found = audit(total, [(x, shaped(y))])
    assert found.information["rgb"][0].mean == pytest.approx(expected, rel=1e-6)
    assert found.missing.full == pytest.approx(((z > 0) == y.numpy()).mean(), abs=1e-6)
    assert found.missing.scores["rgb",] == pytest.approx(y.numpy().mean(), abs=1e-6)  # positive everywhere


def test_one_logit_ignores_too():
    torch.manual_seed(1)
    x = {"rgb": torch.randn(4, 1, 6), "depth": torch.randn(4, 1, 6)}
    y = torch.randint(2, (4, 6))
    short = audit(total, [({m: v[..., :3] for m, v in x.items()}, y[:, :3])])
    y[:, 3:] = 255
    found = audit(total, [(x, y)], ignore_index=255)
    assert found.share["rgb"] == pytest.approx(short.share["rgb"], rel=1e-5)
    assert found.missing.scores == pytest.approx(short.missing.scores)
    with pytest.raises(ValueError, match="0 to 1, or -100 .ignore_index., got 255"):  # a mask of 0 and 255
        audit(total, [(x, y)])

"""evaluate_missing: the right subsets, inputs and statistics; metrics of both kinds agree."""

import sys
from collections import namedtuple
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import modreg_fast as mrf

pytest.importorskip("rich")


def binary_code(inputs):
    """Which modalities are not zero, as one number per sample: modality i counts 2^i."""
    return sum(2.0**i * (x != 0).flatten(1).any(1).double() for i, x in enumerate(inputs.values()))


def ones(modalities, samples=3):
    return {m: torch.ones(samples, 2) for m in modalities}


def mean(predictions, targets):
    return predictions.mean()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_subset_gets_its_modalities(count):
    names = "abcde"[:count]
    result = mrf.evaluate_missing(binary_code, [(ones(names), torch.zeros(3))], mean, progress=False)
    expected = {s: sum(2.0 ** names.index(m) for m in s) for n in range(1, count + 1) for s in combinations(names, n)}
    assert result.scores == expected and len(expected) == 2**count - 1
    assert next(iter(result.scores)) == tuple(names)
    assert [len(s) for s in result.scores] == sorted((len(s) for s in result.scores), reverse=True)


@pytest.mark.parametrize("count", [6, 8])
def test_more_than_five_modalities(count):
    names = [f"m{i}" for i in range(count)]
    result = mrf.evaluate_missing(binary_code, [(ones(names), torch.zeros(3))], mean, progress=False)
    assert len(result.scores) == 1 + 2 * count
    whole = 2.0**count - 1
    expected = [whole, *(whole - 2.0**i for i in reversed(range(count))), *(2.0**i for i in range(count))]
    assert list(result.scores.values()) == expected


def test_statistics():
    result = mrf.evaluate_missing(binary_code, [(ones("abc"), torch.zeros(3))], mean, progress=False)
    values = np.array([7, 3, 5, 6, 1, 2, 4])
    assert list(result.scores.values()) == values.tolist()
    assert result.full == 7 and result.mean == pytest.approx(values.mean()) and result.std == pytest.approx(values.std(ddof=0))
    assert result.worst == ("a",) and list(result.lost.values()) == (7 - values).tolist()
    other = mrf.evaluate_missing(binary_code, [(ones("abc"), torch.zeros(3))], mean, higher_is_better=False, progress=False)
    assert other.worst == ("a", "b", "c") and list(other.lost.values()) == (values - 7).tolist()


def classified(batches=3):
    """Batches of different sizes, and a model that makes mistakes."""
    torch.manual_seed(4)
    data = [({m: torch.randn(n, 4) for m in "ab"}, torch.randint(4, (n,))) for n in (5, 9, 2)[:batches]]
    return nn.Linear(8, 4), data


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.norm.eval()  # frozen

    def forward(self, x):
        return self.drop(self.norm(self.linear(torch.cat([x["a"], x["b"]], 1))))


def test_torchmetrics_and_functions_agree():
    """Macro F1 is no mean over batches: whoever averages it over batches gets another number."""
    metrics = pytest.importorskip("torchmetrics.classification")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    torch.manual_seed(3)
    net, (_, data) = Net(), classified()

    def f1(scores, target):
        return functional.multiclass_f1_score(scores, target, 4, average="macro")

    metric = metrics.MulticlassF1Score(4, average="macro")
    a = mrf.evaluate_missing(net, data, metric, progress=False)
    b = mrf.evaluate_missing(net, iter(data), f1, progress=False)
    assert a.scores == pytest.approx(b.scores) and a.metric == "MulticlassF1Score" and b.metric == "f1"
    assert metric.update_count == 0  # the given one stays untouched
    net.eval()
    inputs = {m: torch.cat([x[m] for x, _ in data]) for m in "ab"}
    target = torch.cat([y for _, y in data])
    assert a.scores["a",] == pytest.approx(float(f1(net({"a": inputs["a"], "b": 0 * inputs["b"]}), target)))
    per_batch = np.mean([float(f1(net(x), y)) for x, y in data])
    assert a.full != pytest.approx(per_batch)


def test_a_used_metric_counts_nothing_from_before():
    metrics = pytest.importorskip("torchmetrics.classification")
    net, (_, data) = Net(), classified()
    fresh, used = metrics.MulticlassAccuracy(4), metrics.MulticlassAccuracy(4)
    used.update(torch.zeros(50, dtype=torch.long), torch.zeros(50, dtype=torch.long))
    scores = [mrf.evaluate_missing(net, data, m, progress=False).scores for m in (fresh, used)]
    assert scores[0] == scores[1] and used.compute() == 1


def test_direction_of_the_metric():
    regression = pytest.importorskip("torchmetrics.regression")
    result = mrf.evaluate_missing(
        binary_code, [(ones("ab"), torch.full((3,), 3.0))], regression.MeanSquaredError(), progress=False
    )
    assert not result.higher_is_better and result.worst == ("a",) and result.lost == {("a", "b"): 0, ("a",): 4, ("b",): 1}


def test_modules_that_do_more_than_set_a_flag():
    """As adapters that fold into their weights in eval(), and unfold in train()."""

    class Folding(nn.Linear):
        folded = False

        def train(self, mode=True):
            self.folded = not mode
            return super().train(mode)

    net = nn.ModuleDict({"l": Folding(2, 2)})
    net.forward = lambda x: net["l"](x["a"]) * float("nan" if not net["l"].folded else 1)
    assert mrf.evaluate_missing(net, [({"a": torch.zeros(1, 2)}, torch.zeros(1))], mean, progress=False).full == pytest.approx(
        net["l"].bias.mean().item()
    )
    assert not net["l"].folded and net.training


def test_modes_and_gradients_are_as_before():
    net, (_, data) = Net(), classified()
    modes = {m: m.training for m in net.modules()}
    assert len(set(modes.values())) == 2
    statistics = net.norm.running_mean.clone()

    def check(scores, target):
        assert not scores.requires_grad and not net.training and not net.drop.training
        return 0

    mrf.evaluate_missing(net, data, check, progress=False)
    assert modes == {m: m.training for m in net.modules()} and torch.equal(statistics, net.norm.running_mean)
    with pytest.raises(ZeroDivisionError):
        mrf.evaluate_missing(net, data, lambda scores, target: 1 / 0, progress=False)
    assert modes == {m: m.training for m in net.modules()} and torch.is_grad_enabled()


def test_inputs_stay_as_they_are():
    inputs = ones("ab")
    mrf.evaluate_missing(binary_code, [(inputs, torch.zeros(3))], mean, drop="noise", progress=False)
    assert all(torch.equal(x, torch.ones(3, 2)) for x in inputs.values())


def test_a_model_that_returns_the_same_memory():
    """A function metric sees every batch, not the last one as often as there are."""
    memory = torch.empty(2)

    def model(x):
        return memory.copy_(x["a"])

    data = [({"a": torch.full((2,), v)}, torch.zeros(2)) for v in (1.0, 5.0)]
    assert mrf.evaluate_missing(model, data, lambda scores, target: scores.mean(), progress=False).full == 3


def test_noise():
    """Standard normal, the same in all subsets and runs, another per batch, and none of the dropped values."""
    seen = []

    def model(x):
        seen.append({m: v.clone() for m, v in x.items()})
        return v.flatten(1).sum(1) if (v := x["a"]) is not None else None

    def run():
        seen.clear()
        data = [({m: torch.full((64, 500), 7.0) for m in "abc"}, torch.zeros(64))] * 2
        mrf.evaluate_missing(model, data, mean, drop="noise", progress=False)
        return list(seen)

    first, again = run(), run()
    assert len(first) == 14 and all(torch.equal(x[m], y[m]) for x, y in zip(first, again, strict=True) for m in "abc")
    noise = {m: {bytes(x[m].numpy().data) for x in first if x[m].min() != 7} for m in "abc"}
    assert all(len(found) == 2 for found in noise.values())  # one per batch
    only_a = first[4]
    assert (only_a["a"] == 7).all() and not torch.equal(only_a["b"], only_a["c"])
    assert abs(only_a["b"].mean()) < 0.02 and abs(only_a["b"].std() - 1) < 0.02


def test_function_as_drop_and_other_inputs():
    """A function fills in, or leaves the key out; what is no modality passes as it is."""
    seen = []

    def drop(modality, x):
        return None if modality == "b" else x + 10

    def model(x):
        seen.append({m: None if v is None else float(v.flatten()[0]) for m, v in x.items()})
        return x["a"]

    inputs = {"a": torch.ones(1, 1), "length": torch.tensor([5]), "b": torch.ones(1, 1), "nothing": None}
    mrf.evaluate_missing(model, [(inputs, torch.zeros(1))], mean, modalities=["a", "b"], drop=drop, progress=False)
    rest = {"length": 5.0, "nothing": None}
    assert seen == [{"a": 1, "b": 1, **rest}, {"a": 1, **rest}, {"a": 11, "b": 1, **rest}]
    assert list(seen[0]) == list(inputs)


def test_names_of_metrics():
    for metric, name in ((mean, "mean"), (lambda scores, target: 1, "score")):
        assert mrf.evaluate_missing(binary_code, [(ones("ab"), torch.zeros(3))], metric, progress=False).metric == name


def test_data_is_read_once():
    reads = []

    def data():
        for i in range(3):
            reads.append(i)
            yield ones("abc"), torch.zeros(3)

    mrf.evaluate_missing(binary_code, data(), mean, progress=False)
    assert reads == [0, 1, 2]


def test_table_and_progress(capsys, monkeypatch):
    mrf.evaluate_missing(binary_code, [(ones("ab"), torch.zeros(3))], mean)
    assert capsys.readouterr() == ("", "")  # no terminal, no bar
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = mrf.evaluate_missing(binary_code, [(ones("ab"), torch.zeros(3))], mean)
    printed = capsys.readouterr()
    assert printed.out == "" and "evaluate_missing" in printed.err
    lines = result.table().splitlines()
    assert [line.split() for line in lines if "●" in line] == [
        ["●", "●", "3.000"],
        ["●", "·", "1.000", "2.000"],
        ["·", "●", "2.000", "1.000"],
    ]
    assert "2.000 ± 0.816" in result.table() and lines[-1] == "worst: a, 1.000"


def test_moves_to_the_device_of_the_model():
    """meta is a second device that every machine has."""
    model = nn.Linear(2, 2, device="meta")
    net = nn.ModuleDict({"l": model})
    net.forward = lambda x: model(x["a"])

    class Everything:
        def reset(self): ...

        def update(self, scores, target):
            assert scores.device.type == target["y"].device.type == "meta"

        def compute(self):
            return 1

    assert mrf.evaluate_missing(net, [({"a": torch.ones(1, 2)}, {"y": torch.ones(1)})], Everything(), progress=False).full == 1


GOOD = [(ones("ab"), torch.zeros(3))]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": []}, ValueError, "data must be at least one batch, got none"),
        ({"data": 3}, TypeError, "data must be an iterable of pairs"),
        ({"data": [torch.ones(3)]}, TypeError, "data must be pairs .* got a Tensor"),
        ({"data": [(torch.ones(3), torch.ones(3))]}, TypeError, "data must be pairs .* got a tuple of Tensor, Tensor"),
        ({"data": [({"a": 1}, 2)]}, TypeError, r"inputs\['a'\] must be a tensor \(choose the modalities"),
        ({"model": 3}, TypeError, "model must be a module or a function, got int"),
        ({"model": lambda rgb, depth: rgb}, TypeError, r"lambda x: model\(\*\*x\)\), got one called as \(rgb, depth\)"),
        ({"metric": 3}, TypeError, "metric must be a torchmetrics metric or a function, got int"),
        ({"metric": torch.nn.CrossEntropyLoss}, TypeError, "metric must be .* or a function, got the class CrossEntropyLoss"),
        ({"metric": lambda a, b: None}, ValueError, "metric must be of one number .* got a NoneType"),
        ({"metric": lambda a, b: (1, 2)}, ValueError, "metric must be of one number .* got a tuple"),
        (
            {"metric": lambda a, b: torch.tensor(1j)},
            ValueError,
            r"metric must be of one number .* got shape \(\) of torch.complex64",
        ),
        ({"data": [({0: torch.ones(3, 2)}, torch.zeros(3))]}, TypeError, "inputs must be a mapping from names .* the name 0"),
        ({"data": [({}, torch.zeros(3))]}, ValueError, "inputs must be a mapping with at least one modality, got an empty one"),
        ({"higher_is_better": "yes"}, TypeError, "higher_is_better must be True or False, got 'yes'"),
        ({"modalities": ["a", "a"]}, ValueError, r"modalities must be different names, got \['a', 'a'\]"),
        ({"metric": lambda a, b: a}, ValueError, r"metric must be of one number .* got shape \(3,\)"),
        ({"metric": lambda a, b: {"x": 1}}, ValueError, "metric must be of one number .* got a dict"),
        ({"modalities": ["a", "z"]}, ValueError, "modalities must be keys of the inputs, 'a', 'b', got 'z'"),
        ({"modalities": []}, ValueError, "modalities must be non-empty"),
        ({"modalities": "ab"}, TypeError, "modalities must be a list or tuple, got str"),
        ({"drop": "ones"}, ValueError, "drop must be 'zeros', 'noise' or a function, got 'ones'"),
        ({"drop": lambda m, x: 0}, TypeError, "drop must be a function that returns a tensor or None, got int"),
        ({"data": [({"a": torch.ones(2, 1).long()}, 0)], "drop": "noise"}, ValueError, r"because inputs\['a'\] is torch.int64"),
        ({"data": [(ones("ab"), 1)]}, TypeError, "tensors of a batch for a metric that is a function, got Tensor and int"),
        ({"data": [(ones("ab"), torch.tensor(1))]}, TypeError, "a metric that is a function, got Tensor and a scalar"),
    ],
)
def test_errors(change, error, message):
    arguments = {"model": binary_code, "data": GOOD, "metric": mean, **change}
    with pytest.raises(error, match=f"evaluate_missing: .*{message}"):
        mrf.evaluate_missing(**arguments, progress=False)


def test_without_rich(monkeypatch):
    for name in ("rich.progress", "rich.console", "rich.table", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    result = mrf.evaluate_missing(binary_code, GOOD, mean)  # without a progress bar
    with pytest.raises(ModuleNotFoundError, match=r"MissingModalities.table: needs the package rich.*modreg_fast\[audit\]"):
        result.table()


def classes(scores, target):
    return (scores.argmax(1) == target).double().mean()


def test_modalities_go_by_name():
    """In whatever order a batch lists them; the model sees them in the order of the first batch."""
    torch.manual_seed(0)
    a, b = torch.eye(3)[torch.randint(3, (40,))], torch.randn(40, 3)
    data = [({"a": a[:20], "b": b[:20]}, a[:20].argmax(1)), ({"b": b[20:], "a": a[20:]}, a[20:].argmax(1))]
    seen = []

    def model(x):
        seen.append(list(x))
        return 5 * x["a"] + x["b"] / 5

    for metric in (classes, pytest.importorskip("torchmetrics.classification").MulticlassAccuracy(3, average="micro")):
        result = mrf.evaluate_missing(model, data, metric, progress=False)
        assert list(result.scores) == [("a", "b"), ("a",), ("b",)]
        assert result.full == result.scores["a",] == 1 and result.scores["b",] < 0.6
    assert all(keys == ["a", "b"] for keys in seen)


@pytest.mark.parametrize("modalities", [None, ["a", "b"]])
@pytest.mark.parametrize("lacking", [{"a": torch.ones(3, 2)}, {"a": torch.ones(3, 2), "b": None}])
def test_a_batch_without_a_modality(lacking, modalities):
    """An error; or it counts in every subset, without the modality in all of them."""
    data = [(ones("ab"), torch.zeros(3)), (lacking, torch.zeros(3))]
    with pytest.raises(ValueError, match="evaluate_missing: data must be batches with 'a', 'b' each .* got batch 1 without 'b'"):
        mrf.evaluate_missing(binary_code, data, mean, modalities=modalities, progress=False)

    def model(x):
        return sum({"a": 1.0, "b": 2.0}[m] * (v != 0).flatten(1).any(1).double() for m, v in x.items() if v is not None)

    result = mrf.evaluate_missing(model, data, mean, modalities=modalities, allow_absent=True, progress=False)
    assert result.scores == {("a", "b"): 2.0, ("a",): 1.0, ("b",): 1.0}
    if modalities is None:
        with pytest.raises(ValueError, match="got batch 1 with 'b'"):
            mrf.evaluate_missing(model, [({"a": torch.ones(3, 2)}, torch.zeros(3)), data[0]], mean, progress=False)
        with pytest.raises(ValueError, match="modalities must be keys of the inputs, 'a', 'b', got 'z', which no batch has"):
            mrf.evaluate_missing(model, data, mean, modalities=["a", "b", "z"], allow_absent=True, progress=False)


def test_images_of_different_sizes():
    """A function sees the pixels of all in a row: the number that a torchmetrics metric gives."""
    metrics = pytest.importorskip("torchmetrics.classification")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    torch.manual_seed(0)
    sizes = ((2, 4, 6), (1, 5, 3), (3, 4, 6))
    data = [({m: torch.randn(b, 3, h, w) for m in "ab"}, torch.randint(3, (b, h, w))) for b, h, w in sizes]

    def iou(scores, target):
        return functional.multiclass_jaccard_index(scores, target, 3)

    def model(x):
        return x["a"] + x["b"]

    def deep(x):  # the same with a channel in both
        return model(x).argmax(1, keepdim=True)

    expected = mrf.evaluate_missing(model, data, metrics.MulticlassJaccardIndex(3), progress=False).scores
    assert mrf.evaluate_missing(model, data, iou, progress=False).scores == pytest.approx(expected)
    assert mrf.evaluate_missing(deep, [(x, y[:, None]) for x, y in data], iou, progress=False).scores == pytest.approx(expected)
    assert mrf.evaluate_missing(lambda x: model(x).argmax(1), data, iou, progress=False).scores == pytest.approx(expected)


def test_empty_batches_and_picked_targets():
    empty = ({m: torch.zeros(0, 2) for m in "ab"}, {"y": torch.zeros(0), "name": []})
    full = (ones("ab"), {"y": torch.zeros(3), "name": ["x"] * 3})
    result = mrf.evaluate_missing(binary_code, [empty, full, empty], mean, target=lambda held: held["y"], progress=False)
    assert result.scores == {("a", "b"): 3.0, ("a",): 1.0, ("b",): 2.0}
    with pytest.raises(TypeError, match="target must be a function"):
        mrf.evaluate_missing(binary_code, [full], mean, target="y", progress=False)


def test_lists_and_tuples_move_to_the_device():
    """meta is a second device that every machine has."""
    pair = namedtuple("pair", "x y")
    net = nn.ModuleDict({"l": nn.Linear(2, 2, device="meta")})

    def forward(x):
        parts = [x["a"], x["more"][0], x["more"][1]["deep"][0], x["pair"].x]
        assert isinstance(x["pair"], pair) and x["more"][2] == "text" and all(part.device.type == "meta" for part in parts)
        return net["l"](x["a"])

    net.forward = forward

    class Everything:
        def reset(self): ...

        def update(self, scores, target):
            assert target[0].device.type == target[1][0].device.type == "meta"

        def compute(self):
            return 1

    x = torch.ones(1, 2)
    inputs = {"a": x, "more": [x, {"deep": (x,)}, "text"], "pair": pair(x, None)}
    data = [(inputs, [x, (x,)])]
    assert mrf.evaluate_missing(net, data, Everything(), modalities=["a"], progress=False).full == 1

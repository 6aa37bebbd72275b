"""AdaptiveWeight holds its ratio in real training; QualityTarget finds the broken sensor and does better than equal shares."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modreg_fast as mrf

SIZES = {"rgb": 6, "depth": 5}


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    """What is trained here is tiny."""
    torch.set_num_threads(1)


class Network(nn.Module):
    def __init__(self, sizes, classes=3):
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(n, 12), nn.Tanh()) for m, n in sizes.items()})
        self.head = nn.Sequential(nn.Linear(12 * len(sizes), 16), nn.Tanh(), nn.Linear(16, classes))

    def forward(self, x):
        features = {m: encoder(x[m]) for m, encoder in self.encoders.items()}
        return self.head(torch.cat(list(features.values()), 1)), features


def sensors(generator, samples, noise):
    """Labels and, per sensor, a noisy view of them; the class means are the same for every call."""
    means = torch.Generator().manual_seed(7)
    labels = torch.randint(3, (samples,), generator=generator)
    return {
        m: torch.randn(3, n, generator=means)[labels] + noise[m] * torch.randn(samples, n, generator=generator)
        for m, n in SIZES.items()
    }, labels


def norm_of(loss, tensors):
    grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(g.double().square().sum().item() for g in grads if g is not None))


@pytest.mark.parametrize("at", ["parameters", "features"])
@pytest.mark.parametrize("kind, ratio", [("entropy", 0.1), ("entropy", 0.5), ("attribution", 0.03)])
def test_ratio_holds_in_training(kind, ratio, at):
    """Measured anew at every step: the norms differ between the losses by orders of magnitude and change while training goes on."""
    network, generator = Network(SIZES), torch.Generator().manual_seed(1)
    adaptive = mrf.AdaptiveWeight(ratio, decay=0.9, maximum=1e9)
    optimizer, ratios, raw = torch.optim.Adam(network.parameters(), 3e-3), [], []
    for _ in range(80):
        x, labels = sensors(generator, 64, {"rgb": 1.5, "depth": 2.0})
        scores, features = network(x)
        task = F.cross_entropy(scores, labels)
        if kind == "entropy":
            penalty, tensors = mrf.FunctionalEntropyLoss(1.0)({m: [f] for m, f in features.items()}), list(features.values())
            if at == "parameters":
                tensors = [p for p in network.encoders.parameters()]
        else:
            penalty = mrf.AttributionLoss({"rgb": 0.1, "depth": 0.9})(scores, features)
            tensors = [network.head[0].weight] if at == "parameters" else list(features.values())
        weighted = adaptive(task, penalty, tensors)
        ratios.append(norm_of(weighted, tensors) / norm_of(task, tensors))
        raw.append(norm_of(penalty, tensors) / norm_of(task, tensors))
        optimizer.zero_grad()
        (task + weighted).backward()
        optimizer.step()
    late = ratios[40:]
    assert np.mean(late) == pytest.approx(ratio, rel=0.15)
    assert max(late) < 4 * ratio and min(late) > ratio / 4
    assert not 0.5 * ratio < np.mean(raw[40:]) < 2 * ratio  # left alone the ratio is another


def losses(scale=1.0):
    z = torch.tensor([3.0, 4.0], requires_grad=True)
    return z, z.square().sum() / 2, scale * z.sum()  # gradient norms 5 and sqrt(2) * scale


def test_the_formula():
    """Averages by hand, the limit, no gradient through the weight."""
    adaptive = mrf.AdaptiveWeight(0.5, decay=0.75)
    assert adaptive.weight == 0
    z, task, penalty = losses()
    weighted = adaptive(task, penalty, [z])
    assert weighted.item() == pytest.approx(7 * 0.5 * 5 / 2**0.5, rel=1e-6)
    gradient = torch.autograd.grad(weighted, z)[0]
    torch.testing.assert_close(gradient, torch.full((2,), 0.5 * 5 / 2**0.5))
    z, task, penalty = losses(3.0)
    adaptive(2 * task, penalty, [z])
    expected = 0.5 * (0.75 * 5 + 10) / (0.75 * 2**0.5 + 3 * 2**0.5)
    assert adaptive.weight.item() == pytest.approx(expected, rel=1e-6)
    z, task, penalty = losses(1e-9)
    limited = mrf.AdaptiveWeight(0.5, maximum=20.0)
    limited(task, penalty, [z])
    assert limited.weight == 20


@pytest.mark.parametrize("bad", ["zero_penalty", "nan_penalty", "nan_task", "infinite_task"])
def test_steps_that_do_not_count(bad):
    """They leave the weight as it was, before the first step too."""
    adaptive = mrf.AdaptiveWeight(0.5)
    factors = {"zero_penalty": (1, 0), "nan_penalty": (1, math.nan), "nan_task": (math.nan, 1), "infinite_task": (math.inf, 1)}[
        bad
    ]

    def step(task_factor, penalty_factor):
        z, task, penalty = losses()
        return adaptive(task_factor * task, penalty_factor * penalty, [z])

    step(*factors)
    assert adaptive.weight == 0
    step(1, 1)
    before = adaptive.weight.clone()
    value = step(*factors)
    assert adaptive.weight == before > 0
    assert value.isnan() if bad == "nan_penalty" else value.isfinite()
    step(0, 1)
    assert 0 < adaptive.weight < before  # a task without gradient counts


def test_weight_is_part_of_the_state_and_rests_in_eval():
    adaptive, other = mrf.AdaptiveWeight(0.5), mrf.AdaptiveWeight(0.5)
    z, task, penalty = losses()
    adaptive(task, penalty, [z])
    other.load_state_dict(adaptive.state_dict())
    assert other.weight == adaptive.weight > 0
    other.eval()
    with torch.no_grad():
        z, task, penalty = losses(5.0)
        assert other(task, penalty, [z]).item() == pytest.approx(35 * adaptive.weight.item())
    assert other.weight == adaptive.weight


def test_adaptive_weight_in_bfloat16():
    z = torch.randn(50, dtype=torch.bfloat16, requires_grad=True)
    adaptive = mrf.AdaptiveWeight(0.5)
    value = adaptive(z.square().sum() / 2, z.sum(), [z])
    assert value.dtype == torch.bfloat16 and adaptive.weight.dtype == torch.float32
    assert adaptive.weight.item() == pytest.approx(0.5 * z.float().norm().item() / 50**0.5, rel=1e-2)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda module: module.to("cpu", torch.float16)])
def test_averages_stay_in_float32_when_the_model_is_cast(cast):
    """In 16 bits a norm or a count above 65504 would be infinite, and stay so in the average."""

    def trained():
        model = nn.ModuleDict(
            {"net": nn.Linear(4, 3), "weight": mrf.AdaptiveWeight(0.5), "quality": mrf.QualityTarget(["a", "b"], 3)}
        )
        z, task, penalty = losses()
        model["weight"](1e8 * task, 1e8 * penalty, [z])
        labels = torch.arange(300_000) % 3
        model["quality"]({m: k * F.one_hot(labels, 3).float() for k, m in ((1, "a"), (2, "b"))}, labels)
        return model

    model, expected = cast(trained()), trained()
    assert model["net"].weight.dtype in (torch.float16, torch.bfloat16)
    for name, buffer in expected.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(model.get_buffer(name), buffer), name
    assert model["weight"].weight == expected["weight"].weight > 0 and model["quality"].target == expected["quality"].target
    other = cast(mrf.AdaptiveWeight(0.5))
    other.load_state_dict(expected["weight"].state_dict())
    assert other.weight == expected["weight"].weight


def test_averages_are_not_of_a_small_default_dtype():
    """As where a large model is made under ``torch.set_default_dtype(torch.float16)``, and goes on from a checkpoint."""
    adaptive = mrf.AdaptiveWeight(0.5)
    z, task, penalty = losses()
    adaptive(1e8 * task, 1e8 * penalty, [z])
    torch.set_default_dtype(torch.float16)
    try:
        other = mrf.AdaptiveWeight(0.5)
        assert all(buffer.dtype == torch.float32 for buffer in (*other.buffers(), *quality().buffers()))
    finally:
        torch.set_default_dtype(torch.float32)
    other.load_state_dict(adaptive.state_dict())
    assert other.weight == adaptive.weight > 0


def test_averages_move_with_the_model():
    model = nn.ModuleDict({"weight": mrf.AdaptiveWeight(0.5)})
    assert all(buffer.device.type == "meta" for buffer in model.half().to("meta").buffers())
    assert all(buffer.device.type == "cpu" and buffer.dtype == torch.float32 for buffer in model.to_empty(device="cpu").buffers())


ADAPTIVE_ERRORS = {
    "ratio": (lambda: mrf.AdaptiveWeight(-1), "ratio must be a finite number of at least 0"),
    "decay": (lambda: mrf.AdaptiveWeight(decay=1), r"decay must be a number in \[0, 1\)"),
    "maximum": (lambda: mrf.AdaptiveWeight(maximum=math.inf), "maximum must be a finite number"),
    "no_tensors": (lambda: mrf.AdaptiveWeight()(*losses()[1:], []), "tensors must be non-empty"),
    "no_graph": (lambda: mrf.AdaptiveWeight()(torch.ones(()), losses()[2], [torch.ones(1)]), "task must be .* without a graph"),
    "unrelated": (lambda: mrf.AdaptiveWeight()(*losses()[1:], [losses()[0]]), "task must be computed from the given tensors"),
    "number": (lambda: mrf.AdaptiveWeight()(1.0, *losses()[2:], [losses()[0]]), "task must be a tensor, got float"),
    "vector": (lambda: mrf.AdaptiveWeight().eval()(*losses()[1:2], torch.ones(3), []), r"penalty must be a scalar, got shape"),
    "twice": (lambda: mrf.QualityTarget(["a", "a"], 2), r"modalities must be different names, got \['a', 'a'\]"),
    "class": (
        lambda: quality()(dict.fromkeys("ab", torch.zeros(2, 3)), torch.tensor([0, 255])),
        r"labels must be in \[0, 3\).*255",
    ),
    "below": (
        lambda: quality()(dict.fromkeys("ab", torch.zeros(2, 3)), torch.tensor([-100, 1])),
        r"labels must be in .* got -100",
    ),
    "modalities": (lambda: mrf.QualityTarget([], 2), "modalities must be non-empty"),
    "classes": (lambda: mrf.QualityTarget("ab", 2), "modalities must be a list or tuple"),
    "one_class": (lambda: mrf.QualityTarget(["a"], 1), "classes must be at least 2"),
    "smoothing": (lambda: mrf.QualityTarget(["a", "b", "c"], 2, smoothing=0), "smoothing must be above 0"),
    "names": (lambda: quality()({"a": torch.zeros(2, 3)}, LABELS[:2]), r"scores must be of the modalities \['a', 'b'\]"),
    "shape": (lambda: quality()(dict.fromkeys("ab", torch.zeros(2, 4)), LABELS[:2]), r"must be of shape \(2, 3\), got \(2, 4\)"),
    "labels": (lambda: quality()(dict.fromkeys("ab", torch.zeros(2, 3)), torch.zeros(2)), "labels must be int64"),
    "mask": (
        lambda: quality()(dict.fromkeys("ab", torch.zeros(2, 3)), LABELS[:2], mask=torch.ones(3, dtype=torch.bool)),
        "mask must be of the shape",
    ),
    "present": (
        lambda: quality()(dict.fromkeys("ab", torch.zeros(2, 3)), LABELS[:2], present=torch.ones(2, 3, dtype=torch.bool)),
        "present must be of shape",
    ),
}
LABELS = torch.tensor([0, 1, 2, 0, 0, 1, 0, 0])


def quality(**options):
    return mrf.QualityTarget(["a", "b"], 3, **options)


@pytest.mark.parametrize("case", ADAPTIVE_ERRORS)
def test_messages(case):
    call, message = ADAPTIVE_ERRORS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def reference_skill(scores, labels, classes=3):
    """McFadden's pseudo-R^2 in NumPy."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    logits = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    frequency = np.bincount(labels, minlength=classes) / len(labels)
    entropy = -sum(f * math.log(f) for f in frequency if f > 0)
    return min(max(1 + logits[np.arange(len(labels)), labels].mean() / entropy, 0), 1)


def test_skill_and_target_of_one_batch():
    scores = {"a": torch.randn(8, 3) + 2 * F.one_hot(LABELS, 3), "b": torch.randn(8, 3) + F.one_hot(LABELS, 3)}
    target = (module := quality(smoothing=0.1))(scores, LABELS)
    expected = {m: reference_skill(x, LABELS) for m, x in scores.items()}
    assert module.skill == pytest.approx(expected, rel=1e-5) and expected["a"] > 0
    total = sum(expected.values()) + 0.2
    assert target == pytest.approx({m: (s + 0.1) / total for m, s in expected.items()}, rel=1e-5)


def test_the_frequencies_of_unbalanced_classes_are_no_skill():
    """A broken sensor's scores tell how frequent the classes are, and nothing more; equal shares while nobody has skill."""
    frequency = torch.bincount(LABELS).float().log().expand(8, 3)
    module = quality()
    assert module.target == {"a": 0.5, "b": 0.5}
    assert module({"a": frequency, "b": -9 * frequency}, LABELS) == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-5)
    assert module.skill == pytest.approx({"a": 0, "b": 0}, abs=1e-6)


def test_dense_scores_masks_and_missing_modalities():
    """Equal to the skill over the positions that count; labels under the mask are never looked up."""
    scores = {m: torch.randn(4, 3, 5, 6) for m in "ab"}
    labels = torch.randint(3, (4, 5, 6))
    for x in scores.values():
        x += 3 * F.one_hot(labels, 3).movedim(-1, 1)
    mask, present = torch.rand(4, 5, 6) < 0.6, torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
    module = quality()
    module(scores, labels.where(mask, 255).to(torch.uint8), mask=mask, present=present)
    for i, (m, x) in enumerate(scores.items()):
        held = mask & present[:, i, None, None]
        assert module.skill[m] == pytest.approx(reference_skill(x.movedim(1, -1)[held], labels[held]), rel=1e-5)


def test_averages_forget():
    """A sensor that breaks loses its skill at the rate of ``decay``, and batches weigh by their valid positions."""
    good, module = 3.0 * F.one_hot(LABELS, 3), quality(decay=0.5)
    healthy = module({"a": good, "b": good}, LABELS)
    assert healthy == {"a": 0.5, "b": 0.5}
    shares = [module({"a": good, "b": torch.zeros(8, 3)}, LABELS)["b"] for _ in range(6)]
    assert all(later <= earlier for earlier, later in zip([0.5, *shares], shares, strict=False)) and shares[-1] < 0.1
    before = module.target
    assert module({m: torch.zeros(8, 3) for m in "ab"}, LABELS, mask=torch.zeros(8, dtype=torch.bool)) == pytest.approx(before)


def test_not_finite_scores_leave_the_skill_of_their_modality():
    module, good = quality(decay=0.5), {m: 3.0 * F.one_hot(LABELS, 3) for m in "ab"}
    module(good, LABELS)
    before = module.skill
    module({"a": torch.full((8, 3), math.nan), "b": torch.zeros(8, 3)}, LABELS)
    assert module.skill["a"] == before["a"] and module.skill["b"] < before["b"]


def test_quality_state_and_eval():
    module, other = quality(), quality()
    module({"a": 3.0 * F.one_hot(LABELS, 3), "b": torch.zeros(8, 3)}, LABELS)
    other.load_state_dict(module.state_dict())
    assert other.target == module.target != {"a": 0.5, "b": 0.5}
    other.eval()
    assert other({m: torch.zeros(8, 3) for m in "ab"}, LABELS) == module.target


def small_sample(generator, samples):
    """A sensor that knows the label and an unplugged one, noise alone in 20 channels."""
    means = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(3, (samples,), generator=generator)
    rgb = means[labels] + torch.randn(samples, 6, generator=generator)
    return {"rgb": rgb, "depth": torch.randn(samples, 20, generator=generator)}, labels


def train(targets, seed):
    """Accuracy on new data after training on 150 samples with the shares steered to equal ones, or by skill measured on them or on
    held-out ones; and the last target of the broken sensor."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network({"rgb": 6, "depth": 20})
    network.head = nn.Linear(24, 3)
    probes = nn.ModuleDict({m: nn.Linear(12, 3) for m in SIZES})
    quality, loss = mrf.QualityTarget(list(SIZES), 3, decay=0.95), mrf.AttributionLoss()
    optimizer = torch.optim.Adam([*network.parameters(), *probes.parameters()], 3e-3)
    (x, labels), (held_out, held_out_labels) = small_sample(generator, 150), small_sample(generator, 150)
    for _ in range(150):
        scores, features = network(x)
        alone = {m: probe(features[m].detach()) for m, probe in probes.items()}
        target = None
        if targets == "skill":
            target = quality(alone, labels)
        if targets == "held_out_skill":
            target = quality({m: probes[m](f) for m, f in network(held_out)[1].items()}, held_out_labels)
        task = F.cross_entropy(scores, labels) + sum(F.cross_entropy(y, labels) for y in alone.values())
        optimizer.zero_grad()
        task.backward(retain_graph=True)
        (3 * loss(scores, features, target=target)).backward(inputs=list(network.head.parameters()))
        optimizer.step()
    x, labels = small_sample(generator, 4000)
    return (network(x)[0].argmax(1) == labels).float().mean().item(), quality.target["depth"]


@pytest.mark.parametrize("seed", range(3))
def test_broken_sensor_gets_no_equal_share(seed):
    """Its target goes down and accuracy is better than with equal shares; more so when skill is measured where nothing was learnt."""
    equal, _ = train("equal", seed)
    accuracy, share = train("skill", seed)
    held_out_accuracy, held_out_share = train("held_out_skill", seed)
    assert share < 0.25 and accuracy > equal + 0.02
    assert held_out_share < 0.1 and held_out_accuracy > equal + 0.03

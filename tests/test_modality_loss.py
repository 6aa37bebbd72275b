"""ModalityCrossEntropy: the loss it says, its details, ranks, copies."""

import copy
import pickle

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import modreg_fast as mrf

# The compiler's own: a deprecated call in Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

PRESENT = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def given(dtype=torch.float64):
    logits = {m: torch.randn(4, 5, 6, 3, dtype=dtype, requires_grad=True) for m in ("rgb", "depth")}
    joint = torch.randn(4, 5, 6, 3, dtype=dtype, requires_grad=True)
    target = torch.randint(5, (4, 6, 3))
    target[torch.rand(target.shape) < 0.2] = 255
    return logits, joint, target


@pytest.mark.parametrize("with_joint", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_sum_of_cross_entropies(backend, with_joint, label_smoothing, weighted):
    logits, joint, target = given()
    class_weight = torch.rand(5, dtype=torch.float64) if weighted else None
    options = {"ignore_index": 255, "label_smoothing": label_smoothing}
    criterion = mrf.ModalityCrossEntropy(0.3, 0.7, class_weight=class_weight, backend=backend, **options)
    loss, details = criterion(logits, target, joint=joint if with_joint else None, return_details=True)
    own = {m: F.cross_entropy(x, target, weight=class_weight, **options) for m, x in logits.items()}
    together = joint if with_joint else (logits["rgb"] + logits["depth"]) / 2
    together = F.cross_entropy(together, target, weight=class_weight, **options)
    expected = 0.7 * together + 0.3 * (own["rgb"] + own["depth"]) / 2
    helpers.assert_close(loss, helpers.wide(expected), 1e-12)
    leaves = [*logits.values(), joint]
    helpers.assert_close(helpers.gradients(loss, leaves, None), helpers.wide(helpers.gradients(expected, leaves, None)), 1e-12)
    helpers.assert_close(details.joint, helpers.wide(together), 1e-12)
    helpers.assert_close(list(details.cross_entropy.values()), helpers.wide(list(own.values())), 1e-12)
    assert not loss.isnan() and not any(x.requires_grad for x in (details.joint, *details.information.values()))


@pytest.mark.parametrize("with_joint", [False, True])
def test_present_leaves_out_what_is_absent(backend, with_joint):
    logits, joint, target = given()
    with torch.no_grad():
        for i, x in enumerate(logits.values()):
            x[~PRESENT[:, i]] = float("nan")
        joint[3] = float("nan")
    criterion = mrf.ModalityCrossEntropy(ignore_index=255, information_weight=0.1, objective="log", backend=backend)
    loss, details = criterion(logits, target, joint=joint if with_joint else None, present=PRESENT, return_details=True)
    expected = 0
    for i, (m, x) in enumerate(logits.items()):
        ce = F.cross_entropy(x[PRESENT[:, i]], target[PRESENT[:, i]], ignore_index=255, reduction="none")
        valid = target[PRESENT[:, i]] != 255
        p = x[PRESENT[:, i]].softmax(1)
        t = F.one_hot(target[PRESENT[:, i]] % 5, 5).movedim(-1, 1)
        information = ((p - t).square().sum(1) / (ce + 1e-8))[valid].mean()
        helpers.assert_close(details.information[m], helpers.wide(information), 1e-10)
        expected = expected + ce[valid].mean() / 2 - 0.1 * (information + 1e-8).log()
    if with_joint:
        together = joint
    else:
        rgb, depth = (torch.where(PRESENT[:, i].view(4, 1, 1, 1), x, 0) for i, x in enumerate(logits.values()))
        together = (rgb + depth) / PRESENT.sum(1).clamp(min=1).view(4, 1, 1, 1)
    expected = expected + F.cross_entropy(together[:3], target[:3], ignore_index=255)
    helpers.assert_close(loss, helpers.wide(expected), 1e-10)
    assert all(g.isfinite().all() for g in helpers.gradients(loss, list(logits.values()), None))


def test_nothing_counts(backend):
    logits, joint, _ = given()
    criterion = mrf.ModalityCrossEntropy(ignore_index=255, information_weight=1.0, backend=backend)
    target = torch.full((4, 6, 3), 255)
    loss, details = criterion(logits, target, joint=joint, return_details=True)
    assert loss == 0 and details.joint.isnan() and details.cross_entropy["rgb"].isnan()
    assert all((g == 0).all() for g in helpers.gradients(loss, [*logits.values(), joint], None))


def test_a_modality_that_nobody_has_does_not_count_in_the_mean(backend):
    logits, _, target = given()
    present = torch.tensor([[True, False]] * 4)
    criterion = mrf.ModalityCrossEntropy(1.0, 0.0, ignore_index=255, backend=backend)
    expected = F.cross_entropy(logits["rgb"], target, ignore_index=255)
    helpers.assert_close(criterion(logits, target, present=present), helpers.wide(expected), 1e-12)


def test_compiled_into_one_graph(backend):
    logits, joint, target = given(torch.float32)
    criterion = mrf.ModalityCrossEntropy(ignore_index=255, information_weight=0.1, class_weight=torch.rand(5), backend=backend)

    def step(logits, target):
        return criterion({m: 2 * x for m, x in logits.items()}, target, joint=joint, present=PRESENT)

    losses = [f(logits, target) for f in (step, torch.compile(step, fullgraph=True))]
    helpers.assert_close(losses[1], helpers.wide(losses[0]), 1e-6)
    expected, actual = (helpers.gradients(loss, list(logits.values()), None) for loss in losses)
    helpers.assert_close(actual, helpers.wide(expected), 1e-6)


class Concatenation(torch.nn.Conv2d):
    def forward(self, features):
        return super().forward(torch.cat([*features.values()], 1))


def trained(backend, way):
    """Gradients of a network with own heads from four samples with equally many valid pixels each."""
    torch.manual_seed(0)
    encoders = torch.nn.ModuleDict({m: torch.nn.Conv2d(3, 4, 3, padding=1) for m in ("rgb", "depth")}).double()
    heads = mrf.ModalityHeads(Concatenation(8, 5, 1), lambda m: torch.nn.Conv2d(4, 5, 1), ["rgb", "depth"]).double()
    criterion = mrf.ModalityCrossEntropy(ignore_index=255, label_smoothing=0.1, backend=backend)
    inputs = {m: torch.randn(4, 3, 6, 3, dtype=torch.float64) for m in encoders}
    target = torch.randint(5, (4, 6, 3))
    target[:, 2] = 255

    def loss(inputs, target):
        joint, alone = heads({m: encoders[m](x).tanh() for m, x in inputs.items()})
        return criterion(alone, target, joint=joint)

    if way == "accumulated":
        for part in (slice(0, 2), slice(2, 4)):
            (loss({m: x[part] for m, x in inputs.items()}, target[part]) / 2).backward()
    elif way == "checkpointed":
        checkpoint(loss, inputs, target, use_reentrant=False).backward()
    else:
        loss(inputs, target).backward()
    return [p.grad for p in (*encoders.parameters(), *heads.parameters())]


@pytest.mark.parametrize("way", ["accumulated", "checkpointed"])
def test_gradients_of_the_whole_batch(backend, way):
    helpers.assert_close(trained(backend, way), trained(backend, "at once"), 1e-9)


def test_class_weight_is_a_buffer_and_copies_are_equal(backend):
    logits, _, target = given()
    criterion = mrf.ModalityCrossEntropy(ignore_index=255, class_weight=torch.rand(5), backend=backend)
    assert list(criterion.state_dict()) == ["class_weight"]
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(logits, target), criterion(logits, target))
    assert "ignore_index=255" in repr(criterion)


def test_gradients_per_sample():
    """vmap over grad: nobody can look at a target there, at whatever depth it is wrapped."""
    x, y = torch.randn(4, 2, 3, dtype=torch.float64), torch.randint(3, (4,))
    criterion = mrf.ModalityCrossEntropy(information_weight=0.1)

    def loss(x, y):
        return criterion({"rgb": x[:1], "depth": x[1:]}, y[None])

    found = torch.func.vmap(torch.func.grad(loss))(x, y)
    for sample, target, gradient in zip(x, y, found, strict=True):
        sample = sample.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(sample, target), sample)[0])


def test_autocast(backend):
    """16-bit logits, as a network under autocast gives them; the loss is float32."""
    layer = torch.nn.Conv2d(3, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = {m: layer(torch.randn(2, 3, 4, 4)) for m in ("rgb", "depth")}
        assert logits["rgb"].dtype == torch.bfloat16
        loss = mrf.ModalityCrossEntropy(backend=backend)(logits, torch.randint(5, (2, 4, 4)))
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mrf.ModalityCrossEntropy(weight=-1.0), ValueError, "weight must be a finite number of at least 0, got -1.0"),
        (lambda: mrf.ModalityCrossEntropy(objective="x"), ValueError, "objective must be 'inverse', 'norm' or 'log', got 'x'"),
        (lambda: mrf.ModalityCrossEntropy(class_weight=[1.0]), TypeError, "class_weight must be a tensor, got list"),
        (lambda: mrf.ModalityCrossEntropy()([torch.zeros(1, 2)], torch.zeros(1)), TypeError, "logits must be a mapping"),
        (
            lambda: mrf.ModalityCrossEntropy()({"a": torch.zeros(1, 2)}, torch.zeros(1).long(), joint=torch.zeros(1, 3)),
            ValueError,
            r"joint must be of the shape \(1, 2\) of logits\['a'\], got \(1, 3\)",
        ),
        (
            lambda: mrf.ModalityCrossEntropy()({"a": [torch.zeros(1, 2)]}, torch.zeros(1).long(), joint=torch.zeros(1, 2)),
            TypeError,
            r"logits\['a'\] must be a tensor, got list",
        ),
        (
            lambda: mrf.ModalityCrossEntropy()({"a": torch.zeros(1, 2), "b": torch.zeros(1, 3)}, torch.zeros(1).long()),
            ValueError,
            r"logits\['b'\] must be of the shape \(1, 2\) of logits\['a'\], got \(1, 3\)",
        ),
        (
            lambda: mrf.ModalityCrossEntropy()({"a": torch.zeros(1, 2)}, torch.tensor([7])),
            ValueError,
            r"^ModalityCrossEntropy: target must be a class in \[0, 2\) or ignore_index \(-100\), got 7",
        ),
        (
            lambda: mrf.ModalityCrossEntropy()({"a": torch.zeros(2, 1)}, torch.zeros(2).long()),
            ValueError,
            r"logits\['a'\] must be of at least two classes \(of one logit z: .*\), got shape \(2, 1\)",
        ),
        (lambda: mrf.ModalityCrossEntropy(ignore_index=255.0), TypeError, "ignore_index must be an integer, got float"),
        (lambda: mrf.ModalityCrossEntropy(ignore_index=2**70), ValueError, "ignore_index must be an integer of 64 bits"),
        (lambda: mrf.ModalityCrossEntropy(label_smoothing=2), ValueError, "label_smoothing must be at most 1, got 2"),
        (lambda: mrf.ModalityCrossEntropy(class_weight=torch.tensor([1.0, -1])), ValueError, "class_weight must be at least 0"),
        (lambda: mrf.ModalityCrossEntropy(class_weight=torch.tensor([torch.nan])), ValueError, "class_weight must be at least 0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

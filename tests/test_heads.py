"""each_alone and ModalityHeads: what the heads say, what state is left alone, and the rest of the library beside them."""

import copy
import threading

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import modreg_fast as mrf

# The compiler's own: a deprecated call in Inductor, and a look at tensors that a graph break made inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def features(batch=3, names=("rgb", "depth"), scales=None):
    def one():
        return torch.randn(batch, 4, 5, 6, requires_grad=True)

    return {m: one() if scales is None else [one() for _ in range(scales)] for m in names}


class Concatenation(nn.Sequential):
    def __init__(self, modalities=2, norm=nn.BatchNorm2d):
        super().__init__(nn.Conv2d(4 * modalities, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, f):
        return super().forward(torch.cat(list(f.values()), 1))


class Addition(nn.Sequential):
    def forward(self, f):
        return super().forward(sum(f.values()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.classify = nn.Linear(4, 3)

    def forward(self, f):
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in f.values()], 1)
        return self.classify(self.attention(tokens, tokens, tokens)[0].mean(1))


class Pyramid(nn.Module):
    """Several scales, and a structure of results."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 3, 1) for _ in range(2))

    def forward(self, f):
        return {"scales": [conv(torch.cat([x[s] for x in f.values()], 1)) for s, conv in enumerate(self.convs)]}


HEADS = {
    "concatenation": lambda: Concatenation(norm=lambda n: nn.GroupNorm(2, n)),
    "addition": lambda: Addition(nn.Conv2d(4, 3, 1)),
    "attention": Attention,
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_the_others_are_absent(kind, absent, batched):
    head, f = HEADS[kind](), features()
    nothing = {m: torch.randn(1, 4, 5, 6) for m in f} if absent else None
    alone = mrf.each_alone(head, f, nothing, batched=batched)
    assert list(alone) == ["rgb", "depth"]
    for m in f:
        given = {k: x if k == m else (nothing[k].expand_as(x) if absent else torch.zeros_like(x)) for k, x in f.items()}
        helpers.assert_close(alone[m], helpers.wide(head(given)), 1e-5)
    loss = sum(x.square().sum() for x in alone.values())
    loss.backward()
    for m, x in f.items():
        (expected,) = torch.autograd.grad(head({**{k: torch.zeros_like(y) for k, y in f.items()}, m: x}).square().sum(), x)
        if not absent:
            helpers.assert_close(x.grad, helpers.wide(expected), 1e-5)
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("batched", [True, False])
def test_a_batch_without_samples(batched):
    """As a rank may hold one."""
    conv = nn.Conv2d(8, 3, 1)
    empty = {m: x[:0] for m, x in features().items()}
    alone = mrf.each_alone(lambda f: conv(torch.cat([*f.values()], 1)), empty, batched=batched)
    assert {m: x.shape for m, x in alone.items()} == dict.fromkeys(empty, (0, 3, 5, 6))


def test_several_scales_and_structures():
    head, f = Pyramid(), features(scales=2)
    absent = {m: [torch.randn(1, 4, 5, 6) for _ in range(2)] for m in f}
    alone = mrf.each_alone(head, f, absent)
    given = {"rgb": f["rgb"], "depth": [y.expand(3, -1, -1, -1) for y in absent["depth"]]}
    for actual, expected in zip(alone["rgb"]["scales"], head(given)["scales"], strict=True):
        helpers.assert_close(actual, helpers.wide(expected), 1e-5)


def test_a_whole_model_by_the_names_of_its_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders = nn.ModuleDict({m: nn.Linear(4, 8) for m in ("rgb", "depth")})
            self.head = nn.Linear(16, 3)

        def forward(self, inputs):
            return self.head(torch.cat([self.encoders[m](x).relu() for m, x in inputs.items()], 1))

    model, inputs = Model(), {m: torch.randn(5, 4) for m in ("rgb", "depth")}
    alone = mrf.each_alone(model, inputs)
    helpers.assert_close(alone["depth"], helpers.wide(model({**inputs, "rgb": torch.zeros(5, 4)})), 1e-5)


@pytest.mark.parametrize("wrap", [lambda head: head, lambda head: lambda f: head(f)], ids=["module", "function"])
@pytest.mark.parametrize("batched", [True, False])
def test_running_statistics_stay_those_of_the_joint_pass(wrap, batched):
    """Batch norm normalises by them, as at inference, and does not update them; afterwards it trains on."""
    head, f = Concatenation(), features()
    head(f)
    before = copy.deepcopy(head.state_dict())
    alone = mrf.each_alone(wrap(head), f, batched=batched)
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    assert all(module.training for module in head.modules())
    evaluated = copy.deepcopy(head).eval()
    for m in f:
        given = {k: x if k == m else torch.zeros_like(x) for k, x in f.items()}
        helpers.assert_close(alone[m], helpers.wide(evaluated(given)), 1e-5)
    head(f)
    assert not torch.equal(head[1].running_mean, before["1.running_mean"])


def test_modules_train_on_after_an_error():
    head, f = Concatenation(), features()
    with pytest.raises(RuntimeError):
        mrf.each_alone(lambda g: head(g) @ torch.zeros(7, 7), f)
    assert head[1].training


def test_dropout_is_active_and_the_joint_pass_before_draws_what_it_did():
    head, f = nn.Sequential(Addition(nn.Conv2d(4, 8, 1)), nn.Dropout(0.5)), features()
    torch.manual_seed(3)
    expected = head(f)
    torch.manual_seed(3)
    assert torch.equal(head(f), expected)
    alone = mrf.each_alone(head, f)
    assert 0.3 < (alone["rgb"] == 0).double().mean() < 0.7


def test_checkpointed_as_a_whole():
    """Batch norm in the recomputation is what it was, and the running statistics stay."""
    head, f = Concatenation(), features()

    def gradients(call):
        logits = call()
        return torch.autograd.grad(sum(x.square().sum() for x in logits.values()), list(f.values()))

    expected = gradients(lambda: mrf.each_alone(head, f))
    before = copy.deepcopy(head.state_dict())
    actual = gradients(lambda: checkpoint(lambda: mrf.each_alone(head, f), use_reentrant=False))
    assert all(map(torch.equal, actual, expected))
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())


@pytest.mark.parametrize("compiled", ["head", "step"])
def test_compiled(compiled):
    head, f = Concatenation(), features()
    expected = {m: x.detach() for m, x in mrf.each_alone(head, f).items()}
    before = copy.deepcopy(head.state_dict())
    call = mrf.each_alone if compiled == "head" else torch.compile(lambda h, g: mrf.each_alone(h, g))
    alone = call(torch.compile(head) if compiled == "head" else head, f)
    for m, x in alone.items():
        helpers.assert_close(x, helpers.wide(expected[m]), 1e-5)
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mrf.each_alone(3, {"a": torch.zeros(2, 3)}), TypeError, "head must be a module or a function, got int"),
        (lambda: mrf.each_alone(len, [1]), TypeError, "features must be a mapping"),
        (
            lambda: mrf.each_alone(len, {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}),
            ValueError,
            r"features\['b'\] must be of batch",
        ),
        (lambda: mrf.each_alone(len, {"a": [1.0]}), TypeError, r"features\['a'\] must be a tensor \(B, ...\) or a list of them"),
        (
            lambda: mrf.each_alone(lambda f: f["a"].sum(), {"a": torch.zeros(2, 3)}),
            ValueError,
            "head must be a head that returns",
        ),
        (lambda: mrf.each_alone(len, {"a": torch.zeros(2, 3)}, {}), ValueError, "absent must be a mapping with at least one"),
        (
            lambda: mrf.each_alone(len, {"a": torch.zeros(2, 3)}, {"a": torch.zeros(1, 4)}),
            ValueError,
            r"absent\['a'\] must be of the form of features\['a'\], with a batch of 1 or 2, got \(1, 4\)",
        ),
    ],
)
def test_errors_of_each_alone(call, error, message):
    with pytest.raises(error, match=f"each_alone: {message}"):
        call()


# ---- ModalityHeads ----


def heads(names=("rgb", "depth")):
    return mrf.ModalityHeads(Concatenation(len(names)), {m: nn.Conv2d(4, 3, 1) for m in names})


def test_training_gives_every_prediction_and_the_loss_takes_them():
    model, f = heads(), features()
    joint, alone = model(f)
    assert torch.equal(alone["depth"], model.heads["depth"](f["depth"]))
    target = torch.randint(3, (3, 5, 6))
    loss = mrf.ModalityCrossEntropy()(alone, target, joint=joint)
    expected = F.cross_entropy(joint, target) + sum(F.cross_entropy(x, target) for x in alone.values()) / 2
    helpers.assert_close(loss, helpers.wide(expected), 1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_with_all_modalities_is_the_joint_head_alone(monkeypatch):
    model, f = heads().eval(), features()
    monkeypatch.setattr(model.heads["rgb"], "forward", lambda *_: pytest.fail("a head ran in vain"))
    assert torch.equal(model(f), model.joint(f))


@pytest.mark.parametrize("names", [("rgb", "depth"), ("rgb", "depth", "radar")])
def test_evaluation_per_sample(names):
    """Joint where all are there, else the mean probability of the heads of those that are; NaN in the others has no effect."""
    model, f = heads(names).eval(), features(4, names)
    present = torch.ones(4, len(names), dtype=torch.bool)
    present[1, 0] = False
    present[2] = torch.arange(len(names)) == 1
    present[3] = False
    with torch.no_grad():
        for i, m in enumerate(names):
            f[m][1:3][~present[1:3, i]] = float("nan")
        logits = model(f, present=present)
        joint = model.joint({m: x.nan_to_num(0) for m, x in f.items()})
    own = {m: model.heads[m](x).softmax(1) for m, x in f.items()}
    helpers.assert_close(logits[[0, 3]], helpers.wide(joint[[0, 3]]), 1e-5)
    helpers.assert_close(logits[1].softmax(0), helpers.wide(sum(own[m][1] for m in names[1:]) / (len(names) - 1)), 1e-5)
    helpers.assert_close(logits[2].softmax(0), helpers.wide(own["depth"][2]), 1e-5)


def test_samples_that_have_none_of_what_is_given():
    """As where ``evaluate_missing`` leaves out the only sensor of a sample: the others speak, on what stands there, and not NaN."""
    model, f = heads(("rgb", "depth", "radar")).eval(), features(3, ("rgb", "depth", "radar"))
    given = {m: f[m] for m in ("rgb", "radar")}
    present = torch.tensor([[False, True, False], [True, True, False], [False, False, False]])
    found, own = model(given, present=present), {m: model.heads[m](x).softmax(1) for m, x in given.items()}
    helpers.assert_close(found[[0, 2]].softmax(1), helpers.wide((own["rgb"] + own["radar"])[[0, 2]] / 2), 1e-5)
    helpers.assert_close(found[1].softmax(0), helpers.wide(own["rgb"][1]), 1e-5)


def test_modalities_left_out_in_evaluation():
    model, f = heads().eval(), features()
    alone = model({"depth": f["depth"]})
    helpers.assert_close(alone.softmax(1), helpers.wide(model.heads["depth"](f["depth"]).softmax(1)), 1e-6)
    with pytest.raises(ValueError, match=r"ModalityHeads: features must be of the modalities 'rgb', 'depth', got \['depth'\]"):
        model.train()({"depth": f["depth"]})


class First(nn.Module):
    def forward(self, f):
        return next(iter(f.values()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_in_every_dtype(dtype, tolerance, default):
    """That of the logits, as of the joint head, and the number of modalities as exact, whatever the default dtype is."""
    heads = mrf.ModalityHeads(First(), {m: nn.Identity() for m in "abc"}).eval()
    logits = {m: torch.randn(4, 5, 3).to(dtype) for m in "abc"}
    p = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits[m].double().numpy() for m in "ab")]
    expected = np.log((p[0] + p[1]) / 2)
    two = {m: logits[m] for m in "ab"}
    present = torch.tensor([[True, True, False]]).expand(4, 3)
    torch.set_default_dtype(default)
    try:
        found = [heads(two), heads(two, present=present)]
    finally:
        torch.set_default_dtype(torch.float32)
    for x in found:
        assert x.dtype == dtype
        helpers.assert_close(x, expected, tolerance)


def test_heads_made_by_a_function():
    model = mrf.ModalityHeads(Concatenation(), lambda m: nn.Conv2d(4, 3, 1), ["rgb", "depth"])
    assert list(model.heads) == ["rgb", "depth"] and model.heads["rgb"] is not model.heads["depth"]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Conv2d(2, 4, 3, padding=1) for m in ("rgb", "depth")})
        self.heads = heads()

    def forward(self, inputs):
        return self.heads({m: self.encoders[m](x).relu() for m, x in inputs.items()})


def test_evaluate_missing_audit_and_capture():
    model = Network()
    data = [({m: torch.randn(4, 2, 8, 8) for m in ("rgb", "depth")}, torch.randint(3, (4, 8, 8))) for _ in range(2)]

    def accuracy(scores, labels):
        return (scores.argmax(1) == labels).double().mean()

    result = mrf.evaluate_missing(model, data, accuracy, drop=lambda m, x: None, progress=False)
    model.eval()
    with torch.no_grad():
        own = [(model.heads.heads["depth"](model.encoders["depth"](x["depth"]).relu()).argmax(1) == y) for x, y in data]
    assert result.scores[("depth",)] == pytest.approx(float(torch.cat(own).double().mean()))
    names = {"rgb": "encoders.rgb", "depth": "encoders.depth"}
    audit = mrf.audit(model, data, names, metric=accuracy, drop=lambda m, x: None, progress=False)
    assert audit.missing.scores == result.scores
    assert 0 < audit.share["rgb"].mean < 1
    with mrf.capture(model.train(), names) as captured:
        joint, alone = model(data[0][0])
    penalty = mrf.AttributionLoss()(joint, captured)
    (penalty + mrf.ModalityCrossEntropy()(alone, data[0][1], joint=joint)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_features_go_by_name(training):
    """The joint head, which may go by their order, gets them in the order of the heads."""
    model, f = heads(("rgb", "depth")).train(training), features(4)
    a, b = model(f), model(dict(reversed(f.items())))
    assert torch.equal(a.joint, b.joint) if training else torch.equal(a, b)


def test_gradients_do_not_see_what_is_absent():
    """NaN in the place of an absent modality, whose head a gradient would take times 0."""
    model, f = heads(("rgb", "depth")).eval(), features(4)
    present = torch.tensor([[True, False], [True, True], [False, True], [True, True]])
    holed = {m: torch.where(present[:, i].view(-1, 1, 1, 1), x, torch.nan).detach() for i, (m, x) in enumerate(f.items())}
    found = {}
    for fill, given in (("nan", holed), ("zeros", {m: x.nan_to_num(0) for m, x in holed.items()})):
        model.zero_grad()
        logits = model(given, present=present)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        found[fill] = [logits, *(p.grad.clone() for p in model.parameters())]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found["nan"], found["zeros"], strict=True))


def test_captured_features_stay_those_of_the_joint_pass():
    """each_alone runs the whole captured model again, and its parts in a run of their own."""
    encoders = nn.ModuleDict({m: nn.Conv2d(4, 4, 1) for m in ("rgb", "depth")})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders, self.head = encoders, Addition(nn.Conv2d(4, 3, 1))

        def forward(self, x):
            return self.head({m: self.encoders[m](v) for m, v in x.items()})

    model, x = Model(), features(4)
    with mrf.capture(model, {m: f"encoders.{m}" for m in x}) as captured:
        joint = model(x)
        before = {m: list(row) for m, row in captured.items()}
        alone = mrf.each_alone(model, x)
        assert captured == before
        with pytest.warns(UserWarning, match="ran outside of a forward pass"):
            encoders["rgb"](x["rgb"])
    mrf.AttributionLoss()(joint, captured).backward(inputs=list(model.parameters()))
    assert model.head[0].weight.grad.isfinite().all() and set(alone) == set(x)


@pytest.mark.parametrize("batched", [True, False])
def test_a_model_that_captures_in_its_forward_pass(batched):
    """As one that reads the features of a backbone which it cannot change; a capture around it still records nothing."""
    encoders = nn.ModuleDict({m: nn.Linear(4, 3) for m in ("rgb", "depth")})

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleDict({"encoders": encoders})
            self.backbone.forward = lambda x: [encoders[m](x[m]) for m in x]

        def forward(self, x):
            with mrf.capture(self.backbone, {m: f"encoders.{m}" for m in x}) as captured:
                self.backbone(x)
            return sum(captured[m][0] for m in x)

    model, x = Reads(), {m: torch.randn(5, 4) for m in encoders}
    with mrf.capture(model, {"rgb": "backbone.encoders.rgb"}) as around:
        model(x)
        before = list(around["rgb"])
        alone = mrf.each_alone(model, x, batched=batched)
        assert around["rgb"] == before
    for m, other in (("rgb", "depth"), ("depth", "rgb")):
        helpers.assert_close(alone[m], helpers.wide(encoders[m](x[m]) + encoders[other].bias), 1e-6)


def test_batch_norm_in_another_thread_goes_on_training():
    """A head that is a function is followed by a hook of the whole process."""
    other, own = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def head(f):
        thread = threading.Thread(target=lambda: other(torch.randn(4, 3)))
        thread.start()
        thread.join()
        return own(f["a"] + f["b"])

    mrf.each_alone(head, {m: torch.randn(4, 3) for m in "ab"})
    assert other.num_batches_tracked == 1 and own.num_batches_tracked == 0 and own.training and other.training


@pytest.mark.parametrize("batched", [True, False])
def test_a_head_that_writes_into_what_it_gets(batched):
    def head(f):
        return sum(x.add_(10 ** (i + 1)).flatten(1).sum(1, keepdim=True) for i, x in enumerate(f.values()))

    f = {m: torch.full((2, 1), float(i)) for i, m in enumerate("abc")}
    alone = mrf.each_alone(head, f, {m: torch.full((1, 1), 0.5) for m in f}, batched=batched)
    assert [x.flatten().tolist() for x in alone.values()] == [[1111.0] * 2, [1112.0] * 2, [1113.0] * 2]
    assert [x[0, 0].item() for x in f.values()] == [0, 1, 2]


class Pixels(nn.Module):
    def forward(self, f):
        return f["a"][:, :, None, None]


def own_logits(joint=None, **options):
    return mrf.ModalityHeads(joint or First(), {m: nn.Identity() for m in "ab"}, **options).eval()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mrf.ModalityHeads(nn.Identity(), {}), ValueError, "heads must be a mapping with at least one modality"),
        (lambda: mrf.ModalityHeads(nn.Identity(), {"a": 3}), TypeError, r"heads\['a'\] must be a module, got int"),
        (lambda: mrf.ModalityHeads(3, {"a": nn.Identity()}), TypeError, "joint must be a module, got int"),
        (
            lambda: mrf.ModalityHeads(nn.Identity(), 3),
            TypeError,
            "heads must be a mapping from modality to module, or a function",
        ),
        (lambda: mrf.ModalityHeads(nn.Identity(), lambda m: nn.Identity()), ValueError, "modalities must be the names"),
        (
            lambda: heads(("a",)).eval()({"a": 3}, present=torch.ones(2, 1, dtype=torch.bool)),
            TypeError,
            r"features\['a'\] must be a list or tuple, got int",
        ),
        (
            lambda: heads(("a", "b")).eval()(
                {"a": torch.ones(2, 4, 5, 6), "b": torch.ones(3, 4, 5, 6)}, present=torch.ones(2, 2) > 0
            ),
            ValueError,
            r"features\['b'\] must be of batch size 2 like the first, got 3",
        ),
        (
            lambda: mrf.ModalityHeads(nn.Identity(), lambda m: nn.Identity(), ["a", "a"]),
            ValueError,
            r"modalities must be different names, got \['a', 'a'\]",
        ),
        *(
            (
                lambda dim=dim: own_logits(channel_dim=dim)({"a": torch.ones(2, 3)}),
                ValueError,
                "channel_dim must be a dimension of",
            )
            for dim in (0, 2)
        ),
        (
            lambda: own_logits()({"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, present=torch.ones(2, 2) > 0),
            ValueError,
            r"the logits of 'b' must be of the shape \(2, 3\) of 'a', got \(2, 4\)",
        ),
        (
            lambda: own_logits(Pixels())({m: torch.ones(2, 2) for m in "ab"}, present=torch.ones(2, 2) > 0),
            ValueError,
            r"the joint logits must be of the shape \(2, 2\) of those of a modality, got \(2, 2, 1, 1\)",
        ),
        *(
            (lambda m=m: mrf.ModalityHeads(nn.Identity(), {m: nn.Identity()}), ValueError, f"heads must be names .* got {m!r}")
            for m in ("s1.vv", "values", "type", "", 1)
        ),
    ],
)
def test_errors_of_the_heads(call, error, message):
    with pytest.raises(error, match=f"ModalityHeads: {message}"):
        call()

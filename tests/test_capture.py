"""capture: the right tensors, reached by gradients; nothing is left behind."""

import weakref
from collections import namedtuple

import pytest
import torch
from capturing import SPEC, hooks, inputs, model_of, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import modreg_fast as mrf

Output = namedtuple("Output", "scores hidden")


def test_records_the_very_tensors():
    model = model_of()
    with mrf.capture(model, SPEC) as features:
        scores = model(inputs())
        assert list(features) == ["rgb", "depth"] and [len(x) for x in features.values()] == [2, 2]
        assert same(features, model.keep)
    assert hooks(model) == 0 and same(features, model.keep)  # still there after the block
    grads = torch.autograd.grad(scores.max(1).values.sum(), features["rgb"] + features["depth"])
    assert all(g.abs().sum() > 0 for g in grads)


def test_feeds_both_losses(backend):
    model = model_of()
    balance, steer = mrf.FunctionalEntropyLoss(backend=backend), mrf.AttributionLoss(backend=backend)
    with mrf.capture(model, SPEC) as features:
        scores = model(inputs())
        penalty = balance(features) + steer(scores, features)
    by_hand = dict(zip(SPEC, (model.keep[:2], model.keep[2:]), strict=True))
    assert penalty.item() == (balance(by_hand) + steer(scores, by_hand)).item()
    penalty.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n != "head.bias")


def test_tokens():
    """As they are for attribution; as maps, which fit a mask, for functional entropy."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth, self.head = nn.Linear(3, 6), nn.Linear(1, 6), nn.Linear(6, 5)

        def forward(self, x):
            tokens = [getattr(self, m)(v.flatten(2).mT) for m, v in x.items()]
            return self.head(sum(tokens).softmax(1).tanh())[:, 1:].mT.unflatten(2, (7, 9))

    model, x = Tokens(), {m: torch.randn(2, c, 8, 8) for m, c in (("rgb", 3), ("depth", 1))}
    mask = torch.rand(2, 21, 27) < 0.5
    with mrf.capture(model, {"rgb": "rgb", "depth": "depth"}) as features:
        scores = model(x)
        maps = {m: [x[:, 1:].mT.unflatten(2, (7, 9)) for x in scales] for m, scales in features.items()}
        small = mrf.functional.resize_mask(mask, (7, 9))
        penalty, details = mrf.FunctionalEntropyLoss(1.0)(maps, mask=mask, return_details=True)
        flat = torch.cat([torch.zeros(2, 1, dtype=torch.bool), small.flatten(1)], 1)
        _, same_details = mrf.FunctionalEntropyLoss(1.0, channel_dim=-1)(features, mask=flat, return_details=True)
        torch.testing.assert_close(details.information, same_details.information)
        (penalty + mrf.AttributionLoss(channel_dim=-1)(scores, features, mask=small)).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name != "head.bias")


def test_each_pass_starts_anew():
    model = model_of()
    with mrf.capture(model, SPEC) as features:
        assert features == {"rgb": [], "depth": []}
        model(inputs())
        first, kept = dict(features), model.keep
        model(inputs())
        assert same(features, model.keep) and same(first, kept) and first["rgb"][0] is not features["rgb"][0]


def test_gradient_accumulation_before_backward():
    """Two passes, then one backward pass through both."""
    model = model_of(checkpointed=True)
    with mrf.capture(model, SPEC) as features:
        first = model(inputs()).square().mean() + mrf.AttributionLoss()(model(inputs()), features)
        second = features["rgb"]
        first.backward()
        assert features["rgb"] is second and len(second) == 2


@pytest.mark.parametrize("where", ["pick", "forward", "block", "entry"])
def test_no_hook_left_after_exceptions(where):
    model, x = model_of(), inputs()
    spec = {**SPEC, "bad": "nothing"} if where == "entry" else SPEC
    spec = {"rgb": [("encoders.rgb.0", "wrong")]} if where == "pick" else spec
    with pytest.raises((ValueError, TypeError, RuntimeError)), mrf.capture(model, spec):  # noqa: PT012
        assert where != "entry"
        if where == "block":
            raise ValueError
        model({**x, "depth": x["depth"][:, :0]} if where == "forward" else x)
    assert hooks(model) == 0


def test_a_pass_after_a_failed_one():
    model, x = model_of(), inputs()
    with mrf.capture(model, SPEC) as features:
        with pytest.raises(RuntimeError):
            model({**x, "depth": x["depth"][:, :0]})
        assert features == {"rgb": [], "depth": []}  # nothing stale
        model(x)
        assert same(features, model.keep)


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_records_once(whole):
    """The recomputation in the backward pass runs the hooks again; it changes nothing, and gradients are those without it."""
    plain, x = model_of(), inputs()
    model = model_of(checkpointed=not whole)
    results = []
    for net in (plain, model):
        with mrf.capture(net, SPEC) as features:
            scores = checkpoint(net, x, use_reentrant=False) if whole and net is model else net(x)
            recorded = {m: list(row) for m, row in features.items()}
            grads = torch.autograd.grad(scores.max(1).values.sum(), sum(features.values(), []), create_graph=True)
            penalty = mrf.FunctionalEntropyLoss(1.0)(features) + mrf.AttributionLoss()(scores, features)
            penalty.backward()
            assert recorded == features and all(a is b for m in SPEC for a, b in zip(recorded[m], features[m], strict=True))
        results.append([*grads, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert model.runs > plain.runs  # it did recompute
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_recomputed_tensors_are_not_held():
    """Or checkpointing would save nothing."""
    model = model_of(checkpointed=True)
    made = []
    handle = model.encoders["rgb"][0].register_forward_hook(lambda _module, _inputs, output: made.append(weakref.ref(output)))
    with mrf.capture(model, SPEC) as features:
        model(inputs()).sum().backward()
        model.keep = []
        assert [x() is not None for x in made] == [True, False] and made[0]() is features["rgb"][0]
    handle.remove()


def test_checkpointing_of_a_frozen_encoder():
    """The recomputation must mark the same tensors, or checkpointing complains about another number of them."""
    model = model_of(checkpointed=True)
    model.encoders.requires_grad_(False)
    with mrf.capture(model, SPEC) as features:
        scores = model(inputs())
        grads = torch.autograd.grad(scores.sum(), [row[0] for row in features.values()])
    assert all(g.abs().sum() > 0 for g in grads)


def test_reentrant_checkpointing_is_refused():
    x = {m: v.requires_grad_() for m, v in inputs().items()}
    model = model_of(checkpointed=True, reentrant=True)
    with pytest.raises(RuntimeError, match="ran without gradients.*use_reentrant=False"), mrf.capture(model, SPEC):
        model(x)


def test_autocast():
    model = model_of()
    with mrf.capture(model, SPEC) as features, torch.autocast("cpu", torch.bfloat16):
        scores = model(inputs())
        assert {x.dtype for row in features.values() for x in row} == {torch.bfloat16}
    (mrf.FunctionalEntropyLoss()(features) + mrf.AttributionLoss()(scores.float(), features)).backward()
    assert model.encoders["rgb"][0].weight.grad.abs().sum() > 0


def test_frozen_encoder_takes_a_gradient():
    model = model_of()
    model.encoders.requires_grad_(False)
    with mrf.capture(model, {"rgb": "encoders.rgb.1", "depth": "encoders.depth.1"}) as features:
        scores = model(inputs())
        mrf.AttributionLoss()(scores, features).backward(inputs=list(model.head.parameters()))
        assert model.head.weight.grad.abs().sum() > 0
        with torch.no_grad():
            model(inputs())
        assert not features["rgb"][0].requires_grad
        with torch.inference_mode():
            model(inputs())
    assert not features["rgb"][0].requires_grad


def test_output_changed_in_place():
    """The tensor is what it became, and so is its gradient."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    x = torch.randn(5, 3)
    with mrf.capture(model, {"a": "0"}) as features:
        scores = model(x)
        (g,) = torch.autograd.grad(scores.sum(), features["a"])
    torch.testing.assert_close(features["a"][0], (x @ model[0].weight.T + model[0].bias).relu())
    torch.testing.assert_close(g, model[2].weight.expand(5, 4))


def test_eval_without_gradients_is_no_error():
    model = model_of()
    with mrf.capture(model, SPEC) as features, torch.no_grad():
        model(inputs())
    assert [len(row) for row in features.values()] == [2, 2]


class Mixed(nn.Module):
    """Modules that return tuples, dicts and named tuples; one that runs twice."""

    class Many(nn.Module):
        def forward(self, x):
            hidden = (x * 1, x * 2, x * 3)
            return {"hidden": hidden, "last": Output(x * 4, hidden), "items": (x * 5,), "length": 3}

    class One(nn.Module):
        def forward(self, x):
            return (x * 7,)

    class Pair(nn.Module):
        def forward(self, x):
            return x * 8, x * 9

    def __init__(self):
        super().__init__()
        self.many, self.one, self.pair, self.shared, self.unused = self.Many(), self.One(), self.Pair(), nn.Tanh(), nn.Tanh()

    def forward(self, x):
        self.many(x), self.one(x), self.pair(x)
        return self.shared(self.shared(x))


@pytest.mark.parametrize(
    ("entry", "factors"),
    [
        (("many", "hidden", 1), [2]),
        (("many", "hidden"), [1, 2, 3]),
        (("many", "hidden", slice(1, None)), [2, 3]),
        (("many", "last", "scores"), [4]),
        (("many", "last", "hidden", -1), [3]),
        (("many", "items"), [5]),  # a key, not the method of dict
        ("one", [7]),
        (("pair", 1), [9]),
        (("pair", slice(None)), [8, 9]),
        ([("pair", 1), "one", ("pair", 0)], [9, 7, 8]),
        (["one", "on?"], [7]),
    ],
)
def test_picks(entry, factors):
    model, x = Mixed(), torch.ones(1, 2)
    with mrf.capture(model, {"a": entry}) as features:
        model(x)
    assert [x[0, 0].item() for x in features["a"]] == factors


def test_shared_module_gives_every_run():
    model, x = Mixed(), torch.rand(2, 3)
    with mrf.capture(model, {"both": "shared"}) as features:
        model(x)
    torch.testing.assert_close(features["both"], [x.tanh(), x.tanh().tanh()])


def test_the_model_itself_and_its_order():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    with mrf.capture(model, {"out": "", "all": "*", "turned": ["2", "0"]} | {"all": "1"}) as features:
        scores = model(torch.rand(2, 2))
    assert features["out"][0] is scores and [x.shape[1] for x in features["turned"]] == [4, 3]


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ({"rgb": "encoder.rgb.0"}, ValueError, "'encoder.rgb.0', which matches none; close: .*encoders.rgb.0"),
        ({"rgb": "encoders.*.*.*"}, ValueError, "matches none; close: .*encoders.rgb.0"),
        ({"rgb": "zzz"}, ValueError, "'zzz', which matches none; close: encoders, head"),
        ({"rgb": []}, ValueError, r"modules\['rgb'\] must be non-empty"),
        ({"rgb": [7]}, TypeError, r"modules\['rgb'\] must be module names, or tuples .* got 7"),
        ({"rgb": [()]}, TypeError, r"got \(\)"),
        ({"rgb": [("head", 1.5)]}, TypeError, r"got \('head', 1.5\)"),
        ({"rgb": [("head", True)]}, TypeError, r"got \('head', True\)"),
        ({"rgb": 7}, TypeError, r"modules\['rgb'\] must be a list or tuple, got int"),
        ({}, ValueError, "at least one modality"),
        (["head"], TypeError, "modules must be a mapping from modality to module names, got list"),
        (
            {"a": "head", "b": ["head"]},
            ValueError,
            r"modules\['b'\] .* got 'head', as modules\['a'\]; capture a shared module once",
        ),
    ],
)
def test_errors_on_entry(modules, error, message):
    with pytest.raises(error, match=f"capture: .*{message}"), mrf.capture(model_of(), modules):
        pass


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pair", r"module 'pair' returned a tuple of 2: Tensor, Tensor, pick tensors .* such as \('pair', 0\), or slice\(None\)"),
        ("many", "returned a dict with 'hidden', 'last', 'items', 'length', pick"),
        (("many", "length"), r"returned a int, pick"),
        (("many", "missing"), "module 'many' has no 'missing': it is a dict with 'hidden'"),
        (("pair", 2), "module 'pair' has no 2: it is a tuple of 2"),
        (("pair", "one"), r"module 'pair' has no 'one': .*several modules go in a list"),
        (("many", "last", "nothing"), "has no 'nothing': it is a Output of 2"),
    ],
)
def test_errors_of_picks(entry, message):
    model = Mixed()
    with pytest.raises(TypeError, match=f"capture: .*{message}"), mrf.capture(model, {"a": entry}):
        model(torch.ones(1, 2))


def test_other_errors():
    model = Mixed()
    with pytest.raises(RuntimeError, match=r"module 'unused' \(for 'a'\) did not run"), mrf.capture(model, {"a": "unused"}):
        model(torch.ones(1, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"), mrf.capture(lambda x: x, {"a": "b"}):
        pass
    with (
        pytest.raises(ValueError, match="DataParallel, which runs in threads"),
        mrf.capture(nn.DataParallel(Mixed()), {"a": "one"}),
    ):
        pass

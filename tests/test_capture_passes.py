"""capture acts on its own modules in passes of its own model alone: copies, parts, what wraps it, nested passes, tensors of the user."""

import contextlib
import copy
import io
import pickle
import threading
import weakref
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from capturing import SPEC, Model, hooks, inputs, model_of, same
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import modreg_fast as mrf


class Around(nn.Module):
    """As DDP or a LightningModule: the model is an attribute."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "shallow": copy.copy,
    "save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "averaged": lambda model: AveragedModel(model).module,
}


def watch(*_):
    """A hook of the user, which copies keep."""


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", [False, True], ids=["before_a_pass", "after_a_pass"])
def test_copies_have_no_hooks(how, first):
    model, x = model_of(), inputs()
    model.encoders["rgb"][0].register_forward_hook(watch)
    with mrf.capture(model, SPEC) as features:
        if first:
            model(x)
            model.keep = []
        other = COPIES[how](model)
        if how == "shallow":  # it shares its parts
            return
        assert hooks(other) == 1 and not any("__getstate__" in vars(m) for m in other.modules())
        model(x)
        kept = model.keep
        with torch.no_grad():
            other({m: y + 1 for m, y in x.items()})
        assert same(features, kept)
        mrf.FunctionalEntropyLoss(1.0)(features).backward()
        assert model.encoders["rgb"][0].weight.grad.abs().sum() > 0
        model.keep = []
    assert hooks(model) == 1 and not any("__getstate__" in vars(m) for m in model.modules())
    assert type(COPIES[how](model)) is Model


@pytest.mark.parametrize("part", ["encoders", "encoders.rgb", "encoders.rgb.0"])
def test_copy_of_a_part(part):
    model, x = model_of(), inputs()
    with mrf.capture(model, SPEC) as features:
        other = copy.deepcopy(model.get_submodule(part))
        assert hooks(other) == 0
        model(x)
        before = {m: list(row) for m, row in features.items()}
        (other["rgb"] if part == "encoders" else other)(x["rgb"])
        assert before == features


def test_a_state_of_its_own_is_kept():
    """A class that says what is pickled of it, as DistributedDataParallel does."""

    class Own(nn.Linear):
        def __getstate__(self):
            return {**self.__dict__, "secret": None, "asked": True}

    model = nn.Sequential(Own(2, 2), nn.Tanh())
    model[0].secret = 7
    with mrf.capture(model, {"a": "0"}), mrf.capture(model, {"b": ["0", ""]}):
        other = copy.deepcopy(model)
    assert hooks(other) == hooks(model) == 0 and other[0].asked and other[0].secret is None and model[0].secret == 7


def test_nested_captures_end_in_any_order():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(3, 2)
    first, second = mrf.capture(model, {"a": "0"}), mrf.capture(model, {"a": ["0", "1"]})
    a, b = first.__enter__(), second.__enter__()
    model(x)
    first.__exit__(None, None, None)
    assert a["a"][0] is b["a"][0] and len(b["a"]) == 2 and hooks(copy.deepcopy(model)) == 0
    model(x)
    assert a["a"][0] is not b["a"][0]
    second.__exit__(None, None, None)
    assert hooks(model) == 0 and "__getstate__" not in vars(model[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_validation_of_what_is_wrapped(frozen):
    """The unwrapped model, or an encoder alone, without gradients: nothing is kept, nothing is complained about, nothing changes."""
    model, x = model_of(), inputs()
    model.encoders.requires_grad_(not frozen)
    wrapped = Around(model)
    spec = {m: [f"inner.{name}" for name in names] for m, names in SPEC.items()}
    made = []
    with mrf.capture(wrapped, spec) as features:
        with torch.no_grad():
            model(x)
        assert features == {"rgb": [], "depth": []}
        wrapped(x)
        before, kept = {m: list(row) for m, row in features.items()}, model.keep
        handle = model.encoders["rgb"][0].register_forward_hook(lambda _m, _i, output: made.append(weakref.ref(output)))
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                model(x)
                model.encoders["rgb"](x["rgb"])
                assert not model.encoders["rgb"][0](x["rgb"]).requires_grad
        handle.remove()
        model.keep = []
        assert before == features and same(features, kept) and not any(reference() is not None for reference in made)
        assert mrf.FunctionalEntropyLoss(1.0)(features).requires_grad
        with pytest.raises(TypeError):
            model.encoders["rgb"][0](None)


def test_no_pass_no_gradient():
    """A frozen encoder that runs alone returns what it would without capture."""
    model, x = model_of(), inputs()
    model.encoders.requires_grad_(False)
    with mrf.capture(model, SPEC):
        assert not model.encoders["rgb"](x["rgb"]).requires_grad
        y = checkpoint(model.encoders["rgb"], x["rgb"].requires_grad_(), use_reentrant=False)
        model(x)
        y.sum().backward()


def test_runs_outside_of_a_pass_are_told_once():
    model, x = model_of(), inputs()
    with mrf.capture(model, SPEC) as features:
        scores = model(x)
        with pytest.warns(
            UserWarning, match="module 'encoders.rgb.0' ran outside of a forward pass of the captured model"
        ) as told:
            for _ in range(3):
                model.forward(x)  # past __call__, as model.encode_image(x) is
        assert len(told) == 1 and len(features["rgb"]) == 2
        torch.autograd.grad(scores.sum(), features["rgb"])


def test_each_alone_in_another_thread_hides_no_pass():
    model, x = model_of(), inputs()
    entered, done = threading.Event(), threading.Event()

    def head(f):
        entered.set()
        done.wait(10)
        return f["a"] + f["b"]

    with mrf.capture(model, SPEC) as features, ThreadPoolExecutor(1) as pool:
        model(x)
        before = features["rgb"]
        other = pool.submit(mrf.each_alone, head, {m: torch.randn(2, 3) for m in "ab"})
        entered.wait(10)
        scores = model(x)
        done.set()
        other.result(10)
        assert features["rgb"][0] is not before[0]
        torch.autograd.grad(scores.sum(), features["rgb"])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_passes_in_another_thread_are_not_recorded(with_gradients):
    """Such as of a server that evaluates while the model trains; also where it comes in the middle of a pass."""
    model, x = model_of(), inputs()

    def evaluate():
        with torch.set_grad_enabled(with_gradients):
            model(x)

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            pool.submit(evaluate).result(10)

    told = pytest.warns(UserWarning, match="in the thread that entered") if with_gradients else contextlib.nullcontext()
    with mrf.capture(model, SPEC) as features, ThreadPoolExecutor(1) as pool, told:
        model.encoders["rgb"][0].register_forward_hook(meanwhile)
        scores = model(x)
        recorded = {m: list(row) for m, row in features.items()}
        pool.submit(evaluate).result(10)
    assert features == recorded and {len(row) for row in features.values()} == {2}
    torch.autograd.grad(scores.sum(), [*features["rgb"], *features["depth"]])


def test_nothing_piles_up():
    model, x, made = model_of(), inputs(), []
    model.encoders["rgb"][0].register_forward_hook(lambda _m, _i, output: made.append(weakref.ref(output)))
    with mrf.capture(Around(model), {"a": ["inner.encoders.rgb.*"]}), pytest.warns(UserWarning, match="ran outside"):
        for i in range(20):
            with torch.set_grad_enabled(i % 2 == 0):
                model(x)
            model.keep = []
        assert len(made) == 20 and not any(reference() is not None for reference in made)


class Recursive(nn.Module):
    """Runs itself at half the resolution, as multi-scale inference does."""

    def __init__(self):
        super().__init__()
        self.conv, self.fails = nn.Conv2d(1, 1, 1), False

    def forward(self, x):
        y = self.conv(x)
        if self.fails:
            raise ValueError
        return y if len(x[0, 0]) < 4 else y + self(x[..., ::2, ::2]).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_model_that_calls_itself():
    model = Recursive()
    with mrf.capture(model, {"a": "conv"}) as features:
        for _ in range(2):
            model(torch.ones(1, 1, 8, 8))
            assert [len(x[0, 0]) for x in features["a"]] == [8, 4, 2]
        model.fails = True
        for _ in range(3):
            with pytest.raises(ValueError):
                model(torch.ones(1, 1, 8, 8))
            assert features == {"a": []}
        model.fails = False
        model(torch.ones(1, 1, 4, 4))
        assert [len(x[0, 0]) for x in features["a"]] == [4, 2]


def test_an_interrupted_pass_leaves_nothing():
    """KeyboardInterrupt is no Exception: PyTorch runs no hook at its end."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    stop = model[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with mrf.capture(model, {"a": "0"}) as features:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                model(torch.ones(1, 2))
        stop.remove()
        scores = model(torch.ones(1, 2))
        assert len(features["a"]) == 1 and torch.autograd.grad(scores.sum(), features["a"])[0].sum() == 2


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    more: tuple


class Mapped(dict):
    pass


STRUCTURES = {
    "tensor": (lambda x: x, ""),
    "tuple": (lambda x: (x, None), ("", 0)),
    "list": (lambda x: [x, x], ("", slice(None))),
    "named": (lambda x: Pair(x, 1), ("", "x")),
    "dict": (lambda x: {"x": {"y": x}}, ("", "x", "y")),
    "mapping": (lambda x: Mapped(x=(x, x)), ("", "x", 1)),
    "dataclass": (lambda x: Record(x, (x, 2)), ("", "more", 0)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["input", "kept", "buffer", "parameter"])
def test_the_users_tensors_do_not_start_to_require_grad(structure, kind):
    """Embeddings that pass through nn.Identity, a table that a module returns: the model goes on with another tensor of its memory."""
    build, entry = STRUCTURES[structure]

    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = [torch.randn(3, 4)]
            self.register_buffer("buffer", torch.randn(3, 4))
            self.parameter = nn.Parameter(torch.randn(3, 4), requires_grad=False)

        def forward(self, x):
            self.returned = build({"input": x, "kept": self.kept[0]}.get(kind, getattr(self, kind, None)))
            return self.returned

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = Embeddings(), nn.Linear(4, 2)

        def forward(self, x):
            self.received = self.part(x)
            x = self.received
            for step in entry[1:] or ():
                x = getattr(x, step) if isinstance(step, str) and not isinstance(x, dict) else x[step]
            return self.head((x[0] if isinstance(x, list) else x).tanh())

    net, x = Net(), torch.randn(3, 4)
    with mrf.capture(net, {"a": ("part", *entry[1:]) if entry else "part"}) as features:
        for _ in range(2):
            scores = net(x)
            (g,) = torch.autograd.grad(scores.sum(), features["a"][0])
            assert g.abs().sum() > 0
    own = [x, net.part.kept[0], net.part.buffer, net.part.parameter]
    assert not any(y.requires_grad for y in own) and all(y.grad is None for y in own)
    assert structure == "tensor" or type(net.received) is type(net.part.returned)
    assert features["a"][0].data_ptr() in [y.data_ptr() for y in own]


def test_a_container_of_no_known_kind():
    class Box:
        def __init__(self, x):
            self.tensor = x

    class Boxed(nn.Linear):
        def forward(self, x):
            return Box(super().forward(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.boxed = Boxed(2, 2).requires_grad_(False)

        def forward(self, x):
            return self.boxed(x).tensor * 2

    net = Net()
    with mrf.capture(net, {"a": ("boxed", "tensor")}) as features:
        scores = net(torch.ones(1, 2))
    assert torch.autograd.grad(scores.sum(), features["a"])[0].sum() == 4


@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
def test_frozen_encoder_that_switches_gradients_off(off):
    class Frozen(nn.Conv2d):
        @off()
        def forward(self, x):
            return super().forward(x)

    model, x = model_of(), inputs()
    model.encoders["rgb"][0] = Frozen(3, 4, 3, padding=1).requires_grad_(False)
    expected = model(x)
    with mrf.capture(model, {"rgb": "encoders.rgb.0", "depth": "encoders.depth.0"}) as features:
        scores = model(x)
        (mrf.AttributionLoss()(scores, features) + mrf.FunctionalEntropyLoss(1.0)(features)).backward()
    torch.testing.assert_close(scores, expected)
    assert features["rgb"][0].grad.abs().sum() > 0 and model.head.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_frozen_encoder_under_transforms():
    """It gets no gradient there, and the tangent passes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    x, v = torch.randn(5, 3), torch.randn(5, 3)
    expected = torch.func.jvp(model, (x,), (v,))[1]
    with mrf.capture(model, {"a": "0"}) as features:
        torch.testing.assert_close(torch.func.jvp(model, (x,), (v,))[1], expected)
        assert torch.equal(torch.func.vmap(model)(x), model(x)) and len(features["a"]) == 1
        with torch.autograd.forward_ad.dual_level():
            scores = model(torch.autograd.forward_ad.make_dual(x, v))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(scores).tangent, expected)


def test_frozen_encoder_whose_output_is_changed_in_place():
    """The recorded tensor is what it became, and the model's own result stays."""
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = model(x)
    with mrf.capture(model, {"a": "0"}) as features:
        scores = model(x)
    assert torch.equal(scores, expected) and torch.equal(features["a"][0], model[0](x).relu())
    (g,) = torch.autograd.grad(scores.sum(), features["a"], retain_graph=True)
    torch.testing.assert_close(g, model[2].weight.sum(0).expand(5, 4))
    mrf.AttributionLoss()(scores, features).backward()
    assert model[2].weight.grad.isfinite().all()


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        self.keep = [self.encoder(y) for y in x.values()]
        return self.head(sum(y.relu() for y in self.keep))


def test_one_run_of_a_shared_encoder():
    net, x = Siamese(), {m: torch.randn(2, 3, 4, 4) for m in ("rgb", "event")}
    with mrf.capture(net, {"rgb": "encoder#0", "event": ["encoder#1"]}) as features:
        scores = net(x)
        assert same(features, net.keep)
        steer = mrf.AttributionLoss()
        assert steer(scores, features) == steer(scores, dict(zip(x, net.keep, strict=True)))
    with (
        pytest.raises(RuntimeError, match=r"'encoder#2' \(for 'event'\) ran 2 times only"),
        mrf.capture(net, {"rgb": "encoder#0", "event": "encoder#2"}),
    ):
        net(x)
    for spec in ({"a": "encoder", "b": "encoder#1"}, {"a": ["encoder#1", "encoder"]}, {"a": "encoder#1", "b": "encoder#1"}):
        with pytest.raises(ValueError, match="outputs of its own.*'encoder#0', 'encoder#1'"), mrf.capture(net, spec):
            pass
    net.add_module("a#1", nn.Identity())  # a name of its own
    with pytest.raises(RuntimeError, match="'a#1' .* did not run"), mrf.capture(net, {"a": "a#1"}):
        net(x)


class Returns(nn.Module):
    def __init__(self, build):
        super().__init__()
        self.linear, self.build = nn.Linear(2, 2), build

    def forward(self, x):
        return self.build(self.linear(x))


class Rows:
    """As detectron2's Instances: an index picks a sample."""

    def __init__(self, x):
        self.x = x

    def __getitem__(self, i):
        return self.x[i]


@pytest.mark.parametrize("step", [0, -1, slice(None), "T", "mT"])
def test_nothing_is_picked_out_of_a_tensor(step):
    model = nn.Sequential(Returns(lambda x: x))
    with pytest.raises(TypeError, match="'0' returned a tensor where .* indices are those of tuples and lists"):
        with mrf.capture(model, {"a": ("0", step)}):
            model(torch.ones(3, 2))
    model = nn.Sequential(Returns(lambda x: {"y": (x, None)}))
    with pytest.raises(TypeError, match="a tensor where"), mrf.capture(model, {"a": ("0", "y", 0, step)}):
        model(torch.ones(3, 2))


@pytest.mark.parametrize("step", [0, slice(0, 1)])
def test_indices_are_those_of_sequences_and_mappings(step):
    model = nn.Sequential(Returns(Rows))
    with pytest.raises(TypeError, match="'0' returned a Rows, of which .* is no item"), mrf.capture(model, {"a": ("0", step)}):
        model(torch.ones(3, 2))
    model = nn.Sequential(Returns(lambda x: {0: x}))
    with mrf.capture(model, {"a": ("0", 0)}) as features:
        model(torch.ones(3, 2))
    assert features["a"][0].shape == (3, 2)

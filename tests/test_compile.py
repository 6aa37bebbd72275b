"""The custom ops under torch.library.opcheck, and equal values and gradients under torch.compile(fullgraph=True)."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS

import modreg_fast as mrf
from modreg_fast.functional import gradient_statistics, softmax_fisher_information

# The compiler's own: a deprecated call in Inductor, and a look at tensors that a graph break made inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
PRESENT = torch.tensor([[True, False], [True, True]])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- opcheck ----

# All of opcheck for the first set of each op; for the others without its last test (dynamic shapes), which takes seconds.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL = (*QUICK, "test_aot_dispatch_dynamic")
OP_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.mT.contiguous().mT,
    "batch_inside": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "stepped": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def op_features(layout="contiguous", dtype=torch.float32, count=2, shapes=((2, 5, 6),)):
    return [OP_LAYOUTS[layout](torch.randn(shape).to(dtype)).requires_grad_() for _ in range(count) for shape in shapes]


def fisher_sets(backend):
    """Argument sets of the forward op."""
    mask, seed = torch.rand(2, 6) < 0.6, torch.tensor(3)
    plain = ([], None, [0.0, 0.0], 1, None, False, 1e-8, 1, backend)
    yield op_features(), *plain
    for layout in list(OP_LAYOUTS)[1:]:
        yield op_features(layout), *plain
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield op_features(dtype=dtype), *plain
    yield op_features(shapes=((2, 5, 6), (2, 3, 1))), [mask, mask[:, :1]], PRESENT, [0.5, 0.0], 2, seed, True, 1e-3, 1, backend


def backward_set(arguments):
    """Arguments of the backward op for those of the forward op; its result is differentiable by the upstream gradient as well."""
    features, masks, _, sigma = arguments[:4]
    scales = len(features) // len(sigma)
    counts = torch.stack(
        [torch.full((2,), x.shape[2]) if not masks else masks[s].sum(1) for s, x in enumerate(features[:scales])]
    )
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return torch.randn(len(sigma), scales, 2, dtype=dtype, requires_grad=True), counts, *arguments


def statistics_sets(backend):
    def tensors(layout="contiguous", dtype=torch.float32):
        g, e = (op_features(layout, dtype, 1, ((2, 5, 6), (2, 3, 1))) for _ in range(2))
        return g, e, [torch.rand(2, n).add(0.1).to(dtype).requires_grad_() for n in (6, 1)]

    masks = [torch.rand(2, 6) < 0.6, torch.tensor([[True], [False]])]
    yield *tensors(), masks, 1e-8, True, 1, backend
    for layout in list(OP_LAYOUTS)[1:]:
        yield *tensors(layout), [], 1e-8, True, 1, backend
    for dtype in (torch.float64, torch.bfloat16):
        yield *tensors(dtype=dtype), masks, 1e-8, False, 1, backend
    g, e, f = tensors()
    yield g, e, [], [], 1e-8, True, 1, backend
    yield g, [], f, masks, 1e-3, False, 1, backend


def statistics_backward_set(arguments):
    fisher, attribution, fisher_maps, attribution_maps = torch.ops.modreg_fast.gradient_statistics(*arguments)
    upstream = [torch.randn_like(x).requires_grad_() for x in (fisher, attribution)]
    maps = [[torch.randn_like(x) for x in y] for y in (fisher_maps, attribution_maps)]
    return *upstream, *maps, attribution.detach(), *arguments


OPS = {
    "softmax_fisher": (fisher_sets, lambda x: x),
    "softmax_fisher_backward": (fisher_sets, backward_set),
    "gradient_statistics": (statistics_sets, lambda x: x),
    "gradient_statistics_backward": (statistics_sets, statistics_backward_set),
}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op):
    sets, of = OPS[op]
    for i, arguments in enumerate(sets(backend)):
        torch.library.opcheck(getattr(torch.ops.modreg_fast, op).default, of(arguments), test_utils=ALL if i == 0 else QUICK)


# ---- torch.compile ----


def equal_to_eager(function, inputs, compiler="aot_eager", tolerance=1e-6):
    """Values and gradients, from random upstream gradients, of a function of tensors."""
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = []
    for call in (function, compiled):
        torch.manual_seed(5)  # of the noise
        outputs = call(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.manual_seed(6)
        results.append((outputs, torch.autograd.grad(outputs, inputs, [torch.randn_like(x) for x in outputs])))
    for eager, other in zip(*results, strict=True):
        for a, b in zip(eager, other, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            helpers.assert_close(b, a, tolerance)


def images(layout="contiguous", count=2, dtype=torch.float32):
    return [LAYOUTS[layout](torch.randn(2, 5, 4, 6).to(dtype)).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize(
    "compiler, layout",
    [("aot_eager", name) for name in ("contiguous", "channels_last", "batch_inside", "window", "expanded_batch")]
    + [("inductor", "channels_last")],
)
def test_information(backend, layout, compiler):
    """With other operations around the op, so that the compiler relies on the strides it was promised."""

    def function(x, y):
        return softmax_fisher_information([[x * 2], [y + x]], backend=backend).square()

    equal_to_eager(function, images(layout), compiler)


def test_information_options(backend):
    mask = torch.rand(2, 8, 12) < 0.6

    def function(*x):
        return softmax_fisher_information(
            [[x[0], x[1]], [x[2], x[3]]],
            mask=mask,
            present=PRESENT,
            sigma=[0.5, 0.1],
            samples=2,
            seed=7,
            detach_reference=True,
            backend=backend,
        )

    equal_to_eager(
        function, [torch.randn(2, c, *n, requires_grad=True) for _ in range(2) for c, n in ((5, (8, 12)), (3, (4, 6)))]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_information_dtypes(backend, dtype):
    equal_to_eager(lambda x, y: softmax_fisher_information([[x], [y]], backend=backend), images(dtype=dtype))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics(backend, maps, layout):
    mask = torch.rand(2, 4, 6) < 0.6

    def function(g, e, f):
        out = gradient_statistics([g * 2], [e + 1], [f.square()], mask=mask, maps=maps, backend=backend)
        return [out.fisher, out.attribution, *(out.fisher_maps or []), *(out.attribution_maps or [])]

    equal_to_eager(function, [*images(layout), torch.rand(2, 4, 6).add(0.1).requires_grad_()])


@pytest.mark.parametrize("objective", ["inverse", "norm", "log"])
def test_loss(backend, objective):
    loss = mrf.FunctionalEntropyLoss(0.5, objective=objective, scale_weights=[1.0, 0.5], sigma=0.3, samples=2, backend=backend)
    mask = torch.rand(2, 4, 6) < 0.6

    def function(*x):
        return loss({"a": x[:2], "b": x[2:]}, mask=mask, present=PRESENT)

    equal_to_eager(function, [torch.randn(2, 5, 4, 6).requires_grad_() for _ in range(4)])


def test_loss_in_inductor(backend):
    """Inside a model: convolutions, the task loss and the penalty in one graph; only the gradients of parameters are compared."""
    first, second = (torch.nn.Conv2d(3, 6, 3, padding=1) for _ in range(2))
    loss, x, labels = mrf.FunctionalEntropyLoss(1e-2, backend=backend), torch.randn(2, 3, 8, 8), torch.randint(6, (2, 8, 8))
    labels[0, :4] = 255

    def step(x, labels):
        features = {"rgb": [first(x)], "depth": [second(x).relu()]}
        task = F.cross_entropy(features["rgb"][0] + features["depth"][0], labels, ignore_index=255)
        return task + loss(features, mask=labels != 255)

    parameters = [*first.parameters(), *second.parameters()]
    eager = step(x, labels)
    compiled = torch.compile(step, fullgraph=True)(x, labels)
    helpers.assert_close(compiled, eager, 1e-5)
    expected = torch.autograd.grad(eager, parameters)
    helpers.assert_close(list(torch.autograd.grad(compiled, parameters)), list(expected), 1e-4)


def test_noise_in_inductor(backend):
    """Its generator draws other seeds than eager's: each call differs, and the mean is that of eager."""
    features = {m: [torch.randn(2, 8, 16, 16)] for m in "ab"}
    loss = mrf.FunctionalEntropyLoss(1.0, sigma=1.0, samples=4, backend=backend)
    compiled = torch.compile(loss, fullgraph=True)
    ours, eager = ([call(features).item() for _ in range(6)] for call in (compiled, loss))
    assert len(set(ours)) == 6
    assert sum(ours) / 6 == pytest.approx(sum(eager) / 6, rel=0.02)


def test_dynamic_shapes(backend):
    """One compiled function for several sizes; every one right."""

    def function(x, y):
        return softmax_fisher_information([[x], [y]], backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 4, 6), (3, 5, 8, 7), (2, 9, 5, 5)):
        x = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        upstream = torch.randn(2, 1, shape[0])
        eager, other = function(*x), compiled(*x)
        helpers.assert_close(other, eager, 1e-6)
        helpers.assert_close(torch.autograd.grad(other, x, upstream), torch.autograd.grad(eager, x, upstream), 1e-6)


class Concatenation(torch.nn.Conv2d):
    def forward(self, features):
        return super().forward(torch.cat([*features.values()], 1))


def calls_elsewhere():
    """Name -> function of two tensors (2, 5, 4, 6), on whatever device is the default."""
    mask, present = torch.ones(2, 7, 9, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    target = torch.zeros(2, 4, 6, dtype=torch.uint8)
    balance, noisy = mrf.FunctionalEntropyLoss(objective="norm", scale_weights=[0.5]), mrf.FunctionalEntropyLoss(sigma=0.1)
    entropy = mrf.ModalityCrossEntropy(information_weight=0.1, class_weight=torch.ones(5))
    heads = mrf.ModalityHeads(Concatenation(10, 5, 1), {m: torch.nn.Conv2d(5, 5, 1) for m in "ab"}).eval()
    return {
        "feature_term": lambda a, b: balance({"a": [a], "b": [b]}, mask=mask, present=present, return_details=True)[0],
        "noise": lambda a, b: noisy({"a": [a], "b": [b]}),
        "statistics": lambda a, b: gradient_statistics([a], [b], [a[:, 0].abs()], mask=mask).fisher.sum(),
        "cross_entropy": lambda a, b: entropy({"a": a, "b": b}, target, joint=a + b, present=present, return_details=True)[0],
        "heads": lambda a, b: heads({"a": a, "b": b}, present=present).sum(),
        "one_head": lambda a, b: heads({"a": a * b}).sum(),
    }


@pytest.mark.parametrize("name", ["feature_term", "noise", "statistics", "cross_entropy", "heads", "one_head"])
def test_one_graph_on_a_device_other_than_the_cpu(name):
    """Where targets are asserted on the device and no number comes from the host; "meta" stands for a GPU."""
    with torch.device("meta"):
        function, inputs = calls_elsewhere()[name], [torch.randn(2, 5, 4, 6, requires_grad=True) for _ in range(2)]
    torch.compile(function, backend="eager", fullgraph=True)(*inputs).backward()
    assert inputs[0].grad.shape == inputs[0].shape


def test_use_backend_inside_and_around(backend):
    """A changed backend is seen by a function that was compiled before (the op's argument is the proof)."""
    seen = []

    def compiler(graph, inputs):
        seen.extend(a for node in graph.graph.nodes for a in node.args if isinstance(a, str) and a in mrf.backends())
        return graph.forward

    def inside(x, y):
        with mrf.use_backend(backend):
            return softmax_fisher_information([[x], [y]])

    def around(x, y):
        return softmax_fisher_information([[x], [y]])

    x = images()
    helpers.assert_close(torch.compile(inside, fullgraph=True, backend=compiler)(*x), inside(*x), 1e-6)
    assert seen == [backend]
    compiled = torch.compile(around, fullgraph=True, backend=compiler)
    compiled(*x)
    for name in (backend, "reference"):
        seen.clear()
        torch._dynamo.reset()
        compiled(*x)
        with mrf.use_backend(name):
            helpers.assert_close(compiled(*x), around(*x), 1e-6)
        assert seen[-1] == name


def test_attribution_and_prediction_break_the_graph_and_say_why(backend):
    """What needs create_graph runs eagerly inside a compiled function: same numbers, and a reason under fullgraph."""
    head = torch.nn.Conv2d(6, 3, 1)
    steer, balance = mrf.AttributionLoss(backend=backend), mrf.FunctionalEntropyLoss(prediction_weight=1.0, backend=backend)
    labels = torch.randint(3, (2, 4, 6))

    def function(a, b):
        scores = head(torch.cat([a, b], 1)).tanh()
        values = F.cross_entropy(scores, labels, reduction="none")
        return steer(scores, {"a": a, "b": b}) + balance.prediction_term(values, {"a": a, "b": b})

    x = [torch.randn(2, 3, 4, 6, requires_grad=True) for _ in range(2)]
    eager = function(*x)
    compiled = torch.compile(function, backend="eager")(*x)
    helpers.assert_close(compiled, eager, 1e-5)
    helpers.assert_close(helpers.gradients(compiled, x, None), helpers.gradients(eager, x, None), 1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="create_graph"):
        torch.compile(function, backend="eager", fullgraph=True)(*x)

"""modality_cross_entropy on every backend against the NumPy oracle and against torch.nn.functional.cross_entropy."""

import helpers
import oracle
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from modreg_fast.functional import modality_cross_entropy

# The compiler's own: a deprecated call in Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

SHAPES = {
    "no_pixels": (3, 5),
    "many_samples": (37, 6),
    "tokens": (2, 7, 6),
    "image": (2, 4, 5, 3),
    "volume": (2, 3, 2, 3, 4),
    "one_pixel": (2, 6, 1, 1),
    "one_sample": (1, 9, 8),
    "two_classes": (2, 2, 41),
    "one_class": (2, 1, 5),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PRESENT = torch.tensor([[True, False, True], [True, True, True], [False, False, True], [False, False, False]])
NAN, INF = float("nan"), float("inf")
NATIVE = ("cpu", "triton")  # whose sums keep digits that the plain formula loses


def given(modalities, shape, *, dtype=torch.float32, scale=1.0, ignored=0.2, ignore_index=255, target_dtype=torch.int64):
    """Logits and a target, some pixels of which are ignored."""
    logits = [(scale * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(modalities)]
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target[torch.rand(target.shape) < ignored] = ignore_index
    return logits, target.to(target_dtype)


def check(logits, target, backend, *, tolerance=1e-12, floor=0.0, **options):
    """Sums and gradients, from random upstream gradients of all three, against the oracle."""
    sums = modality_cross_entropy(logits, target, backend=backend, **options)
    modalities, batch = len(logits), len(logits[0])
    assert [tuple(x.shape) for x in sums] == [(modalities, batch), (batch,), (modalities, batch), (batch,)]
    upstream = [torch.randn_like(x) for x in sums[:3]]
    gradients = helpers.gradients(list(sums[:3]), logits, upstream)
    values, expected = oracle.modality_cross_entropy(
        helpers.wide(logits),
        target.to(torch.int64).numpy(),
        weight=helpers.wide(options.get("weight")),
        ignore_index=options.get("ignore_index", -100),
        smoothing=options.get("label_smoothing", 0.0),
        present=helpers.wide(options.get("present")),
        eps=options.get("eps", oracle.EPS),
        upstream=helpers.wide(upstream),
    )
    for actual, value in zip(sums, values, strict=True):
        helpers.assert_close(actual, value, tolerance, floor=floor)
    helpers.assert_close(gradients, expected, tolerance, floor=floor)
    return sums, gradients


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(backend, shape, modalities, dtype):
    logits, target = given(modalities, shape, dtype=dtype)
    floor = 1.0 if shape[1] == 1 else 0.0  # all is 0
    check(logits, target, backend, tolerance=TOLERANCE[dtype], floor=floor, ignore_index=255)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_present", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_every_option(backend, dtype, label_smoothing, weighted, with_present, eps):
    logits, target = given(3, (4, 7, 5, 9), dtype=dtype)
    weight = torch.rand(7) + 0.1 if weighted else None
    if weighted:
        weight[2] = 0
    check(
        logits,
        target,
        backend,
        tolerance=TOLERANCE[dtype],
        weight=weight,
        ignore_index=255,
        label_smoothing=label_smoothing,
        present=PRESENT if with_present else None,
        eps=eps,
    )


@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 31, 33, 255, 257, 511, 513])
@pytest.mark.parametrize("channels, label_smoothing", [(2, 0.0), (9, 0.0), (9, 0.2)])
def test_sizes_around_vectors_and_tiles(backend, pixels, channels, label_smoothing):
    logits, target = given(2, (1, channels, pixels))
    target[:, 0] = 0
    check(logits, target, backend, tolerance=1e-5, ignore_index=255, label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_every_layout_and_dtype(backend, layout, dtype):
    logits, target = given(2, (3, 5, 4, 9))
    logits = [helpers.LAYOUTS[layout](x.detach().to(dtype)).requires_grad_() for x in logits]
    sums = modality_cross_entropy(logits, target, ignore_index=255, backend=backend)
    upstream = [torch.randn_like(x) for x in sums[:3]]
    values, expected = oracle.modality_cross_entropy(
        helpers.wide(logits), target.numpy(), ignore_index=255, upstream=helpers.wide(upstream)
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for actual, value in zip(sums, values, strict=True):
        helpers.assert_close(actual, value, tolerance)
    rounding = helpers.STORAGE.get(dtype, (0.0, 0.0))[0]
    helpers.assert_close(helpers.gradients(list(sums[:3]), logits, upstream), expected, tolerance + rounding)


def test_channels_last_of_any_width(backend):
    for channels in (2, 3, 16, 17, 33):
        logits, target = given(3, (2, channels, 41))
        tokens = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in logits]
        check(tokens, target, backend, tolerance=1e-5, ignore_index=255)
        moved = modality_cross_entropy(
            [x.transpose(1, 2) for x in logits], target, ignore_index=255, channel_dim=-1, backend=backend
        )
        sums = modality_cross_entropy(logits, target, ignore_index=255, backend=backend)
        for a, b in zip(moved, sums, strict=True):
            helpers.assert_close(a, helpers.wide(b), 1e-6)


# ---- as torch.nn.functional.cross_entropy ----


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (2, 19, 6, 7)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_in_torch(backend, dtype, label_smoothing, weighted, shape, reduction):
    """The cross entropies of each modality and of the mean, and the gradients that follow."""
    logits, target = given(3, shape, dtype=dtype, scale=3.0)
    weight = torch.rand(shape[1], dtype=dtype) if weighted else None
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": label_smoothing}
    sums = modality_cross_entropy(logits, target, backend=backend, **options)
    all_logits = [*logits, sum(logits) / 3]
    expected = [torch.nn.functional.cross_entropy(x, target, reduction=reduction, **options) for x in all_logits]
    if reduction == "none":  # of which we have the sums of each sample
        expected = [x.reshape(len(x), -1).sum(1) for x in expected]
        actual = [*sums.cross_entropy, sums.joint]
    else:
        divisor = sums.weights.sum() if reduction == "mean" else 1
        actual = [x.sum() / divisor for x in (*sums.cross_entropy, sums.joint)]
    upstream = [torch.randn_like(x) for x in actual]
    for a, e in zip(actual, expected, strict=True):
        helpers.assert_close(a, helpers.wide(e), 1e-6)
    helpers.assert_close(
        helpers.gradients(actual, logits, upstream), helpers.wide(helpers.gradients(expected, logits, upstream)), 1e-6
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_information_is_the_gradient_form_of_each_cross_entropy(backend, label_smoothing):
    """``|grad f|^2 / f`` of the weighted, smoothed cross entropy, by autograd."""
    logits, target = given(2, (2, 6, 5), dtype=torch.float64)
    weight = torch.rand(6, dtype=torch.float64) + 0.1
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": label_smoothing}
    sums = modality_cross_entropy(logits, target, backend=backend, **options)
    for m, x in enumerate(logits):
        f = torch.nn.functional.cross_entropy(x, target, reduction="none", **options)
        (g,) = torch.autograd.grad(f.sum(), x)
        helpers.assert_close(sums.information[m], helpers.wide((g.square().sum(1) / (f + 1e-8)).sum(1)), 1e-12)


# ---- targets ----


@pytest.mark.parametrize(
    "target_dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_every_integer_dtype_of_the_target(backend, target_dtype):
    logits, target = given(2, (2, 5, 40), ignore_index=101, target_dtype=target_dtype)
    check(logits, target, backend, tolerance=1e-5, ignore_index=101)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 255, 2**40])
def test_ignore_index_may_be_a_class_or_anything(backend, ignore_index):
    logits, target = given(2, (2, 5, 40), ignore_index=ignore_index)
    check(logits, target, backend, tolerance=1e-5, ignore_index=ignore_index)


@pytest.mark.parametrize("bad", [-1, 5, 255, -(2**40)])
def test_a_target_out_of_range_is_named(backend, bad):
    logits, target = given(2, (3, 5, 4, 9), ignored=0)
    target[1, 2, 3] = target[2, 0, 0] = bad
    message = rf"target must be a class in \[0, 5\) or ignore_index \(-100\), got {bad} at sample 1, pixel 21 \(2 such pixels\)"
    with pytest.raises(ValueError, match=message):
        modality_cross_entropy(logits, target, backend=backend)


def test_a_target_out_of_range_stops_another_device():
    """Where to look would be to wait, the sum of the weights tells, which nothing else makes NaN; the device asserts that it does not."""
    logits, target = given(2, (3, 5, 9), ignored=0)
    logits[0].data.fill_(NAN)
    target[1, 4] = 5
    weights = torch.vmap(lambda x, y: modality_cross_entropy([x], y[None]).weights)(logits[0][:, None], target)  # nobody looks
    assert (weights >= 0).flatten().tolist() == [True, False, True]

    class Assertions(TorchDispatchMode):
        messages = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._assert_async.msg:
                self.messages.append(args[1])
            return func(*args, **(kwargs or {}))

    with Assertions() as assertions:
        modality_cross_entropy([x.to("meta") for x in logits], target.to("meta"), ignore_index=255, backend="reference")
    (message,) = assertions.messages
    assert message.startswith("modality_cross_entropy: target must be a class in [0, 5) or ignore_index (255)")


def test_strided_targets(backend):
    logits, target = given(2, (2, 5, 4, 6))
    wide = torch.full((2, 4, 18), 77)
    wide[..., 1::3] = target
    transposed = target.transpose(1, 2).contiguous().transpose(1, 2)
    sums = modality_cross_entropy(logits, target, ignore_index=255, backend=backend)
    for other in (wide[..., 1::3], transposed):
        assert all(map(torch.equal, sums, modality_cross_entropy(logits, other, ignore_index=255, backend=backend)))


# ---- what does not count ----


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_does_not_count_is_not_read(backend, layout, label_smoothing):
    """NaN at ignored pixels, in absent modalities and in samples without any has no effect and gets no gradient."""
    logits, target = given(3, (4, 5, 8, 12))
    target[1] = 255
    options = {"ignore_index": 255, "present": PRESENT, "label_smoothing": label_smoothing, "backend": backend}
    clean = modality_cross_entropy([helpers.LAYOUTS[layout](x) for x in logits], target, **options)
    dirty = [x.detach().clone() for x in logits]
    for m, x in enumerate(dirty):
        x[(target == 255)[:, None].expand_as(x)] = NAN
        x[~PRESENT[:, m]] = NAN
    dirty = [helpers.LAYOUTS[layout](x).requires_grad_() for x in dirty]
    sums = modality_cross_entropy(dirty, target, **options)
    upstream = [torch.randn_like(x) for x in sums[:3]]
    assert all(map(torch.equal, sums, clean))
    for m, g in enumerate(helpers.gradients(list(sums[:3]), dirty, upstream)):
        assert g.isfinite().all() and (g[~PRESENT[:, m]] == 0).all()
        assert (g[(target == 255)[:, None].expand_as(g)] == 0).all()
    assert (sums.cross_entropy[~PRESENT.T] == 0).all() and (sums.information[~PRESENT.T] == 0).all()
    assert all((x[..., [1, 3]] == 0).all() for x in sums)


def test_nothing_valid_at_all(backend):
    logits, target = given(2, (2, 4, 3), ignored=2)
    sums = modality_cross_entropy(logits, target, ignore_index=255, backend=backend)
    gradients = helpers.gradients(list(sums[:3]), logits, [torch.ones_like(x) for x in sums[:3]])
    assert all((x == 0).all() for x in (*sums, *gradients))


def test_partial_presence_equals_computing_on_sub_batches(backend):
    logits, target = given(3, (4, 5, 40), dtype=torch.float64)
    sums = modality_cross_entropy(logits, target, ignore_index=255, present=PRESENT, backend=backend)
    for b in range(3):
        held = [m for m in range(3) if PRESENT[b, m]]
        alone = modality_cross_entropy([logits[m][b : b + 1] for m in held], target[b : b + 1], ignore_index=255, backend=backend)
        helpers.assert_close(sums.cross_entropy[held, b], helpers.wide(alone.cross_entropy[:, 0]), 1e-13)
        helpers.assert_close(sums.information[held, b], helpers.wide(alone.information[:, 0]), 1e-13)
        helpers.assert_close(sums.joint[b : b + 1], helpers.wide(alone.joint), 1e-13)


# ---- numbers ----


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("scale", [1e-3, 8.0, 30.0, 80.0])
def test_small_and_huge_logits(backend, scale, modalities, label_smoothing):
    logits, target = given(modalities, (2, 9, 70), scale=scale)
    check(logits, target, backend, tolerance=2e-5, ignore_index=255, label_smoothing=label_smoothing)


def test_confident_and_right(backend):
    """Where ``p_y`` is all but 1 the plain float32 formula has few digits or none; the kernels keep them."""
    logits, target = given(2, (2, 6, 50), ignored=0)
    with torch.no_grad():
        for x in logits:
            x.scatter_add_(1, target[:, None], torch.full((2, 1, 50), 12.0))
    check(logits, target, backend, tolerance=1e-5 if backend in NATIVE else 2e-1)


@pytest.mark.parametrize("label_smoothing", [0.05, 0.5])
def test_smoothed_and_learnt(backend, label_smoothing):
    """Where ``p`` is close to the smoothed target, the information is a sum of small differences."""
    logits, target = given(2, (2, 6, 50), ignored=0)
    t = torch.full((2, 6, 50), label_smoothing / 6).scatter_add_(1, target[:, None], torch.full((2, 1, 50), 1 - label_smoothing))
    logits = [(t.log() + 1e-2 * torch.randn_like(t)).requires_grad_() for _ in range(2)]
    check(logits, target, backend, tolerance=1e-4 if backend in NATIVE else 1e-2, label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.9])
@pytest.mark.parametrize("logit", [0.1, 0.3, 2.0])
def test_a_thousand_equal_classes(backend, logit, label_smoothing):
    """Every addition over the classes rounds to the same side: one running sum of them had lost 2.5e-5 with smoothing."""
    logits = [torch.zeros(1, 1024, 33) for _ in range(2)]
    for x in logits:
        x[:, 0] = logit
        x.requires_grad_()
    check(logits, torch.zeros(1, 33, dtype=torch.int64), backend, tolerance=1e-5, label_smoothing=label_smoothing)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at_target", [False, True])
def test_nan_and_infinity_come_out_as_nan(backend, value, at_target, label_smoothing):
    logits, target = given(3, (2, 5, 40), ignored=0)
    with torch.no_grad():
        logits[1][0, target[0, 7] if at_target else (target[0, 7] + 1) % 5, 7] = value
    sums = modality_cross_entropy(logits, target, label_smoothing=label_smoothing, backend=backend)
    gradients = helpers.gradients(list(sums[:3]), logits, [torch.ones_like(x) for x in sums[:3]])
    assert sums.cross_entropy.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert sums.information.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert sums.joint.isnan().tolist() == [True, False]
    assert gradients[1][0, :, 7].isnan().all()
    assert all(g[0, :, :7].isfinite().all() and g[1].isfinite().all() for g in gradients)


def test_classes_that_are_ruled_out(backend):
    """A logit of -inf, as by masks over the classes, counts as in torch: it adds nothing, and at the target all is lost."""
    logits, target = given(2, (2, 5, 40), ignored=0)
    with torch.no_grad():
        target[target == 3] = 2
        for x in logits:
            x[:, 3] = -INF
    sums = modality_cross_entropy(logits, target, backend=backend)
    gradients = helpers.gradients([sums.cross_entropy.sum() + sums.joint.sum()], logits, None)
    plain = sum(torch.nn.functional.cross_entropy(x, target, reduction="sum") for x in (*logits, (logits[0] + logits[1]) / 2))
    helpers.assert_close(sums.cross_entropy.sum() + sums.joint.sum(), helpers.wide(plain), 1e-6)
    helpers.assert_close(gradients, helpers.wide(helpers.gradients([plain], logits, None)), 1e-5)
    target[0, 0] = 3
    lost = modality_cross_entropy(logits, target, backend=backend)
    assert (lost.cross_entropy[:, 0] == INF).all() and lost.cross_entropy[:, 1].isfinite().all()


def test_a_target_that_is_ruled_out_has_no_information(backend):
    logits = torch.tensor([[[-INF], [0.5], [0.2]]], requires_grad=True)
    sums = modality_cross_entropy([logits], torch.tensor([[0]]), backend=backend)
    assert sums.cross_entropy.item() == INF and sums.information.item() == 0
    assert (helpers.gradients([sums.information], [logits], None)[0] == 0).all()
    (gradient,) = helpers.gradients([sums.cross_entropy], [logits], None)
    helpers.assert_close(gradient[0, 1:, 0], logits[0, 1:, 0].softmax(0).detach().numpy(), 1e-6)


def test_shift_of_the_logits_does_not_matter(backend):
    logits, target = given(2, (2, 5, 40), dtype=torch.float64)
    shifted = [x + 100 * torch.randn(2, 1, 40, dtype=torch.float64) for x in logits]
    a, b = (modality_cross_entropy(x, target, ignore_index=255, backend=backend) for x in (logits, shifted))
    for x, y in zip(a, b, strict=True):
        helpers.assert_close(x, helpers.wide(y), 1e-11)


# ---- autograd ----


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_and_gradgradcheck(backend, label_smoothing, weighted):
    logits, target = given(2, (2, 3, 2), dtype=torch.float64, ignored=0)
    target[1, 0] = 255
    options = {
        "weight": torch.rand(3) if weighted else None,
        "label_smoothing": label_smoothing,
        "present": torch.tensor([[True, True], [True, False]]),
        "ignore_index": 255,
        "backend": backend,
    }

    def function(*logits):
        return tuple(modality_cross_entropy(list(logits), target, **options)[:3])

    assert gradcheck(function, logits) and gradgradcheck(function, logits, fast_mode=weighted)


def test_opcheck(backend):
    logits, target = given(2, (2, 5, 12), target_dtype=torch.uint8)
    weight, present = torch.rand(5), torch.tensor([[True, True], [False, True]])
    for options in ((None, None, 255, 0.0), (weight, present, 255, 0.1)):
        torch.library.opcheck(torch.ops.modreg_fast.modality_cross_entropy, (logits, target, *options, 1e-8, 1, backend))


def test_compiled_into_one_graph(backend):
    """Values and gradients of a whole loss, with every option."""
    logits, target = given(3, (4, 5, 6, 7))
    weight = torch.rand(5)

    def loss(logits, target):
        sums = modality_cross_entropy(
            [2 * x for x in logits],
            target,
            weight=weight,
            ignore_index=255,
            label_smoothing=0.1,
            present=PRESENT,
            backend=backend,
        )
        return (sums.cross_entropy.sum(1) + sums.information.sum(1)).sum() / sums.weights.sum() + sums.joint.sum()

    compiled = torch.compile(loss, fullgraph=True)
    values = [f(logits, target) for f in (loss, compiled)]
    helpers.assert_close(values[1], helpers.wide(values[0]), 1e-6)
    expected, actual = (helpers.gradients([value], logits, None) for value in values)
    helpers.assert_close(actual, helpers.wide(expected), 1e-6)


@pytest.mark.parametrize("outputs", [[0], [1], [2]], ids=["cross_entropy", "joint", "information"])
def test_any_output_alone(backend, outputs):
    logits, target = given(2, (2, 5, 40))
    sums = modality_cross_entropy(logits, target, ignore_index=255, backend=backend)
    upstream = [torch.randn_like(x) if k in outputs else torch.zeros_like(x) for k, x in enumerate(sums[:3])]
    alone = helpers.gradients([sums[k] for k in outputs], logits, [upstream[k] for k in outputs])
    _, expected = oracle.modality_cross_entropy(
        helpers.wide(logits), target.numpy(), ignore_index=255, upstream=helpers.wide(upstream)
    )
    helpers.assert_close(alone, expected, 1e-5)
    assert not sums.weights.requires_grad


# ---- errors ----

X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: modality_cross_entropy([], Y), ValueError, "logits must be non-empty"),
        (lambda: modality_cross_entropy(X, Y), TypeError, "logits must be a list or tuple, got Tensor"),
        (
            lambda: modality_cross_entropy([X, X[:1]], Y),
            ValueError,
            r"logits\[1\] must be of the shape \(2, 3, 4\) of logits\[0\]",
        ),
        (lambda: modality_cross_entropy([X.int()], Y), TypeError, r"logits\[0\] must be float32 or .*, got torch.int32"),
        (lambda: modality_cross_entropy([X], Y.float()), TypeError, "target must be int64 or .*, got torch.float32"),
        (lambda: modality_cross_entropy([X], Y.bool()), TypeError, "target must be int64 or .*, got torch.bool"),
        (lambda: modality_cross_entropy([X], Y[:, :3]), ValueError, r"target must be of shape \(2, 4\) on cpu .*, got \(2, 3\)"),
        (lambda: modality_cross_entropy([X], X[:, 0]), TypeError, "target must be int64"),
        (lambda: modality_cross_entropy([X], Y, weight=torch.ones(4)), ValueError, r"weight must be of shape \(3,\)"),
        (lambda: modality_cross_entropy([X], Y, weight=[1, 1, 1]), TypeError, "weight must be a tensor, got list"),
        (
            lambda: modality_cross_entropy([X], Y, weight=torch.ones(3, requires_grad=True)),
            ValueError,
            "without gradient, got .* that requires grad",
        ),
        (lambda: modality_cross_entropy([X], Y, ignore_index=1.0), TypeError, "ignore_index must be an integer, got float"),
        (lambda: modality_cross_entropy([X], Y, label_smoothing=1.5), ValueError, "label_smoothing must be at most 1, got 1.5"),
        (lambda: modality_cross_entropy([X], Y, label_smoothing=-0.1), ValueError, "label_smoothing must be a finite number"),
        (lambda: modality_cross_entropy([X], Y, eps=NAN), ValueError, "eps must be a finite number"),
        (lambda: modality_cross_entropy([X], Y, present=Y.bool()), ValueError, r"present must be of shape \(2, 1\)"),
        (lambda: modality_cross_entropy([X], Y, backend="cuda9"), ValueError, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"modality_cross_entropy: .*{message}"):
        call()

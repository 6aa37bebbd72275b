"""The PTX that Triton makes of its backend's kernels, executed by the PTX interpreter: numbers against the oracle, traffic, faults.

Triton's interpreter (test_triton.py) runs the source with NumPy's exponentials and without threads. Here runs what a GPU would load: its
approximate instructions, shuffles, shared memory and 16-byte accesses, each one checked."""

import itertools
import os
from dataclasses import replace

import helpers
import numpy as np
import oracle
import ptx
import pytest
import test_numerics
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton_calls import Gpu

from modreg_fast.backends.triton import gradient_statistics as statistics
from modreg_fast.backends.triton import modality_cross_entropy as cross_entropy
from modreg_fast.backends.triton import softmax_fisher as fisher

EPS = 1e-8
LAYOUTS = {"pixels": lambda x: x, "channels": lambda x: x.mT.contiguous().mT}
DTYPES = (torch.float32, torch.bfloat16)
SLOW = [pytest.param(torch.float16, marks=pytest.mark.slow)]
ARCHITECTURES = [80, 90, pytest.param(100, marks=pytest.mark.slow)]


def assert_gradients(gradients, expected):
    """float32: 1e-5 in relative norm. 16 bits, element by element: computed in float32, rounded once."""
    for gradient, want in zip(gradients, expected, strict=True):
        if gradient.dtype == torch.float32:
            helpers.assert_close(gradient, want, 1e-5)
        else:
            relative, absolute = helpers.STORAGE[gradient.dtype]
            bound = relative * np.abs(want) + absolute + 1e-5 * np.abs(want).max()
            assert (np.abs(helpers.wide(gradient) - want) <= bound).all()


def tensors(shapes, count, dtype, layout):
    return [LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(count) for shape in shapes]


def assert_moved_once(traffic, x, coalesced):
    """All bytes, each by one thread; where rows are whole sectors, in whole sectors."""
    size = x.numel() * x.element_size()
    assert traffic.distinct == size and traffic.bytes <= 1.05 * size
    if coalesced:
        assert traffic.efficiency >= 0.95


# ---- softmax_fisher ----


def softmax_fisher(architecture, xs, scales=1, masks=(), present=None, sigma=(0.0, 0.0), samples=1, detach=False):
    """Information, upstream and gradients; the traffic of reading the features, forward and backward, and of writing gradients."""
    seed = torch.tensor(3) if any(sigma) else None
    problem = fisher.Problem(xs, list(masks), present, list(sigma), samples, seed, detach, EPS)
    gpu = Gpu(architecture, *xs, *masks, *(x for x in (present, seed) if x is not None))
    (information, counts), launches = fisher.forward_launches(problem)
    forward, _ = [gpu.run(launch) for launch in launches]
    loads = [forward.loads_of[gpu.buffer(x)] for x in xs]
    gpu.fetch(information, counts)
    pixels = torch.tensor([x.shape[2] for x in xs[:scales]])
    upstream = torch.randn_like(information) * pixels[:, None]  # so that gradients of single pixels are of order one
    gpu = Gpu(architecture, *xs, *masks, upstream, counts, *(x for x in (present, seed) if x is not None))
    gradients, (launch,) = fisher.backward_launches(problem, fisher.Result(None, counts), fisher.Result(upstream, None))
    backward = gpu.run(launch)
    gpu.fetch(*gradients)
    loads += [backward.loads_of[gpu.buffer(x)] for x in xs]
    return information, upstream, gradients, loads, [backward.stores_to[gpu.buffer(x)] for x in gradients]


def check_softmax_fisher(architecture, xs, scales=1, masks=(), present=None, sigma=(0.0, 0.0), samples=1, detach=False):
    information, upstream, gradients, *_ = found = softmax_fisher(
        architecture, xs, scales, masks, present, sigma, samples, detach
    )
    by_modality = [helpers.wide(xs[i : i + scales]) for i in range(0, len(xs), scales)]
    values, expected = oracle.softmax_fisher(
        by_modality,
        helpers.wide(masks) if masks else None,
        helpers.wide(present),
        list(sigma),
        samples,
        3,
        detach,
        upstream=helpers.wide(upstream),
    )
    helpers.assert_close(information, values, 1e-5)
    assert_gradients(gradients, itertools.chain(*expected))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [*DTYPES, *SLOW])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_fisher(architecture, dtype, layout):
    """Numbers, and every feature read once, every gradient written once, in whole sectors."""
    xs = tensors([(2, 64, 96)], 2, dtype, layout)
    *_, loads, stores = check_softmax_fisher(architecture, xs)
    assert len(loads) == 4 and len(stores) == 2
    for traffic in (*loads, *stores):
        assert_moved_once(traffic, xs[0], True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_fisher_has_no_bank_conflicts(dtype, layout):
    """Nor does it ask for sectors of which it uses a part."""
    problem = fisher.Problem(tensors([(1, 64, 256)], 2, dtype, layout), [], None, [0.0] * 2, 1, None, False, EPS)
    upstream = fisher.Result(torch.ones(2, 1, 1), torch.full((1, 1), 256))
    for launch in (fisher.forward_launches(problem)[1][0], fisher.backward_launches(problem, upstream, upstream)[1][0]):
        written = [x for x in launch.arguments if isinstance(x, torch.Tensor)]
        requests = Gpu(90, *problem.features, *written).run(launch).requests.values()
        shared, world = ([r for r in requests if r.space == space] for space in ("shared", "global"))
        assert sum(r.wavefronts for r in shared) <= 1.1 * sum(r.least_wavefronts for r in shared)
        assert sum(r.sectors for r in world) <= 1.02 * sum(r.least_sectors for r in world)


@pytest.mark.parametrize("dtype", [*DTYPES, *SLOW])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("detach", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_softmax_fisher_of_odd_sizes_with_masks(dtype, layout, detach):
    """Two scales in one launch, tiles partly outside, an absent modality, a sample without a valid pixel."""
    shapes = [(3, 19, 77), (3, 6, 33)]
    masks = [torch.rand(b, p) < 0.6 for b, _, p in shapes]
    masks[1][0] = False
    present = torch.tensor([[True, True], [True, False], [True, True]])
    check_softmax_fisher(90, tensors(shapes, 2, dtype, layout), 2, masks, present, detach=detach)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_fisher_with_noise(architecture, dtype, layout):
    """Two draws for one modality, none for the other; what is drawn is not read."""
    xs = tensors([(2, 19, 64)], 2, dtype, layout)
    *_, loads, stores = check_softmax_fisher(architecture, xs, sigma=(0.5, 0.0), samples=2)
    assert all(traffic.distinct == xs[0].numel() * xs[0].element_size() for traffic in (*loads, *stores))


@pytest.mark.parametrize("channels, pixels", [(1, 40), (3, 1), (1024, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_fisher_of_extreme_shapes(channels, pixels, layout):
    check_softmax_fisher(90, tensors([(2, channels, pixels)], 2, torch.float32, layout))


@pytest.mark.parametrize("case", test_numerics.HARD)
def test_hard_inputs_no_worse_than_plain_float32(case):
    """The bound of test_numerics.py, here for approximate exponentials and divisions that err as much as the PTX ISA lets them."""
    pair = [x.flatten(2) for x in test_numerics.hard(case, 2)]
    information, upstream, gradients, *_ = softmax_fisher(90, pair)
    rough = test_numerics.plain([[x.clone().requires_grad_()] for x in pair], upstream)
    values, expected = oracle.softmax_fisher([[helpers.wide(x)] for x in pair], upstream=helpers.wide(upstream))
    expected = [row[0] for row in expected]
    assert information.isfinite().all() and all(g.isfinite().all() for g in gradients)
    for ours, plain, want in ((information, rough[0], values), (gradients, rough[1], expected)):
        assert helpers.relative_error(ours, want) <= max(1e-5, 4 * helpers.relative_error(plain, want))


# ---- gradient_statistics ----


def check_gradient_statistics(architecture, shapes, dtype, layout, masks=(), maps=False):
    """Against the oracle; the device, what was read, what was written, and the report of the backward kernel."""
    g, e = tensors(shapes, 1, dtype, layout), tensors(shapes, 1, dtype, layout)
    f = [torch.rand(b, p) + 0.1 for b, _, p in shapes]
    gpu = Gpu(architecture, *g, *e, *f, *masks)
    problem = statistics.Problem(g, e, f, list(masks), EPS, maps)
    results, launches = statistics.forward_launches(problem)
    forward = [gpu.run(launch) for launch in launches][0]
    fisher_, attribution, fisher_maps, attribution_maps = results
    gpu.fetch(fisher_, attribution, *fisher_maps, *attribution_maps)
    for x in (*g, *e):
        assert_moved_once(forward.loads_of[gpu.buffer(x)], x, shapes[0][2] % 32 == 0)

    up = [torch.randn_like(fisher_), torch.randn_like(attribution)]
    up_maps = [[torch.randn_like(x) for x in some] for some in (fisher_maps, attribution_maps)]
    gpu = Gpu(architecture, *g, *e, *f, *masks, *up, *up_maps[0], *up_maps[1], attribution)
    flat, launches = statistics.backward_launches(problem, results, statistics.Result(*up, *up_maps))
    backward = [gpu.run(launch) for launch in launches][-1]
    gpu.fetch(*flat)
    gradients = [flat[i : i + len(shapes)] for i in range(0, len(flat), len(shapes))]
    for k in range(len(shapes)):
        upstream = [up[0][k], up[1][k], *(some[k] if maps else None for some in up_maps)]
        want = oracle.gradient_statistics(
            *(helpers.wide(x[k]) for x in (g, e, f)),
            helpers.wide(masks[k]) if masks else None,
            upstream=[helpers.wide(x) for x in upstream],
        )
        helpers.assert_close(fisher_[k], want.fisher, 1e-5)
        helpers.assert_close(attribution[k], want.attribution, 1e-5)
        if maps:
            helpers.assert_close(fisher_maps[k], want.fisher_map, 1e-5)
            helpers.assert_close(attribution_maps[k], want.attribution_map, 1e-5)
        assert_gradients([x[k] for x in gradients], (want.dg, want.de, want.df))
    return gpu, (*g, *e), (*gradients[0], *gradients[1]), backward


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [*DTYPES, *SLOW])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_statistics(architecture, dtype, layout):
    gpu, inputs, outputs, backward = check_gradient_statistics(architecture, [(2, 32, 512)], dtype, layout)
    for x in inputs:
        assert_moved_once(backward.loads_of[gpu.buffer(x)], x, True)
    for x in outputs:
        assert_moved_once(backward.stores_to[gpu.buffer(x)], x, True)


@pytest.mark.parametrize("dtype", [*DTYPES, *SLOW])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("maps", [False, True])
def test_gradient_statistics_of_odd_sizes_with_masks(dtype, layout, maps):
    shapes = [(2, 19, 77), (2, 5, 33)]
    masks = [torch.rand(b, p) < 0.6 for b, _, p in shapes]
    masks[1][0] = False
    check_gradient_statistics(90, shapes, dtype, layout, masks, maps)


# ---- modality_cross_entropy ----


def check_modality_cross_entropy(architecture, xs, target, **options):
    """Against the oracle; the traffic of reading the logits, forward and backward, and of writing gradients."""
    values = {"weight": None, "present": None, "ignore_index": 255, "label_smoothing": 0.0, **options}
    problem = cross_entropy.Problem(xs, target, eps=EPS, **values)
    inputs = [*xs, target, *(x for x in (problem.weight, problem.present) if x is not None)]
    gpu = Gpu(architecture, *inputs)
    sums, launches = cross_entropy.forward_launches(problem)
    forward, _ = [gpu.run(launch) for launch in launches]
    gpu.fetch(*sums)
    loads = [forward.loads_of[gpu.buffer(x)] for x in xs]
    upstream = [torch.randn_like(x) for x in sums]
    gpu = Gpu(architecture, *inputs, *upstream)
    gradients, (launch,) = cross_entropy.backward_launches(problem, cross_entropy.Result(*upstream))
    backward = gpu.run(launch)
    gpu.fetch(*gradients)
    expected, want = oracle.modality_cross_entropy(
        helpers.wide(xs),
        target.to(torch.int64).numpy(),
        weight=helpers.wide(problem.weight),
        ignore_index=problem.ignore_index,
        smoothing=problem.label_smoothing,
        present=helpers.wide(problem.present),
        upstream=helpers.wide(upstream[:3]),
    )
    for actual, value in zip(sums, expected, strict=True):
        helpers.assert_close(actual, value, 1e-5)
    assert_gradients(gradients, want)
    return loads + [backward.loads_of[gpu.buffer(x)] for x in xs], [backward.stores_to[gpu.buffer(x)] for x in gradients]


QUICK = [(24, torch.float32, "pixels"), (96, torch.bfloat16, "channels")]
ALL = itertools.product((24, 96), (*DTYPES, torch.float16), LAYOUTS)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(
    "classes, dtype, layout", [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in ALL if x not in QUICK)]
)
def test_modality_cross_entropy(architecture, classes, dtype, layout):
    """A thread with whole pixels, and lanes that share one: every logit read once, every gradient written once, in whole sectors."""
    target = torch.randint(classes, (2, 128))
    target[:, ::5] = 255
    loads, stores = check_modality_cross_entropy(architecture, tensors([(2, classes, 128)], 2, dtype, layout), target)
    assert len(loads) == 4 and len(stores) == 2
    for traffic in (*loads, *stores):
        assert_moved_once(traffic, tensors([(2, classes, 128)], 1, dtype, layout)[0], True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_modality_cross_entropy_of_odd_sizes_with_everything(dtype, layout, label_smoothing):
    """Tiles partly outside, an absent modality, class weights, targets of one byte; sizes of both kinds of tile."""
    present = torch.tensor([[True, True, True], [True, False, True]])
    for classes in (19, 70):
        target = torch.randint(classes, (2, 77), dtype=torch.uint8)
        target[0, 3:9] = 255
        options = {"weight": torch.rand(classes) + 0.1, "present": present, "label_smoothing": label_smoothing}
        check_modality_cross_entropy(90, tensors([(2, classes, 77)], 3, dtype, layout), target, **options)


@pytest.mark.parametrize("classes, pixels", [(1, 40), (3, 1), pytest.param(1000, 9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modality_cross_entropy_of_extreme_shapes(classes, pixels, layout):
    check_modality_cross_entropy(
        90, tensors([(2, classes, pixels)], 2, torch.float32, layout), torch.randint(classes, (2, pixels), dtype=torch.int32)
    )


# ---- faults ----


def test_a_wrong_launch_is_found():
    """A row one pixel too long, an input that is not there, a tile that no program computes."""
    xs = tensors([(1, 64, 96)], 2, torch.float32, "pixels")
    _, (main, reduction) = fisher.forward_launches(fisher.Problem(xs, [], None, [0.0, 0.0], 1, None, False, EPS))
    arguments = list(main.arguments)
    arguments[8] = (97,)  # pixels
    with pytest.raises(ptx.OutOfBounds):
        Gpu(90, *xs).run(replace(main, programs=main.programs + 1, arguments=tuple(arguments)))
    with pytest.raises(ptx.Uninitialized):
        Gpu(90, xs[0]).run(main)
    gpu = Gpu(90, *xs)
    gpu.run(replace(main, programs=main.programs - 1))
    with pytest.raises(ptx.Uninitialized):
        gpu.run(reduction)

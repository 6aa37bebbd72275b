"""The ways to a backend give the same: eager calls go straight to it, whatever has to see an op gets the custom op; under transforms of
``torch.func`` and in forward-mode differentiation the reference formula computes."""

import contextlib

import helpers
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import LAYOUTS
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import modreg_fast as mrf
from modreg_fast.functional import balance_penalty, gradient_statistics, modality_cross_entropy, softmax_fisher_information

# torch.func's own: its decompositions on their first use, and how linearize holds constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

SHAPE = (3, 5, 4, 6)
MASK = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.6
PRESENT = torch.tensor([[True, True], [True, False], [True, True]])
OPTIONS = {
    "plain": {},
    "masks": {"mask": MASK, "present": PRESENT},
    "noise": {"sigma": [0.5, 0.0], "samples": 2, "seed": 3, "detach_reference": True},
}


class Seen(TorchDispatchMode):
    """Which of our ops a dispatch mode gets to see."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "modreg_fast":
            self.ops.append(func.name().removeprefix("modreg_fast::"))
        return func(*args, **(kwargs or {}))


def selective():
    """Of checkpointing: what is ours is kept, the rest computed again."""

    def policy(_context, op, *_args, **_options):
        ours = getattr(op, "namespace", "") == "modreg_fast"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def fisher(backend, options="plain"):
    return lambda *x: softmax_fisher_information([[y] for y in x], backend=backend, **OPTIONS[options])


def statistics(backend, mask=MASK):
    def function(g, e, f):
        out = gradient_statistics([g], [e], [f], mask=mask, maps=True, backend=backend)
        return torch.cat([x.flatten() for x in (out.fisher, out.attribution, *out.fisher_maps, *out.attribution_maps)])

    return function


def cross_entropy(backend, **options):
    def function(*x):
        sums = modality_cross_entropy(x, torch.where(MASK, 1, 4), ignore_index=4, backend=backend, **options)
        return torch.cat([sums.cross_entropy.flatten(), sums.joint, sums.information.flatten()])

    return function


def functions(backend):
    """Each with its arguments, in float64."""
    x = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(2)]
    f = torch.rand(3, 4, 6, dtype=torch.float64) + 0.1
    entropies = cross_entropy(backend), cross_entropy(backend, present=PRESENT, label_smoothing=0.1, weight=torch.rand(5))
    return [
        *((fisher(backend, options), x) for options in OPTIONS),
        (statistics(backend), [*x, f]),
        *((function, x) for function in entropies),
    ]


def all_results(function, arguments, layout, dtype):
    leaves = [(LAYOUTS[layout](x) if x.dim() == 4 else x).to(dtype).requires_grad_() for x in arguments]
    value = function(*leaves)
    upstream = torch.linspace(-1, 2, value.numel()).to(value.dtype).view_as(value)
    first = torch.autograd.grad(value, leaves, upstream, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    return [value, *first, *second]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped_rows", "batch_inside"])
def test_same_bits_by_the_custom_op(backend, layout, dtype):
    for function, arguments in functions(backend):
        eager = all_results(function, arguments, layout, dtype)
        with Seen() as seen:
            custom = all_results(function, arguments, layout, dtype)
        assert [name.endswith("backward") for name in seen.ops[:2]] == [False, True]
        assert all(torch.equal(helpers.bits(a), helpers.bits(b)) for a, b in zip(eager, custom, strict=True))


def test_same_bits_without_a_graph(backend):
    for function, arguments in functions(backend):
        with torch.no_grad():
            alone = function(*arguments)
        assert torch.equal(function(*(x.clone().requires_grad_() for x in arguments)), alone)
        assert torch.equal(function(*arguments), alone) and not alone.requires_grad


@pytest.mark.parametrize("objective", ["inverse", "log"])
def test_the_loss_in_one_node(backend, objective):
    """Where all count; against the op, then the penalty by autograd's own derivatives, and under a mode, which sees the op."""
    loss = mrf.FunctionalEntropyLoss(0.5, objective=objective, backend=backend)
    scales = [torch.randn(2, *shape, dtype=torch.float64) for shape in (SHAPE, (3, 7))]

    def results(function):
        leaves = [x.clone().requires_grad_() for scale in scales for x in scale]
        value = function({"rgb": leaves[::2], "depth": leaves[1::2]})
        first = torch.autograd.grad(3 * value, leaves, create_graph=True)
        helpers.assert_close(torch.autograd.grad(3 * value, leaves, retain_graph=True), first, 1e-12)
        return [value, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)]

    def composed(features):
        information = softmax_fisher_information(list(features.values()), backend=backend)
        return 0.5 * balance_penalty(information, objective=objective, valid=torch.ones_like(information, dtype=torch.bool))

    found, expected = results(loss), results(composed)
    with Seen() as seen:
        seen_found = results(loss)
    assert "softmax_fisher_backward" in seen.ops
    for a, b, c in zip(found, expected, seen_found, strict=True):
        helpers.assert_close(a, b, 1e-10)
        helpers.assert_close(c, b, 1e-10)
    assert torch.equal(loss({"rgb": [x[0] for x in scales], "depth": [x[1] for x in scales]}), found[0])  # without a graph


def test_modes_see_the_op(backend):
    function, arguments = functions(backend)[0]
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    assert counter.get_total_flops() == 0  # opaque: nothing inside is counted
    with torch.profiler.profile() as profile:
        function(*arguments)
    assert profile.key_averages()
    with torch.device("meta"):  # a function mode
        assert function(*arguments).device.type == "cpu"


class Image(torch.Tensor):
    """As data loaders of medical images give: a subclass with the default ``__torch_function__``."""


def test_subclasses(backend):
    for function, arguments in functions(backend):
        images = [x.clone().as_subclass(Image).requires_grad_() for x in arguments]
        value = function(*images)
        leaves = [x.clone().requires_grad_() for x in arguments]
        plain = function(*leaves)
        assert type(value) is Image
        found = torch.autograd.grad(value.sum(), images)
        for a, b in zip([value, *found], [plain, *torch.autograd.grad(plain.sum(), leaves)], strict=True):
            assert torch.equal(a.as_subclass(torch.Tensor), b)


def test_saved_tensors_pass_the_hooks(backend):
    """Of offloading and of checkpointing: everything tensor-sized that waits for the backward pass."""
    for function, arguments in functions(backend):
        leaves = [x.clone().requires_grad_() for x in arguments]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x.clone(), lambda x: x):
            value = function(*leaves)
        assert sizes.count(leaves[0].numel()) == 2
        expected = torch.autograd.grad(function(*leaves).sum(), leaves)
        assert all(map(torch.equal, torch.autograd.grad(value.sum(), leaves), expected))
        again = checkpoint(function, *leaves, use_reentrant=False)
        assert all(map(torch.equal, torch.autograd.grad(again.sum(), leaves), expected))


@pytest.mark.parametrize("preserve", [True, False])
def test_the_noise_of_a_recomputation(backend, preserve):
    """The same with ``seed``, and from the default generator where checkpointing restores it."""
    x = [torch.randn(SHAPE, requires_grad=True) for _ in range(2)]

    def noisy(seed):
        return lambda *y: softmax_fisher_information([[z] for z in y], sigma=0.5, seed=seed, backend=backend)

    for seed in (3, None) if preserve else (3,):
        torch.manual_seed(1)
        expected = torch.autograd.grad(noisy(seed)(*x).sum(), x)
        torch.manual_seed(1)
        again = checkpoint(noisy(seed), *x, use_reentrant=False, preserve_rng_state=preserve)
        assert all(map(torch.equal, torch.autograd.grad(again.sum(), x), expected))


# ---- forward mode ----


@pytest.mark.parametrize("seen", [contextlib.nullcontext, Seen, lambda: torch.device("cpu"), selective])
def test_checkpointing(backend, seen):
    """Which lets a backward pass ask for what was saved once, also where something has to see the op."""
    for function, arguments in functions(backend):
        leaves = [x.clone().requires_grad_() for x in arguments]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        with contextlib.nullcontext() if seen is selective else seen():
            options = {"context_fn": selective} if seen is selective else {}
            value = checkpoint(lambda *x, f=function: f(*x).square(), *leaves, use_reentrant=False, **options)
            found = torch.autograd.grad(value.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def directional(function, arguments, tangents):
    """The derivative in a direction, by the reverse mode: the double-backward trick."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    value = function(*leaves)
    dummy = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(value, leaves, dummy, create_graph=True)
    return torch.autograd.grad(pulled, dummy, tangents)[0]


def test_forward_mode(backend):
    """``jvp``, ``linearize`` and dual tensors; jacobians by rows and by columns."""
    for function, arguments in functions(backend):
        tangents = [torch.randn_like(x) for x in arguments]
        expected = directional(function, arguments, tangents)
        assert expected.norm() > 0
        value, tangent = jvp(function, tuple(arguments), tuple(tangents))
        helpers.assert_close(value, function(*arguments), 1e-12)
        helpers.assert_close(tangent, expected, 1e-10)
        helpers.assert_close(linearize(function, *arguments)[1](*tangents), expected, 1e-10)
        with forward_ad.dual_level():
            out = function(*map(forward_ad.make_dual, arguments, tangents))
            helpers.assert_close(forward_ad.unpack_dual(out).tangent, expected, 1e-10)
            only_first = function(forward_ad.make_dual(arguments[0], tangents[0]), *arguments[1:])
            zeros = [tangents[0], *map(torch.zeros_like, tangents[1:])]
            helpers.assert_close(forward_ad.unpack_dual(only_first).tangent, directional(function, arguments, zeros), 1e-10)
        rows, columns = jacrev(function)(*arguments), jacfwd(function)(*arguments)
        helpers.assert_close(columns, rows, 1e-10)


def test_forward_over_reverse(backend):
    """Hessians: forward mode through the gradient that the backend computed, and by ``torch.func``."""
    x = [torch.randn(1, 3, 2, dtype=torch.float64) for _ in range(2)]

    def function(a):
        return softmax_fisher_information([[a], [x[1]]], backend=backend).sum()

    expected = torch.autograd.functional.hessian(function, x[0])
    helpers.assert_close(hessian(function)(x[0]), expected, 1e-10)
    helpers.assert_close(jacrev(jacrev(function))(x[0]), expected, 1e-10)


# ---- vmap, func.grad ----


def test_vmap(backend):
    for function, arguments in functions(backend):
        stacked = [torch.stack([x, x.flip(0), 2 * x]) for x in arguments]
        expected = torch.stack([function(*some) for some in zip(*stacked, strict=True)])
        helpers.assert_close(vmap(function)(*stacked), expected, 1e-12)
        only_first = torch.stack([function(x, *arguments[1:]) for x in stacked[0]])
        helpers.assert_close(vmap(function, (0, *[None] * (len(arguments) - 1)))(stacked[0], *arguments[1:]), only_first, 1e-12)


def test_func_grad(backend):
    for function, arguments in functions(backend):
        leaves = [x.clone().requires_grad_() for x in arguments]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        found = grad(lambda *x, of=function: of(*x).square().sum(), tuple(range(len(arguments))))(*arguments)
        helpers.assert_close(list(found), list(expected), 1e-12)
        pulled = vjp(function, *arguments)[1](torch.ones_like(function(*arguments)))
        helpers.assert_close(list(pulled), list(torch.autograd.grad(function(*leaves).sum(), leaves)), 1e-12)


# ---- the same in compiled code ----


def as_it_is(function):
    return function


def compiled(function):
    return torch.compile(function, backend="eager", fullgraph=True)


def tangent_of_duals(function, arguments, tangents):
    function(*arguments)  # what was compiled for these must not serve dual tensors
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, arguments, tangents))).tangent


IN_COMPILED_CODE = {
    "jvp": lambda made, f, x, v: made(lambda *y: jvp(f, y, tuple(v))[1])(*x),
    "duals": lambda made, f, x, v: tangent_of_duals(made(f), x, v),
    "grad": lambda made, f, x, v: made(grad(lambda y: f(y, *x[1:]).square().sum()))(x[0]),
    "vmap": lambda made, f, x, v: made(vmap(lambda y: f(y, *x[1:])))(torch.stack([x[0], v[0]])),
}


@pytest.mark.parametrize("way", IN_COMPILED_CODE)
def test_transforms_in_compiled_code(way):
    """A tangent that is lost would be 0, or None, without a word."""
    for function, arguments in functions("cpu")[1::2]:
        torch._dynamo.reset()
        tangents = [torch.randn_like(x) for x in arguments]
        expected, found = (IN_COMPILED_CODE[way](made, function, arguments, tangents) for made in (as_it_is, compiled))
        assert expected.norm() > 0
        helpers.assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_per_sample(backend, masked):
    """Of the parameters of a network, of a loss on its features: ``vmap(grad)`` against a loop."""
    net = torch.nn.ModuleDict({m: torch.nn.Conv2d(3, 5, 1).double() for m in ("rgb", "depth")})
    balance = mrf.FunctionalEntropyLoss(1.0, backend=backend)
    images, parameters = torch.randn(3, 3, 4, 6, dtype=torch.float64), dict(net.named_parameters())

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, mask):
            return balance({m: [self.net[m](x)] for m in self.net}, mask=mask if masked else None)

    whole = Whole()
    parameters = dict(whole.named_parameters())

    def penalty(parameters, x, mask):
        return functional_call(whole, parameters, (x[None], mask[None]))

    found = vmap(grad(penalty), (None, 0, 0))({k: p.detach() for k, p in parameters.items()}, images, MASK)
    for i in range(3):
        expected = torch.autograd.grad(whole(images[i : i + 1], MASK[i : i + 1]), list(parameters.values()))
        helpers.assert_close([found[name][i] for name in parameters], list(expected), 1e-10)

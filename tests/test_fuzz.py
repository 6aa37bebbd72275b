"""Differential fuzzing: random calls of every op on every backend, values and gradients element by element within the error bound of
``bounds.py`` around the float64 oracle. ``MODREG_FAST_FUZZ_SEED=n`` draws other calls.

    MODREG_FAST_FUZZ_SEED=7 python -m pytest tests/test_fuzz.py -m "slow or not slow" -s

prints how much of the bound was used at most."""

import bounds
import fuzzing
import helpers
import numpy as np
import oracle
import pytest
import torch
from conftest import BACKENDS, INTERPRETED

from modreg_fast.backends import computes, reference

FEW = 50 if INTERPRETED else 170 // len(BACKENDS)  # three ops over all backends: 500 calls
MANY = 3400 // len(BACKENDS)
# Rounding of what is stored, relative and (half the step of subnormal numbers, or all of it) absolute; float32 may have been float64.
STORAGE = {
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.float32: (2.0**-24, 2.0**-149),
    torch.float64: (0.0, 2.0**-1070),
}
USED: dict[str, float] = {}


def kind_of(*dtypes):
    return "float64" if torch.float64 in dtypes else "float32"


def within(actual, expected, bound, dtype, what, other=False):
    """Each element within the bound and the rounding of its storage, or where ``other`` allows more."""
    a = np.asarray(actual)
    relative, absolute = STORAGE[dtype]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        stored = relative * (np.abs(expected) + bound) + absolute
        error, allowed = np.abs(a - expected), bound + stored
        fits = (
            (error <= allowed) | np.isinf(bound) | (np.isinf(a) & (np.abs(expected) + allowed >= torch.finfo(dtype).max)) | other
        )
        share = np.where(bound > 4 * stored, np.nan_to_num(error / bound, nan=0.0, posinf=0.0), 0)
    if not fits.all():
        worst = np.unravel_index(np.argmax(np.where(fits, -1, np.nan_to_num(error, nan=np.inf))), a.shape)
        where = f"{what}{list(map(int, worst))}"
        raise AssertionError(
            f"{where}: {a[worst]!r}, not {expected[worst]!r} within {allowed[worst]:.3g}; {(~fits).sum()} of {fits.size} elements; "
            f"MODREG_FAST_FUZZ_SEED={fuzzing.SEED}"
        )
    if a.size and not np.any(other):
        name = what.split("[")[0]
        USED[name] = max(USED.get(name, 0.0), float(share.max()))


def check_softmax_fisher(call, backend):
    features, exact, information, upstream, gradients = fuzzing.call_softmax_fisher(call, backend)
    wide, u, got = helpers.wide(features), helpers.wide(upstream), helpers.wide(information)
    # -inf has a limit, which a logit far below the others has as well; whatever stands for NaN and inf is not compared.
    limit = [[np.where(x == -np.inf, -1e30, np.where(np.isfinite(x), x, 0)) for x in row] for row in wide]
    exact["upstream"] = np.where(np.isfinite(u), u, 0)
    values, expected = oracle.softmax_fisher(limit, **exact)
    allowed, gradient_bounds = bounds.softmax_fisher(limit, kinds=[kind_of(d) for d in call["dtypes"]], **exact)
    modalities, scales, batch = got.shape
    rows = iter(gradients)
    flat = [[x.reshape(*x.shape[:2], -1) for x in row] for row in wide]
    counts = [[np.broadcast_to(_counts(x, exact, m, s)[:, None], x.shape) for s, x in enumerate(r)] for m, r in enumerate(flat)]
    for m in range(modalities):
        for s in range(scales):
            # Pixels of (B, P) at which some modality, or this one, holds what is not finite.
            nan = np.any([(np.isnan(flat[k][s]) | (flat[k][s] == np.inf)) & counts[k][s] for k in range(modalities)], axis=(0, 2))
            low = np.any([(flat[k][s] == -np.inf) & counts[k][s] for k in range(modalities)], axis=(0, 2))
            own = (~np.isfinite(flat[m][s]) & counts[m][s]).any(1)
            here = counts[m][s].any((1, 2))
            must = (nan.any(1) & here) | own.any(1)
            assert np.isnan(got[m, s][must]).all(), f"information[{m}][{s}] is {got[m, s]} where a feature is not finite"
            rest = ~must
            within(
                got[m, s][rest],
                values[m, s][rest],
                allowed[m, s][rest],
                information.dtype,
                f"information[{m}][{s}]",
                np.isnan(got[m, s][rest]) & low.any(1)[rest],
            )
            gradient = next(rows)
            assert gradient.shape == features[m][s].shape and gradient.dtype == features[m][s].dtype
            gradient = helpers.wide(gradient).reshape(flat[m][s].shape)
            read = np.stack([counts[k][s].any((1, 2)) for k in range(modalities) if not exact["detach"] or k == m])
            infinite = (np.isinf(u[[m] if exact["detach"] else slice(None), s]) & read).any(0)  # samples
            other = (nan | low | infinite[:, None])[:, None] & ~np.isfinite(gradient)
            unknown = (nan | infinite[:, None])[:, None] & counts[m][s]  # 0 may be 0 times infinity that was not computed
            within(
                np.where(unknown & (gradient == 0), np.nan, gradient),
                np.where(unknown, np.nan, expected[m][s].reshape(gradient.shape)),
                gradient_bounds[m][s].reshape(gradient.shape),
                features[m][s].dtype,
                f"gradient[{m}][{s}]",
                other | (unknown & (gradient == 0)),
            )
            shows = own & (u[m, s] != 0)[:, None]
            assert (~np.isfinite(gradient)).any(1)[shows].all(), f"gradient[{m}][{s}] is finite where a feature is not"


def _counts(x, exact, m, s):
    """Where a feature counts: ``(B, P)``."""
    counts = np.ones((x.shape[0], x.shape[2]), bool) if exact["masks"] is None else exact["masks"][s].reshape(x.shape[0], -1)
    return counts if exact["present"] is None else counts & exact["present"][:, m, None]


def check_gradient_statistics(call, backend):
    entries, masks, result, upstream, gradients = fuzzing.call_gradient_statistics(call, backend)
    for k, tensors in enumerate(entries):
        g, e, f = map(helpers.wide, tensors)
        mask = None if masks is None else masks[k].numpy()
        counts = np.broadcast_to(True if mask is None else mask[:, None], g.shape)
        bad = [np.zeros(g.shape, bool) if x is None else counts & ~np.isfinite(x) for x in (g, e)]
        samples = [x.reshape(len(g), -1).any(1) for x in (bad[0], bad[0] | bad[1])]  # of the Fisher information, the attribution
        outputs = [None if x is None else x[k] for x in result]
        u = [None if x is None else helpers.wide(upstream_at(upstream, result, i, k)) for i, x in enumerate(outputs)]
        infinite = np.zeros(len(g), bool)
        for x in u:
            infinite |= False if x is None else np.isinf(x).reshape(len(g), -1).any(1)
        finite = [None if x is None else np.where(np.isfinite(x), x, 0) for x in u]
        arguments = (*(None if x is None else np.where(np.isfinite(x), x, 0) for x in (g, e)), f, mask, call["eps"], finite)
        want = oracle.gradient_statistics(*arguments)
        kind = kind_of(*(x.dtype for x in tensors[:2] if x is not None))
        bound = bounds.gradient_statistics(*arguments, kind=kind)
        names = ("fisher", "attribution", "fisher_map", "attribution_map")
        for i, (name, output) in enumerate(zip(names, outputs, strict=True)):
            if output is None:
                continue
            spoiled = samples[i % 2] if i < 2 else bad[0].any(1) | (bad[1].any(1) if i == 3 else False)
            got = helpers.wide(output)
            assert not np.isfinite(got[spoiled]).any(), f"{name} is finite where an input is not"
            part = [x[~spoiled] for x in (got, getattr(want, name), getattr(bound, name))]
            within(*part, output.dtype, f"{name}[{k}]")
        clean = ~(samples[1] | infinite)
        for name, x in zip(("dg", "de", "df"), tensors, strict=True):
            if x is not None:
                gradient = helpers.wide(gradients[id(x)])
                assert gradient.shape == x.shape and gradients[id(x)].dtype == x.dtype
                within(gradient[clean], getattr(want, name)[clean], getattr(bound, name)[clean], x.dtype, f"{name}[{k}]")
                if mask is not None:
                    assert (gradient[~mask] == 0 if name == "df" else np.moveaxis(gradient, 1, -1)[~mask] == 0).all()


def upstream_at(upstream, result, i, k):
    return upstream[id(result[i])][k] if i < 2 else upstream[id(result[i][k])]


def check_modality_cross_entropy(call, backend):
    logits, target, exact, sums, upstream, gradients = fuzzing.call_modality_cross_entropy(call, backend)
    wide, u, got = helpers.wide(logits), helpers.wide(upstream), helpers.wide(list(sums))
    limit = [np.where(x == -np.inf, -1e30, np.where(np.isfinite(x), x, 0)) for x in wide]
    exact["upstream"] = [np.where(np.isfinite(x), x, 0) for x in u]
    values, expected = oracle.modality_cross_entropy(limit, target, **exact)
    kind = kind_of(*call["dtypes"])
    allowed, gradient_bounds = bounds.modality_cross_entropy(limit, target, kind=kind, **exact)
    modalities, batch = got[0].shape
    present = np.ones((batch, modalities), bool) if exact["present"] is None else exact["present"]
    flat, counts = [x.reshape(*x.shape[:2], -1) for x in wide], (target != exact["ignore_index"]).reshape(batch, -1)
    own = [counts & present[:, m, None] for m in range(modalities)]  # (B, P)
    nan = [(np.isnan(x) | (x == np.inf)).any(1) & c for x, c in zip(flat, own, strict=True)]
    low = [(x == -np.inf).any(1) & c for x, c in zip(flat, own, strict=True)]
    any_nan, any_low = np.any(nan, axis=0), np.any(low, axis=0)
    names = ("cross_entropy", "joint", "information", "weights")
    for name, found, value, bound in zip(names, got, values, allowed, strict=True):
        per_modality = found.ndim == 2
        spoiled = np.stack([x.any(1) for x in nan]) if per_modality else any_nan.any(1)
        unsure = np.stack([x.any(1) for x in low]) if per_modality else any_low.any(1)
        if name == "weights":
            spoiled = unsure = np.zeros(batch, bool)
        assert np.isnan(found[spoiled]).all(), f"{name} is {found[spoiled]} where a logit is not finite"
        rest = ~spoiled
        other = ~np.isfinite(found)
        if name == "information":
            other |= np.isinf(got[0]) & (found == 0)  # -inf at the target; the oracle has some -1e30
        within(found[rest], value[rest], bound[rest], sums[0].dtype, name, (unsure & other)[rest])
    infinite = np.any([np.isinf(x).reshape(-1, batch).any(0) for x in u], axis=0)  # samples
    for m, (gradient, x) in enumerate(zip(gradients, logits, strict=True)):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        gradient = helpers.wide(gradient).reshape(flat[m].shape)
        unknown = ((any_nan | infinite[:, None]) & own[m])[:, None]
        within(
            np.where(unknown, 0, gradient),
            np.where(unknown, 0, expected[m].reshape(gradient.shape)),
            gradient_bounds[m].reshape(gradient.shape),
            x.dtype,
            f"gradient[{m}]",
            unknown | ((any_low & own[m])[:, None] & ~np.isfinite(gradient)),
        )
        shows = nan[m] & (u[0][m] != 0)[:, None]
        assert (~np.isfinite(gradient)).any(1)[shows].all(), f"gradient[{m}] is finite where a logit is not"


@pytest.fixture
def with_cross_entropy(backend):
    if not computes(backend, "modality_cross_entropy"):
        pytest.skip(f"{backend} has no modality_cross_entropy")
    return backend


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small calls; test_native_cpu.py compares the bits of more


@pytest.fixture(autouse=True, scope="module")
def _report():
    yield
    print("\nshare of the error bound used:", ", ".join(f"{name} {share:.2f}" for name, share in USED.items()))


@fuzzing.fuzz(FEW, fuzzing.softmax_fisher_calls())
def test_softmax_fisher(backend, call):
    check_softmax_fisher(call, backend)


@fuzzing.fuzz(FEW, fuzzing.gradient_statistics_calls())
def test_gradient_statistics(backend, call):
    check_gradient_statistics(call, backend)


@fuzzing.fuzz(FEW, fuzzing.modality_cross_entropy_calls())
def test_modality_cross_entropy(with_cross_entropy, call):
    check_modality_cross_entropy(call, with_cross_entropy)


@pytest.mark.slow
@fuzzing.fuzz(MANY, fuzzing.softmax_fisher_calls())
def test_many_calls_of_softmax_fisher(backend, call):
    check_softmax_fisher(call, backend)


@pytest.mark.slow
@fuzzing.fuzz(MANY, fuzzing.gradient_statistics_calls())
def test_many_calls_of_gradient_statistics(backend, call):
    check_gradient_statistics(call, backend)


@pytest.mark.slow
@fuzzing.fuzz(MANY, fuzzing.modality_cross_entropy_calls())
def test_many_calls_of_modality_cross_entropy(with_cross_entropy, call):
    check_modality_cross_entropy(call, with_cross_entropy)


# ---- the fuzzing itself can fail ----


def zero_one(gradients):
    gradients[0][(-1,) * gradients[0].dim()] = 0
    return gradients


FAULTS = {
    "values 1e-3 too large": ("softmax_fisher", "forward", lambda out: out._replace(information=out.information * 1.001)),
    "NaN hidden": ("softmax_fisher", "forward", lambda out: out._replace(information=out.information.nan_to_num(0.5))),
    "one element of a gradient left out": ("softmax_fisher", "backward", zero_one),
    "a gradient in the order of memory": (
        "softmax_fisher",
        "backward",
        lambda out: [x.transpose(1, -1).contiguous().view(x.shape) for x in out],
    ),
    "statistics 1e-3 too large": ("gradient_statistics", "forward", lambda out: out._replace(fisher=out.fisher * 1.001)),
    "cross entropies 1e-3 too large": (
        "modality_cross_entropy",
        "forward",
        lambda out: out._replace(cross_entropy=out.cross_entropy * 1.001),
    ),
    "joint for own": ("modality_cross_entropy", "forward", lambda out: out._replace(joint=out.cross_entropy[0])),
    "one element of its gradient left out": ("modality_cross_entropy", "backward", zero_one),
    "the last gradient 1e-3 too large": ("gradient_statistics", "backward", lambda out: [*out[:-1], out[-1] * 1.001]),
}


@pytest.mark.parametrize("stem, function, fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(monkeypatch, stem, function, fault):
    module = getattr(reference, stem)
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: fault(right(*arguments)))
    check, calls = globals()[f"check_{stem}"], getattr(fuzzing, f"{stem}_calls")
    search = fuzzing.fuzz(100, calls(), shrink=False)(lambda call: check(call, "reference"))
    with pytest.raises(AssertionError):
        search()

"""How far arithmetic of a given precision may be from the oracle, element by element: a running error bound in NumPy float64.

``unit`` is the rounding error of one operation, 2^-24 in float32 and 2^-53 in float64. The derivation stands in docs/numerics.md. Errors
of factors are carried to first order, with intervals where a divisor may be wrong by as much as its size. A bound is infinite nowhere but
where the definition divides by 0 (``eps`` = 0)."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import oracle

UNITS = {"float32": 2.0**-24, "float64": 2 * 2.0**-53}  # in float64 the oracle rounds as well
SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022}  # what is smaller may have become 0


def terms(channels, smallest_block=8):
    """Roundings that a term of a sum over the channels meets, in blocks of 16 at most."""
    return min(channels, 16 + channels / smallest_block)


normal = functools.lru_cache(32)(oracle.normal)


def noise(shape, seed, tensor, draw, unit):
    """Of the normals: the logarithm near 1 and the angle lose most."""
    batch, channels, pixels = shape
    whole = normal((batch, -(-channels // 4) * 4, pixels), seed, tensor, draw)
    radius = np.hypot(whole[:, 0::2], whole[:, 1::2]).repeat(2, axis=1)[:, :channels]
    return 8 * unit * radius + np.minimum(np.sqrt(2 * unit), 2 * unit / radius)


def _log_softmax(x, error, unit, smallest):
    """log softmax and softmax of ``x`` ``(C, P)`` known to ``error``, with the errors of both."""
    log_p = oracle.log_softmax(x)
    p = np.exp(log_p)
    log_error = error + (p * error).sum(0) + unit * (2 * np.abs(x - x.max(0)) + np.abs(log_p) + terms(len(x)) + 4)
    return log_p, p, log_error, np.minimum(1, p * np.expm1(np.minimum(log_error, 1)) + smallest)


def _pixel(x, y, mean, mean_error, w, unit, smallest, eps):
    """One modality and draw at the pixels ``(C, P)``: I, dI/dX and what it adds to the bracket of dI/dR, and the errors of these."""
    log_q, q, _, q_error = _log_softmax(mean, mean_error, unit, smallest)
    log_p, p, log_error, p_error = _log_softmax(x, y, unit, smallest)
    channels = len(x)
    d, d_error = p - q, p_error + q_error + unit * np.abs(p - q)
    n, f = (d * d).sum(0), eps - (q * log_p).sum(0)
    n_error = (2 * np.abs(d) * d_error + d_error**2).sum(0) + terms(channels) * unit * n
    f_error = (q_error * (np.abs(log_p) + log_error) + q * log_error).sum(0) + (terms(channels) + 2) * unit * f
    low = np.maximum(f - f_error, eps * (1 - 2 * unit))
    inverse, inverse_error = 1 / f, 1 / low - 1 / f + 2 * unit / f
    i, i_error = n * inverse, (n + n_error) * (inverse + inverse_error) - n * inverse
    a, a_error = 2 * w * inverse, 2 * abs(w) * inverse_error + 4 * unit * abs(w) * inverse
    b = w * n * inverse**2
    b_error = abs(w) * ((n + n_error) * (inverse + inverse_error) ** 2 * (1 + 4 * unit) - n * inverse**2)
    s, s_error = (p * d).sum(0), (p_error * np.abs(d) + p * d_error + p_error * d_error).sum(0) + terms(channels) * unit
    first = p * (d - s)
    first_error = p_error * (np.abs(d) + np.abs(s)) + (p + p_error) * (d_error + s_error) + 2 * unit * p
    own = a * first - b * d
    own_error = np.abs(a) * first_error + a_error * (np.abs(first) + first_error) + np.abs(b) * d_error
    own_error += b_error * (np.abs(d) + d_error) + 2 * unit * (np.abs(a * first) + np.abs(b * d))
    pull = b * log_p - a * d
    pull_error = np.abs(a) * d_error + a_error * (np.abs(d) + d_error) + np.abs(b) * log_error
    pull_error += b_error * (np.abs(log_p) + log_error) + 2 * unit * (np.abs(a * d) + np.abs(b * log_p))
    return SimpleNamespace(
        i=i, i_error=i_error, own_error=own_error, own=own, pull=pull, pull_error=pull_error, q=q, q_error=q_error
    )


def softmax_fisher(
    features,
    masks=None,
    present=None,
    sigma=None,
    samples=1,
    seed=0,
    detach=False,
    eps=oracle.EPS,
    upstream=None,
    kinds=("float32",),
):
    """Errors of ``oracle.softmax_fisher`` of the same arguments: of the information, and of the gradients ``[m][s]``. ``kinds``: the
    precision of each scale."""
    shapes = [x.shape for x in features[0]]
    features = [[x.reshape(*x.shape[:2], -1) for x in row] for row in features]
    modalities, scales, batch = len(features), len(shapes), shapes[0][0]
    information = np.zeros((modalities, scales, batch))
    gradients = [[np.zeros_like(x) for x in row] for row in features]
    for s, b in itertools.product(range(scales), range(batch)):
        held = [m for m in range(modalities) if present is None or present[b, m]]
        unit, smallest = UNITS[kinds[s]], SMALLEST[kinds[s]]
        valid = np.arange(features[0][s].shape[2]) if masks is None else np.flatnonzero(masks[s][b].ravel())
        if not held or valid.size == 0:
            continue
        x = {m: features[m][s][b][:, valid] for m in held}
        mean = np.mean(list(x.values()), axis=0)
        mean_error = (len(held) > 1) * (len(held) + 1) * unit * np.mean([np.abs(y) for y in x.values()], axis=0)
        for y in x.values() if len(held) == 2 else ():  # exp(R) may be the product of these, which may be subnormal
            root = np.exp((y - y.max(0)) / 2)
            mean_error = mean_error + np.where(root < smallest, np.minimum(1, 2 * unit * smallest / np.maximum(root, 1e-323)), 0)
        pull, pull_error, size = 0, 0, 0
        for m, n in itertools.product(held, range(samples)):
            noisy, error = x[m], np.zeros_like(x[m])
            if sigma is not None and sigma[m]:
                shape = features[m][s].shape
                drawn = sigma[m] * normal(shape, seed, m * scales + s, n)[b][:, valid]
                noisy = x[m] + drawn
                error = sigma[m] * noise(shape, seed, m * scales + s, n, unit)[b][:, valid]
                error += unit * (np.abs(noisy) + 2 * np.abs(drawn))
            w = 0.0 if upstream is None else upstream[m, s, b] / (valid.size * samples)
            one = _pixel(noisy, error, mean, mean_error, w, unit, smallest, eps)
            information[m, s, b] += (one.i_error + 8 * unit * one.i).sum() / (valid.size * samples)
            gradients[m][s][b][:, valid] += one.own_error + (samples + 2) * unit * np.abs(one.own)
            pull, pull_error, size = pull + one.pull, pull_error + one.pull_error, size + np.abs(one.pull)
        if detach:
            continue
        q, q_error, pull_error = one.q, one.q_error, pull_error + len(held) * samples * unit * size
        inner = (q * pull).sum(0)
        inner_error = (q_error * np.abs(pull) + (q + q_error) * pull_error).sum(0)
        inner_error += terms(len(q)) * unit * (q * np.abs(pull)).sum(0)
        shared = q_error * (np.abs(pull) + np.abs(inner)) + (q + q_error) * (pull_error + inner_error)
        shared += 4 * unit * q * (np.abs(pull) + np.abs(inner))
        for m in held:
            gradients[m][s][b][:, valid] += shared / len(held)
    return information, [[x.reshape(shapes[s]) for s, x in enumerate(row)] for row in gradients]


def gradient_statistics(g, e=None, f=None, mask=None, eps=oracle.EPS, upstream=None, kind="float32"):
    """Errors of ``oracle.gradient_statistics`` of the same arguments, under the same names. All sums are of squares, so all errors are
    relative, but for what is too small to be squared."""
    unit, smallest = UNITS[kind], SMALLEST[kind]
    exact = oracle.gradient_statistics(g, e, f, mask, eps, upstream)
    spatial = (slice(None), *[None] * (g.ndim - 2))
    valid = np.ones(exact.fisher_map.shape, bool) if mask is None else mask
    count = np.maximum(valid.reshape(len(valid), -1).sum(1), 1)
    relative = (terms(g.shape[1], 16) + 8) * unit
    lost = g.shape[1] * smallest  # of a sum of squares at a pixel
    divisor = np.ones_like(exact.df) if f is None else np.where(valid, f + eps, 1)
    out = SimpleNamespace(fisher_map=np.where(valid, relative * exact.fisher_map + lost / divisor, 0))
    sums = unit * (count if kind == "float64" else np.log2(count) + 1)  # over pixels; the oracle adds one after the other
    out.fisher = out.fisher_map.reshape(len(valid), -1).sum(1) / count + sums * exact.fisher
    # sqrt(A + lost) - sqrt(A) <= sqrt(lost)
    out.attribution_map = np.where(valid, relative * exact.attribution_map + np.sqrt(lost), 0)
    out.attribution = (relative + sums) * exact.attribution + np.sqrt(count * lost)
    size = np.where(valid, _weight(upstream, 0, spatial) / count[spatial] + _weight(upstream, 2, slice(None)), 0)
    step = 4 * smallest * unit  # of subnormal numbers, which lose digits
    dg = 2 * relative * (size / divisor)[:, None] * np.abs(g) + (np.maximum(1, size) * (size > 0) / divisor * step)[:, None]
    out.df = 2 * relative * size * exact.fisher_map / divisor + size * lost / divisor**2
    out.de = np.zeros_like(dg)
    if e is not None:
        v, v_error = np.zeros_like(exact.df), np.zeros_like(exact.df)
        for u, a, error in (
            (_weight(upstream, 1, spatial), exact.attribution[spatial], out.attribution[spatial]),
            (_weight(upstream, 3, slice(None)), exact.attribution_map, out.attribution_map),
        ):
            positive = np.where(a > 0, a, 1)
            some = np.broadcast_to(np.where(a > 0, u / positive, 0), v.shape)
            wrong = np.where(some > 0, np.where(a > 2 * error, 2 * error / positive, np.inf), 0)  # relative
            v, v_error = v + some, v_error + np.where(some > 0, some, 1) * (wrong + 4 * unit * (some > 0))
        v, v_error = np.where(valid, v, 0)[:, None], np.where(valid, v_error, 0)[:, None]
        with np.errstate(invalid="ignore"):
            dg = dg + np.nan_to_num((v_error + 4 * unit * v) * np.abs(g) * e**2, nan=0.0, posinf=np.inf)
            out.de = np.nan_to_num((v_error + 4 * unit * v) * g**2 * np.abs(e), nan=0.0, posinf=np.inf)
        dg, out.de = dg + 4 * v * smallest * (1 + np.abs(g)), out.de + 4 * v * smallest * (1 + np.abs(e))
    out.dg = dg
    return out


def _interval(f, f_error, n, n_error, eps, unit):
    """1 / f and N / f^2 with their errors, where the divisor is at least ``eps``."""
    low = np.maximum(f - f_error, eps * (1 - 2 * unit))
    inverse, inverse_error = 1 / f, 1 / low - 1 / f + 2 * unit / f
    b_error = (n + n_error) * (inverse + inverse_error) ** 2 * (1 + 4 * unit) - n * inverse**2
    return inverse, inverse_error, n * inverse**2, b_error


def modality_cross_entropy(
    logits, target, weight=None, ignore_index=-100, smoothing=0.0, present=None, eps=oracle.EPS, upstream=None, kind="float32"
):
    """Errors of ``oracle.modality_cross_entropy`` of the same arguments: of its four sums, and of the gradients ``[m]``."""
    unit, smallest, near = UNITS[kind], SMALLEST[kind], {"float32": 25, "float64": 240}[kind]
    modalities, shape = len(logits), logits[0].shape
    batch, classes = shape[:2]
    logits, target = [x.reshape(batch, classes, -1) for x in logits], target.reshape(batch, -1)
    w = np.ones(classes) if weight is None else np.asarray(weight, dtype=np.float64)
    u, joint_u, v = np.zeros((3, modalities, batch)) if upstream is None else np.broadcast_arrays(*upstream)
    sums = [np.zeros((modalities, batch)), np.zeros(batch), np.zeros((modalities, batch)), np.zeros(batch)]
    gradients = [np.zeros_like(x) for x in logits]
    for b in range(batch):
        held = [m for m in range(modalities) if present is None or present[b, m]]
        valid = np.flatnonzero(target[b] != ignore_index)
        if not held or valid.size == 0:
            continue
        y, pixels = target[b, valid], np.arange(valid.size)
        t = np.repeat((smoothing / classes * w)[:, None], valid.size, axis=1)
        t[y, pixels] += (1 - smoothing) * w[y]
        total, at_y = t.sum(0), np.zeros_like(t, dtype=bool)
        at_y[y, pixels] = True
        x = {m: logits[m][b][:, valid] for m in held}

        def one(x, error, t=t, total=total, at_y=at_y, y=y, pixels=pixels):
            """Of logits known to ``error``: softmax, cross entropy and g = T p - t, with their errors. Exponentials may be relative to
            the logit of the target, if that is not so far below the largest that they could overflow."""
            below = np.minimum(x.max(0) - x[y, pixels], near)
            _, p, log_error, _ = _log_softmax(x, error + 2 * unit * below, unit, smallest)
            p_error = np.minimum(1, p * np.expm1(np.minimum(log_error, 1)) + smallest)
            log_p = oracle.log_softmax(x)
            size = np.abs(log_p) + np.abs(x - x.max(0)) + 2 * below
            ce = (t * -np.where(t > 0, log_p, 0)).sum(0)
            ce_error = (t * (log_error + (terms(len(x)) + 6) * unit * size)).sum(0) + 4 * smallest
            g, g_error = total * p - t, total * p_error + 3 * unit * (total * p + t)
            others = np.where(at_y, 0, p_error + terms(len(x)) * unit * p).sum(
                0
            )  # g of the target is minus the sum of the others
            return p, p_error, ce, ce_error, g, g_error + at_y * total * others

        mean_error = (len(held) > 1) * (len(held) + 2) * unit * np.mean([np.abs(a) + np.abs(a[y, pixels]) for a in x.values()], 0)
        q, q_error, joint, joint_error, joint_g, joint_g_error = one(np.mean(list(x.values()), axis=0), mean_error)
        rounding = 32 * unit  # sums over a tile
        sums[1][b] = (joint_error + rounding * joint).sum()
        sums[3][b] = rounding * w[y].sum()
        j = np.abs(joint_u[0, b]) / len(held)
        for m in held:
            p, p_error, ce, ce_error, g, g_error = one(x[m], np.zeros_like(x[m]))
            n = (g**2).sum(0)
            n_error = (2 * np.abs(g) * g_error + g_error**2).sum(0) + (terms(classes) + 8) * unit * n
            f, f_error = ce + eps, ce_error + 2 * unit * ce
            inverse, inverse_error, ratio, ratio_error = _interval(f, f_error, n, n_error, eps, unit)
            sums[0][m, b] = (ce_error + rounding * ce).sum()
            sums[2][m, b] = ((n + n_error) * (inverse + inverse_error) - n * inverse + rounding * n * inverse).sum()
            first, first_error = u[m, b] - v[m, b] * ratio, np.abs(v[m, b]) * ratio_error
            first_error = first_error + 2 * unit * (np.abs(u[m, b]) + np.abs(v[m, b]) * ratio)
            a = 2 * np.abs(v[m, b]) * total * inverse
            a_error = 2 * np.abs(v[m, b]) * total * (inverse_error + 4 * unit * inverse)
            s = (p * g).sum(0)
            s_error = (p_error * np.abs(g) + (p + p_error) * g_error).sum(0) + terms(classes) * unit * (p * np.abs(g)).sum(0)
            r, size = p * (g - s), np.abs(g) + np.abs(s)
            r_error = p_error * size + (p + p_error) * (g_error + s_error) + 6 * unit * p * (size + total * p + t)
            error = np.abs(first) * g_error + first_error * (np.abs(g) + g_error) + a * r_error + a_error * (np.abs(r) + r_error)
            error += j * joint_g_error + 6 * unit * (np.abs(first) * (total * p + t) + j * (total * q + t))
            gradients[m][b][:, valid] = error + smallest
    return sums, [x.reshape(shape) for x in gradients]


def _weight(upstream, k, index):
    return 0.0 if upstream is None or upstream[k] is None else np.abs(upstream[k])[index]

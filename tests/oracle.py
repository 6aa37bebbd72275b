"""The definitions in NumPy float64, written from the formulas alone: loops over samples, scales, modalities and draws.

Valid pixels are picked by their index, so whatever lies elsewhere cannot matter. Gradients go through the log-softmax, whose
Jacobian is ``identity - p``; ``test_oracle.py`` holds them to finite differences."""

import itertools
import math
from types import SimpleNamespace

import numpy as np

EPS = 1e-8


# ---- noise ----


def philox(counter, key):
    """Philox4x32-10: four and two words in, four words out; Python integers or uint64 arrays that hold 32 bits."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def normal(shape, seed: int, tensor: int, draw: int) -> np.ndarray:
    """Noise of one tensor ``(B, C, P)``: the block of four channels that holds an element, then the word of its channel."""
    _, channels, pixels = shape
    b, c, p = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return normal_of_block((b * math.ceil(channels / 4) + c // 4) * pixels + p, c, seed, tensor, draw)


def normal_of_block(block, channel, seed: int, tensor: int, draw: int) -> np.ndarray:
    """Noise of channels of blocks, arrays of one shape."""
    block, zero = block.astype(np.uint64), np.zeros(block.shape, np.uint64)
    words = philox(
        (block & 0xFFFFFFFF, block >> 32, zero + tensor, zero + draw), (zero + (seed & 0xFFFFFFFF), zero + (seed >> 32))
    )
    upper = channel % 4 >= 2
    radius = np.sqrt(-2 * np.log((np.where(upper, words[2], words[0]) + 0.5) / 2**32))
    angle = 2 * np.pi * np.where(upper, words[3], words[1]) / 2**32
    return radius * np.where(channel % 2 == 1, np.sin(angle), np.cos(angle))


# ---- softmax_fisher ----


def log_softmax(x):
    shifted = x - x.max(0)
    return shifted - np.log(np.exp(shifted).sum(0))


def _through_log_softmax(p, v):
    """Gradient of x from the gradient ``v`` of ``log softmax(x)``; all ``(C, P)``."""
    return v - p * v.sum(0)


def softmax_fisher(features, masks=None, present=None, sigma=None, samples=1, seed=0, detach=False, eps=EPS, upstream=None):
    """``features[m][s]`` ``(B, C, *spatial)``, ``masks[s]`` ``(B, *spatial)``: information ``(M, S, B)`` and, from an
    ``upstream`` of that shape, the gradients ``[m][s]``."""
    shapes = [x.shape for x in features[0]]
    features = [[x.reshape(*x.shape[:2], -1) for x in row] for row in features]
    modalities, scales, batch = len(features), len(shapes), shapes[0][0]
    sigma = [0.0] * modalities if sigma is None else sigma
    noise = {
        (m, s, n): sigma[m] * normal(features[m][s].shape, seed, m * scales + s, n)
        if sigma[m]
        else np.zeros(features[m][s].shape)
        for m, s, n in itertools.product(range(modalities), range(scales), range(samples))
    }
    information = np.zeros((modalities, scales, batch))
    to_features = [[np.zeros_like(x) for x in row] for row in features]
    for s, b in itertools.product(range(scales), range(batch)):
        held = [m for m in range(modalities) if present is None or present[b, m]]
        valid = np.arange(features[0][s].shape[2]) if masks is None else np.flatnonzero(masks[s][b].ravel())
        if not held or valid.size == 0:
            continue
        x = {m: features[m][s][b][:, valid] for m in held}
        q = np.exp(log_softmax(np.mean(list(x.values()), axis=0)))
        to_reference = np.zeros_like(q)
        for m, n in itertools.product(held, range(samples)):
            log_p = log_softmax(x[m] + noise[m, s, n][b][:, valid])
            p = np.exp(log_p)
            square, f = np.einsum("cp,cp->p", p - q, p - q), eps - np.einsum("cp,cp->p", q, log_p)
            information[m, s, b] += (square / f).sum() / (valid.size * samples)
            if upstream is not None:
                w = upstream[m, s, b] / (valid.size * samples)
                to_log_p, to_log_q = 2 * (p - q) / f * p + square / f**2 * q, (-2 * (p - q) / f + square / f**2 * log_p) * q
                to_features[m][s][b][:, valid] += _through_log_softmax(p, w * to_log_p)
                to_reference += _through_log_softmax(q, w * to_log_q)
        if not detach:
            for m in held:
                to_features[m][s][b][:, valid] += to_reference / len(held)
    if upstream is None:
        return information
    return information, [[x.reshape(shapes[s]) for s, x in enumerate(row)] for row in to_features]


# ---- gradient_statistics ----


def gradient_statistics(g, e=None, f=None, mask=None, eps=EPS, upstream=None):
    """One tensor: ``g``, ``e`` ``(B, C, *spatial)``, ``f``, ``mask`` ``(B, *spatial)``. ``upstream`` holds those of ``fisher (B)``,
    ``attribution (B)``, ``fisher_map`` and ``attribution_map``, or None. Returns these four and ``dg, de, df``."""
    shape, (batch, channels) = g.shape, g.shape[:2]
    g = g.reshape(batch, channels, -1)
    pixels = g.shape[2]
    e, f, mask = (
        None if x is None else x.reshape(*head, pixels) for x, head in ((e, (batch, channels)), (f, (batch,)), (mask, (batch,)))
    )
    out = SimpleNamespace(fisher=np.zeros(batch), attribution=np.zeros(batch), dg=np.zeros_like(g))
    out.fisher_map, out.attribution_map, out.df, out.de = (
        np.zeros((batch, pixels)),
        np.zeros((batch, pixels)),
        np.zeros((batch, pixels)),
        np.zeros_like(g),
    )
    u_fisher, u_attribution, u_fisher_map, u_attribution_map = [None] * 4 if upstream is None else upstream

    def of(u, *index):
        return 0.0 if u is None else u.reshape(batch, -1)[index if len(index) > 1 else (index[0], 0)]

    for b in range(batch):
        valid = [p for p in range(pixels) if mask is None or mask[b, p]]
        for p in valid:
            if f is not None:
                out.fisher_map[b, p] = (g[b, :, p] ** 2).sum() / (f[b, p] + eps)
                out.fisher[b] += out.fisher_map[b, p] / len(valid)
            if e is not None:
                out.attribution_map[b, p] = math.sqrt(((g[b, :, p] * e[b, :, p]) ** 2).sum())
        out.attribution[b] = math.sqrt((out.attribution_map[b] ** 2).sum())
        for p in valid:
            if f is not None:
                u = of(u_fisher, b) / len(valid) + of(u_fisher_map, b, p)
                out.dg[b, :, p] += u * 2 * g[b, :, p] / (f[b, p] + eps)
                out.df[b, p] -= u * out.fisher_map[b, p] / (f[b, p] + eps)
            if e is not None and out.attribution_map[b, p] > 0:
                u = of(u_attribution, b) / out.attribution[b] + of(u_attribution_map, b, p) / out.attribution_map[b, p]
                out.dg[b, :, p] += u * g[b, :, p] * e[b, :, p] ** 2
                out.de[b, :, p] += u * g[b, :, p] ** 2 * e[b, :, p]
    spatial = (batch, *shape[2:])
    for name in ("fisher_map", "attribution_map", "df"):
        setattr(out, name, getattr(out, name).reshape(spatial))
    out.dg, out.de = out.dg.reshape(shape), out.de.reshape(shape)
    return out


# ---- modality_cross_entropy ----


def modality_cross_entropy(logits, target, weight=None, ignore_index=-100, smoothing=0.0, present=None, eps=EPS, upstream=None):
    """``logits[m]`` ``(B, C, *spatial)``, ``target`` ``(B, *spatial)``: cross entropy ``(M, B)``, joint ``(B,)``, information ``(M, B)``
    and weights ``(B,)``, as sums, and from an ``upstream`` of the first three the gradients ``[m]``. Pixel by pixel."""
    shape, modalities = logits[0].shape, len(logits)
    batch, classes = shape[:2]
    logits, target = [x.reshape(batch, classes, -1) for x in logits], target.reshape(batch, -1)
    w = np.ones(classes) if weight is None else np.asarray(weight, dtype=np.float64)
    sums = np.zeros((modalities, batch)), np.zeros(batch), np.zeros((modalities, batch)), np.zeros(batch)
    to_logits = [np.zeros_like(x) for x in logits]
    for b, i in itertools.product(range(batch), range(target.shape[1])):
        held = [m for m in range(modalities) if present is None or present[b, m]]
        y = int(target[b, i])
        if y == ignore_index or not held:
            continue
        t = smoothing / classes * w
        t[y] += (1 - smoothing) * w[y]
        use = t > 0
        sums[3][b] += w[y]
        log_q = log_softmax(np.mean([logits[m][b, :, i] for m in held], axis=0)[:, None])[:, 0]
        sums[1][b] -= (t[use] * log_q[use]).sum()
        for m in held:
            log_p = log_softmax(logits[m][b, :, i][:, None])[:, 0]
            p, ce = np.exp(log_p), -(t[use] * log_p[use]).sum()
            g = t.sum() * p - t
            sums[0][m, b] += ce
            sums[2][m, b] += (g**2).sum() / (ce + eps)
            if upstream is not None:
                u, joint, v = upstream[0][m, b], upstream[1][b] / len(held), upstream[2][m, b]
                slope = u - v * (g**2).sum() / (ce + eps) ** 2  # of ce; g depends on p on its own
                through_p = v * 2 * t.sum() * g / (ce + eps)
                to_logits[m][b, :, i] = (
                    slope * g + p * (through_p - (p * through_p).sum()) + joint * (t.sum() * np.exp(log_q) - t)
                )
    if upstream is None:
        return sums
    return sums, [x.reshape(shape) for x in to_logits]


# ---- penalties ----


def entropy(f):
    """Of samples along the first axis."""
    mean = f.mean(0)
    return np.mean([x * math.log(x) if x > 0 else 0.0 for x in f]) - mean * math.log(mean)


def penalty(information, objective, eps=EPS, weights=None, valid=None):
    """``information``, ``valid`` ``(M, S, B)``."""
    modalities, scales, _ = information.shape
    terms = []
    for m, s in itertools.product(range(modalities), range(scales)):
        values = information[m, s] if valid is None else information[m, s][valid[m, s]]
        if values.size:
            x, w = values.mean() + eps, 1.0 if weights is None else weights[s]
            terms.append(-w * math.log(x) if objective == "log" else w / x)
    return math.sqrt(sum(t * t for t in terms)) if objective == "norm" else sum(terms)


def attribution_penalty(attribution, target, norm, present=None):
    """``attribution`` ``(M, B)``, ``target`` M weights: the penalty and the mean share of each modality."""
    target = np.asarray(target, dtype=np.float64)
    distances, shares = [], []
    for b in range(attribution.shape[1]):
        held = np.ones(len(target), bool) if present is None else present[b]
        a, r = np.where(held, attribution[:, b], 0), np.where(held, target, 0)
        if a.sum() > 0 and r.sum() > 0:
            shares.append(a / a.sum())
            difference = np.abs(a / a.sum() - r / r.sum())
            distances.append((difference if norm == "l1" else difference**2).sum())
    return (np.mean(distances), np.mean(shares, axis=0)) if distances else (0.0, None)


def resize_mask(mask, size):
    """A pixel of the new grid is valid when valid pixels cover at least half of its area. In integers, so that ties are exact."""
    area = mask.astype(np.int64)
    for axis, new in enumerate(size, start=1):
        old = mask.shape[axis]
        overlap = np.array(
            [[max(0, min((i + 1) * old, (j + 1) * new) - max(i * old, j * new)) for j in range(old)] for i in range(new)]
        )
        area = np.moveaxis(np.tensordot(overlap, area, axes=(1, axis)), 0, axis)
    return 2 * area >= math.prod(mask.shape[1:])


def central_difference(function, x, step=1e-5):
    """Gradient of a scalar function by central differences."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        out[i] = (function(high) - function(low)) / (2 * step)
    return out

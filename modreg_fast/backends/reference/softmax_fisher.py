"""Functional Fisher information of softmax features: the definition, in plain PyTorch on any device.

Per scale, with modality features ``X_m`` of shape ``(B, C, P)``::

    q    = softmax_c( mean over present modalities of X_m )
    p_m  = softmax_c( X_m + sigma_m * noise )
    f_m  = -sum_c q_c log p_mc
    I_m  = sum_c (p_mc - q_c)^2 / (f_m + eps)
    information[m, s, b] = mean of I_m over valid pixels and draws
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modreg_fast.backends.reference.philox import standard_normal


def accumulation_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Term(NamedTuple):
    """What one draw of one modality at one scale contributes, per pixel; ``(B, C, P)`` or ``(B, 1, P)``."""

    modality: int
    p: Tensor
    log_p: Tensor
    d: Tensor  # p - q
    n: Tensor  # sum_c d^2
    f: Tensor  # cross entropy + eps


def keep(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x``, 0 where it is not valid (whatever the memory holds there)."""
    return x if valid is None else torch.where(valid, x, 0)


def _validity(masks: list[Tensor], present: Tensor | None, s: int, modalities: int) -> list[Tensor | None]:
    """Per modality, where scale ``s`` counts: broadcastable to ``(B, 1, P)``, or None for everywhere."""
    mask = masks[s][:, None] if masks else None
    if present is None:
        return [mask] * modalities
    return [present[:, m, None, None] if mask is None else mask & present[:, m, None, None] for m in range(modalities)]


def _scale_terms(
    features: list[Tensor],
    s: int,
    valid: list[Tensor | None],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    eps: float,
    detach_reference: bool = False,
) -> tuple[Tensor, Tensor | int, Iterator[_Term]]:
    """The reference ``q``, the number of present modalities ``(B, 1, 1)`` and the terms of scale ``s``."""
    modalities = len(sigma)
    scales = len(features) // modalities
    xs = [keep(x, valid[m]) for m, x in enumerate(features[s::scales])]
    count = modalities if present is None else present.sum(1).clamp(min=1)[:, None, None]
    log_q = torch.log_softmax(sum(xs[1:], xs[0]) / count, dim=1)
    q = log_q.exp().detach() if detach_reference else log_q.exp()

    def terms() -> Iterator[_Term]:
        for m, x in enumerate(xs):
            for draw in range(samples):
                if sigma[m] > 0:
                    noise = standard_normal(x.shape, seed=seed, tensor=m * scales + s, draw=draw, dtype=x.dtype)  # type: ignore[arg-type]
                    log_p = torch.log_softmax(x + sigma[m] * noise, dim=1)
                else:
                    log_p = torch.log_softmax(x, dim=1)
                p = log_p.exp()
                d = p - q
                yield _Term(m, p, log_p, d, d.square().sum(1, keepdim=True), -(q * log_p).sum(1, keepdim=True) + eps)

    return q, count, terms()


def forward(
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``features``: ``M * S`` tensors ``(B, C_s, P_s)``, modality first; ``masks``: none, or ``S`` bool ``(B, P_s)``;
    ``present``: ``(B, M)`` bool. Returns ``information (M, S, B)`` and ``counts (S, B)``, the number of valid pixels."""
    modalities, batch = len(sigma), features[0].shape[0]
    scales = len(features) // modalities
    dtype = accumulation_dtype(features)
    features = [x.to(dtype) for x in features]
    information = []
    counts = []
    for s in range(scales):
        pixels = features[s].shape[2]
        count = masks[s].sum(1) if masks else torch.full((batch,), pixels, device=features[s].device)
        valid = _validity(masks, present, s, modalities)
        totals = [torch.zeros(batch, dtype=dtype, device=features[s].device) for _ in range(modalities)]
        for term in _scale_terms(features, s, valid, present, sigma, samples, seed, eps)[2]:
            m = term.modality
            totals[m] = totals[m] + keep(term.n / term.f, valid[m]).sum((1, 2))
        information.append(torch.stack(totals) / (count.clamp(min=1) * samples))
        counts.append(count)
    return torch.stack(information, dim=1), torch.stack(counts)


def backward(
    grad: Tensor,
    counts: Tensor,
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    detach_reference: bool,
    eps: float,
) -> list[Tensor]:
    """Gradient with respect to each feature; with ``J(v) a = v * a - v * sum_c(v * a)``, the softmax Jacobian, and R the mean::

        dI/dX_m = 2 / (f + eps) J(p) d  -  N / (f + eps)^2 d
        dI/dR   = J(q) [ -2 / (f + eps) d  +  N / (f + eps)^2 log p ]

    In differentiable PyTorch, so that it serves second derivatives as well."""
    modalities = len(sigma)
    scales = len(features) // modalities
    dtype = accumulation_dtype(features)
    wide = [x.to(dtype) for x in features]
    gradients: list[Tensor] = [torch.empty(0)] * len(features)
    for s in range(scales):
        weight = (grad[:, s] / (counts[s].clamp(min=1) * samples))[:, :, None, None]
        valid = _validity(masks, present, s, modalities)
        q, count, terms = _scale_terms(wide, s, valid, present, sigma, samples, seed, eps, detach_reference)
        own = [torch.zeros_like(q) for _ in range(modalities)]
        pull = torch.zeros_like(q)  # sum over modalities and draws of the bracket in dI/dR
        for m, p, log_p, d, n, f in terms:
            w = keep(weight[m], valid[m])
            a, b = 2 * w / f, w * n / f.square()
            own[m] = own[m] + a * p * (d - (p * d).sum(1, keepdim=True)) - b * d
            pull = pull - a * d + b * log_p
        shared = 0 if detach_reference else q * (pull - (q * pull).sum(1, keepdim=True)) / count
        for m in range(modalities):
            k = m * scales + s
            gradients[k] = keep(own[m] + shared, valid[m]).to(features[k].dtype)
    return gradients

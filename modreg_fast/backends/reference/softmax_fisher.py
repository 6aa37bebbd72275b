"""Functional Fisher information of softmax features: the definition, in plain PyTorch on any device.

Per scale, with modality features ``X_m`` of shape ``(B, C, P)``::

    q    = softmax_c( mean over present modalities of X_m )
    p_m  = softmax_c( X_m + sigma_m * noise )
    f_m  = -sum_c q_c log p_mc
    I_m  = sum_c (p_mc - q_c)^2 / (f_m + eps)
    information[m, s, b] = mean of I_m over valid pixels and draws

Every backend takes a :class:`Problem` and gives a :class:`Result`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modreg_fast.backends.layout import flat, shaped_like
from modreg_fast.backends.reference.philox import standard_normal


def accumulation_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


class Problem(NamedTuple):
    """One call: what it reads, and its options. ``functional`` makes and checks it, every backend reads it."""

    features: list[Tensor]  # M * S tensors (B, C_s, *spatial_s), modality first; flat: (B, C_s, P_s)
    masks: list[Tensor]  # none, or S bool tensors (B, P_s): the valid pixels
    present: Tensor | None  # (B, M) bool
    sigma: list[float]  # M
    samples: int
    seed: Tensor | None  # one int64; None without noise
    detach_reference: bool
    eps: float
    channel_dim: int = 1  # of the features

    def flat(self) -> "Problem":
        return Problem([flat(x, self.channel_dim) for x in self.features], *self[1:-1])

    def shaped(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients of the flat problem as those of this one."""
        return [shaped_like(g, x, self.channel_dim) for g, x in zip(gradients, self.features, strict=True)]

    @property
    def modalities(self) -> int:
        return len(self.sigma)

    @property
    def scales(self) -> int:
        return len(self.features) // len(self.sigma)

    def scale(self, s: int) -> list[Tensor]:
        """The features of all modalities at a scale."""
        return self.features[s :: self.scales]

    def empty_result(self) -> "Result":
        """Its memory, to be filled."""
        x = self.features[0]
        information = x.new_empty((self.modalities, self.scales, x.shape[0]), dtype=accumulation_dtype(self.features))
        return Result(information, x.new_empty((self.scales, x.shape[0]), dtype=torch.int64))


class Result(NamedTuple):
    """Of a call, or the gradients of a result; None for what there is no gradient of, or what the backward pass does not read."""

    information: Tensor  # (M, S, B)
    counts: Tensor  # (S, B) int64, the valid pixels


DIFFERENTIABLE_INPUTS = ("features",)
DIFFERENTIABLE_RESULTS = ("information",)
KEPT_RESULTS = ("counts",)  # tensors that the backward pass reads


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


def _validity(problem: Problem, s: int) -> list[Tensor | None]:
    """Per modality, where scale ``s`` counts: broadcastable to ``(B, 1, P)``, or None for everywhere."""
    mask = problem.masks[s][:, None] if problem.masks else None
    if problem.present is None:
        return [mask] * problem.modalities
    held = [problem.present[:, m, None, None] for m in range(problem.modalities)]
    return [h if mask is None else mask & h for h in held]


def _scale_terms(problem: Problem, s: int, valid: list[Tensor | None]) -> tuple[Tensor, Tensor | int, Iterator[_Term]]:
    """The reference ``q``, the number of present modalities ``(B, 1, 1)`` and the terms of scale ``s``."""
    modalities, sigma, present = problem.modalities, problem.sigma, problem.present
    dtype = accumulation_dtype(problem.features)
    xs = [keep(x.to(dtype), valid[m]) for m, x in enumerate(problem.scale(s))]
    count = modalities if present is None else present.sum(1).clamp(min=1)[:, None, None]
    log_q = torch.log_softmax(sum(xs[1:], xs[0]) / count, dim=1)
    q = log_q.exp().detach() if problem.detach_reference else log_q.exp()

    def terms() -> Iterator[_Term]:
        for m, x in enumerate(xs):
            for draw in range(problem.samples):
                if problem.seed is not None and sigma[m] > 0:
                    tensor = m * problem.scales + s
                    noise = standard_normal(x.shape, seed=problem.seed, tensor=tensor, draw=draw, dtype=x.dtype)
                    log_p = torch.log_softmax(x + sigma[m] * noise, dim=1)
                else:
                    log_p = torch.log_softmax(x, dim=1)
                p = log_p.exp()
                d = p - q
                yield _Term(m, p, log_p, d, d.square().sum(1, keepdim=True), -(q * log_p).sum(1, keepdim=True) + problem.eps)

    return q, count, terms()


def forward(problem: Problem) -> Result:
    """In differentiable PyTorch."""
    problem = problem.flat()
    features, masks, dtype = problem.features, problem.masks, accumulation_dtype(problem.features)
    information = []
    counts = []
    for s in range(problem.scales):
        batch, _, pixels = features[s].shape
        count = masks[s].sum(1) if masks else torch.full((batch,), pixels, device=features[s].device)
        valid = _validity(problem, s)
        totals = [torch.zeros(batch, dtype=dtype, device=features[s].device) for _ in range(problem.modalities)]
        for term in _scale_terms(problem, s, valid)[2]:
            m = term.modality
            totals[m] = totals[m] + keep(term.n / term.f, valid[m]).sum((1, 2))
        information.append(torch.stack(totals) / (count.clamp(min=1) * problem.samples))
        counts.append(count)
    return Result(torch.stack(information, dim=1), torch.stack(counts))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    """Gradient with respect to each feature; with ``J(v) a = v * a - v * sum_c(v * a)``, the softmax Jacobian, and R the mean::

        dI/dX_m = 2 / (f + eps) J(p) d  -  N / (f + eps)^2 d
        dI/dR   = J(q) [ -2 / (f + eps) d  +  N / (f + eps)^2 log p ]

    In differentiable PyTorch, so that it serves second derivatives as well."""
    given, problem = problem, problem.flat()
    modalities, scales = problem.modalities, problem.scales
    gradients: list[Tensor] = [torch.empty(0)] * len(problem.features)
    for s in range(scales):
        weight = (upstream.information[:, s] / (result.counts[s].clamp(min=1) * problem.samples))[:, :, None, None]
        valid = _validity(problem, s)
        q, count, terms = _scale_terms(problem, s, valid)
        own = [torch.zeros_like(q) for _ in range(modalities)]
        pull = torch.zeros_like(q)  # sum over modalities and draws of the bracket in dI/dR
        for m, p, log_p, d, n, f in terms:
            w = keep(weight[m], valid[m])
            a, b = 2 * w / f, w * n / f.square()
            own[m] = own[m] + a * p * (d - (p * d).sum(1, keepdim=True)) - b * d
            pull = pull - a * d + b * log_p
        shared = 0 if problem.detach_reference else q * (pull - (q * pull).sum(1, keepdim=True)) / count
        for m in range(modalities):
            k = m * scales + s
            gradients[k] = keep(own[m] + shared, valid[m]).to(problem.features[k].dtype)
    return given.shaped(gradients)

"""Cross entropy and functional Fisher information of every modality's own logits: the definition, in plain PyTorch on any device.

Per pixel with the target ``y``, class weights ``w`` (1 where none are given) and label smoothing ``s``, logits ``X_m`` of ``C`` classes::

    t_c  = (1 - s) w_y [c = y] + s / C w_c       T = sum_c t_c
    ce_m = -sum_c t_c log softmax(X_m)_c         ce = -sum_c t_c log softmax(R)_c,   R = mean over present modalities of X_m
    I_m  = sum_c (T p_mc - t_c)^2 / (ce_m + eps)           because grad_{X_m} ce_m = T p_m - t, with p_m = softmax(X_m)

and over the valid pixels of a sample the sums of ``ce_m``, ``ce``, ``I_m`` and ``w_y``. Valid is what is not ``ignore_index``.

Every backend takes a :class:`Problem` and gives a :class:`Result`. A target out of range is a ``ValueError`` on the CPU; on other devices,
where to look would be to wait, it makes the sums NaN, and ``functional`` asserts on the device that there are none.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modreg_fast._validate import readable
from modreg_fast.backends.layout import flat, shaped_like
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype, keep


class Problem(NamedTuple):
    """One call: what it reads, and its options. ``functional`` makes and checks it, every backend reads it."""

    logits: list[Tensor]  # M tensors (B, C, *spatial); flat: (B, C, P)
    target: Tensor  # (B, P), integers
    weight: Tensor | None  # (C,)
    present: Tensor | None  # (B, M) bool
    ignore_index: int
    label_smoothing: float
    eps: float
    channel_dim: int = 1  # of the logits

    def flat(self) -> "Problem":
        return self._replace(logits=[flat(x, self.channel_dim) for x in self.logits], channel_dim=1)

    def shaped(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients of the flat problem as those of this one."""
        return [shaped_like(g, x, self.channel_dim) for g, x in zip(gradients, self.logits, strict=True)]

    @property
    def classes(self) -> int:
        return self.logits[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.logits)

    def empty_result(self) -> "Result":
        """Its memory, to be filled."""
        modalities, batch = len(self.logits), self.logits[0].shape[0]
        shapes = [(modalities, batch), (batch,), (modalities, batch), (batch,)]
        return Result(*(self.logits[0].new_empty(shape, dtype=self.dtype) for shape in shapes))

    def out_of_range(self) -> ValueError | None:
        """The error for targets that are neither a class nor ignored; None where there are none."""
        target = self.target.to(torch.int64)
        bad = (target != self.ignore_index) & ((target < 0) | (target >= self.classes))
        if not bad.any():
            return None
        sample, pixel = (int(i) for i in bad.nonzero()[0])
        return ValueError(
            f"modality_cross_entropy: target must be a class in [0, {self.classes}) or ignore_index ({self.ignore_index}), got "
            f"{int(target[sample, pixel])} at sample {sample}, pixel {pixel} ({int(bad.sum())} such pixels)"
        )


class Result(NamedTuple):
    """Of a call, or the gradients of a result; sums over the valid pixels. None for what there is no gradient of."""

    cross_entropy: Tensor  # (M, B)
    joint: Tensor  # (B,)
    information: Tensor  # (M, B)
    weights: Tensor  # (B,)


DIFFERENTIABLE_INPUTS = ("logits",)
DIFFERENTIABLE_RESULTS = ("cross_entropy", "joint", "information")
KEPT_RESULTS = ()  # tensors that the backward pass reads


class _Target(NamedTuple):
    """Per pixel; ``(B, P)`` and, where it has classes, ``(B, C, P)``."""

    valid: Tensor
    known: Tensor  # not valid, or a class
    y: Tensor  # a class, whatever the target says
    weight: Tensor  # w_y
    uniform: Tensor | None  # s / C w_c as (C, 1), None without smoothing
    t: Tensor
    total: Tensor  # T


def _target(problem: Problem) -> _Target:
    target, classes, smoothing = problem.target.to(torch.int64), problem.classes, problem.label_smoothing
    valid = target != problem.ignore_index
    known = ~valid | (target >= 0) & (target < classes)
    index = torch.where(valid & known, target, 0)
    ones = torch.ones(classes, dtype=problem.dtype, device=target.device)
    weights = ones if problem.weight is None else problem.weight.to(problem.dtype)
    own = weights[index]
    uniform = weights[:, None] * (smoothing / classes) if smoothing > 0 else None
    t = own.new_zeros(len(target), classes, target.shape[1]).scatter(1, index[:, None], ((1 - smoothing) * own)[:, None])
    t = t if uniform is None else t + uniform
    return _Target(valid, known, index, own, uniform, t, t.sum(1))


def _cross_entropy(log_p: Tensor, target: _Target, label_smoothing: float) -> Tensor:
    """``(B, P)``. Where no smoothing reaches a class its logit may be -inf."""
    own = -(1 - label_smoothing) * target.weight * log_p.gather(1, target.y[:, None])[:, 0]
    return own if target.uniform is None else own - (target.uniform * log_p).sum(1)


def _masked(problem: Problem, valid: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | int]:
    """Logits, 0 where they do not count; where each modality counts, ``(B, P)``; the number of present modalities ``(B, 1, 1)``."""
    logits, present = problem.logits, problem.present
    counted = [valid if present is None else valid & present[:, m, None] for m in range(len(logits))]
    count = len(logits) if present is None else present.sum(1).clamp(min=1)[:, None, None]
    return [keep(x.to(problem.dtype), c[:, None]) for x, c in zip(logits, counted, strict=True)], counted, count


def forward(problem: Problem) -> Result:
    """In differentiable PyTorch."""
    problem = problem.flat()
    # Under vmap, too, nobody can look.
    if problem.target.device.type == "cpu" and readable(problem.target) and (error := problem.out_of_range()):
        raise error
    on, smoothing = _target(problem), problem.label_smoothing
    xs, counted, count = _masked(problem, on.valid)
    some = on.valid if problem.present is None else on.valid & problem.present.any(1, keepdim=True)

    def total(x: Tensor, where: Tensor) -> Tensor:
        return keep(torch.where(on.known, x, torch.nan), where).sum(1)

    cross_entropy, information = [], []
    for x, c in zip(xs, counted, strict=True):
        log_p = torch.log_softmax(x, dim=1)
        ce = _cross_entropy(log_p, on, smoothing)
        g = on.total[:, None] * log_p.exp() - on.t
        cross_entropy.append(total(ce, c))
        information.append(total(g.square().sum(1) / (ce + problem.eps), c))
    joint = _cross_entropy(torch.log_softmax(sum(xs[1:], xs[0]) / count, dim=1), on, smoothing)
    return Result(torch.stack(cross_entropy), total(joint, some), torch.stack(information), total(on.weight, some))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    """Gradient with respect to each modality's logits; with ``g = T p - t``, ``N = sum_c g^2``, ``F = ce_m + eps`` and
    ``J(p) g = p g - p sum_c p g``, the softmax Jacobian::

        d ce_m / dX_m = g        d ce / dX_m = (T softmax(R) - t) / M        d I_m / dX_m = 2 T / F J(p) g - N / F^2 g

    In differentiable PyTorch, so that it serves second derivatives as well."""
    given, problem = problem, problem.flat()
    on = _target(problem)
    xs, counted, count = _masked(problem, on.valid)
    total = torch.where(on.known, on.total, torch.nan)[:, None]
    q = torch.softmax(sum(xs[1:], xs[0]) / count, dim=1)
    shared = upstream.joint[:, None, None] * (total * q - on.t) / count

    def gradient(m: int) -> Tensor:
        log_p = torch.log_softmax(xs[m], dim=1)
        p, f = log_p.exp(), (_cross_entropy(log_p, on, problem.label_smoothing) + problem.eps)[:, None]
        g = total * p - on.t
        u, v = upstream.cross_entropy[m, :, None, None], upstream.information[m, :, None, None]
        own = (u - v * g.square().sum(1, keepdim=True) / f.square()) * g
        own = own + 2 * v * total / f * p * (g - (p * g).sum(1, keepdim=True))
        return keep(own + shared, counted[m][:, None]).to(problem.logits[m].dtype)

    return given.shaped([gradient(m) for m in range(len(xs))])

"""From information and attribution to penalties: tiny tensors, plain PyTorch."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function

from modreg_fast import _validate as validate
from modreg_fast.backends import backends
from modreg_fast.functional.masks import constants
from modreg_fast.ops._eager import is_plain

Objective = Literal["inverse", "norm", "log"]
OBJECTIVES = get_args(Objective)

_NATIVE = backends()["cpu"].available


def _precise(x: Tensor) -> Tensor:
    """In 16 bits sums would be infinite, and ``eps`` 0."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def functional_entropy(f: Tensor, dim: int | Sequence[int]) -> Tensor:
    r"""Functional entropy :math:`\operatorname{Ent}(f) = E[f \log f] - E[f] \log E[f] \ge 0` of samples of a non-negative function.

    Computed as :math:`E f \cdot E[r \log r - r + 1]` with :math:`r = f / E f`, a sum of non-negative terms. For Gaussian samples
    :math:`\operatorname{Ent}(f) \le \tfrac{\sigma^2}{2} E[\lVert \nabla f \rVert^2 / f]` (log-Sobolev; Gat et al., NeurIPS 2020).

    Args:
        f: values of the function, at least 0, floating point.
        dim: the dimension or dimensions that hold the samples.

    Returns:
        ``f`` without ``dim``, in float32 at least. 0 where ``f`` is 0 throughout.

    Raises:
        TypeError: not a floating-point tensor.

    Example:
        >>> functional_entropy(torch.ones(5), dim=0)
        tensor(0.)
    """
    f = _precise(validate.tensor(f, "functional_entropy", "f"))
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, Sequence) or not all(isinstance(d, int) and -f.dim() <= d < f.dim() for d in dims):
        validate.fail("functional_entropy", "dim", f"one or more of the dimensions of f {validate.shape(f)}", repr(dim))
    dim = tuple(dims)
    mean = f.mean(dim, keepdim=True)
    ratio = torch.where(f == 0, 1, f / torch.where(mean == 0, 1, mean))
    return (mean * torch.where(f == 0, 1, ratio * ratio.log() - ratio + 1)).mean(dim)


def modality_share(attribution: Tensor) -> Tensor:
    r"""Share of each modality in the attribution of a sample, :math:`a_m / \sum_k a_k`, in [0, 1] (arXiv:2404.02359).

    Args:
        attribution: ``(M, B)``, at least 0.

    Returns:
        ``(M, B)`` in float32 at least; sums to 1 over the modalities, 0 throughout (with zero gradient) where nothing was attributed.

    Raises:
        TypeError: not a floating-point tensor.

    Example:
        >>> modality_share(torch.tensor([[3.0], [1.0]])).flatten()
        tensor([0.7500, 0.2500])
    """
    attribution = _precise(validate.tensor(attribution, "modality_share", "attribution"))
    total = attribution.sum(0, keepdim=True)
    return attribution / torch.where(total == 0, 1, total)


def balance_penalty(
    information: Tensor,
    *,
    objective: Objective = "inverse",
    eps: float = 1e-8,
    weights: Tensor | Sequence[float] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Penalty on modalities that contribute little information,

    .. math::
        R = \sum_{m,s} w_s\, \phi({\bar I}_{ms}), \qquad {\bar I}_{ms} = \operatorname{mean}_b I_{msb}

    ==========  =============================================  ==========================================
    objective   R                                              source
    ==========  =============================================  ==========================================
    inverse     sum of ``w_s / (I + eps)``                     arXiv:2505.06635
    norm        ``sqrt(sum of w_s^2 / (I + eps)^2)``           Gat et al., NeurIPS 2020
    log         sum of ``-w_s log(I + eps)``                   scale free: its gradient is ``-w_s / I``
    ==========  =============================================  ==========================================

    Args:
        information: ``(M, S, B)``, or ``(M, B)`` for one scale.
        objective: see the table.
        eps: added to the mean information.
        weights: ``w_s``, one per scale; default 1.
        valid: bool, broadcastable to ``information``: the entries that count in the mean over the batch. A modality and scale
            without any is left out of the sum.

    Returns:
        A scalar, in float32 at least; 0 where nothing counts.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which and why.

    Example:
        >>> round(balance_penalty(torch.tensor([[0.5], [0.25]])).item(), 3)  # two modalities, one sample: 1 / 0.5 + 1 / 0.25
        6.0
    """
    information = _precise(validate.tensor(information, "balance_penalty", "information"))
    if information.dim() not in (2, 3):
        validate.fail("balance_penalty", "information", "of shape (M, S, B) or (M, B)", validate.shape(information))
    if valid is not None:
        validate.tensor(valid, "balance_penalty", "valid", dtypes=(torch.bool,))
        try:
            valid = torch.broadcast_to(valid, information.shape)
        except RuntimeError:
            validate.fail("balance_penalty", "valid", f"broadcastable to {validate.shape(information)}", validate.shape(valid))
    if information.dim() == 2:
        information, valid = information.unsqueeze(1), None if valid is None else valid.unsqueeze(1)
    return penalty_of_information(information, objective, eps, valid=valid, weights=weights)


def penalty_of_information(
    information: Tensor,
    objective: str,
    eps: float,
    scale: float = 1.0,
    *,
    valid: Tensor | None = None,
    weights: Tensor | Sequence[float] | None = None,
    function: str = "balance_penalty",
) -> Tensor:
    """``scale`` times the penalty of :func:`balance_penalty` from ``(M, S, B)``."""
    # Where nobody traces or transforms, one node of autograd in place of seven.
    if (
        valid is None
        and has_slope(objective, weights, information.shape[-1])
        and not torch.compiler.is_compiling()
        and is_plain([information])
    ):
        penalty: Tensor = _Penalty.apply(information, objective, validate.number(eps, function, "eps"), scale)
        return penalty
    return penalty_of_mean(*batch_totals(information, valid), objective, eps, weights, function=function, scale=scale)


def batch_totals(information: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Sum over the batch of the entries that count, ``(M, S)``, and their number: of each, or one of all where all count. Sums, so that
    ranks can add theirs."""
    if valid is None:
        return information.sum(-1), information.shape[-1]
    return torch.where(valid, information, 0).sum(-1), valid.sum(-1).to(information.dtype)


def penalty_of_mean(
    total: Tensor,
    count: Tensor | int,
    objective: str,
    eps: float,
    weights: Tensor | Sequence[float] | None,
    *,
    function: str,
    scale: float = 1.0,
) -> Tensor:
    """``scale`` times the penalty of :func:`balance_penalty` from ``(M, S)`` sums over the batch and their counts."""
    validate.number(eps, function, "eps")
    validate.one_of(objective, OBJECTIVES, function, "objective")
    if weights is not None:
        if isinstance(weights, Tensor):
            weights = weights.to(total)
        else:
            numbers = [validate.number(weight, function, "weights") for weight in validate.sequence(weights, function, "weights")]
            weights = constants(numbers, total)
        if weights.shape != total.shape[1:]:
            validate.fail(function, "weights", f"one number per scale ({total.shape[1]})", validate.shape(weights))
    if not isinstance(count, Tensor) and count == 0:
        count = torch.zeros_like(total)
    return scale * _penalty(total, count, objective, eps, weights)


def _penalty(total: Tensor, count: Tensor | int, objective: str, eps: float, weights: Tensor | None) -> Tensor:
    counts = count > 0 if isinstance(count, Tensor) else None  # None: all
    mean = total / count + eps if counts is None else torch.where(counts, total / torch.where(counts, count, 1) + eps, 1)
    terms = -mean.log() if objective == "log" else mean.reciprocal()
    if weights is not None:
        terms = weights * terms
    if counts is not None:
        terms = torch.where(counts, terms, 0)
    return torch.linalg.vector_norm(terms) if objective == "norm" else terms.sum()


def has_slope(objective: str, weights: object, batch: int) -> bool:
    """Whether :func:`value_and_slope` has the penalty, where all count."""
    return objective in ("inverse", "log") and weights is None and batch > 0


def value_and_slope(information: Tensor, objective: str, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`penalty_of_information` without weights, where all count, "inverse" or "log"; and its derivative by the entries of each
    modality and scale, ``(M, S)``."""
    if information.device.type == "cpu" and _NATIVE:
        value, slope = torch.ops.modreg_fast_native.balance_penalty.default(information, objective == "log", eps, scale)
        return value, slope
    mean = information.mean(-1) + eps
    value = scale * (-mean.log() if objective == "log" else mean.reciprocal()).sum()
    return value, _slope(mean, information, objective, scale)


def _slope(mean: Tensor, information: Tensor, objective: str, scale: float) -> Tensor:
    # d(-log mean) = -1 / mean, d(1 / mean) = -1 / mean^2
    return (mean if objective == "log" else mean.square()).reciprocal() * (-scale / information.shape[-1])


class _Penalty(Function):
    """The value of :func:`value_and_slope`."""

    @staticmethod
    def forward(ctx: Any, information: Tensor, objective: str, eps: float, scale: float) -> Tensor:
        value, slope = value_and_slope(information, objective, eps, scale)
        ctx.save_for_backward(information, slope)
        ctx.options = objective, eps, scale
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        information, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            objective, eps, scale = ctx.options
            slope = _slope(information.mean(-1) + eps, information, objective, scale)
        return (upstream * slope)[..., None].expand_as(information), None, None, None

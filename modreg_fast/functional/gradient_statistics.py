"""Functional Fisher information and attribution from gradients."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast import ops
from modreg_fast.backends import resolve
from modreg_fast.backends.reference.gradient_statistics import Problem
from modreg_fast.functional.masks import scale_masks, spatial_shape


class GradientStatistics(NamedTuple):
    """Result of :func:`gradient_statistics`; what lacks its input is None.

    Example:
        >>> result = gradient_statistics([torch.ones(2, 8)], features=[torch.ones(2, 8)], maps=True)
        >>> result.fisher is None, result.attribution_maps[0].shape
        (True, torch.Size([2]))
    """

    fisher: Tensor | None  # (K, B)
    attribution: Tensor | None  # (K, B)
    fisher_maps: list[Tensor] | None  # K maps (B, *spatial_k)
    attribution_maps: list[Tensor] | None


def gradient_statistics(
    grads: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    channel_dim: int = 1,
    eps: float = 1e-8,
    maps: bool = False,
    backend: str | None = None,
) -> GradientStatistics:
    r"""Functional Fisher information and L2-pooled gradient x input of K tensors from their gradients, in one pass.

    With the gradient :math:`g` of a score with respect to the feature :math:`e`, and the positive map :math:`f`, per sample

    .. math::
        \text{fisher} = \operatorname{mean}_p \frac{\sum_c g_{cp}^2}{f_p + \text{eps}}, \qquad
        \text{attribution} = \sqrt{\sum_{c,p} (g_{cp}\, e_{cp})^2}

    over valid pixels :math:`p`. Differentiable in all three; at an attribution of 0 its derivative is taken as 0. Sources:
    :math:`\lVert \nabla f \rVert^2 / f` of Gat et al. (NeurIPS 2020); the pooled attribution of arXiv:2404.02359.

    Args:
        grads: K tensors ``(B, C_k, *spatial_k)``, for training from ``torch.autograd.grad(..., create_graph=True)``.
        features: K tensors of the same shapes; without them no attribution.
        values: K tensors ``(B, *spatial_k)``, at least 0 (such as the cross entropy per pixel); without them no Fisher information.
        mask: valid pixels, bool ``(B, *spatial)`` at any resolution, or one per tensor.
        channel_dim: dimension of the channels in ``grads`` and ``features``.
        eps: added to ``values``.
        maps: return the per-pixel terms as well: :math:`\sum_c g^2 / (f + \text{eps})` and :math:`\sqrt{\sum_c (g e)^2}`.
        backend: as in :func:`softmax_fisher_information`.

    Returns:
        :class:`GradientStatistics` ``(fisher (K, B), attribution (K, B), fisher_maps, attribution_maps)``; None for what was not asked.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which and why.

    Example:
        >>> e = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> (g,) = torch.autograd.grad(e.square().sum(), e, create_graph=True)
        >>> gradient_statistics([g], features=[e]).attribution.shape
        torch.Size([1, 2])
    """
    function = "gradient_statistics"
    grads, features, values = _checked(grads, features, values, channel_dim, function)
    batch, device = grads[0].shape[0], grads[0].device
    masks = []
    if mask is not None:
        masks = scale_masks(mask, [spatial_shape(g, channel_dim) for g in grads], batch, device, function)
    validate.number(eps, function, "eps")
    validate.flag(maps, function, "maps")
    # No kernel runs over nothing.
    name = resolve(backend, grads[0], function, "gradient_statistics") if batch else "reference"
    problem = Problem(list(grads), list(features or ()), list(values or ()), masks, float(eps), maps, channel_dim)
    fisher, attribution, fisher_maps, attribution_maps = ops.gradient_statistics(problem, name)

    def shaped(maps: list[Tensor]) -> list[Tensor]:
        return [x.reshape(batch, *spatial_shape(g, channel_dim)) for x, g in zip(maps, grads, strict=True)]

    return GradientStatistics(
        fisher if values else None,
        attribution if features else None,
        shaped(fisher_maps) if maps and values else None,
        shaped(attribution_maps) if maps and features else None,
    )


_Tensors = Sequence[Tensor]


def _checked(
    grads: _Tensors, features: _Tensors | None, values: _Tensors | None, channel_dim: int, function: str
) -> tuple[_Tensors, _Tensors | None, _Tensors | None]:
    """The same; of gradient and feature of a tensor, both in the dtype that theirs promote to."""
    given = [x for x in (grads, features, values) if x is not None]
    signature = validate.signature((function, features is None, values is None), channel_dim, *given)
    if validate.accepted(signature):
        return grads, features, values
    grads = validate.sequence(grads, function, "grads")
    if features is None and values is None:
        validate.fail(function, "features or values", "given", "neither")
    checked_grads = [validate.feature(g, function, f"grads[{k}]", channel_dim) for k, g in enumerate(grads)]
    batch, device = checked_grads[0].shape[0], checked_grads[0].device
    for k, g in enumerate(checked_grads):
        if g.shape[0] != batch or g.device != device:
            validate.fail(
                function, f"grads[{k}]", f"of batch size {batch} on {device} like grads[0]", f"{g.shape[0]} on {g.device}"
            )

    checked_features: list[Tensor] = []
    if features is not None:
        _same_length(features, grads, function, "features")
        for k, e in enumerate(features):
            checked_features.append(validate.feature(e, function, f"features[{k}]", channel_dim))
            validate.same(e, grads[k], function, f"features[{k}]", f"grads[{k}]")
            checked_features[k], checked_grads[k] = validate.promoted([checked_features[k], checked_grads[k]])

    checked_values: list[Tensor] = []
    if values is not None:
        _same_length(values, grads, function, "values")
        for k, f in enumerate(values):
            f = validate.tensor(f, function, f"values[{k}]")
            expected = (batch, *spatial_shape(grads[k], channel_dim))
            if tuple(f.shape) != expected or f.device != device:
                validate.fail(function, f"values[{k}]", f"of shape {expected} on {device}", f"{validate.shape(f)} on {f.device}")
            checked_values.append(f)

    checked = [*checked_grads, *checked_features, *checked_values]
    if all(a is b for a, b in zip(checked, [x for row in given for x in row], strict=True)):
        validate.accept(signature)
    return checked_grads, None if features is None else checked_features, None if values is None else checked_values


def _same_length(x: object, grads: Sequence[Tensor], function: str, argument: str) -> None:
    if len(validate.sequence(x, function, argument)) != len(grads):
        validate.fail(function, argument, f"a list of {len(grads)} tensors like grads", f"{len(x)}")  # type: ignore[arg-type]

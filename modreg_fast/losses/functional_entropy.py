"""Functional entropy: every modality is to carry information, at feature scales and at the prediction."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast import ops
from modreg_fast.distributed import Grouped, mean_over_parts, sum_over_ranks
from modreg_fast.double_backward import differentiable, gradients
from modreg_fast.functional import gradient_statistics, resize_mask
from modreg_fast.functional.masks import all_pixels, pooled, valid_pixels
from modreg_fast.functional.penalties import (
    OBJECTIVES,
    Objective,
    batch_totals,
    has_slope,
    penalty_of_information,
    penalty_of_mean,
    value_and_slope,
)
from modreg_fast.functional.softmax_fisher import checked_problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InformationDetails(NamedTuple):
    """For logging, detached: mean information over the batch; NaN where no sample counts.

    Example:
        >>> features = {"rgb": [torch.randn(2, 8, 4, 4)], "depth": [torch.randn(2, 8, 4, 4)]}
        >>> penalty, details = FunctionalEntropyLoss()(features, return_details=True)
        >>> {m: x.shape for m, x in details.information.items()}
        {'rgb': torch.Size([1]), 'depth': torch.Size([1])}
    """

    information: dict[str, Tensor]  # modality -> (S,)


class FunctionalEntropyLoss(Grouped):
    r"""Penalty on modalities that carry little functional Fisher information, at feature scales and at the prediction.

    .. math::
        R = w \sum_{m,s} w_s\, \phi(\operatorname{mean}_b I_{msb}), \qquad
        \phi(I) = 1 / (I + \text{eps}) \text{ for } \text{"inverse"}, \; -\log(I + \text{eps}) \text{ for } \text{"log"}

    and for ``"norm"`` the Euclidean norm of the inverse terms. :meth:`forward` takes the features (closed form, no second
    differentiation); :meth:`prediction_term` takes the loss map and differentiates it with respect to the modality inputs.
    Source: arXiv:2505.06635; ``"norm"``: Gat et al., NeurIPS 2020. The mean counts only samples that have the modality and a valid
    pixel.

    Args:
        feature_weight: ``w`` of :meth:`forward`, at least 0.
        prediction_weight: ``w`` of :meth:`prediction_term`, at least 0.
        objective: ``"inverse"`` (the paper), ``"norm"`` or ``"log"``; see :func:`modreg_fast.functional.balance_penalty`.
        scale_weights: ``w_s``, one per scale; default 1.
        sigma, samples, detach_reference, backend: see :func:`modreg_fast.functional.softmax_fisher_information`.
        channel_dim: dimension of the channels; 1, or -1 for tokens.
        eps: see there; also added to the information in the penalty.
        process_group: its ranks hold other samples; statistics are summed over them, so that N ranks compute the penalty of the whole
            batch.
        spatial_group: its ranks hold parts of the same samples, such as rows of every map; sums over pixels are taken over them all.

    Raises:
        ValueError, TypeError: an argument that does not fit, here or in the call; the message says which and why.
        RuntimeError: in :meth:`prediction_term`, an operation between ``inputs`` and ``values`` that PyTorch cannot differentiate twice;
            the message names it and the cure.

    Example:
        >>> balance = FunctionalEntropyLoss(feature_weight=1e-4)
        >>> features = {"rgb": [torch.randn(2, 8, 4, 4)], "depth": [torch.randn(2, 8, 4, 4)]}
        >>> balance(features).shape
        torch.Size([])
    """

    def __init__(
        self,
        feature_weight: float = 1e-5,
        prediction_weight: float = 1e-5,
        objective: Objective = "inverse",
        scale_weights: Sequence[float] | None = None,
        sigma: float = 0.0,
        samples: int = 1,
        detach_reference: bool = False,
        channel_dim: int = 1,
        eps: float = 1e-8,
        process_group: "ProcessGroup | None" = None,
        spatial_group: "ProcessGroup | None" = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        validate.one_of(objective, OBJECTIVES, name, "objective")
        self.feature_weight = validate.number(feature_weight, name, "feature_weight")
        self.prediction_weight = validate.number(prediction_weight, name, "prediction_weight")
        self.objective = objective
        if scale_weights is not None:
            scale_weights = [
                validate.number(w, name, "scale_weights") for w in validate.sequence(scale_weights, name, "scale_weights")
            ]
        self.scale_weights = scale_weights
        self.sigma = validate.number(sigma, name, "sigma")
        self.samples = validate.positive_integer(samples, name, "samples")
        self.detach_reference = validate.flag(detach_reference, name, "detach_reference")
        self.channel_dim = channel_dim
        self.eps = validate.number(eps, name, "eps")
        self.process_group = process_group
        self.spatial_group = spatial_group
        self.backend = backend

    def extra_repr(self) -> str:
        return (
            f"feature_weight={self.feature_weight:g}, prediction_weight={self.prediction_weight:g}, objective={self.objective!r}, "
            f"sigma={self.sigma:g}, samples={self.samples}"
        )

    @overload
    def forward(
        self,
        features: Mapping[str, Sequence[Tensor]],
        *,
        mask: Tensor | Sequence[Tensor] | None = ...,
        present: Tensor | None = ...,
        return_details: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        features: Mapping[str, Sequence[Tensor]],
        *,
        mask: Tensor | Sequence[Tensor] | None = ...,
        present: Tensor | None = ...,
        return_details: Literal[True],
    ) -> tuple[Tensor, InformationDetails]: ...

    def forward(
        self,
        features: Mapping[str, Sequence[Tensor]],
        *,
        mask: Tensor | Sequence[Tensor] | None = None,
        present: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, InformationDetails]:
        """The feature term.

        Args:
            features: modality -> scales, each ``(B, C_s, *spatial_s)``; at a scale the same shape for all modalities.
            mask: valid pixels, bool ``(B, *spatial)`` at any resolution, or one per scale.
            present: ``(B, M)`` bool in the order of ``features``: which sample has which modality.
            return_details: return ``(penalty, InformationDetails)``.
        """
        features, present = self.by_name(validate.modalities(features, type(self).__name__, "features"), present)
        problem, backend = checked_problem(
            list(features.values()),
            mask,
            present,
            self.sigma,
            self.samples,
            None,
            None,
            self.detach_reference,
            self.channel_dim,
            self.eps,
            self.backend,
            function=type(self).__name__,
            names=list(features),
        )
        plain = mask is None and present is None and self.process_group is None and self.spatial_group is None
        if plain and not return_details and has_slope(self.objective, self.scale_weights, problem.features[0].shape[0]):
            options = self.objective, self.eps, self.feature_weight
            return ops.softmax_fisher.scalar(
                problem,
                backend,
                lambda result: penalty_of_information(result.information, *options),
                lambda information: value_and_slope(information, *options),
            )
        information, counts = ops.softmax_fisher(problem, backend)
        information, counts = mean_over_parts(information, counts, self.spatial_group)
        valid = None
        if mask is not None or present is not None:
            valid = (counts > 0).expand_as(information)
            if present is not None:
                valid = valid & present.T[:, None]
        return self._penalty(information, valid, self.scale_weights, self.feature_weight, list(features), return_details)

    def prediction_term(
        self,
        values: Tensor,
        inputs: Mapping[str, Tensor],
        *,
        mask: Tensor | None = None,
        granularity: Literal["pixel", "sample"] = "pixel",
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, InformationDetails]:
        r"""The prediction term: information of the loss map about each modality's tensor, in gradient form.

        With :math:`f` the loss map and :math:`g_m = \partial \sum_p f_p / \partial z_m` over valid pixels:

        - ``"pixel"``: :math:`I_m = \operatorname{mean}_p \sum_c g_{mcp}^2 / (f_p + \text{eps})`, where ``f`` is average-pooled to the
          resolution of :math:`z_m` (arXiv:2505.06635);
        - ``"sample"``: :math:`I_m = \lVert \partial \bar f / \partial z_m \rVert^2 / (\bar f + \text{eps})` with the mean
          :math:`\bar f` over valid pixels (Gat et al.).

        Training differentiates twice through what lies between ``inputs`` and ``values``, so pass tensors near the prediction: a
        modality's own prediction, or the features that enter the fusion. This inner differentiation runs eagerly, outside of
        ``torch.compile`` graphs.

        Args:
            values: ``(B, *spatial)``, at least 0, with a graph to ``inputs``; such as ``F.cross_entropy(..., reduction="none")``.
            inputs: modality -> ``(B, C, *spatial)`` tensors that ``values`` was computed from.
            mask: valid pixels of ``values``, bool of its shape.
            granularity: see above.
            return_details: return ``(penalty, InformationDetails)``.
        """
        name = f"{type(self).__name__}.prediction_term"
        inputs, _ = self.by_name(validate.modalities(inputs, name, "inputs"))
        values = validate.tensor(values, name, "values")
        if values.dim() == 0:
            validate.fail(name, "values", "of shape (B, *spatial)", "()")
        validate.one_of(granularity, ("pixel", "sample"), name, "granularity")
        if mask is not None:
            mask = validate.tensor(mask, name, "mask", dtypes=(torch.bool,))
            validate.same(mask, values, name, "mask", "values")
        tensors = [
            differentiable(x, name, f"inputs[{m!r}]", len(values), self.channel_dim, self.spatial_group)
            for m, x in inputs.items()
        ]
        values = values.to(torch.promote_types(values.dtype, torch.float32))  # sums over many positions
        by_name = dict(zip(inputs, tensors, strict=True))
        information, counts = (self._by_pixel if granularity == "pixel" else self._by_sample)(values, by_name, mask, name)
        valid = None if mask is None else (counts > 0).expand_as(information).unsqueeze(1)
        return self._penalty(information.unsqueeze(1), valid, None, self.prediction_weight, list(inputs), return_details)

    def _by_pixel(self, values: Tensor, tensors: Mapping[str, Tensor], mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """Information and number of valid pixels, ``(K, B)`` each."""
        masked = values if mask is None else torch.where(mask, values, 0)
        grads = gradients(masked.sum(), tensors, name)
        sizes = [_spatial_size(g, values, self.channel_dim, name) for g in grads]
        masks = None if mask is None else [resize_mask(mask, size) if size else valid_pixels(mask) > 0 for size in sizes]
        fisher = gradient_statistics(
            grads,
            values=[pooled(masked, mask, size) for size in sizes],
            mask=masks,
            channel_dim=self.channel_dim,
            eps=self.eps,
            backend=self.backend,
        ).fisher
        assert fisher is not None
        counts = [valid_pixels(m) for m in masks] if masks else [all_pixels(values, size) for size in sizes]
        return mean_over_parts(fisher, torch.stack(counts), self.spatial_group)

    def _by_sample(self, values: Tensor, tensors: Mapping[str, Tensor], mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """Information ``(K, B)`` and number of valid pixels ``(B,)``."""
        masked = values if mask is None else torch.where(mask, values, 0)
        count = sum_over_ranks(all_pixels(values, values.shape[1:]) if mask is None else valid_pixels(mask), self.spatial_group)
        total, n = masked.reshape(len(values), math.prod(values.shape[1:])).sum(1), count.clamp(min=1).to(values.dtype)
        # |d mean|^2 = |d (total / sqrt(n))|^2 / n: in float16 the gradient of a mean over many pixels is 0, that of a sum may be infinite.
        fisher = gradient_statistics(
            [g.flatten(1) for g in gradients((total / n.sqrt()).sum(), tensors, name)],
            values=[sum_over_ranks(total / n, self.spatial_group)] * len(tensors),
            mask=None if mask is None else count > 0,
            eps=self.eps,
            backend=self.backend,
        ).fisher
        assert fisher is not None
        return sum_over_ranks(fisher / n, self.spatial_group), count

    def _penalty(
        self,
        information: Tensor,
        valid: Tensor | None,
        scale_weights: Sequence[float] | None,
        weight: float,
        names: list[str],
        return_details: bool,
    ) -> Tensor | tuple[Tensor, InformationDetails]:
        name = f"{type(self).__name__}.scale_weights"
        if self.process_group is None:
            penalty = penalty_of_information(
                information, self.objective, self.eps, weight, valid=valid, weights=scale_weights, function=name
            )
            if not return_details:
                return penalty
        total, count = batch_totals(information, valid)
        if self.process_group is not None:
            counts = count if isinstance(count, Tensor) else torch.full_like(total, count)
            total, count = (sum_over_ranks(x, self.process_group) for x in (total, counts))
            penalty = penalty_of_mean(total, count, self.objective, self.eps, scale_weights, function=name, scale=weight)
            if not return_details:
                return penalty
        return penalty, InformationDetails(dict(zip(names, (total / count).detach(), strict=True)))


def _spatial_size(g: Tensor, values: Tensor, channel_dim: int, name: str) -> tuple[int, ...]:
    spatial = tuple(g.movedim(channel_dim, 1).shape[2:])
    if len(spatial) != values.dim() - 1 and spatial:
        validate.fail(name, "inputs", f"of {values.dim() - 1} spatial dimensions like values", f"shape {validate.shape(g)}")
    return spatial

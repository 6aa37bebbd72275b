"""The losses: ``nn.Module`` penalties over the functional layer. They return a scalar to add to the task loss."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from modreg_fast import _validate as validate
from modreg_fast.distributed import mean_over_parts, sum_over_ranks
from modreg_fast.double_backward import gradients
from modreg_fast.functional import (
    average_pooled,
    batch_totals,
    gradient_statistics,
    modality_share,
    penalty_of_mean,
    resize_mask,
    softmax_fisher_with_counts,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AttributionDetails", "AttributionLoss", "FunctionalEntropyLoss", "InformationDetails"]


class InformationDetails(NamedTuple):
    """For logging, detached: mean information over the batch; NaN where no sample counts."""

    information: dict[str, Tensor]  # modality -> (S,)


class AttributionDetails(NamedTuple):
    """For logging, detached: mean share of each modality over the batch and mean attribution, 0-dim; NaN where no sample counts."""

    share: dict[str, Tensor]
    attribution: dict[str, Tensor]


class FunctionalEntropyLoss(nn.Module):
    r"""Penalty on modalities that carry little functional Fisher information, at feature scales and at the prediction.

    .. math::
        R = w \sum_{m,s} w_s\, \phi(\operatorname{mean}_b I_{msb}), \qquad
        \phi(I) = 1 / (I + \text{eps}) \text{ for } \texttt{"inverse"}, \; -\log(I + \text{eps}) \text{ for } \texttt{"log"}

    and for ``"norm"`` the Euclidean norm of the inverse terms. :meth:`forward` takes the features (closed form, no second
    differentiation); :meth:`prediction_term` takes the loss map and differentiates it with respect to the modality inputs.
    Source: arXiv:2505.06635; ``"norm"``: Gat et al., NeurIPS 2020. The mean counts only samples that have the modality and a valid
    pixel.

    Args:
        feature_weight: ``w`` of :meth:`forward`, at least 0.
        prediction_weight: ``w`` of :meth:`prediction_term`, at least 0.
        objective: ``"inverse"`` (the paper), ``"norm"`` or ``"log"``; see :func:`modreg_fast.functional.balance_penalty`.
        scale_weights: ``w_s``, one per scale; default 1.
        sigma, samples, detach_reference, eps, backend: see :func:`modreg_fast.functional.softmax_fisher_information`; ``eps`` is also
            added to the information in the penalty.
        process_group: its ranks hold other samples; statistics are summed over them, so that N ranks compute the penalty of the whole
            batch.
        spatial_group: its ranks hold parts of the same samples, such as rows of every map; sums over pixels are taken over them all.

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
        objective: Literal["inverse", "norm", "log"] = "inverse",
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
        if objective not in ("inverse", "norm", "log"):
            validate.fail(name, "objective", "'inverse', 'norm' or 'log'", repr(objective))
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
        self.detach_reference = detach_reference
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
        features = validate.modalities(features, type(self).__name__, "features")
        information, counts = softmax_fisher_with_counts(
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
        inputs = validate.modalities(inputs, name, "inputs")
        validate.tensor(values, name, "values")
        if values.dim() == 0:
            validate.fail(name, "values", "of shape (B, *spatial)", "()")
        if granularity not in ("pixel", "sample"):
            validate.fail(name, "granularity", "'pixel' or 'sample'", repr(granularity))
        if mask is not None:
            validate.tensor(mask, name, "mask", dtypes=(torch.bool,))
            validate.same(mask, values, name, "mask", "values")
        tensors = [_differentiable(x, name, f"inputs[{m!r}]", len(values), self.spatial_group) for m, x in inputs.items()]
        values = values.to(torch.promote_types(values.dtype, torch.float32))  # sums over many positions
        information, counts = (self._by_pixel if granularity == "pixel" else self._by_sample)(values, tensors, mask, name)
        valid = None if mask is None else (counts > 0).expand_as(information).unsqueeze(1)
        return self._penalty(information.unsqueeze(1), valid, None, self.prediction_weight, list(inputs), return_details)

    def _by_pixel(self, values: Tensor, tensors: list[Tensor], mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """Information and number of valid pixels, ``(K, B)`` each."""
        masked = values if mask is None else torch.where(mask, values, 0)
        grads = gradients(masked.sum(), tensors, name)
        sizes = [_spatial_size(g, values, self.channel_dim, name) for g in grads]
        masks = None if mask is None else [resize_mask(mask, size) if size else _count(mask) > 0 for size in sizes]
        fisher = gradient_statistics(
            grads,
            values=[_pooled(masked, mask, size) for size in sizes],
            mask=masks,
            channel_dim=self.channel_dim,
            eps=self.eps,
            backend=self.backend,
        ).fisher
        assert fisher is not None
        counts = [_count(m) for m in masks] if masks else [_everywhere(values, size) for size in sizes]
        return mean_over_parts(fisher, torch.stack(counts), self.spatial_group)

    def _by_sample(self, values: Tensor, tensors: list[Tensor], mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """Information ``(K, B)`` and number of valid pixels ``(B,)``."""
        masked = values if mask is None else torch.where(mask, values, 0)
        count = sum_over_ranks(_everywhere(values, values.shape[1:]) if mask is None else _count(mask), self.spatial_group)
        part = masked.reshape(len(values), -1).sum(1) / count.clamp(min=1)
        fisher = gradient_statistics(
            [g.reshape(len(g), -1) for g in gradients(part.sum(), tensors, name)],
            values=[sum_over_ranks(part, self.spatial_group)] * len(tensors),
            mask=None if mask is None else count > 0,
            eps=self.eps,
            backend=self.backend,
        ).fisher
        assert fisher is not None
        return sum_over_ranks(fisher, self.spatial_group), count

    def _penalty(
        self,
        information: Tensor,
        valid: Tensor | None,
        scale_weights: Sequence[float] | None,
        weight: float,
        names: list[str],
        return_details: bool,
    ) -> Tensor | tuple[Tensor, InformationDetails]:
        total, count = (sum_over_ranks(x, self.process_group) for x in batch_totals(information, valid))
        penalty = weight * penalty_of_mean(
            total, count, self.objective, self.eps, scale_weights, function=f"{type(self).__name__}.scale_weights"
        )
        if not return_details:
            return penalty
        return penalty, InformationDetails(dict(zip(names, (total / count).detach(), strict=True)))


class AttributionLoss(nn.Module):
    r"""Penalty on the distance between the modalities' shares in the decision and target shares.

    The attribution of a modality is the L2-pooled gradient x input of the winning class score,
    :math:`a_m = \lVert \partial s / \partial e_m \odot e_m \rVert_2` per sample (over channels, valid pixels and scales), its share
    :math:`a_m / \sum_k a_k`, and

    .. math::
        R = \operatorname{mean}_b \sum_m |\text{share}_{mb} - r_m| \quad (\texttt{"l1"}; \text{ squared for } \texttt{"l2"}).

    Source: arXiv:2404.02359, which updates the fusion and the classifier only:
    ``penalty.backward(inputs=list(fusion_and_classifier.parameters()))``. The inner differentiation runs eagerly, outside of
    ``torch.compile`` graphs.

    Args:
        target: modality -> weight, at least 0 with a positive sum, normalised to shares; None for equal shares.
        norm: ``"l1"`` (the paper) or ``"l2"``.
        channel_dim: dimension of the channels in the features; 1, or -1 for tokens.
        process_group: its ranks hold other samples; statistics are summed over them, so that N ranks compute the penalty of the whole
            batch.
        spatial_group: its ranks hold parts of the same samples, such as rows of every map; sums over pixels are taken over them all.
        backend: see :func:`modreg_fast.functional.softmax_fisher_information`.

    Example:
        >>> video, audio = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        >>> scores = torch.nn.Linear(16, 3)(torch.cat([video, audio], 1))
        >>> AttributionLoss(target={"video": 0.5, "audio": 0.5})(scores, {"video": video, "audio": audio}).shape
        torch.Size([])
    """

    def __init__(
        self,
        target: Mapping[str, float] | None = None,
        norm: Literal["l1", "l2"] = "l1",
        channel_dim: int = 1,
        process_group: "ProcessGroup | None" = None,
        spatial_group: "ProcessGroup | None" = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if norm not in ("l1", "l2"):
            validate.fail(name, "norm", "'l1' or 'l2'", repr(norm))
        self.target = None if target is None else _shares(target, name)
        self.norm = norm
        self.channel_dim = channel_dim
        self.process_group = process_group
        self.spatial_group = spatial_group
        self.backend = backend

    def extra_repr(self) -> str:
        return f"target={self.target}, norm={self.norm!r}"

    def forward(
        self,
        scores: Tensor,
        features: Mapping[str, Tensor | Sequence[Tensor]],
        *,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        target: Mapping[str, float] | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, AttributionDetails]:
        """The penalty.

        Args:
            scores: ``(B, K, *spatial)`` class scores with a graph to ``features``.
            features: modality -> tensor ``(B, C, *spatial)``, or a sequence of them (scales, pooled together).
            index: ``(B, *spatial)`` integer class to attribute at each position, for valid positions in [0, K); default the class
                with the largest score.
            mask: valid positions of ``scores``, bool ``(B, *spatial)``. Features with as many spatial dimensions are masked too, at
                their resolution.
            present: ``(B, M)`` bool in the order of ``features``; absent modalities have no share, the targets of the others are
                normalised anew, and a sample without any counts nowhere.
            target: for this call, in place of that of the constructor; such as from :class:`QualityTarget`.
            return_details: return ``(penalty, AttributionDetails)``.
        """
        name = type(self).__name__
        features = validate.modalities(features, name, "features")
        target = self.target if target is None else _shares(target, name)
        if target is not None and set(target) != set(features):
            validate.fail(name, "features", f"the modalities of target, {sorted(target)}", sorted(features))
        validate.tensor(scores, name, "scores")
        if scores.dim() < 2:
            validate.fail(name, "scores", "of shape (B, K, *spatial)", validate.shape(scores))
        scales = [[x] if isinstance(x, Tensor) else validate.sequence(x, name, f"features[{m!r}]") for m, x in features.items()]
        flat = [
            _differentiable(x, name, f"features[{m!r}][{s}]", len(scores), self.spatial_group)
            for m, row in zip(features, scales, strict=True)
            for s, x in enumerate(row)
        ]
        score = _selected_score(scores, index, mask, name)
        attribution = gradient_statistics(
            gradients(score, flat, name),
            features=flat,
            mask=None if mask is None else [self._feature_mask(mask, x) for x in flat],
            channel_dim=self.channel_dim,
            backend=self.backend,
        ).attribution
        assert attribution is not None
        # (M, B): scales, and parts on other ranks, are pooled by the L2 norm, as pixels are.
        squares = torch.stack([rows.double().square().sum(0) for rows in attribution.split([len(row) for row in scales])])
        attribution = _root(sum_over_ranks(squares, self.spatial_group)).to(attribution.dtype)
        shares = [1 / len(features) if target is None else target[m] for m in features]
        return self._penalty(attribution, shares, present, list(features), return_details)

    def _penalty(
        self, attribution: Tensor, shares: list[float], present: Tensor | None, names: list[str], return_details: bool
    ) -> Tensor | tuple[Tensor, AttributionDetails]:
        name = type(self).__name__
        target = torch.tensor(shares, dtype=attribution.dtype, device=attribution.device)[:, None].expand_as(attribution)
        if present is not None:
            validate.tensor(present, name, "present", dtypes=(torch.bool,))
            if tuple(present.shape) != tuple(attribution.T.shape):
                validate.fail(name, "present", f"of shape {validate.shape(attribution.T)}", validate.shape(present))
            attribution = torch.where(present.T, attribution, 0)
            target = modality_share(torch.where(present.T, target, 0))
        share = modality_share(attribution)
        distance = (share - target).abs() if self.norm == "l1" else (share - target).square()
        # NaN counts: it must show in the penalty.
        counts = (attribution.sum(0) != 0) & (target.sum(0) > 0)
        total, count = (
            sum_over_ranks(x, self.process_group)
            for x in (torch.where(counts, distance.sum(0), 0).sum(), counts.sum().to(distance.dtype))
        )
        penalty = total / count.clamp(min=1)
        if not return_details:
            return penalty
        sums = sum_over_ranks(torch.where(counts, torch.stack([share, attribution]), 0).sum(2).detach(), self.process_group)
        means = sums / count
        return penalty, AttributionDetails(*(dict(zip(names, values, strict=True)) for values in means))

    def _feature_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        spatial = x.movedim(self.channel_dim, 1).shape[2:]
        if len(spatial) != mask.dim() - 1:  # such as pooled embeddings below a dense prediction
            return torch.ones((x.shape[0], *spatial), dtype=torch.bool, device=x.device)
        return resize_mask(mask, spatial)


def _shares(target: Mapping[str, float], function: str) -> dict[str, float]:
    """The targets, normalised to sum to 1."""
    validate.modalities(target, function, "target", "numbers")
    weights = {m: validate.number(w, function, f"target[{m!r}]") for m, w in target.items()}
    total = sum(weights.values())
    if total <= 0:
        validate.fail(function, "target", "weights with a positive sum", weights)
    return {m: w / total for m, w in weights.items()}


def _root(x: Tensor) -> Tensor:
    """Square root; its derivative at 0 is 0."""
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x).sqrt())


def _differentiable(x: object, function: str, argument: str, batch: int, spatial_group: "ProcessGroup | None") -> Tensor:
    x = validate.tensor(x, function, argument)
    if x.dim() < 2 or len(x) != batch:
        validate.fail(function, argument, f"of shape (B, C, *spatial) with batch size {batch}", validate.shape(x))
    if x.dim() == 2 and spatial_group is not None:
        validate.fail(function, argument, "a part of a map, (B, C, *spatial), with spatial_group", f"shape {validate.shape(x)}")
    if not x.requires_grad:
        validate.fail(
            function, argument, "a tensor that requires grad, because the loss is differentiated by it", "one that does not"
        )
    return x


def _selected_score(scores: Tensor, index: Tensor | None, mask: Tensor | None, name: str) -> Tensor:
    """Sum over valid positions of the score of the attributed class."""
    positions = scores[:, 0]
    if mask is not None:
        validate.tensor(mask, name, "mask", dtypes=(torch.bool,))
        validate.same(mask, positions, name, "mask", "scores without its classes")
    if index is None:
        selected = scores.max(1).values
    else:
        validate.tensor(index, name, "index", dtypes=(torch.int64, torch.int32, torch.uint8))
        validate.same(index, positions, name, "index", "scores without its classes")
        valid_index = index.long() if mask is None else torch.where(mask, index.long(), 0)
        selected = scores.gather(1, valid_index.unsqueeze(1)).squeeze(1)
    return (selected if mask is None else torch.where(mask, selected, 0)).sum()


def _spatial_size(g: Tensor, values: Tensor, channel_dim: int, name: str) -> tuple[int, ...]:
    spatial = tuple(g.movedim(channel_dim, 1).shape[2:])
    if len(spatial) != values.dim() - 1 and spatial:
        validate.fail(name, "inputs", f"of {values.dim() - 1} spatial dimensions like values", f"shape {validate.shape(g)}")
    return spatial


def _count(mask: Tensor) -> Tensor:
    """Valid pixels of each sample."""
    return mask.reshape(len(mask), -1).sum(1)


def _everywhere(values: Tensor, spatial: Sequence[int]) -> Tensor:
    """Pixels of each sample at a resolution."""
    return values.new_full((len(values),), math.prod(spatial))


def _pooled(values: Tensor, mask: Tensor | None, spatial: tuple[int, ...]) -> Tensor:
    """``values`` average-pooled to another resolution, over valid pixels where masked."""
    if tuple(values.shape[1:]) == spatial:
        return values

    def pool(x: Tensor) -> Tensor:
        return average_pooled(x, spatial) if spatial else x.flatten(1).mean(1)

    return pool(values) if mask is None else pool(values) / pool(mask.to(values.dtype)).clamp(min=1e-6)

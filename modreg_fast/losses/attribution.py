"""Attribution: the modalities' shares in the decision are pulled to target shares."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast.distributed import Grouped, sum_over_ranks
from modreg_fast.double_backward import differentiable, gradients
from modreg_fast.functional import gradient_statistics, modality_share, resize_mask
from modreg_fast.functional.masks import constants

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AttributionDetails(NamedTuple):
    """For logging, detached: mean share of each modality over the batch and mean attribution, 0-dim; NaN where no sample counts.

    Example:
        >>> features = {m: torch.ones(4, 8, requires_grad=True) for m in ("video", "audio")}
        >>> scores = 3 * features["video"] + features["audio"]
        >>> penalty, details = AttributionLoss()(scores, features, return_details=True)
        >>> {m: share.item() for m, share in details.share.items()}
        {'video': 0.75, 'audio': 0.25}
    """

    share: dict[str, Tensor]
    attribution: dict[str, Tensor]


class AttributionLoss(Grouped):
    r"""Penalty on the distance between the modalities' shares in the decision and target shares.

    The attribution of a modality is the L2-pooled gradient x input of the winning class score,
    :math:`a_m = \lVert \partial s / \partial e_m \odot e_m \rVert_2` per sample (over channels, valid pixels and scales), its share
    :math:`a_m / \sum_k a_k`, and

    .. math::
        R = \operatorname{mean}_b \sum_m |\text{share}_{mb} - r_m| \quad (\text{"l1"}; \text{ squared for } \text{"l2"}).

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

    Raises:
        ValueError, TypeError: an argument that does not fit, here or in the call; the message says which and why.
        RuntimeError: in the call, an operation between ``features`` and ``scores`` that PyTorch cannot differentiate twice; the message
            names it and the cure.

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
        validate.one_of(norm, ("l1", "l2"), name, "norm")
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
            index: ``(B, *spatial)`` class to attribute at each position, of any integer dtype, for valid positions in [0, K);
                default the class with the largest score.
            mask: valid positions of ``scores``, bool ``(B, *spatial)``. Features with as many spatial dimensions are masked too, at
                their resolution.
            present: ``(B, M)`` bool in the order of ``features``; absent modalities have no share and are not read, the targets of the
                others are normalised anew, and a sample without any counts nowhere.
            target: for this call, in place of that of the constructor; such as from :class:`QualityTarget`.
            return_details: return ``(penalty, AttributionDetails)``.
        """
        name = type(self).__name__
        features, present = self.by_name(validate.modalities(features, name, "features"), present)
        target = self.target if target is None else _shares(target, name)
        if target is not None and set(target) != set(features):
            validate.fail(name, "features", f"the modalities of target, {sorted(target)}", sorted(features))
        scores = validate.tensor(scores, name, "scores")
        if scores.dim() < 2:
            validate.fail(name, "scores", "of shape (B, K, *spatial)", validate.shape(scores))
        batch = scores.shape[0]
        scales = [[x] if isinstance(x, Tensor) else validate.sequence(x, name, f"features[{m!r}]") for m, x in features.items()]
        scales = [
            [
                differentiable(x, name, f"features[{m!r}][{s}]", batch, self.channel_dim, self.spatial_group)
                for s, x in enumerate(row)
            ]
            for m, row in zip(features, scales, strict=True)
        ]
        flat = [x for row in scales for x in row]
        shares = [1 / len(features) if target is None else target[m] for m in features]
        counts = None if present is None else self._counts(present, shares, scores)
        score = selected_score(scores, index, mask, name, None if counts is None else counts.any(1))
        # An entry that does not count is left out here, where it would be read: 0 times a NaN behind it is NaN.
        columns = [None if counts is None else counts[:, i] for i, row in enumerate(scales) for _ in row]
        unmasked = mask is None and present is None
        attribution = gradient_statistics(
            gradients(score, dict(zip(features, scales, strict=True)), name, counts),
            features=flat,
            mask=None if unmasked else [self._feature_mask(mask, c, x) for c, x in zip(columns, flat, strict=True)],
            channel_dim=self.channel_dim,
            backend=self.backend,
        ).attribution
        assert attribution is not None
        # (M, B): scales, and parts on other ranks, are pooled by the L2 norm, as pixels are.
        if len(flat) > len(scales) or self.spatial_group is not None:
            squares, lengths = attribution.double().square(), [len(row) for row in scales]
            if len(set(lengths)) == 1:
                squares = squares.view(len(scales), lengths[0], batch).sum(1)
            else:
                squares = torch.stack([rows.sum(0) for rows in squares.split(lengths)])
            attribution = _root(sum_over_ranks(squares, self.spatial_group)).to(attribution.dtype)
        return self._penalty(attribution, shares, counts, list(features), return_details)

    def _counts(self, present: Tensor, shares: list[float], scores: Tensor) -> Tensor:
        """Which modality of which sample counts, ``(B, M)``: the present ones, if any of them has a target."""
        present = validate.present(present, len(scores), len(shares), scores.device, type(self).__name__)
        targeted = constants([x > 0 for x in shares], present)
        return present & (present & targeted).any(1, keepdim=True)

    def _penalty(
        self, attribution: Tensor, shares: list[float], counts: Tensor | None, names: list[str], return_details: bool
    ) -> Tensor | tuple[Tensor, AttributionDetails]:
        target: Tensor | float = shares[0]
        if counts is not None or len(set(shares)) > 1:
            target = constants(shares, attribution)[:, None]
        if counts is not None:
            target = modality_share(torch.where(counts.T, target, 0))
        whole = attribution.sum(0)
        counted = whole != 0  # NaN counts: it must show in the penalty
        share = attribution / torch.where(counted, whole, 1)
        distance = (share - target).abs() if self.norm == "l1" else (share - target).square()
        total, count, means = torch.where(counted, distance, 0).sum(), counted.sum(), []
        if return_details or self.process_group is not None:  # in one tensor: ranks meet once, whoever of them asks for details
            details = torch.where(counted, torch.cat([share, attribution]), 0).sum(1).detach()
            sums = torch.cat([total[None], count[None].to(total.dtype), details])
            total, count, *means = sum_over_ranks(sums, self.process_group)
        penalty = total / count.clamp(min=1)
        if not return_details:
            return penalty
        by_name = (torch.stack(means).detach() / count.detach()).view(2, -1)
        return penalty, AttributionDetails(*(dict(zip(names, values, strict=True)) for values in by_name))

    def _feature_mask(self, mask: Tensor | None, samples: Tensor | None, x: Tensor) -> Tensor:
        """Where ``x`` counts, ``(B, *spatial)``: the valid pixels of the samples that have it."""
        spatial = x.movedim(self.channel_dim, 1).shape[2:]
        if mask is None or len(spatial) != mask.dim() - 1:  # such as pooled embeddings below a dense prediction
            valid = torch.ones((x.shape[0], *spatial), dtype=torch.bool, device=x.device)
        else:
            valid = resize_mask(mask, spatial)
        return valid if samples is None else _held(valid, samples, valid)


def _held(mask: Tensor | None, samples: Tensor, like: Tensor) -> Tensor:
    """``mask``, where given, within ``samples`` ``(B,)``; of the shape of ``like``."""
    held = samples.reshape(-1, *[1] * (like.dim() - 1)).expand(like.shape)
    return held if mask is None else mask & held


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
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


def selected_score(scores: Tensor, index: Tensor | None, mask: Tensor | None, name: str, samples: Tensor | None = None) -> Tensor:
    """Sum over valid positions, of ``samples`` ``(B,)`` where given, of the score of the attributed class."""
    positions = scores[:, 0]
    if mask is not None:
        mask = validate.tensor(mask, name, "mask", dtypes=(torch.bool,))
        validate.same(mask, positions, name, "mask", "scores without its classes")
    if samples is not None:
        mask = _held(mask, samples, positions)
    if index is None:
        selected = scores.max(1).values
    else:
        index = validate.tensor(index, name, "index", dtypes=validate.INTEGERS)
        validate.same(index, positions, name, "index", "scores without its classes")
        valid_index = index.long() if mask is None else torch.where(mask, index.long(), 0)
        if index.is_cpu and index.numel() and validate.readable(valid_index):
            low, high = (int(x) for x in valid_index.aminmax())
            if low < 0 or high >= scores.shape[1]:
                expected = f"in [0, {scores.shape[1]}) where mask does not leave it out"
                validate.fail(name, "index", expected, low if low < 0 else high)
        selected = scores.gather(1, valid_index.unsqueeze(1)).squeeze(1)
    return (selected if mask is None else torch.where(mask, selected, 0)).sum()

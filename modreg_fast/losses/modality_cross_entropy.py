"""The task loss of every modality alone beside the joint one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast.distributed import Grouped, sum_over_ranks
from modreg_fast.functional.modality_cross_entropy import modality_sums
from modreg_fast.functional.penalties import OBJECTIVES, Objective, penalty_of_mean

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropyDetails(NamedTuple):
    """For logging, detached, 0-dim each: means over the valid pixels of the batch; NaN where none counts.

    Example:
        >>> logits = {"rgb": torch.randn(2, 5, 4, 4), "depth": torch.randn(2, 5, 4, 4)}
        >>> loss, details = ModalityCrossEntropy()(logits, torch.randint(5, (2, 4, 4)), return_details=True)
        >>> list(details.cross_entropy), details.joint.shape
        (['rgb', 'depth'], torch.Size([]))
    """

    cross_entropy: dict[str, Tensor]
    joint: Tensor
    information: dict[str, Tensor]


class ModalityCrossEntropy(Grouped):
    r"""Cross entropy of the joint prediction and of each modality's own, in one pass over all logits.

    .. math::
        L = w_\text{joint}\, \text{ce} + w \operatorname{mean}_m \text{ce}_m + w_I \sum_m \phi(I_m)

    with the cross entropies ``ce`` of the joint logits and :math:`\text{ce}_m` of modality :math:`m`, and the functional Fisher
    information :math:`I_m` of its logits; each is the mean over the valid pixels of the batch, as
    :func:`torch.nn.functional.cross_entropy` takes it (formulas: :func:`modreg_fast.functional.modality_cross_entropy`). What keeps
    a network alive without a sensor is the second term. Sources: arXiv:2405.17730 (ICML 2024) for the losses of each modality,
    arXiv:2505.06635 for the information of the prediction.

    Args:
        weight: ``w``, at least 0. The mean is over the modalities that any valid pixel of the batch has.
        joint_weight: ``w_joint``, at least 0.
        information_weight: ``w_I``, at least 0.
        class_weight: of each class, at least 0, ``(C,)``; a buffer, as in :class:`torch.nn.CrossEntropyLoss`.
        ignore_index: pixels with this target do not count.
        label_smoothing: in ``[0, 1]``.
        objective: :math:`\phi`; ``"inverse"`` (the paper), ``"norm"`` or ``"log"``; see
            :func:`modreg_fast.functional.balance_penalty`.
        channel_dim: dimension of the channels; 1, or -1 for tokens.
        eps: added to the denominator of the information, and to the information in :math:`\phi`.
        process_group: its ranks hold other samples; sums are taken over them, so that N ranks compute the loss of the whole batch.
        spatial_group: its ranks hold parts of the same samples, such as rows of every map; sums are taken over them too.
        backend: see :func:`modreg_fast.functional.modality_cross_entropy`.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which and why.

    Example:
        >>> criterion = ModalityCrossEntropy(ignore_index=255)
        >>> logits = {"rgb": torch.randn(2, 5, 4, 4), "depth": torch.randn(2, 5, 4, 4)}
        >>> criterion(logits, torch.randint(5, (2, 4, 4))).shape
        torch.Size([])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        weight: float = 1.0,
        joint_weight: float = 1.0,
        information_weight: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        objective: Objective = "inverse",
        channel_dim: int = 1,
        eps: float = 1e-8,
        process_group: "ProcessGroup | None" = None,
        spatial_group: "ProcessGroup | None" = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        validate.one_of(objective, OBJECTIVES, name, "objective")
        self.weight = validate.number(weight, name, "weight")
        self.joint_weight = validate.number(joint_weight, name, "joint_weight")
        self.information_weight = validate.number(information_weight, name, "information_weight")
        if class_weight is not None:
            weights = validate.tensor(class_weight, name, "class_weight")
            if weights.device.type != "meta" and not (weights >= 0).all():
                validate.fail(name, "class_weight", "at least 0", weights.tolist())
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = validate.ignore_index(ignore_index, name)
        self.label_smoothing = validate.fraction(label_smoothing, name, "label_smoothing")
        self.objective = objective
        self.channel_dim = channel_dim
        self.eps = validate.number(eps, name, "eps")
        self.process_group = process_group
        self.spatial_group = spatial_group
        self.backend = backend

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, joint_weight={self.joint_weight:g}, information_weight={self.information_weight:g}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing:g}"
        )

    @overload
    def forward(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        *,
        joint: Tensor | None = ...,
        present: Tensor | None = ...,
        return_details: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        *,
        joint: Tensor | None = ...,
        present: Tensor | None = ...,
        return_details: Literal[True],
    ) -> tuple[Tensor, CrossEntropyDetails]: ...

    def forward(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        *,
        joint: Tensor | None = None,
        present: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, CrossEntropyDetails]:
        """The loss; 0 where no pixel counts.

        Args:
            logits: modality -> its own logits, ``(B, C, *spatial)``, all of one shape: from a head of its own
                (:class:`modreg_fast.ModalityHeads`), or from the joint head with the others absent (:func:`modreg_fast.each_alone`).
            target: classes, or ``ignore_index``: ``(B, *spatial)`` of any integer dtype.
            joint: logits of all modalities together, of the same shape; default the mean of ``logits`` over the present modalities.
            present: ``(B, M)`` bool in the order of ``logits``: which sample has which modality. What is absent is not read.
            return_details: return ``(loss, CrossEntropyDetails)``.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says which and why. A target that is neither a class nor
                ``ignore_index`` is an error, on a GPU by an assertion on the device.
        """
        name = type(self).__name__
        logits, present = self.by_name(validate.modalities(logits, name, "logits"), present)
        names, tensors = list(logits), list(logits.values())
        held = present
        if joint is not None:
            joint, first = validate.tensor(joint, name, "joint"), f"logits[{names[0]!r}]"
            validate.same(joint, validate.tensor(tensors[0], name, first), name, "joint", first)
            tensors.append(joint)
            if present is not None:
                held = validate.present(present, len(joint), len(names), joint.device, name)
                held = torch.cat([held, held.any(1, keepdim=True)], 1)
        sums = modality_sums(
            tensors,
            target,
            self.class_weight,
            self.ignore_index,
            self.label_smoothing,
            held,
            self.channel_dim,
            self.eps,
            self.backend,
            function=name,
            names=[*names, "joint"],
        )
        joint_sum = sums.joint if joint is None else sums.cross_entropy[-1]
        weights = sums.weights.expand(len(names), -1) if present is None else torch.where(present.T, sums.weights, 0)
        # All sums over the batch in one tensor, so that ranks meet once.
        rows = [sums.cross_entropy[: len(names)], sums.information[: len(names)], weights, joint_sum[None], sums.weights[None]]
        totals = torch.cat(rows).sum(1)
        for group in (self.spatial_group, self.process_group):
            totals = sum_over_ranks(totals, group)
        cross_entropy, information, count, joint_total, joint_count = totals.split([len(names)] * 3 + [1, 1])

        counted = count > 0
        loss = self.joint_weight * _ratio(joint_total, joint_count)[0]
        loss = loss + self.weight * _ratio(cross_entropy, count).sum() / counted.sum().clamp(min=1)
        if self.information_weight > 0:
            penalty = penalty_of_mean(information[:, None], count[:, None], self.objective, self.eps, None, function=name)
            loss = loss + self.information_weight * penalty
        if not return_details:
            return loss
        own, mean = (dict(zip(names, (x / count).detach(), strict=True)) for x in (cross_entropy, information))
        return loss, CrossEntropyDetails(own, (joint_total / joint_count)[0].detach(), mean)


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """0 where nothing was counted."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0)

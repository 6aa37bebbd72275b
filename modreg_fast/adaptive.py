"""Strength and targets without a search: a weight that follows the gradients, attribution targets that follow each modality's skill."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modreg_fast import _validate as validate
from modreg_fast.distributed import Grouped, sum_over_ranks
from modreg_fast.double_backward import without_graph

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

__all__ = ["AdaptiveWeight", "QualityTarget"]


class _Averages(Grouped):
    """Its buffers have float32 at least, also where the model around them is cast or the default dtype is smaller: an average of large
    norms or counts is infinite in float16, and never becomes finite again."""

    def _start(self, name: str, *shape: int) -> None:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class AdaptiveWeight(_Averages):
    r"""Weights a penalty so that its gradient keeps a set ratio to the gradient of the task.

    The scale of a penalty means little: that of :class:`FunctionalEntropyLoss` with ``"inverse"`` changes by orders of magnitude while
    training goes on. What moves the parameters are gradients, so the weight follows their norms at tensors ``z`` that both losses
    depend on, smoothed over steps by an exponential moving average:

    .. math::
        w = \min\left(\text{ratio} \cdot \frac{\operatorname{EMA} \lVert \nabla_z \text{task} \rVert_2}
        {\operatorname{EMA} \lVert \nabla_z \text{penalty} \rVert_2},\; \text{maximum}\right)

    Source: the ratio with its upper limit is the adaptive weight of VQGAN (arXiv:2012.09841); to balance losses by the norms of their
    gradients is GradNorm (arXiv:1711.02257), whose weights are trained, while these are computed.

    A step counts when both norms are finite and that of the penalty is not 0; otherwise, and in ``eval()``, the weight of the steps
    before it stays. It is 0 until the first step counts. The state is in the ``state_dict``.

    Limits: each call costs a backward pass of either loss down to the tensors, so take tensors near the losses. The ratio holds at
    these tensors and says nothing about others, nor about the directions: gradients that oppose each other cancel all the same. Near
    its optimum a smooth penalty has small gradients, and the weight grows until ``maximum``.

    Args:
        ratio: norm of the weighted penalty's gradient over that of the task, at least 0.
        decay: share of the old value that each step keeps in the average, in [0, 1).
        maximum: upper limit of the weight.
        process_group: takes the norms over all its ranks, so that every rank has the same weight.

    Raises:
        ValueError, TypeError: an argument that does not fit, here or in the call; the message says which and why.

    Example:
        >>> adaptive, head, x = AdaptiveWeight(ratio=0.1), torch.nn.Linear(4, 2), torch.randn(3, 4)
        >>> task, penalty = head(x).square().mean(), 1e6 * head.weight.square().sum()
        >>> loss = task + adaptive(task, penalty, [head.weight])
    """

    task_norm: Tensor
    penalty_norm: Tensor

    def __init__(
        self, ratio: float = 0.1, decay: float = 0.99, maximum: float = 1e4, process_group: "ProcessGroup | None" = None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.ratio = validate.number(ratio, name, "ratio")
        self.decay = _decay(decay, name)
        self.maximum = validate.number(maximum, name, "maximum")
        self.process_group = process_group
        # Both averages start from 0, which cancels in their ratio.
        self._start("task_norm")
        self._start("penalty_norm")

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}, decay={self.decay:g}, maximum={self.maximum:g}"

    @property
    def weight(self) -> Tensor:
        """The present weight, 0-dim."""
        weight = self.ratio * self.task_norm / self.penalty_norm
        return torch.where(self.penalty_norm > 0, weight.clamp(max=self.maximum), 0)

    def forward(self, task: Tensor, penalty: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The weighted penalty, to be added to the task loss. No gradient flows through the weight.

        Args:
            task: scalar loss of the task. Under a loss scaler scale both losses or none.
            penalty: scalar penalty.
            tensors: where the norms are taken: parameters, such as those of the fusion, or features. All of them together count as
                one vector; one that does not require grad, such as a frozen parameter, adds nothing. With a process group the
                gradients of an ``nn.Parameter`` are summed over the ranks before the norm, as DDP does; other tensors are parts of one
                batch, whose squared norms are summed.
        """
        name = type(self).__name__
        for argument, loss in (("task", task), ("penalty", penalty)):
            if validate.tensor(loss, name, argument).dim() > 0:
                validate.fail(name, argument, "a scalar", f"shape {validate.shape(loss)}")
        if self.training:
            tensors = [
                validate.tensor(x, name, f"tensors[{i}]") for i, x in enumerate(validate.sequence(tensors, name, "tensors"))
            ]
            norms = self._norms({"task": task, "penalty": penalty}, tensors)
            counts = norms.isfinite().all() & (norms[1] > 0)
            for buffer, norm in zip(("task_norm", "penalty_norm"), norms, strict=True):
                old = getattr(self, buffer).to(norm)
                setattr(self, buffer, torch.where(counts, norm.lerp(old, self.decay), old))
        return self.weight.to(penalty) * penalty

    @torch.compiler.disable(reason="modreg_fast differentiates inside of the loss, which torch.compile cannot trace")
    def _norms(self, losses: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """Norm of the gradient of each loss."""
        name = type(self).__name__
        tensors = [x for x in tensors if x.requires_grad]
        if not tensors and all(loss.requires_grad for loss in losses.values()):
            validate.fail(name, "tensors", "tensors of which at least one requires grad", "none that does")
        squares = []
        for argument, loss in losses.items():
            found: Sequence[Tensor | None] = [None] * len(tensors)
            expected, got = "computed from the given tensors", "one that depends on none of them"
            if loss.requires_grad:
                found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
            else:
                expected = "computed from tensors with gradients enabled"
                got = without_graph("one without a graph", loss)
            grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, tensors, strict=True)]
            parameters = [g.flatten() for g, x in zip(grads, tensors, strict=True) if isinstance(x, nn.Parameter)]
            features = [g.flatten() for g, x in zip(grads, tensors, strict=True) if not isinstance(x, nn.Parameter)]
            total = loss.new_zeros((), dtype=torch.promote_types(loss.dtype, torch.float32))
            if parameters:
                total = total + sum_over_ranks(torch.cat(parameters).to(total), self.process_group).square().sum()
            if features:
                total = total + sum_over_ranks(torch.cat(features).to(total).square().sum(), self.process_group)
            # After the sums: another rank may have a graph where this one has no samples, and must not wait for it.
            if all(g is None for g in found) and not total > 0:
                validate.fail(name, argument, expected, got)
            squares.append(total)
        return torch.stack(squares).sqrt()


class QualityTarget(_Averages):
    r"""Target shares for :class:`AttributionLoss` in proportion to what each modality knows about the labels by itself.

    Equal targets make a network listen to a sensor even when it is broken. Here a modality's share follows its skill: by how much its
    own scores, from it alone, beat the knowledge of how frequent the classes are,

    .. math::
        \text{skill}_m = \max\left(0,\; 1 - \frac{\mathrm{CE}_m}{H_m}\right), \qquad
        r_m = \frac{\text{skill}_m + \text{smoothing}}{\sum_k (\text{skill}_k + \text{smoothing})},

    with the cross entropy of its scores and the entropy of the labels, both over an exponential moving average of the valid positions
    of the batches so far. ``H - CE`` is a lower bound on the mutual information of the modality and the label (Barber and Agakov,
    2003), the quotient is McFadden's pseudo-:math:`R^2`: 0 for noise, also when classes are unbalanced, and 1 for certainty. The
    smoothing is additive: shares are equal while no modality has any skill, and none becomes 0. Source of the idea, with the
    probability of the label as the skill: OGM-GE, arXiv:2203.15332.

    The scores of one modality: a linear probe on its detached features, trained beside the network by its own cross entropy, or the
    network with the others left out. Measure on held-out batches where you can: on training data a probe learns noise by heart, and
    the skill of a broken sensor comes out too high.

    Limits: skill that shows only when modalities are combined is not seen, and a modality that learns slowly looks like a bad one,
    which ``smoothing`` softens. Overconfident scores count as no skill.

    Args:
        modalities: their names.
        classes: number of classes ``K``, at least 2.
        smoothing: skill that every modality is credited with, above 0.
        decay: share of the old value that each step keeps in the averages, in [0, 1).
        process_group: averages over all its ranks, so that every rank has the same targets.

    Raises:
        ValueError, TypeError: an argument that does not fit, here or in the call; the message says which and why.

    Example:
        >>> quality = QualityTarget(["rgb", "depth"], classes=3)
        >>> labels = torch.tensor([0, 1, 2, 0])
        >>> target = quality({"rgb": 5.0 * torch.eye(3)[labels], "depth": torch.zeros(4, 3)}, labels)
        >>> {m: round(share, 3) for m, share in target.items()}
        {'rgb': 0.954, 'depth': 0.046}
    """

    cross_entropy: Tensor
    labels: Tensor

    def __init__(
        self,
        modalities: Sequence[str],
        classes: int,
        smoothing: float = 0.05,
        decay: float = 0.99,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.modalities = list(validate.different(modalities, name, "modalities"))
        if validate.positive_integer(classes, name, "classes") < 2:
            validate.fail(name, "classes", "at least 2", classes)
        self.smoothing = validate.number(smoothing, name, "smoothing")
        if self.smoothing == 0:
            validate.fail(name, "smoothing", "above 0", smoothing)
        self.decay = _decay(decay, name)
        self.process_group = process_group
        # Sums over positions: (M,), and per class (M, K). Both start from 0, which cancels in their ratio.
        self._start("cross_entropy", len(self.modalities))
        self._start("labels", len(self.modalities), classes)

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, classes={self.labels.shape[1]}, smoothing={self.smoothing:g}, decay={self.decay:g}"

    @property
    def skill(self) -> dict[str, float]:
        """Modality to skill in [0, 1]; 0 before the first batch."""
        entropy = torch.special.entr(self.labels / self.labels.sum(1, keepdim=True)).sum(1)
        skill = 1 - self.cross_entropy / self.labels.sum(1) / entropy
        return dict(zip(self.modalities, torch.where(entropy > 0, skill.clamp(0, 1), 0).tolist(), strict=True))

    @property
    def target(self) -> dict[str, float]:
        """Modality to share; they sum to 1."""
        credit = {m: skill + self.smoothing for m, skill in self.skill.items()}
        return {m: x / sum(credit.values()) for m, x in credit.items()}

    @torch.inference_mode(False)  # the state may be trained with and loaded into later, which inference tensors refuse
    @torch.no_grad()
    def forward(
        self, scores: Mapping[str, Tensor], labels: Tensor, *, mask: Tensor | None = None, present: Tensor | None = None
    ) -> dict[str, float]:
        """The targets, after this batch in ``train()``; in ``eval()`` it does not count. Waits for the device.

        A modality whose cross entropy is not finite in a batch keeps its skill.

        Args:
            scores: modality -> class scores (logits) ``(B, K, *spatial)`` of that modality alone.
            labels: ``(B, *spatial)`` integer, in [0, K) where valid.
            mask: valid positions, bool ``(B, *spatial)``.
            present: ``(B, M)`` bool in the order of ``modalities``.
        """
        if self.training:
            self._count(scores, labels, mask, present)
        return self.target

    def _count(self, scores: Mapping[str, Tensor], labels: Tensor, mask: Tensor | None, present: Tensor | None) -> None:
        name, classes = type(self).__name__, self.labels.shape[1]
        if set(validate.modalities(scores, name, "scores")) != set(self.modalities):
            validate.fail(name, "scores", f"of the modalities {self.modalities}", list(scores))
        validate.tensor(labels, name, "labels", dtypes=validate.INTEGERS)
        valid = torch.ones_like(labels, dtype=torch.bool)
        if mask is not None:
            validate.same(validate.tensor(mask, name, "mask", dtypes=(torch.bool,)), labels, name, "mask", "labels")
            valid = mask
        if present is not None:
            present = validate.present(present, len(labels), len(self.modalities), labels.device, name)
        losses, counts = [], []
        for i, m in enumerate(self.modalities):
            x = validate.tensor(scores[m], name, f"scores[{m!r}]")
            expected = (len(labels), classes, *labels.shape[1:])
            if tuple(x.shape) != expected:
                validate.fail(name, f"scores[{m!r}]", f"of shape {expected}", validate.shape(x))
            held = valid if present is None else valid & present[:, i].view(-1, *[1] * (labels.dim() - 1))
            known = labels.long()[held]
            if known.numel() and not 0 <= (low := int(known.min())) <= (high := int(known.max())) < classes:
                range_ = f"in [0, {classes}) where mask does not leave them out"
                validate.fail(name, "labels", range_, low if low < 0 else high)
            losses.append(F.cross_entropy(x.movedim(1, -1)[held].float(), known, reduction="sum"))
            counts.append(torch.bincount(known, minlength=classes).to(x.device, torch.float32))
        batch = sum_over_ranks(torch.cat([torch.stack(losses)[:, None], torch.stack(counts)], 1), self.process_group)
        old = torch.cat([self.cross_entropy[:, None], self.labels], 1).to(batch)
        new = torch.where(batch.isfinite().all(1, keepdim=True), batch.lerp(old, self.decay), old)
        self.cross_entropy, self.labels = new[:, 0].contiguous(), new[:, 1:].contiguous()


def _decay(x: object, function: str) -> float:
    decay = validate.number(x, function, "decay")
    if decay >= 1:
        validate.fail(function, "decay", "a number in [0, 1)", x)
    return decay

"""What is compared: per method the penalty or its own rule for the gradients, what it updates, and the grid of weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import modreg_fast as mrf
from benchmarks.study.baselines import mmpareto, ogm_ge
from benchmarks.study.models import FUSIONS, Fusion
from benchmarks.study.step import Step
from modreg_fast.demo.data import IGNORE

Objective = Literal["inverse", "norm", "log"]


@dataclass(frozen=True)
class Method:
    """``penalty`` times a weight is added to the cross entropy; ``head_only``: it updates fusion and classifier only. ``adaptive``:
    the weight is the ratio of an AdaptiveWeight. ``backward``: sets the gradients itself, given the cross entropy and the weight.
    ``own``: each modality has a head of its own, which speaks for it where others are lost, or is there in training only (``"train"``),
    so that the joint head speaks. ``dropout``: the probability that a sample loses a modality; None: it takes the place of the weight.
    ``fusions``: that it is tried with."""

    penalty: Callable[[Step], Tensor] | None = None
    weights: Sequence[float] = (0.0,)
    dropout: float | None = 0.0
    head_only: bool = False
    adaptive: bool = False
    backward: Callable[[Step, Tensor, float], None] | None = None
    own: Literal["speak", "train"] | None = None
    fusions: Sequence[Fusion] = FUSIONS

    def weight(self, value: float) -> float:
        """Of the penalty, where ``value`` is one of ``weights``."""
        return 1.0 if self.dropout is None else value

    def probability(self, value: float) -> float:
        """Of losing a modality."""
        return value if self.dropout is None else self.dropout


def feature(step: Step, objective: Objective) -> Tensor:
    return mrf.FunctionalEntropyLoss(1.0, 1.0, objective)({m: [x] for m, x in step.features.items()}, mask=step.mask)


def prediction(step: Step, objective: Objective) -> Tensor:
    penalty = mrf.FunctionalEntropyLoss(1.0, 1.0, objective).prediction_term(step.values, step.features, mask=step.mask)
    assert isinstance(penalty, Tensor)
    return penalty


def both(step: Step, objective: Objective) -> Tensor:
    return feature(step, objective) + prediction(step, objective)


def perturbed(step: Step) -> Tensor:
    """Gat et al.: how much the prediction, not the loss, changes with each input, at inputs with noise of deviation 0.3."""
    inputs = {m: (x + 0.3 * torch.randn_like(x)).requires_grad_() for m, x in step.inputs.items()}
    values = F.cross_entropy(step.model(inputs), step.scores.detach().softmax(1), reduction="none")
    balance = mrf.FunctionalEntropyLoss(1.0, 1.0, "norm")
    penalty = balance.prediction_term(values, inputs, mask=step.mask, granularity="sample")
    assert isinstance(penalty, Tensor)
    return penalty


def own_predictions(step: Step) -> Tensor:
    """The feature term at the scores from each modality alone, in place of its features."""
    scores = {m: [x] for m, x in step.alone().items()}
    return mrf.FunctionalEntropyLoss(1.0, 1.0, "log")(scores, mask=step.mask)


def attribution(step: Step, norm: Literal["l1", "l2"] = "l1", quality: bool = False, labels: bool = False) -> Tensor:
    """``quality``: targets by skill. ``labels``: of the score of the true class, not of the largest score."""
    target = None
    if quality:
        with torch.no_grad():
            own = step.alone()
        target = step.quality(own, step.target, mask=step.mask)
    index = step.target if labels else None
    return mrf.AttributionLoss(norm=norm)(step.scores, step.features, index=index, mask=step.mask, target=target)


def each_alone(step: Step) -> Tensor:
    """Mean over the modalities of the cross entropy from that modality alone; the joint one is in the task loss already."""
    criterion = mrf.ModalityCrossEntropy(joint_weight=0.0, ignore_index=IGNORE)
    return criterion(step.alone(), step.target)


def each_alone_and_attribution(step: Step) -> Tensor:
    return each_alone(step) + 0.3 * attribution(step)


SMALL, LOG, SHARE = (1e-6, 1e-5, 1e-4), (1e-3, 1e-2, 1e-1), (0.1, 0.3, 1.0)
DROPOUT = 0.4  # beside a penalty

# The main terms are tried with every fusion, the rest with the fusion of the paper that they are from: all with all would take
# twice the time.
ENTROPY: Sequence[Fusion] = ("predictions",)
ATTRIBUTION: Sequence[Fusion] = ("concatenation",)
PAPERS: Sequence[Fusion] = (*ENTROPY, *ATTRIBUTION)

METHODS: dict[str, Method] = {
    "joint": Method(),
    "dropout": Method(weights=(0.2, 0.4, 0.6), dropout=None),
    "Gat, norm": Method(perturbed, (1e-10, 1e-9, 1e-8), fusions=ENTROPY),
    "feature, inverse": Method(partial(feature, objective="inverse"), SMALL, fusions=ENTROPY),
    "feature, norm": Method(partial(feature, objective="norm"), SMALL, fusions=ENTROPY),
    "feature, log": Method(partial(feature, objective="log"), LOG),
    "prediction, inverse": Method(partial(prediction, objective="inverse"), (1e-5, 1e-4, 1e-3), fusions=ENTROPY),
    "prediction, log": Method(partial(prediction, objective="log"), LOG, fusions=PAPERS),
    "both, inverse": Method(partial(both, objective="inverse"), SMALL, fusions=ENTROPY),
    "both, log": Method(partial(both, objective="log"), LOG, fusions=ENTROPY),
    "both, log, adaptive": Method(partial(both, objective="log"), (0.03, 0.1, 0.3), adaptive=True, fusions=ENTROPY),
    "own predictions, log": Method(own_predictions, LOG, fusions=ENTROPY),
    "attribution, L1, head only": Method(attribution, SHARE, head_only=True, fusions=ATTRIBUTION),
    "attribution, L1": Method(attribution, SHARE),
    "attribution, L2": Method(partial(attribution, norm="l2"), (0.3, 1.0, 3.0), fusions=ATTRIBUTION),
    "attribution, L1, labels": Method(partial(attribution, labels=True), SHARE, fusions=ATTRIBUTION),
    "attribution, L1, quality": Method(partial(attribution, quality=True), SHARE, fusions=ATTRIBUTION),
    "attribution, L1, adaptive": Method(attribution, SHARE, adaptive=True, fusions=ATTRIBUTION),
    "dropout + both, log": Method(partial(both, objective="log"), LOG, dropout=DROPOUT, fusions=ENTROPY),
    "dropout + attribution, L1": Method(attribution, SHARE, dropout=DROPOUT, fusions=ATTRIBUTION),
    "OGM-GE": Method(weights=SHARE, backward=ogm_ge),
    "MMPareto": Method(weights=SHARE, backward=mmpareto, own="speak"),
    "each alone": Method(each_alone, SHARE),
    "own heads": Method(each_alone, SHARE, own="speak"),
    "own heads, joint speaks": Method(each_alone, SHARE, own="train"),
    "each alone + dropout": Method(each_alone, (0.2, 0.4), dropout=None, fusions=PAPERS),
    "each alone + attribution, L1": Method(each_alone_and_attribution, SHARE, fusions=ATTRIBUTION),
}

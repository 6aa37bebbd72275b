"""What happens inside: joint training, and along its way the gradient of every penalty at weight 1 beside that of the task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import modreg_fast as mrf
from benchmarks.study.data import DATA
from benchmarks.study.methods import Method, attribution, each_alone, feature, prediction
from benchmarks.study.models import SMALL, Fusion
from benchmarks.study.step import Step
from benchmarks.study.train import train

PENALTIES = {
    "feature, inverse": lambda step: feature(step, "inverse"),
    "feature, log": lambda step: feature(step, "log"),
    "prediction, inverse": lambda step: prediction(step, "inverse"),
    "prediction, log": lambda step: prediction(step, "log"),
    "attribution, L1": attribution,
    "each alone": each_alone,
}


def watch(name: str, fusion: Fusion, seed: int = 0, steps: int = SMALL.steps) -> list[dict[str, Any]]:
    """Per watched step: norms of gradients at the parameters of the encoders (of the task also per encoder), information, shares and
    the loss of each modality alone."""
    rows = []

    def look(number: int, step: Step, task: Tensor, penalty: Tensor) -> None:
        if number % max(steps // 30, 1) and number != steps - 1:
            return
        encoders = list(step.model.encoders.parameters())
        row: dict[str, Any] = {"step": number, "task": float(task.detach()), "task gradient": _norm(task, encoders)}
        for m, encoder in step.model.encoders.items():
            row[f"task gradient of {m}"] = _norm(task, list(encoder.parameters()))
        for kind, compute in PENALTIES.items():
            row[kind] = _norm(compute(step), encoders)
        balance = mrf.FunctionalEntropyLoss()
        _, disagreement = balance({m: [x] for m, x in step.features.items()}, mask=step.mask, return_details=True)
        _, information = balance.prediction_term(step.values, step.features, mask=step.mask, return_details=True)
        _, shares = mrf.AttributionLoss()(step.scores, step.features, mask=step.mask, return_details=True)
        for m in step.features:
            row[f"feature information {m}"] = float(disagreement.information[m])
            row[f"prediction information {m}"] = float(information.information[m])
            row[f"share {m}"] = float(shares.share[m])
        rows.append(row)

    # A penalty of weight 0, because only penalised steps are shown.
    train(DATA[name](seed), fusion, Method(lambda step: 0 * step.scores.sum()), 0.0, seed, steps=steps, watch=look)
    return rows


def _norm(loss: Tensor, parameters: Sequence[Tensor]) -> float:
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.norm() for g in grads if g is not None]).norm())

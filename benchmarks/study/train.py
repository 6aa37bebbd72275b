"""One training, and what is measured of its network."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modreg_fast as mrf
from benchmarks.study.data import Data, batch_of
from benchmarks.study.methods import Method
from benchmarks.study.models import Fusion, Network
from benchmarks.study.step import Step
from modreg_fast._evaluation import evaluating
from modreg_fast.demo.data import IGNORE

WEIGHT_DECAY = 0.01
Watch = Callable[[int, Step, Tensor, Tensor], None] | None
NOISE = (0.5, 1.0, 2.0, 4.0)  # on inputs of deviation 1
LEAST_PIXELS = 10  # of a class in training and in the part, for it to be scored


def train(
    data: Data,
    fusion: Fusion,
    method: Method,
    value: float,
    seed: int,
    only: str | None = None,
    steps: int | None = None,
    watch: Watch = None,
) -> Network:
    """The network after ``steps``, by default those of the setup. The same seed gives every method the same start and the same batches.

    ``value``: one of the weights of the method. ``only``: the one modality that is given, the others are 0 throughout. ``watch``: is
    shown every step, with its losses."""
    torch.manual_seed(seed)
    channels = {m: x.shape[1] for m, x in data.parts["train"].inputs.items()}
    setup = data.setup
    steps = steps or setup.steps
    model = Network(channels, data.classes, fusion, data.spatial, method.own is not None, setup.width)
    optimizer = torch.optim.AdamW(model.parameters(), setup.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setup.learning_rate, total_steps=steps, pct_start=0.1)
    best, best_weights, since = -1.0, model.state_dict(), 0
    weigh = mrf.AdaptiveWeight(method.weight(value)) if method.adaptive else None
    quality = mrf.QualityTarget(list(channels), data.classes)
    batches, dropped = (torch.Generator().manual_seed(1000 * stream + seed) for stream in (1, 2))
    for number in range(steps):
        inputs, target = batch_of(data, batches)
        if only is not None:
            inputs = {m: x if m == only else torch.zeros_like(x) for m, x in inputs.items()}
        step, task = forward(model, drop_modalities(inputs, method.probability(value), dropped), target, quality)
        optimizer.zero_grad()
        if method.backward is not None:
            method.backward(step, task, value)
        elif method.penalty is None:
            task.backward()
        else:
            penalty = method.penalty(step)
            if watch is not None:
                watch(number, step, task, penalty)
            if weigh is None:
                penalty = method.weight(value) * penalty
            else:
                penalty = weigh(task, penalty, list(step.features.values()))
            if method.head_only:
                task.backward(retain_graph=True)
                penalty.backward(inputs=model.head_parameters())
            else:
                (task + penalty).backward()
        optimizer.step()
        schedule.step()
        if setup.look and (number + 1) % setup.look == 0:
            score = full(model, data, "validation")
            since += 1
            if score > best:
                best, best_weights, since = score, deepcopy(model.state_dict()), 0
            if since == setup.patience:
                break
    model.load_state_dict(best_weights)
    return model


def forward(model: Network, inputs: Mapping[str, Tensor], target: Tensor, quality: mrf.QualityTarget) -> tuple[Step, Tensor]:
    """The step and its task loss."""
    mask = target != IGNORE if target.dim() > 1 else None
    features = model.encode(inputs)
    scores = model.joint(features)
    values = F.cross_entropy(scores, target, ignore_index=IGNORE, reduction="none")
    task = values.mean() if mask is None else values.sum() / mask.sum().clamp(min=1)
    return Step(model, inputs, features, scores, values, target, mask, quality), task


def drop_modalities(inputs: Mapping[str, Tensor], probability: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Each sample loses each of its modalities with this probability, and keeps all when it would lose all."""
    if probability == 0:
        return dict(inputs)
    keep = torch.rand(len(inputs), len(next(iter(inputs.values()))), generator=generator) >= probability
    keep = keep | ~keep.any(0)
    return {m: x * kept.view(-1, *[1] * (x.dim() - 1)) for (m, x), kept in zip(inputs.items(), keep, strict=True)}


def metric(data: Data, part: str) -> Callable[[Tensor, Tensor], Tensor]:
    """In percent: mean IoU over the classes that both training and the part hold, or accuracy."""
    if not data.spatial:
        return lambda scores, target: 100 * (scores.argmax(1) == target).double().mean()
    counts = [torch.bincount(data.parts[p].target.flatten(), minlength=IGNORE + 1)[: data.classes] for p in ("train", part)]
    scored = torch.minimum(*counts) >= LEAST_PIXELS

    def mean_iou(scores: Tensor, target: Tensor) -> Tensor:
        valid = target != IGNORE
        pairs = target[valid] * data.classes + scores.argmax(1)[valid]
        confusion = torch.bincount(pairs, minlength=data.classes**2).view(data.classes, -1).double()
        union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
        return 100 * (confusion.diag() / union)[scored].mean()

    return mean_iou


def full(model: Network, data: Data, part: str) -> float:
    """The metric with all modalities."""
    inputs, target, _ = data.parts[part]
    with evaluating(model), torch.no_grad():
        return float(metric(data, part)(model(inputs), target))


def missing(model: Network, data: Data, part: str, leave_out: bool = False) -> mrf.MissingModalities:
    """The metric with every subset of the modalities (of more than five: all, all but one, each). A missing one is an input of zeros;
    ``leave_out``: it is not given at all, so that the heads of the others speak."""
    inputs, target, _ = data.parts[part]
    drop: Any = (lambda m, x: None) if leave_out else "zeros"
    return mrf.evaluate_missing(model, [(inputs, target)], metric(data, part), drop=drop, progress=False)


def noisy(model: Network, data: Data, part: str) -> dict[float, float]:
    """Deviation of the noise on the first modality, the one that joint training leans on -> the metric."""
    inputs, target, _ = data.parts[part]
    first = next(iter(inputs))
    noise = torch.randn(inputs[first].shape, generator=torch.Generator().manual_seed(0))
    score = metric(data, part)
    with evaluating(model), torch.no_grad():
        return {s: float(score(model({**inputs, first: inputs[first] + s * noise}), target)) for s in NOISE}


def inside(model: Network, data: Data, part: str) -> dict[str, dict[str, float]]:
    """Per modality its share in the decisions, its information at the features, and at the prediction by the loss."""
    inputs, target, _ = data.parts[part]
    mask = target != IGNORE
    with evaluating(model):
        features = {m: x.detach().requires_grad_() for m, x in model.encode(inputs).items()}
        scores = model.joint(features)
        values = F.cross_entropy(scores, target, ignore_index=IGNORE, reduction="none")
        balance = mrf.FunctionalEntropyLoss()
        _, shares = mrf.AttributionLoss()(scores, features, mask=mask, return_details=True)
        _, at_features = balance({m: [x] for m, x in features.items()}, mask=mask, return_details=True)
        _, at_prediction = balance.prediction_term(values, features, mask=mask, return_details=True)
    found = {
        "shares": shares.share,
        "feature information": at_features.information,
        "prediction information": at_prediction.information,
    }
    return {name: {m: float(x) for m, x in values.items()} for name, values in found.items()}

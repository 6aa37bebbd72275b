"""Training, scoring and timing of one network."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import modreg_fast as mrf
from modreg_fast._evaluation import evaluating
from modreg_fast.backends import resolve
from modreg_fast.demo.data import BLOCK, BOTH, IGNORE, Blocks
from modreg_fast.demo.model import TwoStream
from modreg_fast.functional import gradient_statistics, softmax_fisher_information
from modreg_fast.missing import without

METHODS = ("plain", "functional entropy", "attribution", "own heads")
STEPS, QUICK_STEPS = 300, 12
BATCH, CROP = 16, 8
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1
GAIN, NOISE = 0.2, 0.2  # of the augmentation; bands have deviation 1
# Chosen on validation blocks: the best mean IoU, averaged over the subsets and over seeds 100 to 102 (which are not reported), of
# feature 1e-5, 1e-4 by prediction 0, 1e-2, 1e-1, and of attribution 0.1, 1, 10.
FEATURE_WEIGHT = 1e-5
PREDICTION_WEIGHT = 1e-2
ATTRIBUTION_WEIGHT = 0.1


class Regularizer(nn.Module):
    """The loss that a method adds, and the parameters it updates: all, or those of fusion and classifier (attribution)."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.balance = mrf.FunctionalEntropyLoss(FEATURE_WEIGHT, PREDICTION_WEIGHT)
        self.steer = mrf.AttributionLoss()
        self.alone = mrf.ModalityCrossEntropy(joint_weight=0.0, ignore_index=IGNORE)  # the loss of the step has the joint one

    def forward(
        self, model: TwoStream, features: Mapping[str, list[Tensor]], scores: Tensor, values: Tensor, labels: Tensor
    ) -> Tensor | None:
        """``values``: cross entropy ``(B, H, W)``; the prediction term differentiates it by the finest features."""
        mask = labels != IGNORE
        if self.method == "own heads":
            assert model.heads is not None
            own: Tensor = self.alone({name: head(features[name]) for name, head in model.heads.heads.items()}, labels)
            return own
        if self.method == "functional entropy":
            finest = {name: rows[0] for name, rows in features.items()}
            penalty: Tensor = self.balance(features, mask=mask) + self.balance.prediction_term(values, finest, mask=mask)
            return penalty
        if self.method == "attribution":
            return ATTRIBUTION_WEIGHT * self.steer(scores, features, mask=mask)
        return None


@dataclass
class Run:
    """What one training gave. ``shares``: of the first sensor in the decisions on validation blocks, at ``steps``."""

    model: TwoStream
    steps: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def train(method: str, parts: Mapping[str, Blocks], classes: int, seed: int, steps: int, advance: Callable[[], None]) -> Run:
    """Trains for ``steps``; the last weights count, there is no early stopping. The same seed gives every method the same start
    and the same batches."""
    torch.manual_seed(seed)
    blocks = parts["train"]
    model = TwoStream({name: x.shape[1] for name, x in blocks.sensors.items()}, classes, own=method == "own heads")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    regularizer = Regularizer(method)
    generator = torch.Generator().manual_seed(seed)
    run = Run(model)
    for step in range(steps + 1):
        if step % max(steps // 20, 1) == 0:
            run.steps.append(step)
            run.shares.append(next(iter(shares(model, parts["validation"]).values())))
        if step == steps:
            break
        optimizer.zero_grad()
        _backward(model, regularizer, sample(blocks, generator))
        optimizer.step()
        schedule.step()
        advance()
    return run


def _backward(model: TwoStream, regularizer: Regularizer, batch: Blocks) -> None:
    mask = batch.labels != IGNORE
    features = model.encode(batch.sensors)
    scores = model.head(features)
    values = F.cross_entropy(scores, batch.labels, ignore_index=IGNORE, reduction="none")
    loss = values.sum() / mask.sum().clamp(min=1)
    penalty = regularizer(model, features, scores, values, batch.labels)
    if penalty is None:
        loss.backward()
    elif regularizer.method == "attribution":
        loss.backward(retain_graph=True)
        penalty.backward(inputs=list(model.head.parameters()))
    else:
        (loss + penalty).backward()


def sample(blocks: Blocks, generator: torch.Generator) -> Blocks:
    """A batch of random crops from random blocks, turned, with the brightness of each crop and the noise of each pixel varied."""

    which = torch.randint(len(blocks.labels), (BATCH,), generator=generator).tolist()
    corners = torch.randint(BLOCK - CROP + 1, (BATCH, 2), generator=generator).tolist()
    turns, mirrored = int(torch.randint(4, (), generator=generator)), bool(torch.randint(2, (), generator=generator))
    gain, offset = GAIN * torch.randn(2, BATCH, 1, 1, 1, generator=generator)

    def crop(x: Tensor) -> Tensor:
        crops = [x[i, ..., r : r + CROP, c : c + CROP] for i, (r, c) in zip(which, corners, strict=True)]
        turned = torch.rot90(torch.stack(crops), turns, (-2, -1))
        return turned.flip(-1) if mirrored else turned

    def vary(x: Tensor) -> Tensor:
        return x * (1 + gain) + offset + NOISE * torch.randn(x.shape, generator=generator)

    return Blocks({name: vary(crop(x)) for name, x in blocks.sensors.items()}, crop(blocks.labels))


def _name(subset: Sequence[str], sensors: Mapping[str, Tensor]) -> str:
    return BOTH if len(subset) == len(sensors) else f"{subset[0]} only"


@torch.no_grad()
def predict(model: TwoStream, blocks: Blocks) -> dict[str, Tensor]:
    """Subset -> predicted classes ``(N, 16, 16)``."""
    with evaluating(model):
        subsets = without(blocks.sensors, drop=model.drop)
        return {_name(subset, blocks.sensors): model(given).argmax(1) for subset, given in subsets}


def score(model: TwoStream, blocks: Blocks, classes: int, scored: list[int]) -> dict[str, Any]:
    """Mean IoU over the ``scored`` classes and accuracy of labelled pixels, by subset, and mean and spread of the former."""

    def mean_iou(scores: Tensor, labels: Tensor) -> float:
        jaccard = MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORE)
        return float(jaccard(scores, labels)[scored].mean())

    data = [(blocks.sensors, blocks.labels)]
    miou = mrf.evaluate_missing(model, data, mean_iou, drop=model.drop, progress=False)
    micro = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE)
    accuracy = mrf.evaluate_missing(model, data, micro, drop=model.drop, progress=False)
    return {
        "miou": {_name(subset, blocks.sensors): x for subset, x in miou.scores.items()},
        "miou_mean": miou.mean,
        "miou_spread": miou.std,
        "accuracy": {_name(subset, blocks.sensors): x for subset, x in accuracy.scores.items()},
    }


def shares(model: TwoStream, blocks: Blocks) -> dict[str, float]:
    """Share of each sensor in the decisions of the network, both sensors given: gradient x input of the winning class."""
    with evaluating(model):
        features = model.encode(blocks.sensors)
        _, details = mrf.AttributionLoss()(model.head(features), features, mask=blocks.labels != IGNORE, return_details=True)
    return {name: float(share) for name, share in details.share.items()}


def milliseconds(parts: Mapping[str, Blocks], classes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians: ``{"plain": {"step": t}}`` of a training step without the optimizer. For the other methods what their loss adds to
    it, ``default`` and ``reference`` by backend, and what of that the library's ops take, ``default ops`` and ``reference ops``;
    in the rest PyTorch differentiates the head once more, or runs the heads of the sensors. Forward and backward, measured in turns."""
    torch.manual_seed(0)
    batch = sample(parts["train"], torch.Generator().manual_seed(0))
    model = TwoStream({name: x.shape[1] for name, x in batch.sensors.items()}, classes, own=True)
    assert model.heads is not None
    mask = batch.labels != IGNORE
    features = model.encode(batch.sensors)
    scores = model.head(features)
    values = F.cross_entropy(scores, batch.labels, ignore_index=IGNORE, reduction="none")
    head: list[Tensor] = list(model.head.parameters())
    own: list[Tensor] = list(model.heads.heads.parameters())
    encoded = [x for rows in features.values() for x in rows]
    scales = len(encoded) // len(features)
    grads = [g.requires_grad_() for g in torch.autograd.grad(values.sum(), encoded, retain_graph=True)]
    leaves, fixed_values = [x.detach().requires_grad_() for x in encoded], values.detach()
    logits = {m: model.heads.heads[m](rows).detach().requires_grad_() for m, rows in features.items()}
    updated = {"functional entropy": [*encoded, *head], "attribution": head, "own heads": [*encoded, *own]}

    def step() -> None:
        _backward(model, Regularizer("plain"), batch)

    def added(method: str) -> None:
        penalty = Regularizer(method)(model, features, scores, values, batch.labels)
        assert penalty is not None
        torch.autograd.grad(penalty, updated[method], retain_graph=True, allow_unused=True)

    def ops(method: str) -> None:
        if method == "own heads":
            torch.autograd.grad(Regularizer(method).alone(logits, batch.labels), list(logits.values()))
            return
        if method == "functional entropy":
            by_sensor = [leaves[i : i + scales] for i in range(0, len(leaves), scales)]
            torch.autograd.grad(softmax_fisher_information(by_sensor, mask=mask).sum(), leaves)
            finest = grads[::scales]
            result = gradient_statistics(finest, values=[fixed_values] * len(finest), mask=mask).fisher
        else:
            finest = grads
            result = gradient_statistics(grads, features=leaves, mask=mask).attribution
        assert result is not None
        torch.autograd.grad(result.sum(), finest)

    default = resolve(None, scores, "demo")
    work: dict[tuple[str, str], tuple[str, Callable[[], None]]] = {("plain", "step"): (default, step)}
    for method in METHODS[1:]:
        for name, backend in (("default", default), ("reference", "reference")):
            work[method, name] = backend, partial(added, method)
            work[method, f"{name} ops"] = backend, partial(ops, method)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for _ in range(repeats):
        for key, (backend, function) in work.items():
            with mrf.use_backend(backend):
                start = time.perf_counter()
                function()
                times[key].append((time.perf_counter() - start) * 1e3)
    medians: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for (method, name), measured in times.items():
        medians[method][name] = median(measured)
    return medians

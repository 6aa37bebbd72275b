"""process_group=: one, two and four ranks compute what one process does on the whole batch, under DDP and FSDP2."""

from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import BACKENDS
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import modreg_fast as mrf

RANKS = 4
# Samples of each rank.
CASES = {
    "one": (4,),
    "even": (2, 2),
    "uneven": (3, 1),
    "rank_without_samples": (4, 0),
    "rank_without_valid_pixels": (2, 2),
    "rank_without_a_modality": (1, 3),
    "four": (1, 1, 1, 1),
}
LOSSES = ["inverse", "norm", "attribution_l1", "prediction", "each_alone", "own_logits", "all"]
SHARDED_LOSSES = LOSSES[:-1]  # "all" differentiates by features that lie before a sharded encoder


class Model(nn.Module):
    """Two encoders of two scales, each with its own prediction, and a head that fuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({m: nn.Conv2d(2, 3, 3, padding=1) for m in "ab"})
        self.second = nn.ModuleDict({m: nn.Conv2d(3, 4, 3, 2, 1) for m in "ab"})
        self.head = nn.Conv2d(8, 3, 1)

    def fuse(self, features):
        return self.head(torch.cat([*features.values()], 1))

    def forward(self, x):
        features = {}
        for m in "ab":
            first = self.first[m](x[m]).tanh()
            features[m] = [first, self.second[m](first).tanh()]
        return self.fuse({m: f[1] for m, f in features.items()}), features


def data(case):
    """The whole batch of four; the second rank's part comes last."""
    generator = torch.Generator().manual_seed(17)
    x = {m: torch.randn(4, 2, 8, 8, generator=generator, dtype=torch.float64) for m in "ab"}
    labels = torch.randint(3, (4, 4, 4), generator=generator)
    mask, present = torch.rand(4, 4, 4, generator=generator) < 0.7, torch.ones(4, 2, dtype=torch.bool)
    if case == "rank_without_valid_pixels":
        mask[2:] = False
    if case == "rank_without_a_modality":
        present[1:, 0] = False
    else:
        present[0, 1] = False
    return x, labels, mask, present


def penalty(kind, model, batch, group, backend):
    """One penalty of the model on a batch, with its details. A task loss of 0 beside it: DDP waits for every parameter."""
    scores, features = model(batch[0])
    head = getattr(model, "module", model).fuse
    value, details = penalty_of(kind, head, scores, features, *batch[1:], group, backend)
    return value + 0 * scores.sum(), details


def penalty_of(kind, head, scores, features, labels, mask, present, group, backend):
    options = {"process_group": group, "backend": backend}
    if kind in ("inverse", "norm"):
        loss = mrf.FunctionalEntropyLoss(1.0, objective=kind, scale_weights=[1.0, 0.5], **options)
        return loss(features, mask=mask, present=present, return_details=True)
    if kind.startswith("attribution"):
        loss = mrf.AttributionLoss({"a": 1, "b": 3}, kind[-2:], **options)
        deep = {m: f[1] for m, f in features.items()}
        return loss(scores, deep, index=labels, mask=mask, present=present, return_details=True)
    if kind == "prediction":
        values = F.cross_entropy(scores, labels, reduction="none")
        loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, **options)
        return loss.prediction_term(values, {m: f[1] for m, f in features.items()}, mask=mask, return_details=True)
    if kind in ("each_alone", "own_logits"):
        # Class weights, so that the ranks' means have other denominators than their counts of pixels.
        options["class_weight"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        loss = mrf.ModalityCrossEntropy(0.7, information_weight=1e-2, label_smoothing=0.1, **options)
        deep = {m: f[1] for m, f in features.items()}
        own = mrf.each_alone(head, deep) if kind == "each_alone" else {m: f[:, :3] for m, f in deep.items()}
        joint = scores if kind == "each_alone" else None
        value, details = loss(own, labels.where(mask, -100), joint=joint, present=present, return_details=True)
        return value, (details.cross_entropy, {"joint": details.joint}, details.information)
    steer, balance = mrf.AttributionLoss(norm="l2", **options), mrf.FunctionalEntropyLoss(1e-2, 1e-4, **options)
    value = steer(scores, features, mask=mask) + balance(features, mask=mask)
    return value + balance.prediction_term(
        F.cross_entropy(scores, labels, reduction="none"), {"a": features["a"][1]}, mask=mask
    ), ()


def outcome(kind, model, batch, group, backend):
    value, details = penalty(kind, model, batch, group, backend)
    value.backward()
    return value.detach(), [x for part in details for x in part.values()], [p.grad for p in model.parameters()]


def model_of(seed=3):
    torch.manual_seed(seed)
    return Model().double()


def sharded(group):
    """FSDP2 on the encoders, the head on every rank."""
    model, mesh = model_of(), DeviceMesh.from_group(group, "cpu")
    for encoder in (*model.first.values(), *model.second.values()):
        fully_shard(encoder, mesh=mesh)
    return model


def sharded_outcome(kind, group, batch, backend):
    model = sharded(group)
    value, details, gradients = outcome(kind, model, batch, group, backend)
    for p in model.head.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size()
    return value, details, [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


def adaptive(group, batch, at):
    """The weight of an attribution penalty after two steps, and targets by skill."""
    model = model_of()
    module = mrf.AdaptiveWeight(0.3, decay=0.5, process_group=group)
    quality = mrf.QualityTarget(["a", "b"], 3, process_group=group)
    x, labels, mask, _ = batch
    for shift in (0.0, 1.0):
        scores, features = model({m: y + shift for m, y in x.items()})
        deep = {m: f[1] for m, f in features.items()}
        penalty = mrf.AttributionLoss({"a": 1, "b": 3}, process_group=group)(scores, deep)
        module(F.cross_entropy(scores, labels), penalty, list(model.head.parameters() if at == "parameters" else deep.values()))
        target = quality(
            {m: (1 + i) * F.one_hot(labels, 3).movedim(-1, 1) + f[:, :3] for i, (m, f) in enumerate(deep.items())},
            labels,
            mask=mask,
        )
    return module.weight, target


def work(rank, store, results, backends):
    """Every case on one of four ranks, or fewer; what it computed goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, RANKS)}
    found = {}
    for case, sizes in CASES.items():
        if rank >= len(sizes):
            continue
        group, start = groups[len(sizes)], sum(sizes[:rank])
        part = slice(start, start + sizes[rank])
        x, *rest = data(case)
        batch = ({m: y[part] for m, y in x.items()}, *(y[part] for y in rest))
        for backend in backends:
            for kind in LOSSES:
                model = DistributedDataParallel(model_of(), process_group=group)
                found["ddp", case, kind, backend] = outcome(kind, model, batch, group, backend)
            for kind in SHARDED_LOSSES:
                found["fsdp2", case, kind, backend] = sharded_outcome(kind, group, batch, backend)
        for at in ("parameters", "features"):
            found["adaptive", case, at] = adaptive(group, batch, at)
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


ranks = helpers.ranks(work, RANKS, BACKENDS)


@pytest.mark.parametrize("wrapper, kind", [("ddp", k) for k in LOSSES] + [("fsdp2", k) for k in SHARDED_LOSSES])
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(ranks, backend, case, wrapper, kind):
    value, details, gradients = outcome(kind, model_of(), data(case), None, backend)
    assert value.item() > 0 and sum(g.abs().sum() for g in gradients) > 0
    for found in ranks[: len(CASES[case])]:
        other, other_details, other_gradients = found[wrapper, case, kind, backend]
        assert other.item() == pytest.approx(value.item(), rel=1e-6)
        assert len(other_details) == len(details)
        for a, b in zip(other_details, details, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        helpers.assert_close(other_gradients, gradients, 1e-6)


@pytest.mark.parametrize("at", ["parameters", "features"])
@pytest.mark.parametrize("case", CASES)
def test_adaptive_weight_and_quality_target_are_equal_on_all_ranks(ranks, case, at):
    weight, target = adaptive(None, data(case), at)
    assert weight > 0 and target["b"] > target["a"] > 0
    found = [rank["adaptive", case, at] for rank in ranks[: len(CASES[case])]]
    for other, other_target in found:
        assert other == found[0][0] and other_target == found[0][1]
        assert other_target == pytest.approx(target, rel=1e-5)
        if len(set(CASES[case])) == 1:  # otherwise the mean over ranks of the task losses is another task loss
            assert other.item() == pytest.approx(weight.item(), rel=1e-5)


def test_without_a_group_ranks_do_not_talk(ranks, backend):
    """The comparison has power: a rank alone computes something else."""
    x, *rest = data("even")
    half = ({m: y[:2] for m, y in x.items()}, *(y[:2] for y in rest))
    value, _, _ = outcome("inverse", model_of(), half, None, backend)
    assert value.item() != pytest.approx(ranks[0]["ddp", "even", "inverse", backend][0].item(), rel=1e-3)

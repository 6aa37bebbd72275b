"""process_group= under DDP: two ranks compute the value and the gradients of one process on the whole batch."""

from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import BACKENDS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import modreg_fast as mrf

CASES = {"even": (2, 2), "uneven": (3, 1), "rank_without_valid_pixels": (2, 2), "rank_without_a_modality": (1, 3)}
LOSSES = ["inverse", "norm", "attribution_l1", "prediction", "all"]


class Model(nn.Module):
    """Two encoders of two scales, each with its own prediction, and a head that fuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({m: nn.Conv2d(2, 3, 3, padding=1) for m in "ab"})
        self.second = nn.ModuleDict({m: nn.Conv2d(3, 4, 3, 2, 1) for m in "ab"})
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        features = {}
        for m in "ab":
            first = self.first[m](x[m]).tanh()
            features[m] = [first, self.second[m](first).tanh()]
        return self.head(torch.cat([f[1] for f in features.values()], 1)), features


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
    value, details = penalty_of(kind, scores, features, *batch[1:], group, backend)
    return value + 0 * scores.sum(), details


def penalty_of(kind, scores, features, labels, mask, present, group, backend):
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


def work(rank, store, results, backends):
    """Every case on one of two ranks; what it computed goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {}
    for case, sizes in CASES.items():
        part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        x, *rest = data(case)
        batch = ({m: y[part] for m, y in x.items()}, *(y[part] for y in rest))
        for backend in backends:
            for kind in LOSSES:
                model = DistributedDataParallel(model_of())
                found[case, kind, backend] = outcome(kind, model, batch, dist.group.WORLD, backend)
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder / "store"), str(folder), BACKENDS), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(two_ranks, backend, case, kind):
    value, details, gradients = outcome(kind, model_of(), data(case), None, backend)
    assert value.item() > 0 and sum(g.abs().sum() for g in gradients) > 0
    for found in two_ranks:
        other, other_details, other_gradients = found[case, kind, backend]
        assert other.item() == pytest.approx(value.item(), rel=1e-6)
        assert len(other_details) == len(details)
        for a, b in zip(other_details, details, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        helpers.assert_close(other_gradients, gradients, 1e-6)


def test_without_a_group_ranks_do_not_talk(two_ranks, backend):
    """The comparison has power: a rank alone computes something else."""
    x, *rest = data("even")
    half = ({m: y[:2] for m, y in x.items()}, *(y[:2] for y in rest))
    value, _, _ = outcome("inverse", model_of(), half, None, backend)
    assert value.item() != pytest.approx(two_ranks[0]["even", "inverse", backend][0].item(), rel=1e-3)

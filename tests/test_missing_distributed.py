"""evaluate_missing and a loss on two ranks of which one does something else: it fails, lists modalities in another order, wants details."""

from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
from torchmetrics.classification import MulticlassAccuracy

import modreg_fast as mrf

RANKS = 2


def model(x):
    return sum(x.values())


def broken(x):
    raise KeyError("no such layer")


def evaluated(data, model=model):
    return mrf.evaluate_missing(model, data, MulticlassAccuracy(3, average="micro"), progress=False)


def batches():
    generator = torch.Generator().manual_seed(3)
    draw = [({m: torch.randn(5, 3, generator=generator) for m in ("rgb", "depth")}, torch.arange(5) % 3) for _ in range(2)]
    draw[0][0]["rgb"] *= 3
    return draw


def losses(group, batch, order):
    """Of every loss, the modalities in some order."""
    x, y = batch
    x = {m: x[m].clone().requires_grad_() for m in order(["rgb", "depth"])}
    present = torch.stack([(y > 0) | (m == "rgb") for m in x], 1)
    scores, options = 2 * x["rgb"] + x["depth"], {"process_group": group}
    yield mrf.ModalityCrossEntropy(information_weight=0.1, **options)(x, y, present=present)
    yield mrf.FunctionalEntropyLoss(1.0, objective="log", **options)({m: [v] for m, v in x.items()}, present=present)
    yield mrf.AttributionLoss({"rgb": 3, "depth": 1}, **options)(scores, x, present=present)
    values = torch.nn.functional.cross_entropy(scores, y, reduction="none")
    yield mrf.FunctionalEntropyLoss(prediction_weight=1.0, **options).prediction_term(values, x)


def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    mine = batches()[rank : rank + 1]
    turned = [(dict(reversed(x.items())), y) for x, y in mine] if rank else mine
    found = {"scores": evaluated(turned).scores}

    own, other = (ValueError, KeyError, TypeError), RuntimeError
    lacks = [*mine, ({"rgb": torch.ones(2, 3)}, torch.zeros(2))]
    for what, data, called, said in (
        ("a batch without depth", lacks, model, "batch 1 without 'depth'"),
        ("a rank without samples", [], model, "at least one batch"),
        ("a model that fails", mine, broken, "no such layer"),
        ("no pairs", [3], model, "pairs"),
    ):
        with pytest.raises(own if rank else other, match=said if rank else f"rank 1 of the process group failed: .*{said}"):
            evaluated(data if rank else mine, called if rank else model)
            raise AssertionError(what)
    named = [({"rgb" if m == "rgb" else "ir": v for m, v in x.items()}, y) for x, y in mine] if rank else mine
    with pytest.raises(ValueError, match="the same modalities on every rank"):
        evaluated(named)
    if rank == 0:  # alone, with a metric that gathers from nobody
        metric = MulticlassAccuracy(3, average="micro", sync_on_compute=False)
        mrf.evaluate_missing(model, mine, metric, progress=False)

    features = {m: x.clone().requires_grad_() for m, x in mine[0][0].items()}
    loss = mrf.AttributionLoss(process_group=dist.group.WORLD)
    result = loss(model(features), features, return_details=rank == 0)
    found["penalty"], details = result if rank == 0 else (result, None)
    if details is not None:
        found["share"] = details.share
    found["gradient"] = torch.autograd.grad(found["penalty"], list(features.values()))
    found["by_name"] = list(losses(dist.group.WORLD, mine[0], reversed if rank else list))
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


ranks = helpers.ranks(work, RANKS)


def test_what_fails_on_one_rank_fails_on_all_and_subsets_go_by_name(ranks):
    expected = evaluated(batches()).scores
    for found in ranks:
        assert found["scores"] == pytest.approx(expected) and list(found["scores"]) == list(expected)
    assert len(set(expected.values())) > 1


def test_losses_go_by_name(ranks):
    """Ranks that list their modalities, and with them present, in another order add up like with like."""
    whole = {m: torch.cat([x[m] for x, _ in batches()]) for m in ("rgb", "depth")}, torch.cat([y for _, y in batches()])
    expected = [x.item() for x in losses(None, whole, list)]
    for found in ranks:
        assert [x.item() for x in found["by_name"]] == pytest.approx(expected, rel=1e-5)


def test_details_may_be_wanted_on_one_rank_alone(ranks):
    whole = {m: torch.cat([x[m] for x, _ in batches()]).requires_grad_() for m in ("rgb", "depth")}
    penalty, details = mrf.AttributionLoss()(model(whole), whole, return_details=True)
    gradient = torch.autograd.grad(penalty, list(whole.values()))
    for rank, found in enumerate(ranks):
        torch.testing.assert_close(found["penalty"], penalty)
        for mine, all_of_it in zip(found["gradient"], gradient, strict=True):
            torch.testing.assert_close(mine, RANKS * all_of_it[5 * rank : 5 * rank + 5])
    for m, share in ranks[0]["share"].items():
        torch.testing.assert_close(share, details.share[m])

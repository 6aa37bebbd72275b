"""A head that FSDP2 shards: what differentiates it twice is refused on every rank when it is called. Left alone, the outer backward pass
fails over a freed storage, or loses a gradient in silence. The feature term, and sharded encoders, are not concerned."""

from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard

import modreg_fast as mrf

RANKS = 2


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def sharded(head, mesh, **options):
    fully_shard(head, mesh=mesh, **options)
    return nn.Linear(4, 6), head


def parts(mesh):
    head = mlp()
    fully_shard(head[2], mesh=mesh)
    return nn.Linear(4, 6), head


HEADS = {
    "linear": lambda mesh: sharded(nn.Linear(6, 3), mesh),  # where the gradient would be lost
    "deep": lambda mesh: sharded(mlp(), mesh),
    "gathered": lambda mesh: sharded(mlp(), mesh, reshard_after_forward=False),
    "frozen": lambda mesh: sharded(mlp().requires_grad_(False), mesh),
    "last_layer": parts,
}


def penalty(kind, scores, features):
    group = dist.group.WORLD
    if kind == "attribution":
        return mrf.AttributionLoss(process_group=group)(scores, features)
    balance = mrf.FunctionalEntropyLoss(1.0, 1.0, process_group=group)
    if kind == "features":
        return balance({m: [x] for m, x in features.items()})
    return balance.prediction_term(F.cross_entropy(scores, torch.arange(3), reduction="none"), features, granularity=kind)


KINDS = ("attribution", "pixel", "sample", "features")


def work(rank, store, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(store, RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    found = {}
    for name, build in HEADS.items():
        for kind in KINDS:
            encoder, head = build(mesh)
            a, b = encoder(torch.randn(3, 4)), torch.randn(3, 6, requires_grad=True)
            scores = head((a + b).tanh())
            try:
                penalty(kind, scores, {"a": a, "b": b}).backward()
                found[name, kind] = encoder.weight.grad.abs().sum().item()
            except RuntimeError as error:
                found[name, kind] = str(error)
            head(encoder(torch.randn(3, 4))).sum().backward()  # training goes on
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


ranks = helpers.ranks(work, RANKS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_refused_by_name_or_right(ranks, head, kind):
    for found in ranks:
        if kind == "features":
            assert found[head, kind] > 0
        else:
            assert "differentiates twice" in found[head, kind] and "FSDP has freed the parameters" in found[head, kind]
            assert "unsharded, and shard the encoders" in found[head, kind]

"""audit on several ranks: all samples by all ranks together, or one rank that waits for nobody."""

from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
from auditing import SPEC, Images, Vectors, audit, images, vectors
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


def model_of(kind=Images):
    torch.manual_seed(6)
    return kind().eval()


def data_of():
    """Four batches of four."""
    torch.manual_seed(7)
    return images(16, 4)


def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    group, options = dist.group.WORLD, {"ignore_index": 255}
    data = data_of()
    uneven = data[:3] if rank == 0 else data[3:]
    found = {"together": audit(model_of(), uneven, SPEC, process_group=group, **options)}
    wrapped = DistributedDataParallel(model_of())
    found["ddp"] = audit(wrapped, data[2 * rank : 2 * rank + 2], SPEC, process_group=group, **options)
    sharded = model_of()
    for part in (*sharded.fine.values(), *sharded.coarse.values(), sharded):
        fully_shard(part, mesh=DeviceMesh.from_group(group, "cpu"))
    found["fsdp2"] = audit(sharded, data[2 * rank : 2 * rank + 2], SPEC, process_group=group, **options)
    if rank == 0:  # the other rank does not take part
        found["alone"] = audit(wrapped.module, data, SPEC, **options)
    turned = [(dict(reversed(x.items())), y) for x, y in uneven] if rank else uneven
    found["turned"] = audit(model_of(), turned, process_group=group, **options)
    bad = [({"rgb": x["rgb"]}, y) for x, y in uneven] if rank else uneven
    with pytest.raises(
        (ValueError, RuntimeError), match="'depth', which batch 0 lacks" if rank else "rank 1 .* failed: ValueError"
    ):
        audit(model_of(), bad, SPEC, process_group=group, **options)
    with pytest.raises((ValueError, RuntimeError), match="got none with a sample" if rank else "rank 1 .* none with a sample"):
        audit(model_of(), [] if rank else uneven, SPEC, baseline="mean", process_group=group, **options)
    with pytest.raises(ValueError, match="metric must be one of torchmetrics with process_group: .* got a function"):
        audit(model_of(Vectors), vectors(), metric=lambda scores, labels: 0.5, process_group=group)
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


ranks = helpers.ranks(work, RANKS)


def test_ranks_go_by_name(ranks):
    """Another order of the modalities on one rank, at the inputs, where they are named by the data alone."""
    expected = audit(model_of(), data_of(), ignore_index=255)
    for found in ranks:
        assert list(found["turned"].share) == ["rgb", "depth"]
        assert found["turned"].missing.scores == pytest.approx(expected.missing.scores)
        for m in SPEC:
            assert found["turned"].share[m] == pytest.approx(expected.share[m], rel=1e-5)


@pytest.fixture(scope="module")
def expected():
    return audit(model_of(), data_of(), SPEC, ignore_index=255)


@pytest.mark.parametrize("how", ["together", "ddp", "fsdp2", "alone"])
def test_ranks_equal_one_process(ranks, expected, how):
    """The same samples in the same order: the same means, intervals and scores."""
    for rank, found in enumerate(ranks[:1] if how == "alone" else ranks):
        other = found[how]
        assert other.samples == expected.samples == 15 and len(other.examples) == 4
        assert other.missing.scores == pytest.approx(expected.missing.scores)
        for m in SPEC:
            assert other.share[m] == pytest.approx(expected.share[m], rel=1e-5)
            assert other.share_at_inputs[m] == pytest.approx(expected.share_at_inputs[m], rel=1e-5)
            for s in range(2):
                assert other.share_by_scale[m][s] == pytest.approx(expected.share_by_scale[m][s], rel=1e-5)
                assert other.information[m][s] == pytest.approx(expected.information[m][s], rel=1e-5)
        assert (rank == 0) == (other.examples[0].shares == expected.examples[0].shares).all()  # the maps are the rank's own

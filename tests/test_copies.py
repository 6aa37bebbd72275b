"""Copies and pickles of losses that hold a process group; training with a copy is training with the original."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

import modreg_fast as mrf

LOSSES = {
    "features": lambda **groups: mrf.FunctionalEntropyLoss(0.5, **groups),
    "attribution": lambda **groups: mrf.AttributionLoss({"a": 1, "b": 3}, **groups),
    "weight": lambda process_group, spatial_group=None: mrf.AdaptiveWeight(process_group=process_group),
    "target": lambda process_group, spatial_group=None: mrf.QualityTarget(["a", "b"], 3, process_group=process_group),
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """The default group of one rank, and a group that is not the default one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("copies") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD, dist.new_group([0])
    dist.destroy_process_group()


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, AveragedModel], ids=["deep", "shallow", "averaged"])
def test_a_copy_shares_the_groups(groups, loss, copied):
    model = nn.Linear(2, 2)
    model.loss = LOSSES[loss](process_group=groups[1], spatial_group=groups[0])
    other = copied(model)
    other = getattr(other, "module", other).loss
    assert other.process_group is model.loss.process_group is groups[1]
    assert getattr(other, "spatial_group", None) is getattr(model.loss, "spatial_group", None)
    assert repr(other) == repr(model.loss) and vars(other).keys() == vars(model.loss).keys()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("copied", [saved, lambda x: pickle.loads(pickle.dumps(x))], ids=["save", "pickle"])
def test_a_pickle_keeps_the_default_group(groups, loss, copied):
    model = nn.Linear(2, 2)
    model.loss = LOSSES[loss](process_group=groups[0])
    assert copied(model).loss.process_group is groups[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pickle_loses_another_group_with_a_warning(groups, loss):
    with pytest.warns(UserWarning, match="process group of a loaded loss is not in its file: set process_group"):
        other = saved(LOSSES[loss](process_group=groups[1]))
    assert other.process_group is None


@pytest.mark.parametrize("loss", LOSSES)
def test_without_ranks_the_default_group_is_none(groups, loss, monkeypatch):
    """As in a process that loads the file to look at it."""
    written = pickle.dumps(LOSSES[loss](process_group=groups[0]))
    monkeypatch.setattr(type(dist.group), "WORLD", None)
    assert pickle.loads(written).process_group is None


def test_a_copy_computes_the_same(groups):
    x = {m: [torch.randn(2, 3, 4)] for m in "ab"}
    loss = mrf.FunctionalEntropyLoss(0.5, objective="log", process_group=groups[0])
    for other in (copy.deepcopy(loss), saved(loss)):
        assert other(x) == loss(x)
    quality = mrf.QualityTarget(["a", "b"], 3, process_group=groups[0])
    quality({m: torch.randn(4, 3) for m in "ab"}, torch.arange(4) % 3)
    assert copy.deepcopy(quality).target == saved(quality).target == quality.target

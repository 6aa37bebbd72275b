"""capture of models that something wraps: checkpointing, torch.compile, DDP and FSDP2 over ranks."""

from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
from capturing import SPEC, hooks, inputs, model_of
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import modreg_fast as mrf


class Wrapped(nn.Module):
    """A part that something wraps, and a part that is really called "module"."""

    def __init__(self, wrap):
        super().__init__()
        self.part, self.module = wrap(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), nn.Linear(2, 2)

    def forward(self, x):
        return self.module(self.part(x))


def test_names_inside_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Wrapped(checkpoint_wrapper)
    with mrf.capture(model, {"a": ["part.0", "part"], "b": "module"}) as features:
        scores = model(torch.ones(1, 2))
        scores.sum().backward()
    assert [len(x) for x in features.values()] == [2, 1] and features["b"][0] is scores
    with mrf.capture(model, {"a": "part._checkpoint_wrapped_module.0"}) as features:
        model(torch.ones(1, 2))
    assert len(features["a"]) == 1


# Dynamo itself looks at .grad of what enters a graph after a break.
of_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@of_dynamo
@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_compiled_model(how):
    """Captured from its first call on, the features lie between the compiled graphs, where gradients reach them."""
    torch.compiler.reset()
    model, x = model_of(), inputs()
    compiled = torch.compile(model, backend="aot_eager") if how == "wrapper" else model
    if how == "method":
        model.compile(backend="aot_eager")
    for _ in range(2):
        with mrf.capture(compiled, SPEC) as features:
            scores = compiled(x)
            grads = torch.autograd.grad(scores.max(1).values.sum(), features["rgb"] + features["depth"])
        assert all(g.abs().sum() > 0 for g in grads)
    plain = model_of()
    with mrf.capture(plain, SPEC) as features:
        expected = plain(x)
        expected_grads = torch.autograd.grad(expected.max(1).values.sum(), features["rgb"] + features["depth"])
    torch.testing.assert_close((scores, *grads), (expected, *expected_grads))


@of_dynamo
def test_compiled_part():
    """The output of a compiled part costs no graph break, and may be captured at any time."""
    torch.compiler.reset()
    model = Wrapped(lambda part: torch.compile(part, backend="aot_eager", fullgraph=True))
    x = torch.ones(1, 2)
    model(x)
    with mrf.capture(model, {"a": "part"}) as features:
        scores = model(x)
    (g,) = torch.autograd.grad(scores.sum(), features["a"])
    torch.testing.assert_close(g, model.module.weight.sum(0, keepdim=True))


@of_dynamo
def test_model_compiled_before():
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), backend="aot_eager")
    x = torch.ones(1, 2)
    compiled(x)
    with pytest.raises(RuntimeError, match=r"'0' .* did not run .* torch.compiler.reset\(\)"), mrf.capture(compiled, {"a": "0"}):
        compiled(x)
    torch.compiler.reset()
    with mrf.capture(compiled, {"a": "0"}) as features:
        compiled(x)
    assert len(features["a"]) == 1


def test_fullgraph_names_the_reason():
    torch.compiler.reset()
    compiled = torch.compile(model_of(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="leave out fullgraph=True"), mrf.capture(compiled, SPEC):
        compiled(inputs())


def step(model, rank: int, ranks: int):
    """One training step on a part of four samples: the gradients."""
    part = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    group = dist.group.WORLD if ranks > 1 else None
    balance, steer = mrf.FunctionalEntropyLoss(1e-2, process_group=group), mrf.AttributionLoss(process_group=group)
    before = hooks(model)  # those of FSDP2
    with mrf.capture(model, SPEC) as features:
        scores = model({m: x[part] for m, x in inputs(4).items()})
        (balance(features) + steer(scores, features) + scores.square().mean()).backward()
        assert [len(row) for row in features.values()] == [2, 2] and len(features["rgb"][0]) == 4 // ranks
    assert hooks(model) == before
    return [p.grad for p in model.parameters()]


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    wrapped = DistributedDataParallel(model_of(checkpointed=True))
    grads = step(wrapped, rank, ranks)
    with mrf.capture(wrapped, {"rgb": "module.encoders.rgb.0"}) as features:  # the full name too
        wrapped(inputs())
    with mrf.capture(wrapped.module, {"rgb": "encoders.rgb.0"}) as inner:  # and the module inside
        wrapped(inputs())
    assert len(features["rgb"]) == len(inner["rgb"]) == 1
    sharded = model_of(checkpointed=True)
    for encoder in sharded.encoders.values():  # what follows the captured tensors is differentiated twice, so it is plain
        fully_shard(encoder[0], mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    found = step(sharded, rank, ranks)
    for g in found:
        if not isinstance(g, DTensor):
            dist.all_reduce(g)
            g /= ranks
    torch.save((grads, [g.full_tensor() if isinstance(g, DTensor) else g for g in found]), f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_wrappers_over_ranks(ranks, tmp_path):
    """DDP, and FSDP2 with a plain head, both with checkpointed encoders: the gradients of one process."""
    helpers.run_ranks(work, ranks, ranks, str(tmp_path))
    expected = step(model_of(), 0, 1)
    for rank in range(ranks):
        for found in torch.load(tmp_path / f"{ranks}-{rank}.pt"):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

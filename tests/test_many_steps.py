"""Ten thousand training steps with capture and every loss: neither memory nor the number of Python objects grows."""

import gc
import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from capturing import SPEC, inputs, model_of

import modreg_fast as mrf


def memory():
    """Resident bytes of this process."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True)
def one_thread():
    """Maps this small are faster so, much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("steps", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_grows(steps):
    model, x = model_of(), inputs()
    labels, mask = torch.arange(32).reshape(2, 4, 4) % 5, torch.rand(2, 4, 4) < 0.8
    present = torch.tensor([[True, True], [True, False]])
    balance, steer = mrf.FunctionalEntropyLoss(1e-3, 1e-3, sigma=0.1), mrf.AttributionLoss(norm="l2")
    adaptive, quality = mrf.AdaptiveWeight(), mrf.QualityTarget(["rgb", "depth"], 5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step(features):
        scores = model(x)
        coarse = {m: row[1] for m, row in features.items()}
        target = quality({m: y[:, :5] for m, y in coarse.items()}, labels, mask=mask)
        values = F.cross_entropy(scores, labels, reduction="none")
        penalty, _ = balance(features, mask=mask, present=present, return_details=True)
        penalty = penalty + balance.prediction_term(values, coarse, mask=mask)
        penalty = penalty + steer(scores, features, mask=mask, present=present, target=target)
        optimizer.zero_grad()
        (values.mean() + adaptive(values.mean(), penalty, list(model.head.parameters()))).backward()
        optimizer.step()
        with torch.no_grad():
            model.encoders["rgb"](x["rgb"])  # a part alone
        with mrf.capture(model, SPEC) as others:  # a block in the block, as audit enters it
            model(x)
        model.keep = []
        return others

    def objects():
        gc.collect()
        return len(gc.get_objects()), memory()

    with mrf.capture(model, SPEC) as features:
        for i in range(steps):
            step(features)
            if i == steps // 3:
                before = objects()
        after = objects()
    assert after[0] - before[0] < 50  # not one in a step
    assert after[1] - before[1] < 8 * 2**20  # what an allocator may do; a tensor a step would be more in the long run

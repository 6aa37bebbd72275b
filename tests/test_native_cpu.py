"""What only the native CPU backend promises: the same bits for any number of threads, no temporaries, every instruction set, 64 bits."""

import itertools
import os
import subprocess
import sys

import helpers
import numpy as np
import oracle
import pytest
import torch

import modreg_fast as mrf
from modreg_fast import functional as F


def calls(backend="cpu"):
    """All ops, forward and backward, over several shapes with masks, the last ones channels last; all results in one list."""
    torch.manual_seed(0)
    shapes = [(2, 48, 61, 67), (2, 64, 16, 16), (2, 64, 16, 16), (2, 130, 5, 3), (2, 5, 7, 6)]
    features = [[torch.randn(s) for s in shapes] for _ in range(3)]
    for row in features:
        row[2:] = [x.to(memory_format=torch.channels_last) for x in row[2:]]
        for x in row:
            x.requires_grad_()
    mask = torch.rand(2, 61, 67) > 0.3
    leaves, results = [x for row in features for x in row], []
    for noise in ({"sigma": 0.3, "samples": 2, "seed": 5}, {}):
        information = F.softmax_fisher_information(features, mask=mask, backend=backend, **noise)
        results += [information, *torch.autograd.grad(information, leaves, torch.rand_like(information))]
    values = [torch.rand(s[0], *s[2:]) for s in shapes]
    statistics = F.gradient_statistics(features[0], features[1], values, mask=mask, maps=True, backend=backend)
    more = torch.autograd.grad(statistics.fisher.sum() + statistics.attribution.sum(), [*features[0], *features[1]])
    results += [statistics.fisher, statistics.attribution, *statistics.fisher_maps, *more]
    for s, smoothing in itertools.product(range(len(shapes)), (0.0, 0.1)):
        logits, target = [row[s] for row in features], torch.randint(shapes[s][1], (2, *shapes[s][2:]))
        present = torch.tensor([[True, True, True], [True, False, True]])
        sums = F.modality_cross_entropy(
            logits, target, ignore_index=1, label_smoothing=smoothing, present=present, backend=backend
        )
        upstream = [torch.rand_like(x) for x in sums[:3]]
        results += [*sums, *torch.autograd.grad(sums[:3], logits, upstream)]
    # So far apart that exponentials relative to anything but the maximum overflow.
    far = [(100 * torch.randn(2, 6, 50).sign()).requires_grad_() for _ in range(2)]
    information = F.softmax_fisher_information([[x] for x in far], backend=backend)
    sums = F.modality_cross_entropy(far, torch.randint(6, (2, 50)), backend=backend)
    for outputs in ([information], sums[:3]):
        results += [*outputs, *torch.autograd.grad(outputs, far, [torch.rand_like(x) for x in outputs])]
    return results


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
def test_same_bits_for_any_number_of_threads():
    torch.set_num_threads(1)
    expected = calls()
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        for x, y in zip(calls(), expected, strict=True):
            assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.fixture(scope="module")
def reference():
    return calls("reference")


@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_of_this_processor_gives_the_reference(name, reference, tmp_path):
    """In a process of its own, because the choice is made once."""
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import torch, modreg_fast as mrf, test_native_cpu as t\n"
        "torch.save(t.calls(), sys.argv[1])\n"
        "print(mrf.backends()['cpu'].detail)\n"
    )
    environment = dict(os.environ, MODREG_FAST_INSTRUCTION_SET=name)
    command = [sys.executable, "-c", script, tmp_path / "ours.pt"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    errors = [helpers.relative_error(x, y) for x, y in zip(torch.load(tmp_path / "ours.pt"), reference, strict=True)]
    harness = pytest.importorskip("modreg_fast._native_harness")
    assert run.stdout.splitlines()[-1].endswith(name) == (name in harness.instruction_sets())
    assert 0 < max(errors) < 2e-5  # not the same bits: two computations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_random_calls_on_every_instruction_set(name):
    environment = dict(os.environ, MODREG_FAST_INSTRUCTION_SET=name)
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_fuzz.py", "-m", "slow", "-k", "cpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("all_present", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_those_beside_it(dtype, all_present):
    """While one strip of pixels is computed, those that follow are read: with other modalities, masked out, or shorter."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    batch, scales = 12, ((24, 1088), (7, 300))
    features = [[torch.randn(batch, c, p, 1).to(dtype).requires_grad_() for c, p in scales] for _ in range(3)]
    mask = torch.rand(batch, 1088, 1) > 0.3
    mask[:, 256:512], mask[4] = False, False
    present = None if all_present else torch.rand(batch, 3) > 0.3

    def results(samples):
        some = [[x[samples] for x in row] for row in features]
        held = None if present is None else present[samples]
        information = F.softmax_fisher_information(some, mask=mask[samples], present=held, backend="cpu")
        return [information, *torch.autograd.grad(information.sum(), [x for row in some for x in row])]

    together = results(slice(None))
    for b in range(batch):
        alone = results(slice(b, b + 1))
        assert torch.equal(together[0][:, :, b : b + 1], alone[0])
        for x, y in zip(together[1:], alone[1:], strict=True):
            assert torch.equal(x[b : b + 1], y)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("all_present", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sample_of_cross_entropies_does_not_depend_on_those_beside_it(smoothing, all_present):
    torch.manual_seed(1)
    torch.set_num_threads(1)
    batch = 12
    logits = [torch.randn(batch, 24, 1088, requires_grad=True) for _ in range(3)]
    target = torch.randint(24, (batch, 1088))
    target[:, 256:512], target[4] = -100, -100
    present = None if all_present else torch.rand(batch, 3) > 0.3

    def results(samples):
        some, held = [x[samples] for x in logits], None if present is None else present[samples]
        sums = F.modality_cross_entropy(some, target[samples], label_smoothing=smoothing, present=held, backend="cpu")
        return *sums, *torch.autograd.grad([x.sum() for x in sums[:3]], logits)

    together = results(slice(None))
    for b in range(batch):
        alone = results(slice(b, b + 1))
        assert all(torch.equal(x[..., b : b + 1], y) for x, y in zip(together[:4], alone[:4], strict=True))
        assert all(torch.equal(x[b], y[b]) for x, y in zip(together[4:], alone[4:], strict=True))


def over_features(x):
    return F.softmax_fisher_information([[y] for y in x], backend="cpu").sum()


def over_logits(x):
    return sum(part.sum() for part in F.modality_cross_entropy(x, torch.zeros(2, 64, 64, dtype=torch.uint8), backend="cpu"))


@pytest.mark.parametrize("op", [over_features, over_logits])
def test_forward_allocates_no_tensor_and_backward_only_the_gradients(op):
    x = [torch.randn(2, 64, 64, 64, requires_grad=True) for _ in range(2)]
    size = x[0].numel() * 4

    def allocated(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function()
        return result, sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())

    result, forward = allocated(lambda: op(x))
    assert forward < 0.01 * size
    _, backward = allocated(lambda: torch.autograd.grad(result, x))
    assert backward < 2 * size * 1.01


def test_status_names_the_instruction_set():
    status = mrf.backends()["cpu"]
    assert status.available and status.detail.split()[-1] in ("avx512", "avx2", "baseline")


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets are 64-bit: the last sample of a tensor of 2^31 + 2^26 elements."""
    shape = (33, 64, 1024, 1024)
    a, b = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
    assert a.numel() > 2**31
    last = [torch.randn(1, *shape[1:]).bfloat16() for _ in range(2)]
    a[-1:], b[-1:] = last
    information = F.softmax_fisher_information([[a], [b]], backend="cpu")
    alone = F.softmax_fisher_information([[last[0]], [last[1]]], backend="cpu")
    assert torch.equal(information[:, :, -1:], alone)
    assert (information[:, :, :-1] == 0).all()
    statistics = F.gradient_statistics([a], features=[b], backend="cpu")
    assert torch.equal(
        statistics.attribution[:, -1:], F.gradient_statistics(last[:1], features=last[1:], backend="cpu").attribution
    )


def test_noise_where_its_blocks_are_no_longer_numbers_of_32_bits():
    """In the middle of a register of pixels. Samples share memory, and all but one lack both modalities."""
    batch, channels, pixels, seed, sigma = 256, 64, 2**20 + 8, 5, 0.5
    first = (batch - 1) * channels // 4 * pixels  # block of the last sample
    block, pixel = divmod(2**32 - first, pixels)
    assert block < channels // 4 and pixel % 16 == 8
    around = slice(pixel - 16, pixel + 16)
    x = [torch.randn(1, channels, pixels) for _ in range(2)]
    mask, present = torch.zeros(batch, pixels, dtype=torch.bool), torch.zeros(batch, 2, dtype=torch.bool)
    mask[-1, around], present[-1] = True, True
    information = F.softmax_fisher_information(
        [[m.expand(batch, -1, -1)] for m in x], mask=mask, present=present, sigma=sigma, seed=seed, backend="cpu"
    )
    c, p = np.meshgrid(np.arange(channels), np.arange(around.start, around.stop), indexing="ij")
    noise = [oracle.normal_of_block(first + c // 4 * pixels + p, c, seed, m, 0) for m in range(2)]
    noisy = [x[m][0, :, around].double().numpy() + sigma * noise[m] for m in range(2)]
    mean = (x[0] + x[1])[0, :, around].double().numpy() / 2
    q = np.exp(oracle.log_softmax(mean))
    for m in range(2):
        log_p = oracle.log_softmax(noisy[m])
        exact = (((np.exp(log_p) - q) ** 2).sum(0) / (oracle.EPS - (q * log_p).sum(0))).mean()
        assert abs(information[m, 0, -1].item() - exact) < 1e-5 * exact

"""The CUDA backend as Python sees it, and, where there is a GPU, its numbers against the reference. Without one: test_cuda_kernels.py."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import modreg_fast as mrf

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_validate import checks  # noqa: E402
from benchmarks.gpu_validate.work import odd_works  # noqa: E402

STATUS = mrf.backends()["cuda"]
needs_gpu = pytest.mark.skipif(not STATUS.available, reason=STATUS.detail)


@pytest.mark.skipif(STATUS.available, reason="there is a GPU")
def test_says_why_it_is_not_usable():
    assert STATUS.detail.strip()
    with pytest.raises(RuntimeError, match="backend 'cuda' is not usable here: "), mrf.use_backend("cuda"):
        pass


def test_fake_tensors_on_cuda_need_no_gpu():
    with FakeTensorMode():
        xs = [torch.empty(2, 8, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        information = mrf.functional.softmax_fisher_information([[xs[0]], [xs[1]]])
        assert information.shape == (2, 1, 2) and information.device.type == "cuda" and information.dtype == torch.float32
        counts = torch.empty(1, 2, device="cuda", dtype=torch.int64)
        gradients = torch.ops.modreg_fast.softmax_fisher_backward(
            information, counts, xs, [], None, [0.0, 0.0], 1, None, False, 1e-8, 1, "cuda"
        )
        assert [g.shape for g in gradients] == [x.shape for x in xs]
        statistics = mrf.functional.gradient_statistics([xs[0]], [xs[1]])
        assert statistics.attribution.shape == (1, 2) and statistics.attribution.device.type == "cuda"


def test_the_host_side_can_be_captured_in_a_graph():
    """It queues kernels on the stream it is given and does nothing that waits, copies or allocates: of the CUDA runtime it calls only
    these functions, and scratch memory comes from torch."""
    source = "\n".join(file.read_text() for file in sorted((ROOT / "csrc/cuda").iterdir()))
    queries = {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaGetLastError", "cudaGetErrorString"}
    assert set(re.findall(r"\bcu[A-Z]\w*(?=\()|\bcuda[A-Z]\w*(?=\()", source)) == queries | {"cudaFuncSetAttribute"}
    launches = re.findall(r"<<<(.*?)>>>", source)
    assert launches and all(launch.endswith("static_cast<cudaStream_t>(stream)") for launch in launches)
    binding = (ROOT / "csrc/cuda/module.cpp").read_text()
    assert binding.count("aoti_torch_get_current_cuda_stream(like") == binding.count("mrf::cuda::launch(") == 1
    entries = re.findall(r"^(?:void|bool) \w+_(?:forward|backward)\(", binding, re.M)
    assert len(entries) == 6 and binding.count("DeviceGuard guard(") == 3  # one for each op, in what its two passes call
    assert not re.search(r"\bitem\b|\bcpu\(|copy_|\.to\(|synchronize", binding)


@needs_gpu
@pytest.mark.parametrize("work", range(6))
def test_graph_capture_on_a_gpu(work):
    assert not checks.differing_from_graph(odd_works("cuda", "cuda")[work], replays=3)


@needs_gpu
@pytest.mark.parametrize("work", range(6))
def test_same_bits_on_a_gpu(work):
    assert not checks.differing(odd_works("cuda", "cuda")[work], repeats=10)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_softmax_fisher_on_a_gpu(dtype, channels_last):
    shapes = [(2, 24, 33, 17), (2, 130, 8, 8)] * 5  # more scales than a launch takes
    features = [[torch.randn(s, dtype=dtype, device="cuda") for s in shapes] for _ in range(3)]
    if channels_last:
        features = [[x.to(memory_format=torch.channels_last) for x in row] for row in features]
    features = [[x.requires_grad_() for x in row] for row in features]
    mask, present = torch.rand(2, 33, 17, device="cuda") > 0.3, torch.tensor([[True, False, True], [True] * 3], device="cuda")
    results = []
    for backend in ("cuda", "reference"):
        out = mrf.functional.softmax_fisher_information(
            features, mask=mask, present=present, sigma=[0.5, 0.0, 0.2], samples=2, seed=5, backend=backend
        )
        gradients = torch.autograd.grad(out.square().sum(), [x for row in features for x in row])
        results.append((out.cpu(), [g.cpu() for g in gradients]))
    assert_close(results[0][0], results[1][0], 1e-5)
    assert_close(results[0][1], results[1][1], 1e-5 if dtype.itemsize > 2 else 2.0**-7)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradient_statistics_on_a_gpu(dtype):
    shapes = [(2, 24, 33), (2, 130, 8)] * 8
    tensors = [[torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes] for _ in range(2)]
    values = [torch.rand(s[0], s[2], device="cuda").add(0.5).requires_grad_() for s in shapes]
    results = []
    for backend in ("cuda", "reference"):
        out = mrf.functional.gradient_statistics(*tensors, values, maps=True, backend=backend)
        total = out.fisher.square().sum() + out.attribution.square().sum()
        total = total + sum(x.square().sum() for x in (*out.fisher_maps, *out.attribution_maps))
        gradients = torch.autograd.grad(total, [*tensors[0], *tensors[1], *values])
        results.append([out.fisher.cpu(), out.attribution.cpu(), *(g.cpu() for g in gradients)])
    assert_close(results[0], results[1], 1e-5 if dtype.itemsize > 2 else 2.0**-7)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_modality_cross_entropy_on_a_gpu(dtype, channels_last, label_smoothing):
    for channels, modalities in ((19, 2), (64, 3), (7, 6)):
        logits = [torch.randn(2, channels, 33, 17, dtype=dtype, device="cuda") for _ in range(modalities)]
        if channels_last:
            logits = [x.to(memory_format=torch.channels_last) for x in logits]
        logits = [x.requires_grad_() for x in logits]
        target = torch.randint(channels + 1, (2, 33, 17), device="cuda")
        present = torch.rand(2, modalities, device="cuda") > 0.3
        results = []
        for backend in ("cuda", "reference"):
            sums = mrf.functional.modality_cross_entropy(
                logits,
                target,
                weight=torch.linspace(0.1, 1, channels, device="cuda"),
                ignore_index=channels,
                label_smoothing=label_smoothing,
                present=present,
                backend=backend,
            )
            gradients = torch.autograd.grad(sum(x.square().sum() for x in sums[:3]), logits)
            results.append(([x.cpu() for x in sums], [g.cpu() for g in gradients]))
        assert_close(results[0][0], results[1][0], 1e-5)
        assert_close(results[0][1], results[1][1], 1e-5 if dtype.itemsize > 2 else 2.0**-7)

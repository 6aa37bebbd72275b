"""The CUDA backend as Python sees it, and, where there is a GPU, its numbers against the reference. Without one: test_cuda_kernels.py."""

import pytest
import torch
from helpers import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import modreg_fast as mrf
from modreg_fast.ops.softmax_fisher import softmax_fisher_backward

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
        gradients = softmax_fisher_backward(information, counts, xs, [], None, [0.0, 0.0], 1, None, False, 1e-8, "cuda")
        assert [g.shape for g in gradients] == [x.shape for x in xs]
        statistics = mrf.functional.gradient_statistics([xs[0]], [xs[1]])
        assert statistics.attribution.shape == (1, 2) and statistics.attribution.device.type == "cuda"


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

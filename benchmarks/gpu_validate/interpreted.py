"""Both GPU backends without a GPU. Triton has its interpreter; for the CUDA kernels this file stands for the binding: its raw ops, on CPU
tensors, by the PTX interpreter of the tests."""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from modreg_fast.backends import BackendStatus
from modreg_fast.backends.layout import layout_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import cuda_calls  # noqa: E402
import ptx  # noqa: E402

REPORTS: list[ptx.Report] = []  # of every launch so far


def prepare(backend: str) -> None:
    """For the whole process; after it for ``cuda`` there is no backend ``cpu``."""
    if backend == "triton":
        import interpreter

        interpreter.mend()
    if backend == "cuda":
        _install()


def _install() -> None:
    if ptx.NVCC is None or cuda_calls.COMPILER is None:
        raise RuntimeError("a dry run of the CUDA kernels needs nvcc and a C++ compiler")
    os.environ.setdefault("MODREG_FAST_TESTS_SHARED", os.environ["MODREG_FAST_DRY_RUN"])  # nvcc takes a minute, once per run
    for function in (
        softmax_fisher_forward,
        softmax_fisher_backward,
        gradient_statistics_forward,
        gradient_statistics_backward,
        modality_cross_entropy_forward,
        modality_cross_entropy_backward,
    ):
        function.default = function  # the backends name an overload, which spares a call its choice
        setattr(torch.ops.modreg_fast_cuda, function.__name__, function)
    backends = sys.modules["modreg_fast.backends"]  # the package's attribute of that name is a function
    backends._STATUS["cuda"] = BackendStatus(True, "PTX for sm_90 interpreted on the CPU: for tests, slow")
    backends._REGISTRY["cuda"] = backends._REGISTRY["cuda"]._replace(devices=("cuda", "cpu"))


def softmax_fisher_forward(features, masks, present, sigma, samples, seed, eps, information, counts):
    out = _softmax_fisher(features, masks, present, sigma, samples, seed, eps)
    information.copy_(torch.from_numpy(out.information.numpy()))
    counts.copy_(torch.from_numpy(out.counts.numpy()))


def softmax_fisher_backward(weight, features, masks, present, sigma, samples, seed, detach_reference, eps, gradients):
    out = _softmax_fisher(features, masks, present, sigma, samples, seed, eps, detach=detach_reference, weight=weight.numpy())
    _copy([x for row in out.gradients for x in row], gradients)


def _softmax_fisher(features, masks, present, sigma, samples, seed, eps, **options):
    memory, scales = ptx.Memory(), len(features) // len(sigma)
    tensors = [_tensor(memory, x) for x in features]
    out = cuda_calls.softmax_fisher(
        [tensors[m * scales : (m + 1) * scales] for m in range(len(sigma))],
        masks=_arrays(masks),
        present=None if present is None else present.numpy(),
        sigma=sigma,
        draws=samples,
        seed=0 if seed is None else int(seed),
        eps=eps,
        **options,
    )
    REPORTS.append(out.report)
    return out


def gradient_statistics_forward(grads, features, values, masks, eps, fisher, attribution, fisher_maps, attribution_maps):
    out = _gradient_statistics(grads, features, values, masks, eps, maps=bool(fisher_maps or attribution_maps))
    for buffer, result in ((out.fisher, fisher), (out.attribution, attribution)):
        if buffer is not None:
            result.copy_(torch.from_numpy(buffer.numpy()))
    _copy(out.fisher_maps, fisher_maps)
    _copy(out.attribution_maps, attribution_maps)


def gradient_statistics_backward(
    fisher_weight,
    attribution_weight,
    fisher_map_grads,
    attribution_map_grads,
    grads,
    features,
    values,
    masks,
    eps,
    to_grads,
    to_features,
    to_values,
):
    upstream = (
        fisher_weight.numpy() if values else None,
        attribution_weight.numpy() if features else None,
        _arrays(fisher_map_grads),
        _arrays(attribution_map_grads),
    )
    out = _gradient_statistics(grads, features, values, masks, eps, upstream=upstream)
    _copy(out.to_grads, to_grads)
    _copy(out.to_features, to_features)
    _copy(out.to_values, to_values)


def _gradient_statistics(grads, features, values, masks, eps, **options):
    memory = ptx.Memory()
    tensors = ([_tensor(memory, x) for x in group] for group in (grads, features))
    out = cuda_calls.gradient_statistics(*tensors, values=_arrays(values), masks=_arrays(masks), eps=eps, **options)
    REPORTS.append(out.report)
    return out


def modality_cross_entropy_forward(
    logits, target, weight, present, ignore_index, label_smoothing, eps, cross_entropy, joint, information, weights
):
    out = _modality_cross_entropy(logits, target, weight, present, ignore_index, label_smoothing, eps)
    for result, name in ((cross_entropy, "cross_entropy"), (joint, "joint"), (information, "information"), (weights, "weights")):
        result.copy_(torch.from_numpy(getattr(out, name).numpy()))


def modality_cross_entropy_backward(
    to_cross_entropy, to_joint, to_information, logits, target, weight, present, ignore_index, label_smoothing, eps, gradients
):
    upstream = _arrays([to_cross_entropy, to_joint, to_information])
    out = _modality_cross_entropy(logits, target, weight, present, ignore_index, label_smoothing, eps, upstream=upstream)
    _copy(out.gradients, gradients)


def _modality_cross_entropy(logits, target, weight, present, ignore_index, label_smoothing, eps, **options):
    memory = ptx.Memory()
    out = cuda_calls.modality_cross_entropy(
        [_tensor(memory, x) for x in logits],
        target.numpy(),
        weight=None if weight is None else weight.numpy(),
        present=None if present is None else present.numpy(),
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        eps=eps,
        **options,
    )
    REPORTS.append(out.report)
    return out


def _tensor(memory: ptx.Memory, x: Tensor) -> cuda_calls.Tensor:
    """With strides as far apart as those of ``x``, where these need 64 bits."""
    kind = cuda_calls.FarTensor if max(x.stride()) >= 2**31 else cuda_calls.Tensor
    layout = layout_of(x)
    assert layout is not None
    return kind(memory, x.detach().double().numpy(), str(x.dtype).removeprefix("torch."), layout)


def _arrays(tensors: list[Tensor]):
    return [x.numpy() for x in tensors] or None


def _copy(buffers, tensors: list[Tensor]) -> None:
    for buffer, tensor in zip(buffers, tensors, strict=True):
        found = buffer.values() if isinstance(buffer, cuda_calls.Tensor) else buffer.numpy()
        tensor.copy_(torch.from_numpy(found.copy()))

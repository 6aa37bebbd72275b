"""``softmax_fisher`` by the native kernels, of the CPU or of CUDA, where the tensors are.

Definitions: ``backends/reference/softmax_fisher.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient, in_layout
from modreg_fast.backends.reference.softmax_fisher import Problem, Result

_MOST_MODALITIES = {"cpu": 64, "cuda": 48}


def forward(problem: Problem) -> Result:
    device, modalities = problem.features[0].device.type, problem.modalities
    if modalities > _MOST_MODALITIES[device]:
        raise ValueError(
            f"softmax_fisher: backend {device!r} takes at most {_MOST_MODALITIES[device]} modalities, got {modalities}"
        )
    result = problem.empty_result()
    torch.ops.modreg_fast_native.softmax_fisher_forward.default(
        *_inputs(problem), problem.sigma, problem.samples, problem.seed, problem.eps, *result
    )
    return result


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    inputs = features, masks, _ = _inputs(problem)
    gradients = [empty_gradient(x) for x in features]
    draws = result.counts.clamp(min=1) if masks else result.counts
    if problem.samples > 1:
        draws = draws * problem.samples
    torch.ops.modreg_fast_native.softmax_fisher_backward.default(
        (upstream.information.double() / draws).contiguous(), *inputs, *problem[3:-1], gradients
    )
    return gradients


def _inputs(problem: Problem) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Features, masks and ``present`` as the kernels read them."""
    present = problem.present
    return (
        [in_layout(x) for x in problem.features],
        [m.contiguous() for m in problem.masks],
        None if present is None else present.contiguous(),
    )

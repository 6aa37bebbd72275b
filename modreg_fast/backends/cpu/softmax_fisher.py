"""``softmax_fisher`` by the native kernels, of the CPU or of CUDA, where the tensors are.

Definitions: ``backends/reference/softmax_fisher.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_in_layout, in_layout, layout_of
from modreg_fast.backends.reference.softmax_fisher import Problem, Result

_MOST_MODALITIES = {"cpu": 64, "cuda": 48}


def forward(problem: Problem) -> Result:
    device, modalities = problem.features[0].device.type, problem.modalities
    if modalities > _MOST_MODALITIES[device]:
        raise ValueError(
            f"softmax_fisher: backend {device!r} takes at most {_MOST_MODALITIES[device]} modalities, got {modalities}"
        )
    features, masks, present, sigma, samples, seed, _, eps, _ = _prepared(problem)
    result = problem.empty_result()
    torch.ops.modreg_fast_native.softmax_fisher_forward(features, masks, present, sigma, samples, seed, eps, *result)
    return result


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    problem = _prepared(problem)
    gradients = [empty_in_layout(x, layout_of(x)) for x in problem.features]
    weight = (upstream.information.double() / (result.counts.clamp(min=1) * problem.samples)).contiguous()
    torch.ops.modreg_fast_native.softmax_fisher_backward(weight, *problem[:-1], gradients)
    return gradients


def _prepared(problem: Problem) -> Problem:
    """As the kernels read it."""
    return problem._replace(
        features=[in_layout(x) for x in problem.features],
        masks=[m.contiguous() for m in problem.masks],
        present=None if problem.present is None else problem.present.contiguous(),
    )

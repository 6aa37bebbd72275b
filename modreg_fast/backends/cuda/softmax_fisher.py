"""``softmax_fisher`` by the CUDA kernels.

Definitions: ``backends/reference/softmax_fisher.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient, in_layout
from modreg_fast.backends.reference.softmax_fisher import Problem, Result

_MOST_MODALITIES = 48


def forward(problem: Problem) -> Result:
    problem = problem.flat()
    if problem.modalities > _MOST_MODALITIES:
        raise ValueError(f"softmax_fisher: backend 'cuda' takes at most {_MOST_MODALITIES} modalities, got {problem.modalities}")
    result = problem.empty_result()
    torch.ops.modreg_fast_cuda.softmax_fisher_forward.default(
        *_inputs(problem), problem.sigma, problem.samples, problem.seed, problem.eps, *result
    )
    return result


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    inputs = features, masks, _ = _inputs(problem.flat())
    gradients = [empty_gradient(x) for x in features]
    draws = result.counts.clamp(min=1) if masks else result.counts
    if problem.samples > 1:
        draws = draws * problem.samples
    torch.ops.modreg_fast_cuda.softmax_fisher_backward.default(
        (upstream.information.double() / draws).contiguous(), *inputs, *problem[3:-1], gradients
    )
    return problem.shaped(gradients)


def _inputs(problem: Problem) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Features, masks and ``present`` as the kernels read them."""
    present = problem.present
    return (
        [in_layout(x) for x in problem.features],
        [m.contiguous() for m in problem.masks],
        None if present is None else present.contiguous(),
    )

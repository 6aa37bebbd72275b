"""``modality_cross_entropy`` by the CUDA kernels.

Definitions: ``backends/reference/modality_cross_entropy.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient, in_layout, layout_of
from modreg_fast.backends.reference.modality_cross_entropy import Problem, Result

_MOST_MODALITIES = 48


def forward(problem: Problem) -> Result:
    modalities = len(problem.logits)
    if modalities > _MOST_MODALITIES:
        raise ValueError(f"modality_cross_entropy: backend 'cuda' takes at most {_MOST_MODALITIES} modalities, got {modalities}")
    problem = problem.flat()
    result = problem.empty_result()
    torch.ops.modreg_fast_cuda.modality_cross_entropy_forward(*_prepared(problem)[:-1], *result)
    return result


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    prepared = _prepared(problem.flat())
    gradients = [empty_gradient(x) for x in prepared.logits]
    above = [x.double().contiguous() for x in upstream[:3]]
    torch.ops.modreg_fast_cuda.modality_cross_entropy_backward(*above, *prepared[:-1], gradients)
    return problem.shaped(gradients)


def _prepared(problem: Problem) -> Problem:
    """As the kernels read it; all logits in the layout of the first."""
    first = in_layout(problem.logits[0])
    layout = layout_of(first)
    return problem._replace(
        logits=[first, *(in_layout(x, layout) for x in problem.logits[1:])],
        target=problem.target.contiguous(),
        weight=None if problem.weight is None else problem.weight.double().contiguous(),
        present=None if problem.present is None else problem.present.contiguous(),
    )

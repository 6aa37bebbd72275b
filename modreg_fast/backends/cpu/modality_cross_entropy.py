"""``modality_cross_entropy`` by the native kernels, of the CPU or of CUDA, where the tensors are.

Definitions: ``backends/reference/modality_cross_entropy.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient, in_layout, layout_of
from modreg_fast.backends.reference.modality_cross_entropy import Problem, Result

_MOST_MODALITIES = {"cpu": 64, "cuda": 48}


def forward(problem: Problem) -> Result:
    device, modalities = problem.logits[0].device.type, len(problem.logits)
    if modalities > _MOST_MODALITIES[device]:
        raise ValueError(
            f"modality_cross_entropy: backend {device!r} takes at most {_MOST_MODALITIES[device]} modalities, got {modalities}"
        )
    result = problem.empty_result()
    if torch.ops.modreg_fast_native.modality_cross_entropy_forward(*_prepared(problem)[:-1], *result):
        error = problem.out_of_range()
        assert error is not None
        raise error
    return result


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    problem = _prepared(problem)
    gradients = [empty_gradient(x) for x in problem.logits]
    above = [x.double().contiguous() for x in upstream[:3]]
    torch.ops.modreg_fast_native.modality_cross_entropy_backward(*above, *problem[:-1], gradients)
    return gradients


def _prepared(problem: Problem) -> Problem:
    """As the kernels read it; on a GPU all logits in the layout of the first."""
    first = in_layout(problem.logits[0])
    layout = layout_of(first) if first.is_cuda else None
    return problem._replace(
        logits=[first, *(in_layout(x, layout) for x in problem.logits[1:])],
        target=problem.target.contiguous(),
        weight=None if problem.weight is None else problem.weight.double().contiguous(),
        present=None if problem.present is None else problem.present.contiguous(),
    )

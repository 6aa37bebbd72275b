"""``modality_cross_entropy`` by the native kernels, which read tensors of any shape and layout.

Definitions: ``backends/reference/modality_cross_entropy.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.reference.modality_cross_entropy import Problem, Result

_MOST_MODALITIES = 64
_native = torch.ops.modreg_fast_native


def forward(problem: Problem) -> Result:
    modalities = len(problem.logits)
    if modalities > _MOST_MODALITIES:
        raise ValueError(f"modality_cross_entropy: backend 'cpu' takes at most {_MOST_MODALITIES} modalities, got {modalities}")
    *sums, out_of_range = _native.modality_cross_entropy_forward.default(*problem)
    if out_of_range:
        error = problem.flat().out_of_range()
        assert error is not None
        raise error
    return Result(*sums)


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    gradients: list[Tensor] = _native.modality_cross_entropy_backward.default(*upstream[:3], *problem)
    return gradients

"""``softmax_fisher`` by the native kernels, which read tensors of any shape and layout.

Definitions: ``backends/reference/softmax_fisher.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.reference.softmax_fisher import Problem, Result

_MOST_MODALITIES = 64
_native = torch.ops.modreg_fast_native


def forward(problem: Problem) -> Result:
    if problem.modalities > _MOST_MODALITIES:
        raise ValueError(f"softmax_fisher: backend 'cpu' takes at most {_MOST_MODALITIES} modalities, got {problem.modalities}")
    return Result(*_native.softmax_fisher_forward.default(*problem))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    gradients: list[Tensor] = _native.softmax_fisher_backward.default(upstream.information, result.counts, *problem)
    return gradients

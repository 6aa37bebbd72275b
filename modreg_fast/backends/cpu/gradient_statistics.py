"""``gradient_statistics`` by the native kernels, which read tensors of any shape and layout.

Definitions: ``backends/reference/gradient_statistics.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.reference.gradient_statistics import Problem, Result

_native = torch.ops.modreg_fast_native


def forward(problem: Problem) -> Result:
    return Result(*_native.gradient_statistics_forward.default(*problem))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    gradients: list[Tensor] = _native.gradient_statistics_backward.default(*upstream, result.attribution, *problem)
    return gradients

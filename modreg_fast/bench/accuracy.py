"""Relative error against the definition in float64, on the very inputs that are timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modreg_fast.bench.cases import Case
from modreg_fast.bench.providers import public

_MOST_ELEMENTS = 2**23


class Oracle:
    """Values and gradients of a case in float64, of as many leading samples of the batch as fit (at least one): samples are
    independent of each other."""

    def __init__(self, case: Case, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> None:
        self.samples = max(1, min(case.shape.batch, case.shape.batch * _MOST_ELEMENTS // case.shape.elements))
        inputs = [x.detach()[: self.samples].double().requires_grad_() for x in leaves]
        outputs = public(case, "reference", leaves[0].device)(inputs)
        torch.autograd.backward(outputs, [u[..., : self.samples].double() for u in upstream])
        self._values = [x.detach() for x in outputs]
        self._gradients = _gradients(inputs)

    def error_of_values(self, outputs: Sequence[Tensor]) -> float:
        return _relative_error([x.detach()[..., : self.samples] for x in outputs], self._values)

    def error_of_gradients(self, leaves: Sequence[Tensor]) -> float:
        return _relative_error([g[: self.samples] for g in _gradients(leaves)], self._gradients)


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x.grad for x in leaves if x.grad is not None]


def _relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """In norm, of the worst tensor; NaN if any is."""
    errors = [
        torch.linalg.vector_norm(a.double() - e) / torch.linalg.vector_norm(e) for a, e in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())

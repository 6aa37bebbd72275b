"""What the autograd formulas of the ops share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Form = list[Any]


def flattened(values: Sequence[Any]) -> tuple[list[Tensor], Form]:
    """The tensors among ``values`` and in the lists of tensors among them; and the form that is left without them."""
    tensors: list[Tensor] = []
    form: Form = []
    for value in values:
        if type(value) is list:
            if value and isinstance(value[0], Tensor):
                tensors += value
                value = (Tensor, len(value))
        elif isinstance(value, Tensor):
            tensors.append(value)
            value = Tensor
        form.append(value)
    return tensors, form


def restored(tensors: Sequence[Any], form: Form) -> list[Any]:
    """The values that :func:`flattened` took apart, with other tensors."""
    values: list[Any] = []
    at = 0
    for part in form:
        if part is Tensor:
            part = tensors[at]
            at += 1
        elif type(part) is tuple:
            end = at + part[1]
            part = list(tensors[at:end])
            at = end
        values.append(part)
    return values


def gradients_of(tensors: Sequence[Tensor | None], form: Form) -> tuple[Any, ...]:
    """What a custom op's backward formula returns: the structure of its inputs, with None for what is no tensor."""
    values = zip(restored(tensors, form), form, strict=True)
    return tuple(value if part is Tensor or isinstance(part, tuple) or part == [] else None for value, part in values)


def vector_jacobian_product(
    function: Callable[..., list[Tensor] | Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor | None]:
    """``upstream . d function / d inputs``, itself differentiable; None for inputs that are not floating point.

    Gives the ops their second derivatives: the reference backward formula is plain PyTorch, so autograd differentiates it once more,
    with the memory of the plain formula."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stay tied to the graph of the inputs, for still higher derivatives.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        floating = [x for x in inputs if x.is_floating_point()]
        found = iter(torch.autograd.grad(function(*inputs), floating, upstream, create_graph=higher, allow_unused=True))
    return [next(found) if x.is_floating_point() else None for x in inputs]

"""What the autograd formulas of the ops share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def laid_out_like(gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients with the strides of ``torch.empty_like(input)``, as the fake kernels promise; copies only where they differ."""

    def laid_out(gradient: Tensor, x: Tensor) -> Tensor:
        wanted = torch.empty_like(x, device="meta").stride()
        return gradient if gradient.stride() == wanted else torch.empty_like(x).copy_(gradient)

    return [laid_out(gradient, x) for gradient, x in zip(gradients, inputs, strict=True)]


def vector_jacobian_product(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor | None]:
    """``upstream . d function / d inputs``, itself differentiable.

    Gives the ops their second derivatives: the reference backward formula is plain PyTorch, so autograd differentiates it once more,
    with the memory of the plain formula."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stay tied to the graph of the inputs, for still higher derivatives.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(function(*inputs), inputs, upstream, create_graph=higher, allow_unused=True))

"""Second derivatives of the ops: the reference backward formula is plain PyTorch, so autograd differentiates it once more."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def vector_jacobian_product(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor | None]:
    """``upstream . d function / d inputs``, itself differentiable. Memory: that of the plain PyTorch formula."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views stay tied to the graph of the inputs, for still higher derivatives.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(function(*inputs), inputs, upstream, create_graph=higher, allow_unused=True))

"""``(B, C, P)`` of tensors of any shape, and the two memory layouts of it that the kernels read and write in place; everything else is
copied once."""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["pixels", "channels"]


def flat(x: Tensor, channel_dim: int) -> Tensor:
    """``(B, C, P)`` view (a copy only where the pixels have no common stride) of a tensor of any spatial shape, also none."""
    if channel_dim != 1:
        x = x.movedim(channel_dim, 1)
    dims = x.dim()
    return x if dims == 3 else x.flatten(2) if dims > 3 else x.unsqueeze(2)


def shaped_like(gradient: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The gradient of ``flat(x)`` as that of ``x``."""
    if channel_dim == 1:
        return laid_out_like(gradient.view(x.shape), x)
    return laid_out_like(gradient.view(x.movedim(channel_dim, 1).shape).movedim(1, channel_dim), x)


def laid_out_like(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient with the strides of ``torch.empty_like(x)``, as the fake kernels promise; a copy only where they differ."""
    if gradient.is_contiguous() and x.is_contiguous() or gradient.stride() == x.stride():
        return gradient
    wanted = torch.empty_like(x, device="meta").stride()
    return gradient if gradient.stride() == wanted else torch.empty_like(x).copy_(gradient)


def layout_of(x: Tensor) -> Layout | None:
    """Of ``(B, C, P)``: contiguous pixels, contiguous channels (channels last, tokens, and vectors without pixels), or neither."""
    _, channels, pixels = x.shape
    if (pixels > 1 and x.stride(2) == 1) or channels == pixels == 1:
        return "pixels"
    return "channels" if channels > 1 and x.stride(1) == 1 else None


def in_layout(x: Tensor, layout: Layout | None = None) -> Tensor:
    """``x`` where it has the layout (or, by default, any of the two), else a dense copy."""
    if layout is None and x.is_contiguous():
        return x
    own = layout_of(x)
    if own is not None and layout in (None, own):
        return x
    return empty_in_layout(x, layout or layout_of(x.contiguous())).copy_(x)


def empty_gradient(x: Tensor) -> Tensor:
    """Memory for the gradient of ``x`` ``(B, C, P)``: dense, in its layout."""
    return torch.empty_like(x) if x.is_contiguous() else empty_in_layout(x, layout_of(x))


def empty_in_layout(x: Tensor, layout: Layout | None) -> Tensor:
    """A dense tensor like ``x`` in the layout; with the strides of ``torch.empty_like``, so that no one copies it once more."""
    batch, channels, pixels = x.shape
    if layout == "channels" and pixels > 1:
        return x.new_empty((batch, pixels, channels)).transpose(1, 2)
    return x.new_empty((batch, channels, pixels))

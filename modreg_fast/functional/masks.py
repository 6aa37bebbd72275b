"""Masks and maps at other resolutions, and how many pixels count."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modreg_fast import _validate as validate


def spatial_shape(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    shape = list(x.shape)
    if not isinstance(channel_dim, int) or not -x.dim() < channel_dim < x.dim() or channel_dim == 0:
        raise ValueError(
            f"channel_dim must be a dimension of the features {tuple(x.shape)} other than the batch, got {channel_dim}"
        )
    del shape[channel_dim]
    return tuple(shape[1:])


def resize_mask(mask: Tensor, spatial: Sequence[int]) -> Tensor:
    """``mask`` ``(B, *spatial)`` bool at another resolution: a pixel is valid when at least half of its area is.

    Any ratio of the resolutions.

    Args:
        mask: bool ``(B, *spatial)``.
        spatial: the new spatial shape.

    Returns:
        bool ``(B, *spatial)`` at the new resolution.

    Raises:
        ValueError: to another resolution with other than one to three spatial dimensions.

    Example:
        >>> resize_mask(torch.tensor([[True, True, False, False, False, True]]), (3,))
        tensor([[ True, False,  True]])
    """
    validate.tensor(mask, "resize_mask", "mask", dtypes=(torch.bool,))
    if not isinstance(spatial, Sequence):
        validate.fail("resize_mask", "spatial", "a sequence of sizes", type(spatial).__name__, TypeError)
    spatial = tuple(validate.positive_integer(size, "resize_mask", "spatial") for size in spatial)
    if tuple(mask.shape[1:]) == spatial:
        return mask
    if mask.dim() != 1 + len(spatial) or not 1 <= len(spatial) <= 3:
        validate.fail(
            "resize_mask",
            "mask",
            f"(B, *spatial) with the {len(spatial)} (one to three) dimensions of spatial",
            validate.shape(mask),
        )
    if all(fine % coarse == 0 for fine, coarse in zip(mask.shape[1:], spatial, strict=True)):
        return average_pooled(mask.to(torch.float32), spatial) >= 0.5
    # Exactly, in integers: along each dimension, the difference at the edges k * fine / coarse of the area up to there, times coarse.
    area = mask.to(torch.int64)
    for dim, (fine, coarse) in enumerate(zip(mask.shape[1:], spatial, strict=True), start=1):
        edges = torch.arange(coarse + 1, device=mask.device) * fine
        whole, part = edges // coarse, edges % coarse
        padded = torch.cat([area, area.narrow(dim, 0, 1)], dim)  # the pixel past the end has part 0
        before = padded.cumsum(dim) - padded
        part = part.view([-1 if d == dim else 1 for d in range(area.dim())])
        area = (before.index_select(dim, whole) * coarse + padded.index_select(dim, whole) * part).diff(dim=dim)
    return 2 * area >= math.prod(mask.shape[1:])


def average_pooled(x: Tensor, spatial: Sequence[int]) -> Tensor:
    """``x`` ``(B, *spatial)`` averaged over the area of each pixel of another resolution."""
    return F.interpolate(x.unsqueeze(1), size=tuple(spatial), mode="area").squeeze(1)


def scale_masks(
    mask: Tensor | Sequence[Tensor], spatial: list[tuple[int, ...]], batch: int, device: torch.device, function: str
) -> list[Tensor]:
    """One bool mask ``(B, P_s)`` per spatial shape."""
    one = isinstance(mask, Tensor)
    given = [mask] * len(spatial) if isinstance(mask, Tensor) else list(validate.sequence(mask, function, "mask"))
    if len(given) != len(spatial):
        validate.fail(function, "mask", f"one tensor or one per scale ({len(spatial)})", f"{len(given)} tensors")
    masks = []
    for s, (m, size) in enumerate(zip(given, spatial, strict=True)):
        argument = "mask" if one else f"mask[{s}]"
        m = validate.tensor(m, function, argument, dtypes=(torch.bool,))
        if m.dim() != 1 + len(size) or m.shape[0] != batch or m.device != device or 0 in m.shape[1:]:
            validate.fail(
                function,
                argument,
                f"of shape (B, *spatial) with batch {batch} and {len(size)} spatial dimensions on {device}",
                f"{validate.shape(m)} on {m.device}",
            )
        if tuple(m.shape[1:]) != size and (not one or len(size) > 3):
            validate.fail(function, argument, f"of spatial shape {size}", validate.shape(m)[1:])
        masks.append(resize_mask(m, size).reshape(batch, math.prod(size)))
    return masks


def valid_pixels(mask: Tensor) -> Tensor:
    """Valid pixels of each sample."""
    return mask.reshape(len(mask), math.prod(mask.shape[1:])).sum(1)


def all_pixels(values: Tensor, spatial: Sequence[int]) -> Tensor:
    """Pixels of each sample at a resolution."""
    return values.new_full((len(values),), math.prod(spatial))


def pooled(values: Tensor, mask: Tensor | None, spatial: tuple[int, ...]) -> Tensor:
    """``values`` average-pooled to another resolution, over valid pixels where masked."""
    if tuple(values.shape[1:]) == spatial:
        return values

    def pool(x: Tensor) -> Tensor:
        return average_pooled(x, spatial) if spatial else x.flatten(1).mean(1)

    return pool(values) if mask is None else pool(values) / pool(mask.to(values.dtype)).clamp(min=1e-6)


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers in the dtype and on the device of ``like``; on a GPU by fills, for a copy from the host would wait."""
    if like.device.type == "cpu":
        return torch.tensor(values, dtype=like.dtype, device="cpu")
    return torch.stack([like.new_full((), value) for value in values])

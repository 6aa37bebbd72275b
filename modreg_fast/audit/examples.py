"""Sample images: what the sensors saw, and which of them each pixel's decision came from."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Of the modalities, everywhere; they read on a light and on a dark page, and apart for colour-blind readers.
COLOURS = ("#2f7fc1", "#e69f00", "#2aa37f", "#cc6fa5", "#8a7fd6", "#b5562d", "#5fb7e0", "#8c8c8c")
EQUAL = 244.0  # the grey of equal shares

Image = np.ndarray[Any, np.dtype[np.uint8]]


class Example(NamedTuple):
    """A sample: an image ``(H, W, 3)`` of each modality, and ``(h, w, 4)`` of the shares, transparent where nothing is attributed."""

    inputs: dict[str, Image]
    shares: Image


def colour(m: int) -> str:
    """Of modality ``m``."""
    return COLOURS[m % len(COLOURS)]


def examples(
    inputs: Mapping[str, Any], maps: Sequence[Sequence[Tensor]], names: Sequence[str], count: int
) -> tuple[list[Example], str]:
    """The first ``count`` samples of a batch, from the attribution at each pixel, ``[m][s]`` of shape ``(B, *spatial)``; or why there are
    none, though there are pixels."""
    if count <= 0 or not any(x.dim() > 1 for row in maps for x in row):
        return [], ""
    found = [[_plane(x[:count], inputs[m]) for x in row] for m, row in zip(names, maps, strict=True)]
    planes = [[plane for plane in row if plane is not None] for row in found]
    sizes = [[plane.shape[1:] for plane in row] for row in planes]
    if len(sizes[0]) < len(maps[0]) or any(row != sizes[0] for row in sizes):
        told = [f"{m} {', '.join(' x '.join(map(str, x.shape[1:])) for x in row)}" for m, row in zip(names, maps, strict=True)]
        return [], f"The features do not lie on one grid of rows and columns: {'; '.join(told)}."
    fine = max(sizes[0], key=lambda size: size[0] * size[1])
    energy = torch.stack([torch.stack([F.interpolate(x[:, None], size=fine)[:, 0] for x in row]).sum(0) for row in planes], 1)
    attribution = energy.double().sqrt().cpu()  # (count, M, h, w)
    return [
        Example({m: _picture(inputs[m][b]) for m in names if inputs[m].dim() in (4, 5)}, _blend(attribution[b]))
        for b in range(len(attribution))
    ], ""


def _plane(x: Tensor, image: Tensor) -> Tensor | None:
    """Energy ``(B, h, w)`` of ``(B, *spatial)`` per area, so that energies of scales add up: of a volume its central slice, of tokens
    their patches of the image. None where there is no plane."""
    if x.dim() == 2 and (grid := _grid(x.shape[1], image)):
        x = x[:, -math.prod(grid) :].unflatten(1, grid)
    energy = x.square() * x[0].numel()
    if x.dim() == 4:
        energy = energy[:, x.shape[1] // 2]
    return energy if energy.dim() == 3 else None


def _grid(tokens: int, image: Tensor) -> tuple[int, ...]:
    """Into how many patches, squares or cubes, the sides of an image or volume are cut to make so many tokens, behind up to eight that
    stand for no place (of the class, registers); empty where no size of a patch fits."""
    if image.dim() not in (4, 5):
        return ()
    sides = image.shape[2:]
    for exact in (True, False):  # no rest at the border says more than few tokens of no place
        for patches in range(tokens, max(tokens - 9, 0), -1):
            side = int((math.prod(sides) / patches) ** (1 / len(sides)) + 1e-6)  # 2.9999 is 3
            grid = tuple(n // max(side, 1) for n in sides)
            if math.prod(grid) == patches and not (exact and any(n % side for n in sides)):
                return grid
    return ()


def _blend(attribution: Tensor) -> Image:
    """:func:`mixed` of the shares at each pixel of ``(M, h, w)``."""
    total = attribution.sum(0)
    shares = attribution / torch.where(total == 0, 1, total)
    return torch.cat([mixed(shares), 255.0 * (total > 0)[..., None]], 2).round().to(torch.uint8).numpy()


def mixed(shares: Tensor) -> Tensor:
    """``(M, *)`` to colours ``(*, 3)``: that of the modality with the largest share, and the paler the closer to equal shares."""
    palette = torch.tensor(
        [[int(colour(m)[i : i + 2], 16) for i in (1, 3, 5)] for m in range(len(shares))], device=shares.device
    ).double()
    largest, winner = shares.max(0)
    equal = 1 / len(shares)
    strength = ((largest - equal) / max(1 - equal, equal)).clamp(0, 1).sqrt()[..., None]  # the root shows small differences
    return torch.lerp(torch.full_like(strength, EQUAL), palette[winner], strength)


def ramp(steps: int = 21) -> list[str]:
    """The colours of two modalities, from the first alone to the second alone."""
    share = torch.linspace(1, 0, steps, dtype=torch.double, device="cpu")
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in mixed(torch.stack([share, 1 - share])).tolist()]


def _picture(x: Tensor) -> Image:
    """``(C, H, W)``, or the central slice of ``(C, D, H, W)``: its only channel, three, or the means of three groups of neighbours; the
    middle 98 % spread over the range."""
    x = x.detach().double().cpu()
    x = x[:, x.shape[1] // 2] if x.dim() == 4 else x
    channels = x[:1] if len(x) < 3 else torch.stack([group.mean(0) for group in x.tensor_split(3)])
    low, high = np.quantile(channels, [0.01, 0.99])  # torch's takes 16 million values at most
    scaled = ((channels - low) / (high - low if high > low else 1.0)).clamp(0, 1)
    return (255 * scaled).round().to(torch.uint8).expand(3, -1, -1).movedim(0, -1).numpy()


def png(image: Image) -> bytes:
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(image), format="png")
    return file.getvalue()

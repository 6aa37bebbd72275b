"""Shapes of real models, by name."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Shape:
    """``sizes``: the features of one modality, one tensor per scale, as the public functions take them."""

    name: str
    modalities: int
    sizes: tuple[tuple[int, ...], ...]
    channel_dim: int = 1

    @property
    def layouts(self) -> tuple[str, ...]:
        """Which dimension is contiguous: pixels and channels where there is a choice, the natural one first."""
        return ("pixels", "channels") if self.channel_dim == 1 and len(self.sizes[0]) > 2 else ("channels",)

    @property
    def batch(self) -> int:
        return self.sizes[0][0]

    @property
    def elements(self) -> int:
        """Of all modalities."""
        return self.modalities * sum(prod(size) for size in self.sizes)

    def spatial(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A size of this shape without its channels."""
        channels = self.channel_dim % len(size)
        return size[:channels] + size[channels + 1 :]

    @property
    def pixels(self) -> int:
        """Positions over the batch and all scales of one modality."""
        return sum(prod(self.spatial(size)) for size in self.sizes)


_SEGFORMER_CHANNELS = {"b0": (32, 64, 160, 256), "b2": (64, 128, 320, 512)}
_STRIDES = (4, 8, 16, 32)


def _segformer(model: str, image: int, modalities: int) -> Shape:
    sizes = [(2, c, image // stride, image // stride) for c, stride in zip(_SEGFORMER_CHANNELS[model], _STRIDES, strict=True)]
    return Shape(f"segformer-{model}-{image}-m{modalities}", modalities, tuple(sizes))


def _pixels(exponent: int) -> Shape:
    """Sixteen square images of 2^exponent pixels in all."""
    side = 2 ** ((exponent - 4) // 2)
    return Shape(f"pixels-2^{exponent}", 2, ((16, 8, side, side),))


SWEEP = tuple(_pixels(exponent) for exponent in range(14, 25, 2))

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("heads", 2, ((64, 512),)),  # classification: no pixels
        Shape("tokens", 2, ((8, 1024, 512),), channel_dim=-1),
        *(_segformer(model, image, m) for model in _SEGFORMER_CHANNELS for image in (512, 1024) for m in (2, 4)),
        Shape("square", 2, ((2, 64, 512, 512),)),
        Shape("wide", 2, ((2, 512, 128, 128),)),
        Shape("deliver", 4, ((1, 25, 1024, 1024),)),  # predictions of 25 classes at full resolution
        *SWEEP,
    )
}

"""A small two-stream segmentation network: one encoder of four scales per sensor, one head that fuses and classifies, and where the
method asks for it a head of its own for each sensor."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modreg_fast as mrf

CHANNELS = (32, 32, 48, 64)


class Stage(nn.Module):
    """Refines. The first stage looks at the spectrum of a pixel alone; the others halve the resolution and look around."""

    def __init__(self, channels_in: int, channels: int, first: bool) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels_in, channels, 1) if first else nn.Conv2d(channels_in, channels, 2, stride=2)
        self.refine = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1) if first else nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return x + self.refine(x)


class Encoder(nn.Module):
    """``(B, bands, H, W)`` to features of 32, 32, 48 and 64 channels at the full, half, fourth and eighth resolution."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            Stage(before, channels, first=scale == 0)
            for scale, (before, channels) in enumerate(zip((bands, *CHANNELS[:-1]), CHANNELS, strict=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Head(nn.Module):
    """Fusion and classifier: mixes the sensors at each scale, adds coarse scales to fine ones, and classifies."""

    def __init__(self, sensors: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.fuse = nn.ModuleList(nn.Conv2d(sensors * channels, width, 1) for channels in CHANNELS)
        self.classify = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 1))

    def forward(self, features: Mapping[str, list[Tensor]]) -> Tensor:
        fused: Tensor | None = None
        for scale in reversed(range(len(CHANNELS))):
            x = self.fuse[scale](torch.cat([rows[scale] for rows in features.values()], 1))
            fused = x if fused is None else x + F.interpolate(F.relu(fused), scale_factor=2.0)
        scores: Tensor = self.classify(fused)
        return scores


class OwnHead(Head):
    """The head of one sensor."""

    def __init__(self, classes: int) -> None:
        super().__init__(1, classes)

    def forward(self, features: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward({"": features})


class TwoStream(nn.Module):
    """``own``: each sensor has a head of its own besides, which in evaluation speaks where the other sensor is left out."""

    def __init__(self, bands: Mapping[str, int], classes: int, own: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: Encoder(count) for name, count in bands.items()})
        self.head = Head(len(bands), classes)
        self.heads = mrf.ModalityHeads(self.head, {name: OwnHead(classes) for name in bands}) if own else None

    def encode(self, sensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        return {name: self.encoders[name](x) for name, x in sensors.items()}

    def forward(self, sensors: Mapping[str, Tensor]) -> Tensor:
        head = self.head if self.heads is None or self.training else self.heads
        scores: Tensor = head(self.encode(sensors))
        return scores

    def drop(self, sensor: str, x: Tensor) -> Tensor | None:
        """What takes the place of a lost sensor: zeros, its mean; None where the others have heads of their own."""
        return torch.zeros_like(x) if self.heads is None else None

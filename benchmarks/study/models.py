"""A small network: one encoder per modality, and three ways of fusion."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Fusion = Literal["predictions", "features", "concatenation"]
FUSIONS: tuple[Fusion, ...] = ("predictions", "features", "concatenation")
WIDTH = 16


class Network(nn.Module):
    """``encode`` gives one feature ``(B, WIDTH, *spatial)`` per modality, ``fuse`` class scores ``(B, K, *spatial)``: the mean of the
    modalities' own scores (``"predictions"``), a head on the mean of the features, or one on all of them side by side."""

    def __init__(self, channels: Mapping[str, int], classes: int, fusion: Fusion, spatial: bool) -> None:
        super().__init__()
        self.fusion = fusion
        self.encoders = nn.ModuleDict({m: _encoder(count, spatial) for m, count in channels.items()})
        if fusion == "predictions":
            self.heads = nn.ModuleDict({m: _head(WIDTH, classes, spatial) for m in channels})
        else:
            self.head = _head(WIDTH * (1 if fusion == "features" else len(channels)), classes, spatial)

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        if self.fusion == "predictions":
            return torch.stack([head(features[m]) for m, head in self.heads.items()]).mean(0)
        rows = list(features.values())
        scores: Tensor = self.head(torch.stack(rows).mean(0) if self.fusion == "features" else torch.cat(rows, 1))
        return scores

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.fuse(self.encode(inputs))

    def fusion_parameters(self) -> list[nn.Parameter]:
        """Of fusion and classifier."""
        return [p for name, p in self.named_parameters() if not name.startswith("encoders.")]


def _encoder(channels: int, spatial: bool) -> nn.Module:
    if not spatial:
        return nn.Sequential(nn.Linear(channels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(nn.Conv2d(channels, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))


def _head(channels: int, classes: int, spatial: bool) -> nn.Module:
    if spatial:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, WIDTH, 1), nn.ReLU(), nn.Conv2d(WIDTH, classes, 1))
    return nn.Sequential(nn.ReLU(), nn.Linear(channels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

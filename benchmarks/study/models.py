"""A network with one encoder per modality, three ways of fusion, and a head of its own for each modality where a method asks for it."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import modreg_fast as mrf

Fusion = Literal["predictions", "features", "concatenation"]
FUSIONS: tuple[Fusion, ...] = ("predictions", "features", "concatenation")


class Setup(NamedTuple):
    """A network, by the channels of its layers, and its training. ``look``: after so many steps the validation part is looked at, all
    modalities given, and the best weights count, until ``patience`` looks in a row found none better; 0: the last weights count."""

    width: int
    steps: int
    learning_rate: float
    look: int = 0
    patience: int = 0


SMALL = Setup(16, steps=120, learning_rate=1e-2)


class Joint(nn.Module):
    """Features to class scores ``(B, K, *spatial)``: the mean of the modalities' own scores (``"predictions"``), a head on the mean of
    the features, or one on all of them side by side."""

    def __init__(self, modalities: list[str], classes: int, fusion: Fusion, spatial: bool, width: int) -> None:
        super().__init__()
        self.fusion = fusion
        if fusion == "predictions":
            self.heads = nn.ModuleDict({m: _head(width, classes, spatial, width) for m in modalities})
        else:
            self.head = _head(width * (1 if fusion == "features" else len(modalities)), classes, spatial, width)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        if self.fusion == "predictions":
            return torch.stack([head(features[m]) for m, head in self.heads.items()]).mean(0)
        rows = list(features.values())
        scores: Tensor = self.head(torch.stack(rows).mean(0) if self.fusion == "features" else torch.cat(rows, 1))
        return scores


class Network(nn.Module):
    """``encode`` gives one feature ``(B, width, *spatial)`` per modality, ``joint`` the class scores of all.

    ``own``: each modality has a head of its own besides; those that the mean of predictions is of, or new ones. In evaluation they
    speak where inputs are left out."""

    def __init__(
        self,
        channels: Mapping[str, int],
        classes: int,
        fusion: Fusion,
        spatial: bool,
        own: bool = False,
        width: int = SMALL.width,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: _encoder(count, spatial, width) for m, count in channels.items()})
        self.joint = Joint(list(channels), classes, fusion, spatial, width)
        self.heads = None
        if own:
            heads = self.joint.heads if fusion == "predictions" else None
            new = {m: heads[m] if heads else _head(width, classes, spatial, width) for m in channels}
            self.heads = mrf.ModalityHeads(self.joint, new)

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {m: self.encoders[m](x) for m, x in inputs.items()}

    def alone(self, features: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Modality -> class scores from it alone: of its own head, or of the joint one, the others as their encoders see zeros."""
        if self.heads is not None:
            return {m: head(features[m]) for m, head in self.heads.heads.items()}
        absent = self.encode({m: torch.zeros_like(x[:1]) for m, x in inputs.items()})
        return mrf.each_alone(self.joint, features, absent)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        head = self.joint if self.heads is None or self.training else self.heads
        scores: Tensor = head(self.encode(inputs))
        return scores

    def head_parameters(self) -> list[nn.Parameter]:
        """Of fusion and classifier."""
        return list(self.joint.parameters())


def _encoder(channels: int, spatial: bool, width: int) -> nn.Module:
    if not spatial:
        return nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


def _head(channels: int, classes: int, spatial: bool, width: int) -> nn.Module:
    if spatial:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, classes, 1))
    return nn.Sequential(nn.ReLU(), nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, classes))

"""What a training step offers to a method."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import modreg_fast as mrf
from benchmarks.study.models import Network


@dataclass(frozen=True)
class Step:
    """``values``: cross entropy ``(B, *spatial)``; ``mask``: its labelled positions, None for all; ``quality``: lives as long as the
    training."""

    model: Network
    inputs: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    scores: Tensor
    values: Tensor
    target: Tensor
    mask: Tensor | None
    quality: mrf.QualityTarget

    def alone(self) -> dict[str, Tensor]:
        """Modality -> class scores from it alone."""
        return self.model.alone(self.features, self.inputs)

"""The losses: ``nn.Module`` penalties over the functional layer. They return a scalar to add to the task loss."""

from modreg_fast.losses.attribution import AttributionDetails, AttributionLoss
from modreg_fast.losses.functional_entropy import FunctionalEntropyLoss, InformationDetails

__all__ = ["AttributionDetails", "AttributionLoss", "FunctionalEntropyLoss", "InformationDetails"]

"""The losses: ``nn.Module`` penalties over the functional layer. They return a scalar to add to the task loss."""

from modreg_fast.losses.attribution import AttributionDetails, AttributionLoss
from modreg_fast.losses.functional_entropy import FunctionalEntropyLoss, InformationDetails
from modreg_fast.losses.modality_cross_entropy import CrossEntropyDetails, ModalityCrossEntropy

__all__ = [
    "AttributionDetails",
    "AttributionLoss",
    "CrossEntropyDetails",
    "FunctionalEntropyLoss",
    "InformationDetails",
    "ModalityCrossEntropy",
]

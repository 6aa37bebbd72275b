"""Fast, exact regularizers that keep multimodal networks from leaning on one modality."""

from modreg_fast import functional
from modreg_fast.adaptive import AdaptiveWeight, QualityTarget
from modreg_fast.backends import BackendStatus, backends, use_backend
from modreg_fast.losses import AttributionDetails, AttributionLoss, FunctionalEntropyLoss, InformationDetails

__version__ = "0.1.0"

__all__ = [
    "AdaptiveWeight",
    "AttributionDetails",
    "AttributionLoss",
    "BackendStatus",
    "FunctionalEntropyLoss",
    "InformationDetails",
    "QualityTarget",
    "__version__",
    "backends",
    "functional",
    "use_backend",
]

"""Fast, exact regularizers that keep multimodal networks from leaning on one modality."""

from modreg_fast import functional
from modreg_fast.adaptive import AdaptiveWeight, QualityTarget
from modreg_fast.audit import Audit, audit
from modreg_fast.backends import BackendStatus, backends, use_backend
from modreg_fast.capture import capture
from modreg_fast.heads import ModalityHeads, ModalityLogits, each_alone
from modreg_fast.losses import (
    AttributionDetails,
    AttributionLoss,
    CrossEntropyDetails,
    FunctionalEntropyLoss,
    InformationDetails,
    ModalityCrossEntropy,
)
from modreg_fast.missing import MissingModalities, evaluate_missing

__version__ = "0.1.0"

__all__ = [
    "AdaptiveWeight",
    "AttributionDetails",
    "AttributionLoss",
    "Audit",
    "BackendStatus",
    "CrossEntropyDetails",
    "FunctionalEntropyLoss",
    "InformationDetails",
    "MissingModalities",
    "ModalityCrossEntropy",
    "ModalityHeads",
    "ModalityLogits",
    "QualityTarget",
    "__version__",
    "audit",
    "backends",
    "capture",
    "each_alone",
    "evaluate_missing",
    "functional",
    "use_backend",
]

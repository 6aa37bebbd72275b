"""The differentiable ops: what ``functional`` calls with a problem (``backends/reference/<stem>.py``) and the name of a backend."""

from modreg_fast.backends.reference import gradient_statistics as _gradient_statistics
from modreg_fast.backends.reference import modality_cross_entropy as _modality_cross_entropy
from modreg_fast.backends.reference import softmax_fisher as _softmax_fisher
from modreg_fast.ops._op import Op

__all__ = ["gradient_statistics", "modality_cross_entropy", "softmax_fisher"]

softmax_fisher = Op(_softmax_fisher)
gradient_statistics = Op(_gradient_statistics)
modality_cross_entropy = Op(_modality_cross_entropy)

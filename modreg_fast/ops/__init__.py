"""The differentiable ops: what ``functional`` calls with a problem (``backends/reference/<stem>.py``) and the name of a backend."""

from modreg_fast.backends.reference import gradient_statistics as _gradient_statistics
from modreg_fast.backends.reference import softmax_fisher as _softmax_fisher
from modreg_fast.ops._op import Op

__all__ = ["gradient_statistics", "softmax_fisher"]

softmax_fisher = Op(_softmax_fisher)
gradient_statistics = Op(_gradient_statistics)

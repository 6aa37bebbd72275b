"""Differentiable functions: validation, documentation, one call to an op each."""

from modreg_fast.functional.gradient_statistics import GradientStatistics, gradient_statistics
from modreg_fast.functional.masks import resize_mask
from modreg_fast.functional.modality_cross_entropy import ModalitySums, modality_cross_entropy
from modreg_fast.functional.penalties import balance_penalty, functional_entropy, modality_share
from modreg_fast.functional.softmax_fisher import softmax_fisher_information

__all__ = [
    "GradientStatistics",
    "ModalitySums",
    "balance_penalty",
    "functional_entropy",
    "gradient_statistics",
    "modality_cross_entropy",
    "modality_share",
    "resize_mask",
    "softmax_fisher_information",
]

"""The reference backend: the definitions in plain PyTorch, on any device. It is the truth that every other backend is held to."""

from modreg_fast.backends.reference import gradient_statistics, modality_cross_entropy, softmax_fisher

__all__ = ["gradient_statistics", "modality_cross_entropy", "softmax_fisher", "status"]


def status() -> tuple[bool, str]:
    """Always usable."""
    return True, "plain PyTorch, any device"

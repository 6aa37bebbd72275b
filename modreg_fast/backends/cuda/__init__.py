"""The CUDA C++ backend: raw ops ``modreg_fast_cuda::*`` on tensors on a GPU, built from csrc/cuda."""

from pathlib import Path

import torch

from modreg_fast.backends.cpu import status as native_status
from modreg_fast.backends.cuda import gradient_statistics, modality_cross_entropy, softmax_fisher

__all__ = ["gradient_statistics", "modality_cross_entropy", "softmax_fisher", "status"]


def status() -> tuple[bool, str]:
    """Usable where the extension was built with CUDA and torch has a GPU; with the architectures it was built for."""
    available, detail = native_status()
    if not available:
        return False, detail
    if not hasattr(torch.ops.modreg_fast_cuda, "cuda_architectures"):
        reason = Path(__file__).parents[2] / "_cuda_missing.txt"
        return False, reason.read_text().strip() if reason.exists() else "the native extension was built without CUDA"
    built_for = f"kernels for {torch.ops.modreg_fast_cuda.cuda_architectures()}"
    # Counting does not start the CUDA runtime, so that the process may still fork.
    if torch.version.hip is not None or torch.cuda.device_count() == 0:
        return False, f"{built_for}, but torch {torch.__version__} finds no NVIDIA GPU"
    return True, built_for

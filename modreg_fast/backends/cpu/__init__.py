"""The native CPU backend: raw ops ``modreg_fast_native::*`` of the extension ``modreg_fast._native``, built from csrc/."""

import os
from pathlib import Path

import torch

try:
    from modreg_fast import _native  # type: ignore[attr-defined]  # noqa: F401  (loading it registers the ops)
except ImportError as error:
    _missing: str | None = str(error)
    _reason = Path(__file__).parents[2] / "_native_missing.txt"
    if _reason.exists():
        _missing = _reason.read_text().strip()
    elif os.environ.get("MODREG_FAST_SKIP_NATIVE") == "1":
        _missing = "the native extension was skipped (MODREG_FAST_SKIP_NATIVE=1)"
else:
    _missing = None

from modreg_fast.backends.cpu import gradient_statistics, modality_cross_entropy, softmax_fisher

__all__ = ["gradient_statistics", "modality_cross_entropy", "softmax_fisher", "status"]


def status() -> tuple[bool, str]:
    """Usable where the extension loads; with the instruction set that its kernels run on."""
    if _missing is not None:
        return False, _missing
    return True, f"native kernels, {torch.ops.modreg_fast_native.cpu_instruction_set()}"

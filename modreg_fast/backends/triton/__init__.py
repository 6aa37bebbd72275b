"""The Triton backend: one kernel for the forward pass of an op over all its tensors, one for the backward pass.

Runs on GPUs; with ``TRITON_INTERPRET=1`` set before the start of Python also on CPU tensors, slowly, for tests. Triton is imported
with the first op that runs here, not with the package."""

import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

import torch

_OPS = ("gradient_statistics", "modality_cross_entropy", "softmax_fisher")
__all__ = [*_OPS, "status"]  # noqa: PLE0605  (the ops: __getattr__)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def status() -> tuple[bool, str]:
    """Usable where Triton is installed and there is a GPU, or the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: pip install 'modreg_fast[triton]'"
    version = f"Triton {importlib.metadata.version('triton')}"
    if interpreted():
        return True, f"{version}, interpreted on the CPU (TRITON_INTERPRET=1): for tests, slow"
    gpus = torch.cuda.device_count()  # does not start the CUDA runtime, so that the process may still fork
    if gpus == 0:
        return False, f"{version} needs a GPU, torch {torch.__version__} sees none; TRITON_INTERPRET=1 runs it slowly on the CPU"
    return True, f"{version}, {gpus} GPU{'s' if gpus > 1 else ''}"


def __getattr__(name: str) -> ModuleType:
    if name in _OPS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

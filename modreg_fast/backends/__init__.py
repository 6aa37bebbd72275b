"""Who computes. Each backend is a module that holds ops (``reference`` all of them), each with ``forward(problem)`` and
``backward(problem, result, upstream)`` (documented in ``backends/reference``), and ``status()``. A new backend is one folder and one
line in ``_REGISTRY``."""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from modreg_fast.backends.measured import CANDIDATES, MEASURED


class BackendStatus(NamedTuple):
    """Whether a backend is usable here, and what it runs on or why it is not.

    Example:
        >>> [name for name, status in backends().items() if status.available][-1]
        'reference'
    """

    available: bool
    detail: str


class _Entry(NamedTuple):
    devices: tuple[str, ...] | None  # device types, None for any
    module: str


# In the order of preference.
_REGISTRY = {
    "cpu": _Entry(("cpu",), "modreg_fast.backends.cpu"),
    # CPU tensors are for Triton's interpreter alone.
    "triton": _Entry(("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",), "modreg_fast.backends.triton"),
    "cuda": _Entry(("cuda",), "modreg_fast.backends.cuda"),
    "reference": _Entry(None, "modreg_fast.backends.reference"),
}
_MODULES: dict[str, ModuleType] = {name: importlib.import_module(entry.module) for name, entry in _REGISTRY.items()}
_STATUS: dict[str, BackendStatus] = {name: BackendStatus(*module.status()) for name, module in _MODULES.items()}

if not _STATUS["cpu"].available:
    _said = f"modreg_fast computes in plain PyTorch on the CPU: {_STATUS['cpu'].detail} (docs/install.md#without-a-compiler)"
    warnings.warn(_said, RuntimeWarning, stacklevel=2)

_override: str | None = None  # set by use_backend; a plain global, because torch.compile guards on it


def backends() -> dict[str, BackendStatus]:
    """Every backend with its :class:`BackendStatus`: usable here and on what, or why it is not. In the order of preference; where triton
    and cuda are both usable, each pass of an op runs on the one that was measured to be faster for its dtype, layout and channels
    (docs/gpu.md#the-faster-one).

    Example:
        >>> backends()["reference"]
        BackendStatus(available=True, detail='plain PyTorch, any device')
    """
    found = dict(_STATUS)
    if all(found[name].available for name in CANDIDATES):
        for name in CANDIDATES:
            said = f"{found[name].detail}; by default what was measured to be faster here (docs/gpu.md#the-faster-one)"
            found[name] = BackendStatus(True, said)
    return found


def _require(name: str, source: str) -> str:
    if name not in _REGISTRY:
        raise ValueError(f"{source}: backend must be one of {', '.join(map(repr, _REGISTRY))}, got {name!r}")
    if not _STATUS[name].available:
        reason = f"{_STATUS[name].detail} (docs/install.md#what-is-usable-here)"
        raise RuntimeError(f"{source}: backend {name!r} is not usable here: {reason}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op called in this block runs on backend ``name``; process-wide, like the flags of ``torch.backends``.

    An explicit ``backend=`` argument wins over it, and it wins over the environment variable ``MODREG_FAST_BACKEND``. The
    backward pass of an op runs on the backend that was chosen for its forward pass, wherever it is called.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not usable here, with the reason.

    Example:
        >>> from modreg_fast.functional import softmax_fisher_information
        >>> with use_backend("reference"):
        ...     softmax_fisher_information([[torch.zeros(1, 4)], [torch.zeros(1, 4)]])
        tensor([[[0.]],
        <BLANKLINE>
                [[0.]]])
    """
    global _override
    previous, _override = _override, _require(name, "use_backend")
    try:
        yield
    finally:
        _override = previous


def resolve(backend: str | None, tensor: Tensor, function: str, stem: str | None = None) -> str:
    """Who computes for ``tensor``: the argument, :func:`use_backend`, ``MODREG_FAST_BACKEND``, or the best for its device; ``"measured"``
    where that depends on the pass of the op ``stem``."""
    device = tensor.device.type
    name = backend or _override or _environment
    if name is None:
        for best in _REGISTRY:
            if _usable(best, device, stem):
                break
        measured = best == CANDIDATES[0] and stem is not None and all(_usable(other, device, stem) for other in CANDIDATES)
        return MEASURED if measured else best
    name = _require(str(name), function)
    devices = _REGISTRY[name].devices
    if devices is not None and device not in devices:
        raise ValueError(f"{function}: backend {name!r} takes tensors on {' or '.join(devices)}, got one on {device}")
    if not computes(name, stem):
        having = " or ".join(repr(other) for other in _REGISTRY if computes(other, stem))
        raise ValueError(f"{function}: backend must be {having}, got {name!r}, which has no {stem}")
    return name


def _usable(backend: str, device: str, stem: str | None) -> bool:
    devices = _REGISTRY[backend].devices
    return _STATUS[backend].available and (devices is None or device in devices) and computes(backend, stem)


def computes(backend: str, stem: str | None) -> bool:
    """Whether a backend has an op."""
    return stem is None or hasattr(_MODULES[backend], stem)


def implementation(backend: str, stem: str) -> ModuleType:
    """``forward`` and ``backward`` of op ``stem`` on a backend."""
    return getattr(_MODULES[backend], stem)


_environment: str | None = os.environ.get("MODREG_FAST_BACKEND") or None
if _environment is not None:
    _require(_environment, "MODREG_FAST_BACKEND")

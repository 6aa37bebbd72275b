"""Who computes: the native kernels are here, the order of preference, use_backend and the environment."""

import os
import subprocess
import sys

import pytest
import torch

import modreg_fast as mrf
from modreg_fast.backends import implementation, resolve
from modreg_fast.functional import softmax_fisher_information

X = torch.randn(2, 3, 4)


def test_native_kernels_are_built():
    """Where they are missing on purpose, say so: MODREG_FAST_SKIP_NATIVE=1."""
    status = mrf.backends()["cpu"]
    assert status.available or os.environ.get("MODREG_FAST_SKIP_NATIVE") == "1", f"native backend: {status.detail}"


def test_reference_is_always_there():
    statuses = mrf.backends()
    assert statuses["reference"].available and all(
        isinstance(status.detail, str) and status.detail for status in statuses.values()
    )


def test_the_answer_is_a_copy():
    mrf.backends().clear()
    assert mrf.backends()


def test_order_of_preference(backend, monkeypatch):
    """The argument, use_backend, the environment, the best for the device."""
    module = sys.modules["modreg_fast.backends"]  # the attribute of that name is the function
    monkeypatch.setattr(module, "_environment", None)
    available = [name for name, status in mrf.backends().items() if status.available]
    assert resolve(None, X, "test") == available[0]
    monkeypatch.setattr(module, "_environment", backend)
    assert resolve(None, X, "test") == backend
    with mrf.use_backend("reference"):
        assert resolve(None, X, "test") == "reference"
        assert resolve(backend, X, "test") == backend
        with mrf.use_backend(backend):
            assert resolve(None, X, "test") == backend
        assert resolve(None, X, "test") == "reference"
    assert resolve(None, X, "test") == backend


def test_use_backend_ends_with_an_exception(backend):
    before = resolve(None, X, "test")
    with pytest.raises(KeyError), mrf.use_backend(backend):
        raise KeyError
    assert resolve(None, X, "test") == before


def test_backward_runs_where_forward_ran(backend, monkeypatch):
    """Whatever is set when ``backward`` is called, also on the threads of autograd."""
    ran = []
    spy = lambda name, stem: ran.append(name) or implementation(name, stem)  # noqa: E731
    monkeypatch.setattr("modreg_fast.ops._op.implementation", spy)
    x = [[X.clone().requires_grad_()], [X.clone().flip(0).requires_grad_()]]
    with mrf.use_backend(backend):
        value = softmax_fisher_information(x).sum()
    with mrf.use_backend("reference"):
        value.backward()
    assert ran == [backend, backend]


def run(code, **environment):
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_environment_variable():
    code = (
        "import torch\nfrom modreg_fast.backends import resolve, use_backend\n"
        "assert resolve(None, torch.ones(1), 'x') == 'reference'\nwith use_backend('reference'): pass"
    )
    result = run(code, MODREG_FAST_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    result = run("import modreg_fast", MODREG_FAST_BACKEND="nonsense")
    assert (
        result.returncode != 0
        and "MODREG_FAST_BACKEND: backend must be one of" in result.stderr
        and "'nonsense'" in result.stderr
    )

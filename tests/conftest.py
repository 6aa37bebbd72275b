"""One fixture for all numeric tests: every backend that is usable here."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    # Without its extension the package says so once; test_backends.py is where that fails.
    warnings.filterwarnings("ignore", "modreg_fast computes in plain PyTorch", RuntimeWarning)
    import modreg_fast as mrf

# The tensors of these tests are on the CPU; the CUDA kernels have test_cuda_kernels.py and test_cuda_backend.py.
BACKENDS = [name for name, status in mrf.backends().items() if status.available and name != "cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers in whatever order the tests run; two threads, as in the smallest CI."""
    torch.manual_seed(20240607)
    torch.set_num_threads(2)

"""One fixture for all numeric tests: every backend that is usable here; under Triton's interpreter that one alone."""

import gc
import os
import tempfile
import warnings

import pytest

# Read when torch is loaded: a thread that waits leaves its core to the other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

with warnings.catch_warnings():
    # Without its extension the package says so once; test_backends.py is where that fails.
    warnings.filterwarnings("ignore", "modreg_fast computes in plain PyTorch", RuntimeWarning)
    import modreg_fast as mrf

# The tensors of these tests are on the CPU; the CUDA kernels have test_cuda_kernels.py and test_cuda_backend.py.
# Triton's interpreter has to be on before Triton is imported, for the whole process, so test_triton.py starts one for these tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [name for name, status in mrf.backends().items() if status.available and name != "cuda"]

if INTERPRETED:
    import interpreter

    interpreter.mend()
collect_ignore = [] if INTERPRETED else ["interpreted"]


def pytest_report_header() -> str:
    return f"MODREG_FAST_FUZZ_SEED={os.environ.get('MODREG_FAST_FUZZ_SEED', '0')} (test_fuzz.py, test_wrong_calls.py)"


def pytest_configure(config: pytest.Config) -> None:
    """Compiles into folders of this session: whatever earlier ones left, and each kernel once for all files and workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["TRITON_CACHE_DIR"] = f"{folder.name}/triton"
        os.environ["MODREG_FAST_TESTS_SHARED"] = folder.name  # see shared.py


def pytest_collection_finish() -> None:
    """Garbage is looked for seldom, where the PTX interpreter keeps many objects, and never among what the imports left."""
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _same_start():
    """The same random numbers in whatever order the tests run; two threads, as in the smallest CI."""
    torch.manual_seed(20240607)
    torch.set_num_threads(2)

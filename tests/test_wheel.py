"""One wheel for every torch: built beside the torch of these tests, it works under a later one, built for CUDA, without a GPU."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import modreg_fast as mrf

ROOT = Path(__file__).parents[1]
TORCH = "2.14.1"

CHECK = """
import ctypes
import torch
import modreg_fast as mrf
from modreg_fast import _native
from torch._subclasses.fake_tensor import FakeTensorMode

assert torch.__version__.startswith(VERSION) and torch.version.cuda, (torch.__version__, torch.version.cuda)
assert mrf.backends()["cpu"].available, mrf.backends()
for dtype in (torch.float32, torch.bfloat16):
    x = [torch.randn(2, 19, 33, dtype=dtype).requires_grad_() for _ in range(2)]
    f = torch.rand(2, 33)
    results = {}
    for backend in ("cpu", "reference"):
        information = mrf.functional.softmax_fisher_information([[x[0]], [x[1]]], backend=backend)
        statistics = mrf.functional.gradient_statistics([x[0]], [x[1]], [f], backend=backend)
        total = information.sum() + statistics.fisher.sum() + statistics.attribution.sum()
        results[backend] = [information, statistics.fisher, statistics.attribution, *torch.autograd.grad(total, x)]
    for a, b in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(a, b)

# A CUDA build has device type 'cuda' also where there is no GPU.
with FakeTensorMode():
    x = [torch.empty(2, 8, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    information = mrf.functional.softmax_fisher_information([[x[0]], [x[1]]])
    assert information.shape == (2, 1, 2) and information.device.type == "cuda"
    counts = torch.empty(1, 2, device="cuda", dtype=torch.int64)
    gradients = torch.ops.modreg_fast.softmax_fisher_backward(information, counts, x, [], None, [0.0, 0.0], 1, None, False, 1e-8, 1, "cuda")
    assert [g.shape for g in gradients] == [g.shape for g in x] and gradients[0].device.type == "cuda"
    statistics = mrf.functional.gradient_statistics([x[0]], [x[1]])
    assert statistics.attribution.shape == (1, 2) and statistics.attribution.device.type == "cuda"

print(mrf.backends()["cuda"].detail)
if WITH_CUDA:
    assert mrf.backends()["cuda"].available or "finds no NVIDIA GPU" in mrf.backends()["cuda"].detail
    for stem in ("softmax_fisher", "gradient_statistics"):
        for direction in ("forward", "backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"modreg_fast_native::{stem}_{direction}", "CUDA")
    ctypes.CDLL(_native.__file__).aoti_torch_get_current_cuda_stream  # found by way of what the extension is linked with
print("done")
"""


def run(*command, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not mrf.backends()["cpu"].available, reason="without the native extension the wheel holds Python alone")
def test_one_wheel_under_a_later_torch_with_cuda():
    """Takes minutes, and gigabytes for a while."""
    offered = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True)
    if TORCH not in offered.stdout.replace(",", " ").split():
        pytest.skip(f"the package index offers no torch {TORCH}: {(offered.stdout or offered.stderr).strip()[-300:]}")
    with tempfile.TemporaryDirectory() as folder:
        source, environment = Path(folder, "source"), Path(folder, "environment")
        for name in ("csrc", "modreg_fast"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_*_missing.txt"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, source)
        run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
        (wheel,) = Path(folder).glob("*.whl")
        assert "-cp310-abi3-" in wheel.name
        run(sys.executable, "-m", "venv", environment)
        run(environment / "bin/pip", "install", "--no-cache-dir", f"torch=={TORCH}", "numpy", wheel)
        with_cuda = shutil.which("nvcc") is not None
        code = f"VERSION, WITH_CUDA = {TORCH!r}, {with_cuda}\n{CHECK}"
        assert run(environment / "bin/python", "-c", code, cwd=folder).endswith("done\n")

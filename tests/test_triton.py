"""The Triton backend from outside: its status, its import, and all tests of numbers under Triton's interpreter.

The interpreter has to be on before Triton is imported, and then is for the whole process. So that no other test meets it, these run in
a pytest of their own. There ``conftest.BACKENDS`` is Triton alone, and tests/interpreted is collected too."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modreg_fast as mrf
from modreg_fast.backends import triton as backend

ROOT = Path(__file__).parent.parent
INSTALLED = importlib.util.find_spec("triton") is not None


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )


QUICK = {
    "tests/interpreted": "",
    "tests/test_softmax_fisher.py": "every_shape and dtype0 or empty_masks or nothing_valid or (every_option and 0.5-3-True-True)",
    "tests/test_gradient_statistics.py": "every_shape and dtype0 or lacks or each_output or zero_attribution or masked_out",
    "tests/test_modality_cross_entropy.py": "(every_shape and dtype0 and -2-) or range or learnt or confident or ruled_out"
    " or (every_option and 0.5-True-True and dtype0) or not_read",
    "tests/test_numerics.py": "16_bit or one_channel or one_pixel or every_channel or hard_inputs_no and -2",
}
EVERYTHING = [
    "softmax_fisher",
    "gradient_statistics",
    "modality_cross_entropy",
    "numerics",
    "layouts",
    "philox",
    "autograd",
    "gradcheck",
    "properties",
    "fuzz",
]


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("file, names", QUICK.items(), ids=QUICK)
def test_in_the_interpreter(file, names):
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", names, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_in_the_interpreter(name):
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", "-k", "triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("options", [["--backend", "triton", "--quick", "--json"]])
def test_parity_starts_the_interpreter_by_itself(options):
    result = run("-m", "modreg_fast.cli", "parity", *options, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    report = json.loads(result.stdout)
    assert report["backend"] == "triton" and report["passed"] and len(report["results"]) > 3
    assert all(0 <= row["values"] <= row["values_allowed"] for row in report["results"])


def test_status_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.status() == (False, "Triton is not installed: pip install 'modreg_fast[triton]'")


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("gpus, available, text", [(0, False, "needs a GPU"), (1, True, "1 GPU"), (4, True, "4 GPUs")])
def test_status_counts_gpus(monkeypatch, gpus, available, text):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert backend.status()[0] == available and text in backend.status()[1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.status()[0] and "interpreted" in backend.status()[1]


def test_cpu_tensors_need_the_interpreter():
    if not mrf.backends()["triton"].available:
        with pytest.raises(RuntimeError, match="'triton' is not usable here"), mrf.use_backend("triton"):
            pass


def test_the_package_does_not_import_the_kernels():
    code = "import sys, modreg_fast\nassert not any(name.startswith('modreg_fast.backends.triton.') for name in sys.modules)"
    result = run("-W", "ignore", "-c", code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr

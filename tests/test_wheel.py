"""What users install: the files of the archives, and one wheel for every torch and Python, where there is nothing but torch.

The slow tests take `dist/`, which `make wheel` fills, or build a wheel like it; `make test-wheel` runs them. They take minutes, and
gigabytes for a while."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import modreg_fast as mrf

ROOT = Path(__file__).parents[1]
LIMIT = 25_000_000  # bytes
NEWEST = ""

# Each Python from 3.10, and torch from the oldest that is supported to the newest that is served. A missing Python is a skipped test.
ENVIRONMENTS = [("3.10", "2.10.0"), ("3.11", "2.13.0"), ("3.12", "2.13.0"), ("3.13", NEWEST), ("3.14", NEWEST)]
CORE = [
    "conftest",
    "helpers",
    "oracle",
    "shared",
    "test_softmax_fisher",
    "test_functional",
    "test_losses",
]  # of tests/; they need NumPy and pytest

CHECK = """
import ctypes
import importlib.util
import shutil
import torch
import modreg_fast as mrf
from modreg_fast import _native
from torch._subclasses.fake_tensor import FakeTensorMode

assert torch.__version__.startswith(VERSION), torch.__version__
assert not any(map(shutil.which, ("c++", "g++", "cc", "clang++", "nvcc", "ninja"))) and not importlib.util.find_spec("triton")
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
if torch.version.cuda:
    with FakeTensorMode():
        x = [torch.empty(2, 8, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        information = mrf.functional.softmax_fisher_information([[x[0]], [x[1]]])
        assert information.shape == (2, 1, 2) and information.device.type == "cuda"
        counts = torch.empty(1, 2, device="cuda", dtype=torch.int64)
        options = [None, [0.0, 0.0], 1, None, False, 1e-8, 1, "cuda"]
        gradients = torch.ops.modreg_fast.softmax_fisher_backward(information, counts, x, [], *options)
        assert [g.shape for g in gradients] == [g.shape for g in x] and gradients[0].device.type == "cuda"
        statistics = mrf.functional.gradient_statistics([x[0]], [x[1]])
        assert statistics.attribution.shape == (1, 2) and statistics.attribution.device.type == "cuda"

print(mrf.backends()["cuda"].detail)
if WITH_CUDA:
    assert mrf.backends()["cuda"].available or "finds no NVIDIA GPU" in mrf.backends()["cuda"].detail
    for stem in ("softmax_fisher", "gradient_statistics"):
        for direction in ("forward", "backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"modreg_fast_cuda::{stem}_{direction}", "CUDA")
    if torch.version.cuda:
        ctypes.CDLL(_native.__file__).aoti_torch_get_current_cuda_stream  # found by way of what the extension is linked with
print("done")
"""


def run(*command, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def source(folder: Path) -> Path:
    """The sources alone, as a clone has them, in a folder of that name."""
    for name in ("csrc", "modreg_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_*_missing.txt"))
    for name in ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# ---- what is in the archives ----


def test_version_and_changelog_are_in_step():
    titles = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[:2] == ["Unreleased", mrf.__version__]


def test_the_archives_hold_the_sources_and_nothing_that_lies_about(tmp_path):
    """Without native code, which takes minutes; the name of the extension is all that it would add."""
    folder = source(tmp_path / "source")
    sources = below(folder)
    for stray in (
        "modreg_fast/_native.abi3.so",
        "modreg_fast/_cuda_missing.txt",
        "modreg_fast/notes.txt",
        "tests/test_a.py",
        "dist/x",
    ):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text("stray")
    build = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"
    listed = []
    for output in (tmp_path / "first", tmp_path / "second"):
        output.mkdir()
        run(sys.executable, "-c", build, output, cwd=folder, env={**os.environ, "MODREG_FAST_SKIP_NATIVE": "1"})
        with tarfile.open(*output.glob("*.tar.gz")) as archive:
            files = [name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()]
        with zipfile.ZipFile(*output.glob("*.whl")) as wheel:
            listed.append((files, wheel.namelist()))
    assert listed[0] == listed[1]
    files, members = map(set, listed[0])
    assert {name for name in files if ".egg-info/" not in name} == sources | {"PKG-INFO", "setup.cfg"}
    information = {name for name in members if ".dist-info/" in name}
    assert members - information == {name for name in sources if name.startswith("modreg_fast/")}
    kept = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    assert information == {f"modreg_fast-{mrf.__version__}.dist-info/{name}" for name in kept}


# ---- the wheel ----


def test_the_extension_loads_with_glibc_2_28():
    """The wheel's tag says so, on whatever system it is built: see glibc.cpp."""
    if not mrf.backends()["cpu"].available:
        pytest.skip("there is no native extension")
    found = re.findall(rb"GLIBC_2\.(\d+)", Path(importlib.import_module("modreg_fast._native").__file__).read_bytes())
    assert max(map(int, found), default=0) <= 28


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if not mrf.backends()["cpu"].available:
        pytest.skip("without the native extension the wheel holds Python alone")
    if not (found := list((ROOT / "dist").glob("*.whl"))):
        folder = tmp_path_factory.mktemp("wheel")
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--wheel-dir",
            folder,
            source(folder / "source"),
        )
        found = list(folder.glob("*.whl"))
    (file,) = found
    return file


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel):
    assert wheel.stat().st_size < LIMIT
    with zipfile.ZipFile(wheel) as archive:
        members = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    expected = {
        str(file.relative_to(ROOT)) for file in (ROOT / "modreg_fast").rglob("*") if file.suffix in (".py", ".typed", ".html")
    }
    assert members == expected | {"modreg_fast/_native.abi3.so"}
    assert wheel.name.startswith(f"modreg_fast-{mrf.__version__}-cp310-abi3-")
    if wheel.parent == ROOT / "dist":
        assert wheel.name.endswith("-cp310-abi3-manylinux_2_28_x86_64.whl")


@pytest.mark.slow
@pytest.mark.parametrize("python, torch", ENVIRONMENTS)
def test_with_nothing_but_torch(python, torch, wheel, tmp_path):
    """No compiler, no nvcc, no ninja, no Triton: import without a warning, both ops, parity, and the core of these tests."""
    program = shutil.which(f"python{python}")
    if program is None or subprocess.run([program, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no python{python}")
    environment = tmp_path / "environment"
    run(program, "-I", "-m", "venv", environment)
    pip = (environment / "bin/python", "-I", "-m", "pip")
    run(*pip, "install", "--no-cache-dir", f"torch=={torch}" if torch else "torch", wheel)
    run(*pip, "uninstall", "--yes", "triton")
    clean = {"PATH": str(environment / "bin"), "HOME": str(tmp_path)}
    run(environment / "bin/python", "-W", "error", "-c", "import modreg_fast", cwd=tmp_path, env=clean)
    code = f"VERSION, WITH_CUDA = {torch!r}, {shutil.which('nvcc') is not None}\n{CHECK}"
    assert run(environment / "bin/python", "-c", code, cwd=tmp_path, env=clean).endswith("done\n")
    report = json.loads(run(environment / "bin/modreg-fast", "parity", "--quick", "--json", cwd=tmp_path, env=clean))
    assert report["backend"] == "cpu" and report["passed"]

    run(*pip, "install", "--no-cache-dir", "pytest")
    (tmp_path / "tests").mkdir()
    for name in CORE:
        shutil.copy(ROOT / "tests" / f"{name}.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tested = run(environment / "bin/python", "-m", "pytest", "-q", cwd=tmp_path, env=clean)
    assert re.search(r"\d{3,} passed in", tested), tested[-500:]


# ---- from source ----


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "not isolated"])
def test_install_from_source(isolation, tmp_path):
    """An isolated build takes a torch of its own, the newest; the result works under the one that is here."""
    folder = source(tmp_path / "source")
    run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", *isolation, "--target", tmp_path / "target", folder
    )
    code = "import modreg_fast as mrf; print(mrf.__file__); assert mrf.backends()['cpu'].available, mrf.backends()"
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "target")}}
    assert run(sys.executable, "-W", "error", "-c", code, **options).startswith(str(tmp_path / "target"))

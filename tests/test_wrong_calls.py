"""Wrong calls of every public function and of the raw ops end in an exception: no crash, no hang, nothing that goes through.

They are made in child processes (``wrong_calls.py``), whose last line names the call that crashed or hung. MODREG_FAST_FUZZ_SEED=n makes
others; ``python tests/wrong_calls.py 17 18 0`` repeats call 17 of seed 0."""

import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest
import torch
import wrong_calls

import modreg_fast as mrf

ROOT = Path(__file__).parent.parent


def faults(first, last):
    """What went wrong in the calls of these numbers."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/wrong_calls.py"), *map(str, (first, last, fuzzing.SEED))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 + (last - first))
        output, ending = run.stdout, f"exit status {run.returncode}: {run.stderr[-1500:]}"
    except subprocess.TimeoutExpired as hung:
        output, ending = (hung.stdout or b"").decode(), "no end"
    lines = output.splitlines()
    found = [line for line in lines if line.startswith("!")]
    return found if lines and lines[-1] == "done" else [*found, f"{lines[-1:]}: {ending}"]


@pytest.mark.skipif(not mrf.backends()["cpu"].available, reason="the raw ops are those of the native extension")
def test_wrong_calls():
    assert not faults(0, 400)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 2500))
def test_ten_thousand_wrong_calls(first):
    assert not faults(first, first + 2500)


def test_every_public_function_is_called():
    """And every raw op, so that a new one cannot be forgotten."""
    called = {name.split(".")[-1] for name in wrong_calls.targets()}
    records = {"AttributionDetails", "Audit", "BackendStatus", "GradientStatistics", "InformationDetails", "MissingModalities"}
    records |= {"CrossEntropyDetails", "ModalityLogits", "ModalitySums"}
    public = {name for space in (mrf, mrf.functional) for name in space.__all__ if callable(getattr(space, name))}
    assert public - records - {"backends"} <= called  # backends() has no arguments
    raw = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("modreg_fast_native::")}
    raw = {name.split("::")[1] for name in raw} - {"cpu_instruction_set", "cuda_architectures"}
    assert raw <= called

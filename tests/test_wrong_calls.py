"""Wrong calls of the public functions and of the raw ops end in an exception: no crash, no hang, nothing that goes through.

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

HERE, PACKAGE = Path(__file__).parent, Path(mrf.__file__).parents[1]


def faults(first, last):
    """What went wrong in the calls of these numbers."""
    command = [sys.executable, "-W", "ignore", str(HERE / "wrong_calls.py"), *map(str, (first, last, fuzzing.SEED))]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "2"}
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


RECORDS = {
    *("Audit", "AttributionDetails", "BackendStatus", "CrossEntropyDetails", "GradientStatistics", "InformationDetails"),
    *("MissingModalities", "ModalityLogits", "ModalitySums"),
}


@pytest.mark.skipif(not mrf.backends()["cpu"].available, reason="the raw ops are those of the native extension")
def test_every_public_function_and_every_op_is_called():
    """So that a new one cannot be forgotten."""
    called = set(wrong_calls.targets())
    public = {name for space in (mrf, mrf.functional) for name in space.__all__ if callable(getattr(space, name))}
    assert public - RECORDS - {"backends"} <= called  # backends() has no arguments
    ops = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    native = {f"native.{name.split('::')[1]}" for name in ops if name.startswith("modreg_fast_native::")}
    custom = {f"custom.{name}" for name in mrf.ops.__all__}
    without_arguments = {"native.cpu_instruction_set", "native.cuda_architectures"}
    assert native - without_arguments | custom <= called

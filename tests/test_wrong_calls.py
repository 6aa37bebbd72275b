"""Wrong calls of the public functions and of the raw ops end in an exception: no crash, no hang, nothing that goes through.

They are made in child processes (``wrong_calls.py``), whose last line names the call that crashed or hung. MODREG_FAST_FUZZ_SEED=n makes
others; ``python tests/wrong_calls.py 17 18 0`` repeats call 17 of seed 0."""

import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

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

"""NVIDIA's own tools around ``work``: compute-sanitizer, and Nsight Compute for the bytes that reach memory."""

import csv
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu_validate.runner import python
from benchmarks.gpu_validate.work import OPS, Work, large, ops_of

SANITIZERS = ("memcheck", "racecheck", "initcheck")
MOST_BYTES = 1.1  # over those that must move: at the end of a pass caches are still to be written back, and counters err a little
_METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}
_WORK = ("-m", "benchmarks.gpu_validate.work")


def tool(name: str, dry_run: bool) -> str | None:
    """Its path, on PATH or in the usual folder; None where there is none, and in a dry run, where there is nothing to watch."""
    return None if dry_run else shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def sanitize(program: str | None, check: str, backend: str, flags: list[str]) -> tuple[int, str]:
    """Exit code and output. Without the program the calls run alone."""
    # Each tensor in an allocation of its own, or an access past its end stays within torch's cached block.
    prefix = [program, "--tool", check, "--error-exitcode", "9"] if program else []
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *prefix, *python(*_WORK, backend, *flags)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout + done.stderr


def profile(program: str, backend: str, op: str, flags: list[str]) -> list[dict[str, Any]]:
    """Bytes by pass, of ncu's; ``PermissionError`` where the driver keeps the counters from users."""
    kernels = f"regex:({'|'.join(OPS)}|_forward_kernel|_reduce_kernel|_count_kernel|_backward_kernel)"
    options = ["--csv", "--print-units", "base", "--metrics", ",".join(_METRICS), "--kernel-name", kernels]
    command = [program, *options, *python(*_WORK, backend, "--op", op, *flags)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise PermissionError("the driver lets only administrators read performance counters (ERR_NVGPUCTRPERM)")
    if done.returncode:
        raise RuntimeError(f"{Path(program).name} ended with exit code {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    return by_pass(done.stdout)


def by_pass(output: str) -> list[dict[str, Any]]:
    """``pass``, ``read`` and ``written``, from what ``ncu --csv`` prints between its own lines."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    sums = {mode: {"pass": mode, "read": 0.0, "written": 0.0} for mode in ("forward", "backward")}
    for row in csv.DictReader(lines):
        mode = "backward" if "backward" in row["Kernel Name"] or "_count_kernel" in row["Kernel Name"] else "forward"
        sums[mode][_METRICS[row["Metric Name"]]] += float(row["Metric Value"].replace(",", ""))
    return list(sums.values())


def bytes_moved(program: str | None, backend: str, dry_run: bool) -> list[dict[str, Any]]:
    """By op and pass, beside what must move. In a dry run the CUDA kernels' loads and stores, as the PTX interpreter counts them."""
    rows = []
    for op in ops_of(backend):
        call = large(op, backend, dry_run)
        for row in _interpret(call) if program is None else profile(program, backend, op, ["--dry-run"] if dry_run else []):
            least = call.bytes_of(row["pass"])
            rows.append({"op": op, **row, "must move": least, "times": round((row["read"] + row["written"]) / least, 4)})
    return rows


def _interpret(call: Work) -> list[dict[str, Any]]:
    from benchmarks.gpu_validate import interpreted

    interpreted.REPORTS.clear()
    call()
    reports = zip(("forward", "backward"), interpreted.REPORTS, strict=True)
    return [{"pass": mode, "read": report.loads.distinct, "written": report.stores.distinct} for mode, report in reports]

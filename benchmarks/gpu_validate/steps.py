"""What is done, step by step. As a command, one step: ``python -m benchmarks.gpu_validate.steps NAME [--dry-run] FINDINGS.json``."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import modreg_fast
from benchmarks.gpu_validate import checks, tools
from benchmarks.gpu_validate.runner import Step, python
from benchmarks.gpu_validate.work import odd_works, ops_of
from modreg_fast import parity
from modreg_fast.backends import computes
from modreg_fast.bench.results import Row

ROOT = Path(__file__).parents[2]
BACKENDS = ("triton", "cuda")


CHANNELS = {"square-16": 64, "square-8": 64, "deliver-4": 25, "wide": 512}  # of the shapes of speed.py that measured.py knows
COMPILING = 4  # processes that fill Triton's cache


def plan(dry_run: bool, scratch: Path, only: Sequence[str] = ()) -> list[Step]:
    """``scratch``: an empty folder for what the steps of a dry run share. ``only``: names of steps, or their first words; ``ValueError``
    for what is none. What takes much of a GPU's memory runs one at a time, what is timed or counts for the whole GPU alone."""
    names = ["environment", "tests", *(f"compile triton {part}" for part in range(COMPILING)), "compile torch"]
    for what in ("parity", "bits", "graph", "offsets", "sanitizers", "bytes"):
        names += [f"{what} {backend}" for backend in BACKENDS]
    names += ["speed", "small"]
    unknown = [name for name in only if not any(name in (known, known.partition(" ")[0]) for known in names)]
    if unknown:
        raise ValueError(f"--only must name some of {', '.join(names)}, or their first words, got {', '.join(unknown)}")
    names = [name for name in names if not only or name in only or name.partition(" ")[0] in only]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    interpreted = {**environment, "MODREG_FAST_DRY_RUN": str(scratch), "CUDA_VISIBLE_DEVICES": ""} if dry_run else environment
    flags = ["--dry-run"] if dry_run else []
    steps = []
    for name in names:
        what = name.partition(" ")[0]
        triton = {"TRITON_INTERPRET": "1"} if dry_run and name.endswith("triton") else {}
        command = python("-m", "benchmarks.gpu_validate.steps", name, *flags)
        group = "memory" if what == "offsets" or name == "compile torch" else ""
        steps.append(Step(name, command, interpreted | triton, alone=what in ("bytes", "speed", "small"), group=group))
    return steps


@dataclasses.dataclass
class Findings:
    """As ``runner.Step`` describes them."""

    summary: str
    failures: list[str] = dataclasses.field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    absent: bool = False


@dataclasses.dataclass(frozen=True)
class Where:
    """What a step may ask for. ``device`` is of the tensors."""

    backend: str
    dry_run: bool
    seconds: float = 1800.0  # that the step has

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def flags(self) -> list[str]:
        return ["--dry-run"] if self.dry_run else []


def environment(where: Where) -> Findings:
    rows = [{"what": "python", "is": platform.python_version()}, {"what": "system", "is": platform.platform()}]
    rows += [{"what": "modreg_fast", "is": modreg_fast.__version__}, {"what": "torch", "is": torch.__version__}]
    triton = importlib.util.find_spec("triton")
    rows.append({"what": "triton", "is": importlib.metadata.version("triton") if triton else "absent"})
    rows.append({"what": "CUDA of torch", "is": torch.version.cuda or "none"})
    gpu = "none"
    if torch.cuda.device_count():
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        gpu += f", {properties.multi_processor_count} multiprocessors"
    rows.append({"what": "GPU", "is": gpu})
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"],
        "nvcc": ["nvcc", "--version"],
        "compute-sanitizer": [tools.tool("compute-sanitizer", False) or "compute-sanitizer", "--version"],
        "ncu": [tools.tool("ncu", False) or "ncu", "--version"],
    }.items():
        rows.append({"what": name, "is": _last_line(command)})
    for name, status in modreg_fast.backends().items():
        rows.append({"what": f"backend {name}", "is": f"{'usable' if status.available else 'not usable'}: {status.detail}"})
    unusable = [b for b in BACKENDS if not modreg_fast.backends()[b].available]
    failures = [f"backend {b} is not usable: {modreg_fast.backends()[b].detail}" for b in unusable if not where.dry_run]
    return Findings(gpu if gpu != "none" else "no GPU", failures, {"environment": rows})


def _last_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "absent"
    lines = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout.strip().splitlines()
    return lines[-1] if lines else "prints no version"


def tests(where: Where) -> Findings:
    """The tests that need a GPU; in a dry run they skip, which is no failure, and the others of the file run. Of the second derivatives
    those on the GPU, whose kernels are others than on the CPU (cuDNN, fast attention)."""
    files = ["tests/test_cuda_backend.py", "tests/test_second_derivatives.py", "-k", "cuda"]
    done = subprocess.run(
        python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    print(done.stdout, done.stderr)
    return Findings(
        lines[-1].strip("= "), [] if done.returncode == 0 else [x for x in lines if re.match("FAILED|ERROR", x)] or lines[-1:]
    )


def parity_of(where: Where) -> Findings:
    problems = [problem for problem in parity.problems(where.dry_run) if computes(where.backend, problem.op)]
    results = [parity.check(problem, where.backend, torch.device(where.device)) for problem in problems]
    failed = [
        f"{r.op} {r.dtype} {r.shape} {r.options}: {r.values:.1e}, gradients {r.gradients:.1e}" for r in results if not r.passed
    ]
    rows = [{**dataclasses.asdict(r), "shape": "x".join(map(str, r.shape)), "passed": r.passed} for r in results]
    worst = max(results, key=lambda r: r.values / r.values_allowed)
    summary = f"{len(results) - len(failed)} of {len(results)} within what is allowed; worst error of values {worst.values:.0e}"
    return Findings(summary, failed, {"relative errors against float64": rows})


def bits(where: Where) -> Findings:
    works = odd_works(where.backend, where.device)
    repeats = 2 if where.dry_run else 100
    return Findings(f"{len(works)} calls, {repeats} times each", [x for w in works for x in checks.differing(w, repeats)])


def graph(where: Where) -> Findings:
    works = odd_works(where.backend, where.device)
    replays = 1 if where.dry_run else 5
    captured = "not captured, there is no GPU" if where.dry_run else f"captured, {replays} replays on new data"
    return Findings(f"{len(works)} calls, {captured}", [x for w in works for x in checks.differing_from_graph(w, replays)])


def offsets(where: Where) -> Findings:
    pixels = 24 if where.dry_run else checks.pixels_that_fit(torch.cuda.mem_get_info()[0])
    if pixels is None:
        return Findings("too little free memory for more than 2^31 elements in a sample", absent=True)
    wrong = []
    for op in ops_of(where.backend):
        for layout in ("pixels", "channels"):
            wrong += checks.beyond_31_bits(op, where.backend, where.device, layout, pixels)
            if not where.dry_run:
                torch.cuda.empty_cache()
    what = "a stride beyond 2^31" if where.dry_run else f"{2 * checks.CHANNELS * pixels:,} elements a tensor"
    return Findings(f"{what}, bfloat16, all ops, both layouts", wrong)


def sanitizers(where: Where) -> Findings:
    program = tools.tool("compute-sanitizer", where.dry_run)
    if program is None and not where.dry_run:
        return Findings("compute-sanitizer is not on PATH", absent=True)
    failures, summaries = [], []
    for check in tools.SANITIZERS if program else ("no tool",):
        code, text = tools.sanitize(program, check, where.backend, where.flags)
        print(text)
        lines = [line.strip("= ") for line in text.splitlines() if program is None or line.startswith("=========")]
        summaries.append(f"{check}: {lines[-1] if lines else 'prints nothing'}")
        if code:
            failures += [f"{check}: exit code {code}", *lines[-20:]]
    if program is None and not failures:
        return Findings("no compute-sanitizer in a dry run; the calls that it would watch ran alone", absent=True)
    return Findings("; ".join(summaries), failures)


def bytes_moved(where: Where) -> Findings:
    program = tools.tool("ncu", where.dry_run)
    if program is None and not (where.dry_run and where.backend == "cuda"):
        return Findings("Nsight Compute (ncu) is not on PATH" if not where.dry_run else "no ncu in a dry run", absent=True)
    try:
        rows = tools.bytes_moved(program, where.backend, where.dry_run)
    except PermissionError as error:
        return Findings(str(error), absent=True)
    failures = [f"{r['op']} {r['pass']}: {r['times']} times" for r in rows if not 0.9 <= r["times"] <= tools.MOST_BYTES]
    by = "ncu" if program else "the PTX interpreter"
    summary = f"at most {max(r['times'] for r in rows):.2f} times the bytes that must move; counted by {by}"
    return Findings(summary, failures, {"bytes": rows})


def compiling(where: Where) -> Findings:
    """Of the steps of that name each a share, for the steps that time."""
    from benchmarks.gpu_validate.speed import compile_share

    what, _, part = where.backend.partition(" ")
    mine = ("cpu",) if where.dry_run else (what,) if what == "triton" else ("compile",)
    done, failures = compile_share(int(part or 0), COMPILING if part else 1, mine, where.dry_run)
    return Findings(f"{done} calls, for the caches of the compilers", failures)


def speed(where: Where) -> Findings:
    from benchmarks.gpu_validate.speed import measure

    *_, (rows, failures, left_out) = measure(where.dry_run, where.seconds - 20)
    ours = [r for r in rows if r.provider in BACKENDS or where.dry_run and r.provider == "cpu"]
    shares = [r.copy_share for r in ours if r.mode == "forward"]
    summary = (
        f"forward at {min(shares):.0%} to {max(shares):.0%} of the bandwidth of a copy" if shares else "nothing was measured"
    )
    if left_out:
        summary += f"; left out: {'; '.join(left_out)}"
    return Findings(summary, failures, {"speed": [dataclasses.asdict(r) for r in rows], "the faster one": faster(rows)})


def faster(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What ``modreg_fast/backends/measured.py`` holds: milliseconds of both, by op, pass, bytes of an element, layout, channels."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row.provider in BACKENDS and row.mode != "both" and row.samples == 0 and row.shape in CHANNELS:
            size = 4 if row.dtype == "float32" else 2
            found.setdefault((row.op, row.mode, size, row.layout, CHANNELS[row.shape]), {})[row.provider] = row.median_ms
    titles = ("op", "pass", "bytes", "layout", "channels")
    return [{**dict(zip(titles, key, strict=True)), **times} for key, times in found.items() if len(times) == len(BACKENDS)]


def small(where: Where) -> Findings:
    from benchmarks.gpu_validate.speed import small as measure

    rows = measure(where.dry_run)
    return Findings(f"{len(rows)} rows, microseconds", [], {"small calls": rows})


STEPS: dict[str, Callable[[Where], Findings]] = {
    "environment": environment,
    "tests": tests,
    "parity": parity_of,
    "bits": bits,
    "graph": graph,
    "offsets": offsets,
    "sanitizers": sanitizers,
    "bytes": bytes_moved,
    "compile": compiling,
    "speed": speed,
    "small": small,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("findings", type=Path)
    options = parser.parse_args()
    what, _, backend = options.name.partition(" ")
    if options.dry_run:
        from benchmarks.gpu_validate import interpreted

        interpreted.prepare(backend)
    torch.manual_seed(0)
    found = STEPS[what](Where(backend, options.dry_run, float(os.environ.get("GPU_VALIDATE_SECONDS", "1800"))))
    options.findings.write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()

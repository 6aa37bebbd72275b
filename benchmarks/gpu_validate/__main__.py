"""The command. Exit codes: 0 all steps that could run passed, 1 one failed or crashed, 2 there is no GPU and no ``--dry-run``."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_validate import page
from benchmarks.gpu_validate.runner import passed, run
from benchmarks.gpu_validate.steps import plan
from modreg_fast import _output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_validate", description="Checks and times both GPU backends on this machine."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same steps without a GPU, in interpreters; no figure means anything"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu_validate_output"),
        metavar="DIR",
        help="folder for the report (default %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="STEP", help="names of steps, such as 'parity triton', or their first words"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="for all: what does not fit is left out or stopped (default: as long as it takes)",
    )
    options = parser.parse_args(arguments)
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if not options.dry_run and (torch.version.cuda is None or torch.cuda.device_count() == 0):
        print(
            f"gpu_validate: torch {torch.__version__} finds no NVIDIA GPU here; --dry-run goes through the same steps on the CPU",
            file=sys.stderr,
        )
        return 2
    try:
        _output.folder(options.output)
    except OSError as error:
        print(f"gpu_validate: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        try:
            steps = plan(options.dry_run, Path(scratch), options.only)
        except ValueError as error:
            parser.error(str(error))
        workers = max(2, (os.cpu_count() or 2) - 2)
        outcomes = run(steps, workers, options.minutes, lambda done: page.write(done, options.output, options.dry_run))
    print(f"\nreport: {options.output / 'report.html'}, {options.output / 'report.json'}")
    return 0 if passed(outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("gpu_validate: interrupted", file=sys.stderr)
        sys.exit(130)

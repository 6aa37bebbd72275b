"""Benchmarks: times of every provider in turns with a plain copy of memory, memory, errors; tables, files and pictures of them.

``modreg-fast bench``, or ``python -m modreg_fast.bench``. Needs rich and matplotlib: ``pip install 'modreg_fast[examples]'``."""

import argparse
import sys
from pathlib import Path

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SHAPE", help="everything of these shapes, instead of the default set"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes (or those of --only) and rounds, without torch.compile")
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N", help="numbers of threads to measure with (default: torch's)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write results.csv, results.json and the pictures")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print the ratios to the results.json of another run")


def main(args: argparse.Namespace) -> int:
    """Runs what ``add_arguments`` parsed; 0, or 2 for arguments that do not fit."""
    try:
        from modreg_fast.bench.run import run
    except ModuleNotFoundError as error:
        print(f"bench: needs {error.name}, which is not installed: pip install 'modreg_fast[examples]'", file=sys.stderr)
        return 2
    try:
        run(only=args.only, quick=args.quick, threads=args.threads, output=args.output, compare=args.compare)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0

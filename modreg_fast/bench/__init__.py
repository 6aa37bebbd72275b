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
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on stdout, and the tables on stderr")


def main(args: argparse.Namespace) -> int:
    """Runs what ``add_arguments`` parsed: 0, 1 without the extra or where a result cannot be written, 2 for arguments that do not fit."""
    try:
        from modreg_fast.bench.run import run
    except ModuleNotFoundError as error:
        print(f"modreg-fast bench: needs the package {error.name}: pip install 'modreg_fast[examples]'", file=sys.stderr)
        return 1
    try:
        return run(
            only=args.only, quick=args.quick, threads=args.threads, output=args.output, compare=args.compare, as_json=args.json
        )
    except (ValueError, OSError) as error:
        print(f"modreg-fast bench: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2

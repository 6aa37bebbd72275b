"""``python -m benchmarks.study``: trains what is missing in ``<output>/study/runs.csv``, then writes ``<output>/study.md``."""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.study import report, runs, watch
from benchmarks.study.data import DATA

QUICK_METHODS = ("joint", "dropout", "feature, log", "attribution, L1", "each alone")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("study_output"), help="folder (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two seeds, few methods, few steps: shows that all works, no more")
    options = parser.parse_args(arguments)

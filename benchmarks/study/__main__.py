"""Trains what is missing in <output>/study/runs.csv, then writes the page <output>/study.md. A stopped run goes on where it was."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.study import cost, report, runs
from benchmarks.study.analyse import Study
from benchmarks.study.data import LARGE
from benchmarks.study.methods import METHODS
from benchmarks.study.watch import watch
from modreg_fast._output import folder as make_folder
from modreg_fast._output import to_json, write

SEEDS, QUICK_SEEDS = 5, 2
WATCHED = ("generated", "indian pines", "home tasks")
TIMED = ("indian pines", "digits", *LARGE)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("study_output"), help="folder (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds and {len(runs.GAP_METHODS)} methods")
    options = parser.parse_args(arguments)
    folder = options.output / "study"
    make_folder(folder)
    console = Console(stderr=True)

    methods = runs.GAP_METHODS if options.quick else tuple(METHODS)
    wanted = runs.grid(QUICK_SEEDS if options.quick else SEEDS, methods)
    done = runs.read(folder / "runs.csv")
    with _progress(console) as progress:
        task = progress.add_task("trainings", total=len(wanted), completed=sum(run in done for run in wanted))
        rows = runs.finish(folder / "runs.csv", wanted, options.workers, advance=lambda: progress.advance(task))

    with console.status("one training seen from inside, and the time of a step"):
        page = report.write(options.output, Study(rows), **_inside(folder / "inside.json", methods))
    console.print(f"Wrote {page}", markup=False, emoji=False)


def _inside(path: Path, methods: Sequence[str]) -> dict[str, Any]:
    """What ``path`` holds, measured where it does not."""
    timed = {name: [m for m in methods if name not in LARGE or m in runs.LARGE_METHODS] for name in TIMED}
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if set(found["milliseconds"]) == set(timed) and all(
            set(timed[name]) <= set(x) for name, x in found["milliseconds"].items()
        ):
            return found
    watched = {name: watch(name, "predictions") for name in WATCHED}
    milliseconds = {name: cost.milliseconds(name, listed) for name, listed in timed.items()}
    write(path, to_json({"watched": watched, "milliseconds": milliseconds}, indent=1))
    return {"watched": watched, "milliseconds": milliseconds}


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left")
    return Progress(*columns, TimeRemainingColumn(), console=console)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("study: interrupted; the trainings that have ended are kept", file=sys.stderr)
        sys.exit(130)

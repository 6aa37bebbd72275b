"""The run behind the command: cases, one after the other, then tables, files, pictures and comparison."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from modreg_fast._output import deliver, folder, write
from modreg_fast.bench import plots, report
from modreg_fast.bench.cases import Case, select
from modreg_fast.bench.measure import Copy, measure
from modreg_fast.bench.results import Row, json_of, read_json, rows, write_csv

_BUDGET, _QUICK_BUDGET = 1.0, 0.3  # seconds of rounds per case


def run(
    *,
    only: Sequence[str] = (),
    quick: bool = False,
    threads: Sequence[int] | None = None,
    output: Path | None = None,
    compare: Path | None = None,
    as_json: bool = False,
) -> int:
    """What the command does; the arguments are its options. Raises ValueError for a wrong one and OSError for a folder that cannot be
    written to, before anything is measured. Returns 0, or 1 where a result could not be written."""
    cases = select(only, quick)
    counts = threads or [torch.get_num_threads()]
    if min(counts) < 1:
        raise ValueError(f"--threads must be at least 1, got {min(counts)}")
    old = read_json(compare) if compare else None
    if output:
        folder(output)

    where = report.console(stderr=as_json)
    measured = _measure(cases, counts, _QUICK_BUDGET if quick else _BUDGET)
    steps: list[Callable[[], object]] = [lambda: report.print_run(measured, where)]
    if output:
        steps.append(lambda: _save(measured, output, where))
    if old is not None:
        steps.append(lambda: report.print_comparison(old, measured, where))
    if as_json:
        steps.append(lambda: print(json_of(measured), end="", flush=True))
    return deliver("modreg-fast bench", *steps)


def _save(measured: list[Row], output: Path, where: Console) -> None:
    write_csv(measured, output / "results.csv")
    write(output / "results.json", json_of(measured))
    report.print_files([output / "results.csv", output / "results.json", *plots.save(measured, output)], where)


def _measure(cases: list[Case], counts: Sequence[int], budget: float) -> list[Row]:
    before = torch.get_num_threads()
    copy = Copy()
    measured: list[Row] = []
    try:
        with report.progress() as bar:
            task = bar.add_task("", total=len(cases) * len(counts))
            for case in cases:
                for count in counts:
                    bar.update(task, description=str(case))
                    torch.set_num_threads(count)
                    results, copying = measure(case, copy, budget=budget)
                    measured += rows(case, results, copying, copy.bytes)
                    bar.advance(task)
    finally:
        torch.set_num_threads(before)
    return measured

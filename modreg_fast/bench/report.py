"""What the terminal shows: progress, the tables of a run, and the ratios to another run."""

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from modreg_fast.bench.cases import BASELINES, PASSES
from modreg_fast.bench.figures import figures
from modreg_fast.bench.results import Row

_CACHE = 128 * 2**20  # inputs below this may stay in the last-level cache, which a copy of memory never does


def console(stderr: bool) -> Console:
    """As wide as the terminal, and wide enough for the tables."""
    return Console(stderr=stderr, width=max(Console().width, 150))


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, transient=True, console=Console(stderr=True))


def print_run(rows: list[Row], where: Console) -> None:
    """The tables of a run, one per op."""
    for op, of_op in groupby(sorted(rows, key=lambda row: row.op, reverse=True), key=lambda row: row.op):
        where.print(_table(op, list(of_op)))
    copies = [row.copy_gb_per_s for row in rows]
    first = rows[0]
    where.print(f"{first.device}; {first.versions}")
    where.print(f"copy: {min(copies):.1f} to {max(copies):.1f} GB/s, read and written, by the case it was measured in turns with")
    where.print("x eager, x compile: times faster than it. Peak memory: beyond that before the pass; and over the inputs.")
    where.print("* the inputs may stay in the cache between calls, so the share of copy can exceed 100 %")
    found = figures(rows)
    if found:
        table = Table(title="across rows", title_justify="left", show_header=False)
        for name, value in found:
            table.add_row(name, value)
        where.print(table)


def _table(op: str, rows: list[Row]) -> Table:
    table = Table(title=op, title_justify="left")
    table.add_column("shape")
    table.add_column("mode")
    table.add_column("provider")
    for heading in ("ms", "± IQR", "x eager", "x compile", "MB moved", "GB/s", "of copy", "peak MB", "of inputs", "rel. error"):
        table.add_column(heading, justify="right", no_wrap=True)
    several = len({row.threads for row in rows}) > 1
    for _, of_case in groupby(rows, key=lambda row: (row.case, row.threads)):
        shown = ("", "")
        for row in of_case:
            name = f"{row.case}, {row.threads} thread{'s' if row.threads > 1 else ''}" if several else row.case
            current = (name, row.mode)
            table.add_row(
                "" if current[0] == shown[0] else current[0],
                "" if current == shown else current[1],
                row.provider,
                _digits(row.median_ms),
                _digits(row.spread_ms),
                _ratio(row.ratio_eager),
                _ratio(row.ratio_compile),
                _digits(row.bytes / 1e6),
                _digits(row.gb_per_s),
                f"{row.copy_share:.0%}{'*' if row.bytes < _CACHE * PASSES[row.mode] else ''}",
                _digits(row.peak_bytes / 1e6),
                _digits(row.peak_fraction),
                f"{row.relative_error:.0e}",
                style=None if row.provider in BASELINES else "bold",
            )
            shown = current
        table.add_section()
    return table


def print_comparison(old: list[Row], new: list[Row], where: Console) -> None:
    """New over old time of every row that both runs hold."""
    before = {row.key: row for row in old}
    shared = [(before[row.key], row) for row in new if row.key in before]
    table = Table(title="compared with the old run: below 1 is faster now", title_justify="left")
    for heading in ("op", "shape", "threads", "mode", "provider"):
        table.add_column(heading)
    for heading in ("old ms", "new ms", "new / old", "old of copy", "new of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for a, b in shared:
        ratio = b.median_ms / a.median_ms
        cells = [_digits(a.median_ms), _digits(b.median_ms), f"{ratio:.2f}", f"{a.copy_share:.0%}", f"{b.copy_share:.0%}"]
        # Colour only what the spread of the two runs does not explain.
        certain = abs(b.median_ms - a.median_ms) > a.spread_ms + b.spread_ms
        style = None if not certain else "green" if ratio < 1 else "red"
        table.add_row(b.op, b.case, str(b.threads), b.mode, b.provider, *cells, style=style)
    where.print(table)
    where.print(
        f"{len(shared)} rows in both runs, {len(new) - len(shared)} only in the new, {len(old) - len(shared)} only in the old one"
    )
    if old and old[0].device != new[0].device:
        where.print(f"different machines: {old[0].device} before, {new[0].device} now", style="yellow")


def print_files(paths: Iterable[object], where: Console) -> None:
    where.print("written:", *paths, soft_wrap=True, markup=False, emoji=False)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _digits(value: float) -> str:
    """Three digits or more."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"

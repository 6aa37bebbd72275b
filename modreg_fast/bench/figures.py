"""Figures that take more than one row: a dtype against another, draws against single passes, threads, and cost over size."""

from collections.abc import Iterator
from dataclasses import replace

from modreg_fast.bench.cases import BASELINES
from modreg_fast.bench.results import Row
from modreg_fast.bench.shapes import SHAPES, SWEEP

_Found = dict[tuple[str | int, ...], Row]  # by key


def figures(rows: list[Row]) -> list[tuple[str, str]]:
    """Description and value of every figure of our backends that the rows allow."""
    found = {row.key: row for row in rows}
    own = [row for row in rows if row.provider not in BASELINES]
    described = [figure(row, found) for figure in (_bfloat16, _draws, _threads) for row in own]
    return [figure for figure in described if figure] + list(_sweep(own))


def _name(row: Row) -> str:
    return f"{row.provider} {row.op} {row.mode}, {row.shape}"


def _bfloat16(row: Row, found: _Found) -> tuple[str, str] | None:
    other = found.get(replace(row, dtype="float32").key)
    if row.dtype != "bfloat16" or other is None:
        return None
    return f"{_name(row)}: speed in bfloat16 over float32", f"{other.median_ms / row.median_ms:.2f}x"


def _draws(row: Row, found: _Found) -> tuple[str, str] | None:
    other = found.get(replace(row, samples=1).key)
    if row.samples < 2 or other is None:
        return None
    return (
        f"{_name(row)}: time of {row.samples} noise draws over {row.samples} passes",
        f"{row.median_ms / (row.samples * other.median_ms):.2f}",
    )


def _threads(row: Row, found: _Found) -> tuple[str, str] | None:
    other = found.get(replace(row, threads=1).key)
    if row.threads == 1 or other is None:
        return None
    return f"{_name(row)}: speed with {row.threads} threads over 1", f"{other.median_ms / row.median_ms:.2f}x"


def _sweep(rows: list[Row]) -> Iterator[tuple[str, str]]:
    names = [shape.name for shape in SWEEP]
    groups: dict[tuple[str | int, ...], dict[str, float]] = {}
    for row in rows:
        if row.shape in names:
            group = (row.provider, row.op, row.mode, row.dtype, row.layout, row.samples, row.threads)
            groups.setdefault(group, {})[row.shape] = row.median_ms * 1e6 / SHAPES[row.shape].pixels
    for (provider, op, mode, *_), costs in groups.items():
        listed = ", ".join(f"{name.removeprefix('pixels-')}: {cost:.2f}" for name, cost in costs.items())
        yield f"{provider} {op} {mode}: nanoseconds per pixel", listed

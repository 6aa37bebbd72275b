"""One row per provider, case and mode: the one schema of the CSV and JSON files, and what is computed from the measurements."""

import csv
import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import modreg_fast
from modreg_fast._output import to_json, whole
from modreg_fast.bench.cases import MODES, Case
from modreg_fast.bench.measure import Result, Timing
from modreg_fast.bench.shapes import SHAPES

_KEY = ("op", "shape", "modalities", "dtype", "layout", "samples", "threads", "mode", "provider")


@dataclass(frozen=True)
class Row:
    """What the columns hold.

    - ``samples``: noise draws, 0 without noise
    - ``ratio_*``: the other's median time over this one's, above 1 where this one is faster; None where the other was not measured
    - ``copy_share``: of the bandwidth of a plain copy that took turns with it
    - ``peak_*``: most memory beyond what was there before the pass, in bytes and over the bytes of the inputs
    - ``relative_error``: against float64, of the values, of the gradients, or for ``both`` the larger one
    """

    provider: str
    op: str
    mode: str
    shape: str
    modalities: int
    dtype: str
    layout: str
    samples: int
    threads: int
    device: str
    versions: str
    date: str
    median_ms: float
    spread_ms: float
    calls: int
    ratio_eager: float | None
    ratio_compile: float | None
    bytes: int
    gb_per_s: float
    copy_gb_per_s: float
    copy_share: float
    peak_bytes: int
    peak_fraction: float
    relative_error: float

    @property
    def key(self) -> tuple[str | int, ...]:
        """What the same measurement of another run shares."""
        return tuple(getattr(self, name) for name in _KEY)

    @property
    def case(self) -> str:
        """The shape, and whatever is not the ordinary case."""
        natural = SHAPES[self.shape].layouts[0] if self.shape in SHAPES else "pixels"
        extras = [
            self.dtype if self.dtype != "float32" else "",
            "channels last" if self.layout != natural else "",
            f"{self.samples} noise draw{'s' if self.samples > 1 else ''}" if self.samples else "",
        ]
        return ", ".join([self.shape, *filter(None, extras)])


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def rows(case: Case, results: list[Result], copying: Timing, copy_bytes: int) -> list[Row]:
    """The rows of a measured case."""
    medians = {result.provider: {mode: result.timings[mode].median for mode in MODES} for result in results}
    bandwidth = copy_bytes / copying.median

    def ratio(other: str, result: Result, mode: str) -> float | None:
        return medians[other][mode] / medians[result.provider][mode] if other in medians else None

    def row(result: Result, mode: str) -> Row:
        timing, moved = result.timings[mode], case.bytes_moved(mode)
        return Row(
            provider=result.provider,
            op=case.op,
            mode=mode,
            shape=case.shape.name,
            modalities=case.shape.modalities,
            dtype=case.dtype,
            layout=case.layout,
            samples=case.samples,
            threads=torch.get_num_threads(),
            device=device(),
            versions=versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            median_ms=timing.median * 1e3,
            spread_ms=timing.spread * 1e3,
            calls=len(timing.seconds),
            ratio_eager=ratio("eager", result, mode),
            ratio_compile=ratio("compile", result, mode),
            bytes=moved,
            gb_per_s=moved / timing.median / 1e9,
            copy_gb_per_s=bandwidth / 1e9,
            copy_share=moved / timing.median / bandwidth,
            peak_bytes=result.peak_bytes[mode],
            peak_fraction=result.peak_bytes[mode] / case.input_bytes,
            relative_error=result.errors[mode],
        )

    return [row(result, mode) for mode in MODES for result in results]


def device() -> str:
    """The processor by name and number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    """Of whatever the numbers depend on."""
    kernels = modreg_fast.backends()["cpu"].detail
    return f"modreg_fast {modreg_fast.__version__} ({kernels}), torch {torch.__version__}, python {platform.python_version()}"


def write_csv(rows: list[Row], path: Path) -> None:
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [_parse(line) for line in csv.DictReader(file)]


def _parse(line: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Row):
        text = line[field.name]
        values[field.name] = text if field.type is str else int(text) if field.type is int else float(text) if text else None
    return Row(**values)


def json_of(rows: list[Row]) -> str:
    return to_json([dataclasses.asdict(row) for row in rows], indent=1)


def read_json(path: Path) -> list[Row]:
    """Raises ValueError, with the reason, for a file that does not hold the rows of a run."""
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold the rows of a run: {error}") from error

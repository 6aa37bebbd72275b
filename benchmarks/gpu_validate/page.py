"""``report.json``, and ``report.html``: one file with its style and pictures inside."""

import base64
import dataclasses
from datetime import datetime, timezone
from pathlib import Path

import jinja2

from benchmarks.gpu_validate.runner import Outcome, passed
from modreg_fast import _output
from modreg_fast.bench import plots
from modreg_fast.bench.results import Row

_HIDDEN = {"device", "versions", "date", "bytes", "peak_bytes", "calls", "threads", "modalities", "samples"}  # in the JSON only


def write(outcomes: list[Outcome], folder: Path, dry_run: bool) -> None:
    """Into ``folder``, which is there."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = {"date": date, "dry_run": dry_run, "passed": passed(outcomes), "steps": [dataclasses.asdict(o) for o in outcomes]}
    _output.write(folder / "report.json", _output.to_json(report, indent=1))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": _cell, "image": _image}
    rows = [Row(**row) for outcome in outcomes for row in outcome.tables.get("speed", [])]
    page = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(
        report=report, outcomes=outcomes, pictures=plots.save(rows, folder) if rows else [], hidden=_HIDDEN
    )
    _output.write(folder / "report.html", page)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

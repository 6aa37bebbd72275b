"""The page and its tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study import plots
from benchmarks.study.analyse import POINT, Interval, Study, interval
from benchmarks.study.data import DATA, LARGE, PARTS
from benchmarks.study.methods import METHODS
from benchmarks.study.models import FUSIONS, SMALL
from benchmarks.study.runs import LARGE_METHODS, Run, load
from modreg_fast._output import write as write_text


def write(
    output: Path, study: Study, watched: Mapping[str, plots.History], milliseconds: Mapping[str, Mapping[str, float]]
) -> Path:
    """``<output>/study.md``, with ``<output>/study/tables.md`` and pictures."""
    folder = output / "study"
    folder.mkdir(parents=True, exist_ok=True)
    plots.save(folder, study, watched)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": points, "change": change}
    methods = [m for m in METHODS if study.fusions(next(iter(DATA)), m)]
    context: dict[str, Any] = {
        "study": study,
        "data": list(DATA),
        "large": [name for name in LARGE if study.fusions(name, "joint")],
        "large_methods": [m for m in LARGE_METHODS if m in methods],
        "recipes": [m for m in ("each alone", "own heads") if m in methods],
        "setups": {name: load(name, 0).setup for name in LARGE},
        "small": SMALL,
        "speaking": speaking(study),
        "fusions": FUSIONS,
        "methods": methods,
        "grids": METHODS,
        "sizes": {name: [len(load(name, 0).parts[part].target) for part in PARTS] for name in DATA},
        "milliseconds": milliseconds,
        "watched": watched,
        "interval": interval,
        "fmean": fmean,
        "helped": helped,
        "default_on_validation": default_on_validation,
        "spread": spread,
        "alone_methods": [m for m in ("joint", "dropout", "attribution, L1", "each alone", "own heads") if m in methods],
        "beside_dropout": [m for m in methods if m.startswith(("dropout +", "OGM", "MMP", "each alone", "own heads"))],
    }
    page = output / "study.md"
    write_text(page, environment.get_template("study.md.j2").render(context))
    write_text(folder / "tables.md", environment.get_template("tables.md.j2").render(context))
    return page


def points(x: Interval) -> str:
    """Bold where 0 lies outside of the interval."""
    text = f"{x.mean:+.1f} ± {x.half:.1f}"
    return f"**{text}**" if x.clear else text


def change(x: Interval) -> str:
    """The same without the interval."""
    return f"**{x.mean:+.1f}**" if x.clear else f"{x.mean:+.1f}"


def helped(
    study: Study,
    method: str,
    baseline: str = "joint",
    weight: float | None = None,
    data: Sequence[str] = tuple(DATA),
    cost: float = POINT,
) -> list[str]:
    """Of ``data`` those where a method raises mean and worst subset, and costs at most ``cost`` with all modalities."""

    def change(name: str, measure: str) -> float:
        return study.effect(name, method, measure, baseline, weight).mean

    return [name for name in data if change(name, "mean") > 0 and change(name, "worst") > 0 and change(name, "full") >= -cost]


def default_on_validation(study: Study, method: str, data: Sequence[str]) -> tuple[int, int]:
    """Of ``data`` on how many weight 1 has, on the validation parts, the highest mean over the subsets of all weights, and on how many it
    costs at most a point there with all modalities."""

    def mean(name: str, method: str, weight: float, measure: str) -> float:
        rows = [study.rows[Run(name, f, method, weight, seed)] for f in study.fusions(name, method) for seed in study.seeds]
        return fmean(float(row[f"validation {measure}"]) for row in rows)

    best = [max(METHODS[method].weights, key=lambda w: mean(name, method, w, "mean")) for name in data]
    cost = [mean(name, "joint", 0.0, "full") - mean(name, method, 1.0, "full") for name in data]
    return best.count(1.0), sum(x <= POINT for x in cost)


def speaking(study: Study) -> tuple[int, int]:
    """Of the trainings with own heads: where the mean over the subsets of the validation part is higher when they speak, and all."""
    pairs = [(run, run._replace(method="own heads, joint speaks")) for run in study.rows if run.method == "own heads"]
    means = [[float(study.rows[run]["validation mean"]) for run in pair] for pair in pairs if pair[1] in study.rows]
    return sum(own > joint for own, joint in means), len(means)


def spread(study: Study, name: str, method: str) -> float:
    """Mean over seeds and fusions of the deviation over the subsets."""
    return fmean(study.scores(name, method, "std", study.fusions(name, method)))

"""The list of trainings, and the file that keeps what each of them gave: a stopped study goes on where it was."""

import csv
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from benchmarks.study.data import DATA, GAPS, LARGE, Data
from benchmarks.study.methods import METHODS, Method
from benchmarks.study.models import FUSIONS
from benchmarks.study.train import NOISE, inside, missing, noisy, train
from modreg_fast._output import write
from modreg_fast.missing import MissingModalities

ALONE = "alone: "
GAP_METHODS = ("joint", "dropout", "feature, log", "attribution, L1", "each alone", "own heads")
LARGE_METHODS = ("joint", "dropout", "OGM-GE", "MMPareto", "each alone", "own heads")
SCORES = ("full", "mean", "std", "worst")


class Run(NamedTuple):
    """One training. ``method``: of METHODS, or ``"alone: <modality>"``."""

    data: str
    fusion: str
    method: str
    weight: float
    seed: int


COLUMNS = (
    *Run._fields,
    *(f"validation {name}" for name in SCORES),
    *SCORES,
    *(f"noise {strength:g}" for strength in NOISE),
    "alone",
    "shares",
    "feature information",
    "prediction information",
)


def grid(seeds: int, methods: Sequence[str] = tuple(METHODS)) -> list[Run]:
    """All trainings, seed by seed. Ceilings are trained once per modality, as their network has no fusion to speak of."""
    runs = []
    for seed in range(seeds):
        for name in DATA:
            runs += [Run(name, FUSIONS[0], ALONE + m, 0.0, seed) for m in load(name, 0).parts["train"].inputs]
            for fusion in FUSIONS:
                runs += _trainings(name, fusion, [m for m in methods if fusion in METHODS[m].fusions], seed)
        for name in GAPS:
            runs += _trainings(name, "concatenation", [m for m in GAP_METHODS if m in methods], seed)
        for name in LARGE:
            for fusion in FUSIONS:
                runs += _trainings(name, fusion, [m for m in LARGE_METHODS if m in methods], seed)
    return runs


def _trainings(name: str, fusion: str, methods: Sequence[str], seed: int) -> list[Run]:
    return [Run(name, fusion, method, weight, seed) for method in methods for weight in METHODS[method].weights]


@lru_cache(maxsize=8)
def load(name: str, seed: int) -> Data:
    return (DATA | GAPS | LARGE)[name](seed)


def perform(run: Run, steps: int | None = None) -> dict[str, Any]:
    """Trains, and returns the row of the file."""
    torch.set_num_threads(1)  # tensors this small gain nothing from a second one
    data = load(run.data, run.seed)
    only = run.method.removeprefix(ALONE) if run.method.startswith(ALONE) else None
    method = Method() if only else METHODS[run.method]
    model = train(data, run.fusion, method, run.weight, run.seed, only, steps)  # type: ignore[arg-type]
    validation, test = (missing(model, data, part, method.own == "speak") for part in ("validation", "test"))
    return {
        **run._asdict(),
        **{f"validation {name}": x for name, x in _scores(validation).items()},
        **_scores(test),
        **{f"noise {strength:g}": x for strength, x in noisy(model, data, "test").items()},
        "alone": {subset[0]: x for subset, x in test.scores.items() if len(subset) == 1},
        **inside(model, data, "test"),
    }


def _scores(result: MissingModalities) -> dict[str, float]:
    return dict(zip(SCORES, (result.full, result.mean, result.std, result.scores[result.worst]), strict=True))


def read(path: Path) -> dict[Run, dict[str, str]]:
    """The rows of finished trainings. A last line that a killed process left unfinished is no row: it lacks its newline."""
    if not path.exists():
        return {}
    whole, _, _ = path.read_text().rpartition("\n")
    return {
        Run(row["data"], row["fusion"], row["method"], float(row["weight"]), int(row["seed"])): row
        for row in csv.DictReader(whole.splitlines())
    }


def finish(
    path: Path, runs: Sequence[Run], workers: int, steps: int | None = None, advance: Callable[[], object] = lambda: None
) -> dict[Run, dict[str, str]]:
    """Performs what ``path`` lacks of ``runs``, writes each row as it comes, and returns all rows of ``runs``."""
    done = read(path)
    text = path.read_text() if path.exists() else ""
    write(path, text[: text.rfind("\n") + 1] or ",".join(COLUMNS) + "\n")  # without an unfinished line
    left = [run for run in runs if run not in done]
    with path.open("a", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        pool = ProcessPoolExecutor(workers, get_context("forkserver"), _end_with_parent)
        try:
            for future in as_completed([pool.submit(perform, run, steps) for run in left]):
                writer.writerow({name: _text(x) for name, x in future.result().items()})
                advance()
        finally:
            pool.shutdown(cancel_futures=True)
    done = read(path)
    return {run: done[run] for run in runs}


def _end_with_parent() -> None:
    """In a worker: a killed study leaves no process behind."""
    parent = parent_process()
    assert parent is not None

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, args=(parent,), daemon=True).start()


def _text(x: object) -> object:
    """Four digits; a number per modality as ``camera=71.2 depth=29``."""
    if isinstance(x, dict):
        return " ".join(f"{m}={_text(value)}" for m, value in x.items())
    return f"{x:.4g}" if isinstance(x, float) else x

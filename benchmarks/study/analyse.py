"""From the rows of all trainings to what can be said: weights chosen on validation parts, paired differences, intervals."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from benchmarks.study.runs import Run

Rows = Mapping[Run, Mapping[str, str]]
POINT = 1.0  # what a regularizer may cost with all modalities, in points of the metric


class Interval(NamedTuple):
    """A mean with the half width of its 95 % interval; infinite for a single value."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside."""
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean."""
    n = len(values)
    return Interval(fmean(values), float(stdtrit(n - 1, 0.975)) * stdev(values) / sqrt(n) if n > 1 else float("inf"))


def differences(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Of pairs: the same seed, so the same split, start and batches."""
    return interval([x - y for x, y in zip(values, baseline, strict=True)])


def chosen(rows: Rows, data: str, fusion: str, method: str) -> list[Run]:
    """Per seed the run whose weight is best on the validation part of that very seed; the test part has no say.

    Best: the highest mean over the subsets, among the weights that cost at most a point with all modalities against joint training.
    Where none is, the weight that costs least."""
    runs = [run for run in rows if (run.data, run.fusion, run.method) == (data, fusion, method)]
    best = []
    for seed in sorted({run.seed for run in runs}):
        joint = float(rows[Run(data, fusion, "joint", 0.0, seed)]["validation full"]) if not method.startswith("alone") else 0.0

        def rank(run: Run, joint: float = joint) -> tuple[bool, float]:
            full, mean = (float(rows[run][f"validation {name}"]) for name in ("full", "mean"))
            affordable = full >= joint - POINT
            return affordable, mean if affordable else full

        best.append(max((run for run in runs if run.seed == seed), key=rank))
    return best


def scores(rows: Rows, runs: Iterable[Run], measure: str) -> list[float]:
    return [float(rows[run][measure]) for run in runs]


def split(text: str) -> dict[str, float]:
    """``"camera=71.2 depth=29"`` as numbers."""
    return {name: float(value) for name, _, value in (part.partition("=") for part in text.split())}

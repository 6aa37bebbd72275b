"""From the rows of all trainings to what can be said: weights chosen on validation parts, paired differences, intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from benchmarks.study.runs import ALONE, Run

POINT = 1.0  # what a method may cost with all modalities, in points of the metric


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
    """Of pairs, such as two methods by seed: the same seed gave both the same split, start and batches."""
    return interval([x - y for x, y in zip(values, baseline, strict=True)])


def split(text: str) -> dict[str, float]:
    """``"camera=71.2 depth=29"`` as numbers."""
    return {name: float(value) for name, _, value in (part.partition("=") for part in text.split())}


class Study:
    """The rows of all trainings, and per data set, fusion, method and seed the one whose weight was chosen."""

    def __init__(self, rows: Mapping[Run, Mapping[str, str]]) -> None:
        self.rows = rows
        self.seeds = sorted({run.seed for run in rows})
        grids: dict[tuple[str, str, str, int], list[Run]] = {}
        for run in rows:
            grids.setdefault((run.data, run.fusion, run.method, run.seed), []).append(run)
        self.chosen = {key: self._best(runs) for key, runs in grids.items()}

    def _best(self, runs: Sequence[Run]) -> Run:
        """The run whose weight is best on the validation part of its own seed; the test part has no say.

        Best: the highest mean over the subsets, among the weights that cost at most a point with all modalities against joint
        training. Where none is, the weight that costs least."""
        if len(runs) == 1:
            return runs[0]
        joint = self._validation(runs[0]._replace(method="joint", weight=0.0), "full")
        affordable = [run for run in runs if self._validation(run, "full") >= joint - POINT]
        if affordable:
            return max(affordable, key=lambda run: self._validation(run, "mean"))
        return max(runs, key=lambda run: self._validation(run, "full"))

    def _validation(self, run: Run, measure: str) -> float:
        return float(self.rows[run][f"validation {measure}"])

    def fusions(self, data: str, method: str) -> list[str]:
        return list(dict.fromkeys(run.fusion for run in self.rows if (run.data, run.method) == (data, method)))

    def scores(self, data: str, method: str, measure: str, fusions: Sequence[str], weight: float | None = None) -> list[float]:
        """On test parts, per seed, the mean over the fusions; with the chosen weights, or all with one."""

        def score(fusion: str, seed: int) -> float:
            run = self.chosen[data, fusion, method, seed]
            return float(self.rows[run if weight is None else run._replace(weight=weight)][measure])

        return [fmean(score(fusion, seed) for fusion in fusions) for seed in self.seeds]

    def effect(
        self,
        data: str,
        method: str,
        measure: str,
        baseline: str = "joint",
        weight: float | None = None,
        fusions: Sequence[str] | None = None,
    ) -> Interval:
        """Difference to another method, over the given fusions, or all that the method was tried with."""
        fusions = fusions or self.fusions(data, method)
        return differences(self.scores(data, method, measure, fusions, weight), self.scores(data, baseline, measure, fusions))

    def weights(self, data: str, fusion: str, method: str) -> dict[float, int]:
        """Chosen weight -> by how many seeds."""
        return dict(sorted(Counter(self.chosen[data, fusion, method, seed].weight for seed in self.seeds).items()))

    def alone(self, data: str, fusion: str, method: str) -> dict[str, float]:
        """Modality -> mean over seeds of the metric with it alone."""
        found = [split(self.rows[self.chosen[data, fusion, method, seed]]["alone"]) for seed in self.seeds]
        return {m: fmean(scores[m] for scores in found) for m in found[0]}

    def ceilings(self, data: str) -> dict[str, Interval]:
        """Modality -> the metric of a network that was trained with it alone."""
        methods = dict.fromkeys(run.method for run in self.rows if run.data == data and run.method.startswith(ALONE))
        return {method.removeprefix(ALONE): interval(self._ceiling(data, method)) for method in methods}

    def _ceiling(self, data: str, method: str) -> list[float]:
        modality, (fusion,) = method.removeprefix(ALONE), self.fusions(data, method)
        return [split(self.rows[self.chosen[data, fusion, method, seed]]["alone"])[modality] for seed in self.seeds]

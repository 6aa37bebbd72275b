"""Wall time of a training step of each method."""

import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.study.methods import METHODS
from benchmarks.study.runs import load
from benchmarks.study.train import train

STEPS, REPEATS = 20, 5


def milliseconds(name: str, methods: Sequence[str]) -> dict[str, float]:
    """Method -> median over repeats of the time per step on one thread, the methods in turns."""
    data = load(name, 0)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(REPEATS):
        for name in methods:
            method = METHODS[name]
            start = time.perf_counter()
            train(data, method.fusions[-1], method, method.weights[0], seed=0, steps=STEPS)
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    return {name: median(measured) for name, measured in times.items()}

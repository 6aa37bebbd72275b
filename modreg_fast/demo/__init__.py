"""What the losses do, on a real scene: trains a network plainly and with each of three methods, and reports."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modreg_fast._output import to_json, write
from modreg_fast.backends import resolve
from modreg_fast.demo import data, pictures, report, training

__all__ = ["Measured", "run"]

LEAST_PIXELS = 10  # of a class in training and in test blocks, for it to be scored


@dataclass(frozen=True)
class Measured:
    """``results``: what ``results.json`` holds; the rest is for the pictures."""

    results: dict[str, Any]
    scene: data.Scene
    split: pictures.Split
    maps: dict[str, dict[str, torch.Tensor]]

    def save(self, output: Path) -> None:
        """Writes ``results.json`` and the pictures into the folder ``output``."""
        write(output / "results.json", to_json(self.results))
        pictures.save(output, self.scene, self.split, self.maps, self.results)


def run(seeds: int = 3, quick: bool = False, console: Console | None = None) -> Measured:
    """Trains every method ``seeds`` times, and measures it.

    Args:
        seeds: seeds 0, 1, ... ``seeds - 1``.
        quick: a few steps only, to see that everything runs; the numbers mean nothing.
        console: shows the progress; by default on stderr.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread mostly waits
    try:
        return _run(seeds, quick, console or Console(stderr=True))
    finally:
        torch.set_num_threads(threads)


def _run(seeds: int, quick: bool, console: Console) -> Measured:
    start = time.perf_counter()
    scene = data.load_scene()
    classes = len(scene.classes)
    split = data.split_blocks(scene.labels, classes)
    parts = data.cut(scene, split)
    pixels = {part: data.pixels_per_class(blocks, classes) for part, blocks in parts.items()}
    scored = [c for c in range(classes) if min(pixels["train"][c], pixels["test"][c]) >= LEAST_PIXELS]
    steps = training.QUICK_STEPS if quick else training.STEPS
    results: dict[str, Any] = {
        "scene": scene.name,
        "source": scene.source,
        "real": scene.real,
        "quick": quick,
        "sensors": list(scene.sensors),
        "blocks": {part: len(corners) for part, corners in split.items()},
        "pixels": {part: int(count.sum()) for part, count in pixels.items()},
        "classes": list(scene.classes),
        "classes_scored": [list(scene.classes)[c] for c in scored],
        "steps": steps,
        "weights": {
            "feature": training.FEATURE_WEIGHT,
            "prediction": training.PREDICTION_WEIGHT,
            "attribution": training.ATTRIBUTION_WEIGHT,
        },
        "backend": resolve(None, torch.empty(0), "demo"),
        "threads": torch.get_num_threads(),
        "milliseconds": training.milliseconds(parts, classes, repeats=2 if quick else 25),
        "methods": {method: [] for method in training.METHODS},
    }
    maps: dict[str, dict[str, torch.Tensor]] = {}
    with _progress(console) as progress:
        task = progress.add_task("", total=len(training.METHODS) * seeds * steps)
        for seed in range(seeds):
            for method in training.METHODS:
                progress.update(task, description=f"{method}, seed {seed}")
                trained = training.train(method, parts, classes, seed, steps, lambda: progress.advance(task))
                if method not in maps:
                    maps[method] = training.predict(trained.model, parts["test"])
                results["methods"][method].append(
                    {
                        "seed": seed,
                        **training.score(trained.model, parts["test"], classes, scored),
                        "share": training.shares(trained.model, parts["test"]),
                        "history": {"step": trained.steps, "share": trained.shares},
                    }
                )
    results["seconds"] = round(time.perf_counter() - start, 1)
    results["happened"] = report.sentences(results)
    return Measured(results, scene, split, maps)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<27}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )

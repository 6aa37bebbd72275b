"""What the losses do, on a real scene: trains a network plainly, with functional entropy and with attribution, and reports."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modreg_fast.backends import resolve
from modreg_fast.demo import data, pictures, report, training

__all__ = ["run"]

LEAST_PIXELS = 10  # of a class in training and in test blocks, for it to be scored


def run(output: Path, seeds: int = 3, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains every method ``seeds`` times, writes pictures and ``results.json`` to ``output``, and returns what that file holds.

    Args:
        output: folder; made if it does not exist.
        seeds: seeds 0, 1, ... ``seeds - 1``.
        quick: a few steps only, to see that everything runs; the numbers mean nothing.
        console: shows the progress; by default on stderr.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread mostly waits
    try:
        return _run(output, seeds, quick, console or Console(stderr=True))
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, seeds: int, quick: bool, console: Console) -> dict[str, Any]:
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
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
    pictures.save(output, scene, split, maps, results)
    results["seconds"] = round(time.perf_counter() - start, 1)
    results["happened"] = report.sentences(results)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


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

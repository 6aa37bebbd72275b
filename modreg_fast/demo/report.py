"""The table, and what happened in sentences; both from the numbers in the results alone."""

import statistics
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modreg_fast.demo.data import BOTH

Results = Mapping[str, Any]


def over_seeds(results: Results, method: str, *path: str) -> list[float]:
    """A quantity of each run, in percent; ``path``: its keys, such as ``"miou", "both sensors"``."""
    values = []
    for run in results["methods"][method]:
        for key in path:
            run = run[key]
        values.append(100 * run)
    return values


def mean_std(values: list[float]) -> tuple[float, float]:
    """The deviation of a single seed is given as 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def seeds(results: Results) -> int:
    return len(results["methods"]["plain"])


def subset_names(results: Results) -> list[str]:
    return list(results["methods"]["plain"][0]["miou"])


def show(results: Results, console: Console) -> None:
    """Prints the table and the sentences."""
    console.print(_table(results))
    for sentence in results["happened"]:
        console.print(f"- {sentence}", highlight=False)


def _table(results: Results) -> Table:
    many = seeds(results) > 1
    table = Table(
        title=f"{results['scene']}, test blocks" + (f", mean ± deviation over {seeds(results)} seeds" if many else ", one seed"),
        box=box.SIMPLE_HEAD,
        title_style="bold",
    )
    methods = list(results["methods"])
    table.add_column("")
    for method in methods:
        table.add_column(method, justify="right")

    def row(label: str, *path: str) -> None:
        cells = (mean_std(over_seeds(results, method, *path)) for method in methods)
        table.add_row(f"  {label}", *(f"{mean:.1f} ± {std:.1f}" if many else f"{mean:.1f}" for mean, std in cells))

    table.add_row("[bold]Mean IoU, %")
    for subset in subset_names(results):
        row(subset, "miou", subset)
    row("mean over the subsets", "miou_mean")
    row("spread over the subsets", "miou_spread")
    table.add_row("[bold]Accuracy, %")
    for subset in subset_names(results):
        row(subset, "accuracy", subset)
    table.add_row("[bold]Share in the decisions, %")
    for sensor in results["sensors"]:
        row(sensor, "share", sensor)
    times = results["milliseconds"]
    table.add_row("[bold]Milliseconds per step")
    for label, key in (
        ("plain step", "step"),
        (f"added, {results['backend']} backend", "default"),
        ("added, eager reference", "reference"),
        (f"of it the ops, {results['backend']}", "default ops"),
        ("of it the ops, reference", "reference ops"),
    ):
        table.add_row(f"  {label}", *(f"{times[method][key]:.1f}" if key in times[method] else "-" for method in methods))
    return table


def sentences(results: Results) -> list[str]:
    """What happened, good or bad."""
    others = [method for method in results["methods"] if method != "plain"]
    plain = {subset: mean_std(over_seeds(results, "plain", "miou", subset))[0] for subset in subset_names(results)}
    said = [_data(results)]
    if results["quick"]:
        said.append(f"A quick run of {results['steps']} steps shows that everything works; its numbers mean nothing.")
    said.append(
        "The plain network reaches a mean IoU of " + ", ".join(f"{x:.1f} % with {name}" for name, x in plain.items()) + "."
    )
    said += [_effect(results, method, min(plain, key=lambda subset: plain[subset])) for method in others]
    said.append(_steering(results))
    said += [_cost(results, method) for method in others]
    said.append("The features have 8 x 8 pixels at most here, so calls weigh more than arithmetic; larger ones differ more.")
    if results["real"]:
        said.append(
            "A test block often lies in a field that a training block saw too, two pixels away: expect less in a new region."
        )
    return said


def _data(results: Results) -> str:
    blocks, pixels = results["blocks"], results["pixels"]
    parts = ", ".join(f"{blocks[part]} {part} ({pixels[part]} labelled pixels)" for part in blocks)
    unscored = [name for name in results["classes"] if name not in results["classes_scored"]]
    left_out = f"; {' and '.join(unscored)} have too few pixels to be in both training and test" if unscored else ""
    return (
        f"Data: {results['scene']}, {results['source']}. Blocks of 16 x 16 pixels, two pixels apart: {parts}. "
        f"Mean IoU is over {len(results['classes_scored'])} classes{left_out}."
    )


def _effect(results: Results, method: str, worst: str) -> str:
    """Differences to the plain network of the same seed."""
    texts, mixed, count = [], [], seeds(results)
    for name, path in (
        (f"the worst subset ({worst})", ("miou", worst)),
        (BOTH, ("miou", BOTH)),
        ("the mean over the subsets", ("miou_mean",)),
    ):
        pairs = zip(over_seeds(results, method, *path), over_seeds(results, "plain", *path), strict=True)
        changes = [with_loss - without for with_loss, without in pairs]
        mean, std = mean_std(changes)
        up = sum(change > 0 for change in changes)
        texts.append(f"{name} by {mean:+.1f}" + (f" ± {std:.1f} (up in {up} of {count} seeds)" if count > 1 else ""))
        if 0 < up < count:
            mixed.append(name)
    text = f"{method.capitalize()} changed {texts[0]}, {texts[1]} and {texts[2]}, in points of mean IoU."
    if count == 1:
        return f"{text} One seed is no evidence."
    return f"{text} No evidence where the seeds disagree: {', '.join(mixed)}." if mixed else text


def _steering(results: Results) -> str:
    sensor = results["sensors"][0]
    before, after = (mean_std(over_seeds(results, method, "share", sensor))[0] for method in ("plain", "attribution"))
    closer = "closer to" if abs(after - 50) < abs(before - 50) else "not closer to"
    return (
        f"Attribution moved the share of {sensor} in the decisions on test blocks from {before:.1f} % to {after:.1f} %, "
        f"{closer} its target of 50 %."
    )


def _cost(results: Results, method: str) -> str:
    times, step = results["milliseconds"][method], results["milliseconds"]["plain"]["step"]
    rest = "the heads of the sensors run" if method == "own heads" else "PyTorch differentiates the head once more"
    return (
        f"{method.capitalize()} adds {times['default']:.1f} ms to a training step of {step:.1f} ms; with the eager reference "
        f"{times['reference']:.1f} ms. The library's ops take {times['default ops']:.1f} ms of that, as reference "
        f"{times['reference ops']:.1f} ms; in the rest {rest}."
    )

"""The pictures: predicted maps, robustness, and shares over training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from modreg_fast._output import save_figure
from modreg_fast.demo.data import BLOCK, IGNORE, Scene
from modreg_fast.demo.report import mean_std, over_seeds, seeds, subset_names

METHOD_COLOURS = {"plain": "#7f7f7f", "functional entropy": "#0072b2", "attribution": "#e69f00", "own heads": "#009e73"}
PART_COLOURS = {"train": "#000000", "validation": "#56b4e9", "test": "#ffd117"}
UNLABELLED = "#e0e0e0"

Split = Mapping[str, list[tuple[int, int]]]


def save(output: Path, scene: Scene, split: Split, maps: Mapping[str, Mapping[str, Tensor]], results: Mapping[str, Any]) -> None:
    """``maps``: method -> subset -> classes on the test blocks, of the first seed."""
    style: Any = {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        for name, figure in {
            "maps.png": _maps(scene, split, maps, results),
            "robustness.png": _robustness(results),
            "shares.png": _shares(results),
        }.items():
            save_figure(figure, output / name, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def _maps(scene: Scene, split: Split, maps: Mapping[str, Mapping[str, Tensor]], results: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 3.6 + 2.6 * len(maps)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)  # type: ignore[union-attr, call-arg]
    subsets = subset_names(results)
    axes = figure.subplots(1 + len(maps), len(subsets), squeeze=False, height_ratios=[1.5] + [1] * len(maps))
    for axis in axes.flat:
        axis.set_axis_off()
    _scene(axes[0, 0], scene, split)
    truth = torch.stack([scene.labels[y : y + BLOCK, x : x + BLOCK] for y, x in split["test"]])
    axes[0, 1].imshow(_mosaic(scene, truth, truth))
    figure.suptitle(f"{scene.name}: predictions on the test blocks, first seed", fontsize=14)
    axes[0, 1].set_title("Ground truth of the test blocks, side by side")
    handles = [Patch(color=colour, label=name) for name, colour in scene.classes.items()]
    handles.append(Patch(facecolor=UNLABELLED, label="Unlabelled"))
    axes[0, 2].legend(handles=handles, loc="center", ncols=2, frameon=False, handlelength=1.1, columnspacing=1.2)
    for row, (method, predictions) in enumerate(maps.items(), start=1):
        for column, (subset, predicted) in enumerate(predictions.items()):
            miou = 100 * results["methods"][method][0]["miou"][subset]
            axes[row, column].imshow(_mosaic(scene, predicted, truth))
            axes[row, column].set_title(f"{method.capitalize()}, {subset}: {miou:.0f} % mean IoU")
    return figure


def _scene(axis: Axes, scene: Scene, split: Split) -> None:
    axis.imshow(scene.picture.numpy())
    for part, corners in split.items():
        for y, x in corners:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), BLOCK, BLOCK, fill=False, edgecolor=PART_COLOURS[part], linewidth=1.6))
    axis.set_title("Blocks of the scene, in false colour" if scene.real else "Blocks of the scene, camera")
    handles = [Patch(facecolor="none", edgecolor=colour, linewidth=1.6, label=part) for part, colour in PART_COLOURS.items()]
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False, fontsize=10, handlelength=1.1
    )


def _mosaic(scene: Scene, classes: Tensor, truth: Tensor, columns: int = 6, gap: int = 1) -> Any:
    """Blocks ``(N, 16, 16)`` side by side; pixels without a label are grey."""
    palette = torch.tensor([to_rgb(colour) for colour in scene.classes.values()])
    blocks = torch.where(
        (truth == IGNORE)[..., None], torch.tensor(to_rgb(UNLABELLED)), palette[torch.where(truth == IGNORE, 0, classes)]
    )
    pitch = BLOCK + gap
    image = torch.ones(pitch * -(-len(blocks) // columns) - gap, pitch * columns - gap, 3)
    for i, block in enumerate(blocks):
        y, x = pitch * (i // columns), pitch * (i % columns)
        image[y : y + BLOCK, x : x + BLOCK] = block
    return image.numpy()


def _robustness(results: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axis = figure.subplots()
    names, methods = subset_names(results), list(results["methods"])
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        stats = [mean_std(over_seeds(results, method, "miou", name)) for name in names]
        centres = [x + (i - (len(methods) - 1) / 2) * width for x in range(len(names))]
        axis.bar(
            centres,
            [mean for mean, _ in stats],
            0.92 * width,
            yerr=[std for _, std in stats] if seeds(results) > 1 else None,
            capsize=4,
            color=METHOD_COLOURS[method],
            label=method,
        )
        for x, (mean, std) in zip(centres, stats, strict=True):
            axis.annotate(f"{mean:.1f}", (x, mean + std), (0, 4), textcoords="offset points", ha="center", fontsize=10)
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("mean IoU on test blocks, %")
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper right")
    axis.set_title(f"{results['scene']}: what is left when a sensor is missing ({_over(results)})", loc="left")
    return figure


def _shares(results: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axis = figure.subplots()
    for method, runs in results["methods"].items():
        steps = runs[0]["history"]["step"]
        histories = [[100 * share for share in run["history"]["share"]] for run in runs]
        for history in histories:
            axis.plot(steps, history, color=METHOD_COLOURS[method], linewidth=0.8, alpha=0.4)
        means = [mean_std(list(values))[0] for values in zip(*histories, strict=True)]
        axis.plot(steps, means, color=METHOD_COLOURS[method], linewidth=2.4, label=method)
    axis.axhline(50, color="black", linewidth=1.2, linestyle="--", label="target of attribution")
    axis.set_xlim(0, results["steps"])
    axis.set_xlabel("training step")
    axis.set_ylabel(f"share of {results['sensors'][0]} in the decisions, %")
    axis.legend(frameon=False, ncols=2)
    axis.set_title(f"{results['scene']}: share of {results['sensors'][0]} on validation blocks, thin: single seeds", loc="left")
    return figure


def _over(results: Mapping[str, Any]) -> str:
    return f"mean ± deviation over {seeds(results)} seeds" if seeds(results) > 1 else "one seed"

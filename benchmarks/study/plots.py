"""The pictures of the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.study.analyse import Study
from benchmarks.study.data import DATA, GAPS, LARGE
from benchmarks.study.methods import METHODS
from benchmarks.study.runs import GAP_METHODS
from benchmarks.study.train import NOISE
from benchmarks.study.watch import PENALTIES
from modreg_fast._output import save_figure

matplotlib.use("Agg")

History = Sequence[Mapping[str, float]]  # of benchmarks.study.watch
MEASURES = {"full": ("all modalities", "#666666"), "mean": ("mean over subsets", "#0072b2"), "worst": ("worst subset", "#d55e00")}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6a700", "#56b4e9")
POINTS = (-30, -10, -3, 0, 3, 10, 30)
SHOWN = ("joint", "dropout", "feature, log", "attribution, L1", "each alone", "own heads")
RECIPE = ("joint", "OGM-GE", "feature, log", "attribution, L1", "dropout", "MMPareto", "each alone", "own heads")


def save(folder: Path, study: Study, watched: Mapping[str, History]) -> None:
    figures = {
        "recipe": recipe(study),
        "effects": effects(study),
        "sensitivity": sensitivity(study),
        "noise": noise(study),
        "gap": gap(study),
        "training": training(watched),
    }
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", dpi=110)
        plt.close(figure)


def recipe(study: Study) -> Figure:
    """The scores behind the advice, over the fusions that all of its methods were tried with."""
    methods = _shown(study, RECIPE)
    names = [name for name in (*DATA, *LARGE) if study.fusions(name, methods[0])]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 4), sharey=True, layout="constrained")
    for ax, data in zip(axes, names, strict=True):
        tried = [m for m in methods if study.fusions(data, m)]
        fusions = [f for f in study.fusions(data, methods[0]) if all(f in study.fusions(data, m) for m in tried)]
        for i, measure in enumerate(("full", "worst")):
            label, colour = MEASURES[measure]
            heights = [len(methods) - methods.index(m) + 0.2 - 0.4 * i for m in tried]
            found = [fmean(study.scores(data, m, measure, fusions)) for m in tried]
            bars = ax.barh(heights, found, 0.36, color=colour, label=label)
            ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        ax.set_title(data)
        ax.set_xlim(0, 112)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([len(methods) - j for j in range(len(methods))], methods)
    figure.supxlabel("metric on test parts, %", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def effects(study: Study) -> Figure:
    """Per data set and method the difference to joint training with its interval."""
    methods = [m for m in METHODS if m != "joint" and study.fusions(next(iter(DATA)), m)]
    figure, axes = plt.subplots(1, len(DATA), figsize=(14, 0.33 * len(methods) + 1.8), sharey=True, layout="constrained")
    for ax, data in zip(axes, DATA, strict=True):
        for shift, (measure, (label, colour)) in zip((0.25, 0, -0.25), MEASURES.items(), strict=True):
            found = [study.effect(data, m, measure) for m in methods]
            heights = [len(methods) - i + shift for i in range(len(methods))]
            means, halves = zip(*found, strict=True)
            ax.errorbar(means, heights, xerr=halves, fmt="o", ms=3.5, lw=1, color=colour, label=label)
        ax.axvline(0, color="black", lw=0.8)
        ax.set_title(data)
        ax.set_xlabel("points against joint training")
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_yticks([len(methods) - i for i in range(len(methods))], methods)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def sensitivity(study: Study) -> Figure:
    """Per method and weight the difference to joint training, averaged over fusions and seeds."""
    methods = [m for m, method in METHODS.items() if len(method.weights) > 1 and study.fusions(next(iter(DATA)), m)]
    columns = 4
    rows = -(-len(methods) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 2.3 * rows + 0.6), layout="constrained", squeeze=False)
    for ax, method in zip(axes.flat, methods, strict=False):
        weights = METHODS[method].weights
        for data, colour in zip(DATA, COLOURS, strict=False):
            for measure, style in (("full", "-"), ("worst", "--")):
                values = [study.effect(data, method, measure, weight=w).mean for w in weights]
                ax.plot(weights, values, style, marker=".", color=colour)
        ax.axhline(0, color="black", lw=0.6)
        ax.set_title(method, fontsize=9)
        ax.set_xscale("log")
        ax.minorticks_off()
        ax.set_xticks(weights, [f"{w:g}" for w in weights])
        ax.set_yscale("symlog", linthresh=3)
        ax.set_ylim(-60, 60)
        ax.set_yticks(POINTS, [f"{x:+g}" for x in POINTS])
    for ax in list(axes.flat)[len(methods) :]:
        ax.set_axis_off()
    lines = [Line2D([], [], color=colour) for _, colour in zip(DATA, COLOURS, strict=False)]
    styles = [Line2D([], [], color="black", ls=style) for style in ("-", "--")]
    figure.legend([*lines, *styles], [*DATA, "all modalities", "worst subset"], loc="outside upper center", ncols=6)
    figure.supxlabel("weight (for dropout its probability, for adaptive the ratio of gradient norms)")
    figure.supylabel("points against joint training")
    return figure


def noise(study: Study) -> Figure:
    """The metric while noise on the first modality grows."""
    figure, axes = plt.subplots(1, len(DATA), figsize=(14, 3.4), layout="constrained")
    for ax, data in zip(axes, DATA, strict=True):
        for method, colour in zip(_shown(study, SHOWN), COLOURS, strict=False):
            fusions = study.fusions(data, method)
            measures = ["full", *(f"noise {strength:g}" for strength in NOISE)]
            values = [fmean(study.scores(data, method, measure, fusions)) for measure in measures]
            ax.plot([0, *NOISE], values, marker=".", color=colour, label=method)
        ax.set_title(f"{data}: noise on {next(iter(study.ceilings(data)))}")
        ax.set_xlabel("deviation of the noise (input: 1)")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("metric on test parts, %")
    axes[0].legend(fontsize=8)
    return figure


def gap(study: Study) -> Figure:
    """Depth alone, while the easy part of depth fades."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    names = {float(name.split()[-1]): name for name in GAPS} | {1.0: "generated"}
    for method, colour in zip(_shown(study, GAP_METHODS), COLOURS, strict=False):
        for ax, measure in zip(axes, ("worst", "full"), strict=True):
            values = [fmean(study.scores(names[x], method, measure, ["concatenation"])) for x in sorted(names)]
            ax.plot(sorted(names), values, marker=".", color=colour, label=method)
    for ax, title in zip(axes, ("worst subset", "both modalities"), strict=True):
        ax.set_title(title)
        ax.set_xlabel("gap: depth shows heights (0) to stripes (1)")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("mean IoU on test images, %")
    axes[1].legend(fontsize=8, loc="lower left")
    return figure


def training(watched: Mapping[str, History]) -> Figure:
    """Joint training from inside, a row per data set."""
    figure, axes = plt.subplots(len(watched), 4, figsize=(15, 3 * len(watched) + 0.4), layout="constrained", squeeze=False)
    for row, (data, history) in zip(axes, watched.items(), strict=True):
        steps = [x["step"] for x in history]
        for kind, colour in zip(PENALTIES, COLOURS, strict=True):
            row[0].semilogy(steps, [x[kind] / x["task gradient"] for x in history], color=colour, label=kind)
        row[0].set_title(f"{data}: gradient of penalty / of task, weight 1", fontsize=9)
        panels: Sequence[tuple[Axes, str, str]] = (
            (row[1], "task gradient of", "gradient of the task by encoder"),
            (row[2], "feature information", "information at the features"),
            (row[3], "prediction information", "information at the prediction"),
        )
        for ax, prefix, title in panels:
            for name, colour in zip([key for key in history[0] if key.startswith(prefix)], COLOURS, strict=False):
                ax.semilogy(steps, [x[name] for x in history], color=colour, label=name.removeprefix(prefix).strip())
            ax.set_title(title, fontsize=9)
            ax.legend(fontsize=7)
        for ax in row:
            ax.set_xlabel("step")
    axes[0][0].legend(fontsize=7)
    return figure


def _shown(study: Study, methods: Sequence[str]) -> list[str]:
    return [m for m in methods if study.fusions("generated", m)]

"""The picture of an audit, for papers and notebooks."""

import textwrap
from math import isfinite
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from modreg_fast.audit.examples import colour
from modreg_fast.audit.result import Audit, Estimate

STYLE: Any = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
WIDTH, CHARTS = 10.0, 3.2  # inches
ACROSS = 12  # pictures
LINE = 120  # signs of the verdict


def figure(audit: Audit) -> Figure:
    """Three charts, and below them the inputs and the shares of the first samples."""
    shown = audit.examples[: max(1, ACROSS // (len(audit.share) + 1))]
    pictures = [x for example in shown for x in [*example.inputs.items(), ("share", example.shares)]]
    below = min(WIDTH / len(pictures), 2.0) + 0.3 if pictures else 0.0
    with matplotlib.rc_context(STYLE):
        title = textwrap.fill(audit.verdict, LINE)
        figure = Figure(figsize=(WIDTH, CHARTS + below + 0.2 + 0.2 * len(title.splitlines())), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        parts: Any = figure.subfigures(2, 1, height_ratios=[CHARTS, below]) if pictures else [figure]
        _charts(parts[0].subplots(1, 3), audit)
        for axis, (name, image) in zip(parts[1].subplots(1, len(pictures)) if pictures else [], pictures, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(name, fontsize=8)
            axis.set_axis_off()
    return figure


def _charts(axes: Any, audit: Audit) -> None:
    scales, shares = audit.scales, audit.share_by_scale
    if len(scales) > 1:
        scales, shares = ["all", *scales], {m: [audit.share[m], *row] for m, row in shares.items()}
    if audit.share_at_inputs:
        scales, shares = [*scales, "inputs"], {m: [*row, audit.share_at_inputs[m]] for m, row in shares.items()}
    _bars(axes[0], shares, scales, factor=100)
    place = "" if audit.share_at_inputs else f" at the {audit.measured_at}"
    axes[0].set_title(f"share of the attribution{place}, %", loc="left")
    bars = _bars(axes[1], audit.information, audit.scales)
    axes[1].set_title("functional Fisher information", loc="left")
    axes[1].legend(bars, list(audit.information), frameon=False)  # by itself it leaves out names with a leading underscore
    _missing(axes[2], audit)


def _bars(axis: Axes, values: dict[str, list[Estimate]], groups: list[str], factor: float = 1.0) -> list[BarContainer]:
    """A group of bars per scale, with their intervals; returns those of each name."""
    width = 0.8 / len(values)
    drawn = []
    for i, row in enumerate(values.values()):
        means, low, high = factor * np.array(row).T
        x = np.arange(len(row)) + (i - (len(values) - 1) / 2) * width
        interval = [np.maximum(means - low, 0), np.maximum(high - means, 0)]
        drawn.append(axis.bar(x, means, 0.92 * width, yerr=interval, color=colour(i), error_kw={"elinewidth": 1, "capsize": 2}))
    axis.set_xticks(range(len(groups)), [group.replace(" (", "\n").replace(" x ", "×").rstrip(")") for group in groups])
    axis.tick_params(axis="x", length=0)
    return drawn


def _missing(axis: Axes, audit: Audit) -> None:
    scores = audit.missing.scores
    axis.barh(range(len(scores)), list(scores.values()), height=0.6, color="#8c8c8c")
    for y, x in enumerate(scores.values()):
        if not isfinite(x):  # no bar ends there
            axis.annotate(f"{x:.3g}", (0, y), (3, 0), textcoords="offset points", va="center_baseline")
            continue
        axis.annotate(f"{x:.3g}", (x, y), (3, 0), textcoords="offset points", va="center_baseline")
    axis.set_yticks(range(len(scores)), [" + ".join(subset) for subset in scores])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_title(f"{audit.missing.metric}, by the modalities given", loc="left")

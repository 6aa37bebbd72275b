"""Draws a report of times on a GPU, ``benchmarks/results/nvidia-h200.txt``, as ``docs/images/gpu_h200.png``: the share of a copy's
bandwidth that each row reaches, forward and backward."""

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "benchmarks" / "results" / "nvidia-h200.txt"
PICTURE = ROOT / "docs" / "images" / "gpu_h200.png"
OPS = {"sf": "softmax_fisher", "gs": "gradient_statistics"}
SHAPES = {"square-16": "", "deliver-4": ", 25 classes", "wide": ", 512 channels", "b2-1024": ", SegFormer-B2"}
COLOURS = {"eager": "#999999", "cuda": "#e6a700", "triton": "#0072b2"}
ROW = re.compile(
    r"(?P<op>sf|gs) (?P<shape>\S+) +M\d (?P<dtype>\w+) +(?P<layout>\w+) +n(?P<draws>\d) (?P<who>\w+) +"
    r"fwd +[\d.]+ ms +(?P<forward>\d+)%  bwd +[\d.]+ +(?P<backward>\d+)%"
)


def main() -> None:
    found = [row.groupdict() for row in ROW.finditer(REPORT.read_text(encoding="utf-8"))]
    shares = {(_name(row), row["who"]): row for row in found}
    order = [*OPS, *SHAPES, "float32", "bfloat16", "pixels", "channels"]
    found.sort(
        key=lambda row: (order.index(row["op"]), row["draws"], *(order.index(row[x]) for x in ("shape", "layout", "dtype")))
    )
    names = list(dict.fromkeys(_name(row) for row in found))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * len(names) + 1.3), sharey=True, layout="constrained")
    for ax, direction in zip(axes, ("forward", "backward"), strict=True):
        for i, (who, colour) in enumerate(COLOURS.items()):
            rows = [(len(names) - j - 0.27 * (1 - i), shares[name, who]) for j, name in enumerate(names) if (name, who) in shares]
            heights = [height for height, _ in rows]
            bars = ax.barh(heights, [int(row[direction]) for _, row in rows], 0.25, color=colour, label=who)
            ax.bar_label(bars, fmt="%d", padding=2, fontsize=7)
        ax.set_title(direction)
        ax.set_xlim(0, 105)
        ax.set_xlabel("share of a copy's bandwidth, %")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([len(names) - j for j in range(len(names))], names, fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=3)
    figure.suptitle("One NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-28", x=0.01, ha="left", fontsize=10)
    figure.savefig(PICTURE, dpi=110)


def _name(row: dict[str, str]) -> str:
    noise = ", noise" if row["draws"] != "0" else ""
    return f"{OPS[row['op']]}{SHAPES[row['shape']]}, {row['dtype']}, {row['layout']}{noise}"


if __name__ == "__main__":
    main()

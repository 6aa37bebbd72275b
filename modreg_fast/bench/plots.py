"""Three pictures of a run, by shape: speed against eager PyTorch, bandwidth against a plain copy, peak memory."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from modreg_fast._output import save_figure
from modreg_fast.bench.cases import BASELINES, OPS
from modreg_fast.bench.results import Row

# Okabe and Ito's colours, which everyone tells apart, and a marker for each.
_STYLES = {"eager": ("#999999", "s"), "gat": ("#CC79A7", "v"), "compile": ("#E69F00", "^")}
_OWN = (("#0072B2", "o"), ("#009E73", "D"), ("#D55E00", "P"))
_LABELS = {"eager": "eager PyTorch", "gat": "Gat et al. by autograd", "compile": "torch.compile"}
_MODES = {"forward": "forward", "both": "forward + backward"}
_LEAST_MEMORY = 1e-4

_Styles = dict[str, tuple[str, str]]
_Points = list[tuple[Row, float]]


@dataclass(frozen=True)
class _Picture:
    """What is drawn over a logarithmic axis, in which 1 is marked."""

    name: str
    title: str
    value: Callable[[Row], float | None]
    ticks: tuple[float, ...]  # within a decade
    text: Callable[[float], str]  # of a tick
    draw: Callable[[Axes, _Points, list[str], _Styles], None]


def save(rows: list[Row], folder: Path) -> list[Path]:
    """Writes the pictures, of the largest number of threads measured, and returns their paths."""
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads and row.mode in _MODES]
    paths = []
    for picture in _PICTURES:
        points = [(row, x) for row in rows if (x := picture.value(row)) is not None]
        if points:
            paths.append(folder / f"{picture.name}.png")
            save_figure(_figure(picture, points), paths[-1], dpi=150)
    return paths


def _figure(picture: _Picture, points: _Points) -> Figure:
    """A panel per op and mode, a line per case."""
    styles = _styles({row.provider for row, _ in points})
    ops = [op for op in OPS if any(row.op == op for row, _ in points)]
    cases = {op: list(dict.fromkeys(row.case for row, _ in points if row.op == op)) for op in ops}
    lines = [len(cases[op]) for op in ops]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 0.36 * sum(lines) + 0.8 * len(ops) + 1.0), layout="constrained")
        panels = figure.subplots(
            len(ops), len(_MODES), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": lines}
        )
        for op, row_of_panels in zip(ops, panels, strict=True):
            for mode, panel in zip(_MODES, row_of_panels, strict=True):
                panel.set_title(f"{op}, {_MODES[mode]}", loc="left", fontsize=9)
                _set_axes(panel, picture, cases[op])
                picture.draw(panel, [(r, x) for r, x in points if (r.op, r.mode) == (op, mode)], cases[op], styles)
        handles = [
            Line2D([], [], color=color, marker=marker, linestyle="none", label=_LABELS.get(provider, f"ours: {provider}"))
            for provider, (color, marker) in styles.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.suptitle(f"{picture.title}\n{_note(points[0][0])}", x=0.01, ha="left", fontsize=9)
    return figure


def _styles(present: set[str]) -> _Styles:
    """Colour and marker of every provider present, ours last."""
    own = sorted(present - set(BASELINES))
    return {provider: style for provider, style in _STYLES.items() if provider in present} | dict(
        zip(own, cycle(_OWN), strict=False)
    )


def _note(row: Row) -> str:
    return f"{row.device}, {row.threads} thread{'s' if row.threads > 1 else ''}; {row.versions}; {row.date[:10]}"


def _set_axes(panel: Axes, picture: _Picture, cases: list[str]) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=picture.ticks))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: picture.text(x)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="x", labelbottom=True)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_yticks(range(len(cases)), cases)
    panel.set_ylim(len(cases) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.12)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _place(row: Row, points: _Points, cases: list[str], styles: _Styles, step: float) -> float:
    """On the line of the case; the providers that were measured on it lie a step apart."""
    here = [p for p in styles if any(r.provider == p and r.case == row.case for r, _ in points)]
    return cases.index(row.case) + (here.index(row.provider) - (len(here) - 1) / 2) * step


def _bars(panel: Axes, points: _Points, cases: list[str], styles: _Styles) -> None:
    """From 1 to the value; the providers of a case side by side."""
    height = 0.9 / len(styles)
    for row, x in points:
        y = _place(row, points, cases, styles, height)
        panel.barh(y, x - 1, left=1, height=height * 0.9, color=styles[row.provider][0])
        panel.annotate(f"{x:.1f}", (max(x, 1), y), (3, 0), textcoords="offset points", va="center_baseline", fontsize=6.5)


def _markers(panel: Axes, points: _Points, cases: list[str], styles: _Styles) -> None:
    """A little apart vertically, so that equal values do not hide each other."""
    for row, x in points:
        color, marker = styles[row.provider]
        panel.plot(
            x,
            _place(row, points, cases, styles, 0.2),
            marker,
            color=color,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )


_PICTURES = (
    _Picture(
        "speed",
        "Times faster than eager PyTorch",
        lambda row: None if row.provider == "eager" else row.ratio_eager,
        (1, 2, 5),
        lambda x: f"{x:g}x",
        _bars,
    ),
    _Picture(
        "bandwidth",
        "Share of the bandwidth of a plain copy of memory, counting the bytes that must move",
        lambda row: row.copy_share,
        (1, 3),
        lambda x: f"{100 * x:g}%",
        _markers,
    ),
    _Picture(
        "memory",
        "Peak extra memory, of the size of the inputs",
        lambda row: max(row.peak_fraction, _LEAST_MEMORY),
        (1,),
        lambda x: f"{'≤' if x <= _LEAST_MEMORY * 1.01 else ''}{100 * x:g}%",
        _markers,
    ),
)

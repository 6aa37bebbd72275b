"""What an audit found, and its forms: sentence, table, JSON; picture and page are made next door."""

from dataclasses import dataclass, field
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from modreg_fast._evaluation import extra, rendered
from modreg_fast._output import plain, printable, to_json, write
from modreg_fast.audit.examples import Example
from modreg_fast.missing import MissingModalities

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Estimate(NamedTuple):
    """A mean over samples with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Audit:
    """What :func:`modreg_fast.audit` returns.

    Attributes:
        model: its name.
        samples: number of samples that count.
        scales: names of the feature scales.
        share: modality -> share of the attribution, in [0, 1].
        share_by_scale: modality -> scale -> share in what that scale contributes.
        information: modality -> scale -> functional Fisher information.
        missing: scores with every subset of the modalities.
        examples: sample images, where the features have pixels.
        no_maps: why there are no sample images, though the features have pixels.
        share_at_inputs: modality -> share at the inputs, where ``features`` were named and the scores can be traced back to the inputs of
            all modalities; else empty.
        measured_at: ``"inputs"`` or ``"features"``.
        baseline: ``"zero"`` or ``"mean"``.

    Example:
        >>> from modreg_fast import audit
        >>> inputs = {"rgb": torch.randn(8, 3), "depth": torch.randn(8, 3)}
        >>> result = audit(lambda x: x["rgb"] + x["depth"], [(inputs, inputs["rgb"].argmax(1))], progress=False)
        >>> result.samples, list(result.share), result.missing.metric
        (8, ['rgb', 'depth'], 'accuracy')
    """

    model: str
    samples: int
    scales: list[str]
    share: dict[str, Estimate]
    share_by_scale: dict[str, list[Estimate]]
    information: dict[str, list[Estimate]]
    missing: MissingModalities
    examples: list[Example] = field(repr=False, compare=False)
    no_maps: str = ""
    share_at_inputs: dict[str, Estimate] = field(default_factory=dict)
    measured_at: str = "inputs"
    baseline: str = "zero"

    @property
    def verdict(self) -> str:
        """Who carries the attribution and where that was measured, whose loss costs most, and where these disagree."""
        return " ".join(filter(None, (self.carried, self.costs, self.disagreement)))

    @property
    def carried(self) -> str:
        """Who carries the attribution, called the decision where nothing disagrees; that nobody dominates where the intervals of the
        first two overlap."""
        ranked = sorted(self.share, key=lambda m: -self.share[m].mean)
        texts = [f"{m} carries {percent(self.share[m])}" for m in ranked]
        place = f"the {self.measured_at}" if self.baseline == "zero" else f"the {self.measured_at} less their {self.baseline}"
        what = f"of the attribution at {place}" if self.disagreement else f"of the decision, measured at {place}"
        if len(ranked) > 1 and _leader(self.share) is None:
            return f"No modality dominates: {', '.join(texts)} {what}."
        return f"{texts[0]} {what}."

    @property
    def costs(self) -> str:
        """The modality without which the score is worst, all others given; empty where losing one costs nothing."""
        lost = {m: _cost(x) for m, x in self._lost_without.items()}
        most = max(lost.values(), default=0)
        if most <= 0:
            return ""
        gone = [m for m in self.share if lost.get(m) == most]
        score = next(x for subset, x in self.missing.scores.items() if set(subset) == set(self.share) - {gone[0]})
        return f"Losing {' or '.join(gone)} costs most: {self.missing.metric} {self.missing.full:.3g} becomes {score:.3g}."

    @property
    def disagreement(self) -> str:
        """Where another measurement does not bear the shares out; empty where all agree. Scales, and the inputs beside them, disagree
        where other modalities clearly lead. The scores disagree where the clearly leading modality is not the one that costs most to
        lose, or where it leads by more than twice the share of the second, but costs less than twice as much as another."""
        found = []
        leaders = [(name, _leader({m: row[s] for m, row in self.share_by_scale.items()})) for s, name in enumerate(self.scales)]
        leaders.append(("the inputs", _leader(self.share_at_inputs)))
        if len({m for _, m in leaders if m}) > 1:
            told = ", ".join(f"{m} leads at {name}" for name, m in leaders if m)
            found.append(f"The {'places' if self.share_at_inputs else 'scales'} disagree: {told}.")
        first, lost = _leader(self.share), {m: _cost(x) for m, x in self._lost_without.items()}
        if first is not None and len(lost) > 1:
            second = max((m for m in self.share if m != first), key=lambda m: self.share[m].mean)
            other = max((m for m in lost if m != first), key=lost.__getitem__)
            factor = 2 if self.share[first].mean > 2 * self.share[second].mean else 1
            if lost[first] <= 0 or lost[first] < factor * lost[other]:
                told = f"losing {first} costs {lost[first]:.3g}, losing {other} {lost[other]:.3g}"
                found.append(f"The scores do not bear this out: {told}.")
        return " ".join(found)

    @property
    def _lost_without(self) -> dict[str, float]:
        """Modality -> what its loss alone costs."""
        lost = self.missing.lost
        every = set(self.share)
        return {m: x for subset, x in lost.items() for m in every - set(subset) if subset and len(subset) == len(every) - 1}

    def table(self) -> str:
        """For printing: the verdict, shares and information by scale, and the missing-modality table. In signs that stdout has."""
        with extra("Audit.table"):
            from rich import box
            from rich.table import Table
        table = Table("scale", "modality", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("share", justify="right")
        table.add_column("information", justify="right")
        if len(self.scales) > 1:
            for k, (m, x) in enumerate(self.share.items()):
                table.add_row("" if k else "all", m, percent(x))
        for s, name in enumerate(self.scales):
            table.add_section()
            for k, m in enumerate(self.share):
                table.add_row("" if k else name, m, percent(self.share_by_scale[m][s]), number(self.information[m][s]))
        table.add_section()
        for k, (m, x) in enumerate(self.share_at_inputs.items()):
            table.add_row("" if k else "inputs", m, percent(x))
        over = f"Means over {self.samples} samples, with 95 % intervals."
        return printable(f"{self.verdict}\n\n{rendered(table)}\n{over}\n\n{self.missing.table()}")

    def to_dict(self) -> dict[str, Any]:
        """The numbers in plain types, ready for JSON and trackers, with the versions; None in place of NaN."""
        import modreg_fast

        told = {
            "verdict": self.verdict,
            "model": self.model,
            "samples": self.samples,
            "measured_at": self.measured_at,
            "baseline": self.baseline,
            "modalities": list(self.share),
            "scales": self.scales,
            "share": {m: x._asdict() for m, x in self.share.items()},
            "share_at_inputs": {m: x._asdict() for m, x in self.share_at_inputs.items()},
            "share_by_scale": {m: [x._asdict() for x in row] for m, row in self.share_by_scale.items()},
            "information": {m: [x._asdict() for x in row] for m, row in self.information.items()},
            "missing": self.missing.to_dict(),
            "versions": {"modreg_fast": modreg_fast.__version__, "torch": torch.__version__},
        }
        return cast(dict[str, Any], plain(told))

    def to_json(self, path: str | Path | None = None) -> str:
        """:meth:`to_dict` as JSON; also written to ``path``."""
        return _written(to_json(self.to_dict()), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page (no script, nothing loaded), light, dark and in print; also written to ``path``."""
        with extra("Audit.to_html"):
            from modreg_fast.audit.page import html
        return _written(html(self), path)

    def plot(self) -> "Figure":
        """A matplotlib figure: shares, information, scores with modalities missing, sample images."""
        with extra("Audit.plot"):
            from modreg_fast.audit.plot import figure
        return figure(self)


def _leader(shares: dict[str, Estimate]) -> str | None:
    """The modality whose interval lies above those of all others."""
    ranked = sorted((m for m in shares if not isnan(shares[m].mean)), key=lambda m: -shares[m].mean)
    if len(ranked) == 1 or (ranked and shares[ranked[0]].low > max(shares[m].high for m in ranked[1:])):
        return ranked[0]
    return None


def _cost(lost: float) -> float:
    """Of a lost score; one that is no number any more is the worst."""
    return inf if isnan(lost) else lost


def percent(x: Estimate) -> str:
    """``91 % [88, 94]``, or ``n/a`` where nothing counted."""
    mean, low, high = (100 * value for value in x)
    return "n/a" if isnan(mean) else f"{mean:.0f} % [{low:.0f}, {high:.0f}]"


def number(x: Estimate) -> str:
    """``0.012 [0.010, 0.015]``, with as many decimals as the mean needs for two digits; ``n/a`` where nothing counted."""
    if isnan(x.mean):
        return "n/a"
    if x.mean and not 1e-4 <= abs(x.mean) < 1e4:
        return f"{x.mean:.1e} [{x.low:.1e}, {x.high:.1e}]"
    decimals = next(d for d in range(7) if abs(x.mean) * 10**d >= 10 or d == 6)
    return f"{x.mean:.{decimals}f} [{x.low:.{decimals}f}, {x.high:.{decimals}f}]"


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write(path, text)
    return text

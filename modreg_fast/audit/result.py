"""What an audit found, and its forms: sentence, table, JSON; picture and page are made next door."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from modreg_fast._evaluation import extra, rendered
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
        share: modality -> share in the decisions, in [0, 1].
        share_by_scale: modality -> scale -> share in what that scale contributes.
        information: modality -> scale -> functional Fisher information.
        missing: scores with every subset of the modalities.
        examples: sample images, where the features have pixels.
        no_maps: why there are no sample images, though the features have pixels.

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
    examples: list[Example] = field(repr=False)
    no_maps: str = ""

    @property
    def verdict(self) -> str:
        """Who carries the decision, and whose loss costs most."""
        return f"{self.carried} {self.costs}".rstrip()

    @property
    def carried(self) -> str:
        """Who carries the decision; that nobody dominates where the intervals of the first two overlap."""
        ranked = sorted(self.share, key=lambda m: -self.share[m].mean)
        texts = [f"{m} carries {percent(self.share[m])}" for m in ranked]
        if len(ranked) > 1 and self.share[ranked[0]].low <= self.share[ranked[1]].high:
            return f"No modality dominates: {', '.join(texts)} of the decision."
        return f"{texts[0]} of the decision."

    @property
    def costs(self) -> str:
        """The modality without which the score is worst, all others given; empty where losing one costs nothing."""
        scores, lost = self.missing.scores, self.missing.lost
        without_one = {subset: lost[subset] for subset in scores if len(subset) == len(self.share) - 1}
        if not without_one or max(without_one.values()) <= 0:
            return ""
        rest = max(without_one, key=without_one.__getitem__)
        (gone,) = set(self.share) - set(rest)
        return f"Losing {gone} costs most: {self.missing.metric} {self.missing.full:.3g} becomes {scores[rest]:.3g}."

    def table(self) -> str:
        """For printing: the verdict, shares and information by scale, and the missing-modality table."""
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
        over = f"Means over {self.samples} samples, with 95 % intervals."
        return f"{self.verdict}\n\n{rendered(table)}\n{over}\n\n{self.missing.table()}"

    def to_json(self, path: str | Path | None = None) -> str:
        """The numbers as JSON, with the versions; also written to ``path``."""
        import modreg_fast

        missing = self.missing
        told = {
            "verdict": self.verdict,
            "model": self.model,
            "samples": self.samples,
            "modalities": list(self.share),
            "scales": self.scales,
            "share": {m: x._asdict() for m, x in self.share.items()},
            "share_by_scale": {m: [x._asdict() for x in row] for m, row in self.share_by_scale.items()},
            "information": {m: [x._asdict() for x in row] for m, row in self.information.items()},
            "missing": {
                "metric": missing.metric,
                "higher_is_better": missing.higher_is_better,
                "scores": [{"given": list(subset), "score": x} for subset, x in missing.scores.items()],
                "mean": missing.mean,
                "std": missing.std,
                "worst": list(missing.worst),
            },
            "versions": {"modreg_fast": modreg_fast.__version__, "torch": torch.__version__},
        }
        return _written(json.dumps(told, indent=2) + "\n", path)

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


def percent(x: Estimate) -> str:
    """``91 % [88, 94]``"""
    mean, low, high = (100 * value for value in x)
    return f"{mean:.0f} % [{low:.0f}, {high:.0f}]"


def number(x: Estimate) -> str:
    """``0.012 [0.010, 0.015]``, with as many decimals as the mean needs for two digits."""
    if x.mean and not 1e-4 <= abs(x.mean) < 1e4:
        return f"{x.mean:.1e} [{x.low:.1e}, {x.high:.1e}]"
    decimals = next(d for d in range(7) if abs(x.mean) * 10**d >= 10 or d == 6)
    return f"{x.mean:.{decimals}f} [{x.low:.{decimals}f}, {x.high:.{decimals}f}]"


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text

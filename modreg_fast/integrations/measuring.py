"""What the callbacks of all trainers share: when to measure, the model in evaluation, and a result as scalars."""

from collections.abc import Callable
from typing import Any

import torch

from modreg_fast import _validate as validate
from modreg_fast._evaluation import evaluating
from modreg_fast.audit import Audit
from modreg_fast.missing import MissingModalities

Measure = Callable[[Any], Audit | MissingModalities]


class Measuring:
    """A callback's measurement, ``measure(model)``, every ``every_n_epochs`` epochs."""

    def __init__(self, function: str, measure: Measure, every_n_epochs: int) -> None:
        if not callable(measure):
            validate.fail(function, "measure", "a function of the model", type(measure).__name__, TypeError)
        if isinstance(every_n_epochs, bool) or not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            validate.fail(function, "every_n_epochs", "a number of epochs, at least 1", repr(every_n_epochs))
        self.function, self.measure, self.every_n_epochs = function, measure, every_n_epochs

    def due(self, epochs: int) -> bool:
        """Whether to measure after so many epochs."""
        return epochs % self.every_n_epochs == 0

    def __call__(self, model: Any) -> Audit | MissingModalities:
        # An audit needs gradients, which a trainer's inference mode forbids.
        with torch.inference_mode(False), evaluating(model):
            result = self.measure(model)
        if not isinstance(result, Audit | MissingModalities):
            expected = "a function that returns an Audit or MissingModalities"
            validate.fail(self.function, "measure", expected, type(result).__name__, TypeError)
        return result


def scalars(result: Audit | MissingModalities) -> dict[str, float]:
    """``share/rgb`` and ``information/rgb/0`` (by scale) of an audit; ``accuracy/rgb+depth``, ``accuracy/mean`` and ``accuracy/worst`` by
    the modalities given; all below ``modalities/``."""
    found: dict[str, float] = {}
    if isinstance(result, Audit):
        found |= {f"share/{m}": share.mean for m, share in result.share.items()}
        found |= {f"information/{m}/{s}": x.mean for m, row in result.information.items() for s, x in enumerate(row)}
    missing = result.missing if isinstance(result, Audit) else result
    found |= {f"{missing.metric}/{'+'.join(subset)}": score for subset, score in missing.scores.items()}
    found |= {f"{missing.metric}/mean": missing.mean, f"{missing.metric}/worst": missing.scores[missing.worst]}
    return {f"modalities/{name}": value for name, value in found.items()}


PICTURE = "modalities/audit"  # the name under which the picture of an audit is logged

"""How good a model is when modalities are missing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modreg_fast import _validate as validate
from modreg_fast._evaluation import Data, Model, batches, check_model, copied, evaluating, extra, name_of, rendered
from modreg_fast._output import plain, printable
from modreg_fast.distributed import on_all_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MissingModalities", "evaluate_missing", "without"]

Subset = tuple[str, ...]
Drop = Literal["zeros", "noise"] | Callable[[str, Tensor], Tensor | None]

EXHAUSTIVE = 5  # so many modalities have 31 subsets


@dataclass(frozen=True)
class MissingModalities:
    """What :func:`evaluate_missing` returns.

    Attributes:
        metric: its name.
        scores: subset of modalities that the model was given -> score; all modalities come first.
        higher_is_better: whether a higher score is better.

    Example:
        >>> result = MissingModalities("accuracy", {("rgb", "depth"): 0.75, ("rgb",): 0.5, ("depth",): 0.25}, higher_is_better=True)
        >>> result.worst, result.mean, result.lost[("rgb",)]
        (('depth',), 0.5, 0.25)
    """

    metric: str
    scores: dict[Subset, float]
    higher_is_better: bool

    @property
    def full(self) -> float:
        """Score with all modalities."""
        return next(iter(self.scores.values()))

    @property
    def mean(self) -> float:
        """Mean score over the subsets, that of all modalities included."""
        return fmean(self.scores.values())

    @property
    def std(self) -> float:
        """Standard deviation over the subsets (of these very subsets, not an estimate for others)."""
        return float(np.std(list(self.scores.values())))

    @property
    def worst(self) -> Subset:
        """The subset with the worst score; NaN is worse than any number."""
        sign = 1 if self.higher_is_better else -1
        return min(self.scores, key=lambda subset: (not isnan(x := self.scores[subset]), sign * x))

    @property
    def lost(self) -> dict[Subset, float]:
        """Subset -> by how much its score is worse than with all modalities; negative where it is better."""
        sign = 1 if self.higher_is_better else -1
        return {subset: sign * (self.full - score) for subset, score in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        """The numbers in plain types, ready for JSON and trackers: the subsets as lists of names, None in place of NaN."""
        told = {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "scores": [{"given": list(subset), "score": x} for subset, x in self.scores.items()],
            "mean": self.mean,
            "std": self.std,
            "worst": list(self.worst),
        }
        return cast(dict[str, Any], plain(told))

    def table(self) -> str:
        """For printing: a row per subset, then mean, standard deviation and the worst subset. In signs that stdout has."""
        with extra("MissingModalities.table"):
            from rich import box
            from rich.table import Table
        modalities = next(iter(self.scores))
        table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
        for m in modalities:
            table.add_column(m, justify="center", no_wrap=True)
        table.columns[0].footer = "mean"
        table.add_column(self.metric, justify="right", footer=f"{_digits(self.mean)} ± {_digits(self.std)}", no_wrap=True)
        table.add_column("lost", justify="right")
        for subset, score in self.scores.items():
            marks = ("●" if m in subset else "·" for m in modalities)
            table.add_row(*marks, _digits(score), "" if subset == modalities else _digits(self.lost[subset]))
        return printable(rendered(table, f"worst: {' + '.join(self.worst)}, {_digits(self.scores[self.worst])}"))


def evaluate_missing(
    model: Model,
    data: Data,
    metric: Any,
    *,
    modalities: Sequence[str] | None = None,
    target: Callable[[Any], Any] | None = None,
    drop: Drop = "zeros",
    higher_is_better: bool | None = None,
    allow_absent: bool = False,
    progress: bool = True,
) -> MissingModalities:
    """Evaluates a model with every non-empty subset of its modalities, the others dropped.

    With more than five modalities: all, all but one, and each alone. The data is read once. A module is evaluated in ``eval()`` mode
    without gradients, on the device of its parameters, to which the batches are moved.

    Args:
        model: module or function, called with the inputs ``{modality: tensor}``. For a module with another signature a function:
            ``lambda x: net(x["rgb"], x["depth"])``; in that case ``net.eval()`` is yours to call.
        data: pairs ``(inputs, target)``, such as a ``DataLoader``. Modalities go by their names, in whatever order a batch lists them.
            Batches without a sample are left out.
        metric: a torchmetrics ``Metric``, updated batch by batch (a copy per subset, the given one stays untouched; where it gathers
            from other ranks, what fails on one is an error on all); or a function
            ``(predictions, targets) -> number``, called once per subset with all batches concatenated, on the CPU: images of
            different sizes as one row of pixels, ``(1, K, P)`` and ``(1, P)``. What the model returns goes to the metric as it is.
        modalities: the keys of the inputs that count; default those of the first batch.
        target: what ``metric`` gets of the targets: ``lambda held: held["mask"]`` where these are dicts; default all.
        drop: what takes the place of a dropped modality: ``"zeros"``; ``"noise"``, standard normal, drawn anew per batch from a fixed
            seed, the same in all subsets; or a function ``(modality, tensor) -> tensor``, where None leaves the key out. Zeros and
            noise suit inputs that are normalised to mean 0 and deviation 1.
        higher_is_better: for the worst subset and for what is lost; default that of the torchmetrics metric, else True.
        allow_absent: whether a batch may lack a modality (no key, or None), else an error. The model is then called without it in every
            subset, so that all scores are of the same samples.
        progress: show a progress bar on stderr, if that is a terminal and rich is installed.

    Returns:
        :class:`MissingModalities`: ``scores``, ``mean`` and ``std`` over the subsets, ``worst``, ``lost``, ``table()``,
        ``to_dict()``.

    Raises:
        ValueError, TypeError: data without pairs, a batch without one of the modalities, a metric that gives no single number.

    Example:
        >>> data = [({"rgb": torch.ones(4, 2), "depth": torch.zeros(4, 2)}, torch.tensor([1, 1, 1, 0]))]
        >>> def accuracy(scores, labels): return (scores.argmax(1) == labels).double().mean()
        >>> result = evaluate_missing(lambda x: x["rgb"].cumsum(1) + x["depth"], data, accuracy, progress=False)
        >>> result.scores
        {('rgb', 'depth'): 0.75, ('rgb',): 0.75, ('depth',): 0.25}
    """
    function = "evaluate_missing"
    check_model(model, function)
    streaming = check_metric(metric, function)
    check_drop(drop, function)
    if higher_is_better is None:
        higher_is_better = getattr(metric, "higher_is_better", None) is not False
    validate.flag(higher_is_better, function, "higher_is_better")
    collected: dict[frozenset[str], Any] = {}

    def collect() -> Subset:
        names = None if modalities is None else tuple(validate.different(modalities, function, "modalities"))
        generator = torch.Generator().manual_seed(0)
        for inputs, wanted in batches(model, data, function, progress, names, target=target, allow_absent=allow_absent):
            if names is None:
                names = tuple(inputs)
            elif modalities is None and (more := [name for name in inputs if name not in names]):
                validate.fail(function, "modalities", "given where the first batch lacks some", f"a later batch with {more[0]!r}")
            for subset, given in without(inputs, names, drop, generator, allow_absent=allow_absent):
                key = frozenset(subset)
                if key not in collected:
                    collected[key] = _copied(metric, inputs) if streaming else _Whole(metric)
                collected[key].update(model(copied(given)), wanted)
        assert names is not None
        return names

    with evaluating(model), torch.no_grad():
        names, *others = on_all_ranks(collect, _gathers_from(metric) if streaming else None, function)
        for other in others:
            if set(other) != set(names):
                validate.fail(function, "data", "of the same modalities on every rank", f"{list(names)} and {list(other)}")
        # In the same order on every rank, because a metric may gather.
        scores = {subset: _number(collected[frozenset(subset)].compute(), function) for subset in _subsets(names)}
    return MissingModalities(name_of(metric, "score"), scores, higher_is_better)


def check_metric(metric: Any, function: str) -> bool:
    """Whether it is updated batch by batch, as those of torchmetrics, and not a function."""
    streaming = all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset"))
    if isinstance(metric, type) or not (streaming or callable(metric)):
        got = f"the class {metric.__name__}" if isinstance(metric, type) else type(metric).__name__
        validate.fail(function, "metric", "a torchmetrics metric or a function", got, TypeError)
    return streaming


def check_drop(drop: Drop, function: str) -> None:
    if not callable(drop) and drop not in ("zeros", "noise"):
        validate.fail(function, "drop", "'zeros', 'noise' or a function", repr(drop))


def without(
    inputs: Mapping[str, Any],
    modalities: Sequence[str] | None = None,
    drop: Drop = "zeros",
    generator: torch.Generator | None = None,
    *,
    allow_absent: bool = False,
) -> Iterator[tuple[Subset, dict[str, Any]]]:
    """Every subset as in :func:`evaluate_missing`, with the inputs in which the others are dropped."""
    names = tuple(inputs) if modalities is None else tuple(modalities)
    present = [name for name in names if not (allow_absent and inputs.get(name) is None)]
    dropped = {name: _dropped(name, inputs[name], drop, generator) for name in present}
    for subset in _subsets(names):
        gone = {name: x for name, x in dropped.items() if name not in subset}
        yield subset, {name: x for name, x in {**inputs, **gone}.items() if x is not None or name not in gone}


def _subsets(names: Subset) -> Iterator[Subset]:
    sizes = range(len(names), 0, -1) if len(names) <= EXHAUSTIVE else (len(names), len(names) - 1, 1)
    for size in sizes:
        yield from combinations(names, size)


def _dropped(name: str, x: Any, drop: Drop, generator: torch.Generator | None) -> Tensor | None:
    function = "evaluate_missing"
    if not isinstance(x, Tensor):
        validate.fail(
            function, f"inputs[{name!r}]", "a tensor (choose the modalities with modalities=)", type(x).__name__, TypeError
        )
    if callable(drop):
        replaced = drop(name, x.clone())
        if replaced is not None and not isinstance(replaced, Tensor):
            validate.fail(function, "drop", "a function that returns a tensor or None", type(replaced).__name__, TypeError)
        return replaced
    if drop == "zeros":
        return torch.zeros_like(x)
    if not x.is_floating_point():
        validate.fail(function, "drop", f"'zeros' or a function, because inputs[{name!r}] is {x.dtype}", repr(drop))
    return torch.randn(x.shape, generator=generator, device="cpu").to(x)


class _Whole:
    """Calls a function once, on everything."""

    def __init__(self, metric: Callable[[Tensor, Tensor], Any]) -> None:
        self.metric = metric
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, predictions: Any, target: Any) -> None:
        if not all(isinstance(x, Tensor) and x.dim() > 0 for x in (predictions, target)):
            got = " and ".join(
                "a scalar" if isinstance(x, Tensor) and x.dim() == 0 else type(x).__name__ for x in (predictions, target)
            )
            expected = "tensors of a batch for a metric that is a function"
            validate.fail("evaluate_missing", "predictions and target", expected, got, TypeError)
        # Copies: a model may write its next result, a loader its next batch, into the same memory.
        self.seen.append((predictions.to("cpu", copy=True), target.to("cpu", copy=True)))

    def compute(self) -> Any:
        predictions, targets = (list(x) for x in zip(*self.seen, strict=True))
        if any(len({x.shape[1:] for x in tensors}) > 1 for tensors in (predictions, targets)):
            ranks = {p.dim() - t.dim() for p, t in self.seen}
            same = ranks == {0} and all(len({x.shape[1] for x in tensors}) == 1 for tensors in (predictions, targets))
            predictions = [_row(x, channels=same or ranks == {1}) for x in predictions]
            targets = [_row(x, channels=same) for x in targets]
            return self.metric(torch.cat(predictions, -1), torch.cat(targets, -1))
        return self.metric(torch.cat(predictions), torch.cat(targets))


def _row(x: Tensor, channels: bool) -> Tensor:
    """The pixels of all samples in a row: ``(1, C, P)``, or ``(1, P)``."""
    return x.movedim(1, -1).reshape(1, -1, x.shape[1]).mT if channels else x.reshape(1, -1)


def _gathers_from(metric: Any) -> "ProcessGroup | None":
    """The ranks from which a metric of torchmetrics gathers when it computes."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    parts = metric.modules() if isinstance(metric, nn.Module) else [metric]
    for part in parts:
        if getattr(part, "sync_on_compute", False):
            return cast("ProcessGroup | None", getattr(part, "process_group", None)) or dist.group.WORLD
    return None


def _copied(metric: Any, inputs: Mapping[str, Any]) -> Any:
    parts = metric.modules() if isinstance(metric, nn.Module) else [metric]
    groups = [getattr(part, "process_group", None) for part in parts]  # of ranks: they cannot be copied
    metric = deepcopy(metric, {id(group): group for group in groups})
    metric.reset()
    device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
    return metric.to(device) if isinstance(metric, nn.Module) else metric


def _number(value: Any, function: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        got = f"shape {validate.shape(value)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        validate.fail(function, "metric", "of one number (such as average='macro')", got)


def _digits(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"

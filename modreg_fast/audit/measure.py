"""The measurement: attribution and Fisher information per sample, modality and scale; bootstrap intervals over the samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast._evaluation import Data, Model, batches, evaluating, name_of
from modreg_fast.audit.examples import Example, examples
from modreg_fast.audit.result import Audit, Estimate
from modreg_fast.audit.source import Entries, Features, Traced, source
from modreg_fast.audit.targets import USUAL, Accuracy, classes, default_loss
from modreg_fast.distributed import on_all_ranks
from modreg_fast.functional import gradient_statistics, modality_share, resize_mask
from modreg_fast.functional.masks import pooled, spatial_shape, valid_pixels
from modreg_fast.losses.attribution import selected_score
from modreg_fast.missing import Drop, check_drop, check_metric, evaluate_missing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loss = Callable[[Tensor, Any], Tensor]

Key = tuple[str, str, int]  # place, modality, scale
Means = dict[Key, Tensor]  # of each channel

RESAMPLES, COVERAGE = 2000, 0.95


class _Place(NamedTuple):
    """Where shares are measured."""

    name: str
    features: Features
    channel_dim: int


class _Pass(NamedTuple):
    """A batch, and what the model made of it."""

    inputs: dict[str, Any]
    target: Any
    scores: Tensor
    places: list[_Place]  # the features; the inputs beside those of modules
    classes: Tensor | None
    valid: Tensor


class _Measured(NamedTuple):
    """Of a batch: modality -> ``(S, B)``, and the sizes of the scales."""

    attribution: dict[str, Tensor]
    information: dict[str, Tensor]
    at_inputs: dict[str, Tensor]  # (1, B)
    sizes: list[str]


class _Sum(NamedTuple):
    key: Key
    total: Tensor
    positions: int


def audit(
    model: Model,
    data: Data,
    features: Entries | None = None,
    *,
    metric: Any = None,
    loss: Loss | None = None,
    target: Callable[[Any], Any] | None = None,
    ignore_index: int | None = USUAL,
    baseline: Literal["zero", "mean"] = "zero",
    channel_dim: int = 1,
    drop: Drop = "zeros",
    allow_absent: bool = False,
    maps: int = 4,
    process_group: "ProcessGroup | None" = None,
    progress: bool = True,
) -> Audit:
    r"""Measures on which modality a classifier or a segmentation network relies, with 95 % intervals.

    Per sample, with the features :math:`e_{ms}` of modality :math:`m` at scale :math:`s`:

    - *share*: :math:`a_m / \sum_k a_k` with
      :math:`a_m = \sqrt{\sum_s \lVert \partial t / \partial e_{ms} \odot (e_{ms} - b_{ms}) \rVert^2}`, where :math:`t` sums the largest
      class score over valid positions and :math:`b` is the ``baseline``; with 0 what ``AttributionLoss`` steers (arXiv:2404.02359). Also
      for each scale by itself.
    - *information*: functional Fisher information of the loss map :math:`f` about :math:`e_{ms}`,
      :math:`\operatorname{mean}_p \sum_c g_{cp}^2 / f_p` with :math:`g = \partial \sum_p f_p / \partial e_{ms}` (Gat et al., NeurIPS
      2020). Where loss map and features have different numbers of spatial dimensions, of the mean loss:
      :math:`\lVert \partial \bar f / \partial e_{ms} \rVert^2 / \bar f`.

    Reported is the mean over the samples with a valid position, with a percentile bootstrap interval (2000 resamples of samples, fixed
    seed). Then :func:`modreg_fast.evaluate_missing`. The share is a statement about gradients at the place that was looked at, and depends
    on where 0 lies there; the missing-modality scores are one about accuracy. Read them together; the verdict says where they disagree.
    Where ``features`` are named, the same run measures the share at the inputs too, which takes a backward pass through the encoders.

    Args:
        model: called with the inputs ``{modality: tensor}``, returns class scores ``(B, K, *spatial)``, of two classes also one logit
            ``(B, 1, *spatial)``; a module, with ``features=None`` also a function. Runs in ``eval()`` mode, on the device of its
            parameters, to which the batches are moved.
        data: pairs ``(inputs, target)``, read twice (with ``baseline="mean"`` three times): a ``DataLoader`` or a list. Modalities go by
            their names, in whatever order a batch lists them. Batches without a sample are left out.
        features: what to attribute to, modality -> modules as in :func:`modreg_fast.capture`; best what enters the fusion. The
            same number of scales for each modality. Modalities may name the same module where each of its runs takes the input of one
            of them. Default: the inputs themselves.
        metric: as in ``evaluate_missing``; default accuracy over valid positions.
        loss: ``(scores, target) -> (B, *spatial)``, at least 0 where valid; default the cross entropy per position, of classes or of
            probabilities over them, binary where the scores are one logit.
        target: what ``loss`` and ``metric`` get of the targets: ``lambda held: held["mask"]`` where these are dicts; default all.
        ignore_index: positions of this class are not valid. Classes are whole numbers of any dtype, ``(B, *spatial)`` or
            ``(B, 1, *spatial)``. Where a target is something else, any ``ignore_index`` but -100 is an error, and -100 too where it
            occurs; None: all positions are valid.
        baseline: what counts as no contribution of a feature: ``"zero"``, or ``"mean"``, the mean of each channel over the valid positions
            of all samples, which makes the shares independent of constants that the model takes off again.
        channel_dim: dimension of the channels in the features; 1, or -1 for tokens. In inputs beside them it is 1, unless all are
            ``(B, N, C)`` too.
        drop: what takes the place of a missing modality, as in ``evaluate_missing``.
        allow_absent: whether a batch may lack a modality (no key, or None), else an error. Its samples then have share 0 of that modality
            and do not count in its information. With ``features`` the model must run the named modules all the same.
        maps: for how many samples, from the first, to keep the share of each pixel. Needs the same resolution for all modalities: maps
            ``(B, C, H, W)``; volumes ``(B, C, D, H, W)``, of which the central slice is shown; or tokens ``(B, N, C)`` that are square
            patches of the modality's input ``(B, C, H, W)``, cubes of a volume, in reading order behind up to eight others (class,
            registers). Otherwise ``no_maps`` and the page say what came.
        process_group: its ranks audit together, each with samples of its own: all return the numbers of all samples, each with the maps
            of its own; what fails on one is an error on all. A ``metric`` is then one of torchmetrics, which gathers by itself
            (``process_group`` in its constructor). None: no other rank is waited for, except by a metric of torchmetrics without
            ``sync_on_compute=False``.
        progress: show progress bars on stderr.

    Returns:
        :class:`Audit`: ``verdict``, ``share``, ``share_by_scale``, ``share_at_inputs``, ``information``, ``missing``, and ``table()``,
        ``plot()``, ``to_dict()``, ``to_json()``, ``to_html()``.

    Raises:
        ValueError, TypeError: arguments, data or scores that do not fit.
        ModuleNotFoundError: without ``modreg_fast[audit]``.

    Example:
        >>> rgb, depth = torch.randn(8, 3), torch.randn(8, 3)
        >>> data = [({"rgb": rgb, "depth": depth}, rgb.argmax(1))]
        >>> result = audit(lambda x: 9 * x["rgb"] + x["depth"], data, progress=False)
        >>> result.share["rgb"].mean > 0.5
        True
    """
    if isinstance(maps, bool) or not isinstance(maps, int) or maps < 0:
        validate.fail("audit", "maps", "a number of samples, at least 0", repr(maps))
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        validate.fail("audit", "ignore_index", "an integer or None", repr(ignore_index), TypeError)
    check_drop(drop, "audit")
    if loss is not None and not callable(loss):
        validate.fail("audit", "loss", "a function", type(loss).__name__, TypeError)
    validate.one_of(baseline, ("zero", "mean"), "audit", "baseline")
    if metric is not None and not check_metric(metric, "audit") and process_group is not None:
        validate.fail(
            "audit", "metric", "one of torchmetrics with process_group: a function sees the samples of one rank", "a function"
        )
    if isinstance(data, Iterator):
        validate.fail("audit", "data", "readable twice, such as a DataLoader or a list", f"a {type(data).__name__}")
    score = metric
    shown: list[Example] = []
    no_maps = ""
    with evaluating(model), torch.inference_mode(False), torch.enable_grad(), source(model, features) as forward:

        def passes() -> Iterator[_Pass]:
            named = None if features is None else tuple(features)
            for inputs, held in batches(
                model, data, "audit", progress, named, target=target, argument="features", allow_absent=allow_absent
            ):
                traced = forward(inputs)
                yield _Pass(
                    inputs, held, traced.scores, _places(traced, channel_dim), *classes(traced.scores, held, ignore_index)
                )

        def sums() -> list[_Sum]:
            return [x for p in passes() for place in p.places for x in _sums(place, p.valid)]

        def measured() -> list[_Measured]:
            nonlocal no_maps, score
            rows, names = [], set(features or ())
            for p in passes():
                place, given = p.places[0], p.places[0].features
                values = default_loss(p.scores, p.target, p.classes, ignore_index) if loss is None else _loss(p, loss)
                if score is None:
                    score = Accuracy(p.scores.shape[1], ignore_index, process_group)
                if isinstance(score, Accuracy):
                    score.check(p.scores, p.classes)
                names |= set(given)
                wanted = maps - len(shown) if len(given) == len(names) else 0  # colours stand for places in the list of all
                t = selected_score(p.scores, None, p.valid, "audit")
                attribution, pixels = _attribution(place, _gradients(t, given), p.valid, means, maps=wanted > 0)
                attribution = _finite(attribution, "the scores")
                information = _information(values, given, p.valid, channel_dim)
                a, i = (dict(zip(given, x.double().cpu(), strict=True)) for x in (attribution, information))
                rows.append(_Measured(a, i, _at_inputs(p, t, means), _sizes(given, channel_dim)))
                found, no_maps = examples(p.inputs, pixels, list(given), wanted)
                shown.extend(found)
            return rows

        means = _means(chain(*on_all_ranks(sums, process_group, "audit"))) if baseline == "mean" else {}
        rows = list(chain(*on_all_ranks(measured, process_group, "audit")))
    names = list(dict.fromkeys(features or chain(*(row.attribution for row in rows))))
    a = _stacked([row.attribution for row in rows], names, 0)
    i = _stacked([row.information for row in rows], names, torch.nan)
    counts = a.sum((0, 1)) != 0
    a, i = a[..., counts], i[..., counts]
    if a.shape[2] == 0:
        validate.fail("audit", "data", "at least one sample with a valid position and scores that depend on the features", "none")
    missing = evaluate_missing(
        model, data, score, modalities=names, target=target, drop=drop, allow_absent=allow_absent, progress=progress
    )
    share = modality_share(torch.linalg.vector_norm(a, dim=1))
    at_inputs = []
    if all(row.at_inputs for row in rows):
        at_inputs = _estimates(modality_share(_stacked([row.at_inputs for row in rows], names, 0)[:, 0, counts]))
    by_scale = torch.where(a.sum(0) > 0, a / a.sum(0), torch.nan)  # a scale may lack valid pixels where the sample has some
    return Audit(
        model=name_of(model, "a function"),
        samples=a.shape[2],
        scales=_scale_names([row.sizes for row in rows], features is None),
        share=dict(zip(names, _estimates(share), strict=True)),
        share_by_scale=dict(zip(names, map(_estimates, by_scale), strict=True)),
        information=dict(zip(names, map(_estimates, i), strict=True)),
        missing=replace(missing, metric="accuracy") if metric is None else missing,
        examples=shown,
        no_maps=no_maps,
        share_at_inputs=dict(zip(names, at_inputs, strict=bool(at_inputs))),
        measured_at="inputs" if features is None else "features",
        baseline=baseline,
    )


def _loss(p: _Pass, loss: Loss) -> Tensor:
    what = "what loss returns"
    values = validate.tensor(loss(p.scores, p.target), "audit", what)
    validate.same(values, p.scores[:, 0], "audit", what, "scores without their classes")
    if not values.requires_grad:
        validate.fail("audit", what, "computed from the scores with a gradient", "a tensor without one")
    counted = values.detach()[p.valid]
    if counted.numel() and (counted < -1e-5 * counted.abs().max()).any():  # more than rounding
        validate.fail("audit", what, "at least 0", f"{counted.min().item():.3g}")
    return values


def _gradients(of: Tensor, features: Features) -> list[Tensor]:
    found = []
    labels = [f"features[{name!r}][{s}]" for name, row in features.items() for s in range(len(row))]
    for label, g in zip(labels, _traced(of, features), strict=True):
        if g is None:
            validate.fail("audit", label, "a tensor from which the model computes its scores", "one that they do not depend on")
        found.append(g)
    return found


def _traced(of: Tensor, features: Features) -> tuple[Tensor | None, ...]:
    """The gradient by each tensor; None where there is no path."""
    return torch.autograd.grad(of.sum(), [x for row in features.values() for x in row], retain_graph=True, allow_unused=True)


def _by_modality(rows: Tensor, features: Features) -> Tensor:
    """``(K, B)`` as ``(M, S, B)``."""
    scales = {name: len(row) for name, row in features.items()}
    if len(set(scales.values())) > 1:
        validate.fail("audit", "features", "of the same number of scales for each modality", scales)
    return rows.reshape(len(features), -1, rows.shape[1])


def _feature_masks(features: Features, mask: Tensor, channel_dim: int) -> list[Tensor]:
    sizes = [spatial_shape(x, channel_dim) for row in features.values() for x in row]
    everywhere = torch.ones((), dtype=torch.bool, device=mask.device)  # in features that have no pixels of the scores
    return [resize_mask(mask, n) if len(n) == mask.dim() - 1 else everywhere.expand(len(mask), *n) for n in sizes]


def _places(traced: Traced, channel_dim: int) -> list[_Place]:
    for m, row in traced.features.items():
        for s, x in enumerate(row):
            validate.feature(x, "audit", f"features[{m!r}][{s}]", channel_dim)
    places = [_Place("features", traced.features, channel_dim)]
    inputs = {m: [y] for m in traced.features if (y := traced.inputs.get(m)) is not None and _is_plain(y)}
    if len(inputs) == len(traced.features):
        tokens = all(x.dim() == 3 for (x,) in inputs.values())
        places.append(_Place("inputs", inputs, channel_dim if tokens else 1))
    return places


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested and x.dim() > 1


def _keys(place: _Place) -> list[Key]:
    return [(place.name, m, s) for m, row in place.features.items() for s in range(len(row))]


def _sums(place: _Place, mask: Tensor) -> list[_Sum]:
    """Per feature the sum over valid positions and samples of each channel, and how many they are."""
    masks = _feature_masks(place.features, mask, place.channel_dim)
    found = []
    for key, valid in zip(_keys(place), masks, strict=True):
        x = place.features[key[1]][key[2]].detach().movedim(place.channel_dim, -1)
        found.append(_Sum(key, torch.where(valid[..., None], x, 0).double().flatten(0, -2).sum(0).cpu(), int(valid.sum())))
    return found


def _means(sums: Iterable[_Sum]) -> Means:
    total: dict[Key, tuple[Tensor, int]] = {}
    for key, x, count in sums:
        before, counted = total.get(key, (torch.zeros_like(x), 0))
        total[key] = before + x, counted + count
    return {key: x / max(count, 1) for key, (x, count) in total.items()}


def _attribution(
    place: _Place, grads: Sequence[Tensor], mask: Tensor, means: Means, *, maps: bool
) -> tuple[Tensor, list[list[Tensor]]]:
    """Attribution ``(M, S, B)``, and where asked that of each pixel, ``[m][s]`` of shape ``(B, *spatial)``."""
    features, channel_dim = place.features, place.channel_dim
    tensors = [_less(features[key[1]][key[2]], means.get(key), channel_dim) for key in _keys(place)]
    # What the scores do not read, such as NaN where a sensor saw nothing, contributes 0.
    tensors = [torch.where(g == 0, 0, x) for g, x in zip(grads, tensors, strict=True)]
    masks = _feature_masks(features, mask, channel_dim)
    found = gradient_statistics(grads, features=tensors, mask=masks, channel_dim=channel_dim, maps=maps)
    assert found.attribution is not None
    scales = len(tensors) // len(features)
    pixels = [] if found.attribution_maps is None else found.attribution_maps
    rows = [[x.detach() for x in pixels[k : k + scales]] for k in range(0, len(pixels), scales)]
    return _by_modality(found.attribution, features), rows


def _at_inputs(p: _Pass, t: Tensor, means: Means) -> dict[str, Tensor]:
    """Modality -> attribution at its input, ``(1, B)``; empty where ``t`` cannot be traced back to the inputs of all."""
    for place in p.places[1:]:
        grads = [g for g in _traced(t, place.features) if g is not None]
        if len(grads) == len(place.features):
            attribution, _ = _attribution(place, grads, p.valid, means, maps=False)
            if attribution.isfinite().all():
                return dict(zip(place.features, attribution.double().cpu(), strict=True))
    return {}


def _less(x: Tensor, mean: Tensor | None, channel_dim: int) -> Tensor:
    x = x.detach()
    if mean is None:
        return x
    precise = torch.promote_types(x.dtype, torch.float32)
    return (x.to(precise).movedim(channel_dim, -1) - mean.to(x.device, precise)).movedim(-1, channel_dim).to(x.dtype)


def _information(values: Tensor, features: Features, mask: Tensor, channel_dim: int) -> Tensor:
    """Functional Fisher information ``(M, S, B)`` of the loss map ``values``; NaN where a scale has no valid pixel."""
    values = torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0)
    count = valid_pixels(mask).clamp(min=1)
    rows = []
    for g in _gradients(values, features):
        size = spatial_shape(g, channel_dim)
        whole = len(size) != values.dim() - 1
        if whole:  # of the mean loss, whose gradient is g / count, too small for float16
            g, f, valid, dim = g.flatten(1), values.reshape(len(values), -1).sum(1) / count, count > 0, 1
        else:
            f, valid, dim = pooled(values, mask, size), resize_mask(mask, size) if size else mask, channel_dim
        fisher = gradient_statistics([g], values=[f], mask=valid, channel_dim=dim).fisher
        assert fisher is not None
        found = _finite(fisher[0], "the loss") / (count.square() if whole else 1)
        rows.append(torch.where(valid_pixels(valid) > 0, found, torch.nan))
    return _by_modality(torch.stack(rows), features)


def _finite(x: Tensor, what: str) -> Tensor:
    """Or NaN would be taken for what does not count."""
    if not x.isfinite().all():
        validate.fail("audit", f"the gradient of {what}", "finite", "NaN or infinity")
    return x.detach()


def _sizes(features: Features, channel_dim: int) -> list[str]:
    return [" x ".join(map(str, spatial_shape(x, channel_dim))) for x in next(iter(features.values()))]


def _scale_names(sizes: list[list[str]], inputs: bool) -> list[str]:
    """With the size where all batches have the same."""
    names = ["input"] if inputs else [str(s + 1) for s in range(len(sizes[0]))]
    same = [found.pop() if len(found := set(column)) == 1 else "" for column in zip(*sizes, strict=True)]
    return [f"{name} ({size})" if size else name for name, size in zip(names, same, strict=True)]


def _stacked(rows: list[dict[str, Tensor]], names: Sequence[str], absent: float) -> Tensor:
    """``(M, S, B)`` of all batches, by name; ``absent`` where a batch lacks a modality."""
    empty = [torch.full_like(next(iter(row.values())), absent) for row in rows]
    return torch.cat([torch.stack([row.get(m, x) for m in names]) for row, x in zip(rows, empty, strict=True)], 2)


def _estimates(values: Tensor) -> list[Estimate]:
    """Mean over the samples with its bootstrap interval, of each row of ``(K, B)``; NaN does not count."""
    generator = torch.Generator().manual_seed(0)
    valid = (~values.isnan()).to(values.dtype)
    values, samples, means = values.nan_to_num(), values.shape[1], []
    for _ in range(0, RESAMPLES, 100):  # weights of a hundred resamples at a time
        drawn = torch.randint(samples, (samples, 100), generator=generator, device=values.device)
        weights = torch.zeros_like(drawn, dtype=values.dtype).scatter_add_(0, drawn, torch.ones_like(drawn, dtype=values.dtype))
        means.append((values @ weights) / (valid @ weights))
    tail = (1 - COVERAGE) / 2
    low, high = torch.nanquantile(torch.cat(means, 1), values.new_tensor([tail, 1 - tail]), dim=1)
    return [Estimate(*x) for x in torch.stack([values.sum(1) / valid.sum(1), low, high], 1).tolist()]

"""The measurement: attribution and Fisher information per sample, modality and scale; bootstrap intervals over the samples."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modreg_fast import _validate as validate
from modreg_fast._evaluation import Data, Model, batches, evaluating, extra, name_of
from modreg_fast.audit.examples import Example, examples
from modreg_fast.audit.result import Audit, Estimate
from modreg_fast.capture import Entry, capture
from modreg_fast.distributed import gather_samples
from modreg_fast.functional import gradient_statistics, modality_share, resize_mask
from modreg_fast.functional.masks import pooled, spatial_shape, valid_pixels
from modreg_fast.losses.attribution import selected_score
from modreg_fast.missing import Drop, evaluate_missing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loss = Callable[[Tensor, Any], Tensor]
Features = dict[str, list[Tensor]]

RESAMPLES, COVERAGE = 2000, 0.95


def audit(
    model: Model,
    data: Data,
    features: Mapping[str, Entry | Sequence[Entry]] | None = None,
    *,
    metric: Any = None,
    loss: Loss | None = None,
    ignore_index: int = -100,
    channel_dim: int = 1,
    drop: Drop = "zeros",
    maps: int = 4,
    process_group: "ProcessGroup | None" = None,
    progress: bool = True,
) -> Audit:
    r"""Measures on which modality a classifier or a segmentation network relies, with 95 % intervals.

    Per sample, with the features :math:`e_{ms}` of modality :math:`m` at scale :math:`s`:

    - *share*: :math:`a_m / \sum_k a_k` with :math:`a_m = \sqrt{\sum_s \lVert \partial t / \partial e_{ms} \odot e_{ms} \rVert^2}`, where
      :math:`t` sums the largest class score over valid positions; what ``AttributionLoss`` steers (arXiv:2404.02359). Also for each
      scale by itself.
    - *information*: functional Fisher information of the loss map :math:`f` about :math:`e_{ms}`,
      :math:`\operatorname{mean}_p \sum_c g_{cp}^2 / f_p` with :math:`g = \partial \sum_p f_p / \partial e_{ms}` (Gat et al., NeurIPS
      2020). Where loss map and features have different numbers of spatial dimensions, of the mean loss:
      :math:`\lVert \partial \bar f / \partial e_{ms} \rVert^2 / \bar f`.

    Reported is the mean over the samples with a valid position, with a percentile bootstrap interval (2000 resamples of samples, fixed
    seed). Then :func:`modreg_fast.evaluate_missing`. The share is a statement about gradients, the missing-modality scores one about
    accuracy: read them together.

    Args:
        model: called with the inputs ``{modality: tensor}``, returns class scores ``(B, K, *spatial)``; a module, with ``features=None``
            also a function. Runs in ``eval()`` mode, on the device of its parameters, to which the batches are moved.
        data: pairs ``(inputs, target)``, read twice: a ``DataLoader`` or a list.
        features: what to attribute to, modality -> modules as in :func:`modreg_fast.capture`; best what enters the fusion. The
            same number of scales for each modality. Default: the inputs themselves.
        metric: as in ``evaluate_missing``; default accuracy over valid positions (torchmetrics).
        loss: ``(scores, target) -> (B, *spatial)``, at least 0; default the cross entropy per position.
        ignore_index: positions with this target are not valid.
        channel_dim: dimension of the channels in the features; 1, or -1 for tokens.
        drop: what takes the place of a missing modality, as in ``evaluate_missing``.
        maps: for how many samples, from the first, to keep the share of each pixel. Needs the same resolution for all modalities: maps
            ``(B, C, H, W)``; volumes ``(B, C, D, H, W)``, of which the central slice is shown; or tokens ``(B, N, C)`` that are square
            patches of the modality's input ``(B, C, H, W)``, cubes of a volume, in reading order behind up to eight others (class,
            registers). Otherwise ``no_maps`` and the page say what came.
        process_group: its ranks audit together, each with samples of its own: all return the numbers of all samples, each with the maps
            of its own. A ``metric`` is then one of torchmetrics, which gathers by itself (``process_group`` in its constructor). None: no
            other rank is waited for, except by a metric of torchmetrics without ``sync_on_compute=False``.
        progress: show progress bars on stderr.

    Returns:
        :class:`Audit`: ``verdict``, ``share``, ``share_by_scale``, ``information``, ``missing``, and ``table()``, ``plot()``,
        ``to_json()``, ``to_html()``.

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
    if process_group is not None and metric is not None and not callable(getattr(metric, "compute", None)):
        validate.fail(
            "audit", "metric", "one of torchmetrics with process_group: a function sees the samples of one rank", "a function"
        )
    if isinstance(data, Iterator):
        validate.fail("audit", "data", "readable twice, such as a DataLoader or a list", f"a {type(data).__name__}")
    attribution: list[Tensor] = []
    information: list[Tensor] = []
    shown: list[Example] = []
    classes, no_maps = 0, ""
    with evaluating(model), torch.enable_grad(), _source(model, features) as forward:
        for inputs, target in batches(model, data, "audit", progress):
            scores, captured = forward(inputs)
            classes = scores.shape[1]
            mask = _mask(scores, target, ignore_index)
            values = _loss(scores, target, ignore_index, loss)
            a, pixels = _attribution(scores, captured, mask, channel_dim, maps=len(shown) < maps)
            counts = (a.sum((0, 1)) != 0).cpu()
            attribution.append(a.cpu()[..., counts])
            information.append(_information(values, captured, mask, channel_dim).cpu()[..., counts])
            found, no_maps = examples(inputs, pixels, list(captured), maps - len(shown))
            shown += found
    a, i = (gather_samples(torch.cat(x, 2).double(), process_group) for x in (attribution, information))
    if a.shape[2] == 0:
        validate.fail("audit", "data", "at least one sample with a valid position and scores that depend on the features", "none")
    names = list(captured)
    score = _accuracy(classes, ignore_index, process_group) if metric is None else metric
    missing = evaluate_missing(model, data, score, modalities=names, drop=drop, progress=progress)
    share = modality_share(torch.linalg.vector_norm(a, dim=1))
    by_scale = torch.where(a.sum(0) > 0, a / a.sum(0), torch.nan)  # a scale may lack valid pixels where the sample has some
    return Audit(
        model=name_of(model, "a function"),
        samples=a.shape[2],
        scales=_scale_names(captured, channel_dim, features is None),
        share=dict(zip(names, _estimates(share), strict=True)),
        share_by_scale=dict(zip(names, map(_estimates, by_scale), strict=True)),
        information=dict(zip(names, map(_estimates, i), strict=True)),
        missing=replace(missing, metric="accuracy") if metric is None else missing,
        examples=shown,
        no_maps=no_maps,
    )


@contextlib.contextmanager
def _source(
    model: Model, features: Mapping[str, Entry | Sequence[Entry]] | None
) -> Iterator[Callable[[dict[str, Any]], tuple[Tensor, Features]]]:
    """``inputs -> (scores, features)``."""
    if features is not None:
        if not isinstance(model, nn.Module):
            validate.fail("audit", "model", "a torch.nn.Module when features are named", type(model).__name__, TypeError)
        with capture(model, features) as captured:

            def forward(inputs: dict[str, Any]) -> tuple[Tensor, Features]:
                for name in captured:
                    if name not in inputs:
                        validate.fail(
                            "audit", "features", f"of the modalities in the inputs, {', '.join(map(repr, inputs))}", repr(name)
                        )
                return _scores(model(inputs)), captured

            yield forward
        return
    if not callable(model):
        validate.fail("audit", "model", "a module or a function", type(model).__name__, TypeError)

    def forward_from_inputs(inputs: dict[str, Any]) -> tuple[Tensor, Features]:
        for name, x in inputs.items():
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                validate.fail(
                    "audit", f"inputs[{name!r}]", "a floating point tensor, or name modules with features=", got, TypeError
                )
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        return _scores(model(leaves)), {name: [x] for name, x in leaves.items()}

    yield forward_from_inputs


def _scores(scores: object) -> Tensor:
    if not isinstance(scores, Tensor) or scores.dim() < 2 or not scores.requires_grad:
        kind = f"shape {validate.shape(scores)} without a gradient" if isinstance(scores, Tensor) else type(scores).__name__
        validate.fail("audit", "what the model returns", "class scores (B, K, *spatial) with a gradient", kind, TypeError)
    return scores


def _mask(scores: Tensor, target: object, ignore_index: int) -> Tensor:
    """The valid positions: all, unless ``target`` holds a class for each."""
    if isinstance(target, Tensor) and not target.is_floating_point() and target.shape == scores[:, 0].shape:
        return target != ignore_index
    return torch.ones_like(scores[:, 0], dtype=torch.bool)


def _loss(scores: Tensor, target: Any, ignore_index: int, loss: Loss | None) -> Tensor:
    if loss is None:
        return F.cross_entropy(scores, target, ignore_index=ignore_index, reduction="none")
    values = validate.tensor(loss(scores, target), "audit", "what loss returns")
    validate.same(values, scores[:, 0], "audit", "what loss returns", "scores without their classes")
    return values


def _gradients(of: Tensor, features: Features) -> list[Tensor]:
    grads = torch.autograd.grad(of.sum(), [x for row in features.values() for x in row], retain_graph=True, allow_unused=True)
    labels = [f"features[{name!r}][{s}]" for name, row in features.items() for s in range(len(row))]
    for label, g in zip(labels, grads, strict=True):
        if g is None:
            validate.fail("audit", label, "a tensor from which the model computes its scores", "one that they do not depend on")
    return list(grads)


def _by_modality(rows: Tensor, features: Features) -> Tensor:
    """``(K, B)`` as ``(M, S, B)``."""
    scales = {name: len(row) for name, row in features.items()}
    if len(set(scales.values())) > 1:
        validate.fail("audit", "features", "of the same number of scales for each modality", scales)
    return rows.reshape(len(features), -1, rows.shape[1])


def _attribution(
    scores: Tensor, features: Features, mask: Tensor, channel_dim: int, *, maps: bool
) -> tuple[Tensor, list[list[Tensor]]]:
    """Attribution ``(M, S, B)``, and where asked that of each pixel, ``[m][s]`` of shape ``(B, *spatial)``."""
    tensors = [x for row in features.values() for x in row]
    sizes = [spatial_shape(x, channel_dim) for x in tensors]
    everywhere = torch.ones((), dtype=torch.bool, device=mask.device)  # in features that have no pixels of the scores
    masks = [resize_mask(mask, n) if len(n) == mask.dim() - 1 else everywhere.expand(len(mask), *n) for n in sizes]
    grads = _gradients(selected_score(scores, None, mask, "audit"), features)
    found = gradient_statistics(grads, features=tensors, mask=masks, channel_dim=channel_dim, maps=maps)
    assert found.attribution is not None
    scales = len(tensors) // len(features)
    pixels = [] if found.attribution_maps is None else found.attribution_maps
    rows = [[x.detach() for x in pixels[k : k + scales]] for k in range(0, len(pixels), scales)]
    return _by_modality(_finite(found.attribution, "the scores"), features), rows


def _information(values: Tensor, features: Features, mask: Tensor, channel_dim: int) -> Tensor:
    """Functional Fisher information ``(M, S, B)`` of the loss map ``values``; NaN where a scale has no valid pixel."""
    values = torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0)
    count = valid_pixels(mask).clamp(min=1)
    rows = []
    for g in _gradients(values, features):
        size = spatial_shape(g, channel_dim)
        if len(size) == values.dim() - 1:
            f, valid, dim = pooled(values, mask, size), resize_mask(mask, size) if size else mask, channel_dim
        else:  # of the mean loss
            g, f, valid, dim = g.flatten(1) / count[:, None], values.reshape(len(values), -1).sum(1) / count, count > 0, 1
        fisher = gradient_statistics([g], values=[f], mask=valid, channel_dim=dim).fisher
        assert fisher is not None
        rows.append(torch.where(valid_pixels(valid) > 0, _finite(fisher[0], "the loss"), torch.nan))
    return _by_modality(torch.stack(rows), features)


def _finite(x: Tensor, what: str) -> Tensor:
    """Or NaN would be taken for what does not count."""
    if not x.isfinite().all():
        validate.fail("audit", f"the gradient of {what}", "finite", "NaN or infinity")
    return x.detach()


def _accuracy(classes: int, ignore_index: int, group: "ProcessGroup | None") -> Any:
    with extra("audit"):
        from torchmetrics.classification import MulticlassAccuracy
    if classes < 2:
        validate.fail("audit", "metric", "given where the scores have one class", "None")
    return MulticlassAccuracy(
        classes, average="micro", ignore_index=ignore_index, process_group=group, sync_on_compute=group is not None
    )


def _scale_names(features: Features, channel_dim: int, inputs: bool) -> list[str]:
    sizes = [" x ".join(map(str, spatial_shape(x, channel_dim))) for x in next(iter(features.values()))]
    names = ["input"] if inputs else [str(s + 1) for s in range(len(sizes))]
    return [f"{name} ({size})" if size else name for name, size in zip(names, sizes, strict=True)]


def _estimates(values: Tensor) -> list[Estimate]:
    """Mean over the samples with its bootstrap interval, of each row of ``(K, B)``; NaN does not count."""
    generator = torch.Generator().manual_seed(0)
    valid = (~values.isnan()).to(values.dtype)
    values, samples, means = values.nan_to_num(), values.shape[1], []
    for _ in range(0, RESAMPLES, 100):  # weights of a hundred resamples at a time
        drawn = torch.randint(samples, (samples, 100), generator=generator)
        weights = torch.zeros(samples, 100, dtype=values.dtype).scatter_add_(0, drawn, torch.ones_like(drawn, dtype=values.dtype))
        means.append((values @ weights) / (valid @ weights))
    tail = (1 - COVERAGE) / 2
    low, high = torch.nanquantile(torch.cat(means, 1), torch.tensor([tail, 1 - tail], dtype=values.dtype), dim=1)
    return [Estimate(*x) for x in torch.stack([values.sum(1) / valid.sum(1), low, high], 1).tolist()]

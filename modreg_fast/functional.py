"""Differentiable functions: validation, documentation, one call to an op each."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast import ops
from modreg_fast.backends import resolve

__all__ = [
    "GradientStatistics",
    "balance_penalty",
    "functional_entropy",
    "gradient_statistics",
    "modality_share",
    "resize_mask",
    "softmax_fisher_information",
]


def softmax_fisher_information(
    features: Sequence[Sequence[Tensor]],
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    present: Tensor | None = None,
    sigma: float | Sequence[float] = 0.0,
    samples: int = 1,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    detach_reference: bool = False,
    channel_dim: int = 1,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    r"""Functional Fisher information of every modality at every feature scale, in closed form and in one pass.

    Per scale and pixel, with the features :math:`X_m` of modality :math:`m`,

    .. math::
        q = \operatorname{softmax}_c \operatorname{mean}_m X_m, \qquad
        p_m = \operatorname{softmax}_c (X_m + \sigma_m \epsilon), \qquad
        f_m = -\sum_c q_c \log p_{mc}, \qquad
        I_m = \frac{\sum_c (p_{mc} - q_c)^2}{f_m + \text{eps}}

    which is :math:`\lVert \nabla f \rVert^2 / f`, because :math:`\nabla_{X_m} f_m = p_m - q`. Source: the feature-level term of
    arXiv:2505.06635 with the log-Sobolev bound of Gat et al. (NeurIPS 2020), gradient written out.

    Args:
        features: ``features[m][s]`` of shape ``(B, C_s, *spatial_s)``, spatial shape of any rank, also none. All modalities have the
            same shape at a scale. float32, float64, bfloat16 or float16; where dtypes differ at a scale, the promoted one. Pixels
            contiguous or channels last are read in place; other strides are copied once.
        mask: valid pixels, bool. One tensor ``(B, *spatial)`` at any resolution (a coarse pixel is valid when at least half of it is),
            or one per scale.
        present: ``(B, M)`` bool; an absent modality counts neither in its own mean nor in the reference ``q``.
        sigma: standard deviation of the Gaussian noise, at least 0; one number, or one per modality.
        samples: number of noise draws, at least 1. They cost no memory.
        seed: seed of the noise. By default it is drawn from ``generator``, or from torch's default generator of the device.
        generator: source of the seed.
        detach_reference: no gradient through ``q``.
        channel_dim: dimension of the channels in every feature: 1, or -1 for tokens ``(B, N, C)``.
        eps: added to ``f``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``; default: the best for the tensors (see :func:`modreg_fast.use_backend`).

    Returns:
        ``(M, S, B)``, the mean of :math:`I_m \ge 0` over valid pixels and draws; float64 if any input is, else float32. 0, with zero
        gradient, where a sample has no valid pixel or lacks the modality.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which and why.

    Example:
        >>> rgb, depth = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
        >>> softmax_fisher_information([[rgb], [depth]]).shape
        torch.Size([2, 1, 2])
    """
    information, _ = softmax_fisher_with_counts(
        features, mask, present, sigma, samples, seed, generator, detach_reference, channel_dim, eps, backend
    )
    return information


def softmax_fisher_with_counts(
    features: Sequence[Sequence[Tensor]],
    mask: Tensor | Sequence[Tensor] | None,
    present: Tensor | None,
    sigma: float | Sequence[float],
    samples: int,
    seed: int | None,
    generator: torch.Generator | None,
    detach_reference: bool,
    channel_dim: int,
    eps: float,
    backend: str | None,
    *,
    function: str = "softmax_fisher_information",
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`softmax_fisher_information` and the number of valid pixels ``(S, B)``. ``names``: of the modalities, for messages."""
    modalities = len(validate.sequence(features, function, "features"))
    labels = [f"features[{m}]" for m in range(modalities)] if names is None else [f"features[{name!r}]" for name in names]
    features = [validate.sequence(row, function, label) for label, row in zip(labels, features, strict=True)]
    scales = len(features[0])
    for label, row in zip(labels, features, strict=True):
        if len(row) != scales:
            validate.fail(function, label, f"a list of {scales} scales like {labels[0]}", f"{len(row)}")

    flat: list[list[Tensor]] = [[] for _ in range(modalities)]
    for s in range(scales):
        for m in range(modalities):
            x = validate.feature(features[m][s], function, f"{labels[m]}[{s}]", channel_dim)
            validate.same(features[m][s], features[0][s], function, f"{labels[m]}[{s}]", f"{labels[0]}[{s}]")
            flat[m].append(x)
        if flat[0][s].shape[0] != flat[0][0].shape[0] or flat[0][s].device != flat[0][0].device:
            first = flat[0][0]
            validate.fail(
                function,
                f"{labels[0]}[{s}]",
                f"of batch size {first.shape[0]} on {first.device} like the first scale",
                f"{flat[0][s].shape[0]} on {flat[0][s].device}",
            )
        dtype = flat[0][s].dtype
        for m in range(1, modalities):
            dtype = torch.promote_types(dtype, flat[m][s].dtype)
        for m in range(modalities):
            flat[m][s] = flat[m][s].to(dtype)

    device, batch = flat[0][0].device, flat[0][0].shape[0]
    masks = [] if mask is None else _scale_masks(mask, [_spatial(x, channel_dim) for x in features[0]], batch, device, function)
    if present is not None:
        validate.tensor(present, function, "present", dtypes=(torch.bool,))
        if present.shape != (batch, modalities) or present.device != device:
            validate.fail(
                function,
                "present",
                f"of shape {(batch, modalities)} on {device}",
                f"{validate.shape(present)} on {present.device}",
            )
    sigmas = _sigmas(sigma, modalities, function)
    validate.positive_integer(samples, function, "samples")
    validate.number(eps, function, "eps")
    noise_seed = _draw_seed(seed, generator, device, function) if any(s > 0 for s in sigmas) else None
    if noise_seed is None:
        samples = 1  # without noise every draw is the same
    name = resolve(backend, flat[0][0], function)
    return ops.softmax_fisher(
        [x for row in flat for x in row], masks, present, sigmas, samples, noise_seed, detach_reference, float(eps), name
    )


def _spatial(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    return tuple(x.movedim(channel_dim, 1).shape[2:])


def _sigmas(sigma: float | Sequence[float], modalities: int, function: str) -> list[float]:
    values = list(sigma) if isinstance(sigma, Sequence) else [sigma] * modalities
    if len(values) != modalities:
        validate.fail(function, "sigma", f"a number or one per modality ({modalities})", f"{len(values)} numbers")
    return [validate.number(value, function, "sigma") for value in values]


def _draw_seed(seed: int | None, generator: torch.Generator | None, device: torch.device, function: str) -> Tensor:
    """An int64 scalar on ``device``; no synchronisation with the host when it comes from the device's own generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        validate.fail(function, "generator", "a torch.Generator", type(generator).__name__, TypeError)
    if seed is not None:
        if generator is not None:
            validate.fail(function, "seed", "None when generator is given", seed)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            validate.fail(function, "seed", "an integer in [0, 2^63)", seed)
        return torch.tensor(seed, dtype=torch.int64, device=device)
    source = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=source).to(device)


def resize_mask(mask: Tensor, spatial: Sequence[int]) -> Tensor:
    """``mask`` ``(B, *spatial)`` bool at another resolution: a pixel is valid when at least half of its area is.

    Any ratio; to another resolution for one to three spatial dimensions."""
    if tuple(mask.shape[1:]) == tuple(spatial):
        return mask
    if mask.dim() != 1 + len(spatial) or not 1 <= len(spatial) <= 3:
        validate.fail(
            "resize_mask",
            "mask",
            f"(B, *spatial) with the {len(spatial)} (one to three) dimensions of spatial",
            validate.shape(mask),
        )
    if all(fine % coarse == 0 for fine, coarse in zip(mask.shape[1:], spatial, strict=True)):
        return average_pooled(mask.to(torch.float32), spatial) >= 0.5
    # Exactly, in integers: along each dimension, the difference at the edges k * fine / coarse of the area up to there, times coarse.
    area = mask.to(torch.int64)
    for dim, (fine, coarse) in enumerate(zip(mask.shape[1:], spatial, strict=True), start=1):
        edges = torch.arange(coarse + 1, device=mask.device) * fine
        whole, part = edges // coarse, edges % coarse
        padded = torch.cat([area, area.narrow(dim, 0, 1)], dim)  # the pixel past the end has part 0
        before = padded.cumsum(dim) - padded
        part = part.view([-1 if d == dim else 1 for d in range(area.dim())])
        area = (before.index_select(dim, whole) * coarse + padded.index_select(dim, whole) * part).diff(dim=dim)
    return 2 * area >= math.prod(mask.shape[1:])


def average_pooled(x: Tensor, spatial: Sequence[int]) -> Tensor:
    """``x`` ``(B, *spatial)`` averaged over the area of each pixel of another resolution."""
    return F.interpolate(x.unsqueeze(1), size=tuple(spatial), mode="area").squeeze(1)


def _scale_masks(
    mask: Tensor | Sequence[Tensor], spatial: list[tuple[int, ...]], batch: int, device: torch.device, function: str
) -> list[Tensor]:
    """One bool mask ``(B, P_s)`` per spatial shape."""
    one = isinstance(mask, Tensor)
    given = [mask] * len(spatial) if isinstance(mask, Tensor) else list(validate.sequence(mask, function, "mask"))
    if len(given) != len(spatial):
        validate.fail(function, "mask", f"one tensor or one per scale ({len(spatial)})", f"{len(given)} tensors")
    masks = []
    for s, (m, size) in enumerate(zip(given, spatial, strict=True)):
        argument = "mask" if one else f"mask[{s}]"
        validate.tensor(m, function, argument, dtypes=(torch.bool,))
        if m.dim() != 1 + len(size) or m.shape[0] != batch or m.device != device or m.numel() == 0:
            validate.fail(
                function,
                argument,
                f"of shape (B, *spatial) with batch {batch} and {len(size)} spatial dimensions on {device}",
                f"{validate.shape(m)} on {m.device}",
            )
        if tuple(m.shape[1:]) != size and (not one or len(size) > 3):
            validate.fail(function, argument, f"of spatial shape {size}", validate.shape(m)[1:])
        masks.append(resize_mask(m, size).reshape(batch, -1))
    return masks


class GradientStatistics(NamedTuple):
    """Result of :func:`gradient_statistics`; what lacks its input is None."""

    fisher: Tensor | None  # (K, B)
    attribution: Tensor | None  # (K, B)
    fisher_maps: list[Tensor] | None  # K maps (B, *spatial_k)
    attribution_maps: list[Tensor] | None


def gradient_statistics(
    grads: Sequence[Tensor],
    features: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    channel_dim: int = 1,
    eps: float = 1e-8,
    maps: bool = False,
    backend: str | None = None,
) -> GradientStatistics:
    r"""Functional Fisher information and L2-pooled gradient x input of K tensors from their gradients, in one pass.

    With the gradient :math:`g` of a score with respect to the feature :math:`e`, and the positive map :math:`f`, per sample

    .. math::
        \text{fisher} = \operatorname{mean}_p \frac{\sum_c g_{cp}^2}{f_p + \text{eps}}, \qquad
        \text{attribution} = \sqrt{\sum_{c,p} (g_{cp}\, e_{cp})^2}

    over valid pixels :math:`p`. Differentiable in all three; at an attribution of 0 its derivative is taken as 0. Sources:
    :math:`\lVert \nabla f \rVert^2 / f` of Gat et al. (NeurIPS 2020); the pooled attribution of arXiv:2404.02359.

    Args:
        grads: K tensors ``(B, C_k, *spatial_k)``, for training from ``torch.autograd.grad(..., create_graph=True)``.
        features: K tensors of the same shapes; without them no attribution.
        values: K tensors ``(B, *spatial_k)``, at least 0 (such as the cross entropy per pixel); without them no Fisher information.
        mask: valid pixels, bool ``(B, *spatial)`` at any resolution, or one per tensor.
        channel_dim: dimension of the channels in ``grads`` and ``features``.
        eps: added to ``values``.
        maps: return the per-pixel terms as well: :math:`\sum_c g^2 / (f + \text{eps})` and :math:`\sqrt{\sum_c (g e)^2}`.
        backend: as in :func:`softmax_fisher_information`.

    Returns:
        :class:`GradientStatistics` ``(fisher (K, B), attribution (K, B), fisher_maps, attribution_maps)``; None for what was not asked.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which and why.

    Example:
        >>> e = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> (g,) = torch.autograd.grad(e.square().sum(), e, create_graph=True)
        >>> gradient_statistics([g], features=[e]).attribution.shape
        torch.Size([1, 2])
    """
    function = "gradient_statistics"
    grads = validate.sequence(grads, function, "grads")
    if features is None and values is None:
        validate.fail(function, "features or values", "given", "neither")
    flat_grads = [validate.feature(g, function, f"grads[{k}]", channel_dim) for k, g in enumerate(grads)]
    batch, device = flat_grads[0].shape[0], flat_grads[0].device
    for k, g in enumerate(flat_grads):
        if g.shape[0] != batch or g.device != device:
            validate.fail(
                function, f"grads[{k}]", f"of batch size {batch} on {device} like grads[0]", f"{g.shape[0]} on {g.device}"
            )
    spatial = [_spatial(g, channel_dim) for g in grads]

    flat_features: list[Tensor] = []
    if features is not None:
        _same_length(features, grads, function, "features")
        for k, e in enumerate(features):
            flat_features.append(validate.feature(e, function, f"features[{k}]", channel_dim))
            validate.same(e, grads[k], function, f"features[{k}]", f"grads[{k}]")
            dtype = torch.promote_types(e.dtype, grads[k].dtype)
            flat_features[k], flat_grads[k] = flat_features[k].to(dtype), flat_grads[k].to(dtype)

    flat_values: list[Tensor] = []
    if values is not None:
        _same_length(values, grads, function, "values")
        for k, f in enumerate(values):
            validate.tensor(f, function, f"values[{k}]")
            if tuple(f.shape) != (batch, *spatial[k]) or f.device != device:
                validate.fail(
                    function, f"values[{k}]", f"of shape {(batch, *spatial[k])} on {device}", f"{validate.shape(f)} on {f.device}"
                )
            flat_values.append(f.reshape(batch, -1))

    masks = [] if mask is None else _scale_masks(mask, spatial, batch, device, function)
    validate.number(eps, function, "eps")
    name = resolve(backend, flat_grads[0], function)
    fisher, attribution, fisher_maps, attribution_maps = ops.gradient_statistics(
        flat_grads, flat_features, flat_values, masks, float(eps), maps, name
    )
    return GradientStatistics(
        fisher if flat_values else None,
        attribution if flat_features else None,
        [x.reshape(batch, *spatial[k]) for k, x in enumerate(fisher_maps)] if maps and flat_values else None,
        [x.reshape(batch, *spatial[k]) for k, x in enumerate(attribution_maps)] if maps and flat_features else None,
    )


def _same_length(x: object, grads: Sequence[Tensor], function: str, argument: str) -> None:
    if len(validate.sequence(x, function, argument)) != len(grads):
        validate.fail(function, argument, f"a list of {len(grads)} tensors like grads", f"{len(x)}")  # type: ignore[arg-type]


def functional_entropy(f: Tensor, dim: int | Sequence[int]) -> Tensor:
    r"""Functional entropy :math:`\operatorname{Ent}(f) = E[f \log f] - E[f] \log E[f] \ge 0` of samples of a non-negative function.

    Computed as :math:`E f \cdot E[r \log r - r + 1]` with :math:`r = f / E f`, a sum of non-negative terms. For Gaussian samples
    :math:`\operatorname{Ent}(f) \le \tfrac{\sigma^2}{2} E[\lVert \nabla f \rVert^2 / f]` (log-Sobolev; Gat et al., NeurIPS 2020).

    Args:
        f: values of the function, at least 0, floating point.
        dim: the dimension or dimensions that hold the samples.

    Returns:
        ``f`` without ``dim``. 0 where ``f`` is 0 throughout.

    Example:
        >>> functional_entropy(torch.ones(5), dim=0)
        tensor(0.)
    """
    validate.tensor(f, "functional_entropy", "f")
    dim = dim if isinstance(dim, int) else tuple(dim)
    mean = f.mean(dim, keepdim=True)
    ratio = torch.where(f == 0, 1, f / torch.where(mean == 0, 1, mean))
    return (mean * torch.where(f == 0, 1, ratio * ratio.log() - ratio + 1)).mean(dim)


def modality_share(attribution: Tensor) -> Tensor:
    """Share of each modality in the attribution of a sample, ``a_m / sum_m a_m``, in [0, 1].

    Args:
        attribution: ``(M, B)``, at least 0.

    Returns:
        ``(M, B)``; sums to 1 over the modalities, 0 throughout (with zero gradient) where nothing was attributed.

    Example:
        >>> modality_share(torch.tensor([[3.0], [1.0]])).flatten()
        tensor([0.7500, 0.2500])
    """
    validate.tensor(attribution, "modality_share", "attribution")
    total = attribution.sum(0, keepdim=True)
    return attribution / torch.where(total == 0, 1, total)


def balance_penalty(
    information: Tensor,
    *,
    objective: Literal["inverse", "norm", "log"] = "inverse",
    eps: float = 1e-8,
    weights: Tensor | Sequence[float] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Penalty on modalities that contribute little information,

    .. math::
        R = \sum_{m,s} w_s\, \phi(\bar I_{ms}), \qquad \bar I_{ms} = \operatorname{mean}_b I_{msb}

    ==========  =============================================  ==========================================
    objective   R                                              source
    ==========  =============================================  ==========================================
    inverse     sum of ``w_s / (I + eps)``                     arXiv:2505.06635
    norm        ``sqrt(sum of w_s^2 / (I + eps)^2)``           Gat et al., NeurIPS 2020
    log         sum of ``-w_s log(I + eps)``                   scale free: its gradient is ``-w_s / I``
    ==========  =============================================  ==========================================

    Args:
        information: ``(M, S, B)``, or ``(M, B)`` for one scale.
        objective: see the table.
        eps: added to the mean information.
        weights: ``w_s``, one per scale; default 1.
        valid: bool, broadcastable to ``information``: the entries that count in the mean over the batch. A modality and scale
            without any is left out of the sum.

    Returns:
        A scalar; 0 where nothing counts.
    """
    validate.tensor(information, "balance_penalty", "information")
    if information.dim() not in (2, 3):
        validate.fail("balance_penalty", "information", "of shape (M, S, B) or (M, B)", validate.shape(information))
    if valid is not None:
        validate.tensor(valid, "balance_penalty", "valid", dtypes=(torch.bool,))
        try:
            valid = torch.broadcast_to(valid, information.shape)
        except RuntimeError:
            validate.fail("balance_penalty", "valid", f"broadcastable to {validate.shape(information)}", validate.shape(valid))
    if information.dim() == 2:
        information, valid = information.unsqueeze(1), None if valid is None else valid.unsqueeze(1)
    total, count = batch_totals(information, valid)
    return penalty_of_mean(total, count, objective, eps, weights, function="balance_penalty")


def batch_totals(information: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over the batch of the entries that count, and their number; ``(M, S)`` each. Sums, so that ranks can add theirs."""
    if valid is None:
        return information.sum(-1), torch.full_like(information[..., 0], information.shape[-1])
    return torch.where(valid, information, 0).sum(-1), valid.sum(-1).to(information.dtype)


def penalty_of_mean(
    total: Tensor, count: Tensor, objective: str, eps: float, weights: Tensor | Sequence[float] | None, *, function: str
) -> Tensor:
    """The penalty of :func:`balance_penalty` from ``(M, S)`` sums over the batch and their counts."""
    validate.number(eps, function, "eps")
    counts = count > 0
    mean = torch.where(counts, total / torch.where(counts, count, 1) + eps, 1)
    w = torch.ones_like(mean[0]) if weights is None else torch.as_tensor(weights, dtype=mean.dtype, device=mean.device)
    if w.shape != total.shape[1:]:
        validate.fail(function, "weights", f"one number per scale ({total.shape[1]})", validate.shape(w))
    if objective == "log":
        terms = -w * mean.log()
    elif objective in ("inverse", "norm"):
        terms = w / mean
    else:
        validate.fail(function, "objective", "'inverse', 'norm' or 'log'", repr(objective))
    terms = torch.where(counts, terms, 0)
    return torch.linalg.vector_norm(terms) if objective == "norm" else terms.sum()

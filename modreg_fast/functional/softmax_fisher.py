"""Functional Fisher information of modality features at every scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast import ops
from modreg_fast.backends import resolve
from modreg_fast.backends.reference.softmax_fisher import Problem
from modreg_fast.functional.masks import scale_masks, spatial_shape


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
        q = \operatorname{softmax}_c (\operatorname{mean}_m X_m), \qquad
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
        generator: source of the seed. ``torch.utils.checkpoint`` computes a forward pass again with the default generators as they were,
            but not with one of your own, nor with ``preserve_rng_state=False``: there the gradient would be that of other noise. Under
            it pass ``seed``.
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
    problem, name = checked_problem(
        features, mask, present, sigma, samples, seed, generator, detach_reference, channel_dim, eps, backend
    )
    information: Tensor = ops.softmax_fisher(problem, name).information
    return information


def checked_problem(
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
) -> tuple[Problem, str]:
    """The problem of :func:`softmax_fisher_information` and who computes it. ``names``: of the modalities, for messages."""
    features = _checked(features, channel_dim, function, names)
    modalities, first = len(features), features[0][0]
    device, batch = first.device, first.shape[0]
    masks = (
        [] if mask is None else scale_masks(mask, [spatial_shape(x, channel_dim) for x in features[0]], batch, device, function)
    )
    if present is not None:
        present = validate.present(present, batch, modalities, device, function)
    sigmas = _sigmas(sigma, modalities, function)
    validate.positive_integer(samples, function, "samples")
    validate.number(eps, function, "eps")
    validate.flag(detach_reference, function, "detach_reference")
    noise_seed = _draw_seed(seed, generator, device, function) if any(sigmas) else None
    if noise_seed is None:
        samples = 1  # without noise every draw is the same
    name = resolve(backend, first, function, "softmax_fisher") if batch else "reference"  # no kernel runs over nothing
    flat = [x for row in features for x in row]
    return Problem(flat, masks, present, sigmas, samples, noise_seed, detach_reference, float(eps), channel_dim), name


def _checked(
    features: Sequence[Sequence[Tensor]], channel_dim: int, function: str, names: Sequence[str] | None
) -> Sequence[Sequence[Tensor]]:
    """The features, of one dtype at a scale."""
    signature = validate.signature(function, channel_dim, *features) if isinstance(features, list | tuple) else None
    if validate.accepted(signature):
        return features
    modalities = len(validate.sequence(features, function, "features"))
    labels = [f"features[{m}]" for m in range(modalities)] if names is None else [f"features[{name!r}]" for name in names]
    features = [validate.sequence(row, function, label) for label, row in zip(labels, features, strict=True)]
    scales = len(features[0])
    for label, row in zip(labels, features, strict=True):
        if len(row) != scales:
            validate.fail(function, label, f"a list of {scales} scales like {labels[0]}", f"{len(row)}")

    by_scale: list[list[Tensor]] = []
    for s in range(scales):
        xs = [
            validate.feature(row[s], function, f"{label}[{s}]", channel_dim) for label, row in zip(labels, features, strict=True)
        ]
        for m in range(1, modalities):
            validate.same(xs[m], xs[0], function, f"{labels[m]}[{s}]", f"{labels[0]}[{s}]")
        by_scale.append(validate.promoted(xs))
    device, batch = by_scale[0][0].device, by_scale[0][0].shape[0]
    for s, xs in enumerate(by_scale):
        if xs[0].shape[0] != batch or xs[0].device != device:
            validate.fail(
                function,
                f"{labels[0]}[{s}]",
                f"of batch size {batch} on {device} like the first scale",
                f"{xs[0].shape[0]} on {xs[0].device}",
            )
    checked = [list(row) for row in zip(*by_scale, strict=True)]
    if all(a is b for row, given in zip(checked, features, strict=True) for a, b in zip(row, given, strict=True)):
        validate.accept(signature)
    return checked


def _sigmas(sigma: float | Sequence[float], modalities: int, function: str) -> list[float]:
    if type(sigma) is float:  # spares the look-up of an abstract class
        return [validate.number(sigma, function, "sigma")] * modalities
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
        return torch.full((), seed, dtype=torch.int64, device=device)  # a fill, where torch.tensor would copy and wait
    source = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=source).to(device)

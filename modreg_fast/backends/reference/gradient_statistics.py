"""Functional Fisher information and L2-pooled gradient x input from given gradients: the definition, in plain PyTorch.

Per tensor, with the gradient ``g`` and the feature ``e`` of shape ``(B, C, P)`` and the positive map ``f`` of shape ``(B, P)``::

    fisher_map      = sum_c g^2 / (f + eps)               fisher[b]      = mean of fisher_map over valid pixels
    attribution_map = sqrt( sum_c (g * e)^2 )             attribution[b] = sqrt( sum of attribution_map^2 over valid pixels )
"""

import torch
from torch import Tensor

from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype, keep


def _validity(g: Tensor, masks: list[Tensor], k: int) -> tuple[Tensor | None, Tensor | None, Tensor | int]:
    """Where tensor ``k`` counts, as ``(B, P)`` and ``(B, 1, P)`` (None: everywhere), and the count per sample, at least one."""
    if not masks:
        return None, None, g.shape[2]
    return masks[k], masks[k][:, None], masks[k].sum(1, keepdim=True).clamp(min=1)


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0."""
    zero = x == 0
    return torch.where(zero, 0, torch.sqrt(torch.where(zero, 1, x)))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, 0 where ``b`` is 0."""
    zero = b == 0
    return torch.where(zero, 0, a / torch.where(zero, 1, b))


def forward(
    grads: list[Tensor], features: list[Tensor], values: list[Tensor], masks: list[Tensor], eps: float, maps: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``grads``, ``features``: K tensors ``(B, C_k, P_k)``; ``values``: K tensors ``(B, P_k)``; ``masks``: K bool tensors
    ``(B, P_k)``; each but ``grads`` may be empty. Returns ``fisher (K, B)``, ``attribution (K, B)`` and, if ``maps``, the maps
    ``(B, P_k)``; what lacks its input has no entries: shape ``(0, B)`` and an empty list."""
    dtype = accumulation_dtype([*grads, *features, *values])
    fisher, attribution, fisher_maps, attribution_maps = [], [], [], []
    for k, g in enumerate(grads):
        valid, valid_channels, count = _validity(g, masks, k)
        g = keep(g.to(dtype), valid_channels)
        if values:
            fisher_map = keep(g.square().sum(1) / (values[k].to(dtype) + eps), valid)
            fisher_maps.append(fisher_map)
            fisher.append((fisher_map / count).sum(1))
        if features:
            square = (g * keep(features[k].to(dtype), valid_channels)).square().sum(1)
            attribution_maps.append(_sqrt(square))
            attribution.append(_sqrt(square.sum(1)))
    none = torch.zeros(0, grads[0].shape[0], dtype=dtype, device=grads[0].device)
    return (
        torch.stack(fisher) if fisher else none,
        torch.stack(attribution) if attribution else none.clone(),
        fisher_maps if maps else [],
        attribution_maps if maps else [],
    )


def backward(
    grad_fisher: Tensor,
    grad_attribution: Tensor,
    grad_fisher_maps: list[Tensor],
    grad_attribution_maps: list[Tensor],
    attribution: Tensor,
    grads: list[Tensor],
    features: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor],
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients with respect to ``grads``, ``features`` and ``values``. With ``u`` the upstream weight of ``fisher_map`` and ``v``
    that of ``sum_c (g e)^2``, per pixel (the square roots put ``1 / (2 a)`` into ``v``; 0 where the attribution ``a`` is 0)::

        dg = 2 u / (f + eps) g + 2 v g e^2        de = 2 v g^2 e        df = -u sum_c g^2 / (f + eps)^2

    In differentiable PyTorch, so that it serves second derivatives as well."""
    dtype = accumulation_dtype([*grads, *features, *values])
    to_grads, to_features, to_values = [], [], []
    for k, original in enumerate(grads):
        valid, valid_channels, count = _validity(original, masks, k)
        g = keep(original.to(dtype), valid_channels)
        total = torch.zeros_like(g)
        if values:
            # A pixel that does not count has g = u = v = 0, so any finite f gives it zero gradients.
            f = keep(values[k].to(dtype), valid) + (eps if valid is None else torch.where(valid, eps, 1.0))
            u = grad_fisher[k, :, None] / count
            if grad_fisher_maps:
                u = u + grad_fisher_maps[k]
            u = keep(u, valid)
            total = total + (2 * u / f)[:, None] * g
            to_values.append((-u * g.square().sum(1) / f.square()).to(values[k].dtype))
        if features:
            e = keep(features[k].to(dtype), valid_channels)
            v = _divide(grad_attribution[k], 2 * attribution[k])[:, None]
            if grad_attribution_maps:
                v = v + _divide(grad_attribution_maps[k], 2 * _sqrt((g * e).square().sum(1)))
            v = keep(v, valid)
            total = total + 2 * v[:, None] * g * e.square()
            to_features.append((2 * v[:, None] * g.square() * e).to(features[k].dtype))
        to_grads.append(total.to(original.dtype))
    return to_grads, to_features, to_values

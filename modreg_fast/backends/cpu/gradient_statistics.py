"""``gradient_statistics`` by the native kernels, of the CPU or of CUDA, where the tensors are.

Signatures and definitions: ``backends/reference/gradient_statistics.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_in_layout, in_layout, layout_of
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype


def _prepared(
    grads: list[Tensor], features: list[Tensor], values: list[Tensor], masks: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """What the kernels read: gradient and feature in one layout, values in the accumulation type of their tensor."""
    if grads[0].is_cuda and accumulation_dtype([*grads, *features, *values]) == torch.float64:  # one accumulation type per launch
        grads, features = ([x.double() for x in tensors] for tensors in (grads, features))
    grads = [in_layout(g) for g in grads]
    features = [in_layout(e, layout_of(g)) for g, e in zip(grads, features, strict=True)] if features else []
    values = [f.to(accumulation_dtype([g])).contiguous() for g, f in zip(grads, values, strict=True)] if values else []
    return grads, features, values, [m.contiguous() for m in masks]


def forward(
    grads: list[Tensor], features: list[Tensor], values: list[Tensor], masks: list[Tensor], eps: float, maps: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    dtype = accumulation_dtype([*grads, *features, *values])
    batch = grads[0].shape[0]
    fisher = grads[0].new_empty((len(values), batch), dtype=dtype)
    attribution = grads[0].new_empty((len(features), batch), dtype=dtype)
    grads, features, values, masks = _prepared(grads, features, values, masks)

    def empty_maps(inputs: list[Tensor]) -> list[Tensor]:
        return [g.new_empty((batch, g.shape[2]), dtype=accumulation_dtype([g])) for g in grads] if maps and inputs else []

    fisher_maps, attribution_maps = empty_maps(values), empty_maps(features)
    torch.ops.modreg_fast_native.gradient_statistics_forward(
        grads, features, values, masks, eps, fisher, attribution, fisher_maps, attribution_maps
    )
    return fisher, attribution, [x.to(dtype) for x in fisher_maps], [x.to(dtype) for x in attribution_maps]


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
    dtypes = [[x.dtype for x in tensors] for tensors in (grads, features, values)]
    grads, features, values, masks = _prepared(grads, features, values, masks)
    fisher_weight = grad_fisher.double()
    if values:
        counts = [m.sum(1).clamp(min=1) for m in masks] if masks else [g.shape[2] for g in grads]
        fisher_weight = torch.stack([u / count for u, count in zip(fisher_weight, counts, strict=True)])
    attribution = attribution.double()
    attribution_weight = torch.where(attribution == 0, 0, grad_attribution.double() / (2 * attribution))

    def map_grads(maps: list[Tensor]) -> list[Tensor]:
        return [x.to(accumulation_dtype([g])).contiguous() for g, x in zip(grads, maps, strict=True)] if maps else []

    to_grads, to_features = ([empty_in_layout(x, layout_of(x)) for x in tensors] for tensors in (grads, features))
    to_values = [torch.empty_like(f) for f in values]
    torch.ops.modreg_fast_native.gradient_statistics_backward(
        fisher_weight.contiguous(),
        attribution_weight.contiguous(),
        map_grads(grad_fisher_maps),
        map_grads(grad_attribution_maps),
        grads,
        features,
        values,
        masks,
        eps,
        to_grads,
        to_features,
        to_values,
    )
    outputs = (to_grads, to_features, to_values)
    narrowed = [[x.to(d) for x, d in zip(tensors, kinds, strict=True)] for tensors, kinds in zip(outputs, dtypes, strict=True)]
    return narrowed[0], narrowed[1], narrowed[2]

"""``gradient_statistics`` by the CUDA kernels.

Definitions: ``backends/reference/gradient_statistics.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient, in_layout, layout_of
from modreg_fast.backends.reference.gradient_statistics import Problem, Result
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype


def _prepared(problem: Problem) -> Problem:
    """As the kernels read it: gradient and feature in one layout, values in the accumulation type of their tensor."""
    grads, features, values, masks, *_ = problem
    if problem.dtype == torch.float64:  # one accumulation type per launch
        grads, features = ([x.double() for x in tensors] for tensors in (grads, features))
    grads = [in_layout(g) for g in grads]
    if features and not all([x.is_contiguous() for x in (*grads, *features)]):
        features = [in_layout(e, layout_of(g)) for g, e in zip(grads, features, strict=True)]
    values, masks = _narrowed(values, grads), [m.contiguous() for m in masks]
    return problem._replace(grads=grads, features=features, values=values, masks=masks)


def _narrowed(tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """None, or one per gradient: contiguous, in its accumulation type."""
    return [x.to(accumulation_dtype([g])).contiguous() for g, x in zip(grads, tensors, strict=True)] if tensors else []


def forward(problem: Problem) -> Result:
    problem = problem.flat()
    result = problem.empty_result()
    grads, features, values, masks, eps, *_ = _prepared(problem)
    fisher_maps, attribution_maps = (_narrowed(maps, grads) for maps in result[2:])
    torch.ops.modreg_fast_cuda.gradient_statistics_forward(
        grads, features, values, masks, eps, *result[:2], fisher_maps, attribution_maps
    )
    dtype = problem.dtype
    return Result(*result[:2], [x.to(dtype) for x in fisher_maps], [x.to(dtype) for x in attribution_maps])


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    inputs = [*problem.grads, *problem.features, *problem.values]
    grads, features, values, masks, eps, *_ = _prepared(problem.flat())
    fisher_weight = upstream.fisher.double()
    if values:
        counts = [m.sum(1).clamp(min=1) for m in masks] if masks else [g.shape[2] for g in grads]
        fisher_weight = torch.stack([u / count for u, count in zip(fisher_weight, counts, strict=True)])
    attribution = result.attribution.double()
    attribution_weight = torch.where(attribution == 0, 0, upstream.attribution.double() / (2 * attribution))
    to_grads, to_features = ([empty_gradient(x) for x in tensors] for tensors in (grads, features))
    to_values = [torch.empty_like(f) for f in values]
    torch.ops.modreg_fast_cuda.gradient_statistics_backward(
        fisher_weight.contiguous(),
        attribution_weight.contiguous(),
        _narrowed(upstream.fisher_maps, grads),
        _narrowed(upstream.attribution_maps, grads),
        grads,
        features,
        values,
        masks,
        eps,
        to_grads,
        to_features,
        to_values,
    )
    gradients = zip([*to_grads, *to_features, *to_values], inputs, strict=True)
    return problem.shaped([gradient.to(x.dtype) for gradient, x in gradients])

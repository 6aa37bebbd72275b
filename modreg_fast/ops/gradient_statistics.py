"""The custom op ``modreg_fast::gradient_statistics``: schema, fake kernel, autograd formula. What it computes: ``backends/reference``."""

import torch
from torch import Tensor

from modreg_fast.backends import implementation
from modreg_fast.backends.reference import gradient_statistics as reference
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype
from modreg_fast.ops._autograd import laid_out_like, vector_jacobian_product


@torch.library.custom_op("modreg_fast::gradient_statistics", mutates_args=())
def gradient_statistics(
    grads: list[Tensor], features: list[Tensor], values: list[Tensor], masks: list[Tensor], eps: float, maps: bool, backend: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``grads``, ``features``: K tensors ``(B, C_k, P_k)``; ``values``: K tensors ``(B, P_k)``; ``masks``: K bool tensors ``(B, P_k)``;
    each but ``grads`` may be empty. Returns ``fisher (K, B)``, ``attribution (K, B)`` and, if ``maps``, the maps ``(B, P_k)`` of each;
    what lacks its input is ``(0, B)`` and has no maps."""
    return implementation(backend, "gradient_statistics").forward(grads, features, values, masks, eps, maps)


@gradient_statistics.register_fake
def _(grads, features, values, masks, eps, maps, backend):
    dtype = accumulation_dtype([*grads, *features, *values])
    batch = grads[0].shape[0]

    def outputs(inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        statistic = grads[0].new_empty((len(inputs), batch), dtype=dtype)
        return statistic, [g.new_empty((batch, g.shape[2]), dtype=dtype) for g in grads] if maps and inputs else []

    fisher, fisher_maps = outputs(values)
    attribution, attribution_maps = outputs(features)
    return fisher, attribution, fisher_maps, attribution_maps


@torch.library.custom_op("modreg_fast::gradient_statistics_backward", mutates_args=())
def gradient_statistics_backward(
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
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of ``grads``, ``features`` and ``values``; ``attribution`` is the forward result."""
    to_grads, to_features, to_values = implementation(backend, "gradient_statistics").backward(
        grad_fisher, grad_attribution, grad_fisher_maps, grad_attribution_maps, attribution, grads, features, values, masks, eps
    )
    return laid_out_like(to_grads, grads), laid_out_like(to_features, features), laid_out_like(to_values, values)


@gradient_statistics_backward.register_fake
def _(
    grad_fisher,
    grad_attribution,
    grad_fisher_maps,
    grad_attribution_maps,
    attribution,
    grads,
    features,
    values,
    masks,
    eps,
    backend,
):
    return tuple([torch.empty_like(x) for x in inputs] for inputs in (grads, features, values))


def _setup_context(ctx, inputs, output):
    grads, features, values, masks, ctx.eps, _, ctx.backend = inputs
    ctx.lengths = [len(tensors) for tensors in (grads, features, values, masks)]
    ctx.save_for_backward(output[1], *grads, *features, *values, *masks)


def _backward(ctx, grad_fisher, grad_attribution, grad_fisher_maps, grad_attribution_maps):
    attribution, *tensors = ctx.saved_tensors
    inputs = _split(tensors, ctx.lengths)
    gradients = gradient_statistics_backward(
        grad_fisher, grad_attribution, grad_fisher_maps, grad_attribution_maps, attribution, *inputs, ctx.eps, ctx.backend
    )
    return *gradients, [None] * ctx.lengths[3], None, None, None


def _setup_double_context(ctx, inputs, output):
    lists = [[x] if isinstance(x, Tensor) else x for x in inputs[:9]]
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.eps = inputs[9]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def _double_backward(ctx, *upstream):
    *tensors, masks = _split(ctx.saved_tensors, ctx.lengths)
    lengths = ctx.lengths[:8]

    def gradients(*inputs: Tensor) -> list[Tensor]:
        fisher, attribution, fisher_maps, attribution_maps, pooled, grads, features, values = _split(inputs, lengths)
        lists = reference.backward(
            fisher[0], attribution[0], fisher_maps, attribution_maps, pooled[0], grads, features, values, masks, ctx.eps
        )
        return [x for tensors in lists for x in tensors]

    flat = vector_jacobian_product(gradients, [x for part in tensors for x in part], [x for part in upstream for x in part])
    fisher, attribution, fisher_maps, attribution_maps, pooled, *inputs = _split(flat, lengths)
    return fisher[0], attribution[0], fisher_maps, attribution_maps, pooled[0], *inputs, [None] * len(masks), None, None


def _split(tensors, lengths):
    """A flat sequence cut into lists of the given lengths."""
    tensors = iter(tensors)
    return [[next(tensors) for _ in range(length)] for length in lengths]


gradient_statistics.register_autograd(_backward, setup_context=_setup_context)
gradient_statistics_backward.register_autograd(_double_backward, setup_context=_setup_double_context)

"""The custom op ``modreg_fast::softmax_fisher``: schema, fake kernel, autograd formula. What it computes: ``backends/reference``."""

import torch
from torch import Tensor

from modreg_fast.backends import implementation
from modreg_fast.backends.reference import softmax_fisher as reference
from modreg_fast.ops._autograd import laid_out_like, vector_jacobian_product


@torch.library.custom_op("modreg_fast::softmax_fisher", mutates_args=())
def softmax_fisher(
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    detach_reference: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``features``: ``M * S`` tensors ``(B, C_s, P_s)``, modality first, ``M = len(sigma)``; ``masks``: none, or ``S`` bool tensors
    ``(B, P_s)``; ``present``: ``(B, M)`` bool. Returns ``information (M, S, B)`` and ``counts (S, B)`` int64, the valid pixels."""
    return implementation(backend, "softmax_fisher").forward(features, masks, present, sigma, samples, seed, eps)


@softmax_fisher.register_fake
def _(features, masks, present, sigma, samples, seed, detach_reference, eps, backend):
    modalities, batch = len(sigma), features[0].shape[0]
    scales = len(features) // modalities
    information = features[0].new_empty((modalities, scales, batch), dtype=reference.accumulation_dtype(features))
    return information, features[0].new_empty((scales, batch), dtype=torch.int64)


@torch.library.custom_op("modreg_fast::softmax_fisher_backward", mutates_args=())
def softmax_fisher_backward(
    grad: Tensor,
    counts: Tensor,
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    detach_reference: bool,
    eps: float,
    backend: str,
) -> list[Tensor]:
    """The gradient of every feature from the gradient ``(M, S, B)`` of the information. Everything else is computed again from the
    inputs: the forward pass saves no tensor-sized value."""
    gradients = implementation(backend, "softmax_fisher").backward(
        grad, counts, features, masks, present, sigma, samples, seed, detach_reference, eps
    )
    return laid_out_like(gradients, features)


@softmax_fisher_backward.register_fake
def _(grad, counts, features, masks, present, sigma, samples, seed, detach_reference, eps, backend):
    return [torch.empty_like(x) for x in features]


def _setup_context(ctx, inputs, output):
    features, masks, present, sigma, samples, seed, detach_reference, eps, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], present, seed, *features, *masks)
    ctx.features = len(features)
    ctx.options = (sigma, samples, detach_reference, eps, backend)


def _backward(ctx, grad, _):
    counts, present, seed, *tensors = ctx.saved_tensors
    features, masks = tensors[: ctx.features], tensors[ctx.features :]
    sigma, samples, detach_reference, eps, backend = ctx.options
    gradients = softmax_fisher_backward(
        grad, counts, features, masks, present, sigma, samples, seed, detach_reference, eps, backend
    )
    return gradients, [None] * len(masks), *[None] * 7


def _setup_double_context(ctx, inputs, output):
    grad, counts, features, masks, present, sigma, samples, seed, detach_reference, eps, _ = inputs
    ctx.save_for_backward(grad, counts, present, seed, *features, *masks)
    ctx.features = len(features)
    ctx.options = (sigma, samples, detach_reference, eps)


def _double_backward(ctx, upstream):
    grad, counts, present, seed, *tensors = ctx.saved_tensors
    masks = tensors[ctx.features :]
    sigma, samples, detach_reference, eps = ctx.options

    def gradients(grad: Tensor, *features: Tensor) -> list[Tensor]:
        return reference.backward(grad, counts, list(features), masks, present, sigma, samples, seed, detach_reference, eps)

    to_grad, *to_features = vector_jacobian_product(gradients, [grad, *tensors[: ctx.features]], upstream)
    return to_grad, None, to_features, [None] * len(masks), *[None] * 7


softmax_fisher.register_autograd(_backward, setup_context=_setup_context)
softmax_fisher_backward.register_autograd(_double_backward, setup_context=_setup_double_context)

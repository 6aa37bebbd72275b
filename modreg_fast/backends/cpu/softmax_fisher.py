"""``softmax_fisher`` by the native kernels, of the CPU or of CUDA, where the tensors are.

Signatures and definitions: ``backends/reference/softmax_fisher.py``."""

import torch
from torch import Tensor

from modreg_fast.backends.layout import empty_in_layout, in_layout, layout_of
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype

_MOST_MODALITIES = {"cpu": 64, "cuda": 48}


def forward(
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    device = features[0].device.type
    if len(sigma) > _MOST_MODALITIES[device]:
        raise ValueError(
            f"softmax_fisher: backend {device!r} takes at most {_MOST_MODALITIES[device]} modalities, got {len(sigma)}"
        )
    batch, scales = features[0].shape[0], len(features) // len(sigma)
    information = features[0].new_empty((len(sigma), scales, batch), dtype=accumulation_dtype(features))
    counts = features[0].new_empty((scales, batch), dtype=torch.int64)
    torch.ops.modreg_fast_native.softmax_fisher_forward(
        [in_layout(x) for x in features], _contiguous(masks), _flat(present), sigma, samples, seed, eps, information, counts
    )
    return information, counts


def backward(
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
) -> list[Tensor]:
    features = [in_layout(x) for x in features]
    gradients = [empty_in_layout(x, layout_of(x)) for x in features]
    weight = (grad.double() / (counts.clamp(min=1) * samples)).contiguous()
    torch.ops.modreg_fast_native.softmax_fisher_backward(
        weight, features, _contiguous(masks), _flat(present), sigma, samples, seed, detach_reference, eps, gradients
    )
    return gradients


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

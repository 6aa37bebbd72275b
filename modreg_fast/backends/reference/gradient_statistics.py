"""Functional Fisher information and L2-pooled gradient x input from given gradients: the definition, in plain PyTorch.

Per tensor, with the gradient ``g`` and the feature ``e`` of shape ``(B, C, P)`` and the positive map ``f`` of shape ``(B, P)``::

    fisher_map      = sum_c g^2 / (f + eps)               fisher[b]      = mean of fisher_map over valid pixels
    attribution_map = sqrt( sum_c (g * e)^2 )             attribution[b] = sqrt( sum of attribution_map^2 over valid pixels )

Every backend takes a :class:`Problem` and gives a :class:`Result`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modreg_fast.backends.layout import flat, laid_out_like, shaped_like
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype, keep


class Problem(NamedTuple):
    """One call: what it reads, and its options. ``functional`` makes and checks it, every backend reads it."""

    grads: list[Tensor]  # K tensors (B, C_k, *spatial_k); flat: (B, C_k, P_k)
    features: list[Tensor]  # none, or K of the same shapes
    values: list[Tensor]  # none, or K tensors (B, *spatial_k); flat: (B, P_k)
    masks: list[Tensor]  # none, or K bool tensors (B, P_k): the valid pixels
    eps: float
    maps: bool
    channel_dim: int = 1  # of grads and features

    def flat(self) -> "Problem":
        grads, features = ([flat(x, self.channel_dim) for x in tensors] for tensors in (self.grads, self.features))
        values = [f.flatten(1) if f.dim() > 1 else f.unsqueeze(1) for f in self.values]
        return self._replace(grads=grads, features=features, values=values, channel_dim=1)

    def shaped(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients of the flat problem as those of this one."""
        count = len(self.grads) + len(self.features)
        inputs = zip(gradients, [*self.grads, *self.features], strict=False)
        to_values = [laid_out_like(g.view(f.shape), f) for g, f in zip(gradients[count:], self.values, strict=True)]
        return [*(shaped_like(g, x, self.channel_dim) for g, x in inputs), *to_values]

    @property
    def batch(self) -> int:
        return self.grads[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return accumulation_dtype([*self.grads, *self.features, *self.values])

    def empty_result(self) -> "Result":
        """Its memory, to be filled."""
        batch, dtype, x = self.batch, self.dtype, self.grads[0]

        def maps(inputs: list[Tensor]) -> list[Tensor]:
            return [x.new_empty((batch, g.shape[2]), dtype=dtype) for g in self.grads] if self.maps and inputs else []

        fisher = x.new_empty((len(self.values), batch), dtype=dtype)
        attribution = x.new_empty((len(self.features), batch), dtype=dtype)
        return Result(fisher, attribution, maps(self.values), maps(self.features))


class Result(NamedTuple):
    """Of a call, or the gradients of a result; None for what the backward pass does not read. What lacks its input is ``(0, B)`` and has
    no maps."""

    fisher: Tensor  # (K, B)
    attribution: Tensor  # (K, B)
    fisher_maps: list[Tensor]  # none, or K maps (B, P_k)
    attribution_maps: list[Tensor]


DIFFERENTIABLE_INPUTS = ("grads", "features", "values")
DIFFERENTIABLE_RESULTS = ("fisher", "attribution", "fisher_maps", "attribution_maps")
KEPT_RESULTS = ("attribution",)  # tensors that the backward pass reads


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


def forward(problem: Problem) -> Result:
    """In differentiable PyTorch."""
    problem = problem.flat()
    grads, features, values, masks, eps, maps, _ = problem
    dtype = problem.dtype
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
    none = torch.zeros(0, problem.batch, dtype=dtype, device=grads[0].device)
    return Result(
        torch.stack(fisher) if fisher else none,
        torch.stack(attribution) if attribution else none.clone(),
        fisher_maps if maps else [],
        attribution_maps if maps else [],
    )


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    """Gradients with respect to ``grads``, ``features`` and ``values``. With ``u`` the upstream weight of ``fisher_map`` and ``v``
    that of ``sum_c (g e)^2``, per pixel (the square roots put ``1 / (2 a)`` into ``v``; 0 where the attribution ``a`` is 0)::

        dg = 2 u / (f + eps) g + 2 v g e^2        de = 2 v g^2 e        df = -u sum_c g^2 / (f + eps)^2

    In differentiable PyTorch, so that it serves second derivatives as well."""
    given, problem = problem, problem.flat()
    grads, features, values, masks, eps, *_ = problem
    dtype = problem.dtype
    to_grads, to_features, to_values = [], [], []
    for k, original in enumerate(grads):
        valid, valid_channels, count = _validity(original, masks, k)
        g = keep(original.to(dtype), valid_channels)
        total = torch.zeros_like(g)
        if values:
            # A pixel that does not count has g = u = v = 0, so any finite f gives it zero gradients.
            f = values[k].to(dtype) + eps
            f = f if valid is None else torch.where(valid, f, 1)
            u = upstream.fisher[k, :, None] / count
            if upstream.fisher_maps:
                u = u + upstream.fisher_maps[k]
            u = keep(u, valid)
            total = total + (2 * u / f)[:, None] * g
            to_values.append((-u * g.square().sum(1) / f.square()).to(values[k].dtype))
        if features:
            e = keep(features[k].to(dtype), valid_channels)
            v = _divide(upstream.attribution[k], 2 * result.attribution[k])[:, None]
            if upstream.attribution_maps:
                v = v + _divide(upstream.attribution_maps[k], 2 * _sqrt((g * e).square().sum(1)))
            v = keep(v, valid)
            total = total + 2 * v[:, None] * g * e.square()
            to_features.append((2 * v[:, None] * g.square() * e).to(features[k].dtype))
        to_grads.append(total.to(original.dtype))
    return given.shaped([*to_grads, *to_features, *to_values])

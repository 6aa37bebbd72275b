"""Two published rules for the gradients of the encoders, from their papers. Both were published with SGD; under AdamW, as here, a
factor that stays the same cancels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.step import Step
from modreg_fast.demo.data import IGNORE

GAMMA = 1.5  # of MMPareto, as published


def ogm_ge(step: Step, task: Tensor, alpha: float) -> None:
    """On-the-fly gradient modulation with generalisation enhancement (Peng et al., CVPR 2022, arXiv:2203.15332).

    With s_m the sum over the batch of the probability that modality m alone gives to the true class, and rho_m its ratio to that of the
    other modality (to the mean of the others, where there are more), the gradient of the encoder of m is multiplied by
    1 - tanh(alpha rho_m) where rho_m > 1; then each weight gets Gaussian noise of the deviation of its gradient. The paper splits a
    linear classifier into modalities; the heads here are not linear, so the others are absent instead."""
    task.backward()
    with torch.no_grad():
        target = step.target[:, None]
        skill = {}
        for m, scores in step.alone().items():
            right = scores.softmax(1).gather(1, target.where(target != IGNORE, 0))
            skill[m] = right.where(target != IGNORE, 0).sum()
        for m, encoder in step.model.encoders.items():
            ratio = skill[m] / torch.stack([x for other, x in skill.items() if other != m]).mean()
            factor = 1 - torch.tanh(alpha * ratio) if ratio > 1 else 1.0
            for p in encoder.parameters():
                if p.grad is not None and p.dim() > 1:
                    p.grad.copy_(factor * p.grad + p.grad.std() * torch.randn_like(p))


def mmpareto(step: Step, task: Tensor, weight: float) -> None:
    """MMPareto (Wei and Hu, ICML 2024, arXiv:2405.17730).

    Beside the joint loss each modality has the loss of its own head, times ``weight`` (published: 1). An encoder gets a gradient g of
    the joint and u of its own loss. Where they agree (g u >= 0) it follows g + u, else 2 a g + 2 (1 - a) u with a in [0, 1] such that
    its norm is least; what is shorter than g + u is made as long; then all is multiplied by gamma. Heads follow the sum of all losses."""
    own = torch.stack([F.cross_entropy(x, step.target, ignore_index=IGNORE) for x in step.alone().values()]).sum()
    parameters = list(step.model.parameters())
    # An encoder reaches the sum of the own losses by its own loss alone, so one pass gives them all.
    joint, alone = (
        dict(zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True), strict=True))
        for loss in (task, weight * own)
    )
    for p in parameters:
        p.grad = joint[p] + alone[p]
    for encoder in step.model.encoders.values():
        mine = list(encoder.parameters())
        for p, grad in zip(mine, pareto([joint[p] for p in mine], [alone[p] for p in mine]), strict=True):
            p.grad = grad


def pareto(joint: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of an encoder from that of the joint and of its own loss, a tensor per parameter."""
    g, u = (torch.cat([x.flatten() for x in grads]) for grads in (joint, own))
    share = torch.tensor(0.5)
    if g @ u < 0:
        share = ((u @ u - g @ u) / (g - u).square().sum()).clamp(0, 1)
    step = 2 * share * g + 2 * (1 - share) * u
    longer = ((g + u).norm() / step.norm()).clamp(min=1)
    scaled = GAMMA * longer * step
    return [part.view_as(x) for part, x in zip(scaled.split([x.numel() for x in joint]), joint, strict=True)]

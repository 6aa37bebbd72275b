"""Sums and means over the ranks of a process group, differentiable; samples of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The sum of ``x`` over the ranks of ``group``; ``x`` itself without a group. The gradient is summed over the ranks too, so that
    under DDP, which averages over ranks, the parameters get the gradient that one process on the whole batch would compute."""
    if group is None:
        return x
    return _SumOverRanks.apply(x, group)


def mean_over_parts(mean: Tensor, count: Tensor, group: "dist.ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """The mean over all pixels of a sample, and their number, from the means and numbers of the parts that the ranks of ``group`` hold.
    Both as they are without a group."""
    if group is None:
        return mean, count
    count = count.to(mean.dtype)
    total, pixels = sum_over_ranks(mean * count, group), sum_over_ranks(count, group)
    return total / pixels.clamp(min=1), pixels


def gather_samples(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """``(*, B)`` of all ranks of ``group``, one after the other; ``x`` itself without a group. Without gradients; B may differ."""
    if group is None:
        return x
    parts: list[Tensor] = [x] * group.size()
    dist.all_gather_object(parts, x, group=group)
    return torch.cat(parts, -1)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None

"""Sums and means over the ranks of a process group, differentiable; samples of all ranks; modules that hold a group."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Grouped(nn.Module):
    """A module with process groups, which PyTorch can neither copy nor pickle.

    A copy (``copy.deepcopy``, ``AveragedModel``) shares them. A pickle keeps of the default group that it was the default one, which it
    is again wherever it is loaded, or None where no group is initialised; of another group nothing is kept, and loading warns."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _Shared(x) if isinstance(x, dist.ProcessGroup) else x for name, x in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: x.group if isinstance(x, _Shared) else x for name, x in state.items()})


class _Shared:
    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded_group, (self.group is dist.group.WORLD,)


def _loaded_group(default: bool) -> "dist.ProcessGroup | None":
    if default:
        return dist.group.WORLD
    warnings.warn("the process group of a loaded loss is not in its file: set process_group or spatial_group anew", stacklevel=2)
    return None


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

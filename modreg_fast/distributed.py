"""Sums and means over the ranks of a process group, differentiable; results of all ranks; modules that hold a group."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modreg_fast import _validate as validate

T = TypeVar("T")


class Grouped(nn.Module):
    """A module with process groups, which PyTorch can neither copy nor pickle.

    A copy (``copy.deepcopy``, ``AveragedModel``) shares them. A pickle keeps of the default group that it was the default one, which it
    is again wherever it is loaded, or None where no group is initialised; of another group nothing is kept, and loading warns."""

    process_group: "dist.ProcessGroup | None" = None
    spatial_group: "dist.ProcessGroup | None" = None

    def by_name(self, values: Mapping[str, T], present: Any = None) -> tuple[Mapping[str, T], Any]:
        """Where ranks meet the modalities in the order of their names, for each rank may list them in another, and ``present`` with
        them."""
        if self.process_group is None and self.spatial_group is None:
            return values, present
        columns, names = list(values), sorted(values, key=str)
        if isinstance(present, Tensor) and present.shape[1:] == (len(names),):
            present = torch.stack([present[:, columns.index(m)] for m in names], 1)
        return {m: values[m] for m in names}, present

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


def on_all_ranks(work: Callable[[], T], group: "dist.ProcessGroup | None", function: str) -> list[T]:
    """What ``work`` returns on every rank of ``group``. Where it fails on one, all raise an error, so that none waits for the others."""
    if group is None:
        return [work()]
    if not isinstance(group, dist.ProcessGroup):
        validate.fail(function, "process_group", "a process group or None", type(group).__name__, TypeError)
    mine: T | Exception
    try:
        mine = work()
    except Exception as error:
        mine = error
    told = RuntimeError(f"{type(mine).__name__}: {mine}") if isinstance(mine, Exception) else mine  # an error need not pickle
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, told, group=group)
    if isinstance(mine, Exception):
        raise mine
    for rank, found in enumerate(everyone):
        if isinstance(found, Exception):
            raise RuntimeError(f"{function}: rank {rank} of the process group failed: {found}")
    return everyone


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

"""What targets say: a class for each position and which positions are valid, in whatever dtype and shape; the default loss and metric."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modreg_fast import _validate as validate
from modreg_fast._evaluation import extra

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

USUAL = -100  # the ignore_index of PyTorch, which a target need not hold


def classes(scores: Tensor, target: Any, ignore_index: int | None) -> tuple[Tensor | None, Tensor]:
    """The classes ``(B, *spatial)`` as int64, 0 where not valid, and the valid positions. None, and all positions, where the target holds
    something else than a class for each position; an error where ``ignore_index`` would then be lost."""
    found = _integers(target, scores[:, 0].shape)
    if found is None:
        if ignore_index is not None and (ignore_index != USUAL or _holds(target, ignore_index)):
            expected = f"{_expected(scores)}, to which ignore_index applies (ignore_index=None counts every position)"
            validate.fail("audit", "target", expected, _kind(target))
        return None, torch.ones_like(scores[:, 0], dtype=torch.bool)
    if ignore_index is None:
        return found, torch.ones_like(found, dtype=torch.bool)
    if ignore_index != USUAL and not (target.is_floating_point() or target.dtype == torch.bool):
        limits = torch.iinfo(target.dtype)
        if not limits.min <= ignore_index <= limits.max:
            validate.fail("audit", "ignore_index", f"a number that targets of {target.dtype} can hold", ignore_index)
    valid = found != ignore_index
    return torch.where(valid, found, 0), valid


def _integers(x: Any, shape: torch.Size) -> Tensor | None:
    """``x``, also with a channel dimension of one as MONAI keeps it, as int64; None where it has another shape or is not whole."""
    if not isinstance(x, Tensor) or x.is_complex():
        return None
    x = x.as_subclass(Tensor)
    if x.dim() == len(shape) + 1 and x.shape[1] == 1:
        x = x[:, 0]
    if x.shape != shape or (x.is_floating_point() and not (x.isfinite() & (x == x.round())).all()):
        return None
    return x.long()


def _expected(scores: Tensor) -> str:
    return f"a class for each position {validate.shape(scores[:, 0])}, or target= a function that picks it"


def _kind(x: object) -> str:
    return f"{x.dtype} of shape {validate.shape(x)}" if isinstance(x, Tensor) else type(x).__name__


def _holds(x: Any, value: int) -> bool:
    if isinstance(x, Tensor):
        return not x.is_complex() and bool((x == value).any())
    if isinstance(x, Mapping):
        return any(_holds(part, value) for part in x.values())
    return isinstance(x, tuple | list) and any(_holds(part, value) for part in x)


def default_loss(scores: Tensor, target: Any, found: Tensor | None, ignore_index: int | None) -> Tensor:
    """Cross entropy per position, from classes or from probabilities like the scores; of one score, which is a logit, the binary one."""
    count = scores.shape[1]
    if found is None and isinstance(target, Tensor) and target.is_floating_point() and target.shape == scores.shape and count > 1:
        low, high = target.min().item(), target.float().sum(1).max().item()
        if low < 0 or high > 1.01:  # less than 1 is what one-hot classes have where none is labelled
            expected = "probabilities over the classes, or loss= given where several of them hold at once"
            validate.fail("audit", "target", expected, f"numbers from {low:.3g} on, with sums up to {high:.3g}")
        return F.cross_entropy(scores, target, reduction="none")
    if found is None:
        validate.fail("audit", "target", f"{_expected(scores)} where loss= is not given", _kind(target))
    check_range(found, count, ignore_index)
    if count == 1:
        return F.binary_cross_entropy_with_logits(scores[:, 0], found.to(scores.dtype), reduction="none")
    return F.cross_entropy(scores, found, reduction="none")


def check_range(found: Tensor, count: int, ignore_index: int | None) -> None:
    """Before a GPU meets a class that is not there and stops."""
    low, high, last = int(found.min()), int(found.max()), max(count, 2) - 1
    if low < 0 or high > last:
        ignored = "" if ignore_index is None else f", or {ignore_index} (ignore_index)"
        validate.fail("audit", "target", f"a class of the scores, 0 to {last}{ignored}", low if low < 0 else high)


class Accuracy(nn.Module):
    """Of the classes as :func:`classes` reads them, over the valid positions; one score is a logit."""

    def __init__(self, count: int, ignore_index: int | None, group: "ProcessGroup | None") -> None:
        super().__init__()
        with extra("audit"):
            from torchmetrics.classification import MulticlassAccuracy
        self.ignore_index = ignore_index
        with torch.device("cpu"):  # to start with, whatever the default device is
            self.metric = MulticlassAccuracy(
                max(count, 2), average="micro", ignore_index=-1, process_group=group, sync_on_compute=group is not None
            )

    def check(self, scores: Tensor, found: Tensor | None) -> Tensor:
        if found is None:
            validate.fail("audit", "metric", "given where the target holds no class for each position", "None")
        check_range(found, scores.shape[1], self.ignore_index)
        return found

    def update(self, scores: Tensor, target: Any) -> None:
        found, valid = classes(scores, target, self.ignore_index)
        found = self.check(scores, found)
        predicted = (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(1)
        self.metric.update(predicted, torch.where(valid, found, -1))

    def compute(self) -> Tensor:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()

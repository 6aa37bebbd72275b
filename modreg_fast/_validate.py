"""Checks of what users pass in. Every message names the function, the argument, what was expected and what came."""

from collections.abc import Mapping, Sequence
from functools import reduce
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_SIGNATURES = 1024
_accepted: set[tuple[object, ...]] = set()

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def fail(function: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{function}: {argument} must be {expected}, got {got}")


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def tensor(x: object, function: str, argument: str, *, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """A plain strided tensor of an accepted dtype. One made in inference mode is copied where gradients are on: autograd saves none."""
    if not isinstance(x, Tensor):
        fail(function, argument, "a tensor", type(x).__name__, TypeError)
    if type(x) is not Tensor and hasattr(x, "device_mesh"):
        fail(function, argument, "a plain tensor (take .to_local() and pass process_group=)", "a DTensor", TypeError)
    if x.dtype not in dtypes:
        fail(function, argument, " or ".join(str(d).removeprefix("torch.") for d in dtypes), x.dtype, TypeError)
    if x.layout != torch.strided:
        fail(function, argument, "a strided tensor", x.layout, TypeError)
    if x.is_nested:
        fail(function, argument, "a plain tensor (pad the samples and pass a mask)", "a nested tensor", TypeError)
    if not torch.compiler.is_compiling() and x.is_inference() and torch.is_grad_enabled():
        return x.clone()
    return x


def promoted(tensors: list[Tensor]) -> list[Tensor]:
    """All in the dtype that theirs promote to."""
    if all(x.dtype == tensors[0].dtype for x in tensors):
        return tensors
    dtype = reduce(torch.promote_types, [x.dtype for x in tensors])
    return [x.to(dtype) for x in tensors]


def one_of(x: object, options: Sequence[str], function: str, argument: str) -> None:
    if x not in options:
        *others, last = map(repr, options)
        fail(function, argument, f"{', '.join(others)} or {last}", repr(x))


def signature(call: object, channel_dim: object, *rows: object) -> tuple[object, ...] | None:
    """What the checks of rows of tensors look at, of a kind of call, for :func:`accepted`.

    None where it may not be remembered: with anything but plain tensors; under tracing and transforms, where sizes may be symbols; with
    tensors of inference mode, which a check replaces by copies."""
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or type(channel_dim) is not int
    ):
        return None
    seen: list[object] = [call, channel_dim]
    for row in rows:
        if type(row) is not list and type(row) is not tuple:
            return None
        for x in row:
            if type(x) not in _PLAIN or x.is_nested or x.is_inference():
                return None
            seen += x.shape, x.dtype, x.device, x.layout
        seen.append(None)  # the end of a row
    return tuple(seen)


def accepted(signature: tuple[object, ...] | None) -> bool:
    """Whether tensors like these have passed their checks before."""
    return signature in _accepted


def accept(signature: tuple[object, ...] | None) -> None:
    if signature is not None:
        if len(_accepted) >= _MOST_SIGNATURES:
            _accepted.clear()
        _accepted.add(signature)


def sequence(x: object, function: str, argument: str) -> Sequence:  # type: ignore[type-arg]
    if not isinstance(x, list | tuple) and (not isinstance(x, Sequence) or isinstance(x, str)):
        got = f"{type(x).__name__}{' (of one alone: [x])' * isinstance(x, Tensor)}"
        fail(function, argument, "a list or tuple", got, TypeError)
    if len(x) == 0:
        fail(function, argument, "non-empty", "an empty sequence")
    return x


def different(x: object, function: str, argument: str) -> Sequence[str]:
    """Names, none of them twice."""
    x = sequence(x, function, argument)
    if len(set(x)) < len(x):
        fail(function, argument, "different names", list(x))
    return x


def modalities(x: object, function: str, argument: str, values: str = "tensors") -> Mapping:  # type: ignore[type-arg]
    if type(x) is not dict and not isinstance(x, Mapping):
        fail(function, argument, f"a mapping from modality to {values}", type(x).__name__, TypeError)
    if len(x) == 0:
        fail(function, argument, "a mapping with at least one modality", "an empty one")
    return x


def feature(x: object, function: str, argument: str, channel_dim: int) -> Tensor:
    """A tensor ``(B, C, *spatial)`` of any spatial shape, with its channels at ``channel_dim``."""
    x = tensor(x, function, argument)
    if x.dim() < 2:
        fail(function, argument, "of shape (B, C, *spatial)", shape(x))
    channels(x, channel_dim, function, argument)
    if 0 in x.shape[1:]:  # no samples are fine
        fail(function, argument, "non-empty", f"shape {shape(x)}")
    return x


def channels(x: Tensor, channel_dim: object, function: str, argument: str) -> None:
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        fail(function, "channel_dim", "an integer", type(channel_dim).__name__, TypeError)
    if not -x.dim() < channel_dim < x.dim() or channel_dim == 0:
        fail(function, "channel_dim", f"a dimension of {argument} {shape(x)} other than the batch", channel_dim)


def flag(x: object, function: str, argument: str) -> bool:
    if not isinstance(x, bool):
        fail(function, argument, "True or False", repr(x), TypeError)
    return x


def same(x: Tensor, other: Tensor, function: str, argument: str, reference: str) -> None:
    """``x`` has the shape and the device of ``other``."""
    if x.shape != other.shape:
        fail(function, argument, f"of the shape {shape(other)} of {reference}", shape(x))
    if x.device != other.device:
        fail(function, argument, f"on the device {other.device} of {reference}", x.device)


def present(x: object, batch: int, modalities: int, device: torch.device, function: str) -> Tensor:
    """Which sample has which modality: ``(B, M)`` bool."""
    x = tensor(x, function, "present", dtypes=(torch.bool,))
    if x.shape != (batch, modalities) or x.device != device:
        fail(function, "present", f"of shape {(batch, modalities)} on {device}", f"{shape(x)} on {x.device}")
    return x


def number(x: object, function: str, argument: str) -> float:
    """A finite number of at least 0."""
    if type(x) is not float and (isinstance(x, bool) or not isinstance(x, Real)):
        fail(function, argument, "a number", type(x).__name__, TypeError)
    value = float(x)
    if not 0 <= value < float("inf"):
        fail(function, argument, "a finite number of at least 0", x)
    return value


def ignore_index(x: object, function: str) -> int:
    """As integers of 64 bits can hold it."""
    if isinstance(x, bool) or not isinstance(x, int):
        fail(function, "ignore_index", "an integer", type(x).__name__, TypeError)
    if not -(2**63) <= x < 2**63:
        fail(function, "ignore_index", "an integer of 64 bits", x)
    return x


def fraction(x: object, function: str, argument: str) -> float:
    """In [0, 1]."""
    if (value := number(x, function, argument)) > 1:
        fail(function, argument, "at most 1", x)
    return value


def readable(x: Tensor) -> bool:
    """Whether a look at the values of ``x`` is possible: not in compiled code, nor under ``torch.func.vmap``, at whatever depth, nor where
    ``make_fx`` traces, as ``torch.func.linearize`` does."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def positive_integer(x: object, function: str, argument: str) -> int:
    if type(x) is not int and (isinstance(x, bool) or not isinstance(x, Integral)):
        fail(function, argument, "an integer", type(x).__name__, TypeError)
    if x < 1:
        fail(function, argument, "an integer of at least 1", x)
    return int(x)

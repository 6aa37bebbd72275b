"""Small tools of the tests: exact conversion to NumPy, errors in norm, tensors of every layout, several ranks."""

import io
import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import shared
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Largest relative rounding error of a value stored in 16 bits, and half the step of its subnormal numbers.
STORAGE = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}


def wide(x: Tensor | Sequence | None):
    """float64 NumPy of the very values of a tensor (or of nested lists of them); bool stays bool."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        x = x.detach()
        return x.numpy().copy() if x.dtype == torch.bool else x.double().numpy().copy()
    return [wide(y) for y in x]


def relative_error(actual, expected) -> float:
    """Error in relative norm; over all tensors together if given lists."""
    a, e = _flat(actual), _flat(expected)
    assert a.shape == e.shape, (a.shape, e.shape)
    error = np.linalg.norm(a - e)
    return float(error) if error == 0 else float(error / np.linalg.norm(e))


def assert_close(actual, expected, tolerance: float, *, floor: float = 0.0) -> None:
    """Within ``tolerance`` in relative norm. ``floor``: an absolute size below which the norm of ``expected`` does not count."""
    a, e = _flat(actual), _flat(expected)
    assert a.shape == e.shape, (a.shape, e.shape)
    assert np.isfinite(a).all(), "not finite"
    error, bound = np.linalg.norm(a - e), tolerance * max(np.linalg.norm(e), floor)
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"


def _flat(x) -> np.ndarray:
    if isinstance(x, list | tuple):
        return np.concatenate([_flat(y) for y in x])
    return np.asarray(wide(x) if isinstance(x, Tensor) else x, dtype=np.float64).ravel()


def bits(x: Tensor) -> Tensor:
    """A copy that compares NaN with NaN and 0 with -0 as what they are."""
    return (
        x.detach().clone().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])
    )


def _into(shape: Sequence[int], index, x: Tensor) -> Tensor:
    """``x`` as the window ``index`` of a larger buffer that holds NaN everywhere else."""
    buffer = torch.full(tuple(shape), float("nan"), dtype=x.dtype)
    buffer[index] = x
    return buffer[index]


def _inner(x: Tensor) -> Tensor:
    return _into([n + 2 for n in x.shape], (slice(1, -1),) * x.dim(), x)


def _stepped(x: Tensor, dim: int) -> Tensor:
    shape, index = list(x.shape), [slice(None)] * x.dim()
    shape[dim], index[dim] = 3 * shape[dim], slice(1, None, 3)
    return _into(shape, tuple(index), x)


def _permuted(*order: int) -> Callable[[Tensor], Tensor]:
    back = [order.index(i) for i in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(back)


# (B, C, H, W) -> a tensor of that shape with other strides. What lies between its elements is NaN: whoever reads it shows it.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed_pixels": _permuted(0, 1, 3, 2),
    "channels_outside": _permuted(1, 0, 2, 3),
    "batch_inside": _permuted(2, 3, 1, 0),
    "stepped_batch": lambda x: _stepped(x, 0),
    "stepped_channels": lambda x: _stepped(x, 1),
    "stepped_rows": lambda x: _stepped(x, 2),
    "stepped_columns": lambda x: _stepped(x, 3),
    "window": _inner,
    "window_channels_last": lambda x: _inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "offset": lambda x: _into([3 + x.numel()], slice(3, None), x.flatten()).view(x.shape),
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_batch_channels_last": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_pixels": lambda x: x[:, :, :1, :1].expand_as(x),
}


def features(modalities: int, shapes: Sequence[Sequence[int]], *, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    """``[m][s]`` random leaves that require grad."""
    return [[(scale * torch.randn(*shape)).to(dtype).requires_grad_() for shape in shapes] for _ in range(modalities)]


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence, upstream) -> list[Tensor]:
    """Gradients of the flattened ``inputs``, zeros where there is no path; the graph stays."""
    inputs = [x for row in inputs for x in (row if isinstance(row, list | tuple) else [row])]
    return list(torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, allow_unused=True, materialize_grads=True))


def run_ranks(work: Callable[..., None], count: int, *args) -> None:
    """``work(rank, *args)`` in processes of their own, forked from one that has imported what takes seconds and done nothing else."""
    multiprocessing.set_forkserver_preload(["modreg_fast", "torch.distributed.fsdp", "torchmetrics"])
    torch.multiprocessing.start_processes(work, args, count, start_method="forkserver")


def ranks(work: Callable[..., None], count: int, *args):
    """A fixture of a module: what each rank saves. ``work(rank, store, folder, *args)`` meets the others at the file ``store`` and saves
    to ``folder/rank.pt``."""

    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(work, count, f"{folder}/store", folder, *args)
            return pickle.dumps([Path(folder, f"{rank}.pt").read_bytes() for rank in range(count)])

    @pytest.fixture(scope="module")
    def found():
        saved = pickle.loads(shared.once(f"ranks of {work.__module__}", make))
        return [torch.load(io.BytesIO(content), weights_only=False) for content in saved]

    return found

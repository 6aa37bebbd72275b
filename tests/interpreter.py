"""Triton's interpreter in tests: what has to be mended in it, and what a kernel moves in memory.

Only in a process that was started with ``TRITON_INTERPRET=1``; see test_triton.py."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter


def mend() -> None:
    """A cast to bfloat16 truncates in the interpreter; GPUs round to the nearest, ties to even. And floating point does not warn.

    Each function that a kernel calls replaces the builtins of the language once more, half of the interpreter's time. Here the kernel does,
    for all of them: for those written with ``tl`` and those of Triton's own library, written with ``tl.core``."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = source.data.view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            data = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return original(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast
    patch, modules = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda kernel: patch(modules)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)
    np.seterr(all="ignore")


class Traffic:
    """The bytes that kernels loaded and stored, each as often as it was."""

    def __init__(self) -> None:
        self.loads: list[np.ndarray] = []
        self.stores: list[np.ndarray] = []

    @staticmethod
    def _of(tensor: Tensor, addresses: list[np.ndarray]) -> np.ndarray:
        storage = tensor.untyped_storage()
        first, size = storage.data_ptr(), storage.nbytes()
        everything = np.concatenate([np.zeros(0, np.uint64), *addresses]).astype(np.int64)
        return everything[(everything >= first) & (everything < first + size)]

    def loaded(self, *tensors: Tensor) -> int:
        return sum(self._of(x, self.loads).size for x in tensors)

    def distinct(self, *tensors: Tensor) -> int:
        return sum(np.unique(self._of(x, self.loads)).size for x in tensors)

    def stored_once(self, tensor: Tensor) -> bool:
        """Every byte of the tensor exactly once."""
        found = self._of(tensor, self.stores)
        return found.size == np.unique(found).size == tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    builder, counted = interpreter.InterpreterBuilder, Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def addresses(pointers, mask) -> np.ndarray:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)].astype(np.uint64)
        return (first[:, None] + np.arange(width, dtype=np.uint64)).ravel()

    def counting_load(self, pointers, mask, *rest):
        counted.loads.append(addresses(pointers, mask))
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        counted.stores.append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield counted
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store

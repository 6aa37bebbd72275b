"""The Triton backend's launches on the PTX interpreter: what a GPU would load, compiled for one that is not here."""

import numpy as np
import ptx
import torch
from triton.backends.compiler import GPUTarget

from modreg_fast.backends.triton.offline import compile_for


def content(x):
    """The bytes of the storage of a tensor, as a view."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()


def scalars(types, values):
    """What a compiled kernel takes of its arguments: no constants, and tuples one by one."""
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from scalars(type_, value)
        elif type_ != "constexpr":
            yield type_, value


class Gpu:
    """Device memory that holds copies of ``inputs``; reading anything else before a kernel wrote it is an error."""

    def __init__(self, architecture, *inputs):
        self.architecture, self.memory = architecture, ptx.Memory()
        self.copies = {x.untyped_storage().data_ptr(): (x, self.memory.put(content(x))) for x in inputs}

    def buffer(self, x):
        return self.copies.setdefault(x.untyped_storage().data_ptr(), (x, self.memory.empty(content(x).shape, np.uint8)))[1]

    def run(self, launch):
        """The report of a launch."""
        compiled = compile_for(launch, GPUTarget("cuda", self.architecture, 32))
        types = [compiled.src.signature[name] for name in launch.kernel.arg_names[: len(launch.arguments)]]
        flat = list(scalars(types, launch.arguments))
        source = ptx.TritonSource(
            "", compiled.metadata.name, dict(enumerate(t for t, _ in flat)), {}, (), launch.threads // 32, self.architecture
        )
        metadata = compiled.metadata
        kernel = ptx.TritonKernel(source, compiled.asm["ptx"], metadata.name, metadata.shared, metadata.global_scratch_size)
        values = (self.buffer(v).address + v.storage_offset() * v.itemsize if isinstance(v, torch.Tensor) else v for _, v in flat)
        return kernel.run(launch.programs, dict(enumerate(values)), self.memory)

    def fetch(self, *tensors):
        """Copies the results into the tensors that stand for them; an error where a kernel left bytes unwritten."""
        for x in tensors:
            content(x)[:] = self.buffer(x).numpy()

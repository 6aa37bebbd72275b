"""Compiles launches for GPUs that are not here."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from modreg_fast.backends.triton.launches import Launch


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """What ``launch.run`` would load on a GPU of kind ``target``: a ``triton.compiler.CompiledKernel``, with the results of all
    stages in ``asm`` (``ptx`` and ``cubin``, or ``amdgcn``).

    The steps of ``JITFunction.run`` without a driver; not possible in a process that runs the interpreter."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = launch.options(target.backend, target.warp_size)
    bound, specialization, options = bind(*launch.arguments, **launch.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)

"""Compiles launches for GPUs that are not here."""

from typing import Any

import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from modreg_fast.backends.triton.launches import Launch


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """What ``launch.run`` would load on a GPU of kind ``target``: a ``triton.compiler.CompiledKernel``, with the results of all
    stages in ``asm`` (``ptx`` and ``cubin``, or ``amdgcn``).

    The steps of ``JITFunction.run``, as Triton 3.4 to 3.9 have them, without a driver; not possible in a process that runs the
    interpreter."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = launch.options(target.backend, target.warp_size)
    bound, specialization, _ = bind(*launch.arguments, **launch.constants, **options)
    types = [type_ for type_, _ in specialization]
    values = list(bound.values())
    constants = {path: get_iterable_path(values, path) for path in find_paths_if(types, lambda _, x: x == "constexpr")}
    # What is known of an argument, such as that 16 divides it; of a constant some versions give its value here.
    known = ["" if type_ == "constexpr" else attribute for type_, attribute in specialization]
    attributes = {
        p: backend.parse_attr(get_iterable_path(known, p)) for p in find_paths_if(known, lambda _, x: isinstance(x, str))
    }
    signature = dict(zip(kernel.arg_names, types, strict=True))
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=backend.parse_options(options).__dict__)

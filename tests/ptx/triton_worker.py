"""Compiles the Triton kernels that stdin names (JSON of ``TritonSource``) and prints their PTX and needs as JSON."""

import importlib
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(request: dict) -> dict:
    function = getattr(importlib.import_module(request["module"]), request["function"])
    names, constants = function.arg_names, request["constants"]
    source = ASTSource(
        function,
        {name: request["signature"].get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in request["divisible"]},
    )
    kernel = triton.compile(source, GPUTarget("cuda", request["capability"], 32), {"num_warps": request["warps"]})
    metadata = kernel.metadata
    return {"ptx": kernel.asm["ptx"], "name": metadata.name, "shared": metadata.shared, "scratch": metadata.global_scratch_size}


print(json.dumps([compiled(request) for request in json.load(sys.stdin)]))

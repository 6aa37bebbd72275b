"""PTX from CUDA C++ and from Triton, and the launch of a compiled Triton kernel."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import shared

from .launch import Report, parse_once, run
from .memory import Memory

NVCC = shutil.which("nvcc")


@functools.cache
def cuda_to_ptx(source: str, arch: str, *options: str) -> str:
    """What nvcc makes of CUDA C++ for an architecture such as ``sm_90``. Tests skip where ``NVCC`` is None."""

    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernels.cu")
            file.write_text(source)
            command = [NVCC, "-ptx", f"-arch={arch}", *options, "-o", f"{folder}/kernels.ptx", file]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc failed:\n{done.stderr}")
            return Path(folder, "kernels.ptx").read_bytes()

    return shared.once(repr((source, arch, options)), make).decode()


@dataclass(frozen=True)
class TritonSource:
    """A specialization of a ``triton.jit`` function.

    ``signature`` gives types as Triton writes them (``"*fp32"``, ``"i32"``), in the order of the function's arguments; ``constants`` the
    values of its ``tl.constexpr`` arguments; ``divisible`` the arguments known to be multiples of 16, as Triton finds out at a launch."""

    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    divisible: Sequence[str] = ()
    warps: int = 4
    capability: int = 90


@dataclass(frozen=True)
class TritonKernel:
    source: TritonSource
    ptx: str
    name: str
    shared: int
    scratch: int  # bytes of global memory per program

    def run(self, grid, args: Mapping[str, object], memory: Memory) -> Report:
        """Launches it with the arguments of its signature; scratch pointers, which Triton passes too, are added."""
        if set(args) != set(self.source.signature):
            raise ValueError(f"arguments {sorted(self.source.signature)} expected, got {sorted(args)}")
        programs = functools.reduce(lambda a, b: a * b, (grid,) if isinstance(grid, int) else grid)
        values = [args[name] for name in self.source.signature]
        hidden = [0] * (len(parse_once(self.ptx).functions[self.name].parameters) - len(values))
        if self.scratch:
            hidden[0] = memory.empty(self.scratch * programs, "u1", "scratch")
        threads = 32 * self.source.warps
        return run(self.ptx, self.name, grid, threads, values + hidden, memory, shared_bytes=self.shared, replicated=True)


def triton_to_ptx(*sources: TritonSource) -> list[TritonKernel]:
    """Compiles offline, in one process of its own in which Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    worker = Path(__file__).with_name("triton_worker.py")
    request = json.dumps([asdict(source) for source in sources])
    done = subprocess.run([sys.executable, worker], input=request, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"Triton failed:\n{done.stderr}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return [TritonKernel(source, **answer) for source, answer in zip(sources, answers, strict=True)]

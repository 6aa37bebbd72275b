"""What a compiled CUDA kernel is made of: registers, spills and shared memory, and the instructions by kind, from its cubin.

Needs ``cuobjdump`` and ``nvdisasm``: from PATH, or from Triton's wheel, which carries them."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes of shared memory of a multiprocessor, by architecture
_THREADS, _REGISTERS = 2048, 65536


@dataclass(frozen=True)
class Resources:
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers, and arrays in memory
    shared: int  # bytes per block, declared in the code

    def occupancy(self, architecture: int, threads: int, dynamic_shared: int = 0) -> float:
        """Share of a multiprocessor's threads that are resident with blocks of so many threads."""
        return self.blocks(architecture, threads, dynamic_shared) * threads / _THREADS

    def blocks(self, architecture: int, threads: int, dynamic_shared: int = 0) -> int:
        """Resident blocks of so many threads; at most 32 fit."""
        by_registers = _REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_shared = SHARED[architecture] // (self.shared + dynamic_shared + 1024)  # the driver keeps 1 KiB per block
        return min(by_registers, by_shared, _THREADS // threads, 32)


# Kinds by the pipe that executes them; see the table "Arithmetic Instructions" of the CUDA C++ Programming Guide.
_KINDS = {
    "fp32": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSET FSETP FCHK FADD32I FMUL32I FFMA32I",
    "integer": "IADD IADD3 IADD32I IMAD IMNMX VIMNMX VIADD VIADDMNMX LEA LOP LOP3 SHF SHL SHR ISETP SEL PRMT BMSK SGXT MOV MOV32I CS2R "
    "IABS POPC FLO PLOP3 P2R R2P",
    "mufu": "MUFU",
    "conversion": "F2F F2FP I2F I2FP F2I F2IP I2I FRND HADD2 HFMA2 HMUL2 HADD2_32",
    "exchange": "SHFL BAR LDS STS LDSM STSM REDUX WARPSYNC",
    "memory": "LDG LDGSTS STG LDC LDCU ULDC LDL STL",
}
KINDS = (*_KINDS, "uniform", "other")
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z0-9_]+)((?:\.\w+)*)", re.MULTILINE)


def resources(cubin: bytes) -> Resources:
    """Of the kernel in a cubin that holds one."""
    text = tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump names no resources: {text[:200]}")
    registers, stack, shared, local = map(int, found.groups())
    return Resources(registers, stack + local, shared)


def instructions(cubin: bytes) -> dict[str, int]:
    """Instructions in the code of a cubin, by kind, each counted once wherever it stands: in straight code what a thread executes.
    ``other`` holds branches, synchronisation and what has no kind; instructions of the uniform data path are ``uniform``."""
    counts = dict.fromkeys(KINDS, 0)
    for name, _ in _LINE.findall(tool("nvdisasm", "-c", cubin=cubin)):
        if name != "NOP":
            counts[_kind(name)] += 1
    return counts


def executed(cubin: bytes, entry: str, executions: Mapping[int, int]) -> tuple[dict[str, int], Counter[str]]:
    """Instructions that the threads of a launch executed, by kind, and by name such as ``MUFU.EX2``: each instruction of the kernel
    ``entry`` as often as the line of PTX that ptxas made it from, whose ``executions`` the PTX interpreter counted. The cubin comes from
    ``ptxas -lineinfo``. Right as far as ptxas leaves loops as they are in the PTX, which exponentials and shuffles show. Not counted is
    what stands behind the last ``EXIT``: shuffles of divergent warps, divisions of extreme numbers."""
    code = _code(cubin, entry).rpartition("EXIT")[0]
    counts, names, times = dict.fromkeys(KINDS, 0), Counter[str](), 0
    for line in code.splitlines():
        if source := re.search(r'File "\.nv_debug_ptx_txt", line (\d+)', line):
            times = executions.get(int(source[1]), 0)
        elif (found := _LINE.match(line)) and found[1] != "NOP":
            counts[_kind(found[1])] += times
            names[found[1] + found[2]] += times
    return counts, names


def widths(cubin: bytes, entry: str) -> dict[int, int]:
    """Bytes of one access to shared or global memory in the kernel ``entry``, by the line of the PTX that it was made from: ptxas merges
    accesses to neighbouring places. The cubin comes from ``ptxas -lineinfo``."""
    found, source = dict[int, int](), 0
    for line in _code(cubin, entry).splitlines():
        if at := re.search(r'File "\.nv_debug_ptx_txt", line (\d+)', line):
            source = int(at[1])
        elif (access := _LINE.match(line)) and access[1] in ("LDS", "STS", "LDG", "STG", "LDGSTS", "LDSM", "STSM", "LD", "ST"):
            bits = re.search(r"\.(?:[US])?(8|16|64|128|256)(?:\.|$)", access[2])
            found[source] = max(found.get(source, 0), int(bits[1]) // 8 if bits else 4)
    return found


def _code(cubin: bytes, entry: str) -> str:
    text = tool("nvdisasm", "-gp", "-c", cubin=cubin)
    return text.split(f"\t.section\t.text.{entry},", 1)[1].split("\t.section\t", 1)[0]


def _kind(name: str) -> str:
    return _KIND.get(name) or ("uniform" if name.startswith(("U", "R2UR", "S2UR")) else "other")


def carried(name: str) -> str:
    """The program of that name in the installed Triton."""
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"{name}: neither on PATH nor in an installed Triton")
    return str(path)


def tool(name: str, *options: str, cubin: bytes) -> str:
    """What the program of that name prints of a cubin."""
    path = shutil.which(name) or carried(name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout

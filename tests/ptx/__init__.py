"""A PTX interpreter in NumPy: runs GPU kernels, as nvcc and Triton compile them, on a machine without a GPU.

    memory = ptx.Memory()
    x = memory.put(array)                     # a buffer of device memory with a copy of the array
    y = memory.empty(array.shape, "f4")       # one that nobody has written: reading it first is an error
    report = ptx.run(text, "scale", grid=8, block=256, args=[x, y, array.size, 2.0], memory=memory)
    y.numpy()                                 # a copy; an error where the kernel left bytes unwritten
    report.loads_of[x].distinct               # bytes of x that were read; also .bytes, .sectors, .efficiency

``text`` comes from ``cuda_to_ptx(source, "sm_90")``, from ``triton_to_ptx(TritonSource(...))``, whose kernels have their own ``run``, or is
written by hand. See ``test_ptx_kernels.py`` and ``test_ptx_triton.py``.

**What it checks.** A launch ends with a ``PtxError`` that names the thread, the line of PTX and the address:

- ``OutOfBounds``: an access that leaves its buffer, its block's shared or its thread's local memory, by whatever distance
- ``Misaligned``: an address that is not a multiple of the access, a vector counted as a whole
- ``Uninitialized``: a read of global, shared or local memory that nobody wrote, also of bytes that ``cp.async`` has yet to deliver
- ``SharedRace``: two threads at one byte of shared memory, one writing, with no barrier of the block between them, or of the whole warp for
  threads of one warp. Shuffles and votes do not order memory, as in CUDA. Lanes of a warp may write the same value in one instruction;
  in Triton's kernels, which rely on it, lanes of several warps too
- ``GlobalConflict``: two threads that store to one byte of global memory in a launch; ``ld.global.nc`` of a byte stored in it
- ``BarrierError``: a barrier that not all live threads of the block reach, or that they wait for at different instructions
- ``WarpError``: a shuffle, vote, match, reduction or warp barrier whose member mask names a lane that never comes, even one that has
  ended; a value taken from a lane that takes no part
- ``UnknownInstruction``: when reached, an opcode, a modifier or an operand that is not in the tables; nothing is guessed
- ``Trapped``: ``trap``, a failed ``assert``, ``printf``, a kernel that does not end

**What it counts.** Per buffer, loads and stores: bytes over all threads, distinct bytes, and 32-byte sectors per request of a warp, which
is what reaches the L2 cache when nothing hits in L1.
Per load and store of the PTX (``report.requests``): requests, wavefronts of shared memory and as many as there would be without bank
conflicts, sectors and lines of global memory and as few sectors as hold the bytes. Atomics are not counted.

**What it does not model.**

- The memory model. Lanes run in one order, and all see a store at once, so fences do nothing, and a missing one is not found. Nor is a
  read of global memory that another thread writes without order. A thread that spins until another has stored something may hang.
- Atomics are left out of the checks for races and for two writers; those on floats run in the order of the threads.
- Time, caches, registers and occupancy. The SASS that ptxas makes of the PTX may move and merge accesses; the latter can be counted
  (``requests.as_assembled``).
- Approximate instructions err by a pseudo-random part of what the PTX ISA allows, not by what a given chip does. NaNs have no payload.
- Tensor cores, TMA, mbarriers, clusters, textures, named barriers for a part of a block, recursion.

**Files.** ``parser`` text to instructions. ``formats`` types and exact rounding. ``table``, ``integer``, ``floating`` instructions that
only touch registers. ``memory`` buffers, guards, counters. ``access`` loads, stores, atomics. ``tiles`` asynchronous copies, matrices.
``requests`` bank conflicts and sectors. ``warp`` shuffles and votes. ``control`` branches, calls, barriers. ``program`` an entry and what
it calls. ``machine`` the scheduler. ``launch`` ``run``. ``compilers`` nvcc and Triton. ``evaluate`` one instruction, for its test. To add
an instruction, put it into the table of its file and a row into ``test_ptx_integers.py``, ``test_ptx_floats.py`` or
``test_ptx_machine.py``."""

from .compilers import NVCC, TritonKernel, TritonSource, cuda_to_ptx, triton_to_ptx
from .errors import (
    BarrierError,
    GlobalConflict,
    Misaligned,
    OutOfBounds,
    PtxError,
    SharedRace,
    Trapped,
    Uninitialized,
    UnknownInstruction,
    WarpError,
)
from .launch import Report, run
from .memory import WINDOW_BITS, Buffer, Memory, Traffic

__all__ = [
    "NVCC",
    "WINDOW_BITS",
    "BarrierError",
    "Buffer",
    "GlobalConflict",
    "Memory",
    "Misaligned",
    "OutOfBounds",
    "PtxError",
    "Report",
    "SharedRace",
    "Traffic",
    "Trapped",
    "TritonKernel",
    "TritonSource",
    "Uninitialized",
    "UnknownInstruction",
    "WarpError",
    "cuda_to_ptx",
    "run",
    "triton_to_ptx",
]

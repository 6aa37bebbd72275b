"""How long a kernel needs on a GPU that is not here, on paper: what it does per element against the chip's rates.

Each resource of a multiprocessor (the schedulers, the pipes, the banks of the shared memory, its part of the device memory's bandwidth)
has a time per element at its full rate. The longest of them bounds the kernel from below, and is reached where enough work waits for that
resource all the time. That work comes from the blocks that are resident: the warps of a block meet at its barriers, so a block takes the
resources in turn, and few blocks leave gaps. This is a closed queue, and its throughput follows by mean value analysis (Reiser and
Lavenberg, J. ACM 27, 1980): with n customers, one that comes to a resource finds there what n - 1 leave on average."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Of a kernel, per element of its inputs. ``counts``: instructions of each pipe, of all (``issue``), and ``banks``, passes of a warp
    through the banks of the shared memory, over the elements of a warp. ``resident``: blocks of a multiprocessor, or, in a kernel without
    a barrier, their warps."""

    bytes: float
    counts: Mapping[str, float]
    resident: int


@dataclass(frozen=True)
class Chip:
    """Rates at the boost clock. ``rates``: results per clock and multiprocessor; ``issue``: four schedulers of 32 lanes."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    rates: Mapping[str, int]

    def picoseconds(self, work: Work) -> dict[str, float]:
        """Per element, for the memory and for each resource alone."""
        per_second = self.multiprocessors * self.clock
        times = {"memory": work.bytes / self.bandwidth}
        times |= {name: work.counts[name] / (rate * per_second) for name, rate in self.rates.items()}
        return {name: 1e12 * seconds for name, seconds in times.items()}

    def predicted(self, work: Work) -> float:
        """Picoseconds per element: between the longest of the times, with many blocks, and their sum, with one."""
        times = list(self.picoseconds(work).values())
        waiting, cycle = [0.0] * len(times), 0.0
        for customers in range(1, work.resident + 1):
            taken = [time * (1 + queue) for time, queue in zip(times, waiting, strict=True)]
            cycle = sum(taken) / customers
            waiting = [time / cycle for time in taken]
        return cycle

    def cell(self, work: Work) -> str:
        """The predicted time, the resource that takes longest, and the share of the memory's bandwidth that is reached."""
        times, time = self.picoseconds(work), self.predicted(work)
        return f"{time:.2f} {max(times, key=lambda name: times[name])} {times['memory'] / time:.0%}"


# What the figures come from. But for the bandwidth of the H200 none was measured by this project, and NVIDIA's own documents were seen only
# as other pages quote them.
# - fp32 and integer, A100 and H100: NVIDIA's A100 and H100 architecture white papers, by way of the peak rates that they give: 19.5 and
#   66.9 TFLOPS in FP32, 33.5 TOPS in INT32 (H100) are multiprocessors x clock x rate x 2. Integer, A100: table "Throughput of Native
#   Arithmetic Instructions" of the CUDA C++ Programming Guide, as notes on its column 8.0 quote it; so is mufu, A100.
# - fp32, B200: 80 TFLOPS of NVIDIA's Blackwell brief need 2.1 GHz with it; 75 TFLOPS, which others list, 1.98 GHz.
# - mufu, H100: the same guide, as FlashAttention-3 (arXiv 2407.08608) quotes it for its 3.9 TFLOPS of special functions. B200: as many
#   units as the H100, says FlashAttention-4 (together.ai/blog/flashattention-4).
# - integer, B200: unsourced (taken to be as on the H100).
# - issue: four schedulers a multiprocessor, each one instruction of a warp per clock, as is generally described; not checked.
# - banks: 32 of 4 bytes, each one word per clock, as the CUDA C++ Programming Guide describes; shuffles, and the lines of a global access,
#   pass one by one, which the bank conflicts that Nsight Compute counts on an H200 confirm for lines (docs/gpu.md).
# - H200: that of the H100, with the bandwidth that a copy of 1 GiB reached on one.
# - A100: 108 multiprocessors at 1410 MHz as deviceQuery prints; 2039 GB/s in the data sheet of the 80 GB SXM module.
# - H100: 132 multiprocessors, 3.35 TB/s in the data sheet; the clock from the peak rate in FP32.
# - B200: 148 multiprocessors, a bus of 7680 bits at 2 x 3996 MHz as the driver reports (github.com/pytorch/ao/pull/4002); the data sheet
#   rounds up to 8 TB/s. The clock: the largest that nvidia-smi reports, in notes of users; no document of NVIDIA was found.
_HOPPER = {"fp32": 128, "integer": 64, "mufu": 16, "issue": 128, "banks": 32}
H200 = Chip("H200 SXM", 132, 1.98e9, 4.22e12, _HOPPER)
CHIPS = (
    Chip("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, _HOPPER | {"fp32": 64}),
    Chip("H100 SXM", 132, 1.98e9, 3.35e12, _HOPPER),
    H200,
    Chip("B200", 148, 1.965e9, 7.672e12, _HOPPER),
)

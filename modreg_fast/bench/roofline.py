"""How long a kernel needs on a GPU that is not here, at best, on paper: bytes and instructions per element against the chip's rates."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates at the boost clock. ``rates``: results per clock and multiprocessor; ``issue``: four schedulers of 32 lanes."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    rates: Mapping[str, int]

    def picoseconds(self, bytes_: float, instructions: Mapping[str, float]) -> dict[str, float]:
        """Per element, for the memory and for each pipe alone; ``issue`` for all instructions together."""
        per_second = self.multiprocessors * self.clock
        times = {"memory": bytes_ / self.bandwidth}
        for pipe, rate in self.rates.items():
            count = sum(instructions.values()) if pipe == "issue" else instructions[pipe]
            times[pipe] = count / (rate * per_second)
        return {name: 1e12 * seconds for name, seconds in times.items()}

    def bound(self, bytes_: float, instructions: Mapping[str, float]) -> str:
        """The time of what takes longest, in picoseconds per element, and what it is; how many times as long as the memory takes."""
        times = self.picoseconds(bytes_, instructions)
        slowest = max(times, key=lambda pipe: times[pipe])
        ratio = "" if slowest == "memory" else f" {times[slowest] / times['memory']:.1f}x"
        return f"{times[slowest]:.2f} {slowest}{ratio}"


# What the figures come from. None was measured by this project, and NVIDIA's own documents were seen only as other pages quote them.
# - fp32 and integer, A100 and H100: NVIDIA's A100 and H100 architecture white papers, by way of the peak rates that they give: 19.5 and
#   66.9 TFLOPS in FP32, 33.5 TOPS in INT32 (H100) are multiprocessors x clock x rate x 2. Integer, A100: table "Throughput of Native
#   Arithmetic Instructions" of the CUDA C++ Programming Guide, as notes on its column 8.0 quote it; so is mufu, A100.
# - fp32, B200: 80 TFLOPS of NVIDIA's Blackwell brief need 2.1 GHz with it; 75 TFLOPS, which others list, 1.98 GHz.
# - mufu, H100: the same guide, as FlashAttention-3 (arXiv 2407.08608) quotes it for its 3.9 TFLOPS of special functions. B200: as many
#   units as the H100, says FlashAttention-4 (together.ai/blog/flashattention-4).
# - integer, B200: unsourced (taken to be as on the H100).
# - issue: four schedulers a multiprocessor, each one instruction of a warp per clock, as is generally described; not checked.
# - A100: 108 multiprocessors at 1410 MHz as deviceQuery prints; 2039 GB/s in the data sheet of the 80 GB SXM module.
# - H100: 132 multiprocessors, 3.35 TB/s in the data sheet; the clock from the peak rate in FP32.
# - B200: 148 multiprocessors, a bus of 7680 bits at 2 x 3996 MHz as the driver reports (github.com/pytorch/ao/pull/4002); the data sheet
#   rounds up to 8 TB/s. The clock: the largest that nvidia-smi reports, in notes of users; no document of NVIDIA was found.
CHIPS = (
    Chip("A100 SXM 80 GB", 80, 108, 1.41e9, 2.039e12, {"fp32": 64, "integer": 64, "mufu": 16, "issue": 128}),
    Chip("H100 SXM", 90, 132, 1.98e9, 3.35e12, {"fp32": 128, "integer": 64, "mufu": 16, "issue": 128}),
    Chip("B200", 100, 148, 1.965e9, 7.672e12, {"fp32": 128, "integer": 64, "mufu": 16, "issue": 128}),
)

"""How long a kernel needs on a GPU that is not here, at best, on paper: bytes and instructions per element against the chip's rates."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates at the boost clock. Instructions: results per clock and multiprocessor, from "Arithmetic Instructions" of the CUDA C++
    Programming Guide; ``issue``: four schedulers of 32 lanes. Bandwidth and clocks: NVIDIA's data sheets."""

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


CHIPS = (
    Chip("A100 SXM 80 GB", 80, 108, 1.41e9, 2.039e12, {"fp32": 64, "integer": 64, "mufu": 16, "issue": 128}),
    Chip("H100 SXM", 90, 132, 1.98e9, 3.35e12, {"fp32": 128, "integer": 64, "mufu": 16, "issue": 128}),
    Chip("B200", 100, 148, 1.965e9, 8.0e12, {"fp32": 128, "integer": 64, "mufu": 16, "issue": 128}),
)

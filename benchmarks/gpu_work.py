"""What a launch of a GPU kernel does per element, from its machine code and the PTX interpreter: shared by ``cuda_report.py`` and
``gpu_tables.py``.

The interpreter counts how often each line of PTX is executed, and the requests of each load and store; ptxas says of each instruction of
the machine code which line it comes from, and so how often it is executed, and which loads and stores it merged."""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from modreg_fast.bench import sass
from modreg_fast.bench.roofline import Work

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ptx  # noqa: E402

KINDS = ("fp32", "integer", "mufu")
TITLES = ("bytes", *KINDS, "all", "banks", "conflicts", "sectors")


@functools.cache
def assembled(text: str, *options: str) -> tuple[bytes, str]:
    """The cubin of PTX, and what ``ptxas -v`` prints. Instructions are attributed to lines of the PTX, not of what it was made from."""
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert target is not None
    lines = text.split("\n.section", 1)[0].splitlines()
    bare = "\n".join("" if re.match(r"\s*\.(loc|file)\b", line) else line for line in lines)
    program = shutil.which("ptxas") or sass.carried("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        command = [program, f"-arch={target[1]}", "-v", *options, "-o", cubin, "-"]
        log = subprocess.run(command, input=bare.replace(", debug", ""), capture_output=True, text=True, check=True).stderr
        return cubin.read_bytes(), log


@dataclass(frozen=True)
class OnPaper:
    """Of a launch. ``conflicts``: wavefronts in shared memory, over as many as there would be without bank conflicts.
    ``sectors``: of global memory, over as few as hold the bytes."""

    work: Work
    conflicts: float
    sectors: float
    names: Counter[str]  # instructions such as MUFU.EX2, over all threads

    def cells(self) -> list[str]:
        """Below ``TITLES``."""
        shown = [self.work.counts[kind] for kind in (*KINDS, "issue", "banks")]
        return [f"{self.work.bytes:.2f}", *(f"{n:.1f}" for n in shown), f"{self.conflicts:.2f}", f"{self.sectors:.2f}"]


def on_paper(cubin: bytes, entry: str, report: ptx.Report, elements: int, warps: int, blocks: int) -> OnPaper:
    """``report``: of a launch within ``ptx.requests.as_assembled(sass.widths(cubin, entry))``. ``warps``: of a block; ``blocks``: so many
    fit a multiprocessor."""
    kinds, names = sass.executed(cubin, entry, report.executions)
    shared, world = ([r for r in report.requests.values() if r.space == space] for space in ("shared", "global"))
    wavefronts, shuffles = sum(r.wavefronts for r in shared), sum(n for name, n in names.items() if name.startswith("SHFL")) / 32
    counts = {kind: kinds[kind] / elements for kind in KINDS} | {"issue": sum(kinds.values()) / elements}
    counts["banks"] = (wavefronts + shuffles + sum(r.lines for r in world)) * 32 / elements
    loads = sum(
        traffic.distinct for buffer, traffic in report.loads_of.items() if not buffer.constant
    )  # what all read is fetched once
    # More barriers than the few with which the warps of a block end, once for all of its tiles.
    synchronized = sum(n for name, n in names.items() if name.startswith("BAR")) > 4 * 32 * warps
    work = Work((loads + report.stores.bytes) / elements, counts, blocks if synchronized else blocks * warps)
    conflicts = wavefronts / sum(r.least_wavefronts for r in shared) if shared else 1.0
    return OnPaper(work, conflicts, sum(r.sectors for r in world) / sum(r.least_sectors for r in world), names)

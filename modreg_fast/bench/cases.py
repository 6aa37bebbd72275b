"""What is measured: an op on a shape in one dtype and layout, by whom. The sets: default, ``--only``, ``--quick``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import modreg_fast
from modreg_fast.backends import resolve
from modreg_fast.bench.shapes import SHAPES, SWEEP, Shape

OPS = ("softmax_fisher", "gradient_statistics", "modality_cross_entropy")
MODES = ("forward", "backward", "both")
PASSES = {"forward": 1, "backward": 2, "both": 3}  # over the inputs: each pass reads them once, backward writes gradients once
BASELINES = ("eager", "compile", "gat")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# In the default set, the baselines of a case if they are not eager PyTorch alone; each compilation takes a quarter of a minute, and
# eager PyTorch on deliver half a one.
_BASELINES = {
    ("softmax_fisher", "heads"): ("eager", "compile", "gat"),
    ("softmax_fisher", "segformer-b2-1024-m4"): ("eager", "compile"),
    ("softmax_fisher", "square"): ("eager", "compile", "gat"),
    ("softmax_fisher", "deliver"): (),
    ("gradient_statistics", "square"): ("eager", "compile"),
    ("gradient_statistics", "deliver"): (),
    ("modality_cross_entropy", "square"): ("eager", "compile"),
    ("modality_cross_entropy", "deliver"): ("eager", "compile"),
}
_DEFAULT = ("heads", "tokens", "segformer-b0-512-m2", "segformer-b2-512-m2", "segformer-b2-1024-m4", "square", "deliver")
_QUICK = ("heads", "tokens", "segformer-b0-512-m2")
_NOISE = "segformer-b0-512-m2"


@dataclass(frozen=True)
class Case:
    """``samples``: noise draws (sigma 1), 0 for no noise."""

    op: str
    shape: Shape
    dtype: str = "float32"
    layout: str = "pixels"
    samples: int = 0
    providers: tuple[str, ...] = ("eager",)

    def __str__(self) -> str:
        noise = f" samples={self.samples}" if self.samples else ""
        return f"{self.op} {self.shape.name} {self.dtype} {self.layout}{noise}"

    @property
    def input_bytes(self) -> int:
        """Of everything the op reads: the features; or gradients, features and the map of values (which is float32); or the logits and
        the target (which is int64)."""
        width = DTYPES[self.dtype].itemsize
        if self.op == "modality_cross_entropy":
            return self.shape.elements * width + self.shape.pixels * 8
        if self.op == "softmax_fisher":
            return self.shape.elements * width
        return 2 * self.shape.elements * width + self.shape.modalities * self.shape.pixels * 4

    def bytes_moved(self, mode: str) -> int:
        """That any implementation must move."""
        return self.input_bytes * PASSES[mode]


def own_backends(op: str) -> tuple[str, ...]:
    """The usable backends of this package that have the op for CPU tensors, other than the reference."""
    probe = torch.empty(1)

    def takes(name: str) -> bool:
        try:
            return resolve(name, probe, "bench", op) != "reference"
        except ValueError:  # not for this device, or without this op
            return False

    return tuple(name for name, status in modreg_fast.backends().items() if status.available and takes(name))


def select(only: Sequence[str] = (), quick: bool = False) -> list[Case]:
    """The default set; with ``only``, everything of the named shapes; with ``quick``, plain float32 without the compiler.

    Raises ValueError for an unknown name."""
    unknown = [name for name in only if name not in SHAPES]
    if unknown:
        raise ValueError(f"unknown shape {', '.join(map(repr, unknown))}; there are: {', '.join(SHAPES)}")
    if quick:
        return [_plain(op, SHAPES[name], ("eager", "gat")) for op, name in _pairs(only or _QUICK)]
    if only:
        return [case for op, name in _pairs(only) for case in _everything(op, SHAPES[name])]
    cases = [_plain(op, SHAPES[name], _BASELINES.get((op, name), ("eager",))) for op, name in _pairs(_DEFAULT)]
    for op in OPS:
        cases += [_plain(op, SHAPES["square"], (), dtype="bfloat16"), _plain(op, SHAPES["square"], (), layout="channels")]
    cases += _noise(SHAPES[_NOISE]) + [_plain("softmax_fisher", shape, ()) for shape in (SHAPES["wide"], *SWEEP)]
    return [case for case in cases if case.providers]  # without a backend of ours, some have none


def takes(op: str, shape: Shape) -> bool:
    """Predictions have one scale."""
    return op != "modality_cross_entropy" or len(shape.sizes) == 1


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Ops and shapes that they take."""
    return [(op, name) for op in OPS for name in names if takes(op, SHAPES[name])]


def _plain(op: str, shape: Shape, baselines: tuple[str, ...], *, dtype: str = "float32", layout: str | None = None) -> Case:
    baselines = tuple(name for name in baselines if op == "softmax_fisher" or name != "gat")
    return Case(op, shape, dtype, layout or shape.layouts[0], 0, baselines + own_backends(op))


def _noise(shape: Shape) -> list[Case]:
    return [Case("softmax_fisher", shape, "float32", shape.layouts[0], n, own_backends("softmax_fisher")) for n in (1, 8)]


def _everything(op: str, shape: Shape) -> list[Case]:
    plain = [_plain(op, shape, BASELINES, dtype=dtype, layout=layout) for dtype in DTYPES for layout in shape.layouts]
    return plain + (_noise(shape) if op == "softmax_fisher" else [])

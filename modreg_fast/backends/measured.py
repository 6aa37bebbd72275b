"""Which of the GPU backends computes, where both can and nobody says which: the one that was measured to be faster.

The table: milliseconds of triton and of cuda, by op, pass, bytes of an element, layout and channels. One NVIDIA H200, driver 580, torch
2.11.0+cu130, Triton 3.6.0, 2026-11-28; inputs as in docs/gpu.md, two modalities (25 channels: four), without noise. ``()``: not measured.
``python -m benchmarks.gpu_validate`` measures such rows."""

from math import log
from typing import Any

from torch import Tensor

from modreg_fast.backends.layout import flat, layout_of

CANDIDATES = ("triton", "cuda")  # the first one where nothing was measured
MOST_CHANNELS = 4096  # that cuda takes
MEASURED = "measured"  # stands for the name of a backend, until a pass of an op is computed

# op, pass, bytes, layout: (channels, triton, cuda)
TIMES: dict[tuple[str, str, int, str], tuple[tuple[int, float, float], ...]] = {
    ("softmax_fisher", "forward", 4, "pixels"): ((25, 0.668, 1.626), (64, 0.582, 1.103), (512, 0.243, 0.381)),
    ("softmax_fisher", "backward", 4, "pixels"): ((25, 2.100, 2.503), (64, 1.258, 1.923), (512, 0.920, 1.078)),
    ("softmax_fisher", "forward", 4, "channels"): ((64, 1.562, 1.041),),
    ("softmax_fisher", "backward", 4, "channels"): ((64, 2.704, 1.815),),
    ("softmax_fisher", "forward", 2, "pixels"): ((25, 0.624, 1.687), (64, 0.512, 1.006), (512, 0.386, 0.297)),
    ("softmax_fisher", "backward", 2, "pixels"): ((25, 2.096, 2.541), (64, 1.044, 1.844), (512, 0.934, 0.670)),
    ("softmax_fisher", "forward", 2, "channels"): ((64, 0.870, 0.976),),
    ("softmax_fisher", "backward", 2, "channels"): ((64, 1.944, 1.703),),
    ("gradient_statistics", "forward", 4, "pixels"): ((64, 0.542, 0.747),),
    ("gradient_statistics", "backward", 4, "pixels"): ((64, 1.075, 1.448),),
    ("gradient_statistics", "forward", 4, "channels"): (),
    ("gradient_statistics", "backward", 4, "channels"): (),
    ("gradient_statistics", "forward", 2, "pixels"): ((64, 0.670, 0.727),),
    ("gradient_statistics", "backward", 2, "pixels"): ((64, 1.288, 1.237),),
    ("gradient_statistics", "forward", 2, "channels"): (),
    ("gradient_statistics", "backward", 2, "channels"): (),
    ("modality_cross_entropy", "forward", 4, "pixels"): (),
    ("modality_cross_entropy", "backward", 4, "pixels"): (),
    ("modality_cross_entropy", "forward", 4, "channels"): (),
    ("modality_cross_entropy", "backward", 4, "channels"): (),
    ("modality_cross_entropy", "forward", 2, "pixels"): (),
    ("modality_cross_entropy", "backward", 2, "pixels"): (),
    ("modality_cross_entropy", "forward", 2, "channels"): (),
    ("modality_cross_entropy", "backward", 2, "channels"): (),
}


def faster(op: str, pass_: str, x: Tensor) -> str:
    """For a call whose largest tensor is ``x`` ``(B, C, P)``: by the row of the nearest number of channels, as a ratio. float64 goes by
    float32; a tensor in neither layout is copied to one, and goes by pixels."""
    channels = max(x.shape[1], 1)
    rows = TIMES.get((op, pass_, min(x.itemsize, 4), layout_of(x) or "pixels"), ())
    if not rows or channels > MOST_CHANNELS:
        return CANDIDATES[0]
    _, *times = min(rows, key=lambda row: abs(log(row[0] / channels)))
    return CANDIDATES[times.index(min(times))]


def chosen(backend: str, op: str, pass_: str, problem: Any) -> str:
    """The backend of a pass of a problem."""
    return backend if backend != MEASURED else faster(op, pass_, flat(max(problem[0], key=Tensor.numel), problem.channel_dim))

"""The CUDA kernels of csrc/cuda on the PTX interpreter: the structs of csrc/cuda/call.h, planned by the host code of the library."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ptx

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
SHARED_LIMIT = 232448 - 1024  # of a block on an H100
MOST_BLOCKS = 2048
MOST_SCALES, MOST_ARRAYS, MOST_TENSORS = 8, 48, 14

P, I64, I32, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
TARGETS = ("uint8", "int8", "int16", "int32", "int64")
UNITS = ("pixels", "piece", "single", "none")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


class Array(ctypes.Structure):
    _fields_ = [
        ("data", P),
        ("sample_stride", I64),
        ("line_stride", I64),
        ("dtype", I32),
        ("pixel_lines", ctypes.c_uint8),
        *((name, ctypes.c_uint8) for name in ("vector", "across", "down")),
    ]


class Tiling(ctypes.Structure):
    _fields_ = [
        ("channels", I64),
        ("pixels", I64),
        ("mask", P),
        ("first_block", I64),
        ("blocks", I64),
        *((name, I32) for name in ("tiles_per_block", "width", "pitch", "lanes", "lane_bits", "quads")),
    ]


class SoftmaxFisher(ctypes.Structure):
    _fields_ = [
        *((name, I32) for name in ("modalities", "scales", "first_scale", "all_scales", "draws", "detach_reference")),
        *((name, I32) for name in ("unit", "warp_bytes")),
        ("batch", I64),
        ("eps", F64),
        *((name, P) for name in ("present", "seed", "information", "counts", "partial", "arrived", "weight")),
        ("tilings", Tiling * MOST_SCALES),
        ("sigma", F64 * MOST_ARRAYS),
        ("features", Array * MOST_ARRAYS),
        ("gradients", Array * MOST_ARRAYS),
    ]


class ModalityCrossEntropy(ctypes.Structure):
    _fields_ = [
        ("modalities", I32),
        ("target_type", I32),
        ("batch", I64),
        ("ignore_index", I64),
        ("eps", F64),
        ("label_smoothing", F64),
        *((name, P) for name in ("target", "class_weight", "present", "cross_entropy", "information", "joint", "weights")),
        *((name, P) for name in ("partial", "arrived", "to_cross_entropy", "to_joint", "to_information")),
        *((name, I32) for name in ("unit", "warp_bytes", "numbers")),
        ("tiling", Tiling),
        ("logits", Array * MOST_ARRAYS),
        ("gradients", Array * MOST_ARRAYS),
    ]


class GradientStatistics(ctypes.Structure):
    _fields_ = [
        *((name, I32) for name in ("tensors", "first_tensor", "unit", "warp_bytes")),
        ("batch", I64),
        ("eps", F64),
        *((name, P) for name in ("fisher", "attribution", "partial", "arrived", "fisher_weight", "attribution_weight")),
        ("tilings", Tiling * MOST_TENSORS),
        *((name, Array * MOST_TENSORS) for name in ("grads", "features", "to_grads", "to_features")),
        *((name, P * MOST_TENSORS) for name in ("values", "to_values", "fisher_maps", "attribution_maps")),
    ]


class Launch(ctypes.Structure):
    _fields_ = [("blocks", I64), ("threads", I32), ("shared_bytes", I32)]


@functools.cache
def _host() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "cuda_call.so")
        subprocess.run(
            [COMPILER, "-std=c++17", "-shared", "-fPIC", CSRC / "harness/cuda_call.cpp", "-o", library],
            check=True,
        )
        loaded = ctypes.CDLL(str(library))
    for struct in (SoftmaxFisher, ModalityCrossEntropy, GradientStatistics):
        stem = re.sub("(?<=[a-z])(?=[A-Z])", "_", struct.__name__).lower()
        assert loaded[f"size_of_{stem}"]() == ctypes.sizeof(struct)
    return loaded


def plan(stem: str, call, backward: bool, accumulator: int, limit: int = SHARED_LIMIT, most_blocks: int = MOST_BLOCKS) -> Launch:
    launch = Launch()
    _host()[f"plan_{stem}"](
        ctypes.byref(call), int(backward), I64(accumulator), I64(limit), I64(most_blocks), ctypes.byref(launch)
    )
    return launch


def split(stem: str, call, *tables: ctypes.Array | None) -> list:
    """The calls of the launches that a call of ``tables`` takes, of any length; the first table is that of the tilings."""
    calls: list = []
    each = ctypes.CFUNCTYPE(None, ctypes.POINTER(type(call)))(lambda part: calls.append(type(call).from_buffer_copy(part[0])))
    _host()[f"split_{stem}"](ctypes.byref(call), len(tables[0]), *tables, each)
    return calls


SOURCES = (
    "softmax_fisher",
    "softmax_fisher_general",
    "gradient_statistics",
    "modality_cross_entropy",
)  # with kernels, in csrc/cuda


def source_of(stem: str, call) -> str:
    """The stem of the file in csrc/cuda with the kernel of a planned call."""
    return f"{stem}_general" if stem == "softmax_fisher" and UNITS[call.unit] == "none" else stem


@functools.cache
def kernels(stem: str, arch: str = "sm_90") -> str:
    source = (CSRC / "cuda" / f"{stem}.cu").read_text()
    return ptx.cuda_to_ptx(source, arch, "-std=c++17", "-I", str(CSRC / "cuda"))


# ---- arrays ----


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the storage type; bfloat16 as its bits."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 of what is stored."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if dtype == "bfloat16" else x.astype(np.float64)


class Tensor:
    """``(B, C, P)`` in device memory: contiguous pixels or channels, ``gap`` elements between lines and ``offset`` before the first."""

    def __init__(self, memory: ptx.Memory, values, dtype: str, layout: str = "pixels", gap: int = 0, offset: int = 0, shape=None):
        self.dtype, self.layout, self.shape = dtype, layout, values.shape if shape is None else shape
        batch, channels, pixels = self.shape
        lines, length = (channels, pixels) if layout == "pixels" else (pixels, channels)
        self.view = offset, (batch, lines, length + gap), length
        empty = stored(np.zeros(1), dtype).dtype
        if values is None and gap == offset == 0:
            self.buffer = memory.empty(batch * lines * length, empty)
        else:
            content = np.full(offset + batch * lines * (length + gap), stored(np.array([np.nan]), dtype)[0], empty)
            if values is not None:
                ordered = values if layout == "pixels" else values.transpose(0, 2, 1)
                content[offset:].reshape(self.view[1])[:, :, :length] = stored(ordered, dtype)
            self.buffer = memory.put(content)
        size = BYTES[dtype]
        self.array = Array(
            data=self.buffer.address + offset * size,
            sample_stride=lines * (length + gap),
            line_stride=length + gap,
            dtype=DTYPES[dtype],
            pixel_lines=layout == "pixels",
        )

    def values(self) -> np.ndarray:
        """float64 ``(B, C, P)``. What lies between must still be NaN."""
        offset, shape, length = self.view
        whole = wide(self.buffer.numpy(), self.dtype)
        content = whole[offset:].reshape(shape)[:, :, :length].copy()
        whole[offset:].reshape(shape)[:, :, :length] = np.nan
        assert np.isnan(whole).all(), "written between the lines"
        return content if self.layout == "pixels" else content.transpose(0, 2, 1)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * BYTES[self.dtype]


class FarTensor(Tensor):
    """Every line in a buffer of its own, so that both strides are far beyond 2^31 elements."""

    def __init__(self, memory: ptx.Memory, values, dtype: str, layout: str = "pixels", shape=None):
        self.dtype, self.layout, self.shape = dtype, layout, values.shape if shape is None else shape
        batch, channels, pixels = self.shape
        lines, length = (channels, pixels) if layout == "pixels" else (pixels, channels)
        if values is None:
            self.buffers = [memory.empty(length, stored(np.zeros(1), dtype).dtype) for _ in range(batch * lines)]
        else:
            ordered = values if layout == "pixels" else values.transpose(0, 2, 1)
            self.buffers = [memory.put(stored(line, dtype)) for line in ordered.reshape(-1, length)]
        self.buffer = self.buffers[0]
        stride = (1 << ptx.WINDOW_BITS) // BYTES[dtype]  # from buffer to buffer
        self.array = Array(self.buffer.address, lines * stride, stride, DTYPES[dtype], layout == "pixels")

    def values(self) -> np.ndarray:
        batch, channels, pixels = self.shape
        lines = np.stack([wide(buffer.numpy(), self.dtype) for buffer in self.buffers])
        shaped = lines.reshape(batch, -1, lines.shape[1])
        return shaped if self.layout == "pixels" else shaped.transpose(0, 2, 1)


def address(buffer) -> int | None:
    return None if buffer is None else buffer.address


def array(kind, entries):
    """A table for ``split``, or None where there are no entries."""
    return (kind * len(entries))(*entries) if entries else None


def tilings(tensors, masks):
    memory = tensors[0].buffer.memory
    masks = [None if masks is None else memory.put(mask.astype(np.uint8)) for mask in masks or tensors]
    return array(Tiling, [Tiling(*x.shape[1:], address(mask)) for x, mask in zip(tensors, masks, strict=True)])


def entry(stem: str, call, backward: bool, kind: str) -> str:
    """The kernel that runs a planned call; ``kind``: the accumulation type."""
    name = f"{stem}_{'backward' if backward else 'forward'}"
    if UNITS[call.unit] == "none":
        return f"{name}_noise_{kind}" if any(call.sigma) else f"{name}_{kind}"
    first = {"softmax_fisher": "features", "gradient_statistics": "grads", "modality_cross_entropy": "logits"}[stem]
    name = f"{name}_{UNITS[call.unit]}_{list(DTYPES)[getattr(call, first)[0].dtype]}"
    return f"{name}_{max(call.modalities, 2)}" if stem == "softmax_fisher" else name


def launch_each(out, stem, calls, backward, kind, memory, arch, limit, most_blocks):
    """Plans and runs every launch of a call, the results of its blocks and its counters in memory of its own; ``out`` keeps the last."""
    out.launches = len(calls)
    for call in calls:
        launch = plan(stem, call, backward, BYTES[kind], limit, most_blocks)
        assert launch.shared_bytes >= 0, "a tile does not fit"
        if not backward:
            if stem == "softmax_fisher":
                rows, count = call.modalities + 1, call.scales
            elif stem == "gradient_statistics":
                rows, count = 3, call.tensors
            else:
                rows, count = 2 * call.modalities + 2, 1
            arrived = memory.put(np.zeros(count * call.batch, np.uint32))
            call.partial, call.arrived = memory.empty(launch.blocks * rows, kind).address, arrived.address
        shared = dict(shared_bytes=launch.shared_bytes)
        out.report = ptx.run(
            kernels(source_of(stem, call), arch),
            entry(stem, call, backward, kind),
            launch.blocks,
            launch.threads,
            [call],
            memory,
            **shared,
        )
        assert backward or not arrived.numpy().any()
        out.call, out.launch = call, launch


# ---- softmax_fisher ----


def softmax_fisher(
    features,
    *,
    masks=None,
    present=None,
    sigma=None,
    draws=1,
    seed=0,
    eps=1e-8,
    detach=False,
    weight=None,
    limit=SHARED_LIMIT,
    most_blocks=MOST_BLOCKS,
    arch="sm_90",
    **layout,
):
    """``features[m][s]``: ``Tensor``, all in one memory. Without ``weight`` forward: information ``(M, S, B)`` and counts; with it
    backward: the gradients ``[m][s]`` as ``Tensor``. And what ``launch_each`` adds."""
    memory = features[0][0].buffer.memory
    modalities, scales, batch = len(features), len(features[0]), features[0][0].shape[0]
    kind = "float64" if any(x.dtype == "float64" for row in features for x in row) else "float32"
    call = SoftmaxFisher(modalities=modalities, draws=draws, detach_reference=detach, batch=batch, eps=eps)
    call.sigma[:modalities] = sigma or [0] * modalities
    call.present = None if present is None else memory.put(present.astype(np.uint8)).address
    call.seed = memory.put(np.array([seed], np.int64)).address
    out = SimpleNamespace(gradients=None)
    if weight is None:
        out.information, out.counts = memory.empty((modalities, scales, batch), kind), memory.empty((scales, batch), np.int64)
        call.information, call.counts = out.information.address, out.counts.address
    else:
        out.gradients = [[type(x)(memory, None, x.dtype, x.layout, shape=x.shape, **layout) for x in row] for row in features]
        call.weight = memory.put(weight.astype(np.float64)).address
    tables = [array(Array, [x.array for row in rows or [] for x in row]) for rows in (features, out.gradients)]
    calls = split("softmax_fisher", call, tilings(features[0], masks), *tables)
    launch_each(out, "softmax_fisher", calls, weight is not None, kind, memory, arch, limit, most_blocks)
    return out


# ---- gradient_statistics ----


def gradient_statistics(
    grads,
    features=None,
    *,
    values=None,
    masks=None,
    maps=False,
    eps=1e-8,
    upstream=None,
    arch="sm_90",
    limit=SHARED_LIMIT,
    most_blocks=MOST_BLOCKS,
):
    """``grads``, ``features``: ``Tensor``, all in one memory; ``values``: arrays ``(B, P)``. Without ``upstream`` forward: fisher and
    attribution ``(K, B)``, and maps. With it, the weights of both and upstream maps, backward: to_grads, to_features and to_values. And
    what ``launch_each`` adds."""
    memory, count, batch = grads[0].buffer.memory, len(grads), grads[0].shape[0]
    features, backward = features or [], upstream is not None
    kind = "float64" if any(x.dtype == "float64" for x in [*grads, *features]) else "float32"
    call, out = GradientStatistics(batch=batch, eps=eps), SimpleNamespace(to_grads=[], to_features=[], to_values=[])

    def rows(arrays):
        return [memory.put(x.astype(kind)) for x in arrays or []]

    def empty_rows(wanted):
        return [memory.empty((batch, g.shape[2]), kind) for g in grads] if wanted else []

    def like(tensors):
        return [type(x)(memory, None, x.dtype, x.layout, shape=x.shape) for x in tensors]

    out.values = rows(values)
    if backward:
        fisher_weight, square_weight, fisher_maps, attribution_maps = upstream
        out.to_grads, out.to_features, out.to_values = like(grads), like(features), empty_rows(values is not None)
        out.fisher_maps, out.attribution_maps = rows(fisher_maps), rows(attribution_maps)
        call.fisher_weight = None if fisher_weight is None else memory.put(fisher_weight.astype(np.float64)).address
        call.attribution_weight = None if square_weight is None else memory.put(square_weight.astype(np.float64)).address
    else:
        out.fisher_maps, out.attribution_maps = empty_rows(maps and values is not None), empty_rows(maps and features)
        out.fisher = memory.empty((count, batch), kind) if values is not None else None
        out.attribution = memory.empty((count, batch), kind) if features else None
        call.fisher, call.attribution = address(out.fisher), address(out.attribution)
    arrays = [array(Array, [x.array for x in tensors]) for tensors in (grads, features, out.to_grads, out.to_features)]
    pointers = [
        array(P, [x.address for x in buffers]) for buffers in (out.values, out.to_values, out.fisher_maps, out.attribution_maps)
    ]
    calls = split("gradient_statistics", call, tilings(grads, masks), *arrays, *pointers)
    launch_each(out, "gradient_statistics", calls, backward, kind, memory, arch, limit, most_blocks)
    return out


# ---- modality_cross_entropy ----


def modality_cross_entropy(
    logits,
    target,
    *,
    weight=None,
    ignore_index=-100,
    smoothing=0.0,
    present=None,
    eps=1e-8,
    upstream=None,
    arch="sm_90",
    limit=SHARED_LIMIT,
    most_blocks=MOST_BLOCKS,
    **layout,
):
    """``logits``: ``Tensor``, all in one memory, of one dtype and layout; ``target``: ``(B, P)`` of the dtype that the kernel is to read.
    Without ``upstream`` forward: cross_entropy, joint, information and weights; with it, the gradients of the first three, backward:
    gradients, ``Tensor``. And what ``launch_each`` adds."""
    memory, batch = logits[0].buffer.memory, logits[0].shape[0]
    kind = "float64" if logits[0].dtype == "float64" else "float32"
    call = ModalityCrossEntropy(
        modalities=len(logits), batch=batch, ignore_index=ignore_index, eps=eps, label_smoothing=smoothing
    )
    out = SimpleNamespace(target=memory.put(target), gradients=[])
    call.target, call.target_type = out.target.address, TARGETS.index(str(target.dtype))
    call.class_weight = None if weight is None else memory.put(np.asarray(weight, np.float64)).address
    call.present = None if present is None else memory.put(present.astype(np.uint8)).address
    call.tiling.channels, call.tiling.pixels = logits[0].shape[1:]
    call.logits[: len(logits)] = [x.array for x in logits]
    if upstream is None:
        for name, shape in (("cross_entropy", (len(logits), batch)), ("joint", batch), ("weights", batch)):
            setattr(out, name, memory.empty(shape, kind))
        out.information = memory.empty((len(logits), batch), kind)
        for name in ("cross_entropy", "joint", "information", "weights"):
            setattr(call, name, getattr(out, name).address)
    else:
        out.gradients = [type(x)(memory, None, x.dtype, x.layout, shape=x.shape, **layout) for x in logits]
        call.gradients[: len(logits)] = [x.array for x in out.gradients]
        for name, above in zip(("to_cross_entropy", "to_joint", "to_information"), upstream, strict=True):
            setattr(call, name, memory.put(np.asarray(above, np.float64)).address)
    launch_each(out, "modality_cross_entropy", [call], upstream is not None, kind, memory, arch, limit, most_blocks)
    return out

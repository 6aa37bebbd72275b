"""The CUDA kernels of csrc/cuda on the PTX interpreter: the structs of csrc/cuda/call.h, planned by the host code of the library."""

import ctypes
import functools
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
MOST_BLOCKS = 8192
MOST_SCALES, MOST_ARRAYS, MOST_TENSORS = 8, 48, 14

P, I64, I32, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


class Array(ctypes.Structure):
    _fields_ = [
        ("data", P),
        ("sample_stride", I64),
        ("line_stride", I64),
        ("dtype", I32),
        ("pixel_lines", ctypes.c_uint8),
        ("vector", ctypes.c_uint8),
    ]


class Tiling(ctypes.Structure):
    _fields_ = [
        ("channels", I64),
        ("pixels", I64),
        ("mask", P),
        ("first_block", I64),
        ("blocks", I64),
        ("tiles_per_block", I32),
        ("width", I32),
        ("pitch", I32),
        ("lanes", I32),
    ]


class SoftmaxFisher(ctypes.Structure):
    _fields_ = [
        *((name, I32) for name in ("modalities", "scales", "first_scale", "all_scales", "draws", "detach_reference")),
        ("batch", I64),
        ("eps", F64),
        *((name, P) for name in ("present", "seed", "information", "counts", "partial", "arrived", "weight")),
        ("tilings", Tiling * MOST_SCALES),
        ("sigma", F64 * MOST_ARRAYS),
        ("features", Array * MOST_ARRAYS),
        ("gradients", Array * MOST_ARRAYS),
    ]


class GradientStatistics(ctypes.Structure):
    _fields_ = [
        ("tensors", I32),
        ("first_tensor", I32),
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
    for stem, struct in (("softmax_fisher", SoftmaxFisher), ("gradient_statistics", GradientStatistics)):
        assert loaded[f"size_of_{stem}"]() == ctypes.sizeof(struct)
    return loaded


def plan(stem: str, call, backward: bool, accumulator: int, limit: int = SHARED_LIMIT, most_blocks: int = MOST_BLOCKS) -> Launch:
    launch = Launch()
    _host()[f"plan_{stem}"](
        ctypes.byref(call), int(backward), I64(accumulator), I64(limit), I64(most_blocks), ctypes.byref(launch)
    )
    return launch


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


def address(buffer) -> int | None:
    return None if buffer is None else buffer.address


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
    first_scale=0,
    all_scales=None,
    limit=SHARED_LIMIT,
    most_blocks=MOST_BLOCKS,
    arch="sm_90",
    **layout,
):
    """``features[m][s]``: ``Tensor``, all in one memory. Without ``weight`` forward: information ``(M, S, B)`` and counts; with it
    backward: the gradients ``[m][s]`` as ``Tensor``. And the call, launch and report."""
    memory = features[0][0].buffer.memory
    modalities, scales, batch = len(features), len(features[0]), features[0][0].shape[0]
    all_scales = all_scales or scales
    kind = "float64" if any(x.dtype == "float64" for row in features for x in row) else "float32"
    call = SoftmaxFisher(
        modalities=modalities,
        scales=scales,
        first_scale=first_scale,
        all_scales=all_scales,
        draws=draws,
        detach_reference=detach,
        batch=batch,
        eps=eps,
    )
    out = SimpleNamespace(gradients=None)
    keep = [None if present is None else memory.put(present.astype(np.uint8)), memory.put(np.array([seed], np.int64))]
    call.present, call.seed = address(keep[0]), keep[1].address
    for m in range(modalities):
        call.sigma[m] = 0 if sigma is None else sigma[m]
        for s in range(scales):
            call.features[m * scales + s] = features[m][s].array
    for s in range(scales):
        call.tilings[s].channels, call.tilings[s].pixels = features[0][s].shape[1:]
        if masks is not None:
            call.tilings[s].mask = memory.put(masks[s].astype(np.uint8)).address
    if weight is not None:
        out.gradients = [[Tensor(memory, None, x.dtype, x.layout, shape=x.shape, **layout) for x in row] for row in features]
        for m in range(modalities):
            for s in range(scales):
                call.gradients[m * scales + s] = out.gradients[m][s].array
        call.weight = memory.put(weight.astype(np.float64)).address
    launch = out.launch = plan("softmax_fisher", call, weight is not None, BYTES[kind], limit, most_blocks)
    assert launch.shared_bytes >= 0, "a tile does not fit"
    out.call = call
    if weight is None:
        information, counts = memory.empty((modalities, all_scales, batch), kind), memory.empty((all_scales, batch), np.int64)
        arrived = memory.put(np.zeros(scales * batch, np.uint32))
        call.information, call.counts, call.arrived = information.address, counts.address, arrived.address
        call.partial = memory.empty(launch.blocks * (modalities + 1), kind).address
    noise = "_noise" if sigma is not None and any(sigma) else ""
    entry = f"softmax_fisher_{'forward' if weight is None else 'backward'}{noise}_{kind}"
    out.report = ptx.run(
        kernels("softmax_fisher", arch), entry, launch.blocks, launch.threads, [call], memory, shared_bytes=launch.shared_bytes
    )
    if weight is None:
        out.information, out.counts = information, counts
        assert not arrived.numpy().any()
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
    first_tensor=0,
    all_tensors=None,
    arch="sm_90",
    limit=SHARED_LIMIT,
    most_blocks=MOST_BLOCKS,
):
    """``grads``, ``features``: ``Tensor``, all in one memory; ``values``: arrays ``(B, P)``. Without ``upstream`` forward: fisher and
    attribution ``(K, B)``, and maps. With it, the weights of both and upstream maps, backward: to_grads, to_features and to_values. And
    the call, launch and report."""
    memory, count, batch = grads[0].buffer.memory, len(grads), grads[0].shape[0]
    all_tensors = all_tensors or count
    kind = "float64" if any(x.dtype == "float64" for x in [*grads, *(features or [])]) else "float32"
    call, out, backward = (
        GradientStatistics(tensors=count, first_tensor=first_tensor, batch=batch, eps=eps),
        SimpleNamespace(),
        upstream is not None,
    )
    fisher_weight, square_weight, fisher_maps, attribution_maps = upstream or (None, None, None, None)

    def row(tensor, value=None):
        shape = tensor.shape[0], tensor.shape[2]
        return memory.empty(shape, kind) if value is None else memory.put(value.astype(kind))

    out.values = None if values is None else [row(g, v) for g, v in zip(grads, values, strict=True)]
    if backward:
        out.to_grads = [Tensor(memory, None, x.dtype, x.layout, shape=x.shape) for x in grads]
        out.to_features = [Tensor(memory, None, x.dtype, x.layout, shape=x.shape) for x in features or []]
        out.to_values = [row(g) for g in grads] if values is not None else []
        out.fisher_maps = [row(g, x) for g, x in zip(grads, fisher_maps or [], strict=False)]
        out.attribution_maps = [row(g, x) for g, x in zip(grads, attribution_maps or [], strict=False)]
        call.fisher_weight = None if fisher_weight is None else memory.put(fisher_weight.astype(np.float64)).address
        call.attribution_weight = None if square_weight is None else memory.put(square_weight.astype(np.float64)).address
    else:
        out.fisher_maps = [row(g) for g in grads] if maps and values is not None else []
        out.attribution_maps = [row(g) for g in grads] if maps and features else []
        out.fisher = memory.empty((all_tensors, batch), kind) if values is not None else None
        out.attribution = memory.empty((all_tensors, batch), kind) if features else None
        call.fisher, call.attribution = address(out.fisher), address(out.attribution)
        arrived = memory.put(np.zeros(count * batch, np.uint32))
        call.arrived = arrived.address
    for k, g in enumerate(grads):
        call.tilings[k].channels, call.tilings[k].pixels = g.shape[1:]
        call.grads[k] = g.array
        if masks is not None:
            call.tilings[k].mask = memory.put(masks[k].astype(np.uint8)).address
        if features:
            call.features[k] = features[k].array
        if backward:
            call.to_grads[k] = out.to_grads[k].array
            if features:
                call.to_features[k] = out.to_features[k].array
        for name in ("values", "fisher_maps", "attribution_maps", *(["to_values"] if backward else [])):
            if buffers := getattr(out, name):
                getattr(call, name)[k] = buffers[k].address
    launch = out.launch = plan("gradient_statistics", call, backward, BYTES[kind], limit, most_blocks)
    assert launch.shared_bytes >= 0, "a tile does not fit"
    out.call = call
    if not backward:
        call.partial = memory.empty(launch.blocks * 3, kind).address
    entry = f"gradient_statistics_{'backward' if backward else 'forward'}_{kind}"
    out.report = ptx.run(
        kernels("gradient_statistics", arch),
        entry,
        launch.blocks,
        launch.threads,
        [call],
        memory,
        shared_bytes=launch.shared_bytes,
    )
    assert backward or not arrived.numpy().any()
    return out

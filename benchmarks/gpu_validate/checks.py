"""What a backend must hold beyond single results: the same bits again, graph capture, offsets beyond 2^31. Each returns what is wrong."""

import torch
from torch import Tensor

from benchmarks.gpu_validate.work import Work, classes
from modreg_fast import functional


def differing(work: Work, repeats: int) -> list[str]:
    """Results or gradients whose bits change when the call is repeated."""
    first = work()
    again = [work() for _ in range(repeats - 1)]
    return [f"{work.op}, tensor {k}: other bits in a repeat" for k, x in enumerate(first) if any(_differ(x, y[k]) for y in again)]


def differing_from_graph(work: Work, replays: int) -> list[str]:
    """Results or gradients of a captured CUDA graph, replayed on new data, whose bits are not those of a plain call on these data. On the
    CPU nothing is captured, and a call into the same outputs stands for a replay."""
    on_gpu = work.inputs[0].is_cuda
    if on_gpu:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles, and lets the allocator reserve
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
    wrong = []
    for replay in range(replays):
        work.refill()
        if on_gpu:
            graph.replay()
        else:
            captured = work()
        wrong += [f"{work.op}, tensor {k}: replay {replay} differs" for k, x in enumerate(work()) if _differ(x, captured[k])]
    return wrong


def _differ(x: Tensor, y: Tensor) -> bool:
    return not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


# ---- more than 2^31 elements ----

CHANNELS, BEYOND = 40, 2**31


def beyond_31_bits(op: str, backend: str, device: str, layout: str, pixels: int) -> list[str]:
    """Errors of tensors ``(2, C, P)`` in bfloat16 whose second sample begins beyond 2^31 elements. On a GPU they are dense; on the CPU a
    stride does it, over memory that nobody touches. Compared with float64 at the first and last pixels of each sample."""
    tensors = [_far(device, layout, pixels) for _ in range(2)]
    values = torch.rand(2, pixels, device=device).add_(0.1)
    x = [t.requires_grad_() for t in tensors]
    part = min(pixels, 1000)
    slices = [(b, slice(start, start + part)) for b in range(2) for start in (0, pixels - part)]
    # The mean over all pixels, with an upstream gradient that makes up for it: then a pixel's gradient does not know of the others.
    got = _results(op, x, values, backend)
    gradients = torch.autograd.grad(sum(r.sum() * pixels for r in got), x)
    wrong = []
    for b, where in slices:
        local = [t.detach()[b : b + 1, :, where].double().requires_grad_() for t in tensors]
        expected = _results(op, local, values[b : b + 1, where].double(), "reference")
        for k, gradient in enumerate(torch.autograd.grad(sum(r.sum() * part for r in expected), local)):
            error = _relative(gradients[k][b : b + 1, :, where], gradient)
            if not error <= 2.0**-8 + 1e-5:
                wrong.append(f"{op}, {layout}: gradient {k} of sample {b}, pixels from {where.start}: error {error:.1e}")
    total = torch.zeros_like(got[0], dtype=torch.float64)
    step = 2**24 // CHANNELS
    for b in range(2):
        for start in range(0, pixels, step):
            where = slice(start, start + step)
            chunk = [t.detach()[b : b + 1, :, where].double() for t in tensors]
            (part_of_it,) = _results(op, chunk, values[b : b + 1, where].double(), "reference")
            total[..., b] += part_of_it[..., 0] * (chunk[0].shape[2] / pixels)
    error = _relative(got[0], total)
    return wrong + ([f"{op}, {layout}: values: error {error:.1e}"] if not error <= 1e-5 else [])


def _results(op: str, x: list[Tensor], values: Tensor, backend: str) -> list[Tensor]:
    """Means over pixels, one tensor: the information, the Fisher information, or the cross entropies."""
    if op == "softmax_fisher":
        return [functional.softmax_fisher_information([[t] for t in x], backend=backend)]
    if op == "modality_cross_entropy":
        sums = functional.modality_cross_entropy(x, classes(values, x[0].shape[1]), backend=backend)
        return [sums.cross_entropy / values.shape[1]]
    fisher = functional.gradient_statistics(x, values=[values] * 2, backend=backend).fisher
    assert fisher is not None
    return [fisher]


def _far(device: str, layout: str, pixels: int) -> Tensor:
    size = (2, CHANNELS, pixels)
    if device != "cpu":
        shape = size if layout == "pixels" else (2, pixels, CHANNELS)
        x = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
        return x if layout == "pixels" else x.transpose(1, 2)
    far = BEYOND + 64
    strides = (far, pixels, 1) if layout == "pixels" else (far, 1, CHANNELS)
    storage = torch.empty(far + CHANNELS * pixels, dtype=torch.bfloat16)
    return storage.as_strided(size, strides).copy_(torch.randn(size))


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.detach().double() - expected) / torch.linalg.vector_norm(expected))


def pixels_that_fit(free_bytes: int) -> int | None:
    """So that a sample alone has more than 2^31 elements, if inputs, gradients and what the comparison needs fit; None if they do not."""
    pixels = BEYOND // CHANNELS + 77
    needed = 2 * (2 * CHANNELS * pixels * 2) * 2 + 2**33
    return pixels if needed < free_bytes else None

"""``gradient_statistics`` in Triton. Definitions: ``backends/reference/gradient_statistics.py``. Per pixel::

    fisher_map = sum_c g^2 / (f + eps)        attribution_map = sqrt( sum_c (g e)^2 )

Memory: the forward kernel reads g, e and f once and writes one number per tile and statistic, and the maps; the backward kernel reads
them once and writes each gradient once. With gradients of the attribution maps it reads g and e a second time, just read before and
so from the cache. A second, small kernel adds up the tiles in order; with masks, one before the backward pass counts their pixels.

Work: a program goes over the channels of a tile of pixels of one tensor in steps of ``block_c``. Channels meet only in sums, which
every element of the tile keeps for itself up to the end. Sizes: ``_shape``."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient
from modreg_fast.backends.reference.gradient_statistics import Problem, Result
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype
from modreg_fast.backends.triton import launches
from modreg_fast.backends.triton.launches import Launch, Shape
from modreg_fast.backends.triton.tiles import (
    counting_pixels,
    inside_rows,
    locate,
    narrowed,
    number,
    ordered_sum,
    programs_of,
    read,
    widened,
    write,
)

_THREADS = 64
_REGISTERS = 128
_ROW = 256  # channels of a step, at most, where they lie side by side


@triton.jit
def _sums(grads, features, strides, k: tl.constexpr, sample, p, within, SHAPE: tl.constexpr):
    """Per pixel ``sum_c g^2`` and ``sum_c (g e)^2`` (0 without e).

    By fma in so many words: left alone, the compiler may fuse a product with the sum across lanes that follows, each lane its own
    product, and lanes that share a pixel then hold sums that differ in the last bit."""
    dtype: tl.constexpr = tl.float64 if SHAPE.wide else tl.float32
    squares = tl.full((SHAPE.block_c, SHAPE.block_p), 0.0, dtype)
    products = squares
    for first in range(0, SHAPE.channels, SHAPE.block_c):
        c = (first + tl.arange(0, SHAPE.block_c))[:, None]
        inside = (c < SHAPE.channels) & within[None, :]
        gradient = read(grads[k], strides[k][0], sample, c, p[None, :], inside, SHAPE)
        squares = tl.fma(gradient, gradient, squares)
        if len(features) > 0:
            product = gradient * read(features[k], strides[k][1], sample, c, p[None, :], inside, SHAPE)
            products = tl.fma(product, product, products)
    return tl.sum(squares, 0), tl.sum(products, 0)


@triton.jit(do_not_specialize=["batch"])
def _forward_kernel(
    grads,
    features,
    values,
    masks,
    strides,
    eps,
    pixels,
    batch,
    fisher_maps,
    attribution_maps,
    partial_fisher,
    partial_attribution,
    partial_counts,
    SHAPES: tl.constexpr,
):
    """Per tile the sums of ``fisher_map``, of the square of ``attribution_map`` and of the pixels that count; the maps, if any."""
    program = tl.program_id(0)
    for k in tl.static_range(len(SHAPES)):
        programs = tl.cdiv(pixels[k], SHAPES[k].block_p) * batch
        if (program >= 0) & (program < programs):
            SHAPE: tl.constexpr = SHAPES[k]
            sample, p = locate(program, pixels[k], SHAPE)
            within = inside_rows(p, pixels[k], SHAPE)
            counts = counting_pixels(None if len(masks) == 0 else masks[k], sample, p, within, pixels[k])
            squares, products = _sums(grads, features, strides, k, sample, p, within, SHAPE)
            at = sample * pixels[k] + p
            if len(values) > 0:
                f = widened(tl.load(values[k] + at, mask=within, other=1.0), SHAPE) + number(eps, SHAPE)
                fisher = tl.where(counts, squares / f, 0.0)
                tl.store(partial_fisher + tl.program_id(0), tl.sum(fisher, 0))
                if len(fisher_maps) > 0:
                    tl.store(fisher_maps[k] + at, fisher, mask=within)
            if len(features) > 0:
                products = tl.where(counts, products, 0.0)
                tl.store(partial_attribution + tl.program_id(0), tl.sum(products, 0))
                if len(attribution_maps) > 0:
                    tl.store(attribution_maps[k] + at, tl.sqrt(products), mask=within)
            if len(masks) > 0:
                tl.store(partial_counts + tl.program_id(0), tl.sum(counts.to(tl.int32), 0))
        program -= programs


@triton.jit(do_not_specialize=["batch"])
def _reduce_kernel(
    partial_fisher,
    partial_attribution,
    partial_counts,
    pixels,
    batch,
    fisher,
    attribution,
    SHAPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``fisher (K, B)`` and ``attribution (K, B)`` from the sums of the tiles; one program per tensor and sample."""
    start, tiles, count = programs_of(tl.program_id(0), pixels, batch, SHAPES)
    if partial_fisher is not None:
        if partial_counts is not None:
            count = ordered_sum(partial_counts + start, tiles, BLOCK).to(tl.int64)
        total = ordered_sum(partial_fisher + start, tiles, BLOCK)
        tl.store(fisher + tl.program_id(0), total / tl.maximum(count, 1).to(total.dtype))
    if partial_attribution is not None:
        tl.store(attribution + tl.program_id(0), tl.sqrt(ordered_sum(partial_attribution + start, tiles, BLOCK)))


@triton.jit(do_not_specialize=["batch"])
def _count_kernel(masks, pixels, batch, counts, SHAPES: tl.constexpr, BLOCK: tl.constexpr):
    """``counts (K, B)``, the pixels that count; one program per tensor and sample."""
    for k in tl.static_range(len(SHAPES)):
        if tl.program_id(0) // batch == k:
            mask = masks[k] + (tl.program_id(0) % batch).to(tl.int64) * pixels[k]
            i = tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, pixels[k], BLOCK):
                total += (tl.load(mask + start + i, mask=start + i < pixels[k], other=0) != 0).to(tl.int32)
            tl.store(counts + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _half_over(upstream, root):
    """``upstream / (2 root)``, the derivative by what is under the root; 0 where the root is 0."""
    zero = root == 0
    return tl.where(zero, 0.0, upstream / tl.where(zero, 1.0, 2.0 * root))


@triton.jit(do_not_specialize=["batch"])
def _backward_kernel(
    grads,
    features,
    values,
    masks,
    strides,
    eps,
    pixels,
    batch,
    grad_fisher,
    grad_attribution,
    grad_fisher_maps,
    grad_attribution_maps,
    attribution,
    counts,
    to_grads,
    to_features,
    to_values,
    output_strides,
    SHAPES: tl.constexpr,
):
    """With ``u`` the upstream weight of ``fisher_map`` and ``v`` that of ``sum_c (g e)^2``, per pixel::

    dg = 2 u / (f + eps) g + 2 v g e^2        de = 2 v g^2 e        df = -u sum_c g^2 / (f + eps)^2"""
    program = tl.program_id(0)
    for k in tl.static_range(len(SHAPES)):
        programs = tl.cdiv(pixels[k], SHAPES[k].block_p) * batch
        if (program >= 0) & (program < programs):
            SHAPE: tl.constexpr = SHAPES[k]
            dtype: tl.constexpr = tl.float64 if SHAPE.wide else tl.float32
            sample, p = locate(program, pixels[k], SHAPE)
            within = inside_rows(p, pixels[k], SHAPE)
            counting = counting_pixels(None if len(masks) == 0 else masks[k], sample, p, within, pixels[k])
            at = sample * pixels[k] + p
            result = k * batch + sample

            u = tl.full((SHAPE.block_p,), 0.0, dtype)
            v = u
            f = u + 1.0
            if len(values) > 0:
                count = pixels[k] if len(masks) == 0 else tl.maximum(tl.load(counts + result), 1)
                u += tl.load(grad_fisher + result).to(dtype) / tl.cast(count, dtype)
                if len(grad_fisher_maps) > 0:
                    u += tl.load(grad_fisher_maps[k] + at, mask=within, other=0.0).to(dtype)
                f = widened(tl.load(values[k] + at, mask=within, other=1.0), SHAPE) + number(eps, SHAPE)
            if len(features) > 0:
                v += _half_over(tl.load(grad_attribution + result).to(dtype), tl.load(attribution + result).to(dtype))
                if len(grad_attribution_maps) > 0:
                    sums = _sums(grads, features, strides, k, sample, p, within, SHAPE)
                    v += _half_over(tl.load(grad_attribution_maps[k] + at, mask=within, other=0.0).to(dtype), tl.sqrt(sums[1]))
            u_f = (2.0 * u / f)[None, :]

            squares = tl.full((SHAPE.block_c, SHAPE.block_p), 0.0, dtype)
            for first in range(0, SHAPE.channels, SHAPE.block_c):
                c = (first + tl.arange(0, SHAPE.block_c))[:, None]
                inside = (c < SHAPE.channels) & within[None, :]
                g = read(grads[k], strides[k][0], sample, c, p[None, :], inside, SHAPE)
                to_g = u_f * g
                squares = tl.fma(g, g, squares)
                if len(features) > 0:
                    e = read(features[k], strides[k][1], sample, c, p[None, :], inside, SHAPE)
                    v_g_e = 2.0 * v[None, :] * g * e
                    to_g += v_g_e * e
                    to_e = tl.where(counting[None, :], v_g_e * g, 0.0)
                    write(to_e, to_features[k], output_strides[k], sample, c, p[None, :], inside, SHAPE)
                write(
                    tl.where(counting[None, :], to_g, 0.0), to_grads[k], output_strides[k], sample, c, p[None, :], inside, SHAPE
                )
            if len(values) > 0:
                to_f = tl.where(counting, -u * tl.sum(squares, 0) / (f * f), 0.0)
                tl.store(to_values[k] + at, narrowed(to_f, to_values[k]), mask=within)
        program -= programs


def _shape(tensors: list[Tensor], dtype: torch.dtype, twice: bool) -> Shape:
    """The step of tensors of one shape and layout: twice 16 bytes a thread, once where tensors are read twice, which takes more registers.
    Where pixels lie side by side and are many enough, a thread has pixels of its own, so that sums over channels stay in it."""
    channels, pixels, last = tensors[0].shape[1], tensors[0].shape[2], launches.channels_last(tensors[0])
    vector = launches.vector(tensors)
    row = _THREADS * max(4, vector)
    elements = row if twice else 2 * row
    if last:
        block_c = min(launches.power_of_two(channels), _ROW)
        block_p = min(launches.power_of_two(pixels), elements // block_c)
    else:
        block_p = min(launches.power_of_two(pixels), row)
        block_c = min(launches.power_of_two(channels), elements // block_p)
    return Shape(channels, last, vector, launches.far(tensors), dtype == torch.float64, block_c, block_p)


class _Plan(NamedTuple):
    """What shapes and strides decide."""

    in_place: bool  # gradients and features are read where they are, else copied
    shapes: tuple[Shape, ...]
    programs: int
    strides: tuple[Any, ...]
    output_strides: tuple[Any, ...]
    pixels: tuple[int, ...]


def _plan(problem: Problem, twice: bool) -> _Plan:
    launches.check_pixels(problem.grads, "gradient_statistics")
    pairs, values = _pairs(problem), problem.values
    shapes = [_shape(pair, accumulation_dtype([*pair, *values[k : k + 1]]), twice) for k, pair in enumerate(pairs)]
    outputs = [empty_gradient(pair[0]) for pair in pairs]
    given = [[g, *problem.features[k : k + 1]] for k, g in enumerate(problem.grads)]
    return _Plan(
        all(a is b for pair, tensors in zip(pairs, given, strict=True) for a, b in zip(pair, tensors, strict=True)),
        tuple(shapes),
        sum(shape.programs(pair[0]) for shape, pair in zip(shapes, pairs, strict=True)),
        tuple(launches.strides(pair, shape) for pair, shape in zip(pairs, shapes, strict=True)),
        tuple(launches.strides([x], shape)[0] for x, shape in zip(outputs, shapes, strict=True)),
        tuple(pair[0].shape[2] for pair in pairs),
    )


def _pairs(problem: Problem) -> list[list[Tensor]]:
    """Gradient and feature of every tensor as the kernels read them."""
    return [launches.in_one_layout([g, *problem.features[k : k + 1]]) for k, g in enumerate(problem.grads)]


def _prepared(problem: Problem, twice: bool) -> tuple[list[Tensor], list[Tensor], _Plan, tuple[Any, ...]]:
    """Gradients and features as the kernels read them, the plan, and the arguments that the large kernels share."""
    grads, features, values, masks, eps, *_ = problem
    signature = ("gradient_statistics", twice, *map(launches.signature, (grads, features, values)))
    plan = launches.planned(signature, lambda: _plan(problem, twice))
    if not plan.in_place:
        pairs = _pairs(problem)
        grads, features = [pair[0] for pair in pairs], [pair[1] for pair in pairs if len(pair) > 1]
    arguments = (
        tuple(grads),
        tuple(features),
        tuple([f.contiguous() for f in values]),
        tuple([m.contiguous() for m in masks]),
        plan.strides,
        launches.two_floats(eps),
        plan.pixels,
        problem.batch,
    )
    return grads, features, plan, arguments


def forward_launches(problem: Problem) -> tuple[Result, list[Launch]]:
    """The result of ``forward``, and the launches that fill it."""
    grads, _, plan, shared = _prepared(problem, False)
    result, device = problem.empty_result(), grads[0].device
    # The sums of the tiles, of the statistics that have their input.
    partial_fisher = result.fisher.new_empty(plan.programs) if problem.values else None
    partial_attribution = result.attribution.new_empty(plan.programs) if problem.features else None
    partial_counts = result.fisher.new_empty(plan.programs, dtype=torch.int32) if problem.masks else None
    partial = (partial_fisher, partial_attribution, partial_counts)
    maps = (tuple(result.fisher_maps), tuple(result.attribution_maps))
    sums = (*partial, *shared[-2:], result.fisher, result.attribution)
    constants, reduced = {"SHAPES": plan.shapes}, {"SHAPES": plan.shapes, "BLOCK": 1024}
    return result, [
        Launch(_forward_kernel, device, plan.programs, _THREADS, (*shared, *maps, *partial), constants, _REGISTERS),
        Launch(_reduce_kernel, device, len(grads) * problem.batch, 256, sums, reduced),
    ]


def backward_launches(problem: Problem, result: Result, upstream: Result) -> tuple[list[Tensor], list[Launch]]:
    """The gradients of ``backward``, and the launches that fill them."""
    grads, features, plan, shared = _prepared(problem, bool(upstream.attribution_maps))
    device, counts = grads[0].device, None
    to_grads, to_features = ([empty_gradient(x) for x in tensors] for tensors in (grads, features))
    to_values = [f.new_empty(f.shape) for f in problem.values]
    queued = []
    if problem.masks and problem.values:
        counts = upstream.fisher.new_empty((len(grads), problem.batch), dtype=torch.int32)
        constants = {"SHAPES": plan.shapes, "BLOCK": 4096}
        arguments = (shared[3], *shared[-2:], counts)
        queued.append(Launch(_count_kernel, device, counts.numel(), 256, arguments, constants))
    above = (
        upstream.fisher.contiguous(),
        upstream.attribution.contiguous(),
        tuple([x.contiguous() for x in upstream.fisher_maps]),
        tuple([x.contiguous() for x in upstream.attribution_maps]),
        result.attribution.contiguous(),
        counts,
    )
    written = (tuple(to_grads), tuple(to_features), tuple(to_values), plan.output_strides)
    constants, arguments = {"SHAPES": plan.shapes}, (*shared, *above, *written)
    queued.append(Launch(_backward_kernel, device, plan.programs, _THREADS, arguments, constants, _REGISTERS))
    return [*to_grads, *to_features, *to_values], queued


def forward(problem: Problem) -> Result:
    return launches.run(*forward_launches(problem.flat()))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    return problem.shaped(launches.run(*backward_launches(problem.flat(), result, upstream)))

"""``softmax_fisher`` in Triton. Signatures and definitions: ``backends/reference/softmax_fisher.py``. Per pixel, with R the mean over
present modalities X_m::

    q = softmax_c(R),  p_m = softmax_c(X_m + sigma_m noise),  f_m = -sum_c q_c log p_mc,  I_m = sum_c (p_mc - q_c)^2 / (f_m + eps)

Memory: the forward kernel reads every feature once and writes one number per tile and modality; the backward kernel reads every
feature once and writes every gradient once. Noise is computed, not stored. A second, small kernel adds up the tiles in order.

Work: a program holds a tile of all channels of a few pixels of all modalities in registers, spread over its threads; sums over
channels run across the threads. So nothing is read twice, for any number of channels. Sizes: ``configuration``."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from modreg_fast.backends.layout import empty_in_layout, layout_of
from modreg_fast.backends.reference.softmax_fisher import accumulation_dtype
from modreg_fast.backends.triton import launches
from modreg_fast.backends.triton.launches import Launch, Shape
from modreg_fast.backends.triton.noise import standard_normal
from modreg_fast.backends.triton.tiles import (
    counting_pixels,
    inside_rows,
    locate,
    number,
    ordered_sum,
    programs_of,
    read,
    write,
)

_MOST_CHANNELS = 2**16
_LEAST_THREADS = 256
_LOG2_E = tl.constexpr(1.4426950408889634)

# Elements of a tile per thread, for up to 2, up to 4, and more modalities: as many as 64 registers hold (tests/test_triton_compiled.py).
# For each of them a thread holds all features, q, and p, d and log p of one draw, in the backward pass gradients instead of features
# and the pull on q. The more channels of a pixel a thread has, the less goes between threads in sums over channels.
_ELEMENTS = {
    # (backward, noise)
    (False, False): (8, 4, 2),
    (False, True): (4, 2, 1),
    # Fewer than fit on sm_80 and sm_90 without masks: on sm_100 and with masks twice as many spill.
    (True, False): (4, 1, 1),
    (True, True): (2, 1, 1),
}


@triton.jit
def _softmax(x, inside, SHAPE: tl.constexpr):
    """Over the channels: ``x - max x``, its exponentials, and their sum. 0 past the last channel."""
    if SHAPE.block_c == SHAPE.channels:
        shifted = x - tl.max(x, 0)[None, :]
        e = tl.exp2(shifted * _LOG2_E)  # without the care for subnormal results that exp takes
    else:
        shifted = tl.where(inside, x - tl.max(tl.where(inside, x, float("-inf")), 0)[None, :], 0.0)
        e = tl.where(inside, tl.exp2(shifted * _LOG2_E), 0.0)
    return shifted, e, tl.sum(e, 0)


@triton.jit
def _held(present, sample, m, MODALITIES: tl.constexpr):
    """Whether the sample has modality ``m``."""
    if present is None:
        return sample >= 0
    else:
        return tl.load(present + sample * MODALITIES + m) != 0


@triton.jit
def _read(features, strides, mask, present, sample, c, p, pixels, SHAPE: tl.constexpr, MODALITIES: tl.constexpr):
    """A tile of every modality, 0 where it does not count; the reference q; which pixels count; the share of a modality in
    the reference."""
    within = inside_rows(p, pixels, SHAPE)
    counts = counting_pixels(mask, sample, p, within, pixels)
    xs = ()
    number_held = tl.cast(0.0, tl.float64 if SHAPE.wide else tl.float32)
    for m in tl.static_range(MODALITIES):
        has = _held(present, sample, m, MODALITIES)
        x = read(features[m], strides[m], sample, c, p, (c < SHAPE.channels)[:, None] & within[None, :] & has, SHAPE)
        if mask is not None:
            x = tl.where(counts[None, :], x, 0.0)
        xs = xs + (x,)  # type: ignore[assignment]
        number_held += has.to(number_held.dtype)
    total = xs[0]  # type: ignore[misc]
    for m in tl.static_range(1, MODALITIES):
        total += xs[m]
    share = 1.0 / tl.maximum(number_held, 1.0)
    shifted, e, e_sum = _softmax(total * share, (c < SHAPE.channels)[:, None], SHAPE)
    return xs, e * (1.0 / e_sum)[None, :], counts, share


@triton.jit
def _draw(x, q, sigma, seed, sample, c, p, pixels, tensor, draw, eps, NOISY: tl.constexpr, SHAPE: tl.constexpr):
    """One draw of one modality: p, log p up to a number per pixel, d = p - q, N = sum_c d^2, f + eps."""
    y = x
    if NOISY:
        y = x + number(sigma, SHAPE) * standard_normal(seed, sample, p, pixels, tensor, draw, SHAPE)
    shifted, e, e_sum = _softmax(y, (c < SHAPE.channels)[:, None], SHAPE)
    p_draw = e * (1.0 / e_sum)[None, :]
    d = p_draw - q
    f = tl.log(e_sum) - tl.sum(q * shifted, 0)  # both terms are at least 0: nothing cancels
    return p_draw, shifted, d, tl.sum(d * d, 0), f + number(eps, SHAPE)


@triton.jit(do_not_specialize=["strides", "pixels", "batch"])
def _forward_kernel(
    features,
    strides,
    masks,
    present,
    sigma,
    seed,
    samples,
    eps,
    pixels,
    batch,
    partial,
    partial_counts,
    SHAPES: tl.constexpr,
    NOISY: tl.constexpr,
):
    """``features[s][m]`` to ``partial (M, programs)``, the sums of I over pixels and draws, and ``partial_counts (programs)``."""
    SCALES: tl.constexpr = len(SHAPES)
    MODALITIES: tl.constexpr = len(NOISY)
    program = tl.program_id(0)
    for s in tl.static_range(SCALES):
        programs = tl.cdiv(pixels[s], SHAPES[s].block_p) * batch
        if (program >= 0) & (program < programs):
            SHAPE: tl.constexpr = SHAPES[s]
            sample, p = locate(program, pixels[s], SHAPE)
            c = tl.arange(0, SHAPE.block_c)
            mask = None if len(masks) == 0 else masks[s]
            xs, q, counts, share = _read(features[s], strides[s], mask, present, sample, c, p, pixels[s], SHAPE, MODALITIES)
            for m in tl.static_range(MODALITIES):
                information = tl.full((SHAPE.block_p,), 0.0, q.dtype)
                for draw in range(samples if NOISY[m] else 1):
                    p_draw, log_p, d, n, f = _draw(
                        xs[m], q, sigma[m], seed, sample, c, p, pixels[s], m * SCALES + s, draw, eps, NOISY[m], SHAPE
                    )
                    information += n / f
                if not NOISY[m]:
                    information *= samples  # every draw is the same
                total = tl.sum(tl.where(counts & _held(present, sample, m, MODALITIES), information, 0.0), 0)
                tl.store(partial + m * tl.num_programs(0).to(tl.int64) + tl.program_id(0), total)
            if mask is not None:
                tl.store(partial_counts + tl.program_id(0), tl.sum(counts.to(tl.int32), 0))
        program -= programs


@triton.jit(do_not_specialize=["pixels", "batch", "programs"])
def _reduce_kernel(
    partial,
    partial_counts,
    samples,
    pixels,
    batch,
    programs,
    information,
    counts,
    SHAPES: tl.constexpr,
    MODALITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``information (M, S, B)`` and ``counts (S, B)`` from the results of the tiles; one program per scale and sample."""
    start, tiles, count = programs_of(tl.program_id(0), pixels, batch, SHAPES)
    if partial_counts is not None:
        count = ordered_sum(partial_counts + start, tiles, BLOCK).to(tl.int64)
    tl.store(counts + tl.program_id(0), count)
    for m in range(MODALITIES):
        total = ordered_sum(partial + m * tl.cast(programs, tl.int64) + start, tiles, BLOCK)
        mean = total / (tl.maximum(count, 1) * samples).to(total.dtype)
        tl.store(information + m * tl.num_programs(0) + tl.program_id(0), mean)


@triton.jit(do_not_specialize=["strides", "gradient_strides", "pixels", "batch"])
def _backward_kernel(
    features,
    strides,
    masks,
    present,
    sigma,
    seed,
    samples,
    eps,
    pixels,
    batch,
    grad,
    valid,
    gradients,
    gradient_strides,
    SHAPES: tl.constexpr,
    NOISY: tl.constexpr,
    DETACH: tl.constexpr,
):
    """``features[s][m]``, ``grad (M, S, B)`` and the counts ``valid (S, B)`` to ``gradients[s][m]``."""
    SCALES: tl.constexpr = len(SHAPES)
    MODALITIES: tl.constexpr = len(NOISY)
    program = tl.program_id(0)
    for s in tl.static_range(SCALES):
        programs = tl.cdiv(pixels[s], SHAPES[s].block_p) * batch
        if (program >= 0) & (program < programs):
            SHAPE: tl.constexpr = SHAPES[s]
            sample, p = locate(program, pixels[s], SHAPE)
            c = tl.arange(0, SHAPE.block_c)
            mask = None if len(masks) == 0 else masks[s]
            xs, q, counts, share = _read(features[s], strides[s], mask, present, sample, c, p, pixels[s], SHAPE, MODALITIES)
            terms = (tl.maximum(tl.load(valid + s * batch + sample), 1) * samples).to(q.dtype)
            pull = tl.zeros_like(q)  # sum over modalities and draws of the bracket in dI/dR
            owns = ()
            for m in tl.static_range(MODALITIES):
                weight = tl.load(grad + (m * SCALES + s) * batch + sample).to(q.dtype) / terms
                if not NOISY[m]:
                    weight *= samples  # every draw is the same
                weight = tl.where(_held(present, sample, m, MODALITIES), weight, 0.0)
                own = tl.zeros_like(q)
                for draw in range(samples if NOISY[m] else 1):
                    p_draw, log_p, d, n, f = _draw(
                        xs[m], q, sigma[m], seed, sample, c, p, pixels[s], m * SCALES + s, draw, eps, NOISY[m], SHAPE
                    )
                    # dI/dX = 2/(f+eps) J(p) d - N/(f+eps)^2 d        dI/dR = J(q) [ -2/(f+eps) d + N/(f+eps)^2 log p ]
                    # J(q) is blind to a number added to all channels, so log p may lack its last term.
                    inverse = 1.0 / f
                    a = tl.where(counts, 2.0 * weight * inverse, 0.0)[None, :]
                    b = tl.where(counts, weight * n * inverse * inverse, 0.0)[None, :]
                    own += a * p_draw * (d - tl.sum(p_draw * d, 0)[None, :]) - b * d
                    if not DETACH:
                        pull += b * log_p - a * d
                owns = owns + (own,)  # type: ignore[assignment]
            shared = q * (pull - tl.sum(q * pull, 0)[None, :]) * share
            inside = (c < SHAPE.channels)[:, None] & inside_rows(p, pixels[s], SHAPE)[None, :]
            for m in tl.static_range(MODALITIES):
                write(
                    tl.where(_held(present, sample, m, MODALITIES), owns[m] + shared, 0.0),
                    gradients[s][m],
                    gradient_strides[s],
                    sample,
                    c,
                    p,
                    inside,
                    SHAPE,
                )
        program -= programs


def _configuration(features: list[list[Tensor]], noisy: bool, backward: bool) -> tuple[tuple[Shape, ...], int]:
    """The tile of each scale, for its ``M`` features, and the threads of a program, the same for all scales: enough for all channels of
    one pixel, or for 32 bytes of every channel, which is what memory delivers at least."""
    modalities = len(features[0])
    size = 0 if modalities <= 2 else 1 if modalities <= 4 else 2
    tiles, threads = [], _LEAST_THREADS
    for xs in features:
        item, last = xs[0].element_size(), launches.channels_last(xs[0])
        # Of pixels side by side a thread takes one: with 16 bytes of them it would have few channels of each.
        vector = launches.vector(xs) if last else 1
        scattered = last and vector < 4  # many short loads, an address each
        elements = _ELEMENTS[backward, noisy][size]
        if modalities <= 2 and not noisy:
            elements = max(elements, vector)  # a load of 16 bytes
        if scattered or item == 8:
            elements = max(1, elements // 2)
        block_c = launches.power_of_two(max(4 if noisy else 1, xs[0].shape[1]))
        needed = block_c * (1 if last else launches.SECTOR_BYTES // item) // elements
        threads = min(launches.MOST_THREADS, max(threads, needed))
        tiles.append((xs, last, vector, elements, block_c))
    shapes = []
    for xs, last, vector, elements, block_c in tiles:
        channels, pixels, wide = xs[0].shape[1], xs[0].shape[2], xs[0].dtype == torch.float64
        block_p = max(1, min(launches.power_of_two(pixels), threads * elements // block_c))
        shapes.append(Shape(channels, last, vector, launches.far(xs), wide, block_c, block_p))
    return tuple(shapes), threads


def _prepared(
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    eps: float,
    backward: bool,
) -> tuple[list[list[Tensor]], Launch]:
    """The features by scale, as the kernels read them, and a launch that has all but what one kernel alone takes."""
    scales = len(features) // len(sigma)
    channels = max(x.shape[1] for x in features)
    launches.check_pixels(features, "softmax_fisher")
    if channels > _MOST_CHANNELS:
        raise ValueError(f"softmax_fisher: backend 'triton' takes at most {_MOST_CHANNELS} channels, got {channels}")
    by_scale = [launches.in_one_layout(features[s::scales]) for s in range(scales)]
    shapes, threads = _configuration(by_scale, any(s > 0 for s in sigma), backward)
    arguments = (
        tuple(map(tuple, by_scale)),
        tuple(launches.strides(xs, shape) for xs, shape in zip(by_scale, shapes, strict=True)),
        tuple(m.contiguous() for m in masks),
        None if present is None else present.contiguous(),
        tuple(map(launches.two_floats, sigma)),
        seed,
        samples,
        launches.two_floats(eps),
        tuple(xs[0].shape[2] for xs in by_scale),
        features[0].shape[0],
    )
    programs = sum(shape.programs(xs[0]) for shape, xs in zip(shapes, by_scale, strict=True))
    constants = {"SHAPES": shapes, "NOISY": tuple(s > 0 for s in sigma)}
    kernel = _backward_kernel if backward else _forward_kernel
    return by_scale, Launch(kernel, features[0].device, programs, threads, arguments, constants)


def forward_launches(
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """The results of ``forward``, and the launches that fill them."""
    _, main = _prepared(features, masks, present, sigma, samples, seed, eps, False)
    batch, modalities, scales = features[0].shape[0], len(sigma), len(features) // len(sigma)
    information = features[0].new_empty((modalities, scales, batch), dtype=accumulation_dtype(features))
    counts = features[0].new_empty((scales, batch), dtype=torch.int64)
    partial = information.new_empty((modalities, main.programs))
    partial_counts = counts.new_empty(main.programs, dtype=torch.int32) if masks else None
    pixels = main.arguments[8]
    reduction = Launch(
        _reduce_kernel,
        main.device,
        scales * batch,
        _LEAST_THREADS,
        (partial, partial_counts, samples, pixels, batch, main.programs, information, counts),
        {"SHAPES": main.constants["SHAPES"], "MODALITIES": modalities, "BLOCK": 1024},
    )
    return information, counts, [replace(main, arguments=(*main.arguments, partial, partial_counts)), reduction]


def backward_launches(
    grad: Tensor,
    counts: Tensor,
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    detach_reference: bool,
    eps: float,
) -> tuple[list[Tensor], list[Launch]]:
    """The result of ``backward``, and the launch that fills it."""
    by_scale, main = _prepared(features, masks, present, sigma, samples, seed, eps, True)
    gradients = [[empty_in_layout(x, layout_of(x)) for x in xs] for xs in by_scale]
    # Dense tensors of one shape and layout: one pair of strides per scale.
    strides = tuple(launches.strides(xs[:1], shape)[0] for xs, shape in zip(gradients, main.constants["SHAPES"], strict=True))
    arguments = (*main.arguments, grad.contiguous(), counts.contiguous(), tuple(map(tuple, gradients)), strides)
    constants = {**main.constants, "DETACH": detach_reference}
    flat = [xs[m] for m in range(len(sigma)) for xs in gradients]
    return flat, [replace(main, arguments=arguments, constants=constants)]


def forward(
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    information, counts, launches = forward_launches(features, masks, present, sigma, samples, seed, eps)
    for launch in launches:
        launch.run()
    return information, counts


def backward(
    grad: Tensor,
    counts: Tensor,
    features: list[Tensor],
    masks: list[Tensor],
    present: Tensor | None,
    sigma: list[float],
    samples: int,
    seed: Tensor | None,
    detach_reference: bool,
    eps: float,
) -> list[Tensor]:
    gradients, launches = backward_launches(grad, counts, features, masks, present, sigma, samples, seed, detach_reference, eps)
    for launch in launches:
        launch.run()
    return gradients

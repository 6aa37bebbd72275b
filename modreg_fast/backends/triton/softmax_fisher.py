"""``softmax_fisher`` in Triton. Definitions: ``backends/reference/softmax_fisher.py``. Per pixel, with R the mean over
present modalities X_m::

    q = softmax_c(R),  p_m = softmax_c(X_m + sigma_m noise),  f_m = -sum_c q_c log p_mc,  I_m = sum_c (p_mc - q_c)^2 / (f_m + eps)

Memory: the forward kernel reads every feature once and writes one number per tile and modality; the backward kernel reads every
feature once and writes every gradient once. Noise is computed, not stored. A second, small kernel adds up the tiles in order.

Work: a program holds a tile of all channels of a few pixels of all modalities in registers; a thread holds some channels of one
pixel, and the lanes of a warp share a pixel, as far as they can. So nothing is read twice, for any number of channels, and sums over
channels run within a warp. Threads read 16 bytes: of channels where these lie side by side, else of pixels, which they exchange through
shared memory (``tiles.gathered``). Sizes: ``_configuration``."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modreg_fast.backends.layout import empty_gradient
from modreg_fast.backends.reference.softmax_fisher import Problem, Result
from modreg_fast.backends.triton import launches
from modreg_fast.backends.triton.launches import Launch, Shape
from modreg_fast.backends.triton.noise import standard_normal
from modreg_fast.backends.triton.tiles import (
    channels,
    counting_pixels,
    gathered,
    highest,
    holds,
    inside_rows,
    load_all,
    locate,
    number,
    ordered_sum,
    over_channels,
    programs_of,
    store_all,
    widened,
)

_MOST_CHANNELS = 2**16
_LOG2_E = tl.constexpr(1.4426950408889634)
_FAR_BELOW = tl.constexpr(-(2.0**126))  # in the place of channels past the last: its exponential is 0, its product with 0 as well

# Elements of a tile per thread, and the registers that hold them without a spill (tests/test_triton_compiled.py), for up to 2, up to 4, and
# more modalities. For each element a thread holds all features, r, and p, d and log p of one draw, in the backward pass gradients instead
# of features and the pull on q. The more channels of a pixel a thread has, the fewer sums go between threads, and the more elements share
# what is computed once for a thread. Eight warps, each with all its loads under way, are enough for a multiprocessor.
_TILES = {
    # (backward, noise)
    (False, False): ((32, 128), (32, 184), (16, 168)),
    (False, True): ((16, 128), (16, 168), (8, 128)),
    (True, False): ((32, 255), (16, 255), (8, 184)),
    (True, True): ((16, 200), (8, 152), (4, 128)),
}
_REGISTERS = 136  # in the backward pass with channels side by side: half the elements need no more, and twice the warps fit
_WARP = 32  # threads of a program, where they are enough: it has no barriers


@triton.jit
def _top(x, scale, SHAPE: tl.constexpr):
    """The highest channel of a pixel."""
    top = highest(x)
    if SHAPE.block_c != SHAPE.channels:  # where all channels are -inf, one past the last would be the highest
        top = tl.where(top * scale > 0.5 * _FAR_BELOW, top, float("nan"))
    return top


@triton.jit
def _read(features, strides, mask, present, sample, p, pixels, SHAPE: tl.constexpr, MODALITIES: tl.constexpr):
    """A tile of every modality, 0 where it is absent; the reference as r = exp(R - max R) and sum_c r, q = r / sum_c r; which pixels
    count; the share of a modality in the reference."""
    within = inside_rows(p, pixels, SHAPE)
    counts = counting_pixels(mask, sample, p, within, pixels)
    read, xs = (), ()
    number_held = tl.cast(0.0, tl.float64 if SHAPE.wide else tl.float32)
    for m in tl.static_range(MODALITIES):  # all are on their way before the first is waited for
        has = holds(present, sample, m, MODALITIES)
        read = read + (load_all(features[m], strides[m], sample, p, within & has, SHAPE),)  # type: ignore[assignment]
        number_held += has.to(number_held.dtype)
    for m in tl.static_range(MODALITIES):
        x = widened(gathered(read[m], SHAPE), SHAPE)
        if SHAPE.block_c != SHAPE.channels:
            x = tl.where(channels(SHAPE) < SHAPE.channels, x, _FAR_BELOW)
        xs = xs + (x,)  # type: ignore[assignment]
    total = xs[0]  # type: ignore[misc]
    for m in tl.static_range(1, MODALITIES):
        total += xs[m]
    share = 1.0 / tl.maximum(number_held, 1.0)
    scale = share * _LOG2_E  # the rounding of top times scale is that of all channels of a pixel: q is blind to it
    r = tl.exp2(tl.fma(total, scale, -(_top(total, share, SHAPE) * scale)))
    return xs, r, over_channels(r), counts[None, :, None], share


@triton.jit
def _draw(x, r, r_sum, sigma, seed, sample, p, pixels, tensor, draw, eps, NOISY: tl.constexpr, SHAPE: tl.constexpr):
    """One draw of one modality, with s = sum_c r, so that q need not be held: s p, log p up to a number per pixel, s (p - q) (without
    noise s (q - p)), sum_c of its square, sum_c r log p, f + eps."""
    y = x
    if NOISY:
        y = x + number(sigma, SHAPE) * standard_normal(seed, sample, p, pixels, tensor, draw, SHAPE)
    log_p = y - _top(y, 1.0, SHAPE)
    e = tl.exp2(log_p * _LOG2_E)  # without the care for subnormal results that exp takes
    r_log_p, e_sum = over_channels(r * log_p), over_channels(e)
    s_p = e * (r_sum * (1.0 / e_sum))
    d = s_p - r if NOISY else r - s_p
    f = tl.log(e_sum) - r_log_p * (1.0 / r_sum)  # both terms are at least 0: nothing cancels
    return s_p, log_p, d, over_channels(d * d), r_log_p, f + number(eps, SHAPE)


@triton.jit(do_not_specialize=["batch"])
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
            mask = None if len(masks) == 0 else masks[s]
            xs, r, r_sum, counts, share = _read(features[s], strides[s], mask, present, sample, p, pixels[s], SHAPE, MODALITIES)
            for m in tl.static_range(MODALITIES):
                information = tl.zeros_like(r_sum)
                for draw in range(samples if NOISY[m] else 1):
                    s_p, log_p, d, n, r_log_p, f = _draw(
                        xs[m], r, r_sum, sigma[m], seed, sample, p, pixels[s], m * SCALES + s, draw, eps, NOISY[m], SHAPE
                    )
                    information += n / f
                information *= 1.0 / (r_sum * r_sum)
                if not NOISY[m]:
                    information *= samples  # every draw is the same
                total = tl.sum(tl.where(counts & holds(present, sample, m, MODALITIES), information, 0.0))
                tl.store(partial + m * tl.num_programs(0).to(tl.int64) + tl.program_id(0), total)
            if mask is not None:
                tl.store(partial_counts + tl.program_id(0), tl.sum(counts.to(tl.int32)))
        program -= programs


@triton.jit(do_not_specialize=["batch", "programs"])
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


@triton.jit
def _derivatives(
    x,
    r,
    r_sum,
    weight,
    sigma,
    seed,
    sample,
    p,
    pixels,
    tensor,
    draw,
    eps,
    NOISY: tl.constexpr,
    DETACH: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Of one draw: dI/dX; the bracket in dI/dR over s = sum_c r, and its sum_c q."""
    s_p, log_p, d, n, r_log_p, f = _draw(x, r, r_sum, sigma, seed, sample, p, pixels, tensor, draw, eps, NOISY, SHAPE)
    # dI/dX = 2/(f+eps) J(p) d - N/(f+eps)^2 d        dI/dR = J(q) [ -2/(f+eps) d + N/(f+eps)^2 log p ]
    # J(q) is blind to a number added to all channels, so log p may lack its last term. From here on p and d stand for s p and s d.
    inverse, inverse_s = 1.0 / f, 1.0 / r_sum
    square = inverse_s * inverse_s
    a = 2.0 * weight * inverse * square
    b = weight * n * inverse * inverse * square * inverse_s
    p_d = over_channels(s_p * d)
    if not NOISY:  # d anew: the compiler does not know it with its sign changed, and keeps no d in registers during the sums
        d, p_d = s_p - r, -p_d
    to_x = (a * s_p - b) * d - (a * inverse_s * p_d) * s_p
    if DETACH:
        return to_x, tl.zeros_like(r), tl.zeros_like(f)
    else:
        return to_x, b * log_p - a * d, (b * r_log_p - a * (p_d - n)) * inverse_s  # sum_c q d = sum_c p d - sum_c d^2


@triton.jit(do_not_specialize=["batch"])
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
            mask = None if len(masks) == 0 else masks[s]
            xs, r, r_sum, counts, share = _read(features[s], strides[s], mask, present, sample, p, pixels[s], SHAPE, MODALITIES)
            terms = (tl.maximum(tl.load(valid + s * batch + sample), 1) * samples).to(r.dtype)
            owns, pull, q_pull = (), None, None  # the last two: the bracket in dI/dR over s of all modalities, and its sum_c q
            for m in tl.static_range(MODALITIES):
                weight = tl.load(grad + (m * SCALES + s) * batch + sample).to(r.dtype) / terms
                if not NOISY[m]:
                    weight *= samples  # every draw is the same
                weight = tl.where(holds(present, sample, m, MODALITIES), weight, 0.0)
                own, to_r, q_to_r = tl.zeros_like(r), tl.zeros_like(r), tl.zeros_like(r_sum)
                for draw in range(samples if NOISY[m] else 1):
                    more = _derivatives(
                        xs[m],
                        r,
                        r_sum,
                        weight,
                        sigma[m],
                        seed,
                        sample,
                        p,
                        pixels[s],
                        m * SCALES + s,
                        draw,
                        eps,
                        NOISY[m],
                        DETACH,
                        SHAPE,
                    )
                    if NOISY[m]:
                        own, to_r, q_to_r = own + more[0], to_r + more[1], q_to_r + more[2]
                    else:
                        own, to_r, q_to_r = more
                pull = to_r if pull is None else pull + to_r
                q_pull = q_to_r if q_pull is None else q_pull + q_to_r
                owns = owns + (own,)  # type: ignore[assignment]
            common = share * pull - share * q_pull
            inside = inside_rows(p, pixels[s], SHAPE)
            for m in tl.static_range(MODALITIES):
                to_x = owns[m] + r * common
                if mask is not None or present is not None:
                    to_x = tl.where(counts & holds(present, sample, m, MODALITIES), to_x, 0.0)
                store_all(to_x, gradients[s][m], gradient_strides[s], sample, p, inside, SHAPE)
        program -= programs


def _configuration(features: list[list[Tensor]], noisy: bool, backward: bool) -> tuple[tuple[Shape, ...], int, int]:
    """The tile of each scale, for its ``M`` features, the threads of a program, the same for all scales, and the registers of each:
    threads enough for all channels of one pixel, or for 32 bytes of every channel, which is what memory delivers at least. A thread holds
    one pixel."""
    size = 0 if len(features[0]) <= 2 else 1 if len(features[0]) <= 4 else 2
    tiles, threads, registers = [], _WARP, 0
    for xs in features:
        item, last, channels = xs[0].element_size(), launches.channels_last(xs[0]), xs[0].shape[1]
        vector, block_c = launches.vector(xs), launches.power_of_two(max(4 if noisy else 1, channels))
        elements, limit = _TILES[backward, noisy][size]
        if last and backward:
            elements, limit = elements // 2, _REGISTERS
        held = min(elements, block_c)
        least = min(8, elements // held) * _WARP  # a tile of few channels is no smaller
        if last:
            held = launches.held_side_by_side(held, block_c, vector, item)
        needed = block_c * (1 if last else launches.SECTOR_BYTES // item) // held
        threads, registers = max(threads, least, needed), max(registers, limit)
        tiles.append((xs, last, vector, block_c, held))
    threads = min(threads, launches.power_of_two(65536 // registers + 1) // 2)
    shapes = []
    for xs, last, vector, block_c, held in tiles:
        channels, pixels, wide = xs[0].shape[1], xs[0].shape[2], xs[0].dtype == torch.float64
        block_p = max(1, min(launches.power_of_two(pixels), threads * held // block_c))
        run = min(held, max(vector, 4 if noisy else 1)) if last else held
        shapes.append(Shape(channels, last, vector, launches.far(xs), wide, block_c, block_p, held, run))
    return tuple(shapes), threads, registers


class _Plan(NamedTuple):
    """What shapes and strides decide."""

    in_place: bool  # the features are read where they are, else copied
    shapes: tuple[Shape, ...]
    threads: int
    registers: int  # of each
    programs: int
    strides: tuple[Any, ...]
    gradient_strides: tuple[Any, ...]
    pixels: tuple[int, ...]


def _plan(features: list[Tensor], scales: int, noisy: bool, backward: bool) -> _Plan:
    channels = max(x.shape[1] for x in features)
    launches.check_pixels(features, "softmax_fisher")
    if channels > _MOST_CHANNELS:
        raise ValueError(f"softmax_fisher: backend 'triton' takes at most {_MOST_CHANNELS} channels, got {channels}")
    by_scale = _laid_out(features, scales)
    shapes, threads, registers = _configuration(by_scale, noisy, backward)
    gradients = [empty_gradient(xs[0]) for xs in by_scale] if backward else []
    return _Plan(
        all(a is b for s, xs in enumerate(by_scale) for a, b in zip(xs, features[s::scales], strict=True)),
        shapes,
        threads,
        registers,
        sum(shape.programs(xs[0]) for shape, xs in zip(shapes, by_scale, strict=True)),
        tuple(launches.strides(xs, shape) for xs, shape in zip(by_scale, shapes, strict=True)),
        # Dense tensors of one shape and layout: one pair of strides per scale.
        tuple(launches.strides([x], shape)[0] for x, shape in zip(gradients, shapes, strict=False)),
        tuple(xs[0].shape[2] for xs in by_scale),
    )


def _laid_out(features: list[Tensor], scales: int) -> list[list[Tensor]]:
    """By scale, as the kernels read them."""
    return [launches.in_one_layout(features[s::scales]) for s in range(scales)]


def _prepared(problem: Problem, backward: bool) -> tuple[list[list[Tensor]], _Plan, tuple[Any, ...], dict[str, Any]]:
    """The features by scale, as the kernels read them, the plan, and the arguments and constants that the large kernels share."""
    features, masks, present, sigma, samples, seed, _, eps, _ = problem
    scales, noisy = len(features) // len(sigma), tuple([s > 0 for s in sigma])
    signature = ("softmax_fisher", backward, noisy, launches.signature(features))
    plan = launches.planned(signature, lambda: _plan(features, scales, any(noisy), backward))
    by_scale = [features[s::scales] for s in range(scales)] if plan.in_place else _laid_out(features, scales)
    arguments = (
        tuple(map(tuple, by_scale)),
        plan.strides,
        tuple([m.contiguous() for m in masks]),
        None if present is None else present.contiguous(),
        tuple(map(launches.two_floats, sigma)),
        seed,
        samples,
        launches.two_floats(eps),
        plan.pixels,
        features[0].shape[0],
    )
    return by_scale, plan, arguments, {"SHAPES": plan.shapes, "NOISY": noisy}


def forward_launches(problem: Problem) -> tuple[Result, list[Launch]]:
    """The result of ``forward``, and the launches that fill it."""
    _, plan, arguments, constants = _prepared(problem, False)
    result, modalities, device = problem.empty_result(), problem.modalities, problem.features[0].device
    partial = result.information.new_empty((modalities, plan.programs))
    partial_counts = result.counts.new_empty(plan.programs, dtype=torch.int32) if problem.masks else None
    sums = (partial, partial_counts, problem.samples, plan.pixels, arguments[-1], plan.programs, *result)
    reduced = {"SHAPES": plan.shapes, "MODALITIES": modalities, "BLOCK": 1024}
    return result, [
        Launch(
            _forward_kernel, device, plan.programs, plan.threads, (*arguments, partial, partial_counts), constants, plan.registers
        ),
        Launch(_reduce_kernel, device, result.counts.numel(), 256, sums, reduced),
    ]


def backward_launches(problem: Problem, result: Result, upstream: Result) -> tuple[list[Tensor], list[Launch]]:
    """The gradients of ``backward``, and the launch that fills them."""
    by_scale, plan, arguments, constants = _prepared(problem, True)
    gradients = [[empty_gradient(x) for x in xs] for xs in by_scale]
    results = (upstream.information.contiguous(), result.counts.contiguous(), tuple(map(tuple, gradients)), plan.gradient_strides)
    constants["DETACH"] = problem.detach_reference
    flat = [xs[m] for m in range(problem.modalities) for xs in gradients]
    return flat, [
        Launch(
            _backward_kernel,
            problem.features[0].device,
            plan.programs,
            plan.threads,
            (*arguments, *results),
            constants,
            plan.registers,
        )
    ]


def forward(problem: Problem) -> Result:
    return launches.run(*forward_launches(problem.flat()))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    return problem.shaped(launches.run(*backward_launches(problem.flat(), result, upstream)))

"""``modality_cross_entropy`` in Triton. Definitions: ``backends/reference/modality_cross_entropy.py``. Per pixel of class y, with class
weights w and label smoothing s over C classes, logits X_m of the present modalities and their mean R::

    t_c = (1 - s) w_y [c = y] + s / C w_c,  T = sum_c t_c,  p_m = softmax_c(X_m),  q = softmax_c(R),  g_m = T p_m - t
    ce_m = -sum_c t_c log p_mc,  ce = -sum_c t_c log q_c,  I_m = sum_c g_mc^2 / (ce_m + eps)

Exponentials are relative to the largest logit of a pixel. The sums leave y out, S = sum e and Q = sum e^2 over the others, so that nothing
cancels where y is all but certain::

    -log p_y = log(1 + S / e_y)        1 - p_y = S / (S + e_y)        sum_c g_c^2 = T^2 (S^2 + Q) / (S + e_y)^2    (no smoothing)

Memory: the forward kernel reads every logit and target once and writes one number per tile and sum; the backward kernel reads them once and
writes every gradient once. A second, small kernel adds up the tiles in order.

Work: a program holds a tile of all classes of a few pixels of all modalities in registers. With few classes a thread holds whole pixels,
and sums stay in the thread: where pixels lie side by side neighbouring lanes read neighbours, and no class is padded; where channels do,
the tile goes through shared memory first. With more, lanes of a warp share a pixel, as in ``softmax_fisher``. Sizes: ``_configuration``."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from modreg_fast.backends.layout import empty_in_layout, layout_of
from modreg_fast.backends.reference.modality_cross_entropy import Problem, Result
from modreg_fast.backends.triton import launches
from modreg_fast.backends.triton.launches import Launch, Shape
from modreg_fast.backends.triton.tiles import (
    gathered,
    highest,
    holds,
    inside_rows,
    load_all,
    load_parts,
    locate,
    number,
    ordered_sum,
    over_channels,
    part_channels,
    programs_of,
    store_part,
    widened,
)

_MOST_CHANNELS = 2**16
_LOG2_E = tl.constexpr(1.4426950408889634)

# Numbers that a thread with whole pixels holds at most: the logits of all modalities, their mean, with smoothing t; by whether channels lie
# side by side. 255 registers hold them without a spill (tests/test_triton_compiled.py); 168 hold a few, and half as many threads more fit.
_MOST_HELD = {False: 160, True: 128}
_FEW_HELD = 100
_THREADS = 32  # where they are enough, as in softmax_fisher: sums over a tile have barriers


# ---- the target of a tile ----


@triton.jit
def _uniform(weight, uniform, p, SHAPE: tl.constexpr):
    """``s / C w_c`` by parts, 0 past the last class. Where lanes share a pixel, weights take the way of the logits, as if pixels had their
    own: else the compiler would lay out the whole tile as suits the weights."""
    parts, cs = (), part_channels(SHAPE)
    for i in tl.static_range(len(cs)):
        inside = cs[i] < SHAPE.channels
        if weight is None:
            w = tl.where(inside, 1.0, 0.0)
        elif SHAPE.whole:
            w = tl.load(weight + cs[i], mask=inside, other=0.0)
        elif SHAPE.channels_last:
            w = load_all(weight, (0, 0), 0, p, p >= 0, SHAPE)
        else:
            w = tl.load(weight + cs[i], mask=inside, other=0.0)
            w = gathered(tl.broadcast_to(w, (SHAPE.held, SHAPE.block_p, SHAPE.block_c // SHAPE.held)), SHAPE)
        parts = parts + (number(uniform, SHAPE) * widened(w, SHAPE),)  # type: ignore[assignment]
    return parts


@triton.jit
def _target(target, weight, ignore_index, own_share, uniform, sample, p, pixels, SHAPE: tl.constexpr, SMOOTH: tl.constexpr):
    """Per pixel whether it counts, its class y, T, t_y and w_y, the last three NaN where the target is no class; with smoothing the parts
    of t without what y has for its own."""
    within = inside_rows(p, pixels, SHAPE)
    y = tl.load(target + sample * pixels + p, mask=within, other=0).to(tl.int64)
    valid = within & (y != ignore_index)
    known = (y >= 0) & (y < SHAPE.channels)
    y = tl.where(known, y, 0).to(tl.int32)
    w = tl.where(known, 1.0, float("nan")).to(tl.float64 if SHAPE.wide else tl.float32)
    if weight is not None:
        w *= widened(tl.load(weight + y, mask=valid, other=1.0), SHAPE)
    w = w[None, :, None]
    total, t_y, ts = w, w, ()
    if SMOOTH:
        own, ts = number(own_share, SHAPE) * w, _uniform(weight, uniform, p, SHAPE)
        total, t_y = own, own + number(uniform, SHAPE) * w
        for i in tl.static_range(len(ts)):
            total += over_channels(ts[i])
    return valid[None, :, None], y[None, :, None], total, t_y, w, ts


# ---- sums over the classes of a pixel, over the parts of its tile ----


@triton.jit
def _read(logits, strides, present, sample, p, within, SHAPE: tl.constexpr, MODALITIES: tl.constexpr):
    """The parts of every modality, 0 where it is absent, -inf past the last class; the share of a modality in the mean."""
    read, xs = (), ()
    number_held = tl.cast(0.0, tl.float64 if SHAPE.wide else tl.float32)
    for m in tl.static_range(MODALITIES):  # all are on their way before the first is waited for
        has = holds(present, sample, m, MODALITIES)
        read = read + (load_parts(logits[m], strides[m], sample, p, within & has, SHAPE),)  # type: ignore[assignment]
        number_held += has.to(number_held.dtype)
    for m in tl.static_range(MODALITIES):
        parts = ()
        for i in tl.static_range(len(read[m])):
            x = widened(gathered(read[m][i], SHAPE), SHAPE)
            if SHAPE.block_c != SHAPE.channels:
                x = tl.where(part_channels(SHAPE)[i] < SHAPE.channels, x, -float("inf"))
            parts = parts + (x,)  # type: ignore[assignment]
        xs = xs + (parts,)  # type: ignore[assignment]
    return xs, 1.0 / tl.maximum(number_held, 1.0)


@triton.jit
def _added(xs):
    """The parts of the sum over modalities."""
    parts = xs[0]
    for m in tl.static_range(1, len(xs)):
        more = ()
        for i in tl.static_range(len(parts)):
            more = more + (parts[i] + xs[m][i],)  # type: ignore[assignment]
        parts = more
    return parts


@triton.jit
def _at(xs, y, SHAPE: tl.constexpr):
    """Of the parts ``xs``: what the class ``y`` has, and the parts without it, -inf in its place."""
    cs, others = part_channels(SHAPE), ()
    found = tl.full((1, SHAPE.block_p, 1), 0.0, xs[0].dtype)
    for i in tl.static_range(len(cs)):
        found += over_channels(tl.where(cs[i] == y, xs[i], 0.0))
        others = others + (tl.where(cs[i] == y, -float("inf"), xs[i]),)  # type: ignore[assignment]
    return found, others


@triton.jit
def _parted(xs, y, SHAPE: tl.constexpr, MODALITIES: tl.constexpr):
    """``_at`` of every modality, and the sums over modalities of both."""
    at, others = (), ()
    for m in tl.static_range(MODALITIES):
        x_y, parts = _at(xs[m], y, SHAPE)
        at, others = at + (x_y,), others + (parts,)  # type: ignore[assignment]
    total_y = at[0]  # type: ignore[misc]
    for m in tl.static_range(1, MODALITIES):
        total_y += at[m]
    return at, others, total_y, _added(others)


@triton.jit
def _sums(xs, x_y, scale, y, ts, SHAPE: tl.constexpr, SMOOTH: tl.constexpr):
    """Of the logits ``x_y`` of the class y and ``xs`` of the others, times ``scale``: the largest logit; log e and e of y; S and Q; with
    smoothing sum_c t_c log e_c over the others."""
    cs = part_channels(SHAPE)
    top = x_y
    for i in tl.static_range(len(cs)):
        top = tl.maximum(top, highest(xs[i]))
    rest = tl.zeros_like(top)
    square, spread = rest, rest
    for i in tl.static_range(len(cs)):
        shifted = xs[i] - top
        e = tl.exp2(shifted * (scale * _LOG2_E))
        rest += over_channels(e)
        square += over_channels(e * e)
        if SMOOTH:
            t_z = tl.where((cs[i] == y) | (cs[i] >= SHAPE.channels), 0.0, ts[i] * (shifted * scale))
            spread += over_channels(t_z)
    z_y = (x_y - top) * scale
    return top, z_y, tl.exp2(z_y * _LOG2_E), rest, square, spread


@triton.jit
def _cross_entropy(total, t_y, z_y, e_y, rest, spread):
    """``T log(S + e_y) - sum_c t_c log e_c``, of which no term is below 0; the logarithm with the digits that 1 + S loses."""
    s = rest + (e_y - 1.0)
    u = 1.0 + s
    return total * tl.where(u == 1.0, s, tl.log(u) * (s / (u - 1.0))) - t_y * z_y - spread


@triton.jit
def _gradient(x, top, scale, inverse, c, y, total, t):
    """Of a part of the others, with smoothing: p and g; both 0 at y."""
    p = tl.exp2((x - top) * (scale * _LOG2_E)) * inverse
    return p, tl.fma(total, p, -tl.where(c == y, 0.0, t))


@triton.jit
def _moments(xs, top, e_y, rest, square, y, total, t_y, ts, SHAPE: tl.constexpr, SMOOTH: tl.constexpr):
    """Of a modality: ``sum_c g^2``, ``sum_c p g``, g_y, and the last less the one before."""
    inverse = 1.0 / (rest + e_y)
    p_y = e_y * inverse
    if SMOOTH:  # g may be small for every class, where expanding the square would cancel
        cs = part_channels(SHAPE)
        g_y = tl.fma(total, p_y, -t_y)
        n, pg = g_y * g_y, p_y * g_y
        for i in tl.static_range(len(cs)):
            p, g = _gradient(xs[i], top, 1.0, inverse, cs[i], y, total, ts[i])
            n += over_channels(g * g)
            pg += over_channels(p * g)
        return n, pg, g_y, g_y - pg
    else:
        others, squares = rest * inverse, square * inverse * inverse
        # The last not as the difference that it is: both are all but equal where y is certain.
        both = total * (others * others + squares)
        return total * both, total * (squares - p_y * others), -total * others, -both


# ---- the kernels ----


@triton.jit(do_not_specialize=["ignore_index", "pixels", "batch"])
def _forward_kernel(
    logits,
    strides,
    target,
    weight,
    present,
    ignore_index,
    own_share,
    uniform,
    eps,
    pixels,
    batch,
    partial,
    SHAPES: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """To ``partial (2 M + 2, programs)``: per tile the sums of ce_m, of I_m, of ce and of w_y."""
    SHAPE: tl.constexpr = SHAPES[0]
    MODALITIES: tl.constexpr = len(logits)
    sample, p = locate(tl.program_id(0), pixels, SHAPE)
    xs, share = _read(logits, strides, present, sample, p, inside_rows(p, pixels, SHAPE), SHAPE, MODALITIES)
    valid, y, total, t_y, w, ts = _target(target, weight, ignore_index, own_share, uniform, sample, p, pixels, SHAPE, SMOOTH)
    x_y, others, mean_y, mean = _parted(xs, y, SHAPE, MODALITIES)
    programs = tl.num_programs(0).to(tl.int64)
    to = partial + tl.program_id(0)
    some = tl.full((), False, tl.int1)
    for m in tl.static_range(MODALITIES):
        has = holds(present, sample, m, MODALITIES)
        some = some | has
        top, z_y, e_y, rest, square, spread = _sums(others[m], x_y[m], 1.0, y, ts, SHAPE, SMOOTH)
        ce = _cross_entropy(total, t_y, z_y, e_y, rest, spread)
        n, pg, g_y, g_y_pg = _moments(others[m], top, e_y, rest, square, y, total, t_y, ts, SHAPE, SMOOTH)
        tl.store(to + m * programs, tl.sum(tl.where(valid & has, ce, 0.0)))
        tl.store(to + (MODALITIES + m) * programs, tl.sum(tl.where(valid & has, n / (ce + number(eps, SHAPE)), 0.0)))
    top, z_y, e_y, rest, square, spread = _sums(mean, mean_y, share, y, ts, SHAPE, SMOOTH)
    ce = _cross_entropy(total, t_y, z_y, e_y, rest, spread)
    tl.store(to + 2 * MODALITIES * programs, tl.sum(tl.where(valid & some, ce, 0.0)))
    tl.store(to + (2 * MODALITIES + 1) * programs, tl.sum(tl.where(valid & some, w, 0.0)))


@triton.jit(do_not_specialize=["pixels", "batch", "programs"])
def _reduce_kernel(
    partial,
    pixels,
    batch,
    programs,
    cross_entropy,
    joint,
    information,
    weights,
    SHAPES: tl.constexpr,
    MODALITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``partial`` to the results; one program per sum and sample."""
    k, sample = tl.program_id(0) // batch, tl.program_id(0) % batch
    start, tiles, count = programs_of(sample, (pixels,), batch, SHAPES)
    total = ordered_sum(partial + k.to(tl.int64) * programs + start, tiles, BLOCK)
    if k < MODALITIES:
        tl.store(cross_entropy + tl.program_id(0), total)
    elif k < 2 * MODALITIES:
        tl.store(information + (tl.program_id(0) - MODALITIES * batch), total)
    elif k == 2 * MODALITIES:
        tl.store(joint + sample, total)
    else:
        tl.store(weights + sample, total)


@triton.jit(do_not_specialize=["ignore_index", "pixels", "batch"])
def _backward_kernel(
    logits,
    strides,
    target,
    weight,
    present,
    ignore_index,
    own_share,
    uniform,
    eps,
    pixels,
    batch,
    to_cross_entropy,
    to_joint,
    to_information,
    gradients,
    gradient_strides,
    SHAPES: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """With the upstream gradients u, j and v of ce_m, ce and I_m, F = ce_m + eps and N = sum g^2::

    dX_m = (u - v N / F^2) g  +  2 v T / F p (g - sum p g)  +  j / M (T q - t)

    Without smoothing that is ``a e + b e^2 + r e_R`` for every class but y, with coefficients of a pixel; there it is computed from the
    sums of the others."""
    SHAPE: tl.constexpr = SHAPES[0]
    MODALITIES: tl.constexpr = len(logits)
    sample, p = locate(tl.program_id(0), pixels, SHAPE)
    within = inside_rows(p, pixels, SHAPE)
    xs, share = _read(logits, strides, present, sample, p, within, SHAPE, MODALITIES)
    valid, y, total, t_y, w, ts = _target(target, weight, ignore_index, own_share, uniform, sample, p, pixels, SHAPE, SMOOTH)
    x_y, others, mean_y, mean = _parted(xs, y, SHAPE, MODALITIES)
    cs = part_channels(SHAPE)
    top_r, z_y, e_y, rest, square, spread = _sums(mean, mean_y, share, y, ts, SHAPE, SMOOTH)
    inverse_r = 1.0 / (rest + e_y)
    joint = share * tl.load(to_joint + sample).to(total.dtype)
    joint_at_y = joint * (tl.fma(total, e_y * inverse_r, -t_y) if SMOOTH else -total * (rest * inverse_r))
    r = joint * total * inverse_r
    # Per modality what its gradients take; then channel by channel, so that little is held beside the logits.
    pulls = ()
    for m in tl.static_range(MODALITIES):
        top, z_y, e_y, rest, square, spread = _sums(others[m], x_y[m], 1.0, y, ts, SHAPE, SMOOTH)
        ce = _cross_entropy(total, t_y, z_y, e_y, rest, spread)
        n, pg, g_y, g_y_pg = _moments(others[m], top, e_y, rest, square, y, total, t_y, ts, SHAPE, SMOOTH)
        inverse, inverse_f = 1.0 / (rest + e_y), 1.0 / (ce + number(eps, SHAPE))
        v = tl.load(to_information + m * batch + sample).to(total.dtype) * inverse_f
        first = tl.load(to_cross_entropy + m * batch + sample).to(total.dtype) - v * n * inverse_f  # of g
        second = 2.0 * v * total  # of p (g - sum p g)
        at_y = first * g_y + second * (e_y * inverse) * g_y_pg + joint_at_y
        if SMOOTH:
            pulls = pulls + ((top, at_y, first, second, pg, inverse),)  # type: ignore[assignment]
        else:
            a, b = (first * total - second * pg) * inverse, second * total * inverse * inverse
            pulls = pulls + ((top, at_y, a, b),)  # type: ignore[assignment]
    # In other words: the compiler would keep the comparisons of y with all channels from their first time on.
    y_again = y + tl.where(valid, 0, -SHAPE.channels)
    for i in tl.static_range(len(cs)):
        if SMOOTH:
            q, g_r = _gradient(mean[i], top_r, share, inverse_r, cs[i], y, total, ts[i])
            shared = joint * g_r
        else:
            shared = r * tl.exp2((mean[i] - top_r) * (share * _LOG2_E))
        for m in tl.static_range(MODALITIES):
            counts = valid & holds(present, sample, m, MODALITIES)
            pull = pulls[m]  # type: ignore[var-annotated]
            if SMOOTH:
                p_c, g = _gradient(others[m][i], pull[0], 1.0, pull[5], cs[i], y, total, ts[i])
                to_x = pull[2] * g + pull[3] * p_c * (g - pull[4]) + shared
            else:
                e = tl.exp2((others[m][i] - pull[0]) * _LOG2_E)
                to_x = tl.fma(e, tl.fma(pull[3], e, pull[2]), shared)
            to_x = tl.where(cs[i] == y_again, pull[1], to_x)
            store_part(tl.where(counts, to_x, 0.0), i, gradients[m], gradient_strides, sample, p, within, SHAPE)


# ---- launches ----


def _configuration(xs: list[Tensor], smooth: bool) -> tuple[Shape, int, int]:
    """The tile, the threads of a program, and the registers of each."""
    item, last, channels, pixels = xs[0].element_size(), launches.channels_last(xs[0]), xs[0].shape[1], xs[0].shape[2]
    wide, far, vector, modalities = xs[0].dtype == torch.float64, launches.far(xs), launches.vector(xs), len(xs)
    block_c = launches.power_of_two(channels)
    sets = modalities + (2 if smooth else 1)
    held = (block_c if last else channels) * sets * (2 if wide else 1)
    if held <= _MOST_HELD[last]:
        block_p = min(_THREADS, launches.power_of_two(pixels))
        block_c, vector = (block_c, vector) if last else (channels, 1)
        shape = Shape(channels, last, vector, far, wide, block_c, block_p, block_c, block_c, whole=True)
        return shape, _THREADS, 168 if held <= _FEW_HELD else 255
    elements = min(block_c, 32 if sets <= 3 else 16 if sets <= 5 else 8 if sets <= 9 else 4)
    if last:
        elements = launches.held_side_by_side(elements, block_c, vector, item)
    needed = block_c * (1 if last else launches.SECTOR_BYTES // item) // elements
    threads = min(launches.MOST_THREADS, max(_THREADS, needed))
    block_p = max(1, min(launches.power_of_two(pixels), threads * elements // block_c))
    run = min(elements, vector) if last else elements
    return (
        Shape(channels, last, vector, far, wide, block_c, block_p, elements, run),
        threads,
        min(176 if elements == 32 else 168, 65536 // threads),
    )


def _prepared(problem: Problem, backward: bool) -> tuple[list[Tensor], Launch]:
    """The logits as the kernels read them, and a launch that has all but what one kernel alone takes."""
    launches.check_pixels(problem.logits, "modality_cross_entropy")
    if problem.classes > _MOST_CHANNELS:
        raise ValueError(
            f"modality_cross_entropy: backend 'triton' takes at most {_MOST_CHANNELS} channels, got {problem.classes}"
        )
    xs = launches.in_one_layout(problem.logits)
    shape, threads, registers = _configuration(xs, problem.label_smoothing > 0)
    smoothing = problem.label_smoothing
    arguments = (
        tuple(xs),
        launches.strides(xs, shape),
        problem.target.contiguous(),
        None if problem.weight is None else problem.weight.to(problem.dtype).contiguous(),
        None if problem.present is None else problem.present.contiguous(),
        problem.ignore_index,
        launches.two_floats(1 - smoothing),
        launches.two_floats(smoothing / problem.classes),
        launches.two_floats(problem.eps),
        xs[0].shape[2],
        xs[0].shape[0],
    )
    constants = {"SHAPES": (shape,), "SMOOTH": smoothing > 0}
    kernel = _backward_kernel if backward else _forward_kernel
    return xs, Launch(kernel, xs[0].device, shape.programs(xs[0]), threads, arguments, constants, registers)


def forward_launches(problem: Problem) -> tuple[Result, list[Launch]]:
    """The result of ``forward``, and the launches that fill it."""
    xs, main = _prepared(problem, False)
    result, sums, (pixels, batch) = problem.empty_result(), 2 * len(xs) + 2, main.arguments[9:11]
    partial = result.joint.new_empty((sums, main.programs))
    reduction = Launch(
        _reduce_kernel,
        main.device,
        sums * batch,
        256,
        (partial, pixels, batch, main.programs, *result),
        {"SHAPES": main.constants["SHAPES"], "MODALITIES": len(xs), "BLOCK": 1024},
    )
    return result, [replace(main, arguments=(*main.arguments, partial)), reduction]


def backward_launches(problem: Problem, upstream: Result) -> tuple[list[Tensor], list[Launch]]:
    """The gradients of ``backward``, and the launch that fills them."""
    xs, main = _prepared(problem, True)
    gradients = [empty_in_layout(x, layout_of(x)) for x in xs]
    # Dense tensors of one shape and layout: one pair of strides.
    (strides,) = launches.strides(gradients[:1], main.constants["SHAPES"][0])
    above = [x.contiguous() for x in (upstream.cross_entropy, upstream.joint, upstream.information)]
    return gradients, [replace(main, arguments=(*main.arguments, *above, tuple(gradients), strides))]


def forward(problem: Problem) -> Result:
    problem = problem.flat()
    # Of the interpreter; a GPU would have to be waited for.
    if problem.target.device.type == "cpu" and (error := problem.out_of_range()):
        raise error
    return launches.run(*forward_launches(problem))


def backward(problem: Problem, result: Result, upstream: Result) -> list[Tensor]:
    return problem.shaped(launches.run(*backward_launches(problem.flat(), upstream)))

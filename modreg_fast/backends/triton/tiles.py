"""What the kernels share: how work is cut into tiles, and how tiles are read and written.

A tile is ``block_c`` channels of ``block_p`` neighbouring pixels of one sample, of tensors of one shape. The programs of a launch are
numbered shape by shape, sample by sample, tile by tile. Kernels take their tensors as tuples of arguments, so that a launch copies
nothing to the device, and the body of a kernel is instantiated once per shape, with a tile of its own (``SHAPE``)."""

import triton
import triton.language as tl


@triton.jit
def locate(program, pixels, SHAPE: tl.constexpr):
    """The sample and the pixels of a tile, from the number of its program among those of its shape."""
    VECTOR: tl.constexpr = SHAPE.vector
    tiles = tl.cdiv(pixels, SHAPE.block_p)
    p = program % tiles * SHAPE.block_p + tl.arange(0, SHAPE.block_p)
    # A thread gets as many neighbours as the alignment of the first one allows. Contiguous they are all: of dimensions of which none
    # is, versions of Triton give the lanes of a warp to different ones.
    return (program // tiles).to(tl.int64), tl.multiple_of(p, VECTOR)


@triton.jit
def inside_rows(p, pixels, SHAPE: tl.constexpr):
    """Which pixels of a tile there are."""
    if SHAPE.channels_last:
        return p < pixels
    else:
        return p < pixels // SHAPE.vector * SHAPE.vector


@triton.jit
def counting_pixels(mask, sample, p, within, pixels):
    """Which pixels of a tile count."""
    if mask is None:
        return within
    else:
        return within & (tl.load(mask + sample * pixels + p, mask=within, other=0) != 0)


@triton.jit
def pointers(tensor, strides, sample, c, p, SHAPE: tl.constexpr):
    """Of the elements of a tile, channels ``c`` and pixels ``p`` broadcast against each other. The strides come in units of
    ``SHAPE.vector``: so the compiler sees what divides the offsets."""
    first = tensor + sample * strides[0] * SHAPE.vector
    row = tl.cast(strides[1], tl.int64 if SHAPE.far else tl.int32) * SHAPE.vector
    if SHAPE.channels_last:
        return first + (c + p * row)
    else:
        return first + (c * row + p)


@triton.jit
def widened(x, SHAPE: tl.constexpr):
    """In the type of the arithmetic. From 16 bits by way of float32, as Triton converts reliably."""
    if x.dtype == tl.float64:
        return x
    elif SHAPE.wide:
        return x.to(tl.float32).to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, tensor):
    """In the type of what ``tensor`` points to, from that of the arithmetic."""
    if tensor.dtype.element_ty == tl.float64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32).to(tensor.dtype.element_ty)


@triton.jit
def read(tensor, strides, sample, c, p, inside, SHAPE: tl.constexpr):
    """The tile of channels ``c`` and pixels ``p``, widened; 0 where it is not ``inside``."""
    return widened(tl.load(pointers(tensor, strides, sample, c, p, SHAPE), mask=inside, other=0.0), SHAPE)


@triton.jit
def write(x, tensor, strides, sample, c, p, inside, SHAPE: tl.constexpr):
    tl.store(pointers(tensor, strides, sample, c, p, SHAPE), narrowed(x, tensor), mask=inside)


@triton.jit
def channels(SHAPE: tl.constexpr, DIVISOR: tl.constexpr = 1):
    """The channels of a tile of all of them, or the groups of ``DIVISOR`` neighbours, in its three dimensions (held, pixels, lanes).

    A thread holds all of the first dimension: one or more runs of neighbours, the first of each run, then the second of each and so on."""
    HELD: tl.constexpr = SHAPE.held // DIVISOR
    RUN: tl.constexpr = SHAPE.run // DIVISOR
    LANES: tl.constexpr = SHAPE.block_c // SHAPE.held
    h, lane = tl.arange(0, HELD)[:, None, None], tl.arange(0, LANES)[None, None, :]
    return h % (HELD // RUN) * (LANES * RUN) + lane * RUN + h // (HELD // RUN)


@triton.jit
def over_channels(x):
    """The sum, per pixel."""
    return tl.sum(tl.sum(x, 0), 1)[None, :, None]


@triton.jit
def highest(x):
    """The maximum, per pixel."""
    return tl.max(tl.max(x, 0), 1)[None, :, None]


@triton.jit
def _run(r: tl.constexpr, SHAPE: tl.constexpr):
    """The channels of one run, where they lie side by side."""
    WIDTH: tl.constexpr = SHAPE.block_c // SHAPE.held * SHAPE.run
    return (r * WIDTH + tl.arange(0, WIDTH))[None, :]


@triton.jit
def _interleaved(x, y):
    """Two ``(pixels, neighbours, n)`` to one ``(pixels, neighbours, 2 n)``."""
    return tl.join(x, y).reshape(x.shape[0], x.shape[1], x.shape[2] * 2)


@triton.jit
def _halves(x):
    """The inverse of ``_interleaved``."""
    return tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2))


@triton.jit
def load_all(tensor, strides, sample, p, inside, SHAPE: tl.constexpr):
    """A tile of all channels as it lies in memory, of pixels ``p``; 0 where they are not ``inside`` and past the last channel.

    Channels side by side are read run by run, as tiles of two dimensions: of one with more, versions of Triton choose different
    dimensions for the lanes of a warp. The compiler joins in registers what threads hold of each."""
    if SHAPE.channels_last:
        RUNS: tl.constexpr = SHAPE.held // SHAPE.run
        parts = ()
        for r in tl.static_range(RUNS):
            c = _run(r, SHAPE)
            at = pointers(tensor, strides, sample, c, p[:, None], SHAPE)
            x = tl.load(at, mask=(c < SHAPE.channels) & inside[:, None], other=0.0)
            parts = parts + (x.reshape(x.shape[0], x.shape[1], 1),)  # type: ignore[assignment]
        for _ in tl.static_range(RUNS.bit_length() - 1):  # to (pixels, neighbours, runs)
            joined = ()
            for r in tl.static_range(len(parts) // 2):
                joined = joined + (_interleaved(parts[r], parts[r + len(parts) // 2]),)  # type: ignore[assignment]
            parts = joined
        return parts[0].reshape(p.shape[0], SHAPE.block_c // SHAPE.held, SHAPE.held).permute(2, 0, 1)  # type: ignore[misc]
    else:
        c = channels(SHAPE)
        at = pointers(tensor, strides, sample, c, p[None, :, None], SHAPE)
        return tl.load(at, mask=(c < SHAPE.channels) & inside[None, :, None], other=0.0)


@triton.jit
def store_all(x, tensor, strides, sample, p, inside, SHAPE: tl.constexpr):
    """The counterpart of ``load_all``."""
    x = narrowed(x, tensor)
    if SHAPE.channels_last:
        RUNS: tl.constexpr = SHAPE.held // SHAPE.run
        parts = (x.permute(1, 2, 0).reshape(p.shape[0], SHAPE.block_c // RUNS, RUNS),)
        for _ in tl.static_range(RUNS.bit_length() - 1):
            firsts, seconds = (), ()
            for r in tl.static_range(len(parts)):
                one, other = _halves(parts[r])
                firsts, seconds = firsts + (one,), seconds + (other,)  # type: ignore[assignment]
            parts = firsts + seconds  # type: ignore[assignment]
        for r in tl.static_range(RUNS):
            c = _run(r, SHAPE)
            at = pointers(tensor, strides, sample, c, p[:, None], SHAPE)
            part = parts[r].reshape(p.shape[0], c.shape[1])
            tl.store(at, part, mask=(c < SHAPE.channels) & inside[:, None])
    else:
        c = channels(SHAPE)
        at = pointers(tensor, strides, sample, c, p[None, :, None], SHAPE)
        tl.store(at, x, mask=(c < SHAPE.channels) & inside[None, :, None])


@triton.jit
def holds(present, sample, m, MODALITIES: tl.constexpr):
    """Whether the sample has modality ``m``."""
    if present is None:
        return tl.full((), True, tl.int1)
    else:
        return tl.load(present + sample * MODALITIES + m) != 0


@triton.jit
def part_channels(SHAPE: tl.constexpr):
    """The channels of the parts of a tile. Where a thread holds whole pixels that lie side by side, the parts have 8 or 4, 2, 1 channels,
    and together as many as there are; else there is one part, of all."""
    if SHAPE.whole and SHAPE.channels_last:
        return (tl.arange(0, SHAPE.block_c)[:, None, None],)
    elif SHAPE.whole:
        parts = ()
        for i in tl.static_range(SHAPE.channels // 8):
            parts = parts + ((8 * i + tl.arange(0, 8))[:, None, None],)  # type: ignore[assignment]
        for bit in tl.static_range(3):
            if SHAPE.channels >> bit & 1:
                c = SHAPE.channels // 8 * 8 + SHAPE.channels % (1 << bit) + tl.arange(0, 1 << bit)
                parts = parts + (c[:, None, None],)  # type: ignore[assignment]
        return parts
    else:
        return (channels(SHAPE),)


@triton.jit
def load_parts(tensor, strides, sample, p, inside, SHAPE: tl.constexpr):
    """``load_all`` by parts."""
    if SHAPE.whole and SHAPE.channels_last:
        c = tl.arange(0, SHAPE.block_c)[None, :]
        at = pointers(tensor, strides, sample, c, p[:, None], SHAPE)
        x = tl.load(at, mask=(c < SHAPE.channels) & inside[:, None], other=0.0)
        return (tl.trans(x)[:, :, None],)
    elif SHAPE.whole:
        parts, cs = (), part_channels(SHAPE)
        for i in tl.static_range(len(cs)):
            at = pointers(tensor, strides, sample, cs[i], p[None, :, None], SHAPE)
            parts = parts + (tl.load(at, mask=inside[None, :, None], other=0.0),)  # type: ignore[assignment]
        return parts
    else:
        return (load_all(tensor, strides, sample, p, inside, SHAPE),)


@triton.jit
def store_part(x, i: tl.constexpr, tensor, strides, sample, p, inside, SHAPE: tl.constexpr):
    """The counterpart of ``load_parts`` for part ``i``."""
    if SHAPE.whole and SHAPE.channels_last:
        c = tl.arange(0, SHAPE.block_c)[None, :]
        at = pointers(tensor, strides, sample, c, p[:, None], SHAPE)
        x = tl.trans(narrowed(x, tensor).reshape(SHAPE.block_c, SHAPE.block_p))
        tl.store(at, x, mask=(c < SHAPE.channels) & inside[:, None])
    elif SHAPE.whole:
        at = pointers(tensor, strides, sample, part_channels(SHAPE)[i], p[None, :, None], SHAPE)
        tl.store(at, narrowed(x, tensor), mask=inside[None, :, None])
    else:
        store_all(x, tensor, strides, sample, p, inside, SHAPE)


@triton.jit
def gathered(x, SHAPE: tl.constexpr):
    """A tile of all channels as it was loaded, made such that a thread holds channels of one pixel instead of 16 bytes of pixels, or all
    channels of a pixel instead of 16 bytes of them.

    That is an exchange through shared memory. Triton has no word for it, but a split needs its two parts in one thread."""
    if SHAPE.channels_last != SHAPE.whole:
        return x
    else:
        one, other = tl.split(tl.broadcast_to(x[:, :, :, None], x.shape + (2,)))
        return one


@triton.jit
def number(pair, SHAPE: tl.constexpr):
    """What ``two_floats`` took apart."""
    if SHAPE.wide:
        return tl.cast(pair[0], tl.float64) + tl.cast(pair[1], tl.float64)
    else:
        return pair[0]


@triton.jit
def programs_of(program, pixels, batch, SHAPES: tl.constexpr):
    """Where ``program``, the number of a shape times the batch plus that of a sample, finds the results of its tiles: the first of
    them, how many, and the number of pixels."""
    first, start = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    tiles, size = tl.cast(0, tl.int32), tl.cast(0, tl.int64)
    for s in tl.static_range(len(SHAPES)):
        of_shape = tl.cdiv(pixels[s], SHAPES[s].block_p)
        if s == program // batch:
            start, tiles, size = first + (program % batch).to(tl.int64) * of_shape, of_shape, tl.cast(pixels[s], tl.int64)
        first += of_shape.to(tl.int64) * batch
    return start, tiles, size


@triton.jit
def ordered_sum(terms, n, BLOCK: tl.constexpr):
    """The sum of ``n`` numbers in memory, always in the same order."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), terms.dtype.element_ty)
    for start in range(0, n, BLOCK):
        total += tl.load(terms + start + i, mask=start + i < n, other=0)
    return tl.sum(total, 0)

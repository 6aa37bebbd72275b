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
    # The compiler gives a thread as many neighbours as it may assume to be contiguous.
    return (program // tiles).to(tl.int64), tl.max_contiguous(p, VECTOR)


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
def spread(run: tl.constexpr, SHAPE: tl.constexpr):
    """Numbers from 0 to all channels, or to all groups of them, in the dimensions of a tile that holds all channels::

        (runs, neighbours in a run, pixels, lanes)        a thread holds the first two of a pixel

    A lane's runs lie ``lanes`` runs apart, so that neighbouring lanes read neighbouring runs."""
    RUNS: tl.constexpr = SHAPE.held // SHAPE.run
    LANES: tl.constexpr = SHAPE.block_c // SHAPE.held
    runs = tl.arange(0, RUNS)[:, None, None, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
    return runs * run + tl.arange(0, run)[None, :, None, None]


@triton.jit
def over_channels(x):
    """The sum, per pixel."""
    return tl.sum(tl.sum(tl.sum(x, 0), 0), 1)[None, None, :, None]


@triton.jit
def highest(x):
    """The maximum, per pixel."""
    return tl.max(tl.max(tl.max(x, 0), 0), 1)[None, None, :, None]


@triton.jit
def gathered(x, SHAPE: tl.constexpr):
    """A tile of all channels as it was loaded, made such that a thread holds channels of one pixel instead of 16 bytes of pixels.

    That is an exchange through shared memory. Triton has no word for it, but a split needs its two parts in one thread."""
    if SHAPE.channels_last:
        return x
    else:
        one, other = tl.split(tl.broadcast_to(x[:, :, :, :, None], x.shape + (2,)))
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

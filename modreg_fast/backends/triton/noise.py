"""The noise of ``docs/math.md`` inside a kernel: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, nothing stored."""

import triton
import triton.language as tl

from modreg_fast.backends.triton.tiles import channels

_TURN = tl.constexpr(2.0**-32 * 6.283185307179586)


@triton.jit
def fours(SHAPE: tl.constexpr):
    """Numbers of the blocks of four channels of a tile, where the threads need them; threads that share a block compute it each."""
    if SHAPE.held >= 4:
        return channels(SHAPE, 4)
    else:
        return tl.arange(0, SHAPE.block_c // 4)[None, None, :]


@triton.jit
def philox_words(seed, sample, p, pixels, tensor, draw, SHAPE: tl.constexpr):
    """Words 0 to 3 of the counter blocks of a tile: a block per four neighbouring channels, which get one word each."""
    blocks: tl.constexpr = (SHAPE.channels + 3) // 4
    g = (sample * blocks + fours(SHAPE)) * pixels + p[None, :, None]
    high = (g >> 32).to(tl.uint32)
    zero = high ^ high
    return tl.philox(seed, g.to(tl.uint32), high, zero + tensor, zero + draw)


@triton.jit
def _sine_cosine(word, SHAPE: tl.constexpr):
    """Of ``2 pi word / 2^32``. In float32 by polynomials on the nearest quarter turn (errors below 1 ULP; the library functions keep an
    array in memory for large arguments)."""
    if SHAPE.wide:
        angle = word.to(tl.float64) * _TURN
        return tl.sin(angle), tl.cos(angle)
    else:
        quarter = (word + 0x20000000) >> 30
        x = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _TURN  # in [-pi / 4, pi / 4]
        z = x * x
        a = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
        b = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
        odd = (quarter & 1) != 0
        sine, cosine = tl.where(odd, b, a), tl.where(odd, a, b)
        return tl.where((quarter & 2) != 0, -sine, sine), tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def _box_muller(a, b, SHAPE: tl.constexpr):
    """Two standard normals from two words: ``sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)``, u in (0, 1], v in [0, 1]."""
    u = a.to(tl.float64 if SHAPE.wide else tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt(-2.0 * tl.log(u))
    sine, cosine = _sine_cosine(b, SHAPE)
    return radius * cosine, radius * sine


@triton.jit
def standard_normal(seed, sample, p, pixels, tensor, draw, SHAPE: tl.constexpr):
    """The noise of a tile of all channels, at least 4, and pixels ``p``; past the last channel unused."""
    w0, w1, w2, w3 = philox_words(tl.load(seed), sample, p, pixels, tensor, draw, SHAPE)
    n0, n1 = _box_muller(w0, w1, SHAPE)
    n2, n3 = _box_muller(w2, w3, SHAPE)
    four = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # (.., pixels, .., c // 2 % 2, c % 2)
    LANES: tl.constexpr = SHAPE.block_c // SHAPE.held
    if SHAPE.held >= 4:
        RUNS: tl.constexpr = SHAPE.held // SHAPE.run
        runs = four.reshape(SHAPE.run // 4, RUNS, SHAPE.block_p, LANES, 2, 2)
        return runs.permute(0, 4, 5, 1, 2, 3).reshape(SHAPE.held, SHAPE.block_p, LANES)
    else:
        return four.reshape(SHAPE.block_p, LANES, SHAPE.held).permute(2, 0, 1)

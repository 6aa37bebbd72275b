"""Philox4x32-10 counter-based noise (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") in plain PyTorch.

Every backend draws the same bits: the standard normal that belongs to channel ``c``, pixel ``p`` of sample ``b`` of tensor
``t`` in draw ``n`` is word ``c % 4`` of the block whose key is the 64-bit seed and whose counter is ``(g_lo, g_hi, t, n)`` with
``g = (b * ceil(C / 4) + c // 4) * P + p``. It depends on the logical position alone, never on the memory layout.
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of 32-bit words held in int64."""
    low_half, high_half = a * (constant & 0xFFFF), a * (constant >> 16)
    return (high_half + (low_half >> 16)) >> 16, (a * constant) & _WORD


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32; words are int64 tensors that hold 32 bits each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _box_muller(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two standard normals from two words: ``sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)``, u in (0, 1], v in [0, 1]."""
    u = a.to(dtype) * 2.0**-32 + 2.0**-33
    angle = b.to(dtype) * (2.0**-32 * 2.0 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def standard_normal(shape: torch.Size, *, seed: Tensor, tensor: int, draw: int, dtype: torch.dtype) -> Tensor:
    """The noise of one tensor: ``shape`` is its ``(B, C, P)``, ``seed`` an int64 tensor with one element."""
    samples, channels, pixels = shape
    blocks = -(-channels // 4)
    g = torch.arange(samples * blocks * pixels, device=seed.device)
    constant = torch.zeros_like(g)
    words = philox4x32((g & _WORD, g >> 32, constant + tensor, constant + draw), (seed & _WORD, (seed >> 32) & _WORD))
    normals = (*_box_muller(words[0], words[1], dtype), *_box_muller(words[2], words[3], dtype))
    return (
        torch.stack(normals)
        .view(4, samples, blocks, pixels)
        .permute(1, 2, 0, 3)
        .reshape(samples, 4 * blocks, pixels)[:, :channels]
    )

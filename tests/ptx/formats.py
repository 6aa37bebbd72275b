"""PTX types, and floating-point arithmetic with exactly one rounding.

NumPy computes float32 and float64 ``+ - * /`` and ``sqrt`` as IEEE 754 asks for, to nearest. Everything else (fused multiply-add, the
16-bit formats, the directed modes) goes through float64 rounded *to odd*: an inexact result gets an odd last bit, so that the final
rounding to a format with at least two bits less sees on which side of every tie the exact value lay
(Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Comput. 2008)."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class Type(NamedTuple):
    name: str
    size: int  # bytes; 0 for a predicate
    kind: str  # "u"nsigned, "s"igned, "b"its, "f"loat, or "p"redicate
    dtype: type  # how NumPy holds it; bfloat16 and packed pairs as their bits

    @property
    def bits(self) -> int:
        return 8 * self.size

    @property
    def packed(self) -> bool:
        return self.name.endswith("x2")


TYPES = {
    **{f"{kind}{8 * size}": Type(f"{kind}{8 * size}", size, kind, RAW[size]) for kind in "ub" for size in RAW},
    **{f"s{8 * size}": Type(f"s{8 * size}", size, "s", SIGNED[size]) for size in SIGNED},
    "f16": Type("f16", 2, "f", np.float16),
    "f32": Type("f32", 4, "f", np.float32),
    "f64": Type("f64", 8, "f", np.float64),
    "bf16": Type("bf16", 2, "f", np.uint16),
    "f16x2": Type("f16x2", 4, "f", np.uint32),
    "bf16x2": Type("bf16x2", 4, "f", np.uint32),
    "f32x2": Type("f32x2", 8, "f", np.uint64),
    "pred": Type("pred", 0, "p", np.bool_),
}
U32, U64, PRED, F32, F64 = TYPES["u32"], TYPES["u64"], TYPES["pred"], TYPES["f32"], TYPES["f64"]
SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}


def to_float64(bits_or_floats: np.ndarray, name: str) -> np.ndarray:
    """Values of the format ``name``, exactly."""
    if name == "bf16":
        return (bits_or_floats.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits_or_floats.astype(np.float64)


def from_float64(x: np.ndarray, name: str, mode: str = "rn") -> np.ndarray:
    """Rounds to the format ``name``: ``rn`` nearest even, ``rz`` to zero, ``rm`` down, ``rp`` up."""
    if name == "f64":
        return x
    if name == "bf16":
        bits = _to_odd_float32(x).view(np.uint32)
        nearest = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) if mode == "rn" else np.uint32(0)
        return np.where(np.isnan(x), np.uint16(0x7FFF), (bits + nearest >> np.uint32(16)).astype(np.uint16))
    rounded = x.astype(TYPES[name].dtype)
    if mode == "rn":
        return rounded
    infinity = rounded.dtype.type(np.inf)
    if mode == "rz":
        return np.where(abs(rounded) > abs(x), np.nextafter(rounded, rounded.dtype.type(0)), rounded)
    if mode == "rm":
        return np.where(rounded > x, np.nextafter(rounded, -infinity), rounded)
    return np.where(rounded < x, np.nextafter(rounded, infinity), rounded)


def flush(x: np.ndarray, name: str) -> np.ndarray:
    """Subnormal numbers become zeros of their sign (``.ftz``)."""
    return np.where(abs(x) < x.dtype.type(SMALLEST_NORMAL[name]), np.copysign(x.dtype.type(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """Into [0, 1], NaN to 0 (``.sat``)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total, error = _two_sum(a, b)
    return _odd(total, error)


def fma_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of numbers with at most 24 bits: the product is exact in float64."""
    return add_to_odd(a * b, c)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` in float64 with one rounding."""
    high, low = _two_product(a, b)
    error_free = (
        (abs(high) < 2.0**1000) & (abs(high) > 2.0**-900) & (abs(a) < 2.0**900) & (abs(b) < 2.0**900) & (abs(c) < 2.0**1000)
    )
    carried, rest = _two_sum(c, low)
    top, middle = _two_sum(high, carried)
    result = np.where(error_free, top + add_to_odd(rest, middle), a * b + c)
    rough = ~error_free & np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)
    for i in np.flatnonzero(rough):  # where a step above could over- or underflow
        x, y, z = (float(np.broadcast_to(v, rough.shape)[i]) for v in (a, b, c))
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            result[i] = float(exact) if exact else x * y + z
        except OverflowError:
            result[i] = np.inf if exact > 0 else -np.inf
    return result


def integers_to_odd(x: np.ndarray) -> np.ndarray:
    """64-bit integers in float64; those that need more than 53 bits rounded to odd."""
    eleven = x.dtype.type(0x7FF)
    odd = x & ~eleven | ((x & eleven) != 0).astype(x.dtype) << x.dtype.type(11)
    wide = (x >= 2**53) | ((x <= -(2**53)) if x.dtype.kind == "i" else np.False_)
    return np.where(wide, odd, x).astype(np.float64)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a + b`` and what its rounding lost (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a * b`` and what its rounding lost (Dekker, Veltkamp)."""
    product = a * b
    a_high, b_high = ((2.0**27 + 1) * v - ((2.0**27 + 1) * v - v) for v in (a, b))
    a_low, b_low = a - a_high, b - b_high
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """``value + error`` rounded to odd, where ``value`` is that sum rounded to nearest."""
    even_and_inexact = (error != 0) & np.isfinite(error) & (value.view(np.uint64) & np.uint64(1) == 0)
    if not even_and_inexact.any():
        return value
    return np.where(even_and_inexact, np.nextafter(value, np.copysign(np.inf, error)), value)


def _to_odd_float32(x: np.ndarray) -> np.ndarray:
    nearest = x.astype(np.float32)
    even_and_inexact = (nearest != x) & ~np.isnan(x) & (nearest.view(np.uint32) & np.uint32(1) == 0)
    towards = np.where(nearest.astype(np.float64) < x, np.float32(np.inf), np.float32(-np.inf))
    return np.where(even_and_inexact, np.nextafter(nearest, towards), nearest)

"""For the tests of single instructions: one instruction executed for many operands, and exact rounding by its definition."""

import itertools
import math
import operator
import struct
from fractions import Fraction

import numpy as np

from .launch import run
from .memory import Memory

WIDTH = {"pred": 0, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16}
WIDTH |= {f"{kind}{bits}": bits for kind in "busf" for bits in (32, 64)} | {"f16x2": 32, "bf16x2": 32, "f32x2": 64}


def evaluate(statement: str, result: str, *inputs: tuple[str, list[int]]) -> list[int]:
    """Executes ``statement``, which computes ``%d`` of type ``result`` from ``%a``, ``%b``, ..., given as (type, bits); returns bits.

    One thread per element. A predicate is a 32-bit integer outside of the statement."""
    count = len(inputs[0][1])
    names, memory, lines = "abcefg"[: len(inputs)], Memory(), []
    for name, (type_, values) in zip(names, inputs, strict=True):
        bits = WIDTH[type_] or 32
        lines += [f".reg .{'pred' if type_ == 'pred' else f'b{bits}'} %{name};", f".reg .b{bits} %{name}in;"]
        lines += [
            f"ld.param.u64 %at, [{name}];",
            f"mad.wide.u32 %at, %i, {bits // 8}, %at;",
            f"ld.global.b{bits} %{name}in, [%at];",
        ]
        lines += [f"setp.ne.u32 %{name}, %{name}in, 0;" if type_ == "pred" else f"mov.b{bits} %{name}, %{name}in;"]
        assert len(values) == count
    bits = WIDTH[result] or 32
    lines += [f".reg .{'pred' if result == 'pred' else f'b{bits}'} %d;", f".reg .b{bits} %out;", statement]
    lines += ["selp.u32 %out, 1, 0, %d;" if result == "pred" else f"mov.b{bits} %out, %d;"]
    lines += ["ld.param.u64 %at, [result];", f"mad.wide.u32 %at, %i, {bits // 8}, %at;", f"st.global.b{bits} [%at], %out;"]
    parameters = ", ".join(f".param .u64 {name}" for name in [*names, "result"])
    text = f""".visible .entry kernel({parameters}) {{
        .reg .b32 %i, %n; .reg .b64 %at; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .b16 %rs<9>; .reg .pred %p<9>;
        mov.u32 %i, %tid.x; mov.u32 %n, %ctaid.x; mad.lo.u32 %i, %n, 32, %i;
        {" ".join(lines)} ret; }}"""
    rows = -(-count // 32)
    buffers = [memory.put(np.resize(np.array(v, f"u{(WIDTH[t] or 32) // 8}"), rows * 32)) for t, v in inputs]
    out = memory.empty(rows * 32, f"u{bits // 8}")
    run(text, "kernel", rows, 32, [*buffers, out], memory)
    return out.numpy()[:count].tolist()


def combinations(*lists):
    return [list(column) for column in zip(*itertools.product(*lists), strict=True)]


ORDER = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


def integers(type_: str) -> list[int]:
    """Edges, and a few random patterns, as unsigned bits."""
    bits = WIDTH[type_]
    top = 1 << bits - 1
    rng = np.random.default_rng(bits)
    return [
        0,
        1,
        2,
        7,
        top - 1,
        top,
        top + 1,
        2 * top - 2,
        2 * top - 1,
        *(int(rng.integers(2**63)) % (2 * top) for _ in range(6)),
    ]


def value(bits: int, type_: str) -> int:
    width = WIDTH[type_]
    return bits - (1 << width) if type_[0] == "s" and bits >> width - 1 else bits


# ---- floating-point formats ----

# precision, exponents of the smallest and the largest normal number
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def decoded(bits: int, name: str) -> float:
    if name == "bf16":
        bits, name = bits << 16, "f32"
    code = {"f16": "<He", "f32": "<If", "f64": "<Qd"}[name]
    return struct.unpack("<" + code[2], struct.pack("<" + code[1], bits))[0]


def encoded(x: float, name: str) -> int:
    """Of a number that the format holds."""
    if name == "bf16":
        return encoded(x, "f32") >> 16
    code = {"f16": "<He", "f32": "<If", "f64": "<Qd"}[name]
    return struct.unpack("<" + code[1], struct.pack("<" + code[2], x))[0]


def rounded(exact: Fraction, name: str, mode: str = "rn") -> float:
    """The number of the format next to ``exact``, by its definition. Zero has the sign of ``exact``, + for 0."""
    if exact == 0:
        return 0.0
    precision, low, top = FORMATS[name]
    sign, size = (1, exact) if exact > 0 else (-1, -exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, low) - precision + 1)
    whole, rest = divmod(size, unit)
    up = {"rn": 2 * rest > unit or (2 * rest == unit and whole % 2), "rz": False, "rm": sign < 0, "rp": sign > 0}[mode]
    result = (whole + (rest > 0 and bool(up))) * unit
    limit = Fraction(2) ** (top + 1)
    if result >= limit:
        stays = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * float(limit - Fraction(2) ** (top + 1 - precision)) if stays else sign * math.inf
    return sign * float(result)


def floats(name: str, random: int = 6) -> list[int]:
    """Bits of zeros, subnormals, limits, ties, infinities, NaN, and random patterns."""
    precision, low, top = FORMATS[name]
    tiny, one = 2.0 ** max(low - precision + 1, -1074), 1 + 2.0 ** (1 - precision)
    largest = float(Fraction(2) ** (top + 1) - Fraction(2) ** (top + 1 - precision))
    values = [0.0, tiny, 2.0**low - tiny, 2.0**low, one, 1.5, 2.0 ** (precision - 1) + 1, largest, math.inf]
    bits = [encoded(s * v, name) for v in values for s in (1, -1)] + [encoded(1.0, name), encoded(math.nan, name)]
    rng = np.random.default_rng(precision)
    return bits + [int(b) for b in rng.integers(0, 2 ** WIDTH[name], random, dtype="u8")]


def check(results: list[int], expected: list[float], name: str) -> None:
    for got, want in zip((decoded(bits, name) for bits in results), expected, strict=True):
        assert (math.isnan(got) and math.isnan(want)) or (got == want and math.copysign(1, got) == math.copysign(1, want))

"""Floating-point instructions: arithmetic, comparison, conversion and the approximations of the special function unit.

The ``.approx`` and ``.full`` forms err here as much as the PTX ISA allows them to: the exact result is moved by a pseudo-random part of
the documented bound, so that a kernel passes only if it bears it. Results that the format holds exactly, such as ``ex2`` of an integer,
stay exact, as they are on the hardware."""

import numpy as np

from .formats import (
    F32,
    F64,
    SMALLEST_NORMAL,
    TYPES,
    Type,
    add_to_odd,
    flush,
    fma64,
    fma_to_odd,
    from_float64,
    integers_to_odd,
    saturate,
    to_float64,
)
from .integer import COMPARISONS, comparison
from .table import Modifiers, Operation, operation, same

MANTISSA = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}


def _elementwise(type_: Type, sources: int, compute) -> Operation:
    """An operation from ``compute`` on the elements, of which a packed register holds two."""
    if not type_.packed:
        return same(type_, sources, compute)
    element = TYPES[type_.name[:-2]].dtype

    def on_pairs(*operands):
        pairs = (np.ascontiguousarray(x)[:, None].view(element) for x in operands)
        return np.ascontiguousarray(compute(*pairs)).view(type_.dtype)[:, 0]

    return same(type_, sources, on_pairs)


# ---- arithmetic, rounded once ----


def _rounded(m: Modifiers, type_: Type, sources: int, native, exact) -> Operation:
    """``native`` is right for float32 and float64 to nearest; ``exact`` takes float64 and rounds to odd."""
    name, mode = type_.name.removesuffix("x2"), m.take("rn", "rz", "rm", "rp") or "rn"
    ftz, sat, relu = m.take("ftz"), m.take("sat"), m.take("relu")
    direct = native if mode == "rn" and name in ("f32", "f64") else None
    if direct is None and (exact is None or name == "f64" or (name == "bf16" and mode not in ("rn", "rz"))):
        raise ValueError(f"rounding .{mode} is not there for .{name}")
    if name == "bf16" and (ftz or sat or relu):
        raise ValueError("a modifier is not there for .bf16")

    def compute(*x):
        if ftz:
            x = [flush(v, name) for v in x]
        result = direct(*x) if direct else from_float64(exact(*(to_float64(v, name) for v in x)), name, mode)
        if ftz:
            result = flush(result, name)
        if relu:
            result = np.where(result < 0, result.dtype.type(0), result)
        return saturate(result) if sat else result

    return _elementwise(type_, sources, compute)


@operation("add", "sub", "mul", floats=True)
def arithmetic(opcode, m):
    native, exact = {
        "add": (np.add, add_to_odd),
        "sub": (np.subtract, lambda a, b: add_to_odd(a, -b)),
        "mul": (np.multiply, np.multiply),
    }[opcode]
    type_ = m.type()
    if type_.size == 2 and m.take("f32"):
        return _mixed(_rounded(m, F32, 2, native, exact), type_)
    return _rounded(m, type_, 2, native, exact)


@operation("fma", floats=True)
def fma(m):
    type_ = m.type()
    if type_.size == 2 and m.take("f32"):
        return _mixed(_rounded(m, F32, 3, None, fma_to_odd), type_)
    return _rounded(m, type_, 3, fma64 if type_ is F64 else None, fma_to_odd)


def _mixed(operation: Operation, narrow: Type) -> Operation:
    """Of sm_100: all sources but the last have 16 bits, ``add.rn.f32.f16``."""

    def compute(*x):
        return operation.compute(*(to_float64(v, narrow.name).astype(np.float32) for v in x[:-1]), x[-1])

    return Operation((F32,), (*[narrow] * (len(operation.sources) - 1), F32), compute)


@operation("div", floats=True)
def div(m):
    type_, form = m.type(), m.take("approx", "full")
    if form is None:
        return _rounded(m, type_, 2, np.divide, None)

    def quotient(a, b):
        # The hardware multiplies with 1/b, which underflows; .full scales around that.
        return np.where((abs(b) > 2.0**126) & np.isfinite(b) & (form == "approx"), np.where(np.isinf(a), np.nan, 0.0), a / b)

    return _approximate(m, type_, quotient, lambda _, y, ulp: 2 * ulp, sources=2)


@operation("sqrt", "rcp", floats=True)
def root_or_reciprocal(opcode, m):
    type_ = m.type()
    if not m.take("approx"):
        return _rounded(m, type_, 1, np.sqrt if opcode == "sqrt" else lambda a: a.dtype.type(1) / a, None)
    if type_ is F64:
        return _coarse64(m, lambda a: 1 / a)
    if opcode == "sqrt":
        return _approximate(m, type_, np.sqrt, lambda _, y, ulp: 2.0**-23 * abs(y))
    return _approximate(m, type_, lambda a: 1 / a, lambda _, y, ulp: ulp)


@operation("neg", "abs", floats=True)
def sign(opcode, m):
    type_ = m.type()
    name, ftz = type_.name.removesuffix("x2"), m.take("ftz")
    raw = np.dtype(f"u{TYPES[name].size}")
    top = raw.type(1 << 8 * raw.itemsize - 1)

    def compute(a):
        bits = (flush(a, name) if ftz else np.ascontiguousarray(a)).view(raw)
        return (bits ^ top if opcode == "neg" else bits & ~top).view(a.dtype)

    return _elementwise(type_, 1, compute)


@operation("copysign", floats=True)
def copysign(m):
    return same(m.type(), 2, lambda sign_of, size_of: np.copysign(size_of, sign_of))


@operation("min", "max", floats=True)
def extremum(opcode, m):
    """The other operand where one is NaN, but NaN with ``.NaN``; -0 is below +0. float32 ones may have three operands on sm_100."""
    type_ = m.type()
    name, ftz, keep_nan = type_.name.removesuffix("x2"), m.take("ftz"), m.take("NaN")
    pick = np.fmin if opcode == "min" else np.fmax

    def compute(a, b):
        if name in ("f16", "bf16"):
            a, b = to_float64(a, name), to_float64(b, name)
        if ftz:
            a, b = flush(a, name), flush(b, name)
        zeros = a + b if opcode == "max" else -(-a - b)
        result = np.where((a == 0) & (b == 0), zeros, pick(a, b))
        if keep_nan:
            result = np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), result)
        return from_float64(result, name) if name in ("f16", "bf16") else result

    if m.sources == 3 and name == "f32":
        return same(type_, 3, lambda a, b, c: compute(compute(a, b), c))
    return _elementwise(type_, 2, compute)


# ---- comparison ----


@operation("setp", "set", floats=True)
def compare(opcode, m):
    """``lt`` is false where an operand is NaN, ``ltu`` true; likewise the others, also ``ne``."""
    type_, ftz = m.type(), m.take("ftz")
    if type_.packed:
        raise ValueError("comparison of packed pairs is not there")
    name = m.take(*COMPARISONS, *(f"{c}u" for c in COMPARISONS), "num", "nan")

    def function(a, b):
        if type_.name == "bf16":
            a, b = to_float64(a, "bf16"), to_float64(b, "bf16")
        if ftz:
            a, b = flush(a, type_.name), flush(b, type_.name)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        holds = COMPARISONS[name[:2]](a, b)
        return holds | unordered if name.endswith("u") else holds & ~unordered

    return comparison(opcode, m, type_, function)


@operation("testp", floats=True)
def testp(m):
    type_ = m.type()
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (abs(a) >= SMALLEST_NORMAL[type_.name]),
        "subnormal": lambda a: (abs(a) < SMALLEST_NORMAL[type_.name]) & (a != 0),
    }
    return Operation((TYPES["pred"],), (type_,), tests[m.take(*tests)])


# ---- approximations ----


def _approximate(m: Modifiers, type_: Type, exact, bound, sources: int = 1) -> Operation:
    """``bound(x, y, ulp)``: the largest error at the last operand ``x`` with the exact result ``y``."""
    name, ftz = type_.name.removesuffix("x2"), m.take("ftz")

    def compute(*x):
        x = [to_float64(v, name) for v in x]
        if ftz:
            x = [np.where(abs(v) < SMALLEST_NORMAL[name], np.copysign(0.0, v), v) for v in x]
        y = np.asarray(exact(*x))
        ulp = 2.0 ** (np.frexp(np.maximum(abs(y), SMALLEST_NORMAL[name]))[1] - 1.0 - MANTISSA[name])
        representable = to_float64(from_float64(y, name), name) == y
        inside = np.isfinite(y) & (abs(y) < 2.0**15 if name == "f16" else abs(y) < 2.0**127) & ~representable
        result = np.where(inside, y + _noise(y) * np.maximum(bound(x[-1], y, ulp) - ulp / 2, 0), y)
        if ftz:
            result = np.where(abs(result) < SMALLEST_NORMAL[name], np.copysign(0.0, result), result)
        return from_float64(result, name)

    return _elementwise(type_, sources, compute)


def _noise(y):
    """In [-1, 1), a hash of the bits of ``y``."""
    mixed = (y.view(np.uint64) ^ y.view(np.uint64) >> np.uint64(29)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def _lg2_bound(x, y, ulp):
    return 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, abs(y))


def _sine_bound(x, y, ulp):
    return np.where(abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7)


_SPECIAL = {
    # name: the function, and its error bound by format
    "ex2": (
        np.exp2,
        {
            "f32": lambda _, y, ulp: 2 * ulp,
            "f16": lambda _, y, ulp: 2.0**-9.9 * abs(y),
            "bf16": lambda _, y, ulp: 2.0**-7 * abs(y),
        },
    ),
    "lg2": (np.log2, {"f32": _lg2_bound}),
    "sin": (np.sin, {"f32": _sine_bound}),
    "cos": (np.cos, {"f32": _sine_bound}),
    "tanh": (
        np.tanh,
        {
            "f32": lambda _, y, ulp: 2.0**-11 * abs(y),
            "f16": lambda _, y, ulp: 2.0**-10.987,
            "bf16": lambda _, y, ulp: 2.0**-8,
        },
    ),
}


@operation(*_SPECIAL, floats=True)
def special(opcode, m):
    type_, (function, bounds) = m.type(), _SPECIAL[opcode]
    if not m.take("approx"):
        raise ValueError(".approx is missing")
    return _approximate(m, type_, function, bounds[type_.name.removesuffix("x2")])


@operation("rsqrt", floats=True)
def rsqrt(m):
    type_ = m.type()
    if not m.take("approx"):
        raise ValueError(".approx is missing")
    if type_ is F64 and "ftz" not in m.left:  # emulated, to nearly full precision
        return same(F64, 1, lambda a: 1 / np.sqrt(a))
    if type_ is F64:
        return _coarse64(m, lambda a: 1 / np.sqrt(a))
    return _approximate(m, type_, lambda a: 1 / np.sqrt(a), lambda _, y, ulp: 2.0**-22.9 * abs(y))


def _coarse64(m: Modifiers, function) -> Operation:
    """``.approx.ftz.f64`` gives the upper 32 bits of the result; Newton steps follow it."""
    if not m.take("ftz"):
        raise ValueError(".ftz is missing")

    def compute(a):
        exact = flush(function(flush(a, "f64")), "f64")
        return (exact.view(np.uint64) & ~np.uint64(0xFFFFFFFF)).view(np.float64)

    return same(F64, 1, compute)


# ---- conversion ----

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("cvt")
def cvt(m):
    source, result = m.type(), m.type()
    integral, mode = m.take(*_TO_INTEGRAL), m.take("rn", "rz", "rm", "rp")
    ftz, sat, relu = m.take("ftz"), m.take("sat"), m.take("relu")

    def from_values(x):
        """From float64 (64-bit integers rounded to odd), or from integers when the result is one."""
        if integral:
            x = _TO_INTEGRAL[integral](x)
        if result.kind != "f":
            return _to_integer(x, source, result, sat)
        if relu:
            x = np.where(x < 0, 0.0, x)
        if sat:
            x = saturate(x)
        name = result.name.removesuffix("x2")
        x = from_float64(x, name, mode or "rn")
        return flush(x, name) if ftz and name == "f32" else x

    def values(x):
        if source.kind != "f":
            return (
                x if result.kind != "f" else integers_to_odd(x) if source.size == 8 and result.size < 8 else x.astype(np.float64)
            )
        return to_float64(flush(x, source.name) if ftz and source.name == "f32" else x, source.name)

    if result.packed:  # the first source is the upper half

        def pack(high, low):
            high, low = (np.ascontiguousarray(from_values(values(x))).view(np.uint16).astype(np.uint32) for x in (high, low))
            return high << np.uint32(16) | low

        return Operation((result,), (source, source), pack)
    if source.kind == "f" and result.kind != "f" and not integral:
        raise ValueError("a rounding to integers is missing")
    return Operation((result,), (source,), lambda x: from_values(values(x)))


def _to_integer(x, source: Type, result: Type, sat):
    limits = np.iinfo(result.dtype)
    if source.kind != "f":
        if sat and source.size == 8:
            raise ValueError(".sat of 64-bit integers is not there")
        return (np.clip(x.astype(np.int64), limits.min, limits.max) if sat else x).astype(result.dtype)
    nan = 0 if source is not F64 and result.size < 8 else 1 << result.bits - 1
    inside = np.where((x > limits.min) & (x < limits.max), x, 0).astype(result.dtype)
    outside = np.where(x >= limits.max, np.array(limits.max, result.dtype), np.array(limits.min, result.dtype))
    clamped = np.where((x > limits.min) & (x < limits.max), inside, outside)
    return np.where(np.isnan(x), np.array(nan, np.uint64).astype(result.dtype), clamped)

"""Floating-point instructions of the PTX interpreter, against exact fractions rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx.evaluate import FORMATS, ORDER, WIDTH, check, combinations, decoded, encoded, evaluate, floats, integers, rounded, value

# ---- arithmetic ----


def exactly(function, *x: float, name: str, mode: str = "rn") -> float:
    """``function`` of fractions, rounded once; where IEEE arithmetic leaves fractions, that of float64."""
    plain = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "fma": lambda a, b, c: a * b + c}[
        function
    ]
    if not all(map(math.isfinite, x)):
        return plain(*x)
    exact = plain(*map(Fraction, x))
    if exact == 0:
        product = x[0] * x[1] if function == "fma" and 0 in x[:2] else None
        return product + x[2] if product is not None and x[2] == 0 else plain(*x) if function != "fma" else 0.0
    result = rounded(exact, name, mode)
    return math.copysign(result, 1 if exact > 0 else -1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("opcode", ["add", "sub", "mul"])
def test_float_arithmetic(opcode, name):
    a, b = combinations(floats(name), floats(name))
    expected = [exactly(opcode, decoded(x, name), decoded(y, name), name=name) for x, y in zip(a, b, strict=True)]
    check(evaluate(f"{opcode}.{name} %d, %a, %b;", name, (name, a), (name, b)), expected, name)


@pytest.mark.parametrize("name", FORMATS)
def test_fused_multiply_add(name):
    a, b, c = combinations(floats(name), floats(name, 2), floats(name))
    rows = [tuple(decoded(v, name) for v in row) for row in zip(a, b, c, strict=True)]
    expected = [exactly("fma", *row, name=name) for row in rows]
    check(evaluate(f"fma.rn.{name} %d, %a, %b, %c;", name, (name, a), (name, b), (name, c)), expected, name)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["add", "mul", "fma"])
def test_directed_rounding(opcode, mode):
    operands = combinations(*[floats("f32")] * (3 if opcode == "fma" else 2))
    rows = [[decoded(v, "f32") for v in row] for row in zip(*operands, strict=True)]
    expected = [exactly(opcode, *row, name="f32", mode=mode) for row in rows]
    statement = f"{opcode}.{mode}.f32 %d, {', '.join(f'%{n}' for n in 'abc'[: len(operands)])};"
    results = evaluate(statement, "f32", *(("f32", x) for x in operands))
    nonzero = [i for i, e in enumerate(expected) if e != 0]  # the sign of a sum that cancels under .rm is not modelled
    check([results[i] for i in nonzero], [expected[i] for i in nonzero], "f32")
    assert all(decoded(r, "f32") == 0 for r, e in zip(results, expected, strict=True) if e == 0)


def test_fma_near_ties():
    """Products whose float64 sum lies on a float32 tie, with the rest below the last bit of float64: rounding twice goes wrong."""
    a, b, c = [], [], []
    for k in range(24, 53):
        a += [encoded(1 + 2.0**-12, "f32")] * 4
        b += [encoded(s * (1 + 2.0**-12), "f32") for s in (1, 1, -1, -1)]
        c += [encoded(t * 2.0 ** -(k + 20), "f32") for t in (1, -1)] * 2
    rows = [tuple(decoded(v, "f32") for v in row) for row in zip(a, b, c, strict=True)]
    expected = [exactly("fma", *row, name="f32") for row in rows]
    check(evaluate("fma.rn.f32 %d, %a, %b, %c;", "f32", ("f32", a), ("f32", b), ("f32", c)), expected, "f32")
    twice = [float(np.float32(x * y + z)) for x, y, z in rows]
    assert twice != expected  # the cases are there


def test_fma_of_double_is_exact():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 2000)) * 2.0 ** rng.integers(-300, 300, 2000)
    z = -x * y * (1 + rng.integers(-3, 4, 2000) * 2.0**-52)  # cancels all but the rounding of the product
    columns = [[encoded(v, "f64") for v in column] for column in (x, y, z)]
    expected = [exactly("fma", *map(float, row), name="f64") for row in zip(x, y, z, strict=True)]
    check(evaluate("fma.rn.f64 %d, %a, %b, %c;", "f64", *(("f64", v) for v in columns)), expected, "f64")


@pytest.mark.parametrize("name", ["f16x2", "bf16x2", "f32x2"])
def test_packed_pairs(name):
    """Each half by itself."""
    element, bits = name[:-2], WIDTH[name] // 2
    a, b = combinations(floats(element), floats(element))
    c = a[::-1]

    def pair(lower, upper):
        return name, [y << bits | x for x, y in zip(lower, upper, strict=True)]

    def fused(*columns):
        return [exactly("fma", *(decoded(v, element) for v in row), name=element) for row in zip(*columns, strict=True)]

    result = evaluate(f"fma.rn.{name} %d, %a, %b, %c;", name, pair(a, c), pair(b, a), pair(c, b))
    check([r % 2**bits for r in result], fused(a, b, c), element)
    check([r >> bits for r in result], fused(c, a, b), element)
    if name == "f32x2":
        return  # the rest exists for 16 bits only
    negated = evaluate(f"neg.{name} %d, %a;", name, pair(a, b))
    assert negated == [(y ^ 0x8000) << 16 | x ^ 0x8000 for x, y in zip(a, b, strict=True)]
    larger = evaluate(f"max.{name} %d, %a, %b;", name, pair(a, c), pair(b, c))
    expected = [extreme(max, decoded(x, element), decoded(y, element)) for x, y in zip(a, b, strict=True)]
    check([r & 0xFFFF for r in larger], expected, element)
    check([r >> 16 for r in larger], [decoded(v, element) for v in c], element)


@pytest.mark.parametrize("narrow", ["f16", "bf16"])
def test_mixed_precision(narrow):
    """sm_100 adds a 16-bit number to a float32 one, and multiplies two of them into it."""
    a, b, c = combinations(floats(narrow, 2), floats(narrow, 2), floats("f32", 4))
    rows = [(decoded(x, narrow), decoded(y, narrow), decoded(z, "f32")) for x, y, z in zip(a, b, c, strict=True)]
    expected = [exactly("fma", *row, name="f32") for row in rows]
    check(evaluate(f"fma.rn.f32.{narrow} %d, %a, %b, %c;", "f32", (narrow, a), (narrow, b), ("f32", c)), expected, "f32")
    for opcode in ("add", "sub"):
        expected = [exactly(opcode, x, z, name="f32") for x, _, z in rows]
        check(evaluate(f"{opcode}.rn.f32.{narrow} %d, %a, %b;", "f32", (narrow, a), ("f32", c)), expected, "f32")


@pytest.mark.parametrize("opcode", ["add", "mul", "fma"])
def test_flush_to_zero(opcode):
    """Subnormal operands and results count as zeros of their sign."""
    operands = combinations(*[floats("f32")] * (3 if opcode == "fma" else 2))

    def flushed(x):
        return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x

    rows = [[flushed(decoded(v, "f32")) for v in row] for row in zip(*operands, strict=True)]
    expected = [flushed(exactly(opcode, *row, name="f32")) for row in rows]
    middle = ".rn" if opcode == "fma" else ""
    statement = f"{opcode}{middle}.ftz.f32 %d, {', '.join(f'%{n}' for n in 'abc'[: len(operands)])};"
    check(evaluate(statement, "f32", *(("f32", x) for x in operands)), expected, "f32")


def test_saturation():
    a = floats("f32", 20)
    x = [decoded(v, "f32") for v in a]
    expected = [min(max(v, 0.0), 1.0) if v > 0 else 0.0 for v in x]
    check(evaluate("add.sat.f32 %d, %a, 0f00000000;", "f32", ("f32", a)), expected, "f32")
    check(evaluate("cvt.sat.f32.f32 %d, %a;", "f32", ("f32", a)), expected, "f32")


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_quotients_and_roots(name):
    a, b = combinations(floats(name), floats(name))
    dtype = {"f32": np.float32, "f64": np.float64}[name]
    rows = [(decoded(x, name), decoded(y, name)) for x, y in zip(a, b, strict=True)]

    def divided(x, y):
        if math.isfinite(x) and math.isfinite(y) and x and y:
            return math.copysign(rounded(Fraction(x) / Fraction(y), name), x * math.copysign(1, y))
        with np.errstate(all="ignore"):
            return float(dtype(x) / dtype(y))

    def root(x):
        if not (math.isfinite(x) and x > 0):
            return x if x == 0 or x == math.inf else math.nan
        scaled = Fraction(x) * 4**600  # an integer root with far more digits than the format
        return rounded(Fraction(math.isqrt(int(scaled * 4**120)), 2**720), name)

    check(evaluate(f"div.rn.{name} %d, %a, %b;", name, (name, a), (name, b)), [divided(*row) for row in rows], name)
    singles = floats(name, 30)
    x = [decoded(v, name) for v in singles]
    check(evaluate(f"sqrt.rn.{name} %d, %a;", name, (name, singles)), [root(v) for v in x], name)
    check(evaluate(f"rcp.rn.{name} %d, %a;", name, (name, singles)), [divided(1.0, v) for v in x], name)


def extreme(function, x, y, keep_nan=False):
    if math.isnan(x) or math.isnan(y):
        return math.nan if keep_nan or math.isnan(x) and math.isnan(y) else y if math.isnan(x) else x
    return function((x, y), key=lambda v: (v, math.copysign(1, v)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("opcode", ["min", "max"])
def test_extremum(opcode, name):
    a, b = combinations(floats(name), floats(name))
    function = {"min": min, "max": max}[opcode]
    for suffix, keep_nan in (("", False), (".NaN", True)):
        if name == "f64" and keep_nan:
            continue
        expected = [extreme(function, decoded(x, name), decoded(y, name), keep_nan) for x, y in zip(a, b, strict=True)]
        check(evaluate(f"{opcode}{suffix}.{name} %d, %a, %b;", name, (name, a), (name, b)), expected, name)


def test_extremum_of_three():
    operands = combinations(*[floats("f32", 2)] * 3)
    rows = [[decoded(v, "f32") for v in row] for row in zip(*operands, strict=True)]
    expected = [extreme(max, extreme(max, x, y), z) for x, y, z in rows]
    check(evaluate("max.f32 %d, %a, %b, %c;", "f32", *(("f32", x) for x in operands)), expected, "f32")


@pytest.mark.parametrize("name", FORMATS)
def test_sign_of_floats(name):
    a = floats(name)
    top = 1 << WIDTH[name] - 1
    assert evaluate(f"neg.{name} %d, %a;", name, (name, a)) == [x ^ top for x in a]
    assert evaluate(f"abs.{name} %d, %a;", name, (name, a)) == [x & ~top for x in a]
    if name in ("f32", "f64"):
        b = a[::-1]
        expected = [y & ~top | x & top for x, y in zip(a, b, strict=True)]
        assert evaluate(f"copysign.{name} %d, %a, %b;", name, (name, a), (name, b)) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_float_comparison(name):
    a, b = combinations(floats(name), floats(name))
    rows = [(decoded(x, name), decoded(y, name)) for x, y in zip(a, b, strict=True)]
    nan = [math.isnan(x) or math.isnan(y) for x, y in rows]
    for key, function in ORDER.items():
        holds = [function(*row) and not n for row, n in zip(rows, nan, strict=True)]
        assert evaluate(f"setp.{key}.{name} %d, %a, %b;", "pred", (name, a), (name, b)) == holds
        unordered = [h or n for h, n in zip(holds, nan, strict=True)]
        assert evaluate(f"setp.{key}u.{name} %d, %a, %b;", "pred", (name, a), (name, b)) == unordered
    assert evaluate(f"setp.nan.{name} %d, %a, %b;", "pred", (name, a), (name, b)) == nan
    assert evaluate(f"setp.num.{name} %d, %a, %b;", "pred", (name, a), (name, b)) == [not n for n in nan]


def test_comparison_flushes():
    a, b = [1, 1], [0, 0x80000001]
    assert evaluate("setp.gt.ftz.f32 %d, %a, %b;", "pred", ("f32", a), ("f32", b)) == [0, 0]
    assert evaluate("setp.gt.f32 %d, %a, %b;", "pred", ("f32", a), ("f32", b)) == [1, 1]


def test_classification():
    a = floats("f32")
    x = [decoded(v, "f32") for v in a]
    subnormal = [0 < abs(v) < 2.0**-126 for v in x]
    tests = {
        "finite": [math.isfinite(v) for v in x],
        "infinite": [math.isinf(v) for v in x],
        "notanumber": [math.isnan(v) for v in x],
        "number": [not math.isnan(v) for v in x],
        "subnormal": subnormal,
        "normal": [math.isfinite(v) and v != 0 and not s for v, s in zip(x, subnormal, strict=True)],
    }
    for name, expected in tests.items():
        assert evaluate(f"testp.{name}.f32 %d, %a;", "pred", ("f32", a)) == expected


# ---- conversion with floats ----


@pytest.mark.parametrize(("result", "source"), [(r, s) for r in FORMATS for s in ("f32", "f64") if FORMATS[r][0] < FORMATS[s][0]])
def test_narrowing(result, source):
    a = floats(source, 200)
    precision, low, _ = FORMATS[result]
    for k in (1, 3, 2 ** (precision - 1) + 1, 2**precision - 1):  # ties, and their neighbours, normal and subnormal
        for unit in (2.0 ** (1 - precision), 2.0 ** (low - precision + 1)):
            a += [encoded((k + h) * unit, source) for h in (0.5, 0.5 - 2.0**-10, 0.5 + 2.0**-10)]
    modes = ["rn", "rz"] if result == "bf16" else ["rn", "rz", "rm", "rp"] if result == "f32" else ["rn", "rz"]
    for mode in modes:
        x = [decoded(v, source) for v in a]
        expected = [rounded(Fraction(v), result, mode) if math.isfinite(v) else v for v in x]
        expected = [math.copysign(e, v) for e, v in zip(expected, x, strict=True)]
        check(evaluate(f"cvt.{mode}.{result}.{source} %d, %a;", result, (source, a)), expected, result)


@pytest.mark.parametrize(("result", "source"), [(r, s) for r in ("f32", "f64") for s in FORMATS if FORMATS[s][0] < FORMATS[r][0]])
def test_widening(result, source):
    a = floats(source, 100)
    check(evaluate(f"cvt.{result}.{source} %d, %a;", result, (source, a)), [decoded(v, source) for v in a], result)


@pytest.mark.parametrize("name", ["f16x2", "bf16x2"])
def test_packing_conversion(name):
    """The first operand becomes the upper half."""
    a, b = floats("f32", 100), floats("f32", 100)[::-1]
    element = name[:-2]
    expected = [rounded(Fraction(x), element) if math.isfinite(x) else x for x in (decoded(v, "f32") for v in a)]
    expected = [math.copysign(e, decoded(v, "f32")) for e, v in zip(expected, a, strict=True)]
    result = evaluate(f"cvt.rn.{name}.f32 %d, %a, %b;", name, ("f32", a), ("f32", b))
    check([r >> 16 for r in result], expected, element)
    check([r & 0xFFFF for r in result], expected[::-1], element)
    relu = evaluate(f"cvt.rn.relu.{name}.f32 %d, %a, %b;", name, ("f32", a), ("f32", b))
    for r, e in zip(relu, expected, strict=True):
        assert math.isnan(e) or decoded(r >> 16, element) == max(e, 0.0)


INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("result", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_float_to_integer(source, result):
    """Rounds as told, clamps to the range; NaN gives 0, or the top bit where 64 bits take part."""
    halves = [encoded(v, source) for v in (0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.25, -3.75)]
    a, bits = floats(source, 50) + halves, WIDTH[result]
    if source != "f16":
        a += [encoded(s * 2.0**k, source) for k in (15, 16, 31, 32, 63, 64) for s in (1, -1)]
    low, top = (-(1 << bits - 1), (1 << bits - 1) - 1) if result[0] == "s" else (0, (1 << bits) - 1)
    nan = 1 << bits - 1 if source == "f64" or bits == 64 else 0
    for mode, function in INTEGRAL.items():

        def oracle(x, function=function):
            if math.isnan(x):
                return nan
            return (top if x > 0 else low) if math.isinf(x) else min(max(function(x), low), top)

        expected = [oracle(decoded(v, source)) % (1 << bits) for v in a]
        assert evaluate(f"cvt.{mode}.{result}.{source} %d, %a;", result, (source, a)) == expected


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("result", ["f16", "f32", "f64"])
def test_integer_to_float(source, result):
    a = integers(source)
    if WIDTH[source] == 64:  # ties of float32 and float64, and just beside them
        a += [(2**60 + d) for d in (2**36, 2**36 - 1, 2**36 + 1, 3 * 2**36, 2**7, 2**7 + 1, 3 * 2**7)]
    for mode in ("rn", "rz", "rm", "rp") if result == "f32" else ("rn",):
        expected = [rounded(Fraction(value(x, source)), result, mode) for x in a]
        check(evaluate(f"cvt.{mode}.{result}.{source} %d, %a;", result, (source, a)), expected, result)


@pytest.mark.parametrize("mode", INTEGRAL)
def test_rounding_to_integral_floats(mode):
    a = floats("f32", 50) + [encoded(v, "f32") for v in (0.5, -0.5, 1.5, 2.5, -2.5, 0.75, -0.25)]
    x = [decoded(v, "f32") for v in a]
    expected = [math.copysign(float(INTEGRAL[mode](v)), v) if math.isfinite(v) else v for v in x]
    check(evaluate(f"cvt.{mode}.f32.f32 %d, %a;", "f32", ("f32", a)), expected, "f32")


# ---- approximations ----

ERRORS = {
    # function, range of the operand, largest error from (operand, result, unit in the last place), by the PTX ISA
    "ex2.approx.f32": (lambda x: 2.0**x, (-120, 120), lambda x, y, ulp: 2 * ulp),
    "lg2.approx.f32": (math.log2, (1e-3, 1e3), lambda x, y, ulp: 2.0**-22 * (1 if 0.5 < x < 2 else abs(y))),
    "sin.approx.f32": (math.sin, (-6, 6), lambda x, y, ulp: 2.0**-20.5),
    "cos.approx.f32": (math.cos, (-6, 6), lambda x, y, ulp: 2.0**-20.5),
    "rcp.approx.f32": (lambda x: 1 / x, (0.1, 50), lambda x, y, ulp: ulp),
    "sqrt.approx.f32": (math.sqrt, (0.1, 50), lambda x, y, ulp: 2.0**-23 * y),
    "rsqrt.approx.f32": (lambda x: x**-0.5, (0.1, 50), lambda x, y, ulp: 2.0**-22.9 * y),
    "tanh.approx.f32": (math.tanh, (-4, 4), lambda x, y, ulp: 2.0**-11 * abs(y)),
}


@pytest.mark.parametrize("opcode", ERRORS)
def test_approximations_err_within_their_bounds_and_use_them(opcode):
    function, (low, top), bound = ERRORS[opcode]
    x = np.random.default_rng(5).uniform(low, top, 4000).astype(np.float32)
    result = np.array(evaluate(f"{opcode} %d, %a;", "f32", ("f32", x.view(np.uint32).tolist())), np.uint32).view(np.float32)
    y = np.array([function(float(v)) for v in x])
    ulp = np.spacing(abs(y).astype(np.float32)).astype(np.float64)
    limit = np.array([bound(*row) for row in zip(x.astype(float), y, ulp, strict=True)])
    error = abs(result.astype(np.float64) - y)
    assert (error <= limit + ulp / 2 * (opcode[:3] in ("ex2", "rcp"))).all()  # these count from the rounded result
    assert (error > 0.6 * limit).mean() > 0.05


@pytest.mark.parametrize(
    ("statement", "x", "expected"),
    [
        (
            "ex2.approx.f32",
            [-math.inf, -0.0, 0.0, 3.0, -140.0, math.inf, math.nan],
            [0.0, 1.0, 1.0, 8.0, 2.0**-140, math.inf, math.nan],
        ),
        ("ex2.approx.ftz.f32", [-140.0, 2.0**-140], [0.0, 1.0]),
        (
            "lg2.approx.f32",
            [-1.0, -0.0, 0.0, 1.0, 8.0, 2.0**-140, math.inf],
            [math.nan, -math.inf, -math.inf, 0.0, 3.0, -140.0, math.inf],
        ),
        ("lg2.approx.ftz.f32", [2.0**-140], [-math.inf]),
        ("rcp.approx.f32", [-math.inf, -0.0, 0.0, 4.0, math.inf], [-0.0, -math.inf, math.inf, 0.25, 0.0]),
        ("rcp.approx.ftz.f32", [2.0**-140, 2.0**127], [math.inf, 0.0]),
        ("sqrt.approx.f32", [-1.0, -0.0, 0.25, math.inf], [math.nan, -0.0, 0.5, math.inf]),
        ("rsqrt.approx.f32", [-1.0, -0.0, 0.0, 0.25, math.inf], [math.nan, -math.inf, math.inf, 2.0, 0.0]),
        ("sin.approx.f32", [-0.0, 0.0, math.inf], [-0.0, 0.0, math.nan]),
        ("cos.approx.f32", [0.0, -math.inf], [1.0, math.nan]),
    ],
)
def test_approximations_at_the_edges(statement, x, expected):
    check(evaluate(f"{statement} %d, %a;", "f32", ("f32", [encoded(v, "f32") for v in x])), expected, "f32")


def test_approximate_division():
    x, y = np.random.default_rng(6).uniform(0.1, 9, (2, 3000)).astype(np.float32)
    operands = [("f32", v.view(np.uint32).tolist()) for v in (x, y)]
    for form in ("approx", "full"):
        result = np.array(evaluate(f"div.{form}.f32 %d, %a, %b;", "f32", *operands), np.uint32).view(np.float32)
        quotient = x.astype(float) / y
        ulps = abs(result - quotient) / np.spacing(quotient.astype(np.float32))
        assert 1 < ulps.max() <= 2.5
    huge, infinite = encoded(2.0**127, "f32"), encoded(math.inf, "f32")
    pairs = ("f32", [encoded(1.0, "f32"), infinite]), ("f32", [huge, huge])
    check(evaluate("div.approx.f32 %d, %a, %b;", "f32", *pairs), [0.0, math.nan], "f32")
    check(evaluate("div.full.f32 %d, %a, %b;", "f32", *pairs), [2.0**-127, math.inf], "f32")


def test_coarse_reciprocal_of_doubles():
    x = np.random.default_rng(7).uniform(0.1, 9, 1000)
    columns = ("f64", x.view(np.uint64).tolist())
    for opcode, exact in (("rcp", 1 / x), ("rsqrt", x**-0.5)):
        bits = evaluate(f"{opcode}.approx.ftz.f64 %d, %a;", "f64", columns)
        assert all(b & 0xFFFFFFFF == 0 for b in bits)
        error = abs(np.array(bits, np.uint64).view(np.float64) / exact - 1)
        assert 1e-8 < error.max() < 2.0**-19

"""Integer instructions, moves and refusals of the PTX interpreter, against Python integers."""

import itertools
import operator
import struct

import ptx
import pytest
from ptx.evaluate import ORDER, WIDTH, combinations, evaluate, integers, value

# ---- arithmetic ----


def truncated_division(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def high(a, b, bits):
    return a * b >> bits


INTEGER = [
    # opcode, types, value of the result from the values of the operands
    ("add", "u16 s16 u32 s32 u64 s64", operator.add),
    ("sub", "u16 s16 u32 s32 u64 s64", operator.sub),
    ("mul.lo", "u16 s16 u32 s32 u64 s64", operator.mul),
    ("mul.hi", "u16 s16", lambda a, b: high(a, b, 16)),
    ("mul.hi", "u32 s32", lambda a, b: high(a, b, 32)),
    ("mul.hi", "u64 s64", lambda a, b: high(a, b, 64)),
    ("min", "u16 s16 u32 s32 u64 s64", min),
    ("max", "u16 s16 u32 s32 u64 s64", max),
    ("and", "b16 b32 b64", operator.and_),
    ("or", "b16 b32 b64", operator.or_),
    ("xor", "b16 b32 b64", operator.xor),
]


@pytest.mark.parametrize(("opcode", "type_", "oracle"), [(o, t, f) for o, types, f in INTEGER for t in types.split()])
def test_two_integers(opcode, type_, oracle):
    a, b = combinations(integers(type_), integers(type_))
    expected = [oracle(value(x, type_), value(y, type_)) % (1 << WIDTH[type_]) for x, y in zip(a, b, strict=True)]
    assert evaluate(f"{opcode}.{type_} %d, %a, %b;", type_, (type_, a), (type_, b)) == expected


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division(type_):
    a, b = combinations(integers(type_), [x for x in integers(type_) if x])
    pairs = [(value(x, type_), value(y, type_)) for x, y in zip(a, b, strict=True)]
    quotients = [truncated_division(x, y) for x, y in pairs]
    bound = 1 << WIDTH[type_]
    assert evaluate(f"div.{type_} %d, %a, %b;", type_, (type_, a), (type_, b)) == [q % bound for q in quotients]
    remainders = [(x - q * y) % bound for q, (x, y) in zip(quotients, pairs, strict=True)]
    assert evaluate(f"rem.{type_} %d, %a, %b;", type_, (type_, a), (type_, b)) == remainders
    assert evaluate(f"div.{type_} %d, %a, 0;", type_, (type_, [5])) == [bound - 1]


ONE_INTEGER = [
    ("neg", "s16 s32 s64", None, lambda a, n: -a),
    ("abs", "s16 s32 s64", None, lambda a, n: abs(a)),
    ("not", "b16 b32 b64", None, lambda a, n: ~a),
    ("popc", "b32 b64", "u32", lambda a, n: bin(a).count("1")),
    ("clz", "b32 b64", "u32", lambda a, n: n - a.bit_length()),
    ("brev", "b32 b64", None, lambda a, n: int(f"{a:0{n}b}"[::-1], 2)),
    ("bfind", "u32 u64", "u32", lambda a, n: a.bit_length() - 1),
    ("bfind", "s32 s64", "u32", lambda a, n: (a if a >= 0 else ~a).bit_length() - 1),
    ("bfind.shiftamt", "u32 u64", "u32", lambda a, n: n - a.bit_length() if a else -1),
]


@pytest.mark.parametrize(
    ("opcode", "type_", "result", "oracle"), [(o, t, r, f) for o, ts, r, f in ONE_INTEGER for t in ts.split()]
)
def test_one_integer(opcode, type_, result, oracle):
    result, bits = result or type_, WIDTH[type_]
    expected = [oracle(value(x, type_), bits) % (1 << WIDTH[result]) for x in integers(type_)]
    assert evaluate(f"{opcode}.{type_} %d, %a;", result, (type_, integers(type_))) == expected


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32"])
def test_wide_products(type_):
    a, b, c = combinations(integers(type_), integers(type_), [0, 1, 2 ** WIDTH[type_] - 1, 2 ** (2 * WIDTH[type_]) - 1])
    wide = f"{type_[0]}{2 * WIDTH[type_]}"
    products = [value(x, type_) * value(y, type_) for x, y in zip(a, b, strict=True)]
    bound = 1 << WIDTH[wide]
    assert evaluate(f"mul.wide.{type_} %d, %a, %b;", wide, (type_, a), (type_, b)) == [p % bound for p in products]
    expected = [(p + z) % bound for p, z in zip(products, c, strict=True)]
    assert evaluate(f"mad.wide.{type_} %d, %a, %b, %c;", wide, (type_, a), (type_, b), (wide, c)) == expected


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_mad(type_):
    a, b, c = combinations(integers(type_)[:9], integers(type_)[:9], integers(type_)[:9])
    bits = WIDTH[type_]
    values = [tuple(value(v, type_) for v in row) for row in zip(a, b, c, strict=True)]
    operands = [(type_, x) for x in (a, b, c)]
    assert evaluate(f"mad.lo.{type_} %d, %a, %b, %c;", type_, *operands) == [(x * y + z) % (1 << bits) for x, y, z in values]
    expected = [((x * y >> bits) + z) % (1 << bits) for x, y, z in values]
    assert evaluate(f"mad.hi.{type_} %d, %a, %b, %c;", type_, *operands) == expected


def test_saturating_addition():
    a, b = combinations(integers("s32"), integers("s32"))
    for opcode, function in (("add", operator.add), ("sub", operator.sub)):
        sums = [function(value(x, "s32"), value(y, "s32")) for x, y in zip(a, b, strict=True)]
        expected = [min(max(s, -(2**31)), 2**31 - 1) % 2**32 for s in sums]
        assert evaluate(f"{opcode}.sat.s32 %d, %a, %b;", "s32", ("s32", a), ("s32", b)) == expected


@pytest.mark.parametrize(
    ("statement", "oracle"),
    [
        ("add.cc.u32 %r2, %r0, %r4; addc.u32 %r3, %r1, %r5;", operator.add),
        ("sub.cc.u32 %r2, %r0, %r4; subc.u32 %r3, %r1, %r5;", operator.sub),
        ("mad.lo.cc.u32 %r2, %r0, %r4, %r0; madc.hi.u32 %r3, %r0, %r4, %r1;", lambda a, b: a % 2**32 * (b % 2**32) + a),
    ],
)
def test_carry_from_word_to_word(statement, oracle):
    a, b = combinations(integers("u64"), integers("u64"))
    code = f"mov.b64 {{%r0, %r1}}, %a; mov.b64 {{%r4, %r5}}, %b; {statement} mov.b64 %d, {{%r2, %r3}};"
    expected = [oracle(x, y) % 2**64 for x, y in zip(a, b, strict=True)]
    assert evaluate(code, "u64", ("u64", a), ("u64", b)) == expected


def test_carry_through_three_words():
    """The carry into a word may itself carry: all bits set, plus one."""
    code = """add.cc.u32 %r2, %a, %b; addc.cc.u32 %r3, %c, 0; addc.cc.u64 %rd1, %e, 0; addc.u32 %d, 0, 0;"""
    a, b, c, e = combinations([0, 2**32 - 1], [0, 1], [0, 2**32 - 1], [0, 2**64 - 1])
    expected = [(x + y + (z << 32) + (w << 64)) >> 128 for x, y, z, w in zip(a, b, c, e, strict=True)]
    assert evaluate(code, "u32", ("u32", a), ("u32", b), ("u32", c), ("u64", e)) == expected
    code = """sub.cc.u32 %r2, %a, %b; subc.cc.u32 %r3, %c, 0; subc.u32 %d, 0, 0;"""
    expected = [((x - y + (z << 32)) >> 64) % 2**32 for x, y, z in zip(a, b, c, strict=True)]
    assert evaluate(code, "u32", ("u32", a), ("u32", b), ("u32", c)) == expected


def test_addition_sees_the_flag_of_a_subtraction():
    """Set where nothing was borrowed; the 128-bit division that nvcc emits needs it so."""
    a, b = combinations(integers("u32"), integers("u32"))
    code = "sub.cc.u32 %r2, %a, %b; addc.u32 %d, 0, 0;"
    assert evaluate(code, "u32", ("u32", a), ("u32", b)) == [x >= y for x, y in zip(a, b, strict=True)]


# ---- shifts and bit fields ----

AMOUNTS = [0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 2**32 - 1]


@pytest.mark.parametrize("type_", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts(type_):
    a, n = combinations(integers(type_), AMOUNTS)
    bits = WIDTH[type_]
    operands = (type_, a), ("u32", n)
    right = [(value(x, type_) >> min(y, 100)) % (1 << bits) for x, y in zip(a, n, strict=True)]
    assert evaluate(f"shr.{type_} %d, %a, %b;", type_, *operands) == right
    if type_[0] == "b":
        left = [(x << min(y, 100)) % (1 << bits) for x, y in zip(a, n, strict=True)]
        assert evaluate(f"shl.{type_} %d, %a, %b;", type_, *operands) == left


@pytest.mark.parametrize(("direction", "mode"), list(itertools.product("lr", ("wrap", "clamp"))))
def test_funnel_shift(direction, mode):
    low, up, n = combinations(integers("b32")[:9], integers("b32")[:9], AMOUNTS)

    def oracle(x, y, amount):
        amount = amount % 32 if mode == "wrap" else min(amount, 32)
        both = y << 32 | x
        return (both << amount >> 32 if direction == "l" else both >> amount) % 2**32

    expected = [oracle(*row) for row in zip(low, up, n, strict=True)]
    assert evaluate(f"shf.{direction}.{mode}.b32 %d, %a, %b, %c;", "b32", ("b32", low), ("b32", up), ("u32", n)) == expected


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(type_):
    a, position, length = combinations(integers(type_), AMOUNTS, AMOUNTS)
    bits = WIDTH[type_]

    def oracle(x, p, n):
        """Bit by bit, as the PTX ISA writes it."""
        p, n = p & 255, n & 255
        sign = 0 if type_[0] == "u" or n == 0 else x >> min(p + n - 1, bits - 1) & 1
        return sum((x >> p + i & 1 if i < n and p + i < bits else sign) << i for i in range(bits))

    expected = [oracle(*row) for row in zip(a, position, length, strict=True)]
    assert evaluate(f"bfe.{type_} %d, %a, %b, %c;", type_, (type_, a), ("u32", position), ("u32", length)) == expected


@pytest.mark.parametrize("type_", ["b32", "b64"])
def test_bit_field_insert(type_):
    a, b, position, length = combinations(integers(type_)[3:11], integers(type_)[3:11], AMOUNTS, AMOUNTS)
    bits = WIDTH[type_]

    def oracle(x, y, p, n):
        p, n = p & 255, n & 255
        inside = [p <= i < p + n for i in range(bits)]
        return sum((x >> i - p & 1 if inside[i] else y >> i & 1) << i for i in range(bits))

    expected = [oracle(*row) for row in zip(a, b, position, length, strict=True)]
    operands = (type_, a), (type_, b), ("u32", position), ("u32", length)
    assert evaluate(f"bfi.{type_} %d, %a, %b, %c, %e;", type_, *operands) == expected


def test_permute_bytes():
    a, b, s = combinations(integers("b32"), integers("b32"), [0x0000, 0x3210, 0x7654, 0x5410, 0xFEDC, 0x9B8F, 0x3276, 0x77770123])

    def oracle(x, y, selector):
        source = struct.pack("<II", x, y)
        picks = [selector >> 4 * i & 15 for i in range(4)]
        return int.from_bytes(bytes((255 if source[p & 7] & 128 else 0) if p & 8 else source[p & 7] for p in picks), "little")

    expected = [oracle(*row) for row in zip(a, b, s, strict=True)]
    assert evaluate("prmt.b32 %d, %a, %b, %c;", "b32", ("b32", a), ("b32", b), ("b32", s)) == expected


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xF8, 0x1D, 0xFF])
def test_logic_of_three(table):
    a, b, c = combinations(integers("b32"), integers("b32"), integers("b32"))

    def oracle(x, y, z):
        return sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))

    expected = [oracle(*row) for row in zip(a, b, c, strict=True)]
    assert evaluate(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", ("b32", a), ("b32", b), ("b32", c)) == expected


# ---- comparison, selection, conversion of integers ----


@pytest.mark.parametrize("type_", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_comparison(type_):
    a, b = combinations(integers(type_), integers(type_))
    pairs = [(value(x, type_), value(y, type_)) for x, y in zip(a, b, strict=True)]
    for name, function in ORDER.items():
        expected = [function(*pair) for pair in pairs]
        assert evaluate(f"setp.{name}.{type_} %d, %a, %b;", "pred", (type_, a), (type_, b)) == expected


@pytest.mark.parametrize(("name", "combine"), [("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)])
def test_comparison_combined_with_a_predicate(name, combine):
    a, b, p = combinations([0, 1], [0, 1], [0, 1])
    operands = ("u32", a), ("u32", b), ("pred", p)
    rows = list(zip(a, b, p, strict=True))
    assert evaluate(f"setp.lt.{name}.u32 %d|%p1, %a, %b, %c;", "pred", *operands) == [combine(x < y, bool(z)) for x, y, z in rows]
    assert evaluate(f"setp.lt.{name}.u32 %p1|%d, %a, %b, !%c;", "pred", *operands) == [combine(x >= y, not z) for x, y, z in rows]
    assert evaluate("set.lt.u32.u32 %d, %a, %b;", "u32", *operands[:2]) == [(2**32 - 1) * (x < y) for x, y, _ in rows]
    assert evaluate("set.lt.f32.u32 %d, %a, %b;", "u32", *operands[:2]) == [0x3F800000 * (x < y) for x, y, _ in rows]
    assert evaluate("selp.b32 %d, %a, 7, %c;", "u32", ("u32", a), ("u32", b), ("pred", p)) == [x if z else 7 for x, _, z in rows]
    assert evaluate(f"{name}.pred %d, %a, %c;", "pred", ("pred", a), ("pred", b), ("pred", p)) == [
        combine(x, z) for x, _, z in rows
    ]
    assert evaluate("not.pred %d, %a;", "pred", ("pred", a)) == [1 - x for x in a]


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("result", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversion_between_integers(source, result):
    """8-bit values live in 16-bit registers."""
    register = {t: t.replace("8", "16") if t.endswith("8") else t for t in (source, result)}
    a = integers(register[source])
    values = [value(x % (1 << WIDTH[source]), source) for x in a]
    bits = WIDTH[result]
    wrapped = [value(v % (1 << bits), result) % (1 << WIDTH[register[result]]) for v in values]
    assert evaluate(f"cvt.{result}.{source} %d, %a;", register[result], (register[source], a)) == wrapped
    if WIDTH[source] <= 32:
        low, top = (-(1 << bits - 1), (1 << bits - 1) - 1) if result[0] == "s" else (0, (1 << bits) - 1)
        clamped = [min(max(v, low), top) % (1 << WIDTH[register[result]]) for v in values]
        assert evaluate(f"cvt.sat.{result}.{source} %d, %a;", register[result], (register[source], a)) == clamped


# ---- moves, immediates, what is not there ----


def test_packing_moves():
    a = integers("b64")
    assert evaluate("mov.b64 {%r0, %r1}, %a; mov.b64 %d, {%r1, %r0};", "b64", ("b64", a)) == [
        (x << 32 | x >> 32) % 2**64 for x in a
    ]
    code = "mov.b64 {%rs0, %rs1, %rs2, %rs3}, %a; mov.b32 %d, {%rs3, %rs1};"
    assert evaluate(code, "b32", ("b64", a)) == [(x >> 48) | (x >> 16 & 0xFFFF) << 16 for x in a]
    assert evaluate("mov.b64 {_, %d}, %a;", "b32", ("b64", a)) == [x >> 32 for x in a]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("mov.u32 %d, -1;", 2**32 - 1),
        ("mov.u32 %d, 0x3fb8aa3bU;", 0x3FB8AA3B),
        ("mov.b32 %d, 0f3F800000;", 0x3F800000),
        ("mov.b64 %rd0, 0d3FF0000000000000; mov.b64 {_, %d}, %rd0;", 0x3FF00000),
        ("{.reg .b32 %a; mov.u32 %a, 5; add.u32 %d, %a, 1;}", 6),  # hides the outer %a
        ("{.reg .b32 %a; mov.u32 %a, 5;} mov.u32 %d, %a;", 7),
        ("{.reg.b16 h,r; mov.b16 h,0X1F79U; cvt.u32.u16 %d, h;}", 0x1F79),
        ("@!%a mov.u32 %d, 1; @%a mov.u32 %d, 2;", None),
    ],
)
def test_immediates_and_scopes(statement, expected):
    if expected is None:
        assert evaluate(statement, "b32", ("pred", [0, 1])) == [1, 2]
    else:
        assert evaluate(statement, "b32", ("b32", [7])) == [expected]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("frobnicate.f32 %d, %a;", "no such opcode"),
        ("add.rx.f32 %d, %a, %a;", r"unknown modifier \.rx"),
        ("add.rz.f64 %rd0, %rd1, %rd1;", "rounding"),
        ("add.u32 %d, %a;", "2 operands expected"),
        ("ld.global.v3.b32 %d, [%rd0];", r"unknown modifier \.v3"),
        ("mov.u32 %d, %clock;", "special register %clock"),
        ("cvt.s32.f32 %d, %a;", "rounding to integers"),
        ("mov.u32 %d, %undeclared;", "%undeclared"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%d}, {%a}, {%a}, {%a};", "no such opcode"),
    ],
)
def test_unknown_instructions_are_refused(statement, message):
    with pytest.raises(ptx.UnknownInstruction, match=message) as caught:
        evaluate(statement, "b32", ("b32", [1]))
    assert "line " in str(caught.value)

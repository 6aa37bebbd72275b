"""Integer, logic, selection and bit-field instructions. NumPy integers wrap around as those of PTX do."""

import numpy as np

from .formats import PRED, RAW, TYPES, U32, Type
from .table import Operation, operation, same


def _wider(type_: Type) -> Type:
    return TYPES[f"{type_.kind}{2 * type_.bits}"]


# ---- arithmetic ----


@operation("add", "sub", floats=False)
def add(opcode, m):
    type_ = m.type()
    function = np.add if opcode == "add" else np.subtract
    if m.take("cc"):
        return same(type_, 2, lambda a, b: _with_carry(opcode, a, b, opcode == "sub"), carry_out=True)
    if m.take("sat"):
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        return same(TYPES["s32"], 2, lambda a, b: np.clip(function(a.astype(np.int64), b), low, high).astype(np.int32))
    return same(type_, 2, function)


@operation("addc", "subc", floats=False)
def add_with_carry(opcode, m):
    type_ = m.type()
    if m.take("cc"):
        return same(type_, 2, lambda a, b, carry: _with_carry(opcode, a, b, carry), carry_in=True, carry_out=True)
    return same(type_, 2, lambda a, b, carry: _with_carry(opcode, a, b, carry)[0], carry_in=True)


def _with_carry(opcode, a, b, carry):
    """Sum or difference modulo 2^n, and the carry out of it. A difference is ``a + ~b + carry``: its carry means that nothing was borrowed.

    The PTX ISA calls the flag after a subtraction a borrow, but nvcc's 128-bit division reads it with ``addc`` and relies on this."""
    dtype, raw = a.dtype, RAW[a.dtype.itemsize]
    a, b, carry = a.view(raw), b.view(raw), np.asarray(carry, raw)
    if opcode.startswith("sub"):
        b = ~b
    partial = a + b
    total = partial + carry
    return total.view(dtype), (partial < a) | (total < partial)


@operation("mul", floats=False)
def mul(m):
    type_, form = m.type(), m.take("lo", "hi", "wide")
    return Operation((_wider(type_) if form == "wide" else type_,), (type_,) * 2, lambda a, b: _product(form, type_, a, b))


@operation("mad", "madc", floats=False)
def mad(opcode, m):
    type_, form, carry_out = m.type(), m.take("lo", "hi", "wide"), bool(m.take("cc"))
    result = _wider(type_) if form == "wide" else type_

    def compute(a, b, c, carry=0):
        total, out = _with_carry("add", _product(form, type_, a, b), c, carry)
        return (total, out) if carry_out else total

    return Operation((result,), (type_, type_, result), compute, carry_in=opcode == "madc", carry_out=carry_out)


def _product(form, type_, a, b):
    if form == "lo":
        return a * b
    if type_.size == 8:
        return _upper_half_of_128(a, b)
    wide = _wider(type_).dtype
    product = a.astype(wide) * b.astype(wide)
    return product if form == "wide" else (product >> wide(type_.bits)).astype(type_.dtype)


def _upper_half_of_128(a, b):
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    cross = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (cross >> half)
    if a.dtype.kind == "i":  # as unsigned numbers, negative ones are 2^64 too large
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


@operation("div", "rem", floats=False)
def div(opcode, m):
    """Rounds to zero. By zero it does what the hardware does: all bits set, and the dividend as remainder."""
    type_ = m.type()
    raw = RAW[type_.size]

    def compute(a, b):
        size_a, size_b = np.abs(a).view(raw), np.abs(b).view(raw)  # unsigned, |the smallest integer| fits
        quotient = size_a // np.where(size_b == 0, raw(1), size_b)
        if opcode == "rem":
            size, negative = size_a - np.where(size_b == 0, raw(0), quotient * size_b), a < 0
        else:
            size, negative = quotient, (a < 0) != (b < 0)
        result = np.where(negative, np.negative(size), size)
        return (np.where(b == 0, ~raw(0), result) if opcode == "div" else result).view(type_.dtype)

    return same(type_, 2, compute)


@operation("abs", "neg", floats=False)
def sign(opcode, m):
    return same(m.type(), 1, np.abs if opcode == "abs" else np.negative)


@operation("min", "max", floats=False)
def extremum(opcode, m):
    return same(m.type(), 2, np.minimum if opcode == "min" else np.maximum)


# ---- logic and moves ----


@operation("and", "or", "xor")
def logic(opcode, m):
    return same(m.type(), 2, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[opcode])


@operation("not")
def invert(m):
    return same(m.type(), 1, np.invert)


@operation("mov")
def mov(m):
    return same(m.type(), 1, lambda a: a)


@operation("selp")
def selp(m):
    type_ = m.type()
    return Operation((type_,), (type_, type_, PRED), lambda a, b, chosen: np.where(chosen, a, b))


@operation("lop3")
def lop3(m):
    """Any function of three bits, as its table of eight."""

    def compute(a, b, c, table):
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if int(table[0]) >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    type_ = m.type()
    return Operation((type_,), (type_, type_, type_, U32), compute)


# ---- shifts and bit fields ----


@operation("shl", "shr")
def shift(opcode, m):
    """Amounts beyond the width give zeros, or copies of the sign."""
    type_ = m.type()

    def compute(a, amount):
        inside = np.minimum(amount, type_.bits - 1).astype(type_.dtype)
        if opcode == "shr" and type_.kind == "s":
            return a >> inside
        return np.where(amount < type_.bits, a << inside if opcode == "shl" else a >> inside, type_.dtype(0))

    return Operation((type_,), (type_, U32), compute)


@operation("shf")
def funnel_shift(m):
    """Of the 64 bits ``b:a``: left gives the upper word of the result, right the lower one."""
    type_, left, wrap = m.type(), m.take("l", "r") == "l", m.take("wrap", "clamp") == "wrap"

    def compute(a, b, amount):
        amount = (amount & np.uint32(31) if wrap else np.minimum(amount, 32)).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return ((both << amount >> np.uint64(32)) if left else (both >> amount)).astype(np.uint32)

    return Operation((type_,), (type_, type_, U32), compute)


def _low_ones(dtype, count):
    """A mask of ``count`` low bits; ``count`` may reach the width."""
    bits = 8 * np.dtype(dtype).itemsize
    return np.where(count >= bits, ~dtype(0), (dtype(1) << np.minimum(count, bits - 1).astype(dtype)) - dtype(1))


@operation("bfe")
def bit_field_extract(m):
    type_ = m.type()
    raw, bits = RAW[type_.size], type_.bits

    def compute(a, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        unsigned = a.view(raw)
        field = np.where(position < bits, unsigned >> np.minimum(position, bits - 1).astype(raw), raw(0)) & _low_ones(raw, length)
        if type_.kind == "s":
            last = np.minimum(np.maximum(position + length, 1) - 1, bits - 1).astype(raw)
            inside = np.minimum(length, np.maximum(bits - position.astype(np.int64), 0))
            negative = (unsigned >> last & raw(1)).astype(bool) & (length > 0)
            field = np.where(negative, field | ~_low_ones(raw, inside), field)
        return field.view(type_.dtype)

    return Operation((type_,), (type_, U32, U32), compute)


@operation("bfi")
def bit_field_insert(m):
    type_ = m.type()
    raw, bits = type_.dtype, type_.bits

    def compute(a, b, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        shift = np.minimum(position, bits - 1).astype(raw)
        mask = np.where(position < bits, _low_ones(raw, length) << shift, raw(0))
        return b & ~mask | a << shift & mask

    return Operation((type_,), (type_, type_, U32, U32), compute)


@operation("prmt")
def permute(m):
    """Picks four of the eight bytes of ``b:a``; bit 3 of a selector copies the byte's sign instead."""
    type_ = m.type()

    def compute(a, b, selector):
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(1, np.uint32)
        for i in range(4):
            pick = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
            byte = np.where(pick & np.uint32(8), (byte.view(np.int8) >> np.int8(7)).view(np.uint8), byte)
            result = result | byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return Operation((type_,), (type_, type_, U32), compute)


def _bit_length(x):
    """Of unsigned integers: one plus the position of the highest one, 0 for 0."""
    length, rest = np.zeros(x.shape, np.uint32), x
    for step in (32, 16, 8, 4, 2, 1):
        if step < 8 * x.dtype.itemsize:
            upper = rest >> x.dtype.type(step)
            length, rest = length + np.where(upper != 0, np.uint32(step), np.uint32(0)), np.where(upper != 0, upper, rest)
    return length + (rest != 0).astype(np.uint32)


@operation("popc", "clz", "bfind", "brev")
def count_bits(opcode, m):
    type_ = m.type()
    raw, bits = RAW[type_.size], np.uint32(type_.bits)
    if opcode == "popc":
        return Operation((U32,), (type_,), lambda a: np.bitwise_count(a).astype(np.uint32))
    if opcode == "clz":
        return Operation((U32,), (type_,), lambda a: bits - _bit_length(a))
    if opcode == "bfind":
        shift_amount = m.take("shiftamt")

        def compute(a):
            length = _bit_length(np.where(a < 0, ~a, a).view(raw))
            found = bits - length if shift_amount else length - np.uint32(1)
            return np.where(length == 0, ~np.uint32(0), found)

        return Operation((U32,), (type_,), compute)

    def reverse(a):
        bytes_ = np.ascontiguousarray(a[:, None]).view(np.uint8)
        return (
            np.packbits(np.unpackbits(bytes_, axis=1, bitorder="little"), axis=1, bitorder="big")[:, ::-1].copy().view(raw)[:, 0]
        )

    return same(type_, 1, reverse)


# ---- comparison of integers ----

COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@operation("setp", "set", floats=False)
def compare(opcode, m):
    type_, name = m.type(), m.take(*COMPARISONS, "lo", "ls", "hi", "hs")
    function = COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)]
    return comparison(opcode, m, type_, function)


def comparison(opcode, m, type_, function):
    """``setp d|q, a, b, c``: ``d = (a < b) op c`` and ``q = !(a < b) op c``; ``set`` puts ``d`` into a register."""
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(m.take("and", "or", "xor"))
    sources = (type_, type_, PRED) if combine else (type_, type_)

    def compute(a, b, c=None):
        holds = function(a, b)
        return (holds, ~holds) if combine is None else (combine(holds, c), combine(~holds, c))

    if opcode == "setp":
        return Operation((PRED, PRED), sources, compute)
    result = m.type()
    true = {"f16": 1, "bf16": 0x3F80, "f32": 1}.get(result.name, -1)  # integers: all bits set
    return Operation((result,), sources, lambda *x: np.where(compute(*x)[0], np.array(true), np.array(0)).astype(result.dtype))

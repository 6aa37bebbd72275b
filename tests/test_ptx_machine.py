"""Memory, warps, control flow and refusals of the PTX interpreter, in PTX written by hand: needs no compiler."""

import operator
import re

import numpy as np
import ptx
import pytest
from ptx.evaluate import evaluate


def execute(body: str, x: np.ndarray, result, threads: int = 32, blocks: int = 1, outside: str = "", **options) -> np.ndarray:
    """A kernel around ``body``: ``%t`` is the thread, ``%x`` and ``%y`` the addresses of its elements of input and output, ``s`` 1 KiB of
    shared memory and ``%s`` the address of the thread's 4 bytes of it; ``%r0``..., ``%rd0``..., ``%p0``... are free."""
    memory, result = ptx.Memory(), np.dtype(result)
    text = f"""{outside} .visible .entry kernel(.param .u64 x, .param .u64 y) {{
        .shared .align 16 .b8 s[1024]; .reg .b32 %t, %s, %i; .reg .b64 %x, %y; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<9>;
        mov.u32 %t, %tid.x; mov.u32 %i, %ctaid.x; mad.lo.u32 %i, %i, {threads}, %t; mov.u32 %s, s; mad.lo.u32 %s, %t, 4, %s;
        ld.param.u64 %x, [x]; mad.wide.u32 %x, %i, {x.itemsize}, %x; ld.param.u64 %y, [y]; mad.wide.u32 %y, %i, {result.itemsize}, %y;
        {body}
        ret; }}"""
    y = memory.empty(threads * blocks, result, "y")
    ptx.run(text, "kernel", blocks, threads, [memory.put(x, "x"), y], memory, **options)
    return y.numpy()


X = np.arange(32, dtype=np.uint32) * 1000 + 7
lanes = np.arange(32)

# ---- faults, each next to the kernel without it ----

LOAD, STORE = "ld.global.u32 %r0, [%x];", "st.global.u32 [%y], %r0;"
FAULTS = {
    "load behind the end": (ptx.OutOfBounds, f"{LOAD} {STORE}", f"ld.global.u32 %r0, [%x+4]; {STORE}"),
    "store before the start": (ptx.OutOfBounds, f"{LOAD} {STORE}", f"{LOAD} st.global.u32 [%y+-4], %r0;"),
    "misaligned load": (ptx.Misaligned, f"{LOAD} {STORE}", f"@!%p0 ld.global.u32 %r0, [%x+2]; {STORE}"),
    "misaligned vector": (
        ptx.Misaligned,
        f"ld.param.u64 %rd0, [x]; ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%rd0]; {STORE}",
        f"ld.param.u64 %rd0, [x]; ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%rd0+8]; {STORE}",
    ),
    "unwritten output": (ptx.Uninitialized, f"{LOAD} {STORE}", f"ld.global.u32 %r0, [%y]; {STORE}"),
    "unwritten shared memory": (
        ptx.Uninitialized,
        f"{LOAD} st.shared.u32 [%s], %r0; ld.shared.u32 %r0, [%s]; {STORE}",
        f"{LOAD} st.shared.u16 [%s], %r0; ld.shared.u32 %r0, [%s]; {STORE}",
    ),
    "shared memory behind the end": (
        ptx.OutOfBounds,
        f"{LOAD} st.shared.u32 [%s+896], %r0; {STORE}",
        f"{LOAD} st.shared.u32 [%s+900], %r0; {STORE}",
    ),
    "race": (
        ptx.SharedRace,
        f"{LOAD} st.shared.u32 [%s], %r0; bar.sync 0; xor.b32 %r1, %s, 4; ld.shared.u32 %r0, [%r1]; {STORE}",
        f"{LOAD} st.shared.u32 [%s], %r0; xor.b32 %r1, %s, 4; ld.shared.u32 %r0, [%r1]; {STORE}",
    ),
    "two stores to one byte": (
        ptx.GlobalConflict,
        f"{LOAD} {STORE}",
        f"{LOAD} {STORE} ld.param.u64 %rd0, [y]; st.global.u8 [%rd0+5], %r0;",
    ),
    "barrier in a branch": (
        ptx.BarrierError,
        f"{LOAD} bar.sync 0; {STORE} bar.sync 0;",
        f"{LOAD} setp.lt.u32 %p1, %t, 9; @%p1 bar.sync 0; {STORE} bar.sync 0;",
    ),
    "shuffle in a branch": (
        ptx.WarpError,
        f"{LOAD} shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1; {STORE}",
        f"{LOAD} setp.lt.u32 %p1, %t, 9; @%p1 shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1; {STORE}",
    ),
    "trap": (
        ptx.Trapped,
        f"setp.gt.u32 %p1, %t, 99; @%p1 trap; {LOAD} {STORE}",
        f"setp.gt.u32 %p1, %t, 30; @%p1 trap; {LOAD} {STORE}",
    ),
    "endless loop": (ptx.Trapped, f"{LOAD} {STORE}", f"AGAIN: bra AGAIN; {STORE}"),
    "call of nothing": (ptx.Trapped, f"{LOAD} {STORE}", f"call.uni absent, (); {STORE}"),
    "unknown instruction": (ptx.UnknownInstruction, f"{LOAD} {STORE}", f"frobnicate.u32 %r0, 1; {STORE}"),
    "generic address of another window": (
        ptx.OutOfBounds,
        f"cvta.shared.u64 %rd0, 0; cvta.to.shared.u64 %rd1, %rd0; {LOAD} {STORE}",
        f"cvta.to.shared.u64 %rd1, %x; {LOAD} {STORE}",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    kind, right, wrong = FAULTS[name]
    prelude = "setp.ne.u32 %p0, %t, 3;"
    execute(prelude + right, X, "u4")
    with pytest.raises(kind, match="line [0-9]+: `") as caught:
        execute(prelude + wrong, X, "u4", max_steps=500)
    assert caught.type is kind and "thread (" in str(caught.value) or kind is ptx.UnknownInstruction


# ---- loads and stores ----


def test_short_integers_are_extended_by_their_type():
    values = np.arange(120, 152, dtype=np.uint8)
    for type_, dtype in (("u8", np.uint8), ("s8", np.int8)):
        got = execute(f"ld.global.{type_} %r0, [%x]; st.global.u32 [%y], %r0;", values, "i4")
        np.testing.assert_array_equal(got, values.view(dtype).astype(np.int32))
    got = execute("ld.global.u32 %r0, [%x]; st.global.u8 [%y], %r0;", X, "u1")
    np.testing.assert_array_equal(got, X.astype(np.uint8))


def test_vectors_with_hints():
    body = """ld.param.u64 %rd0, [x]; mad.wide.u32 %rd0, %t, 16, %rd0; ld.param.u64 %rd1, [y]; mad.wide.u32 %rd1, %t, 16, %rd1;
        setp.lt.u32 %p0, %t, 8; @!%p0 bra END; createpolicy.fractional.L2::evict_first.b64 %rd2, 1.0;
        @%p0 ld.global.nc.L1::evict_last.L2::cache_hint.v4.b32 { %r0, %r1, %r2, %r3 }, [ %rd0 + 0 ], %rd2;
        st.global.cs.v2.b32 [%rd1], {%r3, %r2}; st.global.wt.v2.b32 [%rd1+8], {%r1, %r0}; END:"""
    np.testing.assert_array_equal(execute(body, X, "u4"), X.reshape(8, 4)[:, ::-1].ravel())


def test_generic_addresses_of_three_spaces_in_one_load():
    body = """.local .align 4 .b8 l[4]; mov.u64 %rd3, l; st.local.u32 [l], 5; cvta.local.u64 %rd0, %rd3;
        st.shared.u32 [%s], %t; cvt.u64.u32 %rd1, %s; cvta.shared.u64 %rd1, %rd1;
        rem.u32 %r0, %t, 3; setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r0, 1;
        selp.b64 %rd2, %rd0, %x, %p0; selp.b64 %rd2, %rd1, %rd2, %p1; ld.u32 %r1, [%rd2]; add.u32 %r1, %r1, 1; st.global.u32 [%y], %r1;"""
    expected = np.where(lanes % 3 == 0, 5, np.where(lanes % 3 == 1, lanes, X)) + 1
    np.testing.assert_array_equal(execute(body, X, "u4"), expected)


def test_addresses_wrap_around_at_the_width_of_their_register():
    """nvcc lets a 32-bit base fall below zero and adds the rest in the offset."""
    body = """ld.global.u32 %r0, [%x]; sub.u32 %r1, %s, 512; st.shared.u32 [%r1+512], %r0; bar.sync 0; ld.shared.u32 %r2, [%s];
        st.global.u32 [%y], %r2;"""
    np.testing.assert_array_equal(execute(body, X, "u4"), X)
    with pytest.raises(ptx.OutOfBounds, match="offset -4 of shared memory"):
        execute(body.replace("+512", "+508"), X, "u4")


def test_matrices():
    """Through ldmatrix, and back through stmatrix, transposed."""
    values = np.arange(32 * 8, dtype=np.uint16)  # 16 bytes of each lane, a row of one of four matrices
    load = """ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x];
        mov.u32 %r9, s; mad.lo.u32 %r9, %t, 16, %r9; st.shared.v4.b32 [%r9], {%r0, %r1, %r2, %r3}; bar.sync 0;"""
    store = "st.global.v4.b32 [%y], {%r4, %r5, %r6, %r7};"
    matrices = values.reshape(4, 8, 8)
    for suffix, expected in (("", matrices), (".trans", matrices.transpose(0, 2, 1))):
        move = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r9];"
        pairs = _matrix_run(load + move + store, values)
        np.testing.assert_array_equal(pairs.reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8), expected)
        back = f"bar.sync 0; stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r9], {{%r4, %r5, %r6, %r7}}; bar.sync 0;"
        back += "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r9];"
        np.testing.assert_array_equal(_matrix_run(load + move + back + store, values), values)
    for missing in ("%t, 5", "%i, 40"):
        with pytest.raises(ptx.WarpError, match="not all lanes"):
            _matrix_run(load + f"setp.ne.u32 %p0, {missing}; @%p0 " + move + store, np.tile(values, 2), blocks=2)
    two = "setp.lt.u32 %p0, %t, 16; selp.u32 %r9, %r9, -16, %p0; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [%r9];"
    two += "mov.u32 %r6, 0; mov.u32 %r7, 0;"  # the addresses of the upper lanes do not count
    np.testing.assert_array_equal(_matrix_run(load + two + store, values).reshape(32, 4, 2)[:, 1].reshape(8, 8), matrices[1])
    with pytest.raises(ptx.Uninitialized, match="16 bytes at offset 512 of shared"):
        _matrix_run(load + "setp.eq.u32 %p0, %t, 20; selp.u32 %r9, 512, %r9, %p0;" + move + store, values)


def _matrix_run(body: str, values: np.ndarray, blocks: int = 1) -> np.ndarray:
    """One 16-byte row per thread, in and out."""
    return execute(body, values.view("V16"), "V16", blocks=blocks).view(np.uint16)


ATOMICS = {
    # what is left, from what was there, the operand, and the second operand of cas
    "add": lambda old, b, c: old + b,
    "min": lambda old, b, c: min(old, b),
    "max": lambda old, b, c: max(old, b),
    "and": lambda old, b, c: old & b,
    "or": lambda old, b, c: old | b,
    "xor": lambda old, b, c: old ^ b,
    "exch": lambda old, b, c: b,
    "inc": lambda old, b, c: 0 if old >= b else old + 1,
    "dec": lambda old, b, c: b if old == 0 or old > b else old - 1,
    "cas": lambda old, b, c: c if old == b else old,
}


@pytest.mark.parametrize(
    ("name", "type_"), [(n, t) for n in ATOMICS for t in ("u32", "s32", "u64", "s64") if t == "u32" or n not in ("inc", "dec")]
)
def test_atomics_one_after_the_other(name, type_):
    """All threads at one word of shared memory: each gets what the one before it left."""
    bits, dtype = int(type_[1:]), np.dtype(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}")
    start, operands = 5, (lanes * 7 % 11 - (3 if type_[0] == "s" else 0)).astype(dtype)
    if name == "inc":
        operands = (lanes // 3 % 4).astype(dtype)
    if name == "cas":
        operands = np.where(lanes % 4 == 0, 5, operands).astype(dtype)
    kind = f"b{bits}" if name in ("and", "or", "xor", "exch", "cas") else type_
    register, extra = ("%r" if bits == 32 else "%rd"), (", 6" if name == "cas" else "")
    body = f"""ld.global.{type_} {register}1, [%x]; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.{type_} [s], {start}; bar.sync 0;
        atom.acq_rel.cta.shared.{name}.{kind} {register}0, [s], {register}1{extra}; st.global.{type_} [%y], {register}0;"""
    before, expected = start, []
    for b in operands.tolist():
        expected.append(before)
        before = ATOMICS[name](before, b, 6)
        before = int(np.array(before % 2**bits, np.uint64).astype(dtype))
    assert execute(body, operands, dtype).tolist() == expected


# ---- warps and branches ----


def test_votes_and_reductions():
    body = """ld.global.u32 %r0, [%x]; and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 1; vote.sync.uni.pred %p1, %p0, -1;
        selp.u32 %r2, 1, 0, %p1; match.all.sync.b32 %r3|%p2, %r1, -1; selp.u32 %r4, 2, 0, %p2; redux.sync.xor.b32 %r5, %r0, -1;
        add.u32 %r2, %r2, %r4; mad.lo.u32 %r2, %r5, 4, %r2; add.u32 %r2, %r2, %r3; st.global.u32 [%y], %r2;"""
    for alike in (X, X + np.uint32(1)):
        assert set(execute(body, alike, "u4").tolist()) == {(4 * int(np.bitwise_xor.reduce(alike)) + 3 + 2**32 - 1) % 2**32}
    mixed = X + (lanes == 5)
    assert set(execute(body, mixed.astype(np.uint32), "u4").tolist()) == {4 * int(np.bitwise_xor.reduce(mixed))}


def test_branch_through_a_table():
    body = """ld.global.u32 %r0, [%x]; LIST: .branchtargets ZERO, ONE, TWO; brx.idx %r0, LIST;
        ZERO: mov.u32 %r1, 10; bra.uni END; ONE: mov.u32 %r1, 20; bra.uni END; TWO: mov.u32 %r1, 30; END: st.global.u32 [%y], %r1;"""
    index = (lanes * 5 % 3).astype(np.uint32)
    np.testing.assert_array_equal(execute(body, index, "u4"), 10 * (index + 1))
    with pytest.raises(ptx.Trapped, match="beyond the list"):
        execute(body, index + np.uint32(1), "u4")


def test_function_called_on_two_paths_returns_to_both():
    function = """.func (.param .b32 out) twice(.param .b32 in) { .reg .b32 %a; ld.param.u32 %a, [in]; shl.b32 %a, %a, 1;
        st.param.u32 [out+0], %a; ret; }"""
    call = "{ .param .b32 p; st.param.u32 [p+0], %r0; .param .b32 r; call.uni (r), twice, (p); ld.param.u32 %r1, [r+0]; }"
    body = f"""ld.global.u32 %r0, [%x]; setp.lt.u32 %p0, %t, 13; @%p0 bra LOW; {call} add.u32 %r1, %r1, 1; bra END;
        LOW: {call} END: st.global.u32 [%y], %r1;"""
    np.testing.assert_array_equal(execute(body, X, "u4", outside=function), 2 * X + (lanes >= 13))


def test_loops_of_different_length_meet_again():
    body = """ld.global.u32 %r0, [%x]; mov.u32 %r1, 0; LOOP: setp.gt.u32 %p0, %r1, %t; @%p0 bra DONE; add.u32 %r1, %r1, 1;
        add.u32 %r0, %r0, 10; bra LOOP; DONE: vote.sync.ballot.b32 %r2, %p0, -1; not.b32 %r2, %r2; add.u32 %r0, %r0, %r2;
        st.global.u32 [%y], %r0;"""
    np.testing.assert_array_equal(execute(body, X, "u4"), X + 10 * (lanes + 1))


def test_guarded_instructions_keep_what_was_there():
    body = """mov.u32 %r0, 1; setp.lt.u32 %p0, %t, 7; @%p0 mov.u32 %r0, 2; @!%p0 add.u32 %r0, %r0, 5; setp.eq.u32 %p1, %t, 3;
        @%p1 ld.global.u32 %r0, [%x]; @%p1 st.global.u32 [%y], %r0; @%p1 ret; st.global.u32 [%y], %r0;"""
    np.testing.assert_array_equal(execute(body, X, "u4"), np.where(lanes == 3, X, np.where(lanes < 7, 2, 6)))


def test_register_that_nobody_wrote_is_nan():
    assert np.isnan(execute("mov.b32 %r0, %r5; st.global.b32 [%y], %r0;", X, "f4")).all()


def test_warp_of_less_than_32_threads():
    body = """ld.global.u32 %r0, [%x]; shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1; st.global.u32 [%y], %r0;"""
    x = np.arange(40, dtype=np.uint32)
    np.testing.assert_array_equal(execute(body, x, "u4", threads=40), x[np.arange(40) ^ 1])
    with pytest.raises(ptx.WarpError, match="lane 8, which does not take part"):
        execute(body.replace("bfly.b32 %r0, %r0, 1", "down.b32 %r0, %r0, 1"), x, "u4", threads=40)


def test_blocks_do_not_share_memory():
    """Each block writes its number to the same shared address."""
    body = "mov.u32 %r0, %ctaid.x; st.shared.u32 [%s], %r0; bar.sync 0; ld.shared.u32 %r1, [%s]; st.global.u32 [%y], %r1;"
    np.testing.assert_array_equal(execute(body, np.zeros(96, np.uint32), "u4", blocks=3), np.repeat([0, 1, 2], 32))


@pytest.mark.parametrize("name", ["eq", "lt", "le", "gt", "ge"])
def test_lane_masks(name):
    compare = getattr(operator, name)
    expected = [sum(compare(j, i) << j for j in range(32)) for i in range(32)]
    assert evaluate(f"mov.u32 %d, %lanemask_{name};", "u32", ("u32", [0] * 32)) == expected


# ---- text that is refused ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".visible .entry kernel() { ret;", "brace is never closed"),
        (".texref t; .visible .entry kernel() { ret; }", "not a declaration that the interpreter knows: '.texref t'"),
        (".visible .entry kernel() { A: A: ret; }", "label A stands twice"),
        (".visible .entry kernel() {\n .reg .b99 %r; ret; }", "line 2: `.reg .b99 %r`"),
        (".visible .entry kernel() { ld.global.u32 %r, [%tid.x]; ret; }", "not an address"),
    ],
)
def test_malformed_text(text, message):
    with pytest.raises(ptx.UnknownInstruction, match=re.escape(message)):
        ptx.run(text, "kernel", 1, 1, [], ptx.Memory())


def test_block_must_be_the_one_compiled_for():
    text = ".visible .entry kernel() .reqntid 64, 2 { ret; }"
    ptx.run(text, "kernel", 1, (64, 2), [], ptx.Memory())
    with pytest.raises(ValueError, match=r"block \(128, 1, 1\), but the kernel was compiled for \(64, 2, 1\)"):
        ptx.run(text, "kernel", 1, 128, [], ptx.Memory())


def test_output_must_be_written_and_names_its_buffer():
    with pytest.raises(ptx.Uninitialized, match="y: 124 of 128 bytes were never written"):
        execute("setp.eq.u32 %p0, %t, 9; @%p0 st.global.u32 [%y], %t;", X, "u4")


def test_asynchronous_copies_of_a_part():
    """Of 16 bytes each thread copies as many as its number says, 0 to 16; zeros follow. What lies beyond is not read."""
    memory = ptx.Memory()
    content = np.arange(1, 33 * 16 + 1, dtype=np.uint32).astype(np.uint8)
    x, y = memory.put(content[: 32 * 16]), memory.empty(32 * 16, np.uint8)
    text = """
        .visible .entry kernel(.param .u64 x, .param .u64 y) {
        .shared .align 16 .b8 s[512]; .reg .b32 %t, %n, %s, %r<4>; .reg .b64 %x, %y;
        mov.u32 %t, %tid.x; min.u32 %n, %t, 16; mov.u32 %s, s; mad.lo.u32 %s, %t, 16, %s;
        ld.param.u64 %x, [x]; mad.wide.u32 %x, %t, 16, %x; ld.param.u64 %y, [y]; mad.wide.u32 %y, %t, 16, %y;
        cp.async.cg.shared.global [%s], [%x], 16, %n; cp.async.wait_all;
        ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%s]; st.global.v4.u32 [%y], {%r0, %r1, %r2, %r3};
        ret; }"""
    report = ptx.run(text, "kernel", 1, 32, [x, y], memory)
    expected = content[: 32 * 16].reshape(32, 16) * (np.arange(16) < np.minimum(np.arange(32), 16)[:, None])
    np.testing.assert_array_equal(y.numpy().reshape(32, 16), expected)
    assert report.loads_of[x].bytes == report.loads_of[x].distinct == np.minimum(np.arange(32), 16).sum()

"""Bank conflicts and sectors, as the PTX interpreter counts them, of accesses whose counts are known; and of the CUDA kernels' loads and
stores as ptxas merges them."""

import numpy as np
import ptx
import pytest
from ptx.requests import as_assembled, width

LANE = np.arange(32)


def launch(body: str, places: np.ndarray, **options) -> ptx.Report:
    """Each thread finds its number of ``places`` in ``%p``; ``%s`` is that place in shared memory, ``%g`` in a global buffer of zeros."""
    memory = ptx.Memory()
    text = f"""
        .visible .entry kernel(.param .u64 x, .param .u64 y) {{
        .shared .align 128 .b8 s[16384]; .reg .b32 %t, %p, %s, %z; .reg .b64 %x, %w, %g; .reg .b32 %r<9>; .reg .pred %q;
        mov.u32 %t, %tid.x; mov.u32 %z, 0; ld.param.u64 %x, [x]; mad.wide.u32 %x, %t, 4, %x; ld.global.u32 %p, [%x];
        mov.u32 %s, s; add.u32 %s, %s, %p; ld.param.u64 %g, [y]; cvt.u64.u32 %w, %p; add.u64 %g, %g, %w;
        {body}
        ret; }}"""
    args = [memory.put(places.astype(np.uint32)), memory.put(np.zeros(16384, np.uint8))]
    return ptx.run(text, "kernel", 1, places.size, args, memory, **options)


def counted(report: ptx.Report, space: str) -> list:
    """The requests of the body, in the order of its lines; the first load is that of the places."""
    found = [r for (_, where), r in sorted(report.requests.items()) if where == space]
    return found[space == "global" :]


STORES = {
    1: ".u8 [%s], %z",
    2: ".u16 [%s], %z",
    4: ".u32 [%s], %z",
    8: ".v2.u32 [%s], {%z, %z}",
    16: ".v4.u32 [%s], {%z, %z, %z, %z}",
}


@pytest.mark.parametrize(
    "size, places, wavefronts, least",
    [
        (4, 4 * LANE, 1, 1),
        (4, 0 * LANE, 1, 1),  # one word, for all
        (4, 4 * LANE[::-1], 1, 1),
        (4, 8 * LANE, 2, 1),
        (4, 12 * LANE, 1, 1),  # an odd stride
        (4, 16 * LANE, 4, 1),
        (4, 128 * LANE, 32, 1),
        (4, 132 * LANE, 1, 1),  # padded rows
        (4, 128 * (LANE % 4), 4, 1),  # four words of a bank, each for eight lanes
        (1, LANE, 1, 1),
        (2, 2 * LANE, 1, 1),
        (2, 64 * LANE, 16, 1),
        (8, 8 * LANE, 2, 2),  # a half of the warp after the other
        (8, 16 * LANE, 4, 2),
        (8, 136 * LANE, 2, 2),
        (8, 128 * (LANE // 16) + 8 * (LANE % 16), 2, 2),
        (16, 16 * LANE, 4, 4),  # quarters
        (16, 32 * LANE, 8, 4),
        (16, 272 * LANE, 4, 4),
        (16, 0 * LANE, 4, 4),
        (16, 128 * LANE, 32, 4),
    ],
)
def test_wavefronts_of_shared_memory(size, places, wavefronts, least):
    (found,) = counted(launch(f"st.shared{STORES[size]};", places), "shared")
    assert (found.bytes, found.requests, found.wavefronts, found.least_wavefronts) == (size, 1, wavefronts, least)
    twice = np.concatenate((places, places[::-1]))  # a second warp, with the same wavefronts
    (found,) = counted(launch(f"st.shared{STORES[size]};", twice, replicated=True), "shared")
    assert (found.requests, found.wavefronts) == (2, 2 * wavefronts)


def test_lanes_that_take_no_part():
    guard = "setp.lt.u32 %q, %t, 5; @%q st.shared"
    (found,) = counted(launch(f"{guard}{STORES[16]};", 16 * LANE), "shared")
    assert (found.requests, found.wavefronts, found.least_wavefronts) == (1, 1, 1)
    (found,) = counted(launch(f"{guard}{STORES[4]};", 128 * LANE), "shared")
    assert (found.wavefronts, found.least_wavefronts) == (5, 1)


def test_loads_and_generic_addresses():
    body = f"""st.shared{STORES[4]}; bar.sync 0;
        ld.shared.u32 %r0, [%s];
        cvt.u64.u32 %x, %s; cvta.shared.u64 %x, %x;
        ld.u32 %r0, [%x];
        ld.u32 %r0, [%g];"""
    report = launch(body, 8 * LANE)
    assert [r.wavefronts for r in counted(report, "shared")] == [2, 2, 2]
    assert [(r.sectors, r.wavefronts) for r in counted(report, "global")] == [(8, 0)]


LOADS = {4: ".u32 %r0, [%g]", 8: ".v2.u32 {%r0, %r1}, [%g]", 16: ".v4.u32 {%r0, %r1, %r2, %r3}, [%g]"}


@pytest.mark.parametrize(
    "size, places, sectors, least, lines",
    [
        (4, 4 * LANE, 4, 4, 1),
        (4, 4 * LANE[::-1], 4, 4, 1),
        (4, 4 * LANE + 4, 5, 4, 2),  # shifted
        (4, 32 * LANE, 32, 4, 8),
        (4, 128 * LANE, 32, 4, 32),
        (4, 0 * LANE, 1, 1, 1),
        (8, 8 * LANE, 8, 8, 2),
        (8, 16 * LANE, 16, 8, 4),
        (16, 16 * LANE, 16, 16, 4),
        (16, 256 * (LANE // 4) + 16 * (LANE % 4), 16, 16, 8),  # whole sectors of half a line
        (16, 64 * LANE, 32, 16, 16),
    ],
)
def test_sectors_of_global_memory(size, places, sectors, least, lines):
    for body in (f"ld.global{LOADS[size]};", f"ld.global.nc{LOADS[size]};"):
        (found,) = counted(launch(body, places), "global")
        assert (found.bytes, found.requests, found.sectors, found.least_sectors, found.lines) == (size, 1, sectors, least, lines)


def test_asynchronous_copies_and_matrices():
    copy = "cp.async.cg.shared.global [%s], [%g], 16; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    report = launch(copy, 32 * LANE)
    assert [(r.requests, r.wavefronts) for r in counted(report, "shared")] == [(1, 8)]
    assert [(r.sectors, r.least_sectors) for r in counted(report, "global")] == [(32, 16)]
    # Rows of 16 bytes: beside each other, and 64 bytes apart, where four rows of a matrix meet in a bank.
    for stride, wavefronts in ((16, 4), (64, 16)):
        body = f"st.shared{STORES[16]}; bar.sync 0;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%s];"
        assert counted(launch(body, stride * LANE), "shared")[1].wavefronts == wavefronts


def test_as_ptxas_merged_them():
    """Four stores of a word, each of which meets four lanes in a bank, as one of 16 bytes without conflicts."""
    body = "\n".join(f"st.shared.u32 [%s+{4 * k}], %z;" for k in range(4))
    report = launch(body, 16 * LANE)
    lines = [line for line, space in sorted(report.requests) if space == "shared"]
    assert [r.wavefronts for r in counted(report, "shared")] == [4] * 4
    for kept in lines:
        with as_assembled({kept: 16}):
            (found,) = [r for (_, space), r in launch(body, 16 * LANE).requests.items() if space == "shared"]
        assert (found.bytes, found.requests, found.wavefronts) == (16, 1, 4)
    assert width(lines[0], 4) == 4

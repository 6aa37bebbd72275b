"""Triton kernels compiled offline for three architectures and executed by the PTX interpreter, against NumPy."""

import numpy as np
import oracle
import ptx
import pytest
from ptx.evaluate import decoded

triton = pytest.importorskip("triton", reason="needs Triton to compile the kernels")
import triton.language as tl  # noqa: E402


@triton.jit
def softmax(x, y, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Over the channels of (CHANNELS, pixels), bfloat16 to bfloat16."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, CHANNELS)
    at = c[:, None] * pixels + p[None, :]
    v = tl.load(x + at, mask=(p < pixels)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
    e = tl.exp(v - tl.max(v, 0)[None, :])
    tl.store(y + at, (e / tl.sum(e, 0)[None, :]).to(tl.bfloat16), mask=(p < pixels)[None, :])


@triton.jit
def row_norms(x, y, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Root of the sum of squares of each row, in a pipelined loop over tiles of float16."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=3):
        k = start + tl.arange(0, BLOCK)
        inside = (r < rows)[:, None] & (k < columns)[None, :]
        v = tl.load(x + r[:, None] * columns + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += v * v
    tl.store(y + r, tl.sqrt(tl.sum(total, 1)), mask=r < rows)


@triton.jit
def philox_words(y, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(y + i, a, mask=i < n)
    tl.store(y + n + i, b, mask=i < n)
    tl.store(y + 2 * n + i, c, mask=i < n)
    tl.store(y + 3 * n + i, d, mask=i < n)


@triton.jit
def total_of_logs(x, partial, total, arrived, n, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """The program that arrives last adds up, in order, and resets the counter."""
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + pid, tl.sum(tl.log(tl.load(x + i, mask=i < n, other=1.0)), 0))
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        k = tl.arange(0, PROGRAMS)
        sums = tl.load(partial + k, mask=k < tl.num_programs(0), other=0.0, cache_modifier=".cg")
        tl.store(total, tl.sum(sums, 0))
        tl.atomic_xchg(arrived, 0)


@triton.jit
def weighted(x, weights, y, n, BLOCK: tl.constexpr):
    """float64 from bfloat16 where the weight, a byte, is not 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weights + i, mask=i < n, other=0)
    v = tl.load(x + i, mask=(i < n) & (w != 0), other=0.0).to(tl.float64)
    tl.store(y + i, tl.exp(v) * w, mask=i < n)


@triton.jit
def transposed(x, y, rows, columns, BLOCK: tl.constexpr):
    """Through shared memory, when Triton changes the layout of the tile."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + r[:, None] * columns + c[None, :], mask=(r < rows)[:, None] & (c < columns)[None, :])
    tl.store(y + c[:, None] * rows + r[None, :], tl.trans(v), mask=(c < columns)[:, None] & (r < rows)[None, :])


def sources(capability: int) -> list[ptx.TritonSource]:
    def source(function, signature, constants, divisible, warps=4):
        return ptx.TritonSource("test_ptx_triton", function, signature, constants, divisible, warps, capability)

    matrix = {"rows": "i32", "columns": "i32"}
    counts = {"partial": "*fp32", "total": "*fp32", "arrived": "*i32"}
    return [
        source("softmax", {"x": "*bf16", "y": "*bf16", "pixels": "i32"}, {"CHANNELS": 32, "BLOCK": 64}, ("x", "y", "pixels")),
        source("row_norms", {"x": "*fp16", "y": "*fp32", **matrix}, {"ROWS": 8, "BLOCK": 128}, ("x", "y", "columns")),
        source("philox_words", {"y": "*i32", "seed": "i64", "n": "i32"}, {"BLOCK": 128}, ("y",)),
        source("total_of_logs", {"x": "*fp32", **counts, "n": "i32"}, {"BLOCK": 1024, "PROGRAMS": 16}, ("x", "n"), warps=8),
        source("weighted", {"x": "*bf16", "weights": "*i8", "y": "*fp64", "n": "i32"}, {"BLOCK": 512}, ("x", "weights", "y")),
        source("transposed", {"x": "*fp32", "y": "*fp32", **matrix}, {"BLOCK": 32}, ("x", "y")),
    ]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], ptx.TritonKernel]:
    """All kernels for all architectures, from one process."""
    kernels = ptx.triton_to_ptx(*sources(80), *sources(90), *sources(100))
    return {(kernel.source.function, kernel.source.capability): kernel for kernel in kernels}


@pytest.fixture(params=[80, 90, 100], ids="sm_{}".format)
def kernel(request, compiled):
    return lambda name: compiled[name, request.param]


RNG = np.random.default_rng(12)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda b: decoded(int(b), "bf16"))(bits)


@pytest.mark.parametrize("pixels", [256, 1040])
def test_softmax(kernel, pixels):
    values = (4 * RNG.standard_normal((32, pixels))).astype(np.float32).view(np.uint32) >> 16
    memory = ptx.Memory()
    x, y = memory.put(values.astype(np.uint16), "x"), memory.empty((32, pixels), np.uint16, "y")
    report = kernel("softmax").run(-(-pixels // 64), {"x": x, "y": y, "pixels": pixels}, memory)
    v = from_bfloat16(values)
    e = np.exp(v - v.max(0))
    np.testing.assert_allclose(from_bfloat16(y.numpy()), e / e.sum(0), rtol=2.0**-8, atol=1e-30)
    read, written = report.loads_of[x], report.stores_to[y]
    assert read.bytes == read.distinct == written.bytes == 2 * 32 * pixels
    assert read.efficiency == written.efficiency == 1
    assert "ld.global.L1::evict_first.L2::cache_hint.v4" in kernel("softmax").ptx  # predicated 16-byte loads, in inline assembly


@pytest.mark.parametrize(("rows", "columns"), [(16, 512), (13, 336)])
def test_row_norms(kernel, rows, columns):
    values, memory = RNG.standard_normal((rows, columns)).astype(np.float16), ptx.Memory()
    x, y = memory.put(values), memory.empty(rows, np.float32)
    args = {"x": x, "y": y, "rows": rows, "columns": columns}
    report = kernel("row_norms").run(-(-rows // 8), args, memory)
    np.testing.assert_allclose(y.numpy(), np.sqrt((values.astype(float) ** 2).sum(1)), rtol=1e-5)
    assert report.loads.bytes == values.nbytes
    assert "cp.async" in kernel("row_norms").ptx


def test_philox(kernel):
    n, seed, memory = 1000, 0x1234567887654321, ptx.Memory()
    y = memory.empty((4, n), np.uint32)
    kernel("philox_words").run(8, {"y": y, "seed": seed, "n": n}, memory)
    i, zero = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    expected = oracle.philox((i, zero, zero, zero), (zero + np.uint64(seed & 0xFFFFFFFF), zero + np.uint64(seed >> 32)))
    np.testing.assert_array_equal(y.numpy(), np.stack(expected))


def test_last_program_adds_up(kernel):
    n, memory = 10_000, ptx.Memory()
    values = RNG.uniform(0.5, 3, n).astype(np.float32)
    x, partial = memory.put(values), memory.empty(10, np.float32)
    total, arrived = memory.empty(1, np.float32), memory.put(np.zeros(1, np.int32))
    args = {"x": x, "partial": partial, "total": total, "arrived": arrived, "n": n}
    for _ in range(2):
        report = kernel("total_of_logs").run(10, args, memory)
        np.testing.assert_allclose(total.numpy(), np.log(values.astype(float)).sum(), rtol=1e-5)
        assert report.loads_of[x].bytes == values.nbytes and report.stores_to[partial].bytes == 40


def test_weighted_double(kernel):
    n, memory = 900, ptx.Memory()
    bits = (RNG.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    weights, y = RNG.integers(-1, 3, n).astype(np.int8), memory.empty(n, np.float64)
    kernel("weighted").run(2, {"x": memory.put(bits), "weights": memory.put(weights), "y": y, "n": n}, memory)
    np.testing.assert_allclose(y.numpy(), np.where(weights, np.exp(from_bfloat16(bits)), 1) * weights, rtol=1e-14)


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (45, 70)])
def test_transposition(kernel, rows, columns):
    values, memory = RNG.standard_normal((rows, columns)).astype(np.float32), ptx.Memory()
    y = memory.empty((columns, rows), np.float32)
    args = {"x": memory.put(values), "y": y, "rows": rows, "columns": columns}
    report = kernel("transposed").run((-(-rows // 32), -(-columns // 32)), args, memory)
    np.testing.assert_array_equal(y.numpy(), values.T)
    assert report.loads.bytes == report.stores.bytes == values.nbytes


def test_fault_in_a_triton_kernel(kernel):
    """A mask that is one too large."""
    memory = ptx.Memory()
    y = memory.empty((4, 99), np.uint32, "y")
    with pytest.raises(ptx.OutOfBounds, match="of y, which has 1584"):
        kernel("philox_words").run(1, {"y": y, "seed": 1, "n": 100}, memory)


def test_arguments_are_named(kernel):
    with pytest.raises(ValueError, match=r"arguments \['n', 'seed', 'y'\] expected, got \['y'\]"):
        kernel("philox_words").run(1, {"y": 0}, ptx.Memory())

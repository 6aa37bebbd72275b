"""CUDA kernels of the kinds that this library needs, compiled by nvcc and executed by the PTX interpreter, against NumPy."""

import math
from fractions import Fraction

import numpy as np
import oracle
import ptx
import pytest
from ptx.evaluate import decoded, encoded, rounded

pytestmark = pytest.mark.skipif(ptx.NVCC is None, reason="needs nvcc to compile the kernels")

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#define KERNEL(name) extern "C" __global__ void name

// ---- reductions ----

__device__ unsigned arrived = 0;

KERNEL(sum)(const float* __restrict__ x, float* partial, float* total, int n) {
  __shared__ float of_warp[8];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float t = 0;
    for (int i = 0; i < blockDim.x / 32; ++i) t += of_warp[i];
    partial[blockIdx.x] = t;
    __threadfence();
    last = atomicInc(&arrived, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float t = 0;
    for (int i = 0; i < gridDim.x; ++i) t += __ldcg(partial + i);
    *total = t;
  }
}

// ---- tiles ----

KERNEL(transpose)(const float* __restrict__ x, float* y, int rows, int columns) {
  __shared__ float tile[32][33];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    if (r + k < rows && c < columns) tile[threadIdx.y + k][threadIdx.x] = x[(size_t)(r + k) * columns + c];
  __syncthreads();
  c = blockIdx.y * 32 + threadIdx.x, r = blockIdx.x * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    if (c < rows && r + k < columns) y[(size_t)(r + k) * rows + c] = tile[threadIdx.x][threadIdx.y + k];
}

KERNEL(gather)(const float* x, const int* from, float* y) { const int i = blockIdx.x * blockDim.x + threadIdx.x; y[i] = x[from[i]]; }

KERNEL(softmax)(const float4* __restrict__ x, float4* y, int channels, int pixels) {  // pixels in fours
  const int p = blockIdx.x * blockDim.x + threadIdx.x;
  if (p >= pixels) return;
  extern __shared__ float4 rows[];  // a column of channels per thread
  float4* mine = rows + threadIdx.x * channels;
  float4 top = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum = {};
  for (int c = 0; c < channels; ++c) {
    const float4 v = mine[c] = x[(size_t)c * pixels + p];
    top = {fmaxf(top.x, v.x), fmaxf(top.y, v.y), fmaxf(top.z, v.z), fmaxf(top.w, v.w)};
  }
  for (int c = 0; c < channels; ++c) {
    const float4 v = mine[c];
    const float4 e = {__expf(v.x - top.x), __expf(v.y - top.y), __expf(v.z - top.z), __expf(v.w - top.w)};
    sum = {sum.x + e.x, sum.y + e.y, sum.z + e.z, sum.w + e.w};
    mine[c] = e;
  }
  for (int c = 0; c < channels; ++c) {
    const float4 e = mine[c];
    __stcs(y + (size_t)c * pixels + p, make_float4(e.x / sum.x, e.y / sum.y, e.z / sum.z, e.w / sum.w));
  }
}

KERNEL(pipelined_sum)(const float4* __restrict__ x, float* y, int steps) {  // 64 threads, two stages
  __shared__ float4 stage[2][64];
  const int t = threadIdx.x;
  float total = 0;
  __pipeline_memcpy_async(&stage[0][t], x + t, 16);
  __pipeline_commit();
  for (int s = 0; s < steps; ++s) {
    if (s + 1 < steps) __pipeline_memcpy_async(&stage[(s + 1) % 2][t], x + (s + 1) * 64 + t, 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    const float4 v = stage[s % 2][63 - t];
    total += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  y[t] = total;
}

// ---- 16-bit floats ----

KERNEL(bfloats)(const __nv_bfloat16* x, const __nv_bfloat162* pairs, __nv_bfloat16* y, __nv_bfloat162* z) {
  const int i = threadIdx.x;
  y[3 * i] = __hadd(x[i], x[63 - i]);
  y[3 * i + 1] = __hfma(x[i], x[63 - i], x[i]);
  y[3 * i + 2] = __float2bfloat16(__bfloat162float(x[i]) * 1.37f);
  z[2 * i] = __hmul2(pairs[i], pairs[63 - i]);
  z[2 * i + 1] = __floats2bfloat162_rn(__low2float(pairs[i]) / 3, __high2float(pairs[i]) / 3);
}

KERNEL(halves)(const __half* x, __half* y, __half2* z) {
  const int i = threadIdx.x;
  y[3 * i] = __hsub(x[i], x[63 - i]);
  y[3 * i + 1] = __hmax(x[i], x[63 - i]);
  y[3 * i + 2] = __float2half(__half2float(x[i]) * 1.37f);
  z[i] = __hfma2(__half2half2(x[i]), __halves2half2(x[i], x[63 - i]), __float2half2_rn(0.1f));
}

// ---- noise ----

KERNEL(noise)(unsigned* words, float* normals, unsigned long long seed, unsigned long long first, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const unsigned long long g = first + i;
  unsigned c[4] = {(unsigned)g, (unsigned)(g >> 32), 5, 7}, k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const unsigned long long a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c[0] = (unsigned)(b >> 32) ^ c[1] ^ k0, c[1] = (unsigned)b, c[2] = (unsigned)(a >> 32) ^ c[3] ^ k1, c[3] = (unsigned)a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  ((uint4*)words)[i] = make_uint4(c[0], c[1], c[2], c[3]);
  float sine, cosine;
  sincospif(2 * (c[1] * 0x1p-32f), &sine, &cosine);
  const float radius = sqrtf(-2 * logf((c[0] + 0.5f) * 0x1p-32f));
  ((float2*)normals)[i] = make_float2(radius * cosine, radius * sine);
}
"""


@pytest.fixture(params=["sm_80", "sm_90", "sm_100"])
def text(request) -> str:
    return ptx.cuda_to_ptx(SOURCE, request.param)


RNG = np.random.default_rng(11)


def bfloats(shape) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32).view(np.uint32).astype(np.uint32) >> 16


def test_sum_in_one_launch_and_again(text):
    """The last block adds up; its counter is ready for the next launch."""
    memory, values = ptx.Memory(), RNG.standard_normal(5000).astype(np.float32)
    x, partial, total = memory.put(values, "x"), memory.empty(7, np.float32), memory.empty(1, np.float32)
    for _ in range(2):
        report = ptx.run(text, "sum", 7, 256, [x, partial, total, 5000], memory)
        assert total.numpy() == pytest.approx(values.astype(float).sum(), rel=1e-5)
        read = report.loads_of[x]
        assert (read.bytes, read.distinct, read.sectors) == (20_000, 20_000, 625)
        assert report.loads.bytes == 20_000 + 7 * 4 and report.stores.bytes == 8 * 4 and report.atomics == 7


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (45, 70), (1, 33)])
def test_transpose(text, rows, columns):
    memory, values = ptx.Memory(), RNG.standard_normal((rows, columns)).astype(np.float32)
    x, y = memory.put(values), memory.empty((columns, rows), np.float32)
    grid = -(-columns // 32), -(-rows // 32)
    report = ptx.run(text, "transpose", grid, (32, 8), [x, y, rows, columns], memory)
    np.testing.assert_array_equal(y.numpy(), values.T)
    assert report.loads.distinct == report.loads.bytes == report.stores.bytes == values.nbytes
    assert report.loads.efficiency == report.stores.efficiency == 1 or rows % 32


def test_launches_do_not_see_each_other(text):
    """What one launch stored, the next may load through the read-only cache, and other threads of it may store again."""
    memory, values = ptx.Memory(), RNG.standard_normal((32, 32)).astype(np.float32)
    x, y, z = memory.put(values), memory.empty((32, 32), np.float32), memory.empty((32, 32), np.float32)
    ptx.run(text, "transpose", 1, (32, 8), [x, y, 32, 32], memory)
    report = ptx.run(text, "transpose", 1, (32, 8), [y, z, 32, 32], memory)
    np.testing.assert_array_equal(z.numpy(), values)
    assert report.loads_of[y].distinct == report.stores_to[z].distinct == 4096 and y not in report.stores_to
    order = RNG.permutation(1024).astype(np.int32)
    ptx.run(text, "gather", 8, 128, [x, memory.put(order), y], memory)
    np.testing.assert_array_equal(y.numpy().ravel(), values.ravel()[order])


def test_negative_arguments(text):
    memory = ptx.Memory()
    total = memory.empty(1, np.float32)
    ptx.run(text, "sum", 1, 32, [0, memory.empty(1, np.float32), total, -5], memory)
    assert total.numpy() == 0


@pytest.mark.parametrize("pixels", [128, 1000])
def test_softmax_over_channels(text, pixels):
    channels, memory = 19, ptx.Memory()
    values = (8 * RNG.standard_normal((channels, pixels))).astype(np.float32)
    x, y = memory.put(values), memory.empty(values.shape, np.float32)
    args = [x, y, channels, pixels // 4]
    report = ptx.run(text, "softmax", -(-pixels // 256), 64, args, memory, shared_bytes=64 * channels * 16)
    e = np.exp(values.astype(float) - values.max(0))
    np.testing.assert_allclose(y.numpy(), e / e.sum(0), rtol=2e-5, atol=1e-30)
    assert report.loads.bytes == report.stores.bytes == values.nbytes
    assert report.loads.efficiency == report.stores.efficiency == 1
    assert report.loads.requests == channels * -(-pixels // 128)


def test_pipelined_copies(text):
    steps, memory = 5, ptx.Memory()
    values = RNG.standard_normal((steps, 64, 4)).astype(np.float32)
    x, y = memory.put(values), memory.empty(64, np.float32)
    report = ptx.run(text, "pipelined_sum", 1, 64, [x, y, steps], memory)
    np.testing.assert_allclose(y.numpy(), values.astype(float).sum((0, 2))[::-1], rtol=1e-4, atol=1e-5)
    assert report.loads.bytes == values.nbytes


def test_bfloat16(text):
    def nearest(exact: float) -> int:
        return encoded(rounded(Fraction(exact), "bf16"), "bf16")

    bits, pair_bits = bfloats(64).astype(np.uint16), bfloats((64, 2)).astype(np.uint16)
    memory = ptx.Memory()
    y, z = memory.empty((64, 3), np.uint16), memory.empty((64, 2, 2), np.uint16)
    ptx.run(text, "bfloats", 1, 64, [memory.put(bits), memory.put(pair_bits), y, z], memory)
    x = [Fraction(decoded(int(b), "bf16")) for b in bits]
    pairs = [[decoded(int(b), "bf16") for b in row] for row in pair_bits]
    single = [[a + b, a * b + a, float(np.float32(float(a)) * np.float32(1.37))] for a, b in zip(x, x[::-1], strict=True)]
    assert y.numpy().tolist() == [[nearest(v) for v in row] for row in single]
    for i, pair in enumerate(pairs):
        assert z.numpy()[i, 0].tolist() == [nearest(Fraction(a) * Fraction(b)) for a, b in zip(pair, pairs[63 - i], strict=True)]
        assert z.numpy()[i, 1].tolist() == [nearest(float(np.float32(a) / np.float32(3))) for a in pair]


def test_half(text):
    values, memory = RNG.standard_normal(64).astype(np.float16), ptx.Memory()
    y, z = memory.empty((64, 3), np.float16), memory.empty((64, 2), np.float16)
    ptx.run(text, "halves", 1, 64, [memory.put(values), y, z], memory)
    other, wide = values[::-1], values.astype(np.float64)
    scaled = (values.astype(np.float32) * np.float32(1.37)).astype(np.float16)
    np.testing.assert_array_equal(y.numpy(), np.stack([values - other, np.maximum(values, other), scaled], 1))
    tenth = float(np.float16(0.1))
    np.testing.assert_array_equal(z.numpy(), np.stack([wide * wide + tenth, wide * wide[::-1] + tenth], 1).astype(np.float16))


def test_philox_and_normals(text):
    n, seed, first, memory = 500, 0x123456789ABCDEF1, 2**32 - 200, ptx.Memory()
    words, normals = memory.empty((n, 4), np.uint32), memory.empty((n, 2), np.float32)
    ptx.run(text, "noise", 4, 128, [words, normals, seed, first, n], memory)
    g, zero = np.arange(first, first + n, dtype=np.uint64), np.zeros(n, np.uint64)
    key = zero + np.uint64(seed & 0xFFFFFFFF), zero + np.uint64(seed >> 32)
    expected = np.stack(
        oracle.philox((g & np.uint64(0xFFFFFFFF), g >> np.uint64(32), zero + np.uint64(5), zero + np.uint64(7)), key), 1
    )
    np.testing.assert_array_equal(words.numpy(), expected)
    radius, angle = np.sqrt(-2 * np.log((expected[:, 0] + 0.5) / 2**32)), 2 * np.pi * (expected[:, 1] / 2**32)
    np.testing.assert_allclose(
        normals.numpy(), np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), rtol=1e-4, atol=1e-5
    )


# ---- the launch itself ----


def test_chunks_of_blocks_agree(text, monkeypatch):
    """Blocks run together in chunks; how many does not show."""
    memory, values = ptx.Memory(), RNG.standard_normal((64, 70)).astype(np.float32)
    results = []
    for lanes in (256, 600, 1 << 14):
        monkeypatch.setattr("ptx.machine.LANES_PER_CHUNK", lanes)
        y = memory.empty((70, 64), np.float32)
        report = ptx.run(text, "transpose", (3, 2), (32, 8), [memory.put(values), y, 64, 70], memory)
        results.append((y.numpy().tobytes(), report.loads, report.stores, report.instructions))
    assert results[0] == results[1] == results[2]


def test_sectors_of_a_strided_access(text):
    """The sum's loads from every element of a column would touch a sector each; misaligned rows touch one more per request."""
    memory, values = ptx.Memory(), RNG.standard_normal((64, 65)).astype(np.float32)
    y = memory.empty((65, 64), np.float32)
    report = ptx.run(text, "transpose", (3, 2), (32, 8), [memory.put(values), y, 64, 65], memory)
    full = [row * 65 * 4 + start for row in range(64) for start in (0, 128)]  # byte offsets of requests of 32 threads
    single = [row * 65 * 4 + 256 for row in range(64)]
    sectors = sum((f + 127) // 32 - f // 32 + 1 for f in full) + len(single)
    assert report.loads.sectors == sectors
    assert report.loads.efficiency == pytest.approx(64 * 65 * 4 / (32 * sectors))


def test_traffic_of_a_gather(text):
    """Per request: the distinct words and sectors, in whatever order the threads ask for them."""
    memory, values, index = (
        ptx.Memory(),
        RNG.standard_normal(500).astype(np.float32),
        RNG.integers(0, 99, (4, 32)).astype(np.int32),
    )
    x, y = memory.put(values), memory.empty(128, np.float32)
    report = ptx.run(text, "gather", 2, 64, [x, memory.put(index), y], memory)
    np.testing.assert_array_equal(y.numpy(), values[index.ravel()])
    read, requests = report.loads_of[x], [set(row.tolist()) for row in index]
    assert (read.requests, read.bytes) == (4, 512)
    assert read.used == sum(4 * len(words) for words in requests)
    assert read.sectors == sum(len({word // 8 for word in words}) for words in requests)
    assert read.distinct == 4 * len(set.union(*requests))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": "nothing"}, "entry 'nothing' is none of"),
        ({"args": [1, 2, 3]}, "4 arguments expected, got 3"),
        ({"args": [1, 2, 3, b"12"]}, "has 4 bytes, the argument 2"),
        ({"grid": (1, 2, 3, 4)}, "grid must be one to three"),
        ({"block": 0}, "block must be one to three"),
    ],
)
def test_bad_launches(text, change, message):
    launch = {"entry": "sum", "grid": 1, "block": 32, "args": [0, 0, 0, 0], "memory": ptx.Memory()} | change
    with pytest.raises(ValueError, match=message):
        ptx.run(text, **launch)


def test_infinity_and_nan_pass_through(text):
    memory = ptx.Memory()
    values = np.zeros((2, 128), np.float32)
    values[0, :3] = math.inf, -math.inf, math.nan
    x, y = memory.put(values), memory.empty(values.shape, np.float32)
    ptx.run(text, "softmax", 1, 64, [x, y, 2, 32], memory, shared_bytes=64 * 32)
    assert np.isnan(y.numpy()[:, 0]).all() and y.numpy()[:, 1].tolist() == [0, 1] and np.isnan(y.numpy()[:, 2]).any()

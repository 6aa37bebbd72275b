"""What CUDA C++ offers, compiled by nvcc and executed by the PTX interpreter, against NumPy: structs, functions, the mathematical library,
wide integers, warps, blocks, atomics."""

import ctypes

import numpy as np
import ptx
import pytest

pytestmark = pytest.mark.skipif(ptx.NVCC is None, reason="needs nvcc to compile the kernels")

SOURCE = r"""
#define KERNEL(name) extern "C" __global__ void name

// ---- parameters, variables, functions ----

struct Table { const float* rows[5]; long long length[5]; float scale; signed char sign; };
__constant__ float weights[5] = {0.5f, 1, 2, 4, 8};
__device__ int calls[5];

KERNEL(table)(const __grid_constant__ Table table, double* sums) {
  const int r = blockIdx.x;
  double s = 0;
  for (long long i = 0; i < table.length[r]; ++i) s += table.rows[r][i];
  sums[r] = s * weights[r] * table.scale * table.sign;
  calls[r] += r;
}

__noinline__ __device__ float scaled(const float* v, int k) { return k > 2 ? v[k] * k : v[k] - k; }
__noinline__ __device__ double both(double a, float b) { return a * scaled(&b, 0); }

KERNEL(functions)(const float* x, double* y) {  // a function gets generic pointers to shared, local and global memory
  __shared__ float s[32];
  const int t = threadIdx.x;
  float local[4] = {x[t], x[t] + 1, x[t] + 2, x[t] + 3};
  s[t] = 2 * x[t];
  __syncthreads();
  y[t] = scaled(t % 3 == 0 ? s : t % 3 == 1 ? local : x, t % 4) + both(t, x[t]);
}

KERNEL(cases)(const int* x, int* y) {
  int v = x[threadIdx.x];
  switch (v) {
    case 0: v = y[0 * 64 + threadIdx.x] + 5; break;
    case 1: v = v * 7; break;
    case 2: v = v << 20; break;
    case 3: v = __popc(y[64 + threadIdx.x]); break;
    case 4: v = -v; break;
    case 5: v = v * v * v; break;
    case 6: v = __clz(v); break;
    case 7: v = __brev(v); break;
    case 8: v = 1000 / (v - 5); break;
    case 9: v = v % 4;
    default: v += 100;
  }
  y[threadIdx.x] = v;
}

KERNEL(mathematics)(const double* x, double* y, float* f) {
  const int i = threadIdx.x;
  const double v = x[i];
  const float w = (float)v;
  double* out = y + 6 * i;
  out[0] = exp(-v), out[1] = log(v), out[2] = sin(v), out[3] = cos(v * 1e7), out[4] = sqrt(v) / (v + 3), out[5] = rsqrt(v);
  float* g = f + 6 * i;
  g[0] = expf(-w), g[1] = logf(w), g[2] = sinf(w * 1e6f), g[3] = tanhf(w / 5), g[4] = 1 / (w + 3), g[5] = powf(w, 0.3f);
}

KERNEL(words)(const long long* x, unsigned long long* y) {
  const int i = threadIdx.x;
  const long long a = x[i], b = x[63 - i];
  unsigned long long* out = y + 6 * i;
  out[0] = a / (b | 1), out[1] = a % (b | 1), out[2] = __mul64hi(a, b), out[3] = __umul64hi(a, b);
  out[4] = (unsigned long long)a >> (i & 63) | a << (b & 7), out[5] = (unsigned long long)((unsigned __int128)a * b % 1000003);
}

// ---- warps, blocks, atomics ----

KERNEL(warps)(const int* x, unsigned* y) {
  const int t = threadIdx.x, v = x[t];
  unsigned* out = y + t * 12;
  out[0] = __ballot_sync(~0u, v > 4), out[1] = __any_sync(~0u, v > 8), out[2] = __all_sync(~0u, v > 0);
  out[3] = __match_any_sync(~0u, v), out[4] = __reduce_add_sync(~0u, v), out[5] = __reduce_max_sync(~0u, (unsigned)v);
  out[6] = __shfl_up_sync(~0u, v, 3), out[7] = __shfl_down_sync(~0u, v, 5), out[8] = __shfl_xor_sync(~0u, v, 9);
  out[9] = __shfl_sync(~0u, v, v), out[10] = __shfl_sync(~0u, v, v, 8), out[11] = __shfl_down_sync(~0u, v, 1, 16);
  if (v % 2) out[0] += __activemask();
}

KERNEL(blocks)(const int* x, int* y) {
  const int i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, v = x[b * 24 + i];
  const int count = __syncthreads_count(v > 4), every = __syncthreads_and(v > 0), some = __syncthreads_or(v > 8);
  y[b * 24 + i] = count * 100 + every * 10 + some;
}

KERNEL(histogram)(const int* x, int* counts, unsigned long long* extra, float* total, int n) {
  __shared__ int mine[16];
  if (threadIdx.x < 16) mine[threadIdx.x] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(&mine[x[i]], 1);
    atomicMax(extra, (unsigned long long)i << 33);
    atomicXor(extra + 1, 1ull << x[i]);
    atomicAdd(total, 0.5f);
    atomicCAS(extra + 2, 3ull, 4ull);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(counts + threadIdx.x, mine[threadIdx.x]);
}
"""


@pytest.fixture(params=["sm_80", "sm_90", "sm_100"])
def text(request) -> str:
    return ptx.cuda_to_ptx(SOURCE, request.param)


RNG = np.random.default_rng(13)


def test_struct_by_value_and_variables(text):
    class Table(ctypes.Structure):
        _fields_ = [
            ("rows", ctypes.c_uint64 * 5),
            ("length", ctypes.c_int64 * 5),
            ("scale", ctypes.c_float),
            ("sign", ctypes.c_byte),
        ]

    memory, rows = ptx.Memory(), [RNG.standard_normal(n).astype(np.float32) for n in (1, 3, 7, 0, 20)]
    table = Table(scale=1.5, sign=-1)
    for i, row in enumerate(rows):
        table.rows[i], table.length[i] = memory.put(row if row.size else np.zeros(1, np.float32)).address, row.size
    sums = memory.empty(5, np.float64)
    for _ in range(2):
        report = ptx.run(text, "table", 5, 1, [table, sums], memory)
    expected = [row.astype(float).sum() * w * -1.5 for row, w in zip(rows, (0.5, 1, 2, 4, 8), strict=True)]
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6, atol=1e-12)
    calls = memory.variables[text, "calls"]
    assert calls.numpy().view(np.int32).tolist() == [0, 2, 4, 6, 8]  # __device__ variables outlive a launch
    assert report.loads.bytes == 31 * 4 + 5 * 4  # rows and calls; constants are not counted


def test_functions_with_generic_pointers(text):
    values, memory = RNG.standard_normal(32).astype(np.float32), ptx.Memory()
    y = memory.empty(32, np.float64)
    ptx.run(text, "functions", 1, 32, [memory.put(values), y], memory)
    expected = []
    for t, v in enumerate(values.astype(float)):
        k = t % 4
        seen = 2 * float(values[k]) if t % 3 == 0 else v + k if t % 3 == 1 else float(values[k])
        expected.append((seen * k if k > 2 else seen - k) + t * v)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_switch(text):
    values, before, memory = np.arange(64, dtype=np.int32) % 12, RNG.integers(0, 99, 128).astype(np.int32), ptx.Memory()
    y = memory.put(before)
    ptx.run(text, "cases", 1, 64, [memory.put(values), y], memory)

    def oracle(v, t):
        simple = {1: 7, 2: 2 << 20, 4: -4, 5: 125, 6: 29, 7: -(2**29), 8: 333, 9: 101, 10: 110, 11: 111}
        return before[t] + 5 if v == 0 else bin(before[64 + t]).count("1") if v == 3 else simple[v]

    assert y.numpy()[:64].tolist() == [oracle(v, t) for t, v in enumerate(values.tolist())]


def test_mathematics(text):
    """The functions of the CUDA library, double ones with calls to slow paths; to a few units in the last place."""
    values, memory = RNG.uniform(0.01, 300, 64), ptx.Memory()
    y, f = memory.empty((64, 6), np.float64), memory.empty((64, 6), np.float32)
    ptx.run(text, "mathematics", 1, 64, [memory.put(values), y, f], memory)
    v, w = values, values.astype(np.float32).astype(np.float64)
    exact = [np.exp(-v), np.log(v), np.sin(v), np.cos(v * 1e7), np.sqrt(v) / (v + 3), 1 / np.sqrt(v)]
    np.testing.assert_allclose(y.numpy(), np.stack(exact, 1), rtol=1e-15, atol=1e-15)
    large = (w.astype(np.float32) * np.float32(1e6)).astype(np.float64)
    exact = [np.exp(-w), np.log(w), np.sin(large), np.tanh(w / 5), 1 / (w + 3), w**0.3]
    np.testing.assert_allclose(f.numpy(), np.stack(exact, 1), rtol=5e-7, atol=1e-7)


def test_64_and_128_bit_integers(text):
    values = RNG.integers(-(2**63), 2**63, 64)
    memory = ptx.Memory()
    y = memory.empty((64, 6), np.uint64)
    ptx.run(text, "words", 1, 64, [memory.put(values), y], memory)
    for i, row in enumerate(y.numpy().tolist()):
        a, b = int(values[i]), int(values[63 - i])
        ua, d = a % 2**64, b | 1
        quotient = abs(a) // abs(d) * (1 if (a < 0) == (d < 0) else -1)
        product = (a % 2**128) * (b % 2**128) % 2**128
        expected = [
            quotient,
            a - quotient * d,
            a * b >> 64,
            ua * (b % 2**64) >> 64,
            ua >> (i & 63) | a << (b & 7),
            product % 1000003,
        ]
        assert row == [e % 2**64 for e in expected]


def test_warp_instructions(text):
    values, memory = RNG.integers(0, 10, 64).astype(np.int32), ptx.Memory()
    y = memory.empty((64, 12), np.uint32)
    ptx.run(text, "warps", 1, 64, [memory.put(values), y], memory)
    for warp in (0, 1):
        v = values[32 * warp : 32 * warp + 32].tolist()

        def ballot(flags):
            return sum(bool(f) << i for i, f in enumerate(flags))

        for lane in range(32):
            expected = [ballot(a > 4 for a in v), max(v) > 8, min(v) > 0, ballot(a == v[lane] for a in v), sum(v), max(v)]
            expected += [v[lane - 3] if lane >= 3 else v[lane], v[lane + 5] if lane < 27 else v[lane], v[lane ^ 9], v[v[lane]]]
            expected += [v[lane // 8 * 8 + v[lane] % 8], v[lane + 1] if lane % 16 < 15 else v[lane]]
            if v[lane] % 2:
                expected[0] += ballot(a % 2 for a in v)
            assert y.numpy()[32 * warp + lane].tolist() == [e % 2**32 for e in expected]


def test_block_wide_votes_in_three_dimensions(text):
    values, memory = RNG.integers(0, 10, (12, 24)).astype(np.int32), ptx.Memory()
    y = memory.empty(values.shape, np.int32)
    ptx.run(text, "blocks", (2, 3, 2), (4, 3, 2), [memory.put(values), y], memory)
    expected = [(row > 4).sum() * 100 + (row > 0).all() * 10 + (row > 8).any() for row in values]
    np.testing.assert_array_equal(y.numpy(), np.repeat(np.array(expected)[:, None], 24, 1))


def test_atomics(text):
    n, memory = 1000, ptx.Memory()
    values = RNG.integers(0, 16, n).astype(np.int32)
    counts, total = memory.put(np.zeros(16, np.int32)), memory.put(np.zeros(1, np.float32))
    extra = memory.put(np.array([5, 0, 3], np.uint64))
    ptx.run(text, "histogram", 4, 256, [memory.put(values), counts, extra, total, n], memory)
    tally = np.bincount(values, minlength=16)
    np.testing.assert_array_equal(counts.numpy(), tally)
    assert extra.numpy().tolist() == [(n - 1) << 33, sum(1 << k for k in range(16) if tally[k] % 2), 4]
    assert total.numpy() == n / 2

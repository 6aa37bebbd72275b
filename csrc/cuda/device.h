// What all CUDA kernels share on the device: arithmetic of both accumulation types, storage types, the place of a block in its launch, and
// the results of blocks, added up in a fixed order by the last of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "call.h"

namespace mrf {
namespace cuda {

constexpr unsigned kWarp = 0xffffffffu;

// x, but what follows from it is not kept in registers from one turn of a loop to the next.
template <class Int>
__device__ inline Int recomputed(Int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// threadIdx.x, likewise.
__device__ inline int thread_number() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// ---- arithmetic of both types ----

template <class T>
constexpr T kLog2E = T(1.44269504088896340736);
template <class T>
constexpr T kLn2 = T(0.69314718055994530942);

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double exp2_of(double x) { return exp2(x); }
// To one unit in the last place.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double reciprocal(double x) { return 1 / x; }
// Of positive numbers that are neither huge nor tiny; exact where it can be: 1 for equal ones.
__device__ inline float quotient(float a, float b) {
  const float inverse = reciprocal(b), near = a * inverse;
  return fmaf(fmaf(-near, b, a), inverse, near);
}
__device__ inline double quotient(double a, double b) { return a / b; }
__device__ inline float maximum(float a, float b) { return fmaxf(a, b); }
__device__ inline double maximum(double a, double b) { return fmax(a, b); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
// To 2^-21, but near 1 with few digits.
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log_of_1_plus(float x) { return log1pf(x); }
__device__ inline double log_of_1_plus(double x) { return log1p(x); }
__device__ inline float fused(float x, float y, float z) { return fmaf(x, y, z); }
__device__ inline double fused(double x, double y, double z) { return fma(x, y, z); }

// ---- storage types ----

template <class T> __device__ inline T widen(float x) { return x; }
template <class T> __device__ inline T widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T widen(__half x) { return __half2float(x); }
template <class T> __device__ inline T widen(double x) { return T(x); }
template <class T> __device__ inline void narrow(T x, float& y) { y = float(x); }
template <class T> __device__ inline void narrow(T x, double& y) { y = x; }
template <class T> __device__ inline void narrow(T x, __nv_bfloat16& y) { y = __float2bfloat16(float(x)); }
template <class T> __device__ inline void narrow(T x, __half& y) { y = __float2half(float(x)); }

// Calls f with a null pointer of the storage type.
template <class T, class F>
__device__ inline void with_storage(DType dtype, F f) {
  if (dtype == DType::float32) f((float*)nullptr);
  if (dtype == DType::bfloat16) f((__nv_bfloat16*)nullptr);
  if (dtype == DType::float16) f((__half*)nullptr);
  if constexpr (sizeof(T) == 8)
    if (dtype == DType::float64) f((double*)nullptr);
}

// ---- where a block works ----

struct Place {
  int tiling, first_tile, last_tile;
  int64_t sample;
};

__device__ inline Place place_of_block(const Tiling* tilings, int count) {
  int k = count - 1;
  while (tilings[k].first_block > blockIdx.x) --k;
  const Tiling& t = tilings[k];
  const unsigned blocks = unsigned(t.blocks), local = unsigned(blockIdx.x - t.first_block), sample = local / blocks;
  const int64_t first = int64_t(local - sample * blocks) * t.tiles_per_block, end = first + t.tiles_per_block;
  const int64_t tiles = (t.pixels + t.width - 1) >> (31 - __clz(t.width));
  return {k, int(first), int(end < tiles ? end : tiles), sample};
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T>
__device__ inline T* shared() { return reinterpret_cast<T*>(shared_memory); }

// ---- pieces of a line, moved in 16 bytes ----

// N elements of a line.
template <class Storage, int N>
struct alignas(N * sizeof(Storage)) Piece {
  Storage at[N];
};

template <class Storage, int N>
__device__ inline Piece<Storage, N> load_piece(const Storage* p) {
  Piece<Storage, N> piece;
  if constexpr (N > 1) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    __builtin_memcpy(&piece, &raw, sizeof piece);
  } else {
    piece.at[0] = __ldg(p);
  }
  return piece;
}
// Element by element the larger one, of a number and NaN the number.
template <class Storage, int N>
__device__ inline void keep_larger(Piece<Storage, N>& a, const Piece<Storage, N>& b) {
  if constexpr (sizeof(Storage) == 2 && N > 1) {
    using Pair = std::conditional_t<std::is_same_v<Storage, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      Pair x, y;
      __builtin_memcpy(&x, a.at + i, 4), __builtin_memcpy(&y, b.at + i, 4);
      x = __hmax2(x, y);
      __builtin_memcpy(a.at + i, &x, 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if constexpr (sizeof(Storage) == 2) a.at[i] = __hmax(a.at[i], b.at[i]);
      else a.at[i] = maximum(a.at[i], b.at[i]);
  }
}
// Two neighbours of a piece, narrowed, to their place among its words.
template <class T>
__device__ inline void narrow_pair(T a, T b, uint32_t* words, __nv_bfloat16*) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(float(a), float(b));
  words[0] = *reinterpret_cast<const uint32_t*>(&x);
}
template <class T>
__device__ inline void narrow_pair(T a, T b, uint32_t* words, __half*) {
  const __half2 x = __floats2half2_rn(float(a), float(b));
  words[0] = *reinterpret_cast<const uint32_t*>(&x);
}
template <class T>
__device__ inline void narrow_pair(T a, T b, uint32_t* words, float*) {
  words[0] = __float_as_uint(float(a)), words[1] = __float_as_uint(float(b));
}
__device__ inline void narrow_pair(double a, double b, uint32_t* words, double*) {
  words[0] = __double2loint(a), words[1] = __double2hiint(a), words[2] = __double2loint(b), words[3] = __double2hiint(b);
}
// In assembly, as fetch_pair.
__device__ inline void store_words(void* p, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]));
}

// ---- sums ----

// Over lanes of a warp that differ in the bits [first, 32) of their number.
template <class T>
__device__ inline T sum_over(T x, int first) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    if (o < first) break;
    x += __shfl_xor_sync(kWarp, x, o);
  }
  return x;
}

// The rows of the warps added up into `partial`, in order; true in the last block of the `blocks` that count at `arrived`.
template <class T>
__device__ inline bool publish(const T* rows, int count, T* partial, uint32_t* arrived, int64_t blocks) {
  __shared__ bool last;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    T sum = rows[i];
    for (int w = 1; w < blockDim.x / 32; ++w) sum += rows[w * count + i];
    partial[int64_t(blockIdx.x) * count + i] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(arrived, unsigned(blocks - 1)) == unsigned(blocks - 1);  // back to 0 for the next launch
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Column i of the results of blocks [first, first + blocks); by one warp, in a fixed order, `Together` of them under way at once.
template <int Together = 1, class T>
__device__ inline double ordered_sum(const T* partial, int64_t first, int64_t blocks, int count, int i) {
  double sum = 0;
#pragma unroll Together
  for (int64_t k = threadIdx.x % 32; k < blocks; k += 32) sum += double(__ldcg(partial + (first + k) * count + i));
  return sum_over(sum, 1);
}

// ---- host ----

// Null, or what went wrong.
template <class Call>
const char* run_kernel(void (*kernel)(Call), const Call& call, const Launch& launch, void* stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<unsigned(launch.blocks), launch.threads, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(call);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace mrf

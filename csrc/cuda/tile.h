// Tiles in shared memory: what both ops share on the device.
//
// A tile holds `width` pixels of one sample, pixel after pixel, all channels of a pixel side by side, widened to the accumulation type T,
// whatever the tensor's type and layout. So all arithmetic is written once. Threads copy pieces of 16 bytes between memory and tile, or
// single elements where lines are not aligned to that; a team of neighbouring threads then shares a pixel, and each of them owns every
// lanes-th group of four channels (a quad) of it: sums over channels go through the team, and nothing else is exchanged.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// ---- storage types ----

template <class T> __device__ inline T widen(float x) { return x; }
template <class T> __device__ inline T widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T widen(__half x) { return __half2float(x); }
template <class T> __device__ inline T widen(double x) { return T(x); }
template <class T> __device__ inline void narrow(T x, float& y) { y = float(x); }
template <class T> __device__ inline void narrow(T x, double& y) { y = x; }
template <class T> __device__ inline void narrow(T x, __nv_bfloat16& y) { y = __float2bfloat16(float(x)); }
template <class T> __device__ inline void narrow(T x, __half& y) { y = __float2half(float(x)); }

// 16 bytes of a line.
template <class Storage>
struct alignas(16) Piece {
  Storage at[16 / sizeof(Storage)];
};

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

__device__ inline int64_t divided(int64_t x, int power_of_two) { return x >> (__ffs(power_of_two) - 1); }
__device__ inline int divided(int x, int power_of_two) { return x >> (__ffs(power_of_two) - 1); }

__device__ inline Place place_of_block(const Tiling* tilings, int count) {
  int k = count - 1;
  while (tilings[k].first_block > blockIdx.x) --k;
  const Tiling& t = tilings[k];
  const unsigned blocks = unsigned(t.blocks), local = unsigned(blockIdx.x - t.first_block), sample = local / blocks;
  const int64_t first = int64_t(local - sample * blocks) * t.tiles_per_block, end = first + t.tiles_per_block;
  const int64_t tiles = divided(t.pixels + t.width - 1, t.width);
  return {k, int(first), int(end < tiles ? end : tiles), sample};
}

// A tile of one sample: pixels [begin, begin + count) of `width`.
struct Tile {
  int64_t sample, begin, pixels;  // pixels: of the sample
  const uint8_t* mask;
  int channels, width, count, pitch, lanes;
};

__device__ inline Tile tile_at(const Tiling& t, int64_t sample, int64_t number) {
  const int64_t begin = number * t.width, left = t.pixels - begin;
  return {sample, begin, t.pixels, t.mask, int(t.channels), t.width, int(left < t.width ? left : t.width), t.pitch, t.lanes};
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T>
__device__ inline T* shared() { return reinterpret_cast<T*>(shared_memory); }

// ---- quads ----

template <class T>
struct alignas(16) Quad {
  T at[4];
};

template <class T>
__device__ inline Quad<T> load_quad(const T* p) { return *reinterpret_cast<const Quad<T>*>(p); }
template <class T>
__device__ inline void store_quad(T* p, const Quad<T>& x) { *reinterpret_cast<Quad<T>*>(p) = x; }

// ---- copies between memory and tile ----

// What falls to a thread of the pieces of n elements of a tile: those at `first`, `first + step`, ... of the lines `line`,
// `line + line_step`, ...; in memory from `start` on, in the tile `next` from element to element and `next_line` from line to line.
struct Pieces {
  int length, lines, first, step, line, line_step, next, next_line;

  __device__ Pieces(const Array& x, const Tile& t, int n)
      : length(x.pixel_lines ? t.count : t.channels), lines(x.pixel_lines ? t.channels : t.count),
        next(x.pixel_lines ? t.pitch : 1), next_line(x.pixel_lines ? 1 : t.pitch) {
    // 2^across neighbouring threads on a line. Of a line of pixels 64 aligned bytes: whole sectors, and few conflicts between the banks in
    // which pixels start.
    const int most = x.pixel_lines && n > 1 ? 2 : 31 - __clz(blockDim.x), across = min(most, 32 - __clz((length - 1) / n));
    const int thread = thread_number();
    first = (thread & ((1 << across) - 1)) * n, step = n << across;
    line = thread >> across, line_step = blockDim.x >> across;
  }
};

template <class Storage>
__device__ inline Storage* start_of(const Array& x, const Tile& t) {
  return static_cast<Storage*>(x.data) + t.sample * x.sample_stride + t.begin * (x.pixel_lines ? 1 : x.line_stride);
}

// A piece to the tile.
template <class T, class Storage>
__device__ inline void put(const Piece<Storage>& piece, T* to, int next) {
  constexpr int n = 16 / sizeof(Storage);
  if constexpr (n % 4 == 0)
    if (next == 1) {
      for (int i = 0; i < n; i += 4)
        store_quad(to + i, Quad<T>{widen<T>(piece.at[i]), widen<T>(piece.at[i + 1]), widen<T>(piece.at[i + 2]), widen<T>(piece.at[i + 3])});
      return;
    }
  for (int i = 0; i < n; ++i) to[i * next] = widen<T>(piece.at[i]);
}

// Memory to tile, in pieces of 16 bytes where lines are aligned to that. A thread loads two before it stores the first: with 1024 threads,
// enough on the way to cover the latency of the memory.
template <class T>
__device__ inline void read_tile(const Array& x, const Tile& t, T* tile) {
  if (x.vector) {
    const int size = x.dtype == DType::float64 ? 8 : x.dtype == DType::float32 ? 4 : 2;
    const Pieces mine(x, t, 16 / size);
    const int64_t line_bytes = x.line_stride * size;
    const char* start = static_cast<const char*>(x.data) + (t.sample * x.sample_stride + t.begin * (x.pixel_lines ? 1 : x.line_stride)) * size;
    const auto copy = [&](int k, int line, auto count) {
      uint4 raw[decltype(count)::value];
#pragma unroll
      for (int j = 0; j < decltype(count)::value; ++j)
        raw[j] = __ldg(reinterpret_cast<const uint4*>(start + k * size + (line + j * mine.line_step) * line_bytes));
#pragma unroll
      for (int j = 0; j < decltype(count)::value; ++j)
        with_storage<T>(x.dtype, [&](auto* type) {
          Piece<std::remove_pointer_t<decltype(type)>> piece;
          __builtin_memcpy(&piece, &raw[j], sizeof piece);
          put(piece, tile + k * mine.next + (line + j * mine.line_step) * mine.next_line, mine.next);
        });
    };
#pragma unroll 1
    for (int k = mine.first; k < mine.length; k += mine.step) {
      int line = mine.line;
#pragma unroll 1
      for (; line + mine.line_step < mine.lines; line += 2 * mine.line_step) copy(k, line, std::integral_constant<int, 2>{});
      if (line < mine.lines) copy(k, line, std::integral_constant<int, 1>{});
    }
  } else {
    const Pieces mine(x, t, 1);
    with_storage<T>(x.dtype, [&](auto* type) {
      const auto* start = start_of<const std::remove_pointer_t<decltype(type)>>(x, t);
#pragma unroll 1
      for (int k = mine.first; k < mine.length; k += mine.step)
#pragma unroll 2
        for (int line = mine.line; line < mine.lines; line += mine.line_step)
          tile[k * mine.next + line * mine.next_line] = widen<T>(__ldg(start + k + line * x.line_stride));
    });
  }
}

// Tile to memory, likewise.
template <class T>
__device__ inline void write_tile(const Array& x, const Tile& t, const T* tile) {
  with_storage<T>(x.dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    constexpr int n = 16 / sizeof(Storage);
    Storage* start = start_of<Storage>(x, t);
    const Pieces mine(x, t, x.vector ? n : 1);
#pragma unroll 1
    for (int k = mine.first; k < mine.length; k += mine.step)
#pragma unroll 1
      for (int line = mine.line; line < mine.lines; line += mine.line_step) {
        const T* from = tile + k * mine.next + line * mine.next_line;
        Storage* to = start + k + line * x.line_stride;
        if (x.vector) {
          Piece<Storage> piece;
          for (int i = 0; i < n; ++i) narrow(from[i * mine.next], piece.at[i]);
          *reinterpret_cast<Piece<Storage>*>(to) = piece;
        } else {
          narrow(*from, *to);
        }
      }
  });
}

// Fills what a tile has beside the tensor: channels [channels, end) with `value`, pixels past the last one with zeros.
template <class T>
__device__ inline void fill_tile(const Tile& t, int end, T* tile, T value) {
  const int more = end - t.channels;
  for (int i = threadIdx.x; i < more * t.count; i += blockDim.x) tile[i / more * t.pitch + t.channels + i % more] = value;
  for (int i = t.count * t.pitch + threadIdx.x; i < t.width * t.pitch; i += blockDim.x) tile[i] = 0;
}

// Which pixels of the tile count, as 1 and 0.
template <class T>
__device__ inline void read_counts(const Tile& t, T* counts) {
  for (int p = threadIdx.x; p < t.width; p += blockDim.x)
    counts[p] = p < t.count && (t.mask == nullptr || t.mask[t.sample * t.pixels + t.begin + p]);
}

// ---- sums ----

constexpr int kMostExchanged = 2;

// The threads that share a pixel: `lanes` neighbours, a power of two. They are a part of a warp, or several warps, which exchange numbers
// through shared memory: then all threads of the block have to call together.
template <class T>
struct Team {
  int lanes;
  T* scratch;  // 2 x kMostExchanged numbers for each warp
  int turn = 0;

  __device__ int pixel() const { return divided(int(threadIdx.x), lanes); }
  __device__ int pixels_at_once() const { return divided(int(blockDim.x), lanes); }
  __device__ int lane() const { return threadIdx.x & (lanes - 1); }
  // f of all values of the team, the same bits in all its threads.
  template <class F, int N>
  __device__ void combine(T (&x)[N], F f) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      if (o >= lanes) return;
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = f(x[i], __shfl_xor_sync(kWarp, x[i], o));
    }
    if (lanes == 32) return;
    // Of two halves in turn: who writes to one again has met all who read it at the barrier between.
    const int thread = thread_number();
    T* row = scratch + turn * int(blockDim.x / 32) * kMostExchanged;
    const int warp = thread / 32, first = warp & -(lanes / 32);
    turn ^= 1;
    if (thread % 32 == 0)
      for (int i = 0; i < N; ++i) row[warp * N + i] = x[i];
    __syncthreads();
    for (int i = 0; i < N; ++i) {
      x[i] = row[first * N + i];
#pragma unroll 1
      for (int w = first + 1; w < first + lanes / 32; ++w) x[i] = f(x[i], row[w * N + i]);
    }
  }
  __device__ void sum(T& a) {
    T x[] = {a};
    combine(x, [](T y, T z) { return y + z; });
    a = x[0];
  }
  __device__ void sum(T& a, T& b) {
    T x[] = {a, b};
    combine(x, [](T y, T z) { return y + z; });
    a = x[0], b = x[1];
  }
  __device__ T largest(T a) {
    T x[] = {a};
    combine(x, [](T y, T z) { return maximum(y, z); });
    return x[0];
  }
};

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

// Adds what each pixel of a warp gave (the same in all threads of its team) to number i of the warp's row of `count`; where a team is
// several warps, to that of the first.
template <class T>
__device__ inline void add_pixels(T x, int lanes, T* rows, int count, int i) {
  x = sum_over(x, lanes);
  const int thread = thread_number();
  if ((thread & (max(lanes, 32) - 1)) == 0) rows[thread / 32 * count + i] += x;
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

// Column i of the results of blocks [first, first + blocks); by one warp, in a fixed order.
template <class T>
__device__ inline double ordered_sum(const T* partial, int64_t first, int64_t blocks, int count, int i) {
  double sum = 0;
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

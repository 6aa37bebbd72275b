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

// A tile of one sample: `count` pixels from `begin` on, of `width`; channels from `end` on have no place.
struct Tile {
  int64_t sample, begin;
  int count, channels, width, end, pitch;
};

__device__ inline Tile tile_at(const Tiling& t, int64_t sample, int64_t number) {
  const int64_t begin = number * t.width, left = t.pixels - begin;
  return {sample, begin, int(left < t.width ? left : t.width), int(t.channels), t.width, 4 * t.quads << t.lane_bits, t.pitch};
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T>
__device__ inline T* shared() { return reinterpret_cast<T*>(shared_memory); }

// ---- quads and pieces, moved in 16 bytes ----

template <class T>
struct alignas(16) Quad {
  T at[4];
};

__device__ inline Quad<float> load_quad(const float* p) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  return {x.x, x.y, x.z, x.w};
}
__device__ inline Quad<double> load_quad(const double* p) {
  const double2 x = reinterpret_cast<const double2*>(p)[0], y = reinterpret_cast<const double2*>(p)[1];
  return {x.x, x.y, y.x, y.y};
}
// In assembly: the compiler takes the load apart where its values go to several lines. For what was stored before a barrier.
__device__ inline void fetch_pair(const float* p, float (&x)[2]) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(unsigned(__cvta_generic_to_shared(p))));
}
__device__ inline void fetch_pair(const double* p, double (&x)[2]) {
  const double2 pair = *reinterpret_cast<const double2*>(p);
  x[0] = pair.x, x[1] = pair.y;
}
// As CUDA's own vectors: the compiler takes the store of another struct apart where values come from several lines.
__device__ inline void store_together(float* p, const float (&x)[4]) { *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]); }
__device__ inline void store_together(double* p, const double (&x)[2]) { *reinterpret_cast<double2*>(p) = make_double2(x[0], x[1]); }
template <class T>
__device__ inline void store_together(T* p, const T (&x)[1]) { *p = x[0]; }

__device__ inline void store_quad(float* p, const Quad<float>& x) { store_together(p, x.at); }
__device__ inline void store_quad(double* p, const Quad<double>& x) {
  store_together(p, {x.at[0], x.at[1]}), store_together(p + 2, {x.at[2], x.at[3]});
}

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

// ---- copies between memory and tile ----

// A thread copies pieces of several lines at once. It reads as many as elements of a tile are stored together, four of float32: they are on
// the way together, and cover the latency of the memory. It writes two: enough, and no more registers. Where lines are the pixels of a
// channel, those are neighbours.
template <class T, class Storage, int N, bool PixelLines, int Lines>
struct Copy {
  const Array& x;
  const Tile& tile;
  T* values;

  // f(the piece of the first line in memory, its place in the tile, its first element, the first line)
  template <class F>
  __device__ void each(F f) const {
    const int thread = thread_number(), length = PixelLines ? tile.width : tile.end, lines = PixelLines ? tile.end : tile.width;
    const int group = thread >> x.across, first = ((thread & ((1 << x.across) - 1)) + (group >> x.down << x.across)) * N;
    const int first_line = (group & ((1 << x.down) - 1)) * (PixelLines ? Lines : 1);
    Storage* start = static_cast<Storage*>(x.data) + tile.sample * x.sample_stride + tile.begin * (PixelLines ? 1 : x.line_stride);
#pragma unroll 1
    for (int k = first; k < length; k += int(blockDim.x >> x.down) * N) {
#pragma unroll 1
      for (int line = first_line; line < lines; line += Lines << x.down) f(start + k + line * x.line_stride, place(k, line), k, line);
    }
  }
  __device__ int next() const { return PixelLines ? 1 : 1 << x.down; }  // from one of the lines to the next
  __device__ int lines_there() const { return PixelLines ? tile.channels : tile.count; }
  __device__ int length_there() const { return PixelLines ? tile.count : tile.channels; }
  __device__ bool inside(int k, int line) const { return k < length_there() && line < lines_there(); }
  __device__ T* place(int k, int line) const { return values + (PixelLines ? k * tile.pitch + line : line * tile.pitch + k); }

  // Widened; `absent` where the tile has more than the tensor.
  __device__ void read(T absent) const {
    each([&](const Storage* from, T* to, int k, int line) {
      if (inside(k, line + (Lines - 1) * next())) {
        Piece<Storage, N> pieces[Lines];
#pragma unroll
        for (int i = 0; i < Lines; ++i) pieces[i] = load_piece<Storage, N>(from + i * next() * x.line_stride);
        if constexpr (PixelLines) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            T pixel[Lines];
            for (int i = 0; i < Lines; ++i) pixel[i] = widen<T>(pieces[i].at[j]);
            store_together(to + j * tile.pitch, pixel);
          }
        } else {
          constexpr int together = N < Lines ? N : Lines;
#pragma unroll
          for (int i = 0; i < Lines; ++i)
#pragma unroll
            for (int j = 0; j < N; j += together) {
              T part[together];
              for (int l = 0; l < together; ++l) part[l] = widen<T>(pieces[i].at[j + l]);
              store_together(to + i * next() * tile.pitch + j, part);
            }
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < Lines && line + i * next() < (PixelLines ? tile.end : tile.width); ++i) {
          Piece<Storage, N> piece = {};
          const bool there = inside(k, line + i * next());
          if (there) piece = load_piece<Storage, N>(from + i * next() * x.line_stride);
#pragma unroll
          for (int j = 0; j < N; ++j) *place(k + j, line + i * next()) = there ? widen<T>(piece.at[j]) : absent;
        }
      }
    });
  }

  __device__ void write() const {
    each([&](Storage* to, const T* from, int k, int line) {
      constexpr int size = sizeof(Storage);
      if (N > 1 && inside(k, line + (Lines - 1) * next())) {
        uint32_t words[Lines][4];
        if constexpr (PixelLines) {
#pragma unroll
          for (int j = 0; j < N; j += 2) {
            T one[Lines], other[Lines];
            fetch_pair(from + j * tile.pitch, one), fetch_pair(from + (j + 1) * tile.pitch, other);
            for (int i = 0; i < Lines; ++i) narrow_pair(one[i], other[i], words[i] + j * size / 4, to);
          }
        } else {
#pragma unroll
          for (int i = 0; i < Lines; ++i)
#pragma unroll
            for (int j = 0; j < N; j += 2) {
              T pair[2];
              fetch_pair(from + i * next() * tile.pitch + j, pair);
              narrow_pair(pair[0], pair[1], words[i] + j * size / 4, to);
            }
        }
#pragma unroll
        for (int i = 0; i < Lines; ++i) store_words(to + i * next() * x.line_stride, words[i]);
      } else {
#pragma unroll 1
        for (int i = 0; i < Lines && inside(k, line + i * next()); ++i) {
          Storage* of_line = to + i * next() * x.line_stride;
          if constexpr (N > 1) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < N; j += 2)
              narrow_pair(*place(k + j, line + i * next()), *place(k + j + 1, line + i * next()), words + j * size / 4, to);
            store_words(of_line, words);
          } else {
            narrow(*place(k, line + i * next()), *of_line);
          }
        }
      }
    });
  }
};

// f with the copy that fits the array.
template <class T, int Lines, class F>
__device__ inline void with_copy(const Array& x, const Tile& tile, T* values, F f) {
  with_storage<T>(x.dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    constexpr int n = 16 / sizeof(Storage);
    if (x.pixel_lines) {
      if (x.vector) f(Copy<T, Storage, n, true, Lines>{x, tile, values});
      else f(Copy<T, Storage, 1, true, Lines>{x, tile, values});
    } else {
      if (x.vector) f(Copy<T, Storage, n, false, Lines>{x, tile, values});
      else f(Copy<T, Storage, 1, false, Lines>{x, tile, values});
    }
  });
}

// Memory to tile, `absent` where there is nothing in memory.
template <class T>
__device__ inline void read_tile(const Array& x, const Tile& tile, T* values, T absent) {
  with_copy<T, 16 / sizeof(T)>(x, tile, values, [&](const auto& copy) { copy.read(absent); });
}

template <class T>
__device__ inline void write_tile(const Array& x, const Tile& tile, T* values) {
  with_copy<T, 2>(x, tile, values, [&](const auto& copy) { copy.write(); });
}

// Whether pixel p of the tile counts.
__device__ inline bool counted(const Tiling& t, const Tile& tile, int p) {
  return p < tile.count && (t.mask == nullptr || t.mask[tile.sample * t.pixels + tile.begin + p]);
}

// ---- sums ----

constexpr int kMostExchanged = 2;

// The threads that share a pixel: `lanes` neighbours, a power of two. They are a part of a warp, or several warps, which exchange numbers
// through shared memory: then all threads of the block have to call together.
template <class T>
struct Team {
  int lanes, lane_bits;
  T* scratch;  // 2 x kMostExchanged numbers for each warp
  int turn = 0;

  __device__ int pixel() const { return int(threadIdx.x) >> lane_bits; }
  __device__ int pixels_at_once() const { return int(blockDim.x) >> lane_bits; }
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

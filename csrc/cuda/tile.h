// Tiles in shared memory: what both ops share on the device.
//
// A tile holds `width` pixels of one sample, pixel after pixel, all channels of a pixel side by side, widened to the accumulation type T,
// whatever the tensor's type and layout. So all arithmetic is written once. Threads copy pieces of 16 bytes between memory and tile, or
// single elements where lines are not aligned to that; `lanes` neighbouring threads of a warp then share a pixel, and each of them owns
// every lanes-th group of four channels (a quad) of it: sums over channels go through shuffles, and nothing else is exchanged.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "call.h"

namespace mrf {
namespace cuda {

constexpr unsigned kWarp = 0xffffffffu;

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
__device__ inline float maximum(float a, float b) { return fmaxf(a, b); }
__device__ inline double maximum(double a, double b) { return fmax(a, b); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
// Rounded by itself, never a part of a fused operation.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// ---- storage types ----

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline double widen(double x) { return x; }
template <class T> __device__ inline void narrow(T x, float& y) { y = float(x); }
template <class T> __device__ inline void narrow(T x, double& y) { y = x; }
template <class T> __device__ inline void narrow(T x, __nv_bfloat16& y) { y = __float2bfloat16(float(x)); }
template <class T> __device__ inline void narrow(T x, __half& y) { y = __float2half(float(x)); }

template <class Storage, int N>
struct alignas(N * sizeof(Storage)) Piece {
  Storage at[N];
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
  int tiling;
  int64_t sample, first_tile, last_tile;
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
  return {k, sample, first, end < tiles ? end : tiles};
}

// A tile of one sample: pixels [begin, begin + count) of `width`.
struct Tile {
  int64_t sample, begin;
  int channels, width, count, pitch;
};

__device__ inline Tile tile_at(const Tiling& t, int64_t sample, int64_t tile) {
  const int64_t begin = tile * t.width, left = t.pixels - begin;
  return {sample, begin, int(t.channels), t.width, int(left < t.width ? left : t.width), t.pitch};
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T>
__device__ inline T* shared() { return reinterpret_cast<T*>(shared_memory); }

// ---- copies between memory and tile ----

// The pieces of N elements of a tile that fall to a thread, channels rounded up to a multiple of four: where each lies in memory (`offset`
// elements behind the tile's first) and in the tile (`index`).
template <int N>
struct Pieces {
  bool pixel_lines;
  int across, first, line, k, lines, length, index, line_step, pitch;
  int64_t offset, line_stride;

  __device__ Pieces(const Array& x, const Tile& t) : pixel_lines(x.pixel_lines), across(0), pitch(t.pitch), line_stride(x.line_stride) {
    const int channels = (t.channels + 3) & ~3;
    lines = pixel_lines ? channels : t.width, length = pixel_lines ? t.width : channels;
    // 2^across neighbouring threads on a line. Of a line of pixels 64 aligned bytes: whole sectors, and few conflicts between the banks in
    // which pixels start.
    const int most = pixel_lines && N > 1 ? 2 : 5;
    while (across < most && (N << across) < length) ++across;
    first = (threadIdx.x & ((1 << across) - 1)) * N, line_step = blockDim.x >> across;
    line = first < length ? threadIdx.x >> across : lines;
    start_line();
  }
  __device__ bool valid() const { return line < lines; }
  __device__ int pixel() const { return pixel_lines ? k : line; }
  __device__ int channel() const { return pixel_lines ? line : k; }
  __device__ void start_line() {
    k = first, offset = line * line_stride + k;
    index = pixel_lines ? k * pitch + line : line * pitch + k;
  }
  __device__ void next() {
    const int step = N << across;
    k += step, offset += step, index += pixel_lines ? step * pitch : step;
    if (k >= length) line += line_step, start_line();
  }
};

template <class Storage>
__device__ inline Storage* start_of(const Array& x, const Tile& t) {
  return static_cast<Storage*>(x.data) + t.sample * x.sample_stride + t.begin * (x.pixel_lines ? 1 : x.line_stride);
}

// Calls f with a piece of 16 bytes of the storage type, or of one element where lines are not aligned to that.
template <class T, class F>
__device__ inline void with_pieces(const Array& x, F f) {
  with_storage<T>(x.dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    if (x.vector)
      f(Piece<Storage, 16 / sizeof(Storage)>{});
    else
      f(Piece<Storage, 1>{});
  });
}

// Memory to tile. Channels up to the next multiple of four become `pad`, pixels past the end 0. A thread loads two pieces before it
// stores the first: with 1024 threads, enough on the way to cover the latency of the memory.
template <class T>
__device__ inline void read_tile(const Array& x, const Tile& t, T* tile, float pad) {
  with_pieces<T>(x, [&](auto none) {
    using P = decltype(none);
    using Storage = std::remove_reference_t<decltype(none.at[0])>;
    constexpr int n = sizeof(P) / sizeof(Storage), batch = 2;
    const Storage* start = start_of<Storage>(x, t);
    const int step = x.pixel_lines ? t.pitch : 1;
    for (Pieces<n> at(x, t); at.valid();) {
      P pieces[batch];
      int to[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        to[j] = at.valid() ? at.index : -1;
        if (at.valid() && at.pixel() < t.count && at.channel() < t.channels) {
          const Storage* from = start + at.offset;
          if constexpr (n > 1) {
            const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
            __builtin_memcpy(&pieces[j], &raw, sizeof raw);
          } else {
            pieces[j].at[0] = *from;
          }
        } else {
          for (int i = 0; i < n; ++i) narrow(at.channel() < t.channels ? 0.0f : pad, pieces[j].at[i]);
        }
        at.next();
      }
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (to[j] >= 0)
          for (int i = 0; i < n; ++i) tile[to[j] + i * step] = widen(pieces[j].at[i]);
    }
  });
}

// Tile to memory; 0 at pixels that do not count (null: at all).
template <class T>
__device__ inline void write_tile(const Array& x, const Tile& t, const T* tile, const T* counts) {
  with_pieces<T>(x, [&](auto none) {
    using P = decltype(none);
    using Storage = std::remove_reference_t<decltype(none.at[0])>;
    constexpr int n = sizeof(P) / sizeof(Storage);
    Storage* start = start_of<Storage>(x, t);
    const int step = x.pixel_lines ? t.pitch : 1, next_pixel = x.pixel_lines ? 1 : 0;
#pragma unroll 1
    for (Pieces<n> at(x, t); at.valid(); at.next()) {
      if (at.pixel() >= t.count || at.channel() >= t.channels) continue;
      P piece;
      for (int i = 0; i < n; ++i) {
        const bool here = counts != nullptr && counts[at.pixel() + i * next_pixel] != T(0);
        narrow(here ? tile[at.index + i * step] : T(0), piece.at[i]);
      }
      *reinterpret_cast<P*>(start + at.offset) = piece;
    }
  });
}

// Which pixels of the tile count, as 1 and 0.
template <class T>
__device__ inline void read_counts(const Tiling& tiling, const Tile& t, T* counts) {
  for (int p = threadIdx.x; p < t.width; p += blockDim.x)
    counts[p] = p < t.count && (tiling.mask == nullptr || tiling.mask[t.sample * tiling.pixels + t.begin + p]);
}

// ---- quads ----

template <class T>
struct alignas(16) Quad {
  T at[4];
};

template <class T>
__device__ inline Quad<T> load_quad(const T* p) { return *reinterpret_cast<const Quad<T>*>(p); }
template <class T>
__device__ inline void store_quad(T* p, const Quad<T>& x) { *reinterpret_cast<Quad<T>*>(p) = x; }

// ---- sums ----

template <class T>
__device__ inline T sum_over(T x, int first, int end) {  // lanes that differ in the bits [first, end) of their number; the same bits in all
#pragma unroll
  for (int o = 1; o < 32; o *= 2)
    if (o >= first && o < end) x += __shfl_xor_sync(kWarp, x, o);
  return x;
}

template <class T>
__device__ inline T maximum_over(T x, int lanes) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2)
    if (o < lanes) x = maximum(x, __shfl_xor_sync(kWarp, x, o));
  return x;
}

// Adds what each pixel of a warp gave (the same in all its lanes) to the warp's row.
template <class T>
__device__ inline void add_pixels(T x, int lanes, T* row) {
  x = sum_over(x, lanes, 32);
  if (threadIdx.x % 32 == 0) *row += x;
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
  return sum_over(sum, 1, 32);
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

// Tiles in shared memory: what both ops share on the device.
//
// A tile holds `width` pixels of one sample, pixel after pixel, all channels of a pixel side by side, widened to the accumulation type T,
// whatever the tensor's type and layout. So all arithmetic is written once. Threads copy pieces of 16 bytes between memory and tile, or
// single elements where lines are not aligned to that; a team of neighbouring threads then shares a pixel, and each of them owns every
// lanes-th group of four channels (a quad) of it: sums over channels go through the team, and nothing else is exchanged.
#pragma once

#include "device.h"

namespace mrf {
namespace cuda {

// A tile of one sample: `count` pixels from `begin` on, of `width`; channels from `end` on have no place.
struct Tile {
  int64_t sample, begin;
  int count, channels, width, end, pitch;
};

__device__ inline Tile tile_at(const Tiling& t, int64_t sample, int64_t number) {
  const int64_t begin = number * t.width, left = t.pixels - begin;
  return {sample, begin, int(left < t.width ? left : t.width), int(t.channels), t.width, 4 * t.quads << t.lane_bits, t.pitch};
}

// ---- quads, moved in 16 bytes ----

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

// Adds what each pixel of a warp gave (the same in all threads of its team) to number i of the warp's row of `count`; where a team is
// several warps, to that of the first.
template <class T>
__device__ inline void add_pixels(T x, int lanes, T* rows, int count, int i) {
  x = sum_over(x, lanes);
  const int thread = thread_number();
  if ((thread & (max(lanes, 32) - 1)) == 0) rows[thread / 32 * count + i] += x;
}

}  // namespace cuda
}  // namespace mrf

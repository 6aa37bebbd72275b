// Tiles of a warp: a few pixels of one sample, all channels of several tensors, brought to shared memory as they are.
//
// A warp brings its tiles itself, by asynchronous copies of 16 bytes that take no registers while they are under way, and shares them with
// no other: it waits at no barrier of the block, and beside it others compute while its bytes come. In the tile `lanes` lanes share a pixel
// (or a pair of neighbours in one word), each with every lanes-th unit of its channels: what a lane reads at once, from another bank than the
// lanes beside it, and widens in registers. Sums over channels stay in the lane and, where a pixel has several, go through a few shuffles. What a
// lane writes takes the place of what it read, and leaves in 16 bytes as it came.
#pragma once

#include "device.h"

namespace mrf {
namespace cuda {

__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// Shared memory is addressed by 32-bit numbers: of pointers the compiler makes them anew at every access.
__device__ inline unsigned shared_address(const void* p) { return recomputed(unsigned(__cvta_generic_to_shared(p))); }

// `Size` bytes to shared memory, of which `there` (0 to Size) exist; zeros for the rest.
template <int Size>
__device__ inline void copy_async(unsigned to, const void* from, int there) {
  if constexpr (Size == 16)  // around L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Size), "r"(there) : "memory");
}

template <int Size>
__device__ inline void copy_async(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

template <class V>
__device__ inline V load_shared(unsigned at) {
  V x;
  if constexpr (sizeof(V) == 16) {
    uint4 raw;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "r"(at));
    __builtin_memcpy(&x, &raw, 16);
  } else if constexpr (sizeof(V) == 8) {
    uint64_t raw;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(raw) : "r"(at));
    __builtin_memcpy(&x, &raw, 8);
  } else if constexpr (sizeof(V) == 4) {
    uint32_t raw;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(raw) : "r"(at));
    __builtin_memcpy(&x, &raw, 4);
  } else {
    uint16_t raw;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(raw) : "r"(at));
    __builtin_memcpy(&x, &raw, 2);
  }
  return x;
}
template <class V>
__device__ inline void store_shared(unsigned at, const V& x) {
  if constexpr (sizeof(V) == 16) {
    uint4 raw;
    __builtin_memcpy(&raw, &x, 16);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    uint64_t raw;
    __builtin_memcpy(&raw, &x, 8);
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(at), "l"(raw) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    uint32_t raw;
    __builtin_memcpy(&raw, &x, 4);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(raw) : "memory");
  } else {
    uint16_t raw;
    __builtin_memcpy(&raw, &x, 2);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(raw) : "memory");
  }
}

// Where the tile of an array lies in memory: `lines` lines, of which some exist, `pitch` bytes apart in shared memory; of a line
// `bytes_there` exist.
struct Span {
  unsigned char* memory;
  int64_t stride;
  int lines, lines_there, bytes_there, pitch;
};

// How a warp goes over the pieces of a tile's lines, `count` to a line: a lane has piece `piece` of line `line` first, then of the line
// `lines_on` further down the piece `on` further on.
struct Pieces {
  int count, line, piece, lines_on, on;
  __device__ explicit Pieces(int count) : count(count) {
    const int lane = thread_number() & 31;
    line = lane / count, piece = lane - line * count, lines_on = 32 / count, on = 32 - lines_on * count;
  }
};

// f(where in memory, offset in the tile, how many of its bytes exist: any number below 1 for none, whether the compiler knows that all do)
// for the pieces of the calling lane.
template <int Size, class F>
__device__ inline void each_piece(const Span& span, const Pieces& pieces, F f) {
  int line = pieces.line, piece = pieces.piece, place = line * span.pitch + piece * Size;
  unsigned char* memory = span.memory + line * span.stride + piece * Size;
  const int64_t memory_on = pieces.lines_on * span.stride + pieces.on * Size;
  const int place_on = pieces.lines_on * span.pitch + pieces.on * Size;
  const int64_t memory_wrap = span.stride - pieces.count * Size;
  const int place_wrap = span.pitch - pieces.count * Size;
  if (pieces.on == 0 && line < span.lines) {  // the same piece of all lines
    const int there = span.bytes_there - piece * Size;
    int left = (span.lines - line + pieces.lines_on - 1) / pieces.lines_on, there_left = left;
    if (span.lines_there < span.lines) there_left = max(0, (span.lines_there - line + pieces.lines_on - 1) / pieces.lines_on);
    if (there >= Size) {
#pragma unroll 1
      for (; there_left >= 4; there_left -= 4, left -= 4)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(memory, place, Size, std::true_type{}), memory += memory_on, place += place_on;
    }
#pragma unroll 1
    for (; left > 0; --left, --there_left, memory += memory_on, place += place_on) f(memory, place, there_left > 0 ? there : 0, std::false_type{});
    return;
  }
#pragma unroll 4
  for (; line < span.lines; line += pieces.lines_on) {
    f(memory, place, line < span.lines_there ? span.bytes_there - piece * Size : 0, std::false_type{});
    memory += memory_on, place += place_on, piece += pieces.on;
    if (piece >= pieces.count) piece -= pieces.count, memory += memory_wrap, place += place_wrap, ++line;
  }
}

// The part of a warp's tile that a lane has. A unit is `Pixels` pixels of a channel, or `Channels` channels of a pixel where channels lie
// side by side (`Pixels` 0). Of 16 bits these are two where they do not fill 16 bytes: then a lane has two pixels, one after the other, which
// together are a number of words where each alone is not; one channel of such a pixel, the first or the last, is no unit but half of one.
template <class T, class Storage, int Pixels_, int Channels_>
struct WarpTile {
  static constexpr bool pixel_lines = Pixels_ > 0;
  static constexpr int Pixels = pixel_lines ? Pixels_ : 1, Channels = pixel_lines ? 1 : Channels_;
  static constexpr int n = Pixels * Channels, size = sizeof(Storage);
  static constexpr bool pieces_of_rows = size * Channels == 16, pairs = size == 2 && Channels == 2;
  static constexpr int turns = pairs ? 2 : 1;  // of a lane, in a tile
  using Values = Piece<Storage, n>;

  const Tiling& tiling;
  const int groups, group, part;  // lane = part * groups + group
  const Pieces pieces;            // of 16 bytes
  // Of this turn: the number in the tile of the lane's first pixel, where it starts in a plane, and of pairs the channels before a word.
  int first, row, head;

  __device__ explicit WarpTile(const Tiling& t)
      : tiling(t),
        groups(32 >> t.lane_bits),
        group(threadIdx.x % 32 & (groups - 1)),
        part(threadIdx.x % 32 >> (5 - t.lane_bits)),
        pieces((line_bytes(true) + 15) / 16) {}

  // Pairs of pixels side by side, or half a tile apart: so that from lane to lane are as many words as lanes share a pixel, times an odd
  // number, and what lanes read together lies in different banks.
  __device__ void start(int turn) {
    first = !pairs ? group * Pixels : tiling.pitch & (4 * tiling.lanes - 1) ? 2 * group + turn : group + turn * groups;
    row = first * (pixel_lines ? size : tiling.pitch), head = pairs ? row / 2 & 1 : 0;
  }

  // Of a line of the tile; of units below 16 bytes that are copied 16 bytes at a time all rows are one line.
  __device__ int line_bytes(bool vector) const {
    if (pixel_lines) return tiling.width * size;
    return int(tiling.channels) * size * (!pieces_of_rows && vector ? tiling.width : 1);
  }

  __device__ int plane_bytes() const { return ((pixel_lines ? int(tiling.channels) : tiling.width) * tiling.pitch + 15) / 16 * 16; }
  // Units of this lane; the place of a channel in a plane, and the number of its unit in the lane that has it.
  __device__ int units() const { return ((int(tiling.channels) - head) / Channels - part + tiling.lanes - 1) >> tiling.lane_bits; }
  __device__ int place(int channel) const { return channel * (pixel_lines ? tiling.pitch : size) + row; }
  __device__ int unit_of(int channel) const { return head && channel == 0 ? units() : (channel - head) / Channels >> tiling.lane_bits; }
  // From unit to unit of this lane: the lanes of a warp have a word of pixels each, whatever of them shares a pixel.
  __device__ int step() const { return pixel_lines ? 32 * n * size : tiling.lanes * n * size; }
  // Of the lanes of a pixel the one that has a channel; its lane in the warp, and whether it is this one.
  __device__ int part_of(int channel) const { return (channel - head) / Channels & (tiling.lanes - 1); }
  __device__ int owner(int channel) const { return part_of(channel) * groups + group; }
  __device__ bool owns(int channel) const { return part_of(channel) == part; }

  __device__ static Values load_unit(unsigned at) { return load_shared<Values>(at); }
  __device__ static void widen_unit(const Values& values, T* x) {
    if constexpr (std::is_same_v<Storage, __nv_bfloat16> && n > 1) {
#pragma unroll
      for (int i = 0; i < n; i += 2) {
        uint32_t pair;
        __builtin_memcpy(&pair, values.at + i, 4);
        x[i] = __uint_as_float(pair << 16), x[i + 1] = __uint_as_float(pair & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = widen<T>(values.at[i]);
    }
  }
  // Of `Count` elements that a step goes over, the first at `at`: whole units, or half of one.
  template <int Count>
  __device__ void load(unsigned at, T (&x)[Count]) const {
    if constexpr (Count < n) x[0] = load_one(at);
    else
#pragma unroll
      for (int u = 0; u < Count / n; ++u) widen_unit(load_unit(at + u * step()), x + u * n);
  }
  template <int Count>
  __device__ void store(unsigned at, const T (&x)[Count]) const {
    if constexpr (Count < n) store_one(at, x[0]);
    else
#pragma unroll
      for (int u = 0; u < Count / n; ++u) {
        Values values;
#pragma unroll
        for (int i = 0; i < n; ++i) narrow(x[u * n + i], values.at[i]);
        store_shared(at + u * step(), values);
      }
  }
  // The larger ones of these and of `top`.
  template <int Count>
  __device__ void keep_larger_of(unsigned at, Values& top) const {
    if constexpr (Count < n) {
      Values half;
      half.at[0] = half.at[n - 1] = load_shared<Storage>(at);
      keep_larger(top, half);
    } else {
#pragma unroll
      for (int u = 0; u < Count / n; ++u) keep_larger(top, load_unit(at + u * step()));
    }
  }
  __device__ static T load_one(unsigned at) { return widen<T>(load_shared<Storage>(at)); }
  __device__ static void store_one(unsigned at, T x) {
    Storage value;
    narrow(x, value);
    store_shared(at, value);
  }

  // f<elements>(first unit, its first channel, its place in a plane) over the units of this lane, `Units` of them together as long as there
  // are so many. From unit to unit channels are `lanes` units on.
  template <int Units, class F>
  __device__ void each_step(F f) const {
    const int end = units(), on = tiling.lanes * Channels;
    int k = 0, channel = head + part * Channels, at = place(channel);
#pragma unroll 1
    for (; k + Units <= end; k += Units, channel += Units * on, at += Units * step()) f(std::integral_constant<int, Units * n>{}, k, channel, at);
    if constexpr (Units > 1)
#pragma unroll 1
      for (; k < end; ++k, channel += on, at += step()) f(std::integral_constant<int, n>{}, k, channel, at);
    if constexpr (pairs) {
      const int half = head ? 0 : int(tiling.channels) - 1;
      if (tiling.channels & 1 && owns(half)) f(std::integral_constant<int, 1>{}, k, half, place(half));
    }
  }

  // ---- between memory and a plane ----

  __device__ Span span(const Array& x, int64_t sample, int64_t begin) const {
    const int64_t left = tiling.pixels - begin;
    const int count = int(left < tiling.width ? left : tiling.width), channels = int(tiling.channels);
    const int64_t first = sample * x.sample_stride + begin * (pixel_lines ? 1 : x.line_stride), stride = x.line_stride * size;
    unsigned char* const memory = static_cast<unsigned char*>(x.data) + first * size;
    if (pixel_lines) return {memory, stride, channels, channels, count * size, tiling.pitch};
    if (!pieces_of_rows && x.vector) return {memory, 0, 1, 1, count * channels * size, 0};
    return {memory, stride, tiling.width, count, channels * size, tiling.pitch};
  }

  // Zeros where the tile has more than the tensor. wait_for_copies() comes before the first use.
  __device__ void bring(const Array& x, int64_t sample, int64_t begin, unsigned plane) const {
    const Span from = span(x, sample, begin);
    if (x.vector) {
      each_piece<16>(from, pieces, [&](const unsigned char* memory, int place, int there, auto whole) {
        if constexpr (whole.value)
          copy_async<16>(plane + place, memory);
        else
          copy_async<16>(plane + place, memory, max(0, min(there, 16)));
      });
    } else {
      each_piece<size>(from, Pieces(line_bytes(false) / size), [&](const unsigned char* memory, int place, int there, auto) {
        if constexpr (size >= 4)
          copy_async<size>(plane + place, memory, there > 0 ? size : 0);
        else
          store_shared(plane + place, there > 0 ? __ldg(reinterpret_cast<const uint16_t*>(memory)) : uint16_t(0));
      });
    }
  }

  // After a __syncwarp(). Zeros where `there` is not.
  __device__ void take(const Array& x, int64_t sample, int64_t begin, unsigned plane, bool there) const {
    const Span to = span(x, sample, begin);
    const auto element = [&](unsigned char* memory, unsigned at) {
      Storage value;
      narrow(T(0), value);
      if (there) value = load_shared<Storage>(at);
      *reinterpret_cast<Storage*>(memory) = value;
    };
    if (x.vector) {
      each_piece<16>(to, pieces, [&](unsigned char* memory, int place, int bytes, auto) {
        if (bytes >= 16)
          *reinterpret_cast<uint4*>(memory) = there ? load_shared<uint4>(plane + place) : make_uint4(0, 0, 0, 0);
        else
          for (int i = 0; i < bytes; i += size) element(memory + i, plane + place + i);
      });
    } else {
      each_piece<size>(to, Pieces(line_bytes(false) / size), [&](unsigned char* memory, int place, int bytes, auto) {
        if (bytes > 0) element(memory, plane + place);
      });
    }
  }
};

}  // namespace cuda
}  // namespace mrf

// MRF_KERNEL(name, type, storage, pixels, channels) for every storage type and unit, and the table [dtype][unit] of kernels `pass`_name.
#define MRF_WARP_TILE_KERNELS                              \
  MRF_KERNEL(pixels_float32, float, float, 1, 0)           \
  MRF_KERNEL(piece_float32, float, float, 0, 4)            \
  MRF_KERNEL(single_float32, float, float, 0, 1)           \
  MRF_KERNEL(pixels_bfloat16, float, __nv_bfloat16, 2, 0)  \
  MRF_KERNEL(piece_bfloat16, float, __nv_bfloat16, 0, 8)   \
  MRF_KERNEL(single_bfloat16, float, __nv_bfloat16, 0, 2)  \
  MRF_KERNEL(pixels_float16, float, __half, 2, 0)          \
  MRF_KERNEL(piece_float16, float, __half, 0, 8)           \
  MRF_KERNEL(single_float16, float, __half, 0, 2)          \
  MRF_KERNEL(pixels_float64, double, double, 1, 0)         \
  MRF_KERNEL(single_float64, double, double, 0, 1)
#define MRF_WARP_TILE_UNITS(pass, dtype) {pass##_pixels_##dtype, pass##_piece_##dtype, pass##_single_##dtype}
#define MRF_WARP_TILE_LIST(pass)                                                                       \
  {MRF_WARP_TILE_UNITS(pass, float32), {pass##_pixels_float64, nullptr, pass##_single_float64},        \
   MRF_WARP_TILE_UNITS(pass, bfloat16), MRF_WARP_TILE_UNITS(pass, float16)}

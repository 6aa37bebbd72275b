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

// `size` bytes to shared memory, of which `there` (0 to size) exist; zeros for the rest.
template <int Size>
__device__ inline void copy_async(void* to, const void* from, int there) {
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  if constexpr (Size == 16)  // around L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(there) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from), "n"(Size), "r"(there) : "memory");
}

// Where the tile of an array lies in memory: `lines` lines of so many bytes, of which some exist, `pitch` bytes apart in shared memory.
struct Span {
  unsigned char* memory;
  int64_t stride;
  int lines, lines_there, bytes, bytes_there, pitch;
};

// f(where in memory, offset in the tile, how many of its bytes exist: any number below 1 for none) for the pieces of the calling lane.
template <int Size, class F>
__device__ inline void each_piece(const Span& span, F f) {
  const int lane = thread_number() & 31, count = (span.bytes + Size - 1) / Size;  // pieces of a line
  const int lines_on = 32 / count, on = 32 - lines_on * count, first = lane / count;
  int piece = lane - first * count, place = first * span.pitch + piece * Size;
  unsigned char* memory = span.memory + first * span.stride + piece * Size;
  const int64_t memory_on = lines_on * span.stride + on * Size, memory_wrap = span.stride - count * Size;
  const int place_on = lines_on * span.pitch + on * Size, place_wrap = span.pitch - count * Size;
#pragma unroll 4
  for (int line = first; line < span.lines; line += lines_on) {
    f(memory, place, line < span.lines_there ? span.bytes_there - piece * Size : 0);
    memory += memory_on, place += place_on;
    if (on == 0) continue;
    piece += on;
    if (piece >= count) piece -= count, memory += memory_wrap, place += place_wrap, ++line;
  }
}

// The part of a warp's tile that a lane has. A unit is `Pixels` pixels of a channel, or `Channels` channels of a pixel where channels lie
// side by side (`Pixels` 0).
template <class T, class Storage, int Pixels_, int Channels_>
struct WarpTile {
  static constexpr bool pixel_lines = Pixels_ > 0;
  static constexpr int Pixels = pixel_lines ? Pixels_ : 1, Channels = pixel_lines ? 1 : Channels_;
  static constexpr int n = Pixels * Channels, size = sizeof(Storage);
  using Values = Piece<Storage, n>;

  const Tiling& tiling;
  const int groups, group, part;           // lane = part * groups + group
  const int channel_stride, group_stride;  // bytes in the tile

  __device__ explicit WarpTile(const Tiling& t)
      : tiling(t),
        groups(32 >> t.lane_bits),
        group(threadIdx.x % 32 & (groups - 1)),
        part(threadIdx.x % 32 >> (5 - t.lane_bits)),
        channel_stride(pixel_lines ? t.pitch : size),
        group_stride(pixel_lines ? Pixels * size : t.pitch) {}

  __device__ int plane_bytes() const { return ((pixel_lines ? int(tiling.channels) : tiling.width) * tiling.pitch + 15) / 16 * 16; }
  // Units of this lane, the first channel of one, and its place in a plane.
  __device__ int units() const { return (int(tiling.channels) / Channels - part + tiling.lanes - 1) >> tiling.lane_bits; }
  __device__ int channel(int unit) const { return (part + unit * tiling.lanes) * Channels; }
  __device__ int place(int channel) const { return channel * channel_stride + group * group_stride; }
  // From unit to unit of this lane: the lanes of a warp have a word of pixels each, whatever of them shares a pixel.
  __device__ int step() const { return pixel_lines ? 32 * n * size : tiling.lanes * n * size; }
  // The lane that has a channel of this lane's pixels, and whether it is this one.
  __device__ int owner(int channel) const { return (channel / Channels & (tiling.lanes - 1)) * groups + group; }
  __device__ bool owns(int channel) const { return (channel / Channels & (tiling.lanes - 1)) == part; }

  __device__ static void load(const unsigned char* at, T (&x)[n]) {
    const Values values = *reinterpret_cast<const Values*>(at);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = widen<T>(values.at[i]);
  }
  __device__ static void store(unsigned char* at, const T (&x)[n]) {
    Values values;
#pragma unroll
    for (int i = 0; i < n; ++i) narrow(x[i], values.at[i]);
    *reinterpret_cast<Values*>(at) = values;
  }
  __device__ static T load_one(const unsigned char* at) { return widen<T>(*reinterpret_cast<const Storage*>(at)); }
  __device__ static void store_one(unsigned char* at, T x) { narrow(x, *reinterpret_cast<Storage*>(at)); }

  // f over the lanes of each pixel, the same bits in all of them.
  template <class F>
  __device__ void combine(F f) const {
#pragma unroll 1
    for (int o = groups; o < 32; o *= 2) f(o);
  }

  // ---- between memory and a plane ----

  __device__ Span span(const Array& x, int64_t sample, int64_t begin) const {
    const int64_t left = tiling.pixels - begin;
    const int count = int(left < tiling.width ? left : tiling.width), channels = int(tiling.channels);
    const int64_t first = sample * x.sample_stride + begin * (pixel_lines ? 1 : x.line_stride), stride = x.line_stride * size;
    unsigned char* const memory = static_cast<unsigned char*>(x.data) + first * size;
    if (pixel_lines) return {memory, stride, channels, channels, tiling.width * size, count * size, tiling.pitch};
    if (Channels == 1 && x.vector)  // rows that follow one on the other
      return {memory, 0, 1, 1, tiling.width * channels * size, count * channels * size, 0};
    return {memory, stride, tiling.width, count, channels * size, channels * size, tiling.pitch};
  }

  // Zeros where the tile has more than the tensor. wait_for_copies() comes before the first use.
  __device__ void bring(const Array& x, int64_t sample, int64_t begin, unsigned char* plane) const {
    const Span from = span(x, sample, begin);
    if (x.vector) {
      each_piece<16>(from, [&](const unsigned char* memory, int place, int there) {
        copy_async<16>(plane + place, memory, max(0, min(there, 16)));
      });
    } else {
      each_piece<size>(from, [&](const unsigned char* memory, int place, int there) {
        if constexpr (size >= 4)
          copy_async<size>(plane + place, memory, there > 0 ? size : 0);
        else
          *reinterpret_cast<uint16_t*>(plane + place) = there > 0 ? __ldg(reinterpret_cast<const uint16_t*>(memory)) : uint16_t(0);
      });
    }
  }

  // After a __syncwarp(). `plane` null: zeros.
  __device__ void take(const Array& x, int64_t sample, int64_t begin, const unsigned char* plane) const {
    const Span to = span(x, sample, begin);
    const auto element = [&](unsigned char* memory, int place) {
      Storage value;
      narrow(T(0), value);
      if (plane) value = *reinterpret_cast<const Storage*>(plane + place);
      *reinterpret_cast<Storage*>(memory) = value;
    };
    if (x.vector) {
      each_piece<16>(to, [&](unsigned char* memory, int place, int there) {
        if (there >= 16)
          *reinterpret_cast<uint4*>(memory) = plane ? *reinterpret_cast<const uint4*>(plane + place) : make_uint4(0, 0, 0, 0);
        else
          for (int i = 0; i < there; i += size) element(memory + i, place + i);
      });
    } else {
      each_piece<size>(to, [&](unsigned char* memory, int place, int there) {
        if (there > 0) element(memory, place);
      });
    }
  }
};

}  // namespace cuda
}  // namespace mrf

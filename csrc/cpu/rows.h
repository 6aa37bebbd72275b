// Groups of pixels between memory and scratch. A group is two registers of floats (four of doubles); scratch holds it as rows of one
// channel each, in the accumulation type, whatever the layout and storage type of the tensor.
#pragma once

#include "../problem.h"
#include "elementary.h"

namespace mrf {
namespace MRF_ISA {

constexpr int kGroup = 2 * kLanes<float>;
static_assert(kGroup * sizeof(double) <= kRowBytes, "scratch is large enough");
template <class T> constexpr int kVectors = kGroup / kLanes<T>;

// What a thread reads next of one modality, to be prefetched while it computes: of channel c what starts at data + c * stride (bytes).
struct Ahead {
  const char* data;
  int64_t stride;
};

// One register per vector of a group. Local copies stay in registers, where a member would be loaded again after every store.
template <class T>
struct Vectors {
  V<T> lanes[kVectors<T>] = {};
  MRF_INLINE V<T>& operator[](int v) { return lanes[v]; }
  MRF_INLINE const V<T>& operator[](int v) const { return lanes[v]; }
};

// Which pixels of a group count.
template <class T>
struct Valid {
  I<T> lanes[kVectors<T>];
  int count;
};

template <class T>
MRF_INLINE Valid<T> valid_pixels(const uint8_t* mask, int pixels) {
  Valid<T> valid;
  if (mask == nullptr && pixels == kGroup) {
    for (I<T>& lanes : valid.lanes) lanes = ~I<T>{};
    valid.count = kGroup;
    return valid;
  }
  typename IntegerOf<sizeof(T)>::type lane[kGroup];
  int count = 0;
  for (int i = 0; i < kGroup; ++i) {
    const bool counts = i < pixels && (mask == nullptr || mask[i]);
    lane[i] = counts ? -1 : 0;
    count += counts;
  }
  __builtin_memcpy(valid.lanes, lane, sizeof lane);
  valid.count = count;
  return valid;
}

// Reads `pixels` (at most a group) of every channel into rows[c]. Memory: each element once.
template <class T, class Storage>
__attribute__((noinline)) void gather(const Storage* p, const View& view, int64_t channels, int pixels, T* rows) {
  constexpr int n = kLanes<T>, group = kGroup;
  if (view.pixel_stride == 1) {
    for (int64_t c = 0; c < channels; ++c, p += view.channel_stride, rows += group) {
      Storage tail[group];
      const Storage* row = p;
      if (pixels < group) {
        for (int i = 0; i < group; ++i) tail[i] = i < pixels ? p[i] : Storage{};
        row = tail;
      }
      for (int v = 0; v < kVectors<T>; ++v) store<T>(rows + v * n, Convert<T, Storage>::load(row + v * n));
    }
    return;
  }
  const int64_t last_block = channels > n ? channels - n : 0;  // early enough to be a whole one, if there are so many channels
  for (int v = 0; v < kVectors<T>; ++v) {
    const Storage* pixel = p + v * n * view.pixel_stride;
    const int here = pixels - v * n < n ? pixels - v * n : n;
    for (int64_t c = 0; c < channels; c += n) {
      if (c > last_block) c = last_block;
      const int count = c + n <= channels ? n : int(channels - c);
      const Storage* source = pixel + c;
      int64_t stride = view.pixel_stride;
      Storage edge[n * n];
      if (here < n || count < n) {
        for (int i = 0; i < n; ++i)
          for (int k = 0; k < n; ++k) edge[i * n + k] = i < here && k < count ? source[i * stride + k] : Storage{};
        source = edge, stride = n;
      }
      V<T> block[n];  // in registers: constant indices only
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) block[i] = Convert<T, Storage>::load(source + i * stride);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k)
        if (k < count) store<T>(rows + (c + k) * group + v * n, block[k]);
    }
  }
}

// Writes rows[c] to `pixels` of every channel, around the caches where the alignment allows. Memory: each element once.
template <class T, class Storage>
__attribute__((noinline)) void scatter(Storage* p, const View& view, int64_t channels, int pixels, const T* rows) {
  constexpr int n = kLanes<T>, group = kGroup;
  constexpr uintptr_t unaligned = n * sizeof(Storage) - 1;
  if (view.pixel_stride == 1) {
    const bool streams = pixels == group && !(uintptr_t(p) & unaligned) && !(view.channel_stride * sizeof(Storage) & unaligned);
    for (int64_t c = 0; c < channels; ++c, p += view.channel_stride, rows += group) {
      if (streams) {
        for (int v = 0; v < kVectors<T>; ++v) stream<T, Storage>(p + v * n, load<T>(rows + v * n));
      } else {
        Storage narrow[group];
        for (int v = 0; v < kVectors<T>; ++v) Convert<T, Storage>::store(narrow + v * n, load<T>(rows + v * n));
        __builtin_memcpy(p, narrow, pixels * sizeof(Storage));
      }
    }
    return;
  }
  const int64_t last_block = channels > n ? channels - n : 0;  // as in gather
  const bool streams = channels % n == 0 && !(uintptr_t(p) & unaligned) && !(view.pixel_stride * sizeof(Storage) & unaligned);
  for (int v = 0; v < kVectors<T>; ++v) {
    Storage* pixel = p + v * n * view.pixel_stride;
    const int here = pixels - v * n < n ? pixels - v * n : n;
    for (int64_t c = 0; c < channels; c += n) {
      if (c > last_block) c = last_block;
      const int count = c + n <= channels ? n : int(channels - c);
      V<T> block[n];  // in registers: constant indices only
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) block[k] = k < count ? load<T>(rows + (c + k) * group + v * n) : V<T>{};
      transpose<T>(block);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        if (i >= here) break;
        Storage* target = pixel + i * view.pixel_stride + c;
        if (streams) {
          stream<T, Storage>(target, block[i]);
        } else {
          Storage narrow[n];
          Convert<T, Storage>::store(narrow, block[i]);
          __builtin_memcpy(target, narrow, count * sizeof(Storage));
        }
      }
    }
  }
}

// The first element of a unit.
template <class Storage>
Storage* at(const View& view, const Unit& unit) {
  return (Storage*)view.data + unit.sample * view.sample_stride + unit.begin * view.pixel_stride;
}

// Whether every register of every line is aligned to its size.
template <class T, class Storage>
bool aligned(const Storage* p, int64_t stride) {
  constexpr uintptr_t low_bits = kLanes<T> * sizeof(Storage) - 1;
  return !(uintptr_t(p) & low_bits) && !(stride * sizeof(Storage) & low_bits);
}

// Calls f with a null pointer of the storage type; float64 is stored and computed as double, everything else computed as float.
template <class T, class F>
MRF_INLINE void with_storage(DType dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    f((double*)nullptr);
  } else {
    if (dtype == DType::float32) f((float*)nullptr);
    if (dtype == DType::bfloat16) f((bfloat16*)nullptr);
    if (dtype == DType::float16) f((float16*)nullptr);
  }
}

template <class T>
inline void gather(DType dtype, const View& view, int64_t sample, int64_t pixel, int64_t channels, int pixels, T* rows) {
  with_storage<T>(dtype, [&](auto* type) {
    gather<T>(decltype(type)(view.data) + sample * view.sample_stride + pixel * view.pixel_stride, view, channels, pixels, rows);
  });
}

template <class T>
inline void scatter(DType dtype, const View& view, int64_t sample, int64_t pixel, int64_t channels, int pixels, const T* rows) {
  with_storage<T>(dtype, [&](auto* type) {
    scatter<T>(decltype(type)(view.data) + sample * view.sample_stride + pixel * view.pixel_stride, view, channels, pixels, rows);
  });
}

}  // namespace MRF_ISA
}  // namespace mrf

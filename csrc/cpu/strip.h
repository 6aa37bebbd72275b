// Strips of pixels of several modalities, read as rows (one channel of one modality), each from end to end; and the units that they are
// cut from. Shared by the ops over modalities.
#pragma once

#include "rows.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// How many places for modalities where their number is a constant M, and where it is not (0).
template <int M> constexpr int kPlaces = M > 0 ? M : kMaxModalities;

// Calls f with the number of modalities as a constant, 0 where it is not a common one.
template <class F>
MRF_INLINE void with_count(int count, F f) {
  if (count == 2) return f(std::integral_constant<int, 2>{});
  if (count == 3) return f(std::integral_constant<int, 3>{});
  if (count == 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 0>{});
}

template <class T>
MRF_INLINE V<T> mean_of(V<T> total, int count) {  // the inverse of a power of two is exact
  return count & (count - 1) ? total / T(count) : total * (T(1) / T(count));
}

// Rows of every active modality: channel c of modality a starts at data[a] + c * stride[a]. The next strip, if it has any pixels, lies
// next[a] further on. What is ahead is as long as the strip.
template <class Storage>
struct Rows {
  Storage* data[kMaxModalities];
  int64_t stride[kMaxModalities], next[kMaxModalities] = {}, next_pixels = 0;
  Ahead ahead[kMaxModalities];
};

// A copy of rows that stays in registers.
template <class Storage, int M>
struct Cursor {
  Storage* data[kPlaces<M>];
  int64_t stride[kPlaces<M>];

  MRF_INLINE Cursor(const Rows<Storage>& rows, int count, int64_t channel) {
    for (int a = 0; a < count; ++a) data[a] = rows.data[a] + channel * rows.stride[a], stride[a] = rows.stride[a];
  }
  MRF_INLINE Storage* at(int a, int64_t channel, int64_t pixel) const { return data[a] + channel * stride[a] + pixel; }
};

// One channel of every modality of one register of pixels.
template <class T, class Storage, int M>
struct Values {
  V<T> x[kPlaces<M>], total;

  MRF_INLINE Values(const Cursor<const Storage, M>& rows, int count, int64_t channel, int64_t pixel) {
    for (int a = 0; a < count; ++a) {
      x[a] = Convert<T, Storage>::load(rows.at(a, channel, pixel));
      total = a == 0 ? x[0] : total + x[a];
    }
  }
};

// Writes K channels of every modality of one register of pixels; `streams`: around the caches.
template <class T, class Storage, int M, int K>
MRF_INLINE void store_channels(const Cursor<Storage, M>& to, int count, int64_t pixel, const V<T> (&values)[K][kPlaces<M>], bool streams) {
  for (int k = 0; k < K; ++k)
    for (int a = 0; a < count; ++a)
      if (streams)
        stream<T, Storage>(to.at(a, k, pixel), values[k][a]);
      else
        Convert<T, Storage>::store(to.at(a, k, pixel), values[k][a]);
}

// Of a logarithm: its exponential is exp2, of two modalities exp2 squared.
template <class T, int M> constexpr T kUnit = T(1.44269504088896340736) / (M == 2 ? 2 : 1);

// With x_m relative to a shift of its own, and the mean R to one of its own: log e_m in units, e_m = exp(x_m - shift_m) and
// e_R = exp(R - shift_R). Two modalities need two exponentials, not three: with h_m = exp((x_m - shift_m) / 2), e_m = h_m^2 and
// e_R = k h_0 h_1; `reference_shift` is then k = exp((shift_0 + shift_1) / 2 - shift_R).
template <class T, int M>
struct Exponentials {
  V<T> logarithm[kPlaces<M>], e[kPlaces<M>], reference;

  template <class Storage, class Sums>
  MRF_INLINE Exponentials(const Values<T, Storage, M>& values, int count, const Sums* sums, V<T> reference_shift) {
    for (int a = 0; a < count; ++a) {
      logarithm[a] = (values.x[a] - sums[a].shift) * kUnit<T, M>;  // exactly 0 at the shift
      e[a] = exp2<T>(logarithm[a]);
    }
    if (M == 2) {
      reference = e[0] * reference_shift * e[1];
      for (int a = 0; a < count; ++a) e[a] = rounded<T>(e[a] * e[a]);  // the same where the modalities are
    } else {
      reference = exp2<T>((mean_of<T>(values.total, count) - reference_shift) * kUnit<T, M>);
    }
  }
};

// What is ahead, as many registers of pixels in a step as are read, but of one modality after the other: rows of several tensors often
// lie in the same banks of the memory, where one closes the other's page.
template <class T, class Storage, int M>
class Prefetch {
 public:
  MRF_INLINE Prefetch(const Rows<const Storage>& rows, int64_t pixels) : rows_(rows), pixels_(pixels) {}

  // The next step, of `count` registers.
  MRF_INLINE void step(int count) {
    for (int a = 0; a < count; ++a) {
      ahead_[a] = {rows_.ahead[of_].data + at_ * sizeof(Storage), rows_.ahead[of_].stride};
      at_ += kLanes<T>;
      if (at_ == pixels_) at_ = 0, ++of_;
    }
  }
  MRF_INLINE void channel(int a, int64_t c) const { prefetch(ahead_[a].data + c * ahead_[a].stride); }

 private:
  const Rows<const Storage>& rows_;
  const int64_t pixels_;
  int of_ = 0;
  int64_t at_ = 0;
  Ahead ahead_[kPlaces<M>];
};

// A unit of an op over modalities: the pixels of one sample, of the modalities that it has. `next`, `later`: the two units that the
// thread takes after this one; without pixels where there is none.
template <class T, class Problem>
class ModalityUnit {
 public:
  ModalityUnit(const Problem& problem, const Unit& unit, const Unit& next, const Unit& later)
      : problem_(problem), unit_(unit), next_(next), later_(later), tiling_(problem.tilings[unit.tiling]) {
    for (int m = 0; m < problem.modalities; ++m)
      if (problem.present == nullptr || problem.present[unit.sample * problem.modalities + m]) index_[active_++] = m;
    for (int a = 0; a < active_; ++a) in_rows_ = in_rows_ && problem.features[tensor(a)].pixel_stride == 1;
  }

 protected:
  static constexpr int width = kGroup;

  int tensor(int a) const { return index_[a] * problem_.scales + unit_.tiling; }
  int64_t whole_groups() const { return unit_.begin + (unit_.end - unit_.begin) / width * width; }
  int pixels(int64_t pixel) const { return int(unit_.end - pixel < width ? unit_.end - pixel : width); }

  // The rows of the unit in memory.
  template <class Storage>
  Rows<const Storage> features() const {
    Rows<const Storage> rows;
    for (int a = 0; a < active_; ++a) {
      const View& view = problem_.features[tensor(a)];
      rows.data[a] = at<const Storage>(view, unit_), rows.stride[a] = view.channel_stride;
    }
    return rows;
  }
  // The same of the gradients; `streams`: whether they may be written around the caches.
  template <class Storage>
  Rows<Storage> gradients(bool& streams) const {
    Rows<Storage> rows;
    streams = true;
    for (int a = 0; a < active_; ++a) {
      const View& view = problem_.gradients[tensor(a)];
      rows.data[a] = at<Storage>(view, unit_), rows.stride[a] = view.channel_stride;
      streams = streams && aligned<T>(rows.data[a], rows.stride[a]);
    }
    return rows;
  }

  // Copies a group of modality a to rows of scratch; returns what is copied after it.
  Ahead gather(int a, int64_t pixel, T* rows) const {
    const View& view = problem_.features[tensor(a)];
    MRF_ISA::gather<T>(tiling_.dtype, view, unit_.sample, pixel, tiling_.channels, pixels(pixel), rows);
    Ahead ahead;
    with_storage<T>(tiling_.dtype, [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      const bool same_unit = pixel + width < unit_.end || next_.tiling != unit_.tiling;
      const Storage* here = at<const Storage>(view, unit_) + (pixel + width - unit_.begin) * view.pixel_stride;
      ahead.data = (const char*)(same_unit ? here : at<const Storage>(view, next_));
      ahead.stride = (view.pixel_stride == 1 ? view.channel_stride : width) * sizeof(Storage);
    });
    return ahead;
  }

  void scatter(int tensor, int64_t pixel, const T* rows) const {
    MRF_ISA::scatter<T>(tiling_.dtype, problem_.gradients[tensor], unit_.sample, pixel, tiling_.channels, pixels(pixel), rows);
  }

  // Zero gradients to all but the first `count` of the active modalities; `zeros`: rows of scratch.
  void clear_others(int count, T* zeros) const {
    if (count == problem_.modalities) return;
    __builtin_memset(zeros, 0, tiling_.channels * width * sizeof(T));
    for (int m = 0, a = 0; m < problem_.modalities; ++m) {
      if (a < count && index_[a] == m) {
        ++a;
        continue;
      }
      for (int64_t pixel = unit_.begin; pixel < unit_.end; pixel += width) scatter(m * problem_.scales + unit_.tiling, pixel, zeros);
    }
  }

  const Problem& problem_;
  const Unit &unit_, &next_, &later_;
  const Tiling& tiling_;
  int index_[kMaxModalities], active_ = 0;
  bool in_rows_ = true;
};

// Calls f(unit, the one that the thread takes next, the one after that) until no unit is left.
template <class Problem, class F>
MRF_INLINE void for_units(const Problem& problem, int64_t* counter, F f) {
  const auto after = [&](int64_t unit) {
    return (unit + 1) % problem.neighbours ? unit + 1 : problem.neighbours * __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
  };
  int64_t unit = after(-1), next = after(unit);
  while (unit < problem.units) {
    // Where units are few, none is taken so early that another thread may have nothing to do.
    const int64_t later = problem.neighbours > 1 ? after(next) : problem.units;
    const Unit here = locate(problem.tilings, problem.scales, unit), none = {here.tiling, here.sample, here.begin, here.begin};
    const Unit there = next < problem.units ? locate(problem.tilings, problem.scales, next) : none;
    const Unit then = later < problem.units ? locate(problem.tilings, problem.scales, later) : none;
    f(here, there, then);
    unit = next, next = problem.neighbours > 1 ? later : after(next);
  }
}

}  // namespace
}  // namespace MRF_ISA
}  // namespace mrf

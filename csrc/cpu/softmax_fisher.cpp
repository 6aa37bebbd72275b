// softmax_fisher on the CPU: per pixel, with R the mean over present modalities X_m,
//
//   q = softmax_c(R),  p_m = softmax_c(X_m + sigma_m noise),  f_m = -sum_c q_c log p_mc,  I_m = sum_c (p_mc - q_c)^2 / (f_m + eps)
//
// forward: the sum of I_m over the valid pixels and draws of a unit; backward, with d = p - q, N = sum d^2 and J the softmax Jacobian:
//
//   dI/dX_m = 2/(f+eps) J(p) d - N/(f+eps)^2 d        dI/dR = J(q) [ -2/(f+eps) d + N/(f+eps)^2 log p ]
//
// Memory: forward reads every feature once and writes one number per unit and modality; backward reads every feature once and writes every
// gradient once, around the caches. What a unit reads again it finds in L2 or L3. Noise is computed, not stored.
//
// Work: a unit is a tile of pixels of one sample at one scale, all channels and all present modalities; threads take units from a shared
// counter and each result has a place of its own, so any number of threads gives the same bits. They take a few neighbours at a time, so
// that what the processor itself prefetches past the end of a row is of use. A unit is computed as a strip (softmax_fisher_strip.h) of at
// most 256 pixels; what a strip cannot do, by groups (softmax_fisher_group.h).
#include "softmax_fisher_strip.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// The modalities that sample b has.
inline int active_modalities(const SoftmaxFisher& problem, int64_t sample, int* active) {
  int count = 0;
  for (int m = 0; m < problem.modalities; ++m)
    if (problem.present == nullptr || problem.present[sample * problem.modalities + m]) active[count++] = m;
  return count;
}

// A unit: whole groups of contiguous pixels as one strip of rows in place; all else (channels last, the last pixels, noise, and what the
// strip leaves) by groups that are copied to rows of scratch, each a strip if it can be.
template <class T, bool Backward>
class Work {
 public:
  // `next`, `later`: the two units that the thread takes after this one; without pixels where there is none. `found`: see Strip.
  Work(const SoftmaxFisher& problem, const Unit& unit, const Unit& next, const Unit& later, char* scratch, const void*& found)
      : problem_(problem),
        unit_(unit),
        next_(next),
        later_(later),
        tiling_(problem.tilings[unit.tiling]),
        active_(active_modalities(problem, unit.sample, index_)),
        modalities_((Modality<T>*)scratch),
        strip_(problem, tiling_.channels, active_, scratch += problem.modalities * kModalityBytes, found),
        group_(problem, tiling_.channels, (T*)(scratch += strip_bytes(problem.modalities))) {
    for (int a = 0; a < active_; ++a) {
      Modality<T>& s = modalities_[a];
      s.tensor = index_[a] * problem.scales + unit.tiling;
      s.sigma = problem.sigma[index_[a]];
      s.repeats = s.sigma > 0 ? 1 : T(problem.draws);  // without noise every draw is the same
      s.information = {};
      noisy_ = noisy_ || s.sigma > 0;
      in_rows_ = in_rows_ && problem.features[s.tensor].pixel_stride == 1;
      if (Backward && !tiling_.samples_as_pixels)
        for (V<T>& lanes : s.weight.lanes) lanes = broadcast(s.repeats * T(problem.weight[s.tensor * problem.batch + unit.sample]));
    }
  }

  void run() {
    int64_t valid_pixels = 0, pixel = unit_.begin;
    for (int64_t i = unit_.begin; i < unit_.end; i += width) valid_pixels += valid(i).count;
    const bool computes = valid_pixels > 0 && active_ > 0;
    if (computes && in_rows_ && !noisy_)
      with_storage<T>(tiling_.dtype, [&](auto* type) { pixel = strip_in_place<std::remove_pointer_t<decltype(type)>>(); });
    while (computes && pixel < unit_.end) pixel = copied(pixel, !noisy_);
    if constexpr (Backward)
      clear_others(computes ? active_ : 0);
    else if (!tiling_.samples_as_pixels)
      write_sums(valid_pixels);
  }

 private:
  static constexpr int width = kGroup;

  // Each of these computes pixels from some pixel on and returns the pixel after them.

  template <class Storage>
  int64_t strip_in_place() {
    const int64_t end = unit_.begin + (unit_.end - unit_.begin) / width * width;
    Rows<const Storage> from;
    Rows<Storage> to;
    bool streams = true;
    if (next_.tiling == unit_.tiling && (next_.sample == unit_.sample || !problem_.present) && next_.end - next_.begin <= end - unit_.begin)
      from.next_pixels = (next_.end - next_.begin) / width * width;
    const bool prefetches = later_.tiling == unit_.tiling && later_.begin < later_.end;
    for (int a = 0; a < active_; ++a) {
      const int tensor = modalities_[a].tensor;
      const View& features = problem_.features[tensor];
      from.data[a] = at<const Storage>(features, unit_), from.stride[a] = features.channel_stride;
      if (from.next_pixels > 0) from.next[a] = at<const Storage>(features, next_) - from.data[a];
      const int64_t next_block = from.next[a] + Strip<T, Backward>::block * from.stride[a];
      const Storage* ahead = prefetches ? at<const Storage>(features, later_) : from.data[a] + next_block;
      from.ahead[a] = {(const char*)ahead, from.stride[a] * int64_t(sizeof(Storage))};
      if (!Backward) continue;
      to.data[a] = at<Storage>(problem_.gradients[tensor], unit_), to.stride[a] = problem_.gradients[tensor].channel_stride;
      streams = streams && aligned<T>(to.data[a], to.stride[a]);
    }
    bool done[kMostPixels / width];
    strip(from, to, streams, unit_.begin, end, done);
    if (Backward) finish_streams();  // before what is not done is written again
    for (int64_t pixel = unit_.begin; pixel < end; pixel += width)
      if (!done[(pixel - unit_.begin) / width]) copied(pixel, false);
    return end;
  }

  // `strips`: whether the group may be a strip.
  int64_t copied(int64_t pixel, bool strips) {
    const Valid<T> valid = this->valid(pixel);
    Rows<const T> from;
    Rows<T> to;
    for (int a = 0; a < active_; ++a) {
      from.data[a] = group_.features(a), to.data[a] = group_.gradients(a, active_);
      from.stride[a] = to.stride[a] = width;
      const View& features = problem_.features[modalities_[a].tensor];
      gather<T>(tiling_.dtype, features, unit_.sample, pixel, tiling_.channels, pixels(pixel), group_.features(a));
      modalities_[a].ahead = from.ahead[a] = after_group(features, pixel);
    }
    bool done = false;
    if (strips) strip(from, to, false, pixel, pixel + width, &done);
    if (!done) {
      set_weights(pixel);
      group_.any_number(modalities_, active_, valid, noise_blocks(pixel));
      keep_information(pixel, valid);
    }
    for (int a = 0; Backward && a < active_; ++a) scatter(modalities_[a].tensor, pixel, to.data[a]);
    return pixel + width;
  }

  // What is copied after the group at `pixel`.
  Ahead after_group(const View& features, int64_t pixel) const {
    Ahead ahead;
    with_storage<T>(tiling_.dtype, [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      const bool same_unit = pixel + width < unit_.end || next_.tiling != unit_.tiling;
      const Storage* here = at<const Storage>(features, unit_) + (pixel + width - unit_.begin) * features.pixel_stride;
      ahead.data = (const char*)(same_unit ? here : at<const Storage>(features, next_));
      ahead.stride = (features.pixel_stride == 1 ? features.channel_stride : width) * sizeof(Storage);
    });
    return ahead;
  }

  // Pixels from `begin` to `end`, a multiple of a group; which groups are done.
  template <class Storage>
  void strip(const Rows<const Storage>& from, const Rows<Storage>& to, bool streams, int64_t begin, int64_t end, bool* done) {
    strip_.sums(from, end - begin);
    for (int64_t pixel = begin; pixel < end; pixel += width) {
      const Valid<T> valid = this->valid(pixel);
      set_weights(pixel);
      *done = strip_.statistics(pixel - begin, valid, modalities_);
      if (*done++) {
        for (int a = 0; !Backward && a < active_; ++a) modalities_[a].add_information(valid, T(problem_.eps));
        keep_information(pixel, valid);
      }
    }
    if constexpr (Backward) strip_.gradients(from, to, end - begin, streams);
  }

  void scatter(int tensor, int64_t pixel, const T* rows) {
    MRF_ISA::scatter<T>(tiling_.dtype, problem_.gradients[tensor], unit_.sample, pixel, tiling_.channels, pixels(pixel), rows);
  }

  // Samples that are computed as pixels have a weight each.
  void set_weights(int64_t pixel) {
    for (int a = 0; Backward && tiling_.samples_as_pixels && a < active_; ++a) {
      Modality<T>& s = modalities_[a];
      const double* weight = problem_.weight + s.tensor * problem_.batch + pixel;
      T lanes[width] = {};
      for (int i = 0; i < pixels(pixel); ++i) lanes[i] = s.repeats * T(weight[i]);
      __builtin_memcpy(s.weight.lanes, lanes, sizeof lanes);
    }
  }

  // Samples that are computed as pixels have a slot each.
  void keep_information(int64_t pixel, const Valid<T>& valid) {
    if (Backward || !tiling_.samples_as_pixels) return;
    for (int i = 0; i < pixels(pixel); ++i) {
      const int64_t slot = tiling_.first_slot + pixel + i;
      problem_.valid[slot] = valid.lanes[i / kLanes<T>][i % kLanes<T>] != 0;
      for (int a = 0; a < active_; ++a)
        problem_.partial[slot * problem_.modalities + index_[a]] = modalities_[a].information[i / kLanes<T>][i % kLanes<T>];
    }
    for (int a = 0; a < active_; ++a) modalities_[a].information = {};
  }

  void write_sums(int64_t valid_pixels) {
    const int64_t slot = tiling_.first_slot + unit_.sample * tiling_.tiles + unit_.begin / tiling_.tile;
    problem_.valid[slot] = valid_pixels;
    for (int a = 0; a < active_; ++a) {
      V<T> sum = modalities_[a].information[0];
      for (int v = 1; v < kVectors<T>; ++v) sum += modalities_[a].information[v];
      problem_.partial[slot * problem_.modalities + index_[a]] = sum_of_lanes<T>(sum);
    }
  }

  // Zero gradients to all but the first `count` of the active modalities.
  void clear_others(int count) {
    if (count == problem_.modalities) return;
    T* zeros = group_.noisy();
    __builtin_memset(zeros, 0, tiling_.channels * width * sizeof(T));
    for (int m = 0, a = 0; m < problem_.modalities; ++m) {
      if (a < count && index_[a] == m) {
        ++a;
        continue;
      }
      for (int64_t pixel = unit_.begin; pixel < unit_.end; pixel += width) scatter(m * problem_.scales + unit_.tiling, pixel, zeros);
    }
  }

  NoiseBlocks noise_blocks(int64_t pixel) const {
    const int64_t blocks = (tiling_.channels + 3) / 4, lane_step = tiling_.samples_as_pixels ? blocks : 1;
    return {unit_.sample * blocks * tiling_.pixels + pixel * lane_step, lane_step, tiling_.samples_as_pixels ? 1 : tiling_.pixels};
  }

  int pixels(int64_t pixel) const { return int(unit_.end - pixel < width ? unit_.end - pixel : width); }

  Valid<T> valid(int64_t pixel) const {
    return valid_pixels<T>(tiling_.mask ? tiling_.mask + unit_.sample * tiling_.pixels + pixel : nullptr, pixels(pixel));
  }

  const SoftmaxFisher& problem_;
  const Unit &unit_, &next_, &later_;
  const Tiling& tiling_;
  int index_[kMaxModalities];
  const int active_;
  Modality<T>* const modalities_;
  Strip<T, Backward> strip_;
  Group<T, Backward> group_;
  bool noisy_ = false, in_rows_ = true;
};

template <bool Backward>
void run(const SoftmaxFisher& problem, int64_t* counter, void* scratch) {
  const auto after = [&](int64_t unit) {
    return (unit + 1) % problem.neighbours ? unit + 1 : problem.neighbours * __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
  };
  const void* found = nullptr;
  int64_t unit = after(-1), next = after(unit);
  while (unit < problem.units) {
    // Where units are few, none is taken so early that another thread may have nothing to do.
    const int64_t later = problem.neighbours > 1 ? after(next) : problem.units;
    const Unit here = locate(problem.tilings, problem.scales, unit), none = {here.tiling, here.sample, here.begin, here.begin};
    const Unit there = next < problem.units ? locate(problem.tilings, problem.scales, next) : none;
    const Unit then = later < problem.units ? locate(problem.tilings, problem.scales, later) : none;
    if (problem.tilings[here.tiling].dtype == DType::float64)
      Work<double, Backward>(problem, here, there, then, (char*)scratch, found).run();
    else
      Work<float, Backward>(problem, here, there, then, (char*)scratch, found).run();
    unit = next, next = problem.neighbours > 1 ? later : after(next);
  }
  if constexpr (Backward) finish_streams();
}

}  // namespace

extern const Kernel<SoftmaxFisher> softmax_fisher_forward = run<false>, softmax_fisher_backward = run<true>;

}  // namespace MRF_ISA
}  // namespace mrf

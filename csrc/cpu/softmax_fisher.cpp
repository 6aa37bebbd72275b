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

// A unit: whole groups of contiguous pixels as one strip of rows in place; all else (channels last, the last pixels, noise, and what the
// strip leaves) by groups that are copied to rows of scratch, each a strip if it can be.
template <class T, bool Backward>
class Work : ModalityUnit<T, SoftmaxFisher> {
  using Base = ModalityUnit<T, SoftmaxFisher>;
  using Base::active_, Base::in_rows_, Base::index_, Base::later_, Base::next_, Base::pixels, Base::problem_, Base::tiling_, Base::unit_;
  using Base::width;

 public:
  // `found`: see Strip.
  Work(const SoftmaxFisher& problem, const Unit& unit, const Unit& next, const Unit& later, char* scratch, const void*& found)
      : Base(problem, unit, next, later),
        modalities_((Modality<T>*)scratch),
        strip_(problem, tiling_.channels, active_, scratch += problem.modalities * kModalityBytes, found),
        group_(problem, tiling_.channels, (T*)(scratch += strip_bytes(problem.modalities))) {
    for (int a = 0; a < active_; ++a) {
      Modality<T>& s = modalities_[a];
      s.tensor = this->tensor(a);
      s.sigma = problem.sigma[index_[a]];
      s.repeats = s.sigma > 0 ? 1 : T(problem.draws);  // without noise every draw is the same
      s.information = {};
      noisy_ = noisy_ || s.sigma > 0;
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
      this->clear_others(computes ? active_ : 0, group_.noisy());
    else if (!tiling_.samples_as_pixels)
      write_sums(valid_pixels);
  }

 private:
  // Each of these computes pixels from some pixel on and returns the pixel after them.

  template <class Storage>
  int64_t strip_in_place() {
    const int64_t end = this->whole_groups();
    Rows<const Storage> from = this->template features<Storage>();
    Rows<Storage> to;
    bool streams = false;
    if constexpr (Backward) to = this->template gradients<Storage>(streams);
    if (next_.tiling == unit_.tiling && (next_.sample == unit_.sample || !problem_.present) && next_.end - next_.begin <= end - unit_.begin)
      from.next_pixels = (next_.end - next_.begin) / width * width;
    const bool prefetches = later_.tiling == unit_.tiling && later_.begin < later_.end;
    for (int a = 0; a < active_; ++a) {
      const View& features = problem_.features[modalities_[a].tensor];
      if (from.next_pixels > 0) from.next[a] = at<const Storage>(features, next_) - from.data[a];
      const int64_t next_block = from.next[a] + Strip<T, Backward>::block * from.stride[a];
      const Storage* ahead = prefetches ? at<const Storage>(features, later_) : from.data[a] + next_block;
      from.ahead[a] = {(const char*)ahead, from.stride[a] * int64_t(sizeof(Storage))};
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
      modalities_[a].ahead = from.ahead[a] = this->gather(a, pixel, group_.features(a));
    }
    bool done = false;
    if (strips) strip(from, to, false, pixel, pixel + width, &done);
    if (!done) {
      set_weights(pixel);
      group_.any_number(modalities_, active_, valid, noise_blocks(pixel));
      keep_information(pixel, valid);
    }
    for (int a = 0; Backward && a < active_; ++a) this->scatter(modalities_[a].tensor, pixel, to.data[a]);
    return pixel + width;
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

  NoiseBlocks noise_blocks(int64_t pixel) const {
    const int64_t blocks = (tiling_.channels + 3) / 4, lane_step = tiling_.samples_as_pixels ? blocks : 1;
    return {unit_.sample * blocks * tiling_.pixels + pixel * lane_step, lane_step, tiling_.samples_as_pixels ? 1 : tiling_.pixels};
  }

  Valid<T> valid(int64_t pixel) const {
    return valid_pixels<T>(tiling_.mask ? tiling_.mask + unit_.sample * tiling_.pixels + pixel : nullptr, pixels(pixel));
  }

  Modality<T>* const modalities_;
  Strip<T, Backward> strip_;
  Group<T, Backward> group_;
  bool noisy_ = false;
};

template <bool Backward>
void run(const SoftmaxFisher& problem, int64_t* counter, void* scratch) {
  const void* found = nullptr;
  for_units(problem, counter, [&](const Unit& unit, const Unit& next, const Unit& later) {
    if (problem.tilings[unit.tiling].dtype == DType::float64)
      Work<double, Backward>(problem, unit, next, later, (char*)scratch, found).run();
    else
      Work<float, Backward>(problem, unit, next, later, (char*)scratch, found).run();
  });
  if constexpr (Backward) finish_streams();
}

}  // namespace

extern const Kernel<SoftmaxFisher> softmax_fisher_forward = run<false>, softmax_fisher_backward = run<true>;

}  // namespace MRF_ISA
}  // namespace mrf

// modality_cross_entropy on the CPU: per pixel of class y, with class weights w and label smoothing s over C classes, logits X_m of the
// present modalities and their mean R,
//
//   t_c = (1 - s) w_y [c = y] + s / C w_c,  T = sum_c t_c,  p_m = softmax_c(X_m),  q = softmax_c(R)
//   ce_m = -sum_c t_c log p_mc,  ce = -sum_c t_c log q_c,  g_m = T p_m - t,  I_m = sum_c g_mc^2 / (ce_m + eps)
//
// forward: the sums of ce_m, ce, I_m and w_y over the valid pixels of a unit; backward, with the upstream gradients u, j and v of ce_m, ce
// and I_m, F = ce_m + eps, N = sum g^2 and M present modalities:
//
//   dX_m = (u - v N / F^2) g  +  2 v T / F p (g - sum p g)  +  j / M (T q - t)
//
// Exponentials are relative to the logit of y: e_c = exp(x_c - x_y). The sums leave y out, S = sum e and Q = sum e^2 over the others, so
// that nothing cancels where y is all but certain:
//
//   log sum_c exp(x_c) - x_y = log(1 + S)        1 - p_y = S / (1 + S)        N = T^2 (S^2 + Q) / (1 + S)^2   (no smoothing)
//
// No maximum has to be found for that. Where the others are so much larger that Q overflows, or a logit is NaN or infinite, the pixels of
// that register are computed again relative to the maximum; p_y is then exp(x_y - max) / (exp(x_y - max) + S).
//
// Memory: forward reads every logit and target once and writes a few numbers per unit; backward reads them once and writes every gradient
// once, around the caches where the alignment allows. The second pass over a unit (gradients; with smoothing one more, for N) finds it in
// L2, where the strip after it is prefetched meanwhile.
//
// Work: a unit is a tile of at most 256 pixels of one sample, all classes and all present modalities; threads take units from a shared
// counter and each has a place of its own for its sums, so any number of threads gives the same bits. Pixels are lanes. A step takes 8
// channels (2 for the gradients) of every modality for one register of pixels. Channels last and the last pixels are copied by groups to
// rows of scratch first.
#include "strip.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// Of one register of pixels. Of R: what its exponentials are relative to (two modalities: 1, see strip.h), the logit of y above that, the
// sum of the others' exponentials and of w_c times the logits, beyond the mean of the modalities' own.
template <class T>
struct PixelSums {
  I<T> target, valid;
  V<T> weight;  // w_y
  V<T> total;   // T
  V<T> shift, logit;
  V<T> rest;    // S;  then (backward) j T / (M sum e_R)
  V<T> spread;
};
// Of a modality in it.
template <class T>
struct OwnSums {
  V<T> shift, logit;
  V<T> rest;     // S;  then the coefficient of e in the gradient
  V<T> square;   // Q;  then g_y - sum p g;  then the coefficient of e^2
  V<T> spread;   // sum w_c log e_c in units, with smoothing;  then the gradient at y
  V<T> cross_entropy;  // then, with smoothing, what w_c has in the gradient
  V<T> inverse;  // 1 / sum e;  then, with smoothing, what w_c e_c has
  V<T> n, pg;    // N and sum p g
};

template <class T, bool Backward>
class Work : ModalityUnit<T, ModalityCrossEntropy> {
  using Base = ModalityUnit<T, ModalityCrossEntropy>;
  using Base::active_, Base::in_rows_, Base::index_, Base::next_, Base::pixels, Base::problem_, Base::tiling_, Base::unit_, Base::width;

 public:
  Work(const ModalityCrossEntropy& problem, const Unit& unit, const Unit& next, const Unit& later, char* scratch)
      : Base(problem, unit, next, later),
        smoothing_(T(problem.label_smoothing)),
        uniform_(T(problem.label_smoothing / double(tiling_.channels))),
        registers_(scratch),
        totals_((V<T>*)(scratch += kMostPixels / n * register_bytes(problem.modalities))),
        rows_((T*)(scratch + (2 + 2 * problem.modalities) * 64)) {}

  void run() {
    const bool computes = read_targets() && active_ > 0;
    int64_t pixel = unit_.begin;
    if (computes) {
      for (int k = 0; k < 2 * problem_.modalities + 2; ++k) totals_[k] = V<T>{};
      if (in_rows_)
        with_storage<T>(tiling_.dtype, [&](auto* type) { pixel = in_place<std::remove_pointer_t<decltype(type)>>(); });
      while (pixel < unit_.end) pixel = copied(pixel);
    }
    if constexpr (Backward)
      this->clear_others(computes ? active_ : 0, rows_);
    else if (computes && !tiling_.samples_as_pixels)
      write_totals();
  }

 private:
  static constexpr int n = kLanes<T>;
  static constexpr int64_t block = 8;
  static constexpr T log2_e = T(1.44269504088896340736);

  // ---- targets ----

  template <class F>
  void with_target(F f) const {
    switch (problem_.target_type) {
      case Integer::uint8: return f((const uint8_t*)problem_.target);
      case Integer::int8: return f((const int8_t*)problem_.target);
      case Integer::int16: return f((const int16_t*)problem_.target);
      case Integer::int32: return f((const int32_t*)problem_.target);
      case Integer::int64: return f((const int64_t*)problem_.target);
    }
  }

  // The class of every pixel of the unit, whether it counts, and its weights; whether any does. Lanes past the last pixel do not.
  bool read_targets() {
    bool any = false;
    with_target([&](auto* target) {
      const int64_t first = unit_.sample * tiling_.pixels + unit_.begin, count = unit_.end - unit_.begin;
      for (int64_t i = 0; i < (count + width - 1) / width * width; i += n) {
        typename IntegerOf<sizeof(T)>::type classes[n], valid[n];
        T weights[n];
        for (int j = 0; j < n; ++j) {
          const int64_t y = i + j < count ? int64_t(target[first + i + j]) : problem_.ignore_index;
          const bool counts = y != problem_.ignore_index, known = y >= 0 && y < tiling_.channels;
          if (counts && !known && !Backward) __atomic_store_n(problem_.out_of_range, true, __ATOMIC_RELAXED);
          classes[j] = counts && known ? y : 0;
          valid[j] = counts && known ? -1 : 0;
          weights[j] = problem_.class_weight ? T(problem_.class_weight[classes[j]]) : T(1);
          any = any || (counts && known);
        }
        PixelSums<T>& r = pixel(i);
        __builtin_memcpy(&r.target, classes, sizeof classes);
        __builtin_memcpy(&r.valid, valid, sizeof valid);
        r.weight = load<T>(weights);
        r.total = (1 - smoothing_) * r.weight + uniform_ * T(problem_.all_weights);
      }
    });
    return any;
  }

  // ---- pixels from some pixel on; each returns the pixel after them ----

  template <class Storage>
  int64_t in_place() {
    const int64_t end = this->whole_groups();
    Rows<const Storage> from = this->template features<Storage>();
    Rows<Storage> to;
    bool streams = false;
    if constexpr (Backward) to = this->template gradients<Storage>(streams);
    const bool prefetches = next_.begin < next_.end;
    for (int a = 0; a < active_; ++a) {
      const Storage* next = prefetches ? at<const Storage>(problem_.features[this->tensor(a)], next_) : from.data[a];
      from.ahead[a] = {(const char*)next, from.stride[a] * int64_t(sizeof(Storage))};
    }
    compute(from, to, streams, unit_.begin, end);
    return end;
  }

  int64_t copied(int64_t pixel) {
    Rows<const T> from;
    Rows<T> to;
    for (int a = 0; a < active_; ++a) {
      T* const row = rows_ + a * tiling_.channels * width;
      from.data[a] = row, to.data[a] = row + active_ * tiling_.channels * width;
      from.stride[a] = to.stride[a] = width;
      from.ahead[a] = this->gather(a, pixel, row);
    }
    compute(from, to, false, pixel, pixel + width);
    for (int a = 0; Backward && a < active_; ++a) this->scatter(this->tensor(a), pixel, to.data[a]);
    return pixel + width;
  }

  template <class Storage>
  void compute(const Rows<const Storage>& from, const Rows<Storage>& to, bool streams, int64_t begin, int64_t end) {
    with_count(active_, [&](auto count) {
      if (smoothing_ > 0)
        this->strip<Storage, count(), true>(from, to, streams, begin - unit_.begin, end - begin);
      else
        this->strip<Storage, count(), false>(from, to, streams, begin - unit_.begin, end - begin);
    });
  }

  // `offset`: of the strip's first pixel in the unit.
  template <class Storage, int M, bool Smooth>
  void strip(const Rows<const Storage>& from, const Rows<Storage>& to, bool streams, int64_t offset, int64_t count) {
    offset_ = offset;
    find_shifts<Storage, M>(from, count);
    for (int64_t c = 0; c < tiling_.channels; c += block) add_channels<Storage, M, Smooth>(from, c, 0, count);
    bool far[kMostPixels / n], any_far = false;
    for (int64_t i = 0; i < count; i += n) {
      any_far |= far[i / n] = !normalise<M, Smooth>(i, true);
      if (!far[i / n]) continue;
      find_maxima<Storage>(from, i);
      for (int64_t c = 0; c < tiling_.channels; c += block) add_channels<Storage, 0, Smooth>(from, c, i, i + n);
      normalise<0, Smooth>(i, false);
    }
    for (int64_t i = 0; Smooth && i < count; i += n) far[i / n] ? sum_gradients<Storage, 0>(from, i) : sum_gradients<Storage, M>(from, i);
    if constexpr (Backward) {
      for (int64_t i = 0; i < count; i += n) find_coefficients<Smooth>(i);
      write<Storage, M, Smooth>(from, to, 0, count, streams);
      if (any_far) finish_streams();  // before their gradients are written again
      for (int64_t i = 0; any_far && i < count; i += n)
        if (far[i / n]) write<Storage, 0, Smooth>(from, to, i, i + n, false);
    } else {
      for (int64_t i = 0; i < count; i += n) keep_sums(i);
    }
  }

  // ---- sums ----

  // The logits of y, and empty sums.
  template <class Storage, int M>
  __attribute__((noinline)) void find_shifts(const Rows<const Storage>& rows, int64_t count) {
    for (int64_t i = 0; i < count; i += n) {
      PixelSums<T>& r = pixel(i);
      V<T> total = {};
      for (int a = 0; a < active_; ++a) {
        Storage logits[n];
        for (int j = 0; j < n; ++j) logits[j] = rows.data[a][r.target[j] * rows.stride[a] + i + j];
        OwnSums<T>& s = own(i, a);
        s.shift = Convert<T, Storage>::load(logits);
        s.logit = s.rest = s.square = s.spread = V<T>{};
        total += s.shift;
      }
      r.shift = M == 2 ? broadcast(T(1)) : mean_of<T>(total, active_);
      r.logit = r.rest = r.spread = V<T>{};
    }
  }

  // The same relative to the largest logits, for pixels far off.
  template <class Storage>
  __attribute__((noinline)) void find_maxima(const Rows<const Storage>& rows, int64_t i) {
    const Cursor<const Storage, 0> from(rows, active_, 0);
    PixelSums<T>& r = pixel(i);
    V<T> shift = {}, logit = {};
    for (int a = 0; a < active_; ++a) logit += own(i, a).shift;
    logit = mean_of<T>(logit, active_);
    for (int64_t c = 0; c < tiling_.channels; ++c) {
      const Values<T, Storage, 0> values(from, active_, c, i);
      const V<T> mean = mean_of<T>(values.total, active_);
      shift = c == 0 ? mean : maximum<T>(mean, shift);
      for (int a = 0; a < active_; ++a) {
        V<T>& top = own(i, a).rest;
        top = c == 0 ? values.x[a] : maximum<T>(values.x[a], top);
      }
    }
    V<T> total = {};
    for (int a = 0; a < active_; ++a) {
      OwnSums<T>& s = own(i, a);
      total += s.rest;
      s.logit = s.shift - s.rest, s.shift = s.rest;
      s.rest = s.square = s.spread = V<T>{};
    }
    r.shift = shift, r.logit = logit - shift, r.rest = V<T>{};
    r.spread = T(problem_.all_weights) * (mean_of<T>(total, active_) - shift);
  }

  // Adds up 8 channels of some pixels, and that to the sums: sums of sums keep digits that one over 1000 channels would lose.
  template <class Storage, int M, bool Smooth>
  __attribute__((noinline)) void add_channels(const Rows<const Storage>& rows, int64_t begin, int64_t first, int64_t last) {
    const int count = M > 0 ? M : active_;
    const int64_t end = begin + block < tiling_.channels ? begin + block : tiling_.channels;
    const Cursor<const Storage, M> from(rows, count, 0);
    Prefetch<T, Storage, M> ahead(rows, last - first);
    for (int64_t i = first; i < last; i += n) {
      PixelSums<T>& r = pixel(i);
      OwnSums<T>* sums = &own(i, 0);
      ahead.step(count);
      V<T> joint = {}, rest[kPlaces<M>], square[kPlaces<M>], spread[kPlaces<M>];
      for (int a = 0; a < count; ++a) rest[a] = square[a] = spread[a] = V<T>{};
      for (int64_t c = begin; c < end; ++c) {
        const Exponentials<T, M> at_c(Values<T, Storage, M>(from, count, c, i), count, sums, r.shift);
        const I<T> is_target = r.target == typename IntegerOf<sizeof(T)>::type(c);
        joint += select<T>(is_target, V<T>{}, at_c.reference);
        for (int a = 0; a < count; ++a) {
          ahead.channel(a, c);
          const V<T> e = select<T>(is_target, V<T>{}, at_c.e[a]);
          rest[a] += e;
          square[a] = fused<T>(e, e, square[a]);
          if constexpr (Smooth) spread[a] += class_weight(c) * at_c.logarithm[a];
        }
      }
      r.rest += joint;
      for (int a = 0; a < count; ++a) {
        sums[a].rest += rest[a], sums[a].square += square[a];
        if constexpr (Smooth) sums[a].spread += spread[a];
      }
    }
  }

  // From the sums of a register: cross entropies, N, sum p g and g_y less that. False where a valid pixel is beyond these formulas.
  template <int M, bool Smooth>
  MRF_INLINE bool normalise(int64_t i, bool relative_to_target) {
    constexpr T most = sizeof(T) == 4 ? T(1e20) : T(1e200);  // of Q, for the squares of what follows from it
    PixelSums<T>& r = pixel(i);
    I<T> near = ~I<T>{};
    V<T> spread = {};
    for (int a = 0; a < active_; ++a) {
      OwnSums<T>& s = own(i, a);
      near &= (s.square < most) & (s.shift - s.shift == T(0));
      const V<T> e = exp2<T>(s.logit * log2_e);
      if constexpr (Smooth) spread += s.spread *= 1 / kUnit<T, M>;
      s.cross_entropy = this->cross_entropy<Smooth>(r, s.rest + (e - T(1)), s.logit, s.spread);
      s.inverse = T(1) / (s.rest + e);
      const V<T> others = s.rest * s.inverse, square = s.square * s.inverse * s.inverse;
      s.n = r.total * r.total * (others * others + square);
      s.pg = r.total * (square - e * s.inverse * others);
      s.square = -r.total * (others * others + square);
    }
    near &= r.rest < most;
    if (relative_to_target && !all_lanes<T>(near | ~r.valid)) return false;
    const V<T> e = exp2<T>(r.logit * log2_e);
    r.spread = this->cross_entropy<Smooth>(r, r.rest + (e - T(1)), r.logit, r.spread + mean_of<T>(spread, active_));
    return true;
  }

  // T log sum_c e_c - sum_c t_c log e_c, from the sum of exponentials without 1.
  template <bool Smooth>
  MRF_INLINE V<T> cross_entropy(const PixelSums<T>& r, V<T> sum, V<T> logit, V<T> spread) const {
    V<T> result = r.total * log_of_1_plus<T>(sum) - (1 - smoothing_) * r.weight * logit;
    if constexpr (Smooth) result -= uniform_ * spread;
    return result;
  }

  // N, sum p g and g_y less that with smoothing: g = T p - t may be small for every class, where expanding the square would cancel.
  template <class Storage, int M>
  __attribute__((noinline)) void sum_gradients(const Rows<const Storage>& rows, int64_t i) {
    const int count = M > 0 ? M : active_;
    const Cursor<const Storage, M> from(rows, count, 0);
    const PixelSums<T>& r = pixel(i);
    OwnSums<T>* sums = &own(i, 0);
    for (int a = 0; a < count; ++a) sums[a].n = sums[a].pg = V<T>{};
    for (int64_t begin = 0; begin < tiling_.channels; begin += block) {
      const int64_t end = begin + block < tiling_.channels ? begin + block : tiling_.channels;
      V<T> square[kPlaces<M>], pg[kPlaces<M>];
      for (int a = 0; a < count; ++a) square[a] = pg[a] = V<T>{};
      for (int64_t c = begin; c < end; ++c) {
        const Exponentials<T, M> at_c(Values<T, Storage, M>(from, count, c, i), count, sums, r.shift);
        const I<T> is_target = r.target == typename IntegerOf<sizeof(T)>::type(c);
        const V<T> t = uniform_ * class_weight(c) + select<T>(is_target, (1 - smoothing_) * r.weight, V<T>{});
        for (int a = 0; a < count; ++a) {
          const V<T> p = at_c.e[a] * sums[a].inverse, g = fused<T>(r.total, p, -t);
          square[a] = fused<T>(g, g, square[a]);
          pg[a] = fused<T>(p, g, pg[a]);
          sums[a].square = select<T>(is_target, g, sums[a].square);
        }
      }
      for (int a = 0; a < count; ++a) sums[a].n += square[a], sums[a].pg += pg[a];
    }
    for (int a = 0; a < count; ++a) sums[a].square -= sums[a].pg;
  }

  // Adds the sums of a register to those of the unit, or to those of its samples where they are computed as pixels.
  void keep_sums(int64_t i) {
    const PixelSums<T>& r = pixel(i);
    const int modalities = problem_.modalities;
    for (int a = 0; a < active_; ++a) {
      const OwnSums<T>& s = own(i, a);
      keep(i, index_[a], s.cross_entropy);
      keep(i, modalities + index_[a], s.n / (s.cross_entropy + T(problem_.eps)));
    }
    keep(i, 2 * modalities, r.spread);
    keep(i, 2 * modalities + 1, r.weight);
  }

  void keep(int64_t i, int sum, V<T> x) {
    const V<T> counted = select<T>(pixel(i).valid, x, V<T>{});
    if (!tiling_.samples_as_pixels) {
      totals_[sum] += counted;
      return;
    }
    const int64_t first = unit_.begin + offset_ + i;
    for (int j = 0; j < n && first + j < unit_.end; ++j) slot(first + j)[sum] = counted[j];
  }

  void write_totals() {
    double* sums = slot(unit_.sample * tiling_.tiles + unit_.begin / tiling_.tile);
    for (int k = 0; k < 2 * problem_.modalities + 2; ++k) sums[k] = sum_of_lanes<T>(totals_[k]);
  }

  double* slot(int64_t i) { return problem_.partial + (tiling_.first_slot + i) * (2 * problem_.modalities + 2); }

  // ---- gradients ----

  // With p = e / sum e: of e, e^2, e_R / sum e_R, w_c and w_c e_c, and the gradient at y, where g_y = -sum of the others' g.
  template <bool Smooth>
  void find_coefficients(int64_t i) {
    PixelSums<T>& r = pixel(i);
    const V<T> e_r = exp2<T>(r.logit * log2_e), inverse_r = T(1) / (r.rest + e_r);
    const V<T> joint = upstream(problem_.to_joint, 0, i) / T(active_);
    const V<T> others = Smooth ? uniform_ * (T(problem_.all_weights) - r.weight) : V<T>{};  // sum of their t
    const V<T> joint_at_target = joint * (others - r.total * (r.rest * inverse_r));
    for (int a = 0; a < active_; ++a) {
      OwnSums<T>& s = own(i, a);
      const V<T> inverse = T(1) / (s.cross_entropy + T(problem_.eps)), v = upstream(problem_.to_information, index_[a], i) * inverse;
      const V<T> first = upstream(problem_.to_cross_entropy, index_[a], i) - v * (s.n * inverse);  // of g
      const V<T> second = T(2) * v * r.total;                                                      // of p (g - sum p g)
      const V<T> e = exp2<T>(s.logit * log2_e), g = others - r.total * (s.rest * s.inverse);
      s.spread = first * g + second * (e * s.inverse) * s.square + joint_at_target;
      s.rest = (first * r.total - second * s.pg) * s.inverse;
      s.square = second * r.total * s.inverse * s.inverse;
      s.cross_entropy = uniform_ * (first + joint);
      s.inverse *= uniform_ * second;
    }
    r.rest = joint * r.total * inverse_r;
  }

  // The upstream gradients of modality m; of samples that are computed as pixels each its own.
  V<T> upstream(const double* of, int m, int64_t i) const {
    of += m * problem_.batch;
    if (!tiling_.samples_as_pixels) return broadcast(T(of[unit_.sample]));
    T lanes[n] = {};
    const int64_t first = unit_.begin + offset_ + i;
    for (int j = 0; j < n && first + j < unit_.end; ++j) lanes[j] = T(of[first + j]);
    return load<T>(lanes);
  }

  template <class Storage, int M, bool Smooth>
  void write(const Rows<const Storage>& from, const Rows<Storage>& to, int64_t first, int64_t last, bool streams) {
    int64_t c = 0;
    for (; c + 2 <= tiling_.channels; c += 2) write_channels<Storage, M, Smooth, 2>(from, to, c, first, last, streams);
    if (c < tiling_.channels) write_channels<Storage, M, Smooth, 1>(from, to, c, first, last, streams);
  }

  template <class Storage, int M, bool Smooth, int K>
  __attribute__((noinline)) void write_channels(const Rows<const Storage>& rows, const Rows<Storage>& gradients, int64_t channel,
                                                int64_t first, int64_t last, bool streams) {
    const int count = M > 0 ? M : active_;
    const Cursor<const Storage, M> from(rows, count, channel);
    const Cursor<Storage, M> to(gradients, count, channel);
    for (int64_t i = first; i < last; i += n) {
      const PixelSums<T>& r = pixel(i);
      const OwnSums<T>* sums = &own(i, 0);
      V<T> result[K][kPlaces<M>];
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) {
        const Exponentials<T, M> at_c(Values<T, Storage, M>(from, count, k, i), count, sums, r.shift);
        const I<T> is_target = r.target == typename IntegerOf<sizeof(T)>::type(channel + k);
        for (int a = 0; a < count; ++a) {
          const OwnSums<T>& s = sums[a];
          V<T> x = fused<T>(at_c.e[a], fused<T>(s.square, at_c.e[a], s.rest), r.rest * at_c.reference);
          if constexpr (Smooth) x -= class_weight(channel + k) * fused<T>(s.inverse, at_c.e[a], s.cross_entropy);
          result[k][a] = select<T>(r.valid, select<T>(is_target, s.spread, x), V<T>{});
        }
      }
      store_channels<T>(to, count, i, result, streams);
    }
  }

  MRF_INLINE T class_weight(int64_t c) const { return problem_.class_weight ? T(problem_.class_weight[c]) : T(1); }

  // ---- registers of pixels, counted from the first of the strip ----

  static constexpr int64_t register_bytes(int modalities) { return sizeof(PixelSums<T>) + modalities * sizeof(OwnSums<T>); }
  MRF_INLINE char* memory(int64_t i) { return registers_ + (offset_ + i) / n * register_bytes(active_); }
  MRF_INLINE PixelSums<T>& pixel(int64_t i) { return *(PixelSums<T>*)memory(i); }
  MRF_INLINE OwnSums<T>& own(int64_t i, int a) { return ((OwnSums<T>*)(memory(i) + sizeof(PixelSums<T>)))[a]; }
  MRF_INLINE const PixelSums<T>& pixel(int64_t i) const { return const_cast<Work*>(this)->pixel(i); }

  const T smoothing_, uniform_;  // s, s / C
  int64_t offset_ = 0;           // of the strip in the unit
  char* const registers_;
  V<T>* const totals_;
  T* const rows_;
};

template <bool Backward>
void run(const ModalityCrossEntropy& problem, int64_t* counter, void* scratch) {
  for_units(problem, counter, [&](const Unit& unit, const Unit& next, const Unit& later) {
    if (problem.tilings[0].dtype == DType::float64)
      Work<double, Backward>(problem, unit, next, later, (char*)scratch).run();
    else
      Work<float, Backward>(problem, unit, next, later, (char*)scratch).run();
  });
  if constexpr (Backward) finish_streams();
}

}  // namespace

extern const Kernel<ModalityCrossEntropy> modality_cross_entropy_forward = run<false>, modality_cross_entropy_backward = run<true>;

}  // namespace MRF_ISA
}  // namespace mrf

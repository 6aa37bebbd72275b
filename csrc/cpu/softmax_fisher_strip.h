// softmax_fisher without noise, over a strip of pixels read as rows (one channel of one modality), each from end to end.
//
// Per pixel, with every exponential relative to its own maximum over the channels, and R the mean of the modalities,
//
//   e_m = exp(x_m - max x_m),  e_R = exp(R - max R),  g = e_m - e_R
//   S = sum e_R,  Q = sum e_R^2,  G = sum g,  A = sum g^2,  B = sum g e_R,  D = sum e_R log e_m
//
// With r = sum e_m / S - 1 = G / S, which is as exact as the differences g are, p_m - q = (g - r e_R) / (S + G), and so
//
//   N = sum (p_m - q)^2 = (A - 2 r B + r^2 Q) / (S + G)^2        f = log(S + G) - D / S
//   sum p_m (p_m - q)   = (A + B - r (B + Q)) / (S + G)^2
//
// Nearly equal modalities have nearly equal maxima, so g is small where p_m - q is, and little cancels; statistics() finds the pixels
// where much does, and leaves them to Group. Two modalities need two exponentials, not three (strip.h).
//
// Memory: one pass over the rows takes the sums, one writes the gradients, around the caches where the alignment allows. Three strips are
// on the way at once: while the sums of one are taken, the maxima of the next are found, and the one after that is prefetched. So reading
// hides behind arithmetic, and nothing waits for memory but the first strip. Narrow ones lie in L2, all three.
//
// Work: pixels are lanes. A step takes 8 channels (2 for the gradients) of every modality for one register of pixels.
#pragma once

#include "softmax_fisher_group.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// Of one register of pixels. Sums first; statistics() turns them into what gradients() needs.
template <class T>
struct ReferenceSums {
  V<T> shift;   // max R;  of two modalities k
  V<T> sum;     // S
  V<T> square;  // Q;  then the part of the bracket of dI/dR that is the same for every channel, / (M S)
  I<T> valid;
};
template <class T>
struct ModalitySums {
  V<T> shift;     // max x_m
  V<T> gap;       // G;  then r
  V<T> distance;  // D in units;  then b / (S + G)
  V<T> square;    // A;  then a / (S + G)^2
  V<T> cross;     // B;  then a / (S + G) sum_c p d
  V<T> pull_d;    // a / (S + G) / (M S)
  V<T> pull_p;    // b / (M S) per unit
};

template <class T, bool Backward>
class Strip {
 public:
  static constexpr int64_t block = 8;  // channels of a step over the sums

  // `memory`: strip_bytes(); `found`: where the rows start whose maxima are there, null at first.
  Strip(const SoftmaxFisher& problem, int64_t channels, int active, char* memory, const void*& found)
      : problem_(problem), channels_(channels), active_(active), memory_(memory), found_(found) {}

  // Takes the sums of `pixels`, a multiple of a group, and finds the maxima of the next strip.
  template <class Storage>
  void sums(const Rows<const Storage>& rows, int64_t pixels) {
    with_count(active_, [&](auto count) {
      if (found_ != rows.data[0]) find_maxima<Storage, count()>(rows, pixels);
      start<count()>(pixels);
      for (int64_t c = 0; c < channels_; c += block) add_channels<Storage, count()>(rows, c, smaller(c + block, channels_), pixels);
    });
    found_ = rows.next_pixels > 0 ? rows.data[0] + rows.next[0] : nullptr;
  }

  // From the sums of the group that starts at `pixel`: n and cross_entropy of every modality, and the coefficients of gradients(). False
  // where a valid pixel is beyond these formulas.
  bool statistics(int64_t pixel, const Valid<T>& valid, Modality<T>* modalities) {
    const T nats = 1 / (active_ == 2 ? kUnit<T, 2> : kUnit<T, 0>);
    bool exact = true;
    for (int v = 0; v < kVectors<T>; ++v) {
      ReferenceSums<T>& r = reference(pixel + v * n);
      const V<T> share = T(1) / r.sum, pull = share / T(active_);
      V<T> offset = {};
      I<T> fine = r.sum >= T(0.5);  // false for NaN, like the comparisons below; less than 1 where e_R underflows at its maximum
      for (int a = 0; a < active_; ++a) {
        ModalitySums<T>& s = modality(pixel + v * n, a);
        Modality<T>& result = modalities[a];
        const V<T> sum = r.sum + s.gap, inverse = T(1) / sum, excess = s.gap * share, log_sum = log<T>(sum);
        const V<T> n_sum = s.square - excess * (T(2) * s.cross - excess * r.square);
        fine &= (s.square <= T(32) * n_sum) & (r.sum <= T(16) * sum);
        result.n[v] = n_sum * inverse * inverse;
        result.cross_entropy[v] = log_sum - s.distance * share * nats;
        if constexpr (Backward) {
          const V<T> pd = (s.square + s.cross - excess * (s.cross + r.square)) * inverse * inverse;
          V<T> slope_d, slope_p;
          result.coefficients(v, T(problem_.eps), slope_d, slope_p);
          offset += slope_d * (pd - result.n[v]) + slope_p * (result.cross_entropy[v] - log_sum);
          slope_d *= inverse;
          // Nothing passes the reference that is detached, not 0 times an infinite slope either.
          const V<T> pull_d = problem_.detach_reference ? V<T>{} : slope_d * pull;
          const V<T> pull_p = problem_.detach_reference ? V<T>{} : slope_p * pull * nats;
          s = {s.shift, excess, slope_p * inverse, slope_d * inverse, slope_d * pd, pull_d, pull_p};
        }
      }
      if constexpr (Backward) {
        r.square = problem_.detach_reference ? V<T>{} : offset * pull;
        r.valid = valid.lanes[v];
      }
      exact = exact && all_lanes<T>(~valid.lanes[v] | fine);
    }
    return exact;
  }

  // Writes the gradients of `pixels`, a multiple of a group, after statistics() of them all. `streams`: around the caches, rows aligned.
  template <class Storage>
  void gradients(const Rows<const Storage>& rows, const Rows<Storage>& gradients, int64_t pixels, bool streams) {
    with_count(active_, [&](auto count) {
      int64_t c = 0;
      for (; c + 2 <= channels_; c += 2) this->write_channels<Storage, count(), 2>(rows, gradients, c, pixels, streams);
      if (c < channels_) this->write_channels<Storage, count(), 1>(rows, gradients, c, pixels, streams);
    });
  }

 private:
  static constexpr int n = kLanes<T>;
  template <int M> MRF_INLINE int count() const { return M > 0 ? M : active_; }
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  template <class Storage, int M> using Values = MRF_ISA::Values<T, Storage, M>;
  template <int M> using Exponentials = MRF_ISA::Exponentials<T, M>;

  // The largest values so far, none where `begin` is 0: of every modality, then of the sum of all.
  template <int M>
  struct Maxima {
    V<T> top[kPlaces<M> + 1];

    MRF_INLINE Maxima(const V<T>* found, int count, int64_t begin) {
      for (int a = 0; a <= count; ++a) top[a] = begin == 0 ? broadcast(-T(__builtin_inf())) : found[a];
    }
    template <class Storage>
    MRF_INLINE void raise(const Values<Storage, M>& values, int count) {
      for (int a = 0; a < count; ++a) top[a] = maximum<T>(values.x[a], top[a]);
      top[count] = maximum<T>(values.total, top[count]);
    }
    MRF_INLINE void keep(V<T>* found, int count) const {
      for (int a = 0; a <= count; ++a) found[a] = top[a];
    }
  };

  // Finds the maxima of a strip that has none before it.
  template <class Storage, int M>
  __attribute__((noinline)) void find_maxima(const Rows<const Storage>& rows, int64_t pixels) {
    const int count = this->count<M>();
    const Cursor<const Storage, M> from(rows, count, 0);
    for (int64_t i = 0; i < pixels; i += n) {
      Maxima<M> maxima(this->maxima(i), count, 0);
      for (int64_t c = 0; c < channels_; ++c) maxima.raise(Values<Storage, M>(from, count, c, i), count);
      maxima.keep(this->maxima(i), count);
    }
  }

  // Empty sums, from the maxima.
  template <int M>
  void start(int64_t pixels) {
    const int count = this->count<M>();
    for (int64_t i = 0; i < pixels; i += n) {
      const V<T>* top = maxima(i);
      ReferenceSums<T>& r = reference(i);
      if constexpr (M == 2)
        r.shift = exp2<T>((top[0] + top[1] - top[2]) * kUnit<T, M>);
      else
        r.shift = mean_of<T>(top[count], count);
      r.sum = r.square = V<T>{};
      for (int a = 0; a < count; ++a) {
        ModalitySums<T>& s = modality(i, a);
        s.shift = top[a];
        s.gap = s.distance = s.square = s.cross = V<T>{};
      }
    }
  }

  // Adds up the channels from `begin` to `end`, and that to the sums: sums of sums keep digits that one over 1000 channels would lose.
  template <class Storage, int M>
  __attribute__((noinline)) void add_channels(const Rows<const Storage>& rows, int64_t begin, int64_t end, int64_t pixels) {
    const int count = this->count<M>();
    const Cursor<const Storage, M> from(rows, count, 0);
    Cursor<const Storage, M> next(rows, count, 0);
    for (int a = 0; a < count; ++a) next.data[a] += rows.next[a];
    Prefetch<T, Storage, M> ahead(rows, pixels);
    for (int64_t i = 0; i < pixels; i += n) {
      ReferenceSums<T>& r = reference(i);
      ModalitySums<T>* sums = &modality(i, 0);
      ahead.step(count);
      const bool follows = i < rows.next_pixels;
      Maxima<M> maxima(this->maxima(i), count, begin);
      V<T> sum = {}, square = {}, gap[kPlaces<M>], distance[kPlaces<M>], squares[kPlaces<M>], cross[kPlaces<M>];
      for (int a = 0; a < count; ++a) gap[a] = distance[a] = squares[a] = cross[a] = V<T>{};
      for (int64_t c = begin; c < end; ++c) {
        const Exponentials<M> at_c(Values<Storage, M>(from, count, c, i), count, sums, r.shift);
        sum += at_c.reference;
        square = fused<T>(at_c.reference, at_c.reference, square);
        for (int a = 0; a < count; ++a) {
          ahead.channel(a, c);
          const V<T> g = at_c.e[a] - at_c.reference;
          gap[a] += g;
          distance[a] = fused<T>(at_c.reference, at_c.logarithm[a], distance[a]);
          squares[a] = fused<T>(g, g, squares[a]);
          cross[a] = fused<T>(g, at_c.reference, cross[a]);
        }
        if (follows) maxima.raise(Values<Storage, M>(next, count, c, i), count);
      }
      r.sum += sum, r.square += square;
      for (int a = 0; a < count; ++a)
        sums[a].gap += gap[a], sums[a].distance += distance[a], sums[a].square += squares[a], sums[a].cross += cross[a];
      if (follows) maxima.keep(this->maxima(i), count);
    }
  }

  // dI/dX_m + dI/dR / M at K channels of every modality:
  //   a p (d - sum p d) - b d  +  q / M (sum_m b_m log p_m - a_m d_m + constant),   p = e_m / (S + G),  d = (g - r e_R) / (S + G)
  template <class Storage, int M, int K>
  __attribute__((noinline)) void write_channels(const Rows<const Storage>& rows, const Rows<Storage>& gradients, int64_t channel,
                                                int64_t pixels, bool streams) {
    const int count = this->count<M>();
    const Cursor<const Storage, M> from(rows, count, channel);
    const Cursor<Storage, M> to(gradients, count, channel);
    for (int64_t i = 0; i < pixels; i += n) {
      const ReferenceSums<T>& r = reference(i);
      const ModalitySums<T>* sums = &modality(i, 0);
      V<T> result[K][kPlaces<M>];
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) {
        const Exponentials<M> at_c(Values<Storage, M>(from, count, k, i), count, sums, r.shift);
        V<T> bracket = r.square;
        for (int a = 0; a < count; ++a) {
          const ModalitySums<T>& s = sums[a];
          const V<T> g = at_c.e[a] - at_c.reference, numerator = fused<T>(-s.gap, at_c.reference, g);
          result[k][a] = fused<T>(at_c.e[a], fused<T>(s.square, numerator, -s.cross), -s.distance * numerator);
          bracket = fused<T>(s.pull_p, at_c.logarithm[a], fused<T>(-s.pull_d, numerator, bracket));
        }
        for (int a = 0; a < count; ++a) result[k][a] = select<T>(r.valid, fused<T>(bracket, at_c.reference, result[k][a]), V<T>{});
      }
      store_channels<T>(to, count, i, result, streams);
    }
  }

  MRF_INLINE ReferenceSums<T>& reference(int64_t i) { return *(ReferenceSums<T>*)(memory_ + i / n * register_bytes()); }
  MRF_INLINE ModalitySums<T>& modality(int64_t i, int a) {
    return ((ModalitySums<T>*)(memory_ + i / n * register_bytes() + sizeof(ReferenceSums<T>)))[a];
  }
  MRF_INLINE V<T>* maxima(int64_t i) { return (V<T>*)&modality(i, active_); }
  MRF_INLINE int64_t register_bytes() const {
    return sizeof(ReferenceSums<T>) + active_ * sizeof(ModalitySums<T>) + (active_ + 1) * sizeof(V<T>);
  }

  const SoftmaxFisher& problem_;
  const int64_t channels_;
  const int active_;
  char* const memory_;
  const void*& found_;
};

}  // namespace
}  // namespace MRF_ISA
}  // namespace mrf

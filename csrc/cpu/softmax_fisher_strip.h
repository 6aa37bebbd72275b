// softmax_fisher without noise, over a strip of pixels read as rows (one channel of one modality), each once and from end to end.
//
// One pass over the rows takes every sum that the information needs. Per pixel and with all exponentials relative to the values at one
// channel c*, where the mean R of the modalities is largest up to a few powers of two,
//
//   e_m = exp(x_m - x_m[c*]),  e_R = exp(R - R[c*]),  g = e_m - e_R
//   S = sum e_R,  Q = sum e_R^2,  G = sum g,  A = sum g^2,  B = sum g e_R,  D = sum e_R (x_m - x_m[c*])
//
// With r = sum e_m / S - 1 = G / S, which is as exact as the differences g are, p_m - q = (g - r e_R) / (S + G), and so
//
//   N = sum (p_m - q)^2 = (A - 2 r B + r^2 Q) / (S + G)^2        f = log(S + G) - D / S
//   sum p_m (p_m - q)   = (A + B - r (B + Q)) / (S + G)^2
//
// One c* for all modalities keeps g small where they are nearly equal, and exactly 0 at the top channel where they agree confidently, so
// the differences above cancel little; statistics() finds the pixels where they cancel much, or where e_m overflows, and leaves them to
// Group. c* is found on the way: where R exceeds R[c*] by more than a factor 2^2 in e_R, c* moves and the sums are rescaled. Two
// modalities need two exponentials, not three: with h_m = exp((x_m - x_m[c*]) / 2), e_m = h_m^2 and e_R = h_0 h_1.
//
// Memory: sums() reads each row once, gradients() reads it once more and writes the row of the gradient once, around the caches where the
// alignment allows. The sums of a strip (5 per modality and 3, a register for each register of pixels) stay in L1.
//
// Work: pixels are lanes. A step takes 4 channels (2 for the gradients) of every modality for one register (group) of pixels, so that the
// sums are loaded and stored once for all of them. The rows of the next step are prefetched meanwhile, because the hardware prefetches no
// further than to the end of a page (past the last row the prefetch is of no use, and of no harm).
#pragma once

#include "softmax_fisher_group.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// Rows of every active modality: channel c of modality a starts at data[a] + c * stride[a].
template <class Storage>
struct Rows {
  Storage* data[kMaxModalities];
  int64_t stride[kMaxModalities];
};

// Of one register of pixels. Sums first; statistics() turns them into what gradients() needs.
template <class T>
struct ReferenceSums {
  V<T> shift;        // M R[c*]
  V<T> sum = {};     // S;  then 1 / (S M), or 0 where the reference is detached
  V<T> square = {};  // Q;  then the part of the bracket of dI/dR that is the same for every channel
  I<T> valid = {};
};
template <class T>
struct ModalitySums {
  V<T> shift;          // x_m[c*]
  V<T> gap = {};       // G;  then r
  V<T> distance = {};  // D;  then b
  V<T> square = {};    // A;  then a / (S + G)
  V<T> cross = {};     // B;  then sum_c p d
  V<T> inverse = {};   // 1 / (S + G)
};

template <class T, bool Backward>
class Strip {
 public:
  static constexpr int n = kLanes<T>;
  static constexpr T log2_e = T(1.44269504088896340736), margin = 2 / log2_e;  // of R over R[c*], before c* moves

  // `memory`: softmax_fisher_strip_bytes().
  Strip(const SoftmaxFisher& problem, int64_t channels, int active, char* memory)
      : problem_(problem), channels_(channels), active_(active), memory_(memory) {}

  // Takes the sums of `pixels`, a multiple of a group.
  template <class Storage>
  void sums(const Rows<const Storage>& rows, int64_t pixels) {
    with_count([&](auto count) { sums<Storage, count()>(rows, pixels); });
  }

  // From the sums of the group that starts at `pixel`: n and cross_entropy of every modality, and the coefficients of gradients(). False
  // where a valid pixel is beyond these formulas.
  bool statistics(int64_t pixel, const Valid<T>& valid, Modality<T>* modalities) {
    bool exact = true;
    for (int v = 0; v < kVectors<T>; ++v) {
      ReferenceSums<T>& r = reference(pixel + v * n);
      const V<T> share = T(1) / r.sum;
      V<T> offset = {};
      I<T> fine = ~I<T>{};
      for (int a = 0; a < active_; ++a) {
        ModalitySums<T>& s = modality(pixel + v * n, a);
        Modality<T>& result = modalities[a];
        const V<T> sum = r.sum + s.gap, inverse = T(1) / sum, excess = s.gap * share, log_sum = log<T>(sum);
        const V<T> n_sum = s.square - excess * (T(2) * s.cross - excess * r.square);
        fine &= (s.square <= T(32) * n_sum) & (s.square < T(0x1p80)) & (sum < T(0x1p40)) & (r.sum < T(0x1p40));  // false for NaN
        result.n[v] = n_sum * inverse * inverse;
        result.cross_entropy[v] = log_sum - s.distance * share;
        if constexpr (Backward) {
          const V<T> pd = (s.square + s.cross - excess * (s.cross + r.square)) * inverse * inverse;
          V<T> slope_d, slope_p;
          result.coefficients(v, T(problem_.eps), slope_d, slope_p);
          offset += slope_d * (pd - result.n[v]) + slope_p * (result.cross_entropy[v] - log_sum);
          s = ModalitySums<T>{s.shift, excess, slope_p, slope_d * inverse, pd, inverse};
        }
      }
      if constexpr (Backward) {
        r.sum = problem_.detach_reference ? V<T>{} : share / T(active_);
        r.square = offset;
        r.valid = valid.lanes[v];
      }
      exact = exact && all_lanes<T>(~valid.lanes[v] | fine);
    }
    return exact;
  }

  // Writes the gradients of `pixels`, a multiple of a group, after statistics() of them all. `streams`: around the caches, rows aligned.
  template <class Storage>
  void gradients(const Rows<const Storage>& rows, const Rows<Storage>& gradients, int64_t pixels, bool streams) {
    with_count([&](auto count) { this->gradients<Storage, count()>(rows, gradients, pixels, streams); });
  }

 private:
  // Calls f with the number of modalities as a constant, 0 where it is not a common one.
  template <class F>
  MRF_INLINE void with_count(F f) {
    if (active_ == 2) return f(std::integral_constant<int, 2>{});
    if (active_ == 3) return f(std::integral_constant<int, 3>{});
    if (active_ == 4) return f(std::integral_constant<int, 4>{});
    f(std::integral_constant<int, 0>{});
  }

  template <class Storage, int M>
  void sums(const Rows<const Storage>& rows, int64_t pixels) {
    const int64_t whole = channels_ / 4 * 4;
    if (whole > 0)
      start(Block<Storage, M, 4>(rows, active_, 0), pixels);
    else
      start(Block<Storage, M, 1>(rows, active_, 0), pixels);
    add_channels<Storage, M, 4>(rows, 0, whole, pixels);
    if (whole < channels_) add_channels<Storage, M, 1>(rows, whole, channels_, pixels);
  }

  template <class Storage, int M>
  void gradients(const Rows<const Storage>& rows, const Rows<Storage>& gradients, int64_t pixels, bool streams) {
    const int64_t whole = channels_ / 2 * 2;
    write_channels<Storage, M, 2>(rows, gradients, 0, whole, pixels, streams);
    if (whole < channels_) write_channels<Storage, M, 1>(rows, gradients, whole, channels_, pixels, streams);
  }

  // K channels of every modality of one register of pixels after the other.
  template <class Storage, int M, int K>
  struct Block {
    static constexpr int most = M > 0 ? M : kMaxModalities;
    const Storage* x[most];
    int64_t stride[most];
    int count;

    Block(const Rows<const Storage>& rows, int active, int64_t channel) : count(M > 0 ? M : active) {
      for (int a = 0; a < (M > 0 ? M : count); ++a) x[a] = rows.data[a] + channel * rows.stride[a], stride[a] = rows.stride[a];
    }
    MRF_INLINE void next() {
      for (int a = 0; a < (M > 0 ? M : count); ++a) x[a] += n;
    }
    MRF_INLINE V<T> load(int a, int k) const { return Convert<T, Storage>::load(x[a] + k * stride[a]); }
    MRF_INLINE void prefetch_next_rows(int a, int k) const { prefetch(x[a] + (K + k) * stride[a]); }
    // The sum of the modalities.
    MRF_INLINE void totals(V<T> (&total)[K]) const {
      for (int k = 0; k < K; ++k) {
        total[k] = load(0, k);
        for (int a = 1; a < (M > 0 ? M : count); ++a) total[k] += load(a, k);
      }
    }
  };

  // c* is the channel with the largest R of the block, and the sums are empty.
  template <class Storage, int M, int K>
  void start(Block<Storage, M, K> block, int64_t pixels) {
    for (int64_t i = 0; i < pixels; i += n, block.next()) {
      V<T> total[K];
      block.totals(total);
      V<T> top = total[0];
      for (int k = 1; k < K; ++k) top = maximum<T>(total[k], top);
      reference(i) = ReferenceSums<T>{top};
      for (int a = 0; a < block.count; ++a) {
        V<T> shift = block.load(a, 0);
        for (int k = 1; k < K; ++k) shift = select<T>(total[k] == top, block.load(a, k), shift);
        modality(i, a) = ModalitySums<T>{shift};
      }
    }
  }

  // e_R of K channels from the sums of their modalities; of two modalities by way of x_m - x_m[c*] and h_m, which it leaves.
  template <class Storage, int M, int K>
  static MRF_INLINE void exponentials(const Block<Storage, M, K>& block, const V<T> (&total)[K], const ReferenceSums<T>& r,
                                      const ModalitySums<T>* sums, V<T> (&shifted)[2][K], V<T> (&h)[2][K], V<T> (&e_r)[K]) {
    if constexpr (M == 2) {
      for (int k = 0; k < K; ++k) {
        for (int a = 0; a < 2; ++a) {
          shifted[a][k] = block.load(a, k) - sums[a].shift;
          h[a][k] = exp2<T>(shifted[a][k] * (log2_e / 2));
        }
        e_r[k] = h[0][k] * h[1][k];
      }
    } else {
      const V<T> shift = mean_of<T>(r.shift, block.count);
      for (int k = 0; k < K; ++k) e_r[k] = exp2<T>((mean_of<T>(total[k], block.count) - shift) * log2_e);
    }
  }

  // Adds channels to the sums, K at a time.
  template <class Storage, int M, int K>
  __attribute__((noinline)) void add_channels(const Rows<const Storage>& rows, int64_t begin, int64_t end, int64_t pixels) {
    for (int64_t channel = begin; channel < end; channel += K)
      add_block<Storage, M, K>(Block<Storage, M, K>(rows, active_, channel), pixels);
  }

  template <class Storage, int M, int K>
  MRF_INLINE void add_block(Block<Storage, M, K> block, int64_t pixels) {
    const int count = M > 0 ? M : block.count;
    for (int64_t i = 0; i < pixels; i += n, block.next()) {
      ReferenceSums<T>& r = reference(i);
      ModalitySums<T>* sums = &modality(i, 0);
      V<T> total[K], shifted[2][K], h[2][K], e_r[K];
      block.totals(total);
      V<T> top = total[0];
      for (int k = 1; k < K; ++k) top = maximum<T>(total[k], top);
      if (__builtin_expect(any_greater<T>(top, r.shift + margin * count), false)) move_shift(block, r, sums);
      exponentials(block, total, r, sums, shifted, h, e_r);
      for (int k = 0; k < K; ++k) {
        r.sum += e_r[k];
        r.square = fused<T>(e_r[k], e_r[k], r.square);
      }
      for (int a = 0; a < count; ++a) {
        ModalitySums<T>& s = sums[a];
        V<T> gap = s.gap, distance = s.distance, square = s.square, cross = s.cross;
        for (int k = 0; k < K; ++k) {
          block.prefetch_next_rows(a, k);
          const V<T> x = M == 2 ? shifted[a][k] : block.load(a, k) - s.shift;
          const V<T> g = M == 2 ? h[a][k] * (h[a][k] - h[1 - a][k]) : exp2<T>(x * log2_e) - e_r[k];
          gap += g;
          distance = fused<T>(e_r[k], x, distance);
          square = fused<T>(g, g, square);
          cross = fused<T>(g, e_r[k], cross);
        }
        s.gap = gap, s.distance = distance, s.square = square, s.cross = cross;
      }
    }
  }

  // Moves c* of the lanes where R is largest among these K channels and exceeds R[c*] by the margin, and rescales their sums: with the
  // factors u of e_m and w of e_R, g becomes u g + (u - w) e_R.
  template <class Storage, int M, int K>
  __attribute__((noinline)) static void move_shift(const Block<Storage, M, K>& block, ReferenceSums<T>& r, ModalitySums<T>* sums) {
    const int count = M > 0 ? M : block.count;
    V<T> total[K], u[Block<Storage, M, K>::most], change[Block<Storage, M, K>::most], w = broadcast(T(1));
    block.totals(total);
    V<T> top = total[0];
    for (int k = 1; k < K; ++k) top = maximum<T>(total[k], top);
    const I<T> moves = top > r.shift + margin * count;
    for (int a = 0; a < count; ++a) {
      V<T> shift = sums[a].shift;
      for (int k = 0; k < K; ++k) shift = select<T>(moves & (total[k] == top), block.load(a, k), shift);
      change[a] = sums[a].shift - shift;
      sums[a].shift = shift;
      const V<T> root = exp2<T>(change[a] * (log2_e / 2));
      u[a] = root * root;
      w *= root;
    }
    const V<T> shift = select<T>(moves, top, r.shift);
    if (M != 2) w = exp2<T>((mean_of<T>(r.shift, count) - mean_of<T>(shift, count)) * log2_e);
    for (int a = 0; a < count; ++a) {
      ModalitySums<T>& s = sums[a];
      const V<T> step = u[a] - w;
      s.distance = w * (s.distance + change[a] * r.sum);
      s.square = u[a] * u[a] * s.square + step * (T(2) * u[a] * s.cross + step * r.square);
      s.cross = w * (u[a] * s.cross + step * r.square);
      s.gap = u[a] * s.gap + step * r.sum;
    }
    r.shift = shift;
    r.sum *= w;
    r.square *= w * w;
  }

  // dI/dX_m + dI/dR / M at K channels of every modality:
  //   a p (d - sum p d) - b d  +  q / M (sum_m b_m log p_m - a_m d_m + constant),   p = e_m / (S + G),  d = (g - r e_R) / (S + G)
  template <class Storage, int M, int K>
  __attribute__((noinline)) void write_channels(const Rows<const Storage>& rows, const Rows<Storage>& gradients, int64_t begin, int64_t end,
                                                int64_t pixels, bool streams) {
    for (int64_t channel = begin; channel < end; channel += K)
      write_block<Storage, M, K>(Block<Storage, M, K>(rows, active_, channel), gradients, channel, pixels, streams);
  }

  template <class Storage, int M, int K>
  MRF_INLINE void write_block(Block<Storage, M, K> block, const Rows<Storage>& gradients, int64_t channel, int64_t pixels, bool streams) {
    const int count = M > 0 ? M : block.count;
    Storage* to[Block<Storage, M, K>::most];
    V<T> own[Block<Storage, M, K>::most][K];
    for (int a = 0; a < count; ++a) to[a] = gradients.data[a] + channel * gradients.stride[a];
    for (int64_t i = 0; i < pixels; i += n, block.next()) {
      const ReferenceSums<T>& r = reference(i);
      const ModalitySums<T>* sums = &modality(i, 0);
      V<T> total[K], shifted[2][K], h[2][K], e_r[K], bracket[K];
      block.totals(total);
      exponentials(block, total, r, sums, shifted, h, e_r);
      for (int k = 0; k < K; ++k) bracket[k] = r.square;
      for (int a = 0; a < count; ++a) {
        const ModalitySums<T>& s = sums[a];
        for (int k = 0; k < K; ++k) {
          const V<T> x = M == 2 ? shifted[a][k] : block.load(a, k) - s.shift;
          const V<T> e = M == 2 ? h[a][k] * h[a][k] : exp2<T>(x * log2_e);
          const V<T> g = M == 2 ? h[a][k] * (h[a][k] - h[1 - a][k]) : e - e_r[k];
          const V<T> numerator = g - s.gap * e_r[k], d = numerator * s.inverse;
          own[a][k] = s.square * e * (d - s.cross) - s.distance * d;
          bracket[k] += s.distance * x - s.square * numerator;
        }
      }
      for (int k = 0; k < K; ++k) bracket[k] *= e_r[k] * r.sum;
      for (int a = 0; a < count; to[a++] += n)
        for (int k = 0; k < K; ++k) {
          const V<T> result = select<T>(r.valid, own[a][k] + bracket[k], V<T>{});
          Storage* row = to[a] + k * gradients.stride[a];
          if (streams)
            stream<T, Storage>(row, result);
          else
            Convert<T, Storage>::store(row, result);
        }
    }
  }

  MRF_INLINE ReferenceSums<T>& reference(int64_t i) { return *(ReferenceSums<T>*)(memory_ + i / n * register_bytes()); }
  MRF_INLINE ModalitySums<T>& modality(int64_t i, int a) {
    return ((ModalitySums<T>*)(memory_ + i / n * register_bytes() + sizeof(ReferenceSums<T>)))[a];
  }
  MRF_INLINE int64_t register_bytes() const { return sizeof(ReferenceSums<T>) + active_ * sizeof(ModalitySums<T>); }

  const SoftmaxFisher& problem_;
  const int64_t channels_;
  const int active_;
  char* const memory_;
};

}  // namespace
}  // namespace MRF_ISA
}  // namespace mrf

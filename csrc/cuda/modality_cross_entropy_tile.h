// The work of a warp on a tile of modality_cross_entropy: its passes over the logits in shared memory. What is computed, and why so, says
// modality_cross_entropy.cu.
#pragma once

#include "warp_tile.h"

namespace mrf {
namespace cuda {

// Of a modality, or of R, in a pixel. Exponentials are powers of two: e_c = 2^(x_c log2(e) - base).
template <class T>
struct Sums {
  T x;       // the logit of y
  T base;    // log2(e) times what exponentials are relative to, rounded
  T rest;    // S;  then the coefficient of e in the gradient
  T square;  // Q;  then the coefficient of e^2
};

// What follows from them.
template <class T>
struct Own {
  T cross_entropy;
  T p, others, inverse;  // p_y, 1 - p_y, and what e_c is multiplied with for p_c
  T n, pg, above;        // N, sum p g, g_y - sum p g
};

template <class T, class Storage, int Pixels_, int Channels_, bool Backward>
class CrossEntropyTile : WarpTile<T, Storage, Pixels_, Channels_> {
  using Tile = WarpTile<T, Storage, Pixels_, Channels_>;
  static constexpr int Pixels = Tile::Pixels, Channels = Tile::Channels;
  using Tile::groups, Tile::part, Tile::place, Tile::tiling;

 public:
  // `memory`: of the warp. `class_weights`: of all classes, with smoothing.
  __device__ CrossEntropyTile(const ModalityCrossEntropy& call, int64_t sample, uint64_t held, unsigned char* memory,
                              const T* class_weights, T all_weights)
      : Tile(call.tiling),
        call_(call),
        sample_(sample),
        held_(held),
        active_(count_of(held)),
        planes_(shared_address(memory)),
        plane_bytes_(Tile::plane_bytes()),
        means_(reinterpret_cast<T*>(memory + active_ * plane_bytes_)),
        numbers_(reinterpret_cast<T*>(memory + call.numbers)),
        class_weights_(class_weights),
        all_weights_(all_weights),
        smoothing_(T(call.label_smoothing)),
        uniform_(T(call.label_smoothing / double(call.tiling.channels))),
        mean_scale_(kLog2E<T> / T(active_)) {
    if (!Backward)
      for (int k = 0; k < 2 * call.modalities + 2; ++k) number(k) = 0;
  }

  __device__ void run(int64_t begin) {
    __syncwarp();  // all lanes have done with the tile before
    int a = 0;
#pragma unroll 1
    for (int m = 0; m < call_.modalities; ++m)
      if (held_ >> m & 1) Tile::bring(call_.logits[m], sample_, begin, plane(a++));
#pragma unroll 1
    for (int turn = 0; turn < Tile::turns; ++turn) {
      Tile::start(turn);
      read_targets(begin);
      if (turn == 0) wait_for_copies();
      if (active_ > kGroup) keep_means();
#pragma unroll 1
      for (int first = 0; first < active_; first += kGroup) run_group(first, min(active_ - first, kGroup));
    }
    if constexpr (Backward) {
      __syncwarp();
      a = 0;
#pragma unroll 1
      for (int m = 0; m < call_.modalities; ++m)
        Tile::take(call_.gradients[m], sample_, begin, plane(a), held_ >> m & 1), a += held_ >> m & 1;
    }
  }

  // Forward: sum k of this lane's pixels.
  __device__ T& number(int k) const { return numbers_[32 * k + (thread_number() & 31)]; }

 private:
  static constexpr int n = Tile::n, kStep = n < 4 ? 4 / n : 1;
  static constexpr T most_ = sizeof(T) == 4 ? T(1e20) : T(1e200);  // of Q, for the squares of what follows from it

  __device__ static int count_of(uint64_t held) { return __popcll(held); }
  __device__ unsigned plane(int a) const { return planes_ + a * plane_bytes_; }
  __device__ int modality(int a) const {
    uint64_t rest = held_;
#pragma unroll 1
    for (; a > 0; --a) rest &= rest - 1;
    return __ffsll(rest) - 1;
  }

  // ---- targets ----

  __device__ int64_t target(int64_t at) const {
    switch (call_.target_type) {
      case Integer::uint8: return static_cast<const uint8_t*>(call_.target)[at];
      case Integer::int8: return static_cast<const int8_t*>(call_.target)[at];
      case Integer::int16: return static_cast<const int16_t*>(call_.target)[at];
      case Integer::int32: return static_cast<const int32_t*>(call_.target)[at];
      default: return static_cast<const int64_t*>(call_.target)[at];
    }
  }

  __device__ void read_targets(int64_t begin) {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const int64_t pixel = begin + Tile::first + p;
      const bool inside = pixel < tiling.pixels;
      const int64_t y = inside ? target(sample_ * tiling.pixels + pixel) : call_.ignore_index;
      valid_[p] = inside && y != call_.ignore_index;
      const bool known = y >= 0 && y < tiling.channels;
      y_[p] = valid_[p] && known ? int(y) : 0;
      weight_[p] = valid_[p] && !known ? T(NAN) : call_.class_weight ? T(call_.class_weight[y_[p]]) : T(1);
      all_[p] = (1 - smoothing_) * weight_[p] + uniform_ * all_weights_;
    }
  }

  // In all lanes of the pixel.
  __device__ T logit_of_target(int a, int p) const {
    const T own = Tile::owns(y_[p]) ? Tile::load_one(plane(a) + place(y_[p]) + p * Tile::size) : T(0);
    return __shfl_sync(kWarp, own, Tile::owner(y_[p]));
  }

  // ---- R, where a thread does not have all of it at once ----

  __device__ T* means(int unit) const { return means_ + (unit * 32 + (thread_number() & 31)) * n; }

  __device__ void keep_means() {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      joint_[p].x = 0;
#pragma unroll 1
      for (int a = 0; a < active_; ++a) joint_[p].x += logit_of_target(a, p);
    }
    Tile::template each_step<1>([&](auto step, int k, int, int at) {
      constexpr int count = decltype(step)::value;
      T sum[count] = {};
#pragma unroll 1
      for (int a = 0; a < active_; ++a) {
        T x[count];
        Tile::load(plane(a) + at, x);
        for (int i = 0; i < count; ++i) sum[i] += x[i];
      }
      for (int i = 0; i < count; ++i) means(k)[i] = sum[i];
    });
#pragma unroll
    for (int p = 0; p < Pixels; ++p)
      if (Tile::owns(y_[p])) means(Tile::unit_of(y_[p]))[Channels > 1 ? max(y_[p] - Tile::head, 0) % Channels : p] = -T(INFINITY);
  }

  // ---- up to four modalities, and R with the first of them ----

  __device__ void run_group(int first, int count) {
#pragma unroll
    for (int a = 0; a < kGroup; ++a)
#pragma unroll
      for (int p = 0; p < Pixels; ++p) {
        if (a >= count) break;
        Sums<T>& s = own_[a][p];
        s.x = logit_of_target(first + a, p), s.base = s.x * kLog2E<T>;
        if (Tile::owns(y_[p])) Tile::store_one(plane(first + a) + place(y_[p]) + p * Tile::size, -T(INFINITY));
        if (active_ <= kGroup) joint_[p].x = a == 0 ? s.x : joint_[p].x + s.x;
      }
    if (first == 0)
#pragma unroll
      for (int p = 0; p < Pixels; ++p) joint_[p].base = joint_[p].x * mean_scale_;
    add_up(first, count);
    const unsigned far = find_far(first, count);
    if (__any_sync(kWarp, far)) {
      find_maxima(first, count, far);
      add_up(first, count);
    }
    if (first == 0) finish_joint(far >> (kGroup * Pixels));
#pragma unroll 1
    for (int a = 0; a < count; ++a) finish(first, a, far >> (a * Pixels));
    if constexpr (Backward) write_gradients(first, count);
  }

  // `sum`: of the logits of all modalities, of which the mean is taken by the scale of the exponentials.
  template <int N>
  __device__ void load_means(int unit, T (&sum)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = means(unit + i / n)[i % n];
  }

  // Adds a step up, and that to the sums: sums of sums keep digits that one over 1000 classes would lose.
  template <bool Squares, int N>
  __device__ static void add(Sums<T> (&sums)[Pixels], const T (&x)[N], T scale) {
    T rest[Pixels], square[Pixels];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int p = i % Pixels;
      const T e = exp2_of(fused(x[i], scale, -sums[p].base));
      rest[p] = i < Pixels ? e : rest[p] + e;
      if (Squares) square[p] = i < Pixels ? e * e : fused(e, e, square[p]);
    }
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      sums[p].rest += rest[p];
      if (Squares) sums[p].square += square[p];
    }
  }

  __device__ void add_up(int first, int count) {
    each_sums(first, count, [](Sums<T>& s) { s.rest = s.square = 0; });
    Tile::template each_step<kStep>([&](auto step, int k, int, int at) {
      constexpr int elements = decltype(step)::value;
      T sum[elements];
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (a == 0 || a < count) {
          T x[elements];
          Tile::load(plane(first + a) + at, x);
          for (int i = 0; i < elements; ++i) sum[i] = a == 0 ? x[i] : sum[i] + x[i];
          add<true>(own_[a], x, kLog2E<T>);
        }
      if (first > 0) return;
      if (active_ > kGroup) load_means(k, sum);
      add<false>(joint_, sum, mean_scale_);
    });
    combine(first, count, [](Sums<T>& s, int o) {
      s.rest += __shfl_xor_sync(kWarp, s.rest, o), s.square += __shfl_xor_sync(kWarp, s.square, o);
    });
  }

  template <class F>
  __device__ void each_sums(int first, int count, F f) {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (a < count) f(own_[a][p]);
      if (first == 0) f(joint_[p]);
    }
  }
  // f(sums, distance) where a lane meets the others of its pixel.
  template <class F>
  __device__ void combine(int first, int count, F f) {
#pragma unroll 1
    for (int o = groups; o < 32; o *= 2) each_sums(first, count, [&](Sums<T>& s) { f(s, o); });
  }

  // Bit a Pixels + p: the sums of a pixel that counts are beyond these formulas; after those of modalities, R's.
  __device__ unsigned find_far(int first, int count) const {
    unsigned far = 0;
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (a < count && valid_[p] && !(own_[a][p].square < most_)) far |= 1u << (a * Pixels + p);
      if (first == 0 && valid_[p] && !(joint_[p].rest < most_)) far |= 1u << (kGroup * Pixels + p);
    }
    return far;
  }

  // Of these the bases become the maxima, for which `rest` is used meanwhile.
  __device__ void find_maxima(int first, int count, unsigned far) {
    each_sums(first, count, [](Sums<T>& s) { s.rest = s.x; });
    Tile::template each_step<kStep>([&](auto step, int k, int, int at) {
      constexpr int elements = decltype(step)::value;
      T sum[elements] = {};
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (a < count) {
          T x[elements];
          Tile::load(plane(first + a) + at, x);
          for (int i = 0; i < elements; ++i) sum[i] += x[i], own_[a][i % Pixels].rest = maximum(own_[a][i % Pixels].rest, x[i]);
        }
      if (first > 0) return;
      if (active_ > kGroup) load_means(k, sum);
      for (int i = 0; i < elements; ++i) joint_[i % Pixels].rest = maximum(joint_[i % Pixels].rest, sum[i]);
    });
    combine(first, count, [](Sums<T>& s, int o) { s.rest = maximum(s.rest, __shfl_xor_sync(kWarp, s.rest, o)); });
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (far >> (a * Pixels + p) & 1) own_[a][p].base = own_[a][p].rest * kLog2E<T>;
      if (far >> (kGroup * Pixels + p) & 1) joint_[p].base = joint_[p].rest * mean_scale_;
    }
  }

  // What follows from the sums of a modality, or of R; `spread`: with smoothing, sum of w_c log2 e_c over c != y.
  __device__ Own<T> follow(const Sums<T>& s, T scale, T spread, bool far, int p) const {
    // Where exponentials are relative to y, e_y is 1: what base lost in rounding becomes a factor of the others.
    const T lost = fused(s.x, scale, -s.base), logit = far ? lost : T(0), factor = far ? T(1) : 1 - kLn2<T> * lost;
    const T rest = s.rest * factor, e = exp2_of(logit), total = all_[p];
    Own<T> of;
    of.cross_entropy = total * log_of_1_plus(rest + (e - 1)) - (1 - smoothing_) * weight_[p] * logit * kLn2<T>;
    if (smoothing_ > 0) {
      if (!far) spread -= lost * (all_weights_ - weight_[p]);
      of.cross_entropy -= uniform_ * (spread + weight_[p] * logit) * kLn2<T>;
    }
    const T inverse = reciprocal(rest + e);
    of.p = e * inverse, of.others = rest * inverse, of.inverse = factor * inverse;
    const T square = s.square * of.inverse * of.inverse, norm = of.others * of.others + square;
    of.n = total * total * norm, of.pg = total * (square - of.p * of.others), of.above = -total * norm;
    return of;
  }

  // Of a cross entropy at y: less the gradients at all other classes, whose probabilities add up to `others`.
  __device__ T gradient_at_target(T others, int p) const { return uniform_ * (all_weights_ - weight_[p]) - all_[p] * others; }

  // ---- with smoothing, further passes over the classes but y ----

  // f(x, class weight, p) for the elements of a modality (a < 0: those of R, added up).
  template <class F>
  __device__ void each_other(int a, F f) const {
    Tile::template each_step<1>([&](auto step, int k, int channel, int at) {
      constexpr int count = decltype(step)::value;
      T x[count] = {};
      if (a >= 0) Tile::load(plane(a) + at, x);
      else if (active_ > kGroup) load_means(k, x);
      else
#pragma unroll 1
        for (int b = 0; b < active_; ++b) {
          T y[count];
          Tile::load(plane(b) + at, y);
          for (int i = 0; i < count; ++i) x[i] += y[i];
        }
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int c = channel + (Channels > 1 ? i : 0), p = i % Pixels;
        if (c != y_[p]) f(x[i], class_weights_[c], p);
      }
    });
  }
  __device__ void combine(T (&x)[Pixels]) const {
#pragma unroll 1
    for (int o = groups; o < 32; o *= 2)
#pragma unroll
      for (int p = 0; p < Pixels; ++p) x[p] += __shfl_xor_sync(kWarp, x[p], o);
  }

  __device__ void add_spread(int a, const Sums<T> (&s)[Pixels], T scale, T (&spread)[Pixels]) const {
    each_other(a, [&](T x, T w, int p) { spread[p] = fused(w, fused(x, scale, -s[p].base), spread[p]); });
    combine(spread);
  }

  // N, sum p g and g_y less that: g = T p - t may be small for every class, where expanding the square would cancel.
  __device__ void add_gradients(int a, const Sums<T> (&s)[Pixels], Own<T> (&of)[Pixels]) const {
    T square[Pixels] = {}, pg[Pixels] = {};
    each_other(a, [&](T x, T w, int q) {
      const T p = exp2_of(fused(x, kLog2E<T>, -s[q].base)) * of[q].inverse, g = fused(all_[q], p, -uniform_ * w);
      square[q] = fused(g, g, square[q]), pg[q] = fused(p, g, pg[q]);
    });
    combine(square), combine(pg);
#pragma unroll
    for (int q = 0; q < Pixels; ++q) {
      const T g = gradient_at_target(of[q].others, q);
      of[q].n = square[q] + g * g, of[q].pg = pg[q] + of[q].p * g, of[q].above = g - of[q].pg;
    }
  }

  // ---- results of a group ----

  __device__ void finish_joint(unsigned far) {
    T spread[Pixels] = {};
    if (smoothing_ > 0) add_spread(-1, joint_, mean_scale_, spread);
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const Own<T> of = follow(joint_[p], mean_scale_, spread[p], far >> p & 1, p);
      if constexpr (Backward) {
        const T above = upstream(call_.to_joint, 0) / T(active_);
        joint_[p].rest = above * all_[p] * of.inverse, joint_[p].x = above * gradient_at_target(of.others, p);
      } else if (part == 0 && valid_[p]) {
        number(2 * call_.modalities) += of.cross_entropy, number(2 * call_.modalities + 1) += weight_[p];
      }
    }
  }

  // Modality a of the group.
  __device__ void finish(int first, int a, unsigned far) {
    Sums<T> s[Pixels];
#pragma unroll
    for (int b = 0; b < kGroup; ++b)
      if (b == 0 || a == b)
#pragma unroll
        for (int p = 0; p < Pixels; ++p) s[p] = own_[b][p];
    T spread[Pixels] = {};
    if (smoothing_ > 0) add_spread(first + a, s, kLog2E<T>, spread);
    Own<T> of[Pixels];
#pragma unroll
    for (int p = 0; p < Pixels; ++p) of[p] = follow(s[p], kLog2E<T>, spread[p], far >> p & 1, p);
    if (smoothing_ > 0) add_gradients(first + a, s, of);
    const int m = modality(first + a);
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const T inverse_f = reciprocal(of[p].cross_entropy + T(call_.eps));
      if constexpr (Backward) {
        const T v = upstream(call_.to_information, m) * inverse_f;
        const T g = upstream(call_.to_cross_entropy, m) - v * (of[p].n * inverse_f);  // what g is multiplied with
        const T pg = 2 * v * all_[p];                                               // and p (g - sum p g)
        at_target(a, p) = g * gradient_at_target(of[p].others, p) + pg * of[p].p * of[p].above + joint_[p].x;
        s[p].rest = (g * all_[p] - pg * of[p].pg) * of[p].inverse, s[p].square = pg * all_[p] * of[p].inverse * of[p].inverse;
        if (smoothing_ > 0) {
          of_weight(a, p) = uniform_ * (g + upstream(call_.to_joint, 0) / T(active_));
          of_weighted(a, p) = uniform_ * pg * of[p].inverse;
        }
      } else if (part == 0 && valid_[p]) {
        number(m) += of[p].cross_entropy, number(call_.modalities + m) += of[p].n * inverse_f;
      }
    }
    if constexpr (Backward)
#pragma unroll
      for (int b = 0; b < kGroup; ++b)
        if (a == b)
#pragma unroll
          for (int p = 0; p < Pixels; ++p) own_[b][p] = s[p];
  }

  __device__ T upstream(const double* of, int m) const { return T(of[int64_t(m) * call_.batch + sample_]); }
  // The gradient at y; with smoothing, what w_c and w_c e are multiplied with.
  __device__ T& at_target(int a, int p) const { return number(a * Pixels + p); }
  __device__ T& of_weight(int a, int p) const { return at_target(kGroup + a, p); }
  __device__ T& of_weighted(int a, int p) const { return at_target(2 * kGroup + a, p); }

  __device__ void write_gradients(int first, int count) {
    Tile::template each_step<kStep>([&](auto step, int k, int channel, int at) {
      constexpr int elements = decltype(step)::value;
      T x[kGroup][elements], sum[elements];
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (a == 0 || a < count) {
          Tile::load(plane(first + a) + at, x[a]);
          for (int i = 0; i < elements; ++i) sum[i] = a == 0 ? x[a][i] : sum[i] + x[a][i];
        }
      if (active_ > kGroup) load_means(k, sum);
#pragma unroll
      for (int i = 0; i < elements; ++i)
        sum[i] = joint_[i % Pixels].rest * exp2_of(fused(sum[i], mean_scale_, -joint_[i % Pixels].base));
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
        if (a == 0 || a < count) {
#pragma unroll
          for (int i = 0; i < elements; ++i) {
            const Sums<T>& s = own_[a][i % Pixels];
            const T e = exp2_of(fused(x[a][i], kLog2E<T>, -s.base));
            x[a][i] = fused(e, fused(s.square, e, s.rest), sum[i]);
            if (smoothing_ > 0) {
              const T w = class_weights_[channel + i / n * Channels * tiling.lanes + (Channels > 1 ? i % n : 0)];
              x[a][i] -= w * fused(of_weighted(a, i % Pixels), e, of_weight(a, i % Pixels));
            }
          }
          Tile::store(plane(first + a) + at, x[a]);
        }
    });
#pragma unroll
    for (int a = 0; a < kGroup; ++a)
      if (a < count)
#pragma unroll
        for (int p = 0; p < Pixels; ++p) {
          const unsigned start = plane(first + a) + p * Tile::size;
          if (Tile::owns(y_[p])) Tile::store_one(start + place(y_[p]), at_target(a, p));
          if (!valid_[p])
            for (int c = 0; c < int(tiling.channels); ++c)
              if (Tile::owns(c)) Tile::store_one(start + place(c), T(0));
        }
  }

  const ModalityCrossEntropy& call_;
  const int64_t sample_;
  const uint64_t held_;  // bit m: whether the sample has modality m
  const int active_;
  const unsigned planes_;
  const int plane_bytes_;
  T *const means_, *const numbers_;
  const T* const class_weights_;
  const T all_weights_, smoothing_, uniform_;  // sum of w, s, s / C
  const T mean_scale_;                         // log2(e) / M
  // Of this lane's pixels.
  int y_[Pixels];
  bool valid_[Pixels];
  T weight_[Pixels], all_[Pixels];  // w_y, T
  Sums<T> own_[kGroup][Pixels], joint_[Pixels];
};

}  // namespace cuda
}  // namespace mrf

// The work of a warp on a tile of softmax_fisher: its passes over the features in shared memory. What is computed, and why so, says
// softmax_fisher.cu.
#pragma once

#include "warp_tile.h"

namespace mrf {
namespace cuda {

// Of a modality in a pixel, over its channels; with y = log2(e) (X - max X), e = 2^y and r = 2^(mean of all y).
template <class T>
struct Fisher {
  T top;       // max X
  T sum;       // of e
  T distance;  // sum of r y
  T ratio;     // of the sums of e and r: p - q is (e - ratio r) / sum
  T norm;      // sum of (e - ratio r)^2;  before, of (e - r)^2
  T slope;     // sum of e (e - ratio r);  before, of r (e - r)
};

// The gradient of a modality in a pixel is d (of_de e - of_d) - of_e e + r pull, with d = e - ratio r and pull the sum of
// of_y y + of_difference d over modalities, and a number of the pixel.
template <class T>
struct Slopes {
  T of_de, of_d, of_e, of_y, of_difference;
};

template <class T, class Storage, int Pixels_, int Channels_, int M, bool Backward>
class FisherTile : WarpTile<T, Storage, Pixels_, Channels_> {
  using Tile = WarpTile<T, Storage, Pixels_, Channels_>;
  static constexpr int Pixels = Tile::Pixels, Channels = Tile::Channels, n = Tile::n;
  static constexpr int kTogether = M == 2 && !Backward ? 8 : 4, kStep = n < kTogether ? kTogether / n : 1;
  // Of two modalities r is the product of roots, each an exponential, and e its square.
  static constexpr bool kHalved = M == 2;
  template <bool Careful>
  static constexpr bool kRoots = kHalved && !Careful;
  using Tile::groups, Tile::part, Tile::tiling;

 public:
  // Of the calling lane, forward: I of every modality over its pixels, and how many counted.
  T total[M] = {};
  int counted = 0;

  __device__ FisherTile(const SoftmaxFisher& call, const Place& at, uint64_t held, unsigned char* memory)
      : Tile(call.tilings[at.tiling]),
        call_(call),
        scale_(at.tiling),
        sample_(at.sample),
        held_(held),
        mean_(1 / T(count_of(held))),
        planes_(shared_address(memory)),
        plane_bytes_(Tile::plane_bytes()) {
    // A modality that is not there is one of zeros: it adds nothing to the mean, and all else that it gives is left out.
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (!has(m))
        for (int i = 16 * (threadIdx.x % 32); i < plane_bytes_; i += 16 * 32)
          store_shared(plane(m) + i, make_uint4(0, 0, 0, 0));
  }

  __device__ void run(int64_t begin) {
    __syncwarp();  // all lanes have done with the tile before
#pragma unroll 1
    for (int m = 0; m < call_.modalities; ++m)
      if (has(m)) Tile::bring(array(call_.features, m), sample_, begin, plane(m));
#pragma unroll 1
    for (int turn = 0; turn < Tile::turns; ++turn) {
      Tile::start(turn);
      read_mask(begin);
      if (turn == 0) wait_for_copies();
      if (!held_) continue;
      find_maxima();
      const bool careful = (kHalved && count_of(held_) < 2) || __any_sync(kWarp, !add_up<false>());
      if (careful) {
        find_maximum_of_mean();
        add_up<true>();
        compare();
      }
      finish(careful);
      if constexpr (Backward) {
        if (careful) write_gradients<true>();
        else write_gradients<false>();
        clear_gradients();
      }
    }
    if constexpr (Backward) {
      __syncwarp();
#pragma unroll 1
      for (int m = 0; m < call_.modalities; ++m)
        Tile::take(array(call_.gradients, m), sample_, begin, plane(m), has(m));
    }
  }

 private:
  __device__ static int count_of(uint64_t held) { return __popcll(held); }
  __device__ bool has(int m) const { return held_ >> m & 1; }
  __device__ unsigned plane(int m) const { return planes_ + m * plane_bytes_; }
  __device__ const Array& array(const Array* of, int m) const { return of[m * call_.scales + scale_]; }

  __device__ void read_mask(int64_t begin) {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const int64_t pixel = begin + Tile::first + p;
      valid_[p] = pixel < tiling.pixels && (tiling.mask == nullptr || tiling.mask[sample_ * tiling.pixels + pixel]);
      counted += valid_[p] && part == 0;
    }
  }

  // f(number, distance) where a lane meets the others of its pixel, for each number that f is given.
  template <class F>
  __device__ void combine(F f) const {
#pragma unroll 1
    for (int o = groups; o < 32; o *= 2)
#pragma unroll
      for (int p = 0; p < Pixels; ++p) f(p, o);
  }
  __device__ static void add(T& x, int o) { x += __shfl_xor_sync(kWarp, x, o); }
  __device__ static void raise(T& x, int o) { x = maximum(x, __shfl_xor_sync(kWarp, x, o)); }

  // y of every modality and r; and e, or where roots are taken e^(1/2) and y/2.
  template <bool Careful, int N>
  __device__ void exponentials(int at, T (&y)[M][N], T (&e)[M][N], T (&r)[N]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      Tile::load(plane(m) + at, y[m]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T top = of_[m][i % Pixels].top, scale = kLog2E<T> / (kRoots<Careful> ? 2 : 1);
        y[m][i] = Careful ? (y[m][i] - top) * scale : fused(y[m][i], scale, -top * scale);
        e[m][i] = exp2_of(y[m][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (kRoots<Careful>) r[i] = e[0][i] * e[1][i];
      else r[i] = exp2_of((sum_of(y, i) - (Careful ? peak_[i % Pixels] : T(0))) * mean_);
    }
  }
  template <int N>
  __device__ static T sum_of(const T (&y)[M][N], int i) {
    T sum = y[0][i];
#pragma unroll
    for (int m = 1; m < M; ++m) sum += y[m][i];
    return sum;
  }

  // ---- passes over the channels ----

  __device__ void find_maxima() {
    typename Tile::Values top[M];
#pragma unroll
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < n; ++i) narrow(-T(INFINITY), top[m].at[i]);
    Tile::template each_step<kStep>([&](auto count, int, int, int at) {
#pragma unroll
      for (int m = 0; m < M; ++m) Tile::template keep_larger_of<decltype(count)::value>(plane(m) + at, top[m]);
    });
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const T x = widen<T>(top[m].at[i]);
        of_[m][i % Pixels].top = i < Pixels ? x : maximum(of_[m][i % Pixels].top, x);
      }
    combine([&](int p, int o) {
      for (int m = 0; m < M; ++m) raise(of_[m][p].top, o);
    });
  }

  // Sums: of a step first, then of all, which keeps digits that one over 1000 channels would lose. Returns whether they do in all pixels of
  // the lane: modalities not so far apart that exponentials of their mean vanish beside those of their maxima, p not so near to q that the
  // norm of d = (e - r) - (ratio - 1) r is lost among those of its parts, or d itself in the rounding of roots.
  template <bool Careful>
  __device__ bool add_up() {
    T square_r[Pixels];
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      sum_r_[p] = square_r[p] = 0;
      for (int m = 0; m < M; ++m) of_[m][p].sum = of_[m][p].distance = of_[m][p].norm = of_[m][p].slope = 0;
    }
    Tile::template each_step<Careful ? 1 : kStep>([&](auto elements, int, int, int at) {
      constexpr int count = decltype(elements)::value;
      T y[M][count], e[M][count], r[count];
      exponentials<Careful>(at, y, e, r);
#pragma unroll
      for (int p = 0; p < Pixels; ++p) {
        T sum_r = 0;
#pragma unroll
        for (int i = p; i < count; i += Pixels) {
          sum_r = kRoots<Careful> ? fused(e[0][i], e[1][i], sum_r) : sum_r + r[i];
          square_r[p] = fused(r[i], r[i], square_r[p]);
        }
        sum_r_[p] += sum_r;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          Fisher<T>& of = of_[m][p];
          T sum = 0, distance = 0;
#pragma unroll
          for (int i = p; i < count; i += Pixels) {
            sum = kRoots<Careful> ? fused(e[m][i], e[m][i], sum) : sum + e[m][i], distance = fused(r[i], y[m][i], distance);
            if constexpr (!Careful) {
              const T apart = e[0][i] - e[1][i], w = kHalved ? e[m][i] * (m == 0 ? apart : -apart) : e[m][i] - r[i];
              of.norm = fused(w, w, of.norm), of.slope = fused(w, r[i], of.slope);
            }
          }
          of.sum += sum, of.distance += distance;
        }
      }
    });
    combine([&](int p, int o) {
      add(sum_r_[p], o);
      if (!Careful) add(square_r[p], o);
      for (int m = 0; m < M; ++m) {
        add(of_[m][p].sum, o), add(of_[m][p].distance, o);
        if (!Careful) add(of_[m][p].norm, o), add(of_[m][p].slope, o);
      }
    });
    bool well = true;
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      well &= sum_r_[p] > T(1e-16) || !valid_[p];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        Fisher<T>& of = of_[m][p];
        of.ratio = quotient(of.sum, sum_r_[p]);
        if constexpr (!Careful) {
          const T more = of.ratio - 1, ww = of.norm, rw = of.slope, rr = square_r[p];
          of.norm = fused(more, fused(more, rr, -2 * rw), ww), of.slope = fused(-more, rw, ww) + fused(-more, rr, rw);
          const T parts = fused(more * more, rr, ww), near = kHalved && ww > 0 ? of.ratio * of.ratio * rr : T(0);
          well &= (of.norm >= parts / 64 && of.norm >= near / 4096) || !valid_[p] || !has(m);
        }
        if (kRoots<Careful>) of.distance *= 2;
      }
    }
    return well;
  }

  // ---- with care ----

  __device__ void find_maximum_of_mean() {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) peak_[p] = -T(INFINITY);
    Tile::template each_step<1>([&](auto elements, int, int, int at) {
      constexpr int count = decltype(elements)::value;
      T y[M][count];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        Tile::load(plane(m) + at, y[m]);
#pragma unroll
        for (int i = 0; i < count; ++i) y[m][i] = (y[m][i] - of_[m][i % Pixels].top) * kLog2E<T>;
      }
#pragma unroll
      for (int i = 0; i < count; ++i) peak_[i % Pixels] = maximum(peak_[i % Pixels], sum_of(y, i));
    });
    combine([&](int p, int o) { raise(peak_[p], o); });
  }

  __device__ void compare() {
#pragma unroll
    for (int p = 0; p < Pixels; ++p)
#pragma unroll
      for (int m = 0; m < M; ++m) of_[m][p].norm = of_[m][p].slope = 0;
    Tile::template each_step<1>([&](auto elements, int, int, int at) {
      constexpr int count = decltype(elements)::value;
      T y[M][count], e[M][count], r[count];
      exponentials<true>(at, y, e, r);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < count; ++i) {
          Fisher<T>& of = of_[m][i % Pixels];
          const T d = fused(-of.ratio, r[i], e[m][i]);
          of.norm = fused(d, d, of.norm), of.slope = fused(e[m][i], d, of.slope);
        }
    });
    combine([&](int p, int o) {
      for (int m = 0; m < M; ++m) add(of_[m][p].norm, o), add(of_[m][p].slope, o);
    });
  }

  // ---- what follows from the sums ----

  __device__ void finish(bool careful) {
    const bool alone = tiling.channels == 1;  // then p = q = 1, and all is 0
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const T inverse_r = reciprocal(sum_r_[p]), share = call_.detach_reference ? T(0) : inverse_r * mean_;
      T mean = 0;  // of the bracket in dI/dR, by q
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Fisher<T>& of = of_[m][p];
        // f = log sum + sum_c q_c (max - X_c): both terms are at least 0, nothing cancels. y of the maximum is what rounding left.
        const T inverse = reciprocal(of.sum), below = of.distance * inverse_r;  // sum_c q_c y_c
        const T lost = careful ? T(0) : fused(of.top, kLog2E<T>, -of.top * kLog2E<T>);
        const T inverse_f = reciprocal(logarithm_of_sum(of.sum, lost) + kLn2<T> * (lost - below) + T(call_.eps));
        const T norm = (alone ? 0 * of.sum : of.norm) * inverse * inverse;
        if constexpr (!Backward) {
          if (valid_[p] && part == 0 && has(m)) total[m] += norm * inverse_f;
        } else {
          const T w = has(m) && !alone ? weight(m) : T(0), slope = of.slope * inverse;
          const T a = 2 * w * inverse_f * inverse, b = w * norm * inverse_f * inverse_f;
          // own: a inverse e (d - slope) - b inverse d;  the bracket: b y / log2(e) - a d, for J(q) is blind to a number added to all
          // channels; sum_c q (e - ratio r) = sum p d - N
          Slopes<T>& to = slopes_[m][p];
          to.of_de = a * inverse, to.of_d = b * inverse, to.of_e = to.of_de * slope;
          to.of_y = share == 0 ? T(0) : share * b * kLn2<T> * (kHalved && !careful ? 2 : 1);
          to.of_difference = share == 0 ? T(0) : -share * a;
          mean -= a * (slope - norm * of.sum) - b * kLn2<T> * below;
        }
      }
      pull_[p] = share == 0 ? T(0) : -share * mean;
    }
  }
  // log sum_c exp(X_c - max X), also where that is close to 0: 2^lost is the e of the maximum, and sum at least as large.
  __device__ static T logarithm_of_sum(T sum, T lost) {
    return sum > 2 ? kLn2<T> * (fast_log2(sum) - lost) : logarithm(quotient(sum, exp2_of(lost)));
  }
  __device__ T weight(int m) const {
    const int64_t at = (int64_t(m) * call_.all_scales + call_.first_scale + scale_) * call_.batch + sample_;
    return T(call_.weight[at] * call_.draws);  // without noise every draw is the same
  }

  template <bool Careful>
  __device__ void write_gradients() {
    Tile::template each_step<Careful ? 1 : kStep>([&](auto elements, int, int, int at) {
      constexpr int count = decltype(elements)::value;
      T y[M][count], e[M][count], r[count];
      exponentials<Careful>(at, y, e, r);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int p = i % Pixels;
        T d[M], pull = pull_[p];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          if (kRoots<Careful>) e[m][i] *= e[m][i];
          d[m] = fused(-of_[m][p].ratio, r[i], e[m][i]);
          pull = fused(slopes_[m][p].of_difference, d[m], fused(slopes_[m][p].of_y, y[m][i], pull));
        }
        pull *= r[i];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const Slopes<T>& to = slopes_[m][p];
          y[m][i] = fused(d[m], fused(to.of_de, e[m][i], -to.of_d), fused(-to.of_e, e[m][i], pull));
        }
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (has(m)) Tile::store(plane(m) + at, y[m]);
    });
  }

  // Of the pixels that do not count.
  __device__ void clear_gradients() {
    bool all = true;
#pragma unroll
    for (int p = 0; p < Pixels; ++p) all &= valid_[p];
    if (all) return;
    Tile::template each_step<1>([&](auto elements, int, int, int at) {
#pragma unroll
      for (int i = 0; i < decltype(elements)::value; ++i)
        if (!valid_[i % Pixels])
#pragma unroll 1
          for (int m = 0; m < call_.modalities; ++m) Tile::store_one(plane(m) + at + i * Tile::size, T(0));
    });
  }

  const SoftmaxFisher& call_;
  const int scale_;
  const int64_t sample_;
  const uint64_t held_;  // bit m: whether the sample has modality m
  const T mean_;  // 1 / how many
  const unsigned planes_;
  const int plane_bytes_;
  // Of this lane's pixels.
  bool valid_[Pixels];
  T sum_r_[Pixels], peak_[Pixels];  // peak, with care: the largest sum of y over modalities, to whose mean r is relative
  Fisher<T> of_[M][Pixels];
  Slopes<T> slopes_[M][Pixels];
  T pull_[Pixels];
};

}  // namespace cuda
}  // namespace mrf

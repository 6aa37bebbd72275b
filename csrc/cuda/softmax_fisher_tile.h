// The work of a warp on a tile of softmax_fisher: its passes over the features in shared memory. What is computed, and why so, says
// softmax_fisher.cu.
#pragma once

#include "warp_tile.h"

namespace mrf {
namespace cuda {

// Of a modality in a pixel, over its channels; with y = log2(e) (X - max X), e = 2^y and r = 2^(mean of all y).
template <class T>
struct Fisher {
  T base;      // log2(e) max X, rounded
  T lost;      // y of the maximum: what was lost in that
  T sum;       // of e
  T distance;  // sum of r y
  T ratio;     // of the sums of e and r: p - q is (e - ratio r) / sum
  T norm;      // sum of (e - ratio r)^2
  T slope;     // backward: sum of e (e - ratio r)
};

// The gradient of a modality in a pixel is e (of_d d + of_e) + r (of_r + pull), with d = e - ratio r and pull the sum of
// of_y y + of_difference d over modalities, and a number of the pixel.
template <class T>
struct Slopes {
  T of_d, of_e, of_r, of_y, of_difference;
};

template <class T, class Storage, int Pixels_, int Channels_, int M, bool Backward>
class FisherTile : WarpTile<T, Storage, Pixels_, Channels_> {
  using Tile = WarpTile<T, Storage, Pixels_, Channels_>;
  static constexpr int Pixels = Tile::Pixels, Channels = Tile::Channels, n = Tile::n;
  static constexpr int kTogether = M == 2 && !Backward ? 8 : 4, kStep = n < kTogether ? kTogether / n : 1;
  using Tile::channel, Tile::group, Tile::groups, Tile::part, Tile::place, Tile::tiling, Tile::units;

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
    read_mask(begin);
    wait_for_copies();
    if (held_) {
      find_maxima();
      find_sums();
      compare();
      finish();
      if constexpr (Backward) write_gradients();
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
      const int64_t pixel = begin + group * Pixels + p;
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

  template <int Units>
  __device__ void differences(int at, T (&y)[M][Units * n]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      Tile::template load<Units>(plane(m) + at, y[m]);
#pragma unroll
      for (int i = 0; i < Units * n; ++i) y[m][i] = fused(y[m][i], kLog2E<T>, -of_[m][i % Pixels].base);
    }
  }
  __device__ static T sum_of(const T* y, int distance) {
    T sum = y[0];
#pragma unroll
    for (int m = 1; m < M; ++m) sum += y[m * distance];
    return sum;
  }
  template <int Units>
  __device__ void exponentials(int at, T (&y)[M][Units * n], T (&e)[M][Units * n], T (&r)[Units * n]) const {
    differences<Units>(at, y);
#pragma unroll
    for (int i = 0; i < Units * n; ++i) {
#pragma unroll
      for (int m = 0; m < M; ++m) e[m][i] = exp2_of(y[m][i]);
      r[i] = exp2_of(fused(sum_of(&y[0][i], Units * n), mean_, -shift_[i % Pixels]));
    }
  }

  // ---- passes over the channels ----

  __device__ void find_maxima() {
    typename Tile::Values top[M];
#pragma unroll
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < n; ++i) narrow(-T(INFINITY), top[m].at[i]);
    Tile::template each_step<kStep>([&](auto steps, int, int at) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int u = 0; u < decltype(steps)::value; ++u) keep_larger(top[m], Tile::load_unit(plane(m) + at + u * Tile::step()));
    });
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const T x = widen<T>(top[m].at[i]);
        of_[m][i % Pixels].base = i < Pixels ? x : maximum(of_[m][i % Pixels].base, x);
      }
    combine([&](int p, int o) {
      for (int m = 0; m < M; ++m) raise(of_[m][p].base, o);
    });
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      shift_[p] = 0;
      for (int m = 0; m < M; ++m) {
        const T top = of_[m][p].base;
        of_[m][p].base = top * kLog2E<T>, of_[m][p].lost = fused(top, kLog2E<T>, -of_[m][p].base);
      }
    }
  }

  __device__ void find_sums() {
#pragma unroll 1
    for (bool again = false;; again = true) {
      add_up();
      if (again || !__any_sync(kWarp, far())) break;
      find_maximum_of_mean();
    }
  }

  // Of a step first, then of all: sums of sums keep digits that one over 1000 channels would lose.
  __device__ void add_up() {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      sum_r_[p] = 0;
      for (int m = 0; m < M; ++m) of_[m][p].sum = of_[m][p].distance = 0;
    }
    Tile::template each_step<kStep>([&](auto steps, int, int at) {
      constexpr int count = decltype(steps)::value * n;
      T y[M][count], e[M][count], r[count];
      exponentials<decltype(steps)::value>(at, y, e, r);
#pragma unroll
      for (int p = 0; p < Pixels; ++p) {
        T sum_r = r[p];
#pragma unroll
        for (int i = p + Pixels; i < count; i += Pixels) sum_r += r[i];
        sum_r_[p] += sum_r;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          T sum = e[m][p], distance = r[p] * y[m][p];
#pragma unroll
          for (int i = p + Pixels; i < count; i += Pixels) sum += e[m][i], distance = fused(r[i], y[m][i], distance);
          of_[m][p].sum += sum, of_[m][p].distance += distance;
        }
      }
    });
    combine([&](int p, int o) {
      add(sum_r_[p], o);
      for (int m = 0; m < M; ++m) add(of_[m][p].sum, o), add(of_[m][p].distance, o);
    });
  }

  // Whether the modalities of a pixel are so far apart that exponentials of their mean vanish beside those of their maxima.
  __device__ bool far() const {
    bool any = false;
#pragma unroll
    for (int p = 0; p < Pixels; ++p) any |= is_far(p);
    return any;
  }
  __device__ bool is_far(int p) const { return valid_[p] && !(sum_r_[p] > T(1e-16)); }

  // In the pixels that are far.
  __device__ void find_maximum_of_mean() {
    T top[Pixels];
#pragma unroll
    for (int p = 0; p < Pixels; ++p) top[p] = -T(INFINITY);
    Tile::template each_step<1>([&](auto, int, int at) {
      T y[M][n];
      differences<1>(at, y);
#pragma unroll
      for (int i = 0; i < n; ++i) top[i % Pixels] = maximum(top[i % Pixels], sum_of(&y[0][i], n));
    });
    combine([&](int p, int o) { raise(top[p], o); });
#pragma unroll
    for (int p = 0; p < Pixels; ++p)
      if (is_far(p)) shift_[p] = top[p] * mean_;
  }

  __device__ void compare() {
#pragma unroll
    for (int p = 0; p < Pixels; ++p)
#pragma unroll
      for (int m = 0; m < M; ++m) of_[m][p].ratio = quotient(of_[m][p].sum, sum_r_[p]), of_[m][p].norm = of_[m][p].slope = 0;
    Tile::template each_step<kStep>([&](auto steps, int, int at) {
      constexpr int count = decltype(steps)::value * n;
      T y[M][count], e[M][count], r[count];
      exponentials<decltype(steps)::value>(at, y, e, r);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < count; ++i) {
          Fisher<T>& of = of_[m][i % Pixels];
          const T d = fused(-of.ratio, r[i], e[m][i]);
          of.norm = fused(d, d, of.norm);
          if (Backward) of.slope = fused(e[m][i], d, of.slope);
        }
    });
    combine([&](int p, int o) {
      for (int m = 0; m < M; ++m) {
        add(of_[m][p].norm, o);
        if (Backward) add(of_[m][p].slope, o);
      }
    });
  }

  // ---- what follows from the sums ----

  __device__ void finish() {
    const bool alone = tiling.channels == 1;  // then p = q = 1, and all is 0
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const T inverse_r = reciprocal(sum_r_[p]), share = call_.detach_reference ? T(0) : inverse_r * mean_;
      T mean = 0;  // of the bracket in dI/dR, by q
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Fisher<T>& of = of_[m][p];
        // f = log sum + sum_c q_c (max - X_c): both terms are at least 0, nothing cancels.
        const T inverse = reciprocal(of.sum), below = of.distance * inverse_r;  // sum_c q_c y_c
        const T inverse_f = reciprocal(logarithm_of_sum(of) + kLn2<T> * (of.lost - below) + T(call_.eps));
        const T norm = (alone ? 0 * of.sum : of.norm) * inverse * inverse;
        if constexpr (!Backward) {
          if (valid_[p] && part == 0 && has(m)) total[m] += norm * inverse_f;
        } else {
          const T w = has(m) && !alone ? weight(m) : T(0), slope = of.slope * inverse;
          const T a = 2 * w * inverse_f * inverse, b = w * norm * inverse_f * inverse_f, of_d = b * inverse;
          // own: a inverse e (d - slope) - of_d d;  the bracket: b y / log2(e) - a d, for J(q) is blind to a number added to all channels;
          // sum_c q (e - ratio r) = sum p d - N
          Slopes<T>& to = slopes_[m][p];
          to.of_d = a * inverse, to.of_e = -(to.of_d * slope + of_d), to.of_r = of_d * of.ratio;
          to.of_y = share == 0 ? T(0) : share * b * kLn2<T>, to.of_difference = share == 0 ? T(0) : -share * a;
          mean -= a * (slope - norm * of.sum) - b * kLn2<T> * below;
        }
      }
      pull_[p] = share == 0 ? T(0) : -share * mean;
    }
  }
  // log sum_c exp(X_c - max X), also where that is close to 0: 2^lost is the e of the maximum, and sum at least as large.
  __device__ static T logarithm_of_sum(const Fisher<T>& of) {
    return of.sum > 2 ? kLn2<T> * (fast_log2(of.sum) - of.lost) : logarithm(quotient(of.sum, exp2_of(of.lost)));
  }
  __device__ T weight(int m) const {
    const int64_t at = (int64_t(m) * call_.all_scales + call_.first_scale + scale_) * call_.batch + sample_;
    return T(call_.weight[at] * call_.draws);  // without noise every draw is the same
  }

  __device__ void write_gradients() {
    Tile::template each_step<kStep>([&](auto steps, int, int at) {
      constexpr int units = decltype(steps)::value, count = units * n;
      T y[M][count], e[M][count], r[count];
      exponentials<units>(at, y, e, r);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int p = i % Pixels;
        T pull = pull_[p];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const T d = fused(-of_[m][p].ratio, r[i], e[m][i]);
          pull = fused(slopes_[m][p].of_difference, d, fused(slopes_[m][p].of_y, y[m][i], pull));
          y[m][i] = e[m][i] * fused(slopes_[m][p].of_d, d, slopes_[m][p].of_e);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) y[m][i] = fused(r[i], slopes_[m][p].of_r + pull, y[m][i]);
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (has(m)) Tile::template store<units>(plane(m) + at, y[m]);
    });
    bool all = true;
#pragma unroll
    for (int p = 0; p < Pixels; ++p) all &= valid_[p];
    if (all) return;
#pragma unroll 1
    for (int m = 0; m < call_.modalities; ++m)
#pragma unroll 1
      for (int k = 0; k < units(); ++k)
#pragma unroll
        for (int i = 0; i < n; ++i)
          if (!valid_[i % Pixels]) Tile::store_one(plane(m) + place(channel(k)) + i * Tile::size, T(0));
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
  T sum_r_[Pixels], shift_[Pixels];  // r = 2^(mean of y - shift)
  Fisher<T> of_[M][Pixels];
  Slopes<T> slopes_[M][Pixels];
  T pull_[Pixels];
};

}  // namespace cuda
}  // namespace mrf

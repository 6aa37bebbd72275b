// softmax_fisher of one group of pixels in the general way: noise, and logits that disagree or agree beyond what the sums of a strip
// (softmax_fisher_strip.h) resolve. Every exponential is relative to its own maximum, and d = p - q is formed channel by channel.
//
// Memory: scratch only, as rows of one channel of one modality (L1 or L2): e_R, e_p, noisy features, the bracket in dI/dR, M features, M
// gradients. Four passes over the channels for each modality and draw: noise, exponentials, sums, gradient.
//
// Work: pixels are lanes; a group is two registers of floats, which hides the latency of the exponential.
#pragma once

#include "strip.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// One modality in a group of pixels: its rows of logits and of exponentials (of one draw), and per pixel the statistics over the channels.
template <class T>
struct Modality {
  int tensor;              // modality * scales + scale
  double sigma;
  T repeats;               // draws that are the same
  const T *y, *e;          // e = exp(y - top)
  Ahead ahead;
  Vectors<T> top;          // max_c y
  Vectors<T> inverse_sum;  // 1 / sum_c e
  Vectors<T> ratio;        // sum_c e / sum_c e_R: d = (e - ratio e_R) inverse_sum, exactly 0 where the modality equals the mean
  Vectors<T> log_sum;
  Vectors<T> cross_entropy;
  Vectors<T> n;            // sum_c d^2
  Vectors<T> pd;           // sum_c p d, backward only
  Vectors<T> weight;       // of I in the objective, backward only
  Vectors<T> information;  // sum of I over groups and draws, forward only

  // Adds I of the valid pixels.
  MRF_INLINE void add_information(const Valid<T>& valid, T eps) {
    for (int v = 0; v < kVectors<T>; ++v) information[v] += select<T>(valid.lanes[v], repeats * n[v] / (cross_entropy[v] + eps), V<T>{});
  }

  // a = 2 weight / (f + eps), b = weight N / (f + eps)^2: the coefficients of d and of log p in the gradients
  MRF_INLINE void coefficients(int v, T eps, V<T>& a, V<T>& b) const {
    const V<T> inverse = T(1) / (cross_entropy[v] + eps);
    a = inverse * weight[v] * T(2);
    b = n[v] * inverse * inverse * weight[v];
  }
};
static_assert(sizeof(Modality<float>) <= kModalityBytes && sizeof(Modality<double>) <= kModalityBytes, "scratch is large enough");

// The index of the block of noise (docs/math.md) of the first lane and the first four channels, and the steps to the next lane and to
// the next four channels.
struct NoiseBlocks {
  int64_t first, lane_step, channel_step;
};

// Sums over the channels, 16 at a time and those then: they keep digits that one sum over 1000 channels would lose.
template <class T>
struct Sums {
  Vectors<T> all, part;

  MRF_INLINE void add(int v, V<T> x) { part[v] += x; }
  MRF_INLINE void end_channel(int64_t done) {
    if (done % 16 == 0) end();
  }
  MRF_INLINE void end() {
    for (int v = 0; v < kVectors<T>; ++v) all[v] += part[v], part[v] = V<T>{};
  }
};

template <class T, bool Backward>
class Group {
 public:
  static constexpr int n = kLanes<T>, width = kGroup;
  static constexpr T log2_e = T(1.44269504088896340736), ln_2 = T(0.693147180559945309417);

  Group(const SoftmaxFisher& problem, int64_t channels, T* scratch) : problem_(problem), channels_(channels), scratch_(scratch) {}

  // Rows of scratch, each of all channels.
  T* features(int a) { return rows(4 + a); }
  T* gradients(int a, int active) { return rows(4 + active + a); }
  T* noisy() { return rows(2); }

  // Any number of modalities, with or without noise: adds to the information, or leaves the gradients in their rows.
  void any_number(Modality<T>* modalities, int count, const Valid<T>& valid, const NoiseBlocks& blocks) {
    reference(count);
    for (int a = 0; a < count; ++a) {
      Modality<T>& s = modalities[a];
      for (int draw = 0; draw < (s.sigma > 0 ? problem_.draws : 1); ++draw) {
        if (s.sigma > 0)
          add_noise(features(a), s, draw, blocks);
        else
          s.y = features(a), s.top = largest(s.y);
        exponentials(s);
        moments(s);
        if constexpr (Backward)
          gradient(s, gradients(a, count), draw == 0, a == 0 && draw == 0);
        else
          s.add_information(valid, T(problem_.eps));
      }
    }
    if constexpr (Backward) finish_gradients(count, valid);
  }

 private:
  // e_R and 1 / sum e_R from the features of the active modalities.
  __attribute__((noinline)) void reference(int active) {
    const T* x = features(0);
    T* e_r = e_reference();
    Vectors<T> top;
    Sums<T> sum;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const T* row = x + c * width + v * n;
        V<T> total = load<T>(row);
        for (int a = 1; a < active; ++a) total += load<T>(row + a * channels_ * width);
        const V<T> mean = mean_of<T>(total, active);
        top[v] = c == 0 ? mean : maximum<T>(mean, top[v]);
        store<T>(e_r + c * width + v * n, mean);
      }
    }
    for (int64_t c = 0; c < channels_; ++c, sum.end_channel(c)) {
      for (int v = 0; v < kVectors<T>; ++v) {
        T* row = e_r + c * width + v * n;
        const V<T> e = exp2<T>((load<T>(row) - top[v]) * log2_e);
        sum.add(v, e);
        store<T>(row, e);
      }
    }
    sum.end();
    for (int v = 0; v < kVectors<T>; ++v) inverse_reference_[v] = T(1) / sum.all[v];
    sum_reference_ = sum.all;
  }

  // Over the channels of a modality.
  __attribute__((noinline)) Vectors<T> largest(const T* x) {
    Vectors<T> top;
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const V<T> here = load<T>(x + c * width + v * n);
        top[v] = c == 0 ? here : maximum<T>(here, top[v]);
      }
    return top;
  }

  // y = x + sigma * noise in the rows of noisy features, and its maximum.
  void add_noise(const T* x, Modality<T>& s, int draw, const NoiseBlocks& blocks) {
    T* y = noisy();
    constexpr int lanes = kLanes<float>;
    static_assert(width % lanes == 0, "a group is whole registers of words");
    Words steps;
    for (int j = 0; j < lanes; ++j) steps[j] = uint32_t(j * blocks.lane_step);
    for (int64_t c = 0; c < channels_; c += 4) {
      uint32_t words[4][width];
      T normals[4][width];
      for (int i = 0; i < width; i += lanes) {
        const uint64_t first = blocks.first + i * blocks.lane_step + c / 4 * blocks.channel_step;
        const Words low = steps + uint32_t(first), carry = (Words)(low < steps);  // all bits, -1, where the sum wrapped around
        Words counter[4] = {low, uint32_t(first >> 32) - carry, Words{} + uint32_t(s.tensor), Words{} + uint32_t(draw)};
        philox4x32(counter, uint32_t(problem_.seed), uint32_t(problem_.seed >> 32));
        for (int w = 0; w < 4; ++w) __builtin_memcpy(words[w] + i, &counter[w], sizeof counter[w]);
      }
      for (int i = 0; i < width; i += n) {
        box_muller<T>(words[0] + i, words[1] + i, normals[0] + i, normals[1] + i);
        box_muller<T>(words[2] + i, words[3] + i, normals[2] + i, normals[3] + i);
      }
      for (int64_t j = c; j < c + 4 && j < channels_; ++j)
        for (int v = 0; v < kVectors<T>; ++v) {
          const int64_t i = j * width + v * n;
          const V<T> noisy = load<T>(x + i) + load<T>(normals[j - c] + v * n) * T(s.sigma);
          s.top[v] = j == 0 ? noisy : maximum<T>(noisy, s.top[v]);
          store<T>(y + i, noisy);
        }
    }
    s.y = y;
  }

  // The exponentials of a draw, after reference(). f = log sum + sum_c q_c (top - y_c): both terms are at least 0, nothing cancels.
  __attribute__((noinline)) void exponentials(Modality<T>& s) {
    const T *y = s.y, *e_r = e_reference();
    T* e_y = rows(1);
    const Vectors<T> top = s.top;
    const Ahead ahead = s.ahead;
    Sums<T> sum, distance;
    for (int64_t c = 0; c < channels_; ++c, sum.end_channel(c), distance.end_channel(c)) {
      for (int v = 0; v < kVectors<T>; ++v) {
        prefetch(ahead.data + c * ahead.stride + v * kRegisterBytes);
        const int64_t i = c * width + v * n;
        const V<T> shifted = load<T>(y + i) - top[v];
        const V<T> e = exp2<T>(shifted * log2_e);
        sum.add(v, e);
        distance.add(v, -load<T>(e_r + i) * shifted);
        store<T>(e_y + i, e);
      }
    }
    s.e = e_y;
    sum.end(), distance.end();
    for (int v = 0; v < kVectors<T>; ++v) {
      s.inverse_sum[v] = T(1) / sum.all[v];
      s.ratio[v] = sum.all[v] / sum_reference_[v];
      s.log_sum[v] = log<T>(sum.all[v]);
      s.cross_entropy[v] = s.log_sum[v] + distance.all[v] * inverse_reference_[v];
    }
  }

  // The sums of d^2 and p d.
  __attribute__((noinline)) void moments(Modality<T>& s) {
    const T *e_y = s.e, *e_r = e_reference();
    const Vectors<T> ratio = s.ratio;
    Sums<T> n_sum, pd;
    for (int64_t c = 0; c < channels_; ++c, n_sum.end_channel(c), pd.end_channel(c)) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> e = load<T>(e_y + i), d = e - ratio[v] * load<T>(e_r + i);
        n_sum.add(v, d * d);
        if constexpr (Backward) pd.add(v, e * d);
      }
    }
    n_sum.end(), pd.end();
    for (int v = 0; v < kVectors<T>; ++v) {
      s.n[v] = n_sum.all[v] * s.inverse_sum[v] * s.inverse_sum[v];
      s.pd[v] = pd.all[v] * s.inverse_sum[v] * s.inverse_sum[v];
    }
  }

  // Adds weight * dI/dX to `gradient` (or sets it, on the first draw) and weight * the bracket of dI/dR to the rows of the pull.
  __attribute__((noinline)) void gradient(const Modality<T>& s, T* gradient, bool first_draw, bool first) {
    const T *y = s.y, *e_y = s.e, *e_r = e_reference();
    T* pull = this->pull();
    const Vectors<T> top = s.top, log_sum = s.log_sum, pd = s.pd, ratio = s.ratio, inverse_sum = s.inverse_sum;
    Vectors<T> a, b;
    for (int v = 0; v < kVectors<T>; ++v) {
      s.coefficients(v, T(problem_.eps), a[v], b[v]);
      // sum_c q (-a d + b log p), with sum q d = sum p d - N
      const V<T> mean = -a[v] * (s.pd[v] - s.n[v]) - b[v] * s.cross_entropy[v];
      pull_mean_[v] = first ? mean : pull_mean_[v] + mean;
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> e = load<T>(e_y + i), d = (e - ratio[v] * load<T>(e_r + i)) * inverse_sum[v];
        V<T> own = a[v] * (e * inverse_sum[v]) * (d - pd[v]) - b[v] * d;
        V<T> bracket = b[v] * ((load<T>(y + i) - top[v]) - log_sum[v]) - a[v] * d;
        if (!first_draw) own += load<T>(gradient + i);
        if (!first) bracket += load<T>(pull + i);
        store<T>(gradient + i, own);
        store<T>(pull + i, bracket);
      }
  }

  // Adds J(q) pull / (active modalities) to every gradient and clears the pixels that do not count.
  __attribute__((noinline)) void finish_gradients(int active, const Valid<T>& valid) {
    const T inverse = problem_.detach_reference ? T(0) : T(1) / T(active);
    const T *e_r = e_reference(), *pull = this->pull();
    const Vectors<T> inverse_reference = inverse_reference_, pull_mean = pull_mean_;
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> bracket = load<T>(pull + i) - pull_mean[v];
        const V<T> shared = inverse == 0 ? V<T>{} : load<T>(e_r + i) * inverse_reference[v] * bracket * inverse;
        for (int m = 0; m < active; ++m) {
          T* row = gradients(m, active) + i;
          store<T>(row, select<T>(valid.lanes[v], load<T>(row) + shared, V<T>{}));
        }
      }
  }

  T* rows(int64_t i) { return scratch_ + i * channels_ * width; }
  T* e_reference() { return rows(0); }
  T* pull() { return rows(3); }

  const SoftmaxFisher& problem_;
  const int64_t channels_;
  T* scratch_;
  Vectors<T> sum_reference_, inverse_reference_, pull_mean_;
};

}  // namespace
}  // namespace MRF_ISA
}  // namespace mrf

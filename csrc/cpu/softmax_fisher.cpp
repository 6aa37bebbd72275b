// softmax_fisher on the CPU: per pixel, with R the mean over present modalities X_m,
//
//   q = softmax_c(R),  p_m = softmax_c(X_m + sigma_m noise),  f_m = -sum_c q_c log p_mc,  I_m = sum_c (p_mc - q_c)^2 / (f_m + eps)
//
// forward: the sum of I_m over the valid pixels and draws of a unit; backward, with d = p - q, N = sum d^2 and J the softmax Jacobian:
//
//   dI/dX_m = 2/(f+eps) J(p) d - N/(f+eps)^2 d        dI/dR = J(q) [ -2/(f+eps) d + N/(f+eps)^2 log p ]
//
// Memory: forward reads every feature once and writes one number per unit and modality; backward reads every feature once and writes
// every gradient once, around the caches. Noise is computed, not stored.
//
// Work: a unit is a tile of pixels of one sample at one scale, all channels and all present modalities; threads take units from a
// shared counter and each result has a place of its own, so any number of threads gives the same bits. A tile (about 256 KiB) fits L2
// and is prefetched there while the tile before it is computed. Within a tile, groups of two registers of floats are copied to scratch
// as rows (one channel of one modality; L1), where all passes over the channels run. Rows per group, forward: M C features, C of e_R,
// C of e_p; backward also M C gradients and C of the bracket in dI/dR.
#include "rows.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// Per-pixel statistics of one draw of one modality, two registers of pixels.
template <class T>
struct Statistics {
  V<T> inverse_sum[kVectors<T>];   // 1 / sum_c exp(y - top)
  V<T> log_sum[kVectors<T>];
  V<T> cross_entropy[kVectors<T>];
  V<T> n[kVectors<T>];             // sum_c d^2
  V<T> pd[kVectors<T>];            // sum_c p d
};

template <class T, bool Backward>
class Group {
 public:
  static constexpr int n = kLanes<T>, width = kGroup;

  Group(const SoftmaxFisher& problem, const Tiling& tiling, T* scratch, Prefetcher& prefetcher)
      : problem_(problem), channels_(tiling.channels), prefetcher_(prefetcher), scratch_(scratch) {}

  // Rows of scratch, each of all channels.
  T* features(int a) { return rows(4 + a); }
  T* gradients(int a, int active) { return rows(4 + active + a); }
  T* noisy() { return rows(2); }

  // q = e_R / sum e_R from the features of the active modalities.
  void reference(int active) {
    const T count = T(active), inverse = T(1) / count;
    const bool exact = (active & (active - 1)) == 0;  // a power of two has an exact inverse
    V<T> top[kVectors<T>];
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const T* row = features(0) + c * width + v * n;
        V<T> sum = load<T>(row);
        for (int a = 1; a < active; ++a) sum += load<T>(row + a * channels_ * width);
        const V<T> mean = exact ? sum * inverse : sum / count;
        top[v] = c == 0 ? mean : maximum<T>(mean, top[v]);
        store<T>(e_reference() + c * width + v * n, mean);
      }
    }
    V<T> sum[kVectors<T>] = {};
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        T* row = e_reference() + c * width + v * n;
        const V<T> e = exp<T>(load<T>(row) - top[v]);
        sum[v] += e;
        store<T>(row, e);
      }
    for (int v = 0; v < kVectors<T>; ++v) inverse_reference_[v] = T(1) / sum[v];
  }

  // y = x + sigma * noise in the row of noisy features, and its maximum. `k` is the tensor, `g0` the pixel (b, 0, p) as in the
  // definition of the noise: block index b * ceil(C / 4) * P + p.
  void add_noise(const T* x, double sigma, int k, int draw, int64_t g0, int64_t pixels, V<T> (&top)[kVectors<T>]) {
    constexpr int lanes = kLanes<float>;
    static_assert(width % lanes == 0, "a group is whole registers of words");
    for (int64_t c = 0; c < channels_; c += 4, g0 += pixels) {
      uint32_t words[4][width];
      T normals[4][width];
      for (int i = 0; i < width; i += lanes) {
        const uint64_t g = uint64_t(g0) + i;
        Words low = Words{} + uint32_t(g), lane;
        for (int j = 0; j < lanes; ++j) lane[j] = j;
        low += lane;
        const Words carry = low < uint32_t(g) ? Words{} + 1u : Words{};
        Words counter[4] = {low, carry + uint32_t(g >> 32), Words{} + uint32_t(k), Words{} + uint32_t(draw)};
        philox4x32(counter, uint32_t(problem_.seed), uint32_t(problem_.seed >> 32));
        for (int w = 0; w < 4; ++w) __builtin_memcpy(words[w] + i, &counter[w], sizeof counter[w]);
      }
      for (int i = 0; i < width; i += n) {
        box_muller<T>(words[0] + i, words[1] + i, normals[0] + i, normals[1] + i);
        box_muller<T>(words[2] + i, words[3] + i, normals[2] + i, normals[3] + i);
      }
      for (int64_t j = c; j < c + 4 && j < channels_; ++j)
        for (int v = 0; v < kVectors<T>; ++v) {
          const V<T> y = load<T>(x + j * width + v * n) + load<T>(normals[j - c] + v * n) * T(sigma);
          top[v] = j == 0 ? y : maximum<T>(y, top[v]);
          store<T>(noisy() + j * width + v * n, y);
        }
    }
  }

  // The statistics of logits y with maximum `top`; leaves exp(y - top) in e_p.
  // f = log sum - sum_c q_c (y_c - top): both terms are at least 0, so nothing cancels.
  void statistics(const T* y, const V<T> (&top)[kVectors<T>], Statistics<T>& s) {
    V<T> sum[kVectors<T>] = {}, distance[kVectors<T>] = {};
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> shifted = load<T>(y + i) - top[v];
        const V<T> e = exp<T>(shifted);
        sum[v] += e;
        distance[v] -= load<T>(e_reference() + i) * shifted;
        store<T>(e_p() + i, e);
      }
      prefetcher_.step();
    }
    for (int v = 0; v < kVectors<T>; ++v) {
      s.inverse_sum[v] = T(1) / sum[v];
      s.log_sum[v] = log<T>(sum[v]);
      s.cross_entropy[v] = s.log_sum[v] + distance[v] * inverse_reference_[v];
      s.n[v] = s.pd[v] = V<T>{};
    }
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> p = rounded<T>(load<T>(e_p() + i) * s.inverse_sum[v]);
        const V<T> d = p - rounded<T>(load<T>(e_reference() + i) * inverse_reference_[v]);
        s.n[v] += d * d;
        if constexpr (Backward) s.pd[v] += p * d;
      }
      prefetcher_.step();
    }
  }

  // Adds weight * dI/dX to `gradient` (or sets it, on the first draw) and weight * the bracket of dI/dR to the rows of the pull.
  void gradient(const T* y, const V<T> (&top)[kVectors<T>], const Statistics<T>& s, T weight, T* gradient, bool first_draw, bool first) {
    V<T> a[kVectors<T>], b[kVectors<T>], log_shift[kVectors<T>];
    for (int v = 0; v < kVectors<T>; ++v) {
      const V<T> inverse = T(1) / (s.cross_entropy[v] + T(problem_.eps));
      a[v] = inverse * (T(2) * weight);
      b[v] = s.n[v] * inverse * inverse * weight;
      log_shift[v] = top[v] + s.log_sum[v];
      // sum_c q (-a d + b log p), with sum q d = sum p d - N
      const V<T> mean = -a[v] * (s.pd[v] - s.n[v]) - b[v] * s.cross_entropy[v];
      pull_mean_[v] = first ? mean : pull_mean_[v] + mean;
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> p = rounded<T>(load<T>(e_p() + i) * s.inverse_sum[v]);
        const V<T> d = p - rounded<T>(load<T>(e_reference() + i) * inverse_reference_[v]);
        V<T> own = a[v] * p * (d - s.pd[v]) - b[v] * d;
        V<T> bracket = b[v] * (load<T>(y + i) - log_shift[v]) - a[v] * d;
        if (!first_draw) own += load<T>(gradient + i);
        if (!first) bracket += load<T>(pull() + i);
        store<T>(gradient + i, own);
        store<T>(pull() + i, bracket);
      }
  }

  // Adds J(q) pull / (active modalities) to every gradient and clears the pixels that do not count.
  void finish_gradients(int active, const Valid<T>& valid) {
    const T inverse = problem_.detach_reference ? T(0) : T(1) / T(active);
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> q = load<T>(e_reference() + i) * inverse_reference_[v];
        const V<T> shared = problem_.detach_reference ? V<T>{} : q * (load<T>(pull() + i) - pull_mean_[v]) * inverse;
        for (int m = 0; m < active; ++m) {
          T* row = gradients(m, active) + i;
          store<T>(row, select<T>(valid.lanes[v], load<T>(row) + shared, V<T>{}));
        }
      }
  }

 private:
  T* rows(int64_t i) { return scratch_ + i * channels_ * width; }
  T* e_reference() { return rows(0); }
  T* e_p() { return rows(1); }
  T* pull() { return rows(3); }

  const SoftmaxFisher& problem_;
  const int64_t channels_;
  Prefetcher& prefetcher_;
  T* scratch_;
  V<T> inverse_reference_[kVectors<T>], pull_mean_[kVectors<T>];
};

// The modalities that sample b has.
inline int active_modalities(const SoftmaxFisher& problem, int64_t sample, int* active) {
  int count = 0;
  for (int m = 0; m < problem.modalities; ++m)
    if (problem.present == nullptr || problem.present[sample * problem.modalities + m]) active[count++] = m;
  return count;
}

template <class T, bool Backward>
void run_unit(const SoftmaxFisher& problem, const Unit& unit, int64_t index, T* scratch, Prefetcher& prefetcher) {
  constexpr int width = kGroup;
  const Tiling& tiling = problem.tilings[unit.tiling];
  const int scale = unit.tiling;
  int active[kMaxModalities];
  const int count = active_modalities(problem, unit.sample, active);
  Group<T, Backward> group(problem, tiling, scratch, prefetcher);
  V<T> sums[kMaxModalities] = {};
  int64_t valid_count = 0;

  for (int64_t pixel = unit.begin; pixel < unit.end; pixel += width) {
    const int pixels = int(unit.end - pixel < width ? unit.end - pixel : width);
    const Valid<T> valid =
        valid_pixels<T>(tiling.mask ? tiling.mask + unit.sample * tiling.pixels + pixel : nullptr, pixels);
    valid_count += valid.count;
    if (valid.count > 0) {
      V<T> tops[kMaxModalities][kVectors<T>];
      for (int a = 0; a < count; ++a)
        gather<T>(tiling.dtype, problem.features[active[a] * problem.scales + scale], unit.sample, pixel, tiling.channels, pixels,
                  group.features(a), tops[a]);
      if (count > 0) group.reference(count);
      for (int a = 0; a < count; ++a) {
        const int m = active[a], k = m * problem.scales + scale;
        for (int draw = 0; draw < problem.draws; ++draw) {
          const T* y = group.features(a);
          V<T> top[kVectors<T>];
          __builtin_memcpy(top, tops[a], sizeof top);
          if (problem.sigma[m] > 0) {
            const int64_t g0 = unit.sample * ((tiling.channels + 3) / 4) * tiling.pixels + pixel;
            group.add_noise(y, problem.sigma[m], k, draw, g0, tiling.pixels, top);
            y = group.noisy();
          }
          Statistics<T> s;
          group.statistics(y, top, s);
          if constexpr (Backward) {
            const T weight = T(problem.weight[(m * problem.scales + scale) * problem.batch + unit.sample]);
            group.gradient(y, top, s, weight, group.gradients(a, count), draw == 0, a == 0 && draw == 0);
          } else {
            for (int v = 0; v < kVectors<T>; ++v)
              sums[m] += select<T>(valid.lanes[v], s.n[v] / (s.cross_entropy[v] + T(problem.eps)), V<T>{});
          }
        }
      }
    }
    if constexpr (Backward) {
      if (valid.count > 0 && count > 0) group.finish_gradients(count, valid);
      T* zeros = group.noisy();  // free by now; C rows
      if (valid.count == 0 || count < problem.modalities) __builtin_memset(zeros, 0, tiling.channels * width * sizeof(T));
      for (int m = 0, a = 0; m < problem.modalities; ++m) {
        const bool is_active = a < count && active[a] == m;
        const T* rows = is_active && valid.count > 0 ? group.gradients(a, count) : zeros;
        a += is_active;
        scatter<T>(tiling.dtype, problem.gradients[m * problem.scales + scale], unit.sample, pixel, tiling.channels, pixels, rows);
      }
    }
  }
  if constexpr (!Backward) {
    for (int m = 0; m < problem.modalities; ++m) problem.partial[index * problem.modalities + m] = sum_of_lanes<T>(sums[m]);
    problem.valid[index] = valid_count;
  }
}

template <bool Backward>
void run(const SoftmaxFisher& problem, int64_t* next_unit, void* scratch) {
  int64_t unit = __atomic_fetch_add(next_unit, 1, __ATOMIC_RELAXED);
  while (unit < problem.units) {
    const int64_t next = __atomic_fetch_add(next_unit, 1, __ATOMIC_RELAXED);
    const Unit here = locate(problem.tilings, problem.scales, unit);
    const Tiling& tiling = problem.tilings[here.tiling];
    Prefetcher prefetcher;
    if (next < problem.units) {
      const Unit there = locate(problem.tilings, problem.scales, next);
      const Tiling& ahead = problem.tilings[there.tiling];
      int active[kMaxModalities];
      const int count = active_modalities(problem, there.sample, active);
      for (int a = 0; a < count; ++a)
        prefetcher.add(ahead.dtype, problem.features[active[a] * problem.scales + there.tiling], there, ahead.channels);
      const int64_t groups = (here.end - here.begin) / kGroup;
      prefetcher.plan(groups * tiling.channels * problem.modalities * problem.draws * 2);
    }
    if (tiling.dtype == DType::float64)
      run_unit<double, Backward>(problem, here, unit, (double*)scratch, prefetcher);
    else
      run_unit<float, Backward>(problem, here, unit, (float*)scratch, prefetcher);
    unit = next;
  }
  if constexpr (Backward) finish_streams();
}

}  // namespace

extern const Kernel<SoftmaxFisher> softmax_fisher_forward = run<false>, softmax_fisher_backward = run<true>;

}  // namespace MRF_ISA
}  // namespace mrf

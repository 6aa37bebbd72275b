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
// as rows (one channel of one modality; L1), where all passes over the channels run. Rows per group: C of e_R, C of e_p, C of noisy features, C of
// the bracket in dI/dR, M C features, M C gradients (or the exponentials of a pair of modalities).
#include "rows.h"

namespace mrf {
namespace MRF_ISA {
namespace {

// One draw of one modality: its rows of logits and of exponentials, and per pixel the statistics over the channels.
template <class T>
struct Draw {
  const T* y;
  T* e;                    // exp(y - top)
  Vectors<T> top;          // max_c y
  Vectors<T> inverse_sum;  // 1 / sum_c e
  Vectors<T> log_sum;
  Vectors<T> cross_entropy;
  Vectors<T> n;            // sum_c d^2
  Vectors<T> pd;           // sum_c p d, backward only
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
  __attribute__((noinline)) void reference(int active) {
    const T count = T(active), inverse = T(1) / count;
    const bool exact = (active & (active - 1)) == 0;  // a power of two has an exact inverse
    const T* x = features(0);
    T* e_r = e_reference();
    Vectors<T> top, sum;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const T* row = x + c * width + v * n;
        V<T> total = load<T>(row);
        for (int a = 1; a < active; ++a) total += load<T>(row + a * channels_ * width);
        const V<T> mean = exact ? total * inverse : total / count;
        top[v] = c == 0 ? mean : maximum<T>(mean, top[v]);
        store<T>(e_r + c * width + v * n, mean);
      }
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        T* row = e_r + c * width + v * n;
        const V<T> e = exp<T>(load<T>(row) - top[v]);
        sum[v] += e;
        store<T>(row, e);
      }
    for (int v = 0; v < kVectors<T>; ++v) inverse_reference_[v] = T(1) / sum[v];
  }

  // y = x + sigma * noise in the row of noisy features, and its maximum. `k` is the tensor, `g0` the pixel (b, 0, p) as in the
  // definition of the noise: block index b * ceil(C / 4) * P + p.
  void add_noise(const T* x, double sigma, int k, int draw, int64_t g0, int64_t pixels, Vectors<T>& top) {
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

  // The exponentials of a draw, after reference(). f = log sum + sum_c q_c (top - y_c): both terms are at least 0, nothing cancels.
  __attribute__((noinline)) void exponentials(Draw<T>& s) {
    s.e = rows(1);
    const T *y = s.y, *e_r = e_reference();
    T* e_y = s.e;
    const Vectors<T> top = s.top;
    Vectors<T> sum, distance;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> shifted = load<T>(y + i) - top[v];
        const V<T> e = exp<T>(shifted);
        sum[v] += e;
        distance[v] -= load<T>(e_r + i) * shifted;
        store<T>(e_y + i, e);
      }
      prefetcher_.step();
    }
    for (int v = 0; v < kVectors<T>; ++v) normalize(s, v, sum[v], distance[v]);
  }

  // The exponentials of two modalities without noise and of their mean, from two exponentials instead of three:
  // with h = exp((y - top) / 2), e = h^2 and e_R = h_0 h_1 up to a factor per pixel. False where a valid pixel needs reference() and
  // exponentials() instead: the modalities disagree so widely that the largest e_R comes near underflow, or they agree so confidently
  // that f is near 0 and magnifies the last bit of q, which that factor costs.
  __attribute__((noinline)) bool exponentials_of_pair(Draw<T>& s0, Draw<T>& s1, const Valid<T>& valid) {
    s0.e = gradients(0, 2);
    s1.e = gradients(1, 2);
    const T *y0 = s0.y, *y1 = s1.y;
    T *e_0 = s0.e, *e_1 = s1.e, *e_r = e_reference();
    const Vectors<T> top0 = s0.top, top1 = s1.top;
    Vectors<T> sum0, sum1, sum, distance0, distance1;
    bool exact = true;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> shifted0 = load<T>(y0 + i) - top0[v], shifted1 = load<T>(y1 + i) - top1[v];
        const V<T> h0 = exp<T>(shifted0 * T(0.5)), h1 = exp<T>(shifted1 * T(0.5));
        const V<T> e0 = h0 * h0, e1 = h1 * h1, e = h0 * h1;
        sum0[v] += e0, sum1[v] += e1, sum[v] += e;
        distance0[v] -= e * shifted0, distance1[v] -= e * shifted1;
        store<T>(e_r + i, e);
        store<T>(e_0 + i, e0);
        store<T>(e_1 + i, e1);
      }
      prefetcher_.step();
      prefetcher_.step();
    }
    for (int v = 0; v < kVectors<T>; ++v) {
      inverse_reference_[v] = T(1) / sum[v];
      normalize(s0, v, sum0[v], distance0[v]);
      normalize(s1, v, sum1[v], distance1[v]);
      const I<T> tiny = sum[v] < T(1e-20), confident = (s0.cross_entropy[v] < T(0.0625)) | (s1.cross_entropy[v] < T(0.0625));
      exact = exact && all_lanes<T>(~valid.lanes[v] | ~(tiny | confident));
    }
    return exact;
  }

  // The sums of d^2 and p d. Equal modalities give d = 0 exactly.
  __attribute__((noinline)) void moments(Draw<T>& s) {
    const Probabilities probabilities(*this, s);
    Vectors<T> n_sum, pd;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const V<T> p = probabilities.p(c, v), d = p - probabilities.q(c, v);
        n_sum[v] += d * d;
        if constexpr (Backward) pd[v] += p * d;
      }
      prefetcher_.step();
    }
    s.n = n_sum;
    s.pd = pd;
  }

  // Adds weight * dI/dX to `gradient` (or sets it, on the first draw) and weight * the bracket of dI/dR to the rows of the pull.
  __attribute__((noinline)) void gradient(const Draw<T>& s, T weight, T* gradient, bool first_draw, bool first) {
    const Probabilities probabilities(*this, s);
    const T* y = s.y;
    T* pull = this->pull();
    const Vectors<T> top = s.top, log_sum = s.log_sum, pd = s.pd;
    Vectors<T> a, b;
    for (int v = 0; v < kVectors<T>; ++v) {
      const V<T> inverse = T(1) / (s.cross_entropy[v] + T(problem_.eps));
      a[v] = inverse * (T(2) * weight);
      b[v] = s.n[v] * inverse * inverse * weight;
      // sum_c q (-a d + b log p), with sum q d = sum p d - N
      const V<T> mean = -a[v] * (s.pd[v] - s.n[v]) - b[v] * s.cross_entropy[v];
      pull_mean_[v] = first ? mean : pull_mean_[v] + mean;
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> p = probabilities.p(c, v), d = p - probabilities.q(c, v);
        V<T> own = a[v] * p * (d - pd[v]) - b[v] * d;
        V<T> bracket = b[v] * ((load<T>(y + i) - top[v]) - log_sum[v]) - a[v] * d;
        if (!first_draw) own += load<T>(gradient + i);
        if (!first) bracket += load<T>(pull + i);
        store<T>(gradient + i, own);  // may be the row of e, which is read by now
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

 private:
  T* rows(int64_t i) { return scratch_ + i * channels_ * width; }
  T* e_reference() { return rows(0); }
  T* pull() { return rows(3); }

  void normalize(Draw<T>& s, int v, V<T> sum, V<T> distance) {
    s.inverse_sum[v] = T(1) / sum;
    s.log_sum[v] = log<T>(sum);
    s.cross_entropy[v] = s.log_sum[v] + distance * inverse_reference_[v];
  }

  // p of a draw and q, from the rows of exponentials.
  struct Probabilities {
    const T *e, *e_r;
    const Vectors<T> inverse, inverse_reference;
    MRF_INLINE Probabilities(Group& group, const Draw<T>& s)
        : e(s.e), e_r(group.e_reference()), inverse(s.inverse_sum), inverse_reference(group.inverse_reference_) {}
    MRF_INLINE V<T> p(int64_t c, int v) const { return rounded<T>(load<T>(e + c * width + v * n) * inverse[v]); }
    MRF_INLINE V<T> q(int64_t c, int v) const { return rounded<T>(load<T>(e_r + c * width + v * n) * inverse_reference[v]); }
  };

  const SoftmaxFisher& problem_;
  const int64_t channels_;
  Prefetcher& prefetcher_;
  T* scratch_;
  Vectors<T> inverse_reference_, pull_mean_;
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
  bool noisy = false;
  for (int a = 0; a < count; ++a) noisy = noisy || problem.sigma[active[a]] > 0;
  Draw<T> draws[kMaxModalities];
  V<T> sums[kMaxModalities] = {};
  int64_t valid_count = 0;

  for (int64_t pixel = unit.begin; pixel < unit.end; pixel += width) {
    const int pixels = int(unit.end - pixel < width ? unit.end - pixel : width);
    const Valid<T> valid =
        valid_pixels<T>(tiling.mask ? tiling.mask + unit.sample * tiling.pixels + pixel : nullptr, pixels);
    valid_count += valid.count;
    if (valid.count > 0) {
      for (int a = 0; a < count; ++a) {
        draws[a].y = group.features(a);
        gather<T>(tiling.dtype, problem.features[active[a] * problem.scales + scale], unit.sample, pixel, tiling.channels, pixels,
                  group.features(a), draws[a].top);
      }
      const bool pair = count == 2 && !noisy && group.exponentials_of_pair(draws[0], draws[1], valid);
      if (!pair && count > 0) group.reference(count);
      for (int a = 0; a < count; ++a) {
        const int m = active[a], k = m * problem.scales + scale;
        const int different = problem.sigma[m] > 0 ? problem.draws : 1;  // without noise every draw is the same
        const T repeats = T(problem.draws / different);
        Draw<T>& s = draws[a];
        for (int draw = 0; draw < different; ++draw) {
          if (problem.sigma[m] > 0) {
            const int64_t g0 = unit.sample * ((tiling.channels + 3) / 4) * tiling.pixels + pixel;
            group.add_noise(group.features(a), problem.sigma[m], k, draw, g0, tiling.pixels, s.top);
            s.y = group.noisy();
          }
          if (!pair) group.exponentials(s);
          group.moments(s);
          if constexpr (Backward) {
            const T weight = T(problem.weight[k * problem.batch + unit.sample]) * repeats;
            group.gradient(s, weight, group.gradients(a, count), draw == 0, a == 0 && draw == 0);
          } else {
            for (int v = 0; v < kVectors<T>; ++v)
              sums[m] += select<T>(valid.lanes[v], repeats * s.n[v] / (s.cross_entropy[v] + T(problem.eps)), V<T>{});
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

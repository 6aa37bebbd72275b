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
// and is prefetched there by the passes of the exponentials over the tile before it: only there, because the copying to scratch that
// comes later needs the same few buffers between the caches. Within a tile, groups of two registers of floats are copied to scratch
// as rows (one channel of one modality; L1), where all passes over the channels run. Rows of each channel: e_R, e_p, noisy features, the
// bracket in dI/dR, M features, M gradients (or the exponentials of a pair of modalities).
#include "rows.h"

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
  Vectors<T> top;          // max_c y
  Vectors<T> inverse_sum;  // 1 / sum_c e
  Vectors<T> ratio;        // sum_c e / sum_c e_R: d = (e - ratio e_R) inverse_sum, exactly 0 where the modality equals the mean
  Vectors<T> log_sum;
  Vectors<T> cross_entropy;
  Vectors<T> n;            // sum_c d^2
  Vectors<T> pd;           // sum_c p d, backward only
  Vectors<T> weight;       // of I in the objective, backward only
  Vectors<T> information;  // sum of I over groups and draws, forward only
};
static_assert(sizeof(Modality<float>) <= kModalityBytes && sizeof(Modality<double>) <= kModalityBytes, "scratch is large enough");

// The index of the block of noise (docs/math.md) of the first lane and the first four channels, and the steps to the next lane and to
// the next four channels.
struct NoiseBlocks {
  int64_t first, lane_step, channel_step;
};

template <class T, bool Backward>
class Group {
 public:
  static constexpr int n = kLanes<T>, width = kGroup;
  static constexpr T log2_e = T(1.44269504088896340736), ln_2 = T(0.693147180559945309417);

  Group(const SoftmaxFisher& problem, const Tiling& tiling, T* scratch, Prefetcher& prefetcher)
      : problem_(problem), channels_(tiling.channels), prefetcher_(prefetcher), scratch_(scratch) {}

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
        if (s.sigma > 0) add_noise(features(a), s, draw, blocks);
        exponentials(s);
        moments(s);
        if constexpr (Backward)
          gradient(s, gradients(a, count), draw == 0, a == 0 && draw == 0);
        else
          add_information(s, valid);
      }
    }
    if constexpr (Backward) finish_gradients(count, valid);
  }

  // The same for two modalities without noise, which need two exponentials, not three: with h_m = exp((x_m - top_m) / 2), e_m = h_m^2,
  // and e_R = h_0 h_1 up to a factor per pixel, which cancels in q. False, with nothing done, where a valid pixel needs any_number().
  bool pair(Modality<T>* modalities, const Valid<T>& valid) {
    if (!pair_moments(modalities, valid)) return false;
    if constexpr (Backward)
      pair_gradients(modalities, valid);
    else
      for (int a = 0; a < 2; ++a) add_information(modalities[a], valid);
    return true;
  }

 private:
  // e_R and 1 / sum e_R from the features of the active modalities.
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
        const V<T> e = exp2<T>((load<T>(row) - top[v]) * log2_e);
        sum[v] += e;
        store<T>(row, e);
      }
    for (int v = 0; v < kVectors<T>; ++v) inverse_reference_[v] = T(1) / sum[v];
    sum_reference_ = sum;
  }

  // y = x + sigma * noise in the rows of noisy features, and its maximum.
  void add_noise(const T* x, Modality<T>& s, int draw, const NoiseBlocks& blocks) {
    T* y = noisy();
    constexpr int lanes = kLanes<float>;
    static_assert(width % lanes == 0, "a group is whole registers of words");
    for (int64_t c = 0; c < channels_; c += 4) {
      uint32_t words[4][width];
      T normals[4][width];
      for (int i = 0; i < width; i += lanes) {
        Words low, high;
        for (int j = 0; j < lanes; ++j) {
          const uint64_t g = uint64_t(blocks.first + (i + j) * blocks.lane_step + c / 4 * blocks.channel_step);
          low[j] = uint32_t(g), high[j] = uint32_t(g >> 32);
        }
        Words counter[4] = {low, high, Words{} + uint32_t(s.tensor), Words{} + uint32_t(draw)};
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
    Vectors<T> sum, distance;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> shifted = load<T>(y + i) - top[v];
        const V<T> e = exp2<T>(shifted * log2_e);
        sum[v] += e;
        distance[v] -= load<T>(e_r + i) * shifted;
        store<T>(e_y + i, e);
      }
      prefetcher_.step();
    }
    s.e = e_y;
    for (int v = 0; v < kVectors<T>; ++v) {
      s.inverse_sum[v] = T(1) / sum[v];
      s.ratio[v] = sum[v] / sum_reference_[v];
      s.log_sum[v] = log<T>(sum[v]);
      s.cross_entropy[v] = s.log_sum[v] + distance[v] * inverse_reference_[v];
    }
  }

  // The sums of d^2 and p d.
  __attribute__((noinline)) void moments(Modality<T>& s) {
    const T *e_y = s.e, *e_r = e_reference();
    const Vectors<T> ratio = s.ratio;
    Vectors<T> n_sum, pd;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> e = load<T>(e_y + i), d = e - ratio[v] * load<T>(e_r + i);
        n_sum[v] += d * d;
        if constexpr (Backward) pd[v] += e * d;
      }
    }
    for (int v = 0; v < kVectors<T>; ++v) {
      s.n[v] = n_sum[v] * s.inverse_sum[v] * s.inverse_sum[v];
      s.pd[v] = pd[v] * s.inverse_sum[v] * s.inverse_sum[v];
    }
  }

  MRF_INLINE void add_information(Modality<T>& s, const Valid<T>& valid) {
    for (int v = 0; v < kVectors<T>; ++v)
      s.information[v] += select<T>(valid.lanes[v], s.repeats * s.n[v] / (s.cross_entropy[v] + T(problem_.eps)), V<T>{});
  }

  // Adds weight * dI/dX to `gradient` (or sets it, on the first draw) and weight * the bracket of dI/dR to the rows of the pull.
  __attribute__((noinline)) void gradient(const Modality<T>& s, T* gradient, bool first_draw, bool first) {
    const T *y = s.y, *e_y = s.e, *e_r = e_reference();
    T* pull = this->pull();
    const Vectors<T> top = s.top, log_sum = s.log_sum, pd = s.pd, ratio = s.ratio, inverse_sum = s.inverse_sum;
    Vectors<T> a, b;
    for (int v = 0; v < kVectors<T>; ++v) {
      weights_of(s, v, a[v], b[v]);
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

  // Fills n, cross_entropy and pd of both; false where the modalities of a valid pixel disagree so widely that the largest e_R comes
  // near underflow; where they agree so confidently that f is near 0 and magnifies the last bit of q; or where the logits are so large
  // that their offset, rounded before it is subtracted, moves the exponents.
  __attribute__((noinline)) bool pair_moments(Modality<T>* s, const Valid<T>& valid) {
    const T* const x[2] = {features(0), features(1)};
    T* const h[2] = {gradients(0, 2), gradients(1, 2)};
    Vectors<T> shift[2], sum[2], distance[2], sum_r;
    for (int m = 0; m < 2; ++m)
      for (int v = 0; v < kVectors<T>; ++v) shift[m][v] = s[m].top[v] * (log2_e / 2);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> t0 = fused<T>(load<T>(x[0] + i), broadcast(log2_e / 2), -shift[0][v]), h0 = exp2<T>(t0);
        const V<T> t1 = fused<T>(load<T>(x[1] + i), broadcast(log2_e / 2), -shift[1][v]), h1 = exp2<T>(t1);
        const V<T> e_r = h0 * h1;
        sum[0][v] = fused<T>(h0, h0, sum[0][v]);
        sum[1][v] = fused<T>(h1, h1, sum[1][v]);
        sum_r[v] = fused<T>(h0, h1, sum_r[v]);
        distance[0][v] -= e_r * t0;
        distance[1][v] -= e_r * t1;
        store<T>(h[0] + i, h0);
        store<T>(h[1] + i, h1);
      }
      prefetcher_.step();
      prefetcher_.step();
    }
    bool exact = true;
    for (int v = 0; v < kVectors<T>; ++v) {
      inverse_reference_[v] = T(1) / sum_r[v];
      I<T> hard = sum_r[v] < T(1e-20);
      for (int m = 0; m < 2; ++m) {
        s[m].inverse_sum[v] = T(1) / sum[m][v];
        s[m].ratio[v] = sum[m][v] / sum_r[v];
        s[m].log_sum[v] = log<T>(sum[m][v]);
        s[m].cross_entropy[v] = s[m].log_sum[v] + distance[m][v] * inverse_reference_[v] * (2 * ln_2);
        hard |= (s[m].cross_entropy[v] < T(0.0625)) | (shift[m][v] * shift[m][v] > T(0x1p40));
      }
      exact = exact && all_lanes<T>(~valid.lanes[v] | ~hard);
    }
    if (!exact) return false;

    const Vectors<T> ratio[2] = {s[0].ratio, s[1].ratio};
    Vectors<T> n_sum[2], pd[2];
    for (int64_t c = 0; c < channels_; ++c) {
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> h0 = load<T>(h[0] + i), h1 = load<T>(h[1] + i);
        const V<T> d0 = h0 * (h0 - ratio[0][v] * h1), d1 = h1 * (h1 - ratio[1][v] * h0);
        n_sum[0][v] += d0 * d0;
        n_sum[1][v] += d1 * d1;
        if constexpr (Backward) pd[0][v] += h0 * h0 * d0, pd[1][v] += h1 * h1 * d1;
      }
    }
    for (int m = 0; m < 2; ++m)
      for (int v = 0; v < kVectors<T>; ++v) {
        s[m].n[v] = n_sum[m][v] * s[m].inverse_sum[v] * s[m].inverse_sum[v];
        s[m].pd[v] = pd[m][v] * s[m].inverse_sum[v] * s[m].inverse_sum[v];
      }
    return true;
  }

  // The gradients of both modalities after pair_moments(), in the rows of their h.
  __attribute__((noinline)) void pair_gradients(const Modality<T>* s, const Valid<T>& valid) {
    const T* const x[2] = {features(0), features(1)};
    T* const h[2] = {gradients(0, 2), gradients(1, 2)};
    const T half = problem_.detach_reference ? T(0) : T(0.5);
    // dI/dX = (a p / sum) (d - pd) - b d;  bracket = sum over both of slope t - a d, + offset, with b log p = slope t - b log_sum
    Vectors<T> shift[2], a[2], ap[2], b[2], slope[2], pd[2], ratio[2], inverse[2], offset, share;
    for (int v = 0; v < kVectors<T>; ++v) {
      share[v] = inverse_reference_[v] * half;
      for (int m = 0; m < 2; ++m) {
        weights_of(s[m], v, a[m][v], b[m][v]);
        inverse[m][v] = s[m].inverse_sum[v], ratio[m][v] = s[m].ratio[v], pd[m][v] = s[m].pd[v];
        shift[m][v] = s[m].top[v] * (log2_e / 2);
        ap[m][v] = a[m][v] * inverse[m][v];
        slope[m][v] = b[m][v] * (2 * ln_2);
        offset[v] += a[m][v] * (pd[m][v] - s[m].n[v]) + b[m][v] * (s[m].cross_entropy[v] - s[m].log_sum[v]);
      }
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int v = 0; v < kVectors<T>; ++v) {
        const int64_t i = c * width + v * n;
        const V<T> h0 = load<T>(h[0] + i), t0 = fused<T>(load<T>(x[0] + i), broadcast(log2_e / 2), -shift[0][v]);
        const V<T> h1 = load<T>(h[1] + i), t1 = fused<T>(load<T>(x[1] + i), broadcast(log2_e / 2), -shift[1][v]);
        const V<T> d0 = h0 * (h0 - ratio[0][v] * h1) * inverse[0][v], d1 = h1 * (h1 - ratio[1][v] * h0) * inverse[1][v];
        const V<T> bracket = offset[v] + slope[0][v] * t0 - a[0][v] * d0 + slope[1][v] * t1 - a[1][v] * d1;
        const V<T> shared = h0 * h1 * share[v] * bracket;
        const V<T> g0 = h0 * h0 * ap[0][v] * (d0 - pd[0][v]) - b[0][v] * d0 + shared;
        const V<T> g1 = h1 * h1 * ap[1][v] * (d1 - pd[1][v]) - b[1][v] * d1 + shared;
        store<T>(h[0] + i, select<T>(valid.lanes[v], g0, V<T>{}));
        store<T>(h[1] + i, select<T>(valid.lanes[v], g1, V<T>{}));
      }
  }

  T* rows(int64_t i) { return scratch_ + i * channels_ * width; }
  T* e_reference() { return rows(0); }
  T* pull() { return rows(3); }

  // a = 2 weight / (f + eps), b = weight N / (f + eps)^2
  MRF_INLINE void weights_of(const Modality<T>& s, int v, V<T>& a, V<T>& b) {
    const V<T> inverse = T(1) / (s.cross_entropy[v] + T(problem_.eps));
    a = inverse * s.weight[v] * T(2);
    b = s.n[v] * inverse * inverse * s.weight[v];
  }

  const SoftmaxFisher& problem_;
  const int64_t channels_;
  Prefetcher& prefetcher_;
  T* scratch_;
  Vectors<T> sum_reference_, inverse_reference_, pull_mean_;
};

// The modalities that sample b has.
inline int active_modalities(const SoftmaxFisher& problem, int64_t sample, int* active) {
  int count = 0;
  for (int m = 0; m < problem.modalities; ++m)
    if (problem.present == nullptr || problem.present[sample * problem.modalities + m]) active[count++] = m;
  return count;
}

template <class T, bool Backward>
void run_unit(const SoftmaxFisher& problem, const Unit& unit, char* scratch, Prefetcher& prefetcher) {
  constexpr int width = kGroup;
  const Tiling& tiling = problem.tilings[unit.tiling];
  const int64_t channels = tiling.channels, blocks = (channels + 3) / 4;
  int active[kMaxModalities];
  const int count = active_modalities(problem, unit.sample, active);
  Modality<T>* modalities = (Modality<T>*)scratch;
  Group<T, Backward> group(problem, tiling, (T*)(scratch + problem.modalities * kModalityBytes), prefetcher);
  bool pair = count == 2;
  for (int a = 0; a < count; ++a) {
    Modality<T>& s = modalities[a];
    s.tensor = active[a] * problem.scales + unit.tiling;
    s.sigma = problem.sigma[active[a]];
    s.repeats = s.sigma > 0 ? 1 : T(problem.draws);  // without noise every draw is the same
    s.information = {};
    pair = pair && s.sigma == 0;
  }
  int64_t slot = tiling.first_slot + (tiling.samples_as_pixels ? unit.begin : unit.sample * tiling.tiles + unit.begin / tiling.tile);
  int64_t valid_pixels_of_unit = 0;

  for (int64_t pixel = unit.begin; pixel < unit.end; pixel += width) {
    const int pixels = int(unit.end - pixel < width ? unit.end - pixel : width);
    const Valid<T> valid = valid_pixels<T>(tiling.mask ? tiling.mask + unit.sample * tiling.pixels + pixel : nullptr, pixels);
    valid_pixels_of_unit += valid.count;
    const bool computes = valid.count > 0 && count > 0;
    if (computes) {
      for (int a = 0; a < count; ++a) {
        Modality<T>& s = modalities[a];
        s.y = group.features(a);
        gather<T>(tiling.dtype, problem.features[s.tensor], unit.sample, pixel, channels, pixels, group.features(a), s.top);
        if constexpr (Backward) {
          const double* weight = problem.weight + s.tensor * problem.batch;
          T lanes[width];
          for (int i = 0; i < width; ++i)
            lanes[i] = s.repeats * T(tiling.samples_as_pixels ? (i < pixels ? weight[pixel + i] : 0) : weight[unit.sample]);
          for (int v = 0; v < kVectors<T>; ++v) s.weight[v] = load<T>(lanes + v * kLanes<T>);
        }
      }
      if (!pair || !group.pair(modalities, valid)) {
        const int64_t lane_step = tiling.samples_as_pixels ? blocks : 1, block_step = tiling.samples_as_pixels ? 1 : tiling.pixels;
        group.any_number(modalities, count, valid, {unit.sample * blocks * tiling.pixels + pixel * lane_step, lane_step, block_step});
      }
    }
    if constexpr (Backward) {
      T* zeros = group.noisy();  // free by now; C rows
      if (!computes || count < problem.modalities) __builtin_memset(zeros, 0, channels * width * sizeof(T));
      for (int m = 0, a = 0; m < problem.modalities; ++m) {
        const bool is_active = a < count && active[a] == m;
        const T* rows = is_active && computes ? group.gradients(a, count) : zeros;
        a += is_active;
        scatter<T>(tiling.dtype, problem.gradients[m * problem.scales + unit.tiling], unit.sample, pixel, channels, pixels, rows);
      }
    } else if (tiling.samples_as_pixels) {
      for (int i = 0; i < pixels; ++i, ++slot) {
        problem.valid[slot] = valid.lanes[i / kLanes<T>][i % kLanes<T>] != 0;
        for (int a = 0; a < count; ++a)
          problem.partial[slot * problem.modalities + a] = modalities[a].information[i / kLanes<T>][i % kLanes<T>];
      }
      for (int a = 0; a < count; ++a) modalities[a].information = {};
    }
  }
  if (!Backward && !tiling.samples_as_pixels) {
    for (int a = 0; a < count; ++a) {
      V<T> sum = modalities[a].information[0];
      for (int v = 1; v < kVectors<T>; ++v) sum += modalities[a].information[v];
      problem.partial[slot * problem.modalities + active[a]] = sum_of_lanes<T>(sum);
    }
    problem.valid[slot] = valid_pixels_of_unit;
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
      prefetcher.plan(groups * tiling.channels * problem.modalities * problem.draws);
    }
    if (tiling.dtype == DType::float64)
      run_unit<double, Backward>(problem, here, (char*)scratch, prefetcher);
    else
      run_unit<float, Backward>(problem, here, (char*)scratch, prefetcher);
    unit = next;
  }
  if constexpr (Backward) finish_streams();
}

}  // namespace

extern const Kernel<SoftmaxFisher> softmax_fisher_forward = run<false>, softmax_fisher_backward = run<true>;

}  // namespace MRF_ISA
}  // namespace mrf

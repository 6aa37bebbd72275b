// softmax_fisher on a CUDA GPU where tiles of warps do not do (softmax_fisher.cu): with noise, in float64, and for more than four
// modalities, or of different layouts. Per pixel, with R the mean over present modalities X_m,
//
//   q = softmax_c(R),  p_m = softmax_c(X_m + sigma_m noise),  f_m = -sum_c q_c log p_mc,  I_m = sum_c (p_mc - q_c)^2 / (f_m + eps)
//
// forward: the mean of I_m over valid pixels and draws; backward, with d = p - q, N = sum d^2 and J the softmax Jacobian:
//
//   dI/dX_m = 2/(f+eps) J(p) d - N/(f+eps)^2 d        dI/dR = J(q) [ -2/(f+eps) d + N/(f+eps)^2 log p ]
//
// Memory: forward reads every feature once and writes one number per block and modality, which the last block of each scale and sample
// adds up; backward reads every feature once and writes every gradient once. Noise is computed, not stored.
//
// Work: a block takes tiles of pixels of one sample at one scale, all channels of all present modalities, into shared memory (tile.h);
// one launch covers all scales. Of its pixel a thread keeps up to 16 channels in registers, 8 in the backward pass (half of that in
// float64): the exponentials of R, those of one modality and draw, and the gradients that add up. So each feature is read from shared memory
// twice, once for R; gradients replace the features there. A softmax takes the exact maximum, and one exponential for each channel.
//
// Sizes: call.h. A pixel gets as many threads as its channels need, up to the whole block. A tile has as many pixels as fill 160 bytes of
// shared memory for each of 64 threads: then 1024 threads fit a multiprocessor of an A100. It has at least two 32-byte sectors of every
// channel, with more threads where that takes more memory. Where it is too large, a tile has fewer pixels, and the rest of a sector comes
// from L2 when the next block asks for it; a single pixel must fit.
#include "launch.h"
#include "philox.h"
#include "softmax_fisher_results.h"

namespace mrf {
namespace cuda {
namespace {

// What stands for a channel that is not there: its exponential is 0, and so is its part of any sum.
template <class T>
constexpr T kAbsent = T(-1e38);

// Bit m: whether the sample has modality m.
__device__ inline uint64_t held_by(const SoftmaxFisher& call, int64_t sample) {
  uint64_t held = 0;
#pragma unroll 1
  for (int m = 0; m < call.modalities; ++m)
    held |= uint64_t(call.present == nullptr || call.present[sample * call.modalities + m]) << m;
  return held;
}

// The part of one pixel that a thread has: every lanes-th quad, `Quads` of them.
template <class T, bool Backward, bool Noisy, int Quads>
struct Pixel {
  static constexpr int n = 4 * Quads;
  const SoftmaxFisher& call;
  const Tile& tile;
  const int plane;
  Team<T>& team;
  const int64_t& first_noise;  // the number of a tile's first block of noise, in shared memory
  T* features;  // its first quad of modality 0, in shared memory
  int scale, p;
  uint64_t held;
  bool counts;
  T* rows;          // of the warps: sums of I by modality, and pixels

  __device__ T* place_of(int m, int k) const { return features + m * plane + k * (4 * team.lanes); }
  __device__ void load(int m, T (&x)[n]) const {
#pragma unroll
    for (int k = 0; k < Quads; ++k) {
      const Quad<T> quad = load_quad(place_of(m, k));
      for (int i = 0; i < 4; ++i) x[4 * k + i] = quad.at[i];
    }
  }
  __device__ void store(int m, const T (&x)[n]) const {
#pragma unroll
    for (int k = 0; k < Quads; ++k)
      store_quad(place_of(m, k), Quad<T>{x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]});
  }
  __device__ T largest(const T (&x)[n]) const {
    T top = x[0];
    for (int i = 1; i < n; ++i) top = maximum(top, x[i]);
    top = team.largest(top);
    return top > kAbsent<T> / 2 ? top : T(NAN);  // NaN too where all channels are -inf, so that one that is not there would be the highest
  }
  __device__ void add_noise(int m, int draw, T (&x)[n]) const {
    const int64_t tensor = m * call.all_scales + call.first_scale + scale, pixels = call.tilings[scale].pixels;
    const T sigma = T(call.sigma[m]);
#pragma unroll
    for (int k = 0; k < Quads; ++k) {
      const Quad<T> noise = normals<T>(*call.seed, first_noise + ((thread_number() & (team.lanes - 1)) + k * team.lanes) * pixels + p, tensor, draw);
      for (int i = 0; i < 4; ++i) x[4 * k + i] += sigma * noise.at[i];
    }
  }

  __device__ void run() const {
    // Neither `first` nor, in float64, the shares are kept from pixel to pixel: no registers are left for them.
    const int modalities_held = sizeof(T) == 8 ? recomputed(__popcll(held)) : __popcll(held);
    int first = recomputed(0);
    while (!(held >> first & 1)) ++first;
    // r = exp(R - max R), from the sum over modalities; q = inverse_r r
    T r[n], sum_r = 0;
    load(first, r);
#pragma unroll 1
    for (int m = first + 1; m < call.modalities; ++m) {
      if (!(held >> m & 1)) continue;
      T x[n];
      load(m, x);
      for (int i = 0; i < n; ++i) r[i] += x[i];
    }
    const T top_r = largest(r), scale_r = kLog2E<T> / T(modalities_held);
    for (int i = 0; i < n; ++i) r[i] = exp2_of((r[i] - top_r) * scale_r), sum_r += r[i];
    team.sum(sum_r);
    const T inverse_r = reciprocal(sum_r);

    T pull[n] = {}, pull_mean = 0;  // the bracket in dI/dR summed over modalities and draws, and its mean by q
#pragma unroll 1
    for (int m = 0; m < call.modalities; ++m) {
      if (!(held >> m & 1)) continue;
      const bool noise = Noisy && call.sigma[m] > 0;
      const T repeats = T(noise ? 1 : call.draws);  // without noise every draw is the same
      T information = 0, own[n] = {};               // own: dI/dX_m but for what comes through R
#pragma unroll 1
      for (int draw = 0; draw < (noise ? call.draws : 1); ++draw) {
        T y[n], e[n];  // y - max y and its exponential; p = inverse e, d = p - q = inverse (e - ratio r)
        load(m, y);
        if (noise) add_noise(m, draw, y);
        const T top = largest(y);
        T sum = 0, distance = 0, norm = 0, slope = 0;
        for (int i = 0; i < n; ++i) {
          y[i] -= top, e[i] = exp2_of(y[i] * kLog2E<T>);
          sum += e[i], distance -= r[i] * y[i];
        }
        team.sum(sum, distance);
        const T inverse = reciprocal(sum), ratio = quotient(sum, sum_r);
        for (int i = 0; i < n; ++i) {
          const T d = e[i] - ratio * r[i];
          norm += d * d;
          if (Backward) slope += e[i] * d;
        }
        // f = log sum + sum_c q_c (top - y_c): both terms are at least 0, nothing cancels.
        distance *= inverse_r;
        const T inverse_f = reciprocal(logarithm(sum) + distance + T(call.eps));
        if constexpr (!Backward) {
          team.sum(norm);
          information += repeats * (norm * inverse * inverse) * inverse_f;
        } else {
          team.sum(norm, slope);
          norm *= inverse * inverse, slope *= inverse;  // N, and sum p d / inverse
          const int64_t at = (int64_t(m) * call.all_scales + call.first_scale + scale) * call.batch + tile.sample;
          const T w = repeats * T(call.weight[at]), a = 2 * w * inverse_f * inverse, b = w * norm * inverse_f * inverse_f;
          // sum_c q (b (y - top) - a d), with sum q d = sum p d - N. J(q) is blind to a number added to all channels: y - top for log p.
          pull_mean -= a * (slope - norm / inverse) + b * distance;
          const T of_p = a * inverse, of_d = b * inverse;
          const int again = recomputed(0);
#pragma unroll
          for (int k = 0; k < Quads; ++k) {
            if (!Noisy) {  // there are no registers to keep y
              const Quad<T> quad = load_quad(place_of(m, k) + again);
              for (int i = 0; i < 4; ++i) y[4 * k + i] = quad.at[i] - top;
            }
            for (int i = 4 * k; i < 4 * k + 4; ++i) {
              const T d = e[i] - ratio * r[i];
              own[i] += of_p * e[i] * (d - slope) - of_d * d;
              pull[i] += b * y[i] - a * d;
            }
          }
        }
      }
      if constexpr (Backward)
        store(m, own);
      else
        add_pixels(counts ? information : T(0), team.lanes, rows, call.modalities + 1, m);
    }
    if constexpr (Backward) finish(r, pull, pull_mean, call.detach_reference ? T(0) : inverse_r / T(modalities_held));
  }

  // Adds J(q) pull / (modalities held) to every gradient, unless `share` is 0; 0 where the pixel does not count.
  __device__ void finish(const T (&r)[n], T (&pull)[n], T pull_mean, T share) const {
    for (int i = 0; i < n; ++i) pull[i] = share == T(0) ? T(0) : share * r[i] * (pull[i] - pull_mean);
#pragma unroll 1
    for (int m = 0; m < call.modalities; ++m) {
      if (!(held >> m & 1)) continue;
      T x[n];
      load(m, x);
      for (int i = 0; i < n; ++i) x[i] = counts ? x[i] + pull[i] : T(0);
      store(m, x);
    }
  }
};

// All pixels of a tile.
template <class T, bool Backward, bool Noisy, int Quads>
__device__ void run_tile(const SoftmaxFisher& call, const Tile& tile, int scale, uint64_t held, Team<T>& team, const int64_t& first_noise,
                         T* features, T* rows) {
#pragma unroll 1
  for (int first = 0; first < tile.width; first += team.pixels_at_once()) {
    const int p = first + team.pixel();
    const bool counts = counted(call.tilings[scale], tile, p);
    const Pixel<T, Backward, Noisy, Quads> pixel{call, tile, tile.width * tile.pitch, team, first_noise,
                                                 features + p * tile.pitch + 4 * team.lane(), scale, p, held, counts, rows};
    if (held) pixel.run();
    if (!Backward) add_pixels(T(counts), team.lanes, rows, call.modalities + 1, call.modalities);
  }
}

template <class T, bool Backward, bool Noisy>
__device__ void run(const SoftmaxFisher& call) {
  __shared__ int64_t first_noise;
  const Place place = place_of_block(call.tilings, call.scales);
  const Tiling& tiling = call.tilings[place.tiling];
  const uint64_t held = held_by(call, place.sample);
  const int row = call.modalities + 1, warps = blockDim.x / 32, plane = tiling.width * tiling.pitch;
  T *features = shared<T>(), *rows = features + call.modalities * plane;
  Team<T> team{tiling.lanes, tiling.lane_bits, rows + warps * row};
  for (int i = threadIdx.x; i < warps * row; i += blockDim.x) rows[i] = 0;
  if (Backward)  // gradients of modalities that are not there
#pragma unroll 1
    for (int m = 0; m < call.modalities; ++m)
      if (!(held >> m & 1))
        for (int i = threadIdx.x; i < plane; i += blockDim.x) features[m * plane + i] = 0;

#pragma unroll 1
  for (int k = place.first_tile; k < place.last_tile; ++k) {
    if (k > place.first_tile) __syncthreads();
    const Tile tile = tile_at(tiling, place.sample, k);
#pragma unroll 1
    for (int m = 0; m < call.modalities; ++m)
      if (held >> m & 1) read_tile<T>(call.features[m * call.scales + place.tiling], tile, features + m * plane, kAbsent<T>);
    if (Noisy && threadIdx.x == 0) first_noise = tile.sample * ((tile.channels + 3) / 4) * tiling.pixels + tile.begin;
    __syncthreads();
    const auto run_quads = [&](auto n) {
      run_tile<T, Backward, Noisy, decltype(n)::value>(call, tile, place.tiling, held, team, first_noise, features, rows);
    };
    constexpr int most = kMostQuads[sizeof(T) == 8][Backward][Noisy];
    if (most == 1 || tiling.quads == 1) {
      run_quads(std::integral_constant<int, 1>{});
    } else if constexpr (most > 1) {
      if (most == 2 || tiling.quads == 2)
        run_quads(std::integral_constant<int, 2>{});
      else if constexpr (most > 2) {
        if (tiling.quads == 3)
          run_quads(std::integral_constant<int, 3>{});
        else
          run_quads(std::integral_constant<int, 4>{});
      }
    }
    __syncthreads();
    if (Backward)
#pragma unroll 1
      for (int m = 0; m < call.modalities; ++m)
        write_tile<T>(call.gradients[m * call.scales + place.tiling], tile, features + m * plane);
  }
  if constexpr (!Backward) {
    uint32_t* arrived = call.arrived + place.tiling * call.batch + place.sample;
    if (publish(rows, row, static_cast<T*>(call.partial), arrived, tiling.blocks)) write_results<T>(call, place);
  }
}

}  // namespace

// At most 64 registers a thread, 96 in the backward pass with noise: 1024 or 640 of them fit a multiprocessor (512 in float64).
#define MRF_KERNEL(name, type, backward, noisy)                                                             \
  extern "C" __global__ void __launch_bounds__(sizeof(type) == 8 ? 512 : backward && noisy ? 640 : 1024, 1) \
      softmax_fisher_##name(const __grid_constant__ SoftmaxFisher call) {                                   \
    run<type, backward, noisy>(call);                                                                       \
  }
MRF_KERNEL(forward_float32, float, false, false)
MRF_KERNEL(forward_noise_float32, float, false, true)
MRF_KERNEL(forward_float64, double, false, false)
MRF_KERNEL(forward_noise_float64, double, false, true)
MRF_KERNEL(backward_float32, float, true, false)
MRF_KERNEL(backward_noise_float32, float, true, true)
MRF_KERNEL(backward_float64, double, true, false)
MRF_KERNEL(backward_noise_float64, double, true, true)

const char* launch_general(const SoftmaxFisher& call, const Launch& launch, bool backward, bool wide, void* stream) {
  using Kernel = void (*)(SoftmaxFisher);
  constexpr Kernel kernels[2][2][2] = {{{softmax_fisher_forward_float32, softmax_fisher_forward_float64},
                                        {softmax_fisher_forward_noise_float32, softmax_fisher_forward_noise_float64}},
                                       {{softmax_fisher_backward_float32, softmax_fisher_backward_float64},
                                        {softmax_fisher_backward_noise_float32, softmax_fisher_backward_noise_float64}}};
  return run_kernel(kernels[backward][noisy(call)][wide], call, launch, stream);
}

}  // namespace cuda
}  // namespace mrf

// softmax_fisher on a CUDA GPU: per pixel, with R the mean over present modalities X_m,
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
// one launch covers all scales. Planes of shared memory beside the M features: q; with noise, the noisy features of one draw; backward,
// the bracket in dI/dR and, with noise, the gradient over draws. Gradients replace the features in place. A softmax takes one walk over
// the channels, with a maximum that rises from quad to quad, a second walk the moments, a third the gradient; the exponentials are computed
// again in each, which costs less than their places in shared memory would.
//
// Sizes: call.h. A pixel gets as many threads as 160 bytes of shared memory for each leave (up to 32), so that 1024 threads fit a
// multiprocessor of an A100; a tile has the pixels of 256 threads, and at least a 32-byte sector of every channel. With 1024 channels of
// two modalities, tiles are larger and 128 to 512 threads fit. Where even that is too large, a tile has fewer pixels, and the rest of each
// sector comes from L2 when the next block asks for it; a single pixel must fit.
#include "launch.h"
#include "philox.h"

namespace mrf {
namespace cuda {
namespace {

template <class T>
constexpr T kLog2E = T(1.44269504088896340736);

// The largest logit, and the sum of exp(logit - top), of a lane and then of a pixel.
template <class T>
struct Softmax {
  T top = -INFINITY, sum = 0;

  __device__ void add(const Quad<T>& y) {
    const T high = maximum(maximum(top, maximum(y.at[0], y.at[1])), maximum(y.at[2], y.at[3]));
    sum *= exp2_of((top - high) * kLog2E<T>);
    for (int i = 0; i < 4; ++i) sum += exp2_of((y.at[i] - high) * kLog2E<T>);
    top = high;
  }
  __device__ void combine(int lanes) {
    const T high = maximum_over(top, lanes);
    sum = sum_over(sum * exp2_of((top - high) * kLog2E<T>), 1, lanes);
    top = high;
  }
};

// The planes of a tile: pixel p of plane k.
template <class T>
struct Planes {
  T* memory;
  int width, pitch;
  __device__ T* at(int k, int p) const { return memory + (int64_t(k) * width + p) * pitch; }
};

// Bit m: whether the sample has modality m.
__device__ inline uint64_t held_by(const SoftmaxFisher& call, int64_t sample) {
  uint64_t held = 0;
  for (int m = 0; m < call.modalities; ++m)
    held |= uint64_t(call.present == nullptr || call.present[sample * call.modalities + m]) << m;
  return held;
}

// One pixel, by `lanes` threads.
template <class T, bool Backward>
struct Pixel {
  const SoftmaxFisher& call;
  const Tile& tile;
  const Tiling& tiling;
  Planes<T> planes;
  int scale, p, first, step;  // the quads of this thread start at channels first, first + step, ...
  bool counts;
  uint64_t held;
  int modalities_held;
  T inverse;  // of modalities_held
  uint64_t seed;
  T* rows;  // of the warp: sums of I by modality

  __device__ T* q() const { return planes.at(call.modalities, p); }
  __device__ T* pull() const { return planes.at(call.modalities + 1, p); }
  __device__ T* noisy() const { return planes.at(call.modalities + (Backward ? 2 : 1), p); }
  __device__ T* own() const { return planes.at(call.modalities + 3, p); }

  // q from the mean of the features.
  __device__ void reference() const {
    const bool exact = (modalities_held & (modalities_held - 1)) == 0;  // a power of two has an exact inverse
    Softmax<T> softmax;
    for (int c = first; c < tile.channels; c += step) {
      Quad<T> mean = {};
      for (int m = 0; m < call.modalities; ++m)
        if (held >> m & 1) {
          const Quad<T> x = load_quad(planes.at(m, p) + c);
          for (int i = 0; i < 4; ++i) mean.at[i] += x.at[i];
        }
      if (exact)
        for (int i = 0; i < 4; ++i) mean.at[i] *= inverse;
      else
        for (int i = 0; i < 4; ++i) mean.at[i] /= T(modalities_held);
      softmax.add(mean);
      store_quad(q() + c, mean);
    }
    softmax.combine(tiling.lanes);
    const T inverse_sum = reciprocal(softmax.sum);
    for (int c = first; c < tile.channels; c += step) {
      Quad<T> x = load_quad(q() + c);
      for (int i = 0; i < 4; ++i) x.at[i] = rounded_product(exp2_of((x.at[i] - softmax.top) * kLog2E<T>), inverse_sum);
      store_quad(q() + c, x);
    }
  }

  // The softmax of modality m; with noise, of x + sigma noise, which is left in noisy().
  __device__ Softmax<T> softmax_of(int m, const T* x, bool noise, int draw) const {
    Softmax<T> softmax;
    const int64_t quads = (tiling.channels + 3) / 4;
    for (int c = first; c < tile.channels; c += step) {
      Quad<T> y = load_quad(x + c);
      if (noise) {
        const uint64_t g = (tile.sample * quads + c / 4) * tiling.pixels + tile.begin + p;
        const Quad<T> n = normals<T>(seed, g, m * call.all_scales + call.first_scale + scale, draw);
        for (int i = 0; i < 4; ++i) y.at[i] += T(call.sigma[m]) * n.at[i];
        store_quad(noisy() + c, y);
      }
      softmax.add(y);
    }
    softmax.combine(tiling.lanes);
    return softmax;
  }

  __device__ void run() const {
    reference();
    T pull_mean = 0;  // sum_c q * pull
    bool pulled = false;
    for (int m = 0; m < call.modalities; ++m) {
      if (!(held >> m & 1)) continue;
      const bool noise = call.sigma[m] > 0;
      const int draws = noise ? call.draws : 1;
      const T repeats = T(noise ? 1 : call.draws);  // without noise every draw is the same
      T* x = planes.at(m, p);
      T information = 0;
      for (int draw = 0; draw < draws; ++draw) {
        const Softmax<T> softmax = softmax_of(m, x, noise, draw);
        const T* y = noise ? noisy() : x;
        const T inverse_sum = reciprocal(softmax.sum);
        // f = log sum + sum_c q_c (top - y_c): both terms are at least 0, nothing cancels.
        T n = 0, distance = 0, pd = 0;
        for (int c = first; c < tile.channels; c += step) {
          const Quad<T> at = load_quad(y + c), reference = load_quad(q() + c);
          for (int i = 0; i < 4; ++i) {
            const T shifted = at.at[i] - softmax.top, e = rounded_product(exp2_of(shifted * kLog2E<T>), inverse_sum);
            const T d = e - reference.at[i];
            n += d * d;
            if (c + i < tile.channels) distance -= reference.at[i] * shifted;  // past them, 0 * infinity
            if (Backward) pd += e * d;
          }
        }
        n = sum_over(n, 1, tiling.lanes);
        distance = sum_over(distance, 1, tiling.lanes);
        const T inverse_f = reciprocal(logarithm(softmax.sum) + distance + T(call.eps));
        if constexpr (!Backward) {
          information += repeats * n * inverse_f;
        } else {
          pd = sum_over(pd, 1, tiling.lanes);
          const int64_t at = (int64_t(m) * call.all_scales + call.first_scale + scale) * call.batch + tile.sample;
          const T w = repeats * T(call.weight[at]), a = 2 * w * inverse_f, b = w * n * inverse_f * inverse_f;
          // sum_c q (b (y - top) - a d), with sum q d = sum p d - N. J(q) is blind to a number added to all channels: y - top for log p.
          pull_mean -= a * (pd - n) + b * distance;
          gradient(x, y, softmax.top, inverse_sum, pd, a, b, noise && draw > 0, noise && draw + 1 < draws, pulled);
          pulled = true;
        }
      }
      if constexpr (!Backward) add_pixels(counts ? information : T(0), tiling.lanes, rows + m);
    }
    if (Backward && !call.detach_reference) finish(pull_mean);
  }

  // dI/dX_m weighted, into the place of x, or of own() while draws follow; the bracket of dI/dR added to pull().
  __device__ void gradient(T* x, const T* y, T top, T inverse_sum, T pd, T a, T b, bool continues, bool goes_on, bool pulled) const {
    for (int c = first; c < tile.channels; c += step) {
      const Quad<T> at = load_quad(y + c), reference = load_quad(q() + c);
      Quad<T> to_x = {}, bracket = {};
      if (continues) to_x = load_quad(own() + c);
      if (pulled) bracket = load_quad(pull() + c);
      for (int i = 0; i < 4; ++i) {
        const T shifted = at.at[i] - top, e = rounded_product(exp2_of(shifted * kLog2E<T>), inverse_sum), d = e - reference.at[i];
        to_x.at[i] += a * e * (d - pd) - b * d;
        bracket.at[i] += b * shifted - a * d;
      }
      store_quad((goes_on ? own() : x) + c, to_x);
      store_quad(pull() + c, bracket);
    }
  }

  // Adds J(q) pull / (modalities held) to every gradient.
  __device__ void finish(T pull_mean) const {
    for (int c = first; c < tile.channels; c += step) {
      const Quad<T> reference = load_quad(q() + c), bracket = load_quad(pull() + c);
      for (int m = 0; m < call.modalities; ++m)
        if (held >> m & 1) {
          Quad<T> to_x = load_quad(planes.at(m, p) + c);
          for (int i = 0; i < 4; ++i) to_x.at[i] += reference.at[i] * (bracket.at[i] - pull_mean) * inverse;
          store_quad(planes.at(m, p) + c, to_x);
        }
    }
  }
};

// information (M, S, B) and counts (S, B), from the numbers of all blocks of a scale and sample.
template <class T>
__device__ void write_results(const SoftmaxFisher& call, const Place& place) {
  const Tiling& tiling = call.tilings[place.tiling];
  const T* partial = static_cast<const T*>(call.partial);
  const int64_t first = tiling.first_block + place.sample * tiling.blocks, scale = call.first_scale + place.tiling;
  const double count = ordered_sum(partial, first, tiling.blocks, call.modalities + 1, call.modalities);
  for (int m = threadIdx.x / 32; m < call.modalities; m += blockDim.x / 32) {
    const double sum = ordered_sum(partial, first, tiling.blocks, call.modalities + 1, m);
    if (threadIdx.x % 32 == 0)
      static_cast<T*>(call.information)[(m * call.all_scales + scale) * call.batch + place.sample] =
          T(count > 0 ? sum / (count * call.draws) : 0);
  }
  if (threadIdx.x == 0) call.counts[scale * call.batch + place.sample] = int64_t(count);
}

template <class T, bool Backward>
__device__ void run(const SoftmaxFisher& call) {
  const Place place = place_of_block(call.tilings, call.scales);
  const Tiling& tiling = call.tilings[place.tiling];
  const uint64_t held = held_by(call, place.sample);
  const int modalities_held = __popcll(held);
  const T inverse = T(1) / T(modalities_held);
  bool noise = false;
  for (int m = 0; m < call.modalities; ++m) noise |= call.sigma[m] > 0;
  const uint64_t seed = noise ? *call.seed : 0;
  const int planes = call.modalities + (Backward ? 2 : 1) + (noise ? (Backward ? 2 : 1) : 0);
  const int plane = tiling.width * tiling.pitch;
  T *counts = shared<T>() + planes * plane, *rows = counts + tiling.width;
  const int row = call.modalities + 1;
  for (int i = threadIdx.x; i < blockDim.x / 32 * row; i += blockDim.x) rows[i] = 0;

  for (int64_t k = place.first_tile; k < place.last_tile; ++k) {
    const Tile tile = tile_at(tiling, place.sample, k);
    for (int m = 0; m < call.modalities; ++m)
      if (held >> m & 1)
        read_tile<T>(call.features[m * call.scales + place.tiling], tile, shared<T>() + m * plane, -INFINITY);
    read_counts(tiling, tile, counts);
    __syncthreads();
    T* rows_of_warp = rows + threadIdx.x / 32 * row;
    for (int p = divided(int(threadIdx.x), tiling.lanes); p < tile.width; p += divided(int(blockDim.x), tiling.lanes)) {
      const int first = (threadIdx.x & (tiling.lanes - 1)) * 4;
      const Pixel<T, Backward> pixel{call, tile, tiling, {shared<T>(), tile.width, tile.pitch}, place.tiling, p, first, tiling.lanes * 4,
                                     counts[p] != T(0), held, modalities_held, inverse, seed, rows_of_warp};
      if (modalities_held > 0) pixel.run();
      if (!Backward) add_pixels(counts[p], tiling.lanes, rows_of_warp + call.modalities);
    }
    __syncthreads();
    if (Backward) {
      for (int m = 0; m < call.modalities; ++m)
        write_tile<T>(call.gradients[m * call.scales + place.tiling], tile, shared<T>() + m * plane,
                      held >> m & 1 ? counts : nullptr);
      __syncthreads();
    }
  }
  if constexpr (!Backward) {
    uint32_t* arrived = call.arrived + place.tiling * call.batch + place.sample;
    if (publish(rows, row, static_cast<T*>(call.partial), arrived, tiling.blocks)) write_results<T>(call, place);
  }
}

}  // namespace

// 512 threads of at most 64 registers, so that two blocks fit a multiprocessor.
#define MRF_KERNEL(name, type, backward)                                                              \
  extern "C" __global__ void __launch_bounds__(most_threads(sizeof(type)), sizeof(type) == 4 ? 2 : 1) \
      softmax_fisher_##name(const __grid_constant__ SoftmaxFisher call) {                             \
    run<type, backward>(call);                                                                        \
  }
MRF_KERNEL(forward_float32, float, false)
MRF_KERNEL(forward_float64, double, false)
MRF_KERNEL(backward_float32, float, true)
MRF_KERNEL(backward_float64, double, true)

const char* launch(const SoftmaxFisher& call, const Launch& launch, bool backward, bool wide, void* stream) {
  auto* kernel = backward ? (wide ? softmax_fisher_backward_float64 : softmax_fisher_backward_float32)
                          : (wide ? softmax_fisher_forward_float64 : softmax_fisher_forward_float32);
  return run_kernel(kernel, call, launch, stream);
}

}  // namespace cuda
}  // namespace mrf

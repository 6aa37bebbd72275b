// modality_cross_entropy on a CUDA GPU: per pixel of class y, with class weights w and label smoothing s over C classes, logits X_m of the
// present modalities and their mean R,
//
//   t_c = (1 - s) w_y [c = y] + s / C w_c,  T = sum_c t_c,  p_m = softmax_c(X_m),  q = softmax_c(R)
//   ce_m = -sum_c t_c log p_mc,  ce = -sum_c t_c log q_c,  g_m = T p_m - t,  I_m = sum_c g_mc^2 / (ce_m + eps)
//
// forward: the sums of ce_m, ce, I_m and w_y over the valid pixels of a sample; backward, with the upstream gradients u, j and v of ce_m, ce
// and I_m, F = ce_m + eps, N = sum g^2 and M present modalities:
//
//   dX_m = (u - v N / F^2) g  +  2 v T / F p (g - sum p g)  +  j / M (T q - t)
//
// Exponentials are relative to the logit of y: e_c = exp(x_c - x_y). The sums leave y out, S = sum e and Q = sum e^2 over the others, so
// that nothing cancels where y is all but certain:
//
//   log sum_c exp(x_c) - x_y = log(1 + S)        1 - p_y = S / (1 + S)        N = T^2 (S^2 + Q) / (1 + S)^2   (no smoothing)
//
// No maximum has to be found for that, and where y stands in the tile, -inf takes its place, so that no element is compared with it. Where
// the others are so much larger that Q overflows, or a logit is NaN or infinite, the sums of a pixel are computed again relative to the
// maximum; p_y is then exp(x_y - max) / (exp(x_y - max) + S). A target that is neither a class nor ignored has the weight NaN.
//
// Memory: forward reads every logit of the present modalities and every target once and writes one number per block and sum, which the
// last block of each sample adds up; backward reads them once and writes every gradient once.
//
// Work: a warp takes tiles of up to 32 pixels (64 of 16 bits where pixels lie side by side), all classes of all present modalities
// (warp_tile.h), and passes over them in shared memory (modality_cross_entropy_tile.h): once for the sums, with smoothing once more for N,
// and backward once for the gradients, which take the place of the logits. A step of a pass is a few classes of up to four modalities and
// of R: an exponential for each element, and one for each class for R. More than four modalities are taken four at a time, and their mean
// is kept beside the tile.
//
// Sizes: call.h.
#include "launch.h"
#include "modality_cross_entropy_tile.h"

namespace mrf {
namespace cuda {
namespace {

// The results of a sample, from the numbers of all its blocks.
template <class T>
__device__ void write_results(const ModalityCrossEntropy& call, const Place& place) {
  const int modalities = call.modalities, count = 2 * modalities + 2;
  const int64_t first = call.tiling.first_block + place.sample * call.tiling.blocks;
  void* const to[] = {call.cross_entropy, call.information, call.joint, call.weights};
  for (int k = threadIdx.x / 32; k < count; k += blockDim.x / 32) {
    const double sum = ordered_sum<8>(static_cast<const T*>(call.partial), first, call.tiling.blocks, count, k);
    const int which = k < 2 * modalities ? k / modalities : k - 2 * modalities + 2, m = k < 2 * modalities ? k % modalities : 0;
    if (threadIdx.x % 32 == 0) static_cast<T*>(to[which])[m * call.batch + place.sample] = T(sum);
  }
}

template <class T, class Storage, int Pixels, int Channels, bool Backward>
__device__ void run(const ModalityCrossEntropy& call) {
  const Place place = place_of_block(&call.tiling, 1);
  const int lane = threadIdx.x % 32;
  const auto has = [&](int m) {
    return m < call.modalities && (call.present == nullptr || call.present[place.sample * call.modalities + m]);
  };
  // By votes, whose result the compiler knows to be that of all lanes.
  const uint64_t held = __ballot_sync(kWarp, has(lane)) | uint64_t(__ballot_sync(kWarp, has(32 + lane))) << 32;

  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, channels = int(call.tiling.channels);
  unsigned char* const memory = shared_memory + warp * call.warp_bytes;
  T* const class_weights = reinterpret_cast<T*>(shared_memory + warps * call.warp_bytes);
  T all_weights = T(channels);
  if (call.label_smoothing > 0) {
    for (int c = threadIdx.x; c < channels; c += blockDim.x) class_weights[c] = call.class_weight ? T(call.class_weight[c]) : T(1);
    __syncthreads();
    if (call.class_weight) {
      all_weights = 0;
      for (int c = threadIdx.x % 32; c < channels; c += 32) all_weights += class_weights[c];
      all_weights = sum_over(all_weights, 1);
    }
  }
  CrossEntropyTile<T, Storage, Pixels, Channels, Backward> tile(call, place.sample, held, memory, class_weights, all_weights);
#pragma unroll 1
  for (int k = place.first_tile + warp; k < place.last_tile; k += warps) tile.run(int64_t(k) * call.tiling.width);

  if constexpr (!Backward) {
    const int count = 2 * call.modalities + 2;
    T* const rows = class_weights + (call.label_smoothing > 0 ? (channels + 3) / 4 * 4 : 0);
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const T sum = sum_over(tile.number(k), 1);
      if (threadIdx.x % 32 == 0) rows[warp * count + k] = sum;
    }
    if (publish(rows, count, static_cast<T*>(call.partial), call.arrived + place.sample, call.tiling.blocks))
      write_results<T>(call, place);
  }
}

}  // namespace

// At most 128 registers a thread (all in float64): as many warps fit a multiprocessor as their tiles leave room for.
#define MRF_KERNEL(name, type, storage, pixels, channels)                                                      \
  extern "C" __global__ void __launch_bounds__(256, 8 / sizeof(type)) modality_cross_entropy_forward_##name(   \
      const __grid_constant__ ModalityCrossEntropy call) {                                                     \
    run<type, storage, pixels, channels, false>(call);                                                         \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 8 / sizeof(type)) modality_cross_entropy_backward_##name(  \
      const __grid_constant__ ModalityCrossEntropy call) {                                                     \
    run<type, storage, pixels, channels, true>(call);                                                          \
  }
MRF_WARP_TILE_KERNELS

const char* launch(const ModalityCrossEntropy& call, const Launch& launch, bool backward, bool, void* stream) {
  using Kernel = void (*)(ModalityCrossEntropy);
  constexpr Kernel kernels[2][4][3] = {MRF_WARP_TILE_LIST(modality_cross_entropy_forward), MRF_WARP_TILE_LIST(modality_cross_entropy_backward)};
  return run_kernel(kernels[backward][int(call.logits[0].dtype)][int(call.unit)], call, launch, stream);
}

}  // namespace cuda
}  // namespace mrf

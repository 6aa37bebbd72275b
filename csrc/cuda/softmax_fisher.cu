// softmax_fisher on a CUDA GPU: per pixel, with R the mean over present modalities X_m,
//
//   q = softmax_c(R),  p_m = softmax_c(X_m),  f_m = -sum_c q_c log p_mc,  I_m = sum_c (p_mc - q_c)^2 / (f_m + eps)
//
// forward: the mean of I_m over valid pixels; backward, with d = p - q, N = sum d^2 and J the softmax Jacobian:
//
//   dI/dX_m = 2/(f+eps) J(p) d - N/(f+eps)^2 d        dI/dR = J(q) [ -2/(f+eps) d + N/(f+eps)^2 log p ]
//
// Up to four modalities of one layout, in 32 or 16 bits and without noise; all others are left to softmax_fisher_general.cu.
//
// Memory: forward reads every feature once and writes one number per block and modality, which the last block of each scale and sample
// adds up; backward reads every feature once and writes every gradient once.
//
// Work: a warp takes tiles of up to 32 pixels (64 of 16 bits where pixels lie side by side) of one sample at one scale, all channels of all
// modalities (warp_tile.h), and passes over them in shared memory (softmax_fisher_tile.h): for the maxima, for all sums, and backward for the
// gradients, which take the place of the features. With e and r the exponentials of a modality and of R, p - q is (e - ratio r) / sum e,
// whose norm follows from the sums of (e - r)^2, r (e - r) and r^2. So each pass computes one exponential for each element; of two
// modalities it is that of half a feature, because r is the product of two and e the square of one. One launch covers all scales of one
// type and layout.
//
// Exponentials of modalities are relative to their maxima, those of R to the mean of these: no maximum of R is looked for. A warp with a
// pixel where that loses digits goes another way, that of the formula: it looks for the maximum of R, adds up anew and passes once more for
// the norm of p - q. So it is where modalities are so far apart that r vanishes, where p and q are nearly the same though e and r are not,
// as in channels that saturate, and of two modalities where they nearly agree.
//
// Sizes: call.h.
#include "launch.h"
#include "softmax_fisher_results.h"
#include "softmax_fisher_tile.h"

namespace mrf {
namespace cuda {
namespace {

template <class Storage, int Pixels, int Channels, int M, bool Backward>
__device__ void run(const SoftmaxFisher& call) {
  const Place place = place_of_block(call.tilings, call.scales);
  const int width = call.tilings[place.tiling].width, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  // By a vote, whose result the compiler knows to be that of all lanes.
  const int m = threadIdx.x % 32;
  const bool has = m < call.modalities && (call.present == nullptr || call.present[place.sample * call.modalities + m]);
  FisherTile<float, Storage, Pixels, Channels, M, Backward> tile(call, place, __ballot_sync(kWarp, has),
                                                                 shared_memory + warp * call.warp_bytes);
#pragma unroll 1
  for (int k = place.first_tile + warp; k < place.last_tile; k += warps) tile.run(int64_t(k) * width);

  if constexpr (!Backward) {
    const int row = call.modalities + 1;
    float* const rows = reinterpret_cast<float*>(shared_memory + warps * call.warp_bytes);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float sum = sum_over(tile.total[m], 1) * float(call.draws);  // without noise every draw is the same
      if (threadIdx.x % 32 == 0 && m < call.modalities) rows[warp * row + m] = sum;
    }
    const float counted = sum_over(float(tile.counted), 1);
    if (threadIdx.x % 32 == 0) rows[warp * row + call.modalities] = counted;
    uint32_t* arrived = call.arrived + place.tiling * call.batch + place.sample;
    if (publish(rows, row, static_cast<float*>(call.partial), arrived, call.tilings[place.tiling].blocks)) write_results<float>(call, place);
  }
}

}  // namespace

// At most 128 registers a thread: as many warps fit a multiprocessor as their tiles leave room for.
#define MRF_KERNEL(name, storage, pixels, channels, modalities)                                               \
  extern "C" __global__ void __launch_bounds__(256, 2) softmax_fisher_forward_##name##_##modalities(          \
      const __grid_constant__ SoftmaxFisher call) {                                                           \
    run<storage, pixels, channels, modalities, false>(call);                                                  \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2) softmax_fisher_backward_##name##_##modalities(         \
      const __grid_constant__ SoftmaxFisher call) {                                                           \
    run<storage, pixels, channels, modalities, true>(call);                                                   \
  }
#define MRF_MODALITIES(name, storage, pixels, channels) \
  MRF_KERNEL(name, storage, pixels, channels, 2)        \
  MRF_KERNEL(name, storage, pixels, channels, 3)        \
  MRF_KERNEL(name, storage, pixels, channels, 4)
#define MRF_UNITS(dtype, storage, pixels, piece, single) \
  MRF_MODALITIES(pixels_##dtype, storage, pixels, 0) \
  MRF_MODALITIES(piece_##dtype, storage, 0, piece)   \
  MRF_MODALITIES(single_##dtype, storage, 0, single)
MRF_UNITS(float32, float, 1, 4, 1)
MRF_UNITS(bfloat16, __nv_bfloat16, 2, 8, 2)
MRF_UNITS(float16, __half, 2, 8, 2)

// [dtype][unit][modalities]
#define MRF_LIST(pass, name) \
  {softmax_fisher_##pass##_##name##_2, softmax_fisher_##pass##_##name##_3, softmax_fisher_##pass##_##name##_4}
#define MRF_LISTS(pass, dtype) {MRF_LIST(pass, pixels_##dtype), MRF_LIST(pass, piece_##dtype), MRF_LIST(pass, single_##dtype)}
#define MRF_KERNELS(pass) {MRF_LISTS(pass, float32), {}, MRF_LISTS(pass, bfloat16), MRF_LISTS(pass, float16)}

const char* launch(const SoftmaxFisher& call, const Launch& launch, bool backward, bool wide, void* stream) {
  using Kernel = void (*)(SoftmaxFisher);
  constexpr Kernel kernels[2][4][3][3] = {MRF_KERNELS(forward), MRF_KERNELS(backward)};
  if (call.unit == Unit::none) return launch_general(call, launch, backward, wide, stream);
  const int modalities = call.modalities > 2 ? call.modalities : 2;
  return run_kernel(kernels[backward][int(call.features[0].dtype)][int(call.unit)][modalities - 2], call, launch, stream);
}

}  // namespace cuda
}  // namespace mrf

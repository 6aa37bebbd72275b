// The results of softmax_fisher, from the numbers of its blocks.
#pragma once

#include "device.h"

namespace mrf {
namespace cuda {

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

}  // namespace cuda
}  // namespace mrf

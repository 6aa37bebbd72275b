// A call of any number of scales or tensors, cut into launches whose tables fit a kernel's parameters. No CUDA and no torch here.
//
// The caller lists all scales or tensors and fills what every launch of the call shares. `launch(call)` then gets one part after the other:
// its entries of the tables, their number, and the number of the first, by which the results and the noise of the whole call are found. Those
// of a launch follow one on the other and are of one type and unit.
#pragma once

#include <vector>

#include "call.h"

namespace mrf {
namespace cuda {

// A table that is empty has no part in the pass.
struct SoftmaxFisherTables {
  std::vector<Tiling> tilings;             // [scales]
  std::vector<Array> features, gradients;  // [modalities][scales]
};

struct GradientStatisticsTables {
  std::vector<Tiling> tilings;  // all [tensors]
  std::vector<Array> grads, features, to_grads, to_features;
  std::vector<void*> values, to_values, fisher_maps, attribution_maps;
};

template <class T>
inline void copy_some(const std::vector<T>& all, int first, int count, T* to) {
  if (!all.empty()) std::copy_n(all.begin() + first, count, to);
}

template <class Each>
void for_each_launch(SoftmaxFisher& call, const SoftmaxFisherTables& all, Each launch) {
  call.all_scales = int32_t(all.tilings.size());
  const int most = std::min(kMostScales, kMostArrays / call.modalities);
  const auto unit = [&](int s) { return unit_of(call, &all.features[s], call.all_scales, all.tilings[s].channels); };
  for (int first = 0; first < call.all_scales; first += call.scales) {
    call.first_scale = first, call.scales = 1;
    while (call.scales < std::min(most, call.all_scales - first) && unit(first + call.scales) == unit(first) &&
           all.features[first + call.scales].dtype == all.features[first].dtype)
      ++call.scales;
    copy_some(all.tilings, first, call.scales, call.tilings);
    for (int m = 0; m < call.modalities; ++m) {
      copy_some(all.features, m * call.all_scales + first, call.scales, call.features + m * call.scales);
      copy_some(all.gradients, m * call.all_scales + first, call.scales, call.gradients + m * call.scales);
    }
    launch(call);
  }
}

template <class Each>
void for_each_launch(GradientStatistics& call, const GradientStatisticsTables& all, Each launch) {
  const int count = int(all.tilings.size());
  const auto unit = [&](int k) { return unit_of(all.grads[k], all.tilings[k].channels); };
  for (int first = 0; first < count; first += call.tensors) {
    call.first_tensor = first, call.tensors = 1;
    while (call.tensors < std::min(kMostTensors, count - first) && unit(first + call.tensors) == unit(first) &&
           all.grads[first + call.tensors].dtype == all.grads[first].dtype)
      ++call.tensors;
    copy_some(all.tilings, first, call.tensors, call.tilings);
    copy_some(all.grads, first, call.tensors, call.grads);
    copy_some(all.features, first, call.tensors, call.features);
    copy_some(all.to_grads, first, call.tensors, call.to_grads);
    copy_some(all.to_features, first, call.tensors, call.to_features);
    copy_some(all.values, first, call.tensors, call.values);
    copy_some(all.to_values, first, call.tensors, call.to_values);
    copy_some(all.fisher_maps, first, call.tensors, call.fisher_maps);
    copy_some(all.attribution_maps, first, call.tensors, call.attribution_maps);
    launch(call);
  }
}

}  // namespace cuda
}  // namespace mrf

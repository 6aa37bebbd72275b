// The host side of the CUDA launches for the tests, through ctypes: what csrc/cuda/split.h and call.h make of a call, without CUDA.
#include "../cuda/split.h"

using namespace mrf::cuda;

namespace {

template <class T>
std::vector<T> list(const T* x, int64_t count) { return x ? std::vector<T>(x, x + count) : std::vector<T>(); }

}  // namespace

extern "C" {

size_t size_of_softmax_fisher() { return sizeof(SoftmaxFisher); }
size_t size_of_modality_cross_entropy() { return sizeof(ModalityCrossEntropy); }
size_t size_of_gradient_statistics() { return sizeof(GradientStatistics); }

void plan_softmax_fisher(SoftmaxFisher* call, int backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks,
                         Launch* launch) {
  *launch = plan(*call, backward != 0, accumulator_bytes, limit, most_blocks);
}
void plan_modality_cross_entropy(ModalityCrossEntropy* call, int backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks,
                                 Launch* launch) {
  *launch = plan(*call, backward != 0, accumulator_bytes, limit, most_blocks);
}
void plan_gradient_statistics(GradientStatistics* call, int backward, int64_t accumulator_bytes, int64_t limit,
                              int64_t most_blocks, Launch* launch) {
  *launch = plan(*call, backward != 0, accumulator_bytes, limit, most_blocks);
}

// Tables are null where there are none.
void split_softmax_fisher(SoftmaxFisher* call, int scales, const Tiling* tilings, const Array* features, const Array* gradients,
                          void (*each)(const SoftmaxFisher*)) {
  const int64_t count = int64_t(call->modalities) * scales;
  const SoftmaxFisherTables all{list(tilings, scales), list(features, count), list(gradients, count)};
  for_each_launch(*call, all, [&](SoftmaxFisher& part) { each(&part); });
}
void split_gradient_statistics(GradientStatistics* call, int n, const Tiling* tilings, const Array* grads, const Array* features,
                               const Array* to_grads, const Array* to_features, void* const* values, void* const* to_values,
                               void* const* fisher_maps, void* const* attribution_maps, void (*each)(const GradientStatistics*)) {
  const GradientStatisticsTables all{list(tilings, n), list(grads, n), list(features, n), list(to_grads, n), list(to_features, n),
                                     list(values, n), list(to_values, n), list(fisher_maps, n), list(attribution_maps, n)};
  for_each_launch(*call, all, [&](GradientStatistics& part) { each(&part); });
}
}

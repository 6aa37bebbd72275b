// The host side of the CUDA launches for the tests, through ctypes: what csrc/cuda/call.h makes of a call, without CUDA.
#include "../cuda/call.h"

extern "C" {

size_t size_of_softmax_fisher() { return sizeof(mrf::cuda::SoftmaxFisher); }
size_t size_of_gradient_statistics() { return sizeof(mrf::cuda::GradientStatistics); }

void plan_softmax_fisher(mrf::cuda::SoftmaxFisher* call, int backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks,
                         mrf::cuda::Launch* launch) {
  *launch = mrf::cuda::plan(*call, backward != 0, accumulator_bytes, limit, most_blocks);
}
void plan_gradient_statistics(mrf::cuda::GradientStatistics* call, int backward, int64_t accumulator_bytes, int64_t limit,
                              int64_t most_blocks, mrf::cuda::Launch* launch) {
  *launch = mrf::cuda::plan(*call, backward != 0, accumulator_bytes, limit, most_blocks);
}
}

// The entries of the CUDA kernels for the binding. No CUDA and no torch here.
#pragma once

#include "call.h"

namespace mrf {
namespace cuda {

// Bytes of shared memory that a block may have on the current device, less what kernels need beside their tiles.
int64_t shared_memory_limit();

// Run a planned call on a stream (a cudaStream_t), `wide` in float64. Null, or what went wrong.
const char* launch(const SoftmaxFisher& call, const Launch& launch, bool backward, bool wide, void* stream);
// That of softmax_fisher_general.cu, for the former.
const char* launch_general(const SoftmaxFisher& call, const Launch& launch, bool backward, bool wide, void* stream);
const char* launch(const ModalityCrossEntropy& call, const Launch& launch, bool backward, bool wide, void* stream);
const char* launch(const GradientStatistics& call, const Launch& launch, bool backward, bool wide, void* stream);

}  // namespace cuda
}  // namespace mrf

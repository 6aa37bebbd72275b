#include "launch.h"

#include <cuda_runtime_api.h>

namespace mrf {
namespace cuda {

int64_t shared_memory_limit() {
  int device = 0, bytes = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes - 1024;
}

}  // namespace cuda
}  // namespace mrf

// The raw ops modreg_fast_native::* for tensors on CUDA, on LibTorch's stable ABI: calls cut into launches that fit a kernel's parameters.
// The arguments are prepared by modreg_fast/backends/cpu, so a failed check here means a call that did not come from there.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "launch.h"

// Not there in a torch without CUDA, where nothing here is called.
extern "C" int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace {

using mrf::DType;
using mrf::cuda::Array;
using mrf::cuda::Tiling;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "modreg_fast_native: unexpected dtype"); return DType::float32;
  }
}

// (B, C, P) with contiguous pixels, or else contiguous channels.
Array array_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 3, "modreg_fast_native: expected a (B, C, P) tensor on CUDA");
  const bool pixel_lines = (x.size(2) > 1 && x.stride(2) == 1) || (x.size(1) == 1 && x.size(2) == 1);
  STD_TORCH_CHECK(pixel_lines || x.stride(1) == 1, "modreg_fast_native: expected contiguous pixels or channels");
  return {x.data_ptr(), x.stride(0), pixel_lines ? x.stride(1) : x.stride(2), dtype_of(x), pixel_lines, false};
}

template <class T = void>
T* pointer_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.is_contiguous(), "modreg_fast_native: expected a contiguous tensor on CUDA");
  return static_cast<T*>(x.data_ptr());
}

template <class T = void>
T* pointer_of(const Tensors& tensors, size_t k) { return tensors.empty() ? nullptr : pointer_of<T>(tensors[k]); }

Tiling tiling_of(const Tensor& x, const Tensors& masks, size_t k) {
  Tiling tiling{};
  tiling.channels = x.size(1), tiling.pixels = x.size(2), tiling.mask = pointer_of<uint8_t>(masks, k);
  return tiling;
}

// The results of blocks and the counters of a launch live until it is queued; the allocator keeps their memory in the order of the stream.
template <class Call>
void run(Call& call, const Tensor& like, bool backward, bool wide, int64_t rows, int64_t counters) {
  const mrf::cuda::Launch launch = mrf::cuda::plan(call, backward, wide ? 8 : 4, mrf::cuda::shared_memory_limit());
  STD_TORCH_CHECK(launch.shared_bytes >= 0, "modreg_fast: backend 'cuda': all channels of 32 bytes of pixels, or of one pixel, do not "
                  "fit the shared memory of this GPU; use backend 'reference'");
  std::optional<Tensor> partial, arrived;
  if (!backward) {
    partial = torch::stable::new_empty(like, {launch.blocks * rows}, wide ? ScalarType::Double : ScalarType::Float);
    arrived = torch::stable::new_zeros(like, {counters}, ScalarType::Int);
    call.partial = partial->data_ptr(), call.arrived = static_cast<uint32_t*>(arrived->data_ptr());
  }
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0, "modreg_fast_native: no CUDA stream");
  const char* error = mrf::cuda::launch(call, launch, backward, wide, stream);
  STD_TORCH_CHECK(error == nullptr, "modreg_fast: backend 'cuda': ", error);
}

// ---- softmax_fisher ----

void softmax_fisher(const Tensors& features, const Tensors& masks, const std::optional<Tensor>& present, const std::vector<double>& sigma,
                    int64_t draws, const std::optional<Tensor>& seed, double eps, bool wide, mrf::cuda::SoftmaxFisher call,
                    const Tensors& gradients) {
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  const int modalities = int(sigma.size()), scales = int(features.size() / sigma.size());
  STD_TORCH_CHECK(modalities <= mrf::cuda::kMostArrays, "modreg_fast: backend 'cuda' takes at most 48 modalities");
  call.modalities = modalities, call.all_scales = scales, call.draws = int32_t(draws), call.batch = features[0].size(0), call.eps = eps;
  call.present = present.has_value() ? pointer_of<uint8_t>(*present) : nullptr;
  call.seed = seed.has_value() ? pointer_of<int64_t>(*seed) : nullptr;
  std::copy(sigma.begin(), sigma.end(), call.sigma);
  const int most = std::min(mrf::cuda::kMostScales, mrf::cuda::kMostArrays / modalities);
  for (int first = 0; first < scales; first += most) {
    call.first_scale = first, call.scales = std::min(most, scales - first);
    for (int s = 0; s < call.scales; ++s) {
      call.tilings[s] = tiling_of(features[first + s], masks, first + s);
      for (int m = 0; m < modalities; ++m) {
        call.features[m * call.scales + s] = array_of(features[m * scales + first + s]);
        if (!gradients.empty()) call.gradients[m * call.scales + s] = array_of(gradients[m * scales + first + s]);
      }
    }
    run(call, features[0], !gradients.empty(), wide, modalities + 1, call.scales * call.batch);
  }
}

void softmax_fisher_forward(Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma, int64_t draws,
                            std::optional<Tensor> seed, double eps, Tensor information, Tensor counts) {
  mrf::cuda::SoftmaxFisher call{};
  call.information = pointer_of(information), call.counts = pointer_of<int64_t>(counts);
  softmax_fisher(features, masks, present, sigma, draws, seed, eps, dtype_of(information) == DType::float64, call, {});
}

void softmax_fisher_backward(Tensor weight, Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma,
                             int64_t draws, std::optional<Tensor> seed, bool detach_reference, double eps, Tensors gradients) {
  bool wide = false;
  for (const Tensor& x : features) wide |= dtype_of(x) == DType::float64;
  mrf::cuda::SoftmaxFisher call{};
  call.weight = pointer_of<double>(weight), call.detach_reference = detach_reference;
  softmax_fisher(features, masks, present, sigma, draws, seed, eps, wide, call, gradients);
}

// ---- gradient_statistics ----

struct Statistics {
  const Tensors &grads, &features, &values, &masks, &fisher_maps, &attribution_maps;
};

void gradient_statistics(const Statistics& given, double eps, mrf::cuda::GradientStatistics call, const Tensors& to_grads,
                         const Tensors& to_features, const Tensors& to_values) {
  const Tensors& grads = given.grads;
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const bool wide = dtype_of(grads[0]) == DType::float64;
  call.batch = grads[0].size(0), call.eps = eps;
  for (int first = 0; first < int(grads.size()); first += mrf::cuda::kMostTensors) {
    call.first_tensor = first, call.tensors = std::min<int>(mrf::cuda::kMostTensors, int(grads.size()) - first);
    for (int k = 0; k < call.tensors; ++k) {
      const size_t from = first + k;
      STD_TORCH_CHECK((dtype_of(grads[from]) == DType::float64) == wide, "modreg_fast_native: float64 tensors beside others");
      call.tilings[k] = tiling_of(grads[from], given.masks, from);
      call.grads[k] = array_of(grads[from]);
      if (!given.features.empty()) call.features[k] = array_of(given.features[from]);
      if (!to_grads.empty()) call.to_grads[k] = array_of(to_grads[from]);
      if (!to_features.empty()) call.to_features[k] = array_of(to_features[from]);
      call.values[k] = pointer_of(given.values, from), call.to_values[k] = pointer_of(to_values, from);
      call.fisher_maps[k] = pointer_of(given.fisher_maps, from), call.attribution_maps[k] = pointer_of(given.attribution_maps, from);
    }
    run(call, grads[0], !to_grads.empty(), wide, 3, call.tensors * call.batch);
  }
}

void gradient_statistics_forward(Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, Tensor fisher,
                                 Tensor attribution, Tensors fisher_maps, Tensors attribution_maps) {
  mrf::cuda::GradientStatistics call{};
  call.fisher = values.empty() ? nullptr : pointer_of(fisher), call.attribution = features.empty() ? nullptr : pointer_of(attribution);
  gradient_statistics({grads, features, values, masks, fisher_maps, attribution_maps}, eps, call, {}, {}, {});
}

void gradient_statistics_backward(Tensor fisher_weight, Tensor attribution_weight, Tensors fisher_map_grads, Tensors attribution_map_grads,
                                  Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, Tensors to_grads,
                                  Tensors to_features, Tensors to_values) {
  mrf::cuda::GradientStatistics call{};
  call.fisher_weight = pointer_of<double>(fisher_weight), call.attribution_weight = pointer_of<double>(attribution_weight);
  gradient_statistics({grads, features, values, masks, fisher_map_grads, attribution_map_grads}, eps, call, to_grads, to_features,
                      to_values);
}

std::string cuda_architectures() { return MRF_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modreg_fast_native, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_native, CUDA, m) {
  m.impl("softmax_fisher_forward", TORCH_BOX(&softmax_fisher_forward));
  m.impl("softmax_fisher_backward", TORCH_BOX(&softmax_fisher_backward));
  m.impl("gradient_statistics_forward", TORCH_BOX(&gradient_statistics_forward));
  m.impl("gradient_statistics_backward", TORCH_BOX(&gradient_statistics_backward));
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

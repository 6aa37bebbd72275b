// The raw ops modreg_fast_cuda::*, on LibTorch's stable ABI: raw pointers and sizes of the tensors, one launch for each
// part of a call (split.h), scratch memory from torch's allocator, all on the current stream.
// The arguments are prepared by modreg_fast/backends/cuda, so a failed check here means a call that did not come from there.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../dtype.h"
#include "check.h"
#include "launch.h"
#include "split.h"

// Not there in a torch without CUDA, where nothing here is called.
extern "C" int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace {

using mrf::DType;
using mrf::dtype_of;
using mrf::cuda::Array;
using mrf::cuda::Tiling;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// (B, C, P) with contiguous pixels, or else contiguous channels.
Array array_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 3, "modreg_fast_native: expected a (B, C, P) tensor on CUDA");
  const bool pixel_lines = (x.size(2) > 1 && x.stride(2) == 1) || (x.size(1) == 1 && x.size(2) == 1);
  STD_TORCH_CHECK(pixel_lines || x.stride(1) == 1, "modreg_fast_native: expected contiguous pixels or channels");
  return {x.data_ptr(), x.stride(0), pixel_lines ? x.stride(1) : x.stride(2), dtype_of(x), pixel_lines, false, 0, 0};
}

template <class T = void>
T* pointer_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.is_contiguous(), "modreg_fast_native: expected a contiguous tensor on CUDA");
  return static_cast<T*>(x.data_ptr());
}

std::vector<Array> arrays_of(const Tensors& tensors) {
  std::vector<Array> arrays;
  for (const Tensor& x : tensors) arrays.push_back(array_of(x));
  return arrays;
}

std::vector<void*> pointers_of(const Tensors& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& x : tensors) pointers.push_back(pointer_of(x));
  return pointers;
}

// Of the first `count` tensors; masks: of each of them, or none.
std::vector<Tiling> tilings_of(const Tensors& tensors, size_t count, const Tensors& masks) {
  std::vector<Tiling> tilings(count);
  for (size_t k = 0; k < count; ++k) {
    tilings[k].channels = tensors[k].size(1), tilings[k].pixels = tensors[k].size(2);
    tilings[k].mask = masks.empty() ? nullptr : pointer_of<uint8_t>(masks[k]);
  }
  return tilings;
}

// The results of blocks and the counters of a launch live until it is queued; the allocator keeps their memory in the order of the stream.
template <class Call>
void run(Call& call, const Tensor& like, bool backward, bool wide, int64_t rows, int64_t counters) {
  const mrf::cuda::Launch launch = mrf::cuda::plan(call, backward, wide ? 8 : 4, mrf::cuda::shared_memory_limit());
  STD_TORCH_CHECK(launch.shared_bytes >= 0,
                  "modreg_fast: backend 'cuda': too many channels or modalities: those of one pixel do not fit the shared memory of this "
                  "GPU, or softmax_fisher with noise, in float64 or of more than four modalities has more than 4096 channels (2048 in "
                  "float64); use backend 'reference'");
  std::optional<Tensor> partial, arrived;
  if (!backward) {
    partial = torch::stable::new_empty(like, {launch.blocks * rows}, wide ? ScalarType::Double : ScalarType::Float);
    // Cleared for each call: counters that were kept would be those of calls on other streams and of replayed graphs as well.
    arrived = torch::stable::new_zeros(like, {counters}, ScalarType::Int);
    call.partial = partial->data_ptr(), call.arrived = static_cast<uint32_t*>(arrived->data_ptr());
  }
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "modreg_fast_native: this torch does not tell its CUDA stream");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0, "modreg_fast_native: no CUDA stream");
  const char* error = mrf::cuda::launch(call, launch, backward, wide, stream);
  STD_TORCH_CHECK(error == nullptr, "modreg_fast: backend 'cuda': ", error);
}

// ---- softmax_fisher ----

void softmax_fisher(const Tensors& features, const Tensors& masks, const std::optional<Tensor>& present, const std::vector<double>& sigma,
                    int64_t draws, const std::optional<Tensor>& seed, double eps, bool wide, mrf::cuda::SoftmaxFisher call,
                    const Tensors& gradients) {
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  const int modalities = int(sigma.size());
  STD_TORCH_CHECK(modalities <= mrf::cuda::kMostArrays, "modreg_fast: backend 'cuda' takes at most 48 modalities");
  call.modalities = modalities, call.draws = int32_t(draws), call.batch = features[0].size(0), call.eps = eps;
  call.present = present.has_value() ? pointer_of<uint8_t>(*present) : nullptr;
  call.seed = seed.has_value() ? pointer_of<int64_t>(*seed) : nullptr;
  std::copy(sigma.begin(), sigma.end(), call.sigma);
  const mrf::cuda::SoftmaxFisherTables all{tilings_of(features, features.size() / sigma.size(), masks), arrays_of(features),
                                           arrays_of(gradients)};
  mrf::cuda::for_each_launch(call, all, [&](mrf::cuda::SoftmaxFisher& part) {
    run(part, features[0], !gradients.empty(), wide, modalities + 1, part.scales * part.batch);
  });
}

void softmax_fisher_forward(Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma, int64_t draws,
                            std::optional<Tensor> seed, double eps, Tensor information, Tensor counts) {
  mrf::check::softmax_fisher_forward(features, masks, present, sigma, draws, seed, eps, information, counts);
  mrf::cuda::SoftmaxFisher call{};
  call.information = pointer_of(information), call.counts = pointer_of<int64_t>(counts);
  softmax_fisher(features, masks, present, sigma, draws, seed, eps, dtype_of(information) == DType::float64, call, {});
}

void softmax_fisher_backward(Tensor weight, Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma,
                             int64_t draws, std::optional<Tensor> seed, bool detach_reference, double eps, Tensors gradients) {
  mrf::check::softmax_fisher_backward(weight, features, masks, present, sigma, draws, seed, eps, gradients);
  bool wide = false;
  for (const Tensor& x : features) wide |= dtype_of(x) == DType::float64;
  mrf::cuda::SoftmaxFisher call{};
  call.weight = pointer_of<double>(weight), call.detach_reference = detach_reference;
  softmax_fisher(features, masks, present, sigma, draws, seed, eps, wide, call, gradients);
}

// ---- modality_cross_entropy ----

void modality_cross_entropy(const Tensors& logits, const Tensor& target, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& present, int64_t ignore_index, double label_smoothing, double eps, bool wide,
                            mrf::cuda::ModalityCrossEntropy call, const Tensors& gradients) {
  const torch::stable::accelerator::DeviceGuard guard(logits[0].get_device_index());
  STD_TORCH_CHECK(logits.size() <= mrf::cuda::kMostArrays, "modreg_fast: backend 'cuda' takes at most 48 modalities");
  call.modalities = int32_t(logits.size()), call.batch = logits[0].size(0);
  call.target_type = mrf::integer_of(target), call.target = pointer_of(target);
  call.ignore_index = ignore_index, call.eps = eps, call.label_smoothing = label_smoothing;
  call.class_weight = weight.has_value() ? pointer_of<double>(*weight) : nullptr;
  call.present = present.has_value() ? pointer_of<uint8_t>(*present) : nullptr;
  call.tiling = tilings_of(logits, 1, {})[0];
  const auto fill = [&](const Tensors& tensors, Array* to) {
    for (size_t m = 0; m < tensors.size(); ++m) {
      to[m] = array_of(tensors[m]);
      STD_TORCH_CHECK(to[m].dtype == call.logits[0].dtype && to[m].pixel_lines == call.logits[0].pixel_lines,
                      "modreg_fast_native: expected logits of one dtype and layout");
    }
  };
  fill(logits, call.logits), fill(gradients, call.gradients);
  run(call, logits[0], !gradients.empty(), wide, 2 * call.modalities + 2, call.batch);
}

// Targets are checked on the device, where to look would be to wait: one that is no class makes the sums of its sample NaN.
bool modality_cross_entropy_forward(Tensors logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> present,
                                    int64_t ignore_index, double label_smoothing, double eps, Tensor cross_entropy, Tensor joint,
                                    Tensor information, Tensor weights) {
  mrf::check::modality_cross_entropy_forward(logits, target, weight, present, label_smoothing, eps, cross_entropy, joint, information,
                                             weights);
  mrf::cuda::ModalityCrossEntropy call{};
  call.cross_entropy = pointer_of(cross_entropy), call.joint = pointer_of(joint);
  call.information = pointer_of(information), call.weights = pointer_of(weights);
  modality_cross_entropy(logits, target, weight, present, ignore_index, label_smoothing, eps, dtype_of(joint) == DType::float64, call, {});
  return false;
}

void modality_cross_entropy_backward(Tensor to_cross_entropy, Tensor to_joint, Tensor to_information, Tensors logits, Tensor target,
                                     std::optional<Tensor> weight, std::optional<Tensor> present, int64_t ignore_index,
                                     double label_smoothing, double eps, Tensors gradients) {
  mrf::check::modality_cross_entropy_backward(to_cross_entropy, to_joint, to_information, logits, target, weight, present,
                                              label_smoothing, eps, gradients);
  mrf::cuda::ModalityCrossEntropy call{};
  call.to_cross_entropy = pointer_of<double>(to_cross_entropy), call.to_joint = pointer_of<double>(to_joint);
  call.to_information = pointer_of<double>(to_information);
  modality_cross_entropy(logits, target, weight, present, ignore_index, label_smoothing, eps, dtype_of(logits[0]) == DType::float64, call,
                         gradients);
}

// ---- gradient_statistics ----

void gradient_statistics(const mrf::cuda::GradientStatisticsTables& all, const Tensor& like, double eps,
                         mrf::cuda::GradientStatistics call, bool backward) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const bool wide = dtype_of(like) == DType::float64;
  for (const Array& x : all.grads)
    STD_TORCH_CHECK((x.dtype == DType::float64) == wide, "modreg_fast_native: float64 tensors beside others");
  call.batch = like.size(0), call.eps = eps;
  mrf::cuda::for_each_launch(call, all, [&](mrf::cuda::GradientStatistics& part) {
    run(part, like, backward, wide, 3, part.tensors * part.batch);
  });
}

void gradient_statistics_forward(Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, Tensor fisher,
                                 Tensor attribution, Tensors fisher_maps, Tensors attribution_maps) {
  mrf::check::gradient_statistics_forward(grads, features, values, masks, eps, fisher, attribution, fisher_maps, attribution_maps);
  mrf::cuda::GradientStatistics call{};
  call.fisher = values.empty() ? nullptr : pointer_of(fisher), call.attribution = features.empty() ? nullptr : pointer_of(attribution);
  const mrf::cuda::GradientStatisticsTables all{tilings_of(grads, grads.size(), masks), arrays_of(grads), arrays_of(features), {}, {},
                                                pointers_of(values), {}, pointers_of(fisher_maps), pointers_of(attribution_maps)};
  gradient_statistics(all, grads[0], eps, call, false);
}

void gradient_statistics_backward(Tensor fisher_weight, Tensor attribution_weight, Tensors fisher_map_grads, Tensors attribution_map_grads,
                                  Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, Tensors to_grads,
                                  Tensors to_features, Tensors to_values) {
  mrf::check::gradient_statistics_backward(fisher_weight, attribution_weight, fisher_map_grads, attribution_map_grads, grads, features, values,
                                           masks, eps, to_grads, to_features, to_values);
  mrf::cuda::GradientStatistics call{};
  call.fisher_weight = pointer_of<double>(fisher_weight), call.attribution_weight = pointer_of<double>(attribution_weight);
  const mrf::cuda::GradientStatisticsTables all{tilings_of(grads, grads.size(), masks), arrays_of(grads), arrays_of(features),
                                                arrays_of(to_grads), arrays_of(to_features), pointers_of(values),
                                                pointers_of(to_values), pointers_of(fisher_map_grads),
                                                pointers_of(attribution_map_grads)};
  gradient_statistics(all, grads[0], eps, call, true);
}

std::string cuda_architectures() { return MRF_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY(modreg_fast_cuda, m) {
  m.def(
      "softmax_fisher_forward(Tensor[] features, Tensor[] masks, Tensor? present, float[] sigma, int draws, Tensor? seed, float eps, "
      "Tensor(a!) information, Tensor(b!) counts) -> ()");
  m.def(
      "softmax_fisher_backward(Tensor weight, Tensor[] features, Tensor[] masks, Tensor? present, float[] sigma, int draws, Tensor? seed, "
      "bool detach_reference, float eps, Tensor(a!)[] gradients) -> ()");
  m.def(
      "gradient_statistics_forward(Tensor[] grads, Tensor[] features, Tensor[] values, Tensor[] masks, float eps, Tensor(a!) fisher, "
      "Tensor(b!) attribution, Tensor(c!)[] fisher_maps, Tensor(d!)[] attribution_maps) -> ()");
  m.def(
      "gradient_statistics_backward(Tensor fisher_weight, Tensor attribution_weight, Tensor[] fisher_map_grads, "
      "Tensor[] attribution_map_grads, Tensor[] grads, Tensor[] features, Tensor[] values, Tensor[] masks, float eps, "
      "Tensor(a!)[] to_grads, Tensor(b!)[] to_features, Tensor(c!)[] to_values) -> ()");
  m.def(
      "modality_cross_entropy_forward(Tensor[] logits, Tensor target, Tensor? weight, Tensor? present, int ignore_index, "
      "float label_smoothing, float eps, Tensor(a!) cross_entropy, Tensor(b!) joint, Tensor(c!) information, Tensor(d!) weights) -> bool");
  m.def(
      "modality_cross_entropy_backward(Tensor to_cross_entropy, Tensor to_joint, Tensor to_information, Tensor[] logits, Tensor target, "
      "Tensor? weight, Tensor? present, int ignore_index, float label_smoothing, float eps, Tensor(a!)[] gradients) -> ()");
  m.def("cuda_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_cuda, CUDA, m) {
  m.impl("softmax_fisher_forward", TORCH_BOX(&softmax_fisher_forward));
  m.impl("softmax_fisher_backward", TORCH_BOX(&softmax_fisher_backward));
  m.impl("modality_cross_entropy_forward", TORCH_BOX(&modality_cross_entropy_forward));
  m.impl("modality_cross_entropy_backward", TORCH_BOX(&modality_cross_entropy_backward));
  m.impl("gradient_statistics_forward", TORCH_BOX(&gradient_statistics_forward));
  m.impl("gradient_statistics_backward", TORCH_BOX(&gradient_statistics_backward));
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

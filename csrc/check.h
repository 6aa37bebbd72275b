// Checks of the arguments of the raw ops, of the CPU and of CUDA: whatever Python passes in ends in an exception, never in memory that is
// not the tensors' own. modreg_fast/backends/cpu passes nothing that fails here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace mrf {
namespace check {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void that(bool holds, const char* name, const char* expected) {
  STD_TORCH_CHECK(holds, "modreg_fast_native: ", name, " must be ", expected);
}

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Elements from the first to past the last in memory; 0 for an empty tensor. The sizes are those of a tensor, but may be made by stride
// tricks: no memory holds 2^48 elements.
inline int64_t extent(const Tensor& x, const char* name) {
  int64_t elements = 1, last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) {
    int64_t step = 0;
    const bool fits = !__builtin_mul_overflow(elements, x.size(i), &elements) && elements < int64_t(1) << 48 &&
                      !__builtin_mul_overflow(x.size(i) - 1, x.stride(i), &step) && !__builtin_add_overflow(last, step, &last);
    that(fits, name, "a tensor that fits the memory");
  }
  return elements == 0 ? 0 : last + 1;
}

// On the device of `like`, and all of its elements in its storage (which may have been resized).
inline void memory(const Tensor& x, const Tensor& like, const char* name) {
  that(x.is_cpu() == like.is_cpu() && x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), name,
       "on the device of the other tensors");
  int64_t bytes = 0;
  aoti_torch_get_storage_size(x.get(), &bytes);
  that(x.storage_offset() >= 0 && (x.storage_offset() + extent(x, name)) <= bytes / int64_t(x.element_size()), name,
       "a tensor whose storage holds its elements");
}

// Contiguous, of that type and shape.
inline void flat(const Tensor& x, const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
  bool fits = x.dim() == int64_t(sizes.size()) && x.scalar_type() == type;
  int64_t i = 0;
  for (int64_t size : sizes) fits = fits && x.size(i++) == size;
  that(fits && x.is_contiguous(), name, "contiguous, of the shape and the dtype that belong to the other arguments");
  memory(x, like, name);
}

// The line of memory is a run of pixels, or else of channels; see layout_of in modreg_fast/backends/layout.py.
inline bool pixel_lines(const Tensor& x) { return (x.size(2) > 1 && x.stride(2) == 1) || (x.size(1) == 1 && x.size(2) == 1); }

// Tensors (B, C, P) of one batch in one of the two layouts.
inline void inputs(const Tensors& tensors, const char* name) {
  that(!tensors.empty(), name, "at least one tensor");
  for (const Tensor& x : tensors) {
    that(x.dim() == 3 && x.numel() > 0 && x.size(0) == tensors[0].size(0), name, "non-empty tensors (B, C, P) of one batch size");
    const ScalarType type = x.scalar_type();
    that(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
         "of float32, float64, bfloat16 or float16");
    that(pixel_lines(x) || (x.size(1) > 1 && x.stride(1) == 1), name, "tensors with contiguous pixels or channels");
    memory(x, tensors[0], name);
  }
}

// The tensor belongs to another one: its shape, dtype and, for what is read in step with it, layout.
inline void same(const Tensor& x, const Tensor& other, bool layout, const char* name) {
  bool fits = x.dim() == 3 && x.scalar_type() == other.scalar_type();
  for (int64_t i = 0; fits && i < 3; ++i) fits = x.size(i) == other.size(i);
  that(fits && (!layout || pixel_lines(x) == pixel_lines(other)), name, "of the shape, dtype and layout of what it belongs to");
}

// What is written (after inputs() and same()): dense, so that no element is another one's as well.
inline void outputs(const Tensors& tensors, const Tensors& of, const char* name) {
  that(tensors.size() == of.size(), name, "as many tensors as there are inputs");
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Tensor& x = tensors[k];
    same(x, of[k], true, name);
    that(pixel_lines(x) || x.size(1) == 1 || x.stride(1) == 1, name, "a tensor with contiguous pixels or channels");
    std::pair<int64_t, int64_t> steps[3];
    for (int i = 0; i < 3; ++i) steps[i] = {x.size(i) == 1 ? 0 : x.stride(i), x.size(i)};
    std::sort(steps, steps + 3);
    int64_t next = 1;
    for (const auto& [step, size] : steps) {
      that(size == 1 || step == next, name, "dense");
      next *= size;
    }
    memory(x, of[k], name);
  }
}

// Nothing that is written overlaps anything else.
class Apart {
 public:
  void add(const Tensor& x, bool written) {
    const auto first = reinterpret_cast<uintptr_t>(x.data_ptr());
    const int64_t size = extent(x, "a tensor") * int64_t(x.element_size());
    if (size > 0) ranges_.push_back({first, first + uintptr_t(size), written});
  }
  void add(const Tensors& tensors, bool written) {
    for (const Tensor& x : tensors) add(x, written);
  }
  void check() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
    uintptr_t any = 0, written = 0;  // where those so far end
    for (const Range& range : ranges_) {
      that(range.first >= written && (!range.written || range.first >= any), "what is written", "apart from all other arguments");
      any = std::max(any, range.last);
      if (range.written) written = std::max(written, range.last);
    }
  }

 private:
  struct Range {
    uintptr_t first, last;
    bool written;
  };
  std::vector<Range> ranges_;
};

inline void eps(double value) { that(value >= 0 && std::isfinite(value), "eps", "a finite number of at least 0"); }

// None, or one (B, P) for each of the first `count` tensors.
inline void masks(const Tensors& masks, const Tensors& of, size_t count) {
  that(masks.empty() || masks.size() == count, "masks", "none, or one for each shape");
  for (size_t s = 0; s < masks.size(); ++s) flat(masks[s], of[0], ScalarType::Bool, {of[s].size(0), of[s].size(2)}, "masks");
}

// Features [m][s], one shape and dtype to a scale. Returns the number of modalities.
inline int64_t modalities(const Tensors& features, size_t count, const Tensors& masks, const std::optional<Tensor>& present, double eps) {
  inputs(features, "features");
  that(count > 0 && features.size() % count == 0, "features", "M tensors for each scale");
  const size_t scales = features.size() / count;
  for (size_t k = scales; k < features.size(); ++k) same(features[k], features[k % scales], false, "features");
  check::masks(masks, features, scales);
  if (present.has_value()) flat(*present, features[0], ScalarType::Bool, {features[0].size(0), int64_t(count)}, "present");
  check::eps(eps);
  return int64_t(count);
}

inline void softmax_fisher(const Tensors& features, const Tensors& masks, const std::optional<Tensor>& present,
                           const std::vector<double>& sigma, int64_t draws, const std::optional<Tensor>& seed, double eps) {
  modalities(features, sigma.size(), masks, present, eps);
  bool noise = false;
  for (double s : sigma) {
    that(s >= 0 && std::isfinite(s), "sigma", "finite numbers of at least 0");
    noise = noise || s > 0;
  }
  that(draws >= 1 && draws <= std::numeric_limits<int32_t>::max(), "draws", "in [1, 2^31)");
  that(!noise || seed.has_value(), "seed", "given where there is noise");
  if (seed.has_value()) {
    that(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed", "one number of int64");
    memory(*seed, features[0], "seed");
  }
}

inline void softmax_fisher_forward(const Tensors& features, const Tensors& masks, const std::optional<Tensor>& present,
                                   const std::vector<double>& sigma, int64_t draws, const std::optional<Tensor>& seed, double eps,
                                   const Tensor& information, const Tensor& counts) {
  softmax_fisher(features, masks, present, sigma, draws, seed, eps);
  const int64_t count = int64_t(sigma.size()), scales = int64_t(features.size()) / count, batch = features[0].size(0);
  flat(information, features[0], accumulation_type(information), {count, scales, batch}, "information");
  flat(counts, features[0], ScalarType::Long, {scales, batch}, "counts");
  Apart apart;
  apart.add(features, false), apart.add(masks, false), apart.add(information, true), apart.add(counts, true);
  if (present.has_value()) apart.add(*present, false);
  apart.check();
}

inline void softmax_fisher_backward(const Tensor& weight, const Tensors& features, const Tensors& masks, const std::optional<Tensor>& present,
                                    const std::vector<double>& sigma, int64_t draws, const std::optional<Tensor>& seed, double eps,
                                    const Tensors& gradients) {
  softmax_fisher(features, masks, present, sigma, draws, seed, eps);
  const int64_t count = int64_t(sigma.size()), scales = int64_t(features.size()) / count;
  flat(weight, features[0], ScalarType::Double, {count, scales, features[0].size(0)}, "weight");
  outputs(gradients, features, "gradients");
  Apart apart;
  apart.add(features, false), apart.add(masks, false), apart.add(weight, false), apart.add(gradients, true);
  if (present.has_value()) apart.add(*present, false);
  apart.check();
}

inline void modality_cross_entropy(const Tensors& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& present, double label_smoothing, double eps) {
  modalities(logits, logits.size(), {}, present, eps);
  const ScalarType type = target.scalar_type();
  that(type == ScalarType::Byte || type == ScalarType::Char || type == ScalarType::Short || type == ScalarType::Int ||
           type == ScalarType::Long,
       "target", "of uint8, int8, int16, int32 or int64");
  flat(target, logits[0], type, {logits[0].size(0), logits[0].size(2)}, "target");
  if (weight.has_value()) flat(*weight, logits[0], ScalarType::Double, {logits[0].size(1)}, "weight");
  that(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing", "in [0, 1]");
}

inline void modality_cross_entropy_forward(const Tensors& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& present, double label_smoothing, double eps,
                                           const Tensor& cross_entropy, const Tensor& joint, const Tensor& information,
                                           const Tensor& weights) {
  modality_cross_entropy(logits, target, weight, present, label_smoothing, eps);
  const int64_t count = int64_t(logits.size()), batch = logits[0].size(0);
  const ScalarType type = accumulation_type(cross_entropy);
  flat(cross_entropy, logits[0], type, {count, batch}, "cross_entropy");
  flat(joint, logits[0], type, {batch}, "joint");
  flat(information, logits[0], type, {count, batch}, "information");
  flat(weights, logits[0], type, {batch}, "weights");
  Apart apart;
  apart.add(logits, false), apart.add(target, false);
  for (const auto& x : {weight, present})
    if (x.has_value()) apart.add(*x, false);
  for (const Tensor& x : {cross_entropy, joint, information, weights}) apart.add(x, true);
  apart.check();
}

inline void modality_cross_entropy_backward(const Tensor& to_cross_entropy, const Tensor& to_joint, const Tensor& to_information,
                                            const Tensors& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& present, double label_smoothing, double eps,
                                            const Tensors& gradients) {
  modality_cross_entropy(logits, target, weight, present, label_smoothing, eps);
  const int64_t count = int64_t(logits.size()), batch = logits[0].size(0);
  flat(to_cross_entropy, logits[0], ScalarType::Double, {count, batch}, "to_cross_entropy");
  flat(to_joint, logits[0], ScalarType::Double, {batch}, "to_joint");
  flat(to_information, logits[0], ScalarType::Double, {count, batch}, "to_information");
  outputs(gradients, logits, "gradients");
  Apart apart;
  apart.add(logits, false), apart.add(target, false), apart.add(gradients, true);
  for (const auto& x : {weight, present})
    if (x.has_value()) apart.add(*x, false);
  for (const Tensor& x : {to_cross_entropy, to_joint, to_information}) apart.add(x, false);
  apart.check();
}

inline void gradient_statistics(const Tensors& grads, const Tensors& features, const Tensors& values, const Tensors& masks, double eps) {
  inputs(grads, "grads");
  if (!features.empty()) {
    inputs(features, "features");
    that(features.size() == grads.size(), "features", "none, or as many as grads");
    for (size_t k = 0; k < features.size(); ++k) {
      same(features[k], grads[k], true, "features");
      memory(features[k], grads[0], "features");
    }
  }
  that(values.empty() || values.size() == grads.size(), "values", "none, or as many as grads");
  for (size_t k = 0; k < values.size(); ++k)
    flat(values[k], grads[0], accumulation_type(grads[k]), {grads[k].size(0), grads[k].size(2)}, "values");
  check::masks(masks, grads, grads.size());
  check::eps(eps);
}

// None (and none may be there where there is no statistic), or a map (B, P) for each tensor.
inline void maps(const Tensors& maps, const Tensors& grads, bool allowed, const char* name) {
  that(maps.empty() || (allowed && maps.size() == grads.size()), name, "none, or one for each tensor of a statistic");
  for (size_t k = 0; k < maps.size(); ++k)
    flat(maps[k], grads[0], accumulation_type(grads[k]), {grads[k].size(0), grads[k].size(2)}, name);
}

inline void gradient_statistics_forward(const Tensors& grads, const Tensors& features, const Tensors& values, const Tensors& masks,
                                        double eps, const Tensor& fisher, const Tensor& attribution, const Tensors& fisher_maps,
                                        const Tensors& attribution_maps) {
  gradient_statistics(grads, features, values, masks, eps);
  const int64_t batch = grads[0].size(0);
  flat(fisher, grads[0], accumulation_type(fisher), {int64_t(values.size()), batch}, "fisher");
  flat(attribution, grads[0], fisher.scalar_type(), {int64_t(features.size()), batch}, "attribution");
  maps(fisher_maps, grads, !values.empty(), "fisher_maps");
  maps(attribution_maps, grads, !features.empty(), "attribution_maps");
  Apart apart;
  for (const Tensors* read : {&grads, &features, &values, &masks}) apart.add(*read, false);
  apart.add(fisher, true), apart.add(attribution, true), apart.add(fisher_maps, true), apart.add(attribution_maps, true);
  apart.check();
}

inline void gradient_statistics_backward(const Tensor& fisher_weight, const Tensor& attribution_weight, const Tensors& fisher_map_grads,
                                         const Tensors& attribution_map_grads, const Tensors& grads, const Tensors& features,
                                         const Tensors& values, const Tensors& masks, double eps, const Tensors& to_grads,
                                         const Tensors& to_features, const Tensors& to_values) {
  gradient_statistics(grads, features, values, masks, eps);
  const int64_t batch = grads[0].size(0);
  flat(fisher_weight, grads[0], ScalarType::Double, {int64_t(values.size()), batch}, "fisher_weight");
  flat(attribution_weight, grads[0], ScalarType::Double, {int64_t(features.size()), batch}, "attribution_weight");
  maps(fisher_map_grads, grads, !values.empty(), "fisher_map_grads");
  maps(attribution_map_grads, grads, !features.empty(), "attribution_map_grads");
  outputs(to_grads, grads, "to_grads");
  outputs(to_features, features, "to_features");
  that(to_values.size() == values.size(), "to_values", "as many as values");
  maps(to_values, grads, true, "to_values");
  Apart apart;
  for (const Tensors* read : {&grads, &features, &values, &masks, &fisher_map_grads, &attribution_map_grads}) apart.add(*read, false);
  for (const Tensors* written : {&to_grads, &to_features, &to_values}) apart.add(*written, true);
  apart.add(fisher_weight, false), apart.add(attribution_weight, false);
  apart.check();
}

}  // namespace check
}  // namespace mrf

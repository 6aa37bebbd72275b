// Checks of the arguments of the raw ops of CUDA, which write into tensors that the caller allocated: beside those of what is read
// (../check.h) of what is written.
#pragma once

#include <algorithm>
#include <utility>

#include "../check.h"

namespace mrf {
namespace check {

// (B, C, P) in place.
inline Flats flats(const Tensors& tensors, const Tensors& like, const char* name) {
  that(!like.empty(), name, "no tensors where there are no others");
  Flats found;
  for (const Tensor& x : tensors) {
    that(x.dim() == 3, name, "tensors (B, C, P)");
    found.push_back(flat_of(x, 1, like[0], name));
    that(found.back().in_place(), name, "tensors with contiguous pixels or channels");
  }
  return found;
}

// Dense, so that no element is another one's as well.
inline void outputs(const Tensors& tensors, const Flats& of, const char* name) {
  that(tensors.size() == of.size(), name, "as many tensors as there are inputs");
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Flat x = flat_of(tensors[k], 1, of[k].tensor, name);
    same(x, of[k], true, name);
    that(x.is_dense(), name, "dense");
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

inline void softmax_fisher_forward(const Tensors& features, const Tensors& masks, const std::optional<Tensor>& present,
                                   const std::vector<double>& sigma, int64_t draws, const std::optional<Tensor>& seed, double eps,
                                   const Tensor& information, const Tensor& counts) {
  softmax_fisher(flats(features, features, "features"), masks, present, sigma, draws, seed, eps);
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
  const Flats read = flats(features, features, "features");
  softmax_fisher(read, masks, present, sigma, draws, seed, eps);
  const int64_t count = int64_t(sigma.size()), scales = int64_t(features.size()) / count;
  flat(weight, features[0], ScalarType::Double, {count, scales, features[0].size(0)}, "weight");
  outputs(gradients, read, "gradients");
  Apart apart;
  apart.add(features, false), apart.add(masks, false), apart.add(weight, false), apart.add(gradients, true);
  if (present.has_value()) apart.add(*present, false);
  apart.check();
}

inline void modality_cross_entropy_forward(const Tensors& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& present, double label_smoothing, double eps,
                                           const Tensor& cross_entropy, const Tensor& joint, const Tensor& information,
                                           const Tensor& weights) {
  modality_cross_entropy(flats(logits, logits, "logits"), target, weight, present, label_smoothing, eps);
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
  const Flats read = flats(logits, logits, "logits");
  modality_cross_entropy(read, target, weight, present, label_smoothing, eps);
  const int64_t count = int64_t(logits.size()), batch = logits[0].size(0);
  flat(to_cross_entropy, logits[0], ScalarType::Double, {count, batch}, "to_cross_entropy");
  flat(to_joint, logits[0], ScalarType::Double, {batch}, "to_joint");
  flat(to_information, logits[0], ScalarType::Double, {count, batch}, "to_information");
  outputs(gradients, read, "gradients");
  Apart apart;
  apart.add(logits, false), apart.add(target, false), apart.add(gradients, true);
  for (const auto& x : {weight, present})
    if (x.has_value()) apart.add(*x, false);
  for (const Tensor& x : {to_cross_entropy, to_joint, to_information}) apart.add(x, false);
  apart.check();
}

inline void gradient_statistics_forward(const Tensors& grads, const Tensors& features, const Tensors& values, const Tensors& masks,
                                        double eps, const Tensor& fisher, const Tensor& attribution, const Tensors& fisher_maps,
                                        const Tensors& attribution_maps) {
  const Flats read = flats(grads, grads, "grads"), other = flats(features, grads, "features");
  gradient_statistics(read, other, values, masks, eps);
  const int64_t batch = grads[0].size(0);
  flat(fisher, grads[0], accumulation_type(fisher), {int64_t(values.size()), batch}, "fisher");
  flat(attribution, grads[0], fisher.scalar_type(), {int64_t(features.size()), batch}, "attribution");
  maps(fisher_maps, read, !values.empty(), "fisher_maps");
  maps(attribution_maps, read, !features.empty(), "attribution_maps");
  Apart apart;
  for (const Tensors* read : {&grads, &features, &values, &masks}) apart.add(*read, false);
  apart.add(fisher, true), apart.add(attribution, true), apart.add(fisher_maps, true), apart.add(attribution_maps, true);
  apart.check();
}

inline void gradient_statistics_backward(const Tensor& fisher_weight, const Tensor& attribution_weight, const Tensors& fisher_map_grads,
                                         const Tensors& attribution_map_grads, const Tensors& grads, const Tensors& features,
                                         const Tensors& values, const Tensors& masks, double eps, const Tensors& to_grads,
                                         const Tensors& to_features, const Tensors& to_values) {
  const Flats read = flats(grads, grads, "grads"), other = flats(features, grads, "features");
  gradient_statistics(read, other, values, masks, eps);
  const int64_t batch = grads[0].size(0);
  flat(fisher_weight, grads[0], ScalarType::Double, {int64_t(values.size()), batch}, "fisher_weight");
  flat(attribution_weight, grads[0], ScalarType::Double, {int64_t(features.size()), batch}, "attribution_weight");
  maps(fisher_map_grads, read, !values.empty(), "fisher_map_grads");
  maps(attribution_map_grads, read, !features.empty(), "attribution_map_grads");
  outputs(to_grads, read, "to_grads");
  outputs(to_features, other, "to_features");
  that(to_values.size() == values.size(), "to_values", "as many as values");
  maps(to_values, read, true, "to_values");
  Apart apart;
  for (const Tensors* read : {&grads, &features, &values, &masks, &fisher_map_grads, &attribution_map_grads}) apart.add(*read, false);
  for (const Tensors* written : {&to_grads, &to_features, &to_values}) apart.add(*written, true);
  apart.add(fisher_weight, false), apart.add(attribution_weight, false);
  apart.check();
}

}  // namespace check
}  // namespace mrf

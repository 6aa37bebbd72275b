// Checks of the arguments of the raw ops, of the CPU and of CUDA: whatever Python passes in ends in an exception, never in memory that is
// not the tensors' own. modreg_fast/backends passes nothing that fails here.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "flat.h"

namespace mrf {
namespace check {

inline ScalarType accumulation_type(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }
inline ScalarType accumulation_type(const Tensor& x) { return accumulation_type(x.scalar_type()); }

// Contiguous, of that type and shape.
inline void flat(const Tensor& x, const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
  const auto own = x.sizes();
  const bool fits = x.scalar_type() == type && own.size() == sizes.size() && std::equal(own.begin(), own.end(), sizes.begin());
  that(fits && x.is_contiguous(), name, "contiguous, of the shape and the dtype that belong to the other arguments");
  memory(x, like, name);
}

// Tensors of one batch in one of the two layouts.
inline void inputs(const Flats& tensors, const char* name) {
  that(!tensors.empty(), name, "at least one tensor");
  for (const Flat& x : tensors) {
    that(x.batch == tensors[0].batch, name, "of one batch size");
    that(x.in_place(), name, "tensors with contiguous pixels or channels");
  }
}

// The tensor belongs to another one: its shape, dtype and, for what is read in step with it, layout.
inline void same(const Flat& x, const Flat& other, bool layout, const char* name) {
  const bool fits = x.type == other.type && x.batch == other.batch && x.channels == other.channels && x.pixels == other.pixels;
  that(fits && (!layout || x.has_layout_of(other)), name, "of the shape, dtype and layout of what it belongs to");
}

inline void eps(double value) { that(value >= 0 && std::isfinite(value), "eps", "a finite number of at least 0"); }

// None, or one (B, P) for each of the first `count` tensors.
inline void masks(const Tensors& masks, const Flats& of, size_t count) {
  that(masks.empty() || masks.size() == count, "masks", "none, or one for each shape");
  for (size_t s = 0; s < masks.size(); ++s) flat(masks[s], of[0].tensor, ScalarType::Bool, {of[s].batch, of[s].pixels}, "masks");
}

// Features [m][s], one shape and dtype to a scale.
inline void modalities(const Flats& features, size_t count, const Tensors& masks, const std::optional<Tensor>& present, double eps) {
  inputs(features, "features");
  that(count > 0 && features.size() % count == 0, "features", "M tensors for each scale");
  const size_t scales = features.size() / count;
  for (size_t k = scales; k < features.size(); ++k) same(features[k], features[k % scales], false, "features");
  check::masks(masks, features, scales);
  if (present.has_value()) flat(*present, features[0].tensor, ScalarType::Bool, {features[0].batch, int64_t(count)}, "present");
  check::eps(eps);
}

inline void softmax_fisher(const Flats& features, const Tensors& masks, const std::optional<Tensor>& present,
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
    memory(*seed, features[0].tensor, "seed");
  }
}

inline void modality_cross_entropy(const Flats& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& present, double label_smoothing, double eps) {
  modalities(logits, logits.size(), {}, present, eps);
  const ScalarType type = target.scalar_type();
  that(type == ScalarType::Byte || type == ScalarType::Char || type == ScalarType::Short || type == ScalarType::Int ||
           type == ScalarType::Long,
       "target", "of uint8, int8, int16, int32 or int64");
  flat(target, logits[0].tensor, type, {logits[0].batch, logits[0].pixels}, "target");
  if (weight.has_value()) flat(*weight, logits[0].tensor, ScalarType::Double, {logits[0].channels}, "weight");
  that(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing", "in [0, 1]");
}

// None (and none may be there where there is no statistic), or a map (B, *spatial) for each tensor, contiguous, in its accumulation type.
inline void maps(const Tensors& maps, const Flats& grads, bool allowed, const char* name) {
  that(maps.empty() || (allowed && maps.size() == grads.size()), name, "none, or one for each tensor of a statistic");
  for (size_t k = 0; k < maps.size(); ++k) {
    const Tensor& x = maps[k];
    memory(x, grads[0].tensor, name);
    that(x.scalar_type() == accumulation_type(grads[k].type) && x.is_contiguous() && x.dim() > 0 && x.size(0) == grads[k].batch &&
             x.numel() == grads[k].batch * grads[k].pixels,
         name, "contiguous, of the pixels of its tensor and of its accumulation type");
  }
}

inline void gradient_statistics(const Flats& grads, const Flats& features, const Tensors& values, const Tensors& masks, double eps) {
  inputs(grads, "grads");
  that(features.empty() || features.size() == grads.size(), "features", "none, or as many as grads");
  for (size_t k = 0; k < features.size(); ++k) same(features[k], grads[k], true, "features");
  maps(values, grads, true, "values");
  check::masks(masks, grads, grads.size());
  check::eps(eps);
}

}  // namespace check
}  // namespace mrf

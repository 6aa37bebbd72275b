// (B, C, P) of tensors of any shape, and its two memory layouts that the kernels read and write in place (those of
// modreg_fast/backends/layout.py): lines of pixels, or lines of channels. Everything else is copied once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace mrf __attribute__((visibility("hidden"))) {  // as torch's own types are

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void that(bool holds, const char* name, const char* expected) {
  STD_TORCH_CHECK(holds, "modreg_fast_native: ", name, " must be ", expected);
}

// Elements from the first to past the last in memory; 0 for an empty tensor. The sizes are those of a tensor, but may be made by stride
// tricks: no memory holds 2^48 elements.
inline int64_t extent(const Tensor& x, const char* name) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t elements = 1, last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    int64_t step = 0;
    const bool fits = !__builtin_mul_overflow(elements, sizes[i], &elements) && elements < int64_t(1) << 48 &&
                      !__builtin_mul_overflow(sizes[i] - 1, strides[i], &step) && !__builtin_add_overflow(last, step, &last);
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

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

struct Flat {
  Tensor tensor;
  ScalarType type;
  int64_t batch, channels, pixels = 1;
  int64_t sample_stride, channel_stride, pixel_stride = 1;
  bool one_stride = true;  // of the pixels

  // Lines of pixels, or else of channels.
  bool pixel_lines() const { return (pixels > 1 && pixel_stride == 1) || (channels == 1 && pixels == 1); }
  bool in_place() const { return one_stride && (pixel_lines() || (channels > 1 && channel_stride == 1)); }
  bool has_layout_of(const Flat& other) const { return in_place() && pixel_lines() == other.pixel_lines(); }

  // No element is another one's as well, and none is left out.
  bool is_dense() const {
    if (!one_stride) return false;
    std::pair<int64_t, int64_t> steps[] = {{sample_stride, batch}, {channel_stride, channels}, {pixel_stride, pixels}};
    std::sort(std::begin(steps), std::end(steps));
    int64_t next = 1;
    for (const auto& [step, size] : steps) {
      if (size == 1) continue;
      if (step != next) return false;
      next *= size;
    }
    return true;
  }
};

using Flats = std::vector<Flat>;

// Non-empty (B, C, *spatial) with the channels at `channel_dim`, of a dtype of the kernels and on the device of `like`.
inline Flat flat_of(const Tensor& x, int64_t channel_dim, const Tensor& like, const char* name) {
  memory(x, like, name);
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dims = int64_t(sizes.size()), c = channel_dim < 0 ? channel_dim + dims : channel_dim;
  that(dims >= 2 && 0 < c && c < dims && x.numel() > 0, name, "non-empty tensors (B, C, *spatial), the channels at channel_dim");
  Flat flat{x, x.scalar_type(), sizes[0], sizes[c], 1, strides[0], strides[c]};
  that(is_floating(flat.type), name, "of float32, float64, bfloat16 or float16");
  for (int64_t d = dims - 1; d > 0; --d) {
    if (d == c || sizes[d] == 1) continue;
    if (flat.pixels == 1) flat.pixel_stride = strides[d];
    flat.one_stride = flat.one_stride && strides[d] == flat.pixel_stride * flat.pixels;
    flat.pixels *= sizes[d];
  }
  return flat;
}

inline Tensor empty_strided(const Tensor& like, const int64_t* strides) {
  int32_t dtype = 0, device = 0;
  AtenTensorHandle made = nullptr;
  aoti_torch_get_dtype(like.get(), &dtype), aoti_torch_get_device_type(like.get(), &device);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(like.dim(), like.sizes().data(), strides, dtype, device, like.get_device_index(), &made));
  return Tensor(made);
}

// A dense tensor of the shape of `x`, in one of the layouts.
inline Flat empty_in_layout(const Flat& x, int64_t channel_dim, bool pixel_lines) {
  const auto sizes = x.tensor.sizes();
  const int64_t dims = int64_t(sizes.size()), c = channel_dim < 0 ? channel_dim + dims : channel_dim;
  std::vector<int64_t> strides(dims);
  strides[0] = x.channels * x.pixels, strides[c] = pixel_lines ? x.pixels : 1;
  int64_t step = pixel_lines ? 1 : x.channels;
  for (int64_t d = dims - 1; d > 0; --d)
    if (d != c) strides[d] = step, step *= sizes[d];
  return flat_of(empty_strided(x.tensor, strides.data()), channel_dim, x.tensor, "a copy");
}

// As the kernels read it; where `other` is given, in its layout.
inline Flat read(const Tensor& x, int64_t channel_dim, const Tensor& like, const char* name, const Flat* other = nullptr) {
  Flat flat = flat_of(x, channel_dim, like, name);
  if (other ? flat.has_layout_of(*other) : flat.in_place()) return flat;
  Flat copy = empty_in_layout(flat, channel_dim, other ? other->pixel_lines() : flat.pixels > 1 || flat.channels == 1);
  torch::stable::copy_(copy.tensor, x);
  return copy;
}

// The gradient of a tensor: what is returned, with the strides that torch.empty_like gives, as the fake kernels of the ops promise; and
// what is written, in the layout of what was read: the same memory wherever it has that layout.
struct Gradient {
  Tensor result;
  Flat written;

  Tensor finished() {
    if (written.tensor.get() != result.get()) torch::stable::copy_(result, written.tensor);
    return result;
  }
};

inline Gradient gradient_of(const Tensor& x, int64_t channel_dim, const Flat& read) {
  const bool dense = read.tensor.get() == x.get() && read.is_dense();
  const Tensor result = dense ? empty_strided(x, x.strides().data()) : torch::stable::empty_like(x);
  const Flat flat = flat_of(result, channel_dim, x, "a gradient");
  return {result, flat.has_layout_of(read) ? flat : empty_in_layout(flat, channel_dim, read.pixel_lines())};
}

}  // namespace mrf

// What the bindings of the CPU share: arguments as the kernels read them, results, the division of a call into units of work, threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "../check.h"
#include "../dtype.h"
#include "../problem.h"

namespace mrf {
namespace {

View view_of(const Flat& x) {
  // Of one pixel, the stride that is never stepped by has to be one that says which are the lines.
  return {x.tensor.data_ptr(), x.sample_stride, x.channel_stride, x.pixels > 1 ? x.pixel_stride : x.channels};
}

// (B, P), contiguous.
std::vector<View> flat_views_of(const Tensors& tensors) {
  std::vector<View> views;
  for (const Tensor& x : tensors) views.push_back({x.data_ptr(), 0, 0, 1});
  return views;
}

std::vector<void*> pointers_of(const Tensors& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& x : tensors) pointers.push_back(x.data_ptr());
  return pointers;
}

template <class T>
const T* data_or_null(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

// Of another dtype where `type` says so. Of at most `most` elements, so that no wrong one, expanded from little memory, is copied.
Tensor contiguous(const Tensor& x, int64_t most, const char* name, std::optional<ScalarType> type = std::nullopt) {
  memory(x, x, name);
  that(x.numel() <= most, name, "of no more elements than what it belongs to");
  if (type.has_value() && x.scalar_type() != *type) {
    that(is_floating(x.scalar_type()), name, "of float32, float64, bfloat16 or float16");
    return contiguous(torch::stable::to(x, type), most, name);
  }
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

Tensors contiguous(const Tensors& tensors, int64_t most, const char* name) {
  Tensors found;
  for (const Tensor& x : tensors) found.push_back(contiguous(x, most, name));
  return found;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x, int64_t most, const char* name,
                                 std::optional<ScalarType> type = std::nullopt) {
  return x.has_value() ? std::optional(contiguous(*x, most, name, type)) : x;
}

ScalarType widest(const Tensors& tensors) {
  for (const Tensor& x : tensors)
    if (x.scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[3], step = 1;
  for (int64_t d = int64_t(sizes.size()); d-- > 0; step *= sizes.begin()[d]) strides[d] = step;
  const int32_t dtype = type == ScalarType::Long     ? aoti_torch_dtype_int64()
                        : type == ScalarType::Double ? aoti_torch_dtype_float64()
                                                     : aoti_torch_dtype_float32();
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Writes `value(i)` to element i of a tensor of float32 or float64.
template <class Value>
void fill(const Tensor& to, const Value& value) {
  const int64_t count = to.numel();
  if (to.scalar_type() == ScalarType::Double)
    for (int64_t i = 0; i < count; ++i) static_cast<double*>(to.data_ptr())[i] = value(i);
  else
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(to.data_ptr())[i] = float(value(i));
}

// The numbers of an upstream gradient of one to three dimensions, which may be expanded from one number.
std::vector<double> doubles_of(const Tensor& x, std::initializer_list<int64_t> sizes, const char* name) {
  const auto own = x.sizes(), steps = x.strides();
  const bool wide = x.scalar_type() == ScalarType::Double;
  that((wide || x.scalar_type() == ScalarType::Float) && std::equal(own.begin(), own.end(), sizes.begin(), sizes.end()), name,
       "of the shape of its result, in float32 or float64");
  that(x.is_cpu(), name, "on the CPU"), memory(x, x, name);
  int64_t size[3] = {1, 1, 1}, step[3] = {0, 0, 0};
  std::copy(own.begin(), own.end(), size + 3 - own.size()), std::copy(steps.begin(), steps.end(), step + 3 - own.size());
  std::vector<double> found;
  for (int64_t i = 0; i < size[0]; ++i)
    for (int64_t j = 0; j < size[1]; ++j)
      for (int64_t k = 0; k < size[2]; ++k) {
        const int64_t at = i * step[0] + j * step[1] + k * step[2];
        found.push_back(wide ? static_cast<const double*>(x.data_ptr())[at] : static_cast<const float*>(x.data_ptr())[at]);
      }
  return found;
}

// Bytes of all inputs of a tile at most. A tile is read again from L2 or L3; longer rows are worth more than smaller tiles that stay in L1.
constexpr int64_t kTileBytes = 1 << 20;

// Cuts tensors (one per tiling, `tensors_per_pixel` of its kind read together) into units; returns the number of units.
int64_t units_of(const Flat* tensors, int count, const Tensors& masks, int tensors_per_pixel, int64_t most_pixels,
                 bool samples_as_pixels, std::vector<Tiling>& tilings) {
  int64_t units = 0, slots = 0;
  for (int t = 0; t < count; ++t) {
    const Flat& x = tensors[t];
    Tiling tiling{};
    tiling.dtype = dtype_of(x.tensor);
    tiling.samples_as_pixels = samples_as_pixels && x.pixels == 1;
    tiling.channels = x.channels;
    tiling.pixels = tiling.samples_as_pixels ? x.batch : x.pixels;
    const int64_t bytes_per_pixel = tiling.channels * tensors_per_pixel * int64_t(x.tensor.element_size());
    // Multiples of 64 pixels: whole groups for every instruction set, and whole cache lines.
    tiling.tile = std::clamp<int64_t>(kTileBytes / bytes_per_pixel / 64 * 64, 64, most_pixels);
    tiling.tiles = (tiling.pixels + tiling.tile - 1) / tiling.tile;
    tiling.first_unit = units;
    tiling.first_slot = slots;
    tiling.mask = masks.empty() ? nullptr : static_cast<const uint8_t*>(masks[t].data_ptr());
    tilings.push_back(tiling);
    units += tiling.samples_as_pixels ? tiling.tiles : x.batch * tiling.tiles;
    slots += x.batch * slots_per_sample(tiling);
  }
  return units;
}

// Gradients are fresh memory, which Linux clears page by page at the first write. Here in huge pages, where they are offered on request,
// and by all threads, each its own pages: inside the kernel two threads would meet in every page, and one of them clears it in vain.
void populate(const Tensors& tensors) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE of Linux 5.14, unknown to older headers; an older kernel refuses it
  std::vector<uintptr_t> pages;
  for (const Tensor& x : tensors) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(x.data_ptr()), end = start + x.numel() * x.element_size();
    const uintptr_t first = (start + page - 1) / page * page;
    if (first + page <= end) madvise(reinterpret_cast<void*>(first), (end - first) / page * page, MADV_HUGEPAGE);
    for (uintptr_t at = first; at + page <= end; at += page) pages.push_back(at);
  }
  torch::stable::parallel_for(0, int64_t(pages.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) madvise(reinterpret_cast<void*>(pages[i]), page, populate_write);
  });
#else
  (void)tensors;
#endif
}

// A barrier of OpenMP, told to ThreadSanitizer, which does not see those of a libgomp that was not built with it.
struct Barrier {
#if defined(__SANITIZE_THREAD__)
  static inline char mark;
  Barrier() { __tsan_acquire(&mark); }
  ~Barrier() { __tsan_release(&mark); }
#else
  Barrier() {}
#endif
};

template <class Problem>
void run(Kernel<Problem> kernel, const Problem& problem, int64_t scratch_bytes) {
  int64_t counter = 0;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), problem.units);
  const auto work = [&](int64_t, int64_t) {
    const Barrier barrier;
    const std::unique_ptr<char[]> memory(new char[scratch_bytes + 64]);
    void* aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    kernel(problem, &counter, aligned);
  };
  Barrier{};
  torch::stable::parallel_for(0, threads, 1, work);
  Barrier{};
}

// Tensors that are read, and their gradients.
struct Inputs {
  const Tensors& given;
  const int64_t channel_dim;
  Flats flats;
  int64_t elements = 0;
  std::vector<Gradient> gradients;

  // `like`: whose device they are on; `others`: whose layouts they have, if any.
  Inputs(const Tensors& given, int64_t channel_dim, const Tensors& like, const char* name, const Flats* others = nullptr)
      : given(given), channel_dim(channel_dim) {
    that(!others || given.size() <= others->size(), name, "at most as many as the others");
    for (size_t k = 0; k < given.size(); ++k) {
      flats.push_back(read(given[k], channel_dim, like[0], name, others ? &(*others)[k] : nullptr));
      that(given[k].is_cpu(), name, "on the CPU");
      elements += given[k].numel();
    }
  }

  std::vector<View> views() const {
    std::vector<View> found;
    for (const Flat& x : flats) found.push_back(view_of(x));
    return found;
  }

  // Allocates the gradients.
  std::vector<View> gradient_views() {
    std::vector<View> found;
    Tensors written;
    for (size_t k = 0; k < flats.size(); ++k) {
      gradients.push_back(gradient_of(given[k], channel_dim, flats[k]));
      written.push_back(gradients[k].written.tensor);
      found.push_back(view_of(gradients[k].written));
    }
    populate(written);
    return found;
  }

  void finish(Tensors& results) {
    for (Gradient& gradient : gradients) results.push_back(gradient.finished());
  }
};

}  // namespace
}  // namespace mrf

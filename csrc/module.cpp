// Registration of the raw ops modreg_fast_native::* on LibTorch's stable ABI, and the division of a call into units of work.
//
// The ops write into tensors that the caller allocated and have no autograd of their own; modreg_fast/backends/cpu.py prepares the
// arguments (layouts, dtypes, sizes), so a failed check here means a call that did not come from there.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "dtype.h"

namespace {

using mrf::DType;
using mrf::dtype_of;
using mrf::Tiling;
using mrf::View;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// (B, C, P) with contiguous pixels, or else contiguous channels (of several pixels or several channels; see layout_of in cpu/layout.py).
View view_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "modreg_fast_native: expected a (B, C, P) tensor on the CPU");
  View view{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  const int64_t channels = x.size(1), pixels = x.size(2);
  if (pixels > 1 && view.pixel_stride == 1) return view;
  if (channels > 1) {
    STD_TORCH_CHECK(view.channel_stride == 1, "modreg_fast_native: expected contiguous pixels or channels");
    if (pixels == 1) view.pixel_stride = channels;  // never stepped by
    return view;
  }
  STD_TORCH_CHECK(pixels == 1, "modreg_fast_native: expected contiguous pixels or channels");
  view.pixel_stride = 1;
  return view;
}

std::vector<View> views_of(const Tensors& tensors) {
  std::vector<View> views;
  for (const Tensor& x : tensors) views.push_back(view_of(x));
  return views;
}

// (B, P), contiguous.
View flat_view_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "modreg_fast_native: expected a contiguous tensor on the CPU");
  return View{x.data_ptr(), 0, 0, 1};
}

std::vector<View> flat_views_of(const Tensors& tensors) {
  std::vector<View> views;
  for (const Tensor& x : tensors) views.push_back(flat_view_of(x));
  return views;
}

std::vector<void*> pointers_of(const Tensors& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& x : tensors) pointers.push_back(flat_view_of(x).data);
  return pointers;
}

template <class T>
const T* data_or_null(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(flat_view_of(*x).data) : nullptr;
}

// Bytes of all inputs of a tile at most. A tile is read again from L2 or L3; longer rows are worth more than smaller tiles that stay in L1.
constexpr int64_t kTileBytes = 1 << 20;

// Cuts tensors (one per tiling, `tensors_per_pixel` of its kind read together) into units; returns the number of units.
int64_t divide(const Tensor* tensors, int count, const Tensors& masks, int tensors_per_pixel, int64_t most_pixels,
               bool samples_as_pixels, std::vector<Tiling>& tilings) {
  int64_t units = 0, slots = 0;
  for (int t = 0; t < count; ++t) {
    const Tensor& x = tensors[t];
    Tiling tiling{};
    tiling.dtype = dtype_of(x);
    tiling.samples_as_pixels = samples_as_pixels && x.size(2) == 1;
    tiling.channels = x.size(1);
    tiling.pixels = tiling.samples_as_pixels ? x.size(0) : x.size(2);
    const int64_t bytes_per_pixel = tiling.channels * tensors_per_pixel * int64_t(x.element_size());
    // Multiples of 64 pixels: whole groups for every instruction set, and whole cache lines.
    tiling.tile = std::clamp<int64_t>(kTileBytes / bytes_per_pixel / 64 * 64, 64, most_pixels);
    tiling.tiles = (tiling.pixels + tiling.tile - 1) / tiling.tile;
    tiling.first_unit = units;
    tiling.first_slot = slots;
    tiling.mask = masks.empty() ? nullptr : static_cast<const uint8_t*>(flat_view_of(masks[t]).data);
    tilings.push_back(tiling);
    units += tiling.samples_as_pixels ? tiling.tiles : x.size(0) * tiling.tiles;
    slots += x.size(0) * mrf::slots_per_sample(tiling);
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
void run(mrf::Kernel<Problem> kernel, const Problem& problem, int64_t scratch_bytes) {
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

// ---- the ops over modalities ----

template <class Problem>
struct ModalitiesCall {
  std::vector<Tiling> tilings;
  std::vector<View> features, gradients;
  std::vector<double> partial;
  Problem problem{};
  int64_t most_channels = 0;

  ModalitiesCall(const Tensors& inputs, int modalities, const Tensors& masks, const std::optional<Tensor>& present, double eps)
      : features(views_of(inputs)) {
    STD_TORCH_CHECK(modalities <= mrf::kMaxModalities, "modreg_fast_native: at most 64 modalities");
    problem.modalities = modalities;
    problem.scales = int(inputs.size()) / modalities;
    problem.units = divide(inputs.data(), problem.scales, masks, modalities, mrf::kMostPixels, !present.has_value(), tilings);
    problem.neighbours = std::clamp<int64_t>(problem.units / (16 * torch::stable::get_num_threads()), 1, 4);
    problem.batch = inputs[0].size(0);
    problem.tilings = tilings.data();
    fold(features);
    problem.features = features.data();
    problem.present = data_or_null<uint8_t>(present);
    problem.eps = eps;
    for (const Tiling& tiling : tilings) most_channels = std::max(most_channels, tiling.channels);
  }

  void write_to(const Tensors& tensors) {
    gradients = views_of(tensors);
    fold(gradients);
    problem.gradients = gradients.data();
    populate(tensors);
  }

  // Room for `sums` numbers a slot.
  void keep_sums(int64_t sums) {
    partial.resize(slots() * sums);
    problem.partial = partial.data();
  }

  int64_t slots() const { return tilings.back().first_slot + problem.batch * mrf::slots_per_sample(tilings.back()); }

 private:
  // Steps from sample to sample where samples are computed as pixels.
  void fold(std::vector<View>& views) const {
    for (size_t k = 0; k < views.size(); ++k)
      if (tilings[k % tilings.size()].samples_as_pixels) views[k].pixel_stride = views[k].sample_stride;
  }
};

// ---- softmax_fisher ----

struct SoftmaxFisherCall : ModalitiesCall<mrf::SoftmaxFisher> {
  SoftmaxFisherCall(const Tensors& inputs, const Tensors& masks, const std::optional<Tensor>& present, const std::vector<double>& sigma,
                    int64_t draws, const std::optional<Tensor>& seed, double eps)
      : ModalitiesCall(inputs, int(sigma.size()), masks, present, eps) {
    problem.draws = int(draws);
    problem.sigma = sigma.data();
    problem.seed = seed.has_value() ? *data_or_null<uint64_t>(seed) : 0;
  }

  int64_t scratch_bytes() const { return mrf::softmax_fisher_scratch(problem.modalities, most_channels); }
};

template <class T>
void write_information(const SoftmaxFisherCall& call, T* information, int64_t* counts) {
  const mrf::SoftmaxFisher& problem = call.problem;
  for (int s = 0; s < problem.scales; ++s) {
    const int64_t slots = mrf::slots_per_sample(call.tilings[s]);
    for (int64_t b = 0; b < problem.batch; ++b) {
      const int64_t first = call.tilings[s].first_slot + b * slots;
      int64_t count = 0;
      for (int64_t slot = first; slot < first + slots; ++slot) count += problem.valid[slot];
      counts[s * problem.batch + b] = count;
      for (int m = 0; m < problem.modalities; ++m) {
        double sum = 0;
        for (int64_t slot = first; slot < first + slots; ++slot) sum += problem.partial[slot * problem.modalities + m];
        information[(m * problem.scales + s) * problem.batch + b] = T(count ? sum / (double(count) * problem.draws) : 0);
      }
    }
  }
}

void softmax_fisher_forward(Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma, int64_t draws,
                            std::optional<Tensor> seed, double eps, Tensor information, Tensor counts) {
  mrf::check::softmax_fisher_forward(features, masks, present, sigma, draws, seed, eps, information, counts);
  SoftmaxFisherCall call(features, masks, present, sigma, draws, seed, eps);
  std::vector<int64_t> valid(call.slots());
  call.keep_sums(call.problem.modalities);
  call.problem.valid = valid.data();
  run(mrf::instruction_set().kernels->softmax_fisher_forward, call.problem, call.scratch_bytes());
  auto* out_counts = static_cast<int64_t*>(flat_view_of(counts).data);
  void* out = flat_view_of(information).data;
  if (dtype_of(information) == DType::float64)
    write_information(call, static_cast<double*>(out), out_counts);
  else
    write_information(call, static_cast<float*>(out), out_counts);
}

// weight (M, S, B): upstream gradient / (valid pixels * draws), float64.
void softmax_fisher_backward(Tensor weight, Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma,
                             int64_t draws, std::optional<Tensor> seed, bool detach_reference, double eps, Tensors gradients) {
  mrf::check::softmax_fisher_backward(weight, features, masks, present, sigma, draws, seed, eps, gradients);
  SoftmaxFisherCall call(features, masks, present, sigma, draws, seed, eps);
  call.write_to(gradients);
  call.problem.weight = static_cast<const double*>(flat_view_of(weight).data);
  call.problem.detach_reference = detach_reference;
  run(mrf::instruction_set().kernels->softmax_fisher_backward, call.problem, call.scratch_bytes());
}

// ---- modality_cross_entropy ----

struct ModalityCrossEntropyCall : ModalitiesCall<mrf::ModalityCrossEntropy> {
  ModalityCrossEntropyCall(const Tensors& logits, const Tensor& target, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& present, int64_t ignore_index, double label_smoothing, double eps)
      : ModalitiesCall(logits, int(logits.size()), {}, present, eps) {
    problem.target_type = mrf::integer_of(target);
    problem.target = flat_view_of(target).data;
    problem.ignore_index = ignore_index;
    problem.label_smoothing = label_smoothing;
    problem.class_weight = data_or_null<double>(weight);
    for (int64_t c = 0; c < most_channels; ++c) problem.all_weights += problem.class_weight ? problem.class_weight[c] : 1;
  }

  int64_t scratch_bytes() const { return mrf::modality_cross_entropy_scratch(problem.modalities, most_channels); }
};

// Sums `first` to `first + count - 1` of every sample.
void write_sums(const ModalityCrossEntropyCall& call, int64_t first, int64_t count, const Tensor& sums) {
  const mrf::ModalityCrossEntropy& problem = call.problem;
  const int64_t slots = mrf::slots_per_sample(call.tilings[0]), all = 2 * problem.modalities + 2;
  void* out = flat_view_of(sums).data;
  const bool wide = dtype_of(sums) == DType::float64;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t b = 0; b < problem.batch; ++b) {
      double sum = 0;
      for (int64_t slot = b * slots; slot < (b + 1) * slots; ++slot) sum += problem.partial[slot * all + first + k];
      const int64_t i = k * problem.batch + b;
      wide ? static_cast<double*>(out)[i] = sum : static_cast<float*>(out)[i] = float(sum);
    }
}

// weight (C), float64. Whether a target is out of range; there is no result then.
bool modality_cross_entropy_forward(Tensors logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> present,
                                    int64_t ignore_index, double label_smoothing, double eps, Tensor cross_entropy, Tensor joint,
                                    Tensor information, Tensor weights) {
  mrf::check::modality_cross_entropy_forward(logits, target, weight, present, label_smoothing, eps, cross_entropy, joint, information,
                                             weights);
  ModalityCrossEntropyCall call(logits, target, weight, present, ignore_index, label_smoothing, eps);
  const int64_t modalities = call.problem.modalities;
  bool out_of_range = false;
  call.keep_sums(2 * modalities + 2);
  call.problem.out_of_range = &out_of_range;
  run(mrf::instruction_set().kernels->modality_cross_entropy_forward, call.problem, call.scratch_bytes());
  if (out_of_range) return true;
  write_sums(call, 0, modalities, cross_entropy);
  write_sums(call, modalities, modalities, information);
  write_sums(call, 2 * modalities, 1, joint);
  write_sums(call, 2 * modalities + 1, 1, weights);
  return false;
}

// The upstream gradients (M, B), (B), (M, B) are float64.
void modality_cross_entropy_backward(Tensor to_cross_entropy, Tensor to_joint, Tensor to_information, Tensors logits, Tensor target,
                                     std::optional<Tensor> weight, std::optional<Tensor> present, int64_t ignore_index,
                                     double label_smoothing, double eps, Tensors gradients) {
  mrf::check::modality_cross_entropy_backward(to_cross_entropy, to_joint, to_information, logits, target, weight, present,
                                              label_smoothing, eps, gradients);
  ModalityCrossEntropyCall call(logits, target, weight, present, ignore_index, label_smoothing, eps);
  call.write_to(gradients);
  call.problem.to_cross_entropy = static_cast<const double*>(flat_view_of(to_cross_entropy).data);
  call.problem.to_joint = static_cast<const double*>(flat_view_of(to_joint).data);
  call.problem.to_information = static_cast<const double*>(flat_view_of(to_information).data);
  run(mrf::instruction_set().kernels->modality_cross_entropy_backward, call.problem, call.scratch_bytes());
}

// ---- gradient_statistics ----

struct GradientStatisticsCall {
  std::vector<Tiling> tilings;
  std::vector<View> grads, features, values;
  mrf::GradientStatistics problem{};
  int64_t scratch_bytes = 0;

  GradientStatisticsCall(const Tensors& g, const Tensors& e, const Tensors& f, const Tensors& masks, double eps)
      : grads(views_of(g)), features(views_of(e)), values(flat_views_of(f)) {
    problem.tensors = int(g.size());
    problem.batch = g[0].size(0);
    problem.units = divide(g.data(), problem.tensors, masks, e.empty() ? 1 : 2, 2048, false, tilings);
    problem.tilings = tilings.data();
    problem.grads = grads.data();
    problem.features = data_or_null(features);
    problem.values = data_or_null(values);
    problem.eps = eps;
    for (const Tiling& tiling : tilings)
      scratch_bytes = std::max<int64_t>(scratch_bytes, mrf::kGradientStatisticsRows * (tiling.tile + 64) * int64_t(sizeof(double)));
  }
};

template <class T>
void write_statistics(const mrf::GradientStatistics& problem, T* fisher, T* attribution) {
  for (int k = 0; k < problem.tensors; ++k) {
    const Tiling& tiling = problem.tilings[k];
    for (int64_t b = 0; b < problem.batch; ++b) {
      double fisher_sum = 0, square_sum = 0;
      int64_t count = 0;
      const int64_t first = tiling.first_unit + b * tiling.tiles;
      for (int64_t u = first; u < first + tiling.tiles; ++u) {
        fisher_sum += problem.partial[2 * u];
        square_sum += problem.partial[2 * u + 1];
        count += problem.valid[u];
      }
      if (problem.values) fisher[k * problem.batch + b] = T(count ? fisher_sum / double(count) : 0);
      if (problem.features) attribution[k * problem.batch + b] = T(std::sqrt(square_sum));
    }
  }
}

void gradient_statistics_forward(Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, Tensor fisher,
                                 Tensor attribution, Tensors fisher_maps, Tensors attribution_maps) {
  mrf::check::gradient_statistics_forward(grads, features, values, masks, eps, fisher, attribution, fisher_maps, attribution_maps);
  GradientStatisticsCall call(grads, features, values, masks, eps);
  std::vector<double> partial(call.problem.units * 2);
  std::vector<int64_t> valid(call.problem.units);
  const std::vector<void*> maps = pointers_of(fisher_maps), more_maps = pointers_of(attribution_maps);
  call.problem.partial = partial.data();
  call.problem.valid = valid.data();
  call.problem.fisher_maps = data_or_null(maps);
  call.problem.attribution_maps = data_or_null(more_maps);
  run(mrf::instruction_set().kernels->gradient_statistics_forward, call.problem, call.scratch_bytes);
  void *to_fisher = flat_view_of(fisher).data, *to_attribution = flat_view_of(attribution).data;
  if (dtype_of(fisher) == DType::float64)
    write_statistics(call.problem, static_cast<double*>(to_fisher), static_cast<double*>(to_attribution));
  else
    write_statistics(call.problem, static_cast<float*>(to_fisher), static_cast<float*>(to_attribution));
}

// fisher_weight, attribution_weight (K, B), float64: upstream gradient / valid pixels, and upstream gradient / (2 attribution).
void gradient_statistics_backward(Tensor fisher_weight, Tensor attribution_weight, Tensors fisher_map_grads, Tensors attribution_map_grads,
                                  Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, Tensors to_grads,
                                  Tensors to_features, Tensors to_values) {
  mrf::check::gradient_statistics_backward(fisher_weight, attribution_weight, fisher_map_grads, attribution_map_grads, grads, features, values,
                                           masks, eps, to_grads, to_features, to_values);
  GradientStatisticsCall call(grads, features, values, masks, eps);
  const std::vector<View> dg = views_of(to_grads), de = views_of(to_features), df = flat_views_of(to_values);
  const std::vector<void*> maps = pointers_of(fisher_map_grads), more_maps = pointers_of(attribution_map_grads);
  call.problem.fisher_weight = static_cast<const double*>(flat_view_of(fisher_weight).data);
  call.problem.attribution_weight = static_cast<const double*>(flat_view_of(attribution_weight).data);
  call.problem.fisher_map_grads = data_or_null(maps);
  call.problem.attribution_map_grads = data_or_null(more_maps);
  call.problem.to_grads = dg.data();
  call.problem.to_features = data_or_null(de);
  call.problem.to_values = data_or_null(df);
  populate(to_grads);
  populate(to_features);
  run(mrf::instruction_set().kernels->gradient_statistics_backward, call.problem, call.scratch_bytes);
}

std::string cpu_instruction_set() { return mrf::instruction_set().name; }

}  // namespace

STABLE_TORCH_LIBRARY(modreg_fast_native, m) {
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
  m.def("cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_native, CPU, m) {
  m.impl("softmax_fisher_forward", TORCH_BOX(&softmax_fisher_forward));
  m.impl("softmax_fisher_backward", TORCH_BOX(&softmax_fisher_backward));
  m.impl("modality_cross_entropy_forward", TORCH_BOX(&modality_cross_entropy_forward));
  m.impl("modality_cross_entropy_backward", TORCH_BOX(&modality_cross_entropy_backward));
  m.impl("gradient_statistics_forward", TORCH_BOX(&gradient_statistics_forward));
  m.impl("gradient_statistics_backward", TORCH_BOX(&gradient_statistics_backward));
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}

// `import modreg_fast._native` loads the library, which registers the ops.
PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

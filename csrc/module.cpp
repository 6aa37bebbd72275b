// Registration of the raw ops modreg_fast_native::* on LibTorch's stable ABI.
//
// The ops take a problem of backends/reference as it is, of any shape and layout, give new tensors, and have no autograd of their own.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/call.h"
#include "cpu/dispatch.h"

namespace mrf {
namespace {

// ---- the ops over modalities ----

template <class Problem>
struct ModalitiesCall {
  Inputs inputs;
  const std::optional<Tensor> present;
  std::vector<Tiling> tilings;
  std::vector<View> features, gradients;
  std::vector<double> partial;
  Problem problem{};
  int64_t most_channels = 0;

  ModalitiesCall(const Tensors& tensors, int64_t channel_dim, const std::optional<Tensor>& given_present)
      : inputs(tensors, channel_dim, tensors, "features"), present(contiguous(given_present, inputs.elements, "present")) {}

  // After the checks.
  void divide(int modalities, const Tensors& masks, double eps) {
    STD_TORCH_CHECK(modalities <= kMaxModalities, "modreg_fast_native: at most 64 modalities");
    problem.modalities = modalities;
    problem.scales = int(inputs.flats.size()) / modalities;
    problem.units = units_of(inputs.flats.data(), problem.scales, masks, modalities, kMostPixels, !present.has_value(), tilings);
    problem.neighbours = std::clamp<int64_t>(problem.units / (16 * torch::stable::get_num_threads()), 1, 4);
    problem.batch = inputs.flats[0].batch;
    problem.tilings = tilings.data();
    features = folded(inputs.views());
    problem.features = features.data();
    problem.present = data_or_null<uint8_t>(present);
    problem.eps = eps;
    for (const Tiling& tiling : tilings) most_channels = std::max(most_channels, tiling.channels);
  }

  void allocate_gradients() {
    gradients = folded(inputs.gradient_views());
    problem.gradients = gradients.data();
  }

  Tensors finished() {
    Tensors results;
    inputs.finish(results);
    return results;
  }

  // Room for `sums` numbers a slot.
  void keep_sums(int64_t sums) {
    partial.resize(slots() * sums);
    problem.partial = partial.data();
  }

  int64_t slots() const { return tilings.back().first_slot + problem.batch * slots_per_sample(tilings.back()); }

 private:
  // Steps from sample to sample where samples are computed as pixels.
  std::vector<View> folded(std::vector<View> views) const {
    for (size_t k = 0; k < views.size(); ++k)
      if (tilings[k % tilings.size()].samples_as_pixels) views[k].pixel_stride = views[k].sample_stride;
    return views;
  }
};

// ---- softmax_fisher ----

struct SoftmaxFisherCall : ModalitiesCall<SoftmaxFisher> {
  const Tensors masks;
  const std::vector<double>& sigma;

  SoftmaxFisherCall(const Tensors& tensors, const Tensors& given_masks, const std::optional<Tensor>& present,
                    const std::vector<double>& sigma, int64_t samples, const std::optional<Tensor>& seed, bool detach_reference, double eps,
                    int64_t channel_dim)
      : ModalitiesCall(tensors, channel_dim, present), masks(contiguous(given_masks, inputs.elements, "masks")), sigma(sigma) {
    check::softmax_fisher(inputs.flats, masks, this->present, sigma, samples, seed, eps);
    divide(int(sigma.size()), masks, eps);
    problem.draws = int(samples);
    problem.sigma = sigma.data();
    problem.seed = seed.has_value() ? *data_or_null<uint64_t>(seed) : 0;
    problem.detach_reference = detach_reference;
  }

  int64_t scratch_bytes() const { return softmax_fisher_scratch(problem.modalities, most_channels); }
};

std::tuple<Tensor, Tensor> softmax_fisher_forward(Tensors features, Tensors masks, std::optional<Tensor> present, std::vector<double> sigma,
                                                  int64_t samples, std::optional<Tensor> seed, bool detach_reference, double eps,
                                                  int64_t channel_dim) {
  SoftmaxFisherCall call(features, masks, present, sigma, samples, seed, detach_reference, eps, channel_dim);
  SoftmaxFisher& problem = call.problem;
  std::vector<int64_t> valid(call.slots());
  call.keep_sums(problem.modalities);
  problem.valid = valid.data();
  run(instruction_set().kernels->softmax_fisher_forward, problem, call.scratch_bytes());

  const Tensor information = empty({problem.modalities, problem.scales, problem.batch}, widest(features));
  const Tensor counts = empty({problem.scales, problem.batch}, ScalarType::Long);
  int64_t* count = static_cast<int64_t*>(counts.data_ptr());
  const auto first_slot = [&](int64_t s, int64_t b) { return call.tilings[s].first_slot + b * slots_per_sample(call.tilings[s]); };
  for (int64_t s = 0, i = 0; s < problem.scales; ++s)
    for (int64_t b = 0; b < problem.batch; ++b, ++i) {
      const int64_t* first = valid.data() + first_slot(s, b);
      count[i] = std::accumulate(first, first + slots_per_sample(call.tilings[s]), int64_t(0));
    }
  const int64_t each = problem.scales * problem.batch;
  fill(information, [&](int64_t i) {
    const int64_t m = i / each, s = i % each / problem.batch, first = first_slot(s, i % problem.batch);
    double sum = 0;
    for (int64_t slot = first; slot < first + slots_per_sample(call.tilings[s]); ++slot)
      sum += problem.partial[slot * problem.modalities + m];
    return count[i % each] ? sum / (double(count[i % each]) * problem.draws) : 0;
  });
  return {information, counts};
}

Tensors softmax_fisher_backward(Tensor grad_information, Tensor counts, Tensors features, Tensors masks, std::optional<Tensor> present,
                                std::vector<double> sigma, int64_t samples, std::optional<Tensor> seed, bool detach_reference, double eps,
                                int64_t channel_dim) {
  SoftmaxFisherCall call(features, masks, present, sigma, samples, seed, detach_reference, eps, channel_dim);
  SoftmaxFisher& problem = call.problem;
  check::flat(counts, features[0], ScalarType::Long, {problem.scales, problem.batch}, "counts");
  // The weight of I of a valid pixel and a draw.
  std::vector<double> weight = doubles_of(grad_information, {problem.modalities, problem.scales, problem.batch}, "grad_information");
  const int64_t* count = static_cast<const int64_t*>(counts.data_ptr());
  for (size_t i = 0; i < weight.size(); ++i)
    weight[i] /= double(std::max<int64_t>(count[i % (problem.scales * problem.batch)], 1)) * double(samples);
  problem.weight = weight.data();
  call.allocate_gradients();
  run(instruction_set().kernels->softmax_fisher_backward, problem, call.scratch_bytes());
  return call.finished();
}

// ---- modality_cross_entropy ----

struct ModalityCrossEntropyCall : ModalitiesCall<ModalityCrossEntropy> {
  const Tensor target;
  const std::optional<Tensor> weight;

  ModalityCrossEntropyCall(const Tensors& logits, const Tensor& given_target, const std::optional<Tensor>& given_weight,
                           const std::optional<Tensor>& present, int64_t ignore_index, double label_smoothing, double eps,
                           int64_t channel_dim)
      : ModalitiesCall(logits, channel_dim, present), target(contiguous(given_target, inputs.elements, "target")),
        weight(contiguous(given_weight, inputs.elements, "weight", ScalarType::Double)) {
    check::modality_cross_entropy(inputs.flats, target, weight, this->present, label_smoothing, eps);
    divide(int(logits.size()), {}, eps);
    problem.target_type = integer_of(target);
    problem.target = target.data_ptr();
    problem.ignore_index = ignore_index;
    problem.label_smoothing = label_smoothing;
    problem.class_weight = data_or_null<double>(weight);
    for (int64_t c = 0; c < most_channels; ++c) problem.all_weights += problem.class_weight ? problem.class_weight[c] : 1;
  }

  int64_t scratch_bytes() const { return modality_cross_entropy_scratch(problem.modalities, most_channels); }

  // Sums `first` and those after it of every sample, one for each of the first dimension of `to` where it has two.
  void write_sums(int64_t first, const Tensor& to) const {
    const int64_t slots = slots_per_sample(tilings[0]), all = 2 * problem.modalities + 2;
    fill(to, [&](int64_t i) {
      const int64_t k = first + i / problem.batch, b = i % problem.batch;
      double sum = 0;
      for (int64_t slot = b * slots; slot < (b + 1) * slots; ++slot) sum += problem.partial[slot * all + k];
      return sum;
    });
  }
};

// The sums; and whether a target is out of range, where there are none.
std::tuple<Tensor, Tensor, Tensor, Tensor, bool> modality_cross_entropy_forward(Tensors logits, Tensor target, std::optional<Tensor> weight,
                                                                               std::optional<Tensor> present, int64_t ignore_index,
                                                                               double label_smoothing, double eps, int64_t channel_dim) {
  ModalityCrossEntropyCall call(logits, target, weight, present, ignore_index, label_smoothing, eps, channel_dim);
  const int64_t modalities = call.problem.modalities, batch = call.problem.batch;
  bool out_of_range = false;
  call.keep_sums(2 * modalities + 2);
  call.problem.out_of_range = &out_of_range;
  run(instruction_set().kernels->modality_cross_entropy_forward, call.problem, call.scratch_bytes());
  const ScalarType type = widest(logits);
  const Tensor cross_entropy = empty({modalities, batch}, type), joint = empty({batch}, type);
  const Tensor information = empty({modalities, batch}, type), weights = empty({batch}, type);
  call.write_sums(0, cross_entropy);
  call.write_sums(modalities, information);
  call.write_sums(2 * modalities, joint);
  call.write_sums(2 * modalities + 1, weights);
  return {cross_entropy, joint, information, weights, out_of_range};
}

Tensors modality_cross_entropy_backward(Tensor grad_cross_entropy, Tensor grad_joint, Tensor grad_information, Tensors logits, Tensor target,
                                        std::optional<Tensor> weight, std::optional<Tensor> present, int64_t ignore_index,
                                        double label_smoothing, double eps, int64_t channel_dim) {
  ModalityCrossEntropyCall call(logits, target, weight, present, ignore_index, label_smoothing, eps, channel_dim);
  const int64_t modalities = call.problem.modalities, batch = call.problem.batch;
  const std::vector<double> to_cross_entropy = doubles_of(grad_cross_entropy, {modalities, batch}, "grad_cross_entropy");
  const std::vector<double> to_joint = doubles_of(grad_joint, {batch}, "grad_joint");
  const std::vector<double> to_information = doubles_of(grad_information, {modalities, batch}, "grad_information");
  call.problem.to_cross_entropy = to_cross_entropy.data();
  call.problem.to_joint = to_joint.data();
  call.problem.to_information = to_information.data();
  call.allocate_gradients();
  run(instruction_set().kernels->modality_cross_entropy_backward, call.problem, call.scratch_bytes());
  return call.finished();
}

// ---- gradient_statistics ----

struct GradientStatisticsCall {
  Inputs g, e;
  const Tensors values, masks;
  std::vector<Tiling> tilings;
  std::vector<View> grads, features, value_views;
  GradientStatistics problem{};
  ScalarType type;  // of the results
  int64_t scratch_bytes = 0;

  GradientStatisticsCall(const Tensors& given_grads, const Tensors& given_features, const Tensors& given_values, const Tensors& given_masks,
                         double eps, int64_t channel_dim)
      : g(given_grads, channel_dim, given_grads, "grads"), e(given_features, channel_dim, given_grads, "features", &g.flats),
        values(accumulated(given_values, "values")), masks(contiguous(given_masks, g.elements, "masks")), grads(g.views()), features(e.views()),
        value_views(flat_views_of(values)) {
    check::gradient_statistics(g.flats, e.flats, values, masks, eps);
    type = widest(given_grads);
    for (const Tensors& more : {given_features, given_values})
      if (widest(more) == ScalarType::Double) type = ScalarType::Double;
    problem.tensors = int(grads.size());
    problem.batch = g.flats[0].batch;
    problem.units = units_of(g.flats.data(), problem.tensors, masks, features.empty() ? 1 : 2, 2048, false, tilings);
    problem.tilings = tilings.data();
    problem.grads = grads.data();
    problem.features = data_or_null(features);
    problem.values = data_or_null(value_views);
    problem.eps = eps;
    for (const Tiling& tiling : tilings)
      scratch_bytes = std::max<int64_t>(scratch_bytes, kGradientStatisticsRows * (tiling.tile + 64) * int64_t(sizeof(double)));
  }

  // Of maps in the accumulation types of their tensors.
  Tensors accumulated(const Tensors& maps, const char* name) const {
    Tensors found;
    for (size_t k = 0; k < maps.size() && k < g.flats.size(); ++k)
      found.push_back(contiguous(maps[k], g.elements, name, check::accumulation_type(g.flats[k].type)));
    that(found.size() == maps.size(), name, "at most as many as grads");
    return found;
  }

  Tensors empty_maps(bool wanted) const {
    Tensors maps;
    for (size_t k = 0; wanted && k < g.flats.size(); ++k)
      maps.push_back(empty({problem.batch, g.flats[k].pixels}, check::accumulation_type(g.flats[k].type)));
    return maps;
  }
};

std::tuple<Tensor, Tensor, Tensors, Tensors> gradient_statistics_forward(Tensors grads, Tensors features, Tensors values, Tensors masks,
                                                                         double eps, bool maps, int64_t channel_dim) {
  GradientStatisticsCall call(grads, features, values, masks, eps, channel_dim);
  GradientStatistics& problem = call.problem;
  std::vector<double> partial(problem.units * 2);
  std::vector<int64_t> valid(problem.units);
  Tensors fisher_maps = call.empty_maps(maps && !values.empty()), attribution_maps = call.empty_maps(maps && !features.empty());
  const std::vector<void*> to_fisher = pointers_of(fisher_maps), to_attribution = pointers_of(attribution_maps);
  problem.partial = partial.data();
  problem.valid = valid.data();
  problem.fisher_maps = data_or_null(to_fisher);
  problem.attribution_maps = data_or_null(to_attribution);
  run(instruction_set().kernels->gradient_statistics_forward, problem, call.scratch_bytes);

  const Tensor fisher = empty({int64_t(values.size()), problem.batch}, call.type);
  const Tensor attribution = empty({int64_t(features.size()), problem.batch}, call.type);
  const auto sum = [&](int64_t i, const auto& of_unit) {  // over the units of element i of (K, B)
    const Tiling& tiling = problem.tilings[i / problem.batch];
    const int64_t first = tiling.first_unit + i % problem.batch * tiling.tiles;
    decltype(of_unit(0)) total = 0;
    for (int64_t u = first; u < first + tiling.tiles; ++u) total += of_unit(u);
    return total;
  };
  fill(fisher, [&](int64_t i) {
    const int64_t count = sum(i, [&](int64_t u) { return valid[u]; });
    return count ? sum(i, [&](int64_t u) { return partial[2 * u]; }) / double(count) : 0;
  });
  fill(attribution, [&](int64_t i) { return std::sqrt(sum(i, [&](int64_t u) { return partial[2 * u + 1]; })); });
  for (Tensors* all : {&fisher_maps, &attribution_maps})
    for (Tensor& map : *all) map = contiguous(map, map.numel(), "a map", call.type);
  return {fisher, attribution, fisher_maps, attribution_maps};
}

Tensors gradient_statistics_backward(Tensor grad_fisher, Tensor grad_attribution, Tensors grad_fisher_maps, Tensors grad_attribution_maps,
                                     Tensor attribution, Tensors grads, Tensors features, Tensors values, Tensors masks, double eps, bool,
                                     int64_t channel_dim) {
  GradientStatisticsCall call(grads, features, values, masks, eps, channel_dim);
  GradientStatistics& problem = call.problem;
  const int64_t batch = problem.batch;
  // The weights of fisher_map and of sum_c (g e)^2: upstream gradient / valid pixels, and upstream gradient / (2 attribution).
  std::vector<double> fisher_weight = doubles_of(grad_fisher, {int64_t(values.size()), batch}, "grad_fisher");
  for (size_t i = 0; i < fisher_weight.size(); ++i) {
    const Tiling& tiling = problem.tilings[i / batch];
    const uint8_t* mask = tiling.mask ? tiling.mask + i % batch * tiling.pixels : nullptr;
    fisher_weight[i] /= double(mask ? std::max<int64_t>(std::accumulate(mask, mask + tiling.pixels, int64_t(0)), 1) : tiling.pixels);
  }
  std::vector<double> attribution_weight = doubles_of(grad_attribution, {int64_t(features.size()), batch}, "grad_attribution");
  const std::vector<double> roots = doubles_of(attribution, {int64_t(features.size()), batch}, "attribution");
  for (size_t i = 0; i < roots.size(); ++i) attribution_weight[i] = roots[i] == 0 ? 0 : attribution_weight[i] / (2 * roots[i]);
  const Tensors map_grads = call.accumulated(grad_fisher_maps, "grad_fisher_maps");
  const Tensors more_map_grads = call.accumulated(grad_attribution_maps, "grad_attribution_maps");
  check::maps(map_grads, call.g.flats, !values.empty(), "grad_fisher_maps");
  check::maps(more_map_grads, call.g.flats, !features.empty(), "grad_attribution_maps");
  const std::vector<void*> from_fisher = pointers_of(map_grads), from_attribution = pointers_of(more_map_grads);
  const std::vector<View> to_grads = call.g.gradient_views(), to_features = call.e.gradient_views();
  Tensors written, results;
  for (const Tensor& x : call.values) written.push_back(empty_strided(x, x.strides().data()));
  const std::vector<View> to_values = flat_views_of(written);
  problem.fisher_weight = fisher_weight.data();
  problem.attribution_weight = attribution_weight.data();
  problem.fisher_map_grads = data_or_null(from_fisher);
  problem.attribution_map_grads = data_or_null(from_attribution);
  problem.to_grads = to_grads.data();
  problem.to_features = data_or_null(to_features);
  problem.to_values = data_or_null(to_values);
  run(instruction_set().kernels->gradient_statistics_backward, problem, call.scratch_bytes);
  call.g.finish(results);
  call.e.finish(results);
  for (size_t k = 0; k < values.size(); ++k) {
    Tensor& result = results.emplace_back(written[k]);
    if (values[k].get() == call.values[k].get()) continue;  // it was read as it is
    result = torch::stable::empty_like(values[k]);
    torch::stable::copy_(result, written[k]);
  }
  return results;
}

// ---- the balance penalty ----

// Of (M, S, B): scale times the sum over m and s of 1 / mean or -log mean, mean = mean_b I + eps, and its derivative by each I_msb, (M, S).
std::tuple<Tensor, Tensor> balance_penalty(Tensor information, bool logarithm, double eps, double scale) {
  that(information.dim() == 3 && information.numel() > 0, "information", "a non-empty tensor (M, S, B)");
  const int64_t modalities = information.size(0), scales = information.size(1), batch = information.size(2);
  const std::vector<double> all = doubles_of(information, {modalities, scales, batch}, "information");
  const Tensor penalty = empty({}, information.scalar_type()), slope = empty({modalities, scales}, information.scalar_type());
  double total = 0;
  fill(slope, [&](int64_t i) {
    const double mean = std::accumulate(all.begin() + i * batch, all.begin() + (i + 1) * batch, 0.0) / double(batch) + eps;
    total += logarithm ? -std::log(mean) : 1 / mean;
    return -scale / double(batch) / (logarithm ? mean : mean * mean);
  });
  fill(penalty, [&](int64_t) { return scale * total; });
  return {penalty, slope};
}

std::string cpu_instruction_set() { return instruction_set().name; }

}  // namespace
}  // namespace mrf

STABLE_TORCH_LIBRARY(modreg_fast_native, m) {
  const std::string fisher =
      "Tensor[] features, Tensor[] masks, Tensor? present, float[] sigma, int samples, Tensor? seed, bool detach_reference, float eps, "
      "int channel_dim)";
  const std::string entropy =
      "Tensor[] logits, Tensor target, Tensor? weight, Tensor? present, int ignore_index, float label_smoothing, float eps, int channel_dim)";
  const std::string statistics =
      "Tensor[] grads, Tensor[] features, Tensor[] values, Tensor[] masks, float eps, bool maps, int channel_dim)";
  m.def(("softmax_fisher_forward(" + fisher + " -> (Tensor, Tensor)").c_str());
  m.def(("softmax_fisher_backward(Tensor grad_information, Tensor counts, " + fisher + " -> Tensor[]").c_str());
  m.def(("modality_cross_entropy_forward(" + entropy + " -> (Tensor, Tensor, Tensor, Tensor, bool out_of_range)").c_str());
  m.def(("modality_cross_entropy_backward(Tensor grad_cross_entropy, Tensor grad_joint, Tensor grad_information, " + entropy + " -> Tensor[]")
            .c_str());
  m.def(("gradient_statistics_forward(" + statistics + " -> (Tensor, Tensor, Tensor[], Tensor[])").c_str());
  m.def(("gradient_statistics_backward(Tensor grad_fisher, Tensor grad_attribution, Tensor[] grad_fisher_maps, "
         "Tensor[] grad_attribution_maps, Tensor attribution, " +
         statistics + " -> Tensor[]")
            .c_str());
  m.def("balance_penalty(Tensor information, bool logarithm, float eps, float scale) -> (Tensor, Tensor)");
  m.def("cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_native, CPU, m) {
  m.impl("softmax_fisher_forward", TORCH_BOX(&mrf::softmax_fisher_forward));
  m.impl("softmax_fisher_backward", TORCH_BOX(&mrf::softmax_fisher_backward));
  m.impl("modality_cross_entropy_forward", TORCH_BOX(&mrf::modality_cross_entropy_forward));
  m.impl("modality_cross_entropy_backward", TORCH_BOX(&mrf::modality_cross_entropy_backward));
  m.impl("gradient_statistics_forward", TORCH_BOX(&mrf::gradient_statistics_forward));
  m.impl("gradient_statistics_backward", TORCH_BOX(&mrf::gradient_statistics_backward));
  m.impl("balance_penalty", TORCH_BOX(&mrf::balance_penalty));
}

STABLE_TORCH_LIBRARY_IMPL(modreg_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&mrf::cpu_instruction_set));
}

// `import modreg_fast._native` loads the library, which registers the ops.
PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

// Development harness: hands the inner functions of every instruction set that this processor has to NumPy, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "inner.h"

namespace py = pybind11;

namespace mrf {
#if defined(__x86_64__)
namespace avx512 { extern const Inner inner; }
namespace avx2 { extern const Inner inner; }
#endif
namespace baseline { extern const Inner inner; }
}  // namespace mrf

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

const std::map<std::string, const mrf::Inner*>& instruction_sets() {
  static const auto sets = [] {
    std::map<std::string, const mrf::Inner*> all{{"baseline", &mrf::baseline::inner}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) all["avx2"] = &mrf::avx2::inner;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      all["avx512"] = &mrf::avx512::inner;
#endif
    return all;
  }();
  return sets;
}

std::vector<std::string> names() {
  std::vector<std::string> result;
  for (const auto& [name, inner] : instruction_sets()) result.push_back(name);
  return result;
}

// Copies x to a multiple of 64 elements, calls f(padded, results, n) and returns `count` results of x's length.
template <class In, class Out, class F>
std::vector<py::array_t<Out>> padded(const Array<In>& x, int count, F f) {
  const int64_t size = x.size(), n = (size + 63) / 64 * 64;
  std::vector<In> in(n);
  std::vector<Out> out(n * count);
  std::memcpy(in.data(), x.data(), size * sizeof(In));
  f(in.data(), out.data(), n);
  std::vector<py::array_t<Out>> results;
  for (int i = 0; i < count; ++i) results.emplace_back(size, out.data() + i * n);
  return results;
}

template <class In, class Out, class Member>
auto unary(Member member) {
  return [member](const std::string& isa, const Array<In>& x) {
    return padded<In, Out>(x, 1, [&](const In* in, Out* out, int64_t n) { (instruction_sets().at(isa)->*member)(in, out, n); })[0];
  };
}

template <class T, class Member>
auto sincos(Member member) {
  return [member](const std::string& isa, const Array<T>& x) {
    return padded<T, T>(x, 2, [&](const T* in, T* out, int64_t n) { (instruction_sets().at(isa)->*member)(in, out, out + n, n); });
  };
}

// counters (4, n) with n a multiple of 64 -> words (4, n).
Array<uint32_t> philox(const std::string& isa, const Array<uint32_t>& counters, uint32_t key0, uint32_t key1) {
  if (counters.ndim() != 2 || counters.shape(0) != 4 || counters.shape(1) % 64) throw py::value_error("counters must be (4, 64 k)");
  Array<uint32_t> words({counters.shape(0), counters.shape(1)});
  instruction_sets().at(isa)->philox(counters.data(), words.mutable_data(), key0, key1, counters.shape(1));
  return words;
}

// The kernel on features (M, B, C, P) with one unit a sample: information (M, B), summed over pixels, and with a weight (M, B) the
// gradients (M, B, C, P).
template <class T>
py::tuple softmax_fisher(const std::string& isa, const Array<T>& features, const Array<double>& weight, double eps) {
  const int64_t modalities = features.shape(0), batch = features.shape(1), channels = features.shape(2), pixels = features.shape(3);
  if (pixels > mrf::kMostPixels) throw py::value_error("more pixels than a unit holds");
  const auto dtype = sizeof(T) == 8 ? mrf::DType::float64 : mrf::DType::float32;
  const mrf::Tiling tiling{dtype, channels, pixels, pixels, 1, 0, nullptr};
  Array<T> gradients({modalities, batch, channels, pixels});
  std::vector<mrf::View> in, out;
  for (int64_t m = 0; m < modalities; ++m) {
    const int64_t offset = m * batch * channels * pixels;
    in.push_back({const_cast<T*>(features.data()) + offset, channels * pixels, pixels, 1});
    out.push_back({gradients.mutable_data() + offset, channels * pixels, pixels, 1});
  }
  Array<double> partial({batch, modalities});
  std::vector<int64_t> valid(batch);
  const std::vector<double> sigma(modalities, 0.0);
  mrf::SoftmaxFisher problem{};
  problem.modalities = int(modalities);
  problem.scales = problem.draws = 1;
  problem.batch = problem.units = batch;
  problem.neighbours = 1;
  problem.tilings = &tiling;
  problem.features = in.data();
  problem.gradients = out.data();
  problem.sigma = sigma.data();
  problem.eps = eps;
  problem.weight = weight.data();
  problem.partial = partial.mutable_data();
  problem.valid = valid.data();
  std::vector<char> memory(mrf::softmax_fisher_scratch(modalities, channels) + 64);
  void* scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  int64_t counter = 0;
  instruction_sets().at(isa)->softmax_fisher_forward(problem, &counter, scratch);
  counter = 0;
  instruction_sets().at(isa)->softmax_fisher_backward(problem, &counter, scratch);
  return py::make_tuple(partial, gradients);
}

}  // namespace

PYBIND11_MODULE(_native_harness, m) {
  using mrf::Inner;
  m.doc() = "Inner functions of the native CPU kernels, for tests.";
  m.def("instruction_sets", &names);
  m.def("exp2", unary<float, float>(&Inner::exp2_float));
  m.def("exp2_double", unary<double, double>(&Inner::exp2_double));
  m.def("log", unary<float, float>(&Inner::log_float));
  m.def("log_double", unary<double, double>(&Inner::log_double));
  m.def("sincos_turns", sincos<float>(&Inner::sincos_turns_float));
  m.def("sincos_turns_double", sincos<double>(&Inner::sincos_turns_double));
  m.def("philox", &philox);
  m.def("widen_bfloat16", unary<uint16_t, float>(&Inner::widen_bfloat16));
  m.def("narrow_bfloat16", unary<float, uint16_t>(&Inner::narrow_bfloat16));
  m.def("widen_float16", unary<uint16_t, float>(&Inner::widen_float16));
  m.def("narrow_float16", unary<float, uint16_t>(&Inner::narrow_float16));
  m.def("softmax_fisher", &softmax_fisher<float>);
  m.def("softmax_fisher_double", &softmax_fisher<double>);
}

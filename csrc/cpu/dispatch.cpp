#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#define MRF_DECLARE(isa)                                                                                   \
  namespace isa {                                                                                          \
  extern const Kernel<SoftmaxFisher> softmax_fisher_forward, softmax_fisher_backward;                      \
  extern const Kernel<ModalityCrossEntropy> modality_cross_entropy_forward, modality_cross_entropy_backward; \
  extern const Kernel<GradientStatistics> gradient_statistics_forward, gradient_statistics_backward;       \
  static const Kernels& kernels() {                                                                        \
    static const Kernels all{softmax_fisher_forward,         softmax_fisher_backward,                      \
                             modality_cross_entropy_forward, modality_cross_entropy_backward,              \
                             gradient_statistics_forward,    gradient_statistics_backward};                \
    return all;                                                                                            \
  }                                                                                                        \
  }

namespace mrf {

#if defined(__x86_64__)
MRF_DECLARE(avx512)
MRF_DECLARE(avx2)
#endif
MRF_DECLARE(baseline)

const InstructionSet& instruction_set() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512",
       [] {
         return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl"));
       },
       &avx512::kernels()},
      {"avx2", [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")); },
       &avx2::kernels()},
#endif
      {"baseline", [] { return true; }, &baseline::kernels()},
  };
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    const char* wanted = std::getenv("MODREG_FAST_INSTRUCTION_SET");
    const InstructionSet* best = nullptr;
    for (const InstructionSet& set : sets) {
      if (!set.supported()) continue;
      if (wanted && !std::strcmp(wanted, set.name)) return set;
      if (!best) best = &set;
    }
    return *best;
  }();
  return chosen;
}

}  // namespace mrf

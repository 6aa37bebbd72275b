// The kernels of the best instruction set that this processor has.
#pragma once

#include "../problem.h"

namespace mrf {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// MODREG_FAST_INSTRUCTION_SET (a name: "avx512", "avx2" or "baseline") asks for a lower one, for tests and comparisons; ignored where the
// processor lacks it.
const InstructionSet& instruction_set();

}  // namespace mrf
